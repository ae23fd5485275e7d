"""Shards, the tokenizer's byte counts, the training windows and how they are dealt out."""

import dataclasses
import io
import json
import random
import struct

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import shifted
from helpers import FakeRuntime, bare
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs import MAGIC, shard_bytes

import train_gpt as tg

fuzz = hypothesis_settings(max_examples=120, deadline=None, derandomize=True)


def write_shard(folder, name: str, tokens, **changes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(shard_bytes(tokens, **changes))
    return str(folder / name)


# ----- shards


@pytest.mark.parametrize("tokens", [[], [0], [3, 0, 99, 7], list(range(100))])
def test_read_shard(tmp_path, tokens):
    read = tg.read_shard(write_shard(tmp_path, "s.bin", tokens), 100)
    assert read.dtype == np.uint16 and read.tolist() == tokens


def test_read_shard_of_large_ids(tmp_path):
    assert tg.read_shard(write_shard(tmp_path, "s.bin", [65535, 0]), 65536).tolist() == [65535, 0]


@pytest.mark.parametrize("data, told", [
    (b"", "0"), (b"short", "5"), (shard_bytes([])[:1023], "1023"),
    (shard_bytes([1, 2], magic=20240521), "20240521"), (shard_bytes([1, 2], version=2), "2"),
    (shard_bytes([1, 2], count=3), "1030"), (shard_bytes([1, 2], count=1), "1026"),
    (shard_bytes([1, 2], count=-1), "-1"),
    (shard_bytes([1, 2]) + b"\0", "1029"), (shard_bytes([1, 2])[:-1], "1027"),
    (shard_bytes([1, 2], count=2**31 - 1), str(2**31 - 1)), (shard_bytes([5, 40, 5]), "40"),
    (shard_bytes([5, 41, 5]), "41"),
])
def test_wrong_shards_are_refused_by_name(tmp_path, data, told):
    path = tmp_path / "fineweb_val_000007.bin"
    path.write_bytes(data)
    with pytest.raises(tg.RunError, match="fineweb_val_000007.bin: ") as caught:
        tg.read_shard(str(path), 40)
    assert told in str(caught.value).split("bin: ")[1]


@fuzz
@given(st.binary(max_size=64) | st.builds(
    lambda head, body: struct.pack("<3i", *head) + bytes(1012) + body,
    st.tuples(st.sampled_from([MAGIC, MAGIC, 0]), st.sampled_from([1, 1, 2]),
              st.integers(-3, 12) | st.integers(-2**31, 2**31 - 1)),
    st.binary(max_size=24)))
def test_any_bytes_are_a_shard_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(data)
    try:
        tokens = tg.read_shard(str(path), 1000)
    except tg.RunError as e:
        assert "fuzz.bin" in str(e)
    else:
        assert data[:8] == struct.pack("<2i", MAGIC, 1)
        assert tokens.tobytes() == data[1024:] and all(t < 1000 for t in tokens)


def test_shards_come_in_order_and_by_split(tmp_path):
    numbers = [*range(11)]
    for name in ("fineweb_val_000000.bin", *(f"fineweb_train_{n:06}.bin" for n in reversed(numbers)),
                 "fineweb_val_bytes_000000.bin", "other.bin", "fineweb_val_000000.bin.tmp12",
                 "._fineweb_val_000000.bin"):
        write_shard(tmp_path, name, [1])
    cfg = tg.Settings(data_path=str(tmp_path))
    assert [p.split("/")[-1] for p in tg.shard_paths(cfg, "train")] == [f"fineweb_train_{n:06}.bin" for n in numbers]
    assert [p.split("/")[-1] for p in tg.shard_paths(cfg, "val")] == ["fineweb_val_000000.bin"]


@pytest.mark.parametrize("split", ["train", "val", "val_bytes"])
@pytest.mark.parametrize("name", ["fineweb_{}_000000 (1).bin", "fineweb_{}_000000_old.bin", "fineweb_{}_0.bin",
                                  "Copy of fineweb_{}_000000.bin", "fineweb_{}_0000001.bin", "Fineweb_{}_000001.BIN",
                                  "fineweb_{}_00000\N{FULLWIDTH DIGIT ONE}.bin"])
def test_a_copy_beside_the_shards_is_refused_by_name(tmp_path, name, split):
    write_shard(tmp_path, f"fineweb_{split}_000000.bin", [1])
    assert len(tg.find_shards(str(tmp_path), split)) == 1
    name = name.format(split)
    write_shard(tmp_path, name, [1])
    with pytest.raises(tg.RunError) as caught:
        tg.find_shards(str(tmp_path), split)
    assert str(caught.value).startswith(str(tmp_path / name))
    for other in {"train", "val", "val_bytes"} - {split}:
        assert tg.find_shards(str(tmp_path), other) == []


@pytest.mark.parametrize("numbers,missing", [((1,), 0), ((0, 2), 1), ((0, 1, 3, 4), 2), ((7, 8), 0)])
def test_a_missing_shard_is_named(tmp_path, numbers, missing):
    for number in numbers:
        write_shard(tmp_path, f"fineweb_train_{number:06}.bin", [1])
    with pytest.raises(tg.RunError, match=f"fineweb_train_{missing:06}.bin: missing"):
        tg.find_shards(str(tmp_path), "train")


def test_no_shards_is_refused(tmp_path):
    with pytest.raises(tg.RunError, match="tokenize_docs.py"):
        tg.shard_paths(tg.Settings(data_path=str(tmp_path)), "train")


# ----- the tokenizer's bytes

ALPHABET = "abcdefghilmnoprstuy .,é漢\n"
VARIANTS = {
    "project": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                "split_digits": True},
    "published": {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "no-prefix": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                  "add_dummy_prefix": False},
    "no-fallback": {"byte_fallback": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "neither": {"byte_fallback": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                "add_dummy_prefix": False},
    "unigram": {"byte_fallback": True, "model_type": "unigram", "user_defined_symbols": ["<x>", "▁▁", "y z"]},
    "whitespace-pieces": {"byte_fallback": True, "normalization_rule_name": "identity", "split_by_whitespace": False,
                          "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
}


def train_tokenizer(path, sentences=None, **options) -> str:
    rng, model = random.Random(shifted(0)), io.BytesIO()
    words = ["".join(rng.choices(ALPHABET[:17], k=rng.randint(1, 5))) for _ in range(60)] + ["é", "漢", ".", ","]
    if sentences is None:
        sentences = [ALPHABET] + [(" " * rng.randint(1, 3)).join(rng.choices(words, k=8)) for _ in range(120)]
    chosen = {"model_type": "bpe", "vocab_size": 340 if options.get("byte_fallback") else 90, "character_coverage": 1.0,
              "required_chars": ALPHABET.replace(" ", "▁"), "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, minloglevel=2,
                                             **chosen | options)
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, tuple]:
    """Processor and byte table of each variant."""
    made = {}
    for name, options in VARIANTS.items():
        path = train_tokenizer(tmp_path_factory.mktemp("sp") / f"{name}.model", **options)
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
        made[name] = sp, tg.read_tokenizer(path, sp.vocab_size())
    return made


@pytest.mark.parametrize("name", VARIANTS)
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_bytes_sum_to_each_decoded_document(tokenizers, name, data):
    sp, table = tokenizers[name]
    text = st.text(max_size=30) if VARIANTS[name]["byte_fallback"] else st.nothing()
    text |= st.text(ALPHABET, max_size=40) | st.text(" a\n", max_size=6)
    documents = [sp.encode(d) for d in data.draw(st.lists(text, min_size=1, max_size=4))]
    if not VARIANTS[name]["byte_fallback"]:
        documents = [[i for i in ids if not sp.is_unknown(i)] for ids in documents]
    stream = [i for ids in documents for i in [sp.bos_id(), *ids]]
    charged = table.of(torch.tensor(stream, dtype=torch.int32)).tolist()
    assert len(charged) == len(stream) and charged[0] == 0
    place = 0
    for ids in documents:
        assert charged[place] == 0
        expected = len(sp.decode(ids).encode()) if ids else 0
        assert sum(charged[place + 1 : place + 1 + len(ids)]) == expected, [sp.id_to_piece(i) for i in ids]
        place += 1 + len(ids)


def test_project_tokenizer_counts_the_raw_text(tokenizers):
    sp, table = tokenizers["project"]
    for text in ("plain text", " two  spaces ", "naïve 漢字 \U0001f600", "\n\n", "▁", "a▁b"):
        ids = [sp.bos_id(), *sp.encode(text)]
        assert int(table.of(torch.tensor(ids)).sum()) == len(text.replace("▁", " ").encode())


def test_bytes_of_single_tokens(tokenizers):
    sp, table = tokenizers["project"]
    bos, space, e, byte = (sp.piece_to_id(p) for p in ("<s>", "▁", "é", "<0xC3>"))
    stream = torch.tensor([bos, space, e, byte, space, space, bos, bos, e, sp.unk_id(), space])
    assert table.of(stream).tolist() == [0, 0, 2, 1, 1, 1, 0, 0, 2, 0, 0]
    assert table.bos == bos


def test_published_formula_token_by_token(tokenizers):
    """challenge.md, 'How val_bpb is computed', with a tokenizer that strips the opening space."""
    sp, table = tokenizers["project"]
    rng = random.Random(shifted(0))
    stream = [rng.randrange(sp.vocab_size()) for _ in range(2000)]

    def boundary(i):
        return sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)

    expected = [0]
    for before, i in zip(stream, stream[1:]):
        piece = sp.id_to_piece(i)
        if boundary(i):
            expected.append(0)
        elif sp.is_byte(i):
            expected.append(1)
        else:
            opens = piece.startswith("▁") and not boundary(before)
            expected.append(len(piece.removeprefix("▁").replace("▁", " ").encode()) + opens)
    assert table.of(torch.tensor(stream)).tolist() == expected


