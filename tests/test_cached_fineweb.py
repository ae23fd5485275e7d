"""data/cached_challenge_fineweb.py, run as a user runs it, against a hub of our own that can misbehave."""

import hashlib
import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import cached_challenge_fineweb as cached
import numpy as np
import pytest
import sentencepiece as spm
from conftest import shifted
from runs import assert_refused, shard_bytes

import train_gpt

TOOL = Path(cached.__file__)
REPO, CASEOPS = "willdepueoai/parameter-golf", "romeerp/parameter-golf-caseops-v1"


# ----- a hub


class Handler(BaseHTTPRequestHandler):
    """/datasets/<repo>/resolve/<revision>/<file>; large files are sent by another host, as by the real one."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, length: int = 0, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.answer(200, len(data))
        self.wfile.write(data)

    def tell(self, owner: str, repo: str, what: str = "", *rest: str) -> None:
        """/api/datasets/<repo> and /api/datasets/<repo>/tree/<commit>/<folder>: what the hub knows of its files."""
        root = f"{owner}/{repo}/"
        known = [name for name in self.server.files if name.startswith(root)]
        if not known:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if not what:
            return self.send_json({"id": root.rstrip("/"), "sha": self.server.commit(root)})
        assert (what, rest[0]) == ("tree", self.server.commit(root))
        folder = root + "/".join(rest[1:])
        return self.send_json([described(name.removeprefix(root), self.server.files[name]) for name in known
                               if name.startswith(folder)])

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        _, place, owner, repo, *rest = path.split("/")
        name = f"{owner}/{repo}/" + "/".join(rest[2:])
        hub.requests.append((self.command, place, name))
        if place == "api":
            fault = hub.faults.get("api", [])
            return self.answer(fault.pop()) if fault else self.tell(repo, *rest)
        data = hub.files.get(name)
        if data is None or rest[:1] != ["resolve"] or rest[1] != hub.commit(f"{owner}/{repo}/"):
            return self.answer(404, X_Error_Code="EntryNotFound")
        if self.command == "GET" or name not in hub.faults:
            faults = hub.faults.get(name, [])
        else:
            faults = [fault for fault in hub.faults[name] if fault == "HEAD 503"]
        fault = faults[0] if faults else ""
        if fault and fault != hub.always.get(name):
            hub.faults[name].remove(fault)
        if fault.endswith(("503", "429")):
            return self.answer(int(fault[-3:]))
        large = name.endswith(LARGE)
        etag = described(name, data)["lfs"]["oid"] if large else described(name, data)["oid"]
        common = {"ETag": f'"{etag}"', "X_Repo_Commit": rest[1], "Accept_Ranges": "bytes"}
        if large and place == "datasets":
            elsewhere = f"http://localhost:{hub.server_port}/cdn/{path.split('/', 2)[2]}?signature=x"
            linked = {"X_Linked_Size": str(len(data)), "X_Linked_ETag": f'"{etag}"'}
            return self.answer(302, Location=elsewhere, **linked, **common)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if fault == "truncated":
            data = data[: len(data) // 2]
        if fault == "corrupted":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if start and start >= len(data):
            return self.answer(416)
        body = data[start:]
        ranged = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, len(body), **common, **ranged)
        if self.command == "HEAD":
            return None
        if fault == "stalled":  # all but the end, then nothing
            self.wfile.write(body[: len(body) * 9 // 10])
            self.wfile.flush()
            hub.released.wait(20)
        elif fault == "dropped":
            self.wfile.write(body[: len(body) // 2])
        else:
            self.wfile.write(body)
            return None
        self.wfile.flush()
        self.close_connection = True
        return None


LARGE = (".bin", ".model", ".jsonl")


def described(path: str, data: bytes) -> dict:
    """The entry of a file in the hub's listing: large ones have a SHA-256, all have the hash Git would give them."""
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()} | (large if path.endswith(LARGE) else {})


