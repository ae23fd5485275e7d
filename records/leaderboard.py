"""Make the leaderboard in records/README.md: figures measured here and figures published by others, best first.

    python records/leaderboard.py            # print it
    python records/leaderboard.py --write    # put it in its place in records/README.md

A folder with a `submission.json` is a system measured here. A recipe has a `published.json` with the figures that the
authors of its pull request of openai/parameter-golf published. The two are never mixed: if a recipe's folder has no
submission, its row says that there is no figure of ours.

One column compares systems after the same number of training steps (STEP), however fast their machines are. It is the
mean val_bpb over the seeds, for the weights at that step of training, before they are averaged and compressed. It is
there for runs that were validated at that step (VAL_LOSS_EVERY). The last column says whether a folder counts as a
measured result. If it does not, the column has the first line of records/check_submission.py that fails.
"""

import argparse
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from shards import atomic_write, one_line

HERE = Path(__file__).resolve().parent
START = "<!-- leaderboard: written by `python records/leaderboard.py --write` -->"
END = "<!-- leaderboard ends -->"
STEP = 1000  # at which systems are compared
HEAD = (f"| val_bpb | system | whose figure | seeds | largest artifact, bytes | val_bpb at step {STEP} | counts |\n"
        "|---|---|---|---|---|---|---|")


class Row(NamedTuple):
    """One line of the table."""

    val_bpb: Decimal  # with the digits that its file gives
    text: str


def read_fields(path: Path, *names: str) -> dict[str, Any]:
    """The object in a JSON file, with numbers that have a point as Decimal. ValueError, naming file and field, if a
    field is missing.
    """
    try:
        content = dict(json.loads(path.read_bytes(), parse_float=Decimal))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: not a JSON object ({e})") from None
    for name in names:
        if content.get(name) in (None, "", [], {}):
            raise ValueError(f"{path}: has no {name}")
    point, whole = (Decimal, "a number with a point"), (int, "a whole number")
    for name, (kind, expected) in {"val_bpb": point, "val_bpb_std": point, "largest_artifact_bytes": whole,
                                   "bytes_total": whole}.items():
        if not isinstance(content.get(name), kind | None):
            raise ValueError(f"{path}: {name} is {content[name]!r}, expected {expected}")
    return content


def write_row(folder: Path, val_bpb: Decimal, score: str, system: str, whose: str, seeds: int | None,
              artifact: int | None, at_step: Decimal | None, counts: str) -> Row:
    """A row that links to `folder`; None stands for a figure that is not known."""
    link, size = f"[{system}]({folder.parent.name}/{folder.name})", f"{artifact:,}" if artifact else "–"
    early = f"{at_step:.5f}" if at_step else "–"
    return Row(val_bpb, f"| {score} | {link} | {whose} | {seeds or '–'} | {size} | {early} | {counts} |")


def counts(folder: Path) -> str:
    """Whether the submission in `folder` counts. If not, the first line of its check that fails."""
    import check_submission  # late: it takes torch along

    try:
        lines = check_submission.check(check_submission.Submission(folder))
    except check_submission.tg.RunError as e:
        return "no: " + str(e).replace("|", "\\|")
    failed = [f"{line.name}: {line.evidence}" for line in lines if line.status in ("FAIL", "missing")]
    return "no: " + failed[0].replace("|", "\\|") if failed else "yes"


def measured(folder: Path) -> Row:
    """The row of a submission that was measured here."""
    s = read_fields(folder / "submission.json", "name", "val_bpb", "seeds", "bytes_total", "hardware", "date")
    if not isinstance(s["seeds"], list):
        raise ValueError(f"{folder}/submission.json: seeds is {s['seeds']!r}, expected a list")
    at_steps = s.get("val_bpb_at_step", {})
    at_step = at_steps.get(str(STEP)) if isinstance(at_steps, dict) else at_steps
    if not isinstance(at_step, Decimal | None):
        raise ValueError(f"{folder}/submission.json: val_bpb_at_step has {at_step!r}, expected numbers by step")
    spread = f" ± {s['val_bpb_std']:.5f}" if s.get("val_bpb_std") is not None else ""
    return write_row(folder, s["val_bpb"], f"**{s['val_bpb']:.5f}**{spread}", s["name"],
                     f"**measured here**, {s['hardware']}, {s['date']}", len(s["seeds"]), s["bytes_total"],
                     at_step, counts(folder))


def published(folder: Path) -> Row:
    """The row of a recipe: the figure of its authors, and that this project has measured none."""
    p = read_fields(folder / "published.json", "system", "pull_request", "val_bpb", "hardware", "note")
    whose = f"published in PR {p['pull_request']}, {p['hardware']}, {p['note']}"
    return write_row(folder, p["val_bpb"], str(p["val_bpb"]), p["system"], whose, p.get("seeds"),
                     p.get("largest_artifact_bytes"), None, "no: none of ours in this folder")


def leaderboard(records: Path) -> str:
    """The table of the folders records/<track>/<name>. ValueError or OSError for a file that cannot be used."""
    ours = [measured(path.parent) for path in sorted(records.glob("track_*/*/submission.json"))]
    others = [published(path.parent) for path in sorted(records.glob("track_*/*/published.json"))
              if not (path.parent / "submission.json").exists()]
    lines = [HEAD, *(row.text for row in sorted(ours + others, key=lambda row: row.val_bpb))]
    if not ours:
        lines += ["", "No folder holds a `submission.json`: that takes three real runs at full size, and none of ours "
                      "has been made."]
    return "\n".join(lines)


def with_leaderboard(readme: Path, table: str) -> str:
    """The text of `readme` with `table` between its two markers. ValueError unless it has each marker once."""
    text = readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{readme}: expected the line {START} and after it {END}, each once")
    return text[: text.index(START) + len(START)] + f"\n\n{table}\n\n" + text[text.index(END) :]


def main(argv: list[str] | None = None, records: Path = HERE) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the leaderboard of records/README.md.")
    parser.add_argument("--write", action="store_true", help="put it into the README instead of printing it")
    args = parser.parse_args(argv)
    readme = records / "README.md"
    try:
        table = leaderboard(records)
        if args.write:
            text = with_leaderboard(readme, table)
            with atomic_write(readme) as file:
                file.write(text.encode())
        else:
            print(table)
    except (OSError, ValueError) as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
