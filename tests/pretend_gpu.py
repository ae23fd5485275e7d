"""A GPU for a machine without one, as far as tests of train_gpt.py need one. install() puts it in place for good: it
needs a process of its own.

A tensor on it is a GpuTensor: it says cuda:i and holds its data in a CPU tensor. To PyTorch's dispatcher it is a CPU
tensor of another class, so autograd needs no CUDA and this file no compiler; every ATen operator below autograd comes
by GpuTensor.__torch_dispatch__, which checks devices as CUDA does and computes on the CPU. What makes tensors from
nothing, or moves them, is replaced in torch itself.

It refuses what CUDA and NCCL refuse: operators across devices, .numpy(), collectives of tensors that are not
contiguous, of a dtype that NCCL has not, on another device than the process's, or unlike those of other ranks. What is
read too early shows: torch.empty() and the outputs of asynchronous collectives that nobody has waited for hold NaN.
Counted are lines where the host waits for the GPU (WAITS), the operators used (USED), graphs that torch.compile would
have made (GRAPHS), collectives that were not waited for (UNFINISHED).

Blind to: streams, memory, speed, CUDA's rounding, what is inside torch.compile's graphs, whether NCCL hangs, gradients
through a copy between devices (refused here), setting a .grad on another device.
"""

import os
import sys
import threading
import types
import warnings
import zlib
from collections import Counter
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
WAITS: Counter = Counter()  # "what: function" -> how often the host would have waited there for the GPU
USED: dict[str, None] = {}  # operators that ran on the GPU, in the order of their first use
GRAPHS: list[str] = []  # graphs that torch.compile would have made, in order
UNFINISHED: list[str] = []  # asynchronous collectives that are not waited for
STATE = threading.local()  # .device: index of the thread's current GPU
SYNC_DEBUG = ["default"]

# ----- tensors


class GpuTensor(torch.Tensor):
    """A tensor that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: torch.device):
        self = torch.Tensor._make_wrapper_subclass(cls, elem.size(), strides=elem.stride(), dtype=elem.dtype,
                                                   storage_offset=elem.storage_offset(), device=CPU)
        self.elem, self.where = elem, device
        return self

    device = property(lambda self: self.where)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"{self.elem!r} on {self.where}"

    def __reduce_ex__(self, protocol):
        return self.elem.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def numpy(self, *, force=False):
        raise TypeError(f"can't convert {self.where} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        note_wait("tolist")
        return self.elem.tolist()

    def new_tensor(self, data, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.where)


def note_wait(what: str) -> None:
    """Count a wait by the innermost function outside of torch and this file, and warn as PyTorch does if asked to."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
        frame = frame.f_back
    WAITS[f"{what}: {frame.f_code.co_qualname}"] += 1
    if SYNC_DEBUG[0] == "warn":
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, frame.f_code.co_filename,
                               frame.f_lineno)


