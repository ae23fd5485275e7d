"""The whole run, as a user starts it: training to result.json, the artifact alone, and what goes wrong on the way."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from conftest import LONGEST, ROOT, TRAIN, ForkedRun, clean_environment, read_losses, read_result, run_script
from helpers import FakeRuntime, bare, on_ranks

import train_gpt as tg

BYTES = ROOT / "benchmarks/bytes.py"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Folder and process of one finished run."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_script(tiny | {"ARTIFACT_DIR": str(folder), "SAVE_MODEL": "1"}, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder, done


def decoded_bytes(tiny) -> int:
    """UTF-8 bytes of the validation documents, decoded by the tokenizer itself."""
    sp = sentencepiece.SentencePieceProcessor(model_file=tiny["TOKENIZER_PATH"])
    tokens = tg.read_shard(os.path.join(tiny["DATA_PATH"], "fineweb_val_000000.bin"), 512).tolist()
    starts = [i for i, t in enumerate(tokens) if t == sp.bos_id()] + [len(tokens)]
    return sum(len(sp.decode(tokens[a:b]).encode()) for a, b in zip(starts, starts[1:]))


def test_result_holds_the_contract(finished, tiny):
    folder, done = finished
    result = read_result(folder)
    assert set(result) == set(
        "val_loss val_bpb stages val_docs val_tokens val_bytes val_complete model_bytes code_bytes bytes_total "
        "model_sha256 code_sha256 budget_bytes fits steps train_seconds eval_seconds tokens_seen tok_per_s "
        "peak_memory_bytes seed world_size device torch attention config started finished".split())
    assert list(result["stages"]) == ["pre_quant", "quantized", "sliding"]
    for stage in result["stages"].values():
        assert set(stage) == {"val_loss", "val_bpb", "tokens", "bytes", "seconds"}
        assert stage["tokens"] == result["val_tokens"] and stage["bytes"] == result["val_bytes"]
    assert result["val_bpb"] == result["stages"]["sliding"]["val_bpb"]
    assert result["steps"] == 20 and result["tokens_seen"] == 20 * int(tiny["TRAIN_BATCH_TOKENS"])
    assert result["val_docs"] == 6 and result["val_complete"] is True
    assert result["model_bytes"] == (folder / "final_model.int6.ptz").stat().st_size
    assert result["code_bytes"] == (folder / "train_gpt.packed.py").stat().st_size
    assert result["bytes_total"] == result["model_bytes"] + result["code_bytes"] and result["fits"]
    for name, key in (("final_model.int6.ptz", "model_sha256"), ("train_gpt.packed.py", "code_sha256")):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == result[key]
    assert sorted(p.name for p in folder.iterdir()) == [
        "final_model.int6.ptz", "final_model.pt", "metrics.jsonl", "result.json", "train.log", "train_gpt.packed.py"]
    console = [line for line in done.stdout.splitlines() if line]
    told = (folder / "train.log").read_text().splitlines()
    assert console == [line for line in told if not line.startswith(("step:", "settings: {", "warm-up: "))]
    assert json.loads(next(line for line in told if line.startswith("settings: "))[10:]) == result["config"]
    assert len([line for line in told if line.startswith("step:")]) == 20
    assert [line[:13] for line in console if line.startswith("training ") and "%" in line] == [
        f"training {tenth}0 %" for tenth in range(1, 10)]
    assert "  model NUM_LAYERS=3 MODEL_DIM=64" in done.stdout and "ROPE_BASE" not in done.stdout
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [set(m) for m in metrics if "step" in m] == 20 * [
        {"step", "train_loss", "lr_scale", "tokens", "seconds", "tok_per_s"}]
    assert [m["stage"] for m in metrics if "stage" in m] == ["pre_quant", "quantized", "sliding"]


def test_bytes_are_those_of_the_decoded_documents(finished, tiny):
    assert read_result(finished[0])["val_bytes"] == decoded_bytes(tiny)


def test_training_learns_and_compression_costs_little(finished):
    stages = read_result(finished[0])["stages"]
    losses = read_losses(finished[0])
    assert losses[-1] < losses[0] - 0.8
    assert abs(stages["quantized"]["val_bpb"] - stages["pre_quant"]["val_bpb"]) < 0.02
    assert stages["sliding"]["val_bpb"] < stages["quantized"]["val_bpb"]  # more context helps


def test_packed_script_and_artifact_alone_give_the_same_score(finished, tiny, tmp_path):
    folder, _ = finished
    for name in ("train_gpt.packed.py", "final_model.int6.ptz"):
        shutil.copy(folder / name, tmp_path)
    data = {k: tiny[k] for k in ("DATA_PATH", "TOKENIZER_PATH", "DTYPE", "DEVICE")}
    done = run_script(data | {"EVAL_ONLY": "final_model.int6.ptz", "ARTIFACT_DIR": "out"}, cwd=tmp_path,
                      script=tmp_path / "train_gpt.packed.py")
    assert done.returncode == 0, done.stderr
    result, original = read_result(tmp_path / "out"), read_result(folder)
    assert abs(result["val_bpb"] - original["val_bpb"]) < 1e-6
    assert list(result["stages"]) == ["quantized", "sliding"]
    assert result["bytes_total"] == original["bytes_total"] and result["steps"] == 0
    assert (tmp_path / "out/train_gpt.packed.py").read_bytes() == (tmp_path / "train_gpt.packed.py").read_bytes()


def test_same_seed_gives_the_same_artifact_and_warmup_leaves_no_trace(finished, tiny, tmp_path):
    done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path), "WARMUP_STEPS": "0"})
    assert done.returncode == 0, done.stderr
    name = "final_model.int6.ptz"
    assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert read_losses(tmp_path) == read_losses(finished[0])


def test_any_number_of_processes_trains_and_scores_alike(finished, tiny, tmp_path):
    """Two under torchrun train, and three score; by three, which share unevenly, test_training.py trains."""
    train = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path / "train")}, processes=2, fresh=True)
    assert train.returncode == 0, train.stderr
    ours, theirs = read_losses(tmp_path / "train"), read_losses(finished[0])
    assert len(ours) == 20 and max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-4
    assert read_result(tmp_path / "train")["world_size"] == 2
    score = run_script(tiny | {"EVAL_ONLY": str(finished[0] / "final_model.int6.ptz"),
                               "ARTIFACT_DIR": str(tmp_path / "score")}, processes=3)
    assert score.returncode == 0, score.stderr
    assert abs(read_result(tmp_path / "score")["val_bpb"] - read_result(finished[0])["val_bpb"]) < 1e-6


def test_over_budget_is_written_and_ends_with_status_2(finished, tiny, tmp_path):
    """By an evaluation, which resumes nothing, whatever the environment still says of a training."""
    done = run_script(tiny | {"EVAL_ONLY": str(finished[0] / "final_model.int6.ptz"), "ARTIFACT_DIR": str(tmp_path),
                              "ARTIFACT_BUDGET_BYTES": "20000", "EVAL_STRIDE": "0", "RESUME": "1"})
    result = read_result(tmp_path)
    assert done.returncode == 2 and result["fits"] is False and list(result["stages"]) == ["quantized"]
    assert f"OVER by {result['bytes_total'] - 20000}" in done.stdout


def test_the_clock_ends_training(tiny, tmp_path):
    """How far it comes is the machine's; when it stops is tested on a pretended clock (test_training.py)."""
    done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path), "MAX_WALLCLOCK_SECONDS": "2", "ITERATIONS": "100000",
                              "GPTQ_RESERVE_SECONDS": "0.5", "EVAL_STRIDE": "0", "VAL_LOSS_EVERY": "5"})
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps, stages = [m for m in metrics if "step" in m], [m["stage"] for m in metrics if "stage" in m]
    count = read_result(tmp_path)["steps"]
    assert [m["step"] for m in steps] == [*range(1, count + 1)] and count < 100_000 and steps[0]["lr_scale"] == 1
    assert stages == [*(f"step{n}" for n in range(5, count, 5)), "pre_quant", "quantized"]


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a run that could not run."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_missing_or_wrong_data_is_one_line_and_spares_the_run_before(tiny, tmp_path):
    out = {"ARTIFACT_DIR": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert "no fineweb_val_" in error_of(run_script(tiny | out | {"DATA_PATH": str(tmp_path / "empty")}))
    shutil.copytree(tiny["DATA_PATH"], tmp_path / "no_train")
    (tmp_path / "no_train/fineweb_train_000000.bin").unlink()
    assert "run_smoke_1gpu.sh" in error_of(run_script(tiny | out | {"DATA_PATH": str(tmp_path / "no_train")}))
    shutil.copytree(tiny["DATA_PATH"], tmp_path / "cut")
    with open(tmp_path / "cut/fineweb_val_000000.bin", "r+b") as file:
        file.truncate(5000)
    message = error_of(run_script(tiny | out | {"DATA_PATH": str(tmp_path / "cut")}))
    assert "fineweb_val_000000.bin: expected" in message and "found 5000" in message
    assert "has 512 pieces, expected VOCAB_SIZE=500" in error_of(run_script(tiny | out | {"VOCAB_SIZE": "500"}))
    assert "no such file" in error_of(run_script(tiny | out | {"TOKENIZER_PATH": "nowhere.model"}))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["result.json"]


def test_bad_artifacts_are_one_line(finished, tiny, tmp_path):
    good = (finished[0] / "final_model.int6.ptz").read_bytes()
    cases = {"short": good[:-1], "flipped": good[:500] + bytes([good[500] ^ 1]) + good[501:], "other": b"hello",
             "empty": b""}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        message = error_of(run_script(tiny | {"EVAL_ONLY": str(tmp_path / name), "ARTIFACT_DIR": str(tmp_path / "o")}))
        assert str(tmp_path / name) in message
    message = error_of(run_script(tiny | {"EVAL_ONLY": str(finished[0] / "final_model.int6.ptz"), "NUM_LAYERS": "4",
                                          "ARTIFACT_DIR": str(tmp_path / "out")}))
    assert "made with NUM_LAYERS=3, this run has 4" in message
    assert f"EVAL_ONLY={tmp_path}/nowhere: no such file" in error_of(
        run_script(tiny | {"EVAL_ONLY": str(tmp_path / "nowhere")}))


def test_a_folder_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in error_of(run_script(tiny | {"ARTIFACT_DIR": str(tmp_path / "file")}))
    assert str(tmp_path / "file") in error_of(run_script(tiny | {"ARTIFACT_DIR": str(tmp_path / "file/below")}))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tiny, tmp_path):
    limit = 40_000  # bytes a file may have: enough for the log, not for the artifact
    (tmp_path / "limited.py").write_text(f"import resource, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n"
                                         f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
                                         "sys.exit(train_gpt.main())\n")
    settings = tiny | {"ARTIFACT_DIR": str(tmp_path / "run"), "ITERATIONS": "2"}
    done = run_script(settings, script=tmp_path / "limited.py")
    assert f"cannot write {tmp_path}/run/final_model.int6.ptz: File too large" in error_of(done)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "train.log"]


