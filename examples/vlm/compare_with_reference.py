"""Compares kvpare_vlm with the table in data/README.md, which an independent implementation in PyTorch made.

    python3 examples/vlm/compare_with_reference.py build/release/bin/kvpare_vlm

Runs every policy that both have on all 128 scenes (some minutes) and prints one table per task: ours / theirs, with a
mark where they are more than two standard errors apart. Needs nothing beyond Python.
"""
import argparse
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
KEEPS = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
SCENES = 128

# Their name -> ours. Theirs: -h = one choice per kv head, -p = pooled over 5 neighbours, -b = adaptive layer budgets, -st and
# -sk = these by strength or skewness alone. "snap_kv(window=1000, rows=text)" is all text rows.
POLICIES = {"h2o": "h2o(recent_share=0, heads=layer)", "h2o-h": "h2o(recent_share=0)"}
SUFFIXES = {
    "": ["pool=1", "heads=layer"],
    "-h": ["pool=1"],
    "-p": ["heads=layer"],
    "-h-p": [],
    "-b": ["pool=1", "heads=layer", "budget=strength_skewness"],
}
for name, window in (("last", 1), ("snap@8", 8), ("snap@16", 16), ("snap@32", 32), ("text", 1000)):
    for suffix, settings in SUFFIXES.items():
        theirs = name.replace("@", suffix + "@") if "@" in name else name + suffix
        POLICIES[theirs] = "snap_kv(" + ", ".join([f"window={window}", "rows=text", *settings]) + ")"
for alpha in (0.9, 0.5, 0.2):
    short = f"@.{round(alpha * 10)}"
    POLICIES["air" + short] = f"air_cache(alpha={alpha}, budget=uniform)"
    POLICIES["air-b" + short] = f"air_cache(alpha={alpha})"
    POLICIES["air-st" + short] = f"air_cache(alpha={alpha}, use=strength)"
    POLICIES["air-sk" + short] = f"air_cache(alpha={alpha}, use=skewness)"
    POLICIES["air-h" + short] = f"air_cache(alpha={alpha}, budget=uniform, heads=kv)"
    POLICIES["air-h-b" + short] = f"air_cache(alpha={alpha}, heads=kv)"
# Theirs draws anew for every scene. Ours keeps the same patches in every scene, so one seed says little: take their mean.
RANDOM = [f"random(heads=layer, seed={seed})" for seed in range(16)]


def read_reference(page):
    """{task: {policy: [accuracy per keep]}} from the tables of data/README.md."""
    tables, task = {}, None
    for line in page.splitlines():
        title = re.match(r"\*\*(desc|same|other)\b.*full cache", line)
        if title:
            task = title.group(1)
        elif line.startswith("**"):
            task = None
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if task and len(cells) == 1 + len(KEEPS) and re.match(r"\d\.\d+$", cells[1]):
            tables.setdefault(task, {})[cells[0]] = [float(cell) for cell in cells[1:]]
    return tables


def run(program, policies):
    """Results of kvpare_vlm: {(policy, keep): {task: {"exact": ..., "by_token": ..., "answers": ...}}}."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "results.json"
        command = [program, "--scenes", str(SCENES), "--task", "desc,same,other", "--json", str(out)]
        command += ["--keep", ",".join(map(str, KEEPS))]
        for policy in policies:
            command += ["--policy", policy]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = json.loads(out.read_text())["results"]
    return {(entry["policy"], entry["keep"]): entry["tasks"] for entry in results}


def mean(results):
    return {task: {key: statistics.mean(r[task][key] for r in results) for key in results[0][task]} for task in results[0]}


def standard_error(ours, theirs, answers):
    """Of one measured accuracy; the unit is a whole answer, for desc too, whose words are not independent."""
    share = min(max((ours + theirs) / 2, 1 / answers), 1 - 1 / answers)
    return math.sqrt(share * (1 - share) / answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="kvpare_vlm, as built")
    options = parser.parse_args()

    reference = read_reference((HERE / "data" / "README.md").read_text())
    shared = [name for name in reference["desc"] if name in POLICIES]
    results = run(options.program, [POLICIES[name] for name in shared] + RANDOM)
    POLICIES["random"] = "mean of " + RANDOM[0].replace("seed=0", f"seed=0..{len(RANDOM) - 1}")
    for keep in KEEPS:
        results[POLICIES["random"], keep] = mean([results[policy, keep] for policy in RANDOM])

    compared = apart = equal = 0
    for task, measure in (("desc", "by_token"), ("same", "exact"), ("other", "exact")):
        print(f"\n**{task}**, ours / theirs\n")
        print("| theirs | ours | " + " | ".join(f"{keep:.0%}" for keep in KEEPS) + " |")
        print("|---" * (2 + len(KEEPS)) + "|")
        for name in ["random", *shared]:
            cells = []
            for keep, theirs in zip(KEEPS, reference[task][name]):
                result = results[POLICIES[name], keep][task]
                ours = result[measure]
                mark = " **!**" if abs(ours - theirs) > 2 * standard_error(ours, theirs, result["answers"]) else ""
                cells.append(f"{ours:.3f} / {theirs:.3f}{mark}")
                compared += 1
                apart += bool(mark)
                equal += abs(ours - theirs) < 0.0006
            print(f"| {name} | `{POLICIES[name]}` | " + " | ".join(cells) + " |")
    print(f"\n{compared} figures compared: {equal} equal to the last digit, {apart} more than two standard errors apart")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
