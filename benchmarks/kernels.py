"""Two kernels that train_gpt.py may come to use, and the check of all five: its three and these.

norm_rotate makes one pass of the norm, rotary and gain of queries or keys; mlp has the activation in the product before
it and its derivative in the product that comes backward. They move into train_gpt.py if gpu.py shows on a GPU that the
compiled step gains by them, and go otherwise: they have not run on one. Little speaks for the MLP so far: PR 1679 found
five fused variants, PR 1450's among them, no faster than what torch.compile makes.
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

try:
    import triton
    import triton.language as tl
except ImportError:  # as in train_gpt.py: the module loads, the kernels cannot run
    triton = None

constexpr, read, write = tg.constexpr, tg.read, tg.write  # kernels find what they call among a module's own names


@tg.kernel
def rotate_kernel(x, gain, cos, sin, g, out, dots, rows, length, heads, HALF: constexpr, D: constexpr,
                  WIDTH: constexpr, ROWS: constexpr, EPS: constexpr, GRAD: constexpr):
    """norm_rotate() on x (rows, D), one row a head -> out; or with GRAD, from the gradient g, that of x there and each
    row's share of its gain's in dots.
    """
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at, keep = row.to(tl.int64) * D + col, (row < rows) & (col < D)
    first, turned = col < HALF, keep & (col < 2 * HALF)
    shift = tl.where(first, HALF, -HALF)
    angle = row // heads % length * HALF + tl.minimum(col, col + shift)
    cosine = tl.where(turned, read(cos + angle, turned), 1.0)
    sine = tl.where(first, 1.0, -1.0) * read(sin + angle, turned)
    xs = read(x + at, keep)
    r = 1 / tl.sqrt(tl.sum(xs * xs, 1, keep_dims=True) / D + EPS)
    if GRAD:  # turned back
        value = read(g + at, keep) * cosine - read(g + at + shift, turned) * sine
        dot = r * tl.sum(value * xs, 1, keep_dims=True)
        write(dots + row, dot, row < rows)
        scale = read(gain + row % heads, row < rows)
        write(out + at, scale * r * (value - r * xs * dot / D), keep)
    else:
        value = xs * cosine + read(x + at + shift, turned) * sine
        write(out + at, read(gain + row % heads, row < rows) * r * value, keep)


@tg.kernel
def mlp_kernel(a, b, h, out, act, M, N, K, step_k, step_n, BM: constexpr, BN: constexpr, BK: constexpr,
               GRAD: constexpr):
    """The product p (M, N) of a (M, K) and b, whose element (k, n) is at k step_k + n step_n -> out, and with it
    act = squared_leaky_relu(p); or with GRAD p is act's gradient, -> out is that of h, and act is of h.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i, j = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    i, j = tl.swizzle2d(i, j, tiles_m, tiles_n, 8)  # programs at work together share rows and columns
    row, col = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None], (j * BN + tl.arange(0, BN))[None, :]
    p = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        left = tl.load(a + row * K + k[None, :], (row < M) & (k[None, :] < K), other=0.0)
        right = tl.load(b + k[:, None] * step_k + col * step_n, (k[:, None] < K) & (col < N), other=0.0)
        p = tl.dot(left, right, p, input_precision="ieee")
    at, keep = row * N + col, (row < M) & (col < N)
    value = read(h + at, keep) if GRAD else p.to(out.dtype.element_ty).to(tl.float32)
    slope = tl.where(value < 0, 0.5, 1.0)
    write(act + at, slope * slope * value * value, keep)
    write(out + at, 2 * slope * slope * value * p if GRAD else p, keep)


def run_norm_rotate(_: float, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, *grads: Tensor) -> list[Tensor]:
    length, heads, d = x.shape[1:]
    tile, rows, out = tg.tiles(d), x.numel() // d, torch.empty_like(x)
    dots = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rotate_kernel[(triton.cdiv(rows, tile[2]),)](x, gain, cos, sin, *(grads or [out]), out, dots, rows, length, heads,
                                                 cos.size(-1), *tile, tg.NORM_EPS, bool(grads))
    return [out, dots.sum((0, 1)).to(gain.dtype)] if grads else [out]


def run_mlp(_: float, x: Tensor, up: Tensor, down: Tensor, *rest: Tensor) -> list[Tensor]:
    """Forward also returns h (B, T, hidden), before the activation, and backward is given it ahead of the gradient."""
    h, left = rest or (x, x)
    out, act = (x.new_empty(*x.shape[:-1], len(up)) for _ in range(2))
    b, steps = (down, down.stride()) if rest else (up, up.stride()[::-1])
    left = left.flatten(0, -2)
    # backward half as wide, as its registers spill otherwise (ptxas, sm_90); fp32 is for checks, and large tiles of it
    # do not fit a GPU's shared memory
    tile = (128, 128 if rest else 256, 64) if x.is_cuda and x.dtype == torch.bfloat16 else (32, 32, 32)
    programs = triton.cdiv(len(left), tile[0]) * triton.cdiv(len(up), tile[1])
    mlp_kernel[(programs,)](left, b, h, out, act, len(left), *up.shape, *steps, *tile, bool(rest), num_warps=8)
    if not rest:
        return [F.linear(act, down), out]
    return [out @ up, out.flatten(0, -2).mT @ x.flatten(0, -2), left.mT @ act.flatten(0, -2)]


