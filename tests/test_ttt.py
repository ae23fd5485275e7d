"""Test-time training: a slow float64 reference of one document at a time, who learns from what and when, and ranks."""

import copy
import dataclasses
import itertools
import json
import logging
import math
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, shifted
from helpers import BOS, LENGTHS, FakeRuntime, farthest, on_ranks, random_model, stream
from helpers import tiny_ttt as config
from reference import Reference, rms
from runs import run_here
from shards import write_shard

import train_gpt as tg

ROUNDING = 3e-4  # nats: AdamW divides gradients by their own size, where rounding may be most of what there is
ROLES = ["q", "k", "v", "o", "mlp", "head"]


def validation(tokens: torch.Tensor) -> tg.Validation:
    return tg.Validation(tokens, 1 + torch.arange(len(tokens), dtype=torch.int32) % 4, int((tokens == BOS).sum()), None,
                         BOS)


def adapt_to(cfg: tg.Settings, model: tg.GPT, tokens: torch.Tensor, rt=None, forward=None, loaded=None):
    """(score, losses by position) of test-time training, or with TTT_MODE=none of the sliding window."""
    val, rt = validation(tokens), rt or FakeRuntime()
    evaluator = tg.Evaluator(cfg, rt, model, forward or model, val, loaded)
    return evaluator.final(), evaluator.scorer.losses[1:].clone()


def documents_by_hand(tokens: torch.Tensor) -> list[list[int]]:
    """Positions of the targets that each document is charged for: all that its own tokens predict."""
    found, ids = [[]], tokens.tolist()
    for i in range(len(ids) - 1):
        if ids[i] == BOS and found[-1]:
            found.append([])
        found[-1].append(i + 1)
    return found


# ----- documents


@pytest.mark.parametrize("tokens", [
    [1, 5, 6, 1, 7, 1], [4, 5, 1, 6, 7], [1, 1, 1, 5], [1, 5, 1, 1], [3, 1], [1, 3], [1, 1], [3, 3, 3], [3, 3, 1, 1, 1],
])
def test_documents_hold_every_target_once(tokens):
    tokens = torch.tensor(tokens, dtype=torch.int32)
    documents = tg.find_documents(tokens, BOS)
    assert [list(range(a + 1, b + 1)) for a, b in documents] == documents_by_hand(tokens)
    assert [t for a, b in documents for t in range(a + 1, b + 1)] == list(range(1, len(tokens)))


def test_documents_of_random_streams_are_never_cut():
    for seed in range(200):
        chance = random.Random(shifted(seed))
        tokens = torch.tensor([chance.choice([1, 1, 2, 3, 4]) for _ in range(chance.randrange(2, 20))])
        documents = tg.find_documents(tokens, BOS)
        assert documents[0][0] == 0 and documents[-1][1] == len(tokens) - 1
        assert all(b == c for (_, b), (c, _) in pairwise(documents))
        for i, (a, b) in enumerate(documents):
            assert a < b and (tokens[a] == BOS or i == 0) and BOS not in tokens[a + 1 : b].tolist()


@pytest.mark.parametrize("changes", [{"ttt_mode": "lora"}, {"ttt_mode": "phased"}, {"bos_id": 22}])
def test_a_bos_that_never_occurs_is_refused(tmp_path, changes):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 5, 6, 7], np.uint16))
    table = tg.ByteTable(torch.ones(23, dtype=torch.int32), torch.zeros(23, dtype=torch.int32),
                         torch.zeros(23, dtype=torch.bool), 0, 9)
    cfg = config(data_path=str(tmp_path), **{"ttt_mode": "none"} | changes)
    with pytest.raises(tg.RunError, match=f"token {changes.get('bos_id', 9)} .*BOS_ID"):
        tg.Validation.load(cfg, table, torch.device("cpu"))
    found = tg.Validation.load(dataclasses.replace(cfg, bos_id=1), table, torch.device("cpu"))
    assert (found.bos, found.docs) == (1, 1)


def spans(count: int, seed: int) -> list[tuple[int, int]]:
    chance, cuts = random.Random(shifted(seed)), [0]
    for _ in range(count):
        cuts.append(cuts[-1] + chance.choice([1, 2, 3, 5, 8, 13, 60]))
    return list(pairwise(cuts))


@pytest.mark.parametrize("order", ["sequential", "bucketed", "sorted"])
def test_batches_hold_every_document_once_at_any_number_of_ranks(order):
    for seed, count in enumerate((1, 2, 5, 12, 37, 100)):
        documents, cfg = spans(count, seed), config(ttt_doc_order=order)
        alone = tg.document_batches(cfg, documents, 1)
        assert len(alone) == 1 and sorted(d for batch in alone[0] for d in batch) == documents
        assert all(1 <= len(batch) <= 3 for batch in alone[0])
        for ranks in (1, 2, 3, 5):
            dealt = tg.document_batches(cfg, documents, ranks)
            assert len(dealt) == ranks and dealt == tg.document_batches(cfg, documents, ranks)
            assert sorted(batch for mine in dealt for batch in mine) == sorted(alone[0])
            loads = [sum(tg.batch_cost(cfg, batch, True) for batch in mine) for mine in dealt]
            assert max(loads) - min(loads) <= max(tg.batch_cost(cfg, batch, True) for batch in alone[0])


def test_document_orders_are_as_specified():
    documents = spans(30, 3)

    def order(name):
        return [d for batch in tg.document_batches(config(ttt_doc_order=name), documents, 1)[0] for d in batch]

    def length(d):
        return d[1] - d[0]

    assert order("sequential") == documents
    assert [length(d) for d in order("sorted")] == sorted(map(length, documents))
    bucketed = order("bucketed")
    for i in range(0, 30, 4):  # windows of four documents, none leaves its own
        assert sorted(bucketed[i : i + 4]) == documents[i : i + 4]
        assert [length(d) for d in bucketed[i : i + 4]] == sorted(map(length, documents[i : i + 4]))
    assert bucketed != documents and bucketed != order("sorted")


def test_documents_that_have_ended_leave_their_batch_by_halves():
    """Sixteen rows: thirteen documents, of which one, five and seven have so many chunks of four tokens."""
    cfg, lengths = config(ttt_batch_size=16), [4, 9, 1, 23, 2, 12, 10, 3, 9, 4, 12, 3, 1]
    ends = list(itertools.accumulate(lengths))
    rows, passes = tg.plan_passes(cfg, [(end - n, end) for end, n in zip(ends, lengths)], True)
    assert [b - a for a, b, _ in rows] == [23, 9, 12, 10, 9, 12, 4, 1, 2, 3, 4, 3, 1, 0, 0, 0]
    assert {chunk for _, _, chunk in rows} == {4}
    assert [tuple(step) for step in passes] == [
        (0, 16, 4, 7, 6), (1, 8, 8, 0, 6), (2, 8, 10, 5, 1), (3, 2, 10, 0, 1), (4, 2, 10, 0, 1), (5, 2, 10, 1, 0)]
    assert tg.batch_cost(cfg, [(0, 23)], True) == 2 * 2 * (4 + 8 + 4 * 10)
    assert tg.batch_cost(cfg, [(0, 5)], False) == 2 * (2 + 4 + 8)  # chunks of a quarter of ten
    assert tg.plan_passes(config(ttt_batch_size=1), [(3, 5)], True) == ([(3, 5, 4)], [(0, 1, 4, 1, 0)])


