"""The run scripts as a user calls them, with the interpreter that runs the tests."""

import subprocess
import sys

from conftest import ROOT, clean_environment, read_result, run_script


def leaderboard(settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    environment = clean_environment(settings | {"PYTHON": sys.executable})
    return subprocess.run([ROOT / "run_leaderboard_8xh100.sh", *arguments], env=environment, capture_output=True,
                          text=True, timeout=300)


def test_leaderboard_run_checks_before_it_trains(tiny, tmp_path):
    empty = tiny | {"NPROC": "2", "DATA_PATH": str(tmp_path)}
    for settings, arguments, words in (
        (tiny, ["nonsense"], "error: nonsense: neither a recipe's folder nor a seed"),
        (tiny, [str(tmp_path)], f"error: {tmp_path}: no recipe.env in it"),
        (tiny | {"NPROC": "2", "NUM_HEADS": "7"}, ["1"], "error: NUM_HEADS=7"),
        (empty, ["1"], f"error: {tmp_path}/fineweb_train_*.bin: no such file"),
        (tiny, ["1"], "error: no GPU here"),
    ):
        done = leaderboard(settings, *arguments)
        assert done.returncode == 1 and done.stderr.startswith(words) and done.stderr.count("\n") == 1, done.stderr


def test_leaderboard_run_trains_each_seed_and_reports_it(tiny):
    done = leaderboard(tiny | {"NPROC": "2", "ITERATIONS": "3", "EVAL_STRIDE": "0"}, "91", "92")
    assert done.returncode == 0, done.stderr
    results = [read_result(ROOT / f"logs/defaults_seed{seed}") for seed in (91, 92)]
    assert [(r["seed"], r["world_size"], r["steps"]) for r in results] == [(91, 2, 3), (92, 2, 3)]
    assert done.stdout.count("after compression, reloaded") == 2


def test_summary_of_no_run_is_one_line(tmp_path):
    done = run_script({}, str(tmp_path), script=ROOT / "records/summary.py")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/result.json") and done.stdout == ""
