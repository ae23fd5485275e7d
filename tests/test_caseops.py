"""data/caseops.py: no text is lost, and every byte of the restored text is charged once."""

import hashlib
import io
import itertools
import random
import re
import sys

import caseops
import numpy as np
import pytest
import sentencepiece as spm
from caseops import (
    ALLCAPS,
    CAP,
    ESCAPE,
    MARKED,
    MARKERS,
    PUBLISHED,
    TITLE,
    Fusion,
    restore,
    restored_bytes,
    rule_of,
    token_bytes,
    transform,
)
from conftest import shifted
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import published_caseops

CODE_POINTS = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
READABLE = str.maketrans({TITLE: "^", ALLCAPS: "#", CAP: "+", ESCAPE: "\\"})
SENTENCES = [
    "The quick brown fox asked NASA about McDonald's iPhone.\n", "I am A. J. R. Smith, and HTTPServer isn't DON'T.\n",
    "na\u00efve \u00c9COLE, \u0396\u03b5\u03cd\u03c2, \u041f\u0440\u0430\u0432\u0434\u0430 7 + 1234.5\n",
]
CASED = st.text(st.sampled_from("aAbBzZ \n.'7\u00c9\u00e9\u00df\u0130\u0131\u01c4\u01c5\u01c6\u03a3\u03c3\u03c2"
                                "\u023a\u2c65\u2c6f\u1e9e\u0301\u2581\0" + "".join(MARKERS)))
ANY = st.one_of(st.text(), CASED, st.text(st.sampled_from(CODE_POINTS), max_size=20))


# ----- the transform


@pytest.mark.parametrize(("raw", "transformed"), [
    ("The NASA probe", "^the# nasa probe"),  # a marker stands in front of the space
    ("McDonald's iPhone", "^mc^donald's i^phone"),
    ("HTTPServer, TVs", "#http^server,+ t^vs"),
    ("I saw A. J. DON'T", "+i saw+ a.+ j.# don'+t"),
    ("  Two\tTabs\nLine", " ^ two\t^tabs\n^line"),
    ("B2B COVID19 3D", "+b2+b# covid19 3+d"),
    ("\u00c9cole E\u0301COLE", "^\u00e9cole+ e\u0301#cole"),
    ("Stra\u00dfe \u00df\u1e9e", "^stra\u00dfe \u00df\u1e9e"),
    ("\u0130stanbul \u0131I", "\u0130stanbul \u0131+i"),
    ("\u0396\u03b5\u03cd\u03c2 \u039f\u0394\u039f\u03a3", "^\u03b6\u03b5\u03cd\u03c2# \u03bf\u03b4\u03bf\u03c3"),
    ("\u01c4\u01c5\u01c6", "+\u01c6\u01c5\u01c6"),
    ("\u13a0\u13a1 \U00010400 \uff21", "\u13a0\u13a1 \U00010400 \uff21"),  # letters outside of BLOCKS
    (f"{TITLE}The {ESCAPE}", "\\^^the \\\\"),
    (f" {CAP} x", " \\+ x"),
    ("", ""),
])
def test_what_becomes_of_words(raw, transformed):
    assert transform(raw).translate(READABLE) == transformed
    assert restore(transform(raw)) == raw


def test_every_code_point_alone_and_in_company():
    """All 1.1 million at once, between separators: one by one, after a capital, between small letters, in capitals."""
    for before, after in (("", ""), ("A", ""), ("a", "b"), ("AB", "C")):
        text = "\n".join(before + c + after for c in CODE_POINTS)
        assert restore(transform(text), strict=False) == text


@given(ANY)
@settings(max_examples=1000, deadline=None)
@example(f"{ESCAPE}{ESCAPE}{TITLE}A{CAP}")
def test_restores_any_text(text):
    transformed = transform(text)
    assert restore(transformed) == text == restore(transformed, strict=False)
    assert not any(c in caseops.SMALL for c in transformed)


@given(ANY, ANY)
@settings(max_examples=500, deadline=None)
def test_different_texts_stay_different(a, b):
    assert (transform(a) == transform(b)) == (a == b)


