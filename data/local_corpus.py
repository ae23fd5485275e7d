#!/usr/bin/env python3
"""English prose with no network: the documentation inside the Python packages that requirements.txt pins.

Notable features:
- reads docstrings and long prose literals from the *source files* of a few packages; none of them is imported or
  executed
- drops duplicates first by docstring, then by paragraph, so that validation text does not stand in training text
- splits by source module: no module is in both sets
- the same package versions give the same bytes on every machine, whatever the Python, the platform, the build of
  PyTorch, the file system's order or the hash seed; the SHA-256 of the text is printed to compare

    python data/local_corpus.py                   # -> data/local/docs_train.jsonl, data/local/docs_val.jsonl
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards import atomic_write, one_line
from tqdm import tqdm

PACKAGES = ("networkx", "numpy", "scipy", "sympy")  # pure source in every wheel of a version; torch's builds differ
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "_vendor"}
SKIPPED_FILES = {"__config__.py", "version.py", "_distributor_init.py"}  # written by a package's build
DOCUMENT_CHARS = 8_000  # a document is cut at a paragraph end before it grows past this
MIN_DOCUMENT_CHARS = 200
MIN_LITERAL_CHARS = 200  # shorter literals that are not docstrings are messages, formats and keys
MIN_DOCSTRING_CHARS = 60
UNIQUE_PARAGRAPH_CHARS = 100  # longer paragraphs stand once in the corpus; shorter ones ("Returns") may repeat
MIN_PROSE_SHARE = 0.75  # letters and blanks among all characters of a paragraph
MAX_WORD_CHARS = 14  # on average over a paragraph
MIN_ENGLISH_SHARE = 0.1  # of these words among all words of a docstring or literal; code and data have fewer
ENGLISH = frozenset("a an and are as at be by can for from has if in into is it not of on or that the this to use used "
                    "when which will with you".split())
BAD_CHARS = re.compile("[\x00\u2581\ufffd\ud800-\udfff]")  # U+2581 is the space of SentencePiece
CODE_LINE_END = re.compile(r"[;{}][ \t]*$", re.MULTILINE)
UNDERLINE = re.compile(r"^[ \t]*([-=~^*#+.])\1+[ \t]*$", re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*?(?=[ \t]*\S)")


@dataclass(frozen=True)
class Document:
    """One document: the source `module` it came from ("numpy/lib/foo.py") and its `text`."""

    module: str
    text: str


# ----- reading sources


def find_roots(packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Folders of `packages`, found without importing them; ValueError where one is not installed."""
    roots = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"package {name} is not installed; requirements.txt has it")
        roots[name] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def source_files(root: Path) -> list[str]:
    """Relative POSIX paths of the .py files under `root`, sorted; tests and vendored copies are left out."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files
                  if name.endswith(".py") and name not in SKIPPED_FILES]
    return sorted(found)


def dedent(text: str) -> str:
    """A docstring without the indentation of its lines after the first, and without blank lines at its ends.

    inspect.cleandoc() does the same, in ways that differ between versions of Python.
    """
    first, *rest = text.expandtabs().split("\n")
    indent = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.lstrip(" "), *(line[indent:] for line in rest)]).strip("\n")


def literals(source: bytes) -> Iterator[str]:
    """Docstrings and other long string literals of Python `source`, dedented, in source order.

    A source that does not parse (a template, another Python version) yields nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    found: list[tuple[int, int, str]] = []
    shortest: dict[int, float] = {}  # by id of a string's node; MIN_LITERAL_CHARS where nothing else is said
    for node in ast.walk(tree):  # breadth first: a parent is seen before its children
        if isinstance(node, ast.JoinedStr):
            # pieces of an f-string are fragments, and what stands inside one has no place in older Pythons
            shortest.update((id(part), float("inf")) for part in ast.walk(node))
        elif isinstance(node, ast.Expr):
            shortest[id(node.value)] = MIN_DOCSTRING_CHARS  # a string that stands alone is documentation
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if len(node.value) >= shortest.get(id(node), MIN_LITERAL_CHARS) and not BAD_CHARS.search(node.value):
                found.append((node.lineno, node.col_offset, node.value))
    for _, _, text in sorted(found):
        yield dedent(text)


# ----- prose and duplicates


def is_english(text: str) -> bool:
    """Whether the everyday words of English are as frequent in `text` as in documentation."""
    words = text.lower().split()
    return sum(word in ENGLISH for word in words) >= MIN_ENGLISH_SHARE * len(words)


def is_prose(paragraph: str) -> bool:
    """Whether letters and blanks make up the paragraph: not a doctest, code, a table, or encoded data.

    Underlines of headings do not count against it.
    """
    if ">>>" in paragraph or "{{" in paragraph or CODE_LINE_END.search(paragraph):
        return False
    words = UNDERLINE.sub("", paragraph).split()
    if not words:
        return False
    letters = sum(map(str.isalpha, "".join(words)))
    length = len(" ".join(words))
    return letters + len(words) - 1 >= MIN_PROSE_SHARE * length and length <= MAX_WORD_CHARS * len(words)


def squeeze(text: str) -> str:
    """`text` with every run of whitespace as one space: equal for near-duplicates."""
    return " ".join(text.split())


