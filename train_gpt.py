"""Train a GPT in a fixed time, compress it into a fixed number of bytes, score it in bits per byte.

One file that runs under `python` or `torchrun`, on CPU or GPU, configured by environment variables alone
(`--help` lists them). It reads from top to bottom in the order the data flows:

  settings      one frozen dataclass: every environment variable, its default and its meaning
  runtime       device, processes, log files, the training clock
  data          token shards, the tokenizer's byte counts, the training windows
  kernels       causal attention behind one signature, four backends
  model         GQA, partial rotary, XSA, LeakyReLU^2 MLP, U-Net skips; weights in parameter banks; one forward pass
  optimizers    Muon on the banks (sharded over ranks), AdamW on the rest
  training      schedule, compile warm-up, the loop, EMA
  quantization  full-Hessian GPTQ on SDClip's grid
  packing       the artifact container (no pickle) and the self-extracting script that is counted
  evaluation    windows, and the scorer that turns losses into nats and bytes
  main          the run from start to result.json

Importing it runs nothing. Formulas cite the paper or the openai/parameter-golf pull request ("PR n") they come from.
"""

import ast
import dataclasses
import glob
import hashlib
import inspect
import json
import lzma
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Settings


class RunError(Exception):
    """Something the user can mend: main() prints it as one line, `error: ...`, and exits with status 1."""


def setting(default, group, meaning, *, kind=None, low=None, high=None, choices=None, aliases=None) -> Any:
    """One field of Settings. None as a default means `auto`; then `kind` says the type of an explicit value.

    `aliases` maps another environment name to {its value: ours}, or to {} when it takes the same values. Under the
    field's own name the map translates values of the field's other scripts (COMPRESSOR=pergroup).
    """
    meta = {"group": group, "help": meaning, "kind": kind or type(default), "low": low, "high": high}
    return dataclasses.field(default=default, metadata=meta | {"choices": choices, "aliases": aliases or {}})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. A field's environment name is its name in capitals. An instance is always valid."""

    run_id: str | None = setting(None, "run", "name of the run; auto: time and seed", kind=str)
    artifact_dir: str | None = setting(None, "run", "folder for everything a run writes; auto: logs/<RUN_ID>", kind=str)
    seed: int = setting(1337, "run", "seed of initial weights and of the data order", low=0)
    device: str = setting("auto", "run", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "run", "dtype of matrix products; auto: bf16 where the hardware has it",
                         choices=("auto", "bf16", "fp32"))
    compile: str = setting("auto", "run", "torch.compile the model; auto: on GPUs", choices=("auto", "0", "1"))
    attention: str = setting("auto", "run", "attention backend; auto: the first of these that works here",
                             choices=("auto", "fa3", "fa2", "varlen", "sdpa"))
    eval_only: str = setting("", "run", "path of an artifact: load and score it, no training")
    save_model: bool = setting(False, "run", "also write the averaged weights, final_model.pt")
    train_log_every: int = setting(50, "run", "steps between log lines", low=1)
    val_loss_every: int = setting(0, "run", "steps between validations during training; 0: none", low=0)

    data_dir: str = setting("./data", "data", "folder that holds datasets/ and tokenizers/")
    data_path: str | None = setting(
        None, "data", "folder of the shards; auto: <DATA_DIR>/datasets/fineweb10B_sp<VOCAB_SIZE>", kind=str)
    tokenizer_path: str | None = setting(
        None, "data", "SentencePiece model; auto: <DATA_DIR>/tokenizers/fineweb_<VOCAB_SIZE>_bpe.model", kind=str)
    vocab_size: int = setting(8192, "data", "tokens in the vocabulary", low=2, high=65536)

    num_layers: int = setting(11, "model", "physical transformer layers", low=1)
    model_dim: int = setting(512, "model", "width of the residual stream", low=8)
    num_heads: int = setting(8, "model", "query heads", low=1)
    num_kv_heads: int = setting(4, "model", "key/value heads, each shared by a group of query heads", low=1)
    mlp_mult: float = setting(4.0, "model", "MLP hidden width over MODEL_DIM", low=0.1)
    rope_dims: int = setting(16, "model", "dimensions of each head that are rotated by position", low=0)
    rope_base: float = setting(10000.0, "model", "base of the rotary frequencies", low=1.0)
    qk_gain_init: float = setting(5.0, "model", "initial gain on normalised queries, per head")
    xsa_last_n: int = setting(11, "model", "last layers whose attention drops its own value's direction", low=0)
    ln_scale: bool = setting(True, "model", "scale normed inputs by 1/sqrt(layer+1)")
    skip_gates_enabled: bool = setting(True, "model", "U-Net skips join by a learned gate instead of a sum")
    logit_softcap: float = setting(30.0, "model", "c in logits = c tanh(z/c)", low=1e-3)
    tied_embed_init_std: float = setting(0.005, "model", "standard deviation of the initial embedding", low=0.0)

    train_batch_tokens: int = setting(786432, "training", "tokens of one optimizer step, over all processes", low=1)
    train_seq_len: int = setting(2048, "training", "tokens of one training window", low=2)
    micro_batch_tokens: int | None = setting(
        None, "training", "most tokens of one forward pass; auto: 98304 on a GPU, 8192 on CPU", kind=int, low=1)
    iterations: int = setting(20000, "training", "most optimizer steps; 0: only the clock", low=0)
    max_wallclock_seconds: float = setting(600.0, "training", "training clock, calibration included; 0: none", low=0.0)
    warmup_steps: int = setting(20, "training", "compile warm-up steps on random tokens before the clock", low=0)
    warmdown_frac: float = setting(0.72, "training", "last share of training over which the LR falls to 0", low=0.0,
                                   high=1.0)
    matrix_lr: float = setting(0.026, "training", "Muon learning rate", low=0.0)
    muon_momentum: float = setting(0.97, "training", "Muon momentum after its warm-up", low=0.0, high=1.0)
    muon_momentum_warmup_start: float = setting(0.92, "training", "Muon momentum at step 0", low=0.0, high=1.0)
    muon_momentum_warmup_steps: int = setting(1500, "training", "steps of Muon's momentum warm-up", low=0)
    muon_backend_steps: int = setting(5, "training", "Newton-Schulz iterations", low=1)
    muon_wd: float = setting(0.095, "training", "decoupled weight decay of the matrices", low=0.0)
    tied_embed_lr: float = setting(0.03, "training", "AdamW learning rate of the embedding", low=0.0)
    embed_wd: float = setting(0.085, "training", "weight decay of the embedding", low=0.0)
    scalar_lr: float = setting(0.02, "training", "AdamW learning rate of vectors and scalars", low=0.0)
    adam_wd: float = setting(0.02, "training", "weight decay of vectors and scalars", low=0.0)
    beta1: float = setting(0.9, "training", "AdamW beta 1", low=0.0, high=1.0)
    beta2: float = setting(0.95, "training", "AdamW beta 2", low=0.0, high=1.0)
    adam_eps: float = setting(1e-8, "training", "AdamW epsilon", low=0.0)
    grad_clip_norm: float = setting(0.3, "training", "clip the global gradient norm to this; 0: off", low=0.0)
    ema_decay: float = setting(0.9965, "training", "decay of the weight average that is kept; 0: off", low=0.0,
                               high=0.999999)

    matrix_bits: int = setting(6, "quantization", "bits of the matrices", low=2, high=8)
    embed_bits: int = setting(8, "quantization", "bits of the tied embedding", low=2, high=8)
    matrix_clip_sigmas: float = setting(12.85, "quantization", "grid half-width of a row, in its std", low=0.1)
    attn_clip_sigmas: float | None = setting(
        None, "quantization", "the same for attention matrices; auto: MATRIX_CLIP_SIGMAS", kind=float, low=0.1)
    mlp_clip_sigmas: float | None = setting(
        None, "quantization", "the same for MLP matrices; auto: MATRIX_CLIP_SIGMAS", kind=float, low=0.1)
    embed_clip_sigmas: float = setting(20.0, "quantization", "the same for the embedding", low=0.1)
    quant_min_weights: int = setting(65536, "quantization", "matrices with fewer weights stay fp16", low=0)
    gptq_calibration: str = setting("train", "quantization", "text behind the Hessians", choices=("train", "random"))
    gptq_calibration_batches: int = setting(16, "quantization", "batches of MICRO_BATCH_TOKENS, all ranks", low=1)
    gptq_reserve_seconds: float | None = setting(
        None, "quantization", "clock kept for calibration; auto: measured in the warm-up", kind=float, low=0.0)

    compressor: str = setting("brotli", "packing", "entropy coder of the artifact", choices=("brotli", "lzma"),
                              aliases={"COMPRESSOR": {"pergroup": "brotli"}})
    artifact_budget_bytes: int = setting(16_000_000, "packing", "most bytes of model and code together", low=1)

    eval_seq_len: int | None = setting(None, "evaluation", "tokens a prediction may see; auto: TRAIN_SEQ_LEN",
                                       kind=int, low=1)
    eval_stride: int = setting(64, "evaluation", "step of the sliding window; 0: no sliding evaluation", low=0)
    eval_batch_tokens: int | None = setting(
        None, "evaluation", "most tokens of one forward pass; auto: MICRO_BATCH_TOKENS", kind=int, low=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_range(f, getattr(self, f.name))
        for name, value in {
            "run_id": f"{datetime.now():%Y%m%d-%H%M%S}-seed{self.seed}",
            "artifact_dir": os.path.join("logs", self.run_id or f"{datetime.now():%Y%m%d-%H%M%S}-seed{self.seed}"),
            "data_path": os.path.join(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}"),
            "tokenizer_path": os.path.join(self.data_dir, "tokenizers", f"fineweb_{self.vocab_size}_bpe.model"),
            "attn_clip_sigmas": self.matrix_clip_sigmas,
            "mlp_clip_sigmas": self.matrix_clip_sigmas,
            "eval_seq_len": self.train_seq_len,
        }.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.check_contradictions()

    def check_contradictions(self) -> None:
        """Raise RunError for the first pair of settings that cannot both hold."""
        head_dim = self.model_dim // self.num_heads
        for wrong, name, takes in (
            (self.model_dim % self.num_heads, "num_heads", f"a divisor of MODEL_DIM={self.model_dim}"),
            (self.num_heads % self.num_kv_heads, "num_kv_heads", f"a divisor of NUM_HEADS={self.num_heads}"),
            (self.rope_dims % 2 or self.rope_dims > head_dim, "rope_dims", f"an even number up to {head_dim}, the "
             "width of a head"),
            (self.train_batch_tokens % self.train_seq_len, "train_batch_tokens",
             f"a multiple of TRAIN_SEQ_LEN={self.train_seq_len}"),
            ((self.micro_batch_tokens or self.train_seq_len) < self.train_seq_len, "micro_batch_tokens",
             f"at least TRAIN_SEQ_LEN={self.train_seq_len}"),
            ((self.eval_batch_tokens or self.eval_seq_len) < self.eval_seq_len, "eval_batch_tokens",
             f"at least EVAL_SEQ_LEN={self.eval_seq_len}"),
            (self.eval_stride > self.eval_seq_len, "eval_stride", f"at most EVAL_SEQ_LEN={self.eval_seq_len}"),
            (not (self.iterations or self.max_wallclock_seconds), "iterations",
             "a number of steps, since MAX_WALLCLOCK_SECONDS=0 sets no clock"),
            (self.max_wallclock_seconds and (self.gptq_reserve_seconds or 0) >= self.max_wallclock_seconds,
             "gptq_reserve_seconds", f"less than MAX_WALLCLOCK_SECONDS={self.max_wallclock_seconds:g}"),
        ):
            if wrong:
                raise RunError(f"{name.upper()}={getattr(self, name)}: takes {takes}")

    @classmethod
    def group(cls, *names: str) -> list[str]:
        """Names of the fields in these groups, in order."""
        return [f.name for f in dataclasses.fields(cls) if f.metadata["group"] in names]


def check_range(f: dataclasses.Field, value) -> None:
    """Raise RunError unless `value` is in the field's range; None (auto) passes where it is the default."""
    meta, name = f.metadata, f.name.upper()
    if value is None and f.default is None:
        return
    if meta["choices"] and value not in meta["choices"]:
        raise RunError(f"{name}={value}: takes one of {', '.join(meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):  # `not >=` also stops nan
        bounds = f"from {low} to {high}" if low is not None and high is not None else f"of at least {low}"
        raise RunError(f"{name}={value}: takes {type_name(meta['kind'])} {bounds}")


def type_name(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "0 or 1", str: "text"}[kind]


def parse_value(f: dataclasses.Field, name: str, raw: str):
    """The typed value of environment variable `name`; RunError when `raw` is not one."""
    kind, raw = f.metadata["kind"], raw.strip()
    if f.default is None and raw.lower() in ("", "auto"):
        return None
    try:
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[raw.lower()]
        value = kind(raw.replace("_", "") if kind is int else raw)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        auto = " or auto" if f.default is None else ""
        raise RunError(f"{name}={raw}: takes {type_name(kind)}{auto}") from None


class Notes(NamedTuple):
    """What reading the environment found beside the values."""

    explicit: frozenset[str]  # fields the user set
    aliases: dict[str, str]  # environment name as given -> what it set
    ignored: tuple[str, ...]  # unknown names that start like one of ours


def read_settings(environ: dict[str, str]) -> tuple[Settings, Notes]:
    """Settings from environment variables. RunError on a bad value, a contradiction or a misspelt name."""
    known: dict[str, tuple[dataclasses.Field, dict[str, str]]] = {}
    for f in dataclasses.fields(Settings):
        known |= {f.name.upper(): (f, {}), **{alias: (f, values) for alias, values in f.metadata["aliases"].items()}}
    chosen, source, aliases = {}, {}, {}
    for name in sorted(set(environ) & set(known)):
        (f, values), raw = known[name], environ[name]
        value = parse_value(f, name, values.get(raw, raw))
        check_range(f, value)
        if f.name in chosen and chosen[f.name] != value:
            raise RunError(f"{name}={raw}: contradicts {source[f.name]}={environ[source[f.name]]}")
        if name != f.name.upper() or raw in values:
            aliases[f"{name}={raw}"] = f"{f.name.upper()}={value}"
        chosen[f.name], source[f.name] = value, name
    first_words = {name.split("_")[0] for name in known if "_" in name} - {"RUN", "DATA", "SAVE"}
    ignored = []
    for name in sorted(set(environ) - set(known)):
        meant = next((k for k in known if is_typo(name.upper(), k)), None)
        if meant:
            raise RunError(f"{name}={environ[name]}: no such setting; did you mean {meant}?")
        if "_" in name and name.split("_")[0] in first_words:
            ignored.append(name)
    return Settings(**chosen), Notes(frozenset(chosen), aliases, tuple(ignored))


def is_typo(name: str, known: str) -> bool:
    """True when the two are equal or one inserted, dropped, changed or swapped character apart (names of 5 up)."""
    head = len(os.path.commonprefix([name, known]))
    a, b = name[head:], known[head:]
    tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    return min(len(name), len(known)) >= 5 and (max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1]))


