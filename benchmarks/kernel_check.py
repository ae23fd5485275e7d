"""Check train_gpt.py's kernels against their plain forms; gpu.py runs this check on a GPU.

The module is not called kernels.py: beside a script that runs, this name would hide the package from which
FlashAttention 3 comes.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

NAMES = ("mlp", "head_losses")


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(tg.squared_leaky_relu(F.linear(x, up)), down)


def plain_head(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    return tg.cross_entropy(F.linear(x, weight), targets, cap)


class Sizes(NamedTuple):
    """Sizes of the tensors in a check; odd sizes are those that fill no tile."""

    rows: int = 3
    length: int = 7
    width: int = 300
    hidden: int = 70
    vocab: int = 8209  # more than the 8,192 columns that the loss takes at a time

    @classmethod
    def of(cls, cfg: tg.Settings) -> "Sizes":
        """One training window of this model."""
        return cls(1, cfg.train_seq_len, cfg.model_dim, int(cfg.mlp_mult * cfg.model_dim), cfg.vocab_size)


class Case(NamedTuple):
    """One case of a check: a form as `run(ops, *inputs)`, its inputs by name, and the names of its outputs.

    Gradients are taken of the inputs in `learned`.
    """

    run: Callable
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    learned: tuple[str, ...]


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Every form that has a kernel, on random inputs of `dtype` of the kind that a model has."""
    draw, (rows, length, d, hidden, vocab) = torch.Generator().manual_seed(0), sizes

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=draw)).to(device, dtype)

    targets = torch.randint(vocab, (rows, length), generator=draw)
    targets[:, ::4] = tg.IGNORE
    return {
        "mlp": Case(lambda ops, *inputs: [(ops.mlp or plain_mlp)(*inputs)], {
            "x": normal(rows, length, d), "up": normal(hidden, d, scale=d**-0.5),
            "down": normal(d, hidden, scale=hidden**-0.5)}, ("out",), ("x", "up", "down")),
        "head_losses": Case(lambda ops, *inputs: [(ops.head_losses or plain_head)(*inputs, 15.0)], {
            "x": normal(rows, length, d), "weight": normal(vocab, d, scale=4 * d**-0.5),
            "targets": targets.to(device)}, ("losses",), ("x", "weight")),
    }


def derive(case: Case, ops: tg.Ops, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs of a case in `dtype`, and the gradients of its learned inputs as `d<input>`, for random gradients of
    the outputs. All random numbers are rounded to the dtype of the case's inputs, whatever `dtype` is.
    """
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.inputs.items()}
    learned = [inputs[name].detach().requires_grad_() for name in case.learned]
    outputs = case.run(ops, *(inputs | dict(zip(case.learned, learned))).values())
    draw, rounded = torch.Generator().manual_seed(1), next(iter(case.inputs.values())).dtype
    grads = [torch.randn(y.shape, generator=draw).to(y.device, rounded).to(y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, learned, grads)
    return dict(zip(case.outputs, outputs)) | {f"d{name}": g for name, g in zip(case.learned, found)}


def check(name: str, ops: tg.Ops, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None
          ) -> dict[str, float]:
    """Relative error of one form of `ops` that computes in `dtype`, by tensor: an output or, as `d<input>`, a gradient.

    The truth is the plain form in fp32 on the same inputs, which are already rounded to `dtype`. With tg.PLAIN the
    result is the error of the plain form itself. An error is the norm of the difference over the norm of the truth. The
    result is empty if the form cannot be checked.
    """
    if name == "mlp" and dtype == torch.bfloat16 and device.type == "cpu":
        return {}  # Triton's interpreter multiplies bf16 wrongly in tl.dot (and cuts off where a GPU rounds)
    case = cases(sizes or Sizes(), device, dtype)[name]
    truth, ours = derive(case, tg.PLAIN, torch.float32), derive(case, ops, dtype)
    return {what: relative_error(ours[what], truth[what]) for what in truth}


def is_right(errors: dict[str, float], plain: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether a kernel's errors can come from rounding, given those of the plain form in the same dtype. Errors that
    are not finite never can, even if the plain form's are not finite either.
    """
    unit = 2**-8 if dtype == torch.bfloat16 else 2e-5  # for fp32 some room for a GPU's short ways to divide and exp
    return all(error <= 2 * plain[what] + unit < math.inf for what, error in errors.items())


def compare(name: str, ops: tg.Ops, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None
            ) -> dict[str, bool | float | str]:
    """The largest errors of a kernel and of its plain form, for outputs and for gradients. `ok`: the kernel is right.
    """
    found, plain = (check(name, form, device, dtype, sizes) for form in (ops, tg.PLAIN))
    if not found:
        return {"skipped": "the interpreter multiplies bf16 wrongly"}
    row = {"ok": is_right(found, plain, dtype)}
    for form, errors in (("", found), ("plain_", plain)):
        grads = [error for what, error in errors.items() if what.startswith("d")]
        values = [error for what, error in errors.items() if not what.startswith("d")]
        row |= {f"{form}values": max(values), f"{form}gradients": max(grads)}
    return row


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; the norm itself where the truth is 0, as when every target is
    IGNORE; infinite where it is not a number.
    """
    truth = truth.detach().double()
    error = float((found.detach().double() - truth).norm() / (truth.norm() if truth.any() else 1.0))
    return error if math.isfinite(error) else math.inf


def can_run(device: torch.device) -> bool:
    """Whether Triton is installed and there is a GPU, or its interpreter, to run kernels on."""
    return tg.triton is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
