"""CaseOps writes capitals as small letters behind markers, without loss (PR 1729 of the challenge).

    The NASA probe, McDonald's iPhone  ->  ^the# nasa probe,^ mc^donald's i^phone    (^ is TITLE, # is ALLCAPS)

So "The" and "the" share one piece of the tokenizer, which can spend its pieces on other things than case.

Notable features:
- MARKERS are four private-use characters. The tokenizer has them as reserved pieces (user_defined_symbols).
- A marker stands in front of the space before its word, so that " The" and " the" share the piece "▁the".
- restore(transform(text)) == text holds for every text, even for one that contains markers.
- token_bytes() charges each token the UTF-8 bytes of the restored text that it stands for. The scorer reads these
  numbers from a file beside the shards.
- The letters that take part are the same in every version of Python, so that old data stays readable.
- A Fusion gives frequent pairs of a piece and a marker one id each (PR 2109), and splits them again without loss.
- The published CaseOps data of the challenge, which has the space before the marker, is read too (PUBLISHED).

The rule divides a run of capitals into parts. If a small letter follows the run, the last capital is a part of its own,
together with the small letters. The other capitals of the run are one part. Each part gets one marker: TITLE for a
capital with small letters ("The", "iPhone"), ALLCAPS for two capitals or more ("NASA", the "HTTP" of "HTTPServer"), and
CAP for a single one ("I", "J. R.").

The published data of PR 1729 has the same markers by another rule. It knows the letters A to Z alone, and a marker
stands between the space and its word: " The" is " ^the". ALLCAPS reaches to the end of such a word.
"""

import re
from collections.abc import Iterable

import numpy as np
import sentencepiece as spm

# After ESCAPE stands a marker that the raw text itself contains.
MARKERS = TITLE, ALLCAPS, CAP, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"

# These are the Latin, Greek, Cyrillic and Armenian blocks. Unicode 7 knew all capitals in them, and a pair of letters
# never changes once both exist. So Python's own tables say the same here in every version. Letters of other blocks stay
# as they are.
BLOCKS = (0x41, 0x24F), (0x370, 0x556), (0x1E00, 0x1FFF)


def small_letters() -> dict[str, str]:
    """Return the small letter of each capital that takes part.

    A capital takes part if its small letter is one character that has it for capital. That leaves out title-case
    digraphs, the Turkish dotted capital I and the capital sharp s, among others.
    """
    capitals = (chr(code) for first, last in BLOCKS for code in range(first, last + 1))
    return {c: c.lower() for c in capitals if c.lower() != c and len(c.lower()) == 1 and c.lower().upper() == c}


SMALL = small_letters()
TO_SMALL = str.maketrans(SMALL)
TO_CAPITAL = str.maketrans({small: capital for capital, small in SMALL.items()})

_capital, _small = f"[{''.join(SMALL)}]", f"[{''.join(SMALL.values())}]"
_marker = f"[{''.join(MARKERS)}]"
CAPITALS = re.compile(f"({_capital}+)({_small}?)|{_marker}")
MARKED = re.compile(f"{ESCAPE}(.)|([{TITLE}{CAP}] ?)({_small})|({ALLCAPS} ?)({_small}+)|{_marker}", re.DOTALL)
PUBLISHED = re.compile(f"{ESCAPE}(.)|([{TITLE}{CAP}])([a-z])|({ALLCAPS})([a-z]+)|{_marker}", re.DOTALL)
_unequal = (small for capital, small in SMALL.items() if len(small.encode()) != len(capital.encode()))
UNEQUAL = re.compile(f"[{ESCAPE}{''.join(_unequal)}]")  # may stand for other bytes than its own


# ----- the transform and its inverse


def mark(match: re.Match) -> str:
    """Return what transform() writes for a run of capitals with the small letter after it, or for a raw marker."""
    capitals, small = match.groups()
    if capitals is None:
        return ESCAPE + match[0]
    capitals = capitals.translate(TO_SMALL)
    if small:
        before, title = capitals[:-1], TITLE + capitals[-1] + small
    else:
        before, title = capitals, ""
    return (ALLCAPS if len(before) > 1 else CAP if before else "") + before + title


def transform(text: str) -> str:
    """Return `text` with its capitals written as small letters behind markers."""
    text = CAPITALS.sub(mark, text)
    for marker in (TITLE, ALLCAPS, CAP):  # in front of a raw marker stands ESCAPE, not a space
        text = text.replace(" " + marker, marker + " ")
    return text


def unmark(match: re.Match) -> str:
    """Return what restore() writes for a marker and its letters. A marker that has no letters becomes nothing."""
    escaped, one, letter, all_, letters = match.groups()
    if escaped:
        return escaped
    if letter or letters:
        return (one or all_)[1:] + (letter or letters).translate(TO_CAPITAL)
    return ""


