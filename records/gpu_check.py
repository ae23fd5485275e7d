"""Check before a long run whether this machine's GPU can do it: driver, memory, disk, compiler, FlashAttention.

    python records/gpu_check.py             prints one line that says what there is, or one that says what is wrong
                                            (exit status 1)
    python records/gpu_check.py --record    also refuses a Hopper GPU on which no FlashAttention works, unless ATTENTION
                                            names a backend: PyTorch's own attention is too slow for a record run

Settings come from the environment, as for train_gpt.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

READ = {"device", "dtype", "compile", "attention", "artifact_dir", "run_id", "varlen_enabled"}  # settings
DISK_BYTES = 2e9  # logs, a checkpoint, what the compiler keeps
FREE_SHARE = 0.9  # of a GPU's memory: less, and another process holds it


def driver_fault() -> str:
    """Why PyTorch finds no GPU although the driver lists one. Empty if it finds one, or if the driver lists none."""
    if torch.cuda.is_available():
        return ""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if listed.returncode or "GPU" not in listed.stdout:
        return ""
    built = torch.version.cuda
    return (f"the driver is older than what torch {torch.__version__} needs, CUDA {built}; update it" if built else
            f"torch {torch.__version__} is a build without CUDA; install the one for CUDA")


def folder_of(path: str) -> str:
    """The folder itself, or the part of its path that already exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def disk_fault(folder: str) -> str:
    """Why a run cannot write into a folder, which may not exist yet. Empty if it can."""
    there = folder_of(folder)
    if not os.access(there, os.W_OK):
        return f"{there}: no permission to write"
    free = shutil.disk_usage(there).free
    return f"{there}: {free / 1e9:.1f} GB free, a run needs {DISK_BYTES / 1e9:.0f}" if free < DISK_BYTES else ""


def memory_fault(index: int) -> str:
    """Why the GPU has too little free memory: another process holds it. Empty if there is enough."""
    free, total = torch.cuda.mem_get_info(index)
    if free >= FREE_SHARE * total:
        return ""
    return (f"GPU {index}: {free / 1e9:.0f} of {total / 1e9:.0f} GB free; another process holds the rest (nvidia-smi "
            "lists them)")


def compiler_fault(device: torch.device) -> str:
    """Why torch.compile does not work here. Empty if it does."""
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "no C compiler, which torch.compile needs: install gcc, or take COMPILE=0, which is slow"
    x = torch.arange(64.0, device=device)
    try:
        y = torch.compile(lambda x: (2 * x).sin() + x)(x)
    except Exception as e:  # whatever a compiler that does not fit the machine raises
        return f"torch.compile fails: {' '.join(str(e).split())[:200]}"
    return "" if torch.allclose(y, (2 * x).sin() + x, atol=1e-5) else "torch.compile gives wrong numbers"


def check(cfg: tg.Settings, record: bool) -> str:
    """One line that says what the machine has. RunError that says what is wrong."""
    fault = disk_fault(cfg.artifact_dir) or ("" if cfg.device == "cpu" else driver_fault())
    if fault:
        raise tg.RunError(fault)
    if not torch.cuda.is_available() or cfg.device == "cpu":
        return "no GPU is used"
    device, used = torch.device("cuda", 0), torch.cuda.device_count() if record else 1
    fault = next(filter(None, map(memory_fault, range(used))), "")
    fault = fault or ("" if cfg.compile == "0" else compiler_fault(device))
    if fault:
        raise tg.RunError(fault)
    attention = tg.pick_attention(cfg, device, tg.pick_dtype(cfg.dtype, device))
    passed = "; ".join(attention.skipped)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if record and hopper and cfg.attention == "auto" and attention.name not in ("fa3", "fa2"):
        raise tg.RunError(f"no FlashAttention works on this Hopper GPU ({passed}); pip install -U kernels, or go on "
                          f"without it by ATTENTION={attention.name}")
    free = shutil.disk_usage(folder_of(cfg.artifact_dir)).free
    return (f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}, "
            f"{torch.cuda.mem_get_info(0)[0] / 1e9:.0f} GB free; attention {attention.name} of {attention.source}"
            f"{f' (not {passed})' if passed else ''}; {'not compiled' if cfg.compile == '0' else 'compiler works'}; "
            f"{free / 1e9:.0f} GB of disk free")


def main(arguments: list[str]) -> int:
    try:
        if arguments not in ([], ["--record"]):
            raise tg.RunError("usage: python records/gpu_check.py [--record]")
        chosen = tg.read_environment(dict(os.environ)).explicit  # the model may still lack what a script adds
        print(check(tg.Settings(**{name: chosen[name] for name in READ & set(chosen)}), bool(arguments)))
    except tg.RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
