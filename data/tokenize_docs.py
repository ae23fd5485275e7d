#!/usr/bin/env python3
"""Documents -> tokenizers, shards and manifest in the published layout.

Notable features:
- reads .jsonl, .jsonl.gz and .jsonl.xz as streams, one {"text": ...} a line
- trains SentencePiece BPE tokenizers of any size on the training documents, or takes existing ones
- makes the data sets of several tokenizers in one pass over the documents
- with CaseOps, transforms the documents first, and writes the bytes of each validation token beside the shards
- splits the published documents as the challenge does: the first 50,000 are validation, and no others
- refuses a tokenizer whose bytes cannot be counted exactly, and training shards that know the validation documents
- encodes on all cores with bounded memory; the output does not depend on their number
- a data set appears whole or not at all, the manifest last

    python data/tokenize_docs.py --docs data/docs_selected.jsonl --out data --name mine_sp8192 --vocab-size 8192
    python data/tokenize_docs.py --docs data/docs_selected.jsonl --out data --specs tokenizers.json
    python data/tokenize_docs.py --train docs_train.jsonl --val docs_val.jsonl --out data --vocab-size 1024

The last one writes, below --out:

    datasets/local_sp1024/fineweb_train_000000.bin, ..., fineweb_val_000000.bin
    tokenizers/local_1024_bpe.model, tokenizers/local_1024_bpe.vocab
    manifest.json

A dataset `<prefix>_sp<N>` gets the tokenizer `<prefix>_<N>_bpe`; an existing tokenizer keeps the name of its file.
With --caseops both names end in _caseops, and each fineweb_val_<6 digits>.bin has a fineweb_val_bytes_<6 digits>.bin
with the bytes of raw text that each of its tokens is charged (uint16 as well; none for BOS).

tokenizers.json is a list of one object a data set: its "name" (or none, for local_sp<N>), either "vocab_size" or
"model", the file of a tokenizer, beside tokenizers.json if its path is relative, and perhaps "caseops":

    [{"name": "mine_sp4096", "vocab_size": 4096}, {"name": "other_sp8192", "model": "fineweb_8192_bpe.model"},
     {"name": "mine_sp8192", "vocab_size": 8192, "caseops": true}]

What is unfinished stands in datasets/.tokenize, which goes when the program ends or, killed, when it runs again.
"""

import argparse
import gzip
import heapq
import io
import json
import lzma
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece as spm
from caseops import MARKERS, restore, token_bytes, transform
from overlap import ALLOWED, find_overlap
from shards import (
    HEADER_BYTES,
    MAX_VOCAB,
    Parser,
    atomic_write,
    file_sha256,
    find_entry,
    interrupt_on_sigterm,
    merge_manifest,
    one_line,
    only_one,
    read_manifest,
    read_shard,
    shard_header,
    shard_names,
    write_manifest,
)
from tqdm import tqdm

BATCH_BYTES = 1 << 20  # JSON lines handed to a worker at once
SPECIAL_PIECES = 4 + 256  # pad, bos, eos, unk and the byte pieces
DEFAULT_VAL_DOCS = 50_000  # of the published documents
TRAINER_SENTENCE_CHARS = 30_000  # the trainer stores positions in 16 bits and drops what is too long
ROUND_TRIP_PROBES = (
    "plain", " leading", "trailing ", "two  spaces", "a\nb\n\n c\r\n", "\ttab\t", "7 + 1234.5", "na\u00efve e\u0301",
    "\u6f22\u5b57 \uff21", "\U0001f600\u200d\U0001f525", "<s> <0x0A> </s>", "\ufb01 \u00a0\u3000", "\x00", "\n", "   ",
)


# ----- documents


@dataclass(frozen=True)
class Batch:
    """Consecutive JSON `lines` (bytes) of file `path`, the first being line `first_line` (from 1), all of one `split`.

    `consumed` counts the bytes read from disk for it, for the progress bar.
    """

    path: str
    first_line: int
    lines: list[bytes]
    consumed: int
    split: str = "train"


