#!/usr/bin/env python3
"""Download the published token shards, their tokenizer and the documents, and check every file.

Notable features:
- The manifest of the published repository says what there is. The tool takes the first N training shards, all
  validation shards and the tokenizer.
- huggingface_hub downloads several files at a time. A file that is here and right is not downloaded again.
- Every file is compared with the hash that the hub has for it, and every shard with its own header and the vocabulary.
  A file gets its name only after that.
- The validation set is compared with the manifest's counts of files, tokens and documents. For CaseOps sets the count
  of bytes is compared too.
- `--verify` checks again what is here, without a network, and names every file that is bad.

    python data/cached_challenge_fineweb.py --variant sp8192 --train-shards 80
    python data/cached_challenge_fineweb.py --variant sp8192_caseops --train-shards 80
    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 0 --with-docs

The files are written below --out, which is the folder of this script unless told otherwise:

    datasets/fineweb10B_sp8192/fineweb_train_000000.bin, ..., fineweb_val_000000.bin
    tokenizers/fineweb_8192_bpe.model, tokenizers/fineweb_8192_bpe.vocab (for CaseOps fineweb_8192_bpe_caseops.*)
    docs_selected.jsonl, docs_selected.source_manifest.json
    manifest.json (the tool changes its own entries only)

Unfinished files stand in folders called .download. They go when the program ends or, after a kill, when it runs again.
The environment variables MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and
another folder in it. HF_ENDPOINT, HF_TOKEN and the like are variables of huggingface_hub.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import shards
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.sha import git_hash
from tqdm.contrib.concurrent import thread_map

DEFAULT_REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"
REPOS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_VARIANT = "sp8192"
DEFAULT_TRAIN_SHARDS = 80
DOCS, DOCS_SOURCE = "docs_selected.jsonl", "docs_selected.source_manifest.json"
STAGING = ".download"


# ----- the hub


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into a ValueError of one line that begins with `where`."""
    try:
        yield
    except Exception as error:  # of the hub, of the HTTP client, of the transfer library or of the system
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise ValueError(f"{where}: {shards.one_line(reason)}") from error


class Hub:
    """A dataset repository of the hub at its current commit."""

    def __init__(self, repo: str) -> None:
        self.repo, api = repo, HfApi()
        self.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
        with hub_errors(repo):
            self.revision = api.dataset_info(repo).sha
            tree = api.list_repo_tree(repo, self.prefix or None, recursive=True, revision=self.revision,
                                      repo_type="dataset")
            self.files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def find(self, name: str) -> RepoFile:
        """Return the file that the manifest calls `name`. Raise ValueError if the repository has none."""
        path = f"{self.prefix}/{name}".lstrip("/")
        if path not in self.files:
            raise ValueError(f"{self.repo}: {path}: no such file")
        return self.files[path]

    def receive(self, published: RepoFile, folder: Path) -> Path:
        """Download the `published` file into the staging folder of `folder`. Return its path there."""
        with hub_errors(f"{self.repo}: {published.path}"):
            return Path(hf_hub_download(self.repo, published.path, repo_type="dataset", revision=self.revision,
                                        local_dir=folder / STAGING))

    def fetch(self, path: Path, published: RepoFile, vocab_size: int) -> str:
        """Download the `published` file to `path`, unless it is there and right. Return its SHA-256."""
        if path.exists():
            with suppress(ValueError):
                return check_published(path, published, vocab_size)
        received = self.receive(published, path.parent)
        digest = check_published(received, published, vocab_size)
        os.replace(received, path)
        return digest

    def fetch_all(self, files: dict[Path, RepoFile], vocab_size: int, workers: int) -> dict[Path, str]:
        """Download the published `files` to their paths. Return their SHA-256.

        Raise ValueError before the first one if the disk has too little room.
        """
        missing = [path for path in files if not path.exists() or path.stat().st_size != files[path].size]
        for path in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        if missing:
            folder, needed = missing[-1].parent, sum(files[path].size for path in missing)
            free = shutil.disk_usage(folder).free
            numbers = f"{needed / 1e9:,.3f} GB needed, {free / 1e9:,.3f} GB free"
            if needed > free:
                raise ValueError(f"{folder}: not enough disk space: {numbers}")
            print(f"{folder}: {numbers}", flush=True)
        digests = thread_map(lambda path: self.fetch(path, files[path], vocab_size), files, max_workers=workers,
                             desc="downloading", unit=" files", disable=None)
        return dict(zip(files, digests))


