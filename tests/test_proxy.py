"""benchmarks/proxy.py: its statistics against formulas of their own, its runs with a script that pretends to train."""

import json
import math
import os
import sys
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import proxy
from shards import write_shard

import train_gpt as tg

# What "training" gives: a score that hangs on seed and settings, what a run leaves, and a line in a list of runs.
PRETENDER = '''
import json, os, sys, time
from pathlib import Path
env, folder = os.environ, Path(os.environ["ARTIFACT_DIR"])
seed, wd, budget = int(env["SEED"]), float(env["MUON_WD"]), int(env.get("ARTIFACT_BUDGET_BYTES", 16_000_000))
with open(env["LIST"], "a") as file:
    file.write(f"{seed} {wd}\\n")
(folder / "environ.json").write_text(json.dumps(dict(env)))
if wd == 9:
    sys.exit("Traceback of something\\nerror: no weight decay like that")
if wd == 8:
    time.sleep(60)
steps = [(1, 9.0), (11, 10.0), (21, 11.2), (31, 30.0)]  # 0.1, 0.12 and 1.88 s a step
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "seconds": s}) + "\\n" for n, s in steps))
score = {"val_bpb": 1 + seed / 100 + wd / 10 * (1 + seed / 10)}
stages = {"pre_quant": {"val_bpb": score["val_bpb"] - 0.01}, "quantized": score, "sliding": {"val_bpb": 0.9}}
size, fits = 1000 + int(1000 * wd), budget > 5000
print("" if fits else f"artifact: {size} bytes, budget {budget}: OVER by 1; lower NUM_LAYERS")
(folder / "result.json").write_text(json.dumps({
    "fits": fits, "val_bpb": 0.9, "stages": stages, "model_bytes": size, "bytes_total": size + 500, "tok_per_s": 1234.5,
    "eval_seconds": 2.25, "tokens_seen": int(env["ITERATIONS"]) * int(env["TRAIN_BATCH_TOKENS"]), "val_bytes": 99,
    "device": "cpu", "steps": 31, "train_seconds": 62.0}))
sys.exit(0 if fits else 2)
'''


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that gives main() a size S of 31 steps and these arguments, and tells which runs there were."""
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_shard(tmp_path / f"data/fineweb_{split}_000000.bin", np.arange(50, dtype=np.uint16))
    (tmp_path / "spm.model").write_bytes(b"pieces")
    (tmp_path / "train_gpt.py").write_text(PRETENDER)
    monkeypatch.setattr(proxy, "SCRIPT", tmp_path / "train_gpt.py")
    monkeypatch.setitem(proxy.SIZES, "S", {"ITERATIONS": "31", "TRAIN_BATCH_TOKENS": "2048", "MUON_WD": "0.0"})
    monkeypatch.setenv("LIST", str(tmp_path / "list"))

    def main(*arguments: str) -> tuple[int, list[str]]:
        (tmp_path / "list").write_text("")
        proxy.data_identity.cache_clear()  # as in a new process
        status = proxy.main(["S", *arguments, "--out", str(tmp_path / "runs"), "--data", str(tmp_path / "data"),
                             "--tokenizer", str(tmp_path / "spm.model")])
        return status, (tmp_path / "list").read_text().splitlines()

    return main


def rows(out: str) -> dict[str, list[str]]:
    """The table's cells by row."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


# ----- statistics


@pytest.mark.parametrize("differences", [(0.003, -0.001, 0.002), (-0.004, -0.003, -0.0035), (0.01, 0.02, -0.03)])
def test_t_and_p_of_three_pairs(differences):
    """With two degrees of freedom p = 1 - |t| / sqrt(2 + t²)."""
    base = {7: 1.7, 1: 1.5, 3: 1.9}
    found = proxy.compare(base, {seed: base[seed] + d for seed, d in zip((7, 1, 3), differences)})
    mean = sum(differences) / 3
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    t = mean / sd * math.sqrt(3)
    assert (found["mean"], found["sd"], found["t"]) == pytest.approx((mean, sd, t))
    assert found["p"] == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t)) and found["seeds"] == [1, 3, 7]


