"""GPTQ against textbook Optimal Brain Quantization, SDClip against its formula, and what the groups cover."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shifted
from helpers import FakeRuntime, Products, empty_hessians, empty_statistics, flat, on_ranks, redrawn, small_run
from torch.overrides import TorchFunctionMode

import train_gpt as tg


def tiny(folder, **changes) -> tg.Settings:
    values = {"num_layers": 3, "model_dim": 32, "mlp_mult": 2.0, "vocab_size": 41, "train_batch_tokens": 16,
              "quant_min_weights": 0, "matrix_clip_sigmas": 9.0, "embed_clip_sigmas": 12.0}
    return small_run(folder, **values | changes)


def random_model(cfg: tg.Settings, seed: int = 0) -> tg.GPT:
    return redrawn(tg.GPT(cfg), seed, lambda name, p, noise: 0.2 * noise + (0.5 if p.ndim < 3 else 0.0))


def gptq(weight, hessian, *others):
    return tg.gptq(weight, tg.factorize(hessian), *others)


def weighted_steps(cfg: tg.Settings, state, stats: tg.Statistics, finest: float):
    curved = tg.curvatures(cfg, state, stats, tg.factorize_all(stats.hessians))
    return {name: tg.weighted_steps(curvature, finest) for name, curvature in curved.items()}


def problem(rows: int, cols: int, count: int = 1, seed: int = 0, correlated: bool = True):
    """Weights (count, rows, cols), Hessians of correlated inputs, and 4-bit scales that clip a few weights."""
    generator = torch.Generator().manual_seed(shifted(seed))
    weight = torch.randn(count, rows, cols, generator=generator)
    x = torch.randn(count, 5 * cols, cols, generator=generator, dtype=torch.float64)
    if correlated:
        x = x @ torch.randn(count, cols, cols, generator=generator, dtype=torch.float64)
        x = x * (0.2 + torch.rand(count, 1, cols, generator=generator, dtype=torch.float64))
    hessian = (x.mT @ x).float()
    scale = (weight.std(-1) * (2.2 + torch.rand(count, rows, generator=generator)) / 7).half()
    return weight, hessian, scale


def nearest(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    levels = 2 ** (bits - 1) - 1
    return (weight.double() / scale.double()[..., None]).round().clamp(-levels, levels).to(torch.int8)


def assert_nearest(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """Every weight by itself, of two codes as near as each other but for rounding either one."""
    levels = 2 ** (bits - 1) - 1
    places = (weight.double() / scale.double()[..., None]).clamp(-levels, levels)
    assert (places - codes).abs().max() < 0.5 + 1e-5


def assert_textbook(codes: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor,
                    bits: int) -> None:
    """Codes of one matrix are those of rounding a weight, then solving exactly for the ones of its row to come.

    Columns in descending diag(H), H with 1 % of its mean diagonal; the inverse of what remains is taken anew each time.
    Each code is looked at given those before it: where a weight comes to lie halfway between two codes, a last bit
    decides which it is, and all that follows is another.
    """
    levels, cols = 2 ** (bits - 1) - 1, weight.size(1)
    hessian, rows, step = hessian.double(), weight.double().clone(), scale.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    order = sorted(range(cols), key=lambda j: -float(hessian[j, j]))
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    for k, j in enumerate(order):
        inverse = torch.linalg.inv(damped[order[k:]][:, order[k:]])[0]
        place = (rows[:, j] / step).clamp(-levels, levels)
        assert (place - codes[:, j]).abs().max() < 0.5 + 1e-3, f"column {k} of {cols}"
        rows[:, order[k:]] -= (rows[:, j] - codes[:, j] * step)[:, None] * inverse / inverse[0]


def loss(weight: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> float:
    """tr(E H Eᵀ) of one matrix."""
    e = weight.double() - codes.double() * scale.double()[:, None]
    return float((e @ hessian.double() * e).sum())


# ----- GPTQ


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_gptq_gives_the_textbook_codes(bits):
    weight, hessian, scale = problem(6, 40)
    scale = (scale.float() * 7 / (2 ** (bits - 1) - 1)).half()
    got = gptq(weight, hessian, scale, bits)
    assert_textbook(got[0], weight[0], hessian[0], scale[0], bits)
    assert (got != nearest(weight, scale, bits)).float().mean() > 0.05


def test_codes_stay_within_the_levels():
    weight, hessian, scale = problem(6, 40)
    for bits in (2, 3, 8):
        levels = 2 ** (bits - 1) - 1
        codes = gptq(weight * 100, hessian, scale, bits).int()
        assert codes.max() == levels and codes.min() == -levels


def test_diagonal_hessian_is_round_to_nearest():
    weight, _, scale = problem(7, 30, 2)
    hessian = torch.diag_embed(0.1 + torch.rand(2, 30, generator=torch.Generator().manual_seed(shifted(4))))
    assert_nearest(gptq(weight, hessian, scale, 4), weight, scale, 4)


def test_error_is_below_round_to_nearest():
    for seed in range(5):
        weight, hessian, scale = problem(16, 48, seed=seed)
        scale = scale * 2
        ours = loss(weight[0], gptq(weight, hessian, scale, 4)[0], hessian[0], scale[0])
        assert ours < 0.6 * loss(weight[0], nearest(weight[0], scale[0], 4), hessian[0], scale[0])


@pytest.mark.parametrize("block", [1, 8, 30, 300])
def test_blocks_do_not_change_the_codes(block):
    weight, hessian, scale = problem(6, 150)
    assert_textbook(gptq(weight, hessian, scale, 5, block)[0], weight[0], hessian[0], scale[0], 5)


def test_each_matrix_of_a_batch_is_one_by_itself():
    weight, hessian, scale = problem(6, 33, count=4)
    together = gptq(weight, hessian, scale, 4)
    for i in range(4):
        assert_textbook(together[i], weight[i], hessian[i], scale[i], 4)


def test_inputs_that_never_fire_are_rounded():
    weight, hessian, scale = problem(5, 24)
    dead = [0, 7, 23]
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    codes = gptq(weight, hessian, scale, 4)
    alive = [j for j in range(24) if j not in dead]
    assert_nearest(codes[:, :, dead], weight[:, :, dead], scale, 4)
    assert_textbook(codes[0], weight[0], hessian[0], scale[0], 4)
    assert not torch.equal(codes[:, :, alive], nearest(weight, scale, 4)[:, :, alive])


def test_no_input_at_all_is_round_to_nearest():
    weight, hessian, scale = problem(5, 24)
    assert_nearest(gptq(weight, hessian * 0, scale, 4), weight, scale, 4)


def test_rank_deficient_hessian():
    weight, _, scale = problem(5, 24)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(shifted(0)))
    hessian = (x.T @ x)[None]
    assert_textbook(gptq(weight, hessian, scale, 6)[0], weight[0], hessian[0], scale[0], 6)


def test_huge_and_small_hessians_give_the_same_codes():
    weight, hessian, scale = problem(5, 24)
    expected = gptq(weight, hessian, scale, 4)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(gptq(weight, hessian * factor, scale, 4), expected)


def test_all_zero_weights():
    _, hessian, _ = problem(5, 24)
    weight = torch.zeros(1, 5, 24)
    scale = tg.clip_scales(weight, 6, 12.85)
    assert (scale > 0).all()
    assert not gptq(weight, hessian, scale, 6).any()


def test_inputs_are_left_alone():
    given = problem(5, 24)
    copies = [t.clone() for t in given]
    gptq(*given, 4)
    assert all(torch.equal(a, b) for a, b in zip(given, copies))


# ----- SDClip


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (8, 20.0), (4, 3.0), (2, 1.5)])
def test_scale_is_sigmas_of_the_row_over_the_levels(bits, sigmas):
    weight = torch.randn(2, 3, 4096, generator=torch.Generator().manual_seed(shifted(0))) + 0.3
    weight[0, 1] *= 50
    scale = tg.clip_scales(weight, bits, sigmas)
    assert scale.dtype == torch.float16 and scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            row = weight[i, j].double()
            std = (float(((row - row.mean()) ** 2).sum()) / (len(row) - 1)) ** 0.5
            assert float(scale[i, j]) == pytest.approx(sigmas * std / (2 ** (bits - 1) - 1), rel=1e-3)


# ----- the whole model


def test_groups_cover_every_matrix_once(tmp_path):
    cfg = tiny(tmp_path)
    model = tg.GPT(cfg)
    state = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for group in tg.quant_groups(cfg):
        view = group.view(state[group.param])
        assert view.ndim == 3
        view += 1
    for name, counts in state.items():
        assert (counts == (name in model.params_of("matrix") or name == "tok_emb")).all(), name


def test_groups_take_bits_and_sigmas_of_their_kind(tmp_path):
    cfg = tiny(tmp_path, matrix_bits=5, embed_bits=7, attn_clip_sigmas=3.0, mlp_clip_sigmas=4.0, embed_clip_sigmas=5.0)
    expected = {"qo_bank": (5, 3.0), "kv_bank": (5, 3.0), "mlp_up_bank": (5, 4.0), "mlp_down_bank": (5, 4.0),
                "tok_emb": (7, 5.0)}
    assert {(g.param, g.bits, g.sigmas) for g in tg.quant_groups(cfg)} == {(n, *v) for n, v in expected.items()}


def test_each_matrix_has_the_hessian_of_its_own_inputs(tmp_path):
    cfg = tiny(tmp_path)
    model = random_model(cfg)
    ids = torch.randint(0, 41, (2, 8), generator=torch.Generator().manual_seed(shifted(0)))
    hessians = empty_hessians(cfg)
    with Products() as products, torch.no_grad():
        model(ids)
    tg.add_statistics(model, tg.Statistics(hessians, {}), tg.Batch(ids, None))
    for group in tg.quant_groups(cfg):
        for i, weight in enumerate(group.view(dict(model.named_parameters())[group.param])):
            x, = (x for x, w in products.linear if torch.equal(w, weight))
            expected = sum(torch.outer(row, row) for row in x.flatten(0, -2).double())
            got = hessians[group.hessian][i].double()
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max(), (group.name, i)


def diagonal_hessians(cfg: tg.Settings) -> dict[str, torch.Tensor]:
    hessians, generator = empty_hessians(cfg), torch.Generator().manual_seed(shifted(3))
    for hessian in hessians.values():
        hessian.diagonal(dim1=1, dim2=2).add_(1 + torch.rand(hessian.shape[:2], generator=generator))
    return hessians


def test_diagonal_hessian_leaves_at_most_half_a_step(rt, tmp_path):
    cfg = tiny(tmp_path)
    state = {n: p.detach() for n, p in random_model(cfg).named_parameters()}
    back = tg.dequantize(cfg, tg.quantize(cfg, rt, state, tg.factorize_all(diagonal_hessians(cfg))))
    assert set(back) == set(state)
    for name, weight in state.items():
        assert back[name].dtype == torch.float32 and back[name].shape == weight.shape
        if name.endswith("_bank") or name == "tok_emb":
            sigmas, levels = (12.0, 127) if name == "tok_emb" else (9.0, 31)
            step = sigmas * weight.std(-1, keepdim=True) / levels
            error = (back[name] - weight).abs() / step
            assert error.max() < 0.505 and error.mean() > 0.2, name
        else:
            assert torch.equal(back[name], weight.half().float()), name


def test_stored_form_is_codes_and_halves(rt, tmp_path):
    cfg = tiny(tmp_path)
    state = {n: p.detach() for n, p in random_model(cfg).named_parameters()}
    stored = tg.quantize(cfg, rt, state, tg.factorize_all(diagonal_hessians(cfg)))
    codes = {n: t for n, t in flat(stored).items() if t.dtype == torch.int8}
    assert sum(t.numel() for t in codes.values()) == sum(
        w.numel() for n, w in state.items() if n.endswith("_bank") or n == "tok_emb")
    assert all(t.dtype == torch.float16 for n, t in flat(stored).items() if n not in codes)
    for form, sizes, parts in stored.values():
        assert {part: (list(t.shape), t.dtype) for part, t in parts.items()} == tg.form_parts(form, sizes)
    for n, t in codes.items():
        assert t.int().abs().max() <= (127 if n.startswith("emb") else 31)


def test_small_matrices_stay_fp16(rt, tmp_path):
    cfg = tiny(tmp_path, quant_min_weights=1025)  # q, o: 1024 weights; k, v: 512; up, down: 2048; embedding: 1312
    state = {n: p.detach() for n, p in random_model(cfg).named_parameters()}
    stored = tg.quantize(cfg, rt, state, tg.factorize_all(diagonal_hessians(cfg)))
    assert sum(t.numel() for t in flat(stored).values() if t.dtype == torch.int8) == 3 * 2 * 2048 + 1312
    back = tg.dequantize(cfg, stored)
    for name in ("qo_bank", "kv_bank"):
        assert torch.equal(back[name], state[name].half().float())
    assert not torch.equal(back["mlp_up_bank"], state["mlp_up_bank"].half().float())
    more = tg.quantize(tiny(tmp_path, quant_min_weights=1024), rt, state, tg.factorize_all(diagonal_hessians(cfg)))
    assert any(t.dtype == torch.int8 and t.numel() == 3 * 1024 for t in flat(more).values())


def test_quantizing_twice_gives_the_same(rt, tmp_path):
    cfg = tiny(tmp_path)
    model = random_model(cfg)
    hessians = empty_hessians(cfg)
    ids = torch.randint(0, 41, (2, 8), generator=torch.Generator().manual_seed(shifted(2)))
    tg.add_statistics(model, tg.Statistics(hessians, {}), tg.Batch(ids, None))
    state = {n: p.detach() for n, p in model.named_parameters()}
    first, second = (flat(tg.quantize(cfg, rt, state, tg.factorize_all(hessians))) for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_gptq_on_the_model_uses_the_hessians(rt, tmp_path):
    cfg = tiny(tmp_path, matrix_bits=3, matrix_clip_sigmas=3.0)
    model = random_model(cfg)
    hessians = empty_hessians(cfg)
    ids = torch.randint(0, 41, (40, 8), generator=torch.Generator().manual_seed(shifted(2)))
    tg.add_statistics(model, tg.Statistics(hessians, {}), tg.Batch(ids, None))
    state = {n: p.detach() for n, p in model.named_parameters()}
    full, plain = (tg.dequantize(cfg, tg.quantize(cfg, rt, state, tg.factorize_all(h)))
                   for h in (hessians, diagonal_hessians(cfg)))
    for group in tg.quant_groups(cfg):
        errors = []
        for back in (full, plain):
            e = (group.view(back[group.param]) - group.view(state[group.param])).double()
            errors.append(float((e @ hessians[group.hessian].double() * e).sum()))
        assert errors[0] < 0.95 * errors[1], group.name


@pytest.mark.parametrize("calibration", ["random", "train"])
def test_calibration_sums_all_batches_whatever_the_number_of_ranks(rt, tmp_path, monkeypatch, calibration):
    cfg = tiny(tmp_path, gptq_calibration=calibration, gptq_calibration_batches=5, max_wallclock_seconds=0.0)
    generator = torch.Generator().manual_seed(shifted(1))
    model, tokens = random_model(cfg), torch.randint(0, 41, (99, 9), generator=generator)
    asked = []

    class FakeWindows:
        def batch(self, first, real, size):
            assert real == size == 2
            asked.extend(range(first, first + real))
            rows = tokens[first : first + size]
            return tg.Batch(rows[:, :-1], rows[:, 1:])

    def sums(rank, world):
        rt.rank, rt.world = rank, world
        monkeypatch.setattr(rt, "sum_", lambda t: t)
        monkeypatch.setattr(rt, "largest", lambda value: value)
        clock = tg.Clock(rt, 0.0, 0.0)
        clock.start()
        stats = tg.calibrate(cfg, rt, model, FakeWindows(), 7, clock)
        assert stats.tokens == 5 * 16
        return stats.hessians | {f"felt {name}": moment for name, moment in stats.moments.items()}

    alone = sums(0, 1)
    parts = [sums(rank, 3) for rank in range(3)]
    rt.rank, rt.world = 0, 1
    assert sorted(asked) == (sorted(2 * list(range(7, 17))) if calibration == "train" else [])
    for role, hessian in alone.items():
        assert hessian.abs().max() > 0, role
        assert (sum(p[role] for p in parts) - hessian).abs().max() < 1e-5 * hessian.abs().max(), role
    assert all(p.grad is None for p in model.parameters())


def test_calibration_stops_with_the_clock(rt, tmp_path, monkeypatch):
    cfg = tiny(tmp_path, gptq_calibration_batches=8)
    model, seconds, batches = random_model(cfg), [0.0], []

    class FakeWindows:
        def batch(self, first, real, size):
            batches.append(first)
            seconds[0] += 1.0
            return tg.Batch(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))

    clock = tg.Clock(rt, 3.5, 0.0)
    monkeypatch.setattr(clock, "seconds", lambda: seconds[0])
    tg.calibrate(cfg, rt, model, FakeWindows(), 0, clock)
    assert len(batches) == 3


# ----- steps weighted by what the loss feels


def statistics(cfg: tg.Settings, model: tg.GPT, rows: int = 40) -> tuple[tg.Statistics, torch.Tensor]:
    """Of random tokens (rows, 9), and those."""
    tokens = torch.randint(0, cfg.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(shifted(2)))
    stats = empty_statistics(cfg, model, rows * 8)
    tg.add_statistics(model, stats, tg.Batch(tokens[:, :-1], tokens[:, 1:]))
    return stats, tokens


@pytest.mark.parametrize("varlen", [False, True])
def test_statistics_do_not_depend_on_how_a_batch_is_cut(tmp_path, monkeypatch, varlen):
    cfg = tiny(tmp_path, varlen_enabled=varlen)
    model = random_model(cfg)
    model.bos = 3
    tokens = torch.randint(0, 41, (6, 17), generator=torch.Generator().manual_seed(shifted(2)))
    tokens[:, ::5] = 3
    batch = tg.Batch(tokens[:, :-1], tokens[:, 1:], tg.Bounds.find(tokens[:, :-1], 3, 8) if varlen else None)
    found = []
    for size in (16384, 40):
        monkeypatch.setattr(tg, "CALIBRATION_TOKENS", size)
        stats = empty_statistics(cfg, model)
        tg.add_statistics(model, stats, batch)
        found.append([*stats.hessians.values(), *stats.moments.values()])
    assert all((a - b).abs().max() < 1e-4 * a.abs().max() for a, b in zip(*found))


def test_moments_are_squares_of_the_gradients_of_each_product(tmp_path):
    """All visits of a looped layer, the tied embedding as head and as input; against gradients taken one by one."""
    cfg = tiny(tmp_path, num_layers=4, num_loops=1, loop_start=1, loop_end=2)
    model, outputs, inputs = random_model(cfg), [], []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            if function is F.linear:
                outputs.append((y, args[1].detach()))
            elif function is F.embedding:
                inputs.append((y, args[0]))
            return y

    stats, tokens = statistics(cfg, model)
    with Products():
        losses = model(tokens[:, :-1], tokens[:, 1:])
    grads = torch.autograd.grad(losses.sum(), [y for y, _ in outputs + inputs])
    params = dict(model.named_parameters())
    for group in tg.quant_groups(cfg):
        name = "head" if group.name == "emb" else group.name
        for i, weight in enumerate(group.view(params[group.param]).detach()):
            felt = [g.double() for g, (_, w) in zip(grads, outputs) if torch.equal(w, weight)]
            assert len(felt) == (2 if i in (1, 2) and name != "head" else 1)
            expected = sum(row ** 2 for g in felt for row in g.flatten(0, 1))
            assert torch.allclose(stats.moments[name][i].double(), expected, rtol=1e-4, atol=1e-12), (name, i)
    expected, (gradient, (_, ids)) = torch.zeros(41, dtype=torch.float64), (grads[-1], inputs[0])
    for row, token in zip(gradient.flatten(0, 1).double(), ids.flatten().tolist()):
        expected[token] += (row ** 2).mean()
    assert torch.allclose(stats.moments["emb"][0].double(), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("layers, looped", [(4, (1, 2)), (1, (0,))])
def test_curvatures_by_their_definition(tmp_path, layers, looped):
    """d_j²: variance of input j that the inputs after it leave, by inverting what remains; F: mean squared gradient."""
    cfg = tiny(tmp_path, num_layers=layers, num_loops=1, loop_start=looped[0], loop_end=looped[-1])
    model = random_model(cfg)
    stats, _ = statistics(cfg, model)
    curved = tg.curvatures(cfg, dict(model.named_parameters()), stats, tg.factorize_all(stats.hessians))
    for group in tg.quant_groups(cfg):
        found = curved[group.name]
        for i, hessian in enumerate(stats.hessians[group.hessian].double() / stats.tokens):
            damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
            order = sorted(range(len(hessian)), key=lambda j: -float(hessian[j, j]))
            for k, j in enumerate(order):
                rest = damped[order[k:]][:, order[k:]]
                expected = 0.5 * torch.log2(1 / torch.linalg.inv(rest)[0, 0])
                assert abs(float(found.col[i, j]) / 4 - float(expected)) < 0.126
            square = stats.moments["head" if group.name == "emb" else group.name][i].double() / stats.tokens
            square = square / (2 if group.name != "emb" and i in looped else 1)
            unseen = 0.5 * 41 / stats.tokens if group.name == "emb" else 0.01
            square = square + unseen * square.mean()
            if group.name == "emb":  # Δ = c / sqrt(F mean(H) + G), over what the columns take
                read = stats.moments["emb"][0].double() / stats.tokens
                square = square + (read + unseen * read.mean()) / hessian.diagonal().mean()
            assert torch.allclose(found.row[i].double(), 0.5 * square.log2(), atol=1e-3), group.name


def test_steps_make_errors_cost_the_same_and_keep_codes_in_range(rt, tmp_path):
    cfg = tiny(tmp_path)
    model = random_model(cfg)
    stats, _ = statistics(cfg, model)
    state = {n: p.detach() for n, p in model.named_parameters()}
    for finest in (-6.0, -1.0):
        steps = weighted_steps(cfg, state, stats, finest)
        stored = tg.quantize(cfg, rt, state, tg.factorize_all(stats.hessians), steps)
        for name, curvature in tg.curvatures(cfg, state, stats, tg.factorize_all(stats.hessians)).items():
            row, col = (e.float() / 4 for e in steps[name])
            assert steps[name][0].dtype == steps[name][1].dtype == torch.int8
            cost = row[..., None] + col[:, None] + curvature.row[..., None] + curvature.col[:, None].float() / 4
            coarser = curvature.least[..., None] > finest - curvature.row[..., None] - 0.25  # codes stay int16
            assert ((cost - finest > -0.2501) & ((cost - finest < 0.2501) | coarser)).all(), name
            codes = stored[name].parts["codes"]
            assert codes.dtype == torch.int16 and codes.int().abs().max() < 32767
    back = tg.dequantize(cfg, stored)
    assert set(back) == set(state) and all(back[n].shape == state[n].shape for n in state)


def test_what_rows_of_a_table_share_is_found_where_it_pays():
    """Rows along two directions and noise: the directions are found, and nothing in noise alone."""
    generator = torch.Generator().manual_seed(shifted(3))
    noise = torch.randn(4000, 40, generator=generator)
    shared = 9 * torch.randn(4000, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    for table, found in ((noise + shared, True), (noise, False)):
        left, right = tg.common_part(table)
        assert left.dtype == torch.int8 and right.dtype == torch.int16 and left.abs().max() <= 15
        assert left.any() == right.any() == found
        rest = table.double() - left.double().T @ right.double() / 256
        assert rest.square().mean() < (1.0 + 4 * (shared.std() / 15) ** 2 if found else 1e9)
    far = torch.cat([noise + shared, 1e4 * torch.randn(3, 40, generator=generator)])  # three rows with fine steps
    left, right = tg.common_part(far)
    assert (far - left.float().T @ right.float() / 256)[:4000].square().mean() < 8 < shared.square().mean() / 10


def test_rows_alike_do_not_err_alike(rt, tmp_path):
    """Rare tokens' rows, all near one vector that is no multiple of the steps: their mean error is small."""
    cfg = tiny(tmp_path, vocab_size=2000)
    state = {n: p.detach() for n, p in random_model(cfg).named_parameters()}
    generator = torch.Generator().manual_seed(shifted(4))
    table = torch.randn(32, generator=generator) + 0.05 * torch.randn(2000, 32, generator=generator)
    state["tok_emb"] = table
    steps = {g.name: (torch.zeros(w.shape[:2], dtype=torch.int8), torch.zeros(w.size(0), w.size(2), dtype=torch.int8))
             for g in tg.quant_groups(cfg) for w in [g.view(state[g.param])]}
    steps["emb"] = steps["emb"][0] - 4, steps["emb"][1]  # steps of 1/2: ten times the rows' own spread
    stored = tg.quantize(cfg, rt, state, tg.factorize_all(diagonal_hessians(cfg)), steps)
    error = tg.dequantize(cfg, stored)["tok_emb"] - table
    alone = (2 * table.mean(0)).round() / 2 - table.mean(0)  # what all rows would err by, rounded by themselves
    assert error.square().mean() < 0.006 and error.mean(0).square().mean() < 0.1 * alone.square().mean()
    codes, left, right = (stored["emb"].parts[part].double() for part in ("codes", "left", "right"))
    assert codes.count_nonzero() < 0.02 * table.numel()
    by_hand = (codes[0] + left.T @ right / 256) / 2
    assert torch.allclose(by_hand, table.double() + error.double(), atol=1e-6)