def full(device: str | torch.device) -> torch.device:
    """The device with its number."""
    device = torch.device(device)
    return torch.device("cuda", current_device()) if device == torch.device("cuda") else device


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def swap(value, change):
    """`value` with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([swap(v, change) for v in value])
    return value


WAITING = {"nonzero", "masked_select", "_local_scalar_dense", "equal", "_unique2", "unique_consecutive", "unique_dim",
           "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "multinomial"}
COPIES = {"copy_", "_foreach_copy_"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
TAKES_NUMBERS = {"fill_", "masked_fill", "masked_fill_", "index_fill_", "_foreach_mul_", "_foreach_mul",
                 "_foreach_add_"}


@cache
def known(func) -> tuple[str, str, bool, list[int]]:
    """Of an operator: its name, with its overload and without, whether it takes numbers (0-dim tensors) from the CPU,
    and which of its arguments it writes into.
    """
    name = func._schema.name.removeprefix("aten::")
    written = [i for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return str(func), name, torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS | INDEXING, written


def check_devices(func, args, on_gpu: list, on_cpu: list) -> None:
    """RuntimeError where CUDA would raise one for an operator with tensors on several devices."""
    _, name, takes_numbers, written = known(func)
    if name in INDEXING and args[0].is_cuda:
        indices = tensors_in(args[1])
        on_cpu = [t for t in on_cpu if not any(t is i for i in indices)]
    targets = tensors_in([args[i] for i in written if i < len(args)])
    devices = {t.device for t in on_gpu}
    devices |= {CPU for t in on_cpu if t.ndim or not takes_numbers or any(t is target for target in targets)}
    if len(devices) > 1:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                           f"{', '.join(sorted(map(str, devices)))}! (when checking {func})")


def run(func, args, kwargs):
    """An operator on tensors of which one at least is a GpuTensor."""
    whole, name, _, written = known(func)
    on_gpu, on_cpu = [], []

    def unwrap(value):
        kind = value.__class__
        if kind is GpuTensor:
            on_gpu.append(value)
            return value.elem
        if kind is list or kind is tuple:
            return [unwrap(v) for v in value]
        if isinstance(value, torch.Tensor):
            on_cpu.append(value)
        return value

    plain, options = unwrap(args), {key: unwrap(value) for key, value in kwargs.items()}
    device = on_gpu[0].where
    if name in COPIES:
        device = tensors_in(args[0])[0].device
        pairs = zip(tensors_in(args[0]), tensors_in(args[1]))
        note_copy([p for p in pairs if p[0].device != p[1].device], len(args) > 2 and args[2])
    elif on_cpu or any(t.where != device for t in on_gpu):
        check_devices(func, args, on_gpu, on_cpu)
    if name in WAITING or (name == "repeat_interleave" and not options.get("output_size")) or (
            name in INDEXING and any(t.dtype == torch.bool or not t.is_cuda for t in tensors_in(args[1]))):
        note_wait(name)
    USED[whole] = None
    out = func(*plain, **options)
    if name.startswith(("empty", "new_empty")):
        spoil(out)
    if device.type == "cpu" or out is None:
        return out
    if not written and isinstance(out, torch.Tensor):
        return GpuTensor(out, device)
    same = {id(t.elem): t for t in on_gpu}
    return swap(out, lambda t: same[id(t)] if id(t) in same else GpuTensor(t, device))


def note_copy(pairs, non_blocking: bool) -> None:
    """Count the wait of a copy between devices, pairs of target and source, unless its memory is pinned."""
    if any(not (non_blocking and getattr(source if target.is_cuda else target, "pretend_pinned", False))
           for target, source in pairs):
        note_wait("copy between devices")


def spoil(t: torch.Tensor) -> None:
    """Write what nobody wants to read."""
    if t.is_floating_point() and t.dtype.itemsize > 1:
        t.fill_(float("nan"))
    elif t.dtype != torch.bool and not t.is_floating_point():
        t.fill_(91 if t.dtype.itemsize == 1 else -21555)


def to(self, *args, **kwargs):
    """Tensor.to: a copy of another device's is made here, everything else by PyTorch."""
    if args and isinstance(args[0], torch.Tensor):
        args = args[0].device, args[0].dtype, *args[1:]
    given = [*args, *(kwargs.get(name) for name in ("device", "dtype"))]
    device = next((full(a) for a in given if isinstance(a, (str, torch.device))), self.device)
    dtype = next((a for a in given if isinstance(a, torch.dtype)), self.dtype)
    if device == self.device:
        return TO(self, dtype, copy=kwargs.get("copy", False))
    if self.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("pretend GPU: gradients through a copy between devices")
    non_blocking = kwargs.get("non_blocking", False) or any(a is True for a in args)
    if device.type == "cuda":
        note_copy([(GpuTensor(self, device), self)] if not self.is_cuda else [], non_blocking)
    elif not non_blocking:
        note_wait("copy to the CPU")
    copy = (self.elem if self.is_cuda else self).detach().clone().to(dtype)
    return GpuTensor(copy, device) if device.type == "cuda" else copy


TO = torch.Tensor.to


def pin_memory(self, device=None):
    if self.is_cuda:
        raise RuntimeError(f"cannot pin '{self.dtype}' on {self.device}: only dense CPU tensors can be pinned")
    out = self.clone()
    out.pretend_pinned = True
    return out


def maker(real):
    """A function that makes a tensor on `device`; without one on the device of its first argument, or the CPU."""
    def make(*args, device=None, requires_grad=False, **options):
        device = full(device) if device is not None else args[0].device if args and isinstance(
            args[0], torch.Tensor) else CPU
        generator = options.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device}'")
        out = real(*swap(args, lambda t: t.elem if t.is_cuda else t), device=CPU, **options)
        if device.type == "cuda":
            if "empty" in real.__name__:
                spoil(out)
            elif "tensor" in real.__name__:
                note_copy([(GpuTensor(out, device), out)], False)
            USED[real.__name__] = None
            out = GpuTensor(out, device)
        return out.requires_grad_() if requires_grad else out

    return make