def help_text() -> str:
    """Every setting by group: name, type, default, meaning."""
    lines = ["usage: [NAME=value ...] python train_gpt.py [--help | --config]",
             "       [NAME=value ...] torchrun --standalone --nproc_per_node=N train_gpt.py", ""]
    for group in dict.fromkeys(f.metadata["group"] for f in dataclasses.fields(Settings)):
        lines.append(f"{group}:")
        for name in Settings.group(group):
            f = Settings.__dataclass_fields__[name]
            default = "auto" if f.default is None else int(f.default) if f.default in (True, False) else f.default
            choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
            also = [a for a in f.metadata["aliases"] if a != name.upper()]
            alias = f" [also {', '.join(also)}]" if also else ""
            kind = f.metadata["kind"].__name__
            lines.append(f"  {name.upper():28}{kind:6}{default!s:11}{f.metadata['help']}{choices}{alias}")
        lines.append("")
    return "\n".join(lines)


class Launch(NamedTuple):
    """This process among the ones torchrun started (its variables RANK, LOCAL_RANK, WORLD_SIZE)."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @classmethod
    def read(cls, environ: dict[str, str]) -> "Launch":
        return cls(*(int(environ.get(n, d)) for n, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))


# ----------------------------------------------------------------------------------------------------------------------
# Runtime


@contextmanager
def atomic_write(path: str) -> Iterator[Any]:
    """Binary file that appears under `path` whole or not at all; an error leaves neither it nor a temporary."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(e, OSError):  # a failed write() does not say which file it was
            raise RunError(f"cannot write {path}: {e.strerror or e}") from None
        raise


class Runtime:
    """Device, processes and log of one run. Rank 0 speaks and writes; the others compute."""

    def __init__(self, cfg: Settings, launch: Launch):
        self.rank, self.local_rank, self.world = launch
        cuda = torch.cuda.is_available()
        if cfg.device == "cuda" and not cuda:
            raise RunError("DEVICE=cuda: this machine has no GPU that PyTorch can use; takes cpu or auto")
        self.device = torch.device("cuda", self.local_rank) if cuda and cfg.device != "cpu" else torch.device("cpu")
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.folder, self.log_file, self.metrics_file, self.events = cfg.artifact_dir, None, None, []
        if self.rank == 0:
            os.makedirs(self.folder, exist_ok=True)
            if os.path.exists(self.path("result.json")):
                os.remove(self.path("result.json"))  # a result is of the run that finished, never of the one before
            self.log_file = open(self.path("train.log"), "w", encoding="utf-8")
            self.metrics_file = open(self.path("metrics.jsonl"), "w", encoding="utf-8")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
            torch.cuda.reset_peak_memory_stats()
        if self.world > 1:  # CPU tensors always go by Gloo: the clock agrees without waiting for the GPU
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
        for file in (self.log_file, self.metrics_file):
            if file:
                file.close()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def log(self, message: str) -> None:
        """One line to the console and train.log, from rank 0."""
        if self.rank == 0:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
            print(message, file=self.log_file, flush=True)

    def metric(self, **values) -> None:
        if self.rank == 0:
            print(json.dumps(values), file=self.metrics_file, flush=True)

    def progress(self, items: Iterable, what: str, total: int | None = None) -> tqdm:
        """A bar on rank 0's terminal; nothing where the output is a file."""
        return tqdm(items, desc=what, total=total, leave=False, disable=None if self.rank == 0 else True)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, the same float on every rank. Does not wait for the GPU."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def share_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank."""
        if self.world == 1:
            return data
        size = int(self.largest(len(data) if self.rank == 0 else 0))
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 else torch.empty(
            size, dtype=torch.uint8)
        dist.broadcast(tensor, 0)
        return tensor.numpy().tobytes()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def throttle(self) -> None:
        """Let the host run at most two steps ahead of the GPU, so that the clock means what it says."""
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.pop(0).synchronize()

    def peak_memory(self) -> int:
        """Bytes: allocated on the GPU, or resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pick_dtype(choice: str, device: torch.device) -> torch.dtype:
    """bf16 where matrix products of it are fast: any GPU we train on, and CPUs with AVX512-BF16 or AMX."""
    if choice == "auto":
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = device.type == "cuda" or features.get("avx512_bf16") or features.get("amx_bf16")
        choice = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]


class Clock:
    """Training seconds against a limit; validation in between does not count. All ranks see the slowest rank's time.

    `limit` 0 means no clock. Training must end by `limit - reserve`; the reserve is for calibration.
    """

    def __init__(self, rt: Runtime, limit: float, reserve: float):
        self.rt, self.limit, self.reserve = rt, limit, min(reserve, limit)
        self.spent, self.started, self.laps = 0.0, None, []

    def start(self) -> None:
        self.rt.sync()
        self.started = time.perf_counter()

    def stop(self) -> float:
        self.rt.sync()
        self.spent, self.started = self.seconds(), None
        return self.spent

    def seconds(self) -> float:
        return self.spent + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def tick(self) -> float:
        """Seconds agreed by all ranks; call once before each step."""
        now = self.rt.largest(self.seconds())
        self.laps = self.laps[-5:] + [now]
        return now

    def allows_step(self) -> bool:
        """Whether one more step ends in time, judged by the slowest of the last five (the GPU may lag by two)."""
        if not self.limit or len(self.laps) < 2:
            return True
        lap = max(b - a for a, b in pairwise(self.laps))
        steps = 3 if self.rt.device.type == "cuda" else 1
        return self.laps[-1] + steps * lap <= self.limit - self.reserve


# ----------------------------------------------------------------------------------------------------------------------
# Data


SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
IGNORE = -100  # target of a position that is not scored


def read_shard(path: str, vocab_size: int, check_tokens: bool = True) -> np.ndarray:
    """Tokens of a shard, (count,) uint16, memory-mapped. RunError when header, size or token range is wrong."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256:
        raise RunError(f"{path}: not a token shard: expected a header of {SHARD_HEADER_BYTES} bytes, found {size}")
    magic, version, count = (int(v) for v in header[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise RunError(f"{path}: expected magic {SHARD_MAGIC} version {SHARD_VERSION}, found {magic} and {version}")
    if count < 0 or size != SHARD_HEADER_BYTES + 2 * count:
        raise RunError(f"{path}: expected {SHARD_HEADER_BYTES + 2 * count} bytes for {count} tokens, found {size}")
    if count == 0:
        return np.zeros(0, dtype="<u2")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))
    if check_tokens and int(tokens.max()) >= vocab_size:
        raise RunError(f"{path}: expected token ids below VOCAB_SIZE={vocab_size}, found {int(tokens.max())}")
    return tokens


