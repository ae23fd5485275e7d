#!/usr/bin/env python3
"""Report what torch.compile plans for a training step on an H100: bytes by kind of kernel, with and without FUSED=1.

    NUM_LOOPS=2 python benchmarks/plan.py              plain forms, whole and by parts, each kernel of FUSED=1, all
    NUM_LOOPS=2 python benchmarks/plan.py plain mlp --list

The script needs a CUDA build of torch, but no GPU. Inductor's passes and its scheduler run on fake tensors under an
H100's properties, up to the list of kernels to make, and stop there. Nothing is compiled further, run or timed. So the
report says how many bytes the kernels move, and nothing about their speed. Settings come from the environment.

The bytes are the scheduler's own: every tensor that a kernel reads or writes counts once, whatever the caches hold. The
step is split into forward and backward as for a CPU, and its tensors are then moved to the GPU. Dense attention in bf16
without documents is one opaque operator: it takes q, k, v and gives y, and backward takes q, k, v, y and y's gradient
and gives three gradients. The operators of FUSED=1 are opaque too, and inside() adds the bytes that they move inside.
Each such operator counts as one kernel, whatever it launches. Optimizer and EMA are left out; count.py has them.

`parts` is the forward pass compiled by its parts, as test-time training uses it. Each graph is planned once and counts
as often as it is called; the work that joins their gradients is left out. Seconds are those of planning on one thread
of this machine: tracing and Inductor's own work, without Triton's.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read when kernels are made, on import; plans are for the compiler
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

PRODUCTS, ATTENTION, REDUCTIONS, POINTWISE, FUSED, OTHER = KINDS = (
    "matrix products", "attention", "reductions", "pointwise", "kernels of FUSED=1", "other")
FORMS = ("plain", "parts", *tg.Ops._fields, "fused")
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20,
    is_multi_gpu_board=0, is_integrated=0, gcnArchName="", uuid="", pci_bus_id=0, pci_device_id=0, pci_domain_id=0)


def inside(cfg: tg.Settings, tokens: int, name: str, backward: bool) -> int:
    """The bytes that an operator of FUSED=1 moves in addition to reading its inputs and writing its outputs once, as
    run_mlp() and run_head_losses() do it.

    mlp, with n = 2 * tokens * hidden: forward writes act and reads it, 2 n. Backward writes dh and act, reads dh for
    two products and act for one, 5 n, and moves the gradient, as wide as the model, a second time. head_losses: none,
    since the logits of a chunk (HEAD_CHUNK) stay in L2. It is assumed that the weight's gradient, to which each chunk
    is added, stays there too.
    """
    if name != "mlp":
        return 0
    n = 2 * tokens * int(cfg.mlp_mult * cfg.model_dim)
    return 5 * n + 2 * tokens * cfg.model_dim if backward else 2 * n


def pretend_h100() -> None:
    from torch._dynamo.device_interface import CudaInterface

    ask = {"get_device_properties": H100, "current_device": 0}
    for name, answer in ask.items():
        for place in (CudaInterface, CudaInterface.Worker):
            setattr(place, name, staticmethod(lambda *_, answer=answer, **__: answer))
    CudaInterface.get_compute_capability = staticmethod(lambda *_, **__: 90)
    CudaInterface.is_available = staticmethod(lambda: True)
    for name, answer in (ask | {"get_device_capability": (9, 0), "device_count": 1}).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def make_attention() -> Callable:
    """Attention as two opaque differentiable operators, called as FlashAttention is."""
    forward = torch.library.custom_op("plan::attention", lambda q, k, v, cu: torch.empty_like(q), mutates_args=(),
                                      schema="(Tensor q, Tensor k, Tensor v, Tensor? cu) -> Tensor")
    backward = torch.library.custom_op(
        "plan::attention_backward", lambda q, k, v, cu, y, g: tuple(map(torch.empty_like, (q, k, v))), mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v, Tensor? cu, Tensor y, Tensor g) -> (Tensor, Tensor, Tensor)")
    forward.register_fake(lambda q, k, v, cu: q.new_empty(q.shape))
    backward.register_fake(lambda q, k, v, cu, y, g: tuple(t.new_empty(t.shape) for t in (q, k, v)))
    forward.register_autograd(lambda ctx, g: (*backward(*ctx.saved_tensors, g), None),
                              setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output))
    return tg.attend_flash(lambda q, k, v, causal: forward(q, k, v, None),
                           lambda q, k, v, cu_seqlens_q, **_: forward(q, k, v, cu_seqlens_q))


def on_gpu(graph: torch.fx.GraphModule, inputs: list) -> tuple[torch.fx.GraphModule, list]:
    """A graph that was made for the CPU, and its fake inputs, moved to the GPU."""
    graph = copy.deepcopy(graph)
    with next(t.fake_mode for t in inputs if hasattr(t, "fake_mode")):
        inputs = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda")
                  if isinstance(t, torch.Tensor) else t for t in inputs]
    for node in graph.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    return graph, inputs


class Planned(NamedTuple):
    """One kernel. `name` is the operator that it calls, if it is not Inductor's own."""

    kind: str
    name: str
    size: int
    operations: str


