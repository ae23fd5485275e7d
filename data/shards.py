"""What the data tools share: shards, the manifest, tokenizers, safe writing and the command line.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) and then its tokens as
little-endian uint16. The shards of a split are called fineweb_<split>_<6 digits>.bin and are numbered from 0. The
splits are train, val and val_bytes; the last one holds the bytes that each token of val is charged.

If some ids stand for pairs of tokens (Fusion in data/caseops.py), the header of every train and val shard lists them
behind the count: a mark of this list, how many pairs there are, then for each pair its id and its two tokens.

The file manifest.json lists the data sets and the tokenizers of a folder by name. A tool changes its own entries only.
"""

import argparse
import fcntl
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece as spm

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
PAIRS_MARK = 20261126  # in the header, where other shards have a zero: pairs are listed behind it
MAX_VOCAB = 1 << 16  # a token is a uint16
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_([0-9]{6})\.bin")


# ----- files


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that gets the name `path` when the block ends well. After an error nothing is left of it."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Lock the folder `out` during the block. Raise ValueError if another data tool has locked it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another program is putting data there") from error
        yield
    finally:
        os.close(descriptor)


# ----- shards


def write_shard(path: str | os.PathLike, tokens: np.ndarray, pairs: list[tuple[int, int, int]] = ()) -> None:
    """Write `tokens`, a uint16 array of shape (count,), as one shard. Raise ValueError for any other array.

    Each of `pairs` is an id among the tokens and the ids of the two tokens for which it stands.
    """
    if tokens.ndim != 1 or tokens.dtype.kind != "u" or tokens.dtype.itemsize != 2:
        raise ValueError(f"{path}: expected a 1-D uint16 array, found {tokens.ndim}-D {tokens.dtype}")
    if len(tokens) >= 1 << 31:  # the header counts in int32
        raise ValueError(f"{path}: expected fewer than {1 << 31} tokens in a shard, found {len(tokens)}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    if len(pairs):
        header[3 : 5 + 3 * len(pairs)] = PAIRS_MARK, len(pairs), *np.ravel(pairs)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2").data)


def read_shard(path: str | os.PathLike, vocab_size: int | None = None) -> np.ndarray:
    """Return the tokens of one shard as a uint16 array of shape (count,), mapped read-only.

    Raise ValueError if the header or the size of the file is wrong. With `vocab_size`, a token that is not below it is
    an error as well.
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
    if count == 0:  # an empty file region cannot be mapped
        return np.zeros(0, "<u2")
    tokens = np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{path}: expected tokens below {vocab_size}, found {largest}")
    return tokens


def read_pairs(paths: list[Path]) -> list[tuple[int, int, int]]:
    """Return the pairs that the headers of these shards list: the id of each pair and the ids of its two tokens.

    Raise ValueError if the headers differ, or if one lists more pairs than it has room for.
    """
    found = []
    for path in paths:
        header = np.fromfile(path, "<i4", HEADER_INTS).tolist()
        count = header[4] if header[3:4] == [PAIRS_MARK] else 0
        if not 0 <= count <= (HEADER_INTS - 5) // 3:
            raise ValueError(f"{path}: its header lists {count} pairs of tokens, expected at most "
                             f"{(HEADER_INTS - 5) // 3}")
        found.append([tuple(header[i : i + 3]) for i in range(5, 5 + 3 * count, 3)])
        if found[-1] != found[0]:
            raise ValueError(f"{path}: lists other pairs of tokens than {paths[0]}")
    return found[0] if found else []


def shard_names(split: str, count: int) -> list[str]:
    """Return the names of the first `count` shards of `split`."""
    return [f"fineweb_{split}_{index:06d}.bin" for index in range(count)]


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the paths of the shards of `split` in `folder`, in order.

    Raise ValueError if a number is missing, or if a file looks like a shard and has another kind of name. Such a file
    is usually a copy, which a run could take for more text.
    """
    found = []
    for path in sorted(folder.glob("fineweb_*.bin")):
        name = SHARD_NAME.fullmatch(path.name)
        if not name and not path.name.startswith("fineweb_test"):  # which nothing here reads
            raise ValueError(f"{path}: not the name of a shard, which is fineweb_<split>_<6 digits>.bin; remove it")
        if name and name[1] == split:
            found.append(path)
    for path, expected in zip(found, shard_names(split, len(found))):
        if path.name != expected:
            raise ValueError(f"{folder / expected}: no such file, but {path.name} is there; shards are numbered from 0 "
                             "without a gap")
    return found


# ----- tokenizers


def load_tokenizer(model: bytes, name: str, threads: int = -1) -> spm.SentencePieceProcessor:
    """Return the tokenizer of the serialized `model`, which works on `threads` threads (-1: one a core).

    Raise ValueError, beginning with `name`, if shards cannot be made with this tokenizer.
    """
    tokenizer = spm.SentencePieceProcessor(num_threads=threads)
    try:
        tokenizer.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"{name}: not a SentencePiece model: {error}") from error
    if tokenizer.vocab_size() > MAX_VOCAB:
        raise ValueError(f"{name}: expected at most {MAX_VOCAB} pieces, found {tokenizer.vocab_size()}")
    if tokenizer.bos_id() < 0:
        raise ValueError(f"{name}: expected a BOS piece to mark the start of a document, found none")
    # Without this piece a space is spelled as three byte pieces, and the scorer counts too many bytes.
    if tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
        raise ValueError(f'{name}: expected a stand-alone "▁" piece, found none')
    return tokenizer


# ----- the manifest


def read_manifest(path: Path) -> dict:
    """Return the manifest at `path`, or an empty one if there is no such file. Raise ValueError for anything else."""
    if not path.exists():
        return {"datasets": [], "tokenizers": []}
    try:
        manifest = json.loads(path.read_bytes())
        for key in ("datasets", "tokenizers"):
            if not isinstance(manifest.setdefault(key, []), list):
                raise TypeError(f"{key} is no list")
            for entry in manifest[key]:
                entry["name"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    return manifest


def find_entry(manifest: dict, key: str, name: str | None) -> dict | None:
    """Return the entry of manifest[`key`] that has this name, or None."""
    return next((entry for entry in manifest[key] if entry["name"] == name), None)


def update_manifest(path: Path, datasets: list[dict], tokenizers: list[dict]) -> None:
    """Put entries into the manifest at `path`. An entry replaces that of the same name, or comes last."""
    manifest = read_manifest(path)
    for key, entries in (("datasets", datasets), ("tokenizers", tokenizers)):
        manifest[key] = list({entry["name"]: entry for entry in manifest[key] + entries}.values())
    with atomic_write(path) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")


# ----- the command line


class Parser(argparse.ArgumentParser):
    """A command-line parser that raises ValueError where argparse prints its usage and exits."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: an integer that is not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    number.__name__ = f"number (at least {least})"  # argparse puts this name into its message
    return number


def run_tool(action: Callable[[argparse.Namespace], None], parser: Parser, argv: list[str] | None) -> int:
    """Parse the command line and do `action`. Return the exit status, and print one line on stderr if it is 1."""
    try:
        action(parser.parse_args(argv))
    except (OSError, ValueError, MemoryError, KeyboardInterrupt) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: BaseException) -> str:
    """Return what the user reads about `error`, in one line. It begins with the file if the system names one."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
