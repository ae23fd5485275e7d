#!/usr/bin/env python3
"""The published shards, tokenizer and documents -> data/, each file checked before it takes its name.

Notable features:
- the manifest of the repository says what there is: the first N training shards, every validation shard, the tokenizer
- huggingface_hub receives the files, several at a time; what stands here and is right is not fetched again
- a file is compared with the hub's hash, a shard also with its own header and its vocabulary, the validation set with
  the manifest's counts of files, tokens and documents; CaseOps sets also with their byte counts
- `--verify` checks again what is here, without a network, and names every file that is bad

    python data/cached_challenge_fineweb.py --variant sp8192 --train-shards 80
    python data/cached_challenge_fineweb.py --variant sp8192_caseops --train-shards 80
    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 0 --with-docs

writes, below --out (this folder, unless told otherwise):

    datasets/fineweb10B_sp8192/fineweb_train_000000.bin, ..., fineweb_val_000000.bin
    tokenizers/fineweb_8192_bpe.model, tokenizers/fineweb_8192_bpe.vocab (for CaseOps fineweb_8192_bpe_caseops.*)
    docs_selected.jsonl, docs_selected.source_manifest.json
    manifest.json (other entries in it stay)

Files are received in .download, beside their final place. MATCHED_FINEWEB_REPO_ID and
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder in it; HF_ENDPOINT, HF_TOKEN and the like are
huggingface_hub's.
"""

import argparse
import glob
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from pathlib import Path

import httpx2
import numpy as np
import sentencepiece as spm
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from shards import (
    SHARD_NAME,
    Parser,
    file_sha256,
    find_entry,
    find_shards,
    merge_manifest,
    one_line,
    only_one,
    read_manifest,
    read_shard,
    shard_names,
    write_manifest,
)
from tqdm.contrib.concurrent import thread_map

DEFAULT_REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"
REPOS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_VARIANT = "sp8192"
DEFAULT_TRAIN_SHARDS = 80
VARIANT = re.compile(r"sp(\d+)(_[\w.-]+)?")
SHA256 = re.compile(r"[0-9a-f]{64}")
NO_PART = "not part of the published set (a run would read it); remove it"
DOCS, DOCS_SOURCE = "docs_selected.jsonl", "docs_selected.source_manifest.json"