def read_batches(paths: Iterable[Path], batch_bytes: int = BATCH_BYTES) -> Iterator[Batch]:
    """Lines of the files `paths` in order, in batches of about `batch_bytes`; .gz and .xz are unpacked on the way.

    OSError if a file cannot be read, ValueError if a compressed one is damaged.
    """
    openers = {".gz": gzip.open, ".xz": lzma.open}
    for path in paths:
        with open(path, "rb") as raw, openers.get(path.suffix, lambda file, _: file)(raw, "rb") as file:
            first_line, position = 1, 0
            while True:
                try:
                    lines = file.readlines(batch_bytes)
                except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                    raise ValueError(f"{path}: damaged compressed file: {error}") from error
                if not lines:
                    break
                position, consumed = raw.tell(), raw.tell() - position
                yield Batch(str(path), first_line, lines, consumed)
                first_line += len(lines)


def texts(batch: Batch) -> Iterator[tuple[str, str]]:
    """(place, text) of every line of `batch`, place being "file:line". ValueError, naming the place, if it has none."""
    for number, line in enumerate(batch.lines, batch.first_line):
        place = f"{batch.path}:{number}"
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not valid JSON: {error}") from error
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{place}: expected an object with a "text" string, found {line.strip()[:60]!r}')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: not valid Unicode: {error.reason} at character {error.start}") from error
        yield place, text


class Sources:
    """The documents: files of training and of validation, or one file `docs` that begins with `val_docs` of validation.

    A pass over `docs` ends by setting `docs_sha256`, the hash of its lines.
    """

    def __init__(self, train: list[Path], val: list[Path], docs: Path | None, val_docs: int) -> None:
        self.train, self.val, self.docs, self.val_docs = train, val, docs, val_docs
        self.paths = [docs] if docs else val + train
        for path in self.paths:
            path.stat()  # a missing file is found before hours of work
        self.docs_sha256: str | None = None
        self.published = self.read_source_manifest() if docs else {}

    def read_source_manifest(self) -> dict:
        """What <docs>.source_manifest.json says, if it stands beside. ValueError if val_docs are fewer than it says.

        Where it says nothing, a file called like the published documents has the challenge's.
        """
        path = self.docs.with_name(self.docs.name.partition(".")[0] + ".source_manifest.json")
        published_name = self.docs.name.startswith("docs_selected")
        reserved, source = DEFAULT_VAL_DOCS if published_name else 0, "as in the challenge"
        published = {}
        if path.exists():
            try:
                published = dict(json.loads(path.read_bytes()))
                if "docs_val" in published:
                    reserved, source = int(published["docs_val"]), f"the docs_val of {path}"
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: not a source manifest: {error!r}") from error
        if self.val_docs < reserved:  # as a run of the challenge did, that trained on 40,000 of the scored documents
            raise ValueError(f"--val-docs: expected at least {reserved}, {source}, found {self.val_docs}")
        return published

    def batches(self) -> Iterator[Batch]:
        """All documents, those of validation first. ValueError, at the end, if the hash is not the published one."""
        if not self.docs:
            for split, paths in (("val", self.val), ("train", self.train)):
                yield from (replace(batch, split=split) for batch in read_batches(paths))
            return
        digest = sha256()
        for batch in read_batches([self.docs]):
            digest.update(b"".join(batch.lines))
            held_out = max(0, self.val_docs - batch.first_line + 1)  # lines of it; slices may reach beyond its end
            for split, start, end in (("val", 0, held_out), ("train", held_out, len(batch.lines))):
                if lines := batch.lines[start:end]:
                    consumed = batch.consumed * len(lines) // len(batch.lines)
                    yield Batch(batch.path, batch.first_line + start, lines, consumed, split)
        self.docs_sha256 = digest.hexdigest()
        expected = self.published.get("docs_sha256", self.docs_sha256)
        if self.docs_sha256 != expected:
            raise ValueError(f"{self.docs}: expected SHA-256 {expected}, as its source manifest says, found "
                             f"{self.docs_sha256}")


