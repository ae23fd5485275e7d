"""The artifact container under damage and malice, the settings it carries, and the packed script."""

import contextlib
import hashlib
import json
import math
import pickle
import random
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ForkedRun, clean_environment, run_script, shifted
from helpers import bare, flat, stored_weights
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt as tg

SCRIPT = Path(tg.__file__)
NAME = "dir/model.ptz"
NO_NOTES = tg.Notes({}, {}, ())


def tiny(**changes) -> tg.Settings:
    values = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 2.0, "rope_dims": 4,
              "vocab_size": 30, "device": "cpu"}
    return bare(**values | changes)


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(shifted(seed)), dtype=torch.int8)


def wide_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """int16, rows from ones within ±1 to ones that fill the type."""
    size, generator = torch.linspace(0, 15, shape[-2])[:, None], torch.Generator().manual_seed(shifted(seed))
    return (torch.randn(shape, generator=generator) * 2**size).clamp(-32768, 32767).short()


def halves(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shifted(seed))).half()


def path_codes(n: int, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """int16, such as a trellis has: each row's codes are even or odd as those before them say."""
    chance = np.random.default_rng(shifted(seed))
    found = np.zeros((n, rows, cols), dtype=np.int16)
    for row in found.reshape(-1, cols):
        state = 0
        for j in range(cols):
            half = round(chance.normal(0, 3))
            row[j], state = 2 * half + state % 2, tg.STATE_AFTER[state][half % 2]
    return torch.from_numpy(found)


def make(form: str, *sizes: int, seed: int = 0, **parts: torch.Tensor) -> tg.Stored:
    """Something of this form with random parts, but for those given."""
    draw = {torch.float16: halves, torch.int8: codes, torch.int16: wide_codes}
    table = enumerate(tg.form_parts(form, list(sizes)).items())
    return tg.Stored(form, list(sizes), {part: parts.get(part, draw[dtype](*shape, seed=seed + i))
                                         for i, (part, (shape, dtype)) in table})


def half(tensor: torch.Tensor) -> tg.Stored:
    return make("half", *tensor.shape, values=tensor.half())


def sample() -> dict[str, tg.Stored]:
    """All forms, odd shapes, extremes, a tensor without elements and one without dimensions."""
    small = (codes(2, 9, 4, seed=3) // 16).short()
    paths = {"t": make("trellis matrix", 2, 9, 4, codes=path_codes(2, 9, 4)),
             "u": make("trellis table", 1, 40, 21, codes=path_codes(1, 40, 21)),
             "v": make("trellis head", 1, 7, 13, codes=path_codes(1, 7, 13))}
    return {"a": make("scaled matrix", 3, 5, 7), "b": make("weighted matrix", 2, 9, 4, codes=small),
            "one": make("gate", 1, 1, 1), "c": make("weighted table", 1, 40, 21), "d": make("scaled table", 1, 40, 9),
            "e": make("scaled head", 1, 30, 5), "f": make("weighted head", 1, 30, 6),
            "a.1": make("low rank", 2, 5, 7, 3), **paths,
            "gate": make("gate", 3, 4, 2), "vector": half(halves(13, seed=1)), "empty": half(halves(2, 0)),
            "wide": make("scaled matrix", 1, 2, 301, seed=2), "scalar": half(torch.tensor(2.5)),
            "extreme": half(torch.tensor([65504.0, -65504.0, 6e-8, -0.0, 0.0])), "deep": half(halves(2, 1, 3, 2))}


def pack(compressor: str = "lzma", stored: dict | None = None, settings: dict | None = None) -> bytes:
    settings = {"num_layers": 3, "mlp_mult": 2.5, "ln_scale": True} if settings is None else settings
    return tg.write_artifact(settings, sample() if stored is None else stored, compressor)


def seal(body: bytes) -> bytes:
    """A container whose checksum is right, whatever the body."""
    return b"PGLF" + hashlib.blake2b(body, digest_size=16).digest() + body


def with_header(header, streams: bytes = b"", compressor: str = "lzma") -> bytes:
    head = tg.compress(header if isinstance(header, bytes) else json.dumps(header).encode(), compressor)
    kind = bytes([tg.ARTIFACT_VERSION, ("brotli", "lzma", "ans").index(compressor)])
    return seal(kind + struct.pack("<I", len(head)) + head + streams)


def assert_refused(data: bytes) -> None:
    with pytest.raises(tg.RunError, match="dir/model.ptz: "):
        tg.read_artifact(data, NAME)


def assert_same(got: dict[str, tg.Stored], expected: dict[str, tg.Stored]) -> None:
    assert {n: item[:2] for n, item in got.items()} == {n: item[:2] for n, item in expected.items()}
    assert_same_tensors(flat(got), flat(expected))


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape and got[name].is_contiguous(), name
        assert got[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


# ----- round trips


@pytest.mark.parametrize("compressor", ["brotli", "lzma", "ans"])
def test_artifact_round_trip(compressor):
    stored = {"num_layers": 3, "mlp_mult": 2.5, "ln_scale": True, "name": "ü"}
    settings, tensors = tg.read_artifact(pack(compressor, settings=stored), NAME)
    assert settings == stored and type(settings["ln_scale"]) is bool
    assert_same(tensors, sample())


@pytest.mark.parametrize("compressor", ["brotli", "lzma", "ans"])
@pytest.mark.parametrize("stored", [{"only": make("weighted matrix", 2, 3, 5)}, {"only": half(halves(3))}, {}],
                         ids=["codes", "halves", "none"])
def test_artifact_without_one_kind_of_tensor(compressor, stored):
    assert_same(tg.read_artifact(pack(compressor, stored), NAME)[1], stored)


@pytest.mark.parametrize("compressor", ["brotli", "lzma", "ans"])
def test_artifact_is_deterministic(compressor):
    assert pack(compressor) == pack(compressor)


def test_artifact_of_a_transposed_view():
    stored = {"c": make("scaled matrix", 2, 3, 5, codes=codes(2, 5, 3).mT), "h": half(halves(4, 3).T)}
    assert_same(tg.read_artifact(pack(stored=stored), NAME)[1], stored)


@pytest.mark.parametrize("compressor", ["lzma", "ans"])
def test_the_order_in_which_parts_were_made_does_not_matter(compressor):
    turned = {name: item._replace(parts=dict(reversed(item.parts.items()))) for name, item in sample().items()}
    assert pack(compressor, turned) == pack(compressor)


def test_more_things_than_a_byte_counts():
    stored = {f"{i}": make("low rank", 1, 3, 2, 4, seed=i) for i in range(150)} | {"q": make("scaled matrix", 2, 4, 4)}
    assert_same(tg.read_artifact(pack("ans", stored), NAME)[1], stored)


def test_zeros_become_small():
    zeros = make("scaled matrix", 4, 300, 300, codes=torch.zeros(4, 300, 300).char(), scales=torch.zeros(4, 300).half())
    assert len(pack("brotli", {"c": zeros, "h": half(halves(2))})) < 400


@pytest.mark.parametrize("tensor", [codes(3, 4), codes(2, 3, 5), codes(1, 1, 1), codes(2, 0, 3), wide_codes(2, 3, 5),
                                    halves(1), halves(7), halves(2, 3, 5)])
def test_stream_round_trip(tensor):
    back = tg.from_stream(tg.to_stream(tensor), tensor.dtype, list(tensor.shape))
    assert_same_tensors({"t": back}, {"t": tensor})


def test_streams_lie_as_documented():
    assert tg.to_stream(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)) == bytes([1, 4, 2, 5, 3, 6])
    assert tg.to_stream(torch.tensor([[1, 0x203]], dtype=torch.int16)) == bytes([1, 3, 0, 2])
    low_high = [struct.pack("<e", x) for x in (1.5, -7.25, 3e-5)]
    expected = bytes(b[0] for b in low_high) + bytes(b[1] for b in low_high)
    assert tg.to_stream(torch.tensor([1.5, -7.25, 3e-5]).half()) == expected


@pytest.mark.parametrize("dtype, shape", [(torch.int8, [2, 3]), (torch.int16, [2, 3]), (torch.float16, [2, 3])])
def test_stream_of_another_length_is_a_value_error(dtype, shape):
    for wrong in (0, 1, 5, 7, 11, 13, 24):
        with pytest.raises(ValueError):
            tg.from_stream(bytes(wrong), dtype, shape)


# ----- damage


@pytest.mark.parametrize("compressor", ["brotli", "lzma", "ans"])
def test_every_changed_byte_is_noticed(compressor):
    data = pack(compressor, {"c": make("weighted matrix", 1, 3, 5), "h": half(halves(4))})
    for place in range(len(data)):
        for change in (1, 128, 255):
            assert_refused(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])


def test_every_truncation_is_noticed():
    data = pack()
    for length in range(len(data)):
        assert_refused(data[:length])


def test_bytes_at_the_end_are_noticed():
    for extra in (b"\0", b"PGLF", bytes(100)):
        assert_refused(pack() + extra)


def test_garbage_is_refused():
    rng = random.Random(shifted(0))
    for i in range(2000):
        assert_refused(b"PGLF" * (i % 2) + rng.randbytes(rng.randrange(80)))


def test_random_corruptions_are_refused():
    rng, data = random.Random(shifted(0)), pack()
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(rng.randint(2, 12)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        if bytes(damaged) != data:
            assert_refused(bytes(damaged))


def test_damage_under_a_right_checksum_is_an_artifact_or_refused():
    rng, body = random.Random(shifted(1)), pack()[20:]
    for _ in range(400):
        damaged = bytearray(body)
        damaged[rng.randrange(len(body))] ^= rng.randrange(1, 256)
        try:
            tg.read_artifact(seal(bytes(damaged[: rng.choice([None, rng.randrange(len(body))])])), NAME)
        except tg.RunError as e:
            assert NAME in str(e)


@pytest.mark.parametrize("streams", [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 5)])
def test_damaged_ans_streams_under_a_right_checksum(monkeypatch, streams):
    """A thousand times in all: an artifact or refused, whatever the coder under it makes of that."""
    here = contextlib.nullcontext(SimpleNamespace(map=map))  # starting threads would cost a third
    monkeypatch.setattr(tg, "ThreadPoolExecutor", lambda: here)
    rng, body = random.Random(shifted(streams.start)), pack("ans")[20:]
    size = int.from_bytes(body[2:6], "little")
    header = json.loads(tg.decompress(body[6 : 6 + size], "ans", 1 << 20))
    ends = [6 + size + sum(header["bytes"][:i]) for i in range(6)]
    for _ in range(200):
        damaged = bytearray(body)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(ends[streams.start], ends[streams.stop])] = rng.randrange(256)
        try:
            tg.read_artifact(seal(bytes(damaged)), NAME)
        except tg.RunError as e:
            assert NAME in str(e)


