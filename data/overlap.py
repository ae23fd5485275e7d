"""Find documents of one set of shards that also stand in another one.

A document is known by a hash of its first 64 tokens, so that the documents need not be compared with each other.
"""

from collections.abc import Iterable

import numpy as np
from shards import read_shard

FIRST_TOKENS = 64
ALLOWED = 0.005  # this share of the validation documents may be known


def document_hashes(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Return a uint64 hash (FNV-1a) of the first 64 tokens after each `bos`. A shorter document is hashed whole."""
    starts = np.flatnonzero(tokens == bos) + 1
    lengths = np.minimum(np.diff(starts, append=len(tokens) + 1) - 1, FIRST_TOKENS)
    hashes, prime = np.full(len(starts), 14695981039346656037, dtype=np.uint64), np.uint64(1099511628211)
    for i in range(FIRST_TOKENS):
        alive = np.flatnonzero(lengths > i)
        hashes[alive] = (hashes[alive] ^ tokens[starts[alive] + i].astype(np.uint64)) * prime
    return (hashes ^ lengths.astype(np.uint64)) * prime


def first_tokens(paths: list[str]) -> np.ndarray:
    """Return the first 64 tokens of the text that these shards hold one after another, or fewer if it is shorter."""
    parts, missing = [np.zeros(0, np.uint16)], FIRST_TOKENS
    for path in paths:
        parts.append(read_shard(path)[:missing])
        missing -= len(parts[-1])
        if not missing:
            break
    return np.concatenate(parts)


def find_overlap(val: np.ndarray, paths: list[str], which: Iterable[int], bos: int) -> np.ndarray:
    """Say of each document of `val` whether a document of the training shards begins with the same tokens.

    `val` is a uint16 array of shape (n,), `paths` are all training shards, `which` are the numbers of those to search.
    The result is a bool array of shape (documents,). Documents without a token are never found.
    """
    wanted, known = document_hashes(val, bos), np.zeros(0, dtype=np.uint64)
    for i in which:
        tokens = read_shard(paths[i])
        documents = np.count_nonzero(tokens == bos)
        if not documents:
            continue
        # The last document of a shard may continue in the next shards.
        longer = np.concatenate((tokens, first_tokens(paths[i + 1 :])))
        hashes = document_hashes(longer, bos)[:documents]
        known = np.union1d(known, hashes[np.isin(hashes, wanted)])
    return np.isin(wanted, known) & (wanted != document_hashes(np.full(1, bos), bos))