def method_maker(name: str):
    real = getattr(torch.Tensor, name)

    def make(self, *args, device=None, **options):
        elsewhere = device is not None and full(device) != self.device
        out = real(self, *args, **options)
        return (GpuTensor(out, full(device)) if not self.is_cuda else out.elem) if elsewhere else out

    return make


# ----- collectives


NCCL_TYPES = {torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16,
              torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}


def check_nccl(name: str, tensors: list[torch.Tensor]) -> None:
    mine = torch.device("cuda", current_device())
    for t in tensors:
        if t.dtype not in NCCL_TYPES:
            raise TypeError(f"Input tensor data type is not supported for NCCL process group: {t.dtype}")
        if not t.is_contiguous():
            raise ValueError(f"Tensors must be contiguous ({name} of {tuple(t.shape)}, strides {t.stride()})")
        if t.device != mine:
            raise RuntimeError(f"NCCL: a tensor on {t.device} in the process of {mine}")
    same = zlib.crc32(repr((name, [(t.dtype, t.shape) for t in tensors])).encode())
    found = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    ALL_GATHER(found, torch.tensor([same]))
    if (found != same).any():
        raise RuntimeError(f"NCCL: {name} of {[(t.dtype, tuple(t.shape)) for t in tensors]} here is another on other "
                           "ranks: on GPUs they would wait for ever")


ALL_GATHER = dist.all_gather_into_tensor


class Late:
    """An asynchronous collective: what it gives stands in its output once it is waited for."""

    def __init__(self, name: str, output: GpuTensor, source: GpuTensor, result: torch.Tensor):
        self.name, self.output, self.source, self.result = name, output, source, result
        self.version = source._version
        spoil(output.elem)
        UNFINISHED.append(name)

    def wait(self, timeout=None) -> None:
        if self.source._version != self.version:
            raise RuntimeError(f"the input of {self.name} was changed before wait()")
        self.output.elem.copy_(self.result)
        UNFINISHED.remove(self.name)


def collective(name: str):
    """dist.<name> of CPU tensors as it is, and of tensors on the GPU by Gloo under NCCL's rules."""
    real = getattr(dist, name)

    def call(*args, async_op=False, **kwargs):
        tensors = tensors_in(args)
        on_gpu = [t for t in tensors if t.is_cuda]
        if not on_gpu:
            return real(*args, async_op=async_op, **kwargs)
        if len(on_gpu) < len(tensors):
            raise RuntimeError("No backend type associated with device type cpu and cuda together")
        check_nccl(name, tensors)
        if not async_op:
            real(*swap(args, lambda t: t.elem), **kwargs)
            return None
        output, source = args
        result = torch.empty_like(output.elem)
        real(result, source.elem, **kwargs)
        return Late(name, output, source, result)

    return call


# ----- FlashAttention 3, its demands and plain attention


def check_flash(q, k, v, ndim: int) -> None:
    for t in (q, k, v):
        if not (t.is_cuda and t.dtype == torch.bfloat16 and t.ndim == ndim and t.stride(-1) == 1 and
                t.size(-1) % 8 == 0):
            raise RuntimeError(f"FlashAttention: {t.dtype} {tuple(t.shape)} {t.stride()} on {t.device}")


def flash_attn_func(q, k, v, causal=False):
    check_flash(q, k, v, 4)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal,
                                          enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    check_flash(q, k, v, 3)
    cu = cu_seqlens_q
    if not (cu.is_cuda and cu.dtype == torch.int32 and cu.is_contiguous() and type(max_seqlen_q) is int and causal):
        raise RuntimeError(f"FlashAttention: cu_seqlens {cu.dtype} on {cu.device}, at most {max_seqlen_q}")
    lengths = cu.elem.diff()
    if int(cu.elem[0]) or int(lengths.sum()) != len(q) or not 0 <= int(lengths.min()) <= lengths.max() <= max_seqlen_q:
        raise RuntimeError(f"FlashAttention: {cu.elem.tolist()} do not cut {len(q)} tokens into at most {max_seqlen_q}")
    segment = torch.arange(len(lengths)).repeat_interleave(lengths.long())
    mask = GpuTensor((segment[:, None] == segment).tril(), q.device)
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask).transpose(0, 1)