@pytest.mark.parametrize("name,mark", [("unigram", "<x>"), ("unigram", "y z"), ("project", "<s>"), ("project", "</s>"),
                                       ("neither", "</s>")])
def test_a_mark_of_documents_costs_nothing_whatever_its_kind(tokenizers, tmp_path, name, mark):
    """Documents between marks cost what they decode to, without the mark and the dummy space after it."""
    sp, _ = tokenizers[name]
    path = tmp_path / "t.model"
    path.write_bytes(sp.serialized_model_proto())
    bos = sp.piece_to_id(mark)
    table = tg.read_tokenizer(str(path), sp.vocab_size(), bos)
    documents = [[i for i in sp.encode(text) if i not in (bos, sp.unk_id())]
                 for text in ("a b", " two  spaces", "abc", "no")]
    stream = torch.tensor([i for ids in documents for i in [bos, *ids]])
    assert table.bos == bos
    assert int(table.of(stream).sum()) == sum(len(sp.decode(ids).encode()) for ids in documents)
    assert int(table.of(stream)[stream == bos].sum()) == 0


def test_a_piece_of_text_as_mark_of_documents_is_refused(tokenizers, tmp_path):
    sp, _ = tokenizers["unigram"]
    path = tmp_path / "t.model"
    path.write_bytes(sp.serialized_model_proto())
    words = [i for i in range(sp.vocab_size()) if len(sp.id_to_piece(i)) == 2 and sp.get_score(i) < 0]
    for bos in (sp.piece_to_id("<0x41>"), sp.piece_to_id("▁"), sp.piece_to_id("a"), *words[:3], sp.vocab_size()):
        with pytest.raises(tg.RunError, match=f"BOS_ID={bos}: takes a control or user-defined piece"):
            tg.read_tokenizer(str(path), sp.vocab_size(), bos)