def schedule(graph: torch.fx.GraphModule, inputs: list) -> list[Planned]:
    """The kernels that Inductor's scheduler makes of a graph."""
    from torch._inductor import compile_fx, debug
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    shapes = compile_fx.shape_env_from_inputs(inputs)
    graph, inputs = on_gpu(graph, inputs)
    mode = compile_fx.fake_tensor_prop(graph, inputs, force_allow_non_fake_inputs=True)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, False)
    compile_fx.record_original_output_strides(graph)
    lowered = GraphLowering(graph, shape_env=shapes)
    with (V.set_graph_handler(lowered), V.set_real_inputs(inputs), V.set_fake_mode(mode),
          V.set_debug_handler(debug.DebugContext())):
        lowered.run(*inputs)
        lowered._update_scheduler()
        rows = []
        for node in lowered.scheduler.nodes:
            parts, size, name = node.get_nodes(), node.get_read_write_buffers_sizes(), ""
            if node.is_extern():
                name = str(getattr(node.node, "op_overload", None) or getattr(node.node, "python_kernel_name", None))
                starts = dict.fromkeys(("aten.mm", "aten.bmm", "aten._scaled_mm"), PRODUCTS)
                starts |= {"plan.": ATTENTION, "train_gpt.": FUSED}
                kind = next((k for start, k in starts.items() if name.startswith(start)), OTHER)
            else:
                kind = REDUCTIONS if any(part.is_reduction() for part in parts) else POINTWISE
            origins = [getattr(o.target, "__name__", str(o.target)).split(".")[0]
                       for part in parts for o in getattr(part.node, "origins", ())]
            if size:  # others only name what another made
                rows.append(Planned(kind, name, size, " ".join(dict.fromkeys(origins))))
    return rows


class Plan(NamedTuple):
    """All kernels of a step; those of a graph count as often as the graph is called."""

    forward: list[Planned]
    backward: list[Planned]
    graphs: int
    seconds: float


