"""Make a submission's folder from the finished runs of three or more seeds.

    python records/make_submission.py NAME --track track_10min_16mb --logs logs/RUN logs/RUN logs/RUN

The tool writes records/<track>/<YYYY-MM-DD>_<NAME>/. The folder holds train_gpt.py (the counted, packed script), logs,
metrics and results of every seed, the first seed's artifact, the tokenizer, requirements.txt, submission.json and a
README. The README's tables, features and command come from the runs alone. If every seed was validated in training
(VAL_LOSS_EVERY), submission.json also has the mean val_bpb at each of these steps. Then check_submission.py checks the
folder. The folder appears whole, or not at all with one line that says why. On both tracks every run must have been
audited (records/audit.py).

Write your own text into the README under its title or in new sections, and leave the sections made here as they are.
Check the folder again afterwards: features, settings and figures in your text must be those of the runs.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import check_submission
import submission as s

import train_gpt as tg

ARTIFACT, COUNTED, RESULT, LOG = "final_model.int6.ptz", "train_gpt.packed.py", "result.json", "train.log"
VERDICT, METRICS = "audit.json", "metrics.jsonl"


def read_run(folder: Path) -> dict[str, Any]:
    """The run's result. RunError unless the folder is that of a finished training run with all its files."""
    for name in (RESULT, LOG, COUNTED, ARTIFACT):
        if not (folder / name).is_file():
            raise tg.RunError(f"{folder}: no {name}: not the folder of a finished run")
    if not (folder / VERDICT).is_file():
        raise tg.RunError(f"{folder}: no {VERDICT}; python records/audit.py {folder} makes it")
    run = s.read_json(folder / RESULT)
    missing = [key for key in ("config", "seed", "steps", "stages", "model_bytes") if key not in run]
    if missing:
        raise tg.RunError(f"{folder}/{RESULT}: has no {missing[0]}: not the result of this train_gpt.py")
    if run["config"].get("eval_only") or not run["steps"]:
        raise tg.RunError(f"{folder}: a run that did not train (EVAL_ONLY)")
    size = (folder / ARTIFACT).stat().st_size
    if size != run["model_bytes"]:
        raise tg.RunError(f"{folder}/{ARTIFACT}: {size:,} bytes, its result says {run['model_bytes']:,}")
    return run


def check_runs(folders: list[Path], runs: list[dict[str, Any]]) -> None:
    """RunError unless the runs have the same code, the same settings and different seeds."""
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise tg.RunError(f"seed {twice} twice: {' and '.join(str(f) for f, x in zip(folders, seeds) if x == twice)}")
    if len(runs) < s.LEAST_SEEDS:
        raise tg.RunError(f"{len(runs)} runs; at least {s.LEAST_SEEDS} seeds are needed")
    code = (folders[0] / COUNTED).read_bytes()
    for folder, run in zip(folders, runs):
        if (folder / COUNTED).read_bytes() != code:
            raise tg.RunError(f"{folder}: other code than in {folders[0]} ({COUNTED} differs)")
        for name in runs[0]["config"].keys() | run["config"].keys():
            ours, theirs = run["config"].get(name), runs[0]["config"].get(name)
            if ours != theirs and name not in s.OF_A_RUN:
                raise tg.RunError(f"{folder}: {name.upper()}={ours}, {folders[0]} has {theirs}")
        places = [f"{s.hardware(r)} with torch {r['torch']}" for r in (run, runs[0])]
        if places[0] != places[1]:
            raise tg.RunError(f"{folder}: run on {places[0]}, {folders[0]} on {places[1]}")


