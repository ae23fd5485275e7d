#!/usr/bin/env python3
"""The published shards, tokenizer and documents -> data/, each file checked before it takes its name.

Notable features:
- the manifest of the repository says what there is: the first N training shards, every validation shard, the tokenizer
- a file is compared with the hub's size and hash, a shard also with its own header and its vocabulary, the validation
  set with the manifest's counts of files, tokens and documents; CaseOps sets also with their byte counts
- several files at a time; what stands here and is right is not fetched again, what was cut off is continued
- dropped connections and an overloaded server are waited for, with growing pauses, a bounded number of times
- `--verify` checks again what is here, without a network, and names every file that is bad

    python data/cached_challenge_fineweb.py --variant sp8192 --train-shards 80
    python data/cached_challenge_fineweb.py --variant sp8192_caseops --train-shards 80
    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 0 --with-docs

writes, below --out (this folder, unless told otherwise):

    datasets/fineweb10B_sp8192/fineweb_train_000000.bin, ..., fineweb_val_000000.bin
    tokenizers/fineweb_8192_bpe.model, tokenizers/fineweb_8192_bpe.vocab (for CaseOps fineweb_8192_bpe_caseops.*)
    docs_selected.jsonl, docs_selected.source_manifest.json
    manifest.json (other entries in it stay)

An unfinished file is called .<name>.<version>.partial, beside its final name. MATCHED_FINEWEB_REPO_ID and
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder in it; HF_ENDPOINT, HF_TOKEN and the like are
huggingface_hub's.
"""

import argparse
import glob
import json
import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import BinaryIO

import httpx2
import numpy as np
import sentencepiece as spm
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from shards import (
    Parser,
    file_sha256,
    find_entry,
    interrupt_on_sigterm,
    merge_manifest,
    one_line,
    only_one,
    read_manifest,
    read_shard,
    write_manifest,
)
from tqdm import tqdm

DEFAULT_REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"
REPOS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_VARIANT = "sp8192"
DEFAULT_TRAIN_SHARDS = 80
LONGEST_PAUSE = 30  # seconds between two attempts
SHA256 = re.compile(r"[0-9a-f]{64}")
VARIANT = r"sp\d+(_[\w.-]+)?"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")
DOCS, DOCS_SOURCE = "docs_selected.jsonl", "docs_selected.source_manifest.json"


# ----- the hub


class Missing(ValueError):
    """The hub has no such file or repository."""


class Stopped(Exception):
    """Another thread has failed, or the user wants to end; this one need not say why it ends."""


@dataclass(frozen=True)
class File:
    """A published file: its `name` in the repository, the `path` it gets here, and what the hub says of it.

    `size` is in bytes; `etag` is the SHA-256 of a large file, the Git hash of a small one.
    """

    name: str
    path: Path
    size: int
    etag: str

    @property
    def partial(self) -> Path:
        """Where it is received; another version of it has another name."""
        return self.path.with_name(f".{self.path.name}.{re.sub(r'[^0-9a-zA-Z]', '_', self.etag)[:16]}.partial")

    @property
    def received(self) -> int:
        """Bytes of it that are here, from this run or an earlier one."""
        return self.partial.stat().st_size if self.partial.exists() else 0


class Sink:
    """What a file is received into: `file`, the progress `bar`, and an event that ends the transfer."""

    def __init__(self, file: BinaryIO, bar: tqdm, stop: threading.Event) -> None:
        self.file, self.bar, self.stop = file, bar, stop
        self.seek, self.tell = file.seek, file.tell

    def count(self, received: int) -> None:
        """Move the bar on by `received` bytes."""
        with self.bar.get_lock():
            self.bar.update(received)

    def write(self, data: bytes) -> None:
        """Append `data`. Stopped if there is no more use for it."""
        if self.stop.is_set():
            raise Stopped
        self.file.write(data)
        self.count(len(data))

    def truncate(self) -> None:
        """Drop what follows the position: the server sends the file from there again."""
        end = os.fstat(self.file.fileno()).st_size
        self.file.truncate()
        self.count(self.file.tell() - end)