# ----- checks


def check_hash(path: Path, expected: str, found: str) -> None:
    """Raise ValueError unless the file at `path` has the `expected` hash."""
    if found != expected:
        raise ValueError(f"{path}: expected hash {expected}, found {found}")


def check_published(path: Path, published: RepoFile, vocab_size: int) -> str:
    """Return the SHA-256 of the file at `path`. Raise ValueError unless it is the `published` file and sound."""
    digest = shards.file_sha256(path)
    if published.lfs:
        check_hash(path, published.lfs.sha256, digest)
    else:  # the hub knows small files by the hash that Git gives them
        check_hash(path, published.blob_id, git_hash(path.read_bytes()))
    if name := shards.SHARD_NAME.fullmatch(path.name):
        shards.read_shard(path, None if name[1] == "val_bytes" else vocab_size)
    return digest


def check_set(folder: Path, entry: dict, model: Path, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer `model` has another vocabulary, or if validation shards are not complete.

    The shards are those in `folder`, and the manifest's `entry` says how many files, tokens, documents and, for
    CaseOps, bytes they hold.
    """
    tokenizer = shards.load_tokenizer(model.read_bytes(), str(model))
    if tokenizer.vocab_size() != vocab_size:
        raise ValueError(f"{model}: expected {vocab_size} pieces, found {tokenizer.vocab_size()}")
    parts = [shards.read_shard(path) for path in shards.find_shards(folder, "val")]
    found = {"files_val": len(parts), "tokens_val": sum(map(len, parts)),
             "docs_val": sum(int(np.count_nonzero(tokens == tokenizer.bos_id())) for tokens in parts)}
    if entry.get("caseops"):
        charges = [shards.read_shard(path) for path in shards.find_shards(folder, "val_bytes")]
        expected, lengths = list(map(len, parts)), list(map(len, charges))
        if lengths != expected:
            raise ValueError(f"{folder}: expected fineweb_val_bytes_*.bin to count the bytes of {expected} tokens, "
                             f"found {lengths} counts")
        found["bytes_val"] = sum(int(charged.sum(dtype=np.int64)) for charged in charges)
    for key, number in found.items():
        if entry["stats"].get(key, number) != number:
            raise ValueError(f"{folder}: the manifest says {key} {entry['stats'][key]}, the shards hold {number}")


# ----- the manifest


def repository(variant: str) -> str:
    """Return the dataset repository that has the variant. The variant "docs" is the documents."""
    known = CASEOPS_REPO if "caseops" in variant else REPOS.get(variant, DEFAULT_REPO)
    return os.environ.get("MATCHED_FINEWEB_REPO_ID") or known


@contextmanager
def manifest_errors(where: object) -> Iterator[None]:
    """Turn errors about what a manifest lacks into a ValueError of one line that begins with `where`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: an entry is not as a download needs it: {error!r}") from error


def find_published(manifest: dict, variant: str) -> tuple[dict, dict]:
    """Return the entries of the variant's data set and tokenizer. Raise ValueError if `manifest` has no such set.

    The variant sp<V>_caseops is the one set of that vocabulary that has "caseops" in its name.
    """
    names = [entry["name"] for entry in manifest["datasets"]]
    name = f"fineweb10B_{variant}"
    if name not in names and variant.endswith("_caseops"):
        stem = name.removesuffix("caseops")
        name = next((other for other in names if other.startswith(stem) and "caseops" in other), name)
    if name not in names:
        raise ValueError(f"expected a data set {name}, found {', '.join(names) or 'none'}")
    entry = shards.find_entry(manifest, "datasets", name)
    return entry, shards.find_entry(manifest, "tokenizers", entry["tokenizer_name"])


def check_folder(out: Path, entry: dict) -> None:
    """Raise ValueError if the data set `entry` would replace what data/tokenize_docs.py made."""
    for other in shards.read_manifest(out / "manifest.json")["datasets"]:
        same = other["name"] == entry["name"] or other.get("tokenizer_name") == entry["tokenizer_name"]
        if same and "shard_files" in other and "repo" not in other:
            raise ValueError(f"{out}: {other['name']} was made by data/tokenize_docs.py and would lose its shards or "
                             "its tokenizer; --out takes another place")


def record(out: Path, entry: dict, tokenizer: dict, hashes: dict[Path, str]) -> None:
    """Put both entries into the manifest in `out`, with the `hashes` of all files that are here and right."""
    folder = out / "datasets" / entry["name"]
    entry["shard_files"] = [{"name": path.name, "tokens": len(shards.read_shard(path)), "sha256": digest}
                            for path, digest in sorted(hashes.items()) if path.parent == folder]
    tokenizer["sha256"] = {path.name: digest for path, digest in hashes.items() if path.parent.name == "tokenizers"}
    shards.update_manifest(out / "manifest.json", [entry], [tokenizer])


# ----- the two commands


def plan(hub: Hub, args: argparse.Namespace, vocab_size: int) -> tuple[dict, dict, dict[Path, RepoFile]]:
    """Return the entries of data set and tokenizer for the manifest here, and the published files by their paths here.

    Both get the names that train_gpt.py looks for. The training shards come last.
    """
    manifest = shards.read_manifest(hub.receive(hub.find("manifest.json"), args.out))
    theirs, their_tokenizer = find_published(manifest, args.variant)
    stem = Path(their_tokenizer["model_path"]).stem
    if args.variant == f"sp{vocab_size}_caseops":
        stem = f"fineweb_{vocab_size}_bpe_caseops"
    entry = {"name": f"fineweb10B_{args.variant}", "tokenizer_name": stem, "repo": hub.repo, "revision": hub.revision,
             "caseops": "caseops" in theirs["name"], "stats": theirs["stats"]}
    tokenizer = {"name": stem, "vocab_size": vocab_size, "model_path": f"tokenizers/{stem}.model",
                 "vocab_path": f"tokenizers/{stem}.vocab"}

    folder, available = args.out / "datasets" / entry["name"], theirs["stats"]["files_train"]
    count = min(DEFAULT_TRAIN_SHARDS, available) if args.train_shards is None else args.train_shards
    if count > available:
        raise ValueError(f"--train-shards: expected at most {available} for {theirs['name']}, found {count}")
    here = {path.name for path in folder.glob("fineweb_train_*.bin")}  # these are checked too
    splits = ["val", "val_bytes"] if entry["caseops"] else ["val"]
    names = [name for split in splits for name in shards.shard_names(split, theirs["stats"]["files_val"])]
    names += [name for i, name in enumerate(shards.shard_names("train", available)) if i < count or name in here]
    files = {args.out / tokenizer[key]: hub.find(their_tokenizer[key]) for key in ("model_path", "vocab_path")}
    return entry, tokenizer, files | {folder / name: hub.find(f"datasets/{theirs['name']}/{name}") for name in names}


def download(args: argparse.Namespace) -> None:
    """Download what is missing. Raise ValueError or OSError if something cannot be had or is not what it should be."""
    name = re.fullmatch(r"sp(\d+)(_[\w.-]+)?", args.variant)
    if not name:
        raise ValueError(f"--variant: expected sp<vocabulary size>, perhaps with _caseops, found {args.variant}")
    vocab_size, hub = int(name[1]), Hub(repository(args.variant))
    with manifest_errors(f"{hub.repo}: manifest.json"):
        entry, tokenizer, files = plan(hub, args, vocab_size)
    check_folder(args.out, entry)
    folder, model, hashes = args.out / "datasets" / entry["name"], args.out / tokenizer["model_path"], {}
    train = {path: published for path, published in files.items() if path.name.startswith("fineweb_train_")}
    validation = {path: published for path, published in files.items() if path not in train}
    # The validation set is whole and in the manifest before the first training shard is downloaded.
    for part in (validation, train):
        hashes |= hub.fetch_all(part, vocab_size, args.workers)
        check_set(folder, entry, model, vocab_size)
        record(args.out, entry, tokenizer, hashes)
    print(f"{folder}: {len(shards.find_shards(folder, 'train'))} training shards, {entry['stats']['files_val']} of "
          f"validation, {vocab_size} pieces: all verified")
    if args.with_docs:
        hub = Hub(repository("docs"))
        hub.fetch_all({args.out / name: hub.find(name) for name in (DOCS_SOURCE, DOCS)}, 0, args.workers)


def verify(args: argparse.Namespace) -> None:
    """Compare the files of one variant, or of everything that was downloaded, with the hashes in the manifest.

    Print a line for each fault. Raise ValueError at the end if there was one.
    """
    where, hashes = args.out / "manifest.json", {}
    manifest = shards.read_manifest(where)
    sets = [entry for entry in manifest["datasets"]
            if "repo" in entry and args.variant in (None, str(entry["name"]).removeprefix("fineweb10B_"))]
    if not sets:
        name = f" {args.variant}" if args.variant else ""
        raise ValueError(f"{where}: expected a downloaded data set{name}, found none")
    with manifest_errors(where):
        for entry in sets:
            folder = args.out / "datasets" / entry["name"]
            tokenizer = shards.find_entry(manifest, "tokenizers", entry["tokenizer_name"])
            hashes |= dict.fromkeys(folder.glob("fineweb_*.bin"))  # None for those that the manifest does not list
            hashes |= {folder / shard["name"]: shard["sha256"] for shard in entry["shard_files"]}
            hashes |= {args.out / "tokenizers" / name: digest for name, digest in tokenizer["sha256"].items()}
    if args.with_docs:
        with manifest_errors(args.out / DOCS_SOURCE):
            hashes[args.out / DOCS] = json.loads((args.out / DOCS_SOURCE).read_bytes())["docs_sha256"]

    def fault(path: Path) -> str | None:
        try:
            if hashes[path] is None:
                raise ValueError(f"{path}: not in {where}; download again, or remove it if it is of another set")
            check_hash(path, hashes[path], shards.file_sha256(path))
        except (OSError, ValueError) as error:
            return shards.one_line(error)

    checked = thread_map(fault, sorted(hashes), max_workers=args.workers, desc="checking", unit=" files", disable=None)
    faults = [each for each in checked if each]
    for each in faults:
        print(f"bad: {each}", flush=True)
    if faults:
        others = f"{len(faults)} faults, each a line above; the first: " if len(faults) > 1 else ""
        raise ValueError(others + faults[0])
    print(f"{', '.join(entry['name'] for entry in sets)}: {len(hashes)} files are as published")


# ----- the command line


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks. Remove the staging folders, also those of a program that was killed."""
    if args.verify:
        return verify(args)
    args.variant = args.variant or DEFAULT_VARIANT
    args.out.mkdir(parents=True, exist_ok=True)

    def clear() -> None:
        for folder in (args.out, *args.out.glob("*/"), *args.out.glob("datasets/*/")):
            shutil.rmtree(folder / STAGING, ignore_errors=True)

    with shards.only_one(args.out):
        clear()
        try:
            download(args)
        finally:
            clear()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = shards.Parser(description="Download the published token shards, or check those that are here.")
    parser.add_argument("--variant", metavar="NAME",
                        help=f"take sp<vocabulary size> or sp<vocabulary size>_caseops (default: {DEFAULT_VARIANT}; "
                             "--verify takes everything that was downloaded)")
    parser.add_argument("--train-shards", type=shards.at_least(0), metavar="N",
                        help=f"download the first N training shards (default: {DEFAULT_TRAIN_SHARDS}, or all if there "
                             "are fewer)")
    parser.add_argument("--with-docs", action="store_true", help=f"also download {DOCS} (48 GB)")
    parser.add_argument("--verify", action="store_true", help="only check the files that are here, without a network")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="write datasets/, tokenizers/ and manifest.json into this folder (default: the folder of "
                             "this script)")
    parser.add_argument("--workers", type=shards.at_least(1), default=8, metavar="N",
                        help="download or check N files at a time (default: 8)")
    hub_logging.set_verbosity_error()
    return shards.run_tool(run, parser, argv)


def end_at_once(*_: object) -> None:
    """Handle Ctrl-C and SIGTERM. Without it the program would end only after the files that are being downloaded."""
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)
    sys.exit(main())
