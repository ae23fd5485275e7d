#!/usr/bin/env python3
"""Count FLOPs and least bytes of one training step by kernel family, and the least time they take on a Hopper GPU.

    python benchmarks/count.py                 prints the tables of benchmarks/README.md
    python benchmarks/count.py --write         puts them there, with the times of gpu.json beside this file
    VARLEN_ENABLED=1 python benchmarks/count.py --documents 800 --tokens 65536 --world 4

The settings of train_gpt.py come from the environment. Nothing is run: every figure is arithmetic on shapes.

What is counted:
- FLOPs are those of matrix products, with two for a multiply-add. Pointwise work runs on other units and is bound by
  its bytes.
- Least bytes: the kernels of a family read each tensor from another family once for each use, from HBM. They write each
  tensor once that goes to another family or is kept for the backward pass. No cache keeps anything from one kernel to
  the next. Only attention's scores and the head's logits never leave the chip: attention is FlashAttention, and
  cross-entropy is fused. Its loss and gradient come from one pass over the logits, or with FUSED=1 from two, since
  backward makes the logits again. Activations and the weights in products are bf16; gradients of weights and the
  optimizer's state are fp32. Vectors (scales, gains, gates) and their gradients are too small to count.
- The floor of a family is the longer of two times: its FLOPs at the tensor cores' bf16 rate, and its bytes at HBM's.
  Families run one after another, so the step's floor is the sum of theirs. The bound "if all overlapped" takes the sums
  of FLOPs and of bytes over all families instead. Kernels that fold a norm into the product beside it approach this
  bound. They can even pass it, because they save bytes too.
QAT, its penalty and SWA, which are off by default, are left out.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

HERE = Path(__file__).resolve().parent
README, MEASURED = HERE / "README.md", HERE / "gpu.json"
MARKS = "<!-- count.py: begin -->\n", "<!-- count.py: end -->\n"
FAMILIES = ("projections", "MLP", "attention", "head and loss", "norms and glue", "optimizer", "EMA", "data")
BF16, FP32, INT64 = 2, 4, 8  # bytes
LINK = 450e9  # bytes a second each way over NVLink 4 (900 GB/s in both)


class Device(NamedTuple):
    """A GPU's peaks, as its maker gives them."""

    name: str
    flops: float  # a second, dense bf16 on the tensor cores
    bandwidth: float  # bytes a second of HBM


DEVICES = (Device("H100 SXM", 989e12, 3.35e12), Device("H200", 989e12, 4.8e12))


def device_called(name: str) -> Device | None:
    """The one of DEVICES that CUDA calls so. An H100 on PCIe is none of them, for its peaks differ."""
    marks = {"H100 SXM": ("H100", "HBM3"), "H200": ("H200",)}
    return next((d for d in DEVICES if all(mark in name for mark in marks[d.name])), None)


class Work(NamedTuple):
    """The work of one step for the GPU. What is done once in a step, such as the optimizer's work, counts as backward.
    """

    flops_forward: float = 0
    flops_backward: float = 0
    bytes_forward: float = 0
    bytes_backward: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other)))

    @property
    def flops(self) -> float:
        return self.flops_forward + self.flops_backward

    @property
    def bytes(self) -> float:
        return self.bytes_forward + self.bytes_backward

    def floor(self, device: Device) -> tuple[float, str]:
        """The least seconds that the work can take, and which of the two rates sets them."""
        return max((self.flops / device.flops, "FLOPs"), (self.bytes / device.bandwidth, "bytes"))


# ----- one use of a kernel


def product(tokens: int, inputs: int, outputs: int, again: bool = False) -> Work:
    """x (tokens, in) times W (out, in) -> y (tokens, out), and its two backward products.

    FLOPs: 2·tokens·in·out forward, and twice that backward. Bytes: forward reads x and W and writes y. Backward reads
    dy and W and writes dx; it also reads dy and x and writes dW in fp32, which it adds to what is there if `again`.
    """
    x, w, y = BF16 * tokens * inputs, BF16 * inputs * outputs, BF16 * tokens * outputs
    dw = (2 if again else 1) * FP32 * inputs * outputs
    flops = 2 * tokens * inputs * outputs
    return Work(flops, 2 * flops, x + w + y, (y + w + x) + (y + x + dw))