# ----- entropy coding


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(-127, 127), st.integers(0, 191)), max_size=300), st.integers(-3000, 3000),
       st.lists(st.integers(0, 300), max_size=4))
def test_integers_round_trip(pairs, shift, ends):
    symbols = np.array([a + shift for a, _ in pairs], dtype=np.int16)
    contexts = np.array([b for _, b in pairs], dtype=np.uint8)
    turns = [*zip(np.split(symbols, sorted(ends)), np.split(contexts, sorted(ends)))]
    for plain in ((0,) * 256, tg.PLAIN_BITS):
        reader = tg.IntegerReader(*tg.encode_integers(turns, plain), plain)
        for part, where in turns:
            back = reader.read(where)
            assert back.dtype == np.int16 and np.array_equal(back, part)
        reader.close()


def test_integers_that_are_left_over_are_refused():
    turns = [(np.arange(300, dtype=np.int16), np.zeros(300, dtype=np.uint8))]
    tables, words = tg.encode_integers(turns)
    reader = tg.IntegerReader(tables, words)
    reader.read(np.zeros(200, dtype=np.uint8))
    with pytest.raises(ValueError):
        reader.close()
    for more in (bytes(8), tg.decompress(tables, "lzma", 1 << 20)):  # an empty table, one more that nothing is read by
        reader = tg.IntegerReader(tg.compress(tg.decompress(tables, "lzma", 1 << 20) + more, "lzma"), words)
        assert np.array_equal(reader.read(turns[0][1]), turns[0][0])
        with pytest.raises(ValueError):
            reader.close()