# ----- the hub


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Raise what the client raises about `repo` as ValueError with one line; errors of the system as they are."""
    try:
        yield
    except (OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if isinstance(reason, RepositoryNotFoundError):
            says = "no such repository, or not yours to read (HF_TOKEN)"
        elif isinstance(reason, HfHubHTTPError):
            answer = reason.response
            says = f"{answer.request.url.path}: HTTP {answer.status_code} {answer.reason_phrase}"
        elif isinstance(reason, OSError) and reason.errno is not None:
            raise
        else:
            says = one_line(reason)
        raise ValueError(f"{repo}: {says}") from error


class Missing(ValueError):
    """The repository has no such file."""


class Hub:
    """Dataset repository `repo` of the hub at its current commit, `revision`, and its `files` by name."""

    def __init__(self, repo: str) -> None:
        self.repo, api = repo, HfApi()
        self.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
        with hub_errors(repo):
            self.revision = api.dataset_info(repo).sha
            tree = api.list_repo_tree(repo, self.prefix or None, recursive=True, revision=self.revision,
                                      repo_type="dataset")
            self.files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def find(self, name: str) -> RepoFile:
        """The file that the manifest calls `name`; Missing if there is none."""
        path = f"{self.prefix}/{name}".lstrip("/")
        if path not in self.files:
            raise Missing(f"{self.repo}: {path}: no such file")
        return self.files[path]

    def fetch(self, wanted: dict[Path, RepoFile], vocab_size: int, workers: int) -> dict[Path, str]:
        """Receive the `wanted` files, each to be had at its path, check them and put them there; their SHA-256.

        What was received completely by a run that was killed is not received again.
        """
        hashes: dict[Path, str] = {}

        def place(path: Path) -> None:
            new = staged(path, wanted[path])
            try:
                hashes[path] = check_published(new, wanted[path], vocab_size)
            except ValueError:
                new.unlink()
                raise
            os.replace(new, path)

        for folder in dict.fromkeys(path.parent for path in wanted):
            paths, staging = [path for path in wanted if path.parent == folder], folder / ".download"
            for unfinished in staging.rglob("*.incomplete"):
                unfinished.unlink()
            with hub_errors(self.repo):
                snapshot_download(self.repo, repo_type="dataset", revision=self.revision, local_dir=staging,
                                  allow_patterns=[glob.escape(wanted[path].path) for path in paths],
                                  max_workers=workers)
            thread_map(place, paths, max_workers=workers, desc="checking", disable=None)
            shutil.rmtree(staging)
        return hashes


def staged(path: Path, published: RepoFile) -> Path:
    """Where the `published` file is received that is to be had at `path`."""
    return path.parent / ".download" / published.path


# ----- checks


def check_hash(path: Path, expected: object) -> str:
    """SHA-256 of the file at `path`; ValueError unless it is the `expected` one."""
    found = file_sha256(path)
    if found != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}, found {found}")
    return found


def check_published(path: Path, published: RepoFile, vocab_size: int) -> str:
    """SHA-256 of the file at `path`; ValueError unless it is the `published` one, and a shard is a sound one."""
    if published.lfs:
        digest = check_hash(path, published.lfs.sha256)
    else:  # the hub knows small files by their Git hash
        data = path.read_bytes()
        digest, found = sha256(data).hexdigest(), sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if found != published.blob_id:
            raise ValueError(f"{path}: expected Git hash {published.blob_id}, found {found}")
    check_shard(path, vocab_size)
    return digest


def check_shard(path: Path, vocab_size: int) -> None:
    """ValueError if the file at `path` has the name of a shard and is not a sound one."""
    if name := SHARD_NAME.fullmatch(path.name):
        read_shard(path, None if name[1] == "val_bytes" else vocab_size)


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


def check_counts(folder: Path, entry: dict, bos: int, training: bool) -> None:
    """ValueError unless the shards in `folder` hold all that their manifest `entry` says.

    Those of validation are counted in files, tokens, documents (`bos` tokens) and, for CaseOps, bytes; those of
    `training`, if all are there, in tokens.
    """
    stats, shards = entry["stats"], [read_shard(path) for path in find_shards(folder, "val")]
    found = {"files_val": len(shards), "tokens_val": sum(map(len, shards)),
             "docs_val": sum(int(np.count_nonzero(tokens == bos)) for tokens in shards)}
    if entry.get("caseops"):
        counts = [read_shard(path) for path in find_shards(folder, "val_bytes")]
        expected, lengths = list(map(len, shards)), list(map(len, counts))
        if lengths != expected:
            raise ValueError(f"{folder}: expected fineweb_val_bytes_*.bin to count the bytes of {expected} tokens, "
                             f"found {lengths} counts")
        found["bytes_val"] = sum(int(part.sum(dtype=np.int64)) for part in counts)
    if training and len(paths := find_shards(folder, "train")) == stats["files_train"]:
        found["tokens_train"] = sum(len(read_shard(path)) for path in paths)
    for key, number in found.items():
        if stats.get(key, number) != number:
            raise ValueError(f"{folder}: the manifest says {key} {stats[key]}, the shards hold {number}")


def docs_sha256(out: Path) -> str:
    """Hash of the documents as their source manifest in `out` gives it; ValueError if it does not."""
    path = out / DOCS_SOURCE
    try:
        return str(json.loads(path.read_bytes())["docs_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object with docs_sha256") from error


# ----- the manifest


def variant_name(text: str) -> str:
    """The command-line value, if it names a variant; ValueError otherwise."""
    if not VARIANT.fullmatch(text):
        raise ValueError
    return text


def vocabulary(variant: str) -> int:
    """Number of pieces of the variant's tokenizer."""
    return int(VARIANT.fullmatch(variant)[1])


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