def plan(cfg: tg.Settings, form: str, tokens: int, loops: int, attend: Callable) -> Plan:
    """The kernels of a training step, with the bytes that operators of FUSED=1 move inside."""
    from torch._inductor import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode

    ops, found, made = tg.fused_ops() if form == "fused" else tg.PLAIN, ([], []), []
    if form in tg.Ops._fields:
        ops = ops._replace(**{form: getattr(tg.fused_ops(), form)})

    def keep(graph: torch.fx.GraphModule, inputs: list, is_backward: bool = False, **_) -> Callable:
        rows, run = schedule(graph, inputs), compile_fx.make_boxed_func(graph.forward)
        more = [inside(cfg, tokens, row.name.split(".")[1], is_backward) if row.kind == FUSED else 0 for row in rows]
        made.append([row._replace(size=row.size + size) for row, size in zip(rows, more)])

        def called(inputs: list, rows: list[Planned] = made[-1]) -> list:
            found[is_backward].extend(rows)
            return run(inputs)

        called._boxed_call = True
        return called

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx.compile_fx(graph, inputs, inner_compile=keep)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tg.GPT(cfg, attend, torch.bfloat16, 1, ops)
        for name, p in list(model.named_parameters()):
            setattr(model, name, torch.nn.Parameter(torch.empty(p.shape)))
        ids, targets = (torch.zeros(tokens // cfg.train_seq_len, cfg.train_seq_len, dtype=torch.long) for _ in "it")
        forward, start = tg.compile_model(model, backend)[form == "parts"], time.perf_counter()
        forward(ids, targets, loops=loops).sum().backward()
        seconds = time.perf_counter() - start
    if form != "parts" and len(made) != 2:
        raise RuntimeError(f"{len(made)} graphs instead of one forward and one backward")
    return Plan(*found, len(made), seconds)


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def place(text: str) -> Path:
    """A file to be written when all is done; its folder must be there now."""
    if not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent}: no such folder")
    return Path(text)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("forms", nargs="*", metavar="form", help=f"of {', '.join(FORMS)} (default: all)")
    parser.add_argument("--tokens", type=int, default=98304, help="of a step on one GPU (default: 98304)")
    parser.add_argument("--loops", type=int, default=0, help="times that looped layers run again (default: 0)")
    parser.add_argument("--list", action="store_true", help="each kernel, in bf16 numbers a token and channel")
    parser.add_argument("--json", type=place, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    if not set(args.forms) <= set(FORMS) or args.tokens < 1 or args.loops < 0:
        parser.error(f"takes forms of {', '.join(FORMS)}, --tokens of at least 1, --loops of at least 0")
    try:
        cfg, found = tg.read_settings(dict(os.environ))[0], {}
        if args.tokens % cfg.train_seq_len or args.loops > cfg.num_loops:
            raise tg.RunError(f"--tokens: whole windows of TRAIN_SEQ_LEN={cfg.train_seq_len}; --loops: at most "
                              f"NUM_LOOPS={cfg.num_loops}")
        if not torch.version.cuda:
            raise tg.RunError(f"torch {torch.__version__} plans nothing for a GPU; takes a CUDA build (and no GPU)")
        pretend_h100()
        attend = make_attention()
        for form in args.forms or FORMS:
            found[form] = plan(cfg, form, args.tokens, args.loops, attend)
    except tg.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # what is not public may be otherwise in any version, and fails in any way
        print(f"error: torch {torch.__version__}: its compiler is not as plan.py knows it (of 2.13): {words(error)}",
              file=sys.stderr)
        return 1
    report(found, args, 2 * args.tokens * cfg.model_dim, len(tg.virtual_layers(cfg, args.loops)))
    return 0


def report(found: dict[str, Plan], args: argparse.Namespace, number: int, layers: int) -> None:
    """`number`: the bytes of one bf16 number for each token and channel."""
    for form, planned in found.items() if args.list else ():
        for label, rows in zip(("forward", "backward"), planned):
            print(f"{form}, {label}: numbers a token and channel, kind, operations; those under 0.02 are left out")
            for row in rows:
                if row.size >= 0.02 * number:
                    print(f"{row.size / number:8.2f}  {row.kind:18}  {(row.name or row.operations)[:90]}")
    kinds = [kind for kind in KINDS if kind != OTHER or any(row.kind == kind for planned in found.values()
                                                            for rows in planned[:2] for row in rows)]
    print(f"{layers} layers, {args.tokens:,} tokens, torch {torch.__version__}: planned for an H100, not run; "
          f"GB forward + backward\n\n| form | {' | '.join(kinds)} | all | kernels | graphs | seconds |\n"
          f"|---|{'---|' * (len(kinds) + 4)}")
    figures = {}
    for form, (*steps, graphs, seconds) in found.items():
        gb = {kind: [sum(row.size for row in rows if row.kind == kind) / 1e9 for rows in steps] for kind in kinds}
        gb["all"] = [sum(row.size for row in rows) / 1e9 for rows in steps]
        figures[form] = gb | {"kernels": [len(rows) for rows in steps], "graphs": graphs, "seconds": seconds}
        cells = [f"{forward:.2f} + {backward:.2f}" for forward, backward in gb.values()]
        cells += [" + ".join(map(str, figures[form]["kernels"])), str(graphs), f"{seconds:.1f}"]
        print(f"| {form} | {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "layers": layers, "tokens": args.tokens,
                                         "planned_for": H100.name, "forms": figures}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
