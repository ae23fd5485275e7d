"""The run scripts as a user calls them, with runs forked from the tests' server; and how they set themselves up, with
small packages of these tests' own in place of the real ones."""

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, read_result, run_script
from forked import stand_in


@pytest.fixture(scope="module")
def leaderboard(tmp_path_factory):
    """A function of settings and arguments that runs the script to its end."""
    python = stand_in(tmp_path_factory.mktemp("bin"))

    def call(settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([ROOT / "run_leaderboard_8xh100.sh", *arguments], capture_output=True, text=True,
                              timeout=900, **python | {"env": clean_environment(settings | python["env"])})

    return call


def test_leaderboard_run_checks_before_it_trains(leaderboard, tiny, tmp_path):
    empty = tiny | {"NPROC": "2", "DATA_PATH": str(tmp_path), "SEED": "42 0"}
    for settings, arguments, words in (
        (tiny, ["nonsense"], "error: nonsense: neither a recipe's folder nor a seed"),
        (tiny, [str(tmp_path)], f"error: {tmp_path}: no recipe.env in it"),
        (tiny | {"NPROC": "2", "NUM_HEADS": "7"}, ["1"], "error: NUM_HEADS=7"),
        (empty, [], f"error: {tmp_path}/fineweb_train_*.bin: no such file"),
        (tiny, ["1"], "error: no GPU here"),
    ):
        done = leaderboard(settings, *arguments)
        assert done.returncode == 1 and done.stderr.startswith(words) and done.stderr.count("\n") == 1, done.stderr


def test_leaderboard_run_trains_each_seed_and_reports_it(leaderboard, tiny):
    done = leaderboard(tiny | {"NPROC": "2", "ITERATIONS": "3", "EVAL_STRIDE": "0", "AUDIT": "0", "SEED": "91 92"})
    assert done.returncode == 0, done.stderr
    results = [read_result(ROOT / f"logs/defaults_seed{seed}") for seed in (91, 92)]
    assert [(r["seed"], r["world_size"], r["steps"]) for r in results] == [(91, 2, 3), (92, 2, 3)]
    assert done.stdout.count("after compression, reloaded") == 2


@pytest.mark.parametrize("does, status", [
    ("touch $2/audit.json", 0), ("touch $2/audit.json; exit 3", 3), ("touch $2/audit.json; exit 1", 3), ("exit 1", 1)])
def test_a_finished_run_is_audited_and_torchruns_status_is_not_the_verdict(tmp_path, does, status):
    """torchrun ends with 1 whatever its processes end with; a verdict that was written says that it is no failure."""
    start, old = program(tmp_path / "start", f"#!/bin/sh\n{does}\n"), time.time() - 60
    for name in ("marker", "audit.json", "result.json"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))

    def audit(**environ: str) -> int:
        line = f"source records/lib.sh; audit {tmp_path} {tmp_path}/marker {start}"
        return subprocess.run(["bash", "-c", line], cwd=ROOT, env=clean_environment(environ)).returncode

    assert audit(AUDIT="1") == 0  # the result is not newer than the marker: of an older run
    (tmp_path / "result.json").touch()
    assert audit(AUDIT="1") == status
    assert audit() == audit(AUDIT="0") == 0


def test_summary_of_no_run_is_one_line(tmp_path):
    done = run_script({}, str(tmp_path), script=ROOT / "records/summary.py")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/result.json") and done.stdout == ""


# Set-up. A project of two packages, `tiny` and what it needs, `below`; pip is real, its index a folder of wheels.

