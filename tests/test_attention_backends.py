"""FlashAttention from where it is to be had: an installed package, or the newest build on the hub that works here."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import on_ranks, tiny

import train_gpt as tg

FLASH = SimpleNamespace(flash_attn_func=lambda q, k, v, causal: q, flash_attn_varlen_func=None)


def hub(monkeypatch, builds: dict, asked: list) -> None:
    """A `kernels` package whose repositories have these {version: module, or the error that loading it raises}."""
    def get_kernel(repository: str, version: int):
        asked.append((repository, version))
        found = builds.get(version, ValueError(f"Version {version} not found, available versions: 1"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    for package in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed


@pytest.fixture
def hopper(monkeypatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cpu")


@pytest.mark.parametrize("name, package, repository", [
    ("fa3", "flash_attn_interface", "kernels-community/flash-attn3"),
    ("fa2", "flash_attn", "kernels-community/flash-attn2")])
def test_builds_come_from_the_newest_on_and_are_named(monkeypatch, hopper, name, package, repository):
    asked = []
    hub(monkeypatch, {1: FLASH, 2: OSError("no build for this machine"), 3: FLASH}, asked)
    builds = tg.attention_builds(name, hopper)
    attend, source = next(builds)
    assert source == f"{repository} version 3" and asked == [(repository, 3)]
    assert attend("q", "k", "v", None) == "q"
    assert next(builds)[1] == f"{repository} version 1" and asked == [(repository, version) for version in (3, 2, 1)]
    monkeypatch.setitem(sys.modules, package, FLASH)  # what is installed comes first
    asked.clear()
    builds = tg.attention_builds(name, hopper)
    assert next(builds)[1] == package and not asked
    assert next(builds)[1] == f"{repository} version 3"


def test_what_no_build_serves_says_why(monkeypatch, hopper):
    hub(monkeypatch, {2: OSError("no build for torch 2.8")}, [])
    with pytest.raises(ImportError, match="flash-attn3: no build for torch 2.8"):  # not that version 1 is missing
        next(tg.attention_builds("fa3", hopper))
    hub(monkeypatch, {}, [])
    with pytest.raises(ImportError, match="flash-attn3: Version 3 not found|Version 1 not found"):
        next(tg.attention_builds("fa3", hopper))
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError):
        next(tg.attention_builds("fa3", hopper))


class Varlen(torch.autograd.Function):
    """FlashAttention's variable-length form as the package has it: the two tables of offsets are inputs of its own."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k):
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        return q * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(t) for t in ctx.saved_tensors[1:3]), None, None


def flash_module(works: bool = True) -> SimpleNamespace:
    def dense(q, k, v, causal):
        return q * 1.0

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        if not works:
            raise RuntimeError("no kernel for as many heads")
        return Varlen.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)

    return SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen)


@pytest.mark.parametrize("builds, source, skipped", [
    ({3: True, 2: True}, "kernels-community/flash-attn3 version 3", 0),
    ({3: False, 2: True}, "kernels-community/flash-attn3 version 2", 1)])
def test_a_build_is_taken_once_it_works_compiled(monkeypatch, hopper, builds, source, skipped):
    """A custom autograd function, as FlashAttention's, under Dynamo, which refuses one that gets a tensor twice."""
    hub(monkeypatch, {version: flash_module(works) for version, works in builds.items()}, [])
    cfg, compiled = tiny(varlen_enabled=True, compile="1"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    monkeypatch.setattr(tg, "try_attention", lambda cfg, attend, device, dtype, real=tg.try_attention: real(
        cfg, attend, hopper, torch.float32))
    found = tg.pick_attention(cfg, SimpleNamespace(type="cuda"), torch.bfloat16)
    assert (found.name, found.source, len(found.skipped)) == ("fa3", source, skipped), found.skipped
    torch._dynamo.reset()


def test_a_build_that_does_not_work_says_why_whatever_else_is_missing(monkeypatch, hopper):
    hub(monkeypatch, {3: flash_module(works=False)}, [])
    cfg = tiny(varlen_enabled=True, compile="0", attention="fa3")
    monkeypatch.setattr(tg, "try_attention", lambda cfg, attend, device, dtype, real=tg.try_attention: real(
        cfg, attend, hopper, torch.float32))
    with pytest.raises(tg.RunError, match="fa3: no kernel for as many heads; fa3: no prebuilt .*: Version [21] not"):
        tg.pick_attention(cfg, SimpleNamespace(type="cuda"), torch.bfloat16)


@pytest.mark.parametrize("works, expected", [
    (["fa3 fa2", "fa2"], "fa2"), (["fa3 varlen", "fa2 varlen"], "varlen"), (["fa3 fa2", "fa3", "fa2"], "sdpa")])
def test_ranks_take_the_fastest_backend_that_works_on_all(monkeypatch, works, expected):
    """Also where it is neither's first choice: of two ranks, one has fa3 alone and the other fa2 alone."""
    here = threading.local()

    def pick(cfg, device, dtype, fastest="fa3"):
        usual = tg.BACKENDS[tg.BACKENDS.index(fastest):]
        name = next(name for name in usual if name in [*works[here.rank].split(), "sdpa"])
        skipped = [f"{n}: rate limit" for n in usual[:usual.index(name)]]
        return tg.Attention(name, f"build of {here.rank}", FLASH, skipped)

    def work(rt):
        here.rank, rt.dtype = rt.rank, None
        return tg.agree_on_attention(tiny(), rt)

    monkeypatch.setattr(tg, "pick_attention", pick)
    found = on_ranks(len(works), work)
    assert [attention.name for attention in found] == [expected] * len(works)
    for rank, (attention, mine) in enumerate(zip(found, works)):
        assert attention.source == f"build of {rank}"
        faster = [name for name in tg.BACKENDS[:tg.BACKENDS.index(expected)] if name in mine]
        assert [line for line in attention.skipped if "rate" not in line] == [
            f"{name}: not on every process" for name in faster]
