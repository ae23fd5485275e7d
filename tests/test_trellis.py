"""Trellis-coded quantization against a search of all paths, a slow Viterbi and what theory says of its gain."""

import itertools
import math

import pytest
import torch
from conftest import shifted
from helpers import FakeRuntime
from test_quantization import problem, random_model, statistics, tiny, weighted_steps

import train_gpt as tg


def allowed(codes: torch.Tensor) -> bool:
    """Whether a row's codes are a path: each as even or odd as its state, which bit 1 of the code before led to."""
    state = 0
    for code in codes.tolist():
        if code % 2 != state % 2:
            return False
        bit = code // 2 % 2
        state = {0: bit, 1: 2 + bit, 2: 5 - bit, 3: 7 - bit, 4: 1 - bit, 5: 3 - bit, 6: 4 + bit, 7: 6 + bit}[state]
    return True


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shifted(seed)))


def cost(weight: torch.Tensor, codes: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Of each row, (E H Eᵀ) with 1 % of the mean diagonal of H added to it, float64."""
    h = hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    e = weight.double() - codes.double() * step.double()
    return ((e @ h) * e).sum(1)


def test_every_state_has_two_ways_in_of_one_parity():
    """The codes of the two ways are then a whole subset's spacing apart, so that no path is close to another."""
    ways = {t: [(before, bit) for before in range(8) for bit in (0, 1) if tg.STATE_AFTER[before][bit] == t]
            for t in range(8)}
    for state, ((first, bit), (second, other)) in ways.items():
        assert (first, second) == (state // 2, state // 2 + 4) and first % 2 == second % 2 and bit != other


def test_without_feedback_it_finds_the_best_of_all_paths():
    """Five columns, codes within ±2 of each weight: all of them that are allowed."""
    weight, step = 3 * draw(1, 6, 5), 0.5 + torch.rand(1, 5, generator=torch.Generator().manual_seed(shifted(1)))
    felt = 0.5 + torch.rand(5, generator=torch.Generator().manual_seed(shifted(2)))
    hessian = torch.diag(felt)
    codes = tg.trellis(weight, tg.factorize(hessian[None], sort=False)[1], step)
    for row, found in zip(weight[0], codes[0]):
        near = [[int(c) for c in (w / s).floor() + torch.arange(-2, 4)] for w, s in zip(row, step[0])]
        paths = torch.tensor([p for p in itertools.product(*near) if allowed(torch.tensor(p))])
        best = float(cost(row.expand(len(paths), 5), paths, step[0], hessian).min())
        assert allowed(found)
        assert float(cost(row[None], found[None], step[0], hessian)) == pytest.approx(best, rel=1e-5)


def slow_viterbi(row: list[float], upper: torch.Tensor, step: list[float]) -> float:
    """The cost that survivors, each with the errors of its own path fed back, end with; in Python numbers."""
    alive = {0: (0.0, list(row))}
    for j, s in enumerate(step):
        found = {}
        for state, (spent, rest) in alive.items():
            for bit in (0, 1):
                offset = state % 2 + 2 * bit
                code = 4 * round((rest[j] / s - offset) / 4) + offset
                error = (rest[j] - code * s) / float(upper[j, j])
                after = tg.STATE_AFTER[state][bit]
                if after not in found or spent + error**2 < found[after][0]:
                    found[after] = spent + error**2, [r - error * float(u) for r, u in zip(rest, upper[j])]
        alive = found
    return min(spent for spent, _ in alive.values())


def test_with_feedback_it_is_viterbi_with_an_error_for_each_survivor():
    weight, hessian, _ = problem(4, 40)
    step = 0.3 + 0.2 * torch.rand(1, 40, generator=torch.Generator().manual_seed(shifted(1)))
    _, upper = tg.factorize(hessian, sort=False)
    codes = tg.trellis(weight, upper, step)
    for row, found in zip(weight[0], codes[0]):
        assert allowed(found)
        expected = slow_viterbi(row.tolist(), upper[0].double(), step[0].tolist())
        assert float(cost(row[None], found[None], step[0], hessian[0])) == pytest.approx(expected, rel=1e-3)


def test_rows_and_matrices_do_not_see_each_other(monkeypatch):
    weight, hessian, _ = problem(9, 150, count=3)
    _, upper = tg.factorize(hessian, sort=False)
    together, step = tg.round_rows(weight, upper, torch.full((3, 150), 0.4)), torch.full((3, 150), 0.4)
    monkeypatch.setattr(tg, "CACHED_ROWS", 4)
    apart = tg.trellis(weight, upper, step)
    assert (together != apart).float().mean() < 0.01  # a last bit may turn one code, and those after it
    for i in range(3):
        a, b = (cost(weight[i], codes[i], step[i], hessian[i]).sum() for codes in (together, apart))
        assert float(a) == pytest.approx(float(b), rel=1e-2)


def entropy(codes: torch.Tensor) -> float:
    counts = torch.unique(codes, return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


@pytest.mark.parametrize("size", [8.0, 2.0])
def test_a_gaussian_takes_a_sixth_of_a_bit_less_than_by_a_plain_grid(size):
    """At equal error, against the entropy of a plain grid's codes; the bound is a quarter of a bit below that grid."""
    x = size * draw(1, 400, 512)
    plain, paths = x.round(), tg.trellis(x, torch.eye(512)[None], torch.full((1, 512), 0.5))
    odd, rates, errors = paths % 2 == 1, [], []
    for codes, step, lots in ((plain, 1.0, [plain]), (paths, 0.5, [paths[odd], paths[~odd]])):
        rates.append(sum(map(entropy, lots)) / x.numel())
        errors.append(float((x - codes * step).square().mean()))
    saved = rates[0] - rates[1] + 0.5 * math.log2(errors[0] / errors[1])
    assert 0.15 < saved < 0.25


@pytest.mark.parametrize("compressor, form", [("ans", "trellis"), ("brotli", "weighted")])
def test_the_budget_is_filled_with_a_trellis_where_the_coder_knows_of_it(rt, tmp_path, compressor, form):
    cfg = tiny(tmp_path, compressor=compressor, quant_allocation="auto", quant_trellis=True, model_dim=64,
               vocab_size=200)
    model = random_model(cfg)
    stats, _ = statistics(cfg, model)
    state, room = {n: p.detach() for n, p in model.named_parameters()}, 40_000
    artifact = tg.fill_budget(cfg, rt, state, stats, room)
    stored = tg.read_artifact(artifact, "x")[1]
    assert 0.98 * room < len(artifact) <= room
    assert {item.form.split()[0] for item in stored.values() if "codes" in item.parts} == {form}


def test_the_budget_is_filled_where_matrices_have_no_gradient(rt, tmp_path):
    """As those of an MLP whose output is scaled by 0: they take steps of any size, and tell nothing of the others."""
    cfg = tiny(tmp_path, compressor="ans", quant_allocation="auto", quant_trellis=True, model_dim=64, vocab_size=200)
    model = random_model(cfg)
    model.mlp_scale.data.zero_()
    stats, _ = statistics(cfg, model)
    assert not stats.moments["up"].any()
    state, room = {n: p.detach() for n, p in model.named_parameters()}, 9_000
    assert 0.98 * room < len(tg.fill_budget(cfg, rt, state, stats, room)) <= room


def test_plain_codes_that_fit_are_kept_where_a_trellis_does_not(rt, tmp_path, monkeypatch):
    cfg = tiny(tmp_path, compressor="ans", quant_allocation="auto", quant_trellis=True, model_dim=64, vocab_size=200)
    model, real = random_model(cfg), tg.write_artifact
    stats, _ = statistics(cfg, model)
    state = {n: p.detach() for n, p in model.named_parameters()}
    monkeypatch.setattr(tg, "write_artifact", lambda settings, stored, compressor: real(
        settings, stored, compressor) + bytes(50_000 * any(item.chained for item in stored.values())))
    assert 30_000 < len(tg.fill_budget(cfg, rt, state, stats, 40_000)) <= 40_000


def test_it_takes_the_bytes_of_plain_codes_and_costs_less(tmp_path):
    cfg = tiny(tmp_path, model_dim=64, vocab_size=200)
    model = random_model(cfg)
    stats, _ = statistics(cfg, model, 80)
    state, factors = {n: p.detach() for n, p in model.named_parameters()}, tg.factorize_all(stats.hessians, sort=False)
    steps, sizes, costs = weighted_steps(cfg, state, stats, -5.0), [], []
    for chained in (False, True):
        stored = tg.quantize(cfg, FakeRuntime(), state, factors, steps, chained)
        sizes.append(len(tg.write_artifact({}, stored, "ans")))
        back, total = tg.dequantize(cfg, stored), 0.0
        for group in tg.quant_groups(cfg):
            e = (group.view(back[group.param]) - group.view(state[group.param])).double()
            if group.name != "emb":
                moments = stats.moments[group.name].double()
                total += float(((e @ stats.hessians[group.hessian].double() * e).sum(2) * moments).sum())
        costs.append(total)
    assert sizes[1] < sizes[0] + 700  # what the tables of twice as many contexts take
    assert costs[1] < 0.85 * costs[0]
