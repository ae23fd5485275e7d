"""Answer the questions that the set-up in lib.sh asks an interpreter about its packages; no package is imported.

    python check_env.py state               prints the names in the environment's site-packages, one a line
    python check_env.py lacking FILE ...    fails if a package that these requirements files pin is not installed
    python check_env.py mend FILE ...       removes packages that are not whole, so that pip installs them again
"""

from __future__ import annotations  # so that an old Python comes as far as to say that it is old

import csv
import re
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


def plain(name: str) -> str:
    """The one spelling to which all spellings of a package's name are reduced."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(files: list[str]) -> list[str]:
    """The names of the pinned packages, each once, without those that only some systems need ("; platform_system ...").
    """
    lines = "\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    return [*dict.fromkeys(plain(name) for name in re.findall(r"^([\w.-]+)==[^;\n]*$", lines, re.MULTILINE))]


def installed(name: str) -> bool:
    return any(metadata.Distribution.discover(name=name))


def state() -> None:
    if not Path(sys.executable).parents[1].samefile(sys.prefix):
        sys.exit("has its packages outside its environment")  # pyvenv.cfg is lost
    print(*sorted({path.name for path in SITE.iterdir()} - {"__pycache__"}), sep="\n")


def lacking(files: list[str]) -> None:
    names = [name for name in pinned(files) if not installed(name)]
    if names:
        sys.exit(f"has no {', '.join(names)}; '{sys.executable}' -m pip install -r {files[-1]}")


def needed(files: list[str]) -> set[str]:
    """pip, the pinned packages, and the packages that these depend on."""
    found, todo = set(), ["pip", *pinned(files)]
    while todo:
        name = todo.pop()
        if name not in found and installed(name):
            todo += [plain(re.match(r"[\w.-]+", line)[0]) for line in metadata.requires(name) or []]
        found.add(name)
    return found


def whole(folder: Path) -> bool:
    with open(folder / "RECORD", newline="", encoding="utf-8") as file:
        names = [row[0] for row in csv.reader(file) if row]
    return all((SITE / name).exists() for name in names if not name.startswith("..") and not name.endswith(".pyc"))


def mend(files: list[str]) -> None:
    """Remove what pip would wrongly take for installed. pip takes a package for installed if its metadata is there, and
    writes RECORD last: without RECORD the installation was interrupted.
    """
    for folder in SITE.glob("*.dist-info"):
        if not (folder / "RECORD").exists():
            shutil.rmtree(folder)
    ours = needed(files)
    for folder in SITE.glob("*.dist-info"):
        if plain(folder.name.split("-")[0]) in ours and not whole(folder):
            shutil.rmtree(folder)
    if not any(SITE.glob("pip-*.dist-info")):
        import ensurepip

        ensurepip.bootstrap(default_pip=True)


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        sys.exit(f"is Python {sys.version.split()[0]}; 3.11 or newer is needed")
    command, *files = sys.argv[1:]
    if command == "state":
        state()
    else:
        {"lacking": lacking, "mend": mend}[command](files)
