#!/usr/bin/env python3
"""What a setting gains at a small size: rows of settings trained on the same tokens and the same seeds, as one table.

    python benchmarks/proxy.py S "plain" "smear: SMEAR_GATE_ENABLED=1" --seeds 1 2 3 4 5
    python benchmarks/proxy.py M "plain" "smear: SMEAR_GATE_ENABLED=1" --seeds 1 2 3 --data FOLDER --tokenizer FILE

A row is a name and what it sets beyond its size; --set does so for all rows. The first row is what the others are
compared with, seed by seed. The table has bits per byte as mean ± standard deviation, the paired difference with its t
and two-sided p, and the seeds that it would take to see 0.002. Settings of the caller's environment do not count.

Sizes: S is the smoke run on a CPU, of the local corpus where --data is not given. M takes 25 to 50 minutes of a core.
Its text is 150 MB of public-domain books, cut into documents as long as web pages, and 400 validation documents of
other authors, in the pieces of a published FineWeb tokenizer. L is the whole model for a shorter time and needs a GPU.
M and L take shards that data/tokenize_docs.py or data/cached_challenge_fineweb.py made.

Each run has a folder named by a hash of the script, its settings and its data: a command given again runs what is
missing. A run that fails is told in a line, the others go on, and the command ends with status 1.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import nct, t, ttest_rel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from shards import Parser, at_least, atomic_write, file_sha256, find_shards, run_tool

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
SIZES = {
    "S": {  # run_smoke_1gpu.sh on a CPU; tests/test_proxy.py compares the two
        "VOCAB_SIZE": "1024", "NUM_LAYERS": "4", "MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "TRAIN_SEQ_LEN": "128", "TRAIN_BATCH_TOKENS": "2048", "ITERATIONS": "490", "WARMUP_STEPS": "2",
        "MUON_MOMENTUM_WARMUP_STEPS": "100", "EMA_DECAY": "0.98", "SWA_EVERY": "5", "GPTQ_CALIBRATION_BATCHES": "4",
        "QUANT_MIN_WEIGHTS": "8192", "EVAL_STRIDE": "64", "TRAIN_LOG_EVERY": "50", "DTYPE": "fp32",
        "BIGRAM_VOCAB_SIZE": "4096", "BIGRAM_DIM": "64", "VARLEN_ENABLED": "1", "SMEAR_GATE_ENABLED": "1",
        "MUON_NS": "polar", "MUON_ROW_NORMALIZE": "1", "NUM_LOOPS": "0", "PARALLEL_START_LAYER": "4",
        "SPARSE_ATTN_GATE_ENABLED": "0", "WARMDOWN_FRAC": "0.72", "EMA_BLEND": "0", "KEY_OFFSET": "0",
        "VE_ENABLED": "0", "MUON_QK_HEADS": "0", "TTT_MODE": "none", "NGRAM_TILT_ENABLED": "0", "EVAL_STAGES": "all"},
    "M": {  # the script's defaults but for sizes, and for what evaluation adds to the model
        "VOCAB_SIZE": "8192", "NUM_LAYERS": "6", "MODEL_DIM": "256", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "TRAIN_SEQ_LEN": "256",  # longer windows learn less of so few tokens (docs/log.md)
        "TRAIN_BATCH_TOKENS": "4096", "ITERATIONS": "732",  # 3.0 M tokens; smaller steps learn more of them
        "TIED_EMBED_LR": "0.0075",  # a quarter of the default, which is for steps of 786,432 tokens (docs/log.md)
        "SCALAR_LR": "0.04",  # twice the default: scalars have few steps here (docs/log.md)
        "MICRO_BATCH_TOKENS": "4096",  # what a core's caches like
        "WARMUP_STEPS": "1",  # nothing is compiled
        "MUON_MOMENTUM_WARMUP_STEPS": "150", "EMA_DECAY": "0.98", "SWA_EVERY": "5",  # shares of the steps as in S
        "GPTQ_CALIBRATION_BATCHES": "12",  # 49,152 tokens
        "QUANT_MIN_WEIGHTS": "16384",  # all matrices are quantized
        "EVAL_STRIDE": "0",  # windows side by side: sliding ones would take longer than training
        "TTT_MODE": "none", "NGRAM_TILT_ENABLED": "0", "EVAL_STAGES": "all", "TRAIN_LOG_EVERY": "20", "DTYPE": "fp32"},
    "L": {  # the script's defaults, 11 layers of 512, but for fewer tokens a step and in all; not run on a GPU yet
        "VOCAB_SIZE": "8192", "TRAIN_BATCH_TOKENS": "196608", "ITERATIONS": "1500",  # 295 M tokens
        "MUON_MOMENTUM_WARMUP_STEPS": "400",  # or all of it would be warm-up
        "EVAL_STRIDE": "0", "TTT_MODE": "none", "NGRAM_TILT_ENABLED": "0", "EVAL_STAGES": "all",
        "TRAIN_LOG_EVERY": "20"},
}
FIXED = {"MAX_WALLCLOCK_SECONDS": "0", "EVAL_BUDGET_SECONDS": "0"}  # tokens and text are fixed, not time
OWN = {"SEED", "DEVICE", "ARTIFACT_DIR", "RUN_ID", "EVAL_ONLY", "EVAL_ONLY_PATH", "RESUME", "AUDIT", *FIXED}
NAMES = {name for name, *_ in tg.environment_names()}
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"}
STAGES = ("pre_quant", "quantized", "final")
EFFECT, P_VALUE, POWER, MOST_SEEDS = 0.002, 0.01, 0.8, 10_000


class Run(NamedTuple):
    """One row on one seed."""

    name: str
    seed: int
    settings: dict[str, str]
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """The run's result, if it ended well."""
        path = self.folder / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {"fits": False}
        return result if result["fits"] else None


