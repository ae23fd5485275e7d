#!/usr/bin/env python3
"""Compile every graph of a run to an H100's machine code without a GPU; report what fails and what spills registers.

    pip install --target /tmp/cuda 'torch===2.13.0'        # once: on Linux the CUDA build, 5 GB
    PYTHONPATH=/tmp/cuda python benchmarks/codegen.py      # all forms; or those named, as `defaults lora`

The script's own warm_up(), Evaluator.warm_windows() and warm_ttt() make the graphs, at real widths and batches, on fake
tensors, through Dynamo and AOTAutograd. tests/test_codegen.py shows that a run has no other graphs. Inductor compiles
each graph as for an H100, up to the code that would launch its kernels. Triton and its ptxas make sm_90 code of every
kernel, in each variant that Inductor would try, and with FUSED=1 of the script's own kernels too. Nothing is run or
timed.

A form is a set of settings: `defaults`, further sets below, or a recipe. Every form but `layers` has 9 layers, with
every kind of layer that its own 11 have: more layers would repeat the same kernels with other offsets. Settings in the
environment take precedence over a form's. Attention is one opaque operator, as FlashAttention is. Graphs are split into
forward and backward as for a CPU and then moved to the GPU. So choices that Inductor makes before that by measuring
(padding of products) are missing here. The status is 1 if a form or a kernel fails. A graph break is a failure, since
the script compiles with fullgraph=True.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read when kernels are made, on import
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plan

import train_gpt as tg

RECIPES = {path.parent.name.split("_", 1)[1]: path for path in sorted(
    (Path(__file__).resolve().parent.parent / "records").glob("track_*/*/recipe.env"))}
FORMS = {"defaults": {}, "lora": {"TTT_MODE": "lora"}, "fused": {"FUSED": "1", "TTT_MODE": "lora"},
         "layers": {}}
ONE_GPU = {"MICRO_BATCH_TOKENS": "98304", "TRAIN_BATCH_TOKENS": "98304", "WARMUP_STEPS": "1", "DEVICE": "cpu",
           "MAX_WALLCLOCK_SECONDS": "0"}  # without a clock no calibration in the warm-up: it compiles nothing
FEW_LAYERS = {"NUM_LAYERS": "9", "LOOP_START": "1", "LOOP_END": "3", "PARALLEL_START_LAYER": "5", "VE_LAYERS": "7,8",
              "QAT_LITE_LAYER_START": "5"}
PTXAS = re.compile(r"entry function '(\w+)' for 'sm_90a'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S)


class Kernel(NamedTuple):
    """A kernel, and what ptxas reports of each of its variants. On a GPU, Inductor runs all variants once and keeps the
    fastest.
    """

    name: str
    spilled: list[int]  # bytes
    registers: list[int]


class Row(NamedTuple):
    """The result of one form."""

    graphs: int
    kernels: int  # that its graphs have
    made: list[Kernel]  # the different ones among them
    graph_seconds: float  # of a core: tracing, Inductor
    kernel_seconds: float  # of a core: Triton, ptxas; none for what a form before had
    failed: dict[str, str]  # name -> what was said


def settings_of(form: str) -> dict[str, str]:
    """The settings of a form, as environment variables."""
    given = dict(re.findall(r"^(\w+)=(\S+)", RECIPES[form].read_text(), re.M)) if form in RECIPES else FORMS[form]
    few = {name: value for name, value in FEW_LAYERS.items() if name != "VE_LAYERS" or name in given}
    return given | ({} if form == "layers" else few) | ONE_GPU


# ----- what stands in for the machine


def pretend_driver() -> None:
    """Make Triton and Inductor see an H100. ptxas's messages are kept; compiled graphs are not."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, config
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    plan.pretend_h100()
    CudaInterface.is_bf16_supported = staticmethod(lambda *_, **__: True)
    compile_fx.get_cuda_device_context = lambda graph: contextlib.nullcontext()
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0))
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel out of a cache would not come by ptxas
    config.fx_graph_cache = False
    logging.getLogger("torch._inductor.runtime.triton_heuristics").setLevel(logging.CRITICAL)  # report() has it


class Quiet(tg.Runtime):
    """A Runtime that prints nothing and shows no progress."""

    def log(self, message: str) -> None:
        pass

    note = log

    def progress(self, items, *_) -> Iterator:
        return iter(items)


