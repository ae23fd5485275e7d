"""The content of a submission and the evidence for it; make_submission.py and check_submission.py share this module.

  rules        the challenge's limits, and the fields of submission.json
  files        JSON and logs as plain data, of this project and of other submissions
  features     the techniques that a README may claim, each with the settings that make the claim true
  README       its sections are written from the runs' results, so that a check can write them again and compare
  significance Welch's t-test

A "run" is the content of a result.json. `runs` is a list of them in the order of the submission's seeds.
"""

import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_ind

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import audit

import train_gpt as tg

# ----------------------------------------------------------------------------------------------------------------------
# Rules


RECORD_TRACK, OTHER_TRACK = TRACKS = "track_10min_16mb", "track_non_record_16mb"
MOST_BYTES, MOST_SECONDS, ALL_DOCUMENTS, LEAST_SEEDS = 16_000_000, 600.0, 50_000, 3
MARGIN_NATS, P_VALUE = 0.005, 0.01
sha256 = audit.file_sha256

CODE, README, SUBMISSION, REQUIREMENTS, TOKENIZER = (
    "train_gpt.py", "README.md", "submission.json", "requirements.txt", "tokenizer.model")
TEXTS = "author github_id name blurb date track code_sha256 hardware pytorch_version attention".split()
NUMBERS = "val_loss val_bpb val_loss_std val_bpb_std bytes_total code_bytes val_docs val_tokens val_bytes".split()
FIELDS = [*TEXTS, *NUMBERS, "seeds", "seed_results", "tokenizer", "settings"]
AT_STEP = "val_bpb_at_step"  # may be absent: the mean over the seeds of each validation in training that all had
SEED_FIELDS = ("val_loss val_bpb artifact_bytes model_bytes model_sha256 steps step_avg_ms train_time_s "
               "eval_time_s").split()
OTHER_NAMES = {"artifact_bytes": ["artifact_bytes", "bytes_total", "total_bytes"], "steps": ["steps", "step_stop"]}
# digits after the point to which scores are compared, whatever their rounding: where results stand beside them, and
# where there are logs of the field alone
SCORE_DIGITS, FIELD_SCORE_DIGITS = 6, 4
# settings in which the runs of one submission may differ, and those that say where things lie on one machine
OF_A_RUN = ("seed", "run_id", "artifact_dir", "resume", "checkpoint_every", "save_model", "audit", "train_log_every")
OF_A_MACHINE = ("data_dir", "data_path", "tokenizer_path")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def parse_object(text: bytes, where: Path | str, number: Callable = float) -> tuple[dict[str, Any], list[str]]:
    """The object that a JSON text holds, and its keys that occur twice. RunError, naming `where`, if the text is no
    object.

    `number` converts numbers with a point; Decimal keeps their digits.
    """
    repeated = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a number")

    try:
        value = json.loads(text, parse_float=number, parse_constant=refuse, object_pairs_hook=collect)
    except (ValueError, RecursionError) as e:
        raise tg.RunError(f"{where}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise tg.RunError(f"{where}: holds {type(value).__name__}, expected an object")
    return value, repeated


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. RunError if the file holds none."""
    return parse_object(path.read_bytes(), path)[0]


def read_step_scores(path: Path) -> dict[int, float]:
    """Step -> val_bpb of the validations in training that a run's metrics.jsonl lists; {} if there is no such file.

    RunError, with the number of the line, if a line is damaged.
    """
    scores: dict[int, float] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        entry, _ = parse_object(line, f"{path}, line {number}")
        stage = re.fullmatch(r"step(\d+)", str(entry.get("stage")))
        if stage and (int(stage[1]) in scores or not is_number(entry.get("val_bpb"))):
            raise tg.RunError(f"{path}, line {number}: {stage[0]} stands twice, or has no number as val_bpb")
        scores |= {int(stage[1]): float(entry["val_bpb"])} if stage else {}
    return scores


def means_at_steps(scores: list[dict[int, float]]) -> dict[str, float]:
    """Step -> mean val_bpb over the seeds, given each seed's step -> val_bpb. Only steps that every seed has are in it.
    """
    steps = set.intersection(*map(set, scores)) if scores else set()
    return {str(step): round(statistics.fmean(seed[step] for seed in scores), 8) for step in sorted(steps)}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested objects and lists, each with its dotted name."""
    if not isinstance(value, (dict, list)):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, f"{name}.{key}" if name else str(key))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def digits(value: Decimal | int) -> int:
    """Digits after the point."""
    return max(0, -Decimal(value).as_tuple().exponent)


