"""benchmarks/count.py against independent counts, and benchmarks/gpu.py at tiny sizes on the CPU."""

import json
import math
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "benchmarks"))
import count
import gpu

import train_gpt as tg

SMALL = {"num_layers": 6, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 4, "vocab_size": 96,
         "mlp_mult": 3.0, "train_seq_len": 16, "train_batch_tokens": 64, "eval_stride": 0, "loop_start": 2,
         "loop_end": 3}
TECHNIQUES = {
    "plain": {},
    "looped": {"num_loops": 2},
    "gptj": {"parallel_start_layer": 4, "sparse_attn_gate_enabled": True},
    "lanes": {"parallel_start_layer": 4, "parallel_mode": "lanes", "num_loops": 1, "gated_attn_enabled": True},
    "crossed": {"parallel_start_layer": 4, "parallel_mode": "crossed", "smear_gate_enabled": True},
    "tables": {"bigram_vocab_size": 64, "bigram_dim": 24, "ve_enabled": True, "ve_dim": 20, "ve_layers": "1,5"},
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


@pytest.mark.parametrize("name", TECHNIQUES)
def test_parameters_are_the_models(name):
    cfg = tg.Settings(**SMALL | TECHNIQUES[name])
    shapes = count.parameter_shapes(cfg)
    assert shapes == {n: tuple(p.shape) for n, p in tg.GPT(cfg).named_parameters()}
    report = count.count_report(cfg, count.parse([]))[-1]
    assert report["parameters"] == sum(p.numel() for p in tg.GPT(cfg).parameters())
    assert report["layers"] == len(tg.virtual_layers(cfg, cfg.num_loops))


def test_bytes_of_one_layer_are_those_counted_by_hand():
    cfg = tg.Settings(num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2.0, vocab_size=32, rope_dims=4,
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
    two = count.count_step(cfg, 64, world=2, loops=0)
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


# ----- the committed tables


def test_readme_tables_are_what_count_prints_now(capsys, monkeypatch):
    for name in count.tg.Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NUM_LOOPS", "2")
    assert count.main([]) == 0
    readme = count.README.read_text()
    printed = capsys.readouterr().out
    assert count.with_tables(readme, printed) == readme
    assert printed.count("### 11 layers,") == printed.count("### 17 layers (11 physical),") == 1
    if not count.MEASURED.exists():
        assert printed.count("| not run on a GPU |") == 2 * (len(count.FAMILIES) + 1)


def test_json_has_the_figures_of_the_tables(capsys, monkeypatch):
    monkeypatch.setenv("NUM_LOOPS", "2")
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
    monkeypatch.setenv("NUM_LOOPS", "2")
    assert count.main(["--measured", str(path)]) == 0
    eleven, seventeen = capsys.readouterr().out.split("### 17")
    rows = [line.split(" | ")[-1] for line in eleven.splitlines() if line.startswith("| ")]
    assert rows == ["today's time, ms on a GPU |", *(f"{1.5 + i:.2f} |" for i in (*range(8), 10))]
    assert "9.50 ms go to kernels not told apart; for 10.50 ms none runs" in eleven
    assert seventeen.count("not run on a GPU") == 9
    path.write_text(json.dumps({"check_only": True}))
    assert count.main(["--measured", str(path)]) == 1 and "on a CPU" in capsys.readouterr().err


# ----- the measurements, as far as a CPU can tell


def test_gpu_benchmark_runs_all_its_parts_on_a_cpu(tmp_path):
    path = tmp_path / "gpu.json"
    done = run_script({"DEVICE": "cpu"}, "--json", str(path), script=ROOT / "benchmarks/gpu.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU here: the same code at tiny sizes on the CPU, as a check that it runs")
    report = json.loads(path.read_text())
    assert report["check_only"] and report["device"] == "cpu" and report["attention"] == "sdpa"
    assert set(report) == {"device", "check_only", "torch", "attention", "attention_skipped", "dtype", "tokens",
                           "finished", "parts", "settings"}
    parts = report["parts"]
    assert list(parts) == list(gpu.PARTS) and not any("error" in found for found in parts.values())
    for mode in ("eager", "compiled"):
        assert list(parts[mode]) == ["2", "3"]
        for figures in parts[mode].values():
            assert set(figures) == {"ms", "tok_per_s", "tflop_per_s", "mfu", "peak_bytes"} and figures["mfu"] is None
            assert figures["tok_per_s"] == pytest.approx(1e3 * report["tokens"] / figures["ms"])
    for times in parts["families"].values():
        assert set(times) == {*count.FAMILIES, "other", "idle", "all"}
        assert min(times[name] for name in ("projections", "MLP", "attention", "head and loss", "optimizer", "EMA")) > 0
    assert parts["warm_up"]["graphs"] == 3 and parts["syncs"]["per_step"] == 0
    assert parts["update"]["optimizer_ms"] > 0 and parts["sliding"]["tokens"] == 512
    for mode in ("lora_eager", "lora_compiled"):
        assert parts[mode]["tokens"] == 512 and parts[mode]["rank"] == 4 and parts[mode]["layers"] == "3"
    assert parts["quantization"]["bytes"] > 0 and min(parts["quantization"].values()) > 0
    assert f"| lora_compiled | tok_per_s | {gpu.cell(parts['lora_compiled']['tok_per_s'])} |" in done.stdout


def test_a_part_that_fails_or_takes_too_long_does_not_cost_the_others(monkeypatch):
    def fails(bench):
        raise ValueError("two\nlines")

    monkeypatch.setattr(gpu, "PARTS", {"fails": fails, "works": lambda b: {"n": 1}, "sleeps": lambda b: time.sleep(60),
                                       "late": lambda b: {"n": 2}})
    start = time.perf_counter()
    found = gpu.run_parts(None, list(gpu.PARTS), start + 1)
    assert time.perf_counter() - start < 10
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
    assert gpu.is_device("NVIDIA H100 80GB HBM3", "H100 SXM") and gpu.is_device("NVIDIA H200", "H200")
    assert not gpu.is_device("NVIDIA H100 PCIe", "H100 SXM") and not gpu.is_device("cpu", "H200")
