"""Draw what runs learned, and where the bytes of their artifacts go.

    python records/plot_runs.py logs/run_a logs/run_b --out plots

This writes two files into --out:

    training.png  training loss and validation bits per byte, against tokens and against seconds
    artifact.png  bytes of each artifact by the role of its tensors; only if a run has finished

A run that is still going is drawn as far as it has come. Runs are named after their folders. Needs matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

try:
    import matplotlib
except ImportError:
    sys.exit("error: the package matplotlib is not installed; pip install matplotlib")
matplotlib.use("Agg")  # files only, no screen needed
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from shards import one_line

import train_gpt as tg

ROLES = {
    "emb": "token embedding", "head": "output head", "q": "queries", "k": "keys", "v": "values",
    "o": "attention output", "up": "MLP up", "down": "MLP down", "bigram": "bigram embedding", "ve": "value embedding",
    "lqer": "low-rank corrections", "": "gates, scales, vectors", "header": "settings, names", "code": "code",
}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.2, "savefig.dpi": 150,
}


# ----- reading


class Run(NamedTuple):
    """The content of a run's folder."""

    name: str
    folder: Path
    steps: np.ndarray  # (n, 4) float64: step, train_loss, tokens, seconds
    validations: np.ndarray  # (m, 4): step, val_bpb, tokens, seconds; of the trained model before compression
    result: dict[str, Any] | None  # what is drawn of result.json, and the compressor; None while the run is going


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, without a last line that is still being written. RunError on anything else."""
    lines = path.read_text().split("\n")
    try:
        return [dict(json.loads(line)) for line in lines[:-1]]
    except (ValueError, TypeError) as e:
        raise tg.RunError(f"{path}: not one JSON object a line ({e})") from None


def read_run(folder: Path) -> Run:
    """The run in `folder`. RunError or OSError if it cannot be drawn."""
    path = folder / "metrics.jsonl"
    try:
        metrics = read_lines(path)
        rows = {m["step"]: [m["step"], m["train_loss"], m["tokens"], m["seconds"]] for m in metrics if "step" in m}
        steps = np.array([rows[step] for step in sorted(rows)], dtype=np.float64)  # a resumed run repeats some
        scores = {m["stage"]: m["val_bpb"] for m in metrics if "stage" in m}
        if not len(steps):
            raise tg.RunError(f"{path}: holds no training steps")
        result = None
        if (folder / "result.json").exists():
            content = json.loads((folder / "result.json").read_text())
            result = {name: content[name] for name in ("val_bpb", "code_bytes", "budget_bytes")}
            result["compressor"] = content["config"]["compressor"]
        marks = {steps[-1, 0] if stage == "pre_quant" else float(stage.removeprefix("step")): bpb
                 for stage, bpb in scores.items() if stage == "pre_quant" or stage.startswith("step")}
        at = np.array(sorted(marks))
        validations = np.stack([at, np.array([marks[step] for step in at]), *(
            np.interp(at, steps[:, 0], steps[:, axis]) for axis in (2, 3))], axis=1)
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise tg.RunError(f"{folder}: not the files of a run ({type(e).__name__}: {e})") from None
    return Run(folder.resolve().name, folder, steps, validations, result)


def role_of(name: str) -> str:
    """Key of ROLES for what an artifact stores under a name: "bigram" for "bigram_table"."""
    if name.split("_")[0] in ("bigram", "ve", "embed"):
        name = name.split("_")[0].replace("embed", "emb")
    return name if name in ROLES else ""


def artifact_bytes(run: Run) -> dict[str, float]:
    """Bytes of a finished run's artifact by role; they add up to its `bytes_total`.

    Roles share compressed streams and frequency tables. So each role's tensors are packed alone to find its share, and
    the shares are then scaled to the size of the file, which changes them little. RunError or OSError if the artifact
    cannot be read.
    """
    path = run.folder / "final_model.int6.ptz"
    data = path.read_bytes()
    settings, stored = tg.read_artifact(data, str(path))
    compressor = run.result["compressor"]
    parts: dict[str, dict] = {}
    for name, item in stored.items():
        parts.setdefault("lqer" if item.form == "low rank" else role_of(name), {})[name] = item
    empty, header = (len(tg.write_artifact(content, {}, compressor)) for content in ({}, settings))
    alone = {role: len(tg.write_artifact({}, part, compressor)) - empty
             for role, part in tqdm(parts.items(), f"packing {run.name} by role", disable=None)}
    scale = (len(data) - header) / sum(alone.values())
    return {role: scale * size for role, size in alone.items()} | {"header": header, "code": run.result["code_bytes"]}


# ----- drawing


def zoom(axes, curves: list[np.ndarray]) -> None:
    """Make the y axis span the values that the curves, (n, 4) each, have after their first twentieth, with a margin."""
    late = np.concatenate([c[c[:, 0] >= 0.05 * c[-1, 0], 1] for c in curves if len(c)] or [np.zeros(0)])
    if len(late):
        low, high = late.min(), late.max()
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def draw_training(runs: list[Run], path: Path) -> None:
    """Draw two rows (loss, bits per byte) by two columns (tokens, seconds)."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for column, (axis, label) in enumerate(((2, "training tokens"), (3, "training time (s), validation not counted"))):
        upper, lower = grid[:, column]
        for run, color in zip(runs, COLORS):
            upper.plot(run.steps[:, axis], run.steps[:, 1], color=color, label=run.name)
            lower.plot(run.validations[:, axis], run.validations[:, 1], "o-", color=color, markersize=4)
            if run.result:
                lower.plot(run.steps[-1, axis], run.result["val_bpb"], "*", color=color, markersize=10)
        lower.set_xlabel(label)
    grid[1, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
    grid[0, 0].set_ylabel("training loss (nats a token)")
    grid[1, 0].set_ylabel("validation (bits per byte)")
    zoom(grid[0, 0], [run.steps for run in runs])
    grid[1, 1].plot([], [], "o-", color="0.4", markersize=4, label="full precision")
    grid[1, 1].plot([], [], "*", color="0.4", markersize=10, label="final score: compressed, last stage")
    grid[1, 1].legend()
    grid[0, 1].legend()
    figure.savefig(path)
    plt.close(figure)


def draw_artifacts(runs: list[Run], sizes: list[dict[str, float]], path: Path) -> None:
    """Draw a group of horizontal bars for each role, with one bar for each run; the legend has each run's total.

    `sizes` are bytes by role, one dict for each run; it is empty for a run that is not finished.
    """
    roles = [role for role in ROLES if any(role in s for s in sizes)]
    shown = [(run, size, color) for run, size, color in zip(runs, sizes, COLORS) if size]
    height = 0.8 / len(shown)
    inches = 1 + 0.2 * len(shown) + len(roles) * (0.1 + 0.14 * len(shown))
    figure, axes = plt.subplots(figsize=(8, inches), layout="constrained")
    for i, (run, size, color) in enumerate(shown):
        total, budget = sum(size.values()), run.result["budget_bytes"]
        bars = axes.barh(np.arange(len(roles)) + i * height, [size.get(role, 0) for role in roles], height, color=color,
                         label=f"{run.name}: {total:,.0f} bytes, {100 * total / budget:.1f} % of {budget:,}")
        axes.bar_label(bars, [f"{100 * size[role] / total:.1f} %" if role in size else "" for role in roles],
                       padding=3, color="0.3", fontsize=7)
    axes.set_yticks(np.arange(len(roles)) + 0.4 - height / 2, [ROLES[role] for role in roles])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1, y=0.01)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("bytes (k = 1,000); each role packed alone, scaled to the artifact's size")
    figure.legend(loc="outside upper left")
    figure.savefig(path)
    plt.close(figure)


COLORS = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]  # of the runs, in order


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw the training and the artifacts of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, as in logs/")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the .png files go")
    args = parser.parse_args(argv)
    try:
        if len(args.runs) > len(COLORS):
            raise tg.RunError(f"{len(args.runs)} runs: at most {len(COLORS)} can be told apart in one plot")
        runs = [read_run(folder) for folder in args.runs]
        sizes = [artifact_bytes(run) if run.result else {} for run in runs]
        args.out.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(STYLE):
            draw_training(runs, args.out / "training.png")
            print(args.out / "training.png")
            if any(sizes):
                draw_artifacts(runs, sizes, args.out / "artifact.png")
                print(args.out / "artifact.png")
    except (OSError, tg.RunError) as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