def shard_paths(cfg: Settings, split: str) -> list[str]:
    """Paths of the `train` or `val` shards, in order; RunError when there are none."""
    paths = sorted(glob.glob(os.path.join(glob.escape(cfg.data_path), f"fineweb_{split}_[0-9]*.bin")))
    if not paths:
        raise RunError(f"DATA_PATH={cfg.data_path}: no fineweb_{split}_*.bin there; ./run_smoke_1gpu.sh makes a small "
                       "local set, data/tokenize_docs.py makes shards from your own documents")
    return paths


class ByteTable(NamedTuple):
    """How many bytes of text a token stands for, given the token before it."""

    length: Tensor  # (V,) int32: UTF-8 bytes of the piece without its leading space
    space: Tensor  # (V,) int32: 1 where the piece starts with a space
    boundary: Tensor  # (V,) bool: control, unknown and unused pieces; text decodes from them to nothing
    space_after_boundary: int  # bytes of a space that opens a document: 0 where decoding strips it
    bos: int  # id of the token that starts a document, -1 if the tokenizer has none

    def of(self, tokens: Tensor) -> Tensor:
        """(N,) int32 bytes charged to each token of a stream (N,); the first, which is no target, costs 0."""
        tokens = tokens.long()
        after_boundary = self.boundary[tokens[:-1]].int()
        space = self.space[tokens[1:]] * (1 - after_boundary * (1 - self.space_after_boundary))
        return F.pad(self.length[tokens[1:]] + space, (1, 0))


def read_tokenizer(path: str, vocab_size: int) -> ByteTable:
    """Byte table of a SentencePiece model; RunError if it does not fit VOCAB_SIZE or cannot spell a space.

    Without a stand-alone "▁" piece SentencePiece spells a lone space as three byte tokens, which would inflate the
    byte count; such a tokenizer is refused.
    """
    import sentencepiece

    if not os.path.exists(path):
        raise RunError(f"TOKENIZER_PATH={path}: no such file; data/tokenize_docs.py makes one beside the shards")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise RunError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None
    if sp.vocab_size() != vocab_size:
        raise RunError(f"TOKENIZER_PATH={path}: has {sp.vocab_size()} pieces, expected VOCAB_SIZE={vocab_size}")
    if "▁" not in (sp.id_to_piece(i) for i in range(vocab_size)):
        raise RunError(f"TOKENIZER_PATH={path}: has no stand-alone '▁' piece, so bytes would be miscounted")
    length, space, boundary = (np.zeros(vocab_size, dtype=np.int32) for _ in range(3))
    for i in range(vocab_size):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            boundary[i] = 1
        elif sp.is_byte(i):
            length[i] = 1
        else:
            space[i] = piece.startswith("▁")
            length[i] = len(piece[space[i]:].replace("▁", " ").encode())
    keeps_space = sp.decode_pieces(["▁", "a"]).startswith(" ")
    tensors = torch.from_numpy(length), torch.from_numpy(space), torch.from_numpy(boundary).bool()
    return ByteTable(*tensors, int(keeps_space), sp.bos_id())


class Validation(NamedTuple):
    """The text that is scored, whole."""

    tokens: Tensor  # (N,) int32 on the CPU
    bytes: Tensor  # (N,) int32: bytes charged to each
    docs: int
    complete: bool | None  # as the manifest says; None without a manifest

    @classmethod
    def load(cls, cfg: Settings, table: ByteTable) -> "Validation":
        paths = shard_paths(cfg, "val")
        tokens = torch.from_numpy(np.concatenate([read_shard(p, cfg.vocab_size) for p in paths]).astype(np.int32))
        if len(tokens) < 2:
            raise RunError(f"DATA_PATH={cfg.data_path}: the validation shards hold {len(tokens)} tokens, nothing to "
                           "score")
        docs = int((tokens == table.bos).sum())
        found = {"files_val": len(paths), "tokens_val": len(tokens), "docs_val": docs}
        return cls(tokens, table.of(tokens), docs, matches_manifest(cfg.data_path, found))


def matches_manifest(data_path: str, found: dict[str, int]) -> bool | None:
    """Whether the counts equal those in manifest.json (beside datasets/, or in the folder); None if it has none."""
    folder = os.path.abspath(data_path)
    for path in (os.path.join(folder, "..", "..", "manifest.json"), os.path.join(folder, "manifest.json")):
        if os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as file:
                    datasets = json.load(file)["datasets"]
                stats = next((d["stats"] for d in datasets if d["name"] == os.path.basename(folder)), {})
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{os.path.normpath(path)}: not a manifest as data/tokenize_docs.py writes it") from None
            shared = [k for k in found if k in stats]
            if shared:
                return all(found[k] == stats[k] for k in shared)
    return None


class Windows:
    """Shuffled fixed windows of the training shards, in one global order that no number of ranks changes.

    Window g of the run is window g mod n of epoch g // n; an epoch is a permutation drawn from (SEED, epoch). A window
    holds TRAIN_SEQ_LEN + 1 tokens; the next one starts at its last token. Position in the run is the one number g.
    """

    def __init__(self, cfg: Settings, rt: Runtime):
        self.seq_len, self.seed, self.rt = cfg.train_seq_len, cfg.seed, rt
        paths = shard_paths(cfg, "train")
        self.shards = [read_shard(p, cfg.vocab_size, i % rt.world == rt.rank) for i, p in enumerate(paths)]
        per_shard = [max(0, (len(s) - 1) // self.seq_len) for s in self.shards]
        self.first = np.concatenate(([0], np.cumsum(per_shard)))  # index of each shard's first window
        self.count = int(self.first[-1])
        if self.count == 0:
            raise RunError(f"DATA_PATH={cfg.data_path}: no train shard holds one window of TRAIN_SEQ_LEN="
                           f"{self.seq_len} tokens and the next")
        self.epoch, self.order = -1, None

    def window(self, g: int) -> np.ndarray:
        """(seq_len + 1,) uint16 tokens of the run's g-th window."""
        epoch, index = divmod(g, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        w = int(self.order[index])
        shard = int(np.searchsorted(self.first, w, side="right")) - 1
        start = (w - int(self.first[shard])) * self.seq_len
        return self.shards[shard][start : start + self.seq_len + 1]

    def batch(self, first: int, real: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (size, seq_len) int64 on the device, of `real` windows from `first`; the rest is padding.

        Padding rows repeat no text: their targets are IGNORE, so they cost time but add nothing to loss or gradient.
        """
        tokens = np.zeros((size, self.seq_len + 1), dtype=np.int64)
        for row in range(real):
            tokens[row] = self.window(first + row)
        batch = torch.from_numpy(tokens)
        ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        targets[real:] = IGNORE
        if self.rt.device.type == "cuda":
            ids, targets = ids.pin_memory(), targets.pin_memory()
        return ids.to(self.rt.device, non_blocking=True), targets.to(self.rt.device, non_blocking=True)


class StepPlan(NamedTuple):
    """How one global batch is dealt: each rank takes `per_rank` windows in `micro` forward passes of `size`."""

    windows: int
    per_rank: int
    micro: int
    size: int

    @classmethod
    def of(cls, cfg: Settings, world: int) -> "StepPlan":
        windows = cfg.train_batch_tokens // cfg.train_seq_len
        per_rank = -(-windows // world)
        micro = -(-per_rank // (cfg.micro_batch_tokens // cfg.train_seq_len))
        return cls(windows, per_rank, micro, -(-per_rank // micro))

    def parts(self, rank: int) -> list[tuple[int, int]]:
        """(first window within the step, how many are real) of each of the rank's forward passes."""
        end = min((rank + 1) * self.per_rank, self.windows)
        firsts = [rank * self.per_rank + m * self.size for m in range(self.micro)]
        return [(first, max(0, min(self.size, end - first))) for first in firsts]


class Feeder:
    """The batches of successive steps for this rank, the next step's prepared while this one runs."""

    def __init__(self, windows: Windows, plan: StepPlan):
        self.windows, self.plan, self.position = windows, plan, 0
        self.pool, self.ready = ThreadPoolExecutor(1), None

    def _load(self, position: int) -> list[tuple[Tensor, Tensor]]:
        parts = self.plan.parts(self.windows.rt.rank)
        return [self.windows.batch(position + first, real, self.plan.size) for first, real in parts]

    def next(self) -> list[tuple[Tensor, Tensor]]:
        batches = self.ready.result() if self.ready else self._load(self.position)
        self.position += self.plan.windows
        self.ready = self.pool.submit(self._load, self.position)
        return batches

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


class Bounds(NamedTuple):
    """Documents packed into one flat sequence of N = B*T tokens: attention stays inside [cu[i], cu[i+1])."""

    cu_seqlens: Tensor  # (documents + 1,) int32, from 0 to N
    segment: Tensor  # (N,) int32: which document a token belongs to
    max_len: int  # no document is longer

    @classmethod
    def find(cls, ids: Tensor, bos: int, max_len: int) -> "Bounds":
        """Bounds of ids (B, T): a document starts at each `bos`, at each row, and after every `max_len` tokens."""
        starts = ids == bos
        starts[:, 0] = True
        flat = starts.flatten().nonzero().flatten().tolist() + [ids.numel()]
        cuts = [c for a, b in pairwise(flat) for c in range(a, b, max_len)] + [ids.numel()]
        cu = torch.tensor(cuts, dtype=torch.int32, device=ids.device)
        segment = torch.repeat_interleave(torch.arange(len(cu) - 1, dtype=torch.int32, device=ids.device),
                                          cu.diff().long())
        return cls(cu, segment, max_len)


Attend = Callable[[Tensor, Tensor, Tensor, Bounds | None], Tensor]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
    """Causal attention with grouped heads: q (B, T, H, dh), k and v (B, T, Hkv, dh) -> (B, T, H, dh). Plain PyTorch.

    With bounds, the flat sequence is cut into blocks of max_len: a query's document starts in its own block or the one
    before, so each block attends to two, under a mask of equal segments. Shapes do not depend on the documents.
    """
    if bounds is None:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                           enable_gqa=q.size(2) != k.size(2))
        return y.transpose(1, 2)
    total, size = q.size(0) * q.size(1), bounds.max_len
    pad = -total % size

    def blocks(x: Tensor) -> Tensor:  # (B, T, heads, dh) -> (blocks, heads, size, dh)
        return F.pad(x.flatten(0, 1), (0, 0, 0, 0, 0, pad)).unflatten(0, (-1, size)).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], x), dim=2)

    segment = F.pad(bounds.segment, (0, pad), value=-1).view(-1, size)
    key_segment = torch.cat((F.pad(segment, (0, 0, 1, 0), value=-2)[:-1], segment), dim=1)
    place = torch.arange(2 * size, device=q.device)
    mask = (segment[:, :, None] == key_segment[:, None, :]) & (place <= place[size:, None])
    y = F.scaled_dot_product_attention(blocks(q), with_previous(blocks(k)), with_previous(blocks(v)),
                                       attn_mask=mask[:, None], enable_gqa=q.size(2) != k.size(2))
    return y.transpose(1, 2).flatten(0, 1)[:total].view_as(q)


