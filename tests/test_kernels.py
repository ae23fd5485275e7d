"""The Triton kernels against their plain forms in Triton's interpreter, compiled for Hopper, and in the whole model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, shifted
from helpers import ALL, BOS, assert_close, empty_statistics, packed_text, random_model, tiny
from reference import sizes_of_gradients

sys.path.append(str(ROOT / "benchmarks"))
from kernel_check import plain_head, plain_mlp

import train_gpt as tg

triton = pytest.importorskip("triton")
if triton.__version__.startswith("3.5.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("the interpreter of Triton 3.5 (of PyTorch 2.9) fails under NumPy 2.4", allow_module_level=True)
SCRIPT = Path(tg.__file__)


@pytest.fixture(scope="module")
def ops() -> tg.Ops:
    return tg.fused_ops()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shifted(seed + 31 * sum(shape))))


def values_and_gradients(form, inputs: list) -> list[torch.Tensor]:
    """Outputs of a form, and what a random function of them all gives each of its floating inputs as a gradient."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t for t in inputs]
    found = form(*leaves)
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    loss = sum((y.double() * random(*y.shape, seed=i)).sum() for i, y in enumerate(outputs))
    grads = torch.autograd.grad(loss, [t for t in leaves if torch.is_tensor(t) and t.requires_grad])
    return [*outputs, *grads]


CASES = {  # odd sizes: rows that fill no tile, widths that are no power of two
    "mlp": [lambda: [random(2, 37, 40), random(72, 40), random(40, 72)],
            lambda: [random(1, 3, 7), random(5, 7), random(7, 5)],
            lambda: [random(3, 45, 64), random(200, 64), random(64, 200)]],
    "head_losses": [lambda: [3 * random(2, 37, 24), random(50, 24), targets_of(2, 37, 50), 5.0],
                    lambda: [9 * random(1, 3, 8), random(1030, 8), targets_of(1, 3, 1030), 30.0]],
}


def targets_of(rows: int, length: int, vocab: int) -> torch.Tensor:
    targets = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(shifted(0)))
    targets[0, 0], targets[0, 1], targets[-1, -1] = tg.IGNORE, 0, vocab - 1
    return targets


PLAIN = {"mlp": plain_mlp, "head_losses": plain_head}