class Still(tg.Trainer):
    """Training steps that end with the gradients: optimizer and averages are not compiled."""

    def reset(self) -> None:
        self.params, self.ema = list(self.model.parameters()), None
        self.optimizer = SimpleNamespace(reduce_gradients=lambda: 0.0, step=self.forget)

    def forget(self, *_) -> None:
        for p in self.params:
            p.grad = None


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without data, and stand-ins for code that needs data: bounds of documents, the adapters' optimizer."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    real = tg.Bounds.find

    def find(ids: torch.Tensor, bos: int, max_len: int) -> tg.Bounds:
        with unset_fake_temporarily():  # shapes are the real ones
            made = real(torch.zeros(ids.shape, dtype=torch.long), 1, max_len)
        return tg.Bounds(*(torch.empty(t.shape, dtype=t.dtype) for t in made[:2]), max_len)

    def learn(adapters: tg.DocumentAdapters, loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, adapters.leaves)

    with (FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(tg.Bounds, "find", find),
          mock.patch.object(tg.DocumentAdapters, "learn", learn)):
        yield


# ----- graphs, and the source of their kernels


def find_kernels(cfg: tg.Settings, graphs: list, found: list[tuple[str, str]]) -> None:
    """The graphs of a run, and (name, source) of the kernels that Inductor makes of them, in order."""
    from torch._inductor import async_compile, compile_fx

    def keep(graph: torch.fx.GraphModule, inputs: list, **options):
        run = compile_fx.make_boxed_func(graph.forward)
        graphs.append(compile_fx.compile_fx_inner(*plan.on_gpu(graph, inputs), **options))
        return run  # on fake tensors, which are on the CPU

    def backend(graph: torch.fx.GraphModule, inputs: list):
        return compile_fx.compile_fx(graph, inputs, inner_compile=keep)

    def note(self, name: str, source: str, device_str: str = "cuda") -> None:
        found.append((name, source))

    torch._dynamo.reset()
    rt, ops = Quiet(cfg, tg.Launch()), tg.fused_ops() if cfg.fused else tg.PLAIN
    text = tg.random_text(cfg, tg.Validation(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32), 1,
                                             None, 1, tg.ngram_of(cfg)))
    tilt = tg.Tilt.of(cfg, text)  # of real tokens
    with (fake_tensors(), mock.patch.object(async_compile.AsyncCompile, "triton", note),
          mock.patch.object(tg.Tilt, "of", lambda *_: tilt)):
        model = tg.GPT(cfg, plan.make_attention(), torch.bfloat16, 1, ops)
        whole, parts = tg.compile_model(model, backend)
        tg.Evaluator(cfg, rt, model, whole, text).warm_windows()
        tg.warm_up(cfg, rt, Still(cfg, rt, model, whole))
        if cfg.ttt_mode != "none":
            tg.Evaluator(cfg, rt, model, parts, text).warm_ttt()


# ----- machine code


def compile_kernel(name: str, source: str) -> Kernel:
    """Compile one of Inductor's kernels in each variant that Inductor would try. Raises what Triton or ptxas raises."""
    from torch._inductor.codecache import PyCodeCache

    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        tuner = getattr(PyCodeCache.load(source), name)
        tuner.precompile(warm_cache_only=True)
    made = PTXAS.findall(log.getvalue())
    if len(made) != len(tuner.compile_results) or not made:
        raise RuntimeError(f"ptxas told of {len(made)} variants of {len(tuner.compile_results)}")
    return Kernel(name, [int(spilled) for _, spilled, _ in made], [int(registers) for *_, registers in made])