def mlp(tokens: int, width: int, hidden: int, again: bool = False) -> Work:
    """Two products with the activation inside them: h is written once, and the activation's output never.

    In addition to the products' work, backward reads h (tokens, hidden) once for the activation's derivative.
    """
    both = product(tokens, width, hidden, again) + product(tokens, hidden, width, again)
    return both + Work(bytes_backward=BF16 * tokens * hidden)


def attention(tokens: int, heads: int, kv_heads: int, head_dim: int, keys: float) -> Work:
    """Causal attention in which a query meets `keys` keys on average.

    FLOPs: a product of the scores' size takes 2·tokens·keys·heads·head_dim. There are two forward and five backward, of
    which one computes the scores again. Bytes: forward reads q, k, v and writes y and the log-sums (fp32, one for each
    query and head). Backward reads these five and dy, and writes dq, dk, dv.
    """
    scores = 2 * tokens * keys * heads * head_dim
    qkv, y = BF16 * tokens * (heads + 2 * kv_heads) * head_dim, BF16 * tokens * heads * head_dim
    sums = FP32 * tokens * heads
    return Work(2 * scores, 5 * scores, qkv + y + sums, qkv + 2 * y + sums + qkv)


def keys_met(length: int, window: int = 0) -> float:
    """How many keys a query meets on average in a causal sequence of `length` tokens, if it sees the last `window` of
    them (0: all).
    """
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def head(tokens: int, width: int, vocab: int, again: bool = False) -> Work:
    """The head's product and the loss; the logits (tokens, vocab) are never written.

    FLOPs: those of a product, and one more forward product if backward makes the logits `again`. Bytes: forward reads
    x, W and the int64 targets and writes fp32 losses. Backward reads x and W and writes dx and dW; it has the logits'
    gradient as long as the logits are on the chip.
    """
    x, w = BF16 * tokens * width, BF16 * vocab * width
    flops = 2 * tokens * width * vocab
    return Work(flops, (3 if again else 2) * flops, x + w + tokens * (INT64 + FP32), 2 * x + w + FP32 * vocab * width)


def pointwise(tokens: int, inputs: int, outputs: int, again: int = 0) -> Work:
    """One fused kernel that reads `inputs` bf16 numbers a token and makes `outputs`; all of them belong to other
    families or are kept.

    Bytes: forward reads the inputs and writes the outputs. Backward reads the inputs, from which it computes the inner
    values again, and the outputs' gradients; it writes the inputs' gradients. `again`: the number of inputs for which
    an earlier reader has left a gradient, which is read and added to.
    """
    return Work(bytes_forward=BF16 * tokens * (inputs + outputs),
                bytes_backward=BF16 * tokens * (2 * inputs + outputs + again))


def lookup(tokens: int, rows: int, width: int, again: bool = False, stored: bool = False) -> Work:
    """Rows of an fp32 table (rows, width) by int64 ids, read into the kernel that uses them; if `stored`, written to
    HBM in bf16.

    Bytes: forward and backward each read the ids and each row once. Backward also writes the table's gradient, which it
    adds to what is there if `again`. If `stored`, the rows are also written, and their gradient is read.
    """
    table, ids = FP32 * min(tokens, rows) * width, INT64 * tokens
    out = BF16 * tokens * width if stored else 0
    return Work(bytes_forward=ids + table + out,
                bytes_backward=ids + table + out + (2 if again else 1) * FP32 * rows * width)


# ----- families