def test_p_of_five_pairs():
    """With four degrees of freedom p = 1 - sin a (1 + cos² a / 2), tan a = |t| / 2."""
    found = proxy.compare(dict.fromkeys(range(5), 2.0), dict(enumerate((2.01, 2.03, 1.99, 2.02, 2.02))))
    a = math.atan(abs(found["t"]) / 2)
    assert found["p"] == pytest.approx(1 - math.sin(a) * (1 + math.cos(a) ** 2 / 2))


def test_too_little_for_a_test():
    assert proxy.compare({1: 1.0}, {1: 1.5}) == {
        "seeds": [1], "mean": 0.5, "sd": None, "t": None, "p": None, "seeds_needed": None}
    assert proxy.compare({1: 1.0, 2: 3.0}, {1: 1.5, 2: 3.5}) == {
        "seeds": [1, 2], "mean": 0.5, "sd": 0.0, "t": None, "p": None, "seeds_needed": 2}  # no spread, no t
    assert proxy.compare({1: 1.0}, {2: 1.0})["mean"] is None
    json.dumps(proxy.compare({1: 1.0}, {2: 1.0}), allow_nan=False)


def power(n: int, effect: float) -> float:
    """Chance that a paired test with p < 0.01 finds an effect of so many deviations in n pairs: the normal tail, given
    the sample's deviation, integrated over that deviation's chi distribution; the critical t by bisection of the same.
    """
    nu = n - 1
    s = np.linspace(1e-6, 6, 60_001)  # sample deviation over the true one
    log_density = math.log(2) + nu / 2 * math.log(nu / 2) - math.lgamma(nu / 2) + (nu - 1) * np.log(s) - nu * s**2 / 2
    weights = np.exp(log_density) * (s[1] - s[0])

    def beyond(critical: float, shift: float) -> float:
        tail = [0.5 * math.erfc((critical * x - shift) / math.sqrt(2)) for x in s[::30].tolist()]
        return float(np.dot(np.interp(s, s[::30], tail), weights))

    low, high = 0.0, 700.0
    for _ in range(40):
        low, high = ((low + high) / 2, high) if beyond((low + high) / 2, 0.0) > 0.005 else (low, (low + high) / 2)
    return beyond(low, effect * math.sqrt(n))


@pytest.mark.parametrize("deviation", [0.0009, 0.002, 0.004, 0.007])
def test_seeds_needed_by_another_integral(deviation):
    n = proxy.seeds_needed(deviation)
    assert power(n, 0.002 / deviation) >= 0.8 > power(n - 1, 0.002 / deviation)


def test_seeds_needed_at_the_ends():
    assert proxy.seeds_needed(0.0) == proxy.seeds_needed(1e-7) == 2
    assert proxy.seeds_needed(1.0) is None
    needed = [proxy.seeds_needed(x) for x in (0.0005, 0.001, 0.002, 0.004, 0.02)]
    assert needed == sorted(needed)
    # for many seeds n is (z of 0.995 + z of 0.8)² (sd / effect)²
    assert needed[-1] == pytest.approx((2.5758 + 0.8416) ** 2 * 100, rel=0.005)


# ----- sizes


def test_s_is_the_smoke_run():
    expected = json.loads((ROOT / "records/smoke.json").read_text())["config"]
    cfg = tg.read_settings(proxy.SIZES["S"] | proxy.FIXED | {"SEED": str(expected["seed"])})[0]
    clocks = {"max_wallclock_seconds", "eval_budget_seconds"}
    unlike = {name for name, value in expected.items() if getattr(cfg, name) not in (value, None)}
    assert unlike == clocks and cfg.max_wallclock_seconds == cfg.eval_budget_seconds == 0
    assert {name for name in expected if getattr(cfg, name) is None} - {
        name for name, value in expected.items() if value is None} == {"micro_batch_tokens", "eval_batch_tokens"}