def local_entries(published: tuple[dict, dict], manifest: dict, variant: str, hub: Hub) -> tuple[dict, dict]:
    """The `published` entries of data set and tokenizer for the manifest here, with where they come from.

    The tokenizer of `sp<V>_caseops` gets the name train_gpt.py looks for.
    """
    entry = {key: value for key, value in published[0].items() if key not in ("path", "train_glob", "val_glob")}
    entry |= {"name": f"fineweb10B_{variant}", "repo": hub.repo, "revision": hub.revision}
    if "caseops" in published[0]["name"]:
        entry["caseops"] = True
    docs = manifest.get("docs_meta")
    if isinstance(docs, dict) and docs.get("docs_sha256"):
        entry["docs_sha256"] = docs["docs_sha256"]
    tokenizer = dict(published[1])
    if variant == f"sp{vocabulary(variant)}_caseops":
        name = f"fineweb_{vocabulary(variant)}_bpe_caseops"
        tokenizer |= {"name": name, "model_path": f"tokenizers/{name}.model"}
        if tokenizer.get("vocab_path"):
            tokenizer["vocab_path"] = f"tokenizers/{name}.vocab"
    entry["tokenizer_name"] = tokenizer["name"]
    return entry, tokenizer


def strangers(folder: Path, entry: dict) -> list[Path]:
    """Shards in `folder` that are not part of the published set `entry`, and that a run would take along."""
    stats = entry["stats"]
    names = {*shard_names("train", stats["files_train"]), *shard_names("val", stats["files_val"])}
    names.update(shard_names("val_bytes", stats["files_val"]) if entry.get("caseops") else ())
    return sorted(path for path in folder.glob("fineweb_*.bin") if path.name not in names)


def check_folder(out: Path, entry: dict, tokenizer: dict) -> None:
    """ValueError if the published set would replace what data/tokenize_docs.py made, or mix with other shards."""
    manifest = read_manifest(out / "manifest.json")
    listed(find_entry(manifest, "datasets", entry["name"]) or {}, out / "manifest.json")
    for other in manifest["datasets"]:
        used = find_entry(manifest, "tokenizers", other.get("tokenizer_name")) or {}
        same = other["name"] == entry["name"] or used.get("model_path") == tokenizer["model_path"]
        if same and "shard_files" in other and "repo" not in other:
            raise ValueError(f"{out}: {other['name']} was made by data/tokenize_docs.py and would lose its shards or "
                             "its tokenizer; --out takes another place")
    for path in strangers(out / "datasets" / entry["name"], entry):
        raise ValueError(f"{path}: {NO_PART}")


def listed(entry: dict, where: Path) -> dict[str, dict]:
    """What the `entry` of a data set, in the manifest `where`, says of each shard; ValueError if that is no list."""
    try:
        return {shard["name"]: dict(shard) for shard in entry.get("shard_files", ())}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: {entry['name']}: expected shard_files, a list of objects with a name") from error


def record(out: Path, entry: dict, tokenizer: dict, wanted: Iterable[Path], hashes: dict[Path, str]) -> None:
    """Put both entries in the manifest in `out`, with the `hashes` of their files; what else it lists stays.

    Shards that an earlier run listed stay too, unless they are `wanted` and, without a hash, not found right.
    """
    manifest, folder = read_manifest(out / "manifest.json"), out / "datasets" / entry["name"]
    old = listed(find_entry(manifest, "datasets", entry["name"]) or {}, out / "manifest.json")
    shards = {folder / name: shard for name, shard in old.items() if folder / name not in wanted}
    shards = {path: shard for path, shard in shards.items() if path.exists()}
    for path, digest in hashes.items():
        if path.parent == folder:
            shards[path] = {"name": path.name, "tokens": len(read_shard(path)), "sha256": digest}
    entry["shard_files"] = [shards[path] for path in sorted(shards)]
    tokenizer["sha256"] = {path.name: digest for path, digest in hashes.items() if path.parent.name == "tokenizers"}
    merge_manifest(manifest, "datasets", entry)
    merge_manifest(manifest, "tokenizers", tokenizer)
    write_manifest(out / "manifest.json", manifest)


# ----- the download


def is_right(path: Path, published: RepoFile, vocab_size: int) -> str | None:
    """SHA-256 of the `published` file at `path`; None if it is not there or wrong, or only linked to."""
    try:
        return None if path.is_symlink() else check_published(path, published, vocab_size)
    except (FileNotFoundError, ValueError):
        return None