MAKING, INSTALLING = "making the virtual environment .venv\n", "installing requirements.txt\n"
BASE = sys._base_executable
START = """set -euo pipefail; source records/lib.sh; use_python requirements.txt
"$PYTHON" -c 'import tiny.late, below; print(tiny.version)'"""
# In every Python of a project: what pip meets when it writes the last module of `tiny`, after the package's metadata.
HOOK = """
import errno, os, pathlib, signal, sys, time
def meet(event, arguments, meets=os.environ.get("MEETS")):
    if meets and event == "open" and str(arguments[0]).endswith("tiny/late.py") and "w" in (arguments[1] or ""):
        if meets == "kill pip":
            os.kill(os.getpid(), signal.SIGKILL)
        if meets == "kill all":
            os.killpg(0, signal.SIGKILL)
        if meets == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        pathlib.Path(meets, "reached").touch()
        for _ in range(30_000):
            if pathlib.Path(meets, "go").exists():
                return
            time.sleep(0.01)
        raise OSError("nobody said go")
sys.addaudithook(meet)
"""
# The `python3` of a project links the tests' pip into what it makes: ensurepip takes seconds.
PYTHON3 = """#!/bin/sh
[ "$2" = venv ] || exec "{base}" "$@"
"{base}" "$@" --without-pip && ln -s "{pip}"/pip "{pip}"/pip-*.dist-info .venv/lib/python3*/site-packages
"""
# An interpreter that says it is of an older version.
OLD_PYTHON = """#!/bin/sh
[ "$1" != -c ] || exec "{base}" "$@"
exec "{base}" -c 'import runpy, sys
sys.version_info, sys.version, sys.argv = (3, 9, 1), "3.9.1", sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
"""


def program(path: Path, text: str) -> Path:
    path.unlink(missing_ok=True)
    path.write_text(text.replace("{base}", BASE))
    path.chmod(0o755)
    return path


