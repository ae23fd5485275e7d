"""CaseOps: capitals become lower-case letters behind markers, without loss (PR 1729 of the challenge).

    The NASA probe, McDonald's iPhone  ->  ^the# nasa probe,^ mc^donald's i^phone    (^ is TITLE, # is ALLCAPS)

"The" and "the" share one piece of the tokenizer, which then spends its pieces on other things than case. Notable
features:
- MARKERS are four private-use characters; the tokenizer has them as reserved pieces (user_defined_symbols)
- a marker stands in front of the space before its word, so that " The" and " the" share the piece "▁the"
- restore(transform(text)) == text for every text, markers in the text included
- token_bytes() charges every token the UTF-8 bytes of the restored text it stands for: the sidecar of the score
- the letters that take part are the same in every version of Python, so that old data stays readable

One rule: of a run of capitals, those before the last are one part; the last one is a part with the small letters that
follow, or, if none follow, belongs to the former. A part gets one marker: TITLE for a capital and small letters ("The",
"iPhone"), ALLCAPS for two capitals or more ("NASA", the "HTTP" of "HTTPServer"), CAP for a single one ("I", "J. R.").
"""

import re

import numpy as np
import sentencepiece as spm

MARKERS = TITLE, ALLCAPS, CAP, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"  # ESCAPE: the next one is only itself

# Latin, Greek, Cyrillic, Armenian: blocks whose capitals were all known to Unicode 7. A pair of letters never changes
# once both exist, so Python's own tables say the same here in every version. Other letters with case stay as they are.
BLOCKS = (0x41, 0x24F), (0x370, 0x556), (0x1E00, 0x1FFF)


def small_letters() -> dict[str, str]:
    """Small letter of each capital that takes part: those whose small letter is one character and has it for capital.

    That leaves out, among others, title-case digraphs, the Turkish dotted capital I and the capital sharp s.
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
_unequal = (small for capital, small in SMALL.items() if len(small.encode()) != len(capital.encode()))
UNEQUAL = re.compile(f"[{ESCAPE}{''.join(_unequal)}]")  # may stand for other bytes than its own


# ----- the transform and its inverse


def mark(match: re.Match) -> str:
    """What transform() writes for a run of capitals and the small letter after it, or for a marker of the raw text."""
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
    """`text` with its capitals as marked small letters."""
    text = CAPITALS.sub(mark, text)
    for marker in (TITLE, ALLCAPS, CAP):  # a marker of the raw text has its ESCAPE in between
        text = text.replace(" " + marker, marker + " ")
    return text


def unmark(match: re.Match) -> str:
    """What restore() writes for a marker and the letters it applies to; nothing for one that applies to none."""
    escaped, one, letter, all_, letters = match.groups()
    if escaped:
        return escaped
    if letter or letters:
        return (one or all_)[1:] + (letter or letters).translate(TO_CAPITAL)
    return ""


def restore(text: str, strict: bool = True) -> str:
    """The text of which transform() made `text`.

    ValueError if there is none, as a model's samples may have it; with strict=False markers without a meaning are
    dropped instead, and capitals without a marker stay.
    """
    raw = MARKED.sub(unmark, text)
    if strict and (again := transform(raw)) != text:
        place = next((i for i, (a, b) in enumerate(zip(again, text)) if a != b), min(len(again), len(text)))
        raise ValueError(f"not a transformed text: character {place}, near {text[max(0, place - 10) : place + 10]!r}")
    return raw


# ----- bytes


def utf8_lengths(text: str) -> np.ndarray:
    """UTF-8 bytes of each character, (len(text),) int64."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def restored_bytes(transformed: str) -> np.ndarray:
    """UTF-8 bytes of the raw text that each character of the `transformed` text stands for, (characters,) int64.

    A marker stands for none, a small letter for its capital, which may be shorter or longer. Sums to the bytes of
    restore(transformed, strict=False).
    """
    codes = np.frombuffer(transformed.encode("utf-32-le"), "<u4")
    result = utf8_lengths(transformed)
    result[(codes >= ord(MARKERS[0])) & (codes <= ord(MARKERS[-1]))] = 0
    if not UNEQUAL.search(transformed):
        return result
    for match in MARKED.finditer(transformed):
        if kept := match[1] or match[3] or match[5]:
            result[match.end() - len(kept) : match.end()] = utf8_lengths(match[1] or kept.translate(TO_CAPITAL))
    return result


def share_byte_pieces(processor: spm.SentencePieceProcessor, ids: np.ndarray, counts: np.ndarray) -> None:
    """Spread what is charged to the last byte piece of a character evenly over all of its pieces, in place.

    `ids` and `counts` (n,) int64; SentencePiece gives the whole character to its last byte piece.
    """
    where = np.flatnonzero(processor.is_byte(ids.tolist()))
    if not len(where):
        return
    values = np.array([int(processor.id_to_piece(token)[3:5], 16) for token in ids[where].tolist()])  # "<0xE2>"
    first = np.flatnonzero(values & 0xC0 != 0x80)  # not a continuation byte
    pieces = np.diff(first, append=len(where))
    total = np.repeat(np.add.reduceat(counts[where], first), pieces)
    place, pieces = np.arange(len(where)) - np.repeat(first, pieces), np.repeat(pieces, pieces)
    counts[where] = total * (place + 1) // pieces - total * place // pieces


def token_bytes(processor: spm.SentencePieceProcessor, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the transformed `text` and the raw UTF-8 bytes that each is charged: ids (n,) and counts (n,), uint16.

    The tokenizer `processor` should have MARKERS as pieces. What is charged is the text that the tokens give back, as
    without CaseOps: counts sum to the bytes of restore(processor.decode(ids), strict=False). That is `text`, unless the
    tokenizer normalizes, or `text` has a literal "▁", which becomes a space. Of a character spelled in byte pieces
    each piece gets its share. A text of which the tokenizer leaves no token gives two empty arrays.
    """
    ids = np.array(processor.encode(transform(text)), np.int64)
    if not len(ids):
        return np.zeros(0, np.uint16), np.zeros(0, np.uint16)
    decoded = processor.decode(ids.tolist(), return_type="offset_mapping", return_bytes=False)  # offsets in characters
    ends = np.fromiter((end for _, end in decoded["offsets"]), np.int64, len(ids))
    so_far = np.append(0, restored_bytes(decoded["text"]).cumsum())
    counts = np.diff(so_far[ends], prepend=0)
    share_byte_pieces(processor, ids, counts)
    return ids.astype(np.uint16), counts.astype(np.uint16)  # SentencePiece refuses pieces that would not fit
