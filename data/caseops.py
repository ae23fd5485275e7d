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

The rule divides a run of capitals into parts. If a small letter follows the run, the last capital is a part of its own,
together with the small letters. The other capitals of the run are one part. Each part gets one marker: TITLE for a
capital with small letters ("The", "iPhone"), ALLCAPS for two capitals or more ("NASA", the "HTTP" of "HTTPServer"), and
CAP for a single one ("I", "J. R.").
"""

import re

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


def restore(text: str, strict: bool = True) -> str:
    """Return the text from which transform() made `text`.

    Raise ValueError if there is no such text, which can happen with the samples of a model. With strict=False the
    function instead drops markers that have no meaning, and keeps capitals that have no marker.
    """
    raw = MARKED.sub(unmark, text)
    if strict and (again := transform(raw)) != text:
        place = next((i for i, (a, b) in enumerate(zip(again, text)) if a != b), min(len(again), len(text)))
        raise ValueError(f"not a transformed text: character {place}, near {text[max(0, place - 10) : place + 10]!r}")
    return raw


# ----- bytes


def utf8_lengths(text: str) -> np.ndarray:
    """Return the number of UTF-8 bytes of each character, as an int64 array of shape (characters,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def restored_bytes(transformed: str) -> np.ndarray:
    """Return the UTF-8 bytes of raw text that each character of the `transformed` text stands for.

    The result is an int64 array of shape (characters,). Its sum is the bytes of restore(transformed, strict=False). A
    marker stands for no bytes. A small letter behind one stands for its capital, which may have more or fewer bytes.
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
    """Spread the charge of each character that is spelled in byte pieces evenly over these pieces.

    SentencePiece gives the whole character to the last of them. `ids` and `counts` are int64 arrays of shape (n,), and
    `counts` is changed in place.
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
    """Return the tokens of the transformed `text`, and the bytes of raw text that each of them is charged.

    Both are uint16 arrays of shape (n,). They are empty if the tokenizer `processor` makes no token of the text. The
    tokenizer should have MARKERS as pieces. As without CaseOps, the tokens are charged for the text that they give
    back: the charges sum to the bytes of restore(processor.decode(ids), strict=False). That is `text` itself, unless
    the tokenizer normalizes, or `text` has a literal "▁", which becomes a space.
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