def attend_flash(dense: Callable, varlen: Callable) -> Attend:
    """FlashAttention's two entry points (versions 2 and 3 share them) behind our signature."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
        if bounds is None:
            y = dense(q, k, v, causal=True)
            return y[0] if isinstance(y, tuple) else y
        cu, size = bounds.cu_seqlens, bounds.max_len
        y = varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu, cu_seqlens_k=cu,
                   max_seqlen_q=size, max_seqlen_k=size, causal=True)
        return (y[0] if isinstance(y, tuple) else y).view_as(q)

    return attend


def attend_torch_varlen(varlen_attn: Callable) -> Attend:
    """PyTorch's own variable-length flash attention; without bounds SDPA is already its fixed-length form."""
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
        if bounds is None:
            return attend_sdpa(q, k, v, None)
        options = {"enable_gqa": True} if grouped else {}
        if not grouped:
            k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
        cu, size = bounds.cu_seqlens, bounds.max_len
        y = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, cu, size, size, window_size=(-1, 0),
                        **options)
        return y.view_as(q)

    return attend


def load_attention(name: str) -> Attend:
    """One backend by name; ImportError when it is not installed."""
    if name == "fa3":
        try:
            import flash_attn_interface as fa
        except ImportError:
            from kernels import get_kernel  # prebuilt; comes from the hub's cache once downloaded

            try:
                fa = get_kernel("kernels-community/flash-attn3")
            except Exception as e:  # whatever the hub client raises: no network, no build for this machine
                raise ImportError(f"no prebuilt FlashAttention 3: {e}") from None
        return attend_flash(fa.flash_attn_func, fa.flash_attn_varlen_func)
    if name == "fa2":
        import flash_attn as fa

        return attend_flash(fa.flash_attn_func, fa.flash_attn_varlen_func)
    if name == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" not in inspect.signature(varlen_attn).parameters:
            raise ImportError("torch.nn.attention.varlen needs torch 2.11")
        return attend_torch_varlen(varlen_attn)
    return attend_sdpa


def pick_attention(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attend]:
    """Name and function of the backend. All but SDPA need a GPU and bf16; RunError if the one asked for is missing."""
    flash = device.type == "cuda" and dtype == torch.bfloat16
    if choice not in ("auto", "sdpa") and not flash:
        raise RunError(f"ATTENTION={choice}: needs a GPU and bf16; takes sdpa or auto here")
    for name in (("fa3", "fa2", "varlen", "sdpa") if flash else ("sdpa",)) if choice == "auto" else (choice,):
        try:
            if name == "fa3" and torch.cuda.get_device_capability(device)[0] != 9:
                raise ImportError("FlashAttention 3 needs a Hopper GPU")
            return name, load_attention(name)
        except ImportError as e:
            if choice != "auto":
                raise RunError(f"ATTENTION={choice}: not available here ({e}); takes auto or sdpa") from None
    raise AssertionError("sdpa always loads")


# ----------------------------------------------------------------------------------------------------------------------
# Model


class Site(NamedTuple):
    """One use of one weight matrix: its role, its physical layer, and which visit of that layer this is."""

    role: str  # q, k, v, o, up, down, head
    layer: int = 0
    visit: int = 0


class Adapter(NamedTuple):
    """A low-rank addition to one projection, one per row of the batch: y += scale * (x Aᵀ) Bᵀ."""

    a: Tensor  # (batch, rank, in)
    b: Tensor  # (batch, out, rank)
    scale: float


class Hooks(NamedTuple):
    """What may ride on a linear projection. All None: a plain matrix product and nothing else."""

    adapters: dict[Site, Adapter] | None = None
    hessians: dict[str, Tensor] | None = None  # role -> (layers, in, in) fp32; sums of x xᵀ are added in place
    fake_quant: Callable[[Tensor, Site], Tensor] | None = None


NO_HOOKS = Hooks()


def linear(x: Tensor, weight: Tensor, site: Site, hooks: Hooks) -> Tensor:
    """x (..., in) times weight (out, in) -> (..., out). The one place where a weight matrix meets activations."""
    if hooks.hessians is not None and site.role in hooks.hessians:
        rows = x.detach().flatten(0, -2).float()
        hooks.hessians[site.role][site.layer].addmm_(rows.T, rows)
    if hooks.fake_quant is not None:
        weight = hooks.fake_quant(weight, site)
    y = F.linear(x, weight.to(x.dtype))
    if hooks.adapters is not None and site in hooks.adapters:
        a, b, scale = hooks.adapters[site]
        y = y + scale * ((x @ a.mT.to(x.dtype)) @ b.mT.to(x.dtype))
    return y


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension; no learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_table(length: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, dims / 2) fp32, of position times base^(-2i/dims)."""
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / max(dims, 1))
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of each head by position (half-split pairs): x (B, T, heads, dh), cos and sin (T, r)."""
    half = cos.size(-1)
    if half == 0:
        return x
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    x1, x2, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA (PR 478): y (B, T, H, dh) less its component along this position's own value, v (B, T, Hkv, dh)."""
    v = F.normalize(v, dim=-1)[:, :, :, None]  # one value per group of query heads
    y = y.unflatten(2, (v.size(2), -1))
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)


class GPT(nn.Module):
    """The language model. Matrices of one role live in one 3-D bank, vectors of one kind in one stacked parameter."""

    def __init__(self, cfg: Settings, attend: Attend = attend_sdpa, dtype: torch.dtype = torch.float32):
        """Weights are fp32; `dtype` is that of activations and matrix products."""
        super().__init__()
        self.cfg, self.attend, self.dtype = cfg, attend, dtype
        layers, d, heads = cfg.num_layers, cfg.model_dim, cfg.num_heads
        kv, hidden = cfg.num_kv_heads * (d // heads), int(cfg.mlp_mult * d)
        self.order = [(layer, 0) for layer in range(layers)]  # virtual layers: (physical layer, visit)
        skips = len(self.order) // 2
        self.tok_emb = nn.Parameter(torch.randn(cfg.vocab_size, d) * cfg.tied_embed_init_std)
        self.qo_bank = nn.Parameter(torch.cat((orthogonal(layers, d, d), torch.zeros(layers, d, d))))
        self.kv_bank = nn.Parameter(orthogonal(2 * layers, kv, d))
        self.mlp_up_bank = nn.Parameter(orthogonal(layers, hidden, d))
        self.mlp_down_bank = nn.Parameter(torch.zeros(layers, d, hidden))
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0])[None, :, None].repeat(layers, 1, d))
        self.attn_scale = nn.Parameter(torch.ones(layers, d))
        self.mlp_scale = nn.Parameter(torch.ones(layers, d))
        self.q_gain = nn.Parameter(torch.full((layers, heads), cfg.qk_gain_init))
        self.skip_weight = nn.Parameter(torch.ones(skips, d))
        if cfg.skip_gates_enabled:
            self.skip_gate = nn.Parameter(torch.zeros(skips, d))

    def forward(self, ids: Tensor, targets: Tensor | None = None, bounds: Bounds | None = None,
                hooks: Hooks = NO_HOOKS) -> Tensor:
        """Losses (B, T) fp32 in nats of targets (B, T), 0 where IGNORE; without targets, logits (B, T, V) fp32.

        ids (B, T) int64. `bounds` keeps attention inside documents of the flattened batch.
        """
        x = rms_norm(F.embedding(ids, self.tok_emb).to(self.dtype))
        x0, skips, half = x, [], len(self.order) // 2
        rope = rotary_table(ids.size(1), self.cfg.rope_dims, self.cfg.rope_base, ids.device)
        banks = [bank.unbind(0) for bank in (self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank)]
        for n, (layer, visit) in enumerate(self.order):
            if n >= half and skips:
                x = self.join_skip(x, skips.pop(), n - half)
            x = self.block(x, x0, layer, visit, banks, rope, bounds, hooks)
            if n < half:
                skips.append(x)
        logits = linear(rms_norm(x), self.tok_emb, Site("head"), hooks).float()
        logits = self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
        return losses.view_as(targets)

    def join_skip(self, x: Tensor, skip: Tensor, i: int) -> Tensor:
        """U-Net skip (PR 289) into decoder step i."""
        skip = self.skip_weight[i].to(x.dtype) * skip
        if self.cfg.skip_gates_enabled:
            return torch.lerp(skip, x, torch.sigmoid(self.skip_gate[i]).to(x.dtype))
        return x + skip

    def block(self, x: Tensor, x0: Tensor, layer: int, visit: int, banks: list, rope: tuple[Tensor, Tensor],
              bounds: Bounds | None, hooks: Hooks) -> Tensor:
        """One virtual layer: mix in x0, then attention, then MLP, each added to the residual stream x (B, T, d)."""
        scale = (layer + 1) ** -0.5 if self.cfg.ln_scale else 1.0
        mix = self.resid_mix[layer].to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y = self.attention(rms_norm(x) * scale, layer, visit, banks, rope, bounds, hooks)
        x = x + self.attn_scale[layer].to(x.dtype) * y
        y = self.mlp(rms_norm(x) * scale, layer, visit, banks, hooks)
        return x + self.mlp_scale[layer].to(x.dtype) * y

    def attention(self, n: Tensor, layer: int, visit: int, banks: list, rope: tuple[Tensor, Tensor],
                  bounds: Bounds | None, hooks: Hooks) -> Tensor:
        """Attention half of a block on normed input n (B, T, d)."""
        (qo, kv, _, _), layers, dh = banks, self.cfg.num_layers, self.cfg.model_dim // self.cfg.num_heads

        def heads(weight: Tensor, role: str) -> Tensor:
            return linear(n, weight, Site(role, layer, visit), hooks).unflatten(-1, (-1, dh))

        q, k, v = heads(qo[layer], "q"), heads(kv[layer], "k"), heads(kv[layers + layer], "v")
        q, k = rotate(rms_norm(q), *rope), rotate(rms_norm(k), *rope)
        q = q * self.q_gain[layer].to(q.dtype)[:, None]
        y = self.attend(q, k, v, bounds)
        if layer >= layers - self.cfg.xsa_last_n:
            y = exclude_self(y, v)
        return linear(y.flatten(2), qo[layers + layer], Site("o", layer, visit), hooks)

    def mlp(self, n: Tensor, layer: int, visit: int, banks: list, hooks: Hooks) -> Tensor:
        """MLP half of a block: LeakyReLU(0.5)² (PR 493) on normed input n (B, T, d)."""
        h = F.leaky_relu(linear(n, banks[2][layer], Site("up", layer, visit), hooks), 0.5).square()
        return linear(h, banks[3][layer], Site("down", layer, visit), hooks)

    def banks(self) -> dict[str, nn.Parameter]:
        """The matrices that Muon trains."""
        return {name: p for name, p in self.named_parameters() if name.endswith("_bank")}

    def vectors(self) -> dict[str, nn.Parameter]:
        """Everything small: scales, gains, mixes, gates."""
        return {name: p for name, p in self.named_parameters() if not name.endswith("_bank") and name != "tok_emb"}