# ----- adapters against a slow reference


class Adapted(Reference):
    """The float64 reference, each of its matrices plus scale times B A, by virtual layer."""

    def __init__(self, cfg: tg.Settings, model: tg.GPT, initial: dict):
        super().__init__(cfg, model, cfg.num_loops)
        self.p = {name: p.detach() for name, p in self.p.items()}
        self.pairs = {site: tuple(t.detach().double().clone().requires_grad_() for t in pair)
                      for site, pair in initial.items()}
        self.visits = {}

    def delta(self, role: str, layer: int = 0):
        pair = self.pairs.get((role, layer, self.visits.get(layer, 0)) if role != "head" else ("head", -1, 0))
        return self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank * pair[1] @ pair[0] if pair else 0.0

    def attention(self, u, layer, ids):
        self.visits[layer] = self.visits.get(layer, -1) + 1
        plain, n, qo, kv = self.p, self.cfg.num_layers, list(self.p["qo_bank"]), list(self.p["kv_bank"])
        for role, bank, i in (("q", qo, layer), ("o", qo, n + layer), ("k", kv, layer), ("v", kv, n + layer)):
            bank[i] = bank[i] + self.delta(role, layer)  # "o" only where it reads what the matrix reads
        self.p = plain | {"qo_bank": qo, "kv_bank": kv}
        y = super().attention(u, layer, ids)
        self.p = plain
        n, delta = rms(u) / math.sqrt(layer + 1), self.delta("attn", layer)
        return y + plain["attn_scale"][layer] * (n @ delta.T) if isinstance(delta, torch.Tensor) else y

    def mlp(self, u, layer):
        n, delta = rms(u) / math.sqrt(layer + 1), self.delta("mlp", layer)
        beside = n @ delta.T if isinstance(delta, torch.Tensor) else 0.0
        return super().mlp(u, layer) + self.p["mlp_scale"][layer] * beside

    def logits(self, ids):
        plain, cfg, self.visits = self.p, self.cfg, {}
        head = plain["tok_emb" if cfg.tie_embeddings else "head"] + self.delta("head")
        self.p, self.cfg = plain | {"head": head}, dataclasses.replace(cfg, tie_embeddings=False)
        logits = super().logits(ids)
        self.p, self.cfg = plain, cfg
        return logits


def initial_adapters(cfg: tg.Settings, model: tg.GPT) -> dict:
    adapters = tg.DocumentAdapters(cfg, model)
    return {tuple(site): (pair.a[0], pair.b[0]) for site, pair in adapters.hooks.adapters.items()}


def chunk_by_hand(cfg: tg.Settings, length: int) -> int:
    """Tokens of the chunks of a document of this length."""
    pairs = [pair.split(":") for pair in cfg.ttt_short_score_first_steps.split(",") if pair]
    return min([int(chunk) for longest, chunk in pairs if length <= int(longest)], default=cfg.ttt_chunk_size)


def slow_losses(cfg: tg.Settings, model: tg.GPT, tokens: torch.Tensor, warm: tuple[int, ...] = ()) -> torch.Tensor:
    """Losses of targets 1..N-1: documents one by one, chunk by chunk, the optimizer written out.

    From the documents of these numbers on, A begins with its mean over the documents since the number before.
    """
    losses, ids, ended = torch.full((len(tokens),), math.nan, dtype=torch.float64), tokens.tolist(), []
    initial, lr = initial_adapters(cfg, model), cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
    for targets in documents_by_hand(tokens):
        if len(ended) in warm:
            before = ended[max((n for n in warm if n < len(ended)), default=0):]
            initial = {site: (sum(pairs[site][0].detach() for pairs in before) / len(before), b)
                       for site, (_, b) in initial.items()}
        net, begin = Adapted(cfg, model, initial), targets[0] - 1
        leaves = [t for pair in net.pairs.values() for t in pair]
        squares, means, steps = [0.0] * len(leaves), [0.0] * len(leaves), 0
        size = chunk_by_hand(cfg, len(targets))
        for low in range(0, len(targets), size):
            high = low + size
            mine = targets[low:high]
            first = begin + max(0, high - cfg.ttt_eval_seq_len)
            wanted = [ids[i + 1] if i + 1 in mine else tg.IGNORE for i in range(first, mine[-1])]
            charged = net.losses(ids[first : mine[-1]], wanted)[-len(mine):]
            losses[mine] = charged.detach()
            if high >= len(targets):
                break  # the last chunk is only scored
            steps += 1
            for i, g in enumerate(torch.autograd.grad(charged.sum() / size, leaves)):
                with torch.no_grad():
                    leaves[i] *= 1 - lr * cfg.ttt_weight_decay
                    if cfg.ttt_optimizer == "adamw":
                        means[i] = cfg.ttt_beta1 * means[i] + (1 - cfg.ttt_beta1) * g
                        squares[i] = cfg.ttt_beta2 * squares[i] + (1 - cfg.ttt_beta2) * g * g
                        root = (squares[i] / (1 - cfg.ttt_beta2**steps)).sqrt() + 1e-10
                        g = means[i] / (1 - cfg.ttt_beta1**steps) / root
                    leaves[i] -= lr * g
        ended.append(net.pairs)
    return losses[1:]