def test_nan_loss_names_the_step(tiny, tmp_path):
    message = error_of(run_script(tiny | {"ARTIFACT_DIR": str(tmp_path), "SCALAR_LR": "1e30", "TRAIN_LOG_EVERY": "7"}))
    assert "train_loss is nan at step" in message or "train_loss is inf at step" in message
    step = int(message.split("at step ")[1].split(";")[0])
    assert 2 <= step <= 7


@pytest.mark.parametrize("moment", ["training 20 %", "quantized and packed in", "stage:quantized"])
def test_a_killed_run_leaves_no_result_not_even_an_old_one(tiny, tmp_path, moment):
    (tmp_path / "result.json").write_text('{"val_bpb": 0.5}')  # of an earlier run in the same folder
    run = ForkedRun(tiny | {"ARTIFACT_DIR": str(tmp_path), "EVAL_STRIDE": "1", "EVAL_BATCH_TOKENS": "64",
                            "ITERATIONS": "10"}, str(TRAIN))
    until = time.monotonic() + LONGEST
    while not any(line.startswith(moment) for line in run.out.read_text().splitlines()):
        assert time.monotonic() < until, "guards against waiting for ever"
        time.sleep(0.01)
    os.kill(run.pids[0], signal.SIGKILL)
    assert run.finish().returncode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()