def hash64(data: bytes) -> int:
    """64-bit hash of `data`, the same in every run."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


# ----- tokenizer


def sample_texts(sources: Sources, sample_bytes: int) -> list[str]:
    """Training documents of about `sample_bytes` UTF-8 bytes, spread over all: those with the smallest hashes."""
    heap: list[tuple[int, int, str]] = []  # the largest hash on top
    total, order = 0, count()
    with progress(sources, "sampling") as bar:
        for batch in sources.batches():
            for _, text in texts(batch) if batch.split == "train" else ():
                data = text.encode()
                heapq.heappush(heap, (-hash64(data), next(order), text))
                total += len(data)
                while total > sample_bytes and len(heap) > 1:
                    total -= len(heapq.heappop(heap)[2].encode())
            bar.update(batch.consumed)
    return [text for _, _, text in sorted(heap, reverse=True)]


def progress(sources: Sources, label: str) -> tqdm:
    """Progress bar over the bytes of the documents on disk; none where nobody looks at it."""
    total = sum(os.path.getsize(path) for path in sources.paths)
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None)


def train_tokenizer(sample: Iterable[str], vocab_size: int, symbols: tuple[str, ...] = ()) -> bytes:
    """SentencePiece BPE model of `vocab_size` pieces, trained on the texts `sample`; serialized, deterministic.

    Each of `symbols` is a piece of its own and part of no other.

    Ids of the specials are those of the published tokenizers. Text is taken as it is (no normalization, no whitespace
    dropped), with byte fallback, so that decoding gives it back exactly; newlines are learned like letters. Pieces hold
    a space ("▁") only in front, which is what makes the byte count of the scorer exact.
    The trainer passes over stretches that hold its reserved characters (NUL, U+2581, U+2585). ValueError if it cannot
    make such a vocabulary: too little text, or more common characters than fit.
    """
    sample, reserved = list(sample), SPECIAL_PIECES + len(symbols)
    if not reserved < vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocabulary size: expected {reserved + 1} to {MAX_VOCAB}, found {vocab_size}")
    # Single characters may take half of what the specials leave; the rarer ones are spelled in bytes.
    characters = Counter()
    for text in sample:
        characters.update(text)
    common = sum(number for _, number in characters.most_common((vocab_size - reserved + 1) // 2))
    coverage = min(0.9995, max(0.98, common / max(1, characters.total())))  # the trainer takes 0.98 to 1
    sentences = (
        text[start : start + TRAINER_SENTENCE_CHARS]
        for text in sample
        for start in range(0, len(text), TRAINER_SENTENCE_CHARS)
    )
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            required_chars="▁",
            user_defined_symbols=list(symbols),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * TRAINER_SENTENCE_CHARS + 4,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from {len(sample)} documents: {error}") from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str, caseops: bool = False) -> spm.SentencePieceProcessor:
    """The tokenizer of a serialized `model`, checked; ValueError, beginning with `name`, if shards cannot use it."""
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"{name}: not a SentencePiece model: {error}") from error
    if tokenizer.vocab_size() > MAX_VOCAB:
        raise ValueError(f"{name}: expected at most {MAX_VOCAB} pieces, found {tokenizer.vocab_size()}")
    if tokenizer.bos_id() < 0:
        raise ValueError(f"{name}: expected a BOS piece to mark the start of a document, found none")
    # Without it a space is spelled as three byte pieces, and the byte count of the scorer is inflated.
    if tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
        raise ValueError(f'{name}: expected a stand-alone "▁" piece, found none')
    if caseops and any(tokenizer.is_unknown(tokenizer.piece_to_id(marker)) for marker in MARKERS):
        raise ValueError(f"{name}: expected the markers of CaseOps among its pieces, found not all of them")
    return tokenizer


def check_round_trip(encoder: "Encoder", sample: Iterable[str]) -> None:
    """ValueError unless the built-in probes and every text of `sample` are encoded so that they can be had back.

    Texts with a literal "▁" are left out: no SentencePiece tokenizer can tell it from a space.
    """
    for text in (*ROUND_TRIP_PROBES, *sample):
        if "▁" not in text and encoder([("probe", text)], "val").docs_lossy:
            raise ValueError(f"the new tokenizer does not give back the text {text[:60]!r}")


def piece_bytes(tokenizer: spm.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the scorer counts bytes: three tables of shape (vocab,).

    int64 bytes of a piece without its leading "▁"; bool whether it has one; bool whether it is a boundary (control,
    unknown or unused). A "▁" counts one byte more unless the token before is a boundary.
    """
    vocab_size = tokenizer.vocab_size()
    size = np.zeros(vocab_size, np.int64)
    space, boundary = np.zeros(vocab_size, bool), np.zeros(vocab_size, bool)
    for token in range(vocab_size):
        piece = tokenizer.id_to_piece(token)
        boundary[token] = tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)
        if not boundary[token]:
            space[token] = piece.startswith("▁")
            size[token] = 1 if tokenizer.is_byte(token) else len(piece.removeprefix("▁").encode())
    return size, space, boundary