@pytest.mark.parametrize("name, case", [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_kernels_equal_their_plain_forms(ops, name, case):
    """Both in fp32 against the plain form in float64."""
    inputs = CASES[name][case]()
    exact = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    if name == "head_losses":  # softcap() computes in fp32
        exact = inputs
    expected, got = values_and_gradients(PLAIN[name], exact), values_and_gradients(getattr(ops, name), inputs)
    assert len(expected) == len(got)
    for want, have in zip(expected, got):
        assert have.shape == want.shape and want.abs().max() > 0
        assert (have - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["head_losses"])  # the interpreter's tl.dot is wrong in bf16
def test_kernels_in_bf16_are_near_the_truth(ops, name):
    """As near as the plain forms are, but that Triton's interpreter cuts numbers off to bf16 where a GPU rounds."""
    inputs = [t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() else t for t in CASES[name][0]()]
    exact = [t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    truth = values_and_gradients(PLAIN[name], exact)
    plain, got = values_and_gradients(PLAIN[name], inputs), values_and_gradients(getattr(ops, name), inputs)
    for want, rounded, have in zip(truth, plain, got):
        assert have.dtype == rounded.dtype
        want = want.detach()
        error, plain_error = (float((t.detach() - want).norm() / want.norm()) for t in (have, rounded))
        assert error <= max(2.5 * plain_error, 1e-6)
        assert error < 0.01


def test_an_ignored_target_costs_nothing_and_gives_no_gradient(ops):
    x, weight = random(1, 4, 8), random(11, 8)
    targets = torch.tensor([[tg.IGNORE, 3, tg.IGNORE, 10]])
    losses, gx, _ = values_and_gradients(ops.head_losses, [x, weight, targets, 6.0])
    assert losses[0, [0, 2]].tolist() == [0, 0] and (losses[0, [1, 3]] > 0).all()
    assert not gx[0, [0, 2]].any() and gx[0, [1, 3]].any()


@pytest.mark.parametrize("vocab", [5, 33, 256])
def test_what_a_kernel_charges_adds_up_to_one(ops, vocab):
    x, weight = 3 * random(1, 2, 8), random(vocab, 8)
    every = torch.arange(vocab)[None].expand(2, -1)  # each of two positions scored for every target
    losses = ops.head_losses(x[0][:, None].expand(-1, vocab, -1), weight, every, 6.0)
    assert (torch.exp(-losses.double()).sum(1) - 1).abs().max() < 1e-5  # losses up to 17 in fp32: 1e-6 each way


def test_logits_never_stand_whole(ops, monkeypatch):
    """Two full chunks and a rest, forward and backward, as the kernel sees them."""
    seen, real = [], tg.loss_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda logits, *rest, **options: seen.append(logits.shape) or real[grid](logits, *rest, **options)

    rows, vocab, d = 75, 1500, 4
    monkeypatch.setattr(tg, "loss_kernel", Watched())
    monkeypatch.setattr(tg, "HEAD_CHUNK", 30 * vocab)
    inputs = [3 * random(1, rows, d), random(vocab, d), targets_of(1, rows, vocab), 5.0]
    got = values_and_gradients(ops.head_losses, inputs)
    assert seen == [(30, vocab), (30, vocab), (15, vocab)] * 2
    for want, have in zip(values_and_gradients(plain_head, inputs), got):
        assert (have - want).abs().max() <= 2e-5 * want.abs().max()


MODELS = {
    "default": {},
    "all techniques": {**ALL, "parallel_mode": "gptj"},
    "lanes": {**ALL, "parallel_mode": "lanes", "attn_out_gate_enabled": True, "sparse_attn_gate_enabled": False},
    "crossed": ALL,
    "packed documents, untied": {"varlen_enabled": True, "tie_embeddings": False, "gated_attn_enabled": True},
    "factorised": {"embedding_dim": 12, "xsa_last_n": 0, "ln_scale": False},
}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_model_with_kernels_equals_the_model_without(ops, name):
    cfg = tiny(**MODELS[name])
    plain, fused = random_model(cfg), random_model(cfg)
    fused.ops = ops
    ids, targets = packed_text(cfg)
    bounds = tg.Bounds.find(ids, BOS, cfg.train_seq_len) if cfg.varlen_enabled else None
    expected, got = (model(ids, targets, bounds=bounds) for model in (plain, fused))
    assert_close(got, expected.detach(), 2e-5)
    assert not torch.equal(got, expected)  # else no kernel ran
    sizes = sizes_of_gradients(plain, ids, targets, torch.ones(ids.shape))
    expected.sum().backward()
    got.sum().backward()
    for (parameter, p), q in zip(plain.named_parameters(), fused.parameters()):
        assert (p.grad is None) == (q.grad is None), parameter
        if p.grad is not None:
            assert_close(q.grad, p.grad, 5e-5, parameter, sizes[parameter])


def test_hooks_ride_on_the_same_products_with_kernels(ops):
    """Calibration sees every projection, the head's too, whatever FUSED says."""
    cfg = tiny()
    found = []
    for form in (tg.PLAIN, ops):
        model, (ids, targets) = random_model(cfg), packed_text(cfg)
        model.ops = form
        stats = empty_statistics(cfg, model)
        tg.add_statistics(model, stats, tg.Batch(ids, targets))
        found.append([*stats.hessians.values(), *stats.moments.values()])
        assert all(t.any() for t in found[-1])
    for want, have in zip(*found):
        assert (have - want).abs().max() <= 1e-3 * want.abs().max()


def test_kernels_go_through_torch_compile_whole(ops):
    """One graph, forward and backward, by way of AOTAutograd, and the shapes it was told hold."""
    cfg = tiny(num_layers=2)
    plain, fused = random_model(cfg), random_model(cfg)
    fused.ops = ops
    ids, targets = packed_text(cfg)
    compiled = torch.compile(fused, fullgraph=True, dynamic=False, backend="aot_eager")
    expected, got = plain(ids, targets), compiled(ids, targets)
    assert_close(got, expected.detach(), 2e-5)
    expected.sum().backward()
    got.sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters()):
        if p.grad is not None:
            assert_close(q.grad, p.grad, 5e-5, name)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", list(CASES))
def test_operators_pass_torchs_own_checks(ops, name):
    """Schema, fake shapes, and what autograd registers, as torch.library.opcheck has them."""
    inputs = CASES[name][0]()
    for t in inputs[: 3 if name == "mlp" else 2]:
        t.requires_grad_()
    inputs = [t if torch.is_tensor(t) else torch.tensor(t) for t in inputs]
    torch.library.opcheck(getattr(torch.ops.train_gpt, name).default, (inputs, []),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_frozen_weights_and_adapters_go_with_kernels(ops):
    """LoRA test-time training: gradients for the adapters alone, through the kernels that no hook replaces."""
    cfg = tiny(ttt_mode="lora", ttt_lora_rank=3, ttt_batch_size=2, ttt_chunk_size=5, ttt_head_lora=False)
    (ids, targets), found = packed_text(cfg), []
    for form in (tg.PLAIN, ops):
        model = random_model(cfg)
        model.ops = form
        adapters = tg.DocumentAdapters(cfg, model)
        adapters.reset()
        for leaf in adapters.leaves:
            leaf.data += 0.1 * random(*leaf.shape)
        for p in model.parameters():
            p.requires_grad_(False)
        losses = model(ids, targets, hooks=adapters.hooks)
        assert (form is tg.PLAIN) == (type(losses.grad_fn).__name__ == "ViewBackward0")  # the head's kernel ran
        found.append([losses, *torch.autograd.grad(losses.sum(), adapters.leaves)])
    for want, have in zip(*found):
        assert want.abs().max() > 0 and (have - want).abs().max() <= 1e-4 * want.abs().max()


# ----- the setting


def test_fused_is_refused_where_nothing_can_run_it(monkeypatch):
    cfg = tg.Settings(fused=True)
    assert all(tg.pick_ops(cfg, torch.device("cpu")))
    assert tg.pick_ops(tg.Settings(), torch.device("cpu")) is tg.PLAIN
    monkeypatch.setattr(tg, "load_fp32", triton.JITFunction(tg.load_fp32.fn))  # as without TRITON_INTERPRET=1
    with pytest.raises(tg.RunError, match="FUSED=1: needs a GPU and Triton; takes 0 here"):
        tg.pick_ops(cfg, torch.device("cpu"))
    monkeypatch.setattr(tg, "triton", None)
    with pytest.raises(tg.RunError, match="FUSED=1"):
        tg.pick_ops(cfg, torch.device("cpu"))


def test_the_script_runs_without_triton():
    """As on a Mac: the import fails, and the model with its plain forms is there all the same."""
    code = ("import sys; sys.modules['triton'] = None\nimport train_gpt as tg\nassert tg.triton is None\n"
            "import torch; cfg = tg.Settings(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4,\n"
            "                                vocab_size=32)\n"
            "ids = torch.arange(32)[None]\nassert tg.GPT(cfg)(ids, ids).isfinite().all()\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ----- what a GPU would be given


COMPILE = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
import train_gpt as module
assert module.__file__.startswith(sys.argv[1])
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
half, full = "*bf16", "*fp32"
kinds = {4: ([half] * 5 + ["i32"] * 5, [128, 128, 64]),  # by how many constants they take
         2: ([half, "*i64", full, full, "i32", full], [8192])}
done = 0
for kernel in [v for v in vars(module).values() if isinstance(v, triton.runtime.jit.JITFunction)]:
    names = list(inspect.signature(kernel.fn).parameters)
    if not kernel.fn.__annotations__:
        continue  # a helper
    types_, sizes = kinds[len(kernel.fn.__annotations__)]
    for grad in (False, True):
        constants = {(len(types_) + i,): value for i, value in enumerate([*sizes, grad])}
        signature = dict(zip(names, types_ + ["constexpr"] * len(constants)))
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": 8})
        assert len(made.asm["cubin"]) > 1000
        done += 1
print("compiled", done)
"""


def test_kernels_compile_for_hopper(tmp_path):
    """To machine code of sm_90, by the assembler that Triton brings; from within the packed script, which has to let
    Triton read its source.
    """
    place = tmp_path / "train_gpt.packed.py"
    place.write_bytes(tg.pack_code(SCRIPT.read_bytes()))
    done = subprocess.run([sys.executable, "-c", COMPILE, str(place)], cwd=tmp_path, capture_output=True, text=True,
                          check=False, env={**os.environ, "TRITON_INTERPRET": "0",
                                            "TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert done.stdout.strip() == "compiled 4", done.stderr[-2000:]
