"""Muon, AdamW, clipping, schedules and averaging against loops over single matrices and numbers in float64."""

import copy
import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ForkedRun, shifted
from helpers import redrawn, small_run

import train_gpt as tg


def tiny(folder, **changes) -> tg.Settings:
    """Settings with learning rates large enough that every term of an update shows."""
    values = {"num_layers": 2, "rope_dims": 2, "vocab_size": 19, "matrix_lr": 0.3, "muon_wd": 0.4,
              "tied_embed_lr": 0.05, "embed_wd": 0.7, "scalar_lr": 0.02, "adam_wd": 0.9, "beta1": 0.8, "beta2": 0.9,
              "adam_eps": 0.01, "grad_clip_norm": 0.0}
    return small_run(folder, **values | changes)


def random_model(cfg: tg.Settings, seed: int = 0) -> tg.GPT:
    return redrawn(tg.GPT(cfg), seed, lambda name, p, noise: 0.3 + noise)


def random_gradients(model: tg.GPT, step: int, rank: int = 0, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(shifted(1000 * step + rank))
    return [size * torch.randn(p.shape, generator=generator) for p in model.parameters()]


def five_quintic_steps(matrix: torch.Tensor) -> torch.Tensor:
    """U p(p(p(p(p(S/|S|))))) Vᵀ of one float64 matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / math.sqrt(sum(float(x) ** 2 for x in s))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


class Reference:
    """One number of state after the other: what techniques.md says of Muon, AdamW and the gradient norm."""

    def __init__(self, model: tg.GPT, cfg: tg.Settings):
        self.cfg, self.steps = cfg, 0
        self.weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        self.m = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.v = {n: torch.zeros_like(w) for n, w in self.weights.items()}

    def step(self, gradients: list[torch.Tensor], lr_scale: float, momentum: float) -> float:
        cfg, grads = self.cfg, {n: g.double() for n, g in zip(self.weights, gradients)}
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        if cfg.grad_clip_norm and norm > cfg.grad_clip_norm:
            grads = {n: g * cfg.grad_clip_norm / norm for n, g in grads.items()}
        self.steps += 1
        for name, w in self.weights.items():
            if name.endswith("_bank"):
                for i in range(len(w)):
                    self.muon(name, i, grads[name][i], cfg.matrix_lr * lr_scale, momentum)
            elif name == "tok_emb":
                self.adamw(name, grads[name], cfg.tied_embed_lr * lr_scale, cfg.embed_wd)
            else:
                self.adamw(name, grads[name], cfg.scalar_lr * lr_scale, cfg.adam_wd)
        return norm

    def muon(self, name: str, i: int, g: torch.Tensor, lr: float, momentum: float) -> None:
        w = self.weights[name][i]
        self.m[name][i] = momentum * self.m[name][i] + g
        update, heads = g + momentum * self.m[name][i], 1
        if self.cfg.muon_qk_heads and name in ("qo_bank", "kv_bank") and i < self.cfg.num_layers:
            heads = self.cfg.num_heads if name == "qo_bank" else self.cfg.num_kv_heads
        update = torch.cat([five_quintic_steps(rows) for rows in update.chunk(heads)])
        rows, cols = w.shape
        self.weights[name][i] = (1 - lr * self.cfg.muon_wd) * w - lr * math.sqrt(max(1, rows / cols)) * update

    def adamw(self, name: str, g: torch.Tensor, lr: float, decay: float) -> None:
        b1, b2 = self.cfg.beta1, self.cfg.beta2
        self.m[name] = b1 * self.m[name] + (1 - b1) * g
        self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
        m, v = self.m[name] / (1 - b1**self.steps), self.v[name] / (1 - b2**self.steps)
        w = self.weights[name] * (1 - lr * decay)
        self.weights[name] = w - lr * m / (v.sqrt() + self.cfg.adam_eps)


def take_steps(model: tg.GPT, optimizer: tg.Optimizer, reference: Reference, sizes: list[float]) -> None:
    """Steps with changing gradients, learning rate and momentum on both; the norms must agree too."""
    for step, size in enumerate(sizes):
        gradients = random_gradients(model, step, size=size)
        for p, g in zip(model.parameters(), gradients):
            p.grad = g.clone()
        lr_scale, momentum = 1.0 - 0.3 * step, 0.5 + 0.2 * step
        norm = optimizer.reduce_gradients()
        optimizer.step(lr_scale, momentum)
        assert float(norm) == pytest.approx(reference.step(gradients, lr_scale, momentum), rel=1e-5)


def assert_equal_weights(model: tg.GPT, expected: dict[str, torch.Tensor], tolerance: float, only=None) -> None:
    for name, p in model.named_parameters():
        if only is None or name in only:
            assert (p.double() - expected[name]).abs().max() < tolerance, name


# ----- Newton-Schulz


@pytest.mark.parametrize("shape", [(1, 12, 12), (4, 9, 20), (3, 20, 9), (2, 1, 6), (2, 6, 1)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape):
    matrices = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(shifted(0)))
    got = tg.newton_schulz(matrices, 5, torch.float32)
    expected = torch.stack([five_quintic_steps(matrix.double()) for matrix in matrices])
    assert got.shape == shape and got.dtype == torch.float32
    assert (got - expected).abs().max() < 2e-5


def test_newton_schulz_brings_singular_values_near_one():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(shifted(0)))
    values = torch.linalg.svdvals(tg.newton_schulz(matrices, 5, torch.float32))
    assert 0.65 < values.min() and values.max() < 1.25


def test_newton_schulz_in_bf16_stays_near():
    matrices = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(shifted(0)))
    exact, low = (tg.newton_schulz(matrices, 5, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() < 0.15 * exact.norm()


def test_newton_schulz_of_zeros_is_zero():
    assert not tg.newton_schulz(torch.zeros(2, 3, 5), 5, torch.float32).any()


# ----- steps


@pytest.mark.parametrize("heads", [False, True])
def test_muon_equals_a_loop_over_matrices(rt, tmp_path, heads):
    cfg = tiny(tmp_path, muon_qk_heads=heads)
    model = random_model(cfg)
    reference, optimizer = Reference(model, cfg), tg.Optimizer(model, cfg, rt)
    take_steps(model, optimizer, reference, [1.0, 0.3, 2.0])
    assert_equal_weights(model, reference.weights, 5e-5, model.params_of("matrix"))


def test_adamw_equals_its_formula(rt, tmp_path):
    cfg = tiny(tmp_path)
    model = random_model(cfg)
    reference, optimizer = Reference(model, cfg), tg.Optimizer(model, cfg, rt)
    take_steps(model, optimizer, reference, [1.0, 0.3, 2.0, 0.01])
    assert_equal_weights(model, reference.weights, 3e-6, {"tok_emb", *model.params_of("scalar")})


def test_clipping_is_by_one_norm_over_all_parameters(rt, tmp_path):
    cfg = tiny(tmp_path, grad_clip_norm=0.3)
    model = random_model(cfg)
    reference, optimizer = Reference(model, cfg), tg.Optimizer(model, cfg, rt)
    take_steps(model, optimizer, reference, [5.0, 0.002, 1.0])  # the second is not clipped
    assert_equal_weights(model, reference.weights, 5e-5)


def test_step_clears_the_gradients(rt, tmp_path):
    cfg = tiny(tmp_path)
    model = random_model(cfg)
    optimizer = tg.Optimizer(model, cfg, rt)
    take_steps(model, optimizer, Reference(model, cfg), [1.0])
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ----- several processes


def gradient_parts(model: tg.GPT, step: int, world: int) -> list[list[torch.Tensor]]:
    """The gradients of each rank."""
    return [random_gradients(model, step, rank + 1, 0.1) for rank in range(world)]


BANKS = [(layers, heads) for layers in (2, 5) for heads in (False, True)]  # of 2, 4, 5 and 10 slices, on 3 ranks


def sharded_worker(folder: str) -> None:
    """One of several processes, by its environment."""
    launch = tg.Launch.read(dict(os.environ))
    rt, rank, world = tg.Runtime(tiny(folder), launch), launch.rank, launch.world
    saved = {"sum": rt.sum_(torch.tensor([1.0, rank])), "largest": rt.largest(float(10 - rank)),
             "bytes": rt.share_bytes(b"\x00from\xff" * 9 if rank == 0 else None)}
    for layers, heads in BANKS:
        cfg = tiny(folder, num_layers=layers, muon_qk_heads=heads, grad_clip_norm=3.0)
        model = random_model(cfg)
        optimizer = tg.Optimizer(model, cfg, rt)
        norms = []
        for step in range(3):
            for p, g in zip(model.parameters(), gradient_parts(model, step, world)[rank]):
                p.grad = g
            norms.append(float(optimizer.reduce_gradients()))
            optimizer.step(1.0 - 0.2 * step, 0.9)
        saved[layers, heads] = {n: p.detach() for n, p in model.named_parameters()} | {"norms": norms}
    cfg = tiny(folder, seed=10 + rank)
    model = tg.build_model(cfg, rt, tg.attend_sdpa, 1)
    saved["built"] = [p.detach() for p in model.parameters()]
    torch.save(saved, os.path.join(folder, f"rank{rank}.pt"))
    rt.largest(0.0)
    rt.close()
    os._exit(0)  # as train_gpt.main does: Gloo's threads can abort an orderly exit


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory) -> list[dict]:
    """What three processes have after three steps, each with its part of the gradient."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    code = "import sys, test_optimizers; test_optimizers.sharded_worker(sys.argv[1])"
    done = ForkedRun({}, "-c", code, folder, processes=3, cwd=ROOT / "tests").finish()
    assert done.returncode == 0, done.stderr
    return [torch.load(os.path.join(folder, f"rank{rank}.pt")) for rank in range(3)]


@pytest.mark.parametrize("layers, heads", BANKS)
def test_sharded_steps_equal_one_process(three_ranks, rt, tmp_path, layers, heads):
    cfg = tiny(tmp_path, num_layers=layers, muon_qk_heads=heads, grad_clip_norm=3.0)
    model = random_model(cfg)
    start = copy.deepcopy(model)
    optimizer = tg.Optimizer(model, cfg, rt)
    norms = []
    for step in range(3):
        for p, *parts in zip(model.parameters(), *gradient_parts(model, step, 3)):
            p.grad = sum(parts)
        norms.append(float(optimizer.reduce_gradients()))
        optimizer.step(1.0 - 0.2 * step, 0.9)
    assert min(norms) > 3.0
    for rank in three_ranks:
        assert rank[layers, heads]["norms"] == pytest.approx(norms, rel=1e-6)
        for name, p in model.named_parameters():
            assert (p - rank[layers, heads][name]).abs().max() < 2e-6, name
    assert all((p - q).abs().max() > 0.01 for p, q in zip(model.parameters(), start.parameters()))


def test_ranks_hold_bitwise_the_same_weights(three_ranks):
    for banks in BANKS:
        for name, value in three_ranks[0][banks].items():
            for other in three_ranks[1:]:
                assert name == "norms" or torch.equal(value, other[banks][name]), name


def test_ranks_start_from_the_same_weights(three_ranks):
    for other in three_ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(three_ranks[0]["built"], other["built"]))