def layers_work(cfg: tg.Settings, tokens: int, loops: int, keys: float) -> dict[str, Work]:
    """Projections, MLP, attention and glue of all virtual layers, and the norm before the head.

    Glue is the work between the products, as it can be fused: the entry of a block (the previous block's last sum,
    skip, residual mix, norm), queries and keys (norm, rotary, gain), XSA and gate, and the sum and norm between
    attention and MLP.
    """
    d, dh = cfg.model_dim, cfg.model_dim // cfg.num_heads
    kv, hidden = cfg.num_kv_heads * dh, int(cfg.mlp_mult * d)
    gated = cfg.sparse_attn_gate_enabled or cfg.attn_out_gate_enabled
    gate = d if cfg.gated_attn_enabled else cfg.gate_window if gated else 0  # inputs it reads
    values = cfg.ve_layer_list() if cfg.ve_enabled else []
    order = tg.virtual_layers(cfg, loops)
    half, stream, kept = len(order) // 2, 0, 0  # tensors of the residual stream that the last block leaves
    work = dict.fromkeys(("projections", "MLP", "attention", "norms and glue"), Work())

    def add(family: str, part: Work) -> None:
        work[family] += part

    for n, (layer, visit) in enumerate(order):
        again = visit > 0
        add("projections", product(tokens, d, d + 2 * kv, again) + product(tokens, d, d, again))
        if gate:
            add("projections", gate_product(tokens, gate, cfg.num_heads))
        add("MLP", mlp(tokens, d, hidden, again))
        add("attention", attention(tokens, cfg.num_heads, cfg.num_kv_heads, dh, keys))

        parallel = layer >= cfg.parallel_start_layer
        lanes = parallel and cfg.parallel_mode != "gptj"
        skip = half <= n < 2 * half
        entry_in = stream + 1 + skip  # x0 beside the stream
        entry_out = (4 if lanes else 2) + kept  # lanes: both, each also normed; else mixed, and that normed
        lerp = cfg.recur_blend in ("alpha", "gate") and visit > 0
        add("norms and glue", pointwise(tokens, d * entry_in, d * (entry_out + lerp), d * (n > 0)))
        added = kv if layer in values else 0
        add("norms and glue", pointwise(tokens, d + kv + 2 * added, d + kv + added, added))
        xsa = kv if layer >= cfg.num_layers - cfg.xsa_last_n else 0
        if xsa or gate:
            add("norms and glue", pointwise(tokens, d + xsa + (cfg.num_heads if gate else 0), d, xsa))
        if not parallel:
            add("norms and glue", pointwise(tokens, 2 * d, 2 * d))
        elif not lanes:  # two products read the same norm
            add("norms and glue", Work(bytes_backward=BF16 * tokens * d))
        stream = 4 if lanes else 3 if parallel else 2
        looped = loops and cfg.loop_start <= layer <= cfg.loop_end
        before = cfg.recur_blend == "ab" and looped  # a visit's output waits for the next visit's end
        stream += lerp or (before and visit > 0)
        kept = int(n < half or (before and visit < loops))  # the output itself: as a skip, or for the next visit
    add("norms and glue", pointwise(tokens, d * stream, d * (1 + kept)))
    return work


def gate_product(tokens: int, inputs: int, heads: int) -> Work:
    """A product with so few outputs that only its inputs' columns and their gradients count; the gradients are added to
    those already there.
    """
    x, flops = BF16 * tokens * inputs, 2 * tokens * inputs * heads
    return Work(flops, 2 * flops, x + BF16 * tokens * heads, 3 * x + BF16 * tokens * heads)


