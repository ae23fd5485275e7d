"""Train each recipe on the same small number of tokens on this machine, and print a table for docs/log.md.

    python records/compare_recipes.py --steps 200 --seeds 1 2 3 --jobs 2

run_smoke_1gpu.sh scales every recipe down (its CPU sizes, 11 layers, the local corpus). Each recipe, and a plain model
of the same size, is trained for the same number of steps without a clock and without test-time training. The runs are
kept in logs/compare. The order of recipes at this scale says little about their order at full size.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"BIGRAM_VOCAB_SIZE": "0", "VARLEN_ENABLED": "0", "SMEAR_GATE_ENABLED": "0", "MUON_NS": "quintic",
         "MUON_ROW_NORMALIZE": "0", "MIN_LR": "0", "BETA2": "0.95"}  # without what the smoke run has


def run(recipe: Path | None, seed: int, steps: int, threads: int) -> dict:
    """The result of one scaled-down run, which is reused if it exists. RuntimeError with its last line if the run
    fails.
    """
    files = [ROOT / "train_gpt.py", ROOT / "run_smoke_1gpu.sh", *([recipe / "recipe.env"] if recipe else [])]
    code = b"".join(path.read_bytes() for path in files) + repr((PLAIN, tg.read_environment(dict(os.environ)))).encode()
    version = hashlib.sha256(code).hexdigest()[:8]  # figures of other code or settings are not taken for these
    folder = ROOT / "logs" / "compare" / f"{recipe.name if recipe else 'plain'}_{steps}_{seed}_{version}"
    if not (folder / "result.json").exists():
        settings = {"NUM_LAYERS": "11", "SEED": str(seed), "ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0",
                    "ARTIFACT_DIR": str(folder), "DEVICE": "cpu", "OMP_NUM_THREADS": str(threads), "EVAL_STRIDE": "0",
                    "WARMUP_STEPS": "0", "TTT_MODE": "none", "PYTHON": sys.executable, "RECIPE": str(recipe or "")}
        settings |= {} if recipe else PLAIN
        done = subprocess.run([ROOT / "run_smoke_1gpu.sh"], env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder.name}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return json.loads((folder / "result.json").read_text())


def row(name: str, results: list[dict]) -> str:
    """One line of the table: mean and standard deviation over the seeds."""
    def mean(key: str) -> str:
        values = [r["stages"][key]["val_bpb"] for r in results]
        return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"

    return (f"| {name} | {mean('pre_quant')} | {mean('quantized')} | {max(r['model_bytes'] for r in results):,} | "
            f"{statistics.mean(r['train_seconds'] for r in results):.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the recipes at the same small token budget.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its share of the cores")
    args = parser.parse_args()
    if min(args.steps, args.jobs) < 1:
        parser.error("--steps and --jobs take numbers of at least 1")
    recipes = [None, *sorted(path.parent for path in ROOT.glob("records/track_*/*/recipe.env"))]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    work = [(recipe, seed) for seed in args.seeds for recipe in recipes]
    try:
        run(None, args.seeds[0], args.steps, threads)  # makes the corpus and the shards, which the others share
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(tqdm(pool.map(lambda w: run(*w, args.steps, threads), work), total=len(work), disable=None))
    except (RuntimeError, tg.RunError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    tokens = results[0]["tokens_seen"]
    print(f"{args.steps} steps, {tokens:,} tokens, seeds {', '.join(map(str, args.seeds))}, {args.jobs} runs side by "
          f"side on {os.cpu_count()} cores, torch {results[0]['torch']}\n")
    print("| recipe | bpb trained | bpb compressed | model bytes | train s |\n|---|---|---|---|---|")
    for recipe in recipes:
        print(row(recipe.name if recipe else "plain, no recipe",
                  [r for r, (of, _) in zip(results, work) if of == recipe]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