@pytest.mark.parametrize("changes", [
    {"tie_embeddings": False}, {"bigram_vocab_size": 50, "bigram_dim": 16}, {"embedding_dim": 16},
    {"ve_enabled": True, "ve_layers": "1,2", "ve_dim": 8}, {"ve_enabled": True, "ve_dim": 0, "ve_bigram_rows": 30},
    {"tie_embeddings": False, "embedding_dim": 16, "bigram_vocab_size": 50, "ve_enabled": True, "ve_layers": "0"},
], ids=str)
def test_weighted_steps_of_every_kind_of_table(rt, tmp_path, changes):
    """The tables' common parts come and go between groups that need Hessians: all is stored, and errors follow c."""
    cfg = tiny(tmp_path, **changes)
    model = random_model(cfg)
    stats, _ = statistics(cfg, model)
    state, distances = {n: p.detach() for n, p in model.named_parameters()}, []
    for finest in (-6.0, -16.0):
        steps = weighted_steps(cfg, state, stats, finest)
        stored = tg.quantize(cfg, rt, state, tg.factorize_all(stats.hessians), steps)
        artifact = tg.write_artifact(tg.artifact_settings(cfg), stored, "ans")
        back = tg.dequantize(cfg, tg.read_artifact(artifact, "x")[1])
        assert set(back) == set(state) and all(back[n].shape == state[n].shape for n in state)
        distances.append({n: float((back[n] - state[n]).square().mean()) for n in state if state[n].ndim > 1})
    assert all(distances[1][n] < 0.01 * distances[0][n] for n in distances[0] if distances[0][n] > 1e-6), distances
    assert sum(distance > 1e-6 for distance in distances[0].values()) >= 4


