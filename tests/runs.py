"""Whole runs at small sizes, and data for them. PyTorch is imported by those who use it: the ranks of a pretend GPU
import this module before that GPU is in place.
"""

import json
import re
import struct
import subprocess
from pathlib import Path

from forked import PLAIN, ROOT, clean_environment

MAGIC = 20240520  # of shards
RECIPES = sorted(path.parent for path in ROOT.glob("records/track_*/*/recipe.env"))
PUBLISHED = [recipe for recipe in RECIPES if (recipe / "published.json").exists()]  # of systems of others
RECIPE_OF = {recipe.name.split("_", 1)[1]: recipe for recipe in RECIPES}
SMALL = {
    "DEVICE": "cuda", "VOCAB_SIZE": "512", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
    "MLP_MULT": "2", "ROPE_DIMS": "4", "TRAIN_SEQ_LEN": "16", "TRAIN_BATCH_TOKENS": "256", "MICRO_BATCH_TOKENS": "128",
    "ITERATIONS": "2", "MAX_WALLCLOCK_SECONDS": "100000", "WARMUP_STEPS": "1", "EVAL_BATCH_TOKENS": "256",
    "EVAL_SEQ_LEN": "auto", "CASEOPS_ENABLED": "0",
    "EVAL_STRIDE": "0", "QUANT_MIN_WEIGHTS": "512", "GPTQ_CALIBRATION_BATCHES": "2", "GPTQ_RESERVE_SECONDS": "1",
    "EVAL_BUDGET_SECONDS": "0", "TTT_BATCH_SIZE": "4", "TTT_CHUNK_SIZE": "24", "TTT_EVAL_SEQ_LEN": "32",
    "TTT_LORA_RANK": "4", "TTT_EPOCHS": "1", "TTT_CHUNK_TOKENS": "128", "GLOBAL_TTT_CHUNK_TOKENS": "32",
    "PHASED_TTT_PREFIX_DOCS": "1",
}
SCALED = {"LOOP_START": "1", "LOOP_END": "1", "ENABLE_LOOPING_AT": "0.3", "PARALLEL_START_LAYER": "2",
          "VE_LAYERS": "1,2", "VE_DIM": "16", "BIGRAM_DIM": "16", "SWA_EVERY": "1", "SWA_START_SCALE": "0.9",
          "QAT_START_SCALE": "0.9", "QAT_LITE_LAYER_START": "2", "QAT_LITE_START_FRAC": "0.3", "QAT_LITE_EVERY": "1"}
BARE = {name: value for name, value in PLAIN.items() if name not in SMALL}
TOGETHER = {  # what runs are made of beside recipes
    "defaults": {}, "sliding": BARE | {"EVAL_STRIDE": "16"},
    "lora": BARE | {"TTT_MODE": "lora", "GPTQ_CALIBRATION": "self", "ATTENTION": "sdpa", "VARLEN_ENABLED": "1"},
    "phased": BARE | {"TTT_MODE": "phased", "VARLEN_ENABLED": "1", "NGRAM_TILT_ENABLED": "1", "TOKEN_ORDER": "2",
                      "TOKEN_THRESHOLD": "0.2", "HEDGE_ENABLED": "1"},
    "chunk": BARE | {"TTT_MODE": "chunk", "GPTQ_CALIBRATION": "random", "VARLEN_ENABLED": "1",
                     "TTT_CHUNK_TOKENS": "114", "EVAL_SEQ_LEN": "100", "EVAL_STRIDE": "20",
                     "EVAL_BATCH_TOKENS": "200"},  # its row is padded
}


# ----- data


def shard_bytes(tokens, magic: int = MAGIC, version: int = 1, count: int | None = None) -> bytes:
    """A shard of these tokens, and of what else its header says."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count) + bytes(253 * 4)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def help_topics() -> list[str]:
    """Python's own help, but for the longest topics."""
    from pydoc_data.topics import topics

    return sorted({text for text in topics.values() if len(text) < 40_000})