def orthogonal(count: int, rows: int, cols: int) -> Tensor:
    """(count, rows, cols) random matrices with orthonormal rows or columns, whichever are fewer."""
    return torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(count)])


def build_model(cfg: Settings, rt: Runtime, attend: Attend) -> GPT:
    """The model with its initial weights from SEED, drawn on the CPU so that they do not depend on the device."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, attend, rt.dtype).to(rt.device)
    if rt.world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of `matrices` (n, rows, cols); singular values go to ~1.

    Quintic iteration X <- aX + (bA + cA²)X with A = XXᵀ on the short side (Muon, K. Jordan 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum, orthogonalised, on banks (n, rows, cols); each rank keeps and works on its share of the slices.

    A bank's gradient is summed by reduce-scatter over its slices (padded to a multiple of the ranks), its update comes
    back by all-gather; communication of one bank overlaps work on the others.
    """

    def __init__(self, params: list[nn.Parameter], cfg: Settings, rt: Runtime):
        self.params, self.cfg, self.rt = params, cfg, rt
        self.share = [-(-p.size(0) // rt.world) for p in params]  # slices of a rank
        self.momentum = [torch.zeros(n, *p.shape[1:], device=p.device) for n, p in zip(self.share, params)]

    def start_reduce(self) -> None:
        """Begin summing the gradients over ranks."""
        self.shards, self.waiting = [], []
        for p, share in zip(self.params, self.share):
            if self.rt.world == 1:
                self.shards.append(p.grad)
                continue
            grad = F.pad(p.grad, (0, 0, 0, 0, 0, share * self.rt.world - p.size(0)))
            self.shards.append(torch.empty_like(grad[:share]))
            self.waiting.append(dist.reduce_scatter_tensor(self.shards[-1], grad, async_op=True))

    def finish_reduce(self) -> list[Tensor]:
        """This rank's shares of the summed gradients; a slice stands on exactly one rank."""
        for work in self.waiting:
            work.wait()
        return self.shards

    def step(self, lr_scale: float, momentum: float) -> None:
        """W <- (1 - lr wd) W - lr sqrt(max(1, rows/cols)) NS(g + momentum m)."""
        gathered = []
        for p, share, m, grad in zip(self.params, self.share, self.momentum, self.shards):
            m.mul_(momentum).add_(grad)
            update = newton_schulz(grad.add(m, alpha=momentum), self.cfg.muon_backend_steps,
                                   torch.bfloat16 if p.is_cuda else torch.float32)
            work = None
            if self.rt.world > 1:
                mine, update = update, torch.empty(share * self.rt.world, *p.shape[1:], device=p.device)
                work = dist.all_gather_into_tensor(update, mine, async_op=True)
            gathered.append((update, work))
        lr = self.cfg.matrix_lr * lr_scale
        for p, (update, work) in zip(self.params, gathered):
            if work:
                work.wait()
            shape_scale = max(1.0, p.size(1) / p.size(2)) ** 0.5
            p.data.mul_(1 - lr * self.cfg.muon_wd).add_(update[: p.size(0)], alpha=-lr * shape_scale)


class Optimizer:
    """Muon on the banks, AdamW on the embedding and the vectors, one gradient norm over all."""

    def __init__(self, model: GPT, cfg: Settings, rt: Runtime):
        self.cfg, self.rt = cfg, rt
        self.muon = Muon(list(model.banks().values()), cfg, rt)
        groups = [
            {"params": [model.tok_emb], "lr": cfg.tied_embed_lr, "weight_decay": cfg.embed_wd},
            {"params": list(model.vectors().values()), "lr": cfg.scalar_lr, "weight_decay": cfg.adam_wd},
        ]
        self.small = [p for g in groups for p in g["params"]]
        self.adamw = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                       fused=rt.device.type == "cuda")
        self.base_lr = [g["lr"] for g in groups]

    def reduce_gradients(self) -> Tensor:
        """Sum gradients over ranks and clip them; returns the norm before clipping, a 0-dim tensor."""
        self.muon.start_reduce()
        if self.rt.world > 1:  # the small ones travel as one flat vector
            flat = self.rt.sum_(torch.cat([p.grad.flatten() for p in self.small]))
            for p, grad in zip(self.small, flat.split([p.numel() for p in self.small])):
                p.grad = grad.view_as(p)
        shards, small = self.muon.finish_reduce(), [p.grad for p in self.small]
        square = self.rt.sum_(sum(s.square().sum() for s in shards)) + sum(g.square().sum() for g in small)
        norm = square.sqrt()
        if self.cfg.grad_clip_norm > 0:
            torch._foreach_mul_(shards + small, torch.clamp(self.cfg.grad_clip_norm / (norm + 1e-6), max=1.0))
        return norm

    def step(self, lr_scale: float, momentum: float) -> None:
        """One update from the reduced gradients; `lr_scale` multiplies every learning rate. Clears the gradients."""
        self.muon.step(lr_scale, momentum)
        for group, lr in zip(self.adamw.param_groups, self.base_lr):
            group["lr"] = lr * lr_scale
        self.adamw.step()
        for p in self.muon.params + self.small:
            p.grad = None


# ----------------------------------------------------------------------------------------------------------------------
# Training


def lr_factor(cfg: Settings, frac: float) -> float:
    """Learning-rate factor when the share `frac` of training is done: 1, then linear to 0 (PR 1395)."""
    return min(1.0, max(1.0 - frac, 0.0) / cfg.warmdown_frac) if cfg.warmdown_frac > 0 else 1.0


def muon_momentum(cfg: Settings, step: int) -> float:
    """Momentum at a step: linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    done = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start + done * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)


class Trainer:
    """What one training step needs: the model, its compiled forward, optimizer and weight average."""

    def __init__(self, cfg: Settings, rt: Runtime, model: GPT, forward: Callable):
        self.cfg, self.rt, self.model, self.forward = cfg, rt, model, forward
        self.plan = StepPlan.of(cfg, rt.world)
        self.reset()

    def reset(self) -> None:
        """Fresh optimizer and average for the model's present weights."""
        self.optimizer = Optimizer(self.model, self.cfg, self.rt)
        self.params = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.params] if self.cfg.ema_decay > 0 else None

    def step(self, batches: list[tuple[Tensor, Tensor]], lr_scale: float, momentum: float) -> Tensor:
        """Forward, backward and update over one global batch; returns this rank's share of the mean loss, 0-dim."""
        total = torch.zeros((), device=self.rt.device)
        for ids, targets in batches:
            loss = self.forward(ids, targets).sum() / (self.plan.windows * self.cfg.train_seq_len)
            loss.backward()
            total += loss.detach()
        self.optimizer.reduce_gradients()
        self.optimizer.step(lr_scale, momentum)
        if self.ema is not None:
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - self.cfg.ema_decay)
        return total

    def use_average(self) -> None:
        """Put the averaged weights into the model."""
        if self.ema is not None:
            torch._foreach_copy_([p.data for p in self.params], self.ema)