@pytest.mark.parametrize("changes", [
    {}, {"num_loops": 2, "loop_end": 2}, {"num_loops": 1, "recur_blend": "ab", "ttt_optimizer": "sgd"},
    {"ttt_optimizer": "sgd", "ttt_lora_lr": 0.1}, {"ttt_beta1": 0.8, "ttt_beta2": 0.9, "ttt_weight_decay": 3.0},
    {"tie_embeddings": False, "ttt_chunk_size": 3, "ttt_eval_seq_len": 17},
    {"ttt_chunk_size": 10}, {"ttt_chunk_size": 1, "ttt_eval_seq_len": 6, "ttt_weight_decay": 0.0,
     "ttt_optimizer": "sgd"}, {"ttt_lora_o_input": "attention"},
    {f"ttt_{other}_lora": other == "o" for other in ROLES} | {"ttt_lora_o_input": "attention"},
    {"ttt_local_lr_mult": 0.4}, {"ttt_short_score_first_steps": "5:2,20:3"},
    {"ttt_batch_size": 8, "ttt_beta1": 0.8, "ttt_beta2": 0.9}, {"ttt_batch_size": 8, "ttt_optimizer": "sgd"},
    {"ttt_short_score_first_steps": "22:3", "ttt_optimizer": "sgd", "ttt_batch_size": 4},
    *({f"ttt_{role}_lora": False} for role in ROLES),
    *({f"ttt_{other}_lora": other == role for other in ROLES} for role in ROLES),
], ids=str)
def test_adapters_equal_a_slow_reference(changes):
    cfg = config(**changes)
    model, tokens = random_model(cfg), stream([9, 1, 23, 4])
    expected = slow_losses(cfg, model, tokens)
    losses = adapt_to(cfg, model, tokens)[1]
    assert farthest(losses, expected) < (3e-5 if cfg.ttt_optimizer == "sgd" else ROUNDING)
    plain = adapt_to(dataclasses.replace(cfg, ttt_lora_lr=0.0), model, tokens)[1]
    assert farthest(losses, plain) > 1e-2  # it did learn
    on = {role for role in ROLES if getattr(cfg, f"ttt_{role}_lora")}
    if cfg.ttt_lora_o_input == "norm" and "o" in on:
        on = on - {"o"} | {"attn"}
    assert {site.role for site in tg.DocumentAdapters(cfg, model).hooks.adapters} == on


@pytest.mark.parametrize("batch, order", [(1, "sequential"), (3, "sorted"), (8, "bucketed")])
@pytest.mark.parametrize("world, mode, warm", [(1, "lora", (2, 4)), (2, "lora", (2, 4)), (2, "phased", (2, 3, 4))])
def test_a_warm_start_is_the_mean_of_what_the_documents_before_ended_with(batch, order, world, mode, warm):
    """Whatever the batches, their order and the ranks; rows of padding and steps after its end do not count. A phase,
    of three documents here, also ends a group.
    """
    cfg = config(ttt_mode=mode, phased_ttt_prefix_docs=3, phased_ttt_num_phases=1, global_ttt_lr=0.0,
                 ttt_warm_start_a=True, ttt_warm_start_docs=2, ttt_batch_size=batch, ttt_doc_order=order,
                 ttt_optimizer="sgd", ttt_lora_lr=0.1)
    model, tokens = random_model(cfg), stream([9, 13, 5, 4, 23, 8])
    expected = slow_losses(cfg, model, tokens, warm)
    found = on_ranks(world, lambda rt: adapt_to(cfg, copy.deepcopy(model), tokens, rt)[1])
    assert farthest(sum(found), expected) < 3e-5
    assert farthest(slow_losses(cfg, model, tokens)[22:], expected[22:]) > 1e-3  # it does something


@pytest.mark.parametrize("text", ["5", "5:", "5:0", "9:2,4:1", "4:1;9:2", "4:1,", "x"])
def test_chunks_that_are_no_list_are_refused(text):
    with pytest.raises(tg.RunError, match="TTT_SHORT_SCORE_FIRST_STEPS=.* takes ascending lengths"):
        config(ttt_short_score_first_steps=text)


def test_chunks_are_at_most_the_usual_ones():
    assert config(ttt_chunk_size=4, ttt_short_score_first_steps="5:2,9:24").ttt_chunks() == [
        (5, 2), (9, 4), (math.inf, 4)]
    assert config(ttt_short_score_first_steps="0").ttt_chunks() == config().ttt_chunks() == [(math.inf, 4)]