def agrees(said: Decimal | int, found: Decimal | float | int, least: int = 0) -> bool:
    """Whether two figures are equal when both are rounded to the digits of the one that has fewer, but to no fewer than
    `least`.

    A Decimal has the digits that stood in a text; a float or int is exact.
    """
    shown = min(digits(said), digits(found)) if isinstance(found, Decimal) else digits(said)
    gap = abs(Decimal(said) - Decimal(str(found)))
    return gap <= Decimal("0.5000001").scaleb(-max(shown, least))


LOG_PATTERNS = {  # of this project's logs, then of the field's; the last match in the file counts
    "artifact_bytes": [r"bytes_total:(\d+)", r"Total submission size[^:\n]*: (\d+)"],
    "code_bytes": [r"^artifact: model \d+ \+ code (\d+) =", r"Code size[^:\n]*: (\d+)"],
    "steps": [r"^trained (\d+) steps", r"stopping_early:.* step: ?(\d+)/", r"^step:(\d+)/"],
    "train_time_s": [r"^trained .* tokens in (\d+\.?\d*)s"],
    "eval_time_s": [r"total_eval_time:(\d+\.?\d*)s"],
    "docs": [r"^validation: (\d+) documents", r"total_docs:(\d+)"],
}


def read_log(text: str) -> dict[str, Any]:
    """The content of a training log: val_loss and val_bpb (Decimal, as printed), the numbers of LOG_PATTERNS, `config`
    (the settings line), `seed`, `complete` and `over_clock`. What the log does not give is absent.
    """
    said: dict[str, Any] = {}
    scores = re.findall(r"val_loss:(\d+\.\d{6,})\s+val_bpb:(\d+\.\d{6,})", text)
    final = re.findall(r"^final val_loss:(\d+\.?\d*) val_bpb:(\d+\.?\d*)", text, re.M) or scores
    if final:
        said["val_loss"], said["val_bpb"] = map(Decimal, final[-1])
    for name, patterns in LOG_PATTERNS.items():
        found = next((m for m in (re.findall(p, text, re.M) for p in patterns) if m), None)
        if found:
            said[name] = Decimal(found[-1])
    milliseconds = re.findall(r"train_time: ?(\d+)ms", text)
    if milliseconds:
        said.setdefault("train_time_s", Decimal(milliseconds[-1]) / 1000)
    seeds = re.findall(r"^\s*seed[:=] ?(\d+)\s*$", text, re.M | re.I)
    if seeds:
        said["seed"] = int(seeds[-1])
    settings = re.findall(r"^settings: (\{.*\})$", text, re.M)
    if settings:
        try:
            said["config"] = json.loads(settings[-1])
            said["seed"] = said["config"].get("seed")
        except (ValueError, RecursionError):
            pass
    complete = re.findall(r"^validation: .*, complete: (\w+)", text, re.M)
    if complete:
        said["complete"] = complete[-1] == "yes"
    said["over_clock"] = "; OVER the clock" in text
    return said


# ----------------------------------------------------------------------------------------------------------------------
# Features


class Feature(NamedTuple):
    """A technique that a model may have and a README may claim."""

    claim: str  # regular expression, case ignored: the words that claim it; empty for what every run has
    on: Callable[[dict[str, Any]], bool]  # whether these settings have it
    says: str  # a line of the README where it is on, formatted with the settings and what `facts` adds


