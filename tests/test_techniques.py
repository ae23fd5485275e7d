"""Every model technique against a short float64 reference written from its formula, and its absence when it is off.

The reference works on one span of attention at a time: a packed document alone, or a row of documents without VARLEN.
All weights are random, none at its initial value, unless a test is about initial values.
"""

import itertools
import math

import pytest
import torch
from conftest import shifted
from helpers import flat
from test_scorer import FakeRuntime

import train_gpt as tg

BOS = 1
ALL = {"num_loops": 2, "recur_blend": "ab", "parallel_mode": "crossed", "parallel_start_layer": 4,
       "bigram_vocab_size": 13, "bigram_dim": 6, "smear_gate_enabled": True, "ve_enabled": True, "ve_dim": 5,
       "ve_layers": "1,3,5", "sparse_attn_gate_enabled": True, "sparse_attn_gate_scale": 1.7, "rope_yarn": True}


def tiny(**changes) -> tg.Settings:
    """Six layers, of which 2 and 3 may loop; 4 query heads on 2 key/value heads; XSA on the last 3 layers."""
    values = {"num_layers": 6, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 1.5, "rope_dims": 6,
              "rope_base": 50.0, "xsa_last_n": 3, "logit_softcap": 8.0, "vocab_size": 23, "loop_start": 2,
              "loop_end": 3, "train_seq_len": 10, "gate_window": 7, "device": "cpu", "dtype": "fp32",
              "quant_min_weights": 0, "eval_stride": 0, "train_batch_tokens": 460, "micro_batch_tokens": 46}
    return tg.Settings(**values | changes)


def random_model(cfg: tg.Settings, seed: int = 0) -> tg.GPT:
    """A model none of whose parameters is 0, 1 or constant; a parameter's values depend on its name alone."""
    model = tg.GPT(cfg, bos=BOS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(shifted(seed + sum(name.encode()))))
            if name.endswith("_bank"):
                p.copy_(noise * 1.5 * p.size(-1) ** -0.5)
            elif name.endswith("_table") or name in ("tok_emb", "head", "skip_gate", "attn_gate", "smear_weight"):
                p.copy_(noise)
            else:
                p.copy_(0.8 + 0.4 * noise)
    return model