def test_a_table_that_claims_to_end_before_it_starts_is_refused():
    """Such a size would have the reader go through the same bytes for ever."""
    tables = np.array([0, -8], dtype="<i4").tobytes() + bytes(8)
    with pytest.raises(ValueError):
        tg.IntegerReader(tg.compress(tables, "lzma"), b"")


def test_codes_that_leave_the_trellis_are_not_packed():
    stored = {"t": make("trellis matrix", 2, 9, 4, codes=path_codes(2, 9, 4))}
    pack("ans", stored)
    stored["t"].parts["codes"][1, 3, 2] += 1
    with pytest.raises(ValueError, match="no path"):
        pack("ans", stored)


def weights_like(n: int, rows: int, cols: int, seed: int = 0) -> dict[str, tg.Stored]:
    """Codes of heavy-tailed weights whose rows and columns differ in size, and the exponents of their steps."""
    chance = np.random.default_rng(shifted(seed))
    row, col = chance.integers(-60, -40, (n, rows)), chance.integers(-9, 9, (n, cols))
    weights = chance.standard_t(6, (n, rows, cols)) * np.exp(0.2 * chance.standard_normal((n, rows, 1)))
    weights *= 2.0 ** (chance.integers(-53, -48, (n, 1, cols)) / 4)
    codes = (weights / 2.0 ** ((row[:, :, None] + col[:, None]) / 4) / 4).round().clip(-127, 127)
    row, col = (torch.from_numpy(array.astype(np.int8)) for array in (row, col))
    codes = torch.from_numpy(codes.astype(np.int16))
    return {"w": make("weighted matrix", n, rows, cols, codes=codes, row=row, col=col)}


