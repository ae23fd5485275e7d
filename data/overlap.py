"""Documents that stand in two sets of shards: known by their first tokens, without a comparison of each with each."""

from collections.abc import Iterable

import numpy as np
from shards import read_shard

FIRST_TOKENS, ALLOWED = 64, 0.005  # a document is known by so many tokens; share of validation that may be known


def document_hashes(tokens: np.ndarray, bos: int) -> np.ndarray:
    """(documents,) uint64 hashes (FNV-1a) of the first 64 tokens after each `bos`, of shorter documents whole."""
    starts = np.flatnonzero(tokens == bos) + 1
    lengths = np.minimum(np.diff(starts, append=len(tokens) + 1) - 1, FIRST_TOKENS)
    hashes, prime = np.full(len(starts), 14695981039346656037, dtype=np.uint64), np.uint64(1099511628211)
    for i in range(FIRST_TOKENS):
        alive = np.flatnonzero(lengths > i)
        hashes[alive] = (hashes[alive] ^ tokens[starts[alive] + i].astype(np.uint64)) * prime
    return (hashes ^ lengths.astype(np.uint64)) * prime


def first_tokens(paths: list[str]) -> np.ndarray:
    """The first 64 tokens of the text that these shards hold one after another; fewer if it is shorter."""
    parts, missing = [np.zeros(0, np.uint16)], FIRST_TOKENS
    for path in paths:
        parts.append(read_shard(path)[:missing])
        missing -= len(parts[-1])
        if not missing:
            break
    return np.concatenate(parts)


def find_overlap(val: np.ndarray, paths: list[str], which: Iterable[int], bos: int) -> np.ndarray:
    """(documents,) bool: the documents of val (n,) uint16 that also start one in the training shards number `which`.

    Documents that hold nothing do not count. A shard may end inside a document that the next ones go on with.
    ValueError if a shard cannot be read.
    """
    wanted, known = document_hashes(val, bos), np.zeros(0, dtype=np.uint64)
    for i in which:
        tokens = read_shard(paths[i])
        hashes, last = document_hashes(tokens, bos), np.flatnonzero(tokens[-FIRST_TOKENS - 1 :] == bos)
        if len(last):
            end = tokens[-FIRST_TOKENS - 1 :][last[-1] :]
            hashes[-1:] = document_hashes(np.concatenate((end, first_tokens(paths[i + 1 :]))), bos)[:1]
        known = np.union1d(known, hashes[np.isin(hashes, wanted)])
    return np.isin(wanted, known) & (wanted != document_hashes(np.full(1, bos), bos))
