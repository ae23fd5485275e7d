"""The training techniques against loops in float64; the packed loader, checkpoints, recompilation, and whole runs."""

import copy
import dataclasses
import json
import logging
import math
import os
import platform
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, read_losses, run_script, shifted
from helpers import BOS, FakeRuntime, a_byte_each, redrawn, small_run, stored_weights
from runs import run_here
from shards import write_shard

import train_gpt as tg

T = 8


def tiny(folder, **changes) -> tg.Settings:
    """Four layers, of which 1 and 2 may loop; six windows of 8 tokens a step; learning rates that show."""
    values = {"num_layers": 4, "vocab_size": 29, "eval_batch_tokens": 2 * T, "loop_start": 1, "loop_end": 2,
              "gate_window": 5, "data_path": str(folder / "data"), "quant_min_weights": 0, "matrix_lr": 0.05,
              "muon_momentum_warmup_steps": 4, "ema_decay": 0.0, "qat_lite_layer_start": 1, "iterations": 8,
              "max_wallclock_seconds": 0.0, "warmup_steps": 1, "train_log_every": 1, "gptq_calibration_batches": 1,
              "warmdown_frac": 0.0, "swa_start_scale": 2.0, "qat_start_scale": 2.0}
    return small_run(folder / "run", **values | changes)


EVERYTHING = {"num_loops": 1, "recur_blend": "ab", "parallel_mode": "lanes", "parallel_start_layer": 3,
              "varlen_enabled": True, "bigram_vocab_size": 13, "bigram_dim": 6, "smear_gate_enabled": True,
              "ve_enabled": True, "ve_dim": 6, "ve_layers": "1,3", "sparse_attn_gate_enabled": True,
              "muon_row_normalize": True, "muon_ns": "polar", "ema_decay": 0.7, "swa_enabled": True, "swa_every": 2,
              "swa_start_scale": 0.8, "warmdown_frac": 0.8, "qat_enabled": True, "qat_start_scale": 0.5,
              "qat_lite_enabled": True, "qat_lite_every": 2, "qat_lite_start_frac": 0.2, "qat_lite_lambda": 3.0,
              "qat_lite_bits": 3, "enable_looping_at": 0.3, "train_seq_schedule": "3@0.25,5@0.7",
              "seq_change_warmup_steps": 3}


def write_shards(folder, sizes: list[int]) -> list[np.ndarray]:
    """Shards of documents of 1 to 30 tokens; a document runs on into the next shard."""
    rng, stream = np.random.default_rng(shifted(0)), []
    while len(stream) < sum(sizes):
        stream += [BOS, *rng.integers(2, 29, rng.integers(0, 30))]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shards = np.split(np.array(stream[: sum(sizes)], dtype="<u2"), np.cumsum(sizes)[:-1])
    for i, tokens in enumerate(shards):
        write_shard(folder / "data" / f"fineweb_train_{i:06}.bin", tokens)
    return shards


def random_model(cfg: tg.Settings, seed: int = 0) -> tg.GPT:
    return redrawn(tg.GPT(cfg, bos=BOS), seed, lambda name, p, noise: 0.3 * noise + (0.5 if p.ndim < 3 else 0.0))


def random_batches(cfg: tg.Settings, seed: int = 0) -> list[tg.Batch]:
    """One step's batches of random tokens."""
    generator, batches = torch.Generator().manual_seed(shifted(seed)), []
    for _ in range(3):
        tokens = torch.randint(0, 29, (2, T + 1), generator=generator)
        ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        batches.append(tg.Batch(ids, targets, tg.Bounds.find(ids, BOS, T) if cfg.varlen_enabled else None))
    return batches


@pytest.fixture
def rt(tmp_path):
    write_shards(tmp_path, [150, 40, 17, 16, 333])
    runtime = tg.Runtime(tiny(tmp_path), tg.Launch())
    yield runtime
    runtime.close()


class Stop(Exception):
    """What a crash is in these tests."""


def run(cfg: tg.Settings, rt: tg.Runtime, model: tg.GPT, crash_after: int | None = None, resume: bool = False,
        forward=None) -> tuple[dict[int, float], tg.Trainer]:
    """The training loop as Run.train has it; losses by step."""
    if rt.log_file:
        rt.log_file.close()  # and with it the lock of the run before
    rt.open_logs(append=resume)
    rt.metrics_file.truncate(0)
    trainer = tg.Trainer(cfg, rt, model, forward or model)
    first = trainer.load()[0] if resume else 0
    feeder = tg.Feeder(tg.Windows(cfg, rt, BOS), trainer.plan, first * trainer.plan.windows)
    following, count = feeder.next, iter(range(first, 10**6))

    def following_or_crash(window):
        if next(count) == crash_after:
            raise Stop
        return following(window)

    feeder.next = following_or_crash
    try:
        tg.train(cfg, rt, trainer, feeder, tg.Clock(rt, 0.0, 0.0), None, first)
    except Stop:
        pass
    finally:
        feeder.close()
    lines = [json.loads(line) for line in open(rt.path("metrics.jsonl"))]
    return {line["step"]: line["train_loss"] for line in lines}, trainer


# ----- off is absent


OFF = {  # what may be set while it is off; what turns it on; whether that changes the losses or only the weights kept
    "loops": ({"enable_looping_at": 0.1, "loop_schedule": "0.1:0"}, {"num_loops": 1, "enable_looping_at": 0.1}, True),
    "late-qat": ({"qat_start_scale": 2.0}, {"qat_enabled": True, "qat_start_scale": 2.0}, True),
    "qat-lite": ({"qat_lite_start_frac": 0.0, "qat_lite_every": 1, "qat_lite_lambda": 50.0, "qat_lite_bits": 2,
                  "qat_lite_clip_sigmas": 1.0, "qat_lite_layer_start": 0, "qat_lite_penalty": "hybrid",
                  "qat_lite_depth_power": 2.0},
                 {"qat_lite_enabled": True, "qat_lite_start_frac": 0.0, "qat_lite_every": 1, "qat_lite_lambda": 50.0,
                  "qat_lite_bits": 2}, True),
    "swa": ({"swa_every": 1, "swa_start_scale": 2.0},
            {"swa_enabled": True, "swa_every": 2, "swa_start_scale": 2.0}, False),
    "ema": ({"average": "ema", "ema_blend": 0.5}, {"ema_decay": 0.5}, False),
    "ema-blend": ({"ema_blend": 0.5, "swa_enabled": True}, {"ema_decay": 0.5, "ema_blend": 0.5}, False),
    "warmdown": ({"warmdown_shape": "cosine", "min_lr": 0.3}, {"warmdown_frac": 0.5}, True),
    "growing": ({"train_seq_schedule": "8@0.5", "seq_change_warmup_steps": 3}, {"train_seq_schedule": "4@0.5"}, True),
    "rise": ({"seq_change_warmup_steps": 3}, {"train_seq_schedule": "4@0.5", "seq_change_warmup_steps": 3}, True),
    "polar": ({"muon_ns": "quintic"}, {"muon_ns": "polar"}, True),
    "row-normalize": ({"muon_row_normalize": False}, {"muon_row_normalize": True}, True),
    "qk-heads": ({"muon_qk_heads": False}, {"muon_qk_heads": True}, True),
    "varlen": ({"varlen_enabled": False}, {"varlen_enabled": True}, True),
    "checkpoints": ({"checkpoint_every": 3}, {"ema_decay": 0.5}, False),
}