def test_ans_takes_what_its_tables_say_and_less_than_the_others():
    stored = weights_like(3, 400, 300)
    side_tables, side_words, tables, words = tg.pack_integers(stored)
    codes, row, col = (stored["w"].parts[part].numpy().astype(np.int64) for part in ("codes", "row", "col"))
    which = np.repeat(np.arange(5), [0, 1200, 900, 1200, 900])
    side = tg.IntegerReader(side_tables, side_words).read(which.astype(np.uint8)).astype(np.int64)
    size = (side[2100:3300].reshape(3, 400) - row)[:, :, None] + (side[3300:].reshape(3, 300) - col)[:, None]
    contexts, bits = np.clip(size + 32, 0, 95), 0.0
    for context in np.unique(contexts):  # by the tables' definition, in plain floating point
        counts = np.bincount(codes[contexts == context] + 127)
        odds = np.array([2.0 ** (-round(8 * np.log2(counts.max() / c)) / 8) if c else 0.0 for c in counts])
        bits -= float((counts[counts > 0] * np.log2(odds[counts > 0] / odds.sum())).sum())
    assert bits < 8 * len(words) < 1.005 * bits + 64
    sizes = {c: len(tg.write_artifact({}, stored, c)) for c in tg.COMPRESSORS}
    assert sizes["ans"] < 0.975 * min(sizes["brotli"], sizes["lzma"])


def test_what_rows_of_a_table_share_is_coded_once():
    """Rows along two directions cost less than the same rows coded as several matrices; noise costs no more for it."""
    generator, sizes = torch.Generator().manual_seed(shifted(3)), {}
    noise = 3 * torch.randn(1, 4000, 40, generator=generator)
    shared = noise + 9 * torch.randn(1, 4000, 2, generator=generator) @ torch.randn(1, 2, 40, generator=generator)
    for name, table in (("noise", noise), ("shared", shared)):
        codes = table.round().clamp(-127, 127).char()
        one = torch.ones(1, 4000).half()
        forms = {form: {"emb": make(f"scaled {form}", 1, 4000, 40, codes=codes, scales=one)}
                 for form in ("table", "head", "matrix")}
        for stored in forms.values():
            data = tg.write_artifact({}, stored, "ans")
            assert_same(tg.read_artifact(data, NAME)[1], stored)
            sizes.setdefault(name, []).append(len(data))
    assert sizes["shared"][:2] == [pytest.approx(sizes["shared"][0], abs=9)] * 2  # the form's name is another
    assert sizes["shared"][0] < 0.85 * sizes["shared"][2]
    counts = noise.round().int().unique(return_counts=True)[1].double()
    assert sizes["noise"][0] < 1.01 * float((counts * (noise.numel() / counts).log2()).sum()) / 8 + 600


