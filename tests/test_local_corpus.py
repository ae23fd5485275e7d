"""data/local_corpus.py on small trees, and on the standard library of this interpreter."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import local_corpus
import pytest

TOOL = Path(local_corpus.__file__)


def prose(topic: str, sentences: int = 4) -> str:
    """English of about 90 chars a sentence that differs with `topic`."""
    return " ".join(
        f"The {topic} number {'abcdefghij'[i % 10]} is used by the caller when a value of the {topic} can be found."
        for i in range(sentences)
    )


def collected(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """Module -> all of its text, of a package called fake that has these files."""
    for name, source in files.items():
        path = folder / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        documents = local_corpus.collect(local_corpus.source_files("fake"))
    return {module: "".join(texts) for module, texts in documents.items()}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_takes_docstrings_and_long_literals_in_source_order(tmp_path):
    source = (
        f'"""{prose("module")}"""\n'
        f'add_docstring(f, """{prose("literal")}""")\n'
        "def f():\n"
        f'    """{prose("first")}\n\n        {prose("indented", 1)}\n\n    {prose("flush")}\n    """\n'
        '    raise ValueError("the message is short")\n'
        f'x = f"""{prose("interpolated")} {{x}} {prose("more")}"""\n'
    )
    text = collected(tmp_path, {"a.py": source})["fake/a.py"]
    indented = "    " + prose("indented", 1)
    assert text == "\n\n".join([prose("module"), prose("literal"), prose("first"), indented, prose("flush")])


def test_leaves_out_what_is_not_prose(tmp_path):
    rows = "\n".join(f"    {i}.25  {i * 7}.5  0x{i:04x} | -{i}" for i in range(60))
    sources = {
        "good.py": f'"""{prose("good")}"""',
        "table.py": f'"""{rows}"""',
        "base64.py": f'DATA = """{"QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo" * 20}"""',
        "code.py": 'T = """' + "static int f(int a) {\n    return g(a);\n}\n" * 20 + '"""',
        "marker.py": f'"""{prose("marker")} \u2581"""',
        "nul.py": f'"""{prose("nul")} \\0"""',
        "surrogate.py": f'"""{prose("surrogate")} \\ud800"""',
        "broken.py": f'"""{prose("broken")}"""\ndef (',
        "short.py": '"""The short one is not for use."""',
        "tests/test_good.py": f'"""{prose("tested")}"""',
        "notes.txt": prose("notes"),
    }
    assert list(collected(tmp_path, sources)) == ["fake/good.py"]


def test_doctest_blocks_go_and_the_prose_around_them_stays(tmp_path):
    source = f'"""{prose("before")}\n\n>>> print(1)\n1\n\n{prose("after")}"""'
    text = collected(tmp_path, {"a.py": source})["fake/a.py"]
    assert text == prose("before") + "\n\n" + prose("after")


def test_duplicates_stay_once(tmp_path):
    shared = prose("shared")
    sources = {
        "a.py": f'"""{prose("alone a")}\n\n{shared}"""',
        "b.py": f'"""{prose("alone b")}\n\n{shared.replace(" is", chr(10) + "    is")}"""',  # other white space
        "c.py": f'"""{prose("alone a")}\n\n{shared}"""',  # the docstring of a.py
    }
    texts = collected(tmp_path, sources)
    assert texts == {"fake/a.py": prose("alone a") + "\n\n" + shared, "fake/b.py": prose("alone b")}


def test_documents_are_cut_at_paragraph_ends():
    paragraphs = [f"paragraph {i} " + "x" * 50 for i in range(100)] + ["line\n" * 100, "y" * 700]
    found = list(local_corpus.pieces(paragraphs, limit=300))
    assert max(map(len, found)) <= 300
    assert "".join("".join(found).split()) == "".join("".join(paragraphs).split())
    assert all(piece.startswith("paragraph") for piece in found[:20])


def test_split_holds_out_whole_modules():
    documents = {f"m{i}": [f"{i} " + "text " * (20 + (i + j) % 7) for j in range(8)] for i in range(50)}
    train, val = local_corpus.split(documents)
    assert sorted(train + val) == sorted(text for texts in documents.values() for text in texts)
    assert all(set(texts) <= set(val) or set(texts) <= set(train) for texts in documents.values())
    assert 0.03 < sum(map(len, val)) / sum(map(len, train + val)) <= 0.05
    assert local_corpus.split(dict(reversed(documents.items()))) == (train, val)  # the order does not matter


def test_packages_are_found_but_not_imported():
    code = (
        "import sys, local_corpus; before = set(sys.modules); files = dict(local_corpus.source_files('sympy'));"
        "assert files['sympy/core/add.py'].exists(); assert not [name for name in files if '/tests/' in name];"
        "print(sorted(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "sympy" not in done.stdout
    with pytest.raises(ValueError, match="package nowhere_ is not installed; requirements.txt has it"):
        local_corpus.source_files("nowhere_")


def test_what_a_build_writes_is_left_out_and_what_stands_in_f_strings(tmp_path):
    sources = {"version.py": f'"""{prose("version")}"""', "__config__.py": f'"""{prose("config")}"""',
               "good.py": f'"""{prose("good")}"""\nx = f"{{f(\'{prose("inner")}\')}}"'}
    assert collected(tmp_path, sources) == {"fake/good.py": prose("good")}


def test_indentation_goes_as_far_as_all_lines_have_it():
    assert local_corpus.dedent("a\n    b\n      c\n\n    d\n    ") == "a\nb\n  c\n\nd"
    assert local_corpus.dedent("\n  a\n  b") == "a\nb" and local_corpus.dedent("  a") == "a"


def test_corpus_of_a_package_is_deterministic_and_honest(tmp_path):
    arguments = ("--packages", "networkx", "--out")
    for seed in ("1", "2"):
        done = run(*arguments, str(tmp_path / seed), PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        digest = hashlib.sha256()
        for name in ("docs_train.jsonl", "docs_val.jsonl"):
            digest.update((tmp_path / seed / name).read_bytes())
        assert len(lines) == 3 and lines[-1] == f"sha256 of both files: {digest.hexdigest()}"
        assert done.stderr == ""  # no progress bar when it is not a terminal
    for name in ("docs_train.jsonl", "docs_val.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "1")) == ["docs_train.jsonl", "docs_val.jsonl"]

    def read(name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (tmp_path / "1" / name).read_bytes().splitlines()]

    train, val = read("docs_train.jsonl"), read("docs_val.jsonl")
    texts = train + val
    assert all(200 <= len(text) <= 8_000 for text in texts)
    assert not any(bad in text for text in texts for bad in ("\0", "\u2581"))
    assert len({" ".join(text.split()) for text in texts}) == len(texts)
    in_train = {" ".join(p.split()) for text in train for p in text.split("\n\n") if len(p) > 200}
    in_val = {" ".join(p.split()) for text in val for p in text.split("\n\n") if len(p) > 200}
    assert in_val
    assert not in_train & in_val


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--packages", "iniconfig"), "too little prose in iniconfig"),
        (("--packages", "nowhere_"), "package nowhere_ is not installed"),
        (("--size", "100"), "unrecognized arguments: --size 100"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    done = run(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