def test_collectives_of_the_runtime(three_ranks):
    for rank in three_ranks:
        assert rank["sum"].tolist() == [3.0, 3.0]
        assert rank["largest"] == 10.0
        assert rank["bytes"] == b"\x00from\xff" * 9


# ----- schedules


@pytest.mark.parametrize("frac, factor", [(0.0, 1.0), (0.2, 1.0), (0.25, 1.0), (0.4, 0.8), (0.7, 0.4), (1.0, 0.0),
                                          (1.3, 0.0)])
def test_learning_rate_falls_linearly_to_zero(tmp_path, frac, factor):
    assert tg.lr_factor(tiny(tmp_path, warmdown_frac=0.75), frac) == pytest.approx(factor, abs=1e-12)


def test_learning_rate_without_warmdown(tmp_path):
    assert [tg.lr_factor(tiny(tmp_path, warmdown_frac=0.0), f) for f in (0.0, 0.5, 0.99)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("step, momentum", [(0, 0.8), (1, 0.81), (5, 0.85), (10, 0.9), (11, 0.9), (900, 0.9)])
def test_momentum_warms_up_linearly(tmp_path, step, momentum):
    cfg = tiny(tmp_path, muon_momentum=0.9, muon_momentum_warmup_start=0.8, muon_momentum_warmup_steps=10)
    assert tg.muon_momentum(cfg, step) == pytest.approx(momentum, abs=1e-12)


def test_momentum_without_warm_up(tmp_path):
    assert tg.muon_momentum(tiny(tmp_path, muon_momentum=0.9, muon_momentum_warmup_steps=0), 0) == 0.9


# ----- training steps


def global_batch(windows: int, size: int, seed: int = 0) -> list[tg.Batch]:
    """`windows` rows of random tokens in passes of `size`, the last one padded with rows that are not scored."""
    generator = torch.Generator().manual_seed(shifted(seed))
    tokens = torch.randint(0, 19, (windows, 9), generator=generator)
    pad = -windows % size
    tokens = torch.cat((tokens, torch.zeros(pad, 9, dtype=torch.int64)))
    targets = tokens[:, 1:].clone()
    targets[windows:] = tg.IGNORE
    return [tg.Batch(*pair) for pair in zip(tokens[:, :-1].split(size), targets.split(size))]


def test_average_is_the_loop(rt, tmp_path):
    cfg = tiny(tmp_path, ema_decay=0.7)
    model = random_model(cfg)
    trainer = tg.Trainer(cfg, rt, model, model)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    for step in range(4):
        trainer.step(global_batch(6, 2, step), tg.Schedule(1.0, 0.9))
        expected = {n: 0.7 * expected[n] + 0.3 * p.detach().double() for n, p in model.named_parameters()}
    assert not torch.allclose(model.tok_emb, expected["tok_emb"].float(), atol=1e-3)
    trainer.use_average()
    assert_equal_weights(model, expected, 1e-6)


def test_no_average_keeps_the_last_weights(rt, tmp_path):
    cfg = tiny(tmp_path, ema_decay=0.0)
    model = random_model(cfg)
    trainer = tg.Trainer(cfg, rt, model, model)
    trainer.step(global_batch(6, 2), tg.Schedule(1.0, 0.9))
    last = [p.detach().clone() for p in model.parameters()]
    trainer.use_average()
    assert all(torch.equal(a, b) for a, b in zip(last, model.parameters()))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_step_does_not_depend_on_how_it_is_cut(rt, tmp_path, size):
    models, losses = [], []
    for cut in (2, size):
        cfg = tiny(tmp_path, micro_batch_tokens=8 * cut)
        models.append(random_model(cfg))
        trainer = tg.Trainer(cfg, rt, models[-1], models[-1])
        losses.append([float(trainer.step(global_batch(6, cut, s), tg.Schedule(0.5, 0.9))) for s in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        assert (p - q).abs().max() < 1e-3, name


def test_gradient_is_that_of_the_mean_loss(rt, tmp_path):
    cfg = tiny(tmp_path, ema_decay=0.0)
    model, twin = random_model(cfg), random_model(cfg)
    trainer, optimizer = tg.Trainer(cfg, rt, model, model), tg.Optimizer(twin, cfg, rt)
    for seed in range(2):
        loss = trainer.step(global_batch(6, 2, seed), tg.Schedule(1.0, 0.9))
        (ids, targets, _), = global_batch(6, 6, seed)
        mean = twin(ids, targets).mean()
        mean.backward()
        optimizer.reduce_gradients()
        optimizer.step(1.0, 0.9)
        assert float(loss) == pytest.approx(mean.item(), rel=1e-4)
    for name in ("tok_emb", "q_gain", "skip_gate", "resid_mix"):
        difference = dict(model.named_parameters())[name] - dict(twin.named_parameters())[name]
        assert difference.abs().max() < 1e-4, name


def test_warm_up_leaves_no_trace(rt, tmp_path, monkeypatch):
    """By a clock that goes on by a second whenever it is read: a step takes one, and so does a calibration batch."""
    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    cfg = tiny(tmp_path, warmup_steps=2, eval_batch_tokens=16, gptq_calibration_batches=2)
    model, untouched = random_model(cfg), random_model(cfg)
    trainer, fresh = tg.Trainer(cfg, rt, model, model), tg.Trainer(cfg, rt, untouched, untouched)
    assert tg.warm_up(cfg, rt, trainer) == (pytest.approx(1.2 * 2 + 0.2), 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters()))
    for seed in range(2):
        for t in (trainer, fresh):
            t.step(global_batch(6, 2, seed), tg.Schedule(1.0, 0.9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(trainer.ema, fresh.ema))


def test_an_explicit_reserve_is_kept(rt, tmp_path):
    cfg = tiny(tmp_path, warmup_steps=0, max_wallclock_seconds=600.0, gptq_reserve_seconds=400.0)
    model = random_model(cfg)
    assert tg.warm_up(cfg, rt, tg.Trainer(cfg, rt, model, model))[0] == 400.0
