#!/usr/bin/env python3
"""Measure train_gpt.py on one GPU: speed, MFU and memory of its step, time by kernel, evaluation, compression.

    python benchmarks/gpu.py --json benchmarks/gpu.json     all parts, at most 8 minutes
    python benchmarks/gpu.py --parts compiled families      some parts
    torchrun --standalone --nproc_per_node=8 benchmarks/gpu.py     several GPUs: their exchanges, then the step

The script needs nothing but the repository: tokens and weights are random, and it writes the shards to a temporary
folder. Settings come from the environment. The default is one GPU's share of the 8-GPU run, 98,304 tokens a step, with
11 layers and, looped, with 17. The optimizer is not shared with other GPUs here, so its time is that of all banks.
Without a GPU the same code runs at tiny sizes, as a check that it works, with the Triton kernels in Triton's
interpreter.

Kernels: `kernels` checks the two kernels of train_gpt.py against their plain forms. `compiled` is the step with plain
forms, `fused` with both kernels (FUSED=1), and `each` with one of them. A kernel is worth having if it is right and the
step takes fewer ms than in `compiled`. `curve` trains from the initial weights with plain forms, with both kernels, and
with plain forms from another seed, which shows how much losses differ by chance. Its tokens are the benchmark's own, or
those of DATA_PATH if that is set; these must be of this VOCAB_SIZE.

On several GPUs, `exchange` sums and gathers the real banks over ranks, compares every number with what one rank
computes alone, and times it. `compiled` is then the step of all GPUs, with 98,304 tokens on each.

MFU is count.py's model FLOPs (scores and logits once, no optimizer) over the dense bf16 peak that the maker gives.
Times of kernel families are GPU times from torch.profiler. A kernel is sorted into a family by the operation that
launched it, by the shapes of its inputs and by its name. `other` has the kernels that cannot be sorted, and `idle` is
the rest of the step.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
if not torch.cuda.is_available() or os.environ.get("DEVICE") == "cpu":  # read when kernels are made, on import
    os.environ["TRITON_INTERPRET"] = "1"
import count
import kernel_check
import plan
from shards import write_shard

import train_gpt as tg

FULL = {"num_loops": 2, "train_batch_tokens": 98304, "micro_batch_tokens": 98304, "eval_stride": 64}
TINY = {"num_layers": 2, "loop_start": 1, "loop_end": 1, "num_loops": 1, "model_dim": 64, "num_heads": 4,
        "num_kv_heads": 2, "vocab_size": 384, "rope_dims": 8, "train_seq_len": 32, "train_batch_tokens": 64,
        "micro_batch_tokens": 32, "eval_stride": 16, "gptq_calibration_batches": 2, "quant_min_weights": 2048,
        "ttt_lora_rank": 4, "ttt_chunk_size": 32, "ttt_eval_seq_len": 32, "ttt_batch_size": 4, "dtype": "fp32",
        "device": "cpu", "caseops_enabled": False}
BOS = 1


class OutOfTime(BaseException):
    """Raised when the time is over. It is not an Exception, because the compiler would take that for a failure of its
    own.
    """


class Bench:
    """One model with random weights, random data, and the parts that are measured on them, in any order.

    Each part returns what goes into the JSON file. The end of a key is the unit of its time.
    """

    def __init__(self, cfg: tg.Settings, rt: tg.Runtime, train_path: str | None = None):
        """`train_path`: a folder of shards for `curve`; None: the benchmark's own shards."""
        self.rt, self.gpu, self.train_path = rt, rt.device.type == "cuda", train_path
        self.cfg = cfg = tg.fit_to_device(cfg, rt)
        self.document = 8 * cfg.ttt_chunk_size  # tokens of a validation document
        self.steps, self.eval_tokens = (20, 4 * cfg.ttt_batch_size * self.document) if self.gpu else (1, 512)
        write_data(cfg, self.eval_tokens, self.document)
        ids = torch.arange(cfg.vocab_size, dtype=torch.int32)
        table = tg.ByteTable(length=0 * ids + 4, space=0 * ids, boundary=ids == BOS, space_after_boundary=0, bos=BOS)
        self.val, self.windows = tg.Validation.load(cfg, table, rt.device), tg.Windows(cfg, rt, BOS)
        self.attention, _, self.attend, self.skipped = tg.pick_attention(cfg, rt.device, rt.dtype)
        self.model = tg.build_model(cfg, rt, self.attend, BOS)
        with torch.no_grad():
            for bank in self.model.params_of("matrix").values():  # some start at 0: others would get no gradient
                bank.normal_(std=bank.size(2) ** -0.5)
        self.compiled, self.by_parts = self.compile()
        self.fused = tg.fused_ops() if kernel_check.can_run(rt.device) else None
        name = torch.cuda.get_device_name(rt.device) if self.gpu else "cpu"
        self.device, self.peak = name, getattr(count.device_called(name), "flops", None)
        shapes = count.parameter_shapes(cfg)
        self.work = {loops: count.count_step(cfg, cfg.train_batch_tokens, loops=loops, shapes=shapes)
                     for loops in sorted({0, cfg.num_loops})}

    # ----- parts

    def exchange(self) -> dict:
        """Sum each bank's gradient into shares, gather its update, and sum the small gradients, over ranks.

        The numbers are whole, so that any order of summing gives the same. Each rank draws the numbers of all ranks and
        compares.
        """
        rt, rows = self.rt, {}
        if rt.world == 1:
            return {"skipped": "one process has nothing to exchange"}
        banks = self.model.params_of("matrix")
        small = sum(p.numel() for p in self.model.parameters()) - sum(p.numel() for p in banks.values())
        shapes = {name: (-(-len(bank) // rt.world) * rt.world, *bank.shape[1:]) for name, bank in banks.items()}

        def draw(shape: tuple[int, ...], rank: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(rank)
            return torch.randint(-8, 9, shape, generator=generator).float().to(rt.device)

        def timed(run: Callable) -> tuple[torch.Tensor, float]:
            run()  # the first sets up what the backend needs
            rt.sync()
            start = time.perf_counter()
            found = run()
            rt.sync()
            return found, 1e3 * rt.largest(time.perf_counter() - start)

        for name, shape in {**shapes, "small gradients": (small,)}.items():
            mine, whole = draw(shape, rt.rank), sum(draw(shape, rank) for rank in range(rt.world))
            share = slice(rt.rank * shape[0] // rt.world, (rt.rank + 1) * shape[0] // rt.world)
            summed, all_reduce_ms = timed(lambda mine=mine: rt.sum_(mine.clone()))
            row, ok = {"all_reduce_ms": all_reduce_ms}, torch.equal(summed, whole)
            if name in shapes:
                part, row["reduce_scatter_ms"] = timed(lambda mine=mine: rt.sum_shares(mine)())
                back, row["all_gather_ms"] = timed(lambda part=part: rt.gather_shares(part)())
                ok = ok and torch.equal(part, whole[share]) and torch.equal(back, whole)
            rows[name] = {"ok": rt.largest(float(not ok)) == 0, "megabytes": 4e-6 * mine.numel(), **row}
        return rows

    def check_kernels(self) -> dict:
        """The result of kernel_check.py for each kernel against its plain form, by kernel, dtype and sizes."""
        rows, runs = {}, {"bf16": (torch.bfloat16, kernel_check.Sizes()), "fp32": (torch.float32, kernel_check.Sizes())}
        if self.gpu:  # so many tokens that a program has several tiles to do, and the head several chunks
            runs = {label: (dtype, sizes._replace(length=4999)) for label, (dtype, sizes) in runs.items()}
            runs["bf16, sizes of the model"] = torch.bfloat16, kernel_check.Sizes.of(self.cfg)
        for label, (dtype, sizes) in runs.items() if self.fused else ():
            for name in kernel_check.NAMES:
                try:
                    row = kernel_check.compare(name, self.fused, self.rt.device, dtype, sizes)
                except Exception as error:  # such as a kernel that this GPU cannot take
                    row = {"ok": False, "error": plan.words(error)}
                rows[f"{name}, {label}"] = row
        return rows or self.no_kernels()

    def warm_up(self) -> dict:
        """The work that a run waits for before its clock starts, from an empty cache: compiling every graph, with one
        step in each.
        """
        trainer, start = tg.Trainer(self.cfg, self.rt, self.model, self.compiled), time.perf_counter()
        tg.warm_up(self.cfg, self.rt, trainer)
        return {"cold_seconds": time.perf_counter() - start, "graphs": len(self.work)}

    def fused_steps(self) -> dict:
        if not self.fused:
            return self.no_kernels()
        with self.using(self.fused) as forward:
            return self.step_speed(forward)

    def each_kernel(self) -> dict:
        """The compiled step at the most virtual layers with only one kernel, by the kernel's name."""
        rows, most = {}, max(self.work)
        for name in kernel_check.NAMES if self.fused else ():
            try:
                with self.using(tg.PLAIN._replace(**{name: getattr(self.fused, name)})) as forward:
                    rows[name] = self.step_speed(forward, [most])[self.layers(most)]
            except OutOfTime:  # what has been measured is worth having
                rows[name] = {"error": "out of time"}
                break
            except Exception as error:
                rows[name] = {"error": plan.words(error)}
        return rows or self.no_kernels()

    def curve(self) -> dict:
        """Mean loss over the last steps of a short training: with plain forms from two seeds, and with the kernels."""
        (steps, last), seed = (300, 50) if self.gpu else (3, 2), self.cfg.seed
        before = [p.detach().clone() for p in self.model.parameters()]
        found = {"steps": steps, "mean_of_last": last, "tokens_of": "DATA_PATH" if self.train_path else "the benchmark"}
        try:
            for ops, runs in ((tg.PLAIN, {"plain": {}, "plain_next_seed": {"seed": seed + 1}}),
                              (self.fused, {"fused": {}})):
                if ops:
                    with self.using(ops) as forward:
                        for name, changes in runs.items():
                            found[f"{name}_loss"] = self.train(forward, steps, last, changes)
        except OutOfTime:
            found["error"] = "out of time"
        except Exception as error:  # what has been measured is worth having
            found["error"] = plan.words(error)
        finally:
            for p, value in zip(self.model.parameters(), before):
                p.detach().copy_(value)
        return found

    def train(self, forward: Callable, steps: int, last: int, changes: dict) -> float:
        """Mean loss over the `last` of `steps` training steps with all loops, from the initial weights of SEED."""
        cfg = dataclasses.replace(self.cfg, data_path=self.train_path or self.cfg.data_path, **changes)
        for p, value in zip(self.model.parameters(), tg.build_model(cfg, self.rt, self.attend, BOS).parameters()):
            p.detach().copy_(value)
        trainer, losses = tg.Trainer(cfg, self.rt, self.model, forward), []
        feeder = tg.Feeder(tg.Windows(cfg, self.rt, BOS), trainer.plan)
        try:
            for step in range(steps):
                phase = dataclasses.replace(tg.Schedule.at(cfg, step, step / steps), loops=cfg.num_loops)
                losses.append(trainer.step(feeder.next(), phase))
                self.rt.throttle()
        finally:
            feeder.close()
        return torch.stack(losses[-last:]).mean().item()

    def step_speed(self, forward: Callable, which: Iterable[int] = ()) -> dict:
        """Speed of training steps with their data, by number of virtual layers. Memory is the most that was allocated.
        """
        rows = {}
        for loops in which or self.work:
            if self.gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                seconds = self.time_steps(tg.Trainer(self.cfg, self.rt, self.model, forward), loops)
                rows[self.layers(loops)] = self.speed(seconds, loops)
            except torch.cuda.OutOfMemoryError:
                rows[self.layers(loops)] = {"error": "out of memory"}
                self.model.zero_grad(set_to_none=True)
        return rows

    def families(self) -> dict:
        """Milliseconds of each kernel family in a compiled step, by virtual layers. `all` is the whole step, measured
        separately.
        """
        rows, steps = {}, 3 if self.gpu else 1
        for loops in self.work:
            trainer = tg.Trainer(self.cfg, self.rt, self.model, self.compiled)
            seconds = self.time_steps(trainer, loops)
            for name in ("reduce_gradients", "step"):
                setattr(trainer.optimizer, name, record_function("optimizer")(getattr(trainer.optimizer, name)))
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]
            with self.fed_steps(trainer, loops) as step, profile(activities=kinds, record_shapes=True) as prof:
                for _ in range(steps):
                    step()
                self.rt.sync()
            times = Counter()
            for op, shapes, kernel, scopes, us in kernel_times(prof, self.gpu):
                times[family_of(self.cfg, op, shapes, kernel, scopes)] += us / 1e3 / steps
            busy = sum(times.values())
            rows[self.layers(loops)] = {**{name: times[name] for name in (*count.FAMILIES, "other")},
                                        "idle": max(0.0, 1e3 * seconds - busy), "all": 1e3 * seconds}
        return rows

    def syncs(self) -> dict:
        """How often the host waits for the GPU in a step (as PyTorch warns of; none can be seen on a CPU)."""
        trainer = tg.Trainer(self.cfg, self.rt, self.model, self.compiled)
        with self.fed_steps(trainer, self.cfg.num_loops) as step:
            step()
            with self.rt.host_waits() as found:
                for _ in range(self.steps):
                    step()
        return {"per_step": found.total() / self.steps, "where": dict(found)}

    def update(self) -> dict:
        """Time of the step's end by wall clock: clipping and optimizer, and what the EMA adds."""
        trainer, times = tg.Trainer(self.cfg, self.rt, self.model, self.model), {}
        for name in ("with_ema", "without"):
            times[name] = []
            for _ in range(self.steps):
                for p in trainer.params:
                    p.grad = torch.full_like(p, 1e-3)
                self.rt.sync()
                start = time.perf_counter()
                trainer.step([], tg.Schedule(lr_scale=0.0))  # no batches: only the gradients that are there
                self.rt.sync()
                times[name].append(time.perf_counter() - start)
            trainer.ema = None
        with_ema, without = (1e3 * float(np.median(times[name])) for name in ("with_ema", "without"))
        return {"optimizer_ms": without, "ema_ms": max(0.0, with_ema - without)}

    def sliding(self) -> dict:
        """Sliding-window evaluation of the validation text with all loops, compiled."""
        first = self.val.tokens[: self.cfg.eval_seq_len + 1]
        self.evaluate(self.val.over(first))  # warms up
        return self.evaluate(self.val) | {"stride": self.cfg.eval_stride, "window": self.cfg.eval_seq_len}

    def quantization(self) -> dict:
        """Calibration, GPTQ with packing until the budget is filled, and packing and unpacking once."""
        seconds, start = {}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal start
            self.rt.sync()
            now = time.perf_counter()
            seconds[f"{name}_seconds"], start = now - start, now

        clock = tg.Clock(self.rt, 0.0, 0.0)
        clock.start()
        stats = tg.calibrate(self.cfg, self.rt, self.model, self.windows, 0, clock)
        lap("calibration")
        state, room = dict(self.model.named_parameters()), self.cfg.artifact_budget_bytes - 30_000  # of code
        artifact = tg.fill_budget(self.cfg, self.rt, state, stats, room)
        lap("fill_budget")
        settings, stored = tg.read_artifact(artifact, "the artifact")
        lap("unpack")
        tg.write_artifact(settings, stored, self.cfg.compressor)
        lap("pack")
        return seconds | {"calibration_tokens": stats.tokens, "bytes": len(artifact)}

    def lora(self, forward: Callable) -> dict:
        """LoRA test-time training over the validation documents, after one batch of them to warm up or compile.

        The compiled form goes by parts; `cold_seconds` are those of compiling all its widths.
        """
        cfg = dataclasses.replace(self.cfg, ttt_mode="lora", eval_budget_seconds=0.0)
        first, start = self.val.tokens[: cfg.ttt_batch_size * self.document + 1], time.perf_counter()
        try:
            tg.Evaluator(cfg, self.rt, self.model, forward, self.val.over(first)).final()
            cold = time.perf_counter() - start
            score = tg.Evaluator(cfg, self.rt, self.model, forward, self.val).final()
        finally:
            for p in self.model.parameters():
                p.requires_grad_(True)
        return {"tok_per_s": score.tokens / score.seconds, "tokens": score.tokens, "cold_seconds": cold,
                "rank": cfg.ttt_lora_rank, "chunk": cfg.ttt_chunk_size, "documents_of": self.document,
                "at_a_time": cfg.ttt_batch_size, "layers": self.layers(cfg.num_loops)}

    # ----- what they share

    def compile(self) -> tuple[Callable, Callable]:
        return tg.compile_model(self.model, "inductor" if self.gpu else "eager")

    @contextlib.contextmanager
    def using(self, ops: tg.Ops) -> Iterator[Callable]:
        """The model with these forms, compiled. Graphs made with other forms are dropped before and after."""
        torch._dynamo.reset()
        self.model.ops = ops
        try:
            yield self.compile()[0]
        finally:
            self.model.ops = tg.PLAIN
            torch._dynamo.reset()

    def no_kernels(self) -> dict:
        return {"skipped": "no Triton here, so no kernels"}

    def layers(self, loops: int) -> str:
        return str(len(tg.virtual_layers(self.cfg, loops)))

    @contextlib.contextmanager
    def fed_steps(self, trainer: tg.Trainer, loops: int) -> Iterator[Callable]:
        """A function that takes one training step on the next data."""
        feeder, phase = tg.Feeder(self.windows, trainer.plan), tg.Schedule(lr_scale=0.01, loops=loops)
        try:
            yield lambda: trainer.step(feeder.next(), phase)
        finally:
            feeder.close()

    def time_steps(self, trainer: tg.Trainer, loops: int) -> float:
        """Mean seconds of a step with data loading, after two warm-up steps (one on a CPU)."""
        with self.fed_steps(trainer, loops) as step:
            for _ in range(min(2, self.steps)):
                step()
            self.rt.sync()
            start = time.perf_counter()
            for _ in range(self.steps):
                step()
                self.rt.throttle()
            self.rt.sync()
            return (time.perf_counter() - start) / self.steps

    def speed(self, seconds: float, loops: int) -> dict:
        """The figures of a training step that takes this long, just after it was measured."""
        tokens, flops = self.cfg.train_batch_tokens, count.model_flops(self.work[loops]) / self.rt.world
        return {"ms": 1e3 * seconds, "tok_per_s": tokens / seconds, "tflop_per_s": flops / seconds / 1e12,
                "mfu": flops / seconds / self.peak if self.peak else None, "peak_bytes": self.rt.peak_memory()}

    def evaluate(self, val: tg.Validation) -> dict:
        evaluator = tg.Evaluator(self.cfg, self.rt, self.model, self.compiled, val)
        score = evaluator.by_windows(self.cfg.eval_stride, "sliding")
        return {"tok_per_s": score.tokens / score.seconds, "tokens": score.tokens}


# in the order they run: what is wanted most first, as the time may end
PARTS = {"exchange": Bench.exchange, "kernels": Bench.check_kernels, "warm_up": Bench.warm_up,
         "compiled": lambda bench: bench.step_speed(bench.compiled), "families": Bench.families,
         "fused": Bench.fused_steps, "each": Bench.each_kernel, "curve": Bench.curve, "syncs": Bench.syncs,
         "update": Bench.update, "sliding": Bench.sliding, "eager": lambda bench: bench.step_speed(bench.model),
         "lora_eager": lambda bench: bench.lora(bench.model), "quantization": Bench.quantization,
         "lora_compiled": lambda bench: bench.lora(bench.by_parts)}


def write_data(cfg: tg.Settings, val_tokens: int, document: int) -> None:
    """Shards of random tokens. Training documents have 1,000 tokens on average. In them every token is, with
    probability one half, the successor of the last one in the vocabulary, so that there is something to learn.
    Validation documents have `document` random tokens each, and one token more is the last target.
    """
    draw = np.random.default_rng(0)
    os.makedirs(cfg.data_path)
    place = np.arange(64 * cfg.train_batch_tokens)
    tokens = draw.integers(0, cfg.vocab_size - 2, len(place))
    drawn = np.maximum.accumulate(np.where(draw.random(len(place)) < 0.5, place, 0))  # the last place drawn by chance
    tokens = 2 + (tokens[drawn] + place - drawn) % (cfg.vocab_size - 2)
    tokens[draw.random(len(tokens)) < 1e-3] = BOS
    write_shard(os.path.join(cfg.data_path, "fineweb_train_000000.bin"), tokens.astype("<u2"))
    tokens = draw.integers(2, cfg.vocab_size, val_tokens + 1)
    tokens[::document] = BOS
    write_shard(os.path.join(cfg.data_path, "fineweb_val_000000.bin"), tokens.astype("<u2"))


def kernel_times(prof: profile, gpu: bool) -> Iterator[tuple[str, list, str, list[str], float]]:
    """(operation, shapes of its inputs, kernel, names of the ranges around it, microseconds) of a profile.

    Kernels for which no launching operation is known are summed by name. On a CPU an operation is its own kernel.
    """
    linked, marks = Counter(), {e.name for e in prof.events() if e.is_user_annotation}  # ranges, also the GPU's copy
    for event in prof.events():
        if event.device_type != DeviceType.CPU:
            continue
        scopes, parent = [], event.cpu_parent
        while parent is not None:
            scopes.append(parent.name)
            parent = parent.cpu_parent
        if not gpu:
            yield event.name, event.input_shapes, event.name, scopes, event.self_cpu_time_total
        for kernel in (k for k in event.kernels if k.name not in marks):
            linked[kernel.name] += kernel.duration
            yield event.name, event.input_shapes, kernel.name, scopes, kernel.duration
    whole = Counter()
    for event in prof.events():
        if event.device_type == DeviceType.CUDA and event.name not in marks:
            whole[event.name] += event.time_range.elapsed_us()
    for name, us in whole.items():
        if us - linked[name] > 0.5:
            yield "", [], name, [], us - linked[name]


def family_of(cfg: tg.Settings, op: str, shapes: list, kernel: str, scopes: list[str]) -> str:
    """The family of count.py that a kernel belongs to, or `other`."""
    words = f"{op} {kernel}".lower()
    if "optimizer" in scopes or op == "optimizer":
        return "optimizer"
    if "foreach_lerp" in words or ("multi_tensor" in words and "lerp" in words):
        return "EMA"
    if re.search(r"flash|fmha|attention|attn|sdpa", words):
        return "attention"
    if op in ("aten::mm", "aten::addmm") and len(shapes) > 1:
        sizes = {size for shape in shapes for size in shape}
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        return "head and loss" if cfg.vocab_size in sizes else "MLP" if hidden in sizes else "projections"
    if re.search(r"log_softmax|nll_loss|cross_entropy|logsumexp|tanh", words):
        return "head and loss"
    if "leaky_relu" in words:
        return "MLP"
    if "htod" in words:
        return "data"
    return "norms and glue" if re.search(r"triton_(per|poi|red)|rms_norm", words) else "other"


def failed(found: dict) -> bool:
    """Whether a part, or a row of it, could not be measured, or found a wrong kernel."""
    rows = [row for row in found.values() if isinstance(row, dict)]
    return "error" in found or any("error" in row or row.get("ok") is False for row in rows)


def run_parts(bench: Bench, names: list[str], until: float) -> dict[str, dict]:
    """The result of each part, or {"error": why there is none}. No part runs on after `until`, in time.perf_counter()'s
    seconds.
    """
    def stop(*_) -> None:
        raise OutOfTime

    results, before = {}, signal.signal(signal.SIGALRM, stop)
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            if start >= until:
                raise OutOfTime
            signal.setitimer(signal.ITIMER_REAL, until - start)
            results[name] = PARTS[name](bench)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            results[name] = {"error": "out of time"}
        except Exception as error:  # one part that fails on a new machine must not cost the others
            results[name] = {"error": plan.words(error)}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"{name}: {results[name].get('error', 'done')}, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    signal.signal(signal.SIGALRM, before)
    return results


def table(report: dict) -> str:
    """The report as one markdown table."""
    rows = [f"| part | figure | {report['device']} |", "|---|---|---|"]
    for part, found in report["parts"].items():
        inner = found.items() if all(isinstance(v, dict) for v in found.values()) else [("", found)]
        for layers, figures in inner:
            label = f"{part}, {layers}{' layers' if layers.isdigit() else ''}" if layers else part
            rows += [f"| {label} | {name} | {cell(value)} |" for name, value in figures.items()]
    return "\n".join(rows)


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def read_config(folder: str, world: int) -> tuple[tg.Settings, bool]:
    """The settings of the environment over the defaults given here, and whether there is a GPU for them. A step has the
    default's tokens on each of `world` GPUs.
    """
    chosen = tg.read_environment(dict(os.environ)).explicit
    gpu = torch.cuda.is_available() and chosen.get("device") != "cpu"
    ours = {"artifact_dir": folder, "data_path": os.path.join(folder, "data"), "gptq_reserve_seconds": 0.0,
            "warmup_steps": 1, "quant_allocation": "auto", "gptq_calibration": "train", "max_wallclock_seconds": 0.0,
            "caseops_enabled": False, "qat_enabled": False, "bos_id": None, "fused": False}
    defaults = FULL if gpu else TINY
    defaults = defaults | {"train_batch_tokens": world * defaults["train_batch_tokens"]}
    return tg.Settings(**defaults | chosen | ours), gpu


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=plan.place, help="also write the figures to this file")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts still to come then are left out (default: 8)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these (default: all; on several GPUs exchange "
                        "and compiled)")
    args = parser.parse_args(arguments)
    until, launch = time.perf_counter() + 60 * args.minutes - 5, tg.Launch.read(dict(os.environ))
    wanted = args.parts or (PARTS if launch.world == 1 else ("exchange", "compiled"))
    names = [name for name in PARTS if name in wanted]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # empty, so that compiling is cold
                os.environ[name] = os.path.join(folder, name.lower())
            report = measure(folder, names, until, launch)
    except (tg.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if launch.rank:
        return 0
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(failed(found) for found in report["parts"].values()))


def measure(folder: str, names: list[str], until: float, launch: tg.Launch) -> dict:
    """Make the data and the model in `folder`, in each process, and run these parts until that time."""
    cfg, gpu = read_config(folder, launch.world)
    if not gpu:
        if not launch.rank:
            print("no GPU here: the same code at tiny sizes on the CPU, as a check that it runs; its times mean "
                  "nothing, and the Triton kernels run in Triton's interpreter")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        raise tg.RunError("TRITON_INTERPRET=1: on a GPU the interpreter says nothing; unset it")
    rt = tg.Runtime(cfg, launch)
    with contextlib.redirect_stdout(sys.stderr):  # what the script logs
        bench = Bench(cfg, rt, tg.read_environment(dict(os.environ)).explicit.get("data_path"))
        rt.open_logs(append=False)
        parts = run_parts(bench, names, until)
        rt.close()
    return {"device": bench.device, "check_only": not gpu, "torch": torch.__version__, "attention": bench.attention,
            "attention_skipped": bench.skipped, "dtype": str(rt.dtype)[6:], "tokens": bench.cfg.train_batch_tokens,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "parts": parts,
            "settings": {n: v for n, v in dataclasses.asdict(bench.cfg).items() if not n.endswith(("_dir", "_path"))}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