def test_kinds_of_pieces(tokenizers):
    sp, _ = tokenizers["unigram"]
    assert {sp.id_to_piece(i) for i in range(sp.vocab_size()) if tg.is_user_defined(sp, i)} == {"<x>", "▁▁", "y z"}
    assert not any(tg.is_user_defined(tokenizers["project"][0], i) for i in range(100))


def test_a_tokenizer_that_adds_text_is_refused(tmp_path):
    """Spaces at the ends of pieces: every document would have a space more than its text."""
    path = train_tokenizer(tmp_path / "t.model", **VARIANTS["project"], treat_whitespace_as_suffix=True)
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    with pytest.raises(tg.RunError, match="t.model: spells .* not 16, so bytes would be miscounted"):
        tg.read_tokenizer(path, sp.vocab_size())


def test_tokenizer_without_a_space_piece_is_refused(tmp_path):
    path = train_tokenizer(tmp_path / "t.model", sentences=["abcab", "bca", "cab"] * 20, vocab_size=270,
                           byte_fallback=True, required_chars="", add_dummy_prefix=False)
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    assert len(sp.encode("a b")) == 5  # the space is three bytes
    with pytest.raises(tg.RunError, match="t.model.*▁"):
        tg.read_tokenizer(path, sp.vocab_size())