def test_two_processes_fail_with_one_line_when_one_cannot_go_on(tiny, tmp_path):
    shutil.copytree(tiny["DATA_PATH"], tmp_path / "data")
    path = tmp_path / "data/fineweb_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1024 + 2 * 50_000:] = b"\xff" * (len(raw) - 1024 - 2 * 50_000)  # most windows hold tokens out of range
    path.write_bytes(raw)
    done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path / "out"), "DATA_PATH": str(tmp_path / "data")}, processes=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert "fineweb_train_000000.bin: expected token ids below VOCAB_SIZE=512, found 65535" in errors[0]


def scoring_slowly(finished, tiny, folder) -> dict[str, str]:
    return tiny | {"ARTIFACT_DIR": str(folder), "EVAL_ONLY": str(finished[0] / "final_model.int6.ptz"),
                   "EVAL_STRIDE": "1", "EVAL_BATCH_TOKENS": "64"}


def check_that_one_line_says_it(errors: str, folder: Path) -> None:
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "another process of this run has ended" in said[0], errors[-2000:]
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("victim", [1, 2])
def test_killing_one_process_of_three_ends_the_others_with_one_line(finished, tiny, tmp_path, victim):
    """In the middle of a long evaluation."""
    run = ForkedRun(scoring_slowly(finished, tiny, tmp_path), str(TRAIN), processes=3)
    until = time.monotonic() + LONGEST
    while "stage:quantized" not in run.out.read_text():  # sliding then
        assert time.monotonic() < until, "guards against waiting for ever"
        time.sleep(0.01)
    os.kill(run.pids[victim], signal.SIGKILL)
    done = run.finish()
    assert done.returncode != 0
    check_that_one_line_says_it(done.stderr, tmp_path)