def test_rows_felt_alike_change_their_steps_one_after_another():
    curvature = tg.Curvature(torch.zeros(1, 1000), torch.zeros(1, 4, dtype=torch.int8), torch.full((1, 1000), -30.0))
    counts = [int((tg.weighted_steps(curvature, at)[0] == -7).sum()) for at in np.arange(-2.0, -1.499, 0.0125)]
    assert counts[0] == 0 and counts[20] == 1000 and counts[-1] == 0
    assert all(abs((b - a) - (50 if i < 20 else -50)) <= 2 for i, (a, b) in enumerate(zip(counts, counts[1:])))


def test_octaves_are_powers_and_exact_on_whole_octaves():
    exponents = torch.arange(-128, 128).to(torch.int8)
    expected = torch.exp2(exponents.double() / 4)
    assert ((tg.octaves(exponents).double() / expected - 1).abs() < 2e-7).all()
    assert torch.equal(tg.octaves(exponents[::4]), torch.exp2(exponents[::4].float() / 4))


def test_weighted_steps_cost_less_than_sdclip_at_the_same_bits():
    """Rows and columns that matter unequally: the quadratic cost under GPTQ, entropy with all its side counted."""
    generator = torch.Generator().manual_seed(shifted(5))
    weight, hessian, _ = problem(512, 96, seed=7)
    felt = torch.exp(1.5 * torch.randn(512, generator=generator, dtype=torch.float64))

    def cost(codes, steps):
        error = (codes * steps - weight[0]).double()
        return float((felt[:, None] * (error @ hessian[0].double()) * error).sum())

    def bits(codes):
        counts = torch.unique(codes, return_counts=True)[1].double()
        return float((-counts * (counts / counts.sum()).log2()).sum())

    scale = tg.clip_scales(weight, 6, 12.85)
    codes = gptq(weight, hessian, scale, 6)
    plain = cost(codes[0].float(), scale.float()[0, :, None]), bits(codes)
    order, upper = tg.factorize(hessian)
    col = torch.zeros(1, 96).scatter_(1, order, (-4 * upper.diagonal(dim1=-2, dim2=-1).log2()).round()).to(torch.int8)
    curvature = tg.Curvature((0.5 * felt.log2()).float()[None], col, torch.full((1, 512), -30.0))
    found = []
    for finest in torch.arange(-2.0, 8.0, 0.25):
        row, col = tg.weighted_steps(curvature, float(finest))
        steps = tg.octaves(row)[..., None] * tg.octaves(col)[:, None]
        codes = gptq(weight, hessian, steps, 16)
        spread = codes.float().square().mean(2).sqrt()  # rows of a like size share a table
        lots = [codes[0][(spread[0].log2() * 2).round() == k] for k in (spread[0].log2() * 2).round().unique()]
        total = sum(bits(lot) for lot in lots) + sum(40 * 8 for _ in lots) + 5 * (512 + 512 + 96)
        found.append((total, math.log2(cost(codes[0].float(), steps[0]))))
        if total <= plain[1]:
            break
    (more, low), (fewer, high) = found[-2:]  # between them lies what the same number of bits would cost
    assert more > plain[1] >= fewer
    assert low + (high - low) * (more - plain[1]) / (more - fewer) < math.log2(0.65 * plain[0])


