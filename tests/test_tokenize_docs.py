"""data/tokenize_docs.py and data/shards.py against expectations computed without them."""

import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import cached_challenge_fineweb
import caseops
import numpy as np
import overlap
import pytest
import sentencepiece as spm
import shards
import tokenize_docs
from conftest import shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_refused

TOOL = Path(tokenize_docs.__file__)
UNUSUAL = [
    "", " ", "\n", " a\n\tb  ", "na\u00efve e\u0301 \U0001f600", "\u6f22\u5b57", "literal \u2581 marker", "<s></s>"
]


def make_documents(count: int, seed: int) -> list[str]:
    """English-like documents of a few hundred chars, with line breaks and digits."""
    rng = random.Random(shifted(seed))
    syllables = ["ka", "to", "mi", "ren", "sol", "the", "ing", "er", "a", "un", "pre", "st", "or", "ly"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800)]
    return [
        "".join(rng.choice(words) + rng.choice([" "] * 12 + [", ", ".\n", "\n\n", " 42 "]) for _ in range(80))
        for _ in range(count)
    ]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The program's main() with what it prints; with `options` of subprocess.run, as a user starts it."""
    if options:
        return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True,
                              timeout=300, **options)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        status = tokenize_docs.main(list(map(str, arguments)))
    return subprocess.CompletedProcess([], status, out.getvalue(), error.getvalue())


