"""benchmarks/count.py against independent counts, kernel_check.py in Triton's interpreter, plan.py as far as this build
of PyTorch can plan, and gpu.py at tiny sizes on the CPU.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PLAIN, ROOT, run_script
from helpers import OFF, bare
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "data"))
import count
import gpu
import kernel_check
import plan
from shards import read_shard

import train_gpt as tg

SMALL = OFF | {
         "num_layers": 6, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 4, "vocab_size": 96,
         "mlp_mult": 3.0, "train_seq_len": 16, "train_batch_tokens": 64, "eval_stride": 0, "loop_start": 2,
         "loop_end": 3}
TECHNIQUES = {
    "plain": {},
    "looped": {"num_loops": 2},
    "gptj": {"parallel_start_layer": 4, "sparse_attn_gate_enabled": True},
    "lanes": {"parallel_start_layer": 4, "parallel_mode": "lanes", "num_loops": 1, "gated_attn_enabled": True},
    "crossed": {"parallel_start_layer": 4, "parallel_mode": "crossed", "smear_gate_enabled": True},
    "tables": {"bigram_vocab_size": 64, "bigram_dim": 24, "ve_enabled": True, "ve_dim": 20, "ve_layers": "1,5",
               "ve_bigram_rows": 32},
    "values": {"ve_enabled": True, "ve_dim": 0, "num_loops": 1},
    "factorised": {"embedding_dim": 24, "tie_embeddings": False, "num_loops": 1, "recur_blend": "ab"},
}


def attend_by_products(q, k, v, bounds):
    """Attention as two plain products, which FlopCounterMode sees; fused kernels on the CPU it does not."""
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(torch.ones(q.size(2), q.size(2)).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


# ----- FLOPs, parameters and bytes


@pytest.mark.parametrize("name", TECHNIQUES)
def test_flops_are_those_that_pytorch_counts_in_the_model(name):
    cfg = tg.Settings(**SMALL | TECHNIQUES[name])
    model, tokens, length = tg.GPT(cfg, attend_by_products), cfg.train_batch_tokens, cfg.train_seq_len
    ids, targets = torch.randint(cfg.vocab_size, (2, tokens // length, length))
    with FlopCounterMode(display=False) as forward:
        loss = model(ids, targets).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    work = count.count_step(cfg, tokens)
    ours, attention = count.total(work), work["attention"]
    # PyTorch's products take the whole square of scores, ours what is causal of it; and keep them for the backward
    # pass, four products, where a flash kernel computes them again, five
    square = 2 * length / (length + 1)
    assert forward.get_total_flops() == pytest.approx(ours.flops_forward + (square - 1) * attention.flops_forward)
    rest = ours.flops_backward - attention.flops_backward - work["optimizer"].flops
    assert backward.get_total_flops() == pytest.approx(rest + square * 4 / 5 * attention.flops_backward)
    plain = (forward.get_total_flops() + backward.get_total_flops() - (square - 1) * 3 * attention.flops_forward)
    assert count.model_flops(work) == pytest.approx(plain)


@pytest.mark.parametrize("shape", [(3, 16, 24), (2, 24, 16), (1, 16, 16)])
def test_newton_schulz_flops_are_those_that_pytorch_counts(shape):
    with FlopCounterMode(display=False) as counted:
        tg.newton_schulz(torch.randn(shape), 5, torch.float32)
    assert counted.get_total_flops() == shape[0] * count.newton_schulz(*shape[1:], 5)[0]


@pytest.mark.parametrize("heads", [False, True])
def test_flops_of_a_step_of_the_optimizer_are_those_that_pytorch_counts(rt, heads):
    cfg = tg.Settings(**SMALL | {"muon_qk_heads": heads})
    model = tg.GPT(cfg)
    optimizer = tg.Optimizer(model, cfg, rt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.reduce_gradients()
    with FlopCounterMode(display=False) as counted:
        optimizer.step(1.0, 0.9)
    assert counted.get_total_flops() == count.count_step(cfg, 64)["optimizer"].flops


@pytest.mark.parametrize("name", TECHNIQUES)
def test_parameters_are_the_models(name):
    cfg = tg.Settings(**SMALL | TECHNIQUES[name])
    shapes = count.parameter_shapes(cfg)
    assert shapes == {n: tuple(p.shape) for n, p in tg.GPT(cfg).named_parameters()}
    report = count.count_report(cfg, count.parse([]))[-1]
    assert report["parameters"] == sum(p.numel() for p in tg.GPT(cfg).parameters())
    assert report["layers"] == len(tg.virtual_layers(cfg, cfg.num_loops))


def test_bytes_of_one_layer_are_those_counted_by_hand():
    cfg = bare(num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2.0, vocab_size=32, rope_dims=4,
               train_seq_len=4, train_batch_tokens=400, eval_stride=0)
    work = count.count_step(cfg, 100)
    x, ids = 100 * 8 * 2, 100 * 8  # 8 channels in bf16, 4 of them for a key; int64
    by_hand = {
        # q, k and v together, 8 -> 16, then o, 8 -> 8; backward dx and dW, which goes out in fp32
        "projections": ((x + 256 + 2 * x) + (x + 128 + x),
                        (2 * x + 256 + x) + (2 * x + x + 512) + (x + 128 + x) + (x + x + 256)),
        # 8 -> 16 -> 8; h, of 2x, is read once more for the derivative
        "MLP": (2 * (x + 256 + 2 * x), (2 * x + 256 + x) + (2 * x + x + 512) + (x + 256 + 2 * x) + (x + 2 * x + 512)
                + 2 * x),
        # q, k, v are 2x; the log-sums half of x
        "attention": (2 * x + x + x // 2, 2 * x + 2 * x + x // 2 + 2 * x),
        "head and loss": (x + 512 + ids + 400, (x + 512) + x + 1024),
        # the embedding's rows -> x0 | x0 -> mixed, normed | q, k, 1.5x -> as many | y and v, 1.5x -> y | two -> two
        # before the MLP | two -> the normed input of the head; v's gradient is added to XSA's, half of x
        "norms and glue": ((ids + 1024 + x) + 3 * x + 3 * x + 5 * x // 2 + 4 * x + 3 * x,
                           (ids + 1024 + 2 * 1024 + x) + 4 * x + 9 * x // 2 + (4 * x + x // 2) + 6 * x + 5 * x),
        # 2 of 8x8, 2 of 4x8, 16x8 and 8x16: five steps of 3rc + 4r² in bf16, 18 + 14 bytes a weight; AdamW on the rest
        "optimizer": (0, 5 * 2 * (2 * (192 + 256) + 2 * (96 + 64) + 2 * (384 + 256)) + 32 * 448 + 34 * 256 + 32 * 34),
        "EMA": (0, 12 * (448 + 256 + 34)),
        "data": (2 * ids, 0),
    }
    assert {name: (w.bytes_forward, w.bytes_backward) for name, w in work.items()} == by_hand
    assert list(work) == list(count.FAMILIES)


def test_keys_met_are_those_under_the_mask():
    for length, window in ((1, 0), (7, 0), (16, 5), (16, 16), (5, 9)):
        place = torch.arange(length)
        back = place[:, None] - place
        mask = (back >= 0) & (back < (window or length))
        assert count.keys_met(length, window) == pytest.approx(float(mask.sum(1, dtype=torch.float64).mean()))


def test_windows_documents_loops_and_ranks_change_what_they_should():
    cfg = tg.Settings(**SMALL | {"num_loops": 2})
    plain, looped = (count.count_step(cfg, 64, loops=loops) for loops in (0, 2))
    for family in ("projections", "MLP", "attention"):  # 10 virtual layers instead of 6
        assert looped[family].flops == pytest.approx(plain[family].flops * 10 / 6)
    visits = 4 * (2 * 32 * 32 + 2 * 16 * 32) * count.FP32  # a revisit's gradient is added to the one that is there
    assert looped["projections"].bytes == plain["projections"].bytes * 10 / 6 + visits
    assert looped["optimizer"] == plain["optimizer"]
    short, window = (count.count_step(cfg, 64, loops=0, **{k: 8}) for k in ("documents", "window"))
    assert short["attention"].flops == plain["attention"].flops * 9 / 17
    assert window["attention"].flops == pytest.approx(plain["attention"].flops * count.keys_met(16, 8) / 8.5)
    assert short["attention"].bytes == plain["attention"].bytes
    plain, two = (count.count_step(dataclasses.replace(cfg, muon_qk_heads=False), 64, world, 0) for world in (1, 2))
    assert two["optimizer"].flops == plain["optimizer"].flops / 2  # every bank has an even number of slices
    shapes = {"a_bank": (3, 4, 8), "scale": (10,)}
    assert count.exchanged(shapes, 1) == 0
    assert count.exchanged(shapes, 2) == (4 * 4 * 4 * 8 * 2 + 2 * 4 * 10) / 2  # four slices, as two are dealt to each


def test_floors_and_what_binds():
    h100, h200 = count.DEVICES
    work = count.Work(989e12, 0, 0, 4.0e12)
    assert work.floor(h200) == (1.0, "FLOPs") and work.floor(h100) == (4.0 / 3.35, "bytes")
    families = {"a": count.Work(flops_forward=2 * 989e12), "b": count.Work(bytes_backward=3.35e12)}
    found = count.floors(families, h100, 600, 450e9, 8)
    assert found["seconds"] == 3 and found["seconds_overlapped"] == 2 and found["tokens_per_second"] == 200
    assert found["exchange_seconds"] == 1 and found["scaling"] == 0.75 and found["tokens_per_second_all"] == 1200


def test_fused_makes_the_logits_twice_and_mfu_counts_them_once():
    """As PyTorch counts the products inside the operator, forward and backward."""
    pytest.importorskip("triton")
    x, weight, targets = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randint(32, (2, 5))
    with FlopCounterMode(display=False) as forward:
        losses, = tg.run_head_losses(x, weight, targets, torch.tensor(15.0))
    with FlopCounterMode(display=False) as backward:
        tg.run_head_losses(x, weight, targets, torch.tensor(15.0), torch.ones_like(losses))
    work = count.head(10, 8, 32, again=True)
    assert (forward.get_total_flops(), backward.get_total_flops()) == (work.flops_forward, work.flops_backward)
    cfg = tg.Settings(**SMALL)
    plain, fused = (count.count_step(dataclasses.replace(cfg, fused=on), 64) for on in (False, True))
    assert fused["head and loss"].flops_backward == 1.5 * plain["head and loss"].flops_backward
    assert fused["head and loss"].bytes == plain["head and loss"].bytes
    assert count.model_flops(fused) == count.model_flops(plain)
    assert {n: w for n, w in fused.items() if n != "head and loss"} == {
        n: w for n, w in plain.items() if n != "head and loss"}


# ----- the committed tables


def test_readme_tables_are_what_count_prints_now(capsys, monkeypatch):
    for name in count.tg.Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    assert count.main([]) == 0
    readme = count.README.read_text()
    printed = capsys.readouterr().out
    assert count.with_tables(readme, printed) == readme
    assert printed.count("### 11 layers,") == printed.count("### 17 layers (11 physical),") == 1
    if not count.MEASURED.exists():
        assert printed.count("| not run on a GPU |") == 2 * (len(count.FAMILIES) + 1)


def test_json_has_the_figures_of_the_tables(capsys):
    assert count.main(["--json", "--tokens", "4096", "--world", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [report["layers"] for report in found["reports"]] == [11, 17]
    for report in found["reports"]:
        assert list(report["families"]) == list(count.FAMILIES) and report["tokens"] == 4096 and report["world"] == 2
        assert report["floors"]["H100 SXM"]["tokens_per_second"] > 0


def test_what_cannot_be_counted_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NUM_HEADS", "7")
    assert count.main([]) == 1
    assert capsys.readouterr().err.startswith("error: NUM_HEADS=7")
    with pytest.raises(SystemExit):
        count.parse(["--world", "0"])


def test_measured_times_fill_the_last_column_and_those_of_a_cpu_do_not(capsys, tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    times = {name: 1.5 + i for i, name in enumerate((*count.FAMILIES, "other", "idle", "all"))}
    path.write_text(json.dumps({"device": "a GPU", "check_only": False, "parts": {"families": {"11": times}}}))
    assert count.main(["--measured", str(path)]) == 0
    eleven, seventeen = capsys.readouterr().out.split("### 17")
    rows = [line.split(" | ")[-1] for line in eleven.splitlines() if line.startswith("| ")]
    assert rows == ["today's time, ms on a GPU |", *(f"{1.5 + i:.2f} |" for i in (*range(8), 10))]
    assert "9.50 ms go to kernels not told apart; for 10.50 ms none runs" in eleven
    assert seventeen.count("not run on a GPU") == 9
    path.write_text(json.dumps({"device": "cpu", "check_only": True, "parts": {}}))
    assert count.main(["--measured", str(path)]) == 1 and "on a CPU" in capsys.readouterr().err


# ----- kernels and their check


@pytest.fixture
def ops() -> tg.Ops:
    pytest.importorskip("triton")
    return tg.fused_ops()


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", kernel_check.NAMES)
def test_kernels_are_right(ops, name):
    """All outputs and gradients; in bf16 as near as the interpreter, which cuts off, can come."""
    errors = kernel_check.check(name, ops, CPU, torch.float32)
    assert 0 < max(errors.values()) < 1e-5 and len(errors) >= 3
    plain = kernel_check.check(name, tg.PLAIN, CPU, torch.float32)
    assert plain.keys() == errors.keys() and set(plain.values()) == {0.0}
    row = kernel_check.compare(name, ops, CPU, torch.bfloat16)
    if name == "mlp":
        assert list(row) == ["skipped"] and not kernel_check.check(name, ops, CPU, torch.bfloat16)
    else:
        assert row["ok"] and all(1e-4 < row[n] < 0.01 for n in row if n != "ok")


def test_every_kernel_is_checked(ops):
    cases = kernel_check.cases(kernel_check.Sizes(), CPU, torch.float32)
    assert set(kernel_check.NAMES) == set(tg.Ops._fields) == set(cases)
    assert not any(getattr(ops, name) is getattr(tg.PLAIN, name) for name in kernel_check.NAMES)
    assert kernel_check.Sizes.of(tg.Settings()) == (1, 2048, 512, 2048, 8192)


def test_the_check_finds_what_is_wrong():
    def steep(x, up, down):
        y = kernel_check.plain_mlp(x, up, down)
        return y.detach() + 1.01 * (y - y.detach())

    wrong = tg.Ops(
        mlp=steep,
        head_losses=lambda x, weight, targets, cap: kernel_check.plain_head(x, weight, targets.clamp(min=0), cap))
    found = {name: kernel_check.compare(name, wrong, CPU, torch.float32) for name in kernel_check.NAMES}
    assert not any(row["ok"] for row in found.values())
    assert found["mlp"]["values"] == 0 and found["mlp"]["gradients"] == pytest.approx(0.01, rel=1e-3)
    broken = tg.Ops(mlp=lambda *inputs: kernel_check.plain_mlp(*inputs) * float("nan"))
    nothing = kernel_check.compare("mlp", broken, CPU, torch.float32)
    assert not nothing["ok"] and nothing["values"] == nothing["gradients"] == math.inf
    assert found["head_losses"]["values"] > 0.1  # targets to ignore counted
    right = kernel_check.compare("mlp", tg.PLAIN, CPU, torch.float32)
    assert right == {"ok": True, "values": 0, "gradients": 0, "plain_values": 0, "plain_gradients": 0}
    assert gpu.failed({"mlp, fp32": found["mlp"]}) and not gpu.failed({"mlp, fp32": right})
    assert kernel_check.is_right({"y": 0.009}, {"y": 0.003}, torch.bfloat16)
    assert not kernel_check.is_right({"y": 0.011}, {"y": 0.003}, torch.bfloat16)
    assert not kernel_check.is_right({"y": math.inf}, {"y": math.inf}, torch.bfloat16)
    zero, some = torch.zeros(3), torch.tensor([0.0, 0.5, 0.0])  # the gradient where every target is IGNORE
    assert kernel_check.relative_error(zero, zero) == 0 and kernel_check.relative_error(some, zero) == 0.5
    assert kernel_check.relative_error(some * math.nan, zero) == math.inf


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import train_gpt as tg

for grad in (False, True):
    types, sizes, one = ["*bf16"] * 5 + ["i32"] * 5, [128, 128 if grad else 256, 64, grad], 9 if grad else 8
    constants = {(10 + i,): size for i, size in enumerate(sizes)} | {(one,): 1}
    names = list(inspect.signature(tg.mlp_kernel.fn).parameters)
    signature = {name: "constexpr" if (i,) in constants else types[i] for i, name in enumerate(names)}
    even = {(i,): [["tt.divisibility", 16]] for i in range(10) if i != one}
    made = triton.compile(ASTSource(tg.mlp_kernel, signature, constants, even), target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": 8})
    assert len(made.asm["cubin"]) > 1000
    print(made.metadata.shared)
"""