def write_wheel(folder: Path, name: str, version: str, metadata: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    files = {  # in the order in which pip writes them
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}/__init__.py": f"version = {version!r}\n",
        f"{name}/late.py": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


class Project:
    """A folder with the run scripts' set-up in it. What is beside it: wheels, python3, the hook."""

    def __init__(self, folder: Path):
        self.folder = folder / "a project"  # every path of it has a blank
        self.venv, self.beside = self.folder / ".venv", folder / "beside"

    def environment(self, **settings: str) -> dict[str, str]:
        return {"PATH": f"{self.beside}/bin:{os.environ['PATH']}", "HOME": str(self.beside), "PIP_NO_INDEX": "1",
                "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(self.beside), "PYTHONPATH": str(self.beside)
                } | settings

    def popen(self, **settings: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", "-c", START], cwd=self.folder, env=self.environment(**settings), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def start(self, **settings: str) -> tuple[int, str, str]:
        process = self.popen(**settings)
        out, err = process.communicate(timeout=300)
        if process.returncode == -signal.SIGKILL:  # its pip was killed with it, and locks until it has died
            folder = os.open(self.venv, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
            os.close(folder)
        return process.returncode, out, err

    def refusal(self, **settings: str) -> str:
        """The one line of a start that cannot be."""
        status, out, err = self.start(**settings)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        return err[len("error: "):-1]

    def site(self, venv: Path | None = None) -> Path:
        return next((venv or self.venv).glob("lib/python3*/site-packages"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, tuple[int, str, str]]:
    """A project that was started once, and what that start printed."""
    project = Project(tmp_path_factory.mktemp("prepared"))
    (project.folder / "records").mkdir(parents=True)
    for name in ("lib.sh", "check_env.py"):
        shutil.copy(ROOT / "records" / name, project.folder / "records")
    (project.folder / "requirements.txt").write_text("# pins\ntiny==1.0\n")
    (project.beside / "bin").mkdir(parents=True)
    pip = Path(pytest.importorskip("pip").__file__).parents[1]
    program(project.beside / "bin/python3", PYTHON3.replace("{pip}", str(pip)))
    program(project.beside / "bin/nvidia-smi", "#!/bin/sh\nexit 1\n")
    (project.beside / "sitecustomize.py").write_text(HOOK)
    write_wheel(project.beside, "tiny", "1.0", "Requires-Dist: below\n")
    write_wheel(project.beside, "tiny", "2.0", "Requires-Dist: below\n")
    write_wheel(project.beside, "below", "1.0")
    return project.folder.parent, project.start()


@pytest.fixture
def project(prepared, tmp_path) -> Project:
    shutil.copytree(prepared[0], tmp_path / "p", symlinks=True)
    return Project(tmp_path / "p")


@pytest.fixture
def fresh(project) -> Project:
    shutil.rmtree(project.venv)
    return project


def test_set_up_happens_once(prepared, project):
    assert prepared[1] == (0, MAKING + INSTALLING + "1.0\n", "")
    assert project.start() == (0, "1.0\n", "")


def test_what_python_compiles_of_the_packages_is_kept(project):
    """pip is told not to compile them."""
    compiled = project.site() / "tiny/__pycache__"
    shutil.rmtree(compiled)
    assert project.start(PYTHONDONTWRITEBYTECODE="1") == (0, "1.0\n", "")
    assert len(list(compiled.iterdir())) == 2


@pytest.mark.parametrize("victim", ["pip", "all"])
def test_set_up_killed_inside_pip(fresh, victim):
    status, out, err = fresh.start(MEETS=f"kill {victim}")
    assert out == MAKING + INSTALLING
    if victim == "all":
        assert (status, err) == (-signal.SIGKILL, "")
    else:
        assert status == 1 and err.startswith("error: cannot install") and err.count("\n") == 1, err
    assert (fresh.site() / "tiny-1.0.dist-info/METADATA").exists()  # pip alone would take it for installed
    assert not (fresh.site() / "tiny/late.py").exists()
    assert fresh.start() == (0, INSTALLING + "1.0\n", "")


def test_mending_killed_inside_pip(project):
    """The names in site-packages are again those of the set-up that was whole."""
    folder_lost(project)
    project.start(MEETS="kill all")
    assert project.start() == (0, INSTALLING + "1.0\n", "")


def test_set_up_killed_before_there_was_an_interpreter(fresh):
    (fresh.venv / "lib").mkdir(parents=True)
    assert fresh.start() == (0, MAKING + INSTALLING + "1.0\n", "")


@pytest.mark.skipif(importlib.util.find_spec("ensurepip") is None, reason="this Python has no ensurepip")
def test_set_up_killed_while_pip_came_into_the_environment(fresh):
    subprocess.run([BASE, "-m", "venv", "--without-pip", fresh.venv], check=True)
    (fresh.site() / "pip-1.0.dist-info").mkdir()
    (fresh.site() / "pip-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 1.0\n")
    (fresh.site() / "pip").mkdir()
    (fresh.site() / "pip/__init__.py").touch()
    assert fresh.start() == (0, INSTALLING + "1.0\n", "")


def lose_interpreter(project: Project) -> None:
    (project.venv / "bin/python").unlink()
    (project.venv / "bin/python").symlink_to("/nonexistent/python3.11")


def lose_version(project: Project) -> None:
    """The interpreter under the same path is of another version since the system's upgrade."""
    project.site().parent.rename(project.venv / "lib/python3.9")


def be_old(project: Project) -> None:
    program(project.venv / "bin/python", OLD_PYTHON)


def lose_configuration(project: Project) -> None:
    (project.venv / "pyvenv.cfg").unlink()  # pip would install into the system


@pytest.mark.parametrize("lose", [lose_interpreter, lose_version])
def test_environment_of_which_nothing_works_is_made_again(project, lose):
    lose(project)
    assert project.start(VIRTUAL_ENV=str(project.venv)) == (0, MAKING + INSTALLING + "1.0\n", "")  # activated
    assert not (project.venv / "lib/python3.9").exists()


@pytest.mark.parametrize("lose", [be_old, lose_configuration])
def test_environment_that_works_is_not_deleted(project, lose):
    lose(project)
    found = sorted(project.venv.rglob("*"))
    assert project.refusal().endswith("; remove it (rm -r .venv) and start again")
    assert sorted(project.venv.rglob("*")) == found


@pytest.mark.parametrize("lose", [lose_interpreter, lose_version, be_old, lose_configuration])
def test_environment_of_the_user_is_never_deleted(project, lose):
    lose(project)
    project.venv = project.venv.rename(project.folder / "the user's")
    found = sorted(project.venv.rglob("*"))
    assert project.refusal(VIRTUAL_ENV=str(project.venv)).endswith(
        "; make that environment again, or unset VIRTUAL_ENV to have .venv made")
    assert sorted(project.venv.rglob("*")) == found and not (project.folder / ".venv").exists()


def test_environment_of_the_user_gets_the_packages(project):
    theirs = project.venv.rename(project.folder / "the user's")
    shutil.rmtree(project.site(theirs) / "below")
    assert project.start(VIRTUAL_ENV=str(theirs)) == (0, INSTALLING + "1.0\n", "")
    assert not project.venv.exists()
    assert project.refusal(VIRTUAL_ENV="/nonexistent") == (
        "VIRTUAL_ENV=/nonexistent: no such folder; unset VIRTUAL_ENV to have .venv made")


def test_no_environment_can_be_made(fresh):
    fresh.venv.write_text("not a folder")
    assert fresh.refusal().endswith("remove what stands there (rm -r .venv) and start again")
    fresh.venv.unlink()
    program(fresh.beside / "bin/python3", "#!/bin/sh\nexit 1\n")
    assert fresh.refusal().endswith("a newer one can make .venv: python3.12 -m venv .venv")
    program(fresh.beside / "bin/python3", "#!/bin/sh\n[ $2 = venv ] || exit 0\necho no ensurepip\necho here\nexit 1\n")
    assert fresh.refusal() == "python3 -m venv .venv: no ensurepip here; mend that and start again"


def removed(project: Project) -> None:
    subprocess.run([project.venv / "bin/python", "-m", "pip", "uninstall", "-qy", "below"], check=True, timeout=300)


def another_version(project: Project) -> None:
    subprocess.run([project.venv / "bin/python", "-m", "pip", "install", "-q", "tiny==2.0"], check=True, timeout=300,
                   env=project.environment())


def folder_lost(project: Project) -> None:
    shutil.rmtree(project.site() / "tiny")  # pip alone would take it for installed


@pytest.mark.parametrize("change", [removed, another_version, folder_lost])
def test_changed_package_is_mended(project, change):
    change(project)
    assert project.start() == (0, INSTALLING + "1.0\n", "")
    assert project.start() == (0, "1.0\n", "")


def test_changed_requirements_are_installed(project):
    (project.folder / "requirements.txt").write_text("tiny==2.0\n")
    assert project.start() == (0, INSTALLING + "2.0\n", "")


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
@pytest.mark.parametrize("killed", [False, True])
def test_two_set_ups_at_once(fresh, tmp_path, killed):
    """The second waits for the first's pip, even if the first was killed and its pip goes on."""
    first = fresh.popen(MEETS=str(tmp_path))
    until = time.monotonic() + 300
    while not (tmp_path / "reached").exists():
        if time.monotonic() > until or first.poll() is not None:
            pytest.fail("the first set-up has not come to its package")
        time.sleep(0.01)
    if killed:
        first.kill()
    second = fresh.popen()
    waiting = second.stdout.readline()
    (tmp_path / "go").touch()
    assert waiting == "waiting for another set-up of .venv\n"
    out, err = second.communicate(timeout=300)
    assert (second.returncode, out, err) == (0, (INSTALLING if killed else "") + "1.0\n", "")
    out, err = first.communicate(timeout=300)
    assert (first.returncode, err) == (-signal.SIGKILL if killed else 0, "")


def test_pip_that_fails_leaves_nothing_that_is_trusted(fresh):
    advice = "; see that the network works and the disk has room, then start again"
    line = fresh.refusal(PIP_FIND_LINKS="/nonexistent")
    assert line.startswith("cannot install requirements.txt: Could not find a version that satisfies the requirement "
                           "tiny==1.0") and line.endswith(advice), line
    line = fresh.refusal(MEETS="full disk")
    assert "No space left on device" in line and line.endswith(advice), line
    assert fresh.start() == (0, INSTALLING + "1.0\n", "")


def test_interpreter_named_by_the_user(project):
    good = str(project.venv / "bin/python")
    old = program(project.beside / "old python", OLD_PYTHON)
    assert project.start(PYTHON=good) == (0, "1.0\n", "")
    for python, words in (
        ("no-such-python", "no such program"), (str(project.folder), "no such program"),
        (str(old), "is Python 3.9.1; 3.11 or newer is needed"),
        (BASE, f"has no tiny; '{BASE}' -m pip install -r requirements.txt"),
    ):
        assert project.refusal(PYTHON=python) == f"PYTHON={python}: {words}"
    shutil.rmtree(project.site() / "below")
    assert project.start(PYTHON=good)[0] == 1  # as it is: nothing was installed


# Files that went through an editor, or through Git for Windows

RECIPE_FORMS = [
    "NUM_LAYERS=5", "NUM_LAYERS=5\n", "NUM_LAYERS=5\r\n", "\ufeffNUM_LAYERS=5\n", "export NUM_LAYERS=5\n",
    "NUM_LAYERS = 5\n", "\t NUM_LAYERS=5  # five\n", "NUM_LAYERS='5'\r\n", 'NUM_LAYERS="5" # five\n',
    "\ufeff# a comment\r\n\r\nNUM_LAYERS=5\r\n", "  export  NUM_LAYERS = '5'\t#five\r\n",
    "   # NUM_LAYERS=4\n   \nNUM_LAYERS=5#five\n",
]


def read_recipe(folder: Path, text: str, name: str = "NUM_LAYERS", **environ) -> subprocess.CompletedProcess:
    (folder / "recipe.env").write_bytes(text.encode())
    code = f'set -euo pipefail; source records/lib.sh; use_recipe "$1"; printf %s "${{{name}-none}}"'
    return subprocess.run(["bash", "-c", code, "bash", str(folder)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=clean_environment(
                              {"SETTINGS_NAMES": " A_NAME, ANOTHER, A_THIRD,", "PYTHON": "none"} | environ))


@pytest.mark.parametrize("text", RECIPE_FORMS)
def test_forms_of_a_recipe(tmp_path, text):
    done = read_recipe(tmp_path, text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5", "")


def test_values_of_a_recipe(tmp_path):
    for written, value in (("", ""), ("a b", "a b"), ("'a # b '", "a # b "), ('"it\'s"', "it's"), ("a=b", "a=b")):
        done = read_recipe(tmp_path, f"DATA_PATH={written}\n", "DATA_PATH")
        assert (done.returncode, done.stdout, done.stderr) == (0, value, "")


def test_what_the_caller_says_by_any_name_goes_before_the_recipe(tmp_path):
    for said in ("A_NAME", "ANOTHER", "A_THIRD", "A_NAM", "THIRD"):
        for written in ("A_NAME", "ANOTHER", "A_THIRD"):
            done = read_recipe(tmp_path, f"{written}=recipe", written, **{said: "caller"})
            answer = "caller" if said == written else "none" if said in ("A_NAME", "ANOTHER", "A_THIRD") else "recipe"
            assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")


def test_line_of_a_recipe_that_is_no_setting(tmp_path):
    for line in ("NUM_LAYERS", "NUM-LAYERS=5", "NUM_LAYERS='5", 'NUM_LAYERS="5" 6', "=5", "set NUM_LAYERS=5"):
        done = read_recipe(tmp_path, f"# first\n{line}\r\n")
        words = f"error: {tmp_path}/recipe.env, line 2: expected NAME=VALUE, found {line}\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", words)


def test_clone_by_git_for_windows(tmp_path):
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main")
        return subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True,
                              timeout=300).stdout

    names = ["run.sh", "a.py", "recipe.env", "a.txt", "a.md", "a.json", "a.tsv", ".ci/run", "LICENSE"]
    exact = ["a.png", "a.ptz", "a.bin", "a.model", "records/track_x/y/train_gpt.py"]
    texts = dict.fromkeys(names, b"one\ntwo\n") | dict.fromkeys(exact, b"\r\n \n")
    git("init", "-q", "here")
    shutil.copy(ROOT / ".gitattributes", tmp_path / "here")
    for name, data in texts.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(data)
    git("-C", "here", "add", ".")
    git("-C", "here", "commit", "-qm", "all")
    git("clone", "-q", "-c", "core.autocrlf=true", "here", "there")
    assert {name: (tmp_path / "there" / name).read_bytes() for name in texts} == texts
    assert git("-C", "there", "status", "--short") == ""


@pytest.mark.parametrize(("environ", "command"), [
    ({"ITERATONS": "3"}, ["benchmarks/ttt.py"]), ({}, ["benchmarks/ttt.py", "--step", "0"]),
    ({}, ["records/compare_recipes.py", "--jobs", "0"]),
    ({}, ["benchmarks/gpu.py", "--json", "/nowhere/figures.json"]),
    ({}, ["benchmarks/plan.py", "--json", "/nowhere/figures.json"]),
    ({}, ["benchmarks/ttt.py", "--json", "/nowhere/figures.json"]),
    ({}, ["benchmarks/bytes.py", "run", "--json", "/nowhere/figures.json"]),
    ({}, ["benchmarks/codegen.py", "--json", "/nowhere/figures.json"]),
    ({}, ["benchmarks/count.py", "--measured", "records/smoke.json"])])
def test_what_a_tool_does_not_take_is_told_in_a_line(environ, command):
    done = run_script(environ, *command[1:], script=ROOT / command[0], cwd=ROOT)
    assert done.returncode in (1, 2) and "error: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
