"""The scorer and the windows: every target once, with the context it is due, at any number of ranks."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import shifted
from helpers import FakeRuntime, a_byte_each, bare, on_ranks, redrawn

import train_gpt as tg


def config(length: int, stride: int, rows: int, spare: int = 0) -> tg.Settings:
    """Evaluation of `rows` windows a pass; `spare` tokens of the limit fill no window."""
    return bare(eval_seq_len=length, eval_stride=stride, eval_batch_tokens=rows * length + spare)


def validation(n: int) -> tg.Validation:
    """A stream whose tokens are their own positions; token i is worth i % 7 bytes."""
    return tg.Validation(torch.arange(n, dtype=torch.int32), torch.arange(n, dtype=torch.int32) % 7, 1, None)


def windows_score(cfg: tg.Settings, rt, forward, val: tg.Validation, stride: int) -> tg.Score:
    return tg.Evaluator(cfg, rt, None, forward, val).by_windows(stride, "test")


def known_loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss of token and target alone, in eighths, so that sums are exact; 0 where nothing is scored."""
    return torch.where(targets == tg.IGNORE, 0.0, (ids * 31 + targets * 17) % 101 / 8)


class Recorder:
    """A forward pass that keeps, for each scored target, the tokens its window shows before it."""

    def __init__(self, length: int, rows: int):
        self.shape, self.context = (rows, length), {}

    def __call__(self, ids: torch.Tensor, targets: torch.Tensor, **_) -> torch.Tensor:
        assert ids.shape == targets.shape == self.shape and ids.dtype == targets.dtype == torch.int64
        for row, column in (targets != tg.IGNORE).nonzero().tolist():
            target = int(targets[row, column])
            assert target not in self.context
            self.context[target] = ids[row, : column + 1].tolist()
        return known_loss(ids, targets)


def windows_by_hand(n: int, length: int, stride: int) -> dict[int, int]:
    """Where the context of each target begins, window after window as the contract words it."""
    begins, reached, start = {}, 0, 0
    while reached < n - 1:
        stop = min(start + length, n - 1)
        for target in range(reached + 1, stop + 1):
            begins[target] = start
        reached, start = stop, start + stride
    return begins


CASES = [(50, 8, 3, 2), (50, 8, 8, 4), (50, 8, 1, 3), (5, 8, 3, 2), (2, 8, 8, 1), (9, 8, 4, 3), (10, 8, 4, 3),
         (8, 8, 2, 1), (49, 8, 4, 7), (17, 8, 8, 5), (18, 8, 8, 2), (33, 16, 5, 1), (40, 1, 1, 6),
         (64, 4, 3, 100), (3, 2, 1, 1)]


DOCUMENTS = [[20], [3, 1, 2, 9, 5, 30, 1], [1] * 12, [40, 2, 40], [7, 8, 8, 7, 16, 17], [64, 1]]