def test_the_mlp_fits_hoppers_shared_memory(tmp_path):
    """In the tiles that run_mlp() takes for bf16: 227 KiB at most."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    assert len(done.stdout.split()) == 2, done.stderr[-2000:]
    assert max(map(int, done.stdout.split())) < 227 * 1024


def test_without_triton_the_parts_with_kernels_say_so():
    code = ("import sys; sys.modules['triton'] = None\nimport gpu, kernel_check, torch\n"
            "assert not kernel_check.can_run(torch.device('cpu'))\nbench = object.__new__(gpu.Bench)\n"
            "bench.gpu, bench.work, bench.fused = False, {0: {}}, None\n"
            "for part in ('kernels', 'fused', 'each'):\n"
            "    assert gpu.PARTS[part](bench) == {'skipped': 'no Triton here, so no kernels'}\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Traffic(TorchDispatchMode):
    """Bytes of what operators are given and give."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "train_gpt":
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def test_readme_has_the_bytes_of_each_kernel(ops):
    """What plan.py said of FUSED=1's operators: what goes in and out, counted here, and what moves inside."""
    cfg = tg.Settings()
    tokens, sizes = 98304, kernel_check.Sizes.of(cfg)
    readme = count.README.read_text()
    for name, case in kernel_check.cases(sizes, CPU, torch.bfloat16).items():
        case = case._replace(inputs={n: t.to("meta") for n, t in case.inputs.items()})
        with Traffic() as forward:
            learned = [case.inputs[n].requires_grad_() for n in case.learned]
            outputs = case.run(ops, *case.inputs.values())
        with Traffic() as backward:
            torch.autograd.grad(outputs, learned, [torch.empty_like(y) for y in outputs])
        weights = sum(t.nbytes for n, t in case.inputs.items() if n in ("up", "down", "weight"))
        times = 1 if name == "head_losses" else cfg.num_layers
        expected = []
        for moved, weight, back in ((forward, weights, False), (backward, 2 * weights, True)):  # read, and a gradient
            window = (moved.bytes - weight) * tokens / sizes.length + weight + plan.inside(cfg, tokens, name, back)
            expected.append(times * window / 1e9)
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` | ")).split(" | ")
        assert [float(n) for n in row[5].split(" + ")] == pytest.approx(expected, rel=0.01, abs=0.005), name
        parts = [[float(n) for n in cell.split(" + ")] for cell in row[1:7]]
        for i in (0, 1):
            assert sum(cell[i] for cell in parts[:-1]) == pytest.approx(parts[-1][i], abs=0.03)


# ----- what torch.compile plans


def run_plan(settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return run_script(settings, *arguments, script=ROOT / "benchmarks/plan.py")


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch")
def test_without_a_cuda_build_plan_says_so_in_one_line(monkeypatch, capsys):
    assert plan.main(["plain"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"error: torch {torch.__version__} plans nothing for a GPU; takes a CUDA build (and no GPU)\n")
    monkeypatch.setenv("NUM_HEADS", "7")
    assert plan.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: NUM_HEADS=7") and said.count("\n") == 1


def test_plan_says_in_one_line_that_it_does_not_know_this_torch(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(plan, "pretend_h100", lambda: torch.no_such_thing)
    assert plan.main(["plain"]) == 1
    said = capsys.readouterr().err
    assert "its compiler is not as plan.py knows it (of 2.13): AttributeError" in said and said.count("\n") == 1


@pytest.mark.skipif(not torch.version.cuda, reason="needs a CUDA build of PyTorch")
def test_kernels_leave_fewer_bytes_in_the_plan(tmp_path):
    path = tmp_path / "plan.json"
    done = run_plan(PLAIN | {"NUM_LAYERS": "4"}, "plain", "parts", "fused", "--list", "--json", str(path))
    assert done.returncode == 0, done.stderr
    forms = json.loads(path.read_text())["forms"]
    for i in (0, 1):
        assert forms["fused"]["all"][i] < 0.85 * forms["plain"]["all"][i]
        assert forms["fused"]["kernels"][i] < forms["plain"]["kernels"][i]
        assert forms["fused"]["kernels of FUSED=1"][i] > forms["plain"]["kernels of FUSED=1"][i] == 0
        assert "other" not in forms["plain"] | forms["fused"]
        # by parts: the same products, and what goes over the edges of layers
        assert forms["parts"]["matrix products"][i] == pytest.approx(forms["plain"]["matrix products"][i])
        assert forms["plain"]["all"][i] < forms["parts"]["all"][i] < 1.1 * forms["plain"]["all"][i]
    assert [forms[form]["graphs"] for form in ("plain", "parts", "fused")] == [2, 8, 2]
    assert "    6.00  attention           plan.attention_backward.default" in done.stdout


# ----- the measurements, as far as a CPU can tell


GPU = ROOT / "benchmarks/gpu.py"
# Dynamo takes its time for every layer of every graph, Triton's interpreter for every tile
LEAST = {"DEVICE": "cpu", "NUM_LAYERS": "1", "LOOP_START": "0", "LOOP_END": "0", "TRAIN_BATCH_TOKENS": "32",
         "VOCAB_SIZE": "128", "MLP_MULT": "2"}


def test_gpu_benchmark_runs_all_its_parts_on_a_cpu(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "gpu.json"
    done = run_script(LEAST, "--json", str(path), script=GPU)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")[0]
    assert said.startswith("no GPU here: the same code at tiny sizes on the CPU, as a check that it runs")
    assert said.endswith("the Triton kernels run in Triton's interpreter")
    report = json.loads(path.read_text())
    assert report["check_only"] and report["device"] == "cpu" and report["attention"] == "sdpa"
    assert set(report) == {"device", "check_only", "torch", "attention", "attention_skipped", "dtype", "tokens",
                           "finished", "parts", "settings"}
    parts = report["parts"]
    assert list(parts) == list(gpu.PARTS) and not any("error" in found for found in parts.values())
    for mode in ("eager", "compiled", "fused"):
        assert list(parts[mode]) == ["1", "2"]
        for figures in parts[mode].values():
            assert set(figures) == {"ms", "tok_per_s", "tflop_per_s", "mfu", "peak_bytes"} and figures["mfu"] is None
            assert figures["tok_per_s"] == pytest.approx(1e3 * report["tokens"] / figures["ms"])
    assert list(parts["each"]) == list(kernel_check.NAMES) and all("error" not in row for row in parts["each"].values())
    rows = parts["kernels"]
    assert list(rows) == [f"{name}, {dtype}" for dtype in ("bf16", "fp32") for name in kernel_check.NAMES]
    assert all(row["ok"] for name, row in rows.items() if name != "mlp, bf16") and "skipped" in rows["mlp, bf16"]
    assert max(row["gradients"] for name, row in rows.items() if "fp32" in name) < 1e-5
    curve = parts["curve"]
    assert curve["plain_loss"] == pytest.approx(curve["fused_loss"], rel=1e-4)
    assert abs(curve["plain_next_seed_loss"] - curve["plain_loss"]) > 1e-3
    assert curve["tokens_of"] == "the benchmark" and curve["steps"] == 3
    for times in parts["families"].values():
        assert set(times) == {*count.FAMILIES, "other", "idle", "all"}
        assert min(times[name] for name in ("projections", "MLP", "attention", "head and loss", "optimizer", "EMA")) > 0
    assert parts["warm_up"]["graphs"] == 2 and parts["syncs"]["per_step"] == 0
    assert parts["update"]["optimizer_ms"] > 0 and parts["sliding"]["tokens"] == 512
    for mode in ("lora_eager", "lora_compiled"):
        assert parts[mode]["tokens"] == 512 and parts[mode]["rank"] == 4 and parts[mode]["layers"] == "2"
    assert parts["quantization"]["bytes"] > 0 and min(parts["quantization"].values()) > 0
    assert f"| lora_compiled | tok_per_s | {gpu.cell(parts['lora_compiled']['tok_per_s'])} |" in done.stdout


def test_two_processes_exchange_their_banks_and_take_a_step(tmp_path):
    path, plain = tmp_path / "gpu.json", {"DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # graphs: see the test above
    done = run_script(plain, "--json", str(path), script=GPU, processes=2)
    assert done.returncode == 0, done.stderr
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == ["exchange", "compiled"] and list(parts["compiled"]) == ["2", "3"]
    assert set(parts["exchange"]) == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "small gradients"}
    for name, row in parts["exchange"].items():
        assert row["ok"] and ("all_gather_ms" in row) == name.endswith("_bank")
    assert done.stdout.count("| part | figure |") == 1


def test_an_exchange_that_loses_a_number_is_told(monkeypatch):
    class Other(tg.Runtime):  # one process that plays rank 0 of two
        def __init__(self):
            self.rank, self.world, self.device = 0, 2, torch.device("cpu")

        def sum_(self, tensor):
            return tensor + other

        def sum_shares(self, tensor):
            return lambda: (tensor + other)[: len(tensor) // 2]

        def gather_shares(self, share):
            return lambda: torch.cat((share, whole[len(share) :]))

        def largest(self, value):
            return value

    bench = object.__new__(gpu.Bench)
    bench.rt, bank = Other(), torch.nn.Parameter(torch.zeros(2, 3, 4))
    bench.model = SimpleNamespace(parameters=lambda: [bank, torch.zeros(5)], params_of=lambda _: {"a_bank": bank})
    drawn = {shape: [torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(rank)).float()
                     for rank in (0, 1)] for shape in ((2, 3, 4), (5,))}
    other, whole = drawn[2, 3, 4][1], sum(drawn[2, 3, 4])
    monkeypatch.setattr(Other, "sum_", lambda self, tensor: tensor + drawn[tuple(tensor.shape)][1])
    assert all(row["ok"] for row in gpu.Bench.exchange(bench).values())
    for name in ("sum_", "sum_shares", "gather_shares"):
        with monkeypatch.context() as patch:
            right = getattr(Other, name)

            def wrong(self, tensor, right=right):
                found = right(self, tensor)
                first = found if isinstance(found, torch.Tensor) else found()
                first.view(-1)[-1] += 1
                return first if first is found else lambda: first

            patch.setattr(Other, name, wrong)
            rows = gpu.Bench.exchange(bench)
            assert not rows["a_bank"]["ok"] and rows["small gradients"]["ok"] == (name != "sum_")


def test_curve_takes_the_tokens_of_data_path_and_kernels_are_interpreted_whatever_was_set(tmp_path):
    pytest.importorskip("triton")
    cfg = tg.Settings(**gpu.TINY | {"data_path": str(tmp_path / "data"), "vocab_size": 128})
    gpu.write_data(cfg, 512, 256)
    (tmp_path / "data/fineweb_val_000000.bin").unlink()
    settings = LEAST | {"DATA_PATH": cfg.data_path, "TRITON_INTERPRET": "0", "TORCHDYNAMO_DISABLE": "1"}
    done = run_script(settings, "--parts", "curve", script=GPU)
    assert done.returncode == 0, done.stderr
    assert "| curve | tokens_of | DATA_PATH |" in done.stdout and "| curve | fused_loss | " in done.stdout


def test_half_of_the_training_tokens_can_be_learned(tmp_path):
    cfg = tg.Settings(**gpu.TINY | {"data_path": str(tmp_path / "data"), "train_batch_tokens": 4096})
    gpu.write_data(cfg, 512, 256)
    tokens = read_shard(str(tmp_path / "data/fineweb_train_000000.bin")).astype(int)
    assert len(tokens) == 64 * 4096 and tokens.min() == gpu.BOS and tokens.max() == cfg.vocab_size - 1
    after = (tokens[1:] == 2 + (tokens[:-1] - 1) % (cfg.vocab_size - 2)).mean()
    assert after == pytest.approx(0.5, abs=0.01)
    assert np.bincount(tokens, minlength=cfg.vocab_size)[2:].min() > 0.8 * len(tokens) / cfg.vocab_size


def test_each_keeps_what_it_measured_when_time_ends():
    bench, done = object.__new__(gpu.Bench), []

    def speed(forward, which):
        done.append((which, bench.model.ops))
        result = next(found)
        if isinstance(result, BaseException):
            raise result
        return {"3": result}

    bench.work, bench.fused, bench.model = {0: {}, 1: {}}, tg.Ops("one", "another"), torch.nn.Module()
    bench.step_speed, bench.layers, bench.compile = speed, lambda loops: "3", lambda: (None, None)
    found = iter([{"ms": 1.0}, gpu.OutOfTime(), ValueError("no GPU"), {"ms": 2.0}])
    assert bench.each_kernel() == {"mlp": {"ms": 1.0}, "head_losses": {"error": "out of time"}}
    assert bench.each_kernel() == {"mlp": {"error": "ValueError: no GPU"}, "head_losses": {"ms": 2.0}}
    assert done == [([1], tg.Ops(mlp="one")), ([1], tg.Ops(head_losses="another"))] * 2  # one kernel at a time
    assert bench.model.ops is tg.PLAIN


def test_a_part_that_fails_or_takes_too_long_does_not_cost_the_others(monkeypatch):
    def fails(bench):
        raise ValueError("two\nlines")

    monkeypatch.setattr(gpu, "PARTS", {"fails": fails, "works": lambda b: {"n": 1}, "sleeps": lambda b: time.sleep(60),
                                       "late": lambda b: {"n": 2}})
    found = gpu.run_parts(None, list(gpu.PARTS), time.perf_counter() + 3)
    assert found == {"fails": {"error": "ValueError: two lines"}, "works": {"n": 1},
                     "sleeps": {"error": "out of time"}, "late": {"error": "out of time"}}


def test_kernels_are_told_apart_by_operation_shapes_and_name():
    cfg = tg.Settings()
    tokens, kernel = 98304, "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"
    for op, shapes, name, scopes, family in (
        ("aten::mm", [[tokens, 512], [512, 256]], kernel, [], "projections"),
        ("aten::mm", [[512, tokens], [tokens, 2048]], kernel, [], "MLP"),
        ("aten::mm", [[tokens, 512], [512, 8192]], kernel, [], "head and loss"),
        ("aten::bmm", [[22, 512, 512], [22, 512, 512]], kernel, ["optimizer"], "optimizer"),
        ("aten::_fused_adamw_", [], "void at::native::multi_tensor_apply_kernel", ["optimizer"], "optimizer"),
        ("aten::_foreach_lerp_", [], "void at::native::multi_tensor_apply_kernel", [], "EMA"),
        ("", [], "void flash::flash_fwd_kernel<...>", [], "attention"),
        ("", [], "cutlass::device_kernel<flash::FlashAttnBwdSm90<...>>", [], "attention"),
        ("", [], "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", [], "attention"),
        ("", [], "triton_red_fused__log_softmax__to_copy_div_tanh_3", [], "head and loss"),
        ("", [], "triton_poi_fused_leaky_relu_pow_7", [], "MLP"),
        ("", [], "triton_per_fused__fused_rms_norm_add_mul_5", [], "norms and glue"),
        ("aten::copy_", [], "Memcpy HtoD (Pinned -> Device)", [], "data"),
        ("", [], kernel, [], "other"),
        ("aten::fill_", [], "void at::native::vectorized_elementwise_kernel", [], "other"),
    ):
        assert gpu.family_of(cfg, op, shapes, name, scopes) == family, (op, name)
    assert [count.device_called(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")] == [*count.DEVICES]
    assert not count.device_called("NVIDIA H100 PCIe") and not count.device_called("cpu")
    assert all(tg.Settings(**settings).eval_stride for settings in (gpu.FULL, gpu.TINY))  # or no window slides
    assert gpu.failed({"mlp": {"error": "out of time"}}) and not gpu.failed({"mlp": {"ok": True}, "seconds": 1.0})