@pytest.mark.parametrize("size,tokens,shape", [("S", 1e6, (4, 128, 1024)), ("M", 3e6, (6, 256, 8192)),
                                               ("L", 295e6, (11, 512, 8192))])
def test_sizes_are_settings_of_the_script(size, tokens, shape):
    cfg = tg.read_settings(proxy.SIZES[size] | proxy.FIXED)[0]
    assert (cfg.num_layers, cfg.model_dim, cfg.vocab_size) == shape
    assert cfg.iterations * cfg.train_batch_tokens == pytest.approx(tokens, rel=0.01)


# ----- runs


def test_table_pairs_by_seed_and_json(pretend, tmp_path, capsys):
    status, runs = pretend("plain", "decay: MUON_WD=0.5", "--seeds", "5", "1", "2", "--json", str(tmp_path / "t.json"))
    out, err = capsys.readouterr()
    assert status == 0 and runs == ["5 0.0", "5 0.5", "1 0.0", "1 0.5", "2 0.0", "2 0.5"]
    table = rows(out)
    assert table["row"] == ["seeds", "pre_quant", "quantized", "final", "difference", "t", "p", "seeds for 0.002",
                            "model bytes", "ms a step", "tok/s", "eval s"]
    assert table["plain"] == ["3", "1.0167 ± 0.0208", "1.0267 ± 0.0208", "0.9000 ± 0.0000", "", "", "", "", "1,000",
                              "120", "1,234", "2.2"]
    # differences are 0.05 (1 + seed / 10): 0.055, 0.06, 0.075, with a deviation of 0.0104; unpaired it would be 0.04
    assert table["decay"][:7] == ["3", "1.0800 ± 0.0312", "1.0900 ± 0.0312", "0.9000 ± 0.0000", "+0.0633 ± 0.0104",
                                  "10.54", "0.0089"]
    assert "31 steps of 2048 tokens, seeds 5, 1, 2, on cpu; differences of quantized" in out
    assert "bytes differ by 50.0%" in out and "decay, seed 2: 1.0800" in err
    written = json.loads((tmp_path / "t.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["plain", "decay"]
    assert written["rows"][1]["difference"]["mean"] == pytest.approx(0.19 / 3)
    assert written["rows"][1]["runs"]["5"]["bytes_total"] == 2000 and written["failed"] == []
    assert (tmp_path / "train_gpt.py").read_bytes() == next(tmp_path.glob("runs/S_5_*/train_gpt.py")).read_bytes()


def test_stage_and_one_seed(pretend, capsys):
    assert pretend("plain", "decay: MUON_WD=0.5", "--seeds", "1", "--stage", "final")[0] == 0
    decay = rows(capsys.readouterr().out)["decay"]
    assert decay[:8] == ["1", "1.0550", "1.0650", "0.9000", "+0.0000", "", "", ""]


def test_a_second_command_runs_what_is_missing(pretend, tmp_path, capsys):
    both = ["plain", "decay: MUON_WD=0.5"]
    first = pretend(*both, "--seeds", "1", "2")
    table = rows(capsys.readouterr().out)
    assert len(first[1]) == 4
    assert pretend(*both, "--seeds", "1", "2") == (0, []) and rows(capsys.readouterr().out) == table
    assert pretend(*both, "other: MUON_WD=0.25", "again: MUON_WD=0.50", "--seeds", "1", "2", "3")[1] == [
        "1 0.25", "2 0.25", "3 0.0", "3 0.5", "3 0.25"]  # equal settings are one run, whatever the row is called
    next(tmp_path.glob("runs/S_1_*/result.json")).unlink()  # as if cut off
    assert len(pretend(*both, "--seeds", "1", "2")[1]) == 1
    assert len(pretend(*both, "--seeds", "1", "2", "--set", "BETA2=0.9")[1]) == 4
    assert pretend(*both, "--seeds", "1", "2") == (0, [])


@pytest.mark.parametrize("changed", ["train_gpt.py", "data/fineweb_train_000000.bin", "data/fineweb_val_000000.bin",
                                     "data/fineweb_val_bytes_000000.bin", "spm.model"])
def test_another_script_or_text_is_run_again(pretend, tmp_path, changed):
    assert len(pretend("plain", "--seeds", "1")[1]) == 1
    with open(tmp_path / changed, "ab") as file:
        file.write(b"#")
    assert len(pretend("plain", "--seeds", "1")[1]) == 1
    assert pretend("plain", "--seeds", "1") == (0, [])


def test_failed_runs_are_named_and_the_others_go_on(pretend, capsys):
    arguments = "plain", "bad: MUON_WD=9", "large: ARTIFACT_BUDGET_BYTES=100", "decay: MUON_WD=0.5", "--seeds", "1", "2"
    status, runs = pretend(*arguments)
    out, err = capsys.readouterr()
    assert status == 1 and len(runs) == 8
    *_, last = err.splitlines()
    assert last.startswith("error: failed: bad, seed 1: error: no weight decay like that (") and "Traceback" not in err
    assert "; large, seed 2: artifact: 1000 bytes, budget 100: OVER by 1; lower NUM_LAYERS (" in last
    table = rows(out)
    assert table["bad"] == table["large"] == ["0", *[""] * 11] and table["decay"][4] == "+0.0575 ± 0.0035"
    assert pretend(*arguments)[0] == 1  # again, and of those only
    assert "error: failed: bad, seed 1" in capsys.readouterr().err
    assert pretend("bad: MUON_WD=9", "decay: MUON_WD=0.5", "--seeds", "1")[0] == 1  # nothing to compare with
    assert rows(capsys.readouterr().out)["decay"][:5] == ["1", "1.0550", "1.0650", "0.9000", ""]


def test_tokens_that_differ_are_told(pretend, capsys):
    assert pretend("plain", "long: ITERATIONS=62", "--seeds", "1")[0] == 0
    assert "NOT COMPARABLE: training tokens differ" in capsys.readouterr().out


def test_the_callers_settings_do_not_count(pretend, tmp_path, monkeypatch):
    for name, value in {"NUM_LAYERS": "99", "MUON_EQR": "1", "WORLD_SIZE": "2", "EVAL_ONLY": "x", "KEPT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert pretend("plain: TIE_EMBEDDINGS=true EVAL_SEQ_LEN=auto", "--seeds", "4", "--set", "LR_FLOOR=0.2")[0] == 0
    environ = json.loads(next(tmp_path.glob("runs/S_4_*/environ.json")).read_text())
    assert environ.keys() & proxy.NAMES == {
        "ITERATIONS", "TRAIN_BATCH_TOKENS", "MUON_WD", "MAX_WALLCLOCK_SECONDS", "EVAL_BUDGET_SECONDS", "DEVICE", "SEED",
        "DATA_PATH", "TOKENIZER_PATH", "ARTIFACT_DIR", "TIE_EMBEDDINGS", "EVAL_SEQ_LEN", "MIN_LR"}
    assert "WORLD_SIZE" not in environ and environ["KEPT"] == "1" and environ["OMP_NUM_THREADS"] == "1"
    assert (environ["MIN_LR"], environ["TIE_EMBEDDINGS"], environ["DEVICE"]) == ("0.2", "1", "cpu")
    assert environ["DATA_PATH"] == str(tmp_path / "data")


@pytest.mark.parametrize("arguments,says", [
    (["plain", "x: SMEAR_GATE_ENABLD=1"], "row x: SMEAR_GATE_ENABLD=1: no such setting; did you mean"),
    (["plain", "x: CASTLES=1"], "row x: CASTLES: takes NAME=value with a setting of train_gpt.py"),
    (["plain", "x: SMEAR_GATE_ENABLED"], "row x: SMEAR_GATE_ENABLED"),
    (["plain", "x: SEED=3"], "row x: SEED: takes"),
    (["plain", "x: NUM_HEADS=7"], "row x: NUM_HEADS=7: takes a divisor of"),
    (["plain", "plain: BETA2=0.99"], "row plain: a row takes a name of its own"),
    (["plain", "--set", "BETA2=2"], "BETA2=2"),
    (["plain", "--jobs", "0"], "--jobs"),
    (["plain", "--device", "abacus"], "--device"),
])
def test_mistakes_end_before_anything_runs(pretend, capsys, arguments, says):
    assert pretend(*arguments) == (1, [])
    err = capsys.readouterr().err
    assert err.startswith(f"error: {says}" if says[0] != "-" else "error: ") and says in err and err.count("\n") == 1


def test_what_sizes_take(tmp_path, capsys):
    assert proxy.main(["M", "plain"]) == proxy.main(["S", "plain", "--data", "x"]) == 1
    assert proxy.main(["L", "plain", "--device", "cpu", "--data", "x", "--tokenizer", "y"]) == 1
    assert proxy.main(["S", "plain", "--data", str(tmp_path), "--tokenizer", "y"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: M takes --data and --tokenizer", "error: S takes --data and --tokenizer", "error: L needs a GPU",
        f"error: {tmp_path}: no shards there"]


def test_an_interrupt_ends_the_run_under_way(pretend, tmp_path, monkeypatch, capsys):
    started, real = [], proxy.start
    monkeypatch.setattr(proxy, "start", lambda *given: started.append(real(*given)) or started[-1])
    waits = count()

    def sleep(seconds: float) -> None:
        if next(waits):
            raise KeyboardInterrupt

    monkeypatch.setattr(proxy, "time", SimpleNamespace(sleep=sleep))
    assert pretend("plain: MUON_WD=8", "--seeds", "1", "2")[0] == 1
    assert [process.returncode for process in started] == [-15] and "error: interrupted" in capsys.readouterr().err


def test_local_text_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(proxy, "ROOT", tmp_path)
    done = [SimpleNamespace(returncode=0)] * 2 + [SimpleNamespace(returncode=1)]
    monkeypatch.setattr(proxy, "subprocess", SimpleNamespace(
        run=lambda command: made.append(os.path.basename(command[1])) or done[len(made) - 1]))
    paths = proxy.local_data("1024")
    smoke = (ROOT / "run_smoke_1gpu.sh").read_text()
    for path, template in zip(paths, ("data/datasets/$name", "data/tokenizers/local_${VOCAB_SIZE}_bpe.model")):
        template = template.replace("$name", "local_sp1024")
        assert path == tmp_path / template.replace("${VOCAB_SIZE}", "1024")
    assert 'name="local_sp$VOCAB_SIZE"' in smoke and made == ["local_corpus.py", "tokenize_docs.py"]
    (tmp_path / "data/local").mkdir(parents=True), paths[0].mkdir(parents=True)
    (tmp_path / "data/local/docs_val.jsonl").touch()
    assert proxy.local_data("1024") == paths and len(made) == 2
    paths[0].rmdir()
    with pytest.raises(ValueError, match="local_sp1024: could not be made"):
        proxy.local_data("1024")


def test_the_real_script(tiny, tmp_path, monkeypatch, capsys):
    settings = {name: value for name, value in tiny.items() if name not in proxy.OWN | {"DATA_PATH", "TOKENIZER_PATH"}}
    monkeypatch.setitem(proxy.SIZES, "S", settings | {"ITERATIONS": "4", "EVAL_STRIDE": "0", "WARMUP_STEPS": "0"})
    assert proxy.main(["S", "plain", "--seeds", "3", "--out", str(tmp_path), "--data", tiny["DATA_PATH"],
                       "--tokenizer", tiny["TOKENIZER_PATH"]]) == 0
    plain = rows(capsys.readouterr().out)["plain"]
    result = json.loads(next(tmp_path.glob("S_3_*/result.json")).read_text())
    assert plain[2] == plain[3] == f"{result['stages']['quantized']['val_bpb']:.4f}"
    assert plain[8] == f"{result['model_bytes']:,}" and result["steps"] == 4 and result["seed"] == 3