@pytest.mark.parametrize("sizes", DOCUMENTS)
@pytest.mark.parametrize("length, stride, rows", [(8, 3, 2), (8, 8, 4), (8, 1, 3), (16, 5, 1), (4, 2, 7), (1, 1, 2)])
@pytest.mark.parametrize("bos_first", [True, False])
def test_windows_of_documents_show_each_token_all_it_is_due(sizes, length, stride, rows, bos_first):
    """Attention sees no further back than the document's start and the window's: every target has its whole document
    before it, or at least length - stride + 1 tokens of it; and a window is run only for targets that need it.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))][0 if bos_first else 1 :]
    n, bos = sum(sizes) + 1, 10**6
    tokens = torch.arange(n, dtype=torch.int32)
    tokens[starts] = bos
    val = a_byte_each(tokens, len(starts), bos)
    cfg = bare(eval_seq_len=length, eval_stride=stride, eval_batch_tokens=rows * length, varlen_enabled=True)
    seen, windows = {}, 0

    def forward(ids, targets, bounds, **_):
        nonlocal windows
        segment = bounds.segment.view_as(ids).tolist()
        windows += int((targets != tg.IGNORE).any(1).sum())
        for row, column in (targets != tg.IGNORE).nonzero().tolist():
            visible = [c for c in range(column + 1) if segment[row][c] == segment[row][column]]
            first = ids[row, column].item()
            seen.setdefault(first, []).append(len(visible))
        return known_loss(ids, targets)

    windows_score(cfg, FakeRuntime(), forward, val, stride)
    found = {token: counts for token, counts in seen.items() if token != bos}
    for place in range(n - 1):
        if place in starts:
            continue
        start = max([0, *(s for s in starts if s <= place)])
        whole = place - start + 1
        counts = found.pop(place)
        assert len(counts) == 1 and counts[0] <= min(whole, length)
        assert counts[0] >= min(whole, length - stride + 1)
    assert not found and seen.get(bos, []) == [1] * len([s for s in starts if s < n - 1])
    most = sum(max(1, 1 + math.ceil((size - length) / stride)) for size in sizes)  # each document by itself
    assert windows <= most
    if max(sizes) <= length - stride + 1:  # documents that fit are never run again from the middle
        assert windows <= math.ceil((n - 1) / max(1, length - max(sizes) + 1))


def test_windows_of_documents_score_as_documents_do_alone():
    """The real model: sliding over packed documents costs what the beginning of each document by itself costs."""
    cfg = bare(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, vocab_size=40,
                      train_seq_len=8, train_batch_tokens=8, eval_seq_len=8, eval_stride=3, eval_batch_tokens=24,
                      varlen_enabled=True, smear_gate_enabled=True, gate_window=4)
    torch.manual_seed(shifted(0))
    model, sizes, bos = tg.GPT(cfg, bos=1), [5, 1, 19, 8, 2, 30, 7], 1
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    tokens = torch.randint(2, 40, (sum(sizes) + 1,), dtype=torch.int32)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    tokens[starts] = bos
    val = a_byte_each(tokens, len(sizes), bos)
    evaluator = tg.Evaluator(cfg, FakeRuntime(), model, model, val)
    evaluator.by_windows(3, "test")
    for start, size in zip(starts, sizes):
        whole = min(size, 8 - 3 + 1)  # further on windows may begin at another token
        part = tokens[start : start + whole + 1].long()[None]
        got = evaluator.scorer.losses[start + 1 : start + whole + 1]
        assert (got - model(part[:, :-1], part[:, 1:])[0]).abs().max() < 1e-5


# ----- the scorer alone


def test_score_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    scorer = tg.Scorer(FakeRuntime(), torch.tensor([9, 2, 0, 3], dtype=torch.int32))
    scorer.add(torch.tensor([[3, 1]]), torch.tensor([[0.5, 2.0]]))
    scorer.add(torch.tensor([2, 0, 0]), torch.tensor([1.0, 0.0, 0.0]))
    now[0] += 7.5
    score = scorer.finish()
    assert (score.tokens, score.bytes) == (3, 5)
    assert score.val_loss == pytest.approx(3.5 / 3, rel=1e-12)
    assert score.val_bpb == pytest.approx(3.5 / math.log(2) / 5, rel=1e-12)
    assert score.seconds == 7.5


def test_losses_are_added_in_float64():
    count = 200_001
    scorer = tg.Scorer(FakeRuntime(), torch.ones(count, dtype=torch.int32))
    losses = torch.full((count - 1,), 0.1)
    losses[0] = 1e6
    scorer.add(torch.arange(1, count), losses)
    exact = (1e6 + (count - 2) * float(torch.tensor(0.1))) / (count - 1)
    assert scorer.finish().val_loss == pytest.approx(exact, rel=1e-12)


def test_bytes_are_added_without_overflow():
    scorer = tg.Scorer(FakeRuntime(), torch.full((4,), 2**30, dtype=torch.int32))
    scorer.add(torch.tensor([1, 2, 3]), torch.ones(3))
    assert scorer.finish().bytes == 3 * 2**30


@pytest.mark.parametrize("positions, told", [
    ([1, 2, 3, 3, 4], "token 3"), ([1, 2, 3, 4, 4], "token 4"), ([1, 1, 2, 3, 4], "token 1"),
    ([2, 3, 4], "token 1"), ([1, 2, 4], "token 3"), ([1, 2, 3], "token 4"), ([], "token 1"), ([1, 3, 3, 4], "token 2"),
    ([0, 1, 2, 3], "token 4"),
])
def test_a_target_scored_twice_or_never_is_refused(positions, told):
    scorer = tg.Scorer(FakeRuntime(), torch.ones(5, dtype=torch.int32))
    scorer.add(torch.tensor(positions, dtype=torch.int64), torch.zeros(len(positions)))
    with pytest.raises(tg.RunError, match=f"refused.*{told}"):
        scorer.finish()


def test_a_target_scored_twice_in_two_calls_is_refused():
    scorer = tg.Scorer(FakeRuntime(), torch.ones(3, dtype=torch.int32))
    for positions in ([1, 2], [2]):
        scorer.add(torch.tensor(positions), torch.zeros(len(positions)))
    with pytest.raises(tg.RunError, match="refused"):
        scorer.finish()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(bad):
    scorer = tg.Scorer(FakeRuntime(), torch.ones(3, dtype=torch.int32))
    scorer.add(torch.tensor([1, 2]), torch.tensor([bad, 1.0]))
    with pytest.raises(tg.RunError, match="finite"):
        scorer.finish()


def test_text_without_bytes_has_no_bits_per_byte():
    scorer = tg.Scorer(FakeRuntime(), torch.zeros(2, dtype=torch.int32))
    scorer.add(torch.tensor([1]), torch.tensor([2.0]))
    with pytest.raises(tg.RunError, match="refused.*no text"):
        scorer.finish()


# ----- windows


@pytest.mark.parametrize("n, length, stride, rows", CASES)
def test_every_target_is_scored_once(n, length, stride, rows):
    recorder, val = Recorder(length, rows), validation(n)
    score = windows_score(config(length, stride, rows, spare=length - 1), FakeRuntime(), recorder, val, stride)
    assert sorted(recorder.context) == list(range(1, n))
    tokens = torch.arange(n)
    nats = float(known_loss(tokens[:-1], tokens[1:]).double().sum())
    n_bytes = sum(i % 7 for i in range(1, n))
    assert (score.tokens, score.bytes) == (n - 1, n_bytes)
    assert score.val_loss == pytest.approx(nats / (n - 1), rel=1e-12)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)


@pytest.mark.parametrize("n, length, stride, rows", CASES)
def test_every_target_has_the_context_it_is_due(n, length, stride, rows):
    recorder = Recorder(length, rows)
    windows_score(config(length, stride, rows), FakeRuntime(), recorder, validation(n), stride)
    for target, context in recorder.context.items():
        assert context == list(range(target - len(context), target))  # its own past, whole and in order
        assert min(target, length - stride + 1) <= len(context) <= length
        if target <= length:
            assert context[0] == 0


@pytest.mark.parametrize("n, length, stride, rows", CASES)
def test_windows_are_those_of_the_contract(n, length, stride, rows):
    recorder = Recorder(length, rows)
    windows_score(config(length, stride, rows), FakeRuntime(), recorder, validation(n), stride)
    assert {target: context[0] for target, context in recorder.context.items()} == windows_by_hand(n, length, stride)


def test_many_streams_and_windows():
    for n in range(2, 30):
        for length in (1, 2, 5, 7):
            for stride in range(1, length + 1):
                recorder = Recorder(length, 2)
                windows_score(config(length, stride, 2), FakeRuntime(), recorder, validation(n), stride)
                begins = {target: context[0] for target, context in recorder.context.items()}
                assert begins == windows_by_hand(n, length, stride), (n, length, stride)


@pytest.mark.parametrize("n, length, stride, rows", [(50, 8, 3, 2), (5, 8, 3, 2), (9, 8, 4, 3), (64, 4, 3, 1)])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_score_does_not_depend_on_the_ranks(n, length, stride, rows, world):
    cfg, val = config(length, stride, rows), validation(n)

    def forward(ids, targets, **_):
        return known_loss(ids, targets) / 3  # not exact: the order of adding shows

    alone = windows_score(cfg, FakeRuntime(), forward, val, stride)
    scores = on_ranks(world, lambda rt: windows_score(cfg, rt, forward, val, stride))
    for score in scores:
        assert score[:4] == alone[:4]


def test_a_rank_that_leaves_out_its_share_is_noticed():
    cfg, val = config(8, 3, 2), validation(50)

    def work(rt):
        scorer = tg.Scorer(rt, val.bytes)
        if rt.rank == 0:
            scorer.add(torch.arange(1, 25), torch.zeros(24))
        try:
            scorer.finish()
        except tg.RunError as e:
            return str(e)
        return "accepted"

    assert cfg.eval_stride == 3
    assert all("25 targets never scored" in said for said in on_ranks(2, work))


# ----- with a model


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_equals_the_model_on_each_context(stride):
    length, rows, n = 8, 3, 30
    cfg = bare(num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=4,
                      vocab_size=40, eval_seq_len=length, eval_stride=stride, eval_batch_tokens=rows * length)
    generator = torch.Generator().manual_seed(shifted(0))
    model = redrawn(tg.GPT(cfg), generator, lambda name, p, noise: 0.3 + 0.5 * noise)
    tokens = torch.randint(0, 40, (n,), generator=generator, dtype=torch.int32)
    val = a_byte_each(tokens, bos=-1)
    evaluator = tg.Evaluator(cfg, FakeRuntime(), model, model, val)
    score = evaluator.by_windows(stride, "test")
    expected = []
    for target, begin in sorted(windows_by_hand(n, length, stride).items()):
        logits = model(tokens[None, begin:target].long())[0, -1].detach().double()
        expected.append(float(logits.logsumexp(0) - logits[int(tokens[target])]))
    assert evaluator.scorer.losses[1:].tolist() == pytest.approx(expected, abs=1e-5)
    assert score.val_loss == pytest.approx(sum(expected) / (n - 1), abs=1e-6)
    assert max(expected) - min(expected) > 0.1


def test_evaluation_keeps_no_gradients():
    cfg = bare(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, vocab_size=40,
                      eval_seq_len=8, eval_stride=8, eval_batch_tokens=16)
    model, modes = tg.GPT(cfg), []

    def forward(ids, targets, **_):
        modes.append(torch.is_grad_enabled())
        return model(ids, targets)

    windows_score(cfg, FakeRuntime(), forward, validation(40), 8)
    assert modes and not any(modes)