def facts(run: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, and the words that follow from them."""
    c = run["config"]
    return c | {"head_dim": c["model_dim"] // c["num_heads"], "xsa_layers": min(c["xsa_last_n"], c["num_layers"]),
                "ve_tables": (f"a table of {c['ve_dim']} for all" if c["ve_dim"] else "a table for each") + (
                    f", and {c['ve_bigram_rows']} rows for pairs of tokens, by hash" if c["ve_bigram_rows"] else ""),
                "visits": c["num_loops"] + 1, "backend": run["attention"], "loops_from": c["loop_schedule"] or
                f"{c['enable_looping_at']:g}{' of training' if c['enable_looping_at'] <= 1 else ' steps'}"}


FEATURES = (
    Feature("", lambda c: True, "{num_layers} layers of {model_dim}, {num_heads} query and {num_kv_heads} key/value "
            "heads, MLP {mlp_mult:g}x LeakyReLU(0.5)², vocabulary {vocab_size}, windows of {train_seq_len} tokens"),
    Feature(r"partial (rotary|rope)", lambda c: c["rope_dims"] < c["head_dim"],
            "partial rotary: position turns {rope_dims} of a head's {head_dim} dimensions"),
    Feature("", lambda c: True, "query/key norm with gain from {qk_gain_init:g}, logits capped at {logit_softcap:g}"),
    Feature(r"\bXSA|exclusive self.attention", lambda c: c["xsa_layers"] > 0, "XSA on the last {xsa_layers} layers"),
    Feature(r"skip gates?|gated (u-?net|skips)", lambda c: c["skip_gates_enabled"], "gated U-Net skips"),
    Feature(r"recurren|loop(ed|ing)|RECUR_?AB|universal transformer", lambda c: c["num_loops"] > 0,
            "depth recurrence: layers {loop_start} to {loop_end} run {visits} times, from {loops_from} on, revisits "
            "joined by: {recur_blend}"),
    Feature(r"parallel residual", lambda c: c["parallel_start_layer"] < c["num_layers"],
            "parallel residuals ({parallel_mode}) from layer {parallel_start_layer} on"),
    Feature(r"var-?len|(with)?in-?(side)? documents?\b.*attention|attention.*\b(with)?in(side)? documents?|cu_seqlens",
            lambda c: c["varlen_enabled"], "attention stays inside documents, which are packed (varlen)"),
    Feature(r"bigram", lambda c: c["bigram_vocab_size"] > 0,
            "hashed bigram embedding, {bigram_vocab_size} x {bigram_dim}"),
    Feature(r"smear", lambda c: c["smear_gate_enabled"], "SmearGate ({smear_gate_mode})"),
    Feature(r"value embeddings?|\bVE\d*\b", lambda c: c["ve_enabled"],
            "value embeddings on layers {ve_layers}, {ve_tables}"),
    Feature(r"sparse.?(attention|attn).?gate", lambda c: c["sparse_attn_gate_enabled"],
            "sparse attention gate on {gate_window} inputs"),
    Feature(r"\bgated.?(attention|attn)", lambda c: c["gated_attn_enabled"], "gated attention"),
    Feature(r"(attention|attn).?out(put)?.?gate", lambda c: c["attn_out_gate_enabled"],
            "attention output gate on {gate_window} inputs"),
    Feature(r"yarn", lambda c: c["rope_yarn"], "YaRN"),
    Feature(r"key.?offset|offset.?keys|shifted.?keys", lambda c: c["key_offset"],
            "key offset: unrotated dimensions of keys are the token before's"),
    Feature(r"untied", lambda c: not c["tie_embeddings"], "untied head"),
    Feature(r"\btied", lambda c: c["tie_embeddings"], "tied embedding"),
    Feature(r"factori[sz]ed embedding", lambda c: c["embedding_dim"] > 0, "factorised embedding of {embedding_dim}"),
    Feature(r"case-?ops", lambda c: c["caseops_enabled"], "CaseOps"),
    Feature("", lambda c: True, "Muon, {muon_backend_steps} iterations, momentum {muon_momentum:g}; AdamW on the rest"),
    Feature(r"polar.?express", lambda c: c["muon_ns"] == "polar", "Polar Express coefficients in Muon"),
    Feature(r"muon-?eq|row.?normali[sz]", lambda c: c["muon_row_normalize"], "MuonEq-R: rows normalised before Muon's "
            "iterations"),
    Feature(r"muon.{0,20}\bheads?\b|head by head", lambda c: c["muon_qk_heads"],
            "Muon on queries and keys head by head"),
    Feature(r"cosine", lambda c: c["warmdown_shape"] == "cosine", "cosine warmdown over the last {warmdown_frac:g} of "
            "training, to {min_lr:g} of the learning rate"),
    Feature(r"linear.{0,12}(warmdown|schedule|decay|\blr\b)", lambda c: c["warmdown_shape"] == "linear",
            "linear warmdown over the last {warmdown_frac:g} of training, to {min_lr:g} of the learning rate"),
    Feature(r"grow\w* context|progressive.{0,12}context|\bseq\w*.?schedule",
            lambda c: c["train_seq_schedule"] not in ("", "0"), "growing context: {train_seq_schedule}"),
    Feature(r"\bEMA\b", lambda c: "ema" in c["average"] and c["ema_decay"] > 0, "EMA of the weights, {ema_decay:g}"),
    Feature(r"\bSWA\b|stochastic weight averag", lambda c: "swa" in c["average"],
            "tight SWA, a snapshot each {swa_every} steps below {swa_start_scale:g} of the learning rate"),
    Feature(r"\bQAT\b(?!-?_? ?lite)|quantization-?aware", lambda c: c["qat_enabled"],
            "late QAT below {qat_start_scale:g} of the learning rate"),
    Feature(r"QAT[-_ ]?lite", lambda c: c["qat_lite_enabled"],
            "QAT-lite on q and k of layers {qat_lite_layer_start} up"),
    Feature(r"full.?hessian|\bGPTQ\b", lambda c: True, "full-Hessian GPTQ, calibration text: {gptq_calibration}"),
    Feature(r"self-?generated|calibrat\w* on its own", lambda c: c["gptq_calibration"] == "self",
            "calibrated on its own samples (self-generated text)"),
    Feature(r"weighted steps", lambda c: c["quant_allocation"] == "auto",
            "weighted steps: from the loss's sensitivity, as fine as the budget allows"),
    Feature(r"trellis|\bTCQ\b",
            lambda c: c["quant_allocation"] == "auto" and c["compressor"] == "ans" and c["quant_trellis"],
            "trellis-coded quantization, eight states"),
    Feature(r"sd-?clip", lambda c: c["quant_allocation"] == "sdclip",
            "SDClip's grid: matrices {matrix_bits} bits, embedding {embed_bits} bits"),
    Feature(r"\bLQER\b", lambda c: c["lqer_enabled"], "LQER: rank {lqer_rank} on {lqer_top_k} matrices"),
    Feature(r"brotli", lambda c: c["compressor"] == "brotli", "Brotli"),
    Feature(r"\blzma", lambda c: c["compressor"] == "lzma", "LZMA"),
    Feature(r"\bANS\b|asymmetric numeral|entropy.?cod", lambda c: c["compressor"] == "ans",
            "ANS under tables of expected size"),
    Feature(r"n-?gram|\btilt", lambda c: c["ngram_tilt_enabled"], "n-gram tilt of order {token_order}, boost "
            "{token_boost:g}"),
    Feature(r"\bhedge", lambda c: c["ngram_tilt_enabled"] and c["hedge_enabled"], "Hedge over boosts"),
    Feature(r"sliding", lambda c: c["eval_stride"] > 0 and (c["ttt_mode"] in ("none", "chunk") or
                                                            c["eval_stages"] == "all"),
            "sliding window of {eval_seq_len} tokens, stride {eval_stride}"),
    Feature(r"\bTTT\b|test-?time train", lambda c: c["ttt_mode"] != "none",
            "test-time training on tokens already scored: {ttt_mode}"),
    Feature(r"\blora\b", lambda c: c["ttt_mode"] in ("lora", "phased"),
            "LoRA of rank {ttt_lora_rank} for each document, documents {ttt_doc_order}"),
    Feature(r"\bphased", lambda c: c["ttt_mode"] == "phased",
            "phased: all weights learn from the first {phased_ttt_prefix_docs} documents, in {phased_ttt_num_phases} "
            "pauses"),
    Feature(r"flash.?attention|\bFA-?[23]\b", lambda c: c["backend"] in ("fa2", "fa3"), "FlashAttention: {backend}"),
    Feature(r"triton|fused (mlp|kernel|ce\b|cross)", lambda c: c["fused"],
            "fused Triton kernels for the MLP and for cross-entropy"),
)
# "no SmearGate", "EMA is off": words that take a claim back, close before or after it
DENIED_BEFORE = r"\b(no|not|without|neither|nor|instead of|unlike)\b([^\w.;]+\w+){0,3}[^\w.;]*$"
DENIED_AFTER = r"^\W*(is|are) (off|not)\b"


def false_claims(prose: str, run: dict[str, Any]) -> list[str]:
    """The techniques that these words claim and that the run's settings do not have."""
    c, wrong = facts(run), []
    for feature in FEATURES:
        for found in re.finditer(feature.claim, prose, re.I) if feature.claim else ():
            denied = (re.search(DENIED_BEFORE, prose[max(0, found.start() - 60) : found.start()], re.I)
                      or re.search(DENIED_AFTER, prose[found.end() : found.end() + 20], re.I))
            if not feature.on(c) and not denied:
                wrong.append(f"claims {found[0]!r}, which the settings do not have")
                break
    return wrong


def environment(config: dict[str, Any]) -> dict[str, str]:
    """The smallest set of environment variables that gives these settings, without seed, names and places.

    ValueError if they are not settings of this version of train_gpt.py.
    """
    try:
        cfg, fields = tg.Settings(**config), tg.Settings.__dataclass_fields__
    except (TypeError, tg.RunError) as e:
        raise ValueError(f"settings of another version of train_gpt.py ({e})") from None
    fixed = {name: config[name] for name in OF_A_RUN + OF_A_MACHINE}
    chosen = {name: value for name, value in config.items() if name not in fixed and value != fields[name].default}
    # What follows from the others need not be said, but what `auto` found on the disk of the run: others have another.
    for name in [name for name in chosen if name != "caseops_enabled" or not chosen[name]]:
        rest = {k: v for k, v in chosen.items() if k != name}
        try:
            if tg.Settings(**fixed, **rest) == cfg:
                chosen = rest
        except tg.RunError:
            pass
    return {name.upper(): str(tg.shown(value)) for name, value in chosen.items()}


def places(config: dict[str, Any]) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH as seen from inside the folder: the data in the repository's layout, the tokenizer
    in the folder itself.
    """
    return {"DATA_PATH": f"../../../data/datasets/{Path(config['data_path']).name}", "TOKENIZER_PATH": TOKENIZER}


def command(runs: list[dict[str, Any]]) -> str:
    """A shell loop that repeats the runs from inside the folder."""
    config, processes = runs[0]["config"], runs[0]["world_size"]
    names = places(config) | environment(config)
    call = f"torchrun --standalone --nproc_per_node={processes} {CODE}" if processes > 1 else f"python {CODE}"
    words = ["SEED=$SEED", *(f"{name}={shlex.quote(value)}" for name, value in names.items()), call]
    body = " \\\n        ".join(words)
    return f"for SEED in {' '.join(str(run['seed']) for run in runs)}; do\n    {body}\ndone"


# ----------------------------------------------------------------------------------------------------------------------
# README


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def step_ms(run: dict[str, Any]) -> float:
    """Milliseconds of a training step, calibration left out."""
    return 1000 * run["tokens_seen"] / run["tok_per_s"] / max(run["steps"], 1)


def seed_row(run: dict[str, Any]) -> dict[str, Any]:
    """The figures of a seed in submission.json before they are rounded."""
    return {name: run[name] for name in ("val_loss", "val_bpb", "model_bytes", "steps")} | {
        "artifact_bytes": run["bytes_total"], "step_avg_ms": step_ms(run), "train_time_s": run["train_seconds"],
        "eval_time_s": run["eval_seconds"]}


def table(head: str, rows: list[str]) -> str:
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count(" | ") + 1), *(f"| {row} |" for row in rows)])


STAGES = {"pre_quant": "trained, full precision", "quantized": "compressed and reloaded", "sliding": "sliding window",
          "ttt": "with test-time training"}


def results_section(runs: list[dict[str, Any]]) -> str:
    rows = [f"{run['seed']} | {run['val_loss']:.8f} | {run['val_bpb']:.8f} | {run['model_bytes']:,} | "
            f"{run['code_bytes']:,} | {run['bytes_total']:,} | {run['steps']:,} | {step_ms(run):.1f} | "
            f"{run['train_seconds']:.1f} | {run['eval_seconds']:.1f}" for run in runs]
    (loss, loss_std), (bpb, bpb_std) = (mean_std([round(run[k], 8) for run in runs]) for k in ("val_loss", "val_bpb"))
    rows.append(f"mean ± std | {loss:.8f} ± {loss_std:.8f} | {bpb:.8f} ± {bpb_std:.8f} |  |  |  |  |  |  | ")
    stages = []
    for name in runs[0]["stages"]:
        mean, std = mean_std([run["stages"][name]["val_bpb"] for run in runs])
        stages.append(f"{STAGES.get(name, name)} | {mean:.6f} ± {std:.6f}")
    run = runs[0]
    complete = {True: "all that its manifest lists", False: "PARTIAL", None: "no manifest to compare with"}
    return "\n\n".join([
        table("seed | val_loss (nats a token) | val_bpb | model bytes | code bytes | total bytes | steps | ms a step | "
              "train s | eval s", rows),
        table("stage | val_bpb, mean ± std", stages),
        "\n".join([
            f"Validation: {run['val_docs']:,} documents, {run['val_tokens']:,} scored tokens, "
            f"{run['val_bytes']:,} bytes, {complete[run['val_complete']]}.",
            f"Hardware: {hardware(run)}; torch {run['torch']}; attention by {run['attention']}.",
            "Standard deviations are of the sample. What each run's audit found stands in audit_seed<seed>.json."])])


def features_section(runs: list[dict[str, Any]]) -> str:
    c = facts(runs[0])
    return "\n".join(f"- {feature.says.format(**c)}" for feature in FEATURES if feature.on(c))


def settings_section(runs: list[dict[str, Any]]) -> str:
    fields = tg.Settings.__dataclass_fields__
    rows = [f"`{name}` | `{value}` | {fields[name.lower()].metadata['help']}"
            for name, value in environment(runs[0]["config"]).items()]
    return "Those that are not default:\n\n" + table("setting | value | meaning", rows)


def reproduce_section(runs: list[dict[str, Any]]) -> str:
    return ("In this folder, with the shards in the repository's `data`:\n\n```\n" + command(runs) + "\n```\n\n"
            "To score an artifact alone, set `EVAL_ONLY` to it beside the places of data and tokenizer.")


SECTIONS = {"Results": results_section, "What is in it": features_section, "Settings": settings_section,
            "Reproduce": reproduce_section}


def hardware(run: dict[str, Any]) -> str:
    return f"{run['world_size']} x {run['device']}"


def write_readme(name: str, blurb: str, runs: list[dict[str, Any]]) -> str:
    sections = [f"## {title}\n\n{section(runs)}" for title, section in SECTIONS.items()]
    return "\n\n".join([f"# {name}", blurb, *sections]) + "\n"


def split_readme(text: str) -> tuple[dict[str, str], str]:
    """The sections that are written from the results, by title, and the rest, which the author may write."""
    parts = re.split(r"^## +(.+?) *$", text, flags=re.M)
    sections, rest = {}, [parts[0]]
    for title, body in zip(parts[1::2], parts[2::2]):
        if title in SECTIONS and title not in sections:
            sections[title] = body.strip()
        else:
            rest.append(f"{title}\n{body}")
    return sections, "\n".join(rest)


def unknown_numbers(prose: str, scores: list[float], others: list[float]) -> list[str]:
    """The figures of scores (four decimals or more) and of bytes (1,234) in the prose that are neither known nor the
    difference of two scores. Lines that name a pull request (PR 1855, #1855) are not checked, since their figures are
    its own.
    """
    lines = [line for line in prose.splitlines() if not re.search(r"\bPR \d+|#\d+", line)]
    known = np.array([abs(a - b) for a in scores for b in scores] + scores + others)
    wrong = []
    for text in re.findall(r"(?<![\w.,/-])(\d+\.\d{4,}|\d{1,3}(?:,\d{3})+)(?![\w,/-]|\.\d)", "\n".join(lines)):
        value = Decimal(text.replace(",", ""))
        if not (np.abs(known - float(value)) <= 0.5000001 * 10.0 ** -digits(value)).any():
            wrong.append(text)
    return wrong


# ----------------------------------------------------------------------------------------------------------------------
# Significance


def welch(ours: list[float], theirs: list[float], margin: float) -> Any:
    """Welch's one-sided t-test of mean(theirs) - mean(ours) > margin; each sample has at least 2 values.

    Returns `statistic`, `df` and `pvalue`. The p-value is the probability of such a gain if the true gain were the
    margin.
    """
    return ttest_ind([loss - margin for loss in theirs], ours, equal_var=False, alternative="greater")