PLAIN = []  # losses and weights of the run with nothing set, which is the same in all cases


@pytest.mark.parametrize("name", OFF)
def test_off_is_absent(rt, tmp_path, name):
    off, on, in_losses = OFF[name]
    results = []
    for changes in ({}, off, on):
        if changes or not PLAIN:
            cfg = tiny(tmp_path, **changes)
            losses, trainer = run(cfg, rt, random_model(cfg))
            assert len(losses) == 8
            trainer.use_average()
            found = losses, [p.detach().clone() for p in trainer.params]
            if not changes:
                PLAIN.append(found)
        results.append(found if changes else PLAIN[0])
    assert results[1][0] == results[0][0] and len(results[1][1]) == len(results[0][1])
    assert all(torch.equal(a, b) for a, b in zip(results[1][1], results[0][1]))
    assert (results[2][0] != results[0][0]) is in_losses
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(results[2][1], results[0][1]))


# ----- Muon


QUINTIC = [(3.4445, -4.7750, 2.0315)]
POLAR = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
         (4.042929935166739, -2.808917465908714, 0.5000178451051316),
         (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
         (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
         (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


@pytest.mark.parametrize("steps", [2, 5, 7])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", ["quintic", "polar"])
def test_muon_equals_singular_values_by_hand(rt, tmp_path, kind, rows, steps):
    """After the last polar triple it is that one again, as for quintic's only one."""
    cfg = tiny(tmp_path, muon_ns=kind, muon_row_normalize=rows, muon_backend_steps=steps, muon_wd=0.4, matrix_lr=0.3,
               grad_clip_norm=0.0, ve_enabled=True, ve_dim=20, ve_layers="1", embedding_dim=6)
    model = random_model(cfg)
    optimizer, generator = tg.Optimizer(model, cfg, rt), torch.Generator().manual_seed(shifted(3))
    weights = {n: p.detach().double().clone() for n, p in model.params_of("matrix").items()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    triples = QUINTIC if kind == "quintic" else POLAR
    assert {tuple(w.shape[1:]) for w in weights.values()} == {(16, 16), (8, 16), (40, 16), (16, 40), (8, 20), (16, 6),
                                                              (6, 16)}
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * (1 + torch.arange(p.size(-1) if p.ndim else 1).view(
                (-1,) if p.ndim else ()))
        gradients = {n: p.grad.double().clone() for n, p in model.params_of("matrix").items()}
        optimizer.reduce_gradients()
        lr_scale, momentum = 1.0 - 0.3 * step, 0.5 + 0.2 * step
        optimizer.step(lr_scale, momentum)
        lr = 0.3 * lr_scale
        for name, bank in weights.items():
            m[name] = momentum * m[name] + gradients[name]
            for i, w in enumerate(bank):
                u = gradients[name][i] + momentum * m[name][i]
                if rows:
                    u = torch.stack([row / row.norm() for row in u])
                left, s, right = torch.linalg.svd(u, full_matrices=False)
                s = s / (s**2).sum().sqrt()
                for k in range(steps):
                    a, b, c = triples[min(k, len(triples) - 1)]
                    s = a * s + b * s**3 + c * s**5
                scale = math.sqrt(max(1, w.size(0) / w.size(1)))
                bank[i] = (1 - lr * 0.4) * w - lr * scale * (left @ torch.diag(s) @ right)
    for name, p in model.params_of("matrix").items():
        assert (p - weights[name]).abs().max() < 2e-4, name


def test_polar_brings_singular_values_nearer_to_one():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(shifted(0)))
    spread = [(torch.linalg.svdvals(tg.newton_schulz(matrices, 5, torch.float32, kind)) - 1).abs().max()
              for kind in ("polar", "quintic")]
    assert spread[0] < 0.2 < spread[1]


# ----- schedules


@pytest.mark.parametrize("shape, min_lr, factors", [
    ("linear", 0.0, [1, 1, 1, 0.75, 0.5, 0.25, 0]),
    ("linear", 0.3, [1, 1, 1, 0.75, 0.5, 0.3, 0.3]),
    ("cosine", 0.0, [1, 1, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0]),
    ("cosine", 0.2, [1, 1, 1, 0.2 + 0.8 * (0.5 + 0.125**0.5), 0.6, 0.2 + 0.8 * (0.5 - 0.125**0.5), 0.2]),
])
def test_learning_rate_by_hand(tmp_path, shape, min_lr, factors):
    cfg = tiny(tmp_path, warmdown_frac=0.4, warmdown_shape=shape, min_lr=min_lr)
    for frac, factor in zip((0.0, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0), factors):
        assert tg.lr_factor(cfg, frac) == pytest.approx(factor, abs=1e-12)
        assert tg.Schedule.at(cfg, 5, frac).lr_scale == tg.lr_factor(cfg, frac)


@pytest.mark.parametrize("changes, expected", [
    ({}, {(0, 0.0): 0, (900, 1.0): 0}),
    ({"num_loops": 2, "enable_looping_at": 0.35},
     {(0, 0.0): 0, (900, 0.34): 0, (3, 0.35): 2, (0, 0.5): 2, (0, 1.0): 2}),
    ({"num_loops": 2, "enable_looping_at": 0.0}, {(0, 0.0): 2}),
    ({"num_loops": 2, "enable_looping_at": 40.0, "iterations": 100}, {(39, 1.0): 0, (40, 0.0): 2, (41, 0.1): 2}),
    ({"num_loops": 2, "loop_schedule": "0.35:1,0.55:2", "enable_looping_at": 0.0},
     {(0, 0.0): 0, (0, 0.34): 0, (0, 0.35): 1, (0, 0.54): 1, (0, 0.55): 2, (0, 1.0): 2}),
    ({"num_loops": 3, "loop_schedule": "5:1,0.5:2,30:3", "iterations": 100},
     {(4, 0.1): 0, (5, 0.1): 1, (29, 0.49): 1, (29, 0.5): 2, (30, 0.5): 3, (30, 0.1): 3}),
    ({"num_loops": 1, "loop_schedule": "0:1"}, {(0, 0.0): 1}),
])
def test_loops_switch_on_by_share_or_step(tmp_path, changes, expected):
    cfg = tiny(tmp_path, **changes)
    for (step, frac), loops in expected.items():
        assert tg.Schedule.at(cfg, step, frac).loops == loops, (step, frac)


def test_iterations_switch_the_loops_when_there_is_no_clock(rt, tmp_path):
    """ENABLE_LOOPING_AT=0.5 of 8 steps: from the fifth on; a step number means that step."""
    for at, steps in ((0.5, [0, 0, 0, 0, 1, 1, 1, 1]), (6.0, [0, 0, 0, 0, 0, 0, 1, 1])):
        cfg, seen = tiny(tmp_path, num_loops=1, enable_looping_at=at), []
        model = random_model(cfg)
        run(cfg, rt, model, forward=lambda *a, loops, seen=seen, model=model, **k: seen.append(loops) or model(
            *a, loops=loops, **k))
        assert seen[::3] == seen[1::3] == seen[2::3] == steps


@pytest.mark.parametrize("at, told", [(0.5, 0), (0.9, 1)])
def test_a_model_that_never_ran_as_it_will_be_scored_says_so(rt, tmp_path, monkeypatch, at, told):
    """The last of 8 steps begins at 0.875."""
    cfg, said = tiny(tmp_path, num_loops=1, enable_looping_at=at), []
    monkeypatch.setattr(rt, "log", said.append)
    run(cfg, rt, random_model(cfg))
    assert len([line for line in said if "no step had NUM_LOOPS=1, the last had 0" in line]) == told


def test_the_clock_switches_the_loops(rt, tmp_path, monkeypatch):
    """With a clock, its share counts: 1 s a step of 10 s, 2 of them kept for calibration."""
    cfg = tiny(tmp_path, num_loops=1, enable_looping_at=0.5, iterations=0, max_wallclock_seconds=10.0,
               warmdown_frac=0.5)
    model, seconds, seen = random_model(cfg), [0.0], []
    clock = tg.Clock(rt, 10.0, 2.0)
    monkeypatch.setattr(clock, "seconds", lambda: seconds[0])
    trainer = tg.Trainer(cfg, rt, model, model)
    monkeypatch.setattr(trainer, "step", lambda batches, phase: seen.append(phase) or seconds.__setitem__(
        0, seconds[0] + 1) or torch.zeros(()))
    rt.open_logs(append=False)
    feeder = tg.Feeder(tg.Windows(cfg, rt, BOS), trainer.plan)
    assert tg.train(cfg, rt, trainer, feeder, clock, None) == 8
    feeder.close()
    assert [phase.loops for phase in seen] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [phase.lr_scale for phase in seen] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_validation_costs_the_clock_nothing_and_a_step_that_would_not_end_is_not_begun(rt, tmp_path, monkeypatch):
    """1 s a step and 100 s a validation, of 10 s with 2.5 of them kept: the eighth step would end after 7.5."""
    cfg = tiny(tmp_path, iterations=0, max_wallclock_seconds=10.0, val_loss_every=3, checkpoint_every=3)
    model, now, validated = random_model(cfg), [0.0], []

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer, clock = tg.Trainer(cfg, rt, model, model), tg.Clock(rt, 10.0, 2.5)
    monkeypatch.setattr(trainer, "step", lambda batches, phase: pass_time(1) or torch.zeros(()))
    monkeypatch.setattr(trainer, "save", lambda step, seconds: validated.append(f"saved {step}"))
    rt.open_logs(append=False)
    feeder = tg.Feeder(tg.Windows(cfg, rt, BOS), trainer.plan)
    validate = lambda step, loops: pass_time(100) or validated.append(step)  # noqa: E731
    assert tg.train(cfg, rt, trainer, feeder, clock, validate) == 7
    assert validated == [3, "saved 3", 6, "saved 6"]  # what a checkpoint goes on from has been validated
    feeder.close()
    assert clock.stop() == 7 and now[0] == 207


def test_late_qat_starts_below_its_scale(tmp_path):
    cfg = tiny(tmp_path, warmdown_frac=0.5, qat_enabled=True, qat_start_scale=0.25)
    assert [tg.Schedule.at(cfg, 0, f).qat for f in (0.0, 0.5, 0.875, 0.88, 1.0)] == [False, False, False, True, True]
    off = tiny(tmp_path, warmdown_frac=0.5, qat_start_scale=0.25)
    assert not tg.Schedule.at(off, 0, 1.0).qat


def test_snapshots_are_taken_late_and_now_and_then(tmp_path):
    cfg = tiny(tmp_path, warmdown_frac=0.5, swa_enabled=True, swa_every=5, swa_start_scale=0.25)
    assert [step for step in range(30) if tg.Schedule.at(cfg, step, 0.9).snapshot] == [4, 9, 14, 19, 24, 29]
    assert not any(tg.Schedule.at(cfg, step, 0.875).snapshot for step in range(30))
    for average in ("ema", "swa"):  # none that nothing keeps
        cfg = tiny(tmp_path, warmdown_frac=0.5, swa_enabled=True, average=average, swa_every=1, swa_start_scale=0.25)
        assert tg.Schedule.at(cfg, 4, 0.99).snapshot == (average == "swa")
    off = tiny(tmp_path, warmdown_frac=0.5, swa_every=5, swa_start_scale=0.25)
    assert not any(tg.Schedule.at(off, step, 1.0).snapshot for step in range(30))


def test_qat_lite_ramps_up_and_comes_now_and_then(tmp_path):
    cfg = tiny(tmp_path, qat_lite_enabled=True, qat_lite_every=4, qat_lite_start_frac=0.6, qat_lite_lambda=0.5)
    for frac, weight in ((0.0, 0), (0.59, 0), (0.6, 0), (0.7, 0.125), (0.8, 0.25), (1.0, 0.5)):
        for step in range(12):
            expected = weight if step % 4 == 0 else 0
            assert tg.Schedule.at(cfg, step, frac).penalty == pytest.approx(expected, abs=1e-12)
    assert not tg.Schedule.at(tiny(tmp_path, qat_lite_lambda=0.5), 0, 1.0).penalty
    assert tg.Schedule.at(tiny(tmp_path, qat_lite_enabled=True, qat_lite_start_frac=1.0), 0, 1.0).penalty == 0.02


# ----- averages


@pytest.mark.parametrize("average, blend", [("ema", 0.0), ("ema", 0.3), ("swa", 0.3), ("ema+swa", 0.3)])
def test_averages_are_the_loops(rt, tmp_path, average, blend):
    cfg = tiny(tmp_path, ema_decay=0.7, swa_enabled=True, average=average, ema_blend=blend)
    model = random_model(cfg)
    trainer = tg.Trainer(cfg, rt, model, model)
    ema = {n: p.detach().double() for n, p in model.named_parameters()}
    last, snapshots = [], []
    for step in range(7):
        trainer.step(random_batches(cfg, step), tg.Schedule(1.0, 0.9, snapshot=step in (2, 3, 6)))
        ema = {n: 0.7 * ema[n] + 0.3 * p.detach().double() for n, p in model.named_parameters()}
        if step in (2, 3, 6):
            snapshots.append({n: p.detach().double() for n, p in model.named_parameters()} if average == "swa" else ema)
            last.append(ema)
    mean = {n: sum(s[n] for s in snapshots) / 3 for n in ema}
    blended = {n: (1 - blend) * ema[n] + blend * p.detach().double() for n, p in model.named_parameters()}
    expected = blended if average == "ema" else mean
    weights = [p.detach().clone() for p in model.parameters()]
    kept = trainer.use_average()
    assert average in kept and ("3 snapshots" in kept) == ("swa" in average)
    assert ("0.3 of the last step's" in kept) == (average == "ema" and blend > 0)
    for (name, p), w in zip(model.named_parameters(), weights):
        assert (p - expected[name]).abs().max() < 1e-6, name
        assert not torch.allclose(p, w, atol=1e-4), name


@pytest.mark.parametrize("changes, source", [
    ({"ema_decay": 0.7, "swa_enabled": True}, "ema"),
    ({"ema_decay": 0.7, "swa_enabled": True, "average": "swa"}, "ema"),
    ({"ema_decay": 0.0, "swa_enabled": True}, "last"),
    ({"ema_decay": 0.0, "swa_enabled": True, "average": "swa"}, "last"),
    ({"ema_decay": 0.0}, "last"),
    ({"ema_decay": 0.7}, "ema"),
])
def test_without_a_snapshot_there_is_the_next_best(rt, tmp_path, changes, source):
    cfg = tiny(tmp_path, **changes)
    model = random_model(cfg)
    trainer = tg.Trainer(cfg, rt, model, model)
    for step in range(3):
        trainer.step(random_batches(cfg, step), tg.Schedule(1.0, 0.9))
    last = [p.detach().clone() for p in model.parameters()]
    expected = last if source == "last" else [p.clone() for p in trainer.ema]
    assert source in trainer.use_average()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected))
    assert source == "last" or not torch.equal(model.tok_emb, last[0])


@pytest.mark.parametrize("changes, average", [
    ({}, "ema"), ({"ema_decay": 0.5}, "ema"), ({"swa_enabled": True}, "swa"),
    ({"ema_decay": 0.5, "swa_enabled": True}, "ema+swa"),
])
def test_average_follows_from_what_is_on(tmp_path, changes, average):
    assert tiny(tmp_path, **changes).average == average


# ----- quantization-aware training


def on_grid_by_hand(weight: torch.Tensor, bits: int, sigmas: float, seen: torch.Tensor) -> torch.Tensor:
    """Every row to the nearest of its 2^bits - 1 points, in float64 with the fp16 step.

    What lies so nearly halfway that a last bit of fp32 decides, as to which fp16 number is the step or which point is
    nearest to a weight, is taken as `seen` has it.
    """
    levels, rows = 2 ** (bits - 1) - 1, []
    for row, points in zip(weight.double(), seen.double()):
        exact = sigmas * (((row - row.mean()) ** 2).sum() / (len(row) - 1)).sqrt() / levels
        steps = {float((exact * (1 + e)).half()) for e in (-1e-6, 1e-6)}
        step = next((s for s in steps if torch.equal((points / s).round() * s, points)), max(steps))
        place, code = (row / step).clamp(-levels, levels), (points / step).round()
        rows.append(torch.where((place - code).abs() < 0.5 + 1e-5, code, place.round()) * step)
    return torch.stack(rows)


QAT = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "loops": {"num_loops": 1, "recur_blend": "ab"},
    "tables": {"bigram_vocab_size": 13, "bigram_dim": 6, "ve_enabled": True, "ve_dim": 6, "ve_layers": "1",
               "ve_bigram_rows": 7, "embedding_dim": 10, "smear_gate_enabled": True, "gated_attn_enabled": True},
}


