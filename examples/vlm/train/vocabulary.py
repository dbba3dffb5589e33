"""The words of the model: an id is a word's place in VOCABULARY (188 words, also in ../data/vocab.json)."""
import chatter

COLOURS = ["red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white"]
SHAPES = ["square", "circle", "triangle", "plus", "ring"]
CELLS = 6  # the scene is a board of 6 x 6 cells, so there are the words row0..row5 and col0..col5

_FRAME = (
    "<pad> <bos> <eos> <ans> please list every object in the image . describe all objects where is what shape at "
    "how many are there tell me look and find can you see show now ? none"
).split()
_NUMBERS = [f"n{i}" for i in range(9)]  # for counting questions, which the published model was not trained on

_core = (
    _FRAME + COLOURS + SHAPES + [f"row{i}" for i in range(CELLS)] + [f"col{i}" for i in range(CELLS)] + _NUMBERS
)
VOCABULARY = _core + sorted(chatter.words() - set(_core))

ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, ANSWER = (ID[word] for word in ("<pad>", "<bos>", "<eos>", "<ans>"))


def encode(words):
    """A sentence, or a list of words -> token ids."""
    return [ID[word] for word in (words.split() if isinstance(words, str) else words)]


def decode(ids):
    return " ".join(VOCABULARY[i] for i in ids)