def export_topics(folder: Path, val: list[str], *options: str) -> None:
    """Tokenize nine in ten of these topics for training, and `val`, by 512 pieces that are trained on them."""
    import tokenize_docs

    for name, part in (("train", [t for i, t in enumerate(help_topics()) if i % 10]), ("val", val)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    status = tokenize_docs.main(["--train", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"), "--out",
                                 str(folder), "--vocab-size", "512", "--name", "topics_sp512", "--workers", "1",
                                 *options])
    assert status == 0


def published_caseops(text: str) -> str:
    """What the published CaseOps data has for a text, by the rule in the words of PR 1729: letters A to Z, by words."""
    marked, title, allcaps, cap, escape = "", "\ue001", "\ue002", "\ue003", "\ue004"
    for word in re.findall("[A-Za-z]+|[^A-Za-z]", text):
        if word in (title, allcaps, cap, escape):
            marked += escape + word
        elif not word.isascii() or word.islower() or not word.isalpha():
            marked += word
        elif len(word) > 1 and word.isupper():
            marked += allcaps + word.lower()
        else:
            first = (title if word[0].isupper() else "") + word[0].lower()
            marked += first + "".join((cap if c.isupper() else "") + c.lower() for c in word[1:])
    return marked


def short_data(tiny: dict[str, str], folder: Path) -> dict[str, str]:
    """Settings of a run of seconds; of its few documents the second ends with a chunk of 114 tokens."""
    import numpy as np
    from shards import read_shard, write_shard

    train, val = (read_shard(f"{tiny['DATA_PATH']}/fineweb_{split}_000000.bin") for split in ("train", "val"))
    write_shard(folder / "fineweb_train_000000.bin", train[:20_000])
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate([val[:n] for n in (50, 64, 24, 40)]))
    return {"DATA_PATH": str(folder)} | {name: tiny[name] for name in ("TOKENIZER_PATH", "SEED")}


# ----- settings


def settings_of(recipe) -> dict[str, str]:
    """What its recipe.env sets."""
    lines = (line.partition("#")[0].strip() for line in (recipe / "recipe.env").read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line)


def scaled(recipe) -> dict[str, str]:
    """A recipe's settings with all its techniques, at small sizes."""
    settings = settings_of(recipe)
    small = {name: "64" for name in ("BIGRAM_VOCAB_SIZE",) if name in settings}
    return PLAIN | settings | SMALL | SCALED | small


# ----- runs


def run_here(settings: dict[str, str]) -> None:
    """What the script does, in this process, which is there already; on one thread, as run_script() has it."""
    import torch

    import train_gpt as tg

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert tg.start([], tg.Launch(0, 0, 1), clean_environment(settings)) == 0
    torch.set_num_threads(threads)


def watch(tg, patch, gpu, found: dict) -> None:
    """Have `found` say what happens while a training step or the clock runs, beside what warm-up did before."""
    def off_the_clock(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args, **options):
            graphs = len(gpu.GRAPHS)
            out = real(*args, **options)
            del gpu.GRAPHS[graphs:]
            return out

        patch.setattr(owner, name, call)

    for owner, name in ((tg, "pick_attention"), (tg, "warm_up"), (tg.Evaluator, "warm_windows"),
                        (tg.Evaluator, "warm_ttt")):
        off_the_clock(owner, name)
    train, calibrate, used = tg.train, tg.calibrate, set()

    def watched_train(*args):
        used.update(gpu.USED)
        gpu.WAITS.clear()
        out = train(*args)
        found["waits"] = dict(gpu.WAITS)
        return out

    def watched_calibrate(*args):
        gpu.USED.clear()
        out = calibrate(*args)
        found["first_used"] = sorted(set(gpu.USED) - used)
        return out

    patch.setattr(tg, "train", watched_train)
    patch.setattr(tg, "calibrate", watched_calibrate)


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """With one line that says why."""
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr
