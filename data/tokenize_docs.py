#!/usr/bin/env python3
"""Turn documents into tokenizers, token shards and a manifest in the published layout.

Notable features:
- The input is .jsonl, .jsonl.gz or .jsonl.xz with one {"text": ...} a line. It is read as a stream.
- The tool trains SentencePiece BPE tokenizers on the training documents, or takes existing ones.
- One pass over the documents makes the data sets of several tokenizers.
- With CaseOps the documents are transformed first. The bytes of each validation token are written beside the shards.
- Frequent pairs of a piece and a marker of CaseOps can become one token each. The headers of the shards list them.
- The published documents are split as the challenge does: the first 50,000 are validation, and no others.
- A tokenizer whose bytes cannot be counted exactly is refused. So are training documents that are also in validation.
- All cores encode, and memory is bounded. The output does not depend on the number of cores.
- A data set appears whole or not at all. The manifest is written last.

    python data/tokenize_docs.py --docs data/docs_selected.jsonl --out data --name mine_sp8192 --vocab-size 8192
    python data/tokenize_docs.py --docs data/docs_selected.jsonl --out data --specs tokenizers.json
    python data/tokenize_docs.py --train docs_train.jsonl --val docs_val.jsonl --out data --vocab-size 1024

The last command writes, below --out:

    datasets/local_sp1024/fineweb_train_000000.bin, ..., fineweb_val_000000.bin
    tokenizers/local_1024_bpe.model, tokenizers/local_1024_bpe.vocab
    manifest.json

A data set called <prefix>_sp<N> gets the tokenizer <prefix>_<N>_bpe. An existing tokenizer keeps the name of its file.
With --caseops both names end in _caseops, and each fineweb_val_<6 digits>.bin has a fineweb_val_bytes_<6 digits>.bin.
That file holds, as uint16, the bytes of raw text that each token is charged. BOS is charged none. With --fuse-markers
as well, the name of the data set ends in _caseops_fused. The tokenizer is the same one.

The file tokenizers.json is a list with one object for each data set. The object has a "name" (local_sp<N> without one),
either "vocab_size" or "model", and perhaps "caseops" and "fuse_markers". A relative path of a "model" starts from the
folder of the file:

    [{"name": "mine_sp4096", "vocab_size": 4096}, {"name": "other_sp8192", "model": "fineweb_8192_bpe.model"},
     {"name": "mine_sp8192", "vocab_size": 8192, "caseops": true}]

Unfinished data sets stand in datasets/.tokenize. It goes when the program ends or, after a kill, when it runs again.
"""

import argparse
import gzip
import heapq
import io
import json
import lzma
import re
import shutil
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece as spm
import shards
from caseops import MARKERS, Fusion, restore, token_bytes, transform
from overlap import ALLOWED, find_overlap
from tqdm import tqdm

BATCH_LINES = 500  # documents that are encoded at once
SPECIAL_PIECES = 4 + 256  # pad, bos, eos, unk and the byte pieces
DEFAULT_VAL_DOCS = 50_000  # of the published documents
TRAINER_SENTENCE_CHARS = 30_000  # the trainer stores positions in 16 bits and drops what is too long
SPLITS = ("train", "val")


# ----- documents


@dataclass(frozen=True)
class Source:
    """A file of documents. The first `val_docs` of them are validation, the others are training."""

    path: Path
    val_docs: int