def is_passing(error: Exception) -> bool:
    """Whether `error` may be gone a little later: a lost connection, a body cut short, an overloaded server."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    cut_short = type(error) is OSError and error.errno is None  # the client's own; those of the system have a number
    return cut_short or isinstance(error, httpx2.TransportError)


def hub_says(error: Exception) -> str:
    """One line for what went wrong with a request."""
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or not yours to read (HF_TOKEN)"
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code} {error.response.reason_phrase}"
    return one_line(error)


class Hub:
    """Dataset repository `repo` of the hub, all of it at the commit that was current at the first request.

    A request is made 1 + `retries` times before it counts as failed, with pauses of 1, 2, 4, ... seconds; one that
    brought new bytes begins to count anew. Setting `stop` ends all requests.

    Files are received by the client's http_get, which can go on where a killed run has ended. Its hf_hub_download no
    longer does so, which hurts with 48 GB of documents, and keeps a second copy of everything behind links.
    """

    def __init__(self, repo: str, retries: int, stop: threading.Event) -> None:
        self.repo, self.retries, self.stop = repo, retries, stop
        self.revision = "main"
        self.headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # or a server may ignore where to continue

    def url(self, name: str) -> str:
        """Where file `name` of the repository is asked for."""
        return hf_hub_url(self.repo, name, repo_type="dataset", revision=self.revision)

    def insist(self, name: str, request: Callable[[], object], received: Callable[[], int] = lambda: 0) -> object:
        """`request()`, again after a failure that may pass; `received()` counts the bytes that are here.

        ValueError, naming repository and file, when it fails for good; OSError of the system's as it is.
        """
        failures, before = 0, received()
        while True:
            try:
                return request()
            except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status == 404 or isinstance(error, RepositoryNotFoundError):
                    raise Missing(f"{self.repo}: {name}: {hub_says(error)}") from error
                if received() > before:
                    failures, before = 0, received()
                failures += 1
                if failures > self.retries or not is_passing(error):
                    tries = f" ({failures} attempts)" if is_passing(error) else ""
                    raise ValueError(f"{self.repo}: {name}: {hub_says(error)}{tries}") from error
            if self.stop.wait(min(2 ** (failures - 1), LONGEST_PAUSE)):
                raise Stopped

    def look_up(self, name: str, path: Path) -> File:
        """File `name` of the repository, which is to become `path`. Missing if there is none."""
        metadata = self.insist(name, lambda: get_hf_file_metadata(self.url(name)))
        if metadata.size is None or not metadata.etag:
            raise ValueError(f"{self.repo}: {name}: expected its size and ETag from the hub, found "
                             f"{metadata.size} and {metadata.etag}")
        if self.revision == "main" and metadata.commit_hash:
            self.revision = metadata.commit_hash
        return File(name, path, metadata.size, metadata.etag)

    def fetch(self, file: File, bar: tqdm) -> None:
        """Receive what is missing of `file.partial`, removing what was received of other versions."""
        file.path.parent.mkdir(parents=True, exist_ok=True)
        for other in file.path.parent.glob(f".{glob.escape(file.path.name)}.*.partial"):
            if other != file.partial:
                other.unlink()

        def receive() -> None:
            if file.received > file.size:
                file.partial.unlink()
            with open(file.partial, "ab") as out:
                start = out.tell()
                try:
                    http_get(self.url(file.name), Sink(out, bar, self.stop), resume_size=start, headers=self.headers,
                             expected_size=file.size)
                except HfHubHTTPError as error:
                    if error.response.status_code != 416:
                        raise
                    raise OSError(f"expected {file.size} bytes, the server's file ends after {start}") from error

        self.insist(file.name, receive, lambda: file.received)


# ----- checks


def check_hash(path: Path, etag: str) -> str:
    """SHA-256 of the file at `path`; ValueError unless `etag` is that, or its Git hash, or no hash at all."""
    found = file_sha256(path)
    if SHA256.fullmatch(etag) and found != etag:
        raise ValueError(f"{path}: expected SHA-256 {etag}, found {found}")
    if re.fullmatch(r"[0-9a-f]{40}", etag):
        data = path.read_bytes()  # the hub stores large files by SHA-256
        git_hash = sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if git_hash != etag:
            raise ValueError(f"{path}: expected Git hash {etag}, found {git_hash}")
    return found


def check_shard(path: Path, name: str, vocab_size: int) -> int:
    """Number of tokens of the shard at `path`, which is to be called `name`; ValueError if it is not a sound one."""
    holds_tokens = SHARD_NAME.fullmatch(name)[1] != "val_bytes"
    return len(read_shard(path, vocab_size if holds_tokens else None))


def check_tokenizer(path: Path, vocab_size: int) -> int:
    """BOS id of the SentencePiece model at `path`; ValueError if it is not one of `vocab_size` pieces."""
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path}: not a SentencePiece model") from error
    if tokenizer.vocab_size() != vocab_size:
        raise ValueError(f"{path}: expected {vocab_size} pieces, found {tokenizer.vocab_size()}")
    return tokenizer.bos_id()


def read_split(folder: Path, split: str) -> list[np.ndarray]:
    """The shards of `split` ("train", "val" or "val_bytes") in `folder`, in order; ValueError for an unsound one."""
    names = sorted(path.name for path in folder.glob(f"fineweb_{split}_*.bin"))
    return [read_shard(folder / name) for name in names if SHARD_NAME.fullmatch(name)[1] == split]


def check_counts(folder: Path, entry: dict, found: dict[str, int]) -> None:
    """ValueError unless the numbers `found` in the shards of `folder` are those of its manifest `entry`, if it has any.
    """
    for key, number in found.items():
        if entry["stats"].get(key, number) != number:
            raise ValueError(f"{folder}: the manifest says {key} {entry['stats'][key]}, the shards hold {number}")


def check_validation(folder: Path, entry: dict, bos: int) -> None:
    """ValueError unless the validation shards in `folder` hold all that their manifest `entry` says.

    They are counted in files, tokens, documents (`bos` tokens) and, for CaseOps, bytes.
    """
    shards = read_split(folder, "val")
    found = {"files_val": len(shards), "tokens_val": sum(map(len, shards)),
             "docs_val": sum(int(np.count_nonzero(tokens == bos)) for tokens in shards)}
    if entry.get("caseops"):
        counts = read_split(folder, "val_bytes")
        expected, lengths = list(map(len, shards)), list(map(len, counts))
        if lengths != expected:
            raise ValueError(f"{folder}: expected fineweb_val_bytes_*.bin to count the bytes of {expected} tokens, "
                             f"found {lengths} counts")
        found["bytes_val"] = sum(int(part.sum(dtype=np.int64)) for part in counts)
    check_counts(folder, entry, found)


def check_training(folder: Path, entry: dict) -> None:
    """ValueError unless the training shards in `folder`, if all are there, hold the tokens their `entry` says."""
    shards = read_split(folder, "train")
    if len(shards) == entry["stats"]["files_train"]:
        check_counts(folder, entry, {"tokens_train": sum(map(len, shards))})


def check_docs(out: Path) -> None:
    """ValueError unless docs_selected.jsonl in `out` has the hash that its source manifest gives."""
    expected, found = docs_sha256(out), file_sha256(out / DOCS)
    if found != expected:
        raise ValueError(f"{out / DOCS}: expected SHA-256 {expected}, found {found}")


def docs_sha256(out: Path) -> str:
    """Hash of the documents as their source manifest in `out` gives it; ValueError if it does not."""
    path = out / DOCS_SOURCE
    try:
        found = json.loads(path.read_bytes())["docs_sha256"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise ValueError(f"{path}: expected a JSON object with docs_sha256")
    return found


# ----- the manifest


def variant_name(text: str) -> str:
    """The command-line value, if it names a variant; ValueError otherwise."""
    if not re.fullmatch(VARIANT, text):
        raise ValueError
    return text


def vocabulary(variant: str) -> int:
    """Number of pieces of the variant's tokenizer."""
    return int(re.match(r"sp(\d+)", variant)[1])


def repository(variant: str) -> str:
    """The dataset repository that has the variant."""
    known = CASEOPS_REPO if "caseops" in variant else REPOS.get(variant, DEFAULT_REPO)
    return os.environ.get("MATCHED_FINEWEB_REPO_ID") or known


def published_entries(manifest: dict, variant: str, where: str) -> tuple[dict, dict]:
    """Entries of the data set and its tokenizer in the published `manifest`; ValueError, naming `where`, if unusable.

    `sp<V>_caseops` stands for the one set of that vocabulary with "caseops" in its name.
    """
    names = [entry["name"] for entry in manifest["datasets"]]
    wanted = f"fineweb10B_{variant}"
    matching = [name for name in names if name == wanted]
    if not matching and variant.endswith("_caseops"):
        stem = wanted.removesuffix("caseops")
        matching = [name for name in names if name.startswith(stem) and "caseops" in name]
    if len(matching) != 1:
        raise ValueError(f"{where}: expected a data set {wanted}, found {', '.join(names) or 'none'}")
    entry = find_entry(manifest, "datasets", matching[0])
    stats = entry.get("stats")
    for key in ("files_train", "files_val"):
        if not isinstance(stats, dict) or type(stats.get(key)) is not int or stats[key] < 1:
            raise ValueError(f"{where}: {matching[0]}: expected stats.{key}, a number of files, found {stats}")
    tokenizer = find_entry(manifest, "tokenizers", entry.get("tokenizer_name"))
    if tokenizer is None:
        raise ValueError(f"{where}: {matching[0]}: tokenizer {entry.get('tokenizer_name')} is not listed")
    if not re.fullmatch(r"tokenizers/[\w+-][\w.+-]*\.model", str(tokenizer.get("model_path"))):
        raise ValueError(f"{where}: {tokenizer['name']}: expected model_path tokenizers/<name>.model, found "
                         f"{tokenizer.get('model_path')}")
    return entry, tokenizer


def local_entry(published: dict, variant: str, manifest: dict, hub: Hub) -> dict:
    """The data set's entry for the manifest here: without paths, but with where it comes from."""
    entry = {key: value for key, value in published.items() if key not in ("path", "train_glob", "val_glob")}
    entry |= {"name": f"fineweb10B_{variant}", "repo": hub.repo, "revision": hub.revision}
    if "caseops" in published["name"]:
        entry["caseops"] = True
    docs = manifest.get("docs_meta")
    if isinstance(docs, dict) and docs.get("docs_sha256"):
        entry["docs_sha256"] = docs["docs_sha256"]
    return entry


def local_tokenizer(published: dict, variant: str) -> dict:
    """The tokenizer's entry for the manifest here: that of `sp<V>_caseops` gets the name train_gpt.py looks for."""
    if variant != f"sp{vocabulary(variant)}_caseops":
        return dict(published)
    name = f"fineweb_{vocabulary(variant)}_bpe_caseops"
    entry = published | {"name": name, "model_path": f"tokenizers/{name}.model"}
    if published.get("vocab_path"):
        entry["vocab_path"] = f"tokenizers/{name}.vocab"
    return entry


def shard_names(split: str, count: int) -> list[str]:
    """Names of the first `count` shards of `split`."""
    return [f"fineweb_{split}_{index:06d}.bin" for index in range(count)]


def strangers(folder: Path, entry: dict) -> dict[str, str]:
    """Shards in `folder` that are not part of the published set `entry`, which a run would take along; and what to do.
    """
    stats = entry["stats"]
    names = set(shard_names("train", stats["files_train"]) + shard_names("val", stats["files_val"]))
    names.update(shard_names("val_bytes", stats["files_val"]) if entry.get("caseops") else ())
    found = sorted(path.name for path in folder.glob("fineweb_*.bin") if path.name not in names)
    return {name: f"{folder / name}: not part of the published set (a run would read it); remove it" for name in found}