@pytest.mark.parametrize("name", QAT)
def test_late_qat_is_the_grid_of_the_artifact(rt, tmp_path, name):
    """GPTQ without correlations rounds each weight by itself: what it stores is what late QAT trained with."""
    cfg = tiny(tmp_path, qat_enabled=True, matrix_bits=4, embed_bits=5, attn_clip_sigmas=2.0, mlp_clip_sigmas=2.5,
               matrix_clip_sigmas=3.0, embed_clip_sigmas=2.2, **QAT[name])
    model, rounded = random_model(cfg), random_model(cfg)
    stored = tg.dequantize(cfg, stored_weights(cfg, model))
    with torch.no_grad():
        for n, p in rounded.named_parameters():
            if n in model.params_of("matrix") or n in model.params_of("embedding", "head"):
                bits = 5 if n in model.params_of("embedding", "head") else 4
                sigmas = {"qo_bank": 2.0, "kv_bank": 2.0, "mlp_up_bank": 2.5, "mlp_down_bank": 2.5}.get(
                    n, 2.2 if n in model.params_of("embedding", "head") else 3.0)
                by_hand = on_grid_by_hand(p.flatten(0, -2), bits, sigmas, stored[n].flatten(0, -2)).float()
                assert torch.equal(stored[n], by_hand.view_as(p)), n
                assert (stored[n] != p).float().mean() > 0.9
                p.copy_(stored[n])
    trainer, (batch, *_) = tg.Trainer(cfg, rt, model, model), random_batches(cfg)
    losses = model(batch.ids, batch.targets, hooks=trainer.qat_hooks)
    expected = rounded(batch.ids, batch.targets)
    assert torch.equal(losses, expected)
    assert not torch.equal(losses, model(batch.ids, batch.targets))
    losses.sum().backward()
    expected.sum().backward()
    for (n, p), q in zip(model.named_parameters(), rounded.named_parameters()):  # straight through
        assert torch.allclose(p.grad, q[1].grad, rtol=1e-5, atol=1e-6 * float(q[1].grad.abs().max())), n
        assert p.grad.any(), n