class LocalHub(ThreadingHTTPServer):
    """Files by "owner/repo/path"; what to do wrong with each GET of one; and what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: list[tuple] = []
        self.released = threading.Event()

    def commit(self, root: str) -> str:
        """Hash of all that the repository holds now."""
        held = [(name, described(name, data)["oid"]) for name, data in self.files.items() if name.startswith(root)]
        return hashlib.sha1(repr(sorted(held)).encode()).hexdigest()

    def fetched(self) -> list[str]:
        """Names of the files whose contents were sent, without the repository."""
        return sorted(name.split("/", 2)[2] for method, place, name in self.requests
                      if method == "GET" and (place == "cdn" or place == "datasets" and not name.endswith(LARGE)))

    def spoil(self, name: str, fault: str) -> None:
        """Let every GET of the one file with this ending go wrong."""
        name, = (known for known in self.files if known.endswith(name))  # of whichever repository
        self.faults[name], self.always[name] = [fault], fault

    def handle_error(self, *_: object) -> None:
        pass  # a client that was killed


@pytest.fixture(scope="module")
def model() -> bytes:
    rng = random.Random(shifted(1))
    lines = [" ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(30)) for _ in range(40)]
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=320,
                                   byte_fallback=True, minloglevel=2)
    return out.getvalue()


def publish(hub: LocalHub, model: bytes, repo: str = REPO, name: str = "fineweb10B_sp320", caseops=False) -> dict:
    """Put a data set of 4 training and 2 validation shards in the hub; its manifest, which is there as well."""
    rng = np.random.default_rng(shifted(len(name)))
    put = {}
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            tokens = rng.integers(4, 320, 3_000 + index)
            tokens[rng.permutation(len(tokens))[:10]] = 1
            put[f"datasets/{name}/fineweb_{split}_{index:06d}.bin"] = shard_bytes(tokens)
            if caseops and split == "val":
                put[f"datasets/{name}/fineweb_val_bytes_{index:06d}.bin"] = shard_bytes(rng.integers(0, 9, len(tokens)))
    tokenizer = f"fineweb_320_bpe{name.removeprefix('fineweb10B_sp320')}"
    put |= {f"tokenizers/{tokenizer}.model": model, f"tokenizers/{tokenizer}.vocab": b"<pad>\t0\n"}
    docs = b'{"text": "one"}\n{"text": "two"}\n' * 1000
    sha = hashlib.sha256(docs).hexdigest()
    source = json.dumps({"docs_sha256": sha}).encode()
    put |= {"docs_selected.jsonl": docs, "docs_selected.source_manifest.json": source}
    manifest = {
        "version": "10B", "num_docs": 100, "docs_meta": {"docs_sha256": sha},
        "tokenizers": [{"name": "sp_bpe_320", "vocab_size": 320, "model_path": f"tokenizers/{tokenizer}.model",
                        "vocab_path": f"tokenizers/{tokenizer}.vocab"}],
        "datasets": [{"name": "fineweb10B_sp77", "tokenizer_name": "sp_bpe_77", "stats": {}},
                     {"name": name, "tokenizer_name": "sp_bpe_320", "path": f"datasets/{name}", "vocab_size": 320,
                      "stats": {"files_train": 4, "files_val": 2, "tokens_train": 12_006, "tokens_val": 6_001,
                                "docs_val": 20}}],
    }
    hub.files |= {f"{repo}/datasets/{path}": data for path, data in put.items()}
    set_manifest(hub, manifest, repo)
    return manifest


def set_manifest(hub: LocalHub, manifest: dict, repo: str = REPO) -> None:
    hub.files[f"{repo}/datasets/manifest.json"] = json.dumps(manifest).encode()


@pytest.fixture
def hub(monkeypatch):
    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in [name for name in os.environ if name.startswith("MATCHED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses before it asks again
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


# ----- the program


def environment(hub: LocalHub) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MATCHED_"))}
    return known | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1",
                    "HF_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}


def command(out: Path, *arguments: object, variant: str | None = "sp320") -> list[str]:
    chosen = ["--variant", variant] if variant else []
    return [sys.executable, str(TOOL), "--out", str(out), *chosen, *map(str, arguments)]


def run_alone(hub: LocalHub, out: Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    """As a user starts it, which takes most of a second."""
    return subprocess.run(command(out, *arguments), env=environment(hub), capture_output=True, text=True, timeout=300,
                          **options)


@pytest.fixture
def run(monkeypatch, capsys):
    """The program's main(), with what it prints; without a hub the network is down."""

    def run(hub: LocalHub | None, out: Path, *arguments: object, variant: str | None = "sp320",
            **more: str) -> subprocess.CompletedProcess:
        endpoint = f"http://127.0.0.1:{hub.server_port if hub else 9}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 5)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        status = cached.main(command(out, *arguments, variant=variant)[2:])
        return subprocess.CompletedProcess([], status, *capsys.readouterr())

    return run