# ----- the download


class Download:
    """One run of the program: what to fetch, where to, and what is known of each file.

    `hashes` gives the SHA-256 of every file below `out` that was found right; `wrong` were not there, or not right.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.variant, self.vocab_size = args.out, args.variant, vocabulary(args.variant)
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(args.workers)
        self.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
        self.hub = Hub(repository(self.variant), args.retries, self.stop)
        self.retries = args.retries
        self.hashes: dict[Path, str] = {}
        self.wrong: set[Path] = set()

    def parallel(self, function: Callable, items: Iterable, label: str | None = None) -> list:
        """`function` of every item on the pool's threads, in order; the first failure ends the others and is raised."""
        futures = [self.pool.submit(function, item) for item in items]
        try:
            for future in tqdm(as_completed(futures), label, len(futures), disable=None if label else True):
                future.result()
        except BaseException:
            self.stop.set()
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]

    def remote(self, name: str) -> str:
        """Name in the repository of the published file `name`."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def check(self, path: Path, file: File) -> None:
        """ValueError unless `path` holds `file`, and a shard is a sound one."""
        if path.stat().st_size != file.size:
            raise ValueError(f"{path}: expected {file.size} bytes, found {path.stat().st_size}")
        digest = check_hash(path, file.etag)
        if SHARD_NAME.fullmatch(file.path.name):
            check_shard(path, file.path.name, self.vocab_size)
        self.hashes[file.path] = digest

    def is_here(self, file: File) -> bool:
        """Whether `file` stands under its final name, as it should be; one that is wrong stays until it is replaced."""
        if file.path.is_file() and not file.path.is_symlink():
            try:
                self.check(file.path, file)
                return True
            except ValueError:
                pass
        self.wrong.add(file.path)
        return False

    def obtain(self, hub: Hub, file: File, bar: tqdm) -> None:
        """Fetch `file`, check it, and give it its name, from which it takes what stood there."""
        hub.fetch(file, bar)
        try:
            self.check(file.partial, file)
        except ValueError:
            file.partial.unlink()
            raise
        os.replace(file.partial, file.path)

    def published_manifest(self) -> dict:
        """The repository's manifest, read and not kept."""
        file = self.hub.look_up(self.remote("manifest.json"), self.out / "published_manifest.json")
        self.hub.fetch(file, tqdm(disable=True))
        try:
            check_hash(file.partial, file.etag)
            return read_manifest(file.partial)
        finally:
            file.partial.unlink()

    def find_docs(self) -> tuple[Hub, File]:
        """The published documents and the repository that has them; their source manifest is fetched here already."""
        hub = self.hub
        try:
            source = hub.look_up(self.remote(DOCS_SOURCE), self.out / DOCS_SOURCE)
        except Missing:
            if "MATCHED_FINEWEB_REPO_ID" in os.environ:
                raise
            hub = Hub(DEFAULT_REPO, self.retries, self.stop)  # has the documents all variants are made of
            source = hub.look_up(self.remote(DOCS_SOURCE), self.out / DOCS_SOURCE)
        docs = hub.look_up(self.remote(DOCS), self.out / DOCS)
        if not self.is_here(source):
            self.obtain(hub, source, tqdm(disable=True))
        expected = docs_sha256(self.out)
        if SHA256.fullmatch(docs.etag) and docs.etag != expected:
            raise ValueError(f"{hub.repo}: {docs.name}: expected SHA-256 {expected} as in {DOCS_SOURCE}, found "
                             f"{docs.etag}")
        return hub, replace(docs, etag=expected)

    def record(self, entry: dict, tokenizer: dict) -> None:
        """Put both entries, with the hashes of their files, in the manifest here; what else it lists stays."""
        manifest = read_manifest(self.out / "manifest.json")
        folder = self.out / "datasets" / entry["name"]
        old = find_entry(manifest, "datasets", entry["name"]) or {}
        shards = {shard["name"]: shard for shard in old.get("shard_files", ())
                  if (path := folder / shard["name"]).exists() and path not in self.wrong}
        for file, digest in self.hashes.items():
            if file.parent == folder:
                shards[file.name] = {"name": file.name, "tokens": len(read_shard(file)), "sha256": digest}
        entry["shard_files"] = [shards[name] for name in sorted(shards)]
        tokenizer["sha256"] = {file.name: digest for file, digest in self.hashes.items()
                               if file.parent == self.out / "tokenizers"}
        merge_manifest(manifest, "datasets", entry)
        merge_manifest(manifest, "tokenizers", tokenizer)
        write_manifest(self.out / "manifest.json", manifest)

    def run(self, train_shards: int | None, with_docs: bool) -> None:
        """Fetch what is missing. ValueError or OSError if something cannot be had, or is not what it should be."""
        manifest = self.published_manifest()
        published, published_tokenizer = published_entries(manifest, self.variant,
                                                           f"{self.hub.repo}: {self.remote('manifest.json')}")
        entry = local_entry(published, self.variant, manifest, self.hub)
        tokenizer = local_tokenizer(published_tokenizer, self.variant)
        entry["tokenizer_name"] = tokenizer["name"]
        stats, folder = entry["stats"], self.out / "datasets" / entry["name"]
        count = min(DEFAULT_TRAIN_SHARDS, stats["files_train"]) if train_shards is None else train_shards
        if count > stats["files_train"]:
            raise ValueError(f"--train-shards: expected at most {stats['files_train']} for {published['name']}, found "
                             f"{count}")
        self.check_folder(folder, entry, tokenizer["model_path"])

        names = shard_names("val", stats["files_val"]) + shard_names("train", count)
        if entry.get("caseops"):
            names += shard_names("val_bytes", stats["files_val"])
        model = self.out / tokenizer["model_path"]
        wanted = [(published_tokenizer[key], self.out / "tokenizers" / Path(tokenizer[key]).name)
                  for key in ("model_path", "vocab_path") if tokenizer.get(key)]
        wanted += [(f"datasets/{published['name']}/{name}", folder / name) for name in names]
        files = self.parallel(lambda item: self.hub.look_up(self.remote(item[0]), item[1]), wanted)
        sources = [(self.hub, file) for file in files] + ([self.find_docs()] if with_docs else [])
        here = self.parallel(lambda source: self.is_here(source[1]), sources, "checking")
        missing = [source for source, there in zip(sources, here) if not there]
        self.check_space([file for _, file in missing])

        with self.progress([file for _, file in missing]) as bar:
            # The validation set is whole and in the manifest before the first training shard is fetched.
            self.parallel(lambda source: self.obtain(*source, bar), [s for s in missing if not is_bulk(s[1])])
            check_validation(folder, entry, check_tokenizer(model, self.vocab_size))
            self.record(entry, tokenizer)
            self.parallel(lambda source: self.obtain(*source, bar), [s for s in missing if is_bulk(s[1])])
        check_training(folder, entry)
        self.record(entry, tokenizer)
        more = len(read_split(folder, "train")) - count
        print(f"{folder}: {count} training shards{f' (and {more} more that were here)' if more else ''}, "
              f"{stats['files_val']} of validation, {self.vocab_size} pieces: all verified")

    def check_folder(self, folder: Path, entry: dict, model_path: str) -> None:
        """ValueError if the published set would replace what data/tokenize_docs.py made, or mix with other shards."""
        manifest = read_manifest(self.out / "manifest.json")
        for other in manifest["datasets"]:
            if "shard_files" in other and "repo" not in other:
                tokenizer = find_entry(manifest, "tokenizers", other.get("tokenizer_name")) or {}
                if other["name"] == entry["name"] or tokenizer.get("model_path") == model_path:
                    raise ValueError(f"{folder}: {other['name']} was made by data/tokenize_docs.py and would lose its "
                                     "shards or its tokenizer; --out takes another place")
        for reason in strangers(folder, entry).values():
            raise ValueError(reason)

    def check_space(self, missing: list[File]) -> None:
        """Say how much is to be fetched; ValueError if a disk has less room."""
        needed = Counter()  # by folder, then by disk: one of them may be a link to elsewhere
        for file in missing:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            needed[file.path.parent] += max(0, file.size - file.received)
        folders = {os.stat(folder).st_dev: folder for folder in (self.out, *needed)}
        for device, folder in folders.items():
            here = sum(size for other, size in needed.items() if os.stat(other).st_dev == device)
            numbers = f"{here / 1e9:,.3f} GB needed, {shutil.disk_usage(folder).free / 1e9:,.3f} GB free"
            if here > shutil.disk_usage(folder).free:
                raise ValueError(f"{folder}: not enough disk space: {numbers}")
            print(f"{folder}: {numbers}", flush=True)
        print(f"{len(missing)} files to fetch from {self.hub.repo} at {self.hub.revision[:7]}", flush=True)

    def progress(self, missing: list[File]) -> tqdm:
        """Progress bar over the bytes of `missing`; none where nobody looks at it."""
        return tqdm(total=sum(file.size for file in missing), initial=sum(file.received for file in missing),
                    desc=self.variant, unit="B", unit_scale=True, disable=None)


