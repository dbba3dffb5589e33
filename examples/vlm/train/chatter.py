"""The text around a question: what people and applications write before and after it.

A template is a sentence with choices: "{a|b}" becomes a or b, and a branch may be empty. Sentences are drawn without
repetition, so a prompt reads like one that somebody pasted together, and its length varies.
"""
import re

PREAMBLES = [
    "you are a {helpful|careful|friendly} {assistant|guide} .",
    "hello , i have a {short|simple|quick} question for you .",
    "hello {again|there} , i hope you are well today .",
    "this is a {picture|photo} {that i took today|from my phone|from my camera|of a small board} .",
    "i {took|found|made} this {picture|photo} for my {work|class|game} .",
    "my friend and i need your help with this {picture|photo|image} .",
    "the {picture|photo|image} may be a {little|bit} dark and noisy .",
    "{first|now} look at the whole {picture|image} with care .",
    "there are a few small things on the board .",
    "take your time and look at every part of the image .",
]
INSTRUCTIONS = [
    "answer with {short|simple|plain} words {only|and nothing else} .",
    "do not {explain|repeat} your answer .",
    "do not {repeat|change} the question .",
    "{please|} be {brief|precise|careful} and {correct|polite} .",
    "thank you {very much|for your help|and have a good day|} .",
    "if there is no such thing , say none .",
    "use only the words that you know .",
    "this is {very|} important for my {work|class|game} .",
    "check your answer {twice|again} before you write it .",
    "{please|} keep the answer {on one line|as short as you can} .",
    "no extra {text|words|comments} please .",
    "i {only|just} need the answer .",
    "do not write a long story about the {picture|photo|image} .",
]
POSITION_INSTRUCTIONS = [
    "write the row first and then the column .",
    "count rows from the top and columns from the left .",
    "say the row and the column for me .",
]
SHAPE_INSTRUCTIONS = ["give the name of the shape in one word .", "one word is enough for me ."]
DESCRIPTION_INSTRUCTIONS = [
    "give the color , then the shape , then the row and the column .",
    "write them one after the other .",
    "do not forget any object .",
]
FITTING = {  # instructions that only make sense for one kind of question
    "where": POSITION_INSTRUCTIONS,
    "shape": SHAPE_INSTRUCTIONS,
    "desc": DESCRIPTION_INSTRUCTIONS + POSITION_INSTRUCTIONS[:2],
}

LONGEST_PREAMBLE = 24  # tokens
LONGEST_SUFFIX = 32


def words():
    """Every word that any template can produce."""
    templates = PREAMBLES + INSTRUCTIONS + POSITION_INSTRUCTIONS + SHAPE_INSTRUCTIONS + DESCRIPTION_INSTRUCTIONS
    return {word for template in templates for word in re.sub(r"[{}|]", " ", template).split()}


def write(rng, template):
    """Makes the choices of a template. Returns a list of words."""

    def choose(match):
        branches = match.group(1).split("|")
        return branches[rng.integers(len(branches))]

    return re.sub(r"\{([^}]*)\}", choose, template).split()


def preamble(rng, longest=LONGEST_PREAMBLE):
    """Nothing (35 %), or one to three different sentences of together at most `longest` words."""
    out = []
    if rng.random() < 0.35:
        return out
    order = rng.permutation(len(PREAMBLES))
    for i in order[: int(rng.integers(1, 4))]:
        sentence = write(rng, PREAMBLES[i])
        if len(out) + len(sentence) <= longest:
            out += sentence
    return out


def suffix(rng, kind, scale=1.0):
    """Different sentences, general or fitting the kind of question, up to a random length of 10 to 32 words (scaled)."""
    templates = INSTRUCTIONS + FITTING.get(kind, [])
    enough = int(rng.integers(10, 29)) * scale
    out = []
    for i in rng.permutation(len(templates)):
        if len(out) >= enough:
            break
        sentence = write(rng, templates[i])
        if len(out) + len(sentence) <= LONGEST_SUFFIX * scale:
            out += sentence
    return out