def restore(text: str, strict: bool = True, rule: re.Pattern = MARKED) -> str:
    """Return the text from which transform() made `text`.

    Raise ValueError if there is no such text, which can happen with the samples of a model. With strict=False the
    function instead drops markers that have no meaning, and keeps capitals that have no marker. It then also takes the
    `rule` PUBLISHED, for text of the published data.
    """
    raw = rule.sub(unmark, text)
    if strict and (again := transform(raw)) != text:
        place = next((i for i, (a, b) in enumerate(zip(again, text)) if a != b), min(len(again), len(text)))
        raise ValueError(f"not a transformed text: character {place}, near {text[max(0, place - 10) : place + 10]!r}")
    return raw


# ----- bytes


def utf8_lengths(text: str) -> np.ndarray:
    """Return the number of UTF-8 bytes of each character, as an int64 array of shape (characters,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def restored_bytes(transformed: str, rule: re.Pattern = MARKED) -> np.ndarray:
    """Return the UTF-8 bytes of raw text that each character of the `transformed` text stands for.

    The result is an int64 array of shape (characters,). Its sum is the bytes of restore(transformed, False, rule). A
    marker stands for no bytes. A small letter behind one stands for its capital, which may have more or fewer bytes.
    """
    codes = np.frombuffer(transformed.encode("utf-32-le"), "<u4")
    result = utf8_lengths(transformed)
    result[(codes >= ord(MARKERS[0])) & (codes <= ord(MARKERS[-1]))] = 0
    if not UNEQUAL.search(transformed):
        return result
    for match in rule.finditer(transformed):
        if kept := match[1] or match[3] or match[5]:
            result[match.end() - len(kept) : match.end()] = utf8_lengths(match[1] or kept.translate(TO_CAPITAL))
    return result


def charges(processor: spm.SentencePieceProcessor, ids: list[int], rule: re.Pattern = MARKED) -> np.ndarray:
    """Return the bytes of raw text that each token of `ids` is charged, an int64 array of shape (n,).

    The charge of a character that is spelled in byte pieces is spread evenly over them; SentencePiece gives the whole
    character to the last one.
    """
    decoded = processor.decode(ids, return_type="offset_mapping", return_bytes=False)  # offsets in characters
    ends = np.fromiter((end for _, end in decoded["offsets"]), np.int64, len(ids))
    so_far = np.append(0, restored_bytes(decoded["text"], rule).cumsum())
    counts = np.diff(so_far[ends], prepend=0)
    where = np.flatnonzero(processor.is_byte(ids))
    if not len(where):
        return counts
    values = np.array([int(processor.id_to_piece(token)[3:5], 16) for token in np.array(ids)[where].tolist()])
    first = np.flatnonzero(values & 0xC0 != 0x80)  # not a continuation byte
    pieces = np.diff(first, append=len(where))
    total = np.repeat(np.add.reduceat(counts[where], first), pieces)
    place, pieces = np.arange(len(where)) - np.repeat(first, pieces), np.repeat(pieces, pieces)
    counts[where] = total * (place + 1) // pieces - total * place // pieces
    return counts


def token_bytes(processor: spm.SentencePieceProcessor, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the transformed `text`, and the bytes of raw text that each of them is charged.

    Both are uint16 arrays of shape (n,). They are empty if the tokenizer `processor` makes no token of the text. The
    tokenizer should have MARKERS as pieces. As without CaseOps, the tokens are charged for the text that they give
    back: the charges sum to the bytes of restore(processor.decode(ids), strict=False). That is `text` itself, unless
    the tokenizer normalizes, or `text` has a literal "▁", which becomes a space.
    """
    ids = processor.encode(transform(text))
    if not ids:
        return np.zeros(0, np.uint16), np.zeros(0, np.uint16)
    # SentencePiece refuses pieces that would not fit
    return np.array(ids, np.uint16), charges(processor, ids).astype(np.uint16)


# ----- pairs of a piece and a marker


NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that stand in no UTF-8 text, whose pieces no text needs


def is_text(processor: spm.SentencePieceProcessor, token: int) -> bool:
    """Return whether a token stands for text of its own: it is no control, unknown, unused or byte piece, no marker."""
    kinds = (processor.is_control, processor.is_unknown, processor.is_unused, processor.is_byte)
    return not any(kind(token) for kind in kinds) and processor.id_to_piece(token) not in MARKERS


