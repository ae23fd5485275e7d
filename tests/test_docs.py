"""What the pages say is what the code does: the table of settings, the messages, the links, the commands."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "records/README.md",
         *([ROOT / "benchmarks/README.md"] if (ROOT / "benchmarks/README.md").exists() else [])]


def test_the_table_of_settings_is_what_help_says():
    written = (ROOT / "docs/settings.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", written, re.M)
    fields = tg.Settings.__dataclass_fields__
    assert [row[0].lower() for row in rows] == [n for group in dict.fromkeys(
        f.metadata["group"] for f in fields.values()) for n in tg.Settings.group(group)]
    for name, kind, default, meaning in rows:
        f = fields[name.lower()]
        assert kind == tg.kind_of(f).__name__ and meaning.replace("&lt;", "<").startswith(f.metadata["help"]), name
        assert default == ("auto" if f.default is None else str(int(f.default) if kind == "bool" else f.default)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    assert not re.search(r"@[A-Z]+@", text)  # a figure still to come
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists() if path else anchor in headings, target


def test_messages_of_troubleshooting_are_the_scripts():
    """Each literal part of a quoted message stands in the source, f-string joints and line breaks aside."""
    names = ("audit", "gpu_check", "make_submission", "check_submission", "submission")
    scripts = [ROOT / "train_gpt.py", *(ROOT / f"records/{name}.py" for name in names),
               *sorted((ROOT / "data").glob("*.py"))]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in scripts))
    source = re.sub(r"\{[^{}\n]*(\{[^{}\n]*\}[^{}\n]*)*\}", "§", source)
    quoted = [q for row in re.findall(r"^\| (`.*?) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
              for q in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 25
    for message in quoted:
        parts = re.split(r"\.\.\.|\b[A-Z_]{4,}\b(?:=\w*)?|\b[NMK]\b|\b\d+\b|nan", message)
        parts = [part for p in parts if len(part := p.strip(" :,()?")) > 3]
        assert parts and all(part in source or known_value(part) for part in parts), (message, parts)


def test_every_fault_of_a_gpus_machine_is_in_troubleshooting():
    """All longer literal parts of what records/gpu_check.py can end with stand on the page."""
    page, parts = (ROOT / "docs/troubleshooting.md").read_text(), []
    for function in ast.parse((ROOT / "records/gpu_check.py").read_text()).body:
        for node in ast.walk(function):
            returned = isinstance(node, ast.Return) and function.name.endswith("_fault")
            if returned or isinstance(node, ast.Raise):
                texts = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                parts += [text.strip(" :;,()") for text in texts if len(text) > 12 and not text.startswith("usage")]
    assert len(parts) > 8
    assert [part for part in parts if part not in page] == []


def known_value(part: str) -> bool:
    """Parts that the script fills in: a system's message, a split's name, a kind of number."""
    return part in ("No space left on device", "no fineweb_train_*.bin there", "takes a whole number", "OVER by",
                    "has fineweb_val_bytes_*.bin", "has no pieces for CaseOps")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_files_in_commands_exist(page):
    """In code blocks: NAME=value before a command is a setting, and the script that is run is there."""
    known = {name.upper() for name in tg.Settings.__dataclass_fields__} | {"RECIPE", "NPROC", "PYTHON", "NAME"}
    known |= {a for f in tg.Settings.__dataclass_fields__.values() for a in f.metadata["aliases"]}
    for block in re.findall(r"```\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split(" #")[0].split() if not line.startswith(("#", " ")) else []
            for name in (m[1] for w in words if (m := re.match(r"([A-Z][A-Z_]+)=", w))):
                assert name in known, line
            for word in words:
                if re.fullmatch(r"(\./)?[\w/]+\.(sh|py)", word):
                    assert (ROOT / word).exists() or Path(word).name == word, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page):
    for name, test in re.findall(r"`(\w+\.py)::(\w+)`", page.read_text()):
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(), (name, test)


def test_the_page_on_changing_names_what_is_there():
    """Names of code, in all but its example; and the example is in no script, as the page says."""
    text = (ROOT / "docs/changing.md").read_text()
    source = "".join((ROOT / name).read_text() for name in ("train_gpt.py", "records/submission.py"))
    example, rest = text.split("## What a technique is made of")
    assert "not in the script" in example and "xsa_gated" not in tg.Settings.__dataclass_fields__
    names = re.findall(r"`([A-Z]\w+)\.(\w+)`", rest)
    assert len(names) > 8 and all(hasattr(getattr(tg, of), name) for of, name in names)
    words = re.findall(r"`(\w+)(?:\(\))?`", rest)
    assert len(words) > 30 and [word for word in words if not re.search(rf"\b{word.lower()}\b", source.lower())] == []
    assert f"`ARTIFACT_VERSION` is {tg.ARTIFACT_VERSION}." in rest


def test_rules_name_what_is_there():
    """Every audit check and line of the checker that docs/rules.md names exists, and no line is left out."""
    text = (ROOT / "docs/rules.md").read_text()
    checker = (ROOT / "records/check_submission.py").read_text()
    listed = checker[checker.index("CHECKS:") :]
    lines = set(re.findall(r"check_(\w+)", listed[: listed.index(")")]))
    parts = [(what, set(re.findall(r"`([a-z_]+)`", part)))
             for what, part in re.findall(r"(audit|checker): ([^;|.]*)", text)]
    assert set().union(*(names for what, names in parts if what == "checker")) == lines
    assert set().union(*(names for what, names in parts if what == "audit")) == {
        "bytes", "single_pass", "normalized", "causal", "no_overlap"}


def test_the_script_can_be_read():
    """Ruled sections of at most 400 lines that open with what comes in and goes out; functions of at most 60."""
    text = (ROOT / "train_gpt.py").read_text()
    _, *sections = re.split(r"^# -{118}\n", text, flags=re.M)
    assert len(sections) > 12
    titles = [section.partition("\n")[0].removeprefix("# ").lower() for section in sections]
    assert re.findall(r"^  (\S+(?: \S+)?)  ", text[: text.index("import ")], re.M) == titles
    for section in sections:
        opening = section.partition("\n\n")[0]
        assert re.fullmatch(r"# [A-Z][a-z ]+\n#\n# In: .+ Out: .+\.", opening, re.S), opening
        assert section.count("\n") + 1 <= 400, section[:30]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    assert max(map(len, text.splitlines())) <= 120