def vocab_lines(tokenizer: spm.SentencePieceProcessor) -> bytes:
    """The .vocab file: piece and score, one line an id; line breaks and tabs inside a piece are written as \\n, \\t."""
    escape = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
    pieces = ((tokenizer.id_to_piece(token), tokenizer.get_score(token)) for token in range(tokenizer.vocab_size()))
    return "".join(f"{piece.translate(escape)}\t{score:g}\n" for piece, score in pieces).encode()


# ----- encoding


@dataclass
class Encoded:
    """What became of some documents under one tokenizer: `tokens` (count,) uint16, BOS before each, and counts.

    `docs_empty` gave no token and were skipped; `docs_lossy` decode to another text; `bytes` is what the scorer will
    count: the UTF-8 length of the decoded documents, with CaseOps restored. `charges` (count,) uint16 says which
    token is charged how many of them, where that does not follow from the tokens: for CaseOps' validation; else (0,).
    """

    tokens: np.ndarray
    charges: np.ndarray
    docs: int = 0
    docs_empty: int = 0
    docs_lossy: int = 0
    bytes: int = 0


class Encoder:
    """Encodes documents with the serialized `model`, transformed if `caseops`, on `threads` threads of SentencePiece.
    """

    def __init__(self, model: bytes, name: str, caseops: bool = False, threads: int = 1) -> None:
        self.model, self.name, self.caseops, self.threads = model, name, caseops, threads
        self.tokenizer = load_tokenizer(model, name, caseops)
        self.tables = piece_bytes(self.tokenizer)

    def counted_bytes(self, tokens: np.ndarray) -> int:
        """Bytes the scorer will count for the document `tokens` (count,), BOS first, without CaseOps."""
        size, space, boundary = self.tables
        return int(size[tokens[1:]].sum() + (space[tokens[1:]] & ~boundary[tokens[:-1]]).sum())

    def encode(self, documents: list[str], split: str) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids of each of the `documents`, and what each id is charged where that does not follow from the ids."""
        if self.caseops and split == "val":
            pairs = [token_bytes(self.tokenizer, text) for text in documents]
            return [ids.tolist() for ids, _ in pairs], [charged for _, charged in pairs]
        documents = [transform(text) for text in documents] if self.caseops else documents
        return self.tokenizer.encode(documents, num_threads=self.threads), [np.zeros(0, np.uint16)] * len(documents)

    def __call__(self, documents: list[tuple[str, str]], split: str) -> Encoded:
        """Tokens of the (place, text) pairs. ValueError, naming the place, if the scorer would miscount the bytes."""
        nothing = np.zeros(0, np.uint16)
        tokens, charges, result = [nothing], [nothing], Encoded(nothing, nothing)
        encoded = zip(documents, *self.encode([text for _, text in documents], split))
        kept = [(place, text, ids, charged) for (place, text), ids, charged in encoded if ids]
        result.docs, result.docs_empty = len(kept), len(documents) - len(kept)
        decoded = self.tokenizer.decode([ids for _, _, ids, _ in kept], num_threads=self.threads) if kept else []
        for (place, text, ids, charged), back in zip(kept, decoded):
            tokens.append(np.array([self.tokenizer.bos_id(), *ids], np.uint16))
            back = restore(back, strict=False) if self.caseops else back
            length = len(back.encode())
            if not self.caseops:
                counted = self.counted_bytes(tokens[-1])
            else:
                counted = int(charged.sum(dtype=np.int64)) if split == "val" else length
            if counted != length:
                raise ValueError(f"{place}: {self.name} counts {counted} bytes for a document of {length}")
            if len(charged):
                charges += [np.zeros(1, np.uint16), charged]  # BOS is charged nothing
            result.docs_lossy += back != text
            result.bytes += length
        result.tokens, result.charges = np.concatenate(tokens), np.concatenate(charges)
        return result


# ----- shards


class ShardWriter:
    """A stream of tokens, in files `folder`/fineweb_<split>_<6 digits>.bin of `shard_tokens` each, the last shorter.

    Documents are cut where a shard is full, as in the published data. `shards` lists those that are complete.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict] = []
        self.file: BinaryIO | None = None
        self.filled = 0  # tokens of the current shard

    def add(self, tokens: np.ndarray) -> None:
        """Append `tokens` (count,) uint16 to the stream."""
        while len(tokens):
            if not self.file:
                self.file = open(self.folder / shard_names(self.split, len(self.shards) + 1)[-1], "wb")
                self.file.write(bytes(HEADER_BYTES))
            taken = min(len(tokens), self.shard_tokens - self.filled)
            self.file.write(tokens[:taken].astype("<u2").data)
            self.filled, tokens = self.filled + taken, tokens[taken:]
            if self.filled == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Complete the current shard, if there is one."""
        if not self.file:
            return
        self.file.seek(0)
        self.file.write(shard_header(self.filled))
        self.file.close()
        path = Path(self.file.name)
        self.shards.append({"name": path.name, "tokens": self.filled, "sha256": file_sha256(path)})
        self.file, self.filled = None, 0


class Dataset:
    """One tokenizer's shards of both splits in `folder`, and their totals.

    With `caseops` the charges of the validation tokens are a stream of their own, cut where the tokens are.
    """

    def __init__(self, folder: Path, shard_tokens: int, caseops: bool) -> None:
        self.folder = folder
        self.totals = {split: Counter() for split in ("train", "val")}
        self.writers = {split: ShardWriter(folder, split, shard_tokens)
                        for split in (*self.totals, *["val_bytes"] * caseops)}

    def add(self, split: str, encoded: Encoded) -> None:
        """Append some documents to `split`."""
        self.writers[split].add(encoded.tokens)
        if f"{split}_bytes" in self.writers:
            self.writers[f"{split}_bytes"].add(encoded.charges)
        for name in ("docs", "docs_empty", "docs_lossy", "bytes"):
            self.totals[split][name] += getattr(encoded, name)

    def close(self) -> None:
        """Complete the last shards. ValueError if a split has no documents."""
        for split, totals in self.totals.items():
            if not totals["docs"]:
                raise ValueError(f"no document with text for {split}")
        for writer in self.writers.values():
            writer.close()

    def stats(self) -> dict:
        """The manifest's numbers: files, tokens, docs (and those empty or lossy) and bytes of both splits."""
        numbers = {}
        for split, totals in self.totals.items():
            shards = self.writers[split].shards
            totals = totals | {"files": len(shards), "tokens": sum(shard["tokens"] for shard in shards)}
            for name in ("files", "tokens", "docs", "docs_empty", "docs_lossy", "bytes"):
                numbers[f"{name}_{split}"] = totals[name]
        return numbers

    def shard_files(self) -> list[dict]:
        """Name, tokens and hash of every shard."""
        return [shard for writer in self.writers.values() for shard in writer.shards]

    def overlap(self, bos: int) -> int:
        """Number of validation documents that begin like a training document, as records/audit.py finds them.

        ValueError if they are more than that allows (a few stand twice in the published documents themselves), or if
        a shard cannot be read.
        """
        paths = {split: [str(self.folder / shard["name"]) for shard in writer.shards]
                 for split, writer in self.writers.items()}
        val, docs = np.concatenate([read_shard(path) for path in paths["val"]]), self.totals["val"]["docs"]
        which = tqdm(range(len(paths["train"])), "overlap", unit="shard", disable=None)
        numbers = np.flatnonzero(find_overlap(val, paths["train"], which, bos)) + 1
        if len(numbers) > ALLOWED * docs:
            listed = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            raise ValueError(f"{self.folder.name}: {len(numbers)} of {docs} validation documents also stand in "
                             f"training (numbers {listed}); remove them there")
        return len(numbers)