def train_model(**options) -> bytes:
    """A small SentencePiece model made without the tool."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False}
    sentences = options.pop("sentences", make_documents(50, 9))
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, **settings, **options
    )
    return model.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[str], list[str]]:
    """Folder with train.jsonl and val.jsonl, and their texts; train is several batches long."""
    folder = tmp_path_factory.mktemp("corpus")
    train, val = make_documents(5_000, 1) + UNUSUAL, make_documents(60, 2) + [text + "!" for text in UNUSUAL[1:]]
    (folder / "train.jsonl").write_bytes(jsonl(train))
    (folder / "val.jsonl").write_bytes(jsonl(val))
    assert len(train) > 2 * tokenize_docs.BATCH_LINES
    return folder, train, val


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    """Output folder of one run that trains a tokenizer and cuts small shards."""
    folder, out = corpus[0], tmp_path_factory.mktemp("built")
    done = run("--train", folder / "train.jsonl", "--val", folder / "val.jsonl", "--out", out, "--vocab-size", 600,
               "--shard-tokens", 100_000, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


@pytest.fixture(scope="module")
def model(built) -> Path:
    return built / "tokenizers" / "local_600_bpe.model"


# ----- shards


def test_shard_bytes(tmp_path):
    path = tmp_path / "a.bin"
    shards.write_shard(path, np.array([1, 2, 65535], np.uint16))
    assert path.read_bytes() == struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 2, 65535)
    assert os.listdir(tmp_path) == ["a.bin"]
    tokens = shards.read_shard(path, vocab_size=65536)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, 2, 65535]
    shards.write_shard(path, np.zeros(0, np.uint16))
    assert shards.read_shard(path).shape == (0,)


def test_pairs_stand_in_the_header(tmp_path):
    """And nowhere else; without pairs the header is that of all other programs."""
    paths, pairs = [tmp_path / "a.bin", tmp_path / "b.bin"], [(195, 300, 4), (196, 301, 5)]
    for path in paths:
        shards.write_shard(path, np.array([7, 8], np.uint16), pairs)
    header = struct.pack("<256i", 20240520, 1, 2, 20261126, 2, 195, 300, 4, 196, 301, 5, *[0] * 245)
    assert paths[0].read_bytes() == header + struct.pack("<2H", 7, 8)
    assert shards.read_shard(paths[0]).tolist() == [7, 8]
    assert shards.read_pairs(paths) == shards.read_pairs(paths[:1]) == pairs
    assert shards.read_pairs([]) == []
    shards.write_shard(paths[1], np.array([7, 8], np.uint16), pairs[::-1])
    with pytest.raises(ValueError, match="b.bin: lists other pairs of tokens than .*a.bin"):
        shards.read_pairs(paths)
    shards.write_shard(paths[1], np.array([7, 8], np.uint16), [])
    assert paths[1].read_bytes() == struct.pack("<256i", 20240520, 1, 2, *[0] * 253) + struct.pack("<2H", 7, 8)
    assert shards.read_pairs(paths[1:]) == []
    with pytest.raises(ValueError, match="b.bin: lists other pairs"):
        shards.read_pairs(paths)
    paths[1].write_bytes(struct.pack("<3i", 20240520, 1, 0))  # cut off: read_shard() refuses it
    assert shards.read_pairs(paths[1:]) == []
    for count in (-1, 84):
        paths[1].write_bytes(struct.pack("<256i", 20240520, 1, 0, 20261126, count, *[0] * 251))
        with pytest.raises(ValueError, match=f"b.bin: its header lists {count} pairs of tokens, expected at most 83"):
            shards.read_pairs(paths[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header of 1024 bytes, found a file of 0"),
        (struct.pack("<256i", 20240521, 1, *[0] * 254), "expected magic 20240520, found 20240521"),
        (struct.pack("<256i", 20240520, 2, *[0] * 254), "expected version 1, found 2"),
        (struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + bytes(4), "expected 1030 bytes for 3 tokens, found 1028"),
        (struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + bytes(4), "expected 1026 bytes for 1 tokens, found 1028"),
        (struct.pack("<256i", 20240520, 1, -1, *[0] * 253), "for -1 tokens"),
        (struct.pack("<256i2H", 20240520, 1, 2, *[0] * 253, 5, 700), "expected tokens below 600, found 700"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, content, message):
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.bin: ") as caught:
        shards.read_shard(path, vocab_size=600)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["train_000000 (1)", "train_000000_old", "train_1", "train_0000001", "val_copy",
                                  "train_00000\u0661", ""])
def test_a_file_that_only_looks_like_a_shard_is_refused(tmp_path, name):
    for each in ("train_000000", "train_000001", "val_000000", "val_bytes_000000"):
        shards.write_shard(tmp_path / f"fineweb_{each}.bin", np.ones(3, np.uint16))
    for split, count in (("train", 2), ("val", 1), ("val_bytes", 1)):
        assert shards.find_shards(tmp_path, split) == [tmp_path / each for each in shards.shard_names(split, count)]
    (tmp_path / "Copy of fineweb_train_000000.bin").write_bytes(b"")  # no tool reads these three
    (tmp_path / "fineweb_train_000000.bin.bak").write_bytes(b"")
    (tmp_path / "fineweb_test_000000.bin").write_bytes(b"")
    assert len(shards.find_shards(tmp_path, "train")) == 2
    (tmp_path / f"fineweb_{name}.bin").write_bytes((tmp_path / "fineweb_train_000000.bin").read_bytes())
    with pytest.raises(ValueError, match=re.escape(f"fineweb_{name}.bin: not the name of a shard")):
        shards.find_shards(tmp_path, "train")


@pytest.mark.parametrize(("numbers", "missing"), [((1,), 0), ((0, 2), 1), ((0, 1, 2, 4, 5), 3)])
def test_a_gap_in_the_shards_is_refused(tmp_path, numbers, missing):
    for number in numbers:
        shards.write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", np.ones(3, np.uint16))
    assert shards.find_shards(tmp_path, "train") == []
    with pytest.raises(ValueError, match=f"fineweb_val_00000{missing}.bin: no such file, but fineweb_val_"):
        shards.find_shards(tmp_path, "val")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_manifest_saved_with_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "manifest.json").write_text(json.dumps({"datasets": [{"name": "caf\u00e9"}]}), encoding=encoding)
    assert shards.find_entry(shards.read_manifest(tmp_path / "manifest.json"), "datasets", "caf\u00e9")


def test_other_arrays_and_failed_writes_leave_nothing(tmp_path):
    for array in (np.zeros(3, np.int64), np.zeros((2, 2), np.uint16)):
        with pytest.raises(ValueError, match="expected a 1-D uint16 array"):
            shards.write_shard(tmp_path / "a.bin", array)
    with pytest.raises(RuntimeError), shards.atomic_write(tmp_path / "b.bin") as file:
        file.write(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


# ----- the published layout


def test_stream_is_bos_and_tokens_of_every_document(corpus, built, model):
    _, train, val = corpus
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    ids = [tokenizer.piece_to_id(piece) for piece in ("<pad>", "<s>", "</s>", "<unk>")]
    assert ids == [0, 1, 2, 3]
    for split, documents in (("train", train), ("val", val)):
        expected = [token for text in documents if text for token in (1, *tokenizer.encode(text))]
        files = sorted((built / "datasets" / "local_sp600").glob(f"fineweb_{split}_*.bin"))
        parts = [shards.read_shard(path, vocab_size=600) for path in files]
        assert [path.name for path in files] == [f"fineweb_{split}_{i:06d}.bin" for i in range(len(files))]
        assert all(len(part) == 100_000 for part in parts[:-1])
        assert 0 < len(parts[-1]) <= 100_000
        assert np.concatenate(parts).tolist() == expected
    assert len(list((built / "datasets" / "local_sp600").glob("fineweb_train_*.bin"))) > 3


def test_manifest(corpus, built, model):
    _, train, val = corpus
    manifest = json.loads((built / "manifest.json").read_bytes())
    (dataset,), (tokenizer,) = manifest["datasets"], manifest["tokenizers"]
    assert dataset["name"] == "local_sp600"
    assert dataset["tokenizer_name"] == tokenizer["name"] == "local_600_bpe"
    assert tokenizer["vocab_size"] == 600
    assert built / tokenizer["model_path"] == model
    assert len((built / tokenizer["vocab_path"]).read_text("utf-8").split("\n")) == 601
    numbers = dataset["stats"]
    for split, texts in (("train", train), ("val", val)):
        files = sorted((built / "datasets" / "local_sp600").glob(f"fineweb_{split}_*.bin"))
        assert numbers[f"files_{split}"] == len(files)
        assert numbers[f"tokens_{split}"] == sum(path.stat().st_size - 1024 for path in files) // 2
        assert numbers[f"docs_{split}"] == sum(text != "" for text in texts)
        assert numbers[f"docs_empty_{split}"] == texts.count("")
        assert numbers[f"docs_lossy_{split}"] == 1
        assert numbers[f"bytes_{split}"] == sum(len(text.replace("\u2581", " ").encode()) for text in texts)
        listed = [entry for entry in dataset["shard_files"] if split in entry["name"]]
        assert [entry["sha256"] for entry in listed] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]
        assert sum(entry["tokens"] for entry in listed) == numbers[f"tokens_{split}"]


def scorer_bytes(tokenizer: spm.SentencePieceProcessor, ids: list[int]) -> int:
    """The rule of the challenge, token by token; `ids` begins with a boundary."""
    total = 0
    for before, token in zip(ids, ids[1:], strict=False):
        piece = tokenizer.id_to_piece(token)
        if tokenizer.is_byte(token):
            total += 1
        elif piece.startswith("\u2581"):
            boundary = tokenizer.is_control(before) or tokenizer.is_unknown(before) or tokenizer.is_unused(before)
            total += len(piece[1:].encode()) + (not boundary)
        else:
            total += len(piece.encode())
    return total


@pytest.fixture(scope="module")
def encoder(model) -> tokenize_docs.Encoder:
    return tokenize_docs.Encoder(model.read_bytes(), "model")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=st.text(max_size=60) | st.text(alphabet=" \t\n\r\x00a\u2581<s>/0x\u0301\ufffd", max_size=30))
def test_bytes_are_exact_for_any_text(encoder, text):
    tokens, charges, numbers = encoder([("file:1", text)], "val")
    tokenizer, plain = encoder.tokenizer, text.replace("\u2581", " ")
    assert len(charges) == 0
    if text == "":
        assert (numbers, len(tokens)) == ({"docs_empty": 1}, 0)
        return
    ids = tokens.tolist()
    assert ids[0] == tokenizer.bos_id()
    assert tokenizer.decode(ids[1:]) == plain
    assert numbers["bytes"] == len(plain.encode()) == scorer_bytes(tokenizer, ids)
    assert (numbers["docs"], numbers["docs_lossy"]) == (1, plain != text)


def test_pieces_hold_a_space_only_in_front(encoder):
    pieces = [encoder.tokenizer.id_to_piece(token) for token in range(600)]
    assert "\u2581" in pieces
    assert not [piece for piece in pieces if "\u2581" in piece[1:]]
    assert any("\n" in piece for piece in pieces)


# ----- the same output in other ways


def test_output_does_not_depend_on_workers_or_compression(corpus, built, tmp_path):
    folder, train, val = corpus
    half = len(train) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(train[:half]), 1))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(jsonl(train[half:]), preset=0))
    done = run("--train", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.xz", "--val", folder / "val.jsonl", "--out",
               tmp_path / "out", "--vocab-size", 600, "--shard-tokens", 100_000, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(built)


def test_existing_tokenizer_and_merged_manifest(corpus, model, tmp_path):
    folder, out = corpus[0], tmp_path / "out"
    common = ("--val", folder / "val.jsonl", "--out", out, "--tokenizer", model, "--workers", 1)
    (tmp_path / "small.jsonl").write_bytes(jsonl(make_documents(20, 3)))
    for name, arguments in (
        ("one", ("--train", folder / "train.jsonl", "--shard-tokens", 200_000)),
        ("two", ("--train", tmp_path / "small.jsonl")),
        ("one", ("--train", tmp_path / "small.jsonl")),
    ):
        done = run(*arguments, *common, "--name", name)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert [entry["name"] for entry in manifest["datasets"]] == ["one", "two"]
    assert [entry["name"] for entry in manifest["tokenizers"]] == ["local_600_bpe"]
    assert manifest["datasets"][0]["stats"]["docs_train"] == 20
    assert (out / "tokenizers" / "local_600_bpe.model").read_bytes() == model.read_bytes()
    # No shard of the larger first run is left.
    assert sorted(os.listdir(out / "datasets" / "one")) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    assert sorted(os.listdir(out / "datasets")) == ["one", "two"]

    other = tmp_path / "other" / "local_600_bpe.model"
    other.parent.mkdir()
    other.write_bytes(train_model())
    before = tree(out)
    done = run("--train", tmp_path / "small.jsonl", *common[:4], "--tokenizer", other, "--name", "three")
    assert_refused(done, "another tokenizer of this name belongs to one, two")
    assert tree(out) == before


def test_training_is_deterministic_and_sample_is_bounded(corpus):
    folder, train, _ = corpus
    sources = [tokenize_docs.Source(folder / "val.jsonl", sys.maxsize), tokenize_docs.Source(folder / "train.jsonl", 0)]
    sample = tokenize_docs.sample_texts(sources, 100_000)
    assert 90_000 < sum(len(text.encode()) for text in sample) <= 100_000
    assert set(sample) <= set(train)
    assert tokenize_docs.train_tokenizer(sample, 512) == tokenize_docs.train_tokenizer(sample, 512)


# ----- refusals


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (jsonl(["fine"]) + b'{"text": \n', ("bad.jsonl:2: not valid JSON",)),
        (jsonl(["fine", "fine too"]) + b"\n", ("bad.jsonl:3: not valid JSON",)),
        (b'{"title": "no text"}\n', ('bad.jsonl:1: expected an object with a "text" string',)),
        (b'{"text": 5}\n', ("bad.jsonl:1: expected",)),
        (b'["text"]\n', ("bad.jsonl:1: expected",)),
        (b'{"text": "\xff"}\n', ("bad.jsonl:1: not valid JSON",)),
        (b'{"text": "\\ud800"}\n', ("bad.jsonl:1: not valid Unicode",)),
        (jsonl([""]), ("no document with text for train",)),
        (b"", ("no document with text for train",)),
    ],
)
def test_bad_documents(corpus, model, tmp_path, capsys, content, parts):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    bad.write_bytes(content)
    status = tokenize_docs.main(
        ["--train", str(bad), "--val", str(corpus[0] / "val.jsonl"), "--out", str(out), "--tokenizer", str(model),
         "--workers", "1"]
    )
    error = capsys.readouterr().err
    assert_refused(subprocess.CompletedProcess([], status, "", error), *parts)
    assert tree(out) == {}


def test_bad_line_is_named_among_threads(corpus, model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes((corpus[0] / "train.jsonl").read_bytes() + b"{}\n")
    done = run("--train", bad, "--val", corpus[0] / "val.jsonl", "--out", tmp_path / "out", "--tokenizer", model,
               "--workers", 2)
    assert_refused(done, f"bad.jsonl:{len(corpus[1]) + 1}: expected an object")
    assert tree(tmp_path / "out") == {}


def test_overlap_is_refused(corpus, model, tmp_path):
    _, train, val = corpus
    (tmp_path / "train.jsonl").write_bytes(jsonl(train[:50] + val[:3]))
    done = run("--train", tmp_path / "train.jsonl", "--val", corpus[0] / "val.jsonl", "--out", tmp_path / "out",
               "--tokenizer", model, "--workers", 1)
    # The last of them is the 67th of validation; one holds nothing and counts for nothing.
    assert_refused(done, "3 of 67 validation documents also stand in training (numbers 1, 2, 3)")
    assert tree(tmp_path / "out") == {}


def test_unusable_tokenizers():
    without_bos = train_model(bos_id=-1)
    with pytest.raises(ValueError, match="name: expected a BOS piece"):
        shards.load_tokenizer(without_bos, "name")
    letters = ["".join(random.Random(shifted(i)).choices("abcdefgh", k=200)) for i in range(50)]
    without_space = train_model(sentences=letters, add_dummy_prefix=False)
    with pytest.raises(ValueError, match='name: expected a stand-alone "▁" piece'):
        shards.load_tokenizer(without_space, "name")
    with pytest.raises(ValueError, match="name: not a SentencePiece model"):
        shards.load_tokenizer(b"something else", "name")


def test_tokenizer_whose_bytes_are_not_exact_is_refused():
    # A piece such as "▁▁" is two bytes of text; the rule counts four.
    spaces = ["a    b     c   d  e " * 20] * 50
    model = train_model(
        sentences=spaces, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_by_whitespace=False,
    )
    encoder = tokenize_docs.Encoder(model, "spaces")
    with pytest.raises(ValueError, match="file:7: spaces counts 30 bytes for a document of 12"):
        encoder([("file:7", "a    b     c")], "train")


def test_command_line_refusals(corpus, model, tmp_path):
    folder = corpus[0]
    train, val = folder / "train.jsonl", folder / "val.jsonl"
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(jsonl(make_documents(500, 4)), preset=0)[:-100])
    (tmp_path / "file").write_text("")
    (tmp_path / "tiny.jsonl").write_bytes(jsonl(["a few words"]))
    out = ("--out", tmp_path / "out")
    use, new = ("--tokenizer", model), ("--vocab-size", 600)
    for arguments, parts in (
        (("--train", tmp_path / "absent.jsonl", "--val", val, *out, *use), ("absent.jsonl: No such file",)),
        (("--train", train, "--val", val, *out, "--tokenizer", "absent.model"), ("absent.model: No such file",)),
        (("--train", train, "--val", val, *out, "--tokenizer", val), ("not a SentencePiece model",)),
        (("--train", tmp_path, "--val", val, *out, *new), ("Is a directory",)),
        (("--train", tmp_path / "cut.jsonl.xz", "--val", val, *out, *new), ("cut.jsonl.xz: damaged",)),
        (("--train", tmp_path / "cut.jsonl.xz", "--val", val, *out, "--vocab-size", 70_000),
         ("261 to 65536, found 70000",)),  # before a document is read
        (("--train", train, "--val", val, *out, "--vocab-size", 264, "--caseops"), ("265 to 65536, found 264",)),
        (("--train", tmp_path / "tiny.jsonl", "--val", val, *out, *new), ("no tokenizer of 600 pieces",)),
        (("--train", train, "--val", val, "--out", tmp_path / "file" / "x", *use), ("Not a directory",)),
        (("--train", train, "--val", val, *out, *use, "--name", "../x"), ("--name: expected",)),
        (("--train", train, "--val", val, *out, *use, "--shard-tokens", 0), ("--shard-tokens: invalid number",)),
    ):
        assert_refused(run(*arguments, "--workers", 1), *parts)
    assert not (tmp_path / "out").exists() or tree(tmp_path / "out") == {}


def test_full_disk(corpus, model, tmp_path):
    resource = pytest.importorskip("resource")

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run("--train", corpus[0] / "train.jsonl", "--val", corpus[0] / "val.jsonl", "--out", tmp_path / "out",
               "--tokenizer", model, "--workers", 1, preexec_fn=limit_file_size)
    assert_refused(done, "File too large")
    out = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")]
    assert sorted(path for path in out if ".tokenize" not in path) == ["datasets"]


def test_few_documents_that_begin_alike_are_counted(model, tmp_path, capsys):
    """As records/audit.py does: the published documents have such pairs, so 0.5 % of validation may be known."""
    texts = make_documents(320, 5)
    head = " ".join(texts[:4])[:2000]
    (tmp_path / "val.jsonl").write_bytes(jsonl([*texts[20:], head + " another end"]))
    for copied in (0, 1):
        (tmp_path / "train.jsonl").write_bytes(jsonl([*texts[:20], *texts[300 : 300 + copied], head + " one end"]))
        status = tokenize_docs.main(["--train", str(tmp_path / "train.jsonl"), "--val", str(tmp_path / "val.jsonl"),
                                     "--out", str(tmp_path / str(copied)), "--tokenizer", str(model), "--workers", "1"])
        out, error = capsys.readouterr()
        if copied:
            done = subprocess.CompletedProcess([], status, out, error)
            assert_refused(done, "2 of 301 validation documents also stand in training (numbers 281, 301)")
            assert tree(tmp_path / "1") == {}
        else:
            assert status == 0
            assert "1 validation documents begin like a training document" in out
            manifest = json.loads((tmp_path / "0/manifest.json").read_bytes())
            assert manifest["datasets"][0]["stats"]["docs_val_overlapping"] == 1


def test_a_shard_that_cannot_be_read_again_is_one_line(corpus, model, tmp_path, monkeypatch, capsys):
    def find_overlap(val: np.ndarray, paths: list[str], *rest) -> np.ndarray:
        Path(paths[0]).write_bytes(Path(paths[0]).read_bytes()[:-2])
        return found(val, paths, *rest)

    found = tokenize_docs.find_overlap
    monkeypatch.setattr(tokenize_docs, "find_overlap", find_overlap)
    (tmp_path / "train.jsonl").write_bytes(jsonl(make_documents(20, 3)))
    status = tokenize_docs.main(["--train", str(tmp_path / "train.jsonl"), "--val", str(corpus[0] / "val.jsonl"),
                                 "--out", str(tmp_path / "out"), "--tokenizer", str(model), "--workers", "1"])
    done = subprocess.CompletedProcess([], status, "", capsys.readouterr().err)
    assert_refused(done, "fineweb_train_000000.bin: expected", "bytes for")


@pytest.mark.parametrize("shard_tokens", [1, 2, 30, 63, 64, 65, 200, 10_000])
def test_overlap_is_found_whatever_the_shards(tmp_path, shard_tokens):
    """Against a comparison of the documents as lists, which are shorter and longer than what is compared."""
    rng = np.random.default_rng(shifted(shard_tokens))
    lengths = [0, 1, 1, 2, 30, 63, 64, 65, 66, 100, 130]
    train = [[1, *rng.integers(2, 5, length)] for length in rng.permutation(lengths * 2)]
    val = [[1, *rng.integers(2, 5, length)] for length in lengths]
    val += [train[3], train[-1], [*train[5], 2], [*train[7][:65], 9, 9], [*train[8], 9]]
    stream = np.concatenate(train).astype(np.uint16)
    for index in range(0, len(stream), shard_tokens):
        shards.write_shard(tmp_path / f"fineweb_train_{index // shard_tokens:06d}.bin",
                           stream[index : index + shard_tokens])
    known = [document[:65] for document in train]
    paths = shards.find_shards(tmp_path, "train")
    found = overlap.find_overlap(np.concatenate(val).astype(np.uint16), paths, range(len(paths)), 1)
    assert found.tolist() == [document[:65] in known and len(document) > 1 for document in val]


@pytest.mark.parametrize("shard_tokens", [1, 30, 64])
def test_overlap_is_refused_in_small_shards(model, tmp_path, capsys, shard_tokens):
    (tmp_path / "docs.jsonl").write_bytes(jsonl([text[:100] for text in make_documents(3, 7)]))
    arguments = ["--train", "--val", "--out", "--tokenizer"]
    values = [tmp_path / "docs.jsonl", tmp_path / "docs.jsonl", tmp_path / "out", model]
    status = tokenize_docs.main([str(each) for pair in zip(arguments, values) for each in pair]
                                + ["--workers", "1", "--shard-tokens", str(shard_tokens)])
    done = subprocess.CompletedProcess([], status, "", capsys.readouterr().err)
    assert_refused(done, "3 of 3 validation documents also stand in training (numbers 1, 2, 3)")
    assert tree(tmp_path / "out") == {}


# ----- the published documents


def publish(folder: Path, texts: list[str], **claims: object) -> Path:
    """docs_selected.jsonl with its source manifest, which says also, or instead, what `claims` does."""
    docs = folder / "docs_selected.jsonl"
    docs.write_bytes(jsonl(texts))
    claims = {"docs_sha256": hashlib.sha256(docs.read_bytes()).hexdigest(), "docs_val": 70} | claims
    (folder / "docs_selected.source_manifest.json").write_text(json.dumps(claims))
    return docs


def test_first_documents_are_validation(corpus, built, model, tmp_path, monkeypatch):
    """The same shards as from two files, wherever the border is in a batch; the hash is that of the file."""
    _, train, val = corpus
    docs = publish(tmp_path, val + train, docs_val=len(val))
    for batch_lines in (500, 7):
        monkeypatch.setattr(tokenize_docs, "BATCH_LINES", batch_lines)
        out = tmp_path / str(batch_lines)
        assert tokenize_docs.main(["--docs", str(docs), "--val-docs", str(len(val)), "--out", str(out), "--tokenizer",
                                   str(model), "--shard-tokens", "100000", "--workers", "1"]) == 0
        made, known = tree(out), tree(built)
        manifest, expected = json.loads(made.pop("manifest.json")), json.loads(known.pop("manifest.json"))
        assert made == known
        assert manifest["datasets"][0].pop("docs_sha256") == hashlib.sha256(docs.read_bytes()).hexdigest()
        assert manifest == expected


def test_default_split_is_that_of_the_challenge(tmp_path):
    """Each document is its own number: 50,000 of validation, the next one is the first of training."""
    docs = tmp_path / "docs.jsonl.gz"
    docs.write_bytes(gzip.compress(jsonl([f"{number:06d}" for number in range(50_100)])))
    (tmp_path / "digits.model").write_bytes(train_model(sentences=["0 1 2 3 4 5 6 7 8 9 10"] * 20, split_digits=True))
    done = run("--docs", docs, "--out", tmp_path / "out", "--tokenizer", tmp_path / "digits.model", "--name", "numbers")
    assert done.returncode == 0, done.stderr
    tokenizer = spm.SentencePieceProcessor(model_file=str(tmp_path / "digits.model"))
    for split, expected in (("val", range(50_000)), ("train", range(50_000, 50_100))):
        tokens = shards.read_shard(tmp_path / f"out/datasets/numbers/fineweb_{split}_000000.bin").astype(int)
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id()))[1:]
        assert [tokenizer.decode(document[1:].tolist()) for document in documents] == [f"{n:06d}" for n in expected]
    digest = json.loads((tmp_path / "out/manifest.json").read_bytes())["datasets"][0]["docs_sha256"]
    assert digest == hashlib.sha256(gzip.decompress(docs.read_bytes())).hexdigest()


@pytest.mark.parametrize(
    ("claims", "arguments", "parts"),
    [
        ({"docs_sha256": "0" * 64}, ("--val-docs", 70), ("expected SHA-256 000", "docs_selected.jsonl")),
        ({}, ("--val-docs", 69), ("--val-docs: expected at least 70", "found 69")),
        ({"docs_val": "many"}, ("--val-docs", 69), ("docs_selected.source_manifest.json: not a source manifest",)),
        ({}, ("--val-docs", 0), ("--val-docs: invalid number (at least 1)",)),
        ({}, ("--val-docs", 3_000), ("no document with text for train",)),
        ({}, (), ("no document with text for train",)),  # 50,000
        ({}, ("--val-docs", 100, "--train", "x.jsonl"), ("expected either --docs, or both --train and --val",)),
    ],
)
def test_refused_documents(model, tmp_path, capsys, claims, arguments, parts):
    docs = publish(tmp_path, make_documents(200, 8), **claims)
    status = tokenize_docs.main(["--docs", str(docs), *map(str, arguments), "--out", str(tmp_path / "out"), "--workers",
                                 "1", "--tokenizer", str(model)])
    assert_refused(subprocess.CompletedProcess([], status, "", capsys.readouterr().err), *parts)
    assert not (tmp_path / "out").exists() or tree(tmp_path / "out") == {}


@pytest.mark.parametrize(("name", "manifest", "refused"), [
    ("docs_selected.jsonl", None, True),
    ("docs_selected_10k.jsonl.gz", None, True),
    ("docs_selected.jsonl", {}, True),  # says nothing of validation
    ("docs_selected.jsonl", {"docs_val": 70}, False),
    ("documents.jsonl", None, False),
])
def test_fewer_validation_documents_of_the_published_ones(tmp_path, name, manifest, refused):
    """As in issue 2127 of the challenge: 10,000 for validation, 40,000 scored documents in the training shards."""
    docs = tmp_path / name
    docs.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    if manifest is not None:
        (tmp_path / "docs_selected.source_manifest.json").write_text(json.dumps(manifest))
    if refused:
        with pytest.raises(ValueError, match="^--val-docs: expected at least 50000, .* found 10000$"):
            tokenize_docs.check_documents(docs, 10_000)
    else:
        tokenize_docs.check_documents(docs, 10_000)
    tokenize_docs.check_documents(docs, 50_000)


# ----- several tokenizers


@pytest.fixture(scope="module")
def several(model, tmp_path_factory) -> tuple[Path, list[str]]:
    """Folder with documents and tokenizers.json; and a command line that makes three data sets of them."""
    folder = tmp_path_factory.mktemp("several")
    docs = publish(folder, make_documents(400, 6) + UNUSUAL)
    (folder / "one.model").write_bytes(model.read_bytes())
    specs = [{"name": "a_sp300", "vocab_size": 300}, {"model": "one.model"},
             {"name": "c_sp400", "vocab_size": 400, "caseops": True}]
    (folder / "tokenizers.json").write_text(json.dumps(specs))
    return folder, ["--docs", str(docs), "--val-docs", "70", "--specs", str(folder / "tokenizers.json"),
                    "--shard-tokens", "20000", "--tokenizer-sample-mb", "0.05"]


def small_batches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokenize_docs, "BATCH_LINES", 10)


@pytest.fixture(scope="module")
def several_built(several, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("several_built")
    assert tokenize_docs.main([*several[1], "--out", str(out), "--workers", "1"]) == 0
    return out


def test_several_tokenizers_in_one_pass(several, several_built, tmp_path, monkeypatch):
    """As if made one by one."""
    folder, arguments = several
    at = arguments.index("--specs")
    rest = arguments[:at] + arguments[at + 2 :]
    for choice in (("--vocab-size", "300", "--name", "a_sp300"), ("--tokenizer", str(folder / "one.model")),
                   ("--vocab-size", "400", "--name", "c_sp400_caseops", "--caseops")):
        assert tokenize_docs.main([*rest, *choice, "--out", str(tmp_path / "single"), "--workers", "1"]) == 0
    assert tree(tmp_path / "single") == tree(several_built)
    manifest = json.loads((several_built / "manifest.json").read_bytes())
    assert [entry["name"] for entry in manifest["datasets"]] == ["a_sp300", "local_sp600", "c_sp400_caseops"]
    assert [entry["name"] for entry in manifest["tokenizers"]] == ["a_300_bpe", "one", "c_400_bpe_caseops"]


@pytest.mark.parametrize(
    ("specs", "parts"),
    [
        ("{", ("tokenizers.json: not valid JSON",)),
        ([], ("expected a list of objects",)),
        ({"name": "x"}, ("expected a list of objects",)),
        ([{"name": "x"}], ('item 1: expected an object with "vocab_size", a number, or "model", a file',)),
        (["x"], ("item 1: expected an object", "found x")),
        ([{"vocab_size": 300}, {"vocab_size": 300, "model": "x"}], ("item 2: expected an object",)),
        ([{"vocab_size": "300"}], ("item 1: expected an object", "'300'")),
        ([{"vocab_size": 300, "vocab": 1}], ("item 1: expected an object", "'vocab': 1")),
        ([{"vocab_size": 300, "caseops": 1}], ("item 1: expected an object", "'caseops': 1")),
        ([{"model": "absent.model"}], ("absent.model: No such file",)),
        ([{"vocab_size": 300, "caseops": True, "fuse_markers": 1}], ("item 1: expected an object",)),
        ([{"vocab_size": 300, "fuse_markers": True}], ("--fuse-markers: expected together with --caseops",)),
        ([{"vocab_size": 300, "name": "../x"}], ("--name: expected",)),
        ([{"vocab_size": 300}, {"vocab_size": 300}], ("local_sp300: two data sets of this name",)),
        ([{"vocab_size": 300, "name": "taken"}], ("taken: downloaded by data/cached_challenge_fineweb.py",)),
    ],
)
def test_refused_specs(corpus, tmp_path, capsys, specs, parts):
    (tmp_path / "tokenizers.json").write_text(specs if isinstance(specs, str) else json.dumps(specs))
    (tmp_path / "out").mkdir()
    manifest = b'{"datasets": [{"name": "taken", "repo": "some/where"}], "tokenizers": []}'
    (tmp_path / "out/manifest.json").write_bytes(manifest)
    status = tokenize_docs.main(["--docs", str(corpus[0] / "train.jsonl"), "--specs", str(tmp_path / "tokenizers.json"),
                                 "--out", str(tmp_path / "out")])
    assert_refused(subprocess.CompletedProcess([], status, "", capsys.readouterr().err), *parts)
    assert tree(tmp_path / "out") == {"manifest.json": manifest}


# ----- CaseOps


CASED = ["The NASA probe, McDonald's iPhone; I DON'T.", "\u00c9COLE na\u00efve \u0130 \U0001f600\n\nA\tB",
         "\ue001The \ue004\ue004 markers of the RAW text\ue002", "x", "  Two  spaces "]


def test_caseops(corpus, tmp_path):
    """Restored text is the raw text, "\u2581" apart; the tokens of every document are charged its bytes, BOS none."""
    train = corpus[1][:600] + [text.title() for text in corpus[1][:100]]
    val = CASED + ["A literal\u2581MARKER\u2581"] + [text.upper() for text in corpus[2]]
    (tmp_path / "train.jsonl").write_bytes(jsonl(train))
    (tmp_path / "val.jsonl").write_bytes(jsonl(val))
    done = run("--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path, "--vocab-size",
               420, "--caseops", "--shard-tokens", 3_000, "--workers", 1)
    assert done.returncode == 0, done.stderr
    folder, model = tmp_path / "datasets/local_sp420_caseops", tmp_path / "tokenizers/local_420_bpe_caseops.model"
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    assert len({tokenizer.piece_to_id(marker) for marker in caseops.MARKERS} - {tokenizer.unk_id()}) == 4
    pieces = [tokenizer.id_to_piece(token) for token in range(420)]
    assert not [piece for piece in pieces if len(piece) > 1 and set(piece) & set(caseops.MARKERS)]

    parts = {split: [shards.read_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_0*.bin"))]
             for split in ("train", "val", "val_bytes")}
    assert len(parts["val"]) > 3
    assert [len(part) for part in parts["val_bytes"]] == [len(part) for part in parts["val"]]
    starts = {}
    for split, texts in (("train", train), ("val", val)):
        tokens = np.concatenate(parts[split]).astype(int)
        starts[split] = np.flatnonzero(tokens == tokenizer.bos_id())
        documents = np.split(tokens, starts[split])[1:]
        decoded = [tokenizer.decode(document[1:].tolist()) for document in documents]
        restored = [caseops.restore(text, strict=False) for text in decoded]
        assert restored == [text.replace("\u2581", " ") for text in texts if text]
    charges = np.concatenate(parts["val_bytes"]).astype(int)
    assert (charges[starts["val"]] == 0).all()
    assert np.add.reduceat(charges, starts["val"]).tolist() == [len(text.replace("\u2581", " ").encode())
                                                                    for text in val]

    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    entry, = manifest["datasets"]
    assert (entry["name"], entry["caseops"]) == ("local_sp420_caseops", True)
    assert manifest["tokenizers"][0]["name"] == entry["tokenizer_name"] == "local_420_bpe_caseops"
    assert entry["stats"]["bytes_val"] == charges.sum()
    assert entry["stats"]["docs_lossy_val"] == sum("\u2581" in text for text in val)
    assert sorted(shard["name"] for shard in entry["shard_files"]) == sorted(path.name for path in folder.iterdir())
    cached_challenge_fineweb.check_set(folder, entry, model, 420)  # as the downloader checks such a set
    entry["stats"]["bytes_val"] += 1
    with pytest.raises(ValueError, match="the manifest says bytes_val"):
        cached_challenge_fineweb.check_set(folder, entry, model, 420)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc", "nfkc_cf"])
def test_caseops_charges_what_the_tokens_give_back(rule):
    """As the audit of a run compares: the text restored from the tokens, whatever became of the raw one."""
    keeps = rule == "identity"
    model = train_model(normalization_rule_name=rule, remove_extra_whitespaces=not keeps,
                        user_defined_symbols=list(caseops.MARKERS))
    encoder = tokenize_docs.Encoder(model, "model", True)
    for text in [*CASED, *UNUSUAL, "\u2581", "A\u2581B The\u2581\u2581X", "\ufb01 \uff21  \u212b\u2581"]:
        for split in ("train", "val"):
            tokens, charges, numbers = encoder([("file:1", text)], split)
            back = caseops.restore(encoder.tokenizer.decode(tokens.tolist()), strict=False)
            assert numbers["bytes"] == len(back.encode())
            assert numbers["docs_lossy"] == (numbers["docs"] and back != text)
            assert len(charges) == (len(tokens) if split == "val" else 0)
            if split == "val":
                assert int(charges.sum(dtype=int)) == numbers["bytes"]
        assert not keeps or back == text.replace("\u2581", " ")


def stream(folder: Path, split: str) -> tuple[list[int], list[tuple[int, ...]]]:
    """All tokens of a split, and what the header of each of its shards has behind the count."""
    tokens, rests = [], []
    for path in sorted(folder.glob(f"fineweb_{split}_0*.bin")):
        data = path.read_bytes()
        _, _, count, *rest = struct.unpack("<256i", data[:1024])
        rests.append(tuple(rest))
        tokens += struct.unpack(f"<{count}H", data[1024:])
    return tokens, rests


def test_fused_markers(corpus, tmp_path):
    """The same documents, tokenizer and bytes with and without; a fused token is charged what its two parts are."""
    train = corpus[1][:400] + [text.title() for text in corpus[1][:200]]
    val = CASED + ["A literal\u2581MARKER\u2581"] + [text.title() for text in corpus[2]]
    (tmp_path / "train.jsonl").write_bytes(jsonl(train))
    (tmp_path / "val.jsonl").write_bytes(jsonl(val))
    both = [{"vocab_size": 420, "caseops": True}, {"vocab_size": 420, "caseops": True, "fuse_markers": True}]
    (tmp_path / "specs.json").write_text(json.dumps(both))
    done = run("--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path, "--specs",
               tmp_path / "specs.json", "--shard-tokens", 3_000, "--workers", 1)
    assert done.returncode == 0 and done.stdout.count("training local") == 1, done.stderr
    plain, fused = (tmp_path / f"datasets/local_sp420_caseops{end}" for end in ("", "_fused"))
    model = tmp_path / "tokenizers/local_420_bpe_caseops.model"
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    headers, places = set(), {}
    for split in ("train", "val", "val_bytes"):
        expected, nothing = stream(plain, split)
        tokens, rests = stream(fused, split)
        assert not any(map(any, nothing)) and len(rests) > 1
        if split == "val_bytes":  # of each token, and of the parts of each
            assert not any(map(any, rests))
            assert tokens == [sum(expected[a:b]) for a, b in zip(places["val"], [*places["val"][1:], None])]
            continue
        headers |= set(rests)
        mark, count, *rest = rests[0]
        pairs = {rest[3 * i]: rest[3 * i + 1 : 3 * i + 3] for i in range(count)}
        assert mark == 20261126 and not any(rest[3 * count :])
        parts = [pairs.get(token, [token]) for token in tokens]
        assert [token for part in parts for token in part] == expected
        places[split] = np.cumsum([0, *map(len, parts)])[:-1].tolist()
        assert len(tokens) < 0.99 * len(expected) and len(set(tokens) & set(pairs)) > 3
    assert len(headers) == 1 and count == 13
    assert {tokenizer.id_to_piece(token) for token in pairs} == {f"<0x{b:02X}>" for b in (
        0xC0, 0xC1, *range(0xF5, 0x100))}
    assert {tokenizer.id_to_piece(marker) for _, marker in pairs.values()} <= set(caseops.MARKERS)

    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    first, second = manifest["datasets"]
    assert second["name"] == "local_sp420_caseops_fused" and second["fuse_markers"] is True
    assert "fuse_markers" not in first and len(manifest["tokenizers"]) == 1
    same = ("bytes_val", "bytes_train", "docs_val", "docs_lossy_val", "docs_train")
    assert [first["stats"][name] for name in same] == [second["stats"][name] for name in same]
    cached_challenge_fineweb.check_set(fused, second, model, 420)  # as the downloader checks such a set

    again = run("--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path / "again",
                "--tokenizer", model, "--caseops", "--fuse-markers", "--shard-tokens", 3_000, "--workers", 2)
    assert again.returncode == 0, again.stderr
    assert tree(tmp_path / "again/datasets/local_sp420_caseops_fused") == tree(fused)


def test_markers_that_cannot_be_fused(corpus, model, tmp_path):
    common = ["--train", corpus[0] / "train.jsonl", "--val", corpus[0] / "val.jsonl", "--out", tmp_path]
    done = run(*common, "--vocab-size", 420, "--fuse-markers")
    assert_refused(done, "--fuse-markers: expected together with --caseops")
    done = run(*common, "--specs", tmp_path / "none.json", "--fuse-markers")
    assert_refused(done, "--name, --caseops, --fuse-markers: expected in the file of --specs")
    (tmp_path / "small.jsonl").write_bytes(jsonl(["no capital is in this"] * 200))
    done = run("--train", tmp_path / "small.jsonl", *common[2:], "--vocab-size", 290, "--caseops", "--fuse-markers",
               "--workers", 1)
    assert_refused(done, "no pair of a piece and a marker to fuse")
    assert not (tmp_path / "datasets").exists() or not list((tmp_path / "datasets").iterdir())


def test_tokenizer_without_markers_is_refused_for_caseops(corpus, model, tmp_path):
    done = run("--train", corpus[0] / "train.jsonl", "--val", corpus[0] / "val.jsonl", "--out", tmp_path, "--tokenizer",
               model, "--caseops", "--workers", 1)
    assert_refused(done, "local_600_bpe.model: expected the markers of CaseOps among its pieces")


# ----- interruptions


class Interruption:
    """Lets the program end at its `last` batch or renaming, before it or `after` it; 0 is never."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int, after: bool) -> None:
        self.count, self.last, self.after = 0, last, after
        patch.setattr(tokenize_docs.Dataset, "add", self.around(tokenize_docs.Dataset.add))
        patch.setattr(Path, "rename", self.around(Path.rename))
        patch.setattr(shards.os, "replace", self.around(shards.os.replace))

    def around(self, function):
        def interrupted(*arguments):
            self.count += 1
            if self.count == self.last and not self.after:
                raise KeyboardInterrupt
            result = function(*arguments)
            if self.count == self.last:
                raise KeyboardInterrupt
            return result

        return interrupted