# ----- text the model draws


def test_drawn_text_is_what_the_prefixes_say(tmp_path):
    """Token by token from the model's own distribution at temperature 0.8, each document from BOS on."""
    cfg = tiny(tmp_path, micro_batch_tokens=80)
    model = random_model(cfg)
    model.bos = 3
    ids = tg.sample_text(cfg, model, 3, 70, torch.Generator().manual_seed(shifted(4)))
    assert ids.shape == (3, 70) and ids.dtype == torch.int64
    drawn, generator = torch.full((3, 70), 3), torch.Generator().manual_seed(shifted(4))
    for part, text in zip(drawn, ids):
        for t in range(1, 70):  # given the text before it: a last bit may turn one draw, and with it all that follows
            odds = torch.softmax(model(text[None, :t]).detach()[0, -1].double() / 0.8, -1).float()
            part[t] = torch.multinomial(odds, 1, generator=generator)
    assert (ids != drawn).sum() <= 1
    assert len(ids.unique()) > 20


def test_calibration_on_drawn_text_is_the_same_for_any_number_of_ranks_and_needs_no_shards(rt, tmp_path, monkeypatch):
    cfg = tiny(tmp_path, gptq_calibration="self", gptq_calibration_batches=3, max_wallclock_seconds=0.0)
    model = random_model(cfg)
    monkeypatch.setattr(rt, "sum_", lambda t: t)
    monkeypatch.setattr(rt, "largest", lambda value: value)

    def sums(rank, world):
        rt.rank, rt.world = rank, world
        return tg.calibrate(cfg, rt, model, None, 0, tg.Clock(rt, 0.0, 0.0)).hessians

    alone, parts = sums(0, 1), [sums(rank, 2) for rank in range(2)]
    for role, hessian in alone.items():
        assert hessian.any() and (parts[0][role] + parts[1][role] - hessian).abs().max() < 1e-5 * hessian.abs().max()