def candidate_ops(base: tg.Ops) -> tg.Ops:
    """These forms, norm_rotate and the MLP by the kernels here."""
    rotate = tg.fused("norm_rotate", run_norm_rotate, 2, lambda x, *_: [x])
    mlp = tg.fused("mlp", run_mlp, 3, lambda x, up, _: [x, x.new_empty(*x.shape[:-1], len(up))], kept=1)
    return base._replace(
        norm_rotate=lambda x, gain, cos, sin: rotate(0.0, x, x.new_ones(x.size(2)) if gain is None else gain, cos,
                                                     sin)[0],
        mlp=lambda x, up, down: mlp(0.0, x, up, down)[0])


# ----- the check

NAMES = ("join", "exclude_self", "head_losses", "norm_rotate", "mlp")


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(tg.squared_leaky_relu(F.linear(x, up)), down)


def plain_head(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    return tg.cross_entropy(F.linear(x, weight), targets, cap)


class Sizes(NamedTuple):
    """Of the tensors in a check; odd ones are those that fill no tile."""

    rows: int = 3
    length: int = 7
    width: int = 300
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 20
    half: int = 3  # pairs of dimensions that rotate
    hidden: int = 70
    vocab: int = 8209  # more than the 8,192 columns that the loss takes at a time

    @classmethod
    def of(cls, cfg: tg.Settings) -> "Sizes":
        """One training window of this model."""
        return cls(1, cfg.train_seq_len, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads,
                   cfg.rope_dims // 2, int(cfg.mlp_mult * cfg.model_dim), cfg.vocab_size)


class Case(NamedTuple):
    """What a check runs: a form as `run(ops, *inputs)` has it, and by name its inputs and its outputs.

    Gradients are of the inputs in `learned`.
    """

    run: Callable
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    learned: tuple[str, ...]


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Every form that has a kernel, on random inputs of `dtype` of the kind that a model has."""
    draw, (rows, length, d, heads, kv_heads, dh, half, hidden, vocab) = torch.Generator().manual_seed(0), sizes

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=draw)).to(device, dtype)

    def wide(*shape: int) -> Tensor:
        return normal(rows, length, *shape)

    targets = torch.randint(vocab, (rows, length), generator=draw)
    targets[:, ::4] = tg.IGNORE
    angle = torch.rand(length, half, generator=draw) * 6
    scale = torch.rand(rows, length, heads, generator=draw)
    return {
        "join": Case(lambda ops, x, z, a, b: ops.join(x, z, a, b, 0.7), {
            "x": wide(d), "z": wide(d), "a": normal(d, mean=1.0), "b": normal(d)}, ("y", "n"), ("x", "z", "a", "b")),
        "exclude_self": Case(lambda ops, *inputs: [ops.exclude_self(*inputs)], {
            "y": wide(heads, dh), "v": wide(kv_heads, dh), "gate": scale.to(device, dtype)}, ("out",),
            ("y", "v", "gate")),
        "head_losses": Case(lambda ops, *inputs: [(ops.head_losses or plain_head)(*inputs, 15.0)], {
            "x": wide(d), "weight": normal(vocab, d, scale=4 * d**-0.5), "targets": targets.to(device)}, ("losses",),
            ("x", "weight")),
        "norm_rotate": Case(lambda ops, *inputs: [ops.norm_rotate(*inputs)], {
            "x": wide(heads, dh), "gain": normal(heads, mean=2.0), "cos": angle.cos().to(device, dtype),
            "sin": angle.sin().to(device, dtype)}, ("out",), ("x", "gain")),
        "mlp": Case(lambda ops, *inputs: [(ops.mlp or plain_mlp)(*inputs)], {
            "x": wide(d), "up": normal(hidden, d, scale=d**-0.5), "down": normal(d, hidden, scale=hidden**-0.5)},
            ("out",), ("x", "up", "down")),
    }


def derive(case: Case, ops: tg.Ops, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of a case in `dtype`, and as `d<input>` the gradients of its learned inputs, for random ones of its
    outputs. All that is random has been rounded to the dtype of the case's inputs, whatever `dtype` is.
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
    """Relative error of one form of `ops`, computing in `dtype`, by tensor: an output or, as `d<input>`, a gradient.

    Truth is the plain form in fp32 on the same inputs, already rounded to `dtype`: with tg.PLAIN this says how far the
    plain form itself is from it. An error is the norm of the difference over that of the truth. Empty where the form
    cannot be checked.
    """
    if name == "mlp" and dtype == torch.bfloat16 and device.type == "cpu":
        return {}  # Triton's interpreter multiplies bf16 wrongly in tl.dot (and cuts off where a GPU rounds)
    case = cases(sizes or Sizes(), device, dtype)[name]
    truth, ours = derive(case, tg.PLAIN, torch.float32), derive(case, ops, dtype)
    return {what: relative_error(ours[what], truth[what]) for what in truth}


def is_right(errors: dict[str, float], plain: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether a kernel's errors are such as come of rounding, given the plain form's in the same dtype."""
    unit = 2**-8 if dtype == torch.bfloat16 else 2e-5  # for fp32 some room for a GPU's short ways to divide and exp
    return all(error <= 2 * plain[what] + unit for what, error in errors.items())


def compare(name: str, ops: tg.Ops, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None
            ) -> dict[str, bool | float | str]:
    """The largest of a kernel's errors and of its plain form's, of outputs and of gradients; `ok`: the kernel is right.
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
    """Norm of the difference over that of the truth; infinite where it is not a number."""
    truth = truth.detach().double()
    error = float((found.detach().double() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf


def can_run(device: torch.device) -> bool:
    """Whether Triton is there and there is a GPU or its interpreter to run kernels on."""
    return triton is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
