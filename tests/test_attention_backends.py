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


def test_ranks_take_the_backend_that_works_on_all(monkeypatch):
    here = threading.local()

    def pick(cfg, device, dtype):
        asked = {"auto": "fa2" if here.rank == 1 else "fa3"}.get(cfg.attention, cfg.attention)
        return tg.Attention(asked, f"build of {here.rank}", FLASH, ["fa3: rate limit"] if here.rank == 1 else [])

    def work(rt):
        here.rank, rt.dtype = rt.rank, None
        return tg.agree_on_attention(tiny(), rt)

    monkeypatch.setattr(tg, "pick_attention", pick)
    first, second = on_ranks(2, work)
    assert (first.name, first.source, first.skipped) == ("fa2", "build of 0", ["fa3: not on every process"])
    assert (second.name, second.skipped) == ("fa2", ["fa3: rate limit"])