# ----- pruning


def test_pruning_zeroes_the_ones_of_the_least_steps_until_it_fits(rt, tmp_path):
    cfg = tiny(tmp_path, quant_allocation="sdclip")
    state = {n: p.detach() for n, p in random_model(cfg).named_parameters()}
    stored = tg.quantize(cfg, rt, state, tg.factorize_all(diagonal_hessians(cfg)))
    # not lzma: its tables take 700 MB each time, which is most of what that costs
    whole = tg.write_artifact({}, stored, "brotli")
    assert tg.prune({}, stored, "brotli", len(whole)) == whole
    for share in (0.99, 0.97):
        room = int(share * len(whole))
        data = tg.prune({}, stored, "brotli", room)
        assert 0.99 * room <= len(data) <= room
        kept, zeroed = 0.0, 0.0
        back, before = flat(tg.read_artifact(data, "x")[1]), flat(stored)
        for name, codes in back.items():
            changed = codes != before[name]
            if changed.any():
                assert (before[name][changed].abs() == 1).all() and not codes[changed].any()
                steps = before[name.replace("codes", "scales")].float()[..., None].expand(codes.shape)
                zeroed = max(zeroed, float(steps[changed].max()))
        for name, codes in back.items():
            if name.endswith(".codes"):
                steps = before[name.replace("codes", "scales")].float()[..., None].expand(codes.shape)
                assert (steps[codes.abs() == 1] > zeroed).all()
                kept += float((codes.abs() == 1).sum())
        assert kept and zeroed
    assert tg.prune({}, stored, "brotli", 10) == whole  # nothing helps