def test_adapters_start_as_specified():
    cfg = config(num_loops=2, ttt_lora_rank=40, embedding_dim=8)
    made = tg.DocumentAdapters(cfg, random_model(cfg))
    made.reset()
    roles = [(role, layer, visit) for layer, visit in [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
             for role in ("q", "k", "v", "attn", "mlp")]
    assert sorted(map(tuple, made.hooks.adapters)) == sorted([*roles, ("head", -1, 0)])
    for site, (a, b, scale) in made.hooks.adapters.items():
        a, b = a.detach(), b.detach()
        width, out = (8, 23) if site.role == "head" else (16, 8 if site.role in "kv" else 16)
        assert a.shape == (3, 40, width) and b.shape == (3, out, 40) and not b.any()
        assert torch.equal(a[0], a[1]) and torch.equal(a[0], a[2])
        assert 0.9 * width**-0.5 < a.abs().max() <= width**-0.5 and abs(float(a[0].mean())) < 0.15 * width**-0.5
        assert float(a[0].std()) == pytest.approx(width**-0.5 / 3**0.5, rel=0.12)
        assert scale == 5.0 / 40
    firsts = [a[0, 0, 0].item() for a, _, _ in made.hooks.adapters.values()]
    assert len(set(firsts)) == len(firsts)


def test_an_artifact_is_adapted_alike_whatever_the_seed_of_the_run():
    """EVAL_ONLY takes from the artifact all that its score depends on; the adapters' first values are such a thing."""
    trained = config(seed=5)
    loaded = tg.adopt_settings(SimpleNamespace(explicit={}), tg.artifact_settings(trained), "x")
    a, b = (tg.DocumentAdapters(cfg, random_model(trained)).leaves[0] for cfg in (trained, loaded))
    assert torch.equal(a, b)


def test_order_and_batches_of_documents_do_not_change_the_score():
    tokens, results = stream(LENGTHS), []
    for order in ("sequential", "bucketed", "sorted"):
        for size in (1, 3, 5, 20):
            cfg = config(ttt_doc_order=order, ttt_batch_size=size, num_loops=1)
            results.append(adapt_to(cfg, random_model(cfg), tokens))
    for score, losses in results[1:]:
        assert score.val_bpb == pytest.approx(results[0][0].val_bpb, abs=1e-5)
        assert farthest(losses, results[0][1]) < ROUNDING


@pytest.mark.parametrize("changes", [{"ttt_lora_lr": 0.0}, {"ttt_lora_lr": 0.0, "ttt_optimizer": "sgd"}])
def test_without_learning_the_score_is_that_of_the_same_windows(changes):
    cfg = config(**changes)
    model, tokens = random_model(cfg), stream(LENGTHS)
    losses, expected, ids = adapt_to(cfg, model, tokens)[1], [], tokens.long()
    for targets in documents_by_hand(tokens):
        for i, target in enumerate(targets):
            end = (i // 4 + 1) * 4  # its chunk's
            logits = model(ids[None, targets[0] - 1 + max(0, end - 10) : target])[0, -1].double()
            expected.append(float(logits.logsumexp(0) - logits[ids[target]]))
    assert farthest(losses, torch.tensor(expected)) < 3e-5
    off = adapt_to(dataclasses.replace(cfg, **{f"ttt_{role}_lora": role == "q" for role in ROLES}), model, tokens)[1]
    assert farthest(losses, off) < 1e-6


# ----- who learns from what, and when


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_forward_and_one_backward_a_chunk_and_no_learning_before_the_charge(monkeypatch, optimizer):
    cfg = config(ttt_doc_order="sequential", ttt_optimizer=optimizer)
    model, tokens, events, made = random_model(cfg), stream(LENGTHS), [], []
    lengths, grad = [len(d) for d in documents_by_hand(tokens)], torch.autograd.grad
    batches = [lengths[i : i + 3] for i in range(0, len(lengths), 3)]
    expected = []
    for batch in batches:
        chunks = -(-max(batch) // 4)
        expected += ["forward", "charge", "backward"] * (chunks - 1) + ["forward", "charge"]

    def forward(*arguments, **options):
        events.append("forward")
        return model(*arguments, **options)

    def backward(*arguments, **options):
        events.append("backward")
        return grad(*arguments, **options)

    charge, init, learn = tg.Scorer.add, tg.DocumentAdapters.__init__, tg.DocumentAdapters.learn
    charged, ends = [], [d[-1] for d in documents_by_hand(tokens) for _ in d]

    def add(self, positions, losses):
        events.append("charge")
        charged.append((positions, losses.clone()))
        assert not losses.requires_grad
        charge(self, positions, losses)

    def spy_learn(self, loss):
        positions, losses = charged[-1]
        fed = sum(float(losses[row].sum()) for row in range(3) if any(positions[row])
                  and int(positions[row].max()) < ends[int(positions[row].max()) - 1])
        assert float(loss.detach()) == pytest.approx(fed / 4, rel=1e-5) and fed > 0
        learn(self, loss)

    def spy_init(self, *arguments):
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(tg.Scorer, "add", add)
    monkeypatch.setattr(tg.DocumentAdapters, "learn", spy_learn)
    monkeypatch.setattr(tg.DocumentAdapters, "__init__", spy_init)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    before = copy.deepcopy(model.state_dict())
    adapt_to(cfg, model, tokens, forward=forward)
    assert events == expected
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert len(made) == 1 and made[0].leaves and all(t.is_leaf and t.requires_grad for t in made[0].leaves)
    held = [t for pair in made[0].hooks.adapters.values() for t in pair[:2]]
    assert len(held) == len(made[0].leaves) and all(a is b for a, b in zip(held, made[0].leaves))


MODES = [{"ttt_mode": "lora"}, {"ttt_mode": "lora", "num_loops": 1, "smear_gate_enabled": True, "bigram_vocab_size": 9},
         {"ttt_mode": "phased"}, {"ttt_mode": "phased", "ttt_warm_start_a": True, "ttt_warm_start_docs": 2},
         {"ttt_mode": "chunk"},
         {"ttt_mode": "chunk", "varlen_enabled": True},
         {"ttt_mode": "chunk", "varlen_enabled": True, "ttt_chunk_tokens": 1}]


def first_difference(cfg, model, tokens, changed, known: list | None = None) -> int:
    """The first position whose loss the changed text changes by more than rounding; `known`: losses of both texts."""
    losses = known or [adapt_to(cfg, copy.deepcopy(model), text)[1] for text in (tokens, changed)]
    differ = ((losses[0] - losses[1]).abs() > ROUNDING).nonzero()
    return int(differ[0]) + 1 if len(differ) else len(tokens)


@pytest.mark.parametrize("changes", MODES, ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["same-documents", "other-documents"])
def test_later_tokens_change_no_loss(changes, shuffled):
    cfg, tokens = config(**changes), stream(LENGTHS)
    model = random_model(cfg)
    before = adapt_to(cfg, copy.deepcopy(model), tokens)[1]
    for t in (1, 12, 13, 33, 38, 61, len(tokens) - 2):
        changed, chance = tokens.clone(), random.Random(shifted(t))
        for i in range(t + 1, len(tokens)):
            if shuffled:  # documents end elsewhere, or not at all
                changed[i] = chance.choice([BOS, *range(1, 23)]) if t % 2 else chance.randrange(2, 23)
            elif tokens[i] != BOS:
                changed[i] = 2 + (int(tokens[i]) - 2 + chance.randrange(1, 21)) % 21
        if torch.equal(changed, tokens):
            continue
        after = adapt_to(cfg, copy.deepcopy(model), changed)[1]
        assert t < first_difference(cfg, model, tokens, changed, [before, after]) < len(tokens)


@pytest.mark.parametrize("changes", [{}, {"ttt_lora_lr": 0.0}, {"ttt_mode": "phased"}], ids=str)
def test_where_a_document_ends_changes_no_loss_before(changes):
    """It is longer than TTT_EVAL_SEQ_LEN, and each of its tokens in turn starts a document instead."""
    cfg, tokens = config(**changes), stream([30, 5])
    model = random_model(cfg)
    before = adapt_to(cfg, copy.deepcopy(model), tokens)[1]
    for t in range(13, 30):
        changed = tokens.clone()
        changed[t] = BOS
        after = adapt_to(cfg, copy.deepcopy(model), changed)[1]
        assert t == first_difference(cfg, model, tokens, changed, [before, after])


@pytest.mark.parametrize("mode, reach", [("lora", (22, 33)), ("phased", (60, 79)), ("chunk", (60, 79))])
def test_earlier_tokens_teach(mode, reach):
    """A token beyond attention's reach still changes what is learned: the test above looks at something."""
    cfg, tokens = config(ttt_mode=mode), stream(LENGTHS)
    model, changed = random_model(cfg), tokens.clone()
    changed[12] = 2 + (changed[12] - 1) % 21
    losses = [adapt_to(cfg, copy.deepcopy(model), text)[1] for text in (tokens, changed)]
    assert farthest(losses[0][reach[0] + 4 : reach[1]], losses[1][reach[0] + 4 : reach[1]]) > ROUNDING
    still = config(ttt_mode=mode, ttt_lora_lr=0.0, ttt_lr=0.0, global_ttt_lr=0.0)
    losses = [adapt_to(still, copy.deepcopy(model), text)[1] for text in (tokens, changed)]
    assert farthest(losses[0][reach[0] + 4 : reach[1]], losses[1][reach[0] + 4 : reach[1]]) < 1e-6


def test_learning_before_the_charge_is_caught_as_not_causal():
    """The planted fault: each chunk is learned from, then scored again and charged."""
    cfg, tokens = config(), stream(LENGTHS)
    model, honest = random_model(cfg), tg.Evaluator.score_documents

    def cheat(self, batch, adapters):
        def peek(ids, targets, hooks, **options):
            losses = self.model(ids, targets, hooks=hooks, **options)
            if losses.requires_grad:
                adapters.learn(losses.sum())
                losses = self.model(ids, targets, hooks=hooks, **options)
            return losses

        self.forward = peek
        honest(self, batch, adapters)

    changed, t = tokens.clone(), 12
    changed[t + 1 : 14] = 2 + (changed[t + 1 : 14] - 1) % 21
    assert not torch.equal(changed, tokens)
    assert first_difference(cfg, model, tokens, changed) > t
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.Evaluator, "score_documents", cheat)
        assert first_difference(cfg, model, tokens, changed) <= t


def test_phases_do_not_depend_on_how_many_documents_are_to_come():
    cfg = config(ttt_mode="phased", phased_ttt_prefix_docs=20, phased_ttt_num_phases=2)
    model, tokens = random_model(cfg), stream(LENGTHS)
    changed, t = tokens.clone(), 60
    changed[t + 1 :] = torch.where(changed[t + 1 :] == BOS, 5, changed[t + 1 :])
    assert first_difference(cfg, model, tokens, changed) > t
    changed[t + 1 :] = BOS
    assert first_difference(cfg, model, tokens, changed) > t


# ----- training all weights


def spied_steps(cfg, model, tokens, monkeypatch, patch_rank=None):
    """What Sgd.step was given, each with the positions scored by then, of a run on one rank."""
    steps, scorers, step, init = [], [], tg.Sgd.step, tg.Scorer.__init__

    def spy(self, part, bos, lr_scale):
        before = [p.detach().clone() for p in model.parameters()]
        step(self, part, bos, lr_scale)
        moved = max(farthest(a, b) for a, b in zip(before, model.parameters()))
        place = (part.data_ptr() - tokens.data_ptr()) // 4  # a view of the stream
        assert torch.equal(tokens[place : place + len(part)], part) and bos == BOS
        scored = {i for i, times in enumerate(scorers[0].times.tolist()) if times and i}
        steps.append(SimpleNamespace(first=place, stop=place + len(part), scored=scored, moved=moved, scale=lr_scale))

    def spy_init(self, *arguments, **options):
        init(self, *arguments, **options)
        scorers.append(self)

    monkeypatch.setattr(tg.Sgd, "step", spy)
    monkeypatch.setattr(tg.Scorer, "__init__", spy_init)
    score = adapt_to(cfg, model, tokens)[0]
    return score, steps


def test_chunks_are_trained_on_once_scored_but_for_the_last(monkeypatch):
    cfg, tokens = config(ttt_mode="chunk"), stream(LENGTHS)
    n, model = len(tokens), random_model(cfg)
    score, steps = spied_steps(cfg, model, tokens, monkeypatch)
    last = (n - 2) // 16  # number of the last chunk of 16 tokens
    assert score.tokens == n - 1 and last > 3 and len(steps) == 2 * last  # two epochs
    for i, (one, two) in enumerate(zip(steps[::2], steps[1::2])):
        assert (one.first, one.stop) == (two.first, two.stop) == (16 * i, 16 * i + 17)
        assert one.scored == two.scored == set(range(1, 16 * i + 17))  # its last target, and nothing further
        assert one.moved > 1e-5 and two.moved > 1e-5
        assert one.scale == two.scale == pytest.approx((1 + math.cos(math.pi * i / last)) / 2)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("changes", [{"eval_stride": 5}, {"varlen_enabled": True}, {"ttt_chunk_tokens": 5},
                                     {"varlen_enabled": True, "ttt_chunk_tokens": 3}], ids=str)
def test_chunks_that_windows_do_not_end_with_hold_scored_targets_only(monkeypatch, changes):
    cfg, tokens = config(ttt_mode="chunk", ttt_epochs=1, **changes), stream(LENGTHS)
    size, reached = cfg.ttt_chunk_tokens, 0
    _, steps = spied_steps(cfg, random_model(cfg), tokens, monkeypatch)
    assert len(steps) > 2
    for step in steps:  # whole chunks, one after another
        assert step.first == reached and step.first % size == 0 and (step.stop - 1) % size == 0
        assert {*range(1, step.stop)} <= step.scored
        reached = step.stop - 1
    assert reached > len(tokens) - 2 - max(size, 12)


@pytest.mark.parametrize("changes", [{}, {"varlen_enabled": True}, {"num_loops": 1}, {"eval_stride": 0},
                                     {"ttt_chunk_tokens": 1}, {"ttt_chunk_tokens": 10_000, "ttt_lr": 0.5}], ids=str)
def test_chunks_without_learning_equal_the_sliding_window(changes):
    cfg, tokens = config(ttt_mode="chunk", **{"ttt_lr": 0.0} | changes), stream(LENGTHS)
    sliding = dataclasses.replace(cfg, ttt_mode="none", eval_stride=cfg.eval_stride or cfg.eval_seq_len)
    losses = [adapt_to(c, random_model(cfg), tokens)[1] for c in (cfg, sliding)]
    assert farthest(*losses) < 1e-5 and losses[0].std() > 0.3


def test_phases_train_on_scored_documents_in_validation_order(monkeypatch):
    cfg = config(ttt_mode="phased", ttt_doc_order="sorted", global_ttt_chunk_tokens=4)
    tokens = stream(LENGTHS)
    model, documents = random_model(cfg), documents_by_hand(tokens)
    score, steps = spied_steps(cfg, model, tokens, monkeypatch)
    assert score.tokens == len(tokens) - 1
    expected = []
    for count in (2, 5):  # two phases over the first five documents
        end = documents[count - 1][-1]
        last = math.ceil(end / 4) - 1  # the last step is left out
        expected += [(4 * i, 4 * i + 5, set(range(1, end + 1)), (1 + math.cos(math.pi * i / last)) / 2)
                     for i in range(last)]
    assert [(s.first, s.stop, s.scored) for s in steps] == [e[:3] for e in expected]
    assert [s.scale for s in steps] == pytest.approx([e[3] for e in expected])
    assert all(s.moved > 1e-5 for s in steps)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_phased_says_how_many_steps_all_weights_took(monkeypatch):
    for changes, why in (({}, ""), ({"phased_ttt_prefix_docs": 1000}, ": PHASED_TTT_PREFIX_DOCS=1000 of 8 documents, "
                                    "steps of GLOBAL_TTT_CHUNK_TOKENS=4")):
        cfg, rt = config(ttt_mode="phased", global_ttt_chunk_tokens=4, **changes), FakeRuntime()
        steps, real = [], tg.Sgd.step
        with monkeypatch.context() as patch:
            patch.setattr(tg.Sgd, "step", lambda *arguments, real=real, steps=steps: steps.append(real(*arguments)))
            adapt_to(cfg, random_model(cfg), stream(LENGTHS), rt)
        assert f"{len(steps)} steps of all weights{why}" in rt.said and bool(steps) == (not why)


def test_phases_change_only_what_follows_them():
    tokens, ends = stream(LENGTHS), [documents[-1] for documents in documents_by_hand(stream(LENGTHS))]
    cfg = config(ttt_mode="phased", phased_ttt_num_phases=1)
    lora, phased, still = (adapt_to(c, random_model(cfg), tokens)[1] for c in (
        config(), cfg, dataclasses.replace(cfg, global_ttt_lr=0.0)))
    assert farthest(lora, still) < ROUNDING  # batches of other documents: matrices of other shapes
    assert farthest(lora[: ends[4]], phased[: ends[4]]) < ROUNDING
    for a, b in pairwise(ends[4:]):
        assert farthest(lora[a:b], phased[a:b]) > 3 * ROUNDING


def test_sgd_equals_its_formula():
    """Momentum SGD on the mean loss, the gradient's norm clipped to 1, over rows of 12 tokens without overlap."""
    cfg, tokens, lr = config(ttt_mode="chunk", ttt_lr=0.3), stream([9, 30]), 0.3
    model = random_model(cfg)
    net, sgd = copy.deepcopy(model), tg.Sgd(cfg, FakeRuntime(), model, model)
    velocity, norms = [0.0 for _ in net.parameters()], []
    for scale, (first, stop) in ((1.0, (0, 31)), (0.4, (20, 38))):
        sgd.step(tokens[first : stop + 1], BOS, scale)
        rows = [tokens[i : min(i + 12, stop) + 1].long() for i in range(first, stop, 12)]
        total = sum(torch.nn.functional.cross_entropy(net(r[None, :-1])[0], r[1:], reduction="sum") for r in rows)
        grads = torch.autograd.grad(total / (stop - first), list(net.parameters()))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
        for i, p in enumerate(net.parameters()):
            velocity[i] = 0.9 * velocity[i] + grads[i] / max(1.0, norms[-1])
            with torch.no_grad():
                p -= lr * scale * velocity[i]
    assert max(norms) > 1
    for (name, p), q in zip(model.named_parameters(), net.parameters()):
        assert farthest(p, q) < 2e-5, name


@pytest.mark.parametrize("varlen", [False, True])
def test_sgd_of_phases_sees_each_document_by_itself(varlen):
    """One row holds a step. The reference runs its documents, cut after 12 tokens, one by one."""
    cfg = config(ttt_mode="phased", global_ttt_lr=0.3, global_ttt_chunk_tokens=40, varlen_enabled=varlen)
    tokens = stream([9, 3, 19, 6, 8])
    model = random_model(cfg)
    net, rows = copy.deepcopy(model), []

    def forward(ids, targets, **options):
        rows.append(tuple(ids.shape))
        return model(ids, targets, **options)

    tg.Sgd(cfg, FakeRuntime(), model, forward).step(tokens[:41], BOS, 0.5)
    assert rows == [(1, 40)]
    cuts = [0, 9, 12, 24, 31, 37, 40]  # 24 inside the third
    total = sum(torch.nn.functional.cross_entropy(net(tokens[None, a:b].long())[0], tokens[a + 1 : b + 1].long(),
                                                  reduction="sum") for a, b in pairwise(cuts))
    grads = torch.autograd.grad(total / 40, list(net.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    for (name, p), q, g in zip(model.named_parameters(), net.parameters(), grads):
        assert farthest(p, q - 0.15 * g / max(1.0, norm)) < 1e-5, name


@pytest.mark.parametrize("mode", ["lora", "phased", "chunk"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_on_score_and_weights(mode, world):
    cfg, tokens = config(ttt_mode=mode), stream(LENGTHS)
    model = random_model(cfg)

    def work(rt):
        own = copy.deepcopy(model)
        return adapt_to(cfg, own, tokens, rt)[0], own.state_dict()

    alone, weights = work(FakeRuntime())
    assert mode == "lora" or any(not torch.equal(weights[name], p) for name, p in model.state_dict().items())
    results = on_ranks(world, work)
    for score, state in results:
        assert score.val_bpb == pytest.approx(alone.val_bpb, abs=1e-5) and score[2:4] == alone[2:4]
        assert all(torch.equal(state[name], results[0][1][name]) for name in state)
        assert all(farthest(state[name], weights[name]) < 1e-5 for name in state)


# ----- the budget


def timed(cfg, monkeypatch, lengths, spent=0.0):
    """Score, losses, messages, when batches began to adapt, by a clock that a forward pass advances by a second.

    `spent`: seconds since the artifact was loaded, before this.
    """
    clock, starts, rt = SimpleNamespace(now=100.0), [], FakeRuntime()
    model, tokens, reset = random_model(cfg), stream(lengths), tg.DocumentAdapters.reset

    def forward(*arguments, **options):
        clock.now += 1
        return model(*arguments, **options)

    def spy(self):
        starts.append(clock.now - 100)
        reset(self)

    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(tg.DocumentAdapters, "reset", spy)
    score, losses = adapt_to(cfg, model, tokens, rt, forward, clock.now - spent)
    return score, losses, [line for line in rt.said if "EVAL_BUDGET" in line], starts


@pytest.mark.parametrize("budget", [0.001, 7.0, 10.0, 16.0])
def test_what_the_budget_cuts_off_is_scored_without_adaptation(monkeypatch, budget):
    cfg = config(ttt_batch_size=1, ttt_doc_order="sequential", eval_budget_seconds=budget)
    score, losses, said, _ = timed(cfg, monkeypatch, [9] * 6)
    tokens = stream([9] * 6)
    adapted = adapt_to(dataclasses.replace(cfg, eval_budget_seconds=0.0), random_model(cfg), tokens)[1]
    kept = [i for i in range(6) if farthest(losses[9 * i : 9 * i + 9], adapted[9 * i : 9 * i + 9]) < 1e-6]
    assert kept == list(range(len(kept))) and len(kept) < 6  # the first ones
    assert budget < 1 or kept
    left = 6 - len(kept)
    assert len(said) == 1 and f": {9 * left} tokens scored and not" in said[0] and "EVAL_BUDGET_SECONDS" in said[0]
    assert score.tokens == len(tokens) - 1
    chunk, ids = max(1, cfg.ttt_eval_seq_len // 4), tokens.long()
    for i in range(len(kept), 6):  # windows of TTT_EVAL_SEQ_LEN in steps of a quarter, no adapters
        for j in range(9):
            first, target = 9 * i + max(0, (j // chunk + 1) * chunk - cfg.ttt_eval_seq_len), 9 * i + j + 1
            logits = random_model(cfg)(ids[None, first:target])[0, -1].double()
            expected = float((logits.logsumexp(0) - logits[ids[target]]).detach())
            assert float(losses[target - 1]) == pytest.approx(expected, abs=1e-5)


def test_a_slow_start_is_not_the_pace_of_all(monkeypatch):
    """Half a second more for the first of 10,000 batches of 20 ms; and then all take as long."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    adapted = []
    for slow in (1, 10_000):
        clock.now = 0.0
        budget = tg.Budget(config(eval_budget_seconds=400.0), FakeRuntime(), 0.0, 10_000 * 0.4)
        count = 0
        for i in range(10_000):
            learns = budget.spend(1.0, 0.4)
            count += learns
            clock.now += (0.52 if i < slow else 0.02) * (1.0 if learns else 0.4)
        adapted.append(count)
    assert adapted[0] == 10_000 and adapted[1] < 30


def test_time_is_kept_for_what_comes_last(monkeypatch):
    """200 s of work, or 80 s without adapting, in 150 s of which 30 are gone: it ends after 97 % of those left."""
    clock = SimpleNamespace(now=30.0)
    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    budget = tg.Budget(config(eval_budget_seconds=150.0), FakeRuntime(), 0.0, 10_000 * 0.4)
    adapted = 0
    for _ in range(10_000):
        learns = budget.spend(1.0, 0.4)
        adapted += learns
        clock.now += 0.02 * (1.0 if learns else 0.4)
    assert clock.now == pytest.approx(30 + 0.97 * 120, abs=0.1)
    assert 0 < adapted < 10_000


@pytest.mark.parametrize("mode", ["lora", "phased", "chunk"])
def test_what_was_spent_before_counts(monkeypatch, mode):
    """Loading and earlier scores: the budget is one for all that follows the loading of the artifact."""
    def losses(budget: float, spent: float) -> torch.Tensor:
        cfg = config(ttt_mode=mode, ttt_batch_size=1, ttt_doc_order="sequential", eval_budget_seconds=budget,
                     ttt_chunk_tokens=9, eval_seq_len=6, eval_stride=3)
        return timed(cfg, monkeypatch, [9] * 6, spent)[1]

    assert torch.equal(losses(516.0, 500.0), losses(16.0, 0.0))
    assert not torch.equal(losses(516.0, 500.0), losses(516.0, 0.0))
    assert not torch.equal(losses(516.0, 500.0), losses(516.0, 516.0))


@pytest.mark.parametrize("budget", [0.0, 19.0])
def test_a_budget_that_suffices_changes_nothing(monkeypatch, budget):
    cfg = config(ttt_batch_size=1, eval_budget_seconds=budget)  # 6 documents of 3 chunks: 18 s
    adapted = adapt_to(dataclasses.replace(cfg, eval_budget_seconds=0.0), random_model(cfg), stream([9] * 6))[1]
    _, losses, said, starts = timed(cfg, monkeypatch, [9] * 6)
    assert not said and len(starts) == 6 and torch.equal(losses, adapted)


@pytest.mark.parametrize("budget", [4.0, 10.0, 14.0])
def test_no_phase_adapts_again_once_the_budget_is_spent(monkeypatch, budget):
    cfg = config(ttt_mode="phased", ttt_batch_size=1, phased_ttt_prefix_docs=4, eval_budget_seconds=budget)
    score, _, said, starts = timed(cfg, monkeypatch, [9] * 12)
    assert score.tokens == 9 * 12 and len(said) == 1
    assert starts and max(starts) <= budget


def test_a_phase_ends_when_the_budget_does(monkeypatch):
    """4 documents of 3 s, then 35 steps of a second, then 2 documents of 5 s: 57 s in all. Backward passes, which take
    no time here, are judged to take some, and so the last documents to take 5 s.
    """
    cfg = config(ttt_mode="phased", ttt_batch_size=1, phased_ttt_prefix_docs=4, phased_ttt_num_phases=1,
                 global_ttt_chunk_tokens=1, ttt_doc_order="sequential", eval_budget_seconds=40.0)
    steps, real = [], tg.Sgd.step
    monkeypatch.setattr(tg.Sgd, "step", lambda *arguments: (steps.append(1), real(*arguments)))
    score, _, said, _ = timed(cfg, monkeypatch, [9] * 6)
    # 12 s, the steps and 10 s end within 6 s of the budget
    assert score.tokens == 9 * 6 and len(said) == 1 and 0 < len(steps) <= 40 + 6 - 12 - 10


def test_adapters_lie_in_memory_as_their_gradients_do():
    """And as AdamW's moments: else each of hundreds of tensors is updated by itself, out of its order."""
    cfg = config(ttt_batch_size=3)
    model, tokens = random_model(cfg), stream([9, 9, 9])
    adapters = tg.DocumentAdapters(cfg, model)
    adapters.reset()
    for rows in (3, 2):
        adapters.narrow(rows)
        ids = torch.stack([tokens[9 * i : 9 * i + 8] for i in range(rows)]).long()
        adapters.learn(model(ids, ids, hooks=adapters.hooks).sum())
        for leaf in adapters.leaves:
            moment = adapters.optimizer.state[leaf]["exp_avg"]
            assert leaf.grad.stride() == leaf.stride() == moment.stride(), leaf.shape


# ----- compile warm-up


@pytest.mark.parametrize("mode", ["lora", "phased", "chunk"])
def test_warm_up_meets_every_shape_and_reads_no_validation_token(mode):
    """Shapes, and whether adapters, weights or nothing learns: what would make another graph."""
    cfg = config(ttt_eval_seq_len=12, ttt_chunk_size=3, ttt_batch_size=2, ttt_mode=mode, eval_budget_seconds=1e-9)
    model, seen, read = random_model(cfg), set(), []

    def forward(ids, targets, hooks=tg.NO_HOOKS, **options):
        read.append(ids)
        seen.add((tuple(ids.shape), hooks.adapters is not None, torch.is_grad_enabled(), model.tok_emb.requires_grad))
        return model(ids, targets, hooks=hooks, **options)

    val, before = validation(torch.full((60,), 22, dtype=torch.int32)), copy.deepcopy(model)
    tg.Evaluator(cfg, FakeRuntime(), model, forward, tg.random_text(cfg, val)).warm_ttt()
    assert read and all(int((ids == 22).sum()) < ids.numel() for ids in read)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    warm = seen.copy()
    seen.clear()
    for budget in (0.0, 1e-9):
        adapt_to(dataclasses.replace(cfg, eval_budget_seconds=budget), model, stream([2, 5, 9, 30, 14, 7, 1]),
                 forward=forward)
    assert seen and seen <= warm, seen - warm
    assert any(adapted for _, adapted, _, _ in seen) == (mode != "chunk")
    assert any(learning for *_, learning in seen) == (mode != "lora")


def test_no_graph_is_made_for_documents_after_the_warm_up():
    """Whatever the widths and the numbers of rows, with adapters and without, with hints of the n-gram tilt."""
    graphs, shapes = [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def forward(ids, *rest, **options):
        shapes.add(tuple(ids.shape))
        return parts(ids, *rest, **options)

    logging.disable(logging.DEBUG)  # or pytest's log handler has every graph printed
    torch._dynamo.reset()
    cfg = config(num_layers=2, loop_start=0, loop_end=0, ttt_batch_size=16, ttt_eval_seq_len=24, ttt_chunk_size=3,
                 ngram_tilt_enabled=True)
    model, chance = random_model(cfg), random.Random(shifted(1))
    parts = tg.compile_model(model, backend)[1]
    val = dataclasses.replace(validation(torch.full((60,), 22, dtype=torch.int32)), ngram=([2], 0.2))
    tg.Evaluator(cfg, FakeRuntime(), model, forward, tg.random_text(cfg, val)).warm_ttt()
    warm, before = shapes.copy(), len(graphs)
    shapes.clear()
    for budget in (0.0, 1e-9):
        text = val.over(stream([chance.choice([1, 2, 3, 5, 8, 13, 21, 34, 60]) for _ in range(90)]))
        tg.Evaluator(dataclasses.replace(cfg, eval_budget_seconds=budget), FakeRuntime(), model, forward, text).final()
    torch._dynamo.reset()
    logging.disable(logging.NOTSET)
    assert before > 5 and len(graphs) == before
    assert len(shapes - warm) > 2 and len({rows for rows, _ in shapes}) == 4  # it has seen others since


@pytest.mark.parametrize("mode", ["phased", "chunk"])
def test_every_rank_warms_up(mode):
    """With something to do in each kind of pass."""
    def work(rank: FakeRuntime) -> set:
        cfg = config(ttt_mode=mode, ttt_batch_size=2)
        model, seen = random_model(cfg), set()

        def forward(ids, targets, hooks=tg.NO_HOOKS, **options):
            seen.add((hooks.adapters is not None, torch.is_grad_enabled()))
            return model(ids, targets, hooks=hooks, **options)

        val = validation(torch.full((60,), 22, dtype=torch.int32))
        tg.Evaluator(cfg, rank, model, forward, tg.random_text(cfg, val)).warm_ttt()
        assert all(p.requires_grad for p in model.parameters())  # or other stages' graphs were made anew
        return seen

    expected = {"chunk": {(False, False), (False, True)}, "phased": {(False, False), (False, True), (True, True)}}
    assert on_ranks(3, work) == [expected[mode]] * 3


# ----- the whole script


DRIVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import train_gpt as tg
environ, runs = dict(os.environ), json.loads(os.environ["RUNS"])
environ.pop("RUNS")
tg.pack_code = lambda source: b"code"  # not what is looked at here
begin, end = dist.init_process_group, dist.destroy_process_group  # once for all runs
dist.init_process_group = lambda *a, **o: None if dist.is_initialized() else begin(*a, **o)
dist.destroy_process_group = lambda: None
for run in runs:
    tg.start([], tg.Launch.read(environ), environ | run)
if dist.is_initialized():
    dist.barrier()
    end()
    os._exit(0)  # as train_gpt.main does: Gloo's threads can abort an orderly exit
"""
FAST = {"TTT_EVAL_SEQ_LEN": "64", "TTT_CHUNK_SIZE": "32", "TTT_BATCH_SIZE": "2", "TTT_LORA_RANK": "4",
        "TTT_LORA_ALPHA": "8", "TTT_LORA_LR": "0.003", "TTT_CHUNK_TOKENS": "512", "TTT_EPOCHS": "1", "TTT_LR": "0.02",
        "PHASED_TTT_PREFIX_DOCS": "3", "GLOBAL_TTT_CHUNK_TOKENS": "512", "GLOBAL_TTT_LR": "0.02",
        "EVAL_BUDGET_SECONDS": "0"}
KINDS = {"lora": {"TTT_MODE": "lora"}, "phased": {"TTT_MODE": "phased"}, "chunk": {"TTT_MODE": "chunk"},
         "still": {"TTT_MODE": "lora", "TTT_LORA_LR": "0"}}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory) -> dict:
    """{(processes, kind): result.json} of one artifact, trained by the first run."""
    folder = tmp_path_factory.mktemp("ttt")
    script, artifact, found = folder / "driver.py", folder / "train/final_model.int6.ptz", {}
    script.write_text(DRIVER.format(root=str(ROOT)))
    data = folder / "data"
    data.mkdir()
    for path in Path(tiny["DATA_PATH"]).glob("fineweb_train_*.bin"):
        (data / path.name).symlink_to(path)
    whole = tg.read_shard(f"{tiny['DATA_PATH']}/fineweb_val_000000.bin").tolist()
    starts = [i for i, token in enumerate(whole) if token == whole[0]]
    tokens = [t for i, a in enumerate(starts) for t in whole[a : min(a + 200 + 75 * i, *starts[i + 1 :], len(whole))]]
    write_shard(data / "fineweb_val_000000.bin", np.array(tokens, np.uint16))
    for n in (1, 2, 3):
        runs = [{"ARTIFACT_DIR": str(folder / f"{n}-{kind}"), "EVAL_ONLY": str(artifact)} | FAST | changes
                for kind, changes in KINDS.items() if n == 1 or kind != "still"]
        train = [{"ARTIFACT_DIR": str(folder / "train"), "EVAL_STRIDE": "0"}] if n == 1 else []
        settings = tiny | {"DATA_PATH": str(data)}
        if n == 1:
            for run in train + runs:
                run_here(settings | run)
        else:
            done = run_script(settings | {"RUNS": json.dumps(runs)}, processes=n, script=script)
            assert done.returncode == 0, done.stderr[-3000:]
        for run, kind in zip(runs, KINDS):
            with open(f"{run['ARTIFACT_DIR']}/result.json") as file:
                found[n, kind] = json.load(file)
    return found


@pytest.mark.parametrize("kind", ["sliding", "chunk", "lora", "phased"])
def test_the_score_is_the_same_for_any_number_of_processes(results, kind):
    scores = []
    for n in (1, 2, 3):
        result = results[n, "lora" if kind == "sliding" else kind]
        assert result["world_size"] == n and result["stages"]["ttt"]["val_bpb"] == result["val_bpb"]
        scores.append(result["stages"]["sliding" if kind == "sliding" else "ttt"]["val_bpb"])
    assert scores[1:] == pytest.approx([scores[0]] * 2, abs=1e-6)
    assert scores[0] != results[1, "still"]["val_bpb"]


def test_adapters_lower_the_score_of_a_trained_model(results):
    gain = results[1, "still"]["val_bpb"] - results[1, "lora"]["val_bpb"]
    assert gain > 0.005