def test_late_qat_leaves_small_matrices_alone(rt, tmp_path):
    cfg = tiny(tmp_path, qat_enabled=True, quant_min_weights=300)  # q, o: 256 weights; k, v: 128; MLP: 640; table: 464
    model = random_model(cfg)
    hooks, seen = tg.Trainer(cfg, rt, model, model).qat_hooks, {}

    def spy(weight, site):
        seen[site.role] = seen.get(site.role, True) and torch.equal(hooks.fake_quant(weight, site), weight)
        return weight

    batch = random_batches(cfg)[0]
    model(batch.ids, batch.targets, hooks=tg.Hooks(fake_quant=spy))
    assert seen == {"emb": False, "q": True, "k": True, "v": True, "o": True, "up": False, "down": False, "head": False}


def test_late_qat_trains_as_its_phase_says(rt, tmp_path):
    cfg = tiny(tmp_path, qat_enabled=True, matrix_bits=3, matrix_clip_sigmas=2.0)
    losses = []
    for phase in (tg.Schedule(0.5, 0.9, qat=True), tg.Schedule(0.5, 0.9)):
        model = random_model(cfg)
        trainer = tg.Trainer(cfg, rt, model, model)
        hooks = trainer.qat_hooks if phase.qat else tg.NO_HOOKS
        expected = sum(model(b.ids, b.targets, hooks=hooks).sum() for b in random_batches(cfg)).item() / 48
        losses.append(float(trainer.step(random_batches(cfg), phase)))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("power", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["mse", "clip", "hybrid"])