# ----- LQER and gates


@pytest.mark.parametrize("bits, group", [(4, 64), (2, 64), (4, 7), (7, 1000)])
def test_even_grids_reach_both_ends_of_each_lot(bits, group):
    factor = torch.randn(3, 100, generator=torch.Generator().manual_seed(shifted(0)))
    codes, grid = tg.even_grid(factor, bits, group)
    back = tg.from_even_grid(codes, grid, group)
    assert codes.shape == back.shape == factor.shape and codes.min() == 0 and codes.max() == 2**bits - 1
    for row, again in zip(factor, back):
        for lot, lot_again in zip(row.split(group), again.split(group)):
            step = float(lot.max() - lot.min()) / (2**bits - 1)
            assert (lot - lot_again).abs().max() <= 0.51 * step + 2e-3 * lot.abs().max()


@pytest.mark.parametrize("weighted", [False, True])
def test_lqer_repairs_the_matrices_with_the_largest_errors(rt, tmp_path, weighted):
    cfg = tiny(tmp_path, matrix_bits=3, lqer_enabled=True, lqer_rank=3, lqer_top_k=2, lqer_factor_bits=7)
    model = random_model(cfg)
    state, steps = {n: p.detach() for n, p in model.named_parameters()}, None
    state["mlp_up_bank"][1] *= 5
    stats, _ = statistics(cfg, model)
    if weighted:
        steps = weighted_steps(cfg, state, stats, -1.0)
    plain_cfg = dataclasses.replace(cfg, lqer_enabled=False)
    plain = tg.dequantize(cfg, tg.quantize(plain_cfg, rt, state, tg.factorize_all(stats.hessians), steps))
    stored = tg.quantize(cfg, rt, state, tg.factorize_all(stats.hessians), steps)
    back = tg.dequantize(cfg, stored)
    errors = sorted(((float((w - q).norm()), g.name, i) for g in tg.quant_groups(cfg) for i, (w, q) in enumerate(zip(
        g.view(state[g.param]), g.view(plain[g.param])))), reverse=True)
    largest = {(name, i) for _, name, i in errors[:2]}
    assert {n for n, item in stored.items() if item.form == "low rank"} == {f"{name}.{i}" for name, i in largest}
    for group in tg.quant_groups(cfg):
        for i, weight in enumerate(group.view(state[group.param])):
            before, after = group.view(plain[group.param])[i], group.view(back[group.param])[i]
            if (group.name, i) not in largest:
                assert torch.equal(before, after)
                continue
            rest = torch.linalg.svdvals((weight - before).double())[3:].norm()  # the best a rank of 3 can do
            assert rest * 0.999 <= (weight - after).double().norm() < rest * 1.02
    artifact = tg.write_artifact(tg.artifact_settings(cfg), stored, "ans")
    tg.load_weights(model, cfg, tg.read_artifact(artifact, "x")[1], "x")
    assert all(torch.equal(p, back[n]) for n, p in model.named_parameters())


