"""The shard format and the manifest in one place, and how the data tools put files in place.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then little-endian uint16 tokens.
Those of a split are called fineweb_<split>_<6 digits>.bin and numbered from 0; val_bytes counts the bytes of val.
The manifest lists the data sets and tokenizers of a folder, by name; what else it says is kept as it is.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 1 << 16  # a token is a uint16
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_([0-9]{6})\.bin")


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Binary file that takes the name `path` when the block ends well; otherwise nothing is left. Raises OSError."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp is private by default
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def shard_header(count: int) -> bytes:
    """The first HEADER_BYTES of a shard of `count` tokens; ValueError if it cannot have as many."""
    if count >= 1 << 31:
        raise ValueError(f"expected fewer than {1 << 31} tokens in a shard, found {count}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write `tokens` (count,) uint16 as one shard, atomically. ValueError for other arrays, OSError from the system."""
    if tokens.ndim != 1 or tokens.dtype.kind != "u" or tokens.dtype.itemsize != 2:
        raise ValueError(f"{path}: expected a 1-D uint16 array, found {tokens.ndim}-D {tokens.dtype}")
    with atomic_write(path) as file:
        file.write(shard_header(len(tokens)))
        file.write(np.ascontiguousarray(tokens, "<u2").data)


def read_shard(path: str | os.PathLike, vocab_size: int | None = None) -> np.ndarray:
    """Tokens of one shard, (count,) uint16, mapped read-only.

    ValueError, one line, when the header, the file size or (given `vocab_size`) a token is not as it should be.
    """
    size = os.path.getsize(path)
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: expected a header of {HEADER_BYTES} bytes, found a file of {size}")
    magic, version, count = (int(value) for value in np.fromfile(path, "<i4", count=3))
    if magic != MAGIC:
        raise ValueError(f"{path}: expected magic {MAGIC}, found {magic}")
    if version != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, found {version}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise ValueError(f"{path}: expected {HEADER_BYTES + 2 * count} bytes for {count} tokens, found {size}")
    if count == 0:  # nothing to map
        return np.zeros(0, "<u2")
    tokens = np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{path}: expected tokens below {vocab_size}, found {largest}")
    return tokens


def shard_names(split: str, count: int) -> list[str]:
    """Names of the first `count` shards of `split`: "train", "val" or "val_bytes"."""
    return [f"fineweb_{split}_{index:06d}.bin" for index in range(count)]


def strange_shards(folder: Path) -> list[Path]:
    """Files in `folder` that look like shards and have no such name: copies, or numbers of another width."""
    return [path for path in sorted(folder.glob("fineweb_*.bin")) if not SHARD_NAME.fullmatch(path.name)]


def find_shards(folder: Path, split: str) -> list[Path]:
    """Paths of the shards of `split` in `folder`, in order.

    ValueError, naming the file, for one that only looks like a shard, and for a gap in the numbers.
    """
    for path in strange_shards(folder):
        raise ValueError(f"{path}: not the name of a shard, which is fineweb_<split>_<6 digits>.bin; remove it")
    found = sorted(path.name for path in folder.glob("fineweb_*.bin") if SHARD_NAME.fullmatch(path.name)[1] == split)
    for name, expected in zip(found, shard_names(split, len(found))):
        if name != expected:
            raise ValueError(f"{folder / expected}: no such file, but {name} is there; shards are numbered from 0 "
                             "without a gap")
    return [folder / name for name in found]


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> dict:
    """The manifest at `path`, or an empty one; ValueError if it is not one."""
    if not path.exists():
        return {"datasets": [], "tokenizers": []}
    try:
        manifest = json.loads(path.read_bytes())
        for key in ("datasets", "tokenizers"):
            for entry in manifest.setdefault(key, []):
                entry["name"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    return manifest


def find_entry(manifest: dict, key: str, name: str | None) -> dict | None:
    """The entry of manifest[`key`] with this name, or None."""
    return next((entry for entry in manifest[key] if entry["name"] == name), None)


def merge_manifest(manifest: dict, key: str, entry: dict) -> None:
    """Put `entry` in manifest[`key`] in the place of one of the same name, or last."""
    entries = manifest[key]
    names = [other["name"] for other in entries]
    if entry["name"] in names:
        entries[names.index(entry["name"])] = entry
    else:
        entries.append(entry)


def write_manifest(path: Path, manifest: dict) -> None:
    """Write `manifest` as JSON, atomically. Raises OSError."""
    with atomic_write(path) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold the folder `out` against other programs that put data there; ValueError if one is running."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another program is putting data there") from error
        yield
    finally:
        os.close(descriptor)


class Parser(argparse.ArgumentParser):
    """Command-line parser that raises ValueError with one line where the original prints several and exits."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the program like Ctrl-C, so that temporary files are removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def one_line(error: BaseException) -> str:
    """What the user reads about `error`: one line, the file first where the system names one."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
