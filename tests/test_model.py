"""The model against the float64 reference (reference.py), on random weights."""

import copy

import pytest
import torch
from conftest import shifted
from helpers import BOS, SIZES, Products, assert_close, bare, packed_text, random_share, random_text, redrawn
from reference import Reference, document_spans, rms
from torch._dynamo.testing import CompileCounter

import train_gpt as tg

ROLES = ("q", "k", "v", "o", "up", "down")


def tiny(**changes) -> tg.Settings:
    """Settings of a model of 5 layers, 4 query heads on 2 key/value heads, XSA on the last 3 layers."""
    return bare(**SIZES | {"num_layers": 5, "rope_dims": 4} | changes)


def random_model(cfg: tg.Settings, seed: int = 0, dtype: torch.dtype = torch.float32) -> tg.GPT:
    """A model none of whose parameters is 0, 1 or constant."""
    def value(name, p, noise):
        if name.endswith("_bank"):
            return noise * 1.5 * p.size(-1) ** -0.5
        return noise if name in ("tok_emb", "skip_gate") else 0.9 + 0.4 * noise

    return redrawn(tg.GPT(cfg, dtype=dtype), seed, value)


def reference_losses(reference: Reference, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B, T) float64 losses; rows are documents."""
    return torch.stack([reference.losses(*pair) for pair in zip(ids.tolist(), targets.tolist())])


# ----- forward and gradients against the reference


@pytest.mark.parametrize("changes", [
    {},
    {"num_layers": 4, "skip_gates_enabled": False, "ln_scale": False},
    {"num_layers": 4, "xsa_last_n": 0, "rope_dims": 8},
    {"num_layers": 3, "num_kv_heads": 4, "xsa_last_n": 9, "rope_dims": 0},
    {"num_layers": 7, "rope_dims": 6},
    {"num_layers": 6, "skip_gates_enabled": False},
    {"num_layers": 1, "num_kv_heads": 1, "rope_dims": 2},
])
def test_losses_equal_the_reference(changes):
    cfg = tiny(**changes)
    model = random_model(cfg)
    ids, targets = random_text(cfg, 2, 9)
    targets[0, 4] = targets[1, 8] = tg.IGNORE
    losses = model(ids, targets)
    expected = reference_losses(Reference(cfg, model), ids, targets)
    assert losses.dtype == torch.float32
    assert losses[0, 4] == 0 and losses[1, 8] == 0
    assert_close(losses, expected, 2e-5)
    assert expected.std() > 0.3
    others = targets.flip(0).masked_fill(targets == tg.IGNORE, tg.IGNORE)
    several = model(ids, torch.stack((targets, others)))  # tokens besides the targets, as hints are
    assert_close(several[1], reference_losses(Reference(cfg, model), ids, others), 3e-5)
    assert torch.equal(several[0], losses) and not several[1][targets == tg.IGNORE].any()


def test_logits_equal_the_reference():
    cfg = tiny()
    model = random_model(cfg)
    ids, _ = random_text(cfg, 1, 9)
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert_close(logits[0], Reference(cfg, model).logits(ids[0].tolist()), 2e-5)
    assert 4 < logits.abs().max() < cfg.logit_softcap


@pytest.mark.parametrize("layer", [0, 4])
def test_attention_alone_equals_the_reference(layer):
    cfg = tiny()
    model = random_model(cfg)
    n = torch.randn(1, 11, cfg.model_dim, generator=torch.Generator().manual_seed(shifted(3)))
    seen = []
    original = model.attention_half

    def spy(normed, params, *rest):
        if torch.equal(params.weights["resid_mix"], model.resid_mix[layer]):
            normed = n
            seen.append(original(normed, params, *rest))
            return seen[-1]
        return original(normed, params, *rest)

    model.attention_half = spy
    model(random_text(cfg, 1, 11)[0])
    assert_close(seen[0][0], Reference(cfg, model).attend(n[0].double(), layer, [2] * 11), 1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_layers": 4, "skip_gates_enabled": False}])
def test_gradients_equal_the_reference(changes):
    cfg = tiny(**changes)
    model, (ids, targets) = random_model(cfg), random_text(cfg, 2, 7)
    targets[1, 2] = tg.IGNORE
    share = torch.rand(targets.shape, generator=torch.Generator().manual_seed(shifted(5)), dtype=torch.float64)
    (model(ids, targets) * share).sum().backward()
    reference = Reference(cfg, model)
    (reference_losses(reference, ids, targets) * share).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, reference.p[name].grad, 1e-4)


def test_bf16_activations_give_nearly_the_fp32_losses():
    cfg = tiny()
    ids, targets = random_text(cfg, 2, 16)
    exact, low = random_model(cfg)(ids, targets), random_model(cfg, dtype=torch.bfloat16)(ids, targets)
    assert low.dtype == torch.float32
    assert (low - exact).abs().mean() < 0.1 * exact.mean()
    assert not torch.equal(low, exact)


# ----- causality


@pytest.mark.parametrize("changed", [1, 8, 15])
def test_later_tokens_do_not_touch_earlier_losses(changed):
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 2, 16)
    other = ids.clone()
    other[:, changed:] = (ids[:, changed:] + 5) % cfg.vocab_size
    before, after = model(ids, targets), model(other, targets)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).all()


def test_an_earlier_token_reaches_every_later_loss():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 1, 16)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % cfg.vocab_size
    assert (model(ids, targets) != model(other, targets)).all()


# ----- packed documents


@pytest.mark.parametrize("max_len", [1, 3, 6, 14, 23, 100])
def test_bounds_find_the_documents(max_len):
    for seed in range(20):
        generator = torch.Generator().manual_seed(shifted(seed))
        ids = torch.randint(0, 6, (3, 17), generator=generator)
        spans = document_spans(ids, max_len)
        bounds = tg.Bounds.find(ids, BOS, max_len)
        cuts = bounds.cu_seqlens.tolist()
        assert cuts[: len(spans)] == [row * 17 + start for row, start, _ in spans]
        assert len(cuts) > len(spans) and set(cuts[len(spans) :]) == {51}  # then documents of no tokens
        assert bounds.segment.tolist() == [i for i, (_, a, b) in enumerate(spans) for _ in range(b - a)]
        assert bounds.cu_seqlens.dtype == bounds.segment.dtype == torch.int32


@pytest.mark.parametrize("documents, room", [(100, 384), (383, 384), (384, 768), (1000, 1536)])
def test_bounds_have_room_for_web_text_and_not_for_ten_times_as_much(documents, room):
    """FlashAttention 3 makes room in backward for every document that might be; doubled where they do not fit."""
    ids = torch.full((1, 98304), 5)
    ids[0, torch.arange(documents) * (98304 // documents)] = BOS
    assert len(tg.Bounds.find(ids, BOS, 98304).cu_seqlens) == room + 1


def test_finding_bounds_leaves_the_tokens_alone():
    ids = torch.tensor([[5, 1, 7, 8]])
    tg.Bounds.find(ids, BOS, 2)
    assert ids.tolist() == [[5, 1, 7, 8]]


@pytest.mark.parametrize("max_len", [2, 5, 9, 14, 30])
def test_packed_documents_equal_documents_alone(max_len):
    cfg = tiny()
    packed, alone = random_model(cfg), random_model(cfg)
    ids, targets = packed_text(cfg)
    share = random_share(targets)
    losses = packed(ids, targets, tg.Bounds.find(ids, BOS, max_len))
    (losses * share).sum().backward()
    expected = torch.cat([alone(ids[row : row + 1, a:b], targets[row : row + 1, a:b])[0]
                          for row, a, b in document_spans(ids, max_len)]).view_as(losses)
    (expected * share).sum().backward()
    assert_close(losses, expected, 2e-5)
    for (name, p), q in zip(packed.named_parameters(), alone.parameters()):
        assert p.grad.abs().max() > 0, name
        assert_close(p.grad, q.grad, 5e-5)


def test_a_document_does_not_see_the_one_before():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 1, 20)
    ids[0, [0, 8]] = BOS
    other = ids.clone()
    other[0, 1:8] = (ids[0, 1:8] - 2 + 4) % (cfg.vocab_size - 2) + 2
    losses = [model(i, targets, tg.Bounds.find(i, BOS, 16)) for i in (ids, other)]
    assert torch.equal(losses[0][0, 8:], losses[1][0, 8:])
    assert (losses[0][0, 1:8] != losses[1][0, 1:8]).all()


def test_a_row_does_not_see_the_row_before():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 2, 12)
    other = ids.clone()
    other[0] = ids[0].flip(0)
    losses = [model(i, targets, tg.Bounds.find(i, BOS, 12)) for i in (ids, other)]
    assert torch.equal(losses[0][1], losses[1][1])


# ----- hooks


def test_empty_hooks_change_nothing():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 2, 8)
    plain = model(ids, targets)
    for hooks in (tg.Hooks(), tg.Hooks(adapters={}), tg.Hooks(hessians={}), tg.Hooks(fake_quant=lambda w, site: w)):
        assert torch.equal(model(ids, targets, hooks=hooks), plain)


def test_hessian_of_the_first_layer_by_hand():
    cfg = tiny(num_layers=2)
    model, (ids, _) = random_model(cfg), random_text(cfg, 3, 8)
    hessian = torch.zeros(2, cfg.model_dim, cfg.model_dim)
    model(ids, hooks=tg.Hooks(hessians={"q": hessian}))
    p, expected = Reference(cfg, model).p, torch.zeros(cfg.model_dim, cfg.model_dim, dtype=torch.float64)
    for token in ids.flatten().tolist():
        x = rms(p["tok_emb"][token])
        n = rms(p["resid_mix"][0, 0] * x + p["resid_mix"][0, 1] * x)
        expected += torch.outer(n, n).detach()
    assert_close(hessian[0], expected, 1e-5)


def test_hessians_sum_the_inputs_of_every_product():
    cfg = tiny()
    model, batches = random_model(cfg), [random_text(cfg, 2, 6, seed)[0] for seed in (1, 2)]
    hidden = int(cfg.mlp_mult * cfg.model_dim)
    hessians = {role: torch.zeros(5, width, width) for role, width in [*[(r, 32) for r in ROLES], ("down", hidden)]}
    hessians["head"] = torch.zeros(1, 32, 32)
    expected = {role: torch.zeros_like(h, dtype=torch.float64) for role, h in hessians.items()}
    slices = {"q": model.qo_bank[:5], "o": model.qo_bank[5:], "k": model.kv_bank[:5], "v": model.kv_bank[5:],
              "up": model.mlp_up_bank, "down": model.mlp_down_bank, "head": model.tok_emb[None]}
    for ids in batches:
        with torch.no_grad():
            with Products() as products:
                model(ids)
            model(ids, hooks=tg.Hooks(hessians=hessians))
        for x, weight in products.linear:
            role, layer = next((r, i) for r, ws in slices.items() for i, w in enumerate(ws) if torch.equal(w, weight))
            rows = x.flatten(0, -2).double()
            expected[role][layer] += sum(torch.outer(row, row) for row in rows)
    for role in hessians:
        for layer in range(len(hessians[role])):
            assert_close(hessians[role][layer], expected[role][layer], 1e-5)


def test_fake_quant_sees_every_matrix_once():
    cfg = tiny()
    model, (ids, _) = random_model(cfg), random_text(cfg, 1, 4)
    seen = {}

    def fake_quant(weight, site):
        assert site not in seen
        seen[site] = weight.detach().clone()
        return weight

    model(ids, hooks=tg.Hooks(fake_quant=fake_quant))
    expected = {tg.Site("emb"): model.tok_emb, tg.Site("head"): model.tok_emb}
    for i in range(5):
        slices = (model.qo_bank[i], model.kv_bank[i], model.kv_bank[5 + i], model.qo_bank[5 + i],
                  model.mlp_up_bank[i], model.mlp_down_bank[i])
        expected |= {tg.Site(role, i): weight for role, weight in zip(ROLES, slices)}
    assert set(seen) == set(expected)
    assert all(torch.equal(seen[site], expected[site]) for site in seen)


def test_fake_quant_replaces_the_weight():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 1, 6)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for bank in halved.params_of("matrix").values():
            bank.mul_(0.5)
    hooks = tg.Hooks(fake_quant=lambda w, site: w * 0.5 if site.role in ROLES else w)
    assert torch.equal(model(ids, targets, hooks=hooks), halved(ids, targets))


def test_every_matrix_product_is_a_hooked_linear():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 1, 6)
    calls = []
    with Products() as products:
        model(ids, targets, hooks=tg.Hooks(fake_quant=lambda w, site: calls.append(site) or w))
    assert calls[0].role == "emb"  # a table: looked up, not multiplied
    assert len(products.linear) == len(calls) - 1 == 6 * cfg.num_layers + 1
    assert not products.others


@pytest.mark.parametrize("role", [*ROLES, "head"])
def test_adapter_equals_a_changed_weight(role):
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 1, 8)
    site = tg.Site(role) if role == "head" else tg.Site(role, 3)
    seen = []
    model(ids, hooks=tg.Hooks(fake_quant=lambda w, s: seen.append(w) or w if s == site else w))
    generator = torch.Generator().manual_seed(shifted(9))
    a = torch.randn(1, 2, seen[0].size(1), generator=generator)
    b = torch.randn(1, seen[0].size(0), 2, generator=generator)
    adapter = tg.Adapter(a, b, 0.07)
    losses = model(ids, targets, hooks=tg.Hooks(adapters={site: adapter}))
    changed = seen[0] + 0.07 * b[0] @ a[0]
    expected = model(ids, targets, hooks=tg.Hooks(fake_quant=lambda w, s: changed if s == site else w))
    assert (losses - expected).abs().max() < 1e-4
    assert (losses - model(ids, targets)).abs().max() > 1e-2


def test_adapters_act_row_by_row():
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), random_text(cfg, 3, 8)
    site, generator = tg.Site("up", 2), torch.Generator().manual_seed(shifted(9))
    a, b = torch.randn(3, 2, 32, generator=generator), torch.randn(3, 48, 2, generator=generator)
    together = model(ids, targets, hooks=tg.Hooks(adapters={site: tg.Adapter(a, b, 0.3)}))
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(ids[one], targets[one], hooks=tg.Hooks(adapters={site: tg.Adapter(a[one], b[one], 0.3)}))
        assert (together[one] - alone).abs().max() < 1e-5


# ----- compiling


@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_one_graph(packed):
    cfg = tiny()
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    bounds = tg.Bounds.find(ids, BOS, 9) if packed else None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (compiled(ids, targets, bounds) - model(ids, targets, bounds)).abs().max() < 1e-6
    torch._dynamo.reset()


def test_no_graph_works_out_the_rotary_table():
    """Inductor would draw it into every kernel that reads it, in float64 and for each element."""
    cfg, graphs = tiny(num_layers=2, loop_start=0, loop_end=0), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    model, (ids, targets) = random_model(cfg), random_text(cfg, 2, 8)
    torch._dynamo.reset()
    for form in tg.compile_model(model, backend):
        for bounds in (None, tg.Bounds.find(ids, BOS, 4)):
            assert torch.equal(form(ids, targets, bounds=bounds), model(ids, targets, bounds))
    torch._dynamo.reset()
    assert len(graphs) >= 4 and not [code for code in graphs if "cos()" in code or "float64" in code]


@pytest.mark.parametrize("layers", [6, 12])
def test_layers_of_a_kind_share_a_graph(layers):
    """By parts: the embedding, layers with and without a skip that ends there, and the head, however many there are."""
    cfg = tiny(num_layers=layers, xsa_last_n=layers)
    model, (ids, targets), graphs = random_model(cfg), random_text(cfg, 2, 8), CompileCounter()
    torch._dynamo.reset()
    _, parts = tg.compile_model(model, graphs)
    assert torch.equal(parts(ids, targets), model(ids, targets)) and graphs.frame_count == 4
    assert torch.equal(parts(ids), model(ids)) and graphs.frame_count == 5  # logits
    torch._dynamo.reset()


def test_the_width_of_adapted_batches_makes_no_new_graph():
    """From the second width on, with adapters of all layers and without; each graph is that of one layer's kind."""
    cfg = tiny(num_layers=4, xsa_last_n=4, ttt_mode="lora", ttt_batch_size=3, ttt_lora_rank=2, ttt_chunk_size=4)
    model, graphs = random_model(cfg).requires_grad_(False), CompileCounter()
    adapters = tg.DocumentAdapters(cfg, model)
    adapters.reset()
    torch._dynamo.reset()
    _, parts = tg.compile_model(model, graphs)
    for hooks in (adapters.hooks, tg.NO_HOOKS):
        made = []
        for width in (4, 7, 8, 16, 20):
            ids, targets = random_text(cfg, 3, width)
            with torch.set_grad_enabled(hooks is not tg.NO_HOOKS):
                assert torch.equal(parts(ids, targets, hooks=hooks), model(ids, targets, hooks=hooks))
            made.append(graphs.frame_count)
        assert made[1] == made[-1]
    torch._dynamo.reset()