# ----- data sets


@dataclass(frozen=True)
class Spec:
    """A data set to make: its `name` and its tokenizer, which is to be trained if there is no `model` yet."""

    name: str
    tokenizer_name: str
    vocab_size: int
    model: bytes | None
    caseops: bool

    @classmethod
    def make(cls, name: str | None, vocab_size: int | None, model: Path | None, caseops: bool) -> "Spec":
        """From either `vocab_size` or the file `model`. ValueError or OSError if that is unusable."""
        data = model.read_bytes() if model else None
        if model:
            vocab_size = load_tokenizer(data, str(model), caseops).vocab_size()
        suffix = "_caseops" if caseops else ""
        name = (name or f"local_sp{vocab_size}").removesuffix(suffix) + suffix
        if not re.fullmatch(r"[\w.+-]*\w", name):
            raise ValueError(f"--name: expected letters, digits and . _ + -, found {name!r}")
        prefix = re.sub(r"(10B)?(_sp\d+)?$", "", name.removesuffix(suffix))
        tokenizer_name = model.stem if model else f"{prefix}_{vocab_size}_bpe{suffix}"
        return cls(name, tokenizer_name, vocab_size, data, caseops)


def read_specs(path: Path) -> list[Spec]:
    """The data sets that the file `path` asks for; ValueError or OSError if it cannot be understood."""
    try:
        listed = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list of objects")
    types = {"name": str, "vocab_size": int, "model": str, "caseops": bool}
    specs = []
    for number, item in enumerate(listed, 1):
        if not isinstance(item, dict) or ("vocab_size" in item) == ("model" in item):
            raise ValueError(f'{path}: item {number}: expected an object with either "vocab_size" or "model"')
        for key, value in item.items():
            if type(value) is not types.get(key):
                raise ValueError(f"{path}: item {number}: {key}: not one of {', '.join(types)}, or not with the value "
                                 f"{value!r}")
        model = path.parent / item["model"] if "model" in item else None
        specs.append(Spec.make(item.get("name"), item.get("vocab_size"), model, item.get("caseops", False)))
    return specs