# ----- torch.compile


def compile_(function=None, dynamic=None, **_):
    """The function itself; noted is each call that torch.compile would make a graph for, which it does for every form
    of its arguments, and unless `dynamic` is False takes a size that was seen to change for any size from then on.
    """
    graphs: dict[tuple, list[tuple]] = {}

    def call(*args, **kwargs):
        leaves = tree_flatten((args, sorted(kwargs.items())))[0]
        form, sizes = [torch.is_grad_enabled()], []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                form.append((leaf.dtype, leaf.ndim, leaf.is_contiguous(), leaf.requires_grad))
                sizes += leaf.shape
            else:
                form.append(leaf if isinstance(leaf, (int, str, type(None))) else type(leaf))
        made = graphs.setdefault(tuple(form), [])
        if not any(all(a in (None, b) for a, b in zip(graph, sizes)) for graph in made):
            new = tuple(sizes)
            if made and dynamic is not False:
                new = tuple(a if a == b else None for a, b in zip(made[-1], sizes))
            made.append(new)
            shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)][:6]
            GRAPHS.append(f"{getattr(function, '__name__', type(function).__name__)} {form[0]} {shapes}")
        return function(*args, **kwargs)

    return call


# ----- torch.cuda


class Event:
    recorded = False

    def __init__(self, **_):
        pass

    def record(self, stream=None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        if not self.recorded:
            raise RuntimeError("synchronize() of an event that was never recorded")


PROPERTIES = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_017_755_648,
                                   multi_processor_count=132)


def current_device() -> int:
    return getattr(STATE, "device", 0)  # a new thread starts on GPU 0


def set_device(device: int | torch.device) -> None:
    STATE.device = device if isinstance(device, int) else device.index
    if STATE.device >= torch.cuda.device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")


def load(real):
    """torch.load that brings tensors to the device asked for."""
    def call(file, map_location=None, **options):
        found = real(file, map_location="cpu", **options)
        return tree_map_only(torch.Tensor, lambda t: t.to(map_location or CPU), found)

    return call


def init_process_group(real):
    def call(backend, timeout=None):
        if backend != "cpu:gloo,cuda:nccl":
            raise RuntimeError(f"pretend GPU: takes cpu:gloo,cuda:nccl, not {backend}")
        real("gloo", timeout=timeout, init_method=os.environ.get("INIT_METHOD"), rank=int(os.environ["RANK"]),
             world_size=int(os.environ["WORLD_SIZE"]))

    return call


def install(devices: int = 8) -> None:
    """Put the pretend GPU in place."""
    for name, value in {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: devices, "Event": Event,
        "current_device": current_device, "set_device": set_device, "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: PROPERTIES.name, "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "set_sync_debug_mode": lambda mode: SYNC_DEBUG.__setitem__(0, mode),
        "is_bf16_supported": lambda including_emulation=True: True,
        "max_memory_allocated": lambda device=None: 2**20, "reset_peak_memory_stats": lambda device=None: None,
    }.items():
        setattr(torch.cuda, name, value)
    for name in ("empty zeros ones full arange eye linspace tensor as_tensor rand randn randint randperm empty_like "
                 "zeros_like ones_like full_like rand_like randn_like randint_like").split():
        setattr(torch, name, maker(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full"):
        setattr(GpuTensor, name, method_maker(name))
    torch.Tensor.to, torch.Tensor.pin_memory = to, pin_memory
    torch.Tensor.cpu = lambda self: self.to(CPU)
    torch.Tensor.cuda = lambda self, device="cuda", non_blocking=False: self.to(device, non_blocking=non_blocking)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to(): parameters of our class
    sys.modules["torch.optim.optimizer"]._foreach_supported_types.append(GpuTensor)
    sys.modules["torch.utils._foreach_utils"]._foreach_supported_types.append(GpuTensor)
    sys.modules["flash_attn_interface"] = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    torch.compile, torch.load, dist.init_process_group = compile_, load(torch.load), init_process_group(
        dist.init_process_group)
    for name in ("all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(dist, name, collective(name))
