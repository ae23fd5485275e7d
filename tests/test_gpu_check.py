"""records/gpu_check.py: what is wrong with a GPU's machine is one line before anything long starts."""

from types import SimpleNamespace

import gpu_check
import pytest
import torch

import train_gpt as tg


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with one good Hopper GPU; attributes say what to break."""
    made = SimpleNamespace(free=79e9, attention="fa3", skipped=[], disk=500e9, capability=(9, 0), asked=[])
    for name, value in {"is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda d: "H100",
                        "mem_get_info": lambda i: (made.free, 80e9),
                        "get_device_capability": lambda d: made.capability}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_check, "compiler_fault", lambda device: made.compiler)
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=made.disk))
    monkeypatch.setattr(tg, "pick_dtype", lambda choice, device: torch.bfloat16)
    monkeypatch.setattr(tg, "pick_attention", lambda cfg, device, dtype: tg.Attention(
        made.attention, "somewhere", tg.attend_sdpa, made.skipped))
    made.compiler, made.folder = "", str(tmp_path / "not/yet")
    return made


def check(gpu, record: bool = False, **settings) -> str:
    return gpu_check.check(tg.Settings(artifact_dir=gpu.folder, **settings), record)


def test_a_good_machine_is_one_line(gpu):
    said = check(gpu, record=True)
    assert said == "1 x H100, 79 GB free; attention fa3 of somewhere; compiler works; 500 GB of disk free"


@pytest.mark.parametrize("change, said", [
    ({"free": 40e9}, "GPU 0: 40 of 80 GB free; another process"), ({"disk": 1e9}, "1.0 GB free, a run needs 2"),
    ({"compiler": "no C compiler"}, "no C compiler")])
def test_what_is_wrong_is_said(gpu, change, said):
    vars(gpu).update(change)
    with pytest.raises(tg.RunError, match=said):
        check(gpu)


def test_only_gpus_that_are_used_need_memory(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (80e9 * (1 - i), 80e9))
    assert "2 x H100" in check(gpu)  # the first alone
    with pytest.raises(tg.RunError, match="GPU 1: 0 of 80 GB free"):
        check(gpu, record=True)


def test_a_record_run_needs_flash_attention_on_hopper(gpu):
    gpu.attention, gpu.skipped = "sdpa", ["fa3: no build"]
    assert "attention sdpa of somewhere (not fa3: no build)" in check(gpu)
    with pytest.raises(tg.RunError, match=r"no FlashAttention works .* \(fa3: no build\).*ATTENTION=sdpa"):
        check(gpu, record=True)
    assert "attention sdpa" in check(gpu, record=True, attention="sdpa")
    gpu.capability = (8, 0)
    assert "attention sdpa" in check(gpu, record=True)


def test_compile_off_needs_no_compiler(gpu):
    gpu.compiler = "no C compiler"
    assert "H100" in check(gpu, compile="0")


def test_the_compiler_is_really_tried(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert "no C compiler" in gpu_check.compiler_fault(torch.device("cpu"))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    for wrapped, said in ((lambda f: f, ""), (lambda f: lambda x: 2 * x, "wrong numbers")):
        monkeypatch.setattr(torch, "compile", wrapped)
        assert said in gpu_check.compiler_fault(torch.device("cpu")) and bool(said) == bool(
            gpu_check.compiler_fault(torch.device("cpu")))

    def broken(function):
        raise RuntimeError("nvcc\nis  not there")

    monkeypatch.setattr(torch, "compile", broken)
    assert gpu_check.compiler_fault(torch.device("cpu")) == "torch.compile fails: nvcc is not there"


@pytest.mark.parametrize("built, listed, said", [
    (None, "GPU 0: NVIDIA H100", "is a build without CUDA"), ("13.0", "GPU 0: NVIDIA H100", "driver is older"),
    ("13.0", "", "")])
def test_a_gpu_that_pytorch_cannot_use_is_told(monkeypatch, built, listed, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *a, **o: SimpleNamespace(returncode=0, stdout=listed))
    found = gpu_check.driver_fault()
    assert said in found and bool(said) == bool(found)
    assert gpu_check.check(tg.Settings(device="cpu"), False) == "no GPU is used"
