"""Builds the fixed evaluation set of 128 scenes from its seed, and checks or writes the files of it.

    python3 evaluation_set.py                       check ../data against the seed, byte for byte (numpy only)
    python3 evaluation_set.py --write FOLDER        write eval128.bin, eval128.jsonl and vocab.json
    python3 evaluation_set.py --write FOLDER --references ../data/vlm.safetensors
                                                    the same with the model's own answers (needs PyTorch)
    python3 evaluation_set.py --write FOLDER --seed 4000000
                                                    another 128 scenes in the same files, to choose settings by

Without --references the `ref` and `logits` fields are left out: they belong to a set of weights, the rest to the seed.
"""
import argparse
import json
import pathlib
import sys

import numpy as np

import questions
import scenes
from vocabulary import COLOURS, SHAPES, VOCABULARY

SCENES = 128
SEED = 3_000_000
SCENES_WITH_LOGITS = 2
DATA = pathlib.Path(__file__).resolve().parent.parent / "data"


def build(seed=SEED):
    """Returns images, uint8 [128, 96, 96, 3], and one dictionary per scene, as the lines of eval128.jsonl."""
    rng = np.random.default_rng(seed)
    sampled, images = scenes.sample_scenes(rng, SCENES, fewest=3, most=6)
    return scenes.to_bytes(images), [_dialogues(rng, scene) for scene in sampled]


def _dialogues(rng, scene):
    def turn(kind, colour, first=False):
        if first:
            prompt = questions.first_turn(rng, kind, colour, plain_share=0.0)
        else:
            prompt = questions.question(rng, kind, colour)
        return {"kind": kind, "q": prompt, "a": questions.answer(kind, scene, colour)}

    a, b, c = (scene[i].colour for i in rng.permutation(len(scene))[:3])
    return {
        "objs": [[COLOURS[t.colour], SHAPES[t.shape], t.row, t.column] for t in scene],
        "desc": turn("desc", a, first=True),
        "turn1": turn("where", a, first=True),
        "same": [turn("shape", a), turn("where", a)],
        "other": [turn("where", b), turn("shape", c), turn("where", c), turn("shape", b)],
    }


def turns(line):
    """All turns of a scene, in the order in which they were drawn."""
    return [line["desc"], line["turn1"], *line["same"], *line["other"]]


def add_references(images, lines, weights):
    """Adds to every turn what the model answers with its full cache, and the first logits for a few scenes."""
    import model  # PyTorch is needed only here

    network = model.load(weights)
    patches = scenes.to_patches(scenes.from_bytes(images))
    for i, line in enumerate(lines):
        for chain in ([line["desc"]], [line["turn1"], *line["same"]], [line["turn1"], *line["other"]]):
            dialogue = model.Dialogue(network, patches[i])
            for turn in chain:
                logits = dialogue.read(turn["q"])
                turn["ref"] = dialogue.answer(cap=26 if turn["kind"] == "desc" else 4)
                if i < SCENES_WITH_LOGITS and turn is chain[0]:
                    turn["logits"] = [round(float(v), 4) for v in logits]
        show_progress(i + 1, len(lines))


def report(lines):
    """Prints how often the model's own answer is the true one."""
    for name in ("desc", "turn1", "same", "other"):
        asked = [turn for line in lines for turn in (line[name] if isinstance(line[name], list) else [line[name]])]
        right = sum(turn["ref"] == turn["a"] for turn in asked)
        print(f"{name}: {right / len(asked):.3f} of {len(asked)} answers exact")


def show_progress(done, total):
    if sys.stderr.isatty() or done % 32 == 0:
        print(f"references: {done} of {total} scenes", file=sys.stderr, end="\r" if done < total else "\n")


def write(folder, images, lines):
    folder.mkdir(parents=True, exist_ok=True)
    images.tofile(folder / "eval128.bin")
    with open(folder / "eval128.jsonl", "w") as out:
        for line in lines:
            out.write(json.dumps(line) + "\n")
    with open(folder / "vocab.json", "w") as out:
        json.dump(VOCABULARY, out)


def differences(folder, images, lines):
    """Sentences on where the files in `folder` differ from what the seed gives; references need not be there."""
    found = []
    if images.tobytes() != (folder / "eval128.bin").read_bytes():
        found.append("eval128.bin: the images differ")
    if json.loads((folder / "vocab.json").read_text()) != VOCABULARY:
        found.append("vocab.json: the words differ")
    stored = [json.loads(line) for line in (folder / "eval128.jsonl").read_text().splitlines()]
    for theirs in stored:
        for turn in turns(theirs):
            turn.pop("ref", None)
            turn.pop("logits", None)
    if len(stored) != len(lines):
        found.append(f"eval128.jsonl: {len(stored)} scenes, the seed gives {len(lines)}")
    found += [f"eval128.jsonl: scene {i} differs" for i, (a, b) in enumerate(zip(stored, lines)) if a != b]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=pathlib.Path, metavar="FOLDER", help="write the files instead of checking")
    parser.add_argument("--references", type=pathlib.Path, metavar="WEIGHTS", help="add this model's own answers")
    parser.add_argument("--seed", type=int, default=SEED, help="what the scenes are drawn from (default: %(default)s)")
    parser.add_argument("--data", type=pathlib.Path, default=DATA, help="the folder to check (default: %(default)s)")
    options = parser.parse_args()
    if options.references and not options.write:
        parser.error("--references needs --write FOLDER")

    if options.seed != SEED and not options.write:
        parser.error("--seed needs --write FOLDER: the published set has one seed")

    images, lines = build(options.seed)
    if options.references:
        add_references(images, lines, options.references)
        report(lines)
    if options.write:
        write(options.write, images, lines)
        print(f"wrote {len(lines)} scenes to {options.write}")
        return 0
    found = differences(options.data, images, lines)
    for sentence in found:
        print(sentence)
    print(f"{len(lines)} scenes: " + ("not what the seed gives" if found else "the same as the seed gives"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
