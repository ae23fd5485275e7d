"""The n-gram tilt: hints against a table filled token by token, its distribution, Hedge written out, every mode."""

import copy
import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from conftest import shifted
from helpers import LENGTHS, FakeRuntime, a_byte_each, farthest, on_ranks, random_model, stream
from helpers import tiny_ttt as config

import train_gpt as tg

ON = {"ngram_tilt_enabled": True, "token_order": "2", "token_threshold": 0.3, "token_boost": 1.5}
MODES = [{"ttt_mode": "none"}, {"ttt_mode": "none", "varlen_enabled": True}, {"ttt_mode": "lora"},
         {"ttt_mode": "phased"}, {"ttt_mode": "chunk"}]


def slow_hints(tokens: list[int], order: int, threshold: float) -> list[int]:
    """A table of contexts, filled after each token: visits, the most frequent token, how often it came."""
    table, hints = {}, []
    for t, token in enumerate(tokens):
        hint = tg.IGNORE
        if t >= order - 1:
            entry = table.setdefault(tuple(tokens[t - order + 1 : t]), {"visits": 0, "top": None, "of": Counter()})
            if entry["visits"] and entry["of"][entry["top"]] / entry["visits"] >= threshold:
                hint = entry["top"]
            entry["visits"] += 1
            entry["of"][token] += 1
            if entry["top"] is None or entry["of"][token] > entry["of"][entry["top"]]:
                entry["top"] = token
        hints.append(hint)
    return hints


@pytest.mark.parametrize("n, vocabulary, order, threshold", [
    (2000, 3, 3, 0.5), (2000, 5, 2, 0.4), (400, 2, 5, 0.8), (900, 9, 2, 0.01), (900, 3, 2, 1.0), (800, 1, 4, 0.8),
    (10, 4, 16, 0.8), (16, 1, 16, 0.8), (17, 1, 16, 0.8), (60, 65536, 2, 0.5), (2, 3, 2, 0.5)])
def test_hints_are_those_of_a_table_filled_token_by_token(n, vocabulary, order, threshold):
    generator = torch.Generator().manual_seed(shifted(n + vocabulary))
    tokens = torch.randint(max(0, vocabulary - 9), vocabulary, (n,), generator=generator, dtype=torch.int32)
    assert tg.find_hints(tokens, [order], threshold).tolist() == slow_hints(tokens.tolist(), order, threshold)


def test_of_several_orders_the_longest_that_has_a_hint_counts():
    generator = torch.Generator().manual_seed(shifted(5))
    tokens = torch.randint(3, (900,), generator=generator, dtype=torch.int32)
    by_order = [slow_hints(tokens.tolist(), order, 0.4) for order in (6, 4, 2)]
    expected = [next((hint for hint in hints if hint != tg.IGNORE), tg.IGNORE) for hints in zip(*by_order)]
    assert a_byte_each(tokens, ngram=([6, 4, 2], 0.4)).hints.tolist() == expected
    assert min(sum(hint != tg.IGNORE for hint in hints) for hints in by_order) > 100 and expected not in by_order
    cfg = config(**ON | {"token_order": "6,4,2"})
    assert cfg.token_orders() == [6, 4, 2] and config(**ON).token_orders() == [2]


def test_a_hint_knows_nothing_of_its_own_token_or_later_ones():
    chance = random.Random(shifted(1))
    tokens = torch.tensor([chance.randrange(4) for _ in range(300)], dtype=torch.int32)
    hints = tg.find_hints(tokens, [3], 0.4)
    assert (hints != tg.IGNORE).sum() > 50
    for t in (3, 40, 120, 299):
        changed = tokens.clone()
        changed[t:] = torch.tensor([chance.randrange(4) for _ in range(300 - t)])
        assert torch.equal(tg.find_hints(changed, [3], 0.4)[: t + 1], hints[: t + 1])


def by_hand(losses: list[float], hint_losses: list[float], hints: list[int], tokens: list[int], boosts: list[float]):
    """Losses after the tilt: each boost's distribution written out, mixed by weights that follow the past of hints
    between the same powers of 1/2.
    """
    costs, found = {}, []
    for loss, hint_loss, hint, token in zip(losses, hint_losses, hints, tokens):
        if hint == tg.IGNORE:
            found.append(loss)
            continue
        p_target, p_hint, total = math.exp(-loss), math.exp(-hint_loss), 0.0
        chances = [p_target * (math.exp(b) if hint == token else 1.0) / (1 - p_hint + p_hint * math.exp(b))
                   for b in boosts]
        kind = min(sum(p_hint <= 0.5**power for power in range(1, 20)), 9)
        past = costs.get(kind, [0.0] * len(boosts))
        weights = [math.exp(-cost) for cost in past]
        total = sum(w * p for w, p in zip(weights, chances)) / sum(weights)
        costs[kind] = [cost - math.log(p) for cost, p in zip(past, chances)]
        found.append(-math.log(total))
    return found


@pytest.mark.parametrize("hedge", [False, True])
def test_the_tilt_equals_its_formula(hedge):
    cfg, tokens = config(**ON, hedge_enabled=hedge), stream([40, 60, 30])
    val = a_byte_each(tokens, 3, ngram=([2], 0.3))
    tilt = tg.Tilt.of(cfg, val)
    assert tilt.boosts == ([1.5 * f for f in (0, 0.25, 0.5, 0.75, 1, 1.5, 2)] if hedge else [1.5])
    losses, hint_losses = 3 * torch.rand(2, len(tokens), generator=torch.Generator().manual_seed(shifted(0))) + 0.1
    hint_losses = torch.where(val.hints == tokens, losses, hint_losses)
    expected = by_hand(losses.tolist(), hint_losses.tolist(), val.hints.tolist(), tokens.tolist(), tilt.boosts)
    got = tilt.apply(losses, hint_losses)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(tilt.places) > 20 and tilt.right.any() and not tilt.right.all()