def published(hub: LocalHub, name: str) -> bytes:
    """Contents of the one file whose name in some repository ends like this."""
    data, = (data for known, data in hub.files.items() if known.endswith(f"/datasets/{name}"))
    return data


def names(out: Path) -> list[str]:
    """Files that have their final name."""
    paths = (path for path in out.rglob("*") if path.is_file() and ".download" not in path.parts)
    return sorted(path.relative_to(out).as_posix() for path in paths)


def assert_sound(hub: LocalHub, out: Path) -> None:
    """Whatever has its final name is the published file."""
    for name in names(out):
        assert name == "manifest.json" or (out / name).read_bytes() == published(hub, name), name


FOLDER = "datasets/fineweb10B_sp320"
VAL = [f"{FOLDER}/fineweb_val_{index:06d}.bin" for index in range(2)]
TRAIN = [f"{FOLDER}/fineweb_train_{index:06d}.bin" for index in range(4)]
OTHERS = ["manifest.json", "tokenizers/fineweb_320_bpe.model", "tokenizers/fineweb_320_bpe.vocab"]


def test_download_then_again_then_verify(run, hub, model, tmp_path):
    remote = publish(hub, model)
    other = {"name": "mine", "tokenizer_name": "mine_bpe", "stats": {"files_val": 1}}
    before = {"note": "kept", "datasets": [other], "tokenizers": [{"name": "mine_bpe"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(before))

    done = run_alone(hub, tmp_path, "--train-shards", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert " GB needed, " in done.stdout and " GB free" in done.stdout
    assert names(tmp_path) == sorted(VAL + TRAIN[:3] + OTHERS)
    assert_sound(hub, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    assert manifest["note"] == "kept"
    assert manifest["datasets"][0] == other
    entry = manifest["datasets"][1]
    assert entry["name"] == "fineweb10B_sp320"
    assert entry["stats"] == remote["datasets"][1]["stats"]
    assert (entry["repo"], entry["revision"]) == (REPO, hub.commit(REPO + "/"))
    listed = {FOLDER + "/" + each["name"]: (each["tokens"], each["sha256"]) for each in entry["shard_files"]}
    assert listed == {name: ((len(published(hub, name)) - 1024) // 2, hashlib.sha256(published(hub, name)).hexdigest())
                      for name in VAL + TRAIN[:3]}
    assert [each["name"] for each in manifest["tokenizers"]] == ["mine_bpe", "fineweb_320_bpe"]

    # Again, with one shard more, one damaged and one gone: these three only.
    damaged = bytearray((tmp_path / TRAIN[0]).read_bytes())
    damaged[5000] ^= 1
    (tmp_path / TRAIN[0]).write_bytes(damaged)
    (tmp_path / VAL[1]).unlink()
    hub.requests.clear()
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    with subprocess.Popen(command(tmp_path, "--train-shards", 4), env=environment(hub),
                          stdout=subprocess.DEVNULL, stderr=end) as process:
        assert process.wait(timeout=300) == 0
    bar = os.read(terminal, 1 << 16).decode()
    assert "downloading" in bar and "100%" in bar  # a terminal gets a progress bar
    assert hub.fetched() == sorted(["datasets/" + name for name in (TRAIN[0], TRAIN[3], VAL[1])]
                                   + ["datasets/manifest.json"])
    assert names(tmp_path) == sorted(VAL + TRAIN + OTHERS)
    assert_sound(hub, tmp_path)

    # Shards that are here stay listed when fewer are asked for, and are mended.
    (tmp_path / TRAIN[2]).write_bytes(b"")
    assert run(hub, tmp_path, "--train-shards", 1).returncode == 0
    done = run(None, tmp_path, "--verify")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fineweb10B_sp320: 8 files are as published\n", "")


def test_verify_finds_each_fault(run, hub, model, tmp_path, capsys):
    publish(hub, model)
    done = run(hub, tmp_path, "--train-shards", 1, "--with-docs")
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == sorted(VAL + TRAIN[:1] + OTHERS + ["docs_selected.jsonl",
                                                                 "docs_selected.source_manifest.json"])
    assert_sound(hub, tmp_path)

    def verify(*arguments: str) -> str:
        capsys.readouterr()
        status = cached.main(["--verify", "--variant", "sp320", "--out", str(tmp_path), *arguments])
        out, error = capsys.readouterr()
        bad = [line for line in out.splitlines() if line.startswith("bad: ")]
        assert (status, error.count("\n")) in ((0, 0), (1, 1))
        assert not bad or bad[0].removeprefix("bad: ") in error
        return "\n".join(bad) or error

    assert verify("--with-docs") == ""

    def changed(name: str, change, *arguments: str) -> str:
        path = tmp_path / name
        data = path.read_bytes()
        new = change(data)
        path.unlink() if new is None else path.write_bytes(new)
        error = verify(*arguments)
        path.write_bytes(data)
        return error

    def flipped(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    assert "fineweb_val_000001.bin: expected hash" in changed(VAL[1], flipped)
    assert "fineweb_val_000001.bin: expected hash" in changed(VAL[1], lambda data: data[:-2])
    assert "fineweb_val_000001.bin: No such file" in changed(VAL[1], lambda data: None)
    assert "fineweb_320_bpe.model: expected hash" in changed(OTHERS[1], flipped)
    assert "docs_selected.jsonl: expected hash" in changed("docs_selected.jsonl", flipped, "--with-docs")
    assert "expected a downloaded data set sp320, found none" in changed("manifest.json", lambda data: b"{}")
    assert "not a manifest" in changed("manifest.json", lambda data: data[:50])
    for name in ("train_000001", "train_000007", "val_000002", "train_000000 (1)", "val_1", "val_bytes_000000"):
        stranger = tmp_path / FOLDER / f"fineweb_{name}.bin"
        stranger.write_bytes(published(hub, TRAIN[0]))
        assert f"fineweb_{name}.bin: not in {tmp_path}/manifest.json" in verify()
        stranger.unlink()
    assert verify("--with-docs") == ""
    assert "docs_selected.source_manifest.json: " in changed("docs_selected.source_manifest.json", lambda data: b"{}",
                                                             "--with-docs")

    # What the manifest itself does not say, or not as it should.
    whole = json.loads((tmp_path / "manifest.json").read_bytes())

    def without(change) -> str:
        manifest = json.loads(json.dumps(whole))
        change(manifest["datasets"][0], manifest["tokenizers"][0])
        return changed("manifest.json", lambda data: json.dumps(manifest).encode())

    unusable = "manifest.json: an entry is not as a download needs it"
    for change, part in (
        (lambda entry, _: entry["shard_files"].pop(), "fineweb_val_000001.bin: not in "),
        (lambda entry, _: entry["shard_files"][0].pop("sha256"), unusable),
        (lambda entry, _: entry["shard_files"][0].update(sha256="abc"), "expected hash abc"),
        (lambda entry, _: entry["shard_files"][0].update(sha256=7), "expected hash 7"),
        (lambda entry, _: entry["shard_files"][0].pop("name"), unusable),
        (lambda entry, _: entry.update(shard_files=7), unusable),
        (lambda entry, _: entry.pop("shard_files"), unusable),
        (lambda entry, _: entry.pop("tokenizer_name"), unusable),
        (lambda _, tokenizer: tokenizer.pop("sha256"), unusable),
        (lambda _, tokenizer: tokenizer.update(sha256=[]), unusable),
        (lambda _, tokenizer: tokenizer["sha256"].update({"fineweb_320_bpe.model": "0" * 63}), "expected hash 000"),
    ):
        assert part in without(change)
    assert verify() == ""


def test_other_shards_in_the_folder_are_refused(run, hub, model, tmp_path):
    publish(hub, model)
    (tmp_path / FOLDER).mkdir(parents=True)
    for name, says in (("train_000000 (1)", "fineweb_train_000000 (1).bin: not the name of a shard"),
                       ("val_1", "fineweb_val_1.bin: not the name of a shard"),
                       ("train_000007", "fineweb_train_000001.bin: no such file, but fineweb_train_000007.bin is"),
                       ("val_000002", "files_val 2, the shards hold 3")):
        stranger = tmp_path / FOLDER / f"fineweb_{name}.bin"
        stranger.write_bytes(published(hub, TRAIN[0]))
        assert_refused(run(hub, tmp_path, "--train-shards", 1), says)
        stranger.unlink()
    assert run(hub, tmp_path, "--train-shards", 1).returncode == 0


def test_verify_names_every_bad_file_of_every_set(run, hub, model, tmp_path):
    publish(hub, model)
    publish(hub, model, CASEOPS, "fineweb10B_sp320_lossless_caps_caseops_v1_reserved", caseops=True)
    for variant in ("sp320", "sp320_caseops"):
        assert run(hub, tmp_path, "--train-shards", 1, variant=variant).returncode == 0
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    manifest["datasets"].append({"name": "mine", "tokenizer_name": "mine_bpe", "shard_files": []})  # not downloaded
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = run(None, tmp_path, "--verify", variant=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "fineweb10B_sp320, fineweb10B_sp320_caseops: 12 files are as published\n"

    spoilt = [tmp_path / name for name in (TRAIN[0], VAL[1], OTHERS[1])]
    spoilt += [tmp_path / "datasets/fineweb10B_sp320_caseops" / f"fineweb_{split}_000001.bin"
               for split in ("val", "val_bytes")]
    for path in spoilt[:-1]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    spoilt[-1].unlink()
    done = run(None, tmp_path, "--verify", variant=None)
    assert_refused(done, f"5 faults, each a line above; the first: {spoilt[0]}: expected hash")
    lines = [line for line in done.stdout.splitlines() if line.startswith("bad: ")]
    assert [line.split(": ")[1] for line in lines] == sorted(map(str, spoilt))
    assert_refused(run(None, tmp_path, "--verify"), "3 faults")
    for variant in ("sp320", "sp320_caseops"):
        assert run(hub, tmp_path, "--train-shards", 1, variant=variant).returncode == 0
    assert run(None, tmp_path, "--verify", variant=None).returncode == 0


def test_what_passes_is_waited_for(run, hub, model, tmp_path):
    publish(hub, model)
    base = f"{REPO}/datasets/"
    hub.faults = {base + "manifest.json": ["HEAD 503"], base + VAL[0]: ["429", "429"], base + VAL[1]: ["dropped"],
                  base + TRAIN[0]: ["HEAD 503", "dropped"]}
    done = run(hub, tmp_path, "--train-shards", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(hub.faults.values())
    assert names(tmp_path) == sorted(VAL + TRAIN[:1] + OTHERS)
    assert_sound(hub, tmp_path)


@pytest.mark.parametrize(
    ("name", "fault", "parts"),
    [
        (VAL[0], "truncated", ("should be of size 7024 but has size 3512",)),
        (VAL[1], "corrupted", ("fineweb_val_000001.bin", "expected hash")),
        (TRAIN[0], "corrupted", ("fineweb_train_000000.bin", "expected hash")),
        (OTHERS[2], "corrupted", ("fineweb_320_bpe.vocab", "expected hash")),
        (TRAIN[1], "503", ("fineweb_train_000001.bin: Server error '503",)),
        ("manifest.json", "503", ("manifest.json: Server error '503",)),
        (VAL[0], "HEAD 503", ("fineweb_val_000000.bin: Server error '503",)),
        (TRAIN[0], "404", (f"{REPO}: datasets/{TRAIN[0]}: no such file",)),
        ("manifest.json", "404", (f"{REPO}: datasets/manifest.json: no such file",)),
    ],
)
def test_what_does_not_pass(run, hub, model, tmp_path, name, fault, parts):
    publish(hub, model)
    if fault == "404":
        del hub.files[f"{REPO}/datasets/{name}"]
    else:
        hub.spoil("/" + name, fault)
    done = run(hub, tmp_path, "--train-shards", 2)
    assert_refused(done, *parts)
    assert_sound(hub, tmp_path)
    assert not list(tmp_path.rglob(Path(name).name))  # a wrong one is not gone on with
    if name in VAL:
        assert not (tmp_path / "manifest.json").exists() and not (tmp_path / TRAIN[0]).exists()


def changed_stats(**changes: int):
    def change(hub: LocalHub, manifest: dict) -> None:
        manifest["datasets"][1]["stats"] |= changes
        set_manifest(hub, manifest)

    return change


def cut_validation(hub: LocalHub, manifest: dict) -> None:
    """The hub itself has a shard that ends early, sound in itself."""
    hub.files[f"{REPO}/datasets/{VAL[1]}"] = shard_bytes(np.arange(4, 104))


def replaced(name: str, data: bytes):
    return lambda hub, manifest: hub.files.__setitem__(f"{REPO}/datasets/{name}", data)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (changed_stats(files_val=3), ("fineweb_val_000002.bin: no such file",)),
        (changed_stats(files_val=1), ("tokens_val 6001, the shards hold 3000",)),
        (changed_stats(tokens_val=6_002), ("tokens_val 6002, the shards hold 6001",)),
        (changed_stats(docs_val=50_000), ("docs_val 50000, the shards hold 20",)),
        (changed_stats(files_val=0), ("tokens_val 6001, the shards hold 0",)),
        (lambda hub, manifest: set_manifest(hub, manifest | {"tokenizers": []}), ("manifest.json: an entry is not",)),
        (cut_validation, ("tokens_val 6001, the shards hold 3100",)),
        (replaced(VAL[0], b"version https://git-lfs.github.com/spec/v1\n" * 30), ("expected magic 20240520",)),
        (replaced(TRAIN[0], shard_bytes(np.full(3_000, 320))), ("expected tokens below 320, found 320",)),
        (replaced(OTHERS[1], b"model"), ("not a SentencePiece model",)),
        (replaced("manifest.json", b"<html>"), ("not a manifest",)),
        (replaced("manifest.json", b'{"datasets": []}'), ("expected a data set fineweb10B_sp320, found none",)),
    ],
)
def test_what_is_published_wrong(run, hub, model, tmp_path, change, parts):
    change(hub, publish(hub, model))
    assert_refused(run(hub, tmp_path, "--train-shards", 4), *parts)
    assert_sound(hub, tmp_path)


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + 300  # a guard against waiting for ever
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)


def test_killed_and_continued(run, hub, model, tmp_path):
    publish(hub, model)
    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        hub.spoil(TRAIN[1], "stalled")
        hub.requests.clear()
        process = subprocess.Popen(command(tmp_path, "--train-shards", 4, "--workers", 2), env=environment(hub),
                                   stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        try:
            wait_for(lambda: ("GET", "cdn", f"{REPO}/datasets/{TRAIN[1]}") in hub.requests, process)
            wait_for(lambda: list(tmp_path.rglob("*.incomplete")), process)
            wait_for((tmp_path / TRAIN[0]).exists, process)
            if end == signal.SIGKILL:
                assert_refused(run(hub, tmp_path), "another program is putting data there")
            process.send_signal(end)
            error = process.communicate(timeout=300)[1]
        finally:
            process.kill()
        assert (process.returncode, error) == ((-9, "") if end == signal.SIGKILL else (1, "error: interrupted\n"))
        assert not (tmp_path / TRAIN[1]).exists()
        for name in VAL:
            assert (tmp_path / name).read_bytes() == published(hub, name)

    hub.faults.clear()
    hub.released.set()
    hub.requests.clear()
    done = run(hub, tmp_path, "--train-shards", 4)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"datasets/{TRAIN[1]}" in hub.fetched() and f"datasets/{VAL[0]}" not in hub.fetched()
    assert f"datasets/{TRAIN[0]}" not in hub.fetched()  # received and checked before the kill
    assert names(tmp_path) == sorted(VAL + TRAIN + OTHERS)
    assert not list(tmp_path.rglob(".download"))
    assert_sound(hub, tmp_path)


def test_disk(monkeypatch, run, hub, model, tmp_path):
    publish(hub, model)
    with monkeypatch.context() as full:
        full.setattr(cached.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
        done = run(hub, tmp_path, "--train-shards", 4)
        assert_refused(done, "not enough disk space: 0.000 GB needed, 0.000 GB free")
        assert hub.fetched() == ["datasets/manifest.json"]
        assert names(tmp_path) == []
        (tmp_path / VAL[0]).write_bytes(b"old")
        assert_refused(run(hub, tmp_path, "--train-shards", 4), "space")

    # What stands here and is wrong stays until what is right has come.
    assert (tmp_path / VAL[0]).read_bytes() == b"old"
    hub.spoil(VAL[0], "corrupted")
    assert_refused(run(hub, tmp_path, "--train-shards", 1), "expected hash")
    assert (tmp_path / VAL[0]).read_bytes() == b"old"
    hub.faults.clear()
    assert run(hub, tmp_path, "--train-shards", 1).returncode == 0
    assert_sound(hub, tmp_path)
    hub.spoil(TRAIN[0], "corrupted")
    (tmp_path / TRAIN[0]).write_bytes(b"old")
    assert_refused(run(hub, tmp_path, "--train-shards", 1), "expected hash")
    assert (tmp_path / TRAIN[0]).read_bytes() == b"old"
    entry, = json.loads((tmp_path / "manifest.json").read_bytes())["datasets"]
    assert [each["name"] for each in entry["shard_files"]] == [Path(name).name for name in VAL]

    resource = pytest.importorskip("resource")
    done = run_alone(hub, tmp_path / "new", "--train-shards", 4,
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (7_100, 7_100)))
    assert_refused(done, "File too large")
    assert_sound(hub, tmp_path / "new")


def test_documents(run, hub, model, tmp_path):
    # Documents from the default repository where that of the variant has none of its own.
    publish(hub, model)
    publish(hub, model, CASEOPS, "fineweb10B_sp320_lossless_caps_caseops_v1_reserved", caseops=True)
    for name in ("docs_selected.jsonl", "docs_selected.source_manifest.json"):
        del hub.files[f"{CASEOPS}/datasets/{name}"]
    done = run(hub, tmp_path, "--train-shards", 0, "--with-docs", variant="sp320_caseops")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "docs_selected.jsonl").read_bytes() == published(hub, "docs_selected.jsonl")

    hub.spoil("docs_selected.jsonl", "corrupted")
    done = run(hub, tmp_path / "new", "--train-shards", 1, "--with-docs")
    assert_refused(done, "docs_selected.jsonl: expected hash")
    assert_sound(hub, tmp_path / "new")
    assert not list(tmp_path.rglob("new/**/docs_selected.jsonl"))


def test_caseops(run, hub, model, tmp_path):
    name = "fineweb10B_sp320_lossless_caps_caseops_v1_reserved"
    publish(hub, model, CASEOPS, name, caseops=True)
    done = run(hub, tmp_path, "--train-shards", 1, variant="sp320_caseops")
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "datasets/fineweb10B_sp320_caseops"
    shards = ["fineweb_train_000000.bin"] + [f"fineweb_{split}_{index:06d}.bin" for split in ("val", "val_bytes")
                                             for index in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(shards)
    for each in shards:
        assert (folder / each).read_bytes() == published(hub, f"datasets/{name}/{each}")
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    (entry,), (tokenizer,) = manifest["datasets"], manifest["tokenizers"]
    assert (entry["name"], entry["caseops"]) == ("fineweb10B_sp320_caseops", True)
    # CASEOPS_ENABLED=1 is all that a run needs: the tokenizer stands where train_gpt.py looks for it.
    assert train_gpt.Settings(caseops_enabled=True, vocab_size=320, data_dir=str(tmp_path)).tokenizer_path == str(
        tmp_path / "tokenizers/fineweb_320_bpe_caseops.model")
    assert entry["tokenizer_name"] == tokenizer["name"] == "fineweb_320_bpe_caseops"
    for key, ending in (("model_path", "model"), ("vocab_path", "vocab")):
        assert tokenizer[key] == f"tokenizers/fineweb_320_bpe_caseops.{ending}"
        theirs = published(hub, f"tokenizers/fineweb_320_bpe_lossless_caps_caseops_v1_reserved.{ending}")
        assert (tmp_path / tokenizer[key]).read_bytes() == theirs
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2
    assert sorted(each["name"] for each in entry["shard_files"]) == sorted(shards)
    assert run(None, tmp_path, "--verify", variant="sp320_caseops").returncode == 0

    sidecar = f"{CASEOPS}/datasets/datasets/{name}/fineweb_val_bytes_000001.bin"
    hub.files[sidecar] = shard_bytes(np.zeros(100, int))
    done = run(hub, tmp_path / "new", "--train-shards", 1, variant="sp320_caseops")
    assert_refused(done, "fineweb_val_bytes_*.bin", "the bytes of [3000, 3001] tokens, found [3000, 100]")
    del hub.files[sidecar]
    done = run(hub, tmp_path / "new", "--train-shards", 1, variant="sp320_caseops")
    assert_refused(done, "fineweb_val_bytes_000001.bin: no such file")


def test_repositories(monkeypatch, run, hub, model, tmp_path):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    known = {"sp1024": REPO, "sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf",
             "sp8192_caseops": CASEOPS, "docs": REPO}
    assert {variant: cached.repository(variant) for variant in known} == known
    publish(hub, model, "someone/else")
    for path in [path for path in hub.files if path.startswith("someone/else/")]:
        hub.files[path.replace("else/datasets/", "else/deep/down/")] = hub.files.pop(path)
    more = {"MATCHED_FINEWEB_REPO_ID": "someone/else", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "deep/down"}
    done = run(hub, tmp_path, "--train-shards", 1, **more)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == sorted(VAL + TRAIN[:1] + OTHERS)


def test_command_line_refusals(capsys, monkeypatch, run, hub, model, tmp_path):
    for arguments, parts in (
        (("--variant", "gpt2"), ("--variant", "gpt2")),
        (("--train-shards", "-1"), ("--train-shards", "-1")),
        (("--workers", "0"), ("--workers",)),
        (("--shards", "1"), ("--shards",)),
        (("--verify",), ("expected a downloaded data set", "found none")),
        (("--verify", "--variant", "sp8192"), ("expected a downloaded data set sp8192, found none",)),
    ):
        assert cached.main(["--out", str(tmp_path), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert all(part in error for part in parts)
    manifest = publish(hub, model)
    assert_refused(run(hub, tmp_path, "--train-shards", 5), "--train-shards: expected at most 4")
    assert_refused(run(None, tmp_path), REPO, "refused")
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert_refused(run(hub, tmp_path), "offline")
    with monkeypatch.context() as elsewhere:
        for repo, says in (("no such/name/at all", "no such/name/at all"), ("no/such", "no/such: 404 ")):
            elsewhere.setenv("MATCHED_FINEWEB_REPO_ID", repo)
            assert_refused(run(hub, tmp_path), says)
    manifest["tokenizers"][0]["model_path"] = "tokenizers/../../x.model"
    set_manifest(hub, manifest)
    assert_refused(run(hub, tmp_path), "tokenizers/../../x.model: no such file")
    # A set of one's own with this name, or a tokenizer of one's own, is left alone.
    publish(hub, model)
    for name in ("fineweb10B_sp320", "mine"):
        mine = {"datasets": [{"name": name, "tokenizer_name": "fineweb_320_bpe", "stats": {}, "shard_files": []}],
                "tokenizers": [{"name": "fineweb_320_bpe", "model_path": "tokenizers/fineweb_320_bpe.model"}]}
        (tmp_path / "manifest.json").write_text(json.dumps(mine))
        assert_refused(run(hub, tmp_path), f"{name} was made by data/tokenize_docs.py")