def test_parts_compiled_for_training_equal_the_model():
    """By way of AOTAutograd, gradients of all parameters too; in a second shape as well, which is a graph of any."""
    cfg = tiny(num_layers=3, xsa_last_n=3)
    model = random_model(cfg)
    torch._dynamo.reset()
    _, parts = tg.compile_model(model, "aot_eager")
    for length in (6, 9):
        ids, targets = random_text(cfg, 2, length)
        found = []
        for forward in (model, parts):
            model.zero_grad()
            losses = forward(ids, targets)
            losses.sum().backward()
            found.append([losses.detach(), *(p.grad.clone() for p in model.parameters())])
        for want, got in zip(*found):
            assert_close(got, want, 5e-5)
    torch._dynamo.reset()


# ----- initial weights


def test_initial_weights():
    cfg = tiny(vocab_size=3000, tied_embed_init_std=0.02, qk_gain_init=5.25)
    model = tg.GPT(cfg)
    shapes = {"tok_emb": (3000, 32), "qo_bank": (10, 32, 32), "kv_bank": (10, 16, 32), "mlp_up_bank": (5, 48, 32),
              "mlp_down_bank": (5, 32, 48), "resid_mix": (5, 2, 32), "attn_scale": (5, 32), "mlp_scale": (5, 32),
              "q_gain": (5, 4), "skip_weight": (2, 32), "skip_gate": (2, 32)}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert abs(model.tok_emb.std().item() / 0.02 - 1) < 0.02
    assert abs(model.tok_emb.mean().item()) < 0.0005
    assert not model.qo_bank[5:].any() and not model.mlp_down_bank.any()
    for matrix in [*model.qo_bank[:5], *model.kv_bank, *model.mlp_up_bank]:
        short = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
        assert (short @ short.T - torch.eye(len(short))).abs().max() < 1e-5
    assert (model.resid_mix[:, 0] == 1).all() and not model.resid_mix[:, 1].any()
    for ones in (model.attn_scale, model.mlp_scale, model.skip_weight):
        assert (ones == 1).all()
    assert (model.q_gain == 5.25).all() and not model.skip_gate.any()


def test_slices_start_different():
    model = tg.GPT(tiny())
    slices = [*model.qo_bank[:5].flatten(1), *model.kv_bank.flatten(1)]
    assert len({tuple(s.tolist()) for s in slices}) == 15


def test_ungated_skips_have_no_gate():
    assert "skip_gate" not in dict(tg.GPT(tiny(skip_gates_enabled=False)).named_parameters())


def test_model_comes_from_the_seed(tmp_path):
    def build(seed):
        cfg = tiny(seed=seed, device="cpu", artifact_dir=str(tmp_path))
        rt = tg.Runtime(cfg, tg.Launch())
        weights = [p.detach() for p in tg.build_model(cfg, rt, tg.attend_sdpa, BOS).parameters()]
        rt.close()
        return weights

    first = build(1)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, build(1)))
    assert not torch.equal(first[0], build(2)[0])


def test_banks_and_vectors_share_out_all_but_the_embedding():
    model = tg.GPT(tiny())
    names = [*model.params_of("matrix"), *model.params_of("scalar"), "tok_emb"]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(model.params_of("matrix")) == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