@pytest.mark.parametrize("boosts", [[0.0], [2.625], [0.0, 1.0, 3.0]])
def test_a_tilted_distribution_adds_up_to_one(boosts):
    """Whatever has been seen before it; for each token that might stand there."""
    log_p = torch.randn(12, generator=torch.Generator().manual_seed(shifted(4))).double().log_softmax(0)
    past, hint, total = torch.tensor([0.4, 2.0, 1.1]).double(), 5, 0.0
    for token in range(12):
        losses, hint_losses = torch.cat((past, -log_p[token, None])), torch.cat((past.flip(0), -log_p[hint, None]))
        tilt = tg.Tilt(torch.tensor([0, 2, 3]), torch.tensor([False, True, token == hint]), boosts)
        hint_losses[2] = losses[2]
        total += float(torch.exp(-tilt.apply(losses, hint_losses)[3]))
    assert total == pytest.approx(1.0, abs=1e-12)


def evaluate(cfg: tg.Settings, model: tg.GPT, tokens: torch.Tensor, rt=None) -> tuple[tg.Score, tg.Scorer]:
    val = a_byte_each(tokens, ngram=tg.ngram_of(cfg))
    evaluator = tg.Evaluator(cfg, rt or FakeRuntime(), model, model, val)
    return evaluator.final(), evaluator.scorer


@pytest.mark.parametrize("changes", MODES, ids=str)
@pytest.mark.parametrize("hedge", [False, True])
def test_every_evaluation_is_tilted_and_nothing_is_learned_from_it(changes, hedge):
    cfg, plain_cfg, tokens = config(**ON, **changes, hedge_enabled=hedge), config(**changes), stream(LENGTHS * 2)
    model = random_model(cfg)
    score, scorer = evaluate(cfg, copy.deepcopy(model), tokens)
    plain, untilted = evaluate(plain_cfg, copy.deepcopy(model), tokens)
    assert farthest(scorer.losses, untilted.losses) < 1e-6 and untilted.hint_losses is None
    hints = tg.find_hints(tokens, [2], 0.3)
    right = hints == tokens
    assert torch.allclose(scorer.hint_losses[right], scorer.losses[right], atol=1e-6)
    expected = by_hand(scorer.losses.tolist()[1:], scorer.hint_losses.tolist()[1:], hints.tolist()[1:],
                       tokens.tolist()[1:], scorer.tilt.boosts)
    assert score.val_loss == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert abs(score.val_loss - plain.val_loss) > 1e-4 and score[2:4] == plain[2:4]


def test_hints_are_priced_by_the_distribution_of_their_target():
    cfg, tokens = config(**ON, ttt_mode="none", eval_stride=1), stream([60])
    model = random_model(cfg)
    _, scorer = evaluate(cfg, model, tokens)
    hints = tg.find_hints(tokens, [2], 0.3)
    for t in (hints != tg.IGNORE).nonzero().flatten().tolist():
        log_p = model(tokens[None, max(0, t - 12) : t].long())[0, -1].detach().log_softmax(-1)
        assert float(scorer.hint_losses[t]) == pytest.approx(-float(log_p[hints[t]]), abs=1e-5)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("order", ["sequential", "sorted"])
def test_ranks_and_the_order_of_documents_change_no_tilted_score(world, order):
    cfg, tokens = config(**ON, hedge_enabled=True), stream(LENGTHS * 2)
    model = random_model(cfg)
    alone = evaluate(cfg, copy.deepcopy(model), tokens)[0]
    other = dataclasses.replace(cfg, ttt_doc_order=order)
    scores = on_ranks(world, lambda rt: evaluate(other, copy.deepcopy(model), tokens, rt)[0])
    assert all(score.val_loss == pytest.approx(alone.val_loss, abs=1e-5) for score in scores)


def test_hedge_costs_at_most_the_best_boost_of_each_kind_and_the_number_of_boosts():
    tokens = stream([50] * 30)
    val = a_byte_each(tokens, 30, ngram=([2], 0.3))
    losses, hint_losses = 4 * torch.rand(2, len(tokens), generator=torch.Generator().manual_seed(shifted(7)))
    hint_losses = torch.where(val.hints == tokens, losses, hint_losses)
    mixed = tg.Tilt.of(config(**ON, hedge_enabled=True), val)
    each = torch.stack([mixed._replace(boosts=[b]).apply(losses, hint_losses) for b in mixed.boosts])
    got, kinds = mixed.apply(losses, hint_losses), (hint_losses / math.log(2)).floor()
    for kind in range(6):
        there = (val.hints != tg.IGNORE) & (kinds == kind)
        assert there.sum() > 3
        assert float(got[there].sum()) <= float(each[:, there].sum(1).min()) + math.log(len(each)) + 1e-9


def test_without_the_tilt_there_is_nothing_of_it():
    cfg, tokens = config(ttt_mode="none"), stream(LENGTHS)
    model, seen = random_model(cfg), []

    def forward(*inputs, **options):
        seen.append(options)
        return model(*inputs, **options)

    val = a_byte_each(tokens)
    evaluator = tg.Evaluator(cfg, FakeRuntime(), model, forward, val)
    evaluator.final()
    assert seen and all("hints" not in options for options in seen)
    assert evaluator.scorer.tilt is None and evaluator.scorer.hint_losses is None and val.hints is None