def test_wide_codes_take_little_more_than_their_entropy():
    """Rows of Gaussian codes of size 2^0 to 2^13: their lowest bits need no tables."""
    size = 2.0 ** torch.linspace(0, 13, 300)[None, :, None]
    codes = (torch.randn(1, 300, 512, generator=torch.Generator().manual_seed(shifted(2))) * size).round().short()
    stored = {"w": make("weighted matrix", 1, 300, 512, codes=codes, row=torch.zeros(1, 300).char(),
                        col=torch.zeros(1, 512).char())}
    least = float((0.5 * math.log2(2 * math.pi * math.e) + size.log2()).sum()) * 512 / 8
    assert least * 0.99 < len(tg.write_artifact({}, stored, "ans")) < 1.03 * least


def test_decoding_does_not_depend_on_threads():
    data, found, usual = tg.write_artifact({}, weights_like(2, 300, 200, seed=1), "ans"), set(), torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        t = flat(tg.read_artifact(data, NAME)[1])
        w = t["w.codes"].float() * tg.octaves(t["w.row"])[..., None] * tg.octaves(t["w.col"])[:, None]
        found.add(b"".join(x.numpy().tobytes() for x in (*t.values(), w)))
    torch.set_num_threads(usual)
    assert len(found) == 1


@pytest.mark.parametrize("missing, words", [("constriction", "COMPRESSOR=ans: .* take COMPRESSOR=brotli"),
                                            ("brotli", "COMPRESSOR=brotli: .* take COMPRESSOR=lzma")])
def test_a_missing_package_is_named_with_a_way_out(monkeypatch, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(tg.RunError, match=words):
        pack({"constriction": "ans"}.get(missing, missing))


# ----- malice


@pytest.mark.parametrize("body", [b"", b"\5", b"\5\1", b"\5\1\0\0", b"\5\1\0\0\0\0", b"\5\1\xff\xff\xff\xff",
                                  b"\5\3" + bytes(9), b"\4\1" + bytes(9), b"\6\1" + bytes(9)])
def test_short_or_foreign_bodies_are_refused(body):
    assert_refused(seal(body))


GOOD = {"settings": {}, "stored": [["h", "half", [2]], ["c", "gate", [1, 1, 3]]]}
STREAMS = [tg.compress(bytes(6), "lzma"), tg.compress(bytes(3), "lzma")]
H, C = GOOD["stored"]


def nonsense(**changes) -> bytes:
    return with_header(GOOD | {"bytes": [len(s) for s in STREAMS]} | changes, b"".join(STREAMS))


def test_the_header_that_is_spoilt_below_is_good():
    assert set(tg.read_artifact(nonsense(), NAME)[1]) == {"h", "c"}


@pytest.mark.parametrize("changes", [
    {"settings": None}, {"settings": 5}, {"settings": "text"}, {"settings": [1, 2]},
    {"stored": None}, {"stored": []}, {"stored": "text"}, {"stored": [["h"], C]}, {"stored": [["h", "half", 2], C]},
    {"stored": [["h", "half", [3]], C]}, {"stored": [["h", "half", [1]], C]}, {"stored": [["h", "half", [-1]], C]},
    {"stored": [["h", "half", ["2"]], C]}, {"stored": [["h", "half", [10**30]], C]}, {"stored": [C]}, {"stored": [H]},
    {"stored": [H, ["c", "gate", [4]]]}, {"stored": [H, ["c", "gate", [1, 1, 4]]]}, {"stored": [H, ["c", "gate", []]]},
    {"stored": [H, ["c", "gate"]]}, {"stored": [H, ["c", "scaled", [1, 1, 3]]]},
    {"stored": [H, ["c", None, [1, 1, 3]]]},
    {"stored": [H, ["c", "weighted matrix", [1, 1, 3]]]}, {"stored": [H, C, ["d", "gate", [1, 1, 3]]]},
    {"stored": [H, ["c", "gate", [1, 1, 10**30]]]}, {"stored": [H, ["c", "gate", [1, 10**5, 10**5]]]},
    {"stored": [H, C, ["d", "half", [1, 10**10, 1]], ["e", "half", [-1, 10**10, 1]]]},  # together none
    {"stored": [H, ["c", "low rank", [1, 10**6, 10**6, 1]]]}, {"stored": [H, ["c", "trellis matrix", [1, 1, 10**6]]]},
    {"stored": [H, ["c", "low rank", [1, 1, 3, 0]]]}, {"stored": [H, [[], "gate", [1, 1, 3]]]},
    {"bytes": []}, {"bytes": None}, {"bytes": [1]}, {"bytes": [1, 2, 3]}, {"bytes": [-3, 5]}, {"bytes": ["a", "b"]},
    {"bytes": [10**30, 1]}, {"bytes": [10**9, 1]}, {"bytes": {"a": 1}},
], ids=str)
def test_nonsense_in_the_header_is_refused(changes):
    assert_refused(nonsense(**changes))


@pytest.mark.parametrize("header", [None, 5, "text", [], {}, {"settings": {}}, b"", b"\xff\xfe", b"[" * 100_000,
                                    b'{"settings":', b"NaN"])
def test_headers_of_another_kind_are_refused(header):
    assert_refused(with_header(header))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10**12, 10**12) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)