def test_killing_the_first_process_under_torchrun_ends_the_others_with_one_line(finished, tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(TRAIN)]
    process = subprocess.Popen(command, env=clean_environment(scoring_slowly(finished, tiny, tmp_path)), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("stage:quantized"):
            break  # sliding now
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = {int(re.search(rb"(?:^|\0)RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())[1]): pid
             for pid in children if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()}
    os.kill(ranks[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode != 0
    check_that_one_line_says_it(errors, tmp_path)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_weighted_steps_fill_the_budget_and_never_exceed_it(finished, tiny, tmp_path):
    sizes, code = [], read_result(finished[0])["code_bytes"]
    for budget in (code + 25_000, code + 90_000):
        done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path), "ARTIFACT_BUDGET_BYTES": str(budget),
                                  "EVAL_STRIDE": "0", "QUANT_MIN_WEIGHTS": "1024", "ITERATIONS": "8",
                                  "QUANT_TRELLIS": "1"})
        assert done.returncode == 0, done.stderr
        result = read_result(tmp_path)
        # of so small a model one step of one row can change what a table's rows share, and with it 150 bytes
        assert result["fits"] and budget - 200 <= result["bytes_total"] <= budget
        sizes.append(result["stages"]["quantized"]["val_loss"] - result["stages"]["pre_quant"]["val_loss"])
    assert sizes[1] < sizes[0]  # more bytes, less loss


def test_a_model_that_cannot_fit_says_so_before_it_is_scored(finished, tiny, tmp_path):
    budget = read_result(finished[0])["code_bytes"] + 1000
    done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path), "ARTIFACT_BUDGET_BYTES": str(budget), "EVAL_STRIDE": "0",
                              "ITERATIONS": "2"})
    assert done.returncode == 2, done.stderr
    lines = done.stdout.splitlines()
    told = next(i for i, line in enumerate(lines) if "OVER by" in line and "lower NUM_LAYERS" in line)
    assert told < next(i for i, line in enumerate(lines) if line.startswith("stage:quantized"))
    result = read_result(tmp_path)
    assert not result["fits"] and f"OVER by {result['bytes_total'] - budget};" in lines[told]


# ----- the table of loss against bytes


def test_loss_against_bytes_of_a_run(finished, tmp_path):
    """Of its saved model and its settings: the loss that it ended with, and KL and gaps that shrink with bytes. The run
    seems to have had low-rank corrections, which two of the rows are to compare.
    """
    figures, result = tmp_path / "bytes.json", read_result(finished[0])
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "result.json").write_text(json.dumps(result | {"config": result["config"] | {
        "lqer_enabled": True, "qat_enabled": True, "quant_allocation": "sdclip"}}))
    done = run_script({}, str(run), "--bytes", "60000", "30000", "--json", str(figures), script=BYTES)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["base"] == pytest.approx(result["stages"]["pre_quant"]["val_loss"], abs=1e-5)
    for way in ("GPTQ", "trellis"):
        more, less = (row for row in found["rows"] if row["way"].startswith(f"{way}, weighted"))
        assert 59_000 < more["bytes"]["ans"] <= 60_000 and 29_000 < less["bytes"]["ans"] <= 30_000
        assert abs(more["gap"]) < less["gap"] and 0 < more["kl"] < less["kl"]
    plain, corrected = found["rows"][1:3]
    assert corrected["way"] == f"{plain['way']}, LQER" and corrected["bytes"]["ans"] > plain["bytes"]["ans"] + 100
    assert done.stdout.count(" gap ") == len(found["rows"]) == 7