# ----- what is run


def read_settings(words: list[str]) -> dict[str, str]:
    """NAME=value words as the script has them: by its own name for each, 1 for true. ValueError for others."""
    try:
        chosen = tg.read_environment(given := dict(word.partition("=")[::2] for word in words)).explicit
    except tg.RunError as error:
        raise ValueError(error) from error
    if wrong := [word for word in words if "=" not in word] + sorted(set(given) - (NAMES - OWN)):
        raise ValueError(f"{wrong[0]}: takes NAME=value with a setting of train_gpt.py that this command leaves free")
    return {name.upper(): "auto" if value is None else str(tg.shown(value)) for name, value in chosen.items()}


def read_rows(texts: list[str], base: dict[str, str]) -> dict[str, dict[str, str]]:
    """Settings by row, each checked by the script before anything runs. ValueError, naming the row."""
    rows = {}
    for text in texts:
        name, _, words = (part.strip() for part in text.partition(":"))
        try:
            settings = base | read_settings(shlex.split(words))
            tg.read_settings(settings)
            if not name or name in rows:
                raise ValueError("a row takes a name of its own")
        except (ValueError, tg.RunError) as error:
            raise ValueError(f"row {name}: {error}") from error
        rows[name] = settings
    return rows


@cache
def data_identity(data: str, tokenizer: str) -> str:
    """A hash of the tokenizer and all shards. ValueError or OSError where there are none."""
    files = [path for split in ("train", "val", "val_bytes") for path in find_shards(Path(data), split)]
    if not files:
        raise ValueError(f"{data}: no shards there")
    hashes = [*((path.name, file_sha256(path)) for path in files), file_sha256(tokenizer)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def plan_run(name: str, row: dict[str, str], seed: int, prefix: Path, source: bytes) -> Run:
    """A run of a row, and its folder: the prefix, the seed and a hash of all that its result hangs on."""
    settings = row | {"SEED": str(seed)}
    rest = {key: value for key, value in settings.items() if key not in ("DATA_PATH", "TOKENIZER_PATH")}
    identity = [hashlib.sha256(source).hexdigest(), version("torch"), sorted(rest.items()),
                data_identity(settings["DATA_PATH"], settings["TOKENIZER_PATH"])]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Run(name, seed, settings, prefix.with_name(f"{prefix.name}_{seed}_{key}"))


def start(run: Run, source: bytes) -> subprocess.Popen:
    """Start the script, as it was when the command began, in an environment without the caller's settings."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (script := run.folder / SCRIPT.name).write_bytes(source)
    environ = {name: value for name, value in os.environ.items() if name not in NAMES | TORCHRUN}
    if run.settings["DEVICE"] == "cpu":
        environ |= {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # logits need many pages a step
    with open(run.folder / "output.txt", "wb") as output:
        return subprocess.Popen([sys.executable, str(script)], env=environ | run.settings | {"ARTIFACT_DIR": str(
            run.folder)}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def last_words(folder: Path, status: int) -> str:
    """The script's own line about why it failed."""
    lines = (folder / "output.txt").read_text(errors="replace").splitlines()
    said = [line for line in lines if "rror: " in line or "OVER by" in line] or lines or [f"status {status}"]
    return f"{said[-1]} ({folder})"


def run_all(runs: list[Run], jobs: int, source: bytes, stage: str) -> list[str]:
    """Run what has no result yet, `jobs` at a time; a line for each that failed."""
    missing = {run.folder: run for run in runs if not run.result()}  # two rows may be the same run
    waiting, running, failed = list(missing.values()), [], []
    with tqdm(total=len(waiting), desc="runs", disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append((waiting[0], start(waiting.pop(0), source)))
                time.sleep(0.05)
                for run, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((run, process))
                    result = run.result()
                    line = f"{bpb(result, stage):.4f}" if result else last_words(run.folder, process.returncode)
                    bar.write(f"{run.name}, seed {run.seed}: {line}", file=sys.stderr)
                    bar.update()
                    failed += [] if result else [f"{run.name}, seed {run.seed}: {line}"]
        finally:
            for _, process in running:
                process.terminate()
                process.wait()
    return failed


# ----- what it says


def bpb(result: dict[str, Any], stage: str) -> float:
    """Bits per byte of a stage; `final` is the last one there is."""
    return result["val_bpb"] if stage == "final" else result["stages"][stage]["val_bpb"]


def figures(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What the table takes of a run. A step's time is the median between log lines, else the mean."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["seconds"]) for line in lines if "step" in line]
    between = [(now - before) / (step - last) for (last, before), (step, now) in pairwise(logged)]
    keys = ("model_bytes", "bytes_total", "tok_per_s", "eval_seconds", "tokens_seen", "val_bytes", "device")
    return {stage: bpb(result, stage) for stage in STAGES} | {key: result[key] for key in keys} | {
        "step_ms": 1e3 * statistics.median(between or [result["train_seconds"] / max(result["steps"], 1)])}


def seeds_needed(deviation: float) -> int | None:
    """Pairs with which a paired t-test finds EFFECT at P_VALUE (two-sided) with POWER; None beyond MOST_SEEDS.

    `deviation` is that of the paired differences. Under the effect, t follows a noncentral t with n - 1 degrees of
    freedom and noncentrality EFFECT / deviation * sqrt(n). The far tail, below 1e-6, is left out.
    """
    effect = EFFECT / max(deviation, 1e-5)  # below it two seeds do anyway
    return next((n for n in range(2, MOST_SEEDS + 1)
                 if nct.sf(t.isf(P_VALUE / 2, n - 1), n - 1, effect * n**0.5) >= POWER), None)


def compare(base: dict[int, float], row: dict[int, float]) -> dict[str, Any]:
    """Differences to the first row on the seeds that both have; None for what these are too few, or too equal, for."""
    seeds = sorted(set(base) & set(row))
    pairs = [row[seed] - base[seed] for seed in seeds]
    found = {"seeds": seeds, "mean": statistics.mean(pairs) if pairs else None,
             "sd": statistics.stdev(pairs) if pairs[1:] else None, "t": None, "p": None, "seeds_needed": None}
    if pairs[1:]:
        found["seeds_needed"] = seeds_needed(found["sd"])
    if len(set(pairs)) > 1:
        found["t"], found["p"] = map(float, ttest_rel([row[seed] for seed in seeds], [base[seed] for seed in seeds]))
    return found


def summarise(runs: list[Run], stage: str) -> list[dict[str, Any]]:
    """A row of the table for every name, in order."""
    table: dict[str, dict[str, Any]] = {}
    for run in runs:
        row = table.setdefault(run.name, {"name": run.name, "settings": run.settings, "runs": {}})
        if result := run.result():
            row["runs"][run.seed] = figures(run.folder, result)
    scores = [{seed: found[stage] for seed, found in row["runs"].items()} for row in table.values()]
    for row, score in zip(table.values(), scores):
        row["difference"] = compare(scores[0], score if score is not scores[0] else {})
    return list(table.values())


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text; blank where there is no figure."""
    def spread(mean: float | None, sd: float | None, sign: str = "") -> str:
        return "" if mean is None else f"{mean:{sign}.4f}" + ("" if sd is None else f" ± {sd:.4f}")

    runs, d = list(row["runs"].values()), row["difference"]
    columns = {key: [run[key] for run in runs] for key in (runs[0] if runs else ())}
    scores = [columns.get(stage, []) for stage in STAGES]
    costs = [f"{statistics.mean(columns[key]):,.{digits}f}" if runs else "" for key, digits in
             (("model_bytes", 0), ("step_ms", 0), ("tok_per_s", 0), ("eval_seconds", 1))]
    return [row["name"], str(len(runs)),
            *(spread(statistics.mean(x) if x else None, statistics.stdev(x) if x[1:] else None) for x in scores),
            spread(d["mean"], d["sd"], "+"), "" if d["t"] is None else f"{d['t']:.2f}",
            "" if d["p"] is None else f"{d['p']:.4f}" if d["p"] >= 1e-4 else "<0.0001",
            "" if d["sd"] is None else f"{d['seeds_needed'] or f'>{MOST_SEEDS}'}", *costs]


def print_table(table: list[dict[str, Any]], args: argparse.Namespace, source: bytes) -> None:
    """The table as Markdown, under a line that says of what, over what does not go together."""
    runs, base = [run for row in table for run in row["runs"].values()], table[0]["settings"]
    print(f"{args.size}, {base['ITERATIONS']} steps of {base['TRAIN_BATCH_TOKENS']} tokens, seeds "
          f"{', '.join(map(str, args.seeds))}, on {', '.join(sorted({run['device'] for run in runs})) or 'nothing'}; "
          f"differences of {args.stage}; torch {version('torch')}, train_gpt.py "
          f"{hashlib.sha256(source).hexdigest()[:12]}\n")
    heads = ["row", "seeds", *STAGES, "difference", "t", "p", f"seeds for {EFFECT}", "model bytes", "ms a step",
             "tok/s", "eval s"]
    for line in (heads, ["---"] * len(heads), *map(cells, table)):
        print(f"| {' | '.join(line)} |")
    sizes = [statistics.mean(run["model_bytes"] for run in row["runs"].values()) for row in table if row["runs"]]
    if sizes and max(sizes) > 1.001 * min(sizes):
        print(f"\nbytes differ by {max(sizes) / min(sizes) - 1:.1%}; --set ARTIFACT_BUDGET_BYTES=N can make them equal")
    for key, what in (("tokens_seen", "training tokens"), ("val_bytes", "bytes of text")):
        if len({run[key] for run in runs}) > 1:
            print(f"\nNOT COMPARABLE: {what} differ between runs")


# ----- the command


def local_data(vocab_size: str) -> tuple[Path, Path]:
    """The shards and the tokenizer of the smoke run, made where they are not there yet."""
    data, name = ROOT / "data", f"local_sp{vocab_size}"
    train, val = (data / "local" / f"docs_{split}.jsonl" for split in ("train", "val"))
    for made, tool, *options in (
            (val, "local_corpus.py", "--out", data / "local"),
            (data / "datasets" / name, "tokenize_docs.py", "--train", train, "--val", val, "--out", data,
             "--name", name, "--vocab-size", vocab_size)):
        if not made.exists() and subprocess.run([sys.executable, data / tool, *options]).returncode:
            raise ValueError(f"{made}: could not be made")
    return data / "datasets" / name, data / "tokenizers" / f"local_{vocab_size}_bpe.model"


def measure(args: argparse.Namespace) -> None:
    """Run what is missing, print the table, write it as JSON. ValueError for a mistake, and last for failed runs."""
    device, source = args.device or ("cuda" if args.size == "L" else "cpu"), SCRIPT.read_bytes()
    if args.size == "L" and device == "cpu":
        raise ValueError("L needs a GPU")
    if (args.data is None) != (args.tokenizer is None) or (args.size != "S" and args.data is None):
        raise ValueError(f"{args.size} takes --data and --tokenizer")
    base = SIZES[args.size] | FIXED | {"DEVICE": device} | read_settings(shlex.split(args.set))
    rows = read_rows(args.rows, base)
    data, tokenizer = (args.data, args.tokenizer) if args.data else local_data(base["VOCAB_SIZE"])
    here = {"DATA_PATH": str(data.resolve()), "TOKENIZER_PATH": str(tokenizer.resolve())}
    runs = [plan_run(name, here | row, seed, args.out.resolve() / args.size, source)
            for seed in args.seeds for name, row in rows.items()]  # a seed of every row before the next seed
    failed = run_all(runs, args.jobs, source, args.stage)
    table = summarise(runs, args.stage)
    print_table(table, args, source)
    with atomic_write(args.json or args.out / f"{args.size}.json") as file:
        file.write(json.dumps({"size": args.size, "stage": args.stage, "seeds": args.seeds, "failed": failed,
                               "script_sha256": hashlib.sha256(source).hexdigest(), "torch": version("torch"),
                               "data": data_identity(*here.values()), "rows": table}, indent=1).encode())
    if failed:
        raise ValueError(f"failed: {'; '.join(failed)}")


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the runs under way end too
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("rows", nargs="+", metavar="ROW", help='"name: SETTING=value ..."; the first is the baseline')
    parser.add_argument("--set", default="", metavar="SETTINGS", help='"SETTING=value ..." of every row')
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--stage", choices=STAGES, default="quantized", help="the score that is compared")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="shards; S makes its own")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for L, cpu for the others")
    parser.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="runs side by side; a CPU thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "logs/proxy", metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: <FOLDER>/<size>.json")
    return run_tool(measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
