#!/usr/bin/env python3
"""Documents -> tokenizer, shards and manifest in the published layout.

Notable features:
- reads .jsonl, .jsonl.gz and .jsonl.xz as streams, one {"text": ...} a line
- trains a SentencePiece BPE tokenizer of any size on the training documents, or takes an existing one
- refuses a tokenizer whose bytes cannot be counted exactly, and validation documents that also stand in training
- encodes on all cores with bounded memory; the output does not depend on the number of workers
- the dataset folder appears whole or not at all, the manifest last

    python data/tokenize_docs.py --train docs_train.jsonl --val docs_val.jsonl --out data --vocab-size 1024

writes, below --out:

    datasets/local_sp1024/fineweb_train_000000.bin, ..., fineweb_val_000000.bin
    tokenizers/local_1024_bpe.model, tokenizers/local_1024_bpe.vocab
    manifest.json

A dataset `<prefix>_sp<N>` gets the tokenizer `<prefix>_<N>_bpe`; an existing tokenizer keeps the name of its file.
"""

import argparse
import gzip
import heapq
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import sentencepiece as spm
from shards import (
    MAX_VOCAB,
    atomic_write,
    file_sha256,
    interrupt_on_sigterm,
    merge_manifest,
    one_line,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from tqdm import tqdm

BATCH_BYTES = 1 << 20  # JSON lines handed to a worker at once
SPECIAL_PIECES = 4 + 256  # pad, bos, eos, unk and the byte pieces
TRAINER_SENTENCE_CHARS = 30_000  # the trainer stores positions in 16 bits and drops what is too long
ROUND_TRIP_PROBES = (
    "plain", " leading", "trailing ", "two  spaces", "a\nb\n\n c\r\n", "\ttab\t", "7 + 1234.5", "na\u00efve e\u0301",
    "\u6f22\u5b57 \uff21", "\U0001f600\u200d\U0001f525", "<s> <0x0A> </s>", "\ufb01 \u00a0\u3000", "\x00", "\n", "   ",
)


# ----- documents


@dataclass(frozen=True)
class Batch:
    """Consecutive JSON `lines` (bytes) of file `path`, the first being line `first_line` (from 1).

    `consumed` counts the bytes read from disk for it, for the progress bar.
    """

    path: str
    first_line: int
    lines: list[bytes]
    consumed: int


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


def hash64(data: bytes) -> int:
    """64-bit hash of `data`, the same in every run."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


# ----- tokenizer


def sample_texts(paths: Iterable[Path], sample_bytes: int) -> list[str]:
    """Documents of about `sample_bytes` UTF-8 bytes in all, spread over the files: those with the smallest hashes."""
    heap: list[tuple[int, int, str]] = []  # the largest hash on top
    total, order = 0, count()
    for batch in progress(read_batches(paths), paths, "sampling"):
        for _, text in texts(batch):
            data = text.encode()
            heapq.heappush(heap, (-hash64(data), next(order), text))
            total += len(data)
            while total > sample_bytes and len(heap) > 1:
                total -= len(heapq.heappop(heap)[2].encode())
    return [text for _, _, text in sorted(heap, reverse=True)]


def train_tokenizer(sample: list[str], vocab_size: int) -> bytes:
    """SentencePiece BPE model of `vocab_size` pieces, trained on the texts `sample`; serialized, deterministic.

    Ids of the specials are those of the published tokenizers. Text is taken as it is (no normalization, no whitespace
    dropped), with byte fallback, so that decoding gives it back exactly; newlines are learned like letters. Pieces hold
    a space ("▁") only in front, which is what makes the byte count of the scorer exact.
    The trainer passes over stretches that hold its reserved characters (NUL, U+2581, U+2585). ValueError if it cannot
    make such a vocabulary: too little text, or more common characters than fit.
    """
    if not SPECIAL_PIECES < vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocabulary size: expected {SPECIAL_PIECES + 1} to {MAX_VOCAB}, found {vocab_size}")
    # Single characters may take half of what the specials leave; the rarer ones are spelled in bytes.
    characters = Counter()
    for text in sample:
        characters.update(text)
    common = sum(number for _, number in characters.most_common((vocab_size - SPECIAL_PIECES + 1) // 2))
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


def load_tokenizer(model: bytes, name: str) -> spm.SentencePieceProcessor:
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
    return tokenizer


def check_round_trip(tokenizer: spm.SentencePieceProcessor, sample: Iterable[str]) -> None:
    """ValueError unless decode(encode(text)) is `text` for the built-in probes and every text of `sample`.

    Texts with a literal "▁" are left out: no SentencePiece tokenizer can tell it from a space.
    """
    for text in (*ROUND_TRIP_PROBES, *sample):
        if "▁" not in text and tokenizer.decode(tokenizer.encode(text)) != text:
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
    """What became of one batch: `tokens` (count,) uint16, `hashes` (docs,) uint64, and counts.

    A hash is over the tokens of a document, so that texts the tokenizer cannot tell apart count as the same.

    `docs_empty` gave no token and were skipped; `docs_lossy` decode to another text; `bytes` is the UTF-8 length of the
    decoded documents, what the scorer will count; `consumed` is the batch's, for the progress bar.
    """

    tokens: np.ndarray
    hashes: np.ndarray
    docs: int = 0
    docs_empty: int = 0
    docs_lossy: int = 0
    bytes: int = 0
    consumed: int = 0


class Encoder:
    """Encodes batches with the serialized `model`; can be sent to another process."""

    def __init__(self, model: bytes, name: str) -> None:
        self.model, self.name = model, name
        self.tokenizer = load_tokenizer(model, name)
        self.tables = piece_bytes(self.tokenizer)

    def __reduce__(self) -> tuple:
        return Encoder, (self.model, self.name)

    def counted_bytes(self, tokens: np.ndarray) -> int:
        """Bytes the scorer will count for the document `tokens` (count,), BOS first."""
        size, space, boundary = self.tables
        return int(size[tokens[1:]].sum() + (space[tokens[1:]] & ~boundary[tokens[:-1]]).sum())

    def __call__(self, batch: Batch) -> Encoded:
        """Tokens of `batch`, BOS before every document. ValueError, naming file and line, for a bad document."""
        parts, hashes, result = [], [], Encoded(np.zeros(0, np.uint16), np.zeros(0, np.uint64))
        for place, text in texts(batch):
            ids = self.tokenizer.encode(text)
            if not ids:
                result.docs_empty += 1
                continue
            decoded = self.tokenizer.decode(ids)
            tokens = np.array([self.tokenizer.bos_id(), *ids], np.uint16)
            length, counted = len(decoded.encode()), self.counted_bytes(tokens)
            if counted != length:
                raise ValueError(f"{place}: {self.name} counts {counted} bytes for a document that decodes to {length}")
            parts.append(tokens)
            hashes.append(hash64(tokens.tobytes()))
            result.docs += 1
            result.docs_lossy += decoded != text
            result.bytes += length
        if parts:
            result.tokens, result.hashes = np.concatenate(parts), np.array(hashes, np.uint64)
        result.consumed = batch.consumed
        return result


_encoder: Encoder | None = None  # of this worker process; set once by start_worker


def start_worker(encoder: Encoder) -> None:
    """Prepare a worker process: keep the `encoder`, leave Ctrl-C to the parent, end when the parent is gone."""
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_in_worker(batch: Batch) -> Encoded:
    """Encode `batch` in a worker process prepared by start_worker."""
    return _encoder(batch)


def ordered_map(encoder: Encoder, batches: Iterable[Batch], workers: int) -> Iterator[Encoded]:
    """`encoder` over `batches` in order on `workers` processes, with a bounded number of batches in flight."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    context = multiprocessing.get_context("spawn")  # the same on every system, and safe with threads
    pool = ProcessPoolExecutor(workers, context, start_worker, (encoder,))
    pending = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(encode_in_worker, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker process died (out of memory?)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable, paths: Iterable[Path], label: str) -> Iterator:
    """`items` with a progress bar over the bytes of `paths` on disk; each item says how many it `consumed`."""
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for item in items:
            yield item
            bar.update(item.consumed)


# ----- shards


@dataclass
class Split:
    """Totals of one split and its shards; the fields are the manifest's."""

    files: int = 0
    tokens: int = 0
    docs: int = 0
    docs_empty: int = 0
    docs_lossy: int = 0
    bytes: int = 0
    shards: list[dict] = field(default_factory=list)


def write_split(folder: Path, split: str, encoded: Iterable[Encoded], shard_tokens: int) -> Split:
    """Write the token stream as `folder`/fineweb_<split>_<6 digits>.bin, `shard_tokens` each, the last one shorter.

    Documents are cut where a shard is full, as in the published data.
    """
    result = Split()
    buffer, filled = np.empty(shard_tokens, np.uint16), 0

    def flush() -> None:
        path = folder / f"fineweb_{split}_{result.files:06d}.bin"
        write_shard(path, buffer[:filled])
        result.shards.append({"name": path.name, "tokens": filled, "sha256": file_sha256(path)})
        result.files += 1
        result.tokens += filled

    for item in encoded:
        for name in ("docs", "docs_empty", "docs_lossy", "bytes"):
            setattr(result, name, getattr(result, name) + getattr(item, name))
        tokens = item.tokens
        while len(tokens):
            taken = min(len(tokens), shard_tokens - filled)
            buffer[filled : filled + taken] = tokens[:taken]
            filled, tokens = filled + taken, tokens[taken:]
            if filled == shard_tokens:
                flush()
                filled = 0
    if filled:
        flush()
    if not result.docs:
        raise ValueError(f"no document with text for {split}")
    return result


def encode_dataset(folder: Path, encoder: Encoder, train: list[Path], val: list[Path], shard_tokens: int,
                   workers: int) -> tuple[Split, Split]:
    """Write train and val shards to `folder`; returns their totals. ValueError if a val document is also in train."""
    held_out: set[int] = set()
    overlapping = 0

    def remember(items: Iterable[Encoded]) -> Iterator[Encoded]:
        for item in items:
            held_out.update(item.hashes.tolist())
            yield item

    def compare(items: Iterable[Encoded]) -> Iterator[Encoded]:
        nonlocal overlapping
        for item in items:
            overlapping += sum(value in held_out for value in item.hashes.tolist())
            yield item

    def encoded(paths: list[Path], label: str) -> Iterator[Encoded]:
        return progress(ordered_map(encoder, read_batches(paths), workers), paths, label)

    val_split = write_split(folder, "val", remember(encoded(val, "val")), shard_tokens)
    train_split = write_split(folder, "train", compare(encoded(train, "train")), shard_tokens)
    if overlapping:
        raise ValueError(f"{overlapping} training documents also stand in validation; remove them from --train")
    return train_split, val_split


def place_folder(build: Callable[[Path], tuple[Split, Split]], final: Path) -> tuple[Split, Split]:
    """Run `build`(temporary folder) and give the folder the name `final`, replacing one that stands there.

    Returns what `build` returns. Nothing is left of a build that fails.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        built = temporary / "new"
        built.mkdir()  # with the usual permissions; mkdtemp is private
        result = build(built)
        old = temporary / "old"
        if final.exists():
            final.rename(old)
        try:
            built.rename(final)
        except BaseException:
            if old.exists():
                old.rename(final)
            raise
        return result
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ----- manifest


def stats(train: Split, val: Split) -> dict:
    """The manifest's numbers: files, tokens, docs (and those empty or lossy) and bytes of both splits."""
    names = ("files", "tokens", "docs", "docs_empty", "docs_lossy", "bytes")
    parts = (("train", train), ("val", val))
    return {f"{name}_{part}": getattr(totals, name) for name in names for part, totals in parts}


def overlapping_documents(folder: Path, train: Split, val: Split, bos: int) -> int:
    """Validation documents that begin like a training document: the `no_overlap` check that AUDIT=1 makes of a run."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from train_gpt import find_overlap  # late: it takes torch along

    tokens = np.concatenate([read_shard(folder / shard["name"]) for shard in val.shards])
    paths = [str(folder / shard["name"]) for shard in train.shards]
    return int(find_overlap(tokens, paths, tqdm(range(len(paths)), "overlap", unit="shard", disable=None), bos).sum())


# ----- command line


def tokenize(args: argparse.Namespace) -> None:
    """Do what the command line asks; ValueError or OSError if it cannot be done."""
    if args.shard_tokens < 1:
        raise ValueError(f"--shard-tokens: expected at least 1, found {args.shard_tokens}")
    for path in (*args.train, *args.val):
        path.stat()  # a missing file is found before hours of work
    args.out.mkdir(parents=True, exist_ok=True)
    manifest_path = args.out / "manifest.json"
    manifest = read_manifest(manifest_path)

    if args.tokenizer:
        model = args.tokenizer.read_bytes()
        tokenizer = load_tokenizer(model, str(args.tokenizer))
        name = args.name or f"local_sp{tokenizer.vocab_size()}"
        tokenizer_name = args.tokenizer.stem
    else:
        name = args.name or f"local_sp{args.vocab_size}"
        tokenizer_name = re.sub(r"(10B)?(_sp\d+)?$", "", name) + f"_{args.vocab_size}_bpe"
        sample = sample_texts(args.train, int(args.tokenizer_sample_mb * 1e6))
        print(f"training {tokenizer_name} on {len(sample):,} documents", flush=True)
        model = train_tokenizer(sample, args.vocab_size)
        tokenizer = load_tokenizer(model, tokenizer_name)
        check_round_trip(tokenizer, sample[:200])
    if not re.fullmatch(r"[\w.+-]*\w", name):
        raise ValueError(f"--name: expected letters, digits and . _ + -, found {name!r}")

    model_path = Path("tokenizers", f"{tokenizer_name}.model")
    users = [d["name"] for d in manifest["datasets"] if d.get("tokenizer_name") == tokenizer_name and d["name"] != name]
    standing = args.out / model_path
    if users and standing.exists() and standing.read_bytes() != model:
        raise ValueError(f"{standing}: another tokenizer of this name belongs to {', '.join(users)}; change --name")

    folder = args.out / "datasets" / name
    encoder = Encoder(model, tokenizer_name)
    train, val = place_folder(
        lambda new: encode_dataset(new, encoder, args.train, args.val, args.shard_tokens, args.workers), folder
    )
    standing.parent.mkdir(exist_ok=True)
    for path, content in ((standing, model), (standing.with_suffix(".vocab"), vocab_lines(tokenizer))):
        with atomic_write(path) as file:
            file.write(content)
    overlap = overlapping_documents(folder, train, val, tokenizer.bos_id())
    merge_manifest(manifest, "datasets", {
        "name": name,
        "tokenizer_name": tokenizer_name,
        "stats": stats(train, val) | {"docs_val_overlapping": overlap},
        "shard_files": train.shards + val.shards,
    })
    merge_manifest(manifest, "tokenizers", {
        "name": tokenizer_name,
        "vocab_size": tokenizer.vocab_size(),
        "model_path": model_path.as_posix(),
        "vocab_path": model_path.with_suffix(".vocab").as_posix(),
    })
    write_manifest(manifest_path, manifest)
    for part, totals in (("train", train), ("val", val)):
        print(f"{part}: {totals.files} files, {totals.tokens:,} tokens, {totals.bytes:,} bytes, {totals.docs:,} "
              f"documents ({totals.docs_lossy:,} decode to another text), {totals.docs_empty:,} empty ones skipped")
    print(f"{overlap} validation documents begin like a training document")
    if overlap > 0.005 * val.docs:
        print("warning: that is more than 0.5 % of them: a run's AUDIT=1 will fail", file=sys.stderr)
    print(f"{name} with {tokenizer_name} -> {folder}")


def worker_count(text: str) -> int:
    """Number of processes for the command-line value `text`: "auto" is the number of cores this process may use."""
    if text != "auto":
        if int(text) < 1:
            raise ValueError
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Turn documents into token shards in the published layout.")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE",
                        help='training documents: .jsonl, .jsonl.gz or .jsonl.xz, {"text": ...} a line')
    parser.add_argument("--val", type=Path, nargs="+", required=True, metavar="FILE", help="validation documents")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="folder of datasets/, tokenizers/ and manifest.json")
    parser.add_argument("--name", help="dataset name (default: local_sp<vocabulary size>)")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--vocab-size", type=int, metavar="N", help="train a BPE tokenizer of N pieces")
    choice.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this SentencePiece model")
    parser.add_argument("--tokenizer-sample-mb", type=float, default=20, metavar="MB",
                        help="train the tokenizer on this many million bytes of --train (default: 20)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                        help="tokens in a full shard (default: 100000000)")
    parser.add_argument("--workers", type=worker_count, default="auto", metavar="N",
                        help="processes that encode (default: auto, one a core)")
    args = parser.parse_args(argv)
    interrupt_on_sigterm()
    try:
        tokenize(args)
    except (OSError, ValueError, MemoryError, KeyboardInterrupt) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