def test_gates_take_a_byte_a_number(rt, tmp_path):
    cfg = tiny(tmp_path, gated_attn_enabled=True)
    model = random_model(cfg)
    state = {n: p.detach() for n, p in model.named_parameters()}
    state["attn_gate"][1, 2] = 0.0
    stored = tg.quantize(cfg, rt, state, tg.factorize_all(diagonal_hessians(cfg)))
    assert stored["attn_gate"].form == "gate" and stored["attn_gate"].parts["levels"].dtype == torch.int8
    gate, back = state["attn_gate"], tg.dequantize(cfg, stored)["attn_gate"]
    step = gate.abs().amax(-1, keepdim=True) / 127
    assert ((back - gate).abs() <= 0.51 * step + 1e-6).all() and not back[1, 2].any()
    assert set(tg.dequantize(cfg, stored)) == set(state)


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_that_share_the_matrices_store_the_same(tmp_path, world):
    """Each rank quantizes its share; what is stored is one rank's, also where there are fewer matrices than ranks."""
    cfg = tiny(tmp_path)
    model = random_model(cfg)
    stats, _ = statistics(cfg, model)
    state = {n: p.detach() for n, p in model.named_parameters()}
    steps = weighted_steps(cfg, state, stats, -3.0)
    alone = flat(tg.quantize(cfg, FakeRuntime(), state, tg.factorize_all(stats.hessians), steps))
    for stored in on_ranks(world, lambda rt: flat(tg.quantize(
            cfg, rt, state, tg.factorize_all(stats.hessians), steps))):
        assert list(stored) == list(alone) and all(torch.equal(stored[n], alone[n]) for n in alone)