@pytest.mark.parametrize("change, said", [
    ({"no_such_setting": 1}, "differ in no_such_setting"),
    (dict.fromkeys("abcd"), "differ in a, b, c and 1 more")])
def test_bytes_of_another_versions_run_are_refused_in_a_line(finished, tmp_path, change, said):
    result = read_result(finished[0])
    (tmp_path / "result.json").write_text(json.dumps(result | {"config": result["config"] | change}))
    done = run_script({}, str(tmp_path), script=BYTES)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'result.json'}: not of this version") and said in done.stderr


# ----- the evaluation's clock


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("settings,stages,seconds", [
    ({}, ["quantized", "sliding"], 33), ({"eval_stages": "final"}, ["quantized", "sliding"], 23),
    ({"eval_stride": 0}, ["quantized"], 13), ({"eval_stride": 0, "eval_stages": "final"}, ["quantized"], 13),
    ({"ttt_mode": "lora"}, ["quantized", "sliding", "ttt"], 73),
    ({"ttt_mode": "lora", "eval_stages": "final"}, ["quantized", "ttt"], 43),
    ({"ttt_mode": "lora", "eval_only": "x"}, ["quantized", "sliding", "ttt"], 73),
    ({"ttt_mode": "lora", "eval_only": "x", "eval_stages": "final"}, ["ttt"], 43),
])
def test_evaluation_is_timed_from_the_loading_of_the_artifact(monkeypatch, settings, stages, seconds, compiled):
    """By a clock that loading advances by 3 seconds, the stages by 10, 20 and 40, and compiling by 1000."""
    clock, began, ahead = SimpleNamespace(now=500.0), [], []

    def advance(seconds: float):
        clock.now += seconds
        return seconds

    def stage(name: str, _) -> float:
        began.append(run.loaded)
        return advance({"quantized": 10, "sliding": 20, "ttt": 40}[name])

    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run = SimpleNamespace(cfg=bare(**settings), stages={}, loaded=None, forward=compiled, model=False, stage=stage,
                          load=lambda *_: advance(3), rt=SimpleNamespace(largest=float),
                          compile_ahead=lambda stages: ahead.append((list(stages), advance(1000))),
                          val=tg.Validation(torch.zeros(2), torch.ones(2), 1, None))
    assert tg.Run.score(run, b"", "x") == seconds
    assert list(run.stages) == stages
    assert run.loaded == clock.now - seconds and began[-1] == run.loaded  # from where the budget counts
    timed = stages[-1:] if settings.get("eval_stages") == "final" else stages
    assert ahead == [(timed, 1000)] * compiled


@pytest.mark.parametrize("stages, expected", [(["quantized", "sliding", "ttt"], ["windows", "ttt"]),
                                              (["quantized"], ["windows"]), (["ttt"], ["ttt"])])
def test_what_the_stages_run_is_compiled_on_random_text(monkeypatch, stages, expected):
    """Of each kind of graph, by the form of the model that the stage has."""
    called, said = [], []

    class Evaluator:
        def __init__(self, forward: str, val: str):
            self.given = (forward, val)

        def warm_windows(self):
            called.append(("windows", *self.given))

        def warm_ttt(self):
            called.append(("ttt", *self.given))

    monkeypatch.setattr(tg, "random_text", lambda cfg, val: "random")
    run = SimpleNamespace(cfg=None, val="validation", forward="whole", final_forward="parts", evaluator=Evaluator,
                          rt=SimpleNamespace(note=said.append, largest=lambda seconds: seconds + 7, sync=lambda: None))
    tg.Run.compile_ahead(run, stages)
    form = {"windows": "whole", "ttt": "parts"}
    assert called == [(kind, form[kind], "random") for kind in expected]
    seconds = re.fullmatch(r"warm-up: evaluation compiled in (\d+\.\d)s, before its clock", *said)
    assert float(seconds[1]) >= 7  # the slowest rank's