def test_tokenizer_of_another_size_is_refused(tokenizers, tmp_path):
    path = train_tokenizer(tmp_path / "t.model", **VARIANTS["project"])
    size = tokenizers["project"][0].vocab_size()
    for wrong in (size - 1, size + 1, 8192):
        with pytest.raises(tg.RunError, match=f"t.model.*{size}.*{wrong}"):
            tg.read_tokenizer(path, wrong)


def test_missing_or_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"no protobuf \xff\xff")
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("missing.model", "broken.model", "empty.model"):
        with pytest.raises(tg.RunError, match=name):
            tg.read_tokenizer(str(tmp_path / name), 40)


# ----- training windows

T = 6
SIZES = [50, 6, 7, 33, 1, 0, 13, 12]  # windows: 8, 0, 1, 5, 0, 0, 2, 1
COUNT = 17


@pytest.fixture
def data_path(tmp_path):
    """Shards in which every token is different."""
    place = 0
    for i, size in enumerate(SIZES):
        write_shard(tmp_path / "data", f"fineweb_train_{i:06}.bin", range(place, place + size))
        place += size
    return tmp_path / "data"


def config(data_path, **changes) -> tg.Settings:
    values = {"data_path": str(data_path), "vocab_size": 1000, "train_seq_len": T, "train_batch_tokens": 7 * T,
              "micro_batch_tokens": 2 * T, "eval_stride": 3, "seed": 5}
    return bare(**values | changes)


def expected_starts() -> list[int]:
    """First tokens of all windows of the epoch, by hand."""
    starts, place = [], 0
    for size in SIZES:
        starts += [place + T * w for w in range(size) if T * w + T < size]
        place += size
    return starts


def test_an_epoch_has_every_window_once(data_path):
    windows = tg.Windows(config(data_path), FakeRuntime())
    assert windows.count == COUNT == len(expected_starts())
    orders = []
    for epoch in range(3):
        rows = [windows.window(epoch * COUNT + i).tolist() for i in range(COUNT)]
        assert all(row == list(range(row[0], row[0] + T + 1)) for row in rows)
        orders.append([row[0] for row in rows])
        assert sorted(orders[-1]) == expected_starts()
    assert len({tuple(order) for order in [*orders, expected_starts()]}) == 4


def test_order_comes_from_the_seed_alone(data_path):
    def order(rt, **changes):
        windows = tg.Windows(config(data_path, **changes), rt)
        return [int(windows.window(g)[0]) for g in range(2 * COUNT)]

    first = order(FakeRuntime())
    assert order(FakeRuntime(2, 3)) == first
    assert order(FakeRuntime(), seed=6) != first


def test_windows_may_be_asked_in_any_order(data_path):
    forward, backward = (tg.Windows(config(data_path), FakeRuntime()) for _ in range(2))
    rows = [forward.window(g).tolist() for g in range(3 * COUNT)]
    assert [backward.window(g).tolist() for g in reversed(range(3 * COUNT))] == rows[::-1]


def test_batch_shifts_targets_and_pads(data_path):
    windows = tg.Windows(config(data_path), FakeRuntime())
    ids, targets, bounds = windows.batch(3, 2, 4)
    assert bounds is None
    assert ids.shape == targets.shape == (4, T) and ids.dtype == targets.dtype == torch.int64
    for row in range(2):
        window = windows.window(3 + row).tolist()
        assert ids[row].tolist() == window[:-1] and targets[row].tolist() == window[1:]
    assert (targets[2:] == tg.IGNORE).all()
    assert ((ids[2:] >= 0) & (ids[2:] < 1000)).all()