def is_bulk(file: File) -> bool:
    """Whether `file` waits until the validation set is here and right: training shards and documents."""
    return file.path.name.startswith("fineweb_train_") or file.path.name == DOCS


# ----- what is here


def fault(check: Callable, *arguments: object) -> str | None:
    """What `check` of these arguments objects to, in one line; None if it is content."""
    try:
        check(*arguments)
    except (OSError, ValueError) as error:
        return one_line(error)
    return None


def check_recorded(path: Path, digest: object, where: Path) -> None:
    """ValueError unless `digest`, of the manifest at `where`, is a SHA-256, and that of the file at `path`."""
    if not isinstance(digest, str) or not SHA256.fullmatch(digest):
        raise ValueError(f"{path}: expected its sha256, of 64 digits, in {where}, found {digest}; download again")
    check_hash(path, digest)


def shards_listed(entry: dict, where: Path) -> dict[str, dict]:
    """What `entry` of the manifest at `where` says of each shard, by name; ValueError if that cannot be understood."""
    try:
        return {shard["name"]: dict(shard) for shard in entry.get("shard_files", ())}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: {entry['name']}: expected shard_files, a list of objects with a name") from error


def faults_of_set(out: Path, manifest: dict, variant: str, train_shards: int, workers: int) -> list[str]:
    """Everything that is wrong with the set `variant` of the `manifest` in `out`, one line each.

    ValueError if the manifest has no such set, or does not say what belongs to it.
    """
    where = out / "manifest.json"
    entry, tokenizer = published_entries(manifest, variant, str(where))
    folder, vocab_size, listed = out / "datasets" / entry["name"], vocabulary(variant), shards_listed(entry, where)
    strange = strangers(folder, entry)
    present = {file.name for file in folder.glob("fineweb_*.bin")} - strange.keys()
    validation = ["val", "val_bytes"] if entry.get("caseops") else ["val"]
    wanted = [name for split in validation for name in shard_names(split, entry["stats"]["files_val"])]
    wanted = {*wanted, *shard_names("train", train_shards), *listed} - strange.keys()

    def check(name: str) -> None:
        path, known = folder / name, listed.get(name)
        if name not in present:
            raise ValueError(f"{path}: no such file; download again")
        if known is None:
            raise ValueError(f"{path}: not listed in {where} (an interrupted download?); download again")
        check_recorded(path, known.get("sha256"), where)
        if (tokens := check_shard(path, name, vocab_size)) != known.get("tokens"):
            raise ValueError(f"{path}: expected {known.get('tokens')} tokens, as {where} says, found {tokens}")

    names = sorted(present | wanted)
    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(lambda name: fault(check, name), names)
        found = [*strange.values(), *tqdm(checked, "checking", len(names), disable=None)]
    digests = tokenizer.get("sha256", {})
    digests = digests if isinstance(digests, dict) else {}
    files = {Path(tokenizer[key]).name for key in ("model_path", "vocab_path") if tokenizer.get(key)}
    for name in sorted(digests.keys() | (files if "repo" in entry else ())):
        found.append(fault(check_recorded, out / "tokenizers" / name, digests.get(name), where))
    if not any(found):  # what follows is of all files together
        found.append(fault(lambda: check_validation(folder, entry, check_tokenizer(out / tokenizer["model_path"],
                                                                                   vocab_size))))
        found.append(fault(check_training, folder, entry))
    if not any(found):
        print(f"{folder}: {len(listed)} shards and the tokenizer are as published")
    return [reason for reason in found if reason]