@hypothesis_settings(max_examples=80, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(["settings", "stored", "bytes"]), json_values))
def test_any_json_header_is_an_artifact_or_refused(changes):
    try:
        tg.read_artifact(nonsense(**changes), NAME)
    except tg.RunError as e:
        assert NAME in str(e)


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_a_stream_that_unpacks_to_all_memory_is_refused(compressor):
    packed = tg.compress(bytes(1 << 20), compressor)
    assert tg.decompress(packed, compressor, 1 << 20) == bytes(1 << 20)
    for stream, most in (packed, 1 << 18), (packed[:-2], 1 << 20):
        with pytest.raises(ValueError, match="larger than it should be"):
            tg.decompress(stream, compressor, most)


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_no_stream_of_an_artifact_is_unpacked_beyond_what_its_sizes_say(monkeypatch, compressor):
    """And none that its header does not count."""
    unpacked, real = [], tg.decompress
    monkeypatch.setattr(tg, "decompress", lambda *args: unpacked.append(args[2]) or real(*args))
    tg.read_artifact(pack(compressor), NAME)
    sizes = [tensor.numpy().nbytes for item in sample().values() for tensor in item.parts.values()
             if tensor.dtype != torch.float16]
    halves = sum(2 * tensor.numel() for item in sample().values() for tensor in item.parts.values()
                 if tensor.dtype == torch.float16)
    assert sorted(unpacked) == sorted([tg.MOST_TEXT, halves, *sizes])  # by several threads
    unpacked.clear()
    bomb = tg.compress(bytes(1 << 20), compressor)
    header = {"settings": {}, "stored": [], "bytes": 5 * [len(bomb)]}
    assert_refused(with_header(header, 5 * bomb, compressor))
    assert unpacked == [tg.MOST_TEXT]


