"""FlashAttention from where it is to be had: an installed package, or the newest build on the hub that works here."""

import sys
import threading
from types import SimpleNamespace

import pytest
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


@pytest.mark.parametrize("name, package, repository", [
    ("fa3", "flash_attn_interface", "kernels-community/flash-attn3"),
    ("fa2", "flash_attn", "kernels-community/flash-attn2")])
def test_the_newest_build_that_loads_is_taken_and_named(monkeypatch, name, package, repository):
    asked = []
    hub(monkeypatch, {1: FLASH, 2: OSError("no build for this machine")}, asked)
    attend, source = tg.load_attention(name)
    assert source == f"{repository} version 1" and asked == [(repository, version) for version in (3, 2, 1)]
    assert attend("q", "k", "v", None) == "q"
    hub(monkeypatch, {1: OSError("old"), 3: FLASH}, asked)
    assert tg.load_attention(name)[1] == f"{repository} version 3"
    monkeypatch.setitem(sys.modules, package, FLASH)  # what is installed comes first
    asked.clear()
    assert tg.load_attention(name)[1] == package and not asked


def test_what_no_build_serves_says_why(monkeypatch):
    hub(monkeypatch, {2: OSError("no build for torch 2.8")}, [])
    with pytest.raises(ImportError, match="flash-attn3: no build for torch 2.8"):  # not that version 1 is missing
        tg.load_attention("fa3")
    hub(monkeypatch, {}, [])
    with pytest.raises(ImportError, match="flash-attn3: Version 3 not found|Version 1 not found"):
        tg.load_attention("fa3")
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError):
        tg.load_attention("fa3")


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