def warm_up(cfg: Settings, rt: Runtime, trainer: Trainer) -> float:
    """Compile every graph a run needs on random tokens, then put everything back; returns the calibration reserve.

    The reserve (seconds) is GPTQ_RESERVE_SECONDS, or measured here: one batch's time over all of a rank's batches.
    """
    generator = torch.Generator().manual_seed(cfg.seed)

    def random_batch(rows: int, length: int) -> Tensor:
        return torch.randint(cfg.vocab_size, (rows, length), generator=generator).to(rt.device)

    initial = [p.detach().clone() for p in trainer.params]
    rows, length = trainer.plan.size, cfg.train_seq_len
    for _ in rt.progress(range(cfg.warmup_steps), "warm-up"):
        batches = [(random_batch(rows, length), random_batch(rows, length)) for _ in range(trainer.plan.micro)]
        trainer.step(batches, 1.0, cfg.muon_momentum)
    if cfg.warmup_steps:
        with torch.no_grad():
            shape = (cfg.eval_batch_tokens // cfg.eval_seq_len, cfg.eval_seq_len)
            trainer.forward(random_batch(*shape), random_batch(*shape))
    reserve = cfg.gptq_reserve_seconds or 0.0
    if cfg.gptq_reserve_seconds is None and cfg.gptq_calibration == "train" and cfg.max_wallclock_seconds:
        hessians, ids = empty_hessians(cfg, rt.device), random_batch(cfg.micro_batch_tokens // length, length)
        times = []
        for _ in range(2):  # the first pays for allocation
            rt.sync()
            start = time.perf_counter()
            add_hessians(trainer.model, hessians, ids)
            rt.sync()
            times.append(time.perf_counter() - start)
        reserve = rt.largest(1.2 * times[-1] * -(-cfg.gptq_calibration_batches // rt.world) + 0.1)
    for p, value in zip(trainer.params, initial):
        p.data.copy_(value)
    trainer.reset()
    return min(reserve, 0.5 * cfg.max_wallclock_seconds)


def train(cfg: Settings, rt: Runtime, trainer: Trainer, feeder: Feeder, clock: Clock, validate: Callable) -> int:
    """Train until the clock or ITERATIONS says stop; returns the number of steps. RunError when the loss turns NaN."""
    step, scale, pending, validated = 0, 1.0, [], 0
    clock.start()
    while True:
        now = clock.tick()
        last = (cfg.iterations and step >= cfg.iterations) or not clock.allows_step()
        if pending and (last or step <= 5 or step % cfg.train_log_every == 0):
            losses = rt.sum_(torch.stack(pending)).tolist()  # the one wait for the GPU, on logged steps
            bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
            if bad is not None:
                raise RunError(f"train_loss is {losses[bad]} at step {step - len(losses) + bad + 1}; no checkpoint was "
                               "asked for; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR")
            tokens, pending = step * cfg.train_batch_tokens, []
            rt.log(f"step:{step}/{cfg.iterations or '-'} train_loss:{losses[-1]:.4f} train_time:{now * 1e3:.0f}ms "
                   f"step_avg:{now / step * 1e3:.2f}ms tok/s:{tokens / now:,.0f} lr:{scale:.3f}")
            rt.metric(step=step, train_loss=losses[-1], lr_scale=scale, tokens=tokens, seconds=now,
                      tok_per_s=tokens / now)
        if last:
            break
        if cfg.val_loss_every and step and step % cfg.val_loss_every == 0 and step != validated:
            clock.stop()
            validate(f"step:{step}")
            clock.start()
            validated = step
        frac = step / cfg.iterations if cfg.iterations else 0.0
        if clock.limit:
            frac = max(frac, now / (clock.limit - clock.reserve))
        scale = lr_factor(cfg, frac)
        pending.append(trainer.step(feeder.next(), scale, muon_momentum(cfg, step)))
        rt.throttle()
        step += 1
    return step


# ----------------------------------------------------------------------------------------------------------------------
# Quantization


class Group(NamedTuple):
    """Matrices that are quantized alike: slices start..stop of a parameter, seen as (stop - start, rows, cols)."""

    name: str
    param: str
    start: int
    stop: int
    hessian: str  # role whose inputs they share
    bits: int
    sigmas: float

    def view(self, param: Tensor) -> Tensor:
        return param[None] if param.ndim == 2 else param[self.start : self.stop]


def quant_groups(cfg: Settings) -> list[Group]:
    """All matrices of the model by role; together they cover the banks and the embedding."""
    n, bits = cfg.num_layers, cfg.matrix_bits
    return [
        Group("q", "qo_bank", 0, n, "q", bits, cfg.attn_clip_sigmas),
        Group("o", "qo_bank", n, 2 * n, "o", bits, cfg.attn_clip_sigmas),
        Group("k", "kv_bank", 0, n, "q", bits, cfg.attn_clip_sigmas),
        Group("v", "kv_bank", n, 2 * n, "q", bits, cfg.attn_clip_sigmas),
        Group("up", "mlp_up_bank", 0, n, "up", bits, cfg.mlp_clip_sigmas),
        Group("down", "mlp_down_bank", 0, n, "down", bits, cfg.mlp_clip_sigmas),
        Group("emb", "tok_emb", 0, 1, "head", cfg.embed_bits, cfg.embed_clip_sigmas),
    ]


def empty_hessians(cfg: Settings, device: torch.device) -> dict[str, Tensor]:
    """Zero sums of x xᵀ, (layers, in, in) fp32, for each input that some matrix reads."""
    d, n = cfg.model_dim, cfg.num_layers
    widths = {"q": (n, d), "o": (n, d), "up": (n, d), "down": (n, int(cfg.mlp_mult * d)), "head": (1, d)}
    return {role: torch.zeros(count, width, width, device=device) for role, (count, width) in widths.items()}


@torch.no_grad()
def add_hessians(model: GPT, hessians: dict[str, Tensor], ids: Tensor) -> None:
    """Add Σ x xᵀ of every matrix's inputs over ids (B, T), all visits of a layer."""
    model(ids, hooks=Hooks(hessians=hessians))


def calibrate(cfg: Settings, rt: Runtime, model: GPT, windows: Windows, first: int, clock: Clock) -> dict[str, Tensor]:
    """Hessians summed over all ranks, from training windows `first`... not trained on yet, or from random tokens.

    Batches are dealt to ranks one by one, so the sum does not depend on how many there are. Training text is read on
    the running clock: a round that would not end in time is left out.
    """
    hessians, longest, done = empty_hessians(cfg, rt.device), 0.0, 0
    rows = cfg.micro_batch_tokens // cfg.train_seq_len
    generator = torch.Generator()
    for round_ in rt.progress(range(-(-cfg.gptq_calibration_batches // rt.world)), "calibration"):
        before = rt.largest(clock.seconds())
        if clock.limit and round_ and before + longest > clock.limit and cfg.gptq_calibration == "train":
            rt.log(f"calibration: the clock ends after {done} of {cfg.gptq_calibration_batches} batches")
            break
        batch = round_ * rt.world + rt.rank
        if batch < cfg.gptq_calibration_batches:
            if cfg.gptq_calibration == "train":
                ids, _ = windows.batch(first + batch * rows, rows, rows)
            else:
                generator.manual_seed(cfg.seed + batch)
                ids = torch.randint(cfg.vocab_size, (rows, cfg.train_seq_len), generator=generator).to(rt.device)
            add_hessians(model, hessians, ids)
        rt.sync()
        longest = max(longest, rt.largest(clock.seconds()) - before)
        done = min((round_ + 1) * rt.world, cfg.gptq_calibration_batches)
    for hessian in hessians.values():
        rt.sum_(hessian)
    return hessians


def clip_scales(weight: Tensor, bits: int, sigmas: float) -> Tensor:
    """SDClip (PR 1394): step of each row's symmetric grid, (..., rows) fp16, for weight (..., rows, cols)."""
    scale = sigmas * weight.float().std(dim=-1, correction=0) / (2 ** (bits - 1) - 1)
    return scale.clamp(2.0**-14, 60000.0).half()  # the least normal fp16: rows of zeros get a step too


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, bits: int, block: int = 128) -> Tensor:
    """Codes, (n, rows, cols) int8 within ±(2^(bits-1) - 1), that keep weight @ x close (GPTQ, arXiv 2210.17323).

    weight (n, rows, cols); hessian (n, cols, cols) = Σ x xᵀ; scale (n, rows) fp16, the grid's step. Columns go in
    descending diag(H); each one's rounding error is passed on to those after it through the upper Cholesky factor of
    H⁻¹, with 1 % of the mean diagonal added to H.
    """
    levels = 2 ** (bits - 1) - 1
    diagonal = hessian.double().diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    w = weight.float().gather(2, order[:, None].expand_as(weight))
    h = hessian.double().gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    mean = diagonal.mean(-1, keepdim=True)
    h.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, 0.01 * mean, 1.0))
    # H⁻¹ = UᵀU with U upper: factor H with rows and columns reversed, then invert the triangle
    lower = torch.linalg.cholesky(h.flip(-1, -2))
    eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device).expand_as(h)
    upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(-1, -2).float()
    step = scale.float()
    codes = torch.empty_like(w, dtype=torch.int8)
    for start in range(0, w.size(2), block):
        stop = min(start + block, w.size(2))
        errors = torch.empty_like(w[:, :, start:stop])
        for j in range(start, stop):
            code = (w[:, :, j] / step).round_().clamp_(-levels, levels)
            codes[:, :, j] = code.to(torch.int8)
            error = (w[:, :, j] - code * step) / upper[:, None, j, j]
            w[:, :, j + 1 : stop] -= error[:, :, None] * upper[:, j, None, j + 1 : stop]
            errors[:, :, j - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes)


@torch.no_grad()
def quantize(cfg: Settings, rt: Runtime, state: dict[str, Tensor], hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything the artifact stores, on the CPU: `<group>.codes` int8 and `<group>.scales` fp16, the rest fp16.

    A group whose matrices have fewer than QUANT_MIN_WEIGHTS weights is stored as `<group>` in fp16.
    """
    stored = {}
    for group in rt.progress(quant_groups(cfg), "GPTQ"):
        weight = group.view(state[group.param])
        if weight[0].numel() < cfg.quant_min_weights:
            stored[group.name] = weight.half()
            continue
        scales = clip_scales(weight, group.bits, group.sigmas)
        stored[f"{group.name}.codes"] = gptq(weight, hessians[group.hessian], scales, group.bits)
        stored[f"{group.name}.scales"] = scales
    covered = {g.param for g in quant_groups(cfg)}
    stored |= {name: tensor.half() for name, tensor in state.items() if name not in covered}
    return {name: tensor.cpu() for name, tensor in stored.items()}


def dequantize(cfg: Settings, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters, fp32, from what `quantize` stored. KeyError when something is missing."""
    state: dict[str, Any] = {}
    for group in quant_groups(cfg):
        if f"{group.name}.codes" in stored:
            codes, scales = stored[f"{group.name}.codes"], stored[f"{group.name}.scales"]
            weight = codes.float() * scales.float()[..., None]
        else:
            weight = stored[group.name].float()
        state.setdefault(group.param, []).append(weight)
    state = {name: torch.cat(parts) for name, parts in state.items()}
    state["tok_emb"] = state["tok_emb"][0]
    names = {g.name for g in quant_groups(cfg)}
    return state | {name: t.float() for name, t in stored.items() if name.split(".")[0] not in names}


# ----------------------------------------------------------------------------------------------------------------------
# Packing


ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLF", 1
COMPRESSORS = ("brotli", "lzma")
DTYPES = {"i1": torch.int8, "f2": torch.float16}
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def compress(data: bytes, compressor: str) -> bytes:
    if compressor == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return import_brotli().compress(data, quality=11, lgwin=24)


def decompress(data: bytes, compressor: str) -> bytes:
    if compressor == "lzma":
        return lzma.decompress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return import_brotli().decompress(data)


def import_brotli():
    try:
        import brotli
    except ImportError:
        raise RunError("COMPRESSOR=brotli: the package brotli is not installed; pip install brotli, or take "
                       "COMPRESSOR=lzma") from None
    return brotli


def to_stream(tensor: Tensor) -> bytes:
    """Codes column by column, so that neighbours share an input; fp16 as all low bytes, then all high bytes."""
    if tensor.dtype == torch.int8:
        return tensor.mT.contiguous().numpy().tobytes()
    return tensor.contiguous().numpy().view(np.uint8).reshape(-1, 2).T.tobytes()


def from_stream(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Inverse of to_stream. ValueError when the length does not fit the shape."""
    if dtype == torch.int8:
        array = np.frombuffer(data, np.int8).reshape(*shape[:-2], shape[-1], shape[-2])
        return torch.from_numpy(array.copy()).mT.contiguous()
    array = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(2, -1).T).view(np.float16)
    return torch.from_numpy(array.reshape(shape))


def write_artifact(settings: dict[str, Any], tensors: dict[str, Tensor], compressor: str) -> bytes:
    """The container: magic, version, compressor, checksum, then header and streams compressed one by one.

    The header is JSON: the settings that must match, and for each tensor its name, dtype, shape and bytes compressed.
    All fp16 tensors share the first stream; int8 tensors, (..., rows, cols), have one each. Data only: no pickle.
    """
    halves = {n: t for n, t in tensors.items() if t.dtype == torch.float16}
    codes = {n: t for n, t in tensors.items() if t.dtype == torch.int8}
    raw = [to_stream(torch.cat([t.flatten() for t in halves.values()]))] + [to_stream(t) for t in codes.values()]
    with ThreadPoolExecutor() as pool:  # the compressors release the interpreter lock
        packed = list(pool.map(lambda data: compress(data, compressor), raw))
    header = {
        "settings": settings,
        "halves": [[n, list(t.shape)] for n, t in halves.items()],
        "codes": [[n, list(t.shape)] for n, t in codes.items()],
        "bytes": [len(p) for p in packed],
    }
    head = compress(json.dumps(header, separators=(",", ":")).encode(), compressor)
    body = bytes([ARTIFACT_VERSION, COMPRESSORS.index(compressor)]) + len(head).to_bytes(4, "little") + head
    body += b"".join(packed)
    return ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body


def read_artifact(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a container. RunError, naming the file `name`, on anything that is not a whole one."""
    if data[:4] != ARTIFACT_MAGIC:
        raise RunError(f"{name}: not an artifact of this script (no {ARTIFACT_MAGIC.decode()} at its start)")
    body = data[20:]
    if hashlib.blake2b(body, digest_size=16).digest() != data[4:20]:
        raise RunError(f"{name}: checksum does not match its {len(data)} bytes: truncated or corrupted")
    if body[0] != ARTIFACT_VERSION or body[1] >= len(COMPRESSORS):
        raise RunError(f"{name}: artifact version {body[0]}, this script reads {ARTIFACT_VERSION}")
    compressor, size = COMPRESSORS[body[1]], int.from_bytes(body[2:6], "little")
    try:
        header = json.loads(decompress(body[6 : 6 + size], compressor))
        ends = np.cumsum([6 + size] + header["bytes"])
        packed = [body[a:b] for a, b in pairwise(ends)]
        with ThreadPoolExecutor() as pool:
            raw = list(pool.map(lambda stream: decompress(stream, compressor), packed))
        shapes = [shape for _, shape in header["halves"]]
        values = from_stream(raw[0], torch.float16, [-1]).split([math.prod(s) for s in shapes])
        tensors = {n: v.view(s) for (n, s), v in zip(header["halves"], values, strict=True)}
        for (n, shape), stream in zip(header["codes"], raw[1:], strict=True):
            tensors[n] = from_stream(stream, torch.int8, shape)
        return dict(header["settings"]), tensors
    except RunError:
        raise
    except Exception as e:  # the checksum held, so someone built it wrong: say so, whatever broke
        raise RunError(f"{name}: checksum holds but the content is not an artifact ({type(e).__name__}: {e})") from None


def artifact_settings(cfg: Settings) -> dict[str, Any]:
    """What stands in the artifact: the settings its weights and its score depend on."""
    names = ["vocab_size", *Settings.group("model"), "eval_seq_len", "eval_stride"]
    return {name: getattr(cfg, name) for name in names}


def adopt_settings(cfg: Settings, notes: Notes, stored: dict[str, Any], name: str) -> Settings:
    """Settings to evaluate an artifact: its own, except what the user set. RunError where the weights would not fit."""
    ours = {n: getattr(cfg, n) for n in notes.explicit}
    must_match = {"vocab_size", *Settings.group("model")}
    for key, value in stored.items():
        if key not in artifact_settings(cfg):
            raise RunError(f"{name}: made by another version of this script: it has a setting {key.upper()}")
        if key in must_match and key in ours and ours[key] != value:
            raise RunError(f"{name}: made with {key.upper()}={value}, this run has {key.upper()}={ours[key]}")
    missing = must_match - set(stored)
    if missing:
        raise RunError(f"{name}: made by another version of this script: it lacks {min(missing).upper()}")
    return Settings(**(stored | ours))


@torch.no_grad()
def load_weights(model: GPT, cfg: Settings, tensors: dict[str, Tensor], name: str) -> None:
    """Put an artifact's weights into the model. RunError unless every parameter gets one of its own shape."""
    try:
        state = dequantize(cfg, tensors)
    except (KeyError, RuntimeError) as e:
        raise RunError(f"{name}: tensors do not fit the model of its settings ({e})") from None
    params = dict(model.named_parameters())
    wrong = sorted(set(params) ^ set(state)) or [n for n in params if params[n].shape != state[n].shape]
    if wrong:
        raise RunError(f"{name}: parameter {wrong[0]} does not fit the model of its settings")
    for n, p in params.items():
        p.copy_(state[n])


PACKED_START = b"#coding:latin1\nimport lzma,linecache\n"


def pack_code(source: bytes) -> bytes:
    """The counted script: minified, compressed, and unpacked by itself when run. A packed script is given back as is.

    The compressed bytes stand in a latin-1 string literal, which costs 2 % where base85 costs 25 %; the source is
    registered with linecache so that tools that read it (Triton) find it.
    """
    if source.startswith(PACKED_START):
        return source
    try:
        import python_minifier
    except ImportError:
        raise RunError("the package python-minifier is not installed; pip install python-minifier") from None
    small = python_minifier.minify(source.decode(), remove_literal_statements=True, hoist_literals=False)
    ast.parse(small)
    data = lzma.compress(small.encode(), format=lzma.FORMAT_ALONE, filters=[
        {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0, "dict_size": 1 << 18}])
    escapes = {"\\": r"\\", "'": r"\'", "\n": r"\n", "\r": r"\r", "\0": r"\x00"}
    literal = re.sub(r"[\\'\n\r\0]", lambda m: escapes[m[0]], data.decode("latin1"))
    return PACKED_START + (f"s=lzma.decompress('{literal}'.encode('latin1')).decode();n='train_gpt'\n"
                           "linecache.cache[n]=len(s),None,s.splitlines(True),n\nexec(compile(s,n,'exec'))\n"
                           ).encode("latin1")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


class Score(NamedTuple):
    """One evaluation of the whole validation text."""

    val_loss: float  # nats a token
    val_bpb: float  # bits a byte
    tokens: int
    bytes: int
    seconds: float


class Scorer:
    """Turns losses into nats, bytes and the score; each target of the stream must be given exactly once.

    Targets are tokens 1..N-1 of the stream, boundary tokens included; index 0 takes what padding produces. Losses are
    kept by position and added in float64 in stream order, so the score does not depend on batches or ranks.
    """

    def __init__(self, rt: Runtime, target_bytes: Tensor):
        """target_bytes (N,) int32: bytes charged to each token."""
        self.rt, self.target_bytes, self.began = rt, target_bytes, time.perf_counter()
        self.losses = torch.zeros(len(target_bytes), dtype=torch.float32, device=rt.device)
        self.times = torch.zeros(len(target_bytes), dtype=torch.int32, device=rt.device)

    def add(self, positions: Tensor, losses: Tensor) -> None:
        """Losses in nats of the targets at these positions of the stream, both of any one shape; 0 for padding."""
        positions = positions.flatten()
        self.losses.index_add_(0, positions, losses.flatten().float())
        self.times.index_add_(0, positions, torch.ones_like(positions, dtype=torch.int32))

    def finish(self) -> Score:
        """The score over all ranks. RunError when a target was scored twice or never."""
        times, losses = self.rt.sum_(self.times)[1:].cpu(), self.rt.sum_(self.losses)[1:].cpu()
        wrong = (times != 1).nonzero().flatten()
        if len(wrong):
            raise RunError(f"score refused: {int((times == 0).sum())} targets never scored, {int((times > 1).sum())} "
                           f"more than once (first: token {int(wrong[0]) + 1})")
        nats, n_bytes = float(losses.double().sum()), int(self.target_bytes[1:].sum(dtype=torch.int64))
        if not math.isfinite(nats):
            raise RunError("score refused: a loss is not finite")
        bpb = nats / (math.log(2) * n_bytes) if n_bytes else math.nan
        return Score(nats / len(losses), bpb, len(losses), n_bytes, time.perf_counter() - self.began)


@torch.no_grad()
def evaluate(cfg: Settings, rt: Runtime, forward: Callable, val: Validation, stride: int, what: str) -> Score:
    """Score the stream by windows of EVAL_SEQ_LEN tokens, `stride` apart (EVAL_SEQ_LEN: windows side by side).

    The first window scores all its tokens, later ones those the window before did not reach: at most `stride`, each
    with at least EVAL_SEQ_LEN - stride tokens before it; the last one what is left. Batches are dealt whole to ranks.
    """
    length, n = cfg.eval_seq_len, len(val.tokens)
    tokens, scorer = val.tokens.to(rt.device), Scorer(rt, val.bytes)
    rows = cfg.eval_batch_tokens // length
    windows = 1 + max(0, -(-(n - 1 - length) // stride))
    batches = range(rt.rank, -(-windows // rows), rt.world)
    for batch in rt.progress(batches, what):
        window = torch.arange(batch * rows, (batch + 1) * rows, device=rt.device)[:, None]
        place = window * stride + torch.arange(length, device=rt.device)  # (rows, length): input tokens in the stream
        fresh_from = torch.where(window == 0, 0, (window - 1) * stride + length)
        scored = (place >= fresh_from) & (place < n - 1) & (window < windows)
        ids = tokens[place.clamp(max=n - 1)].long()
        targets = torch.where(scored, tokens[(place + 1).clamp(max=n - 1)].long(), IGNORE)
        scorer.add(torch.where(scored, place + 1, 0), forward(ids, targets))
    return scorer.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Main


def fit_to_device(cfg: Settings, rt: Runtime) -> Settings:
    """Resolve the `auto` values that depend on the device."""
    micro = cfg.micro_batch_tokens or max(cfg.train_seq_len, 98304 if rt.device.type == "cuda" else 8192)
    return dataclasses.replace(cfg, micro_batch_tokens=micro,
                               eval_batch_tokens=cfg.eval_batch_tokens or max(micro, cfg.eval_seq_len))


class Run:
    """One run: its settings, its stages, and the result they add up to."""

    def __init__(self, cfg: Settings, notes: Notes, rt: Runtime):
        self.cfg, self.rt, self.started = cfg, rt, datetime.now(timezone.utc)
        self.stages: dict[str, Score] = {}
        self.attention, attend = pick_attention(cfg.attention, rt.device, rt.dtype)
        self.compiled = cfg.compile == "1" or (cfg.compile == "auto" and rt.device.type == "cuda")
        name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "cpu"
        rt.log(f"settings: {json.dumps(dataclasses.asdict(cfg))}")
        for given, meant in notes.aliases.items():
            rt.log(f"alias: {given} taken as {meant}")
        if notes.ignored:
            rt.log(f"ignored, no such setting: {', '.join(notes.ignored)}")
        rt.log(f"environment: python {sys.version.split()[0]}, torch {torch.__version__}, {rt.world} x {name}, dtype "
               f"{str(rt.dtype)[6:]}, attention {self.attention}, compiled {self.compiled}")
        self.val = Validation.load(cfg, read_tokenizer(cfg.tokenizer_path, cfg.vocab_size))
        complete = {None: "unknown, no manifest", True: "yes", False: "NO, not what the manifest lists"}
        rt.log(f"validation: {self.val.docs} documents, {len(self.val.tokens)} tokens, "
               f"{int(self.val.bytes.sum(dtype=torch.int64))} bytes, complete: {complete[self.val.complete]}")
        self.model = build_model(cfg, rt, attend)
        rt.log(f"model: {sum(p.numel() for p in self.model.parameters()):,} parameters")
        self.forward = torch.compile(self.model, fullgraph=True, dynamic=False) if self.compiled else self.model
        with open(__file__, "rb") as file:
            self.code = pack_code(file.read())

    def stage(self, name: str, stride: int) -> None:
        """Evaluate, log, and keep the score under `name`."""
        score = self.stages[name] = evaluate(self.cfg, self.rt, self.forward, self.val, stride, name)
        self.rt.log(f"stage:{name} val_loss:{score.val_loss:.6f} val_bpb:{score.val_bpb:.6f} tokens:{score.tokens} "
                    f"bytes:{score.bytes} seconds:{score.seconds:.1f}")
        self.rt.metric(stage=name, val_loss=score.val_loss, val_bpb=score.val_bpb, seconds=score.seconds)

    def train(self) -> tuple[bytes, dict[str, Any]]:
        """Train, calibrate, quantize and pack; returns the artifact and the training part of the result."""
        cfg, rt = self.cfg, self.rt
        windows = Windows(cfg, rt)
        trainer = Trainer(cfg, rt, self.model, self.forward)
        rt.log(f"training: {windows.count} windows of {cfg.train_seq_len} tokens; a step is {trainer.plan.windows} of "
               f"them, {trainer.plan.micro} forward passes of {trainer.plan.size} on each rank")
        reserve = warm_up(cfg, rt, trainer)
        clock = Clock(rt, cfg.max_wallclock_seconds, reserve)
        rt.log(f"warm-up done; training clock {clock.limit:.0f}s, {clock.reserve:.1f}s of it kept for calibration")
        feeder = Feeder(windows, trainer.plan)

        def validate(name: str) -> None:
            score = evaluate(cfg, rt, self.forward, self.val, cfg.eval_seq_len, name)
            rt.log(f"{name} val_loss:{score.val_loss:.6f} val_bpb:{score.val_bpb:.6f}")
            rt.metric(stage=name, val_loss=score.val_loss, val_bpb=score.val_bpb, seconds=score.seconds)

        steps = train(cfg, rt, trainer, feeder, clock, validate)
        feeder.close()
        loop_seconds = rt.largest(clock.seconds())
        trainer.use_average()
        if cfg.gptq_calibration == "random":
            clock.stop()
        hessians = calibrate(cfg, rt, self.model, windows, steps * trainer.plan.windows, clock)
        seconds, tokens = rt.largest(clock.stop()), steps * cfg.train_batch_tokens
        rt.log(f"trained {steps} steps, {tokens} tokens in {seconds:.1f}s, {seconds - loop_seconds:.1f}s of it "
               f"calibration{'; OVER the clock' if clock.limit and seconds > clock.limit else ''}")
        if cfg.save_model and rt.rank == 0:
            with atomic_write(rt.path("final_model.pt")) as file:
                torch.save(self.model.state_dict(), file)
        self.stage("pre_quant", cfg.eval_seq_len)
        artifact = self.compress(hessians) if rt.rank == 0 else None
        return rt.share_bytes(artifact), {"steps": steps, "train_seconds": seconds, "tokens_seen": tokens,
                                          "tok_per_s": tokens / loop_seconds}

    def compress(self, hessians: dict[str, Tensor]) -> bytes:
        """Quantize and pack on this rank; the artifact's bytes as read back from disk."""
        cfg, rt, start = self.cfg, self.rt, time.perf_counter()
        tensors = quantize(cfg, rt, dict(self.model.named_parameters()), hessians)
        quantized = time.perf_counter()
        with atomic_write(rt.path("final_model.int6.ptz")) as file:
            file.write(write_artifact(artifact_settings(cfg), tensors, cfg.compressor))
        rt.log(f"quantized in {quantized - start:.1f}s, packed in {time.perf_counter() - quantized:.1f}s")
        with open(rt.path("final_model.int6.ptz"), "rb") as file:
            return file.read()

    def score(self, artifact: bytes, name: str) -> float:
        """Load the artifact over poisoned weights and run the stages; returns their seconds."""
        start = time.perf_counter()
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(math.nan)  # nothing of the trained model may reach the score but through these bytes
        load_weights(self.model, self.cfg, read_artifact(artifact, name)[1], name)
        self.stage("quantized", self.cfg.eval_seq_len)
        if self.cfg.eval_stride:
            self.stage("sliding", self.cfg.eval_stride)
        return time.perf_counter() - start

    def execute(self, artifact: bytes | None = None) -> int:
        """The whole run; with an `artifact` only its evaluation. Returns the exit status."""
        cfg, rt, trained = self.cfg, self.rt, {"steps": 0, "train_seconds": 0.0, "tokens_seen": 0, "tok_per_s": 0.0}
        name = cfg.eval_only or rt.path("final_model.int6.ptz")
        if artifact is None:
            artifact, trained = self.train()
        total = len(artifact) + len(self.code)
        fits = total <= cfg.artifact_budget_bytes
        rt.log(f"artifact: model {len(artifact)} + code {len(self.code)} = {total} bytes, budget "
               f"{cfg.artifact_budget_bytes}: {'fits' if fits else f'OVER by {total - cfg.artifact_budget_bytes}'}")
        eval_seconds = self.score(artifact, name)
        final = list(self.stages.values())[-1]
        result = {
            "val_loss": final.val_loss, "val_bpb": final.val_bpb,
            "stages": {stage: score._asdict() for stage, score in self.stages.items()},
            "val_docs": self.val.docs, "val_tokens": final.tokens, "val_bytes": final.bytes,
            "val_complete": self.val.complete,
            "model_bytes": len(artifact), "code_bytes": len(self.code), "bytes_total": total,
            "budget_bytes": cfg.artifact_budget_bytes, "fits": fits, **trained, "eval_seconds": eval_seconds,
            "peak_memory_bytes": int(rt.largest(rt.peak_memory())), "seed": cfg.seed, "world_size": rt.world,
            "device": torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "cpu",
            "torch": torch.__version__, "attention": self.attention, "config": dataclasses.asdict(cfg), "audit": None,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if rt.rank == 0:
            with atomic_write(rt.path("train_gpt.packed.py")) as file:
                file.write(self.code)
            rt.log(f"final val_loss:{final.val_loss:.8f} val_bpb:{final.val_bpb:.8f} bytes_total:{total} "
                   f"in {rt.path('result.json')}")
            with atomic_write(rt.path("result.json")) as file:
                file.write(json.dumps(result, indent=1).encode())
        return 0 if fits else 2


def start(arguments: list[str], launch: Launch, environ: dict[str, str]) -> int:
    """Read the settings and do what they say; returns the exit status. RunError for what the user can mend."""
    if arguments not in ([], ["--help"], ["--config"]):
        raise RunError(f"{' '.join(arguments)}: no such argument; settings are environment variables, see --help")
    if arguments == ["--help"]:
        print(help_text())
        return 0
    cfg, notes = read_settings(environ)
    if arguments == ["--config"]:
        print(json.dumps(dataclasses.asdict(cfg) | {"aliases": notes.aliases}, indent=1))
        return 0
    artifact = None
    if cfg.eval_only:
        with open(cfg.eval_only, "rb") as file:
            artifact = file.read()
        cfg = adopt_settings(cfg, notes, read_artifact(artifact, cfg.eval_only)[0], cfg.eval_only)
    rt = Runtime(cfg, launch)
    status = Run(fit_to_device(cfg, rt), notes, rt).execute(artifact)
    rt.close()  # not after an error: the others would see the connection close before they hear why
    return status


def main() -> int:
    """Entry point: every expected failure becomes one line on stderr and exit status 1."""
    launch = Launch.read(dict(os.environ))
    wait = 5 if launch.rank else 0  # what befalls every rank is rank 0's to say: then torchrun ends the others
    try:
        return start(sys.argv[1:], launch, dict(os.environ))
    except RunError as e:
        message = str(e)
    except torch.OutOfMemoryError:
        message = "out of GPU memory; lower MICRO_BATCH_TOKENS or EVAL_BATCH_TOKENS"
    except OSError as e:
        message = f"{e.filename}: {e.strerror}" if e.filename else f"reading or writing failed: {e.strerror or e}"
    except KeyboardInterrupt:
        message = "interrupted"
    except RuntimeError as e:
        if launch.world == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        message, wait = "another process of this run has ended", 5
    time.sleep(wait)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
