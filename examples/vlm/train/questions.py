"""Questions about a scene and their true answers, as token ids.

kind   about       answer
desc   –           colour shape row column of every object, in the order of colours
where  a colour    row column
shape  a colour    shape
An absent object is answered with "none". Every answer ends with <eos>, every question with <ans>.
"""
import chatter
from vocabulary import ANSWER, COLOURS, EOS, ID, SHAPES, encode

KINDS = ["desc", "where", "shape"]

_TEMPLATES = {
    "desc": ["describe all objects in the image .", "please describe the image .", "tell me what you see ."],
    "where": [
        "where is the {colour} object ?",
        "please find the {colour} object .",
        "can you see where the {colour} object is ?",
    ],
    "shape": [
        "what shape is the {colour} object ?",
        "tell me the shape is {colour} .",  # not good English; the published weights and prompts have it so
        "please look and tell me what shape is {colour} ?",
    ],
}


def question(rng, kind, colour):
    """The bare question: 4 to 11 tokens, <ans> included."""
    templates = _TEMPLATES[kind]
    template = templates[rng.integers(len(templates))]
    return encode(template.format(colour=COLOURS[colour])) + [ANSWER]


def first_turn(rng, kind, colour, scale=1.0, plain_share=0.15):
    """A question as applications send it: [preamble] question [instructions] <ans>.

    `scale` below 1 shortens what stands around the question (a curriculum), 0 leaves the bare question; so does
    chance, for `plain_share` of the prompts.
    """
    bare = question(rng, kind, colour)
    if scale <= 0 or rng.random() < plain_share:
        return bare
    before = encode(chatter.preamble(rng, chatter.LONGEST_PREAMBLE * scale))
    after = encode(chatter.suffix(rng, kind, scale))
    return before + bare[:-1] + after + [ANSWER]


def answer(kind, scene, colour):
    if kind == "desc":
        words = [word for thing in scene for word in words_of(thing)]
    else:
        found = [words_of(thing) for thing in scene if thing.colour == colour]
        wanted = {"where": slice(2, 4), "shape": slice(1, 2)}[kind]
        words = found[0][wanted] if found else ["none"]
    return encode(words) + [EOS]


def words_of(thing):
    return [COLOURS[thing.colour], SHAPES[thing.shape], f"row{thing.row}", f"col{thing.column}"]


def pick_colour(rng, scene):
    """What a training question asks about: nearly always something that is there."""
    if rng.random() < 0.95:
        return scene[rng.integers(len(scene))].colour
    return int(rng.integers(len(COLOURS)))