def test_only_the_final_score_on_the_clock(tiny, tmp_path):
    settings = tiny | {"ARTIFACT_DIR": str(tmp_path / "run"), "ITERATIONS": "2", "EVAL_STAGES": "final",
                       "TTT_MODE": "chunk", "TTT_CHUNK_TOKENS": "1024", "TTT_EPOCHS": "1"}
    done = run_script(settings)
    assert done.returncode == 0, done.stderr
    trained = read_result(tmp_path / "run")
    assert list(trained["stages"]) == ["pre_quant", "quantized", "ttt"]
    assert trained["val_bpb"] == trained["stages"]["ttt"]["val_bpb"]
    artifact = str(tmp_path / "run/final_model.int6.ptz")
    done = run_script(settings | {"EVAL_ONLY": artifact, "ARTIFACT_DIR": str(tmp_path / "eval")})
    assert done.returncode == 0, done.stderr
    scored = read_result(tmp_path / "eval")
    assert list(scored["stages"]) == ["ttt"] and scored["val_bpb"] == pytest.approx(trained["val_bpb"], abs=1e-6)


# ----- the folder of a run


def runtime(folder: Path) -> tg.Runtime:
    return tg.Runtime(tg.Settings(artifact_dir=str(folder), device="cpu"), tg.Launch())


@pytest.mark.parametrize("append", [False, True])
def test_a_second_run_into_a_folder_in_use_is_refused(tmp_path, append):
    first, second = runtime(tmp_path), runtime(tmp_path)
    first.open_logs(append=False)
    first.log("a line of the first")
    with pytest.raises(tg.RunError, match="another run is writing there"):
        second.open_logs(append=append)
    first.log("one more")
    assert (tmp_path / "train.log").read_text() == "a line of the first\none more\n"
    first.close()
    third = runtime(tmp_path)
    third.open_logs(append=append)
    assert (tmp_path / "train.log").read_text() == ("a line of the first\none more\n" if append else "")
    third.close()


def test_a_folder_is_free_again_when_its_run_is_killed(tiny, tmp_path):
    run = subprocess.Popen([sys.executable, ROOT / "train_gpt.py"], stdout=subprocess.PIPE, text=True,
                           env=clean_environment(tiny | {"ARTIFACT_DIR": str(tmp_path), "ITERATIONS": "100000"}))
    assert run.stdout.readline().startswith("settings")  # it holds the folder now
    with pytest.raises(tg.RunError, match="another run is writing there"):
        runtime(tmp_path).open_logs(append=True)
    run.kill()
    run.wait()
    again = runtime(tmp_path)
    again.open_logs(append=True)
    again.close()


def test_default_names_never_collide():
    names = {tg.Settings(seed=7).artifact_dir for _ in range(50)}
    assert len(names) == 50 and all(re.search(r"\d{8}-\d{6}-seed7-[0-9a-f]{8}$", name) for name in names)


@pytest.mark.parametrize("content", ['{"steps": 2}', "half a resu", "[]", "{}"])
def test_scoring_into_the_folder_of_a_training_run_is_refused(tmp_path, content):
    for name in ("result.json", "train.log", "metrics.jsonl"):
        (tmp_path / name).write_text(content)
    with pytest.raises(tg.RunError, match="holds the result of a training run"):
        runtime(tmp_path).open_logs(append=True, training=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("result.json", "train.log", "metrics.jsonl"), content)


@pytest.mark.parametrize("content", ['{"steps": 0}', None])
def test_scoring_again_may_replace_a_score(tmp_path, content):
    if content:
        (tmp_path / "result.json").write_text(content)
    rt = runtime(tmp_path)
    rt.open_logs(append=True, training=False)
    assert not (tmp_path / "result.json").exists()
    rt.close()


def test_a_training_run_keeps_its_result_when_scored_in_its_own_folder(finished, tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run_script(tiny | {"ARTIFACT_DIR": str(folder), "EVAL_ONLY": str(folder / "final_model.int6.ptz")})
    assert done.returncode == 1 and done.stderr.startswith("error: ARTIFACT_DIR=")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_that_a_console_cannot_print_lose_nothing(tiny, tmp_path):
    folder = os.path.join(tmp_path, "caf\udce9 \u6f22")  # a byte of Latin-1, and more than ASCII
    settings = tiny | {"ARTIFACT_DIR": folder, "ITERATIONS": "1", "EVAL_STRIDE": "0", "PYTHONIOENCODING": "ascii",
                       "RUN_ID": "\u6f22"}
    done = run_script(settings, fresh=True)
    assert done.returncode == 0, done.stderr
    assert read_result(Path(folder))["steps"] == 1
    assert "caf\\udce9 \\u6f22" in done.stdout


def test_a_packer_that_is_missing_is_told_before_training(tiny, tmp_path):
    (tmp_path / "constriction.py").write_text("raise ImportError('not here')")
    done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path / "run"), "COMPRESSOR": "ans", "PYTHONPATH": str(tmp_path)},
                      fresh=True)
    assert (done.returncode, done.stdout) == (1, "") and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: COMPRESSOR=ans: the package constriction is not installed")