class Bomb:
    """Unpickling one writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_executed(tmp_path):
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    torch.save({"x": Bomb(mark)}, tmp_path / "bomb.pt")
    for data in (bomb, seal(bomb), with_header(bomb), seal(b"\1\1" + bomb), (tmp_path / "bomb.pt").read_bytes(),
                 nonsense()[:-3] + bomb):
        assert_refused(data)
    stream = tg.compress(bomb, "lzma")
    head = GOOD | {"halves": [], "codes": [], "bytes": [len(stream)]}
    assert_refused(with_header(head, stream))
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()


# ----- the settings in it


def stored_settings(**changes) -> dict:
    """What comes back from an artifact: through JSON."""
    return json.loads(json.dumps(tg.artifact_settings(tiny(**changes))))


def explicit(**values) -> tuple[tg.Settings, tg.Notes]:
    return bare(**values), tg.Notes(values, {}, ())


def test_artifact_settings_are_adopted():
    made = tiny(rope_base=50.0, skip_gates_enabled=False, eval_stride=32)
    cfg = tg.adopt_settings(NO_NOTES, stored_settings(rope_base=50.0, skip_gates_enabled=False,
                                                                     eval_stride=32), NAME)
    for name in ["vocab_size", *tg.Settings.group("model"), "eval_seq_len", "eval_stride"]:
        assert getattr(cfg, name) == getattr(made, name), name


def test_every_setting_the_weights_depend_on_is_stored():
    needed = {"num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims", "rope_base",
              "xsa_last_n", "ln_scale", "skip_gates_enabled", "logit_softcap", "vocab_size", "eval_seq_len",
              "eval_stride"}
    assert needed <= set(stored_settings())


@pytest.mark.parametrize("name, value", [("num_layers", 3), ("vocab_size", 31), ("rope_base", 123.0),
                                         ("ln_scale", False), ("logit_softcap", 29.0)])
def test_another_model_setting_is_refused_by_name(name, value):
    cfg, notes = explicit(**{name: value})
    with pytest.raises(tg.RunError, match=f"dir/model.ptz: .*{name.upper()}=") as caught:
        tg.adopt_settings(notes, stored_settings(), NAME)
    assert str(value) in str(caught.value)


def test_the_same_setting_given_again_is_fine():
    cfg, notes = explicit(num_layers=2, vocab_size=30)
    assert tg.adopt_settings(notes, stored_settings(), NAME).num_layers == 2


@pytest.mark.parametrize("changes, said", [
    ({"loop_start": 2, "loop_end": 2, "num_loops": 1}, {"loop_start": None, "loop_end": None}),
    ({}, {"embedding_dim": 16})])  # as wide as the model: no factors
def test_what_says_the_same_in_other_words_is_adopted(changes, said):
    stored = stored_settings(**{"num_layers": 4} | changes)
    adopted = tg.adopt_settings(tg.Notes(said, {}, ()), stored, NAME)
    assert {name: getattr(adopted, name) for name in stored} == stored


def test_auto_of_an_evaluation_is_resolved_anew():
    stored = stored_settings(ttt_mode="phased", train_seq_len=128, eval_seq_len=512, eval_stride=None)
    assert stored["eval_stride"] == 0
    said = {"ttt_mode": "none", "eval_stride": None, "eval_seq_len": None}
    adopted = tg.adopt_settings(tg.Notes(said, {}, ()), stored, NAME)
    assert (adopted.eval_stride, adopted.eval_seq_len) == (64, 128)
    for said, stride in (({"ttt_mode": "none"}, 64), ({"ttt_mode": "phased"}, 0), ({}, 0),
                         ({"ttt_mode": "none", "eval_stride": 16}, 16)):  # auto hangs on TTT_MODE
        assert tg.adopt_settings(tg.Notes(said, {}, ()), stored, NAME).eval_stride == stride


def test_a_length_that_moves_the_rotary_base_is_refused():
    cfg, notes = explicit(train_seq_len=256)
    assert tg.adopt_settings(notes, stored_settings(), NAME).train_seq_len == 256
    with pytest.raises(tg.RunError, match="dir/model.ptz: made with TRAIN_SEQ_LEN=.*, this run has 256"):
        tg.adopt_settings(notes, stored_settings(rope_yarn=True), NAME)


def test_evaluation_settings_may_differ():
    cfg, notes = explicit(eval_stride=16, eval_seq_len=512, data_path="elsewhere", device="cpu")
    adopted = tg.adopt_settings(notes, stored_settings(), NAME)
    assert (adopted.eval_stride, adopted.eval_seq_len, adopted.data_path) == (16, 512, "elsewhere")
    assert adopted.model_dim == 16


def test_settings_of_another_version_are_refused():
    with pytest.raises(tg.RunError, match="dir/model.ptz: .*WARP_DRIVE"):
        tg.adopt_settings(NO_NOTES, stored_settings() | {"warp_drive": 1}, NAME)
    older = stored_settings()
    del older["rope_dims"]
    with pytest.raises(tg.RunError, match="dir/model.ptz: .*ROPE_DIMS"):
        tg.adopt_settings(NO_NOTES, older, NAME)


@pytest.mark.parametrize("name, value", [("num_layers", "eleven"), ("num_layers", None), ("num_layers", 2.5),
                                         ("model_dim", [16]), ("num_heads", 0), ("num_heads", 7), ("rope_base", "x"),
                                         ("ln_scale", "maybe"), ("vocab_size", {}), ("eval_seq_len", "long"),
                                         ("rope_yarn", "yes"), ("rope_yarn", None)])
def test_nonsense_settings_are_refused(name, value):
    with pytest.raises(tg.RunError):
        tg.adopt_settings(NO_NOTES, stored_settings() | {name: value}, NAME)


# ----- weights into the model


def test_loaded_weights_are_the_dequantized_ones():
    cfg = tiny(quant_min_weights=512)
    source, target = tg.GPT(cfg), tg.GPT(cfg)
    with torch.no_grad():
        for p in source.parameters():
            p.normal_(generator=torch.Generator().manual_seed(shifted(0)))
        for p in target.parameters():
            p.fill_(float("nan"))
    stored = stored_weights(cfg, source)
    tg.load_weights(target, cfg, tg.read_artifact(pack("brotli", stored), NAME)[1], NAME)
    expected = tg.dequantize(cfg, stored)
    for name, p in target.named_parameters():
        assert torch.equal(p, expected[name]), name
        assert (p - dict(source.named_parameters())[name]).abs().max() < 0.5


def test_weights_that_do_not_fit_are_refused():
    cfg = tiny(quant_min_weights=512)
    model = tg.GPT(cfg)
    good = stored_weights(cfg, model)
    tg.load_weights(model, cfg, good, NAME)
    wrong = [{n: item for n, item in good.items() if n != name} for name in good]
    wrong += [good | {"stowaway": half(halves(3))}, good | {"q.7": make("low rank", 2, 16, 16, 4)},
              good | {"q.0": make("low rank", 2, 16, 15, 4)}, good | {"x.0": make("low rank", 2, 16, 16, 4)}]
    for name, (form, sizes, _) in good.items():
        for i in range(len(sizes)):
            for size in {0, 1, sizes[i] - 1, 2 * sizes[i]} - {sizes[i]}:
                wrong.append(good | {name: make(form, *sizes[:i], size, *sizes[i + 1 :])})
        if form == "half":
            wrong.append(good | {name: make(form, *sizes, 1)})
    accepted = []
    for spoilt in wrong:
        try:
            tg.load_weights(model, cfg, spoilt, NAME)
            accepted.append({n: item[:2] for n, item in spoilt.items() if item is not good.get(n)})
        except tg.RunError as e:
            assert NAME in str(e)
    assert not accepted


# ----- the packed script


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "train_gpt.packed.py"
    path.write_bytes(tg.pack_code(SCRIPT.read_bytes()))
    return path


def test_packed_script_holds_the_source_byte_for_byte_and_one_line(packed):
    with zipfile.ZipFile(packed) as archive:
        assert archive.namelist() == ["train_gpt.py", "__main__.py"] and archive.testzip() is None
        assert archive.read("train_gpt.py") == SCRIPT.read_bytes()
        assert archive.read("__main__.py").count(b"\n") == 1
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_packing_is_deterministic_and_idempotent(packed):
    code = packed.read_bytes()
    assert tg.pack_code(SCRIPT.read_bytes()) == code
    assert tg.pack_code(code) == code
    assert len(code) < len(zlib.compress(SCRIPT.read_bytes(), 9)) + 400  # of zlib's best
    assert tg.pack_code(SCRIPT.read_bytes() + b"\n") != code


def test_packed_script_can_be_imported_from_and_packs_itself(packed):
    """Tools that read sources find them (Triton, tracebacks), and what it counts is the file it came from."""
    code = ("import inspect, sys; sys.path.insert(0, sys.argv[1])\nimport train_gpt as tg\n"
            "assert tg.__file__.startswith(sys.argv[1])\n"
            "assert 'def newton_schulz' in inspect.getsource(tg.newton_schulz)\n"
            "assert tg.pack_code(tg.read_code()) == open(sys.argv[1], 'rb').read()\n"
            "try: tg.softcap(None, 1.0)\nexcept AttributeError: import traceback; traceback.print_exc()\n")
    done = ForkedRun({}, "-c", code, str(packed), cwd=packed.parent).finish()
    assert done.returncode == 0 and "return cap * torch.tanh(logits.float() / cap)" in done.stderr, done.stderr


def test_packed_script_answers_like_the_source(packed, capsys):
    """Which answers in this process, but for an error, that ends it."""
    environ = {"RUN_ID": "same", "ARTIFACT_DIR": "same", "NUM_LAYERS": "7", "COMPRESSOR": "pergroup", "MLP_MULT": "3"}

    def answer(path: Path, argument: str) -> tuple[str, str, int]:
        done = run_script(environ, argument, script=path, cwd=packed.parent)
        return done.stdout, done.stderr, done.returncode

    for argument in ("--config", "--help"):
        status = tg.start([argument], tg.Launch(), clean_environment(environ))
        expected = (*capsys.readouterr(), status)
        assert answer(packed, argument) == expected and status == 0
        if argument == "--config":
            assert json.loads(expected[0])["num_layers"] == 7
    refused = answer(packed, "--nonsense")
    assert refused == answer(SCRIPT, "--nonsense") and refused[2] == 1
    assert sorted(p.name for p in packed.parent.iterdir()) == [packed.name]