def verify(out: Path, variant: str | None, train_shards: int | None, with_docs: bool, workers: int) -> None:
    """Check again everything the manifest in `out` lists of `variant`, or of every set that was downloaded.

    Each fault becomes a line on stdout; ValueError, at the end, if there was one.
    """
    manifest = read_manifest(out / "manifest.json")
    variants = [variant] if variant else [str(entry["name"]).removeprefix("fineweb10B_")
                                          for entry in manifest["datasets"] if "repo" in entry]
    if not variants:
        raise ValueError(f"{out / 'manifest.json'}: expected a downloaded data set, found none")
    found = []
    for each in variants:
        try:
            if not re.fullmatch(VARIANT, each):
                raise ValueError(f"{out / 'manifest.json'}: {each}: expected the name fineweb10B_sp<vocabulary size>")
            found += faults_of_set(out, manifest, each, train_shards or 0, workers)
        except ValueError as error:
            found.append(one_line(error))
    if with_docs and (reason := fault(check_docs, out)):
        found.append(reason)
    elif with_docs:
        print(f"{out / DOCS}: as published")
    found = list(dict.fromkeys(found))  # two sets may share a tokenizer
    for reason in found:
        print(f"bad: {reason}", flush=True)
    if found:
        raise ValueError(found[0] if len(found) == 1 else f"{len(found)} faults, each a line above; the first: "
                                                          f"{found[0]}")


