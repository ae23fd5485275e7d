"""FP8: products of rounded rows by hand, gradients of both inputs, what goes through it, and its absence when off."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, shifted
from test_techniques import packed_text, random_model, tiny
from test_training import random_batches, rt  # noqa: F401
from test_training import tiny as training

sys.path.append(str(ROOT / "benchmarks"))
from kernel_check import plain_head, plain_mlp

import train_gpt as tg

try:
    tg.product_fp8(torch.ones(16, 16), torch.ones(16, 16))
except RuntimeError:  # older ones know one scale a tensor only
    pytest.skip("this PyTorch has no products of FP8 with a scale a row on a CPU", allow_module_level=True)

# all of e4m3: 4 bits of exponent with bias 7, 3 of mantissa; 1.111 x 2^8 is not a number
E4M3 = torch.tensor([m / 8 * 2.0**-6 for m in range(8)] +
                    [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1], dtype=torch.float64)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows of x (n, m) to the nearest numbers of e4m3 times the row's scale, in float64.

    The quotients are of fp32, which every machine rounds alike: one that lies halfway goes to the even neighbour.
    """
    scale = x.abs().amax(1, keepdim=True) / 448
    distance = ((x / scale).abs().double()[..., None] - E4M3).abs()
    distance[..., ::2] *= 1 - 1e-9
    return E4M3[distance.argmin(-1)] * x.double().sign() * scale.double()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    draw = torch.Generator().manual_seed(shifted(seed))
    return torch.randn(shape, generator=draw) * 10 ** (4 * torch.rand((*shape[:-1], 1), generator=draw) - 2)


def test_the_table_is_e4m3():
    assert len(E4M3) == 127 and E4M3.max() == torch.finfo(torch.float8_e4m3fn).max == 448
    assert torch.equal(E4M3, torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double())


@pytest.mark.parametrize("rows, n, m", [((2, 5), 16, 32), ((1, 1), 48, 16), ((3, 40), 64, 80)])
def test_products_and_gradients_equal_those_by_hand(rows, n, m):
    x, weight, grad = random(*rows, n), random(m, n, seed=1), random(*rows, m, seed=2)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = tg.LinearFp8.apply(*leaves)
    gx, gw = torch.autograd.grad(y, leaves, grad)
    flat, g = x.flatten(0, 1), grad.flatten(0, 1)
    expected = (rounded(flat) @ rounded(weight).T, rounded(g) @ rounded(weight.T).T, g.double().T @ flat.double())
    for got, want, shape in zip((y, gx, gw), expected, ((*rows, m), (*rows, n), (m, n))):
        assert got.shape == shape and got.dtype == torch.float32
        size = want.abs().amax(-1, keepdim=True)  # rows differ in size
        assert ((got.detach().view_as(want) - want).abs() / size).max() < 1e-5
    assert ((y.detach().flatten(0, 1) - flat @ weight.T).norm(dim=1) / (flat @ weight.T).norm(dim=1)).median() > 1e-3


def test_bf16_stays_bf16_and_zeros_stay_zeros():
    x, weight = random(2, 3, 16).bfloat16(), random(32, 16, seed=1).bfloat16()
    x[0, 1], weight[5] = 0, 0
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = tg.LinearFp8.apply(*leaves)
    gx, gw = torch.autograd.grad(y.float().square().sum(), leaves)
    assert y.dtype == gx.dtype == gw.dtype == torch.bfloat16
    assert not y[0, 1].any() and not y[..., 5].any() and not gx[0, 1].any() and y.isfinite().all()
    assert gx.isfinite().all() and gw.isfinite().all() and gw.any()


@pytest.mark.parametrize("which, roles", [("none", set()), ("mlp", {"up", "down"}), ("head", {"head"}),
                                          ("both", {"up", "down", "head"})])