def test_a_token_beyond_the_vocabulary_is_refused(data_path):
    """Tokens are their own places, so the windows from a place on are the wrong ones."""
    starts = [int(tg.Windows(config(data_path), FakeRuntime()).window(g)[0]) for g in range(COUNT)]
    for limit in (64, 83, 104):
        windows, refused = tg.Windows(config(data_path, vocab_size=limit), FakeRuntime()), 0
        for g, start in enumerate(starts):
            if start + T < limit:
                assert windows.window(g).tolist() == list(range(start, start + T + 1))
                continue
            shard = 3 if start < 96 else 6 if start < 110 else 7
            for ask in (lambda: windows.window(g), lambda: windows.batch(g, 1, 1)):  # noqa: B023
                with pytest.raises(tg.RunError, match=f"fineweb_train_00000{shard}.bin: .*VOCAB_SIZE={limit}, found"):
                    ask()
            refused += 1
        assert 0 < refused == sum(start + T >= limit for start in starts) < COUNT


def test_too_short_shards_are_refused(tmp_path):
    write_shard(tmp_path, "fineweb_train_000000.bin", range(T))
    with pytest.raises(tg.RunError, match="TRAIN_SEQ_LEN"):
        tg.Windows(config(tmp_path), FakeRuntime())


def test_training_text_without_documents_is_refused_where_attention_ends_with_them(tmp_path):
    write_shard(tmp_path, "fineweb_train_000000.bin", range(2, 90))
    tg.Windows(config(tmp_path), FakeRuntime(), 1)
    with pytest.raises(tg.RunError, match="fineweb_train_000000.bin: token 1 .*does not occur .*BOS_ID takes the one"):
        tg.Windows(dataclasses.replace(config(tmp_path), varlen_enabled=True), FakeRuntime(), 1)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("windows, per_pass", [(7, 2), (1, 1), (12, 5), (8, 100), (30, 3)])
def test_ranks_share_out_each_step(data_path, world, windows, per_pass):
    cfg = config(data_path, train_batch_tokens=windows * T, micro_batch_tokens=per_pass * T + T - 1)
    plan = tg.StepPlan.of(cfg, world)
    assert plan.windows == windows
    dealt = []
    for rank in range(world):
        parts = plan.parts(rank)
        assert len(parts) == plan.micro  # every rank makes the same number of passes, of the same size
        assert all(0 <= real <= plan.size <= per_pass for _, real in parts)
        dealt += [first + i for first, real in parts for i in range(real)]
    assert dealt == list(range(windows))
    assert plan.micro * plan.size * world < windows + world * (1 + plan.micro)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_feeders_of_all_ranks_give_the_steps_in_order(data_path, world):
    cfg = config(data_path)
    reference, plan = tg.Windows(cfg, FakeRuntime()), tg.StepPlan.of(cfg, world)
    feeders = [tg.Feeder(tg.Windows(cfg, FakeRuntime(rank, world)), plan) for rank in range(world)]
    for step in range(6):
        rows, padding = [], 0
        for feeder in feeders:
            for ids, targets, _ in feeder.next():
                real = (targets != tg.IGNORE).all(1)
                padding += int((targets == tg.IGNORE).all(1).sum())
                assert ((targets == tg.IGNORE).all(1) | real).all()
                rows += [[*i, t[-1]] for i, t in zip(ids[real].tolist(), targets[real].tolist())]
        assert rows == [reference.window(step * 7 + i).tolist() for i in range(7)]
        assert padding == world * plan.micro * plan.size - 7
    for feeder in feeders:
        feeder.close()


# ----- validation text


def test_validation_is_all_shards_in_order(tmp_path, tokenizers):
    sp, table = tokenizers["project"]
    texts = ["a b c", "", "more text\nin lines", "漢"]
    stream = [i for text in texts for i in [sp.bos_id(), *sp.encode(text)]]
    for i in range(3):
        write_shard(tmp_path, f"fineweb_val_{i:06}.bin", stream[i * 5 : (i + 1) * 5 if i < 2 else None])
    val = tg.Validation.load(tg.Settings(data_path=str(tmp_path), vocab_size=sp.vocab_size()), table)
    assert val.tokens.tolist() == stream
    assert (val.docs, int(val.bytes.sum()), val.complete) == (4, len("".join(texts).encode()), None)