def fingerprint(text: str) -> bytes:
    """16-byte hash of `text`, the same in every run."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_new(text: str, seen: set[bytes]) -> bool:
    """Whether `text`, modulo whitespace, is not among the fingerprints `seen`; it is from then on."""
    key = fingerprint(squeeze(text))
    new = key not in seen
    seen.add(key)
    return new


class Deduplicator:
    """Remembers every docstring and every long paragraph of the corpus; the first occurrence stays."""

    def __init__(self) -> None:
        self.docstrings: set[bytes] = set()
        self.paragraphs: set[bytes] = set()

    def clean(self, text: str) -> list[str]:
        """Prose paragraphs of `text` that stand nowhere before; empty if the whole was seen or little is left."""
        if not is_english(text) or not is_new(text, self.docstrings):
            return []
        kept = [
            paragraph.rstrip()
            for paragraph in PARAGRAPH_END.split(text)
            if is_prose(paragraph)
            and (len(squeeze(paragraph)) <= UNIQUE_PARAGRAPH_CHARS or is_new(paragraph, self.paragraphs))
        ]
        # Headings alone ("Parameters", "See Also") are what duplicates leave behind.
        return kept if sum(map(len, kept)) >= MIN_DOCSTRING_CHARS else []


def pieces(paragraphs: Iterable[str], limit: int = DOCUMENT_CHARS) -> Iterator[str]:
    """Join `paragraphs` by blank lines into texts of at most `limit` chars, cut at paragraph ends.

    A single paragraph over the limit is cut at a line end, or anywhere if it has none.
    """
    text = ""
    for paragraph in paragraphs:
        while len(paragraph) > limit:
            cut = paragraph.rfind("\n", 1, limit)
            cut = cut if cut > 0 else limit
            if text:
                yield text
            text, paragraph = paragraph[:cut], paragraph[cut:].lstrip("\n")
        if text and len(text) + 2 + len(paragraph) > limit:
            yield text
            text = ""
        text = f"{text}\n\n{paragraph}" if text else paragraph
    if text:
        yield text


# ----- corpus


def collect(roots: dict[str, Path]) -> list[Document]:
    """Documents of all sources under `roots` {label: folder}, shuffled by hash so that packages are mixed.

    Each is prose of one module, MIN_DOCUMENT_CHARS to DOCUMENT_CHARS chars long. A file that cannot be read raises
    OSError.
    """
    sources = [(label, root, path) for label, root in roots.items() for path in source_files(root)]
    deduplicator, documents = Deduplicator(), []
    for label, root, path in tqdm(sources, desc="reading sources", unit=" files", disable=None):
        paragraphs = [p for text in literals((root / path).read_bytes()) for p in deduplicator.clean(text)]
        for text in pieces(paragraphs):
            if len(text) >= MIN_DOCUMENT_CHARS:
                documents.append(Document(f"{label}/{path}", text))
    return sorted(documents, key=lambda document: fingerprint(f"{document.module}\n{document.text}"))


def split(documents: list[Document], val_percent: float) -> tuple[list[Document], list[Document]]:
    """(train, val), each in the given order; val holds whole modules, at most `val_percent` of the UTF-8 bytes.

    Modules are taken in the order of their hash, passing over those too large for what is left.
    """
    size: dict[str, int] = {}
    for document in documents:
        size[document.module] = size.get(document.module, 0) + len(document.text.encode())
    left = sum(size.values()) * val_percent / 100
    held_out = set()
    for module in sorted(size, key=fingerprint):
        if size[module] <= left:
            held_out.add(module)
            left -= size[module]
    train = [document for document in documents if document.module not in held_out]
    val = [document for document in documents if document.module in held_out]
    return train, val


def write_jsonl(path: Path, documents: list[Document]) -> bytes:
    """Write {"text": ...} lines to `path` atomically; returns what was written."""
    lines = b"".join(json.dumps({"text": document.text}, ensure_ascii=False).encode() + b"\n" for document in documents)
    with atomic_write(path) as file:
        file.write(lines)
    return lines


def build(out: Path, packages: Iterable[str], min_mb: float, val_percent: float) -> None:
    """Build the corpus and write it to `out`; ValueError if it has less than `min_mb` million bytes of text."""
    if not 0 < val_percent < 100:
        raise ValueError(f"--val-percent: expected between 0 and 100, found {val_percent}")
    roots = find_roots(packages)
    documents = collect(roots)
    total = sum(len(document.text.encode()) for document in documents)
    if total < min_mb * 1e6:
        raise ValueError(f"found {total / 1e6:.2f} MB of prose in {', '.join(roots)}; expected at least {min_mb} MB")
    train, val = split(documents, val_percent)
    if not train or not val:
        raise ValueError(f"{len(documents)} documents are too few for --val-percent {val_percent}")
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for name, part in (("docs_train.jsonl", train), ("docs_val.jsonl", val)):
        # in the order of a hash: mixed like web text, since a short run reads only the first part of it
        digest.update(write_jsonl(out / name, sorted(part, key=lambda document: fingerprint(document.text))))
        count = sum(len(document.text.encode()) for document in part)
        print(f"{name}: {len(part):,} documents, {count:,} bytes of text ({count / total:.1%})")
    print(f"total: {len(documents):,} documents, {total:,} bytes from {', '.join(roots)} -> {out}")
    print(f"sha256 of both files: {digest.hexdigest()}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build a corpus from the documentation inside Python packages.")
    default_out = Path(__file__).resolve().parent / "local"
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write to (default: data/local)")
    parser.add_argument("--packages", nargs="*", default=PACKAGES, metavar="NAME",
                        help=f"packages to read (default: {' '.join(PACKAGES)})")
    parser.add_argument("--min-mb", type=float, default=8, help="fail below this many million bytes (default: 8)")
    parser.add_argument("--val-percent", type=float, default=5, help="share of validation text (default: 5)")
    args = parser.parse_args(argv)
    try:
        build(args.out, args.packages, args.min_mb, args.val_percent)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