def test_qat_lite_equals_a_loop_over_weights(rt, tmp_path, kind, power):
    cfg = tiny(tmp_path, qat_lite_enabled=True, qat_lite_bits=3, qat_lite_clip_sigmas=1.5, qat_lite_penalty=kind,
               qat_lite_depth_power=power, qat_lite_layer_start=2, grad_clip_norm=0.0)
    model = random_model(cfg)
    total, weights, gradients = 0.0, 0.0, {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    for layer in (2, 3):
        depth = ((layer + 1) / 4) ** power
        for name in ("qo_bank", "kv_bank"):
            matrix = dict(model.named_parameters())[name][layer].detach()
            grid, share = on_grid_by_hand(matrix, 3, 1.5, tg.on_grid(matrix, 3, 1.5)), depth / matrix.numel()
            weights += depth
            for i, row in enumerate(matrix.tolist()):
                deviations = (matrix[i].double() - matrix[i].double().mean()).square().sum()
                std = math.sqrt(float(deviations) / (len(row) - 1))
                edge = float(torch.tensor(1.5 * std / 3).half()) * 3
                for j, w in enumerate(row):
                    off, over = w - float(grid[i, j]), max(abs(w) - edge, 0.0)
                    parts = {"mse": off**2, "clip": over**2, "hybrid": (off**2 + over**2) / 2}
                    slopes = {"mse": off, "clip": math.copysign(over, w), "hybrid": (off + math.copysign(over, w)) / 2}
                    total += share * parts[kind]
                    gradients[name][layer, i, j] = 2 * share * slopes[kind]
    penalty = tg.qat_lite_penalty(cfg, model)
    assert penalty.item() == pytest.approx(total / weights, rel=1e-4)
    grads = []
    for weight in (0.0, 7.0):  # through a whole step
        trainer = tg.Trainer(cfg, rt, model, model)
        trainer.optimizer.step = lambda *_: None
        trainer.step(random_batches(cfg), tg.Schedule(1.0, 0.9, penalty=weight))
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for (name, gradient), plain, penalised in zip(gradients.items(), *grads):
        assert (penalised - plain - 7.0 * gradient / weights).abs().max() < 1e-4 * (1 + plain.abs().max()), name
    assert max(g.abs().max() for g in gradients.values()) * 7 / weights > 0.002


# ----- the packed loader


@pytest.fixture
def few_rows(monkeypatch):
    """Rows of several windows although a step of these tests has few of them."""
    monkeypatch.setattr(tg, "MIN_ROWS", 1)


def test_packed_rows_cover_the_shards_once_an_epoch(tmp_path, few_rows):
    shards = write_shards(tmp_path, [150, 40, 17, 16, 333])
    cfg = tiny(tmp_path, varlen_enabled=True)
    assert cfg.row_tokens == 16  # two windows: what a pass of 16 tokens holds, and six can be dealt into
    windows = tg.Windows(cfg, FakeRuntime(), BOS)
    expected = [shard[start : start + 17].tolist() for shard in shards for start in range(0, len(shard) - 16, 16)]
    n = windows.count
    assert n == len(expected) == 9 + 2 + 1 + 0 + 20
    epochs = [[windows.window(g).tolist() for g in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(rows) == sorted(expected) for rows in epochs)
    assert len({str(rows) for rows in [*epochs, expected]}) == 4  # in an order of its own each time
    for g in (5, 70, 0):  # and back
        assert windows.window(g).tolist() == epochs[g // n][g % n]


@pytest.mark.parametrize("windows, micro, row", [(6, 100, 1), (64, 100, 1), (127, 100, 1), (128, 1, 1), (128, 100, 2),
                                                 (192, 2, 2), (192, 100, 3), (384, 100, 6), (512, 5, 4), (700, 100, 7)])
def test_packed_rows_are_long_fit_and_are_many(tmp_path, windows, micro, row):
    cfg = tiny(tmp_path, varlen_enabled=True, train_batch_tokens=windows * T, micro_batch_tokens=micro * T + T - 1)
    assert cfg.row_tokens == row * T
    assert dict(vars(cfg)) and tiny(tmp_path, micro_batch_tokens=micro * T).row_tokens == T


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_packed_rows_are_the_same_for_any_number_of_ranks(tmp_path, few_rows, world):
    write_shards(tmp_path, [150, 40, 17, 16, 333])
    cfg = tiny(tmp_path, varlen_enabled=True, train_batch_tokens=14 * T, micro_batch_tokens=2 * T)
    alone = tg.Windows(cfg, FakeRuntime(), BOS)
    plan = tg.StepPlan.of(cfg, world)
    assert plan.windows == 7
    for resumed_at in (0, 4):
        feeders = [tg.Feeder(tg.Windows(cfg, FakeRuntime(rank, world), BOS), plan, 7 * resumed_at)
                   for rank in range(world)]
        for step in range(resumed_at, resumed_at + 6):
            rows = []
            for feeder in feeders:
                for batch in feeder.next():
                    check_bounds(batch)
                    real = (batch.targets != tg.IGNORE).all(1)
                    assert ((batch.targets == tg.IGNORE).all(1) | real).all()
                    rows += [[*i, t[-1]] for i, t in zip(batch.ids[real].tolist(), batch.targets[real].tolist())]
            assert rows == [alone.window(7 * step + i).tolist() for i in range(7)]
        for feeder in feeders:
            feeder.close()


def check_bounds(batch: tg.Batch) -> None:
    """Every document's start begins a piece; others begin at a row's start or TRAIN_SEQ_LEN after the one before."""
    flat, cuts = batch.ids.flatten().tolist(), batch.bounds.cu_seqlens.tolist()
    length, pieces = batch.ids.size(1), []
    for start, stop in zip(cuts, cuts[1:]):
        assert 0 <= stop - start <= T == batch.bounds.max_len
        if stop > start:
            pieces.append((start, stop))
    assert pieces[0][0] == 0 and pieces[-1][1] == len(flat)
    for n, (start, stop) in enumerate(pieces):
        assert BOS not in flat[start + 1 : stop]
        assert start // length == (stop - 1) // length
        assert flat[start] == BOS or start % length == 0 or start - pieces[n - 1][0] == T
        assert batch.bounds.segment[start:stop].unique().tolist() == [n]


# ----- growing context


@pytest.mark.parametrize("schedule, varlen, windows", [
    ("", False, {0.0: 8, 1.0: 8}), ("0", True, {0.5: 8}),
    ("2@0.1,5@0.7", False, {0.0: 2, 0.09: 2, 0.1: 5, 0.69: 5, 0.7: 8, 1.0: 8}),
    ("3@.25,8@1.000", True, {0.2: 3, 0.25: 8, 1.0: 8}), ("5@1", True, {0.0: 5, 1.0: 5}),
    ("5@0.5,2048@0.9", True, {0.0: 5, 0.5: 8, 0.9: 8}),
])
def test_windows_grow_by_share_of_training(tmp_path, schedule, varlen, windows):
    cfg = tiny(tmp_path, train_seq_schedule=schedule, varlen_enabled=varlen)
    assert {share: tg.Schedule.at(cfg, 3, share).window for share in windows} == windows


@pytest.mark.parametrize("schedule", ["4", "4:0.5", "4@0.5,", "4@0.5,2@0.5", "4@0.5,2@0.4", "1@0.5", "4@1.1",
                                      "4@0", "four@0.5"])
def test_a_schedule_that_is_none_is_refused(tmp_path, schedule):
    with pytest.raises(tg.RunError, match=f"^TRAIN_SEQ_SCHEDULE={schedule}: takes windows, "):
        tiny(tmp_path, train_seq_schedule=schedule)


@pytest.mark.parametrize("varlen", [False, True])
def test_attention_ends_with_the_window_and_nothing_else_changes(rt, tmp_path, varlen):
    """Each piece alone, in a model that never saw a longer row, has the losses that it has in the batch."""
    cfg = tiny(tmp_path, varlen_enabled=varlen, smear_gate_enabled=False, num_loops=1)
    model, text = random_model(cfg), tg.Windows(cfg, rt, BOS)
    for window in (2, 3, 8):
        batch, whole = text.batch(5, 3, 4, window), text.batch(5, 3, 4)
        for a, b in zip(batch[:2], whole[:2]):
            assert torch.equal(a.flatten(), b.flatten())  # the rows are the same
        losses = model(batch.ids, batch.targets, bounds=batch.bounds).view(4, T)
        for row in range(3):
            ids, targets = whole.ids[row], whole.targets[row]
            starts = [0, *(i for i in range(1, T) if varlen and ids[i] == BOS), T]
            cuts = [*(c for a, b in zip(starts, starts[1:]) for c in range(a, b, window)), T]
            for a, b in zip(cuts, cuts[1:]):
                alone = model(ids[None, a:b], targets[None, a:b])[0]
                torch.testing.assert_close(losses[row, a:b], alone, rtol=1e-5, atol=1e-5)
        assert not losses[3].any()  # padding


def test_batches_follow_the_window_that_is_asked_for(rt, tmp_path):
    cfg = tiny(tmp_path, varlen_enabled=True)
    plan = tg.StepPlan.of(cfg, 1)
    feeder, text = tg.Feeder(tg.Windows(cfg, rt, BOS), plan), tg.Windows(cfg, rt, BOS)
    for step, window in enumerate((4, 4, 8, 8, 2)):
        for batch, (first, real) in zip(feeder.next(window), plan.parts(0), strict=True):
            expected = text.batch(step * plan.windows + first, real, plan.size, window)
            assert torch.equal(batch.ids, expected.ids) and batch.bounds.max_len == window
            assert torch.equal(batch.bounds.cu_seqlens, expected.bounds.cu_seqlens)
    feeder.close()


def test_learning_rates_rise_again_when_windows_grow(rt, tmp_path):
    """SEQ_CHANGE_WARMUP_STEPS=3, of windows that grow at step 2 and step 6 of 8: 1/3, 2/3 and 1 of the usual rate."""
    cfg = tiny(tmp_path, train_seq_schedule="2@0.25,4@0.75", seq_change_warmup_steps=3, warmdown_frac=1.0)
    _, trainer = run(cfg, rt, random_model(cfg))
    got = [json.loads(line) for line in open(rt.path("metrics.jsonl"))]
    rise = [1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]
    assert [line["lr_scale"] for line in got] == pytest.approx([(1 - i / 8) * r for i, r in enumerate(rise)])
    assert (trainer.window, trainer.grown) == (8, 6)


def test_the_warm_up_meets_what_training_meets(tmp_path):
    """PR 2014's schedule with loops from 0.35: four graphs of six; a step number may fall into any window."""
    cfg = tiny(tmp_path, num_loops=2, enable_looping_at=0.35, train_seq_schedule="2@0.1,4@0.7")
    met = [(0, 2), (0, 4), (2, 4), (2, 8)]
    assert [(phase.loops, phase.window) for phase in tg.graphs_of(cfg)] == met
    late = dataclasses.replace(cfg, qat_enabled=True, warmdown_frac=0.5)
    assert [(p.loops, p.window, p.qat) for p in tg.graphs_of(late)] == [(*m, qat) for qat in (False, True) for m in met]
    by_step = dataclasses.replace(cfg, enable_looping_at=9.0, iterations=40)
    assert {(p.loops, p.window) for p in tg.graphs_of(by_step)} == {(n, w) for n in (0, 2) for w in (2, 4, 8)}
    for each in (cfg, by_step):
        seen = {(p.loops, p.window) for step in range(40) for p in [tg.Schedule.at(each, step, step / 40)]}
        assert seen <= {(p.loops, p.window) for p in tg.graphs_of(each)}


# ----- checkpoints


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(rt, tmp_path):
    cfg = tiny(tmp_path, checkpoint_every=3, **EVERYTHING)
    whole, trainer = run(cfg, rt, random_model(cfg))
    assert len(whole) == 8 and trainer.snapshots >= 2
    trainer.use_average()
    expected = [p.detach().clone() for p in trainer.params]
    for crash_after, saved_at in ((4, 3), (6, 6), (7, 6)):
        os.remove(rt.path("checkpoint.pt"))
        before, _ = run(cfg, rt, random_model(cfg), crash_after=crash_after)
        assert before == {step: whole[step] for step in before} and len(before) >= crash_after - 1
        saved = torch.load(rt.path("checkpoint.pt"), weights_only=True)
        assert saved["step"] == saved_at
        after, resumed = run(cfg, rt, random_model(cfg, seed=9), resume=True)
        assert after == {step: whole[step] for step in range(saved_at + 1, 9)}
        resumed.use_average()
        assert resumed.snapshots == trainer.snapshots
        assert all(torch.equal(a, b) for a, b in zip(resumed.params, expected))


def test_a_checkpoint_does_not_change_when_training_goes_on(rt, tmp_path):
    cfg = tiny(tmp_path, checkpoint_every=3, **EVERYTHING)
    _, trainer = run(cfg, rt, random_model(cfg))
    state = [p.detach().clone() for p in trainer.params]
    trainer.save(8, 12.5)
    trainer.step(random_batches(cfg), tg.Schedule(1.0, 0.9, loops=1, snapshot=True))
    assert not torch.equal(trainer.params[0], state[0])
    assert trainer.load() == (8, 12.5)
    assert all(torch.equal(p, q) for p, q in zip(trainer.params, state))


def rewrite(path: Path, place: int) -> None:
    """Another token at this place of a shard."""
    tokens = np.array(tg.read_shard(str(path)))
    tokens[place] = (tokens[place] + 1) % 29
    write_shard(path, tokens)


@pytest.mark.parametrize("change", [
    lambda folder: write_shard(folder / "fineweb_train_000005.bin", np.arange(40, dtype=np.uint16) % 29),
    lambda folder: (folder / "fineweb_train_000004.bin").unlink(),
    lambda folder: rewrite(folder / "fineweb_train_000004.bin", 0),
    lambda folder: rewrite(folder / "fineweb_train_000001.bin", -1),
    lambda folder: write_shard(folder / "fineweb_train_000000.bin", np.zeros(151, np.uint16)),
], ids=["arrived", "gone", "first token", "last token", "length"])
def test_a_checkpoint_of_other_training_text_is_refused(rt, tmp_path, change):
    cfg = tiny(tmp_path)

    def trainer() -> tg.Trainer:
        model = random_model(cfg)
        return tg.Trainer(cfg, rt, model, model, tg.Windows(cfg, rt, BOS).identity())

    rt.open_logs(append=False)
    trainer().save(4, 1.5)
    assert trainer().load() == (4, 1.5)
    change(tmp_path / "data")
    with pytest.raises(tg.RunError, match="checkpoint.pt: made with other training text; fineweb_train_00000"):
        trainer().load()


def test_the_same_training_text_may_stand_elsewhere(rt, tmp_path):
    cfg, elsewhere = tiny(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (tmp_path / "data").glob("*.bin"):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    moved = dataclasses.replace(cfg, data_path=str(elsewhere))
    assert tg.Windows(cfg, rt, BOS).identity() == tg.Windows(moved, rt, BOS).identity()
    rt.open_logs(append=False)
    model = random_model(cfg)
    tg.Trainer(cfg, rt, model, model).save(4, 1.5)
    assert tg.Trainer(moved, rt, model, model).load() == (4, 1.5)


def spoilt(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


def test_a_checkpoint_that_does_not_fit_is_refused(rt, tmp_path, few_rows):
    cfg = tiny(tmp_path, ema_decay=0.5, varlen_enabled=True)
    path = rt.path("checkpoint.pt")

    def load(**changes):
        other = tiny(tmp_path, **{"ema_decay": 0.5, "varlen_enabled": True} | changes)
        model = random_model(other)
        return tg.Trainer(other, rt, model, model).load()

    with pytest.raises(tg.RunError, match="no .*checkpoint.pt"):
        load()
    rt.open_logs(append=False)
    model = random_model(cfg)
    tg.Trainer(cfg, rt, model, model).save(4, 1.5)
    assert load() == (4, 1.5)
    for changes in ({"num_layers": 3}, {"model_dim": 32}, {"num_loops": 1}, {"parallel_start_layer": 2},
                    {"smear_gate_enabled": True}, {"rope_base": 9.0}, {"varlen_enabled": False}, {"ema_decay": 0.0},
                    {"seed": 3}, {"train_batch_tokens": 12 * T}, {"train_seq_len": 16, "eval_stride": 4},
                    {"bos_id": 5}):
        with pytest.raises(tg.RunError, match=f"checkpoint.pt: made with {next(iter(changes)).upper()}="):
            load(**changes)
    with pytest.raises(tg.RunError, match="rows of 16 tokens, this run's have 8; takes MICRO_BATCH_TOKENS=16"):
        load(micro_batch_tokens=T)
    assert load(micro_batch_tokens=16) == (4, 1.5)
    good = open(path, "rb").read()
    content = torch.load(path, weights_only=True)
    damaged = [b"", b"hello", good[:-1], good[: len(good) // 2], good[100:]]
    for data in damaged:
        with open(path, "wb") as file:
            file.write(data)
        with pytest.raises(tg.RunError, match="checkpoint.pt: not a whole checkpoint"):
            load()
    for key in content:
        torch.save(spoilt(content, key), path)
        with pytest.raises(tg.RunError, match="checkpoint.pt"):
            load()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):  # no fault of the file
        patch.setattr(torch, "load", Mock(side_effect=torch.OutOfMemoryError("full")))
        load()
    for other in ([], 5, {"settings": None}, content | {"params": content["params"][:-1]}, content | {"muon": []}):
        torch.save(other, path)
        with pytest.raises(tg.RunError, match="checkpoint.pt"):
            load()
    with open(path, "wb") as file:
        file.write(good)
    assert load() == (4, 1.5)


def test_a_checkpoint_is_never_of_a_broken_run(rt, tmp_path):
    """The loss is looked at every 50 steps, but what is saved before that must be sound."""
    cfg = tiny(tmp_path, checkpoint_every=1, train_log_every=50, iterations=40)
    model, count = random_model(cfg), iter(range(10**6))

    def breaks_down(*arguments, **options):
        losses = model(*arguments, **options)
        return losses * math.nan if next(count) >= 3 * 9 else losses  # three passes a step

    with pytest.raises(tg.RunError, match="train_loss is nan at step 10"):
        run(cfg, rt, model, forward=breaks_down)
    saved = torch.load(rt.path("checkpoint.pt"), weights_only=True)
    assert all(p.isfinite().all() for p in saved["params"])
    assert saved["step"] <= 9


def test_a_checkpoint_never_follows_from_a_gradient_that_is_no_number(rt, tmp_path):
    """The losses before it are all sound, and clipping makes every weight nan."""
    cfg = tiny(tmp_path, checkpoint_every=1, train_log_every=50, iterations=10)
    model, count = random_model(cfg), iter(range(10**6))

    def breaks_down(*arguments, **options):
        losses = model(*arguments, **options)
        if next(count) >= 3 * 9:  # three passes a step; in the last one
            losses.register_hook(lambda gradient: gradient * math.nan)
        return losses

    with pytest.raises(tg.RunError, match="train_loss is nan at step 10"):
        run(cfg, rt, model, forward=breaks_down)
    saved = torch.load(rt.path("checkpoint.pt"), weights_only=True)
    assert saved["step"] == 9 and all(p.isfinite().all() for p in saved["params"])


# ----- compilation


def test_nothing_is_compiled_after_the_warm_up(rt, tmp_path):
    """Plain, looped, both with late QAT: each has its graph, for training and for the score, before the clock runs."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    logging.disable(logging.DEBUG)  # or pytest's log handler has every graph printed
    changes = EVERYTHING | {"num_layers": 2, "loop_start": 0, "loop_end": 0, "parallel_start_layer": 1,
                            "ve_layers": "0,1", "ve_dim": 0, "num_loops": 1, "loop_schedule": "0.2:1"}
    phases, counts = set(), []
    for warmup_steps, iterations in ((1, 12), (0, 1)):
        cfg = tiny(tmp_path, **changes | {"warmup_steps": warmup_steps, "iterations": iterations})
        torch._dynamo.reset()
        calls.clear()
        model = random_model(cfg)
        compiled, _ = tg.compile_model(model, backend)

        def forward(*arguments, compiled=compiled, **options):
            if torch.is_grad_enabled():
                phases.add((options["loops"], options["bounds"].max_len, options["hooks"].fake_quant is not None))
            return compiled(*arguments, **options)

        tokens = torch.randint(2, 29, (50,), generator=torch.Generator().manual_seed(shifted(0)), dtype=torch.int32)
        tokens[::11] = BOS
        val = a_byte_each(tokens, 5)
        if warmup_steps:
            tg.Evaluator(cfg, rt, model, compiled, tg.random_text(cfg, val)).warm_windows()
        tg.warm_up(cfg, rt, tg.Trainer(cfg, rt, model, compiled))
        before = len(calls)
        run(cfg, rt, model, forward=forward)
        tg.Evaluator(cfg, rt, model, compiled, val).by_windows(4, "test")
        counts.append((before, len(calls) - before))
    torch._dynamo.reset()
    logging.disable(logging.NOTSET)
    assert phases == {(0, 3, False), (1, 5, False), (1, 5, True), (1, 8, True)}
    assert counts[0] == (9, 0)  # four of loops and window with and without QAT, and the score's
    assert counts[1] == (0, 2)  # without a warm-up they are made on the way


def test_switching_loops_on_changes_no_shape(tmp_path):
    cfg = tiny(tmp_path, num_loops=2, recur_blend="gate")
    model = random_model(cfg)
    batch = random_batches(cfg)[0]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for loops in (0, 1, 2):
        copied = copy.deepcopy(model)
        copied(batch.ids, batch.targets, loops=loops).sum().backward()
        assert {n: p.shape for n, p in copied.named_parameters()} == shapes
        used = copied.skip_weight.grad.flatten(1).any(1).tolist()
        assert used == [True] * (2 + loops) + [False] * (2 - loops)  # one virtual layer in two of each loop


# ----- whole runs


FULL = {"NUM_LAYERS": "4", "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "2", "RECUR_AB_ENABLED": "1",
        "ENABLE_LOOPING_AT": "0.3", "PARALLEL_MODE": "lanes", "PARALLEL_START_LAYER": "3", "VARLEN_ENABLED": "1",
        "BIGRAM_VOCAB_SIZE": "101", "BIGRAM_DIM": "24", "SMEAR_GATE_ENABLED": "1", "VE_ENABLED": "1", "VE_DIM": "24",
        "VE_LAYERS": "1,3", "KEY_OFFSET": "1", "SPARSE_ATTN_GATE_ENABLED": "1", "MUON_ROW_NORMALIZE": "1",
        "MUON_NS": "polar",
        "SWA_ENABLED": "1", "SWA_EVERY": "2", "SWA_START_SCALE": "0.6", "QAT_ENABLED": "1", "QAT_START_SCALE": "0.5",
        "QAT_LITE_ENABLED": "1", "QAT_LITE_LAYER_START": "1", "QAT_LITE_START_FRAC": "0.3", "QAT_LITE_BITS": "4",
        "TRAIN_SEQ_SCHEDULE": "16@0.2,24@0.6", "SEQ_CHANGE_WARMUP_STEPS": "3",
        "TRAIN_BATCH_TOKENS": "640", "MICRO_BATCH_TOKENS": "320", "ITERATIONS": "16", "EVAL_STRIDE": "0"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_large_tensor_takes_the_memory_of_one_before(rt):
    size, faults = 64 << 20, []
    for _ in range(20):  # the heap takes about eight to settle
        torch.ones(size, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[-5] < size // resource.getpagesize(), f"of four tensors: {faults[-1] - faults[-5]}"


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """Folder of a run of one process that nothing interrupts, every technique on."""
    folder = tmp_path_factory.mktemp("finished")
    run_here(tiny_run | {"ARTIFACT_DIR": str(folder)})
    assert len(read_losses(folder)) == 16
    return folder


@pytest.fixture(scope="module")
def tiny_run(request):
    return request.getfixturevalue("tiny") | FULL


def losses_by_step(folder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt as tg
save = tg.save_tensors


def dies(rt, name, content, otherwise):
    if content["step"] < {step}:
        return save(rt, name, content, otherwise)
    tg.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(rt, name, content, otherwise)


tg.save_tensors = dies
tg.start([], tg.Launch(0, 0, 1), dict(os.environ))
"""


def test_a_killed_run_goes_on_to_the_same_losses_and_artifact(finished, tiny_run, tmp_path):
    """Killed at the worst moment, while it writes a checkpoint: the one before must be whole."""
    settings = tiny_run | {"ARTIFACT_DIR": str(tmp_path / "run"), "CHECKPOINT_EVERY": "3"}
    moment = 3 * int(np.random.default_rng(shifted(0)).integers(2, 5))
    (tmp_path / "dies.py").write_text(DIES.format(root=str(ROOT), step=moment))
    folder, killed = tmp_path / "run", run_script(settings, script=tmp_path / "dies.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "result.json").exists() and (folder / "checkpoint.pt").exists()
    run_here(settings | {"RESUME": "1"})
    expected, got = dict(losses_by_step(finished)), losses_by_step(folder)
    assert f"resumed at step {moment - 3}," in (folder / "train.log").read_text()
    assert [step for step, _ in got] == list(range(1, 17))
    for step, loss in got:
        assert loss == expected[step], f"killed in step {moment}'s checkpoint: step {step}"
    name = "final_model.int6.ptz"
    assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_three_processes_train_alike_with_every_technique_on(finished, tiny_run, tmp_path):
    settings = tiny_run | {"ARTIFACT_DIR": str(tmp_path), "CHECKPOINT_EVERY": "12"}
    done = run_script(settings, processes=3)
    assert done.returncode == 0, done.stderr
    ours, theirs = read_losses(tmp_path), read_losses(finished)
    differences = [abs(a - b) for a, b in zip(ours, theirs)]
    assert len(ours) == 16 and max(differences[:12]) < 1e-4
    assert max(differences) < 1e-3  # late QAT: a last bit decides which way a weight is rounded
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path, finished)]
    assert results[0]["world_size"] == 3
    assert abs(results[0]["val_bpb"] - results[1]["val_bpb"]) < 1e-3
    run_here(settings | {"RESUME": "1"})  # what three have saved, one goes on with
    _, resumed = (tmp_path / "train.log").read_text().split("resumed at step 12,")
    assert "step:13/" in resumed and "step:12/" not in resumed
    assert [step for step, _ in losses_by_step(tmp_path)] == list(range(1, 17))
    assert max(abs(a - b) for a, b in zip(read_losses(tmp_path), theirs)) < 1e-3