def find_docs(hub: Hub, args: argparse.Namespace) -> tuple[Hub, dict[Path, RepoFile]]:
    """The published documents and the repository that has them; their source manifest is fetched here already."""
    try:
        source = hub.find(DOCS_SOURCE)
    except Missing:
        if "MATCHED_FINEWEB_REPO_ID" in os.environ:
            raise
        hub = Hub(DEFAULT_REPO)  # has the documents all variants are made of
        source = hub.find(DOCS_SOURCE)
    docs = hub.find(DOCS)
    hub.fetch({args.out / DOCS_SOURCE: source}, 0, args.workers)
    expected, found = docs_sha256(args.out), docs.lfs.sha256 if docs.lfs else None
    if found != expected:
        raise ValueError(f"{hub.repo}: {DOCS}: expected SHA-256 {expected} as in {DOCS_SOURCE}, found {found}")
    return hub, {args.out / DOCS: docs}


def check_space(missing: dict[Path, RepoFile]) -> None:
    """Say how much is to be received; ValueError if a disk has less room."""
    disks, needed = {}, Counter()
    for path, published in missing.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = path.parent.stat().st_dev  # a folder may be a link to elsewhere
        disks[disk] = path.parent
        needed[disk] += 0 if staged(path, published).exists() else published.size
    for disk, folder in disks.items():
        free = shutil.disk_usage(folder).free
        numbers = f"{needed[disk] / 1e9:,.3f} GB needed, {free / 1e9:,.3f} GB free"
        if needed[disk] > free:
            raise ValueError(f"{folder}: not enough disk space: {numbers}")
        print(f"{folder}: {numbers}", flush=True)


def download(args: argparse.Namespace) -> None:
    """Fetch what is missing. ValueError or OSError if something cannot be had, or is not what it should be."""
    out, vocab_size, hub = args.out, vocabulary(args.variant), Hub(repository(args.variant))
    path = out / ".published_manifest.json"
    hub.fetch({path: hub.find("manifest.json")}, vocab_size, 1)
    try:
        manifest = read_manifest(path)
    finally:
        path.unlink()
    published = published_entries(manifest, args.variant, f"{hub.repo}: {hub.prefix}/manifest.json")
    entry, tokenizer = local_entries(published, manifest, args.variant, hub)
    stats, folder = entry["stats"], out / "datasets" / entry["name"]
    count = min(DEFAULT_TRAIN_SHARDS, stats["files_train"]) if args.train_shards is None else args.train_shards
    if count > stats["files_train"]:
        raise ValueError(f"--train-shards: expected at most {stats['files_train']} for {published[0]['name']}, found "
                         f"{count}")
    check_folder(out, entry, tokenizer)

    def shards(split: str, number: int) -> dict[Path, RepoFile]:
        return {folder / name: hub.find(f"datasets/{published[0]['name']}/{name}")
                for name in shard_names(split, number)}

    first = {out / tokenizer[key]: hub.find(published[1][key]) for key in ("model_path", "vocab_path")
             if tokenizer.get(key)}
    first |= shards("val", stats["files_val"])
    first |= shards("val_bytes", stats["files_val"]) if entry.get("caseops") else {}
    train = shards("train", count)
    docs_hub, docs = find_docs(hub, args) if args.with_docs else (hub, {})
    wanted = first | train | docs
    digests = thread_map(lambda path: is_right(path, wanted[path], vocab_size), wanted, max_workers=args.workers,
                         desc="checking", disable=None)
    hashes = {path: digest for path, digest in zip(wanted, digests) if digest}
    check_space({path: wanted[path] for path in wanted if path not in hashes})

    # The validation set is whole and in the manifest before the first training shard is received.
    for source, files in ((hub, first), (hub, train), (docs_hub, docs)):
        missing = {path: files[path] for path in files if path not in hashes}
        hashes |= source.fetch(missing, vocab_size, args.workers)
        bos = check_tokenizer(out / tokenizer["model_path"], vocab_size)
        check_counts(folder, entry, bos, training=files is not first)
        record(out, entry, tokenizer, wanted, hashes)
    more = len(find_shards(folder, "train")) - count
    print(f"{folder}: {count} training shards{f' (and {more} more that were here)' if more else ''}, "
          f"{stats['files_val']} of validation, {vocab_size} pieces: all verified")