def check_names(manifest: dict, specs: list[Spec]) -> None:
    """ValueError if a data set or a tokenizer would take the place of another one, here or among the `specs`."""
    models: dict[str, bytes | None] = {}
    for index, spec in enumerate(specs):
        if spec.name in (other.name for other in specs[:index]):
            raise ValueError(f"{spec.name}: two data sets of this name")
        if models.setdefault(spec.tokenizer_name, spec.model) != spec.model:
            raise ValueError(f"{spec.tokenizer_name}: two tokenizers of this name")
        if "repo" in (find_entry(manifest, "datasets", spec.name) or {}):
            raise ValueError(f"{spec.name}: downloaded by data/cached_challenge_fineweb.py; change --name")


def check_standing(out: Path, manifest: dict, specs: list[Spec], model: bytes, tokenizer_name: str) -> None:
    """ValueError if a tokenizer of this name stands here, is another, and belongs to a data set that will stay."""
    mine = {spec.name for spec in specs}
    users = [entry["name"] for entry in manifest["datasets"]
             if entry.get("tokenizer_name") == tokenizer_name and entry["name"] not in mine]
    standing = out / "tokenizers" / f"{tokenizer_name}.model"
    if users and standing.exists() and standing.read_bytes() != model:
        raise ValueError(f"{standing}: another tokenizer of this name belongs to {', '.join(users)}; change --name")