@contextmanager
def open_documents(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file of documents, and give the file on disk and the unpacked one. Raise ValueError if it is damaged."""
    unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda raw: raw)
    try:
        with open(path, "rb") as raw, unpack(raw) as file:
            yield raw, file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged compressed file: {error}") from error


def read_text(line: bytes, place: str) -> str:
    """Return the text of a JSON `line`. Raise ValueError, naming the `place`, if it has none."""
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
    return text


def read_batches(sources: list[Source], label: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the documents of all `sources` in order, as pairs of a split and a list of (place, text).

    A place is "file:line". The progress bar is called `label`.
    """
    total = sum(source.path.stat().st_size for source in sources)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for source in sources:
            with open_documents(source.path) as (raw, file):
                first, position = 0, 0
                while True:
                    held_out = max(0, source.val_docs - first)  # a batch does not reach over the border
                    lines = list(islice(file, min(held_out, BATCH_LINES) or BATCH_LINES))
                    if not lines:
                        break
                    places = [f"{source.path}:{number}" for number in range(first + 1, first + len(lines) + 1)]
                    yield "val" if held_out else "train", [*zip(places, map(read_text, lines, places))]
                    first += len(lines)
                    bar.update(raw.tell() - position)
                    position = raw.tell()


def check_documents(docs: Path, val_docs: int) -> str:
    """Return the SHA-256 of the documents `docs`. Raise ValueError if they are not to be split at `val_docs`.

    Beside the documents may stand <docs>.source_manifest.json. It says what their hash is and how many are validation,
    at least. Where it does not say so, a file that is called like the published documents has the challenge's 50,000.
    """
    path = docs.with_name(docs.name.partition(".")[0] + ".source_manifest.json")
    try:
        claims = dict(json.loads(path.read_bytes())) if path.exists() else {}
        reserved = int(claims.get("docs_val", DEFAULT_VAL_DOCS if docs.name.startswith("docs_selected") else 0))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a source manifest: {error!r}") from error
    if val_docs < reserved:  # a run of the challenge did so, and trained on 40,000 of the scored documents
        source = f"the docs_val of {path}" if "docs_val" in claims else "as in the challenge"
        raise ValueError(f"--val-docs: expected at least {reserved}, {source}, found {val_docs}")
    with open_documents(docs) as (_, file):
        found = file_digest(file, "sha256").hexdigest()
    expected = claims.get("docs_sha256", found)
    if found != expected:
        raise ValueError(f"{docs}: expected SHA-256 {expected}, as its source manifest says, found {found}")
    return found


# ----- tokenizer


def sample_texts(sources: list[Source], sample_bytes: float) -> list[str]:
    """Return training documents of about `sample_bytes` UTF-8 bytes: those that have the smallest hashes."""
    heap: list[tuple[int, str]] = []  # the largest hash on top
    total = 0
    for split, documents in read_batches(sources, "sampling"):
        for _, text in documents if split == "train" else ():
            data = text.encode()
            number = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
            heapq.heappush(heap, (-number, text))
            total += len(data)
            while total > sample_bytes and len(heap) > 1:
                total -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def train_tokenizer(sample: list[str], vocab_size: int, symbols: tuple[str, ...] = ()) -> bytes:
    """Return a serialized SentencePiece BPE model of `vocab_size` pieces, trained on the texts `sample`.

    Each of `symbols` becomes a piece of its own and part of no other. The special pieces have the ids of the published
    tokenizers. Text is taken as it is: nothing is normalized, no space is dropped, and what has no piece is spelled in
    bytes. So decoding gives the text back. A space ("▁") stands only in front of a piece, which makes the scorer's
    count of bytes exact. The trainer passes over stretches that hold its reserved characters (NUL, U+2581, U+2585).

    Raise ValueError if there is too little text for so many pieces, or more common characters than fit.
    """
    reserved = SPECIAL_PIECES + len(symbols)
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
        why = error if sample else "all documents are held out for validation; lower --val-docs"
        raise ValueError(f"no tokenizer of {vocab_size} pieces from {len(sample)} documents: {why}") from error
    return model.getvalue()


def piece_bytes(tokenizer: spm.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the three tables of shape (vocab,) by which the scorer counts bytes.

    The first one is the bytes of each piece without its leading "▁". The second one says whether it has a "▁", which
    is one byte more unless the token before is a boundary. The third one says whether a piece is a boundary: a control,
    unknown or unused piece.
    """
    ids = list(range(tokenizer.vocab_size()))
    pieces = tokenizer.id_to_piece(ids)
    boundary = np.array(tokenizer.is_control(ids)) | tokenizer.is_unknown(ids) | tokenizer.is_unused(ids)
    size = np.where(tokenizer.is_byte(ids), 1, [len(piece.removeprefix("▁").encode()) for piece in pieces])
    space = np.array([piece.startswith("▁") for piece in pieces])
    return np.where(boundary, 0, size), space & ~boundary, boundary


def vocab_lines(tokenizer: spm.SentencePieceProcessor) -> bytes:
    """Return the .vocab file: a line with piece and score for each id. Line breaks and tabs of a piece are escaped."""
    escape = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
    pieces = ((tokenizer.id_to_piece(token), tokenizer.get_score(token)) for token in range(tokenizer.vocab_size()))
    return "".join(f"{piece.translate(escape)}\t{score:g}\n" for piece, score in pieces).encode()


# ----- encoding


class Encoder:
    """Encodes documents with the serialized `model`. With `caseops` it transforms them first."""

    def __init__(self, model: bytes, name: str, caseops: bool = False, threads: int = -1) -> None:
        self.model, self.name, self.caseops = model, name, caseops
        self.tokenizer = shards.load_tokenizer(model, name, threads)
        self.tables, self.fusion = piece_bytes(self.tokenizer), Fusion(self.tokenizer)
        if caseops and any(self.tokenizer.is_unknown(self.tokenizer.piece_to_id(marker)) for marker in MARKERS):
            raise ValueError(f"{name}: expected the markers of CaseOps among its pieces, found not all of them")

    def counted_bytes(self, tokens: np.ndarray) -> int:
        """Return the bytes that the scorer will count for the `tokens` of a document, BOS first, without CaseOps."""
        size, space, boundary = self.tables
        return int(size[tokens[1:]].sum() + (space[tokens[1:]] & ~boundary[tokens[:-1]]).sum())

    def fuse_markers(self, sample: list[str]) -> None:
        """Fuse from now on the pairs that are the most frequent ones in the texts `sample`."""
        self.fusion = Fusion.choose(self.tokenizer, self.tokenizer.encode([transform(text) for text in sample]))

    def split_texts(self, texts: list[str], split: str) -> list[tuple[list[int], np.ndarray]]:
        """Return the token ids of each text, and the bytes that each id is charged if they do not follow from it."""
        if self.caseops and split == "val":
            return [(ids.tolist(), charged) for ids, charged in (token_bytes(self.tokenizer, text) for text in texts)]
        texts = [transform(text) for text in texts] if self.caseops else texts
        return [(ids, np.zeros(0, np.uint16)) for ids in self.tokenizer.encode(texts)]

    def __call__(self, documents: list[tuple[str, str]], split: str) -> tuple[np.ndarray, np.ndarray, Counter]:
        """Return the tokens of (place, text) pairs, the bytes that each token is charged, and numbers.

        The tokens are a uint16 array with BOS before each document. The charges are a uint16 array too. It is empty
        unless this is the validation set of CaseOps, because elsewhere the charges follow from the tokens. The numbers
        are those of the documents (`docs`), of those that gave no token and were skipped (`docs_empty`), of those that
        decode to another text (`docs_lossy`), and the `bytes` of the decoded documents in UTF-8, as the scorer counts.

        Raise ValueError, naming the place, if the scorer would count other bytes.
        """
        nothing = np.zeros(0, np.uint16)
        tokens, charges, numbers = [nothing], [nothing], Counter()
        encoded = self.split_texts([text for _, text in documents], split)
        fused = [self.fusion.fuse(np.array(ids)) for ids, _ in encoded]
        decoded = self.tokenizer.decode([self.fusion.split(ids)[0].tolist() for ids, _ in fused])
        for (place, text), (_, charged), (ids, starts), back in zip(documents, encoded, fused, decoded):
            if not len(ids):
                numbers["docs_empty"] += 1
                continue
            if len(charged):
                charged = np.add.reduceat(charged, starts)
            tokens.append(np.append(self.tokenizer.bos_id(), ids).astype(np.uint16))
            back = restore(back, strict=False) if self.caseops else back
            length = counted = len(back.encode())
            if not self.caseops:
                counted = self.counted_bytes(tokens[-1])
            elif split == "val":
                counted = int(charged.sum(dtype=np.int64))
                charges += [np.zeros(1, np.uint16), charged]  # BOS is charged nothing
            if counted != length:
                raise ValueError(f"{place}: {self.name} counts {counted} bytes for a document of {length}")
            numbers.update(docs=1, docs_lossy=back != text, bytes=length)
        return np.concatenate(tokens), np.concatenate(charges), numbers


# ----- data sets


class ShardWriter:
    """Writes a stream of tokens into shards of `shard_tokens`. The last one is shorter.

    Documents are cut where a shard is full, as in the published data. `written` lists the shards for the manifest. The
    headers list the `pairs` of tokens that are fused.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int, pairs: list[tuple[int, int, int]] = ()) -> None:
        self.folder, self.split, self.pairs = folder, split, pairs
        self.buffer, self.filled = np.empty(shard_tokens, np.uint16), 0
        self.written: list[dict] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append a uint16 array of tokens to the stream."""
        while len(tokens):
            taken = min(len(tokens), len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + taken] = tokens[:taken]
            self.filled, tokens = self.filled + taken, tokens[taken:]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is not yet in a shard."""
        if self.filled:
            path = self.folder / shards.shard_names(self.split, len(self.written) + 1)[-1]
            shards.write_shard(path, self.buffer[: self.filled], self.pairs)
            self.written.append({"name": path.name, "tokens": self.filled, "sha256": shards.file_sha256(path)})
            self.filled = 0


@dataclass(frozen=True)
class Spec:
    """A data set to make, and its tokenizer. The tokenizer is to be trained if there is no `model`."""

    name: str
    tokenizer_name: str
    vocab_size: int
    model: bytes | None
    caseops: bool
    fuse_markers: bool

    @classmethod
    def make(cls, name: str | None, vocab_size: int | None, model: Path | None, caseops: bool, fuse_markers: bool
             ) -> "Spec":
        """Make a Spec from either `vocab_size` or the file `model`. Raise ValueError or OSError if that is unusable."""
        if fuse_markers and not caseops:
            raise ValueError("--fuse-markers: expected together with --caseops, whose markers it fuses")
        suffix = "_caseops" if caseops else ""
        data = model.read_bytes() if model else None
        if model:
            vocab_size = Encoder(data, str(model), caseops).tokenizer.vocab_size()
        least = SPECIAL_PIECES + caseops * len(MARKERS) + 1
        if not model and not least <= vocab_size <= shards.MAX_VOCAB:
            raise ValueError(f"vocabulary size: expected {least} to {shards.MAX_VOCAB}, found {vocab_size}")
        end = suffix + ("_fused" if fuse_markers else "")
        name = (name or f"local_sp{vocab_size}").removesuffix(end).removesuffix(suffix) + end
        if not re.fullmatch(r"[\w.+-]*\w", name):
            raise ValueError(f"--name: expected letters, digits and . _ + -, found {name!r}")
        prefix = re.sub(r"(10B)?(_sp\d+)?$", "", name.removesuffix(end))
        tokenizer_name = model.stem if model else f"{prefix}_{vocab_size}_bpe{suffix}"
        return cls(name, tokenizer_name, vocab_size, data, caseops, fuse_markers)


class Dataset:
    """A data set while it is made: its shards in `folder`, and the numbers of its documents."""

    def __init__(self, name: str, encoder: Encoder, folder: Path, shard_tokens: int) -> None:
        self.name, self.encoder, self.folder = name, encoder, folder
        self.numbers = {split: Counter(docs=0, docs_empty=0, docs_lossy=0, bytes=0) for split in SPLITS}
        self.writers = {split: ShardWriter(folder, split, shard_tokens, encoder.fusion.pairs) for split in SPLITS}
        if encoder.caseops:
            self.writers["val_bytes"] = ShardWriter(folder, "val_bytes", shard_tokens)
        folder.mkdir()

    def add(self, split: str, documents: list[tuple[str, str]]) -> None:
        """Append some documents to `split`."""
        tokens, charges, numbers = self.encoder(documents, split)
        self.writers[split].add(tokens)
        if len(charges):
            self.writers[f"{split}_bytes"].add(charges)
        self.numbers[split].update(numbers)

    def finish(self, docs_sha256: str | None) -> dict:
        """Write the last shards, and return the entry for the manifest.

        Raise ValueError if a split has no documents, or if validation documents are in the training set.
        """
        stats = {}
        for split in SPLITS:
            if not self.numbers[split]["docs"]:
                raise ValueError(f"no document with text for {split}")
        for split, writer in self.writers.items():
            writer.flush()
            if split in SPLITS:
                stats[f"files_{split}"] = len(writer.written)
                stats[f"tokens_{split}"] = sum(shard["tokens"] for shard in writer.written)
                stats |= {f"{name}_{split}": number for name, number in self.numbers[split].items()}
        entry = {"name": self.name, "tokenizer_name": self.encoder.name}
        if self.encoder.caseops:
            entry["caseops"] = True
        if self.encoder.fusion.pairs:
            entry["fuse_markers"] = True
        if docs_sha256:
            entry["docs_sha256"] = docs_sha256
        entry["stats"] = stats | {"docs_val_overlapping": self.count_overlap()}
        entry["shard_files"] = [shard for writer in self.writers.values() for shard in writer.written]
        return entry

    def count_overlap(self) -> int:
        """Return the number of validation documents that begin like a training document.

        Raise ValueError if they are more than records/audit.py allows. The published documents have a few such pairs.
        """
        paths = {split: [str(self.folder / shard["name"]) for shard in self.writers[split].written] for split in SPLITS}
        val, docs = np.concatenate([shards.read_shard(path) for path in paths["val"]]), self.numbers["val"]["docs"]
        which = tqdm(range(len(paths["train"])), "overlap", unit="shard", disable=None)
        numbers = np.flatnonzero(find_overlap(val, paths["train"], which, self.encoder.tokenizer.bos_id())) + 1
        if len(numbers) > ALLOWED * docs:
            listed = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            raise ValueError(f"{self.name}: {len(numbers)} of {docs} validation documents also stand in training "
                             f"(numbers {listed}); remove them there")
        return len(numbers)


def read_specs(path: Path) -> list[Spec]:
    """Return the data sets that the file `path` asks for. Raise ValueError or OSError if it cannot be understood."""
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list of objects")
    types = {"name": str, "vocab_size": int, "model": str, "caseops": bool, "fuse_markers": bool}
    specs = []
    for number, item in enumerate(listed, 1):
        known = isinstance(item, dict) and all(type(value) is types.get(key) for key, value in item.items())
        if not known or ("vocab_size" in item) == ("model" in item):
            raise ValueError(f'{path}: item {number}: expected an object with "vocab_size", a number, or "model", a '
                             f'file, and perhaps "name", "caseops" and "fuse_markers", true or false; found {item}')
        model = path.parent / item["model"] if "model" in item else None
        specs.append(Spec.make(item.get("name"), item.get("vocab_size"), model, item.get("caseops", False),
                               item.get("fuse_markers", False)))
    return specs


def check_names(out: Path, specs: list[Spec]) -> None:
    """Raise ValueError if one of `specs` would replace another one, or what does not belong to it in `out`."""
    known, names = shards.read_manifest(out / "manifest.json")["datasets"], [spec.name for spec in specs]
    models: dict[str, bytes | None] = {}
    for spec in specs:
        if names.count(spec.name) > 1:
            raise ValueError(f"{spec.name}: two data sets of this name")
        if models.setdefault(spec.tokenizer_name, spec.model) != spec.model:
            raise ValueError(f"{spec.tokenizer_name}: two tokenizers of this name")
        if any(entry["name"] == spec.name and "repo" in entry for entry in known):
            raise ValueError(f"{spec.name}: downloaded by data/cached_challenge_fineweb.py; change --name")
        users = [entry["name"] for entry in known if entry.get("tokenizer_name") == spec.tokenizer_name]
        users = [name for name in users if name not in names]
        path = out / "tokenizers" / f"{spec.tokenizer_name}.model"
        if users and path.exists() and path.read_bytes() != spec.model:
            raise ValueError(f"{path}: another tokenizer of this name belongs to {', '.join(users)}; change --name, or "
                             "take that one by --tokenizer")


def make_encoders(specs: list[Spec], sources: list[Source], sample_mb: float, threads: int) -> list[Encoder]:
    """Return an encoder for each of `specs`. Tokenizers are trained, and pairs to fuse are chosen, on one sample of the
    training documents.
    """
    needed = any(not spec.model or spec.fuse_markers for spec in specs)
    sample = sample_texts(sources, sample_mb * 1e6) if needed else []
    encoders, models = [], {spec.tokenizer_name: spec.model for spec in specs}
    for spec in specs:
        if not models[spec.tokenizer_name]:
            print(f"training {spec.tokenizer_name} on {len(sample):,} documents", flush=True)
            texts = [transform(text) for text in sample] if spec.caseops else sample
            models[spec.tokenizer_name] = train_tokenizer(texts, spec.vocab_size, MARKERS if spec.caseops else ())
        encoders.append(Encoder(models[spec.tokenizer_name], spec.tokenizer_name, spec.caseops, threads))
        if spec.fuse_markers:
            encoders[-1].fuse_markers(sample)
    return encoders


@contextmanager
def in_place(new: Path, final: Path, old: Path) -> Iterator[None]:
    """Give the folder or file `new` the name `final`. What has this name gets the name `old`; after an error in the
    block all is as before.
    """
    if final.exists():
        final.rename(old)
    try:
        new.rename(final)
        yield
    except BaseException:
        if final.exists():
            final.rename(new)
        if old.exists():
            old.rename(final)
        raise


def write_tokenizer(folder: Path, encoder: Encoder) -> dict:
    """Write the files of a tokenizer into `folder`, and return its entry for the manifest."""
    entry = {"name": encoder.name, "vocab_size": encoder.tokenizer.vocab_size(),
             "model_path": f"tokenizers/{encoder.name}.model", "vocab_path": f"tokenizers/{encoder.name}.vocab"}
    for key, content in (("model_path", encoder.model), ("vocab_path", vocab_lines(encoder.tokenizer))):
        with shards.atomic_write(folder / Path(entry[key]).name) as file:
            file.write(content)
    return entry


def report(entry: dict, folder: Path) -> None:
    """Print the numbers of the data set in `folder` that has this `entry` in the manifest."""
    stats = entry["stats"]
    print(f"{entry['name']} with {entry['tokenizer_name']} -> {folder}")
    for split in SPLITS:
        files, tokens, size, docs, lossy, empty = (
            stats[f"{name}_{split}"] for name in ("files", "tokens", "bytes", "docs", "docs_lossy", "docs_empty"))
        print(f"  {split}: {files} files, {tokens:,} tokens, {size:,} bytes, {docs:,} documents ({lossy:,} decode to "
              f"another text), {empty:,} empty ones skipped")
    print(f"  {stats['docs_val_overlapping']} validation documents begin like a training document")


def make_datasets(args: argparse.Namespace, specs: list[Spec], sources: list[Source], work: Path) -> None:
    """Make the data sets of `specs` in the folder `work`. Then put them, their tokenizers and the manifest in place."""
    docs_sha256 = check_documents(args.docs, args.val_docs) if args.docs else None
    made = [Dataset(spec.name, encoder, work / spec.name, args.shard_tokens)
            for spec, encoder in zip(specs, make_encoders(specs, sources, args.tokenizer_sample_mb, args.workers))]
    for split, documents in read_batches(sources, "encoding"):
        for dataset in made:
            dataset.add(split, documents)
    entries, folders = [dataset.finish(docs_sha256) for dataset in made], args.out / "datasets"
    tokenizers = [write_tokenizer(work, dataset.encoder) for dataset in made]
    (args.out / "tokenizers").mkdir(exist_ok=True)
    with ExitStack() as placed:  # all of it or nothing
        for dataset in made:
            placed.enter_context(in_place(dataset.folder, folders / dataset.name, work / f"old {dataset.name}"))
        # data sets may share a tokenizer
        for path in {Path(entry[key]) for entry in tokenizers for key in ("model_path", "vocab_path")}:
            placed.enter_context(in_place(work / path.name, args.out / path, work / f"old {path.name}"))
        shards.update_manifest(args.out / "manifest.json", entries, tokenizers)
    for entry in entries:
        report(entry, folders / entry["name"])


# ----- the command line


def tokenize(args: argparse.Namespace) -> None:
    """Do what the command line asks. Raise ValueError or OSError if it cannot be done."""
    if bool(args.docs) == bool(args.train or args.val) or bool(args.train) != bool(args.val):
        raise ValueError("expected either --docs, or both --train and --val")
    if args.val_docs and not args.docs:
        raise ValueError("--val-docs: expected together with --docs")
    args.val_docs = args.val_docs or DEFAULT_VAL_DOCS
    if args.specs and (args.name or args.caseops or args.fuse_markers):
        raise ValueError("--name, --caseops, --fuse-markers: expected in the file of --specs")
    if args.docs:
        sources = [Source(args.docs, args.val_docs)]
    else:
        sources = [Source(path, sys.maxsize) for path in args.val] + [Source(path, 0) for path in args.train]
    for source in sources:
        source.path.stat()  # a missing file is found before hours of work
    if args.specs:
        specs = read_specs(args.specs)
    else:
        specs = [Spec.make(args.name, args.vocab_size, args.tokenizer, args.caseops, args.fuse_markers)]
    args.out.mkdir(parents=True, exist_ok=True)
    with shards.only_one(args.out):
        check_names(args.out, specs)
        work = args.out / "datasets" / ".tokenize"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            make_datasets(args, specs, sources, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = shards.Parser(description="Turn documents into token shards in the published layout.")
    parser.add_argument("--docs", type=Path, metavar="FILE",
                        help="read all documents from this file, those of validation first, as in the published "
                             "docs_selected.jsonl")
    parser.add_argument("--val-docs", type=shards.at_least(1), metavar="N",
                        help=f"take the first N of --docs for validation (default: {DEFAULT_VAL_DOCS})")
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE",
                        help='read the training documents from these files: .jsonl, .jsonl.gz or .jsonl.xz with one '
                             '{"text": ...} a line')
    parser.add_argument("--val", type=Path, nargs="+", metavar="FILE",
                        help="read the validation documents from these files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="write datasets/, tokenizers/ and manifest.json into this folder")
    parser.add_argument("--name", help="name the data set (default: local_sp<vocabulary size>)")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--vocab-size", type=int, metavar="N", help="train a BPE tokenizer of N pieces")
    choice.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this SentencePiece model")
    choice.add_argument("--specs", type=Path, metavar="FILE", help="make the data sets that this JSON file lists")
    parser.add_argument("--caseops", action="store_true",
                        help="mark capitals instead of spelling them (see data/caseops.py)")
    parser.add_argument("--fuse-markers", action="store_true",
                        help="with --caseops, make one token of each of the 13 most frequent pairs of a piece and a "
                             "marker")
    parser.add_argument("--tokenizer-sample-mb", type=float, default=20, metavar="MB",
                        help="train tokenizers on this many million bytes of training documents (default: 20)")
    parser.add_argument("--shard-tokens", type=shards.at_least(1), default=100_000_000, metavar="N",
                        help="put N tokens into a full shard (default: 100000000)")
    parser.add_argument("--workers", type=shards.at_least(1), default=-1, metavar="N",
                        help="encode with N threads (default: one a core)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that unfinished files are removed
    return shards.run_tool(tokenize, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