def ends_work(cfg: tg.Settings, tokens: int) -> dict[str, Work]:
    """The work before the first layer and after the last: tables, their projections, the head and the loss."""
    d, e = cfg.model_dim, cfg.embedding_dim or cfg.model_dim
    kv = cfg.num_kv_heads * (d // cfg.num_heads)
    products, glue, inputs = Work(), lookup(tokens, cfg.vocab_size, e, cfg.tie_embeddings, e != d), 0
    if e != d:
        products += product(tokens, e, d) + product(tokens, d, e)
        inputs += d
    if cfg.bigram_vocab_size:
        glue += lookup(tokens, cfg.bigram_vocab_size, cfg.bigram_dim, stored=True)
        products += product(tokens, cfg.bigram_dim, d)
        inputs += d
    if cfg.smear_gate_enabled and cfg.smear_gate_mode == "input":  # inside the kernel that norms the input
        flops = 2 * tokens * cfg.gate_window
        products += Work(flops, 2 * flops)
    if cfg.ve_enabled:
        for rows in filter(None, (cfg.vocab_size, cfg.ve_bigram_rows)):
            glue += lookup(tokens, rows, cfg.ve_dim or kv * len(cfg.ve_layer_list()), stored=True)
        products += product(tokens, cfg.ve_dim, kv) if cfg.ve_dim else Work()
    glue += pointwise(tokens, inputs, d)
    # FUSED=1 keeps no logits for backward, which makes each chunk of them a second time
    return {"projections": products, "norms and glue": glue,
            "head and loss": head(tokens, e, cfg.vocab_size, again=cfg.fused)}


def newton_schulz(rows: int, cols: int, steps: int) -> tuple[int, int]:
    """FLOPs and bytes to orthogonalise one matrix with short side r and long side c.

    The three products of an iteration are X Xᵀ (2r²c), A A (2r³) and B X (2r²c). Each reads its operands and writes its
    result in bf16, and sums are fused, which makes 3rc + 4r² numbers.
    """
    r, c = min(rows, cols), max(rows, cols)
    return steps * (4 * r * r * c + 2 * r**3), steps * BF16 * (3 * r * c + 4 * r * r)


def optimizer_work(cfg: tg.Settings, shapes: dict[str, tuple[int, ...]], world: int) -> Work:
    """Clipping, Muon on a GPU's share of each bank's slices (the one with the fewest queries and keys, which are
    orthogonalised head by head), and AdamW on tables and vectors, which every GPU updates.

    Bytes for each weight of the share: the gradient for the norm, 4; gradient and momentum read, momentum and
    Nesterov's sum written, 14; and Newton-Schulz. Bytes for each weight of the whole bank: the gathered fp32 update and
    the weight read, the weight written in fp32 and, for the products, in bf16, 14. AdamW: the gradient for the norm, 4;
    weight, gradient and two moments read, and all but the gradient written, 28; a table also in bf16, 2.
    """
    flops, moved = 0, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if name.endswith("_bank"):
            slices, rows, cols = shape
            share = -(-slices // world)
            whole = min(slices - tg.slices_by_heads(cfg, name), share)  # of the GPU that has most of them
            width = cfg.model_dim // cfg.num_heads
            for matrices, height in (whole, rows), ((share - whole) * (rows // width), width):
                ns_flops, ns_bytes = newton_schulz(height, cols, cfg.muon_backend_steps)
                flops += matrices * ns_flops
                moved += matrices * ns_bytes
            moved += share * (4 + 14) * rows * cols + 14 * size
        else:
            table = name in ("tok_emb", "head") or name.endswith("_table")
            moved += (32 + BF16 * table) * size
    return Work(flops_backward=flops, bytes_backward=moved)


def parameter_shapes(cfg: tg.Settings) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter. They come from the model itself, which is made without memory for its weights."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in tg.GPT(cfg).named_parameters()}


def count_step(cfg: tg.Settings, tokens: int, world: int = 1, loops: int | None = None, window: int = 0,
               documents: int = 0, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Work]:
    """The work of each family in one step, on one of `world` GPUs that takes `tokens` tokens.

    `loops`: how often looped layers run again; None: NUM_LOOPS. `window`: how many tokens back attention reaches; 0:
    all. `documents`: tokens of a document, if attention stays inside documents; 0 or more than TRAIN_SEQ_LEN:
    TRAIN_SEQ_LEN.
    """
    shapes = shapes or parameter_shapes(cfg)
    keys = keys_met(min(documents or cfg.train_seq_len, cfg.train_seq_len), window)
    layers = layers_work(cfg, tokens, cfg.num_loops if loops is None else loops, keys)
    ends, weights = ends_work(cfg, tokens), sum(math.prod(shape) for shape in shapes.values())
    work = {family: layers.get(family, Work()) + ends.get(family, Work()) for family in FAMILIES}
    work["optimizer"] = optimizer_work(cfg, shapes, world)
    if cfg.ema_decay:  # weight and average read, average written
        work["EMA"] = Work(bytes_backward=3 * FP32 * weights)
    ids = (2 * INT64 + (FP32 if cfg.varlen_enabled else 0)) * tokens  # written: ids, targets, and which document
    work["data"] = Work(bytes_forward=ids)
    return work


def total(work: dict[str, Work]) -> Work:
    return sum(work.values(), Work())


def model_flops(work: dict[str, Work]) -> float:
    """The FLOPs that count for MFU. The optimizer's do not, nor do those that compute attention's scores and the head's
    logits a second time.
    """
    head = work["head and loss"]
    again = 0.5 * work["attention"].flops_forward + head.flops_backward - 2 * head.flops_forward
    return total(work).flops - again - work["optimizer"].flops


def exchanged(shapes: dict[str, tuple[int, ...]], world: int) -> float:
    """The bytes that each GPU sends in a step, as train_gpt.py exchanges them, in fp32.

    Banks are padded to a multiple of the GPUs. Their gradients take a reduce-scatter and their updates an all-gather,
    each (N-1)/N of their size. All other parameters take an all-reduce, which is twice that.
    """
    banks = sum(-(-s[0] // world) * world * s[1] * s[2] for name, s in shapes.items() if name.endswith("_bank"))
    small = sum(math.prod(s) for name, s in shapes.items() if not name.endswith("_bank"))
    return FP32 * 2 * (banks + small) * (world - 1) / world


# ----- the report


def floors(work: dict[str, Work], device: Device, tokens: int, sent: float, world: int) -> dict[str, float]:
    """The step's floors in seconds, the tokens a second at each, and how much of `world` GPUs' speed the exchange
    leaves.
    """
    step, everything, link = sum(w.floor(device)[0] for w in work.values()), total(work), sent / LINK
    overlapped = everything.floor(device)[0]
    return {"seconds": step, "tokens_per_second": tokens / step, "seconds_overlapped": overlapped,
            "tokens_per_second_overlapped": tokens / overlapped, "exchange_seconds": link,
            "scaling": step / (step + link), "tokens_per_second_all": world * tokens / (step + link)}


def count_report(cfg: tg.Settings, args: argparse.Namespace) -> list[dict]:
    """The figures of the tables and of --json: for the layers without loops and, with NUM_LOOPS, with loops."""
    shapes, reports = parameter_shapes(cfg), []
    sent = exchanged(shapes, args.world)
    for loops in sorted({0, cfg.num_loops}):
        work = count_step(cfg, args.tokens, args.world, loops, args.window, args.documents, shapes)
        reports.append({
            "layers": len(tg.virtual_layers(cfg, loops)), "physical_layers": cfg.num_layers, "tokens": args.tokens,
            "world": args.world, "parameters": sum(math.prod(shape) for shape in shapes.values()),
            "families": work, "total": total(work), "model_flops_per_token": model_flops(work) / args.tokens,
            "bytes_sent": sent,
            "floors": {d.name: floors(work, d, args.tokens, sent, args.world) for d in DEVICES}})
    return reports


def markdown(report: dict, measured: dict | None) -> str:
    """One table with the lines under it. `measured` is what benchmarks/gpu.py wrote."""
    work, sums, layers = report["families"], report["total"], report["layers"]
    first, *others = DEVICES
    looped = f" ({report['physical_layers']} physical)" if layers != report["physical_layers"] else ""
    whole = report["floors"][first.name]["seconds"]
    device = f", ms on {measured['device']}" if measured else ""
    times = (measured["parts"].get("families") or {}).get(str(layers)) if measured else None
    lines = [f"### {layers} layers{looped}, {report['tokens']:,} tokens a GPU, {report['world']} GPUs, "
             f"{report['parameters']:,} parameters", "",
             f"| family | TFLOP, forward + backward | GB, forward + backward | FLOP/byte | {first.name} floor, ms | of "
             f"the step | bound by | {' | '.join(f'{d.name} floor, ms' for d in others)} | today's time{device} |",
             "|---|---|---|---|---|---|---|" + "---|" * len(others) + "---|"]
    for family, w in [*work.items(), ("all", sums)]:
        seconds = [sum(part.floor(d)[0] for part in (work.values() if family == "all" else [w])) for d in DEVICES]
        bound = w.floor(first)[1] if w.bytes else ""
        today = f"{times[family]:.2f}" if times and family in times else "not run on a GPU"
        lines.append(
            f"| {family} | {pair(w.flops_forward, w.flops_backward, 1e12)} | "
            f"{pair(w.bytes_forward, w.bytes_backward, 1e9)} | {w.flops / w.bytes if w.bytes else 0:,.0f} | "
            f"{1e3 * seconds[0]:.2f} | {seconds[0] / whole:.0%} | {'' if family == 'all' else bound} | "
            f"{' | '.join(f'{1e3 * s:.2f}' for s in seconds[1:])} | {today} |")
    lines.append("")
    for d in DEVICES:
        f = report["floors"][d.name]
        lines.append(
            f"- {d.name}: {1e3 * f['seconds']:.1f} ms a step at the floors one after another, "
            f"{f['tokens_per_second'] / 1e6:.2f} M tokens/s a GPU; {1e3 * f['seconds_overlapped']:.1f} ms and "
            f"{f['tokens_per_second_overlapped'] / 1e6:.2f} M if all overlapped ({sums.floor(d)[1]} bind, balance "
            f"{d.flops / d.bandwidth:.0f} FLOP/byte, the step's {sums.flops / sums.bytes:.0f}).")
    f = report["floors"][first.name]
    lines += [
        f"- Model FLOPs for MFU: {report['model_flops_per_token'] / 1e6:.1f} M a token.",
        f"- Exchange: each GPU sends {report['bytes_sent'] / 1e6:.0f} MB a step, {1e3 * f['exchange_seconds']:.2f} ms "
        f"at {LINK / 1e9:.0f} GB/s each way; with none of it hidden {report['world']} {first.name} reach "
        f"{f['scaling']:.1%} of {report['world']} times one, {f['tokens_per_second_all'] / 1e6:.1f} M tokens/s."]
    if times:
        lines.append(f"- Of today's step {times['other']:.2f} ms go to kernels not told apart; for {times['idle']:.2f} "
                     "ms none runs.")
    return "\n".join(lines) + "\n"


def pair(forward: float, backward: float, unit: float) -> str:
    return f"{forward / unit:.2f} + {backward / unit:.2f}"


def read_measured(path: Path) -> dict | None:
    """What benchmarks/gpu.py wrote, if the file is there. RunError if it was not measured on a GPU."""
    if not path.exists():
        return None
    measured = json.loads(path.read_text())
    if not isinstance(measured, dict) or not {"check_only", "device", "parts"} <= measured.keys():
        raise tg.RunError(f"{path}: not written by benchmarks/gpu.py")
    if measured["check_only"]:
        raise tg.RunError(f"{path}: written on a CPU as a check, its times mean nothing")
    return measured


def with_tables(text: str, tables: str) -> str:
    """The README's text with these tables between the markers."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + tables + MARKS[1] + rest.split(MARKS[1])[1]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=98304, help="tokens of a step on one GPU (default: 98304)")
    parser.add_argument("--world", type=int, default=8, help="GPUs (default: 8)")
    parser.add_argument("--window", type=int, default=0, help="tokens that attention reaches back; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="tokens of a document; 0: TRAIN_SEQ_LEN")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="what benchmarks/gpu.py --json wrote")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    args = parser.parse_args(arguments)
    if min(args.tokens, args.world) < 1 or min(args.window, args.documents) < 0:
        parser.error("--tokens and --world take at least 1, --window and --documents at least 0")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        reports = count_report(tg.read_settings(dict(os.environ))[0], args)
        tables = "\n".join(markdown(report, read_measured(args.measured)) for report in reports)
    except (tg.RunError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        for report in reports:
            report["families"] = {name: w._asdict() for name, w in report["families"].items()}
            report["total"] = report["total"]._asdict()
        print(json.dumps({"devices": [d._asdict() for d in DEVICES], "reports": reports}, indent=1))
    elif args.write:
        README.write_text(with_tables(README.read_text(), tables))
    else:
        print(tables, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
