"""Check a submission's folder as a reviewer would: one line for each question, with the evidence for the answer.

    python records/check_submission.py FOLDER [--against FOLDER] [--data DATA_PATH [--tokenizer FILE]] [--json]

Each line is `status  name  evidence`. The status is one of these:

  pass      the answer is good
  FAIL      the answer is bad
  missing   the folder does not say
  note      a limit is exceeded that binds the record track only
  not run   the check needs --against, --data or --tokenizer, a validation in training (VAL_LOSS_EVERY), or the version
            of train_gpt.py that wrote the artifact

The exit status is 0 if no line is FAIL or missing. Submissions of other projects, which have fields and logs of their
own, are checked as far as they can be read.

Nothing in the folder is executed unless --data is given. --data runs the folder's train_gpt.py on its artifact, as this
user, and lets records/audit.py judge it.
"""

import argparse
import difflib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import submission as s

import train_gpt as tg


class Line(NamedTuple):
    status: str
    name: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.status:8} {self.name:13} {self.evidence}"


class Verdict(Exception):
    """A check raises this when it does not pass."""

    def __init__(self, status: str, evidence: str):
        super().__init__(evidence)
        self.status = status


def fail(faults: list[str]) -> None:
    """End the check if there are faults."""
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise Verdict("FAIL", "; ".join(faults[:4]) + more)


def need(value: Any, what: str) -> Any:
    """The value. If there is none, the check ends as `missing`."""
    if value is None or value in ({}, [], ""):
        raise Verdict("missing", what)
    return value


def first(source: dict[str, Any], *names: str) -> Any:
    """The number under the first of these names that has one, or None."""
    return next((source[name] for name in names if s.is_number(source.get(name))), None)


class Submission:
    """The content of a folder. RunError if there is no submission.json or a JSON file cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        if not (self.folder / s.SUBMISSION).is_file():
            raise tg.RunError(f"{folder}: no {s.SUBMISSION} in it")
        path = self.folder / s.SUBMISSION
        self.data, self.repeated = s.parse_object(path.read_bytes(), path, Decimal)
        self.track = str(self.data.get("track") or self.folder.parent.name)
        self.record = "non_record" not in self.track and "non-record" not in self.track
        self.seed_results = self.read_seed_results()
        self.seeds = list(self.seed_results)  # as text
        named = {path: re.findall(r"\d+", path.stem) for path in sorted(self.folder.glob("*.log"))}
        logs = {seed: path for seed in self.seeds for path, numbers in named.items() if seed in numbers}
        if not self.seeds:
            logs = {numbers[-1] if numbers else path.stem: path for path, numbers in named.items()}
        self.log_texts = {seed: path.read_text(errors="replace") for seed, path in logs.items()}
        self.logs = {seed: s.read_log(text) for seed, text in self.log_texts.items()}
        self.results = {seed: s.read_json(path) for seed, path in self.files("result_seed{}.json").items()}
        self.runs = list(self.results.values())
        self.verdicts = {seed: s.read_json(path) for seed, path in self.files("audit_seed{}.json").items()}
        self.artifacts = self.files("final_model_seed{}.int6.ptz")
        self.score_digits = s.SCORE_DIGITS if self.results else s.FIELD_SCORE_DIGITS
        try:
            self.readme = (self.folder / s.README).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            self.readme = None
        self.against: Submission | None = None
        self.data_path = self.tokenizer_path = None  # what --data and --tokenizer say

    def read_seed_results(self) -> dict[str, dict[str, Any]]:
        """Seed -> its figures. Submissions give them as objects by seed, as bare scores by seed, or as a list of
        objects.
        """
        found = self.data.get("seed_results")
        if isinstance(found, list):
            found = {row["seed"]: row for row in found if isinstance(row, dict) and "seed" in row}
        if not isinstance(found, dict):
            return {}
        rows = {re.sub(r"^seed_?", "", str(seed)): row for seed, row in found.items()}
        return {seed: {"val_bpb": row} if s.is_number(row) else row for seed, row in rows.items()
                if isinstance(row, dict) or s.is_number(row)}

    def config(self) -> dict[str, Any]:
        """The settings of the first run. The check ends as `missing` if no run has them."""
        need(self.runs, "no result_seed<seed>.json, so the settings are not known")
        return self.runs[0]["config"]

    def files(self, name: str) -> dict[str, Path]:
        """Seed -> the path of the file with this name and the seed in it, where the folder has one."""
        paths = {seed: self.folder / name.format(seed) for seed in self.seeds}
        return {seed: path for seed, path in paths.items() if path.is_file()}

    def tokenizers(self) -> list[Path]:
        """The tokenizer files that exist: the folder's own, and that of --tokenizer. Without --tokenizer it is the one
        beside the shards that has the name of the run's tokenizer.
        """
        places = [self.folder / s.TOKENIZER, self.tokenizer_path]
        if self.data_path and not self.tokenizer_path:
            places.append(self.data_path.parent.parent / "tokenizers" / Path(self.config()["tokenizer_path"]).name)
        return [path.resolve() for path in places if path and path.is_file()]

    def byte_table(self) -> tg.ByteTable:
        """The byte table that the script makes of tokenizer and BOS_ID. The check fails if the script refuses them."""
        config, path = self.config(), self.tokenizers()[0]
        try:
            return tg.read_tokenizer(str(path), config["vocab_size"], config.get("bos_id"))
        except tg.RunError as e:
            raise Verdict("FAIL", str(e).replace(str(path), path.name)) from None

    def figures(self, key: str) -> list[float]:
        """val_loss or val_bpb of each seed, to 8 digits, from its result, or else from submission.json. If that lists
        no seeds, the figures come from the logs. The list is empty unless every seed has a figure.
        """
        rows = [first(self.results.get(seed, row), key) for seed, row in self.seed_results.items()]
        rows = rows or [log.get(key) for log in self.logs.values()]
        return [] if None in rows else [round(float(v), 8) for v in rows]

    def limit(self, faults: list[str]) -> None:
        """Like fail(), but on the non-record track the check ends only with a note."""
        if faults and not self.record:
            raise Verdict("note", "; ".join(faults[:4]))
        fail(faults)

    def audit(self, name: str) -> list[str]:
        """What is wrong with this check in the runs' audits. The check ends as `missing` if a run has no such audit."""
        faults = []
        for seed in need(self.results, "no result_seed<seed>.json"):
            checks = self.verdicts.get(seed, {}).get("checks", {})
            found = need(checks.get(name), f"seed {seed}: no audit of {name}; records/audit.py makes one")
            if not found["ok"]:
                faults.append(f"seed {seed}: {name} failed: {found['detail']}")
        return faults