@given(ANY)
@settings(max_examples=1000, deadline=None)
def test_restore_takes_only_what_transform_writes(text):
    """The strict form refuses the rest in one line; the other takes anything."""
    assert isinstance(restore(text, strict=False), str)
    try:
        raw = restore(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert transform(restore(text, strict=False)) != text
    else:
        assert transform(raw) == text


@pytest.mark.parametrize("sample", ["A", TITLE, f"{TITLE}7", f"{ALLCAPS}a", f"{CAP}ab", f"a{ESCAPE}", f"{ESCAPE}a",
                                    f" {TITLE}ab", f"{TITLE}  ab", f"{TITLE}{TITLE}ab"])
def test_restore_refuses(sample):
    with pytest.raises(ValueError, match="^not a transformed text: character "):
        restore(sample)


def test_samples_of_a_model_are_read_leniently():
    assert restore(f"{TITLE} the {TITLE}{CAP}x{ALLCAPS} a 7{ESCAPE}", strict=False) == " The X A 7"


def test_the_letters_are_those_of_every_python():
    """Data written under one Unicode table must be readable under another: the pairs are pinned."""
    assert len(caseops.SMALL) == len(set(caseops.SMALL.values())) == 655
    pairs = "".join(capital + small for capital, small in sorted(caseops.SMALL.items()))
    assert hashlib.sha256(pairs.encode()).hexdigest()[:16] == "6207ebc18292b0b2"
    assert not set(caseops.SMALL) & set(caseops.SMALL.values())
    assert not (set(caseops.SMALL) | set(caseops.SMALL.values())) & {*MARKERS, *" \n\0"}


# ----- bytes


@given(ANY)
@settings(max_examples=500, deadline=None)
def test_restored_bytes_are_those_of_the_raw_characters(text):
    """Against a walk over the transformed text, character by character."""
    transformed, raw, expected, escaped = transform(text), iter(text), [], False
    for c in transformed:
        inserted = c in MARKERS and not escaped
        escaped = inserted and c == ESCAPE
        expected.append(0 if inserted else len(next(raw).encode()))
    assert next(raw, None) is None
    assert restored_bytes(transformed).tolist() == expected
    assert sum(expected) == len(text.encode())
    # A text that nothing transforms to, as a model or a tokenizer may leave one: the sum holds all the same.
    assert restored_bytes(text).sum() == len(restore(text, strict=False).encode())


def train(**options) -> spm.SentencePieceProcessor:
    """A small BPE tokenizer with MARKERS, otherwise as data/tokenize_docs.py trains it."""
    model = io.BytesIO()
    texts = [transform(text) for text in SENTENCES * 5] + ["the them then there"] * 10
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 360,
                "user_defined_symbols": list(MARKERS)} | options
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", byte_fallback=True, split_digits=True,
        required_chars="\u2581", pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **settings,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def identity() -> spm.SentencePieceProcessor:
    return train()


@pytest.fixture(scope="module", params=["identity", "bare", "nmt_nfkc", "nfkc_cf"])
def any_processor(request, identity) -> spm.SentencePieceProcessor:
    """Also tokenizers that merge and drop characters, and one that puts no space in front."""
    if request.param == "identity":
        return identity
    if request.param == "bare":
        return train(add_dummy_prefix=False)
    return train(normalization_rule_name=request.param, remove_extra_whitespaces=True)