def packed_text(cfg: tg.Settings, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 23 tokens: documents of 1 to 14 tokens, the second row not starting with BOS."""
    generator = torch.Generator().manual_seed(shifted(1))
    ids = torch.randint(2, cfg.vocab_size, (rows, 23), generator=generator)
    targets = torch.randint(0, cfg.vocab_size, (rows, 23), generator=generator)
    ids[0, [0, 3, 4, 18]] = BOS
    if rows > 1:
        ids[1, [5, 6, 15, 22]] = BOS
        targets[1, 0] = tg.IGNORE
    targets[0, 7] = tg.IGNORE
    return ids, targets


def spans(ids: torch.Tensor, max_len: int) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every piece of a document, token after token."""
    found = []
    for row, tokens in enumerate(ids.tolist()):
        start = 0
        for t in range(1, len(tokens) + 1):
            if t == len(tokens) or tokens[t] == BOS or t - start == max_len:
                found.append((row, start, t))
                start = t
    return found


def same_document(ids: torch.Tensor, row: int, start: int) -> list[int]:
    """The tokens before `start` in its document, as far as the row has them."""
    tokens = ids[row].tolist()
    first = next((t for t in range(start, -1, -1) if tokens[t] == BOS), 0)
    return tokens[first:start]


# ----- the reference


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


class Reference:
    """Logits of one span of attention in float64, from techniques.md."""

    def __init__(self, cfg: tg.Settings, model: tg.GPT, loops: int = 0, span: int = 1):
        """`span`: how far attention may reach, which is what YaRN looks at."""
        self.cfg, self.loops, self.span, self.context = cfg, loops, span, []
        self.p = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}

    def before(self, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Vector of the token before, 0 where a document starts."""
        return torch.stack([x[t - 1] if t and ids[t] != BOS else 0 * x[t] for t in range(len(ids))])

    def inputs(self, ids: list[int]) -> torch.Tensor:
        cfg, p = self.cfg, self.p
        x = p["tok_emb"][ids]
        if cfg.embedding_dim:
            x = x @ p["embed_in_bank"][0].T
        if cfg.bigram_vocab_size:
            last, buckets = cfg.bigram_vocab_size - 1, []
            for t, token in enumerate(ids):
                pair = int32(int32(36313 * token) ^ int32(27191 * ids[t - 1]))
                buckets.append(pair % last if t and token != BOS else last)
            x = x + p["bigram_scale"] * p["bigram_table"][buckets] @ p["bigram_bank"][0].T
        if cfg.smear_gate_enabled and cfg.smear_gate_mode == "input":
            gate = sigmoid(x[:, : cfg.gate_window] @ p["smear_weight"][0])
            x = x + p["smear_scale"] * gate[:, None] * self.before(x, ids)
        x = rms(x)
        if cfg.smear_gate_enabled and cfg.smear_gate_mode == "vector":
            g = sigmoid(p["smear_theta"])
            x = (1 - g) * x + g * self.before(x, ids)
        return x

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """One head's vectors (T, dh), pair by pair."""
        cfg, r, out = self.cfg, self.cfg.rope_dims, list(x.unbind(-1))
        base = cfg.rope_base
        if cfg.rope_yarn and self.span > cfg.train_seq_len:
            base = base * (self.span / cfg.train_seq_len) ** (r / (r - 2))
        for i in range(r // 2):
            angle = torch.arange(len(x), dtype=torch.float64) * base ** (-2 * i / r)
            a, b = x[:, i], x[:, i + r // 2]
            out[i], out[i + r // 2] = a * angle.cos() + b * angle.sin(), -a * angle.sin() + b * angle.cos()
        return torch.stack(out, -1)

    def attention(self, u: torch.Tensor, layer: int, ids: list[int]) -> torch.Tensor:
        """a ⊙ Attn(rms(u) s)."""
        cfg, p, layers = self.cfg, self.p, self.cfg.num_layers
        dh, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
        n = rms(u) / math.sqrt(layer + 1 if cfg.ln_scale else 1)
        values = n @ p["kv_bank"][layers + layer].T
        with_ve = [int(i) for i in cfg.ve_layers.split(",")] if cfg.ve_enabled else []
        if layer in with_ve:
            t = p["ve_layer_scale"][with_ve.index(layer)]
            values = values + t * p["ve_scale"] * p["ve_table"][ids] @ p["ve_bank"][0].T
        future, heads = torch.ones(len(u), len(u)).triu(1).bool(), []
        for h in range(cfg.num_heads):
            mine, shared = slice(h * dh, (h + 1) * dh), slice(h // group * dh, (h // group + 1) * dh)
            q = p["q_gain"][layer, h] * self.rotated(rms(n @ p["qo_bank"][layer][mine].T))
            k, v = self.rotated(rms(n @ p["kv_bank"][layer][shared].T)), values[:, shared]
            y = (q @ k.T / math.sqrt(dh)).masked_fill(future, -math.inf).softmax(-1) @ v
            if layer >= layers - cfg.xsa_last_n:
                unit = v / v.norm(dim=-1, keepdim=True)
                y = y - (y * unit).sum(-1, keepdim=True) * unit
            if cfg.gated_attn_enabled:
                y = y * sigmoid(n @ p["attn_gate"][layer, h])[:, None]
            elif cfg.sparse_attn_gate_enabled:
                score = n[:, : cfg.gate_window] @ p["attn_gate"][layer, h]
                y = y * sigmoid(cfg.sparse_attn_gate_scale * score)[:, None]
            elif cfg.attn_out_gate_enabled:
                y = y * 2 * sigmoid(n[:, : cfg.gate_window] @ p["attn_gate"][layer, h])[:, None]
            heads.append(y)
        return p["attn_scale"][layer] * (torch.cat(heads, -1) @ p["qo_bank"][layers + layer].T)

    def mlp(self, u: torch.Tensor, layer: int) -> torch.Tensor:
        """b ⊙ MLP(rms(u) s)."""
        h = rms(u) / math.sqrt(layer + 1 if self.cfg.ln_scale else 1) @ self.p["mlp_up_bank"][layer].T
        hidden = torch.where(h > 0, h, 0.5 * h) ** 2
        return self.p["mlp_scale"][layer] * (hidden @ self.p["mlp_down_bank"][layer].T)

    def mixed(self, x: torch.Tensor, x0: torch.Tensor, layer: int) -> torch.Tensor:
        return self.p["resid_mix"][layer, 0] * x + self.p["resid_mix"][layer, 1] * x0

    def skipped(self, x: torch.Tensor, skip: torch.Tensor, i: int) -> torch.Tensor:
        skip = self.p["skip_weight"][i] * skip
        if not self.cfg.skip_gates_enabled:
            return x + skip
        gate = sigmoid(self.p["skip_gate"][i])
        return (1 - gate) * skip + gate * x

    def logits(self, ids: list[int]) -> torch.Tensor:
        cfg, p = self.cfg, self.p
        x = x0 = self.inputs(self.context + ids)[len(self.context) :]
        looped = list(range(cfg.loop_start, cfg.loop_end + 1)) if self.loops else []
        order = list(range(cfg.num_layers))
        if looped:
            order = [*range(looped[0]), *looped * (self.loops + 1), *range(looped[-1] + 1, cfg.num_layers)]
        half, pushed, last, visits, lanes = len(order) // 2, [], {}, {}, None
        parallel = cfg.num_layers if cfg.parallel_start_layer is None else cfg.parallel_start_layer
        for n, layer in enumerate(order):
            visit = visits[layer] = visits.get(layer, -1) + 1
            skip = pushed.pop() if n >= half and pushed else None
            if layer >= parallel and cfg.parallel_mode != "gptj":
                lanes = self.parallel(lanes, x, x0, layer, skip, n - half)
                continue
            x = x if skip is None else self.skipped(x, skip, n - half)
            u = self.mixed(x, x0, layer)
            y = u + self.attention(u, layer, ids)
            y = y + self.mlp(u if layer >= parallel else y, layer)
            if visit and cfg.recur_blend != "none":
                w = p["recur_blend"][visit - 1, layer - cfg.loop_start]
                if cfg.recur_blend == "ab":
                    y = w[0] * y + w[1] * last[layer]
                else:
                    y = x + (w[0] if cfg.recur_blend == "alpha" else sigmoid(w[0])) * (y - x)
            x = last[layer] = y
            if n < half:
                pushed.append(x)
        if lanes is not None and cfg.parallel_mode == "lanes":
            x = p["lane_mix"] * lanes[0] + (1 - p["lane_mix"]) * lanes[1]
        elif lanes is not None:
            x = {"mean": (lanes[0] + lanes[1]) / 2, "attn": lanes[0], "mlp": lanes[1]}[cfg.parallel_final_lane]
        x = rms(x)
        if cfg.embedding_dim:
            x = x @ p["embed_out_bank"][0].T
        z = x @ p["tok_emb" if cfg.tie_embeddings else "head"].T
        return cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)

    def parallel(self, lanes, x, x0, layer: int, skip, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer on two lanes; `lanes` are None at the first one."""
        cfg, p, ids = self.cfg, self.p, self.ids
        if lanes is None and cfg.parallel_mode == "lanes":  # the skip of that step is already in
            x = x if skip is None else self.skipped(x, skip, i)
            lanes = x, x
        else:
            lane0, lane1 = (x, x) if lanes is None else lanes
            lanes = lane0 if skip is None else self.skipped(lane0, skip, i), lane1
        lane0, lane1 = lanes
        u = self.mixed(lane0, x0, layer)
        a, m = self.attention(u, layer, ids), self.mlp(lane1, layer)
        if cfg.parallel_mode == "lanes":
            return u + a, lane1 + m
        keep, write = (p[name][layer - cfg.parallel_start_layer] for name in ("lane_keep", "lane_write"))
        return (keep[0] * lane0 + write[0, 0] * a + write[1, 0] * m,
                keep[1] * lane1 + write[0, 1] * a + write[1, 1] * m)

    def losses(self, ids: list[int], targets: list[int], context: list[int] = ()) -> torch.Tensor:
        """(T,) nats; 0 where ignored. `context`: tokens before in the document, which attention does not reach."""
        self.ids, self.context = ids, [*context]
        logits = self.logits(ids)
        log_sum = logits.exp().sum(-1).log()
        return torch.stack([0 * log_sum[t] if w == tg.IGNORE else log_sum[t] - logits[t, w]
                            for t, w in enumerate(targets)])


def by_piece(pieces: list[tuple[int, int, int]], losses_of, share: torch.Tensor, leaves: dict) -> tuple:
    """Losses of pieces run one by one; by leaf the sum of the pieces' gradients, None without any, and their scale.

    The scale is that of what was summed: a sum may cancel out, and its rounding errors are then all that is left of it.
    """
    losses, sums = torch.zeros(share.shape, dtype=torch.float64), dict.fromkeys(leaves)
    sizes = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for row, a, b in pieces:
        found = losses_of(row, a, b)
        losses[row, a:b] = found.detach()
        grads = torch.autograd.grad((found * share[row, a:b]).sum(), list(leaves.values()), allow_unused=True)
        for name, g in zip(leaves, grads):
            if g is not None:
                sums[name] = g if sums[name] is None else sums[name] + g
                sizes[name] += g.abs()
    return losses, sums, {name: float(size.max()) for name, size in sizes.items()}


def sizes_of_gradients(model: tg.GPT, ids: torch.Tensor, targets: torch.Tensor, share: torch.Tensor) -> dict:
    """The scale of each parameter's gradient, with whole documents each by itself."""
    return by_piece(spans(ids, ids.size(1)), lambda row, a, b: model(
        ids[row : row + 1, a:b], targets[row : row + 1, a:b])[0], share, dict(model.named_parameters()))[2]


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "",
                 scale: float | None = None) -> None:
    """Within tolerance of `scale`, which is the largest value expected unless it is given."""
    scale = float(expected.abs().max()) if scale is None else scale
    assert got.shape == expected.shape and scale > 0, what
    difference = float((got.detach().double() - expected.double()).abs().max()) / scale
    assert difference <= tolerance, f"{what}: {difference}"


def assert_equals_reference(cfg: tg.Settings, max_len: int | None, loops: int) -> None:
    """Losses and all gradients, packed in pieces of max_len or (None) by rows."""
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    bounds = tg.Bounds.find(ids, BOS, max_len) if max_len else None
    share = 0.1 + torch.rand(targets.shape, generator=torch.Generator().manual_seed(shifted(5)))
    losses = model(ids, targets, bounds, loops=loops)
    (losses * share).sum().backward()
    reference = Reference(cfg, model, loops, max_len or ids.size(1))
    pieces = spans(ids, max_len) if max_len else [(row, 0, ids.size(1)) for row in range(len(ids))]
    expected, gradients, sizes = by_piece(pieces, lambda row, a, b: reference.losses(
        ids[row, a:b].tolist(), targets[row, a:b].tolist(), same_document(ids, row, a)), share, reference.p)
    assert_close(losses, expected, 2e-5)
    assert expected.std() > 0.3
    for name, parameter in model.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_close(parameter.grad, gradients[name], 5e-5, name, sizes[name])


LOOPS = {"num_loops": 2}
TECHNIQUES = {
    "plain": {},
    "recurrence": LOOPS,
    "recurrence-ungated-skips": LOOPS | {"skip_gates_enabled": False, "loop_start": 1},
    "recurrence-alpha": LOOPS | {"recur_blend": "alpha"},
    "recurrence-ab": LOOPS | {"recur_blend": "ab"},
    "recurrence-gate": LOOPS | {"recur_blend": "gate"},
    "recurrence-of-all-layers": {"num_loops": 1, "loop_start": 0, "loop_end": 5, "recur_blend": "ab"},
    "gptj": {"parallel_start_layer": 3},
    "gptj-in-the-loop": LOOPS | {"parallel_start_layer": 3, "recur_blend": "ab"},
    "lanes": {"parallel_mode": "lanes", "parallel_start_layer": 3},
    "lanes-after-loops": LOOPS | {"parallel_mode": "lanes", "parallel_start_layer": 4, "recur_blend": "alpha"},
    "crossed": {"parallel_mode": "crossed", "parallel_start_layer": 3},
    "crossed-attn-after-loops": LOOPS | {"parallel_mode": "crossed", "parallel_start_layer": 4, "recur_blend": "gate",
                                         "parallel_final_lane": "attn"},
    "crossed-mlp-after-loops": LOOPS | {"parallel_mode": "crossed", "parallel_start_layer": 4,
                                        "parallel_final_lane": "mlp", "skip_gates_enabled": False},
    "bigram": {"bigram_vocab_size": 13, "bigram_dim": 6},
    "bigram-of-two-buckets": {"bigram_vocab_size": 2, "bigram_dim": 40},
    "smear-input": {"smear_gate_enabled": True},
    "smear-vector": {"smear_gate_enabled": True, "smear_gate_mode": "vector"},
    "value-embedding": {"ve_enabled": True, "ve_dim": 5, "ve_layers": "1,5"},
    "value-embedding-in-the-loop": LOOPS | {"ve_enabled": True, "ve_dim": 40, "ve_layers": "4,3"},
    "sparse-gate": {"sparse_attn_gate_enabled": True, "sparse_attn_gate_scale": 0.6},
    "gated": {"gated_attn_enabled": True},
    "out-gate": {"attn_out_gate_enabled": True, "gate_window": 32},
    "yarn": {"rope_yarn": True},
    "untied": {"tie_embeddings": False},
    "factorised": {"embedding_dim": 9},
    "factorised-wide": {"embedding_dim": 41},
    "factorised-untied": {"embedding_dim": 9, "tie_embeddings": False},
    "no-xsa": {"xsa_last_n": 0, "num_kv_heads": 1},
    "all-with-crossed": ALL,
    "all-with-lanes": ALL | {"parallel_mode": "lanes", "recur_blend": "alpha", "smear_gate_mode": "vector",
                             "sparse_attn_gate_enabled": False, "gated_attn_enabled": True, "embedding_dim": 11},
    "all-with-gptj": ALL | {"parallel_mode": "gptj", "parallel_start_layer": 2, "recur_blend": "gate",
                            "sparse_attn_gate_enabled": False, "attn_out_gate_enabled": True,
                            "tie_embeddings": False, "skip_gates_enabled": False, "num_kv_heads": 1},
}


@pytest.mark.parametrize("max_len", [14, None], ids=["packed", "rows"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_losses_and_gradients_equal_the_reference(name, max_len):
    cfg = tiny(**TECHNIQUES[name])
    assert_equals_reference(cfg, max_len, cfg.num_loops)


@pytest.mark.parametrize("loops", [0, 1])
@pytest.mark.parametrize("blend", ["none", "alpha", "ab", "gate"])
def test_fewer_loops_than_the_model_has_equal_the_reference(blend, loops):
    assert_equals_reference(tiny(num_loops=2, recur_blend=blend), 14, loops)


@pytest.mark.parametrize("max_len", [3, 5, 10, 23])
def test_pieces_of_any_length_equal_the_reference(max_len):
    assert_equals_reference(tiny(**ALL), max_len, 2)


def test_evaluation_loops_as_often_as_the_model_has():
    cfg = tiny(num_loops=2)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    losses = [model(ids, targets, loops=loops) for loops in (None, 2, 1, 0)]
    assert torch.equal(losses[0], losses[1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(losses[1:], 2))


# ----- depth recurrence


@pytest.mark.parametrize("layers, start, end, loops, order, skips", [
    (11, 3, 5, 2, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10], 8),
    (11, 4, 5, 1, [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10], 6),
    (11, 3, 5, 0, list(range(11)), 5),
    (9, 4, 4, 3, [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8], 6),
    (3, 0, 2, 1, [0, 1, 2, 0, 1, 2], 3),
    (2, 1, 1, 1, [0, 1, 1], 1),
])
def test_virtual_order_by_hand(layers, start, end, loops, order, skips):
    cfg = tiny(num_layers=layers, loop_start=start, loop_end=end, num_loops=loops)
    virtual = tg.virtual_layers(cfg, loops)
    assert [layer for layer, _ in virtual] == order
    for n, (layer, visit) in enumerate(virtual):
        assert visit == order[:n].count(layer)
    assert tg.virtual_layers(cfg, 0) == [(layer, 0) for layer in range(layers)]
    assert tg.GPT(cfg, bos=BOS).skip_weight.shape == tg.GPT(cfg, bos=BOS).skip_gate.shape == (skips, 32)


def test_encoder_and_decoder_of_the_looped_order():
    """[0,1,2,3,4,5,3,4 | 5,3,4,5,6,7,8,9,10]: what is pushed when, and which skip weight joins it back in."""
    cfg = tiny(num_layers=11, loop_start=3, loop_end=5, num_loops=2)
    model, events = random_model(cfg), []
    run_layer = model.layer

    def spy(x, lane, skip, last, params, *rest):
        own = params.weights
        if skip is not None:
            joins = (i for i, w in enumerate(model.skip_weight) if torch.equal(w, own["skip_weight"]))
            events.append(("join", next(joins), skip))
        layer = next(i for i, q in enumerate(model.qo_bank) if torch.equal(q, own["q"]))
        events.append(("block", layer, run_layer(x, lane, skip, last, params, *rest)[0]))
        return events[-1][2], None

    model.layer = spy
    model(packed_text(cfg)[0])
    outputs = [y for kind, _, y in events if kind == "block"]
    joined = [(next(n for n, y in enumerate(outputs) if torch.equal(y, skip)), i) for kind, i, skip in events
              if kind == "join"]
    assert joined == [(7 - i, i) for i in range(8)]
    assert [(kind, which) for kind, which, _ in events] == [
        *(("block", layer) for layer in (0, 1, 2, 3, 4, 5, 3, 4)),
        *(event for i, layer in enumerate((5, 3, 4, 5, 6, 7, 8, 9)) for event in (("join", i), ("block", layer))),
        ("block", 10)]


def test_each_visit_has_its_own_site():
    """(physical layer, visit) is what adapters are keyed by."""
    cfg = tiny(num_loops=2)
    model, (ids, _), seen = random_model(cfg), packed_text(cfg), []
    model(ids, hooks=tg.Hooks(fake_quant=lambda w, site: seen.append(site) or w))
    for role in ("q", "k", "v", "o", "up", "down"):
        expected = [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2), (4, 0), (5, 0)]
        assert [(site.layer, site.visit) for site in seen if site.role == role] == expected


# ----- the hash


@pytest.mark.parametrize("buckets", [2, 13, 3072, 65535])
def test_bigram_buckets_by_hand(buckets):
    """Products of the larger ids leave int32."""
    tokens = [0, 65535, 65535, 1, 59141, 59140, 78976 % 65536, 40000, 3, 65535]
    starts = torch.tensor([[t in (0, 4) for t in range(10)]])
    got = tg.bigram_bucket(torch.tensor([tokens]), starts, buckets)[0].tolist()
    for t, bucket in enumerate(got):
        pair = int32(int32(36313 * tokens[t]) ^ int32(27191 * tokens[t - 1]))
        assert bucket == (buckets - 1 if t in (0, 4) else pair % (buckets - 1))
    assert buckets == 2 or len(set(got)) > 3


def test_document_starts():
    ids = torch.tensor([[1, 5, 6, 7, 1, 1, 8], [9, 9, 9, 9, 9, 1, 9]])
    assert tg.document_starts(ids, BOS).int().tolist() == [[1, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1, 0]]


# ----- off is absent


def everything(cfg: tg.Settings, model: tg.GPT, bounds: bool) -> dict[str, torch.Tensor]:
    """Losses and gradients on the packed text."""
    ids, targets = packed_text(cfg)
    losses = model(ids, targets, tg.Bounds.find(ids, BOS, 14) if bounds else None)
    losses.mean().backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result | {"losses": losses.detach()}


def stored_bytes(cfg: tg.Settings, model: tg.GPT) -> dict[str, int]:
    """Name and size of all that the artifact would hold."""
    hessians = {role: h + torch.eye(h.size(1)) for role, h in tg.empty_hessians(cfg, torch.device("cpu")).items()}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    stored = tg.quantize(cfg, FakeRuntime(), weights, tg.factorize_all(hessians))
    return {name: t.numel() * t.element_size() for name, t in flat(stored).items()}


GATE = {"attn_gate.levels", "attn_gate.scales"}  # as stored
TECHNIQUES_OFF = {  # what may be set while it is off; what turns it on; parameters that adds; how they are stored
    "recurrence": ({"num_loops": 0, "loop_start": 0, "loop_end": 4, "recur_blend": "ab", "recur_alpha_init": 0.3,
                    "recur_a_init": 0.4, "recur_b_init": 0.5}, LOOPS | {"recur_blend": "ab"}, {"recur_blend"},
                   {"recur_blend"}),
    "recurrence-alpha": ({"num_loops": 0, "recur_blend": "alpha", "recur_alpha_init": 0.3, "loop_end": 99},
                         LOOPS | {"recur_blend": "alpha"}, {"recur_blend"}, {"recur_blend"}),
    "recurrence-gate": ({"num_loops": 0, "recur_blend": "gate", "loop_start": 5, "loop_end": 2},
                        LOOPS | {"recur_blend": "gate"}, {"recur_blend"}, {"recur_blend"}),
    "gptj": ({"parallel_final_lane": "attn"}, {"parallel_start_layer": 3}, set(), set()),
    "lanes": ({"parallel_mode": "lanes"}, {"parallel_mode": "lanes", "parallel_start_layer": 3}, {"lane_mix"},
              {"lane_mix"}),
    "crossed": ({"parallel_mode": "crossed", "parallel_final_lane": "mlp", "parallel_start_layer": 6},
                {"parallel_mode": "crossed", "parallel_start_layer": 3}, {"lane_keep", "lane_write"},
                {"lane_keep", "lane_write"}),
    "bigram": ({"bigram_dim": 9}, {"bigram_vocab_size": 13}, {"bigram_table", "bigram_bank", "bigram_scale"},
               {"bigram_table.codes", "bigram_table.scales", "bigram.codes", "bigram.scales", "bigram_scale"}),
    "smear-input": ({"gate_window": 3}, {"smear_gate_enabled": True}, {"smear_weight", "smear_scale"},
                    {"smear_weight", "smear_scale"}),
    "smear-vector": ({"smear_gate_mode": "vector"}, {"smear_gate_enabled": True, "smear_gate_mode": "vector"},
                     {"smear_theta"}, {"smear_theta"}),
    "value-embedding": ({"ve_dim": 7, "ve_layers": "0,3"}, {"ve_enabled": True, "ve_layers": "0,3"},
                        {"ve_table", "ve_bank", "ve_scale", "ve_layer_scale"},
                        {"ve_table.codes", "ve_table.scales", "ve.codes", "ve.scales", "ve_scale", "ve_layer_scale"}),
    "sparse-gate": ({"sparse_attn_gate_scale": 3.0, "gate_window": 2}, {"sparse_attn_gate_enabled": True},
                    {"attn_gate"}, GATE),
    "gated": ({"gate_window": 2}, {"gated_attn_enabled": True}, {"attn_gate"}, GATE),
    "out-gate": ({"gate_window": 2}, {"attn_out_gate_enabled": True}, {"attn_gate"}, GATE),
    "yarn": ({"train_seq_len": 20}, {"rope_yarn": True, "train_seq_len": 10}, set(), set()),
    "untied": ({"head_lr": 0.5}, {"tie_embeddings": False}, {"head"}, {"head.codes", "head.scales"}),
    "factorised": ({"embedding_dim": 0}, {"embedding_dim": 9}, {"embed_in_bank", "embed_out_bank"},
                   {"embed_in.codes", "embed_in.scales", "embed_out.codes", "embed_out.scales"}),
}


@pytest.mark.parametrize("name", TECHNIQUES_OFF)
def test_off_is_absent(name):
    off, on, added, stored = TECHNIQUES_OFF[name]
    plain_cfg, off_cfg, on_cfg = tiny(), tiny(**off), tiny(**on)
    plain, without, with_it = (random_model(cfg) for cfg in (plain_cfg, off_cfg, on_cfg))
    names = set(dict(plain.named_parameters()))
    assert set(dict(without.named_parameters())) == names
    assert set(dict(with_it.named_parameters())) == names | added
    assert stored_bytes(off_cfg, without) == stored_bytes(plain_cfg, plain)
    assert set(stored_bytes(on_cfg, with_it)) == set(stored_bytes(plain_cfg, plain)) | stored
    for bounds in (False, True):
        expected, got, changed = (everything(c, m, bounds) for c, m in (
            (plain_cfg, plain), (off_cfg, without), (on_cfg, with_it)))
        assert set(got) == set(expected) == names | {"losses"}
        for key in expected:
            assert torch.equal(got[key], expected[key]), key
        assert (changed["losses"] - expected["losses"]).abs().max() > 1e-3
        assert set(changed) == names | added | {"losses"}
        assert all(changed[key].any() for key in added)


def test_plain_model_has_only_the_plain_parameters():
    assert set(dict(tg.GPT(tiny(), bos=BOS).named_parameters())) == {
        "tok_emb", "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "resid_mix", "attn_scale", "mlp_scale",
        "q_gain", "skip_weight", "skip_gate"}


def test_plain_settings_have_every_technique_off():
    cfg = tg.Settings()
    assert not any((cfg.num_loops, cfg.varlen_enabled, cfg.bigram_vocab_size, cfg.smear_gate_enabled, cfg.ve_enabled,
                    cfg.sparse_attn_gate_enabled, cfg.gated_attn_enabled, cfg.attn_out_gate_enabled, cfg.rope_yarn,
                    cfg.embedding_dim, cfg.swa_enabled, cfg.qat_enabled, cfg.qat_lite_enabled, cfg.muon_row_normalize))
    assert cfg.tie_embeddings and cfg.muon_ns == "quintic" and cfg.parallel_start_layer == cfg.num_layers


def test_yarn_within_the_training_length_changes_nothing():
    cfg = tiny(rope_yarn=True, train_seq_len=23)
    model, plain = random_model(cfg), random_model(tiny())
    for bounds in (False, True):
        assert torch.equal(everything(cfg, model, bounds)["losses"], everything(cfg, plain, bounds)["losses"])


def test_factorised_embedding_of_the_model_width():
    """Whether it then has projections or not, the model must work and be stored whole."""
    cfg = tiny(embedding_dim=32)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    model(ids, targets).mean().backward()
    assert all(p.grad.any() for p in model.parameters())
    assert stored_bytes(cfg, model)


@pytest.mark.parametrize("changes", [
    {"ve_enabled": True, "ve_layers": "1,6"},
    {"qat_lite_enabled": True, "qat_lite_layer_start": 6},
    {"num_loops": 2, "loop_schedule": "0.2:3,0.5:2"},
    {"num_loops": 2, "loop_schedule": "0.1.5:2"},
    {"num_loops": 2, "loop_schedule": ".:2"},
])
def test_settings_that_could_not_train_are_refused(changes):
    with pytest.raises(tg.RunError):
        tiny(**changes)


# ----- neutral initial values


NEUTRAL = {  # what turns it on; what it is compared with; the parameters that must be able to move
    "alpha": (LOOPS | {"recur_blend": "alpha"}, LOOPS, {"recur_blend"}),
    "ab": (LOOPS | {"recur_blend": "ab"}, LOOPS, {"recur_blend"}),
    "out-gate": ({"attn_out_gate_enabled": True}, {}, {"attn_gate"}),
    "smear-input": ({"smear_gate_enabled": True}, {}, {"smear_scale"}),
    "bigram": ({"bigram_vocab_size": 13, "bigram_dim": 20}, {}, {"bigram_table"}),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_initial_values_change_nothing_and_can_move(name):
    on, off, movable = NEUTRAL[name]
    cfg = tiny(**on)
    model, plain = tg.GPT(cfg, bos=BOS), random_model(tiny(**off))
    base = dict(plain.named_parameters())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key in base:
                p.copy_(base[key])
    for bounds in (False, True):
        got, expected = everything(cfg, model, bounds), everything(cfg, plain, bounds)
        for key in expected:
            if key == "losses" or name != "bigram":
                assert torch.equal(got[key], expected[key]), key
        for key in movable:
            grad = got[key].flatten(0, -2) if got[key].ndim > 1 else got[key].view(1, -1)
            used = torch.ones(len(grad), dtype=torch.bool)
            if name == "bigram":  # each bucket that occurs
                ids, _ = packed_text(cfg)
                used[:] = False
                used[tg.bigram_bucket(ids, tg.document_starts(ids, BOS), 13).flatten().long()] = True
                assert used.sum() > 6
            assert (grad[used] != 0).all(), key
    for key in movable:  # and once it has moved it does something
        with torch.no_grad():
            dict(model.named_parameters())[key].add_(0.1)
    assert (everything(cfg, model, True)["losses"] - expected["losses"]).abs().max() > 1e-4


def test_initial_values():
    cfg = tiny(**ALL | {"recur_a_init": 0.9, "recur_b_init": 0.2, "vocab_size": 500})
    model = tg.GPT(cfg, bos=BOS)
    assert model.recur_blend.shape == (2, 2, 2)
    assert torch.equal(model.recur_blend, torch.tensor([0.9, 0.2]).expand(2, 2, 2))
    assert (model.lane_keep == torch.tensor(1.1)).all() and (model.lane_write == 1).all()
    assert model.lane_keep.shape == (2, 2) and model.lane_write.shape == (2, 2, 2)
    assert not model.bigram_table.any() and model.bigram_scale == torch.tensor(0.05)
    assert not model.smear_scale.any() and not model.smear_weight.any() and not model.attn_gate.any()
    assert abs(model.ve_table.std() / 0.01 - 1) < 0.1 and abs(model.ve_table.mean()) < 0.001
    assert model.ve_scale == torch.tensor(0.1) and (model.ve_layer_scale == 1).all()
    for bank in (model.bigram_bank[0], model.ve_bank[0]):
        assert bank.size(0) > bank.size(1) and (bank.T @ bank - torch.eye(bank.size(1))).abs().max() < 1e-5
    for blend, value in (("alpha", 0.7), ("gate", 4.0)):
        other = tg.GPT(tiny(num_loops=2, recur_blend=blend, recur_alpha_init=0.7), bos=BOS)
        assert other.recur_blend.shape == (2, 2, 1) and (other.recur_blend == torch.tensor(value)).all()
    assert tg.GPT(tiny(parallel_mode="lanes", parallel_start_layer=3), bos=BOS).lane_mix == 0.5
    assert not tg.GPT(tiny(smear_gate_enabled=True, smear_gate_mode="vector"), bos=BOS).smear_theta.any()
    gate = tg.GPT(tiny(gated_attn_enabled=True, num_layers=30), bos=BOS).attn_gate
    assert gate.shape == (30, 4, 32) and abs(gate.std() / 0.01 - 1) < 0.1


# ----- packed documents


PACKED = LOOPS | {"bigram_vocab_size": 13, "bigram_dim": 6, "smear_gate_enabled": True, "ve_enabled": True,
                  "ve_layers": "1,3", "recur_blend": "ab", "train_seq_len": 23}


@pytest.mark.parametrize("changes", [
    {"attn_out_gate_enabled": True},
    {"gated_attn_enabled": True, "smear_gate_mode": "vector", "parallel_mode": "lanes", "parallel_start_layer": 4},
    {"sparse_attn_gate_enabled": True, "parallel_mode": "crossed", "parallel_start_layer": 4, "rope_yarn": True},
], ids=["sequential", "lanes", "crossed"])
@pytest.mark.parametrize("max_len", [1, 4, 9, 14, 23])
def test_packed_documents_equal_documents_alone(changes, max_len):
    cfg = tiny(**PACKED | changes)
    packed, alone, (ids, targets) = random_model(cfg), random_model(cfg), packed_text(cfg)
    share = 0.1 + torch.rand(targets.shape, generator=torch.Generator().manual_seed(shifted(5)))
    losses = packed(ids, targets, tg.Bounds.find(ids, BOS, max_len))
    (losses * share).sum().backward()

    def by_itself(row: int, a: int, b: int) -> torch.Tensor:
        document = ids[row : row + 1, a:b]
        return alone(document, targets[row : row + 1, a:b], tg.Bounds.find(document, BOS, max_len))[0]

    expected, gradients, _ = by_piece(spans(ids, 23), by_itself, share, dict(alone.named_parameters()))
    assert_close(losses, expected, 2e-5)
    # where attention has no choice some gradients are 0 but for rounding, which whole documents give a scale
    sizes = sizes_of_gradients(alone, ids, targets, share)
    for name, p in packed.named_parameters():
        assert_close(p.grad, gradients[name], 5e-5, name, sizes[name])


def leaks(cfg: tg.Settings) -> list[int]:
    """Places whose loss changes though nothing of their own piece of a document does; checks that others change.

    The first document, the last token of a piece that is cut by length, and a whole other row are perturbed. What looks
    one token back reaches from a piece into the rest of its document, but no further.
    """
    looks_back = cfg.smear_gate_enabled or cfg.bigram_vocab_size
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    bounds = tg.Bounds.find(ids, BOS, 8)
    before, found = model(ids, targets, bounds), []
    pieces, documents = ([(row * 23 + a, row * 23 + b) for row, a, b in spans(ids, most)] for most in (8, 23))
    assert {b - a for a, b in pieces} >= {1, 3, 6, 8}
    for start, stop in pieces:
        other = ids.flatten().clone()
        inner = [t for t in range(start, stop) if other[t] != BOS]
        if not inner:
            continue
        other[inner] = (other[inner] - 2 + 9) % (cfg.vocab_size - 2) + 2
        changed = (model(other.view_as(ids), targets, bounds) != before).flatten()
        counted = targets.flatten() != tg.IGNORE
        assert changed[inner][counted[inner]].all()
        end = next(b for _, b in documents if b >= stop) if looks_back else stop
        found += [t for t in changed.nonzero().flatten().tolist() if not start <= t < end]
    return found


@pytest.mark.parametrize("loops", [0, 2])
@pytest.mark.parametrize("parallel", [None, "gptj", "lanes", "crossed"])
@pytest.mark.parametrize("smear", [None, "input", "vector"])
def test_no_document_reaches_another(smear, parallel, loops):
    for bigram in (0, 13):
        changes = {"num_loops": loops, "bigram_vocab_size": bigram, "bigram_dim": 6, "recur_blend": "ab"}
        if smear:
            changes |= {"smear_gate_enabled": True, "smear_gate_mode": smear}
        if parallel:
            changes |= {"parallel_mode": parallel, "parallel_start_layer": 4}
        assert leaks(tiny(**changes)) == []


@pytest.mark.parametrize("fault, changes", [
    ("smear", {"smear_gate_enabled": True}),
    ("smear", {"smear_gate_enabled": True, "smear_gate_mode": "vector"}),
    ("bigram", {"bigram_vocab_size": 13, "bigram_dim": 6}),
    ("attention", {}),
], ids=["smear-input", "smear-vector", "bigram", "attention"])
def test_the_check_for_leaks_notices_one(monkeypatch, fault, changes):
    cfg = tiny(**changes)
    assert leaks(cfg) == []
    if fault == "smear":
        monkeypatch.setattr(tg, "previous", lambda x, starts: x.flatten(0, 1).roll(1, 0).view_as(x))
    elif fault == "bigram":
        bucket = tg.bigram_bucket
        monkeypatch.setattr(tg, "bigram_bucket", lambda ids, starts, n: bucket(
            ids.view(1, -1), torch.zeros(1, ids.numel(), dtype=torch.bool), n).view_as(ids))
    else:
        find = tg.Bounds.find
        monkeypatch.setattr(tg.Bounds, "find", lambda ids, bos, max_len: find(ids, -1, 23))
    assert leaks(cfg)


def test_rows_without_varlen_mask_the_document_start_too():
    """Attention crosses documents there, SmearGate and BigramHash do not."""
    cfg = tiny(num_layers=1, loop_end=0, loop_start=0, smear_gate_enabled=True, bigram_vocab_size=13, bigram_dim=6)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    with torch.no_grad():
        model.qo_bank[1:] = 0  # no attention: what is left is the token itself and the one before it
    other = ids.clone()
    other[0, 17] = (ids[0, 17] + 3) % 20 + 2
    changed = (model(ids, targets) != model(other, targets)).nonzero().tolist()
    assert changed == [[0, 17]]
    assert ids[0, 18] == BOS