def test_only_what_the_setting_names_goes_through(monkeypatch, which, roles):
    cfg = tiny(num_loops=1, embedding_dim=16)
    model, (ids, targets), seen = random_model(cfg), packed_text(cfg), set()
    weights = {"up": model.mlp_up_bank, "down": model.mlp_down_bank, "head": model.tok_emb[None]}

    def exact(x, weight):
        seen.update(role for role, ws in weights.items() for w in ws if torch.equal(w, weight))
        return F.linear(x, weight)

    plain = model(ids, targets)
    changed = model(ids, targets, hooks=tg.Hooks(fp8=which))
    assert torch.equal(changed, plain) == (which == "none")
    assert (changed - plain).abs().mean() < 0.5
    monkeypatch.setattr(tg.LinearFp8, "apply", exact)
    assert torch.equal(model(ids, targets, hooks=tg.Hooks(fp8=which)), plain)
    assert seen == roles


def test_training_uses_it_and_nothing_else_does(rt, tmp_path):  # noqa: F811
    """A step's loss is that under FP8's hooks, with late QAT that of the rounded weights; the model alone has none."""
    calls, real = [], tg.product_fp8
    for which in ("none", "both"):
        cfg = training(tmp_path, fp8=which, qat_enabled=True, vocab_size=32, model_dim=16, mlp_mult=3.0)
        model = tg.GPT(cfg, bos=1)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(shifted(p.numel()))) * 0.3)
        trainer, batches = tg.Trainer(cfg, rt, model, model), random_batches(cfg)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tg, "product_fp8", lambda x, w: calls.append(w.detach().clone()) or real(x, w))
            model(batches[0].ids, batches[0].targets)
            assert not calls
            for phase in (tg.Phase(0.5, 0.9), tg.Phase(0.5, 0.9, qat=True)):
                calls.clear()
                first = model.mlp_up_bank[0].detach().clone()
                trainer.step(batches, phase)
                # forward and backward of two matrices in each layer and of the head, in each of three batches
                assert len(calls) == (0 if which == "none" else 3 * 2 * (2 * cfg.num_layers + 1))
    assert torch.equal(calls[0], tg.on_grid(first, cfg.matrix_bits, cfg.mlp_clip_sigmas))  # what late QAT made of it


def test_kernels_stay_where_fp8_is_not():
    """FP8=mlp leaves the head to FUSED=1's kernel, and the other way round."""
    used, cfg = [], tiny()
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    model.ops = tg.Ops(mlp=lambda *inputs: used.append("mlp") or plain_mlp(*inputs),
                       head_losses=lambda *inputs: used.append("head") or plain_head(*inputs))
    for which, expected in (("none", {"mlp", "head"}), ("mlp", {"head"}), ("head", {"mlp"}), ("both", set())):
        used.clear()
        model(ids, targets, hooks=tg.Hooks(fp8=which))
        assert set(used) == expected


def test_it_goes_through_torch_compile_whole():
    cfg = tiny(num_layers=2)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    compiled, hooks, found = tg.compile_model(model, "aot_eager")[0], tg.Hooks(fp8="both"), []
    for forward in (model, compiled):
        model.zero_grad()
        losses = forward(ids, targets, hooks=hooks)
        losses.sum().backward()
        found.append([losses.detach(), *(p.grad.clone() for p in model.parameters())])
    torch._dynamo.reset()
    for want, got in zip(*found):
        # a last bit may turn a rounding, and that others: 2 %; a product that is not of FP8 makes 4 % and more
        assert (got - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize("dtype, capability, changes, fits", [
    (torch.bfloat16, (9, 0), {}, True), (torch.bfloat16, (9, 0), {"embedding_dim": 128}, True),
    (torch.bfloat16, (8, 9), {}, False), (torch.float32, (9, 0), {}, False),
    *((torch.bfloat16, (9, 0), {name: value}, False) for name, value in (
        ("vocab_size", 1000), ("mlp_mult", 3.01), ("embedding_dim", 100), ("model_dim", 520)))])
def test_it_is_refused_where_it_cannot_run(monkeypatch, dtype, capability, changes, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    rt = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)  # noqa: F811
    assert tg.fit_to_device(tg.Settings(**changes), rt).micro_batch_tokens == 98304
    if fits:
        assert tg.fit_to_device(tg.Settings(fp8="mlp", **changes), rt).fp8 == "mlp"
        return
    with pytest.raises(tg.RunError, match="FP8=mlp: needs a Hopper GPU, bf16 and widths in sixteens; takes none here"):
        tg.fit_to_device(tg.Settings(fp8="mlp", **changes), rt)