def test_an_artifact_needs_the_packer_that_packed_it_alone(tiny, tmp_path):
    settings = tiny | {"ITERATIONS": "1", "EVAL_STRIDE": "0"}
    done = run_script(settings | {"ARTIFACT_DIR": str(tmp_path / "run"), "COMPRESSOR": "lzma"})
    assert done.returncode == 0, done.stderr
    (tmp_path / "constriction.py").write_text("raise ImportError('not here')")
    done = run_script(settings | {"EVAL_ONLY": str(tmp_path / "run/final_model.int6.ptz"), "COMPRESSOR": "ans",
                                  "ARTIFACT_DIR": str(tmp_path / "eval"), "PYTHONPATH": str(tmp_path)}, fresh=True)
    assert done.returncode == 0, done.stderr


def test_ranks_on_unlike_gpus_deal_the_same_rows(monkeypatch):
    """As many tokens at a time as the least of them holds, or windows would be scored twice or by nobody."""
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=(48e9, 24e9)[device.index]))

    def work(rt: FakeRuntime) -> tg.Settings:
        rt.device = SimpleNamespace(type="cuda", index=rt.rank)
        return tg.fit_to_device(bare(run_id="run"), rt)

    one, other = on_ranks(2, work)
    assert one == other and one.micro_batch_tokens == int(98304 * 0.3)


def test_a_console_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w") as console:
        monkeypatch.setattr(sys, "stdout", console)
        os.close(read)
        rt = runtime(tmp_path)
        rt.open_logs(append=False)
        for line in ("one", "two"):
            rt.log(line)
        monkeypatch.undo()
    assert (tmp_path / "train.log").read_text() == "one\ntwo\n"
    rt.close()


def test_a_log_on_a_full_disk_ends_no_run(tmp_path, capsys):
    rt = runtime(tmp_path)
    rt.open_logs(append=False)
    for file in ("log_file", "metrics_file"):
        getattr(rt, file).close()
        setattr(rt, file, open("/dev/full", "w", encoding="utf-8"))
    rt.log("a line")
    rt.metric(step=1)
    said = capsys.readouterr()
    assert said.out == "a line\n" and said.err == 2 * "note: /dev/full misses a line: No space left on device\n"
    for file in ("log_file", "metrics_file"):
        with contextlib.suppress(OSError):  # what its buffer holds cannot be written either
            getattr(rt, file).close()
        setattr(rt, file, None)
    rt.close()


def test_half_a_line_of_metrics_is_left_out_when_a_run_goes_on(tmp_path):
    rt = runtime(tmp_path)
    rt.open_logs(append=False)
    for step in (1, 2, 3):
        rt.metric(step=step)
    rt.metrics_file.write('{"step": 1, "tr{"step": 2}\n')
    rt.forget_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    rt.close()


# ----- what a run leaves of an earlier one


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_cannot_go_on_leaves_the_one_before_as_it_is(tiny, tmp_path):
    settings = tiny | {"ARTIFACT_DIR": str(tmp_path), "ITERATIONS": "4", "EVAL_STRIDE": "0"}
    assert run_script(settings).returncode == 0
    before = contents(tmp_path)
    assert error_of(run_script(settings | {"RESUME": "1"})).startswith("error: RESUME=1: no ")
    assert contents(tmp_path) == before
    assert run_script(settings | {"CHECKPOINT_EVERY": "2"}).returncode == 0
    before = contents(tmp_path)
    for changes, said in (({"NUM_LAYERS": "2"}, "made with NUM_LAYERS="), ({"ITERATIONS": "1"}, "has 4 steps already")):
        assert said in error_of(run_script(settings | {"RESUME": "1"} | changes))
    assert contents(tmp_path) == before