def test_validation_without_a_target_is_refused(tmp_path, tokenizers):
    write_shard(tmp_path, "fineweb_val_000000.bin", [1])
    with pytest.raises(tg.RunError, match="1 tokens"):
        tg.Validation.load(tg.Settings(data_path=str(tmp_path), vocab_size=400), tokenizers["project"][1])


FOUND = {"files_val": 1, "tokens_val": 500, "docs_val": 9}


def manifest(*datasets: dict) -> str:
    return json.dumps({"datasets": list(datasets)})


@pytest.mark.parametrize("text, expected", [
    (None, None),
    (manifest(), None),
    (manifest({"name": "other", "stats": FOUND}), None),
    (manifest({"name": "fineweb10B_sp9", "stats": {"files_train": 80}}), None),
    (manifest({"name": "fineweb10B_sp9", "stats": FOUND | {"files_train": 80}}), True),
    (manifest({"name": "fineweb10B_sp9", "stats": {"files_val": 1}}), True),
    (manifest({"name": "other", "stats": {}}, {"name": "fineweb10B_sp9", "stats": FOUND}), True),
    (manifest({"name": "fineweb10B_sp9", "stats": FOUND | {"tokens_val": 501}}), False),
    (manifest({"name": "fineweb10B_sp9", "stats": {"files_val": 2}}), False),
    ("\ufeff" + manifest({"name": "fineweb10B_sp9", "stats": FOUND}), True),  # saved with a byte-order mark
    ('{"name": "my application", "icons": []}', None),  # of another program
    ('[1, 2]', None),
    ('{"datasets": [{"name": "fineweb10B_sp9", "stats": {"files_val"', None),
])
@pytest.mark.parametrize("beside", [True, False])
def test_manifest_says_whether_the_validation_is_whole(tmp_path, text, expected, beside):
    folder = tmp_path / "datasets" / "fineweb10B_sp9"
    folder.mkdir(parents=True)
    if text is not None:
        ((tmp_path if beside else folder) / "manifest.json").write_text(text)
    assert tg.matches_manifest(str(folder), FOUND) is expected
    assert tg.matches_manifest(f"{folder}/", FOUND) is expected
    (tmp_path / "data").mkdir()
    (tmp_path / "data/datasets").symlink_to(folder.parent)  # on another disk, perhaps
    assert tg.matches_manifest(str(tmp_path / "data/datasets/fineweb10B_sp9"), FOUND) is expected
    if beside and text is not None:
        (tmp_path / "manifest.json").rename(tmp_path / "data/manifest.json")
    assert tg.matches_manifest(str(tmp_path / "data/datasets/fineweb10B_sp9"), FOUND) is expected


@fuzz
@given(st.binary(max_size=30) | st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["datasets", "name", "stats", "files_val"]), inner, max_size=3), max_leaves=8,
).map(lambda value: json.dumps(value).encode()))
@example(b'{"datasets": [{"name": "fuzz", "stats": 5}]}')
@example(b'{"datasets": [{"name": "fuzz", "stats": ["files_val"]}]}')
@example(b'{"datasets": [{"name": "fuzz"}]}')
def test_any_manifest_is_read_or_passed_over(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    assert tg.matches_manifest(str(folder), FOUND) in (True, False, None)


def test_shards_that_the_manifest_does_not_list_are_refused(tmp_path):
    stats = {"files_train": 2, "files_val": 1}
    (tmp_path / "manifest.json").write_text(manifest({"name": tmp_path.name, "stats": stats}))
    cfg = tg.Settings(data_path=str(tmp_path))
    for split, listed in (("train", 2), ("val", 1)):
        for number in range(listed):
            write_shard(tmp_path, f"fineweb_{split}_{number:06}.bin", [1])
            assert len(tg.shard_paths(cfg, split)) == number + 1  # training may use some of them
        write_shard(tmp_path, f"fineweb_{split}_{listed:06}.bin", [1])
        with pytest.raises(tg.RunError, match=f"fineweb_{split}_{listed:06}.bin: not in the manifest"):
            tg.shard_paths(cfg, split)
