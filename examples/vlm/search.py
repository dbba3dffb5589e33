"""Compares combinations of parts on scenes, and on texts, that no evaluation uses: what the recipe pare was chosen by.

    python3 search.py KVPARE_VLM                              scenes of seed 4000000
    python3 search.py KVPARE_VLM --seed 5000000               other ones, to see what of a rank is luck
    python3 search.py KVPARE_VLM --story KVPARE_STORY --model stories260K.bin --tokenizer tok512.bin
                                                              and eight texts that the story model writes itself

A line is one combination: its mark, then words right / same object / other objects at each budget. The mark is the
mean of these over the budgets; a standard error of one figure is 1 to 2 %. Texts: nats per token at each budget, in
blocks of 16.
Needs numpy, for the scenes.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
BUDGETS = ["0.2", "0.1", "0.05"]
TEXT_BUDGETS = ["8t", "16t", "32t", "64t", "128t"]
TEXT_SEEDS = range(1, 9)

# From what the papers publish, one part at a time.
WINDOW = "snap_kv(rows=text, pool=1"
OURS = "pare(layer_floor=0"
COMBINATIONS = [
    # Whose attention, by layer or by kv head.
    "h2o(recent_share=0)", "air_cache", "air_cache(alpha=0.2)", "air_cache(alpha=0.2, heads=kv)",
    "air_cache(alpha=0, heads=kv)", "key_diff", "snap_kv(rows=text)", f"{WINDOW})", f"{WINDOW}, heads=layer)",
    f"{WINDOW}, window=16)", f"{WINDOW}, window=64)",
    # Budgets of layers, of heads, of both.
    f"{WINDOW}, budget=strength_skewness)", f"{WINDOW}, heads=shared)",
    f"{WINDOW}, heads=shared, budget=strength_skewness)",
    f"{WINDOW}, heads=shared, floor=0, budget=strength_skewness)",
    f"{WINDOW}, heads=shared, floor=0, budget=strength_skewness, represent=0.1)",
    f"{WINDOW}, heads=shared, floor=0, budget=strength_skewness, recover=8)",
    # The length of values.
    f"{OURS}, pool=1, values=0.25)", f"{OURS}, pool=1, values=0.5)", f"{OURS}, pool=1)", f"{OURS}, pool=1, values=2)",
    # Then neighbours and rows again, and how much of the budget layers may take from each other.
    f"{OURS})", f"{OURS}, pooling=avg)", f"{OURS}, pool=5)", f"{OURS}, values=1.5)", f"{OURS}, window=16)",
    f"{OURS}, window=64)", f"{OURS}, rows=all)", f"{OURS}, use=skewness)", "pare",
    "pare(heads=kv)", "pare(floor=0.2)", "pare(budget=uniform)",
]
TEXT_COMBINATIONS = [
    "h2o", "snap_kv", "ada_kv", "ada_kv(pool=3)", "ada_kv(pool=3, floor=0)", "ada_kv(pool=3, floor=0, values=0.5)",
    "ada_kv(pool=3, floor=0, values=1)", "pare(layer_floor=0)", "pare", "pare(budget=uniform)",
]


def results(command, policies, budgets, folder):
    """Runs one program over all policies; gives its JSON's results by policy, in the order of the budgets."""
    out = pathlib.Path(folder) / "results.json"
    command = [*command, "--keep", ",".join(budgets), "--json", str(out)]
    for policy in policies:
        command += ["--policy", policy]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    by_policy = {}
    for result in json.loads(out.read_text())["results"]:
        by_policy.setdefault(result["policy"], []).append(result)
    return by_policy


def share_right(result):
    tasks = result["tasks"]
    return [tasks["desc"]["by_token"], tasks["same"]["exact"], tasks["other"]["exact"]]


def search_scenes(options, folder):
    make_scenes = [sys.executable, str(HERE / "train" / "evaluation_set.py")]
    make_scenes += ["--write", folder, "--seed", str(options.seed)]
    subprocess.run(make_scenes, check=True, stdout=subprocess.DEVNULL)
    os.symlink(HERE / "data" / "vlm.safetensors", pathlib.Path(folder) / "vlm.safetensors")
    found = results([options.vlm, "--data", folder, "--scenes", str(options.scenes)], COMBINATIONS, BUDGETS, folder)
    rows = []
    for policy, at_budgets in found.items():
        figures = [share_right(result) for result in at_budgets]
        mark = sum(map(sum, figures)) / (3 * len(figures))
        rows.append((mark, policy, "  |  ".join(" ".join(f"{x:.3f}" for x in at) for at in figures)))
    print(f"{options.scenes} scenes of seed {options.seed}; words / same / other at {', '.join(BUDGETS)}")
    for mark, policy, figures in sorted(rows, reverse=True):
        print(f"{mark:.4f}  {policy:80}  {figures}")


def search_texts(options, folder):
    story = [options.story, "--model", options.model, "--tokenizer", options.tokenizer]
    text = pathlib.Path(folder) / "own.txt"
    with open(text, "wb") as out:
        for seed in TEXT_SEEDS:
            write = [*story, "--prompt", "", "--temperature", "0.8", "--seed", str(seed), "--steps", "300"]
            out.write(subprocess.run(write, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
            out.write(b"<|endoftext|>\n")
    found = results([*story, "--nll", str(text), "--all-in-blocks"], TEXT_COMBINATIONS, TEXT_BUDGETS, folder)
    rows = []
    for policy, at_budgets in found.items():
        nats = [result["nats_per_token"] for result in at_budgets]
        rows.append((sum(nats) / len(nats), policy, " ".join(f"{x:.3f}" for x in nats)))
    print(f"\ntexts of the story model; nats per token at {', '.join(TEXT_BUDGETS)}")
    for mean, policy, nats in sorted(rows):
        print(f"{mean:.4f}  {policy:80}  {nats}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vlm", metavar="KVPARE_VLM", help="the program kvpare_vlm")
    parser.add_argument("--seed", type=int, default=4_000_000, help="of the scenes (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=64, help="of 128 (default: %(default)s)")
    parser.add_argument("--story", metavar="KVPARE_STORY", help="the program kvpare_story")
    parser.add_argument("--model", help="its model, stories260K.bin")
    parser.add_argument("--tokenizer", help="its tokenizer, tok512.bin")
    options = parser.parse_args()
    if options.story and not (options.model and options.tokenizer):
        parser.error("--story needs --model and --tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        search_scenes(options, folder)
        if options.story:
            search_texts(options, folder)


if __name__ == "__main__":
    main()