# ----- what is here


def faults_of_set(out: Path, manifest: dict, variant: str, train_shards: int, workers: int) -> list[str]:
    """Everything that is wrong with the set `variant` of the `manifest` in `out`, one line each.

    ValueError if the manifest has no such set, or does not say what belongs to it.
    """
    where = out / "manifest.json"
    entry, tokenizer = published_entries(manifest, variant, str(where))
    folder, vocab_size = out / "datasets" / entry["name"], vocabulary(variant)
    known = tokenizer["sha256"] if isinstance(tokenizer.get("sha256"), dict) else {}
    digests = {folder / name: shard.get("sha256") for name, shard in listed(entry, where).items()}
    digests |= {out / tokenizer[key]: None for key in ("model_path", "vocab_path") if tokenizer.get(key)}
    digests |= {out / "tokenizers" / name: digest for name, digest in known.items()}
    strange = strangers(folder, entry)
    here = {path.name for path in folder.glob("fineweb_*.bin") if path not in strange}
    last = max((int(name[14:20]) for name in here if name.startswith("fineweb_train_")), default=-1)
    names = shard_names("val", entry["stats"]["files_val"]) + shard_names("train", max(train_shards, last + 1))
    if entry.get("caseops"):
        names += shard_names("val_bytes", entry["stats"]["files_val"])

    def fault(path: Path) -> str | None:
        try:
            if path.exists() and not SHA256.fullmatch(str(digests.get(path))):
                raise ValueError(f"{path}: expected its sha256 in {where}, found {digests.get(path)} (an interrupted "
                                 "download?); download again")
            check_hash(path, digests.get(path))
            check_shard(path, vocab_size)
        except (OSError, ValueError) as error:
            return one_line(error)

    paths = sorted(digests.keys() | {folder / name for name in names})
    found = [f"{path}: {NO_PART}" for path in strange]
    found += filter(None, thread_map(fault, paths, max_workers=workers, desc="checking", disable=None))
    if not found:  # what follows is of all files together
        check_counts(folder, entry, check_tokenizer(out / tokenizer["model_path"], vocab_size), training=True)
        print(f"{folder}: {len(entry['shard_files'])} shards and the tokenizer are as published")
    return found


def verify(args: argparse.Namespace) -> None:
    """Check again all that the manifest lists of a variant, or of every set that was downloaded.

    Each fault becomes a line on stdout; ValueError, at the end, if there was one.
    """
    where = args.out / "manifest.json"
    manifest, found = read_manifest(where), []
    variants = [args.variant] if args.variant else [str(entry["name"]).removeprefix("fineweb10B_")
                                                    for entry in manifest["datasets"] if "repo" in entry]
    if not variants:
        raise ValueError(f"{where}: expected a downloaded data set, found none")
    for variant in variants:
        try:
            if not VARIANT.fullmatch(variant):
                raise ValueError(f"{where}: {variant}: expected the name fineweb10B_sp<vocabulary size>")
            found += faults_of_set(args.out, manifest, variant, args.train_shards or 0, args.workers)
        except (OSError, ValueError) as error:
            found.append(one_line(error))
    if args.with_docs:
        try:
            check_hash(args.out / DOCS, docs_sha256(args.out))
            print(f"{args.out / DOCS}: as published")
        except (OSError, ValueError) as error:
            found.append(one_line(error))
    found = list(dict.fromkeys(found))  # two sets may share a tokenizer
    for reason in found:
        print(f"bad: {reason}", flush=True)
    if found:
        others = f"{len(found)} faults, each a line above; the first: " if len(found) > 1 else ""
        raise ValueError(others + found[0])


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
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()  # those of the client, which ours leave out by themselves
    try:
        args = parser.parse_args(argv)
        if args.verify:
            verify(args)
            return 0
        args.variant = args.variant or DEFAULT_VARIANT
        args.out.mkdir(parents=True, exist_ok=True)
        with only_one(args.out):
            download(args)
    except (OSError, ValueError, MemoryError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def end_at_once(*_: object) -> None:
    """Handler of Ctrl-C and SIGTERM: the client's threads would receive their files to the end first."""
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)
    sys.exit(main())