def prepare_tokenizers(specs: list[Spec], sources: Sources, sample_bytes: int, workers: int) -> list[Encoder]:
    """The tokenizer of each of `specs`; those to be trained are, on one sample of the documents."""
    sample: list[str] | None = None
    encoders = []
    for spec in specs:
        model = spec.model
        if not model:
            if sample is None:
                sample = sample_texts(sources, sample_bytes)
            print(f"training {spec.tokenizer_name} on {len(sample):,} documents", flush=True)
            if spec.caseops:
                model = train_tokenizer(map(transform, sample), spec.vocab_size, MARKERS)
            else:
                model = train_tokenizer(sample, spec.vocab_size)
            check_round_trip(Encoder(model, spec.tokenizer_name, spec.caseops), sample[:200])
        encoders.append(Encoder(model, spec.tokenizer_name, spec.caseops, workers))
    return encoders


def encode_datasets(specs: list[Spec], encoders: list[Encoder], sources: Sources, shard_tokens: int,
                    work: Path) -> list[Dataset]:
    """Encode all documents into a data set for each of `specs`, in a folder of its name in `work`."""
    datasets = [Dataset(work / spec.name, shard_tokens, spec.caseops) for spec in specs]
    for dataset in datasets:
        dataset.folder.mkdir()
    with progress(sources, "encoding") as bar:
        for batch in sources.batches():
            documents = list(texts(batch))
            for dataset, encoder in zip(datasets, encoders):
                dataset.add(batch.split, encoder(documents, batch.split))
            bar.update(batch.consumed)
    for dataset in datasets:
        dataset.close()
    return datasets


def place_folder(new: Path, final: Path, old: Path) -> None:
    """Give the folder `new` the name `final`; one that stands there gets the name `old`."""
    if final.exists():
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise


def make_datasets(args: argparse.Namespace, specs: list[Spec], sources: Sources, manifest: dict, work: Path) -> None:
    """Make the data sets and tokenizers of `specs` in `work` and put them, and the manifest, in place."""
    encoders = prepare_tokenizers(specs, sources, int(args.tokenizer_sample_mb * 1e6), args.workers)
    for encoder in encoders:
        check_standing(args.out, manifest, specs, encoder.model, encoder.name)
    datasets = encode_datasets(specs, encoders, sources, args.shard_tokens, work)
    overlaps = [dataset.overlap(encoder.tokenizer.bos_id()) for encoder, dataset in zip(encoders, datasets)]

    (args.out / "tokenizers").mkdir(exist_ok=True)
    for spec, encoder, dataset, overlap in zip(specs, encoders, datasets, overlaps):
        folder = args.out / "datasets" / spec.name
        place_folder(dataset.folder, folder, work / f"old {spec.name}")
        model_path = Path("tokenizers", f"{encoder.name}.model")
        vocab_path = model_path.with_suffix(".vocab")
        for path, content in ((model_path, encoder.model), (vocab_path, vocab_lines(encoder.tokenizer))):
            with atomic_write(args.out / path) as file:
                file.write(content)
        entry = {"name": spec.name, "tokenizer_name": encoder.name}
        if spec.caseops:
            entry["caseops"] = True
        if sources.docs:
            entry["docs_sha256"] = sources.docs_sha256
        entry["stats"] = dataset.stats() | {"docs_val_overlapping": overlap}
        entry["shard_files"] = dataset.shard_files()
        merge_manifest(manifest, "datasets", entry)
        merge_manifest(manifest, "tokenizers", {
            "name": encoder.name,
            "vocab_size": encoder.tokenizer.vocab_size(),
            "model_path": model_path.as_posix(),
            "vocab_path": vocab_path.as_posix(),
        })
        report(entry, folder)
    write_manifest(args.out / "manifest.json", manifest)