# ----- command line


def at_least(least: int) -> Callable[[str], int]:
    """Type of a command-line number that is `least` or more."""

    def number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    number.__name__ = f"number (at least {least})"
    return number


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser(description="Download the published token shards, or check those that are here.")
    parser.add_argument("--variant", type=variant_name, metavar="NAME",
                        help=f"sp<vocabulary size>, or sp<vocabulary size>_caseops (default: {DEFAULT_VARIANT}; with "
                             "--verify all that were downloaded)")
    parser.add_argument("--train-shards", type=at_least(0), metavar="N",
                        help=f"fetch the first N training shards (default: {DEFAULT_TRAIN_SHARDS}, or all there are)")
    parser.add_argument("--with-docs", action="store_true", help=f"also fetch {DOCS} (48 GB)")
    parser.add_argument("--verify", action="store_true", help="only check what is here, without a network")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="folder of datasets/, tokenizers/ and manifest.json (default: that of this script)")
    parser.add_argument("--workers", type=at_least(1), default=8, metavar="N", help="files at a time (default: 8)")
    parser.add_argument("--retries", type=at_least(0), default=5, metavar="N",
                        help="attempts after the first that brought nothing (default: 5)")
    interrupt_on_sigterm()
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        args = parser.parse_args(argv)
        if args.verify:
            verify(args.out, args.variant, args.train_shards, args.with_docs, args.workers)
            return 0
        args.variant = args.variant or DEFAULT_VARIANT
        args.out.mkdir(parents=True, exist_ok=True)
        with only_one(args.out):
            Download(args).run(args.train_shards, args.with_docs)
    except (OSError, ValueError, MemoryError, KeyboardInterrupt) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a thread that waits for the network cannot be told to end