def slow_counts(processor: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Raw bytes of each token, for a tokenizer that changes nothing: its pieces laid over the text byte by byte."""
    owners = []  # of each byte of the transformed text: how many raw bytes it carries
    for c, size in zip(transform(text), restored_bytes(transform(text))):
        n = len(c.encode())
        owners += [int(size) * (k + 1) // n - int(size) * k // n for k in range(n)]
    counts, place = [], -1  # the dummy space in front is no text
    for token in processor.encode(transform(text)):
        piece = processor.id_to_piece(token)
        size = 1 if processor.is_byte(token) else len(piece.replace("\u2581", " ").encode())
        counts.append(sum(owners[max(place, 0) : place + size]))
        place += size
    assert place == len(owners) or not text
    return counts


@given(ANY.filter(lambda text: "\u2581" not in text))
@settings(max_examples=500, deadline=None)
def test_tokens_are_charged_what_they_stand_for(identity, text):
    ids, counts = token_bytes(identity, text)
    assert ids.dtype == counts.dtype == np.uint16
    assert counts.tolist() == slow_counts(identity, text)
    assert restore(identity.decode(ids.tolist())) == text


def given_back(processor: spm.SentencePieceProcessor, ids: np.ndarray) -> str:
    """The text of a document as the audit of a run sees it: decoded behind its BOS, then restored."""
    return restore(processor.decode([processor.bos_id(), *ids.tolist()]), strict=False)


@given(ANY)
@settings(max_examples=500, deadline=None)
@example("\u2581")
@example(" A\u2581B\u2581\u2581The  \u2581")
@example("\ufb01 \uff21\uff22 \u212b  X ")
def test_sums_are_exact_whatever_the_tokenizer_does(any_processor, text):
    """Also of texts that the tokens do not give back."""
    ids, counts = token_bytes(any_processor, text)
    assert ids.tolist() == any_processor.encode(transform(text))
    assert len(ids) == len(counts)
    assert counts.sum() == len(given_back(any_processor, ids).encode())


def test_every_code_point_is_charged(any_processor):
    text = "".join(random.Random(shifted(0)).sample(CODE_POINTS, 50_000))
    ids, counts = token_bytes(any_processor, text)
    back = given_back(any_processor, ids)
    assert counts.sum() == len(back.encode())
    if any_processor.normalize("\ufb01") == "\u2581\ufb01":
        assert back == text.replace("\u2581", " ")


def test_a_literal_space_symbol_is_charged_as_the_space_it_becomes(identity):
    ids, counts = token_bytes(identity, "The\u2581THEM\u2581 x")
    plain = token_bytes(identity, "The THEM  x")
    assert given_back(identity, ids) == "The THEM  x"
    assert counts.sum() == plain[1].sum() == 11  # not the 15 of the raw text


def test_markers_cost_nothing_and_bytes_are_shared(identity):
    ids, counts = token_bytes(identity, f"The\U0001f600\u023a {CAP}A")
    by_piece = list(zip(identity.id_to_piece(ids.tolist()), counts.tolist()))
    assert [count for piece, count in by_piece if piece in (TITLE, ALLCAPS, ESCAPE)] == [0, 0]
    assert [count for piece, count in by_piece if piece == CAP] == [0, 3, 0]  # the second stands for itself
    assert [count for piece, count in by_piece if re.fullmatch("<0x..>", piece)] == [1, 1, 1, 1, 0, 1, 1]


def test_a_text_of_which_nothing_is_left():
    ids, counts = token_bytes(train(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True), "  ")
    assert len(ids) == len(counts) == 0


# ----- pairs of a piece and a marker


PAIRED = st.lists(st.sampled_from(["A", "the", " The", ". The", ".", " I", "\n", ", A", "NASA", " ", "\u00e9",
                                   "\U0001f600A", "<0xC0>", "\u2581A", *MARKERS])).map("".join)


@pytest.fixture(scope="module")
def fusion(identity) -> Fusion:
    return Fusion.choose(identity, identity.encode([transform(text) for text in SENTENCES]))


def spare(processor: spm.SentencePieceProcessor) -> set[int]:
    """Ids of bytes that no text has: what no code point begins or goes on with."""
    used = {byte for c in CODE_POINTS[::64] + CODE_POINTS[:0x800] for byte in c.encode()}
    return {processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256) if byte not in used}


def fused_by_hand(ids: list[int], pairs: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """(id, place) of each token, from left to right."""
    out, i = [], 0
    while i < len(ids):
        pair = tuple(ids[i : i + 2])
        out.append((pairs.get(pair, ids[i]), i))
        i += 2 if pair in pairs else 1
    return out


def test_the_most_frequent_pairs_are_chosen(identity, fusion):
    texts = [identity.encode(transform(text)) for text in SENTENCES]
    markers, counts = {identity.piece_to_id(marker) for marker in MARKERS}, {}
    for a, b in (pair for ids in texts for pair in itertools.pairwise(ids)):
        if b in markers and a not in markers and not identity.is_byte(a):
            counts[a, b] = counts.get((a, b), 0) + 1
    assert len(fusion.pairs) == 13 == len(spare(identity)) < len(counts)
    assert {token for token, _, _ in fusion.pairs} == spare(identity)
    chosen = [counts.pop(pair[1:]) for pair in fusion.pairs]
    assert min(chosen) >= max(counts.values()) and len({identity.id_to_piece(m) for _, _, m in fusion.pairs}) > 1


@given(ANY | PAIRED)
@settings(max_examples=1000, deadline=None)
@example("".join(SENTENCES))
@example("")
def test_pairs_are_fused_and_split_without_loss(identity, fusion, text):
    """Of every text: the same tokens, and each is charged what its parts were, to the last byte."""
    ids, counts = token_bytes(identity, text)
    fused, starts = fusion.fuse(ids)
    by_hand = fused_by_hand(ids.tolist(), {pair[1:]: pair[0] for pair in fusion.pairs})
    assert list(zip(fused.tolist(), starts.tolist())) == by_hand
    split, places = fusion.split(fused)
    assert split.tolist() == ids.tolist() and places.tolist() == starts.tolist()
    assert restore(identity.decode(split.tolist()), strict=False) == text.replace("\u2581", " ")
    ends = [*starts.tolist(), len(ids)][1:]
    charged = [sum(counts[a:b].tolist()) for a, b in zip(starts.tolist(), ends)]
    assert not len(ids) or np.add.reduceat(counts, starts).tolist() == charged
    assert sum(charged) == len(text.replace("\u2581", " ").encode())
    assert not set(ids.tolist()) & spare(identity)


def test_no_code_point_needs_the_id_of_a_pair(any_processor):
    """All 1.1 million, and a third of them after a capital, another before one."""
    for before, after, some in (("", "", CODE_POINTS), ("A", "", CODE_POINTS[::3]), ("", "A", CODE_POINTS[1::3])):
        text = "\n".join(before + c + after for c in some)
        assert not set(any_processor.encode(transform(text))) & spare(any_processor)


@given(st.lists(st.integers(0, 359)))
@settings(max_examples=300, deadline=None)
def test_any_tokens_that_have_no_fused_id_come_back(fusion, ids):
    """Also those that no text is encoded by; and what has fused ids splits into both parts of each."""
    parts = {token: [piece, marker] for token, piece, marker in fusion.pairs}
    split, places = fusion.split(np.array(ids, np.uint16))
    assert split.tolist() == [part for token in ids for part in parts.get(token, [token])]
    assert places.tolist() == [sum(len(parts.get(t, [t])) for t in ids[:i]) for i in range(len(ids))]
    again, _ = fusion.fuse(split)
    assert fusion.split(again)[0].tolist() == split.tolist() and len(again) <= len(ids)
    nothing = Fusion(train())
    assert nothing.fuse(np.array(ids, np.uint16))[0].tolist() == nothing.split(np.array(ids))[0].tolist() == ids


@pytest.mark.parametrize("change", [
    lambda sp, p: [(sp.piece_to_id("<0x41>"), *p[0][1:])],
    lambda sp, p: [(sp.piece_to_id("the"), *p[0][1:])],
    lambda sp, p: [(p[0][0], sp.piece_to_id(TITLE), p[0][2])],
    lambda sp, p: [(p[0][0], sp.piece_to_id("<0x41>"), p[0][2])],
    lambda sp, p: [(p[0][0], sp.bos_id(), p[0][2])],
    lambda sp, p: [(p[0][0], 360, p[0][2])],
    lambda sp, p: [(p[0][0], -1, p[0][2])],
    lambda sp, p: [(*p[0][:2], p[0][1])],
    lambda sp, p: [p[0], (p[0][0], *p[1][1:])],
    lambda sp, p: [p[0], (p[1][0], *p[0][1:])],
])
def test_what_are_no_pairs_of_a_tokenizer_is_refused(identity, fusion, change):
    Fusion(identity, fusion.pairs[:2])
    with pytest.raises(ValueError, match="^the pairs? of tokens") as caught:
        Fusion(identity, change(identity, fusion.pairs))
    assert len(str(caught.value).splitlines()) == 1


def test_without_markers_there_is_nothing_to_choose(identity):
    with pytest.raises(ValueError, match="no pair of a piece and a marker"):
        Fusion.choose(identity, identity.encode(["the them", ""]))


# ----- the published order of markers


@given(ANY | PAIRED)
@settings(max_examples=1000, deadline=None)
@example("AB\u023a AB\u2c65 iPhone HTTPServer I A\u00e9")
def test_the_published_rule_is_read_without_loss(text):
    marked = published_caseops(text)
    assert restore(marked, False, PUBLISHED) == text
    assert restored_bytes(marked, PUBLISHED).sum() == len(text.encode())
    assert restored_bytes(text, PUBLISHED).sum() == len(restore(text, False, PUBLISHED).encode())


def test_the_two_rules_differ():
    """Or there would be no need to know which one made a text: an A to Z word ends where another letter begins."""
    marked = published_caseops("AB\u2c65")
    assert restore(marked, False) == "AB\u023a" and restored_bytes(marked).sum() == 4
    assert restored_bytes(marked, PUBLISHED).sum() == 5


@pytest.mark.parametrize("literal", ["", "\u2581T\u2581X "])
def test_the_order_of_markers_tells_the_rule(any_processor, literal):
    """By tokenizers that put a space in front, put none or drop spaces; also of a literal "\u2581"."""
    bos, texts = any_processor.bos_id(), [*SENTENCES, "The end", literal + "A"]
    for rule, marked in ((MARKED, transform), (PUBLISHED, published_caseops)):
        tokens = [t for text in texts for t in (bos, *any_processor.encode(marked(text)))]
        assert rule_of(any_processor, np.array(tokens)) is rule
    for tokens in ([], [bos], [bos, *any_processor.encode("\ue001the")], [bos] * 3):
        assert rule_of(any_processor, np.array(tokens, np.int64)) is MARKED