def seed_result(artifact: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The seed's entry in submission.json, with the scores as its log prints them."""
    figures = s.seed_row(run).items()
    return {name: round(value, 8 if name in ("val_loss", "val_bpb") else 2) for name, value in figures} | {
        "model_sha256": s.sha256(artifact)}


def submission_json(args: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = {str(run["seed"]): seed_result(folder / ARTIFACT, run) for folder, run in zip(args.logs, runs)}
    run = runs[0]
    loss, loss_std = s.mean_std([row["val_loss"] for row in seeds.values()])
    bpb, bpb_std = s.mean_std([row["val_bpb"] for row in seeds.values()])
    at_steps = s.means_at_steps([s.read_step_scores(folder / METRICS) for folder in args.logs])
    return {
        "author": args.author, "github_id": args.github_id, "name": args.name, "blurb": args.blurb, "date": args.date,
        "track": args.track, "val_loss": round(loss, 8), "val_bpb": round(bpb, 8), "val_loss_std": round(loss_std, 8),
        "val_bpb_std": round(bpb_std, 8), "seeds": [run["seed"] for run in runs], "seed_results": seeds,
        "bytes_total": max(run["bytes_total"] for run in runs), "code_bytes": run["code_bytes"],
        "code_sha256": s.sha256(args.logs[0] / COUNTED), "val_docs": run["val_docs"], "val_tokens": run["val_tokens"],
        "val_bytes": run["val_bytes"], "hardware": s.hardware(run), "pytorch_version": run["torch"],
        "attention": run["attention"], "settings": s.environment(run["config"]),
        "tokenizer": {"name": Path(run["config"]["tokenizer_path"]).name, "sha256": s.sha256(args.tokenizer)},
    } | ({s.AT_STEP: at_steps} if at_steps else {})


def default_blurb(runs: list[dict[str, Any]]) -> str:
    c, (mean, std) = s.facts(runs[0]), s.mean_std([run["val_bpb"] for run in runs])
    return f"{s.FEATURES[0].says.format(**c)}. val_bpb {mean:.4f} ± {std:.4f} over {len(runs)} seeds."


def git_config(name: str) -> str:
    try:
        return subprocess.run(["git", "config", name], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def fill(folder: Path, args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Write every file of the submission into the empty folder."""
    for place, run in zip(args.logs, runs):
        shutil.copyfile(place / LOG, folder / f"train_seed{run['seed']}.log")
        shutil.copyfile(place / RESULT, folder / f"result_seed{run['seed']}.json")
        shutil.copyfile(place / VERDICT, folder / f"audit_seed{run['seed']}.json")
        if (place / METRICS).is_file():
            shutil.copyfile(place / METRICS, folder / f"metrics_seed{run['seed']}.jsonl")
    for place, run in list(zip(args.logs, runs))[: None if args.artifacts else 1]:
        shutil.copyfile(place / ARTIFACT, folder / f"final_model_seed{run['seed']}.int6.ptz")
    shutil.copyfile(args.logs[0] / COUNTED, folder / s.CODE)
    shutil.copyfile(args.tokenizer, folder / s.TOKENIZER)  # also under a published name: a name proves no content
    shutil.copyfile(Path(__file__).resolve().parent.parent / s.REQUIREMENTS, folder / s.REQUIREMENTS)
    content = submission_json(args, runs)
    (folder / s.SUBMISSION).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / s.README).write_text(s.write_readme(args.name, args.blurb, runs), encoding="utf-8")


def make(args: argparse.Namespace) -> Path:
    """Build the folder, check it and put it in place; returns the folder. RunError if the submission is not allowed."""
    if not re.fullmatch(r"[\w.+-]+", args.name):
        raise tg.RunError(f"NAME={args.name}: takes letters, digits and _ . + -, it names a folder")
    try:
        date.fromisoformat(args.date or "2026-01-01")
    except ValueError:
        raise tg.RunError(f"--date {args.date}: takes YYYY-MM-DD") from None
    runs = [read_run(folder) for folder in args.logs]
    check_runs(args.logs, runs)
    args.author, args.github_id = args.author or git_config("user.name"), args.github_id or git_config("github.user")
    for name, flag in (("author", "user.name"), ("github_id", "github.user")):
        if not getattr(args, name):
            raise tg.RunError(f"no {name}: give --{name.replace('_', '-')}, or set git's {flag}")
    args.date = args.date or max(run["finished"] for run in runs)[:10]
    args.blurb = args.blurb or default_blurb(runs)
    args.tokenizer = args.tokenizer or Path(runs[0]["config"]["tokenizer_path"])
    if not args.tokenizer.is_file():
        raise tg.RunError(f"{args.tokenizer}: no such file; --tokenizer tells where the runs' tokenizer is")
    target = args.out / args.track / f"{args.date}_{args.name}"
    if target.exists():
        raise tg.RunError(f"{target}: is there already")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making", dir=args.out) as temporary:
        folder = Path(temporary, args.track, target.name)  # under its final name, which is checked too
        folder.mkdir(parents=True)
        fill(folder, args, runs)
        lines = check_submission.check(check_submission.Submission(folder))
        for line in lines:
            if line.status in ("FAIL", "missing"):
                raise tg.RunError(f"{line.name}: {line.evidence}")
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    print("\n".join(str(line) for line in lines if line.status != "pass"))
    return target


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a submission's folder from the finished runs of its seeds.")
    parser.add_argument("name", metavar="NAME", help="of the submission, as in the folder's name")
    parser.add_argument("--track", required=True, choices=s.TRACKS)
    parser.add_argument("--logs", required=True, nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--author", help="default: git's user.name")
    parser.add_argument("--github-id", help="default: git's github.user")
    parser.add_argument("--blurb", help="a sentence or two (default: the shape of the model and its score)")
    parser.add_argument("--date", help="YYYY-MM-DD (default: the day the last run finished)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: where the runs had it")
    parser.add_argument("--artifacts", action="store_true", help="keep every seed's artifact, not only the first one's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="folder of the tracks (default: records)")
    args = parser.parse_args(argv)
    try:
        print(f"made {make(args)}")
    except (tg.RunError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        what = f"a result without {e}" if isinstance(e, KeyError) else str(e)
        print(f"error: {' '.join(what.split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