def test_a_tokenizer_that_cannot_be_written_leaves_the_data_set_before(corpus, built, model, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.jsonl").write_bytes(jsonl(make_documents(60, 7)))
    (tmp_path / "tokenizers").rename(tmp_path / "away")
    (tmp_path / "tokenizers").touch()
    before = tree(tmp_path)
    for name in ("local_sp600", "new_sp600"):
        done = run("--train", tmp_path / "train.jsonl", "--val", corpus[0] / "val.jsonl", "--out", tmp_path, "--name",
                   name, "--tokenizer", model)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and "File exists" in done.stderr
        assert tree(tmp_path) == before


def test_a_manifest_that_cannot_be_written_leaves_shards_with_their_tokenizer(corpus, built, tmp_path, monkeypatch,
                                                                              capsys):
    """Shards of one tokenizer decode to nonsense by another of as many pieces, and nothing says so."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.jsonl").write_bytes(jsonl(make_documents(60, 7)))
    before = tree(tmp_path)
    monkeypatch.setattr(shards, "update_manifest", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert tokenize_docs.main(["--train", str(tmp_path / "train.jsonl"), "--val", str(corpus[0] / "val.jsonl"), "--out",
                               str(tmp_path), "--name", "local_sp600", "--vocab-size", "600", "--workers", "1"]) == 1
    assert capsys.readouterr().err == "error: No space left on device\n" and tree(tmp_path) == before


def test_an_interruption_anywhere_leaves_whole_data_sets(several, several_built, tmp_path, monkeypatch, capsys):
    """What has its place is what an undisturbed run makes, the manifest comes last, and the next run mends the rest."""
    small_batches(monkeypatch)
    command = [*several[1], "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        never = Interruption(patch, 0, False)
        assert tokenize_docs.main([*several[1], "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    made = tree(several_built)
    assert tree(tmp_path / "whole") == made
    assert never.count > 40
    points = [(1, False), (20, True), *((last, False) for last in range(never.count - 9, never.count + 1, 2))]
    for last, after in points:
        with pytest.MonkeyPatch.context() as patch:
            Interruption(patch, last, after)
            assert tokenize_docs.main(command) == 1
        assert capsys.readouterr().err == "error: interrupted\n"
        left = tree(tmp_path / "out")
        assert left.items() <= made.items() and "manifest.json" not in left
        assert not any(path.startswith("datasets/") for path in left)  # all of them or none
        assert not left  # and without it all goes back
    assert tokenize_docs.main(command) == 0
    assert tree(tmp_path / "out") == made


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_half_way(several, several_built, tmp_path, kind):
    slow = ("import sys, time; import tokenize_docs as t\n"
            "t.BATCH_LINES = 10\n"
            "from pathlib import Path\n"
            "def stop(*a, add=t.Dataset.add):\n"  # half way, for as long as the signal takes
            "    out = Path(sys.argv[sys.argv.index('--out') + 1])\n"
            "    while list(out.glob('datasets/.tokenize/c_sp400_caseops/fineweb_train_*.bin')):\n"
            "        time.sleep(0.01)\n"
            "    add(*a)\n"
            "t.Dataset.add = stop\n"
            "if __name__ == '__main__': sys.exit(t.main())")
    environment = os.environ | {"PYTHONPATH": str(TOOL.parent)}
    command = [sys.executable, "-c", slow, *several[1], "--out", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment,  # see Ctrl-C, as jobs in
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # the background do not
    try:
        until = time.monotonic() + 300  # guards against waiting for ever
        while not list(tmp_path.glob("datasets/.tokenize/c_sp400_caseops/fineweb_train_*.bin")):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(kind)
        error = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert [path.name for path in tmp_path.rglob("*") if ".tokenize" not in path.parts] == ["datasets"]
    if kind != signal.SIGKILL:
        assert process.returncode == 1
        assert error == "error: interrupted\n"
    assert (tmp_path / "datasets/.tokenize").exists() == (kind == signal.SIGKILL)
    if kind == signal.SIGKILL:
        assert tokenize_docs.main([*several[1], "--out", str(tmp_path), "--workers", "1"]) == 0
        assert tree(tmp_path) == tree(several_built)