def test_nothing_goes_on_from_the_checkpoint_of_an_earlier_run(tiny, tmp_path):
    settings = tiny | {"ARTIFACT_DIR": str(tmp_path), "ITERATIONS": "4", "EVAL_STRIDE": "0"}
    assert run_script(settings | {"CHECKPOINT_EVERY": "2", "SAVE_MODEL": "1"}).returncode == 0
    old = (tmp_path / "checkpoint.pt").read_bytes()
    assert (tmp_path / "final_model.pt").exists()
    assert run_script(settings).returncode == 0
    assert not (tmp_path / "final_model.pt").exists()  # it would pass for this run's
    assert "no " in error_of(run_script(settings | {"RESUME": "1"}))
    assert (tmp_path / "checkpoint.old.pt").read_bytes() == old


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tiny, tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    (tmp_path / "checkpoint.pt/in the way").write_text("")
    (tmp_path / "checkpoint.old.pt").write_text("")
    settings = tiny | {"ARTIFACT_DIR": str(tmp_path), "ITERATIONS": "4", "CHECKPOINT_EVERY": "2", "EVAL_STRIDE": "0"}
    assert "checkpoint" in error_of(run_script(settings))  # it cannot be moved away
    (tmp_path / "checkpoint.old.pt").unlink()
    done = run_script(settings)
    assert done.returncode == 0 and read_result(tmp_path)["steps"] == 4


def test_config_of_an_evaluation_is_that_of_its_artifact(finished, tiny):
    artifact = finished[0] / "final_model.int6.ptz"
    done = run_script({"EVAL_ONLY": str(artifact), "EVAL_STRIDE": "7"}, "--config")
    config = json.loads(done.stdout)
    assert (config["num_layers"], config["vocab_size"], config["eval_stride"]) == (int(tiny["NUM_LAYERS"]), 512, 7)
    done = run_script({"EVAL_ONLY": str(artifact), "TRAIN_SEQ_LEN": "24"}, "--config")  # no divisor of its batch
    assert json.loads(done.stdout)["train_seq_len"] == 24
    assert "no such file" in error_of(run_script({"EVAL_ONLY": "/nowhere"}, "--config"))


def test_who_has_no_data_is_told_how_to_get_it(tmp_path):
    said = error_of(run_script({"DATA_PATH": str(tmp_path), "ARTIFACT_DIR": str(tmp_path / "run")}))
    assert said.startswith(f"error: DATA_PATH={tmp_path}: no fineweb_val_") and "cached_challenge_fineweb.py" in said


# ----- what PyTorch says


@pytest.mark.parametrize("error,said", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
     "out of memory; lower MICRO_BATCH_TOKENS, EVAL_BATCH_TOKENS or, in test-time training, TTT_BATCH_SIZE"),
    (MemoryError("Unable to allocate 8 GiB"), "out of memory; lower MICRO_BATCH_TOKENS, "),
    (torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory; lower MICRO_BATCH_TOKENS, "),
    (torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("No working C++ compiler found"), None),
     "COMPILE=1: the model could not be compiled"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
     "COMPILE=1: the model could not be compiled (Failed to find C compiler. Please"),
    (RuntimeError("value cannot be converted to type float without overflow"),
     "a learning rate, weight decay or initial value is too large for float32"),
    (RuntimeError("pack_vnni2 is only supported when avx512 is supported"), "DTYPE=bf16: PyTorch has no attention"),
    (RuntimeError("size mismatch"), ""),
    (KeyError("a defect"), ""),
])
def test_errors_of_pytorch_in_one_line(error, said):
    told = tg.explain(error)
    assert told.startswith(said) and bool(told) == bool(said) and "\n" not in told


def test_a_defect_on_two_processes_ends_both_with_its_traceback():
    code = "import train_gpt as tg; tg.start = lambda *_: 1 / 0; tg.main()"
    done = ForkedRun({}, "-c", code, processes=2, cwd=ROOT).finish()
    assert done.returncode and "ZeroDivisionError: division by zero" in done.stderr


def test_a_model_that_does_not_fit_the_memory_is_one_line(tiny, tmp_path):
    done = run_script(tiny | {"ARTIFACT_DIR": str(tmp_path), "MODEL_DIM": "4294967296", "NUM_HEADS": "67108864"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory; lower MICRO_BATCH") and done.stderr.count("\n") == 1