def spare_ids(processor: spm.SentencePieceProcessor) -> list[int]:
    """Return the ids of the byte pieces of NEVER. Encoding gives them for no text at all."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in NEVER]
    return [token for token in ids if processor.is_byte(token)]


class Fusion:
    """Replaces pairs [piece, marker] of a tokenizer by single ids, and splits these ids again.

    `pairs` lists the id of each pair, its piece and its marker. The ids are spare ones, so that splitting gives back
    the very tokens that were fused, whatever the text. Pairs cannot overlap, because no marker is a piece of a pair.
    Without pairs nothing changes.
    """

    def __init__(self, processor: spm.SentencePieceProcessor, pairs: Iterable[tuple[int, int, int]] = ()) -> None:
        """Raise ValueError if `pairs` are not pairs of this tokenizer."""
        self.pairs, size = [tuple(pair) for pair in pairs], processor.vocab_size()
        ids, markers = spare_ids(processor), [processor.piece_to_id(marker) for marker in MARKERS]
        for pair in self.pairs:
            token, piece, marker = pair
            known = token in ids and 0 <= piece < size and is_text(processor, piece) and marker in markers
            if not known or processor.is_unknown(marker):
                raise ValueError(f"the pair of tokens {pair}: expected a byte piece that no text needs, a piece of "
                                 "text and a marker of CaseOps")
            ids.remove(token)
        table = np.array(sorted(self.pairs, key=lambda pair: pair[1:]), np.int64).reshape(-1, 3)
        self.ids, self.wholes = table[:, 0], self.whole(table[:, 1], table[:, 2])
        if len(set(self.wholes.tolist())) < len(self.pairs):
            raise ValueError("the pairs of tokens: the same pair is listed twice")
        self.first, self.second = np.full((2, size), -1)  # of each id that stands for a pair
        self.first[self.ids], self.second[self.ids] = table[:, 1], table[:, 2]

    @staticmethod
    def whole(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return one number for each pair of ids."""
        return (first << 16) + second

    @classmethod
    def choose(cls, processor: spm.SentencePieceProcessor, documents: Iterable[list[int]]) -> "Fusion":
        """Return the fusion that saves most tokens of `documents`, lists of ids, by as many pairs as there are ids.

        Raise ValueError if there is none.
        """
        counts: dict[int, int] = {}
        markers = [processor.piece_to_id(marker) for marker in MARKERS]
        for tokens in documents:
            tokens = np.array(tokens, np.int64)
            second = np.flatnonzero(np.isin(tokens[1:], markers)) + 1
            for pair in cls.whole(tokens[second - 1], tokens[second]).tolist():
                counts[pair] = counts.get(pair, 0) + 1
        usual = [pair for pair in counts if is_text(processor, pair >> 16)]
        usual.sort(key=lambda pair: (-counts[pair], pair))
        pairs = [(token, pair >> 16, pair & 0xFFFF) for token, pair in zip(spare_ids(processor), usual)]
        if not pairs:
            raise ValueError("no pair of a piece and a marker to fuse: the documents have none, or the tokenizer has "
                             "no byte pieces")
        return cls(processor, pairs)

    def fuse(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `tokens` with fused pairs, and the place of each result among `tokens`; int64 arrays."""
        tokens = tokens.astype(np.int64)
        if not self.pairs or not len(tokens):
            return tokens, np.arange(len(tokens))
        wholes = self.whole(tokens[:-1], tokens[1:])
        at = np.searchsorted(self.wholes, wholes).clip(max=len(self.wholes) - 1)
        found = np.flatnonzero(self.wholes[at] == wholes)
        tokens[found] = self.ids[at[found]]
        kept = np.ones(len(tokens), bool)
        kept[found + 1] = False
        return tokens[kept], np.flatnonzero(kept)

    def split(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `tokens` with pairs split again, and the place of each of `tokens` among the result; int64 arrays."""
        tokens = tokens.astype(np.int64)
        if not self.pairs:
            return tokens, np.arange(len(tokens))
        fused = self.first[tokens] >= 0
        ends = (1 + fused).cumsum()
        split = np.repeat(tokens, 1 + fused)
        split[ends[fused] - 2], split[ends[fused] - 1] = self.first[tokens[fused]], self.second[tokens[fused]]
        return split, ends - 1 - fused


def rule_of(processor: spm.SentencePieceProcessor, tokens: np.ndarray) -> re.Pattern:
    """Return the rule by which a CaseOps text was made, MARKED or PUBLISHED, from its `tokens`.

    They are an int64 array of shape (n,), with no pair fused. Where a marked word follows a space, one rule has it
    behind the marker and the other one before. The more frequent order decides: a text can have any order somewhere,
    because "\u2581" in it becomes a space.
    """
    ids = list(range(processor.vocab_size()))
    pieces = processor.id_to_piece(ids)
    before, behind = (np.array([found(piece, "▁") for piece in pieces]) for found in (str.endswith, str.startswith))
    marker = np.isin(pieces, (TITLE, ALLCAPS, CAP))
    last, this, following = tokens[:-2], tokens[1:-1], tokens[2:]
    spaced = marker[this] & ~np.array(processor.is_control(ids))[np.append(0, tokens)[:-3]]  # not the dummy space
    published = (spaced & before[last] & ~behind[following]).sum()
    return PUBLISHED if published > (marker[this] & behind[following]).sum() else MARKED