class Launcher:
    """A kernel of the script that is compiled for the arguments of a launch, but not launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple):
        return lambda *inputs, **options: self.kernel.run(*inputs, grid=grid, warmup=True, **options)


def compile_own(cfg: tg.Settings) -> list[Kernel]:
    """Compile the kernels of FUSED=1 for everything that run_mlp() and run_head_losses() launch on a batch."""
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d, hidden = cfg.model_dim, int(cfg.mlp_mult * cfg.model_dim)
    shape, log = (cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len), io.StringIO()
    x, up, down, h = empty(*shape, d), empty(hidden, d), empty(d, hidden), empty(*shape, hidden)
    head = (x, empty(cfg.vocab_size, d), empty(*shape, dtype=torch.long), empty(dtype=torch.float32))
    with (contextlib.redirect_stdout(log), mock.patch.object(tg, "mlp_kernel", Launcher(tg.mlp_kernel)),
          mock.patch.object(tg, "loss_kernel", Launcher(tg.loss_kernel))):
        tg.run_mlp(x, up, down)
        tg.run_mlp(x, up, down, h, x)
        tg.run_head_losses(*head)
        tg.run_head_losses(*head, empty(*shape, dtype=torch.float32))
    return [Kernel(name, [int(spilled)], [int(used)]) for name, spilled, used in PTXAS.findall(log.getvalue())]


def cpu_seconds() -> float:
    """CPU seconds of this process and of those it waited for, so that other work on the machine does not count."""
    return sum(os.times()[:4])


def compile_form(form: str, known: dict[str, Kernel]) -> Row:
    """Compile all of a form. `known` has the kernels compiled before, by source; those of this form are added to it."""
    start, failed, graphs, found, made = cpu_seconds(), {}, [], [], {}
    cfg = tg.read_settings(settings_of(form) | os.environ)[0]
    cfg = tg.fit_to_device(cfg, SimpleNamespace(device=torch.device("cpu")))
    try:
        find_kernels(cfg, graphs, found)
    except Exception as error:  # of any of the compilers
        failed["graphs"] = plan.words(error)
    middle = cpu_seconds()
    for name, source in {source.replace(name, "kernel"): (name, source) for name, source in found}.values():
        key = source.replace(name, "kernel")
        try:
            made[key] = known[key] = known.get(key) or compile_kernel(name, source)
        except Exception as error:
            failed[name] = plan.words(error)
    made = [*made.values()]
    if cfg.fused:
        try:
            made += compile_own(cfg)
        except Exception as error:
            failed["FUSED=1"] = plan.words(error)
    return Row(len(graphs), len(found), made, middle - start, cpu_seconds() - middle, failed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("forms", nargs="*", metavar="form", help=f"of {', '.join([*FORMS, *RECIPES])} (default: all)")
    parser.add_argument("--json", type=plan.place, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    if not {*args.forms} <= {*FORMS, *RECIPES}:
        parser.error(f"takes forms of {', '.join([*FORMS, *RECIPES])}")
    if not torch.version.cuda:
        print(f"error: torch {torch.__version__} compiles nothing for a GPU; takes a CUDA build (and no GPU)",
              file=sys.stderr)
        return 1
    rows, known = {}, {}
    with tempfile.TemporaryDirectory() as folder:  # Inductor's cache of another run would not ask Triton
        os.environ |= {"TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        pretend_driver()
        for form in args.forms or [*FORMS, *RECIPES]:
            rows[form] = compile_form(form, known)
            print(f"| {form} | {cells(rows[form])} |", file=sys.stderr, flush=True)
    report(rows)
    if args.json:
        args.json.write_text(json.dumps({form: row._replace(made=[k._asdict() for k in row.made])._asdict()
                                         for form, row in rows.items()}, indent=1) + "\n")
    return int(any(row.failed for row in rows.values()))


def cells(row: Row) -> str:
    variants = [spilled for kernel in row.made for spilled in kernel.spilled]
    spills = sorted(f"{min(kernel.spilled)} ({kernel.name})" for kernel in row.made if min(kernel.spilled))
    return (f"{row.graphs} | {row.kernels} | {len(row.made)} | {len(variants)} | {row.graph_seconds:.0f} + "
            f"{row.kernel_seconds:.0f} | {len(row.failed)} | {len([spilled for spilled in variants if spilled])} | "
            f"{', '.join(spills) or 'none'}")


def report(rows: dict[str, Row]) -> None:
    print(f"torch {torch.__version__}: compiled for an H100, not run\n\n| form | graphs | kernels | different ones | "
          "their variants | seconds | failed | variants that spill | bytes that every variant of a kernel spills |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for form, row in rows.items():
        print(f"| {form} | {cells(row)} |")
    for form, row in rows.items():
        for name, said in row.failed.items():
            print(f"error: {form}: {name}: {said}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