def report(entry: dict, folder: Path) -> None:
    """Print what the manifest's `entry` of the data set in `folder` says."""
    stats = entry["stats"]
    print(f"{entry['name']} with {entry['tokenizer_name']} -> {folder}")
    for split in ("train", "val"):
        names = ("files", "tokens", "bytes", "docs", "docs_lossy", "docs_empty")
        files, tokens, size, docs, lossy, empty = (stats[f"{name}_{split}"] for name in names)
        print(f"  {split}: {files} files, {tokens:,} tokens, {size:,} bytes, {docs:,} documents ({lossy:,} decode to "
              f"another text), {empty:,} empty ones skipped")
    print(f"  {stats['docs_val_overlapping']} validation documents begin like a training document")


# ----- command line


def tokenize(args: argparse.Namespace) -> None:
    """Do what the command line asks; ValueError or OSError if it cannot be done."""
    if args.shard_tokens < 1:
        raise ValueError(f"--shard-tokens: expected at least 1, found {args.shard_tokens}")
    if bool(args.docs) == bool(args.train or args.val) or bool(args.train) != bool(args.val):
        raise ValueError("expected either --docs, or both --train and --val")
    if args.val_docs is not None and (args.val_docs < 1 or not args.docs):
        raise ValueError(f"--val-docs: expected at least 1, and --docs, found {args.val_docs}")
    if args.specs and (args.name or args.caseops):
        raise ValueError("--name, --caseops: expected in the file of --specs")
    sources = Sources(args.train or [], args.val or [], args.docs, args.val_docs or DEFAULT_VAL_DOCS)
    if args.specs:
        specs = read_specs(args.specs)
    else:
        specs = [Spec.make(args.name, args.vocab_size, args.tokenizer, args.caseops)]
    args.out.mkdir(parents=True, exist_ok=True)
    with only_one(args.out):
        manifest = read_manifest(args.out / "manifest.json")
        check_names(manifest, specs)
        work = args.out / "datasets" / ".tokenize"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            make_datasets(args, specs, sources, manifest, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def worker_count(text: str) -> int:
    """Number of threads for the command-line value `text`: "auto" is the number of cores this process may use."""
    if text != "auto":
        if int(text) < 1:
            raise ValueError
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser(description="Turn documents into token shards in the published layout.")
    parser.add_argument("--docs", type=Path, metavar="FILE",
                        help="all documents, those of validation first, as in the published docs_selected.jsonl")
    parser.add_argument("--val-docs", type=int, metavar="N",
                        help=f"how many of --docs are validation (default: {DEFAULT_VAL_DOCS})")
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE",
                        help='training documents: .jsonl, .jsonl.gz or .jsonl.xz, {"text": ...} a line')
    parser.add_argument("--val", type=Path, nargs="+", metavar="FILE", help="validation documents")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="folder of datasets/, tokenizers/ and manifest.json")
    parser.add_argument("--name", help="dataset name (default: local_sp<vocabulary size>)")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--vocab-size", type=int, metavar="N", help="train a BPE tokenizer of N pieces")
    choice.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this SentencePiece model")
    choice.add_argument("--specs", type=Path, metavar="FILE", help="make the data sets that this JSON file lists")
    parser.add_argument("--caseops", action="store_true", help="transform the documents (data/caseops.py)")
    parser.add_argument("--tokenizer-sample-mb", type=float, default=20, metavar="MB",
                        help="train tokenizers on this many million bytes of training documents (default: 20)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                        help="tokens in a full shard (default: 100000000)")
    parser.add_argument("--workers", type=worker_count, default="auto", metavar="N",
                        help="threads that encode (default: auto, one a core)")
    interrupt_on_sigterm()
    try:
        tokenize(parser.parse_args(argv))
    except (OSError, ValueError, MemoryError, KeyboardInterrupt) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