# ----------------------------------------------------------------------------------------------------------------------
# The folder and submission.json


def check_files(sub: Submission) -> str:
    names = [s.README, s.SUBMISSION, s.CODE, s.REQUIREMENTS]
    if sub.results or "code_sha256" in sub.data:  # made by make_submission.py
        names += [name for seed in sub.seeds
                  for name in (f"train_seed{seed}.log", f"result_seed{seed}.json", f"audit_seed{seed}.json")]
    absent = [name for name in names if not (sub.folder / name).exists()]
    logs = list(sub.folder.glob("*.log"))
    if len(logs) < s.LEAST_SEEDS:
        absent.append(f"logs of {s.LEAST_SEEDS} seeds ({len(logs)} here)")
    files = [path for path in sub.folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    fail([f"{path.name} is a link" for path in files if path.is_symlink()]
         + ([f"{s.README} is not UTF-8 text"] if sub.readme is None and s.README not in absent else []))
    if absent:
        raise Verdict("missing", ", ".join(absent))
    return f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes"


def check_folder(sub: Submission) -> str:
    name, parent, date = sub.folder.name, sub.folder.parent.name, need(sub.data.get("date"), "no date")
    faults = [] if re.fullmatch(r"\d{4}-\d\d-\d\d_[\w.+-]+", name) else [f"{name} is not <YYYY-MM-DD>_<Name>"]
    if not faults and not str(date).startswith(name[:10]):
        faults.append(f"the folder says {name[:10]}, {s.SUBMISSION} {date}")
    if parent not in s.TRACKS:
        faults.append(f"lies in {parent}, not in {' or '.join(s.TRACKS)}")
    elif "track" in sub.data and f"track_{str(sub.data['track']).removeprefix('track_')}" != parent:
        faults.append(f"lies in {parent}, {s.SUBMISSION} says {sub.data['track']}")
    fail(faults)
    return f"{parent}/{name}"


def check_schema(sub: Submission) -> str:
    rows = [(f"seed_results.{seed}.", row, s.SEED_FIELDS) for seed, row in sub.seed_results.items()]
    rows.append(("", sub.data, s.FIELDS))
    absent = [prefix + name for prefix, row, names in rows for name in names if name not in row]
    wrong = [f"{name} is no text" for name in s.TEXTS if not isinstance(sub.data.get(name, ""), (str, type(None)))]
    wrong += [f"{name} is no number" for name in s.NUMBERS if not s.is_number(sub.data.get(name) or 0)]
    wrong += ["seeds is no list of numbers"] if not all(map(s.is_number, sub.data.get("seeds") or [])) else []
    fail([f"{name} is null or empty" for name, value in s.leaves(sub.data) if value in (None, "")] + wrong)
    if absent:
        raise Verdict("missing", ", ".join(absent))
    return f"{len(s.FIELDS)} fields, and {len(s.SEED_FIELDS)} for each seed"


def check_seeds(sub: Submission) -> str:
    listed = [str(seed) for seed in sub.data["seeds"]] if isinstance(sub.data.get("seeds"), list) else sub.seeds
    listed = need(listed or list(sub.logs), "no seeds")
    faults = [f"seed {seed} twice" for seed in sorted({x for x in listed if listed.count(x) > 1})]
    faults += [f"key {key} stands twice in {s.SUBMISSION}" for key in sub.repeated]
    if len(set(listed)) < s.LEAST_SEEDS:
        faults.append(f"{len(set(listed))} seeds, {s.LEAST_SEEDS} are needed")
    if sub.seeds and set(listed) != set(sub.seeds):
        faults.append(f"seeds are {', '.join(listed)}; seed_results has {', '.join(sub.seeds)}")
    for what, found in (("result", sub.results), ("log", sub.logs)):
        faults += [f"the {what} of seed {seed} is of seed {row['seed']}" for seed, row in found.items()
                   if row.get("seed") is not None and str(row["seed"]) != seed]
    losses = sub.figures("val_loss")
    faults += [f"seeds {a} and {b} have the same val_loss" for i, (a, x) in enumerate(zip(sub.seeds, losses))
               for b, y in zip(sub.seeds[:i], losses) if x == y]
    fail(faults)
    return ", ".join(listed)


def check_means(sub: Submission) -> str:
    faults, seen = [], []
    for key in ("val_loss", "val_bpb"):
        values = need(sub.figures(key), f"no {key} of each seed")
        mean, std = s.mean_std(values)
        said = need(first(sub.data, key, f"mean_{key}", f"{key}_mean"), f"no {key}")
        if not s.agrees(said, mean, sub.score_digits):
            faults.append(f"{key} is {said}, the mean of the seeds {mean:.8f}")
        said = first(sub.data, f"{key}_std", f"std_{key}")
        stds = [std] if sub.runs else [std, statistics.pstdev(values)]
        if said is not None and not any(s.agrees(said, found, sub.score_digits) for found in stds):
            faults.append(f"{key}_std is {said}, that of the seeds {std:.8f}")
        seen.append(f"{key} {mean:.8f} ± {std:.8f}{'' if said is not None else ' (no std is given)'}")
    fail(faults)
    return ", ".join(seen)


def check_scores(sub: Submission) -> str:
    """Compare every figure of submission.json with the run's result and with the log's text."""
    faults, count = [], 0
    for seed, row in need(sub.seed_results, "no seed_results").items():
        log = sub.logs.get(seed, {})
        if log and "val_bpb" not in log:
            faults.append(f"seed {seed}: no score in its log")
        result = s.seed_row(sub.results[seed]) if seed in sub.results else {}
        for name in s.SEED_FIELDS:
            said = first(row, *s.OTHER_NAMES.get(name, [name]))
            for what, source in (("log", log), ("result", result)):
                if said is not None and name in source:
                    count += 1
                    if not s.agrees(said, source[name], sub.score_digits if name in ("val_loss", "val_bpb") else 0):
                        faults.append(f"seed {seed}: {name} is {said}, its {what} says {source[name]}")
    fail(faults)
    if not count:
        raise Verdict("missing", "no logs or results to compare with")
    return f"{count} figures of {len(sub.seed_results)} seeds as in logs{' and results' if sub.results else ''}"


def check_at_step(sub: Submission) -> str:
    """Compare the optional scores at fixed steps in submission.json with the metrics, and the metrics with the logs."""
    scores = {seed: s.read_step_scores(sub.folder / f"metrics_seed{seed}.jsonl") for seed in sub.seeds}
    said, means, faults = sub.data.get(s.AT_STEP) or {}, s.means_at_steps(list(scores.values())), []
    if not said and not any(scores.values()):
        raise Verdict("not run", "no seed was validated in training: VAL_LOSS_EVERY does it")
    for seed, steps in scores.items():
        logged = dict(re.findall(r"^stage:step(\d+) .*val_bpb:(\d+\.\d{6})", sub.log_texts.get(seed, ""), re.M))
        for step, bpb in steps.items():
            text = logged.get(str(step))
            if text is None or not s.agrees(Decimal(text), bpb):
                faults.append(f"seed {seed}: {bpb:.6f} at step {step}, its log says {text or 'nothing'}")
    for step in sorted(said.keys() | means.keys(), key=int):
        if step not in means:
            faults.append(f"{s.AT_STEP} has step {step}, which not every seed's metrics have")
        elif first(said, step) is None or not s.agrees(said[step], means[step], s.SCORE_DIGITS):
            faults.append(f"{s.AT_STEP} is {said.get(step)} at step {step}, the mean of the seeds {means[step]:.8f}")
    fail(faults)
    return f"{', '.join(means)}: as metrics and logs of every seed say" if means else "none that every seed has"


def check_bpb(sub: Submission) -> str:
    """Bits per byte must follow from nats per token and the counts."""
    faults = []
    for seed, run in need(sub.results, "no counts of tokens and bytes").items():
        stages = run["stages"]
        for name, stage in stages.items():
            bpb = stage["val_loss"] * stage["tokens"] / (math.log(2) * stage["bytes"])
            if abs(bpb - stage["val_bpb"]) > 1e-9 * bpb:
                faults.append(f"seed {seed}, {name}: {stage['val_bpb']:.8f} bits a byte, it comes to {bpb:.8f}")
        last = list(stages)[-1]
        if (run["val_loss"], run["val_bpb"]) != (stages[last]["val_loss"], stages[last]["val_bpb"]):
            faults.append(f"seed {seed}: the score is not that of its last stage, {last}")
    fail(faults)
    return "val_loss x tokens / (ln 2 x bytes) in every stage of every seed"


# ----------------------------------------------------------------------------------------------------------------------
# Code, bytes, times


def check_settings(sub: Submission) -> str:
    config, faults = sub.config(), []
    for seed, run in sub.results.items():
        differ = [name for name in config if name not in s.OF_A_RUN and run["config"].get(name) != config[name]]
        faults += [f"seed {seed}: {name} is {run['config'].get(name)}, the first has {config[name]}" for name in differ]
        log = sub.logs.get(seed, {}).get("config")
        if log is not None:
            faults += [f"seed {seed}: {name} is {log.get(name)} in the log, {value} in the result"
                       for name, value in run["config"].items() if log.get(name) != value]
    if sub.data.get("settings") != s.environment(config):
        faults.append(f"settings in {s.SUBMISSION} are not those of the runs")
    fail(faults)
    return f"{len(config)} of {len(sub.results)} runs equal but for {', '.join(s.OF_A_RUN)}"


def check_code(sub: Submission) -> str:
    path = sub.folder / s.CODE
    if not path.is_file():
        raise Verdict("missing", s.CODE)
    size, digest = path.stat().st_size, s.sha256(path)
    sources = {s.SUBMISSION: sub.data}
    sources |= {f"the result of seed {seed}": run for seed, run in sub.results.items()}
    sources |= {f"the log of seed {seed}": log for seed, log in sub.logs.items()}
    counted = {what: first(source, "code_bytes", "bytes_code") for what, source in sources.items()}
    counted = {what: int(n) for what, n in counted.items() if n is not None}
    fail([f"{s.CODE} has {size:,} bytes, {what} counts {n:,}" for what, n in counted.items() if n != size]
         + [f"{s.CODE} is not the code of {what} (sha256)" for what, source in sources.items()
            if source.get("code_sha256", digest) != digest])
    need(counted, "nothing says how many bytes of code were counted")
    return f"{size:,} bytes, counted so {len(counted)} times; sha256 {digest[:16]}"


def check_bytes(sub: Submission) -> str:
    sizes = [first(row, *s.OTHER_NAMES["artifact_bytes"]) for row in sub.seed_results.values()]
    sizes = [int(n) for n in sizes or [log.get("artifact_bytes") for log in sub.logs.values()] if n is not None]
    total, most = first(sub.data, "bytes_total", "artifact_bytes_max", "artifact_bytes"), max(sizes, default=None)
    largest = max((int(n) for n in (total, most) if n is not None), default=0)
    faults = [f"{largest:,} bytes, {largest - s.MOST_BYTES:,} over"] if largest > s.MOST_BYTES else []
    if total is not None and most is not None and total != most:
        faults.append(f"bytes_total is {total:,}, the largest of the seeds {most:,}")
    for seed, run in sub.results.items():
        if run["bytes_total"] != run["model_bytes"] + run["code_bytes"]:
            faults.append(f"seed {seed}: {run['bytes_total']:,} bytes are not those of model and code")
    fail(faults)
    need(total, "no bytes_total")
    return f"the largest of {max(len(sizes), 1)}: {total:,} of {s.MOST_BYTES:,}"


def check_artifact(sub: Submission) -> str:
    """The artifact must be the run's to the byte, and whole. One of another version of train_gpt.py is not read."""
    faults, told, unread = [], [], []
    for seed, path in need(sub.artifacts, "no final_model_seed<seed>.int6.ptz of one of the seeds").items():
        data, run = path.read_bytes(), sub.results.get(seed, {})
        digests = {sub.seed_results[seed].get("model_sha256"), run.get("model_sha256")} - {None}
        if digests - {s.sha256(path)}:
            faults.append(f"{path.name} is not the artifact of seed {seed} (sha256)")
        if run and len(data) != run["model_bytes"]:
            faults.append(f"{path.name} has {len(data):,} bytes, the run made {run['model_bytes']:,}")
        try:
            settings = tg.read_artifact(data, path.name)[0]
            told.append(f"{path.name} is whole and of its run")
        except tg.RunError as e:
            # a version is looked at after the checksum; the same is said of a compressor that is not known
            if digests and "another version" in str(e) and data[20] != tg.ARTIFACT_VERSION:
                unread.append(f"content not looked at: {e}; its checksum is right")
            else:
                faults.append(str(e))
            continue
        faults += [f"{path.name} was made with {name.upper()}={value}, the run has {run['config'].get(name)}"
                   for name, value in settings.items() if run and run["config"].get(name) != value]
    fail(faults)
    if unread:
        raise Verdict("not run", "; ".join(unread + told))
    return "; ".join(told)


def within_the_clock(sub: Submission, field: str) -> str:
    """Compare the largest time that submission.json, result or log give for each seed with the limit."""
    found, rows = {}, {seed: s.seed_row(run) for seed, run in sub.results.items()}
    for seed in sub.seeds or sub.logs:
        told = [first(source.get(seed, {}), field) for source in (sub.seed_results, rows, sub.logs)]
        found[seed] = max((float(t) for t in told if t is not None), default=None)
    sub.limit([f"seed {seed}: {t:.1f} s, {s.MOST_SECONDS:.0f} s is the limit" for seed, t in found.items()
               if t is not None and t > s.MOST_SECONDS])
    if not found or None in found.values():
        raise Verdict("missing", f"no {field} of every seed")
    return f"at most {max(found.values()):.1f} s of {s.MOST_SECONDS:.0f} s"


def check_train_time(sub: Submission) -> str:
    return within_the_clock(sub, "train_time_s")


def check_eval_time(sub: Submission) -> str:
    return within_the_clock(sub, "eval_time_s")


def check_hardware(sub: Submission) -> str:
    said = need(sub.data.get("hardware"), "no hardware")
    fail([f"{said}, but the run of seed {seed} says {s.hardware(run)}" for seed, run in sub.results.items()
          if s.hardware(run) != said])
    sub.limit([] if re.search(r"\b8 ?x.*H100", str(said)) else [f"{said}; the record track's machine is 8 x H100"])
    return str(said)


def check_calibration(sub: Submission) -> str:
    source = sub.config()["gptq_calibration"]
    if source in ("self", "random"):
        return f"on {'text that the model draws itself' if source == 'self' else 'random tokens'}: free of the clock"
    fail([] if source == "train" else [f"on {source!r}, which is neither training text nor the model's own"])
    sub.limit([f"seed {seed}: training with calibration went over the clock" for seed, log in sub.logs.items()
               if log["over_clock"]])
    return "on training text, its time within train_time_s"


# ----------------------------------------------------------------------------------------------------------------------
# The score


def check_validation(sub: Submission) -> str:
    names = ("val_docs", "val_tokens", "val_bytes")
    first_run, faults, unsure = need(sub.runs, "no counts of documents, tokens and bytes")[0], [], []
    for seed, run in sub.results.items():
        if run["val_complete"] is None:
            unsure.append(f"seed {seed}: no manifest to say whether this is all")
        elif run["val_complete"] is not True or sub.logs.get(seed, {}).get("complete") is False:
            faults.append(f"seed {seed}: scored on part of the validation set")
        faults += [f"seed {seed}: {name} is {run[name]:,}, the first has {first_run[name]:,}" for name in names
                   if run[name] != first_run[name]]
        faults += [f"seed {seed}: stage {stage} has {score['tokens']:,} tokens and {score['bytes']:,} bytes"
                   for stage, score in run["stages"].items()
                   if (score["tokens"], score["bytes"]) != (run["val_tokens"], run["val_bytes"])]
        docs = sub.logs.get(seed, {}).get("docs")
        if docs is not None and docs != run["val_docs"]:
            faults.append(f"seed {seed}: {docs} documents in the log, {run['val_docs']} in the result")
    faults += [f"{name} in {s.SUBMISSION} is {sub.data[name]}, the runs have {first_run[name]}" for name in names
               if name in sub.data and sub.data[name] != first_run[name]]
    fail(faults)
    sub.limit(unsure)
    return ", ".join(f"{first_run[name]:,} {name[4:]}" for name in names) + ", complete, in every seed"


def check_documents(sub: Submission) -> str:
    docs = {seed: run["val_docs"] for seed, run in sub.results.items()}
    docs = docs or {seed: int(log["docs"]) for seed, log in sub.logs.items() if "docs" in log}
    counts = sorted(set(need(docs, "no count of documents").values()))
    sub.limit([f"{n:,} documents, the record track has {s.ALL_DOCUMENTS:,}" for n in counts if n != s.ALL_DOCUMENTS])
    return f"{s.ALL_DOCUMENTS:,}"


def check_audit(sub: Submission) -> str:
    of_their_own = ("no_overlap", "single_pass")  # they have lines of their own
    names = [name for name in s.audit.CHECKS if name not in of_their_own]
    faults = [fault for name in names for fault in sub.audit(name)]
    for seed, run in sub.results.items():
        faults += [f"seed {seed}: audited was another {what}" for what, key in (
            ("script", "code_sha256"), ("artifact", "model_sha256")) if sub.verdicts[seed].get(key) != run[key]]
    again = {}
    if sub.data_path and sub.artifacts:
        seed, artifact = next(iter(sub.artifacts.items()))
        copies = {"train_gpt.packed.py": sub.folder / s.CODE, "final_model.int6.ptz": artifact,
                  "result.json": sub.folder / f"result_seed{seed}.json"}
        again = run_copies(sub, copies, [Path(__file__).resolve().with_name("audit.py"), "."], "audit.json")["checks"]
    fail(faults + [f"audited here, {name} failed: {check['detail']}" for name, check in again.items()
                   if check and not check["ok"]])
    return f"{', '.join(names)} proven in every seed{', and once more here' if again else ''}"


def run_copies(sub: Submission, copies: dict[str, Path], command: list[Any], output: str, **settings: str
               ) -> dict[str, Any]:
    """Run a Python command on the data, in a folder that holds only these copies. Return the JSON object that the
    command writes there; the check fails if there is none. Of the settings in the environment only DEVICE is kept.
    """
    tokenizer, *_ = need(sub.tokenizers(), "no tokenizer; --tokenizer names one")
    ours = {name for name, *_ in tg.environment_names()} - {"DEVICE"}
    env = {name: value for name, value in os.environ.items() if name not in ours} | settings
    env |= {"DATA_PATH": str(sub.data_path), "TOKENIZER_PATH": str(tokenizer)}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in copies.items():
            shutil.copyfile(path, Path(folder, name))
        done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
        if not Path(folder, output).is_file():
            said = (done.stderr.splitlines() or ["nothing said"])[-1]
            fail([f"{Path(command[0]).name} ended with status {done.returncode}: {said}"])
        return s.read_json(Path(folder, output))


def check_overlap(sub: Submission) -> str:
    fail(sub.audit("no_overlap"))
    return "; ".join(sorted({verdict["checks"]["no_overlap"]["detail"] for verdict in sub.verdicts.values()}))


def check_order(sub: Submission) -> str:
    c = sub.config()
    faults = sub.audit("single_pass")
    if c["ttt_mode"] in ("lora", "phased"):
        if c["ttt_doc_order"] == "sorted":
            faults.append("documents sorted by length")
        elif c["ttt_doc_order"] == "bucketed" and c["ttt_bucket_window"] > 4096:
            faults.append(f"documents sorted by length in windows of {c['ttt_bucket_window']:,}")
        how = f"documents {c['ttt_doc_order']}, each with adapters of its own"
    else:
        how = "windows of the stream in its order"
    fail(faults)
    return f"every target once, left to right; {how}"


def check_tokenizer(sub: Submission) -> str:
    config, paths = sub.config(), need(sub.tokenizers(), f"no {s.TOKENIZER} in the folder; --tokenizer tells of one")
    said = sub.data.get("tokenizer") or {}
    fail([f"{path} is not that of the runs (sha256)" for path in paths if said.get("sha256") != s.sha256(path)])
    sub.byte_table()
    return f"{paths[0].name}: {config['vocab_size']:,} pieces, a lone space among them"


def check_bos(sub: Submission) -> str:
    config, faults = sub.config(), []
    if not sub.tokenizers():
        raise Verdict("not run", f"no {s.TOKENIZER} in the folder; --data or --tokenizer tells of one")
    bos = sub.byte_table().bos
    fail(["the tokenizer has no BOS, and no BOS_ID names another mark"] if bos < 0 else [])
    source = "of the tokenizer" if config.get("bos_id") is None else "by BOS_ID"
    if not sub.data_path:
        return f"id {bos}, {source} (validation shards not looked at: no --data)"
    shards = tg.find_shards(str(sub.data_path), "val")
    tokens = [tg.read_shard(shard, config["vocab_size"]) for shard in need(shards, f"no shards in {sub.data_path}")]
    docs = sum(int((t == bos).sum()) for t in tokens)
    if tokens[0][0] != bos:
        faults.append(f"the validation text starts with token {tokens[0][0]}, not with BOS {bos}")
    if docs != sub.runs[0]["val_docs"]:
        faults.append(f"{docs} BOS in the shards, {sub.runs[0]['val_docs']} documents in the results")
    fail(faults)
    return f"id {bos}, {source}; it starts the validation text and each of {docs:,} documents"


# ----------------------------------------------------------------------------------------------------------------------
# The README


def readme_parts(sub: Submission) -> tuple[dict[str, str], str]:
    if sub.readme is None:
        raise Verdict("missing", f"no {s.README}")
    sub.config()
    return s.split_readme(sub.readme)


def compare_section(sub: Submission, title: str) -> list[str]:
    """The lines of a README's section that differ from what the runs give."""
    sections, _ = readme_parts(sub)
    if title not in sections:
        raise Verdict("missing", f"no section '{title}' in {s.README}")
    ours, theirs = s.SECTIONS[title](sub.runs).splitlines(), sections[title].splitlines()
    changes = list(difflib.unified_diff(ours, theirs, n=0))[2:]  # without the names of the two
    verbs = {"+": "says", "-": "leaves out"}
    return [f"'{title}' {verbs[line[0]]}: {line[1:].strip()[:90]}" for line in changes if line[0] in verbs]


def check_claims(sub: Submission) -> str:
    faults = compare_section(sub, "What is in it") + compare_section(sub, "Settings")
    config, prose = sub.config(), f"{readme_parts(sub)[1]}\n{sub.data.get('blurb')}"
    words = re.sub(r"```.*?```|`[^`\n]*`", " ", prose, flags=re.S)
    faults += s.false_claims(f"{words}\n{str(sub.data.get('name')).replace('_', ' ')}", sub.runs[0])
    fields = tg.Settings.__dataclass_fields__
    for name, text in re.findall(r"\b([A-Z][A-Z0-9_]+)=([^\s`\"',;]+)", prose):
        field = fields.get(name.lower())
        if field and name.lower() not in (*s.OF_A_RUN, *s.OF_A_MACHINE):
            try:
                same = tg.parse_value(field, name, text.rstrip(".")) in (config[field.name], None)
            except tg.RunError:
                same = False
            faults += [] if same else [f"says {name}={text}, the runs have {config[field.name]}"]
    fail(faults)
    return "features and settings are those of the runs; the prose claims no other"


def check_numbers(sub: Submission) -> str:
    faults = compare_section(sub, "Results")
    sources = [{k: v for k, v in run.items() if k != "config"} for run in sub.runs]
    scores = [stage[key] for run in sub.runs for stage in run["stages"].values() for key in ("val_loss", "val_bpb")]
    for stage in sub.runs[0]["stages"]:
        for key in ("val_loss", "val_bpb"):
            scores += s.mean_std([run["stages"][stage][key] for run in sub.runs])
    scores += map(float, (sub.data.get(s.AT_STEP) or {}).values())
    sources += [sub.config(), sub.against.data if sub.against else {}]
    others = [float(value) for _, value in s.leaves(sources) if s.is_number(value)]
    prose = f"{readme_parts(sub)[1]}\n{sub.data.get('blurb')}"
    faults += [f"says {text}, which is in no result" for text in s.unknown_numbers(prose, scores, others)]
    fail(faults)
    return "the table is that of the results; so are the figures in the prose"


def check_command(sub: Submission) -> str:
    fail(compare_section(sub, "Reproduce"))
    return f"{len(s.environment(sub.config()))} settings, seeds {', '.join(sub.results)}, as the runs had them"


# ----------------------------------------------------------------------------------------------------------------------
# What needs more than the folder


def check_score(sub: Submission) -> str:
    if not sub.data_path:
        raise Verdict("not run", "no data: --data runs the folder's train_gpt.py on its artifact")
    sub.config()
    seed, artifact = next(iter(need(sub.artifacts, "no artifact").items()))
    run = sub.results[seed]
    dtype = re.search(r"^environment: .*, dtype (\w+)", sub.log_texts.get(seed, ""), re.M)
    again = run_copies(
        sub, {s.CODE: sub.folder / s.CODE, artifact.name: artifact}, [s.CODE], "out/result.json",
        EVAL_ONLY=artifact.name, ARTIFACT_DIR="out", EVAL_BUDGET_SECONDS="0",  # which a slower machine would overrun
        DTYPE={"bfloat16": "bf16", "float32": "fp32"}.get(dtype[1] if dtype else "", "auto"))
    gap = abs(again["val_bpb"] - run["val_bpb"])
    names = ("val_docs", "val_tokens", "val_bytes")
    faults = [f"{name} is {again[name]:,}, the run had {run[name]:,}" for name in names if again[name] != run[name]]
    if not s.audit.same_score(again["val_bpb"], run["val_bpb"], sub.log_texts.get(seed, "")):
        faults.append(f"seed {seed}: {again['val_bpb']:.8f}, its run says {run['val_bpb']:.8f}")
    fail(faults)
    return f"seed {seed}: {again['val_bpb']:.8f} from the artifact alone, {gap:.1e} from its run"


def check_significance(sub: Submission) -> str:
    if not sub.against:
        raise Verdict("not run", "no standing record: --against names its folder")
    losses, scores = (need(sub.figures(key), f"no {key} of each seed") for key in ("val_loss", "val_bpb"))
    theirs, their_scores, how = sub.against.figures("val_loss"), sub.against.figures("val_bpb"), ""
    nats = sum(losses) / sum(scores)  # a token, for each bit a byte
    if not theirs or (their_scores and abs(sum(theirs) / sum(their_scores) / nats - 1) > 1e-3):
        theirs = [score * nats for score in need(their_scores, "no scores in the standing record's folder")]
        how = " (its tokens are others, so its bits a byte are taken as nats on ours)"
    for what, values in (("this submission", losses), ("the standing record", theirs)):
        need(len(values) > 1 or None, f"{what} tells one seed; the test needs two")
    gain, found = statistics.fmean(theirs) - statistics.fmean(losses), s.welch(losses, theirs, s.MARGIN_NATS)
    better = f"{gain:.5f} nats better than {sub.against.folder.name}{how}"
    evidence = (f"{better}; more than {s.MARGIN_NATS} at p = {found.pvalue:.2g} (t = {found.statistic:.2f}, "
                f"{found.df:.1f} degrees of freedom)")
    sub.limit([f"{better}, {s.MARGIN_NATS} are needed"] if gain < s.MARGIN_NATS else [])
    sub.limit([f"{evidence}; p < {s.P_VALUE} is needed"] if not found.pvalue < s.P_VALUE else [])
    return evidence


CHECKS: tuple[Callable[[Submission], str], ...] = (
    check_files, check_folder, check_schema, check_seeds, check_means, check_scores, check_at_step, check_bpb,
    check_settings, check_code, check_bytes, check_artifact, check_train_time, check_eval_time, check_hardware,
    check_calibration, check_validation, check_documents, check_audit, check_overlap, check_order, check_tokenizer,
    check_bos, check_claims, check_numbers, check_command, check_score, check_significance)


def check(sub: Submission) -> list[Line]:
    """The lines of all checks, in order. If a check cannot read what it finds, its line is `missing`."""
    lines = []
    for function in CHECKS:
        name = function.__name__.removeprefix("check_")
        try:
            lines.append(Line("pass", name, function(sub)))
        except Verdict as e:
            lines.append(Line(e.status, name, " ".join(str(e).split())))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as e:
            lines.append(Line("missing", name, f"not in a form that can be read ({type(e).__name__}: {e})"))
        except tg.RunError as e:
            lines.append(Line("FAIL", name, " ".join(str(e).split())))
    return lines


def is_clean(lines: list[Line]) -> bool:
    return not any(line.status in ("FAIL", "missing") for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 without FAIL and missing, else 1."""
    parser = argparse.ArgumentParser(description="Check a submission's folder as a reviewer would.",
                                     epilog="--data EXECUTES the folder's train_gpt.py; nothing else does.")
    parser.add_argument("folder", type=Path, help="records/<track>/<YYYY-MM-DD>_<Name>")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the standing record, to be beaten")
    parser.add_argument("--data", type=Path, metavar="DATA_PATH",
                        help="validation shards: runs the folder's train_gpt.py on its artifact and compares the score")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="where the folder has none (default: that of the run's name, beside the shards)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)
    try:
        sub, sub.tokenizer_path = Submission(args.folder), args.tokenizer
        sub.against = Submission(args.against) if args.against else None
        sub.data_path = args.data.resolve() if args.data else None
        if args.data and not sub.data_path.is_dir():
            raise tg.RunError(f"{args.data}: no such folder")
        if args.tokenizer and not args.tokenizer.is_file():
            raise tg.RunError(f"{args.tokenizer}: no such file")
        lines = check(sub)
    except (tg.RunError, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    clean = is_clean(lines)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "track": sub.track, "clean": clean,
                          "checks": [line._asdict() for line in lines]}, indent=1, default=float))
    else:
        print("\n".join(map(str, lines)))
        counts = [f"{sum(line.status == status for line in lines)} {status}"
                  for status in ("pass", "FAIL", "missing", "note", "not run")]
        print(f"{sub.folder.name}: {', '.join(counts)}")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
