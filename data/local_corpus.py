#!/usr/bin/env python3
"""Make a corpus of English prose without a network, from the documentation inside the packages of requirements.txt.

Notable features:
- The text is the docstrings and the long prose literals in the source files of a few packages. None of the packages is
  imported or executed.
- Duplicate docstrings are dropped, and then duplicate paragraphs. So no validation text stands in the training text.
- Each source module is either in the training set or in the validation set.
- The same package versions give the same bytes on every machine. The result does not depend on Python, the platform,
  the build of PyTorch, the order of the file system or the hash seed. The SHA-256 of the text is printed to compare.

    python data/local_corpus.py                   # -> data/local/docs_train.jsonl, data/local/docs_val.jsonl
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import shards
from tqdm import tqdm

PACKAGES = ("networkx", "numpy", "scipy", "sympy")  # pure source in every wheel of a version; torch's builds differ
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "_vendor"}
SKIPPED_FILES = {"__config__.py", "version.py", "_distributor_init.py"}  # written by a package's build
VAL_PERCENT = 5  # of the bytes
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


# ----- reading sources


def source_files(package: str) -> list[tuple[str, Path]]:
    """Return the names ("numpy/lib/foo.py") and paths of a package's .py files in order, without tests and copies.

    The package is found without importing it. Raise ValueError if it is not installed.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed; requirements.txt has it")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = {path.relative_to(root): path for path in root.rglob("*.py") if path.name not in SKIPPED_FILES}
    return sorted((f"{package}/{name.as_posix()}", path) for name, path in found.items()
                  if SKIPPED_FOLDERS.isdisjoint(name.parts))


def dedent(text: str) -> str:
    """Return a docstring without the indentation of its later lines and without blank lines at its ends.

    inspect.cleandoc() does the same, but in ways that differ between versions of Python.
    """
    first, *rest = text.expandtabs().split("\n")
    indent = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.lstrip(" "), *(line[indent:] for line in rest)]).strip("\n")


def literals(source: bytes) -> Iterator[str]:
    """Yield the docstrings and other long string literals of Python `source`, dedented and in order.

    A source that does not parse (a template, or for another Python version) yields nothing.
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
    """Say whether the everyday words of English are as frequent in `text` as in documentation."""
    words = text.lower().split()
    return sum(word in ENGLISH for word in words) >= MIN_ENGLISH_SHARE * len(words)


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph is mostly letters and blanks, and not a doctest, code, a table or encoded data.

    The underlines of headings do not count.
    """
    if ">>>" in paragraph or "{{" in paragraph or CODE_LINE_END.search(paragraph):
        return False
    words = UNDERLINE.sub("", paragraph).split()
    if not words:
        return False
    letters = sum(map(str.isalpha, "".join(words)))
    length = len(" ".join(words))
    return letters + len(words) - 1 >= MIN_PROSE_SHARE * length and length <= MAX_WORD_CHARS * len(words)


def is_new(text: str, seen: set[str]) -> bool:
    """Say whether `text` is not in `seen`, whatever its white space. From then on it is in `seen`."""
    squeezed = " ".join(text.split())
    new = squeezed not in seen
    seen.add(squeezed)
    return new


def new_prose(text: str, docstrings: set[str], paragraphs: set[str]) -> list[str]:
    """Return the prose paragraphs of a docstring `text` that are new, or none if too little is left.

    `docstrings` and `paragraphs` are all those that were seen before.
    """
    if not is_english(text) or not is_new(text, docstrings):
        return []
    kept = []
    for paragraph in PARAGRAPH_END.split(text):
        short = len(" ".join(paragraph.split())) <= UNIQUE_PARAGRAPH_CHARS
        if is_prose(paragraph) and (short or is_new(paragraph, paragraphs)):
            kept.append(paragraph.rstrip())
    # Headings alone ("Parameters", "See Also") are what duplicates leave behind.
    return kept if sum(map(len, kept)) >= MIN_DOCSTRING_CHARS else []


def pieces(paragraphs: Iterable[str], limit: int = DOCUMENT_CHARS) -> Iterator[str]:
    """Join `paragraphs` by blank lines, and yield texts of at most `limit` characters, cut at paragraph ends.

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


def fingerprint(text: str) -> bytes:
    """Return a hash of `text` that is the same in every run."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def collect(files: list[tuple[str, Path]]) -> dict[str, list[str]]:
    """Return the documents of each of the named source `files`. Each document is prose of one module."""
    docstrings, paragraphs, documents = set(), set(), defaultdict(list)
    for module, path in tqdm(files, desc="reading sources", unit=" files", disable=None):
        kept = [part for text in literals(path.read_bytes()) for part in new_prose(text, docstrings, paragraphs)]
        for text in pieces(kept):
            if len(text) >= MIN_DOCUMENT_CHARS:
                documents[module].append(text)
    return documents


def split(documents: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Return the texts of training and of validation.

    Validation has whole modules and at most VAL_PERCENT of the bytes. Modules are taken in the order of their hash.
    Those that are too large for what is left are passed over.
    """
    sizes = {module: sum(len(text.encode()) for text in texts) for module, texts in documents.items()}
    left = sum(sizes.values()) * VAL_PERCENT / 100
    train, val = [], []
    for module in sorted(sizes, key=fingerprint):
        if sizes[module] <= left:
            val += documents[module]
            left -= sizes[module]
        else:
            train += documents[module]
    return train, val


def build(args: argparse.Namespace) -> None:
    """Make the corpus of the packages and write it. Raise ValueError if they have too little text."""
    train, val = split(collect([file for package in args.packages for file in source_files(package)]))
    if not train or not val:
        raise ValueError(f"too little prose in {', '.join(args.packages)}: {len(train) + len(val)} documents")
    args.out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for name, texts in (("docs_train.jsonl", train), ("docs_val.jsonl", val)):
        # The order is that of a hash: mixed like web text, because a short run reads only the first part of it.
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sorted(texts, key=fingerprint)]
        data = "".join(lines).encode()
        with shards.atomic_write(args.out / name) as file:
            file.write(data)
        digest.update(data)
        size = sum(len(text.encode()) for text in texts)
        print(f"{args.out / name}: {len(texts):,} documents, {size:,} bytes of text")
    print(f"sha256 of both files: {digest.hexdigest()}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = shards.Parser(description="Make a corpus from the documentation inside Python packages.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "local", metavar="DIR",
                        help="write the corpus into this folder (default: data/local)")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME",
                        help=f"read these packages (default: {' '.join(PACKAGES)})")
    return shards.run_tool(build, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
