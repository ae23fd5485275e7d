"""The float64 reference of the model, written from the formulas of techniques.md with a loop wherever one is plainer.

It works on one span of attention at a time: a packed document alone, or a row of documents without VARLEN.
"""

import math

import torch
from helpers import BOS

import train_gpt as tg


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def sign(pair: int, channel: int, dim: int) -> int:
    """1 or -1 by the top bit of a hash of 32 bits."""
    x = (pair % 8192 * dim + channel) * 0x9E3779B1 % 2**32
    x = (x ^ (x >> 15)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 15)) * 0xC2B2AE35 % 2**32
    return 1 if x < 2**31 else -1


class Reference:
    """Logits of one span of attention in float64, from techniques.md."""

    def __init__(self, cfg: tg.Settings, model: tg.GPT, loops: int = 0, span: int = 1):
        """`span`: how far attention may reach, which is what YaRN looks at."""
        self.cfg, self.loops, self.span, self.context = cfg, loops, span, []
        self.pairs = set() if model.is_pair is None else set(model.is_pair.nonzero().flatten().tolist())
        self.p = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}

    def before(self, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Vector of the token before, 0 where a document starts."""
        return torch.stack([x[t - 1] if t and ids[t] != BOS else 0 * x[t] for t in range(len(ids))])

    def smeared(self, ids: list[int]) -> torch.Tensor:
        """(T, 1) 0 for each token whose predecessor in the document stands for two tokens, 1 for the others."""
        return torch.tensor([[0.0 if t and ids[t] != BOS and ids[t - 1] in self.pairs else 1.0]
                             for t in range(len(ids))]).double()

    def bigrams(self, name: str, ids: list[int], signed: bool) -> torch.Tensor:
        table, rows = self.p[name], []
        for t, token in enumerate(ids):
            before = ids[t - 1] if t and token != BOS else None
            pair, last = int32(int32(36313 * token) ^ int32(27191 * (before or 0))), len(table) - 1
            row = table[last if before is None else pair % last]
            if signed:
                row = row * torch.tensor([sign(token ^ (before or 0), c, len(row)) for c in range(len(row))]).double()
            rows.append(row)
        return torch.stack(rows)

    def inputs(self, ids: list[int]) -> torch.Tensor:
        cfg, p = self.cfg, self.p
        x = p["tok_emb"][ids]
        if cfg.embedding_dim:
            x = x @ p["embed_in_bank"][0].T
        if cfg.bigram_vocab_size:
            rows = self.bigrams("bigram_table", ids, cfg.bigram_signs)
            x = x + p["bigram_scale"] * rows @ p["bigram_bank"][0].T
        if cfg.smear_gate_enabled and cfg.smear_gate_mode == "input":
            gate = sigmoid(x[:, : cfg.gate_window] @ p["smear_weight"][0])
            x = x + self.smeared(ids) * p["smear_scale"] * gate[:, None] * self.before(x, ids)
        x = rms(x)
        if cfg.smear_gate_enabled and cfg.smear_gate_mode == "vector":
            g = self.smeared(ids) * sigmoid(p["smear_theta"])
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
        n = rms(u) / math.sqrt(layer + 1 if self.cfg.ln_scale else 1)
        return self.p["attn_scale"][layer] * self.attend(n, layer, ids)

    def attend(self, n: torch.Tensor, layer: int, ids: list[int]) -> torch.Tensor:
        """Attn(n)."""
        cfg, p, layers = self.cfg, self.p, self.cfg.num_layers
        dh, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
        values = n @ p["kv_bank"][layers + layer].T
        with_ve = [int(i) for i in cfg.ve_layers.split(",")] if cfg.ve_enabled else []
        if layer in with_ve:
            i, kv = with_ve.index(layer), cfg.num_kv_heads * dh
            of_tokens = p["ve_table"][ids]
            if cfg.ve_bigram_rows:
                bigrams = self.bigrams("ve_bigram_table", self.context + ids, signed=True)
                of_tokens = of_tokens + bigrams[len(self.context) :]
            of_layer = of_tokens[:, i * kv : (i + 1) * kv]
            if cfg.ve_dim:  # one for all
                of_layer = p["ve_scale"] * of_tokens @ p["ve_bank"][0].T
            values = values + p["ve_layer_scale"][i] * of_layer
        future, heads = torch.ones(len(n), len(n)).triu(1).bool(), []
        for h in range(cfg.num_heads):
            mine, shared = slice(h * dh, (h + 1) * dh), slice(h // group * dh, (h // group + 1) * dh)
            q = p["q_gain"][layer, h] * self.rotated(rms(n @ p["qo_bank"][layer][mine].T))
            k, v = self.rotated(rms(n @ p["kv_bank"][layer][shared].T)), values[:, shared]
            if cfg.key_offset:
                k = torch.stack([torch.cat((k[t, : cfg.rope_dims], k[max(t - 1, 0), cfg.rope_dims :]))
                                 for t in range(len(k))])
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
        return torch.cat(heads, -1) @ p["qo_bank"][layers + layer].T

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


# ----- spans of attention


def document_spans(ids: torch.Tensor, max_len: int) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every piece of a document, token after token."""
    found = []
    for row, tokens in enumerate(ids.tolist()):
        start = 0
        for t in range(1, len(tokens) + 1):
            if t == len(tokens) or tokens[t] == BOS or t - start == max_len:
                found.append((row, start, t))
                start = t
    return found


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
    return by_piece(document_spans(ids, ids.size(1)), lambda row, a, b: model(
        ids[row : row + 1, a:b], targets[row : row + 1, a:b])[0], share, dict(model.named_parameters()))[2]
