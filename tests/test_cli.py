"""The command line: settings from the environment, --help, --config, and one line for every mistake."""

import ast
import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

import train_gpt as tg


def read(**environ):
    return tg.read_settings(environ)


def test_importing_runs_nothing_and_needs_no_environment():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt as tg; print(tg.Settings(run_id='x').seed)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"NUM_HEADS": "junk"})
    assert (done.stdout, done.stderr) == ("1337\n", "")


def test_help_names_every_setting_with_its_default_and_meaning():
    done = run_script({}, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, f in tg.Settings.__dataclass_fields__.items():
        line = next(row for row in done.stdout.splitlines() if row.split()[:1] == [name.upper()])
        assert f.metadata["help"] in line
        assert f.metadata["help"] and len(line) < 230 and f.metadata["proof"] in line
        default = "auto" if f.default is None else str(int(f.default) if f.type is bool else f.default)
        assert default == "" or default in line.split()


@pytest.mark.parametrize("argument", ["--help", "--config"])
def test_a_reader_of_help_may_leave_early(argument):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run([sys.executable, ROOT / "train_gpt.py", argument], stdout=nobody, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_config_prints_resolved_settings_without_data():
    done = run_script({"DATA_DIR": "/nowhere", "VOCAB_SIZE": "4096", "RUN_ID": "r"}, "--config")
    config = json.loads(done.stdout)
    assert done.returncode == 0
    assert config["data_path"] == "/nowhere/datasets/fineweb10B_sp4096"
    assert config["tokenizer_path"] == "/nowhere/tokenizers/fineweb_4096_bpe.model"
    assert config["artifact_dir"] == "logs/r" and config["aliases"] == {}
    assert set(config) == set(tg.Settings.__dataclass_fields__) | {"aliases"}


@pytest.mark.parametrize("given, expected", [  # the shape of the record, in proportion, and what is given stays
    ({}, (3, 5, 8)), ({"NUM_LAYERS": 6}, (2, 3, 4)), ({"NUM_LAYERS": 4}, (1, 2, 3)), ({"NUM_LAYERS": 2}, (1, 1, 2)),
    ({"NUM_LAYERS": 1}, (0, 0, 1)), ({"NUM_LAYERS": 13, "LOOP_END": 4}, (4, 4, 9)), ({"LOOP_START": 6}, (6, 6, 8)),
    ({"LOOP_END": 9}, (3, 9, 10)), ({"LOOP_END": 1}, (1, 1, 8)), ({"NUM_LOOPS": 0, "LOOP_END": 9}, (3, 9, 8)),
    ({"PARALLEL_START_LAYER": 11}, (3, 5, 11)),
])
def test_loops_and_lanes_scale_with_the_layers(given, expected):
    cfg, _ = read(**{name: str(value) for name, value in given.items()})
    assert (cfg.loop_start, cfg.loop_end, cfg.parallel_start_layer) == expected


def test_defaults_that_follow_from_other_settings(tmp_path):
    assert read()[0].sparse_attn_gate_enabled and read(TTT_MODE="none")[0].eval_stride == 64
    assert read()[0].eval_stride == 0 == read(TTT_MODE="lora")[0].eval_stride
    assert read(TTT_MODE="none", EVAL_SEQ_LEN="32")[0].eval_stride == 32
    for given, chunk in ({}, 48), ({"EVAL_SEQ_LEN": "32"}, 32), ({"TTT_EVAL_SEQ_LEN": "40"}, 40):
        assert read(**given)[0].ttt_chunk_size == chunk
    for other in ("GATED_ATTN_ENABLED", "ATTN_OUT_GATE_ENABLED"):
        assert not read(**{other: "1"})[0].sparse_attn_gate_enabled
    marked = tmp_path / "datasets" / "fineweb10B_sp4096_caseops"
    for there in (False, True):
        cfg, _ = read(DATA_DIR=str(tmp_path), VOCAB_SIZE="4096")
        assert cfg.caseops_enabled is there and (cfg.data_path == str(marked)) is there
        assert cfg.tokenizer_path.endswith("_caseops.model") is there
        marked.mkdir(parents=True, exist_ok=True)
        (marked / "fineweb_val_bytes_000000.bin").touch()
    assert read(DATA_PATH=str(marked))[0].caseops_enabled and not read(DATA_PATH=str(tmp_path))[0].caseops_enabled
    assert not read(DATA_DIR=str(tmp_path), VOCAB_SIZE="4096", CASEOPS_ENABLED="0")[0].caseops_enabled


def test_any_other_argument_is_an_error():
    for arguments in (["--foo"], ["--help", "--config"], ["train"]):
        done = run_script({}, *arguments)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("environ", "words"), [
    ({"NUM_HEADS": "7"}, "NUM_HEADS=7: takes a divisor of MODEL_DIM=512"),
    ({"VOCAB_SIZE": "abc"}, "VOCAB_SIZE=abc: takes a whole number"),
    ({"VOCAB_SIZE": "1e4"}, "VOCAB_SIZE=1e4: takes a whole number"),
    ({"VOCAB_SIZE": "70000"}, "VOCAB_SIZE=70000: takes a whole number from 2 to 65536"),
    ({"MATRIX_LR": "nan"}, "MATRIX_LR=nan: takes a number"),
    ({"MATRIX_LR": "-1"}, "MATRIX_LR=-1.0: takes a number of at least 0"),
    ({"LN_SCALE": "yes"}, "LN_SCALE=yes: takes 0 or 1"),
    ({"DEVICE": "tpu"}, "DEVICE=tpu: takes one of auto, cpu, cuda"),
    ({"COMPRESSOR": "zip"}, "COMPRESSOR=zip: takes one of ans, brotli, lzma"),
    ({"EVAL_SEQ_LEN": "x"}, "EVAL_SEQ_LEN=x: takes a whole number or auto"),
    ({"NUM_KV_HEADS": "3"}, "NUM_KV_HEADS=3: takes a divisor of NUM_HEADS=8"),
    ({"ROPE_DIMS": "15"}, "ROPE_DIMS=15: takes an even number up to 64"),
    ({"TRAIN_BATCH_TOKENS": "5000"}, "TRAIN_BATCH_TOKENS=5000: takes a multiple of TRAIN_SEQ_LEN=2048"),
    ({"MICRO_BATCH_TOKENS": "100"}, "MICRO_BATCH_TOKENS=100: takes at least TRAIN_SEQ_LEN=2048"),
    ({"EVAL_STRIDE": "4096"}, "EVAL_STRIDE=4096: takes at most EVAL_SEQ_LEN=2048"),
    ({"ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "0"}, "ITERATIONS=0: takes a number of steps"),
    ({"GPTQ_RESERVE_SECONDS": "600"}, "GPTQ_RESERVE_SECONDS=600.0: takes less than MAX_WALLCLOCK_SECONDS=600"),
    ({"ITERATION": "5"}, "ITERATION=5: no such setting; did you mean ITERATIONS?"),
    ({"ITERATOINS": "5"}, "ITERATOINS=5: no such setting; did you mean ITERATIONS?"),
    ({"VOCABSIZE": "5"}, "VOCABSIZE=5: no such setting; did you mean VOCAB_SIZE?"),
    ({"MATRIX_LE": "5"}, "MATRIX_LE=5: no such setting; did you mean MATRIX_LR?"),
    ({"num_heads": "5"}, "num_heads=5: no such setting; did you mean NUM_HEADS?"),
    *(({name: "7"}, f"{name}=7: no such setting; did you mean SEED?")  # short names too
      for name in ("SEEDS", "seed", "SED", "SEDE", "Seeds", "SEED_")),
    ({"DEVICES": "cpu"}, "DEVICES=cpu: no such setting; did you mean DEVICE?"),
    ({"DTYP": "fp32"}, "DTYP=fp32: no such setting; did you mean DTYPE?"),
    ({"FUSE": "1"}, "FUSE=1: no such setting; did you mean FUSED?"),
    ({"SWA_ENABLE": "1"}, "SWA_ENABLE=1: no such setting; did you mean SWA_ENABLED?"),
    ({"TTT_ENABLE": "1"}, "TTT_ENABLE=1: no such setting; did you mean TTT_ENABLED?"),  # of an alias
])
def test_bad_settings_are_refused_by_name(environ, words):
    with pytest.raises(tg.RunError, match="^" + words.replace("?", r"\?").replace("(", r"\(")):
        read(**environ)


def test_bad_setting_ends_the_script_with_one_line_and_status_1(tmp_path):
    for environ in ({"NUM_HEADS": "7"}, {"ITERATION": "5"}):
        done = run_script(environ | {"ARTIFACT_DIR": str(tmp_path / "run")})
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "message"), [  # the setting that was given is named, never a default alone
    ("EVAL_SEQ_LEN=32 TTT_CHUNK_SIZE=48", "TTT_CHUNK_SIZE=48: takes at most TTT_EVAL_SEQ_LEN=32"),
    ("TRAIN_SEQ_LEN=32 TTT_MODE=none EVAL_STRIDE=64", "EVAL_STRIDE=64: takes at most EVAL_SEQ_LEN=32"),
    ("EVAL_SEQ_LEN=32 EVAL_STRIDE=33", "EVAL_STRIDE=33: takes at most EVAL_SEQ_LEN=32"),
    ("TRAIN_SEQ_LEN=1000", "TRAIN_SEQ_LEN=1000: TRAIN_BATCH_TOKENS=786432 takes a multiple of TRAIN_SEQ_LEN=1000"),
    ("MODEL_DIM=100", "MODEL_DIM=100: NUM_HEADS=8 takes a divisor of MODEL_DIM=100"),
    ("NUM_HEADS=1", "NUM_HEADS=1: NUM_KV_HEADS=4 takes a divisor of NUM_HEADS=1"),
    ("MODEL_DIM=64", "MODEL_DIM=64: ROPE_DIMS=16 takes an even number up to 8, the width of a head"),
    ("NUM_LAYERS=4 LOOP_START=4", "LOOP_START=4: LOOP_END=4 takes a layer from LOOP_START=4 to 3"),
    ("NUM_LAYERS=4 LOOP_END=4", "LOOP_END=4: takes a layer from LOOP_START=1 to 3"),
    ("PARALLEL_START_LAYER=5", "PARALLEL_START_LAYER=5: takes more than LOOP_END=5 with PARALLEL_MODE=crossed"),
    ("NUM_LAYERS=4 VE_LAYERS=9,10", "VE_LAYERS=9,10: takes different layers below NUM_LAYERS=4, as 9,10"),
    ("VE_LAYERS=9,9", "VE_LAYERS=9,9: takes different layers below NUM_LAYERS=11, as 9,10"),
    ("TOKEN_ORDER=4,16", "TOKEN_ORDER=4,16: takes numbers from 64 down to 2, as 16,8,4"),
    *((f"{name}=1", f"{name}=1: takes 0 or at least 2") for name in ("BIGRAM_VOCAB_SIZE", "VE_DIM", "EMBEDDING_DIM")),
    *((f"{given}{more}", f"{given}{shown}: takes a share below 1 or a step below ITERATIONS, or no step of training "
       "has NUM_LOOPS") for given, shown, more in (
        ("ENABLE_LOOPING_AT=1", ".0", ""), ("ENABLE_LOOPING_AT=300", ".0", " ITERATIONS=300"),
        ("LOOP_SCHEDULE=0.3:1,300:2", "", " ITERATIONS=200"))),
    *((given, f"{said} takes more than {least}, below which no learning rate comes") for given, said, least in (
        ("QAT_ENABLED=1 QAT_START_SCALE=0.1", "QAT_START_SCALE=0.1:", 0.1),
        ("SWA_ENABLED=1 MIN_LR=0.2", "MIN_LR=0.2: SWA_START_SCALE=0.2", 0.2),
        ("SWA_ENABLED=1 WARMDOWN_FRAC=0", "WARMDOWN_FRAC=0.0: SWA_START_SCALE=0.2", 1))),
    (" ".join(f"TTT_{role}_LORA=0" for role in ("Q", "K", "V", "O", "MLP", "HEAD")),
     "TTT_Q_LORA=0: TTT_MODE=phased takes an adapter, as TTT_Q_LORA=1"),
    ("NUM_LAYERS=4 QAT_LITE_ENABLED=1", "NUM_LAYERS=4: QAT_LITE_LAYER_START=7 takes a layer below NUM_LAYERS=4"),
])
def test_a_contradiction_is_blamed_on_what_was_given(given, message):
    with pytest.raises(tg.RunError) as error:
        read(**dict(part.split("=") for part in given.split()))
    assert str(error.value) == message


@pytest.mark.parametrize("given", ["TOKEN_ORDER=" + 5000 * "9", f"TTT_SHORT_SCORE_FIRST_STEPS={5000 * '9'}:8",
                                   f"TRAIN_SEQ_SCHEDULE={5000 * '9'}@0.5", f"VE_LAYERS={5000 * '9'}",
                                   "LOOP_SCHEDULE=1e+999:2", "NUM_LAYERS=1000000000"])
def test_numbers_without_end_are_one_line(given):
    with pytest.raises(tg.RunError, match=f"^{given[:10]}"):
        read(**dict([given.split("=")]))


@pytest.mark.parametrize("blank", ["", " ", "\t "])
def test_a_blank_value_is_an_error_for_every_setting_under_every_name(blank):
    """EVAL_ONLY=" ", the path lost in a shell variable, would train for ten minutes."""
    names = {a for f in tg.Settings.__dataclass_fields__.values() for a in f.metadata["aliases"]}
    # blank by default: how a recipe's is taken back
    lists = {"LOOP_SCHEDULE", "TRAIN_SEQ_SCHEDULE", "TTT_SHORT_SCORE_FIRST_STEPS"}
    assert all(getattr(read(**{name: blank})[0], name.lower()) == "" for name in lists)
    for name in (names | {name.upper() for name in tg.Settings.__dataclass_fields__}) - lists:
        with pytest.raises(tg.RunError, match=f"^{name}=: takes .*, not a blank; unset it for the default$"):
            read(**{name: blank})


# of shells, desktops, compilers, clusters, containers, CI and other programs of this field
SYSTEM = """
PATH HOME SHELL LANG LANGUAGE LC_ALL TERM USER LOGNAME MAIL PWD OLDPWD SHLVL EDITOR VISUAL PAGER DISPLAY TZ TMP TMPDIR
UID PS1 LINES COLUMNS HOSTNAME HISTSIZE LS_COLORS MANPATH COLORTERM WINDOWID SSH_TTY XDG_DATA_DIRS XDG_RUNTIME_DIR CC
CXX CFLAGS LDFLAGS CPATH LD_LIBRARY_PATH LD_PRELOAD COMPILER TYPE ARCH CI BUILD_ID JOB_NAME JOB_ID TASK_ID QUEUE
RUNNER_OS GITHUB_RUN_ID RUN_NUMBER DEVNAME DEVTYPE DEVPATH RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
GROUP_RANK ROLE_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID OMP_NUM_THREADS NCCL_DEBUG CUDA_HOME CUDA_VISIBLE_DEVICES
CONDA_PREFIX CONDA_DEFAULT_ENV VIRTUAL_ENV PYTHONPATH PYTHONHASHSEED PL_GLOBAL_SEED SLURM_JOB_ID SLURM_PROCID
PBS_JOBID WANDB_RUN_ID MLFLOW_RUN_ID HF_HOME RUNPOD_POD_ID KUBERNETES_SERVICE_HOST JAVA_HOME SEEDS_OF_DOOM
EPOCH_SECONDS
""".split()


def test_environment_of_the_system_is_no_typo():
    settings, notes = read(**dict.fromkeys(SYSTEM, "7"))
    assert not notes.explicit and not notes.absent and settings.seed == 1337
    assert set(tg.ORDINARY) <= set(notes.ignored) <= {*tg.ORDINARY, "RUN_NUMBER"}  # let through, and named


def test_every_name_one_letter_off_is_refused_but_for_a_few():
    """Settings and aliases in small letters, in plural, with each letter dropped, doubled, swapped with the next."""
    fields = tg.Settings.__dataclass_fields__
    known = {name.upper() for name in fields} | {a for f in fields.values() for a in f.metadata["aliases"]}
    for name in known:
        off = {name.lower(), name.capitalize(), f"{name}S", f"X{name}"}
        for i in range(len(name)):
            off |= {name[:i] + name[i + 1 :], name[:i] + 2 * name[i] + name[i + 1 :],
                    name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]}
        for wrong in off - known - {*tg.ORDINARY, *tg.ELSEWHERE}:
            assert any(tg.is_typo(wrong.upper(), k) for k in known), wrong
    for name, other in (("SEED", "SPEEDY"), ("FUSED", "MUSE"), ("DEVICE", "DEVTYPE"), ("BETA1", "ALPHA"),
                        ("DATA_DIR", "XDG_DATA_DIRS")):
        assert not tg.is_typo(other, name)


def test_unknown_names_of_our_families_are_reported_not_obeyed():
    _, notes = read(MUON_FOO="1", GPTQ_BAR="2", JAVA_HOME="/x")
    assert notes.ignored == ("GPTQ_BAR", "MUON_FOO")


@pytest.mark.parametrize(("given", "meant"), [
    ("COMPRESSOR=pergroup", "COMPRESSOR=ans"),
    ("TTT_OPTIMIZER=adam", "TTT_OPTIMIZER=adamw"),
    ("LR_FLOOR=0.1", "MIN_LR=0.1"),
    ("PARALLEL_RESID_START=7", "PARALLEL_START_LAYER=7"),
    ("GPTQ_CALIB_BATCHES=64", "GPTQ_CALIBRATION_BATCHES=64"),
    ("EVAL_ONLY_PATH=model.ptz", "EVAL_ONLY=model.ptz"),
    ("RECUR_LAYERS=4,5", "LOOP_START=4 LOOP_END=5 NUM_LOOPS=1"),
    ("RECUR_START_STEP=3000", "ENABLE_LOOPING_AT=3000.0"),
    ("RECUR_START=2", "LOOP_START=2"),
    ("RECUR_END=6", "LOOP_END=6"),
    ("RECUR_PASSES=2", "NUM_LOOPS=1"),
    ("LATE_QAT_THRESHOLD=0.2", "QAT_ENABLED=1 QAT_START_SCALE=0.2"),
    ("LATE_QAT_THRESHOLD=0", "QAT_ENABLED=0 QAT_START_SCALE=0.0"),
    ("RECUR_AB_ENABLED=True", "RECUR_BLEND=ab"),
    ("RECUR_ALPHA_ENABLED=0", "RECUR_BLEND=none"),
])
def test_aliases_are_mapped_and_named(given, meant):
    settings, notes = read(**dict([given.split("=")]))
    assert notes.aliases == {given: meant} and not notes.ignored and not notes.absent
    for part in meant.split():
        name, value = part.split("=")
        assert str(tg.shown(getattr(settings, name.lower()))) == value


@pytest.mark.parametrize(("given", "mode"), [
    ("TTT_ENABLED=1", "chunk"), ("TTT_ENABLED=1 TTT_MODE=lora", "lora"),
    ("TTT_ENABLED=1 PHASED_TTT_ENABLED=1", "phased"),
    ("TTT_ENABLED=1 TTT_MODE=phased PHASED_TTT_ENABLED=1", "phased"), ("TTT_ENABLED=1 PHASED_TTT_ENABLED=0", "chunk"),
    ("TTT_ENABLED=0", "none"), ("TTT_ENABLED=0 PHASED_TTT_ENABLED=0 TTT_MODE=none", "none"),
    ("PHASED_TTT_ENABLED=0 TTT_MODE=lora", "lora"),
    ("TTT_ENABLED=1 TTT_MODE=none", "TTT_ENABLED=1: contradicts TTT_MODE=none"),
    ("TTT_ENABLED=0 TTT_MODE=lora", "TTT_ENABLED=0: contradicts TTT_MODE=lora"),
    ("TTT_ENABLED=0 PHASED_TTT_ENABLED=1", "PHASED_TTT_ENABLED=1: contradicts TTT_ENABLED=0"),
    ("PHASED_TTT_ENABLED=1 TTT_MODE=lora", "PHASED_TTT_ENABLED=1: contradicts TTT_MODE=lora"),
    ("TTT_ENABLED=2", "TTT_ENABLED=2: takes one of 0, 1"),
])
def test_a_name_that_says_only_part_allows_what_others_say(given, mode):
    """TTT_ENABLED=1 is chunk TTT to PR 1493, LoRA or phased TTT to PR 1536 and 1855."""
    environ = dict(part.split("=") for part in given.split())
    if ":" in mode:
        with pytest.raises(tg.RunError, match=f"^{mode}$"):
            read(**environ)
    else:
        assert read(**environ)[0].ttt_mode == mode


@pytest.mark.parametrize(("environ", "words"), [
    ({"RECUR_LAYERS": "4,6"}, "RECUR_LAYERS=4,6: takes layers that follow each other, as 4,5"),
    ({"RECUR_LAYERS": "x"}, "RECUR_LAYERS=x: takes layers that follow each other"),
    ({"RECUR_PASSES": "0"}, "RECUR_PASSES=0: takes one of 1, 2, 3, 4"),
    ({"LATE_QAT_THRESHOLD": "soon"}, "LATE_QAT_THRESHOLD=soon: takes a number"),
    ({"RECUR_LAYERS": "4,5", "NUM_LOOPS": "2"}, "RECUR_LAYERS=4,5: contradicts NUM_LOOPS=2"),
    ({"LR_FLOOR": "0.1", "MIN_LR": "0"}, "LR_FLOOR=0.1: contradicts MIN_LR=0"),
    ({"RECUR_AB_ENABLED": "1", "RECUR_ALPHA_ENABLED": "1"}, "RECUR_AB_ENABLED=1: contradicts RECUR_ALPHA_ENABLED=1"),
])
def test_bad_values_of_aliases_are_refused_under_their_name(environ, words):
    with pytest.raises(tg.RunError, match=f"^{words}"):
        read(**environ)


@pytest.mark.parametrize("given", [
    "NGRAM_HINT_PRECOMPUTE_OUTSIDE=1", "ASYM_LOGIT_RESCALE=True", "WITHIN_BOOST=0.75", "LAYER_SCALE_INIT=0.1",
    "SLOT_ENABLED=1",
    "TARGET_MB=15.9", "QRES_ENABLED=1", "ETLB_ENABLED=1", "LAWA_ENABLED=true", "MTP_NUM_HEADS=2", "OPTROT_ENABLED=1",
    "PREQUANT_TTT_ENABLED=1", "SLIDING_WINDOW_ENABLED=0", "GPTQ_ENABLED=0", "WORD_BOOST=0.5",
    "GLOBAL_TTT_OPTIMIZER=muon", "QK_BITS=5", "ROPE_TRAIN_SEQ_LEN=1024", "SMEAR_GATE_BOS_FIX=0", "AWQ_LITE_ENABLED=1",
])
def test_what_this_script_has_not_is_told_by_a_line_of_its_own(given):
    _, notes = read(**dict([given.split("=")]))
    why = tg.WHY_NOT.get(given.split("=")[0], "not in this script")
    assert why.startswith("not ") and notes.absent == (f"{given}: {why}",) and not notes.ignored and not notes.explicit


@pytest.mark.parametrize("given", [
    "NGRAM_HINT_PRECOMPUTE_OUTSIDE=0", "ASYM_LOGIT_RESCALE=False", "AGREE_ADD_BOOST=0.0", "LAYER_SCALE_INIT=1.0",
    "WITHIN_TAU=99.0", "QK_BITS=6", "QK_BITS=5 MATRIX_BITS=5", "ROPE_TRAIN_SEQ_LEN=1024 TRAIN_SEQ_LEN=1024",
    "GPTQ_ENABLED=True", "QK_GAIN_SCHEDULE=[]", "VAL_BATCH_TOKENS=524288", "VAL_BATCH_SIZE=1", "TTT_OUTPUT_DIR=",
    "EMBED_LR=0.6", "LQER_ASYM_ENABLED=1", "GATED_ATTN_QUANT_GATE=1", "GATED_ATTN_QUANT_GATE=False",
])
def test_what_is_off_or_as_it_is_here_is_not_told(given):
    _, notes = read(**dict(part.split("=") for part in given.split()))
    assert not notes.absent and not notes.ignored


def test_names_of_elsewhere_are_no_settings_of_ours():
    """A line of ELSEWHERE goes when the script gets the thing."""
    fields = tg.Settings.__dataclass_fields__
    known = {name.upper() for name in fields} | {a for f in fields.values() for a in f.metadata["aliases"]}
    assert not known & {*tg.ELSEWHERE, *tg.ORDINARY}
    for here in tg.ELSEWHERE.values():  # a setting's name is one of ours
        assert not here.isupper() or here in known


def test_config_and_log_tell_what_is_not_here(tiny, tmp_path):
    given = {"ASYM_LOGIT_RESCALE": "1", "WITHIN_BOOST": "0.75", "WORD_BOOST": "0"}
    lines = [f"ASYM_LOGIT_RESCALE=1: {tg.WHY_NOT['ASYM_LOGIT_RESCALE']}", "WITHIN_BOOST=0.75: not in this script"]
    done = run_script(given, "--config")
    assert done.returncode == 0 and json.loads(done.stdout)["not_here"] == lines
    assert done.stderr.splitlines() == [f"note: {line}" for line in lines]
    done = run_script(tiny | given | {"ARTIFACT_DIR": str(tmp_path), "ITERATIONS": "1", "EVAL_STRIDE": "0"})
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, (tmp_path / "train.log").read_text()):
        log = text.splitlines()
        assert [line for line in log if "not in this script" in line] == lines
        assert log.index(lines[0]) < next(i for i, line in enumerate(log) if line.startswith("model: "))


def test_values_are_typed():
    settings, notes = read(SEED="42", MATRIX_LR="2.5e-2", LN_SCALE="false", EVAL_SEQ_LEN="auto", RUN_ID="a b")
    assert (settings.seed, settings.matrix_lr, settings.ln_scale, settings.run_id) == (42, 0.025, False, "a b")
    assert settings.eval_seq_len == settings.train_seq_len
    assert set(notes.explicit) == {"seed", "matrix_lr", "ln_scale", "eval_seq_len", "run_id"}


def test_the_environment_is_read_in_one_place():
    source = (ROOT / "train_gpt.py").read_text()
    assert "getenv" not in source and "os.environ" not in source[:source.index("def main()")]


COMMANDS = {  # command lines of the field's own scripts (systems.md), and what they must amount to
    "DATA_DIR=./data VOCAB_SIZE=4096 SEED=42": {
        "data_path": "./data/datasets/fineweb10B_sp4096", "vocab_size": 4096, "seed": 42},
    "SEED=1337 MUON_EQR=1 EMA_DECAY=0 ENABLE_LOOPING_AT=0.42 RECUR_ALPHA_ENABLED=0 RECUR_AB_ENABLED=1 RECUR_A_INIT=1.0 "
    "RECUR_B_INIT=0.0 QAT_LITE_ENABLED=1 QAT_LITE_START_FRAC=0.55 QAT_LITE_EVERY=4 QAT_LITE_LAMBDA=0.02 "
    "QAT_LITE_BITS=6 QAT_LITE_CLIP_SIGMAS=12.85 QAT_LITE_LAYER_START=7 QAT_LITE_TARGETS=qk QAT_LITE_PENALTY=mse "
    "QAT_LITE_DEPTH_POWER=0.0 DATA_PATH=./data/datasets/fineweb10B_sp8192 "
    "TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe.model VOCAB_SIZE=8192": {
        "muon_row_normalize": True, "ema_decay": 0.0, "enable_looping_at": 0.42, "recur_blend": "ab",
        "num_loops": 2, "qat_lite_enabled": True, "qat_lite_layer_start": 7, "average": "ema"},
    "SEED=42 QK_GAIN_INIT=5.25 TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3": {
        "qk_gain_init": 5.25, "ttt_mode": "chunk", "ttt_lr": 0.005, "ttt_epochs": 3},
    "DATA_DIR=./data VOCAB_SIZE=8192 CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1 "
    "PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=3 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1 MLP_CLIP_SIGMAS=11.5 "
    "ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48 WARMUP_STEPS=20 "
    "MUON_BACKEND_STEPS=5 GLOBAL_TTT_MOMENTUM=0.9 WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5 "
    "TTT_LORA_RANK=80 SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16 "
    "VAL_LOSS_EVERY=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 "
    "LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3 "
    "FUSED_CE_ENABLED=1 COMPRESSOR=pergroup SEED=42": {
        "ttt_mode": "phased", "phased_ttt_prefix_docs": 2500, "phased_ttt_num_phases": 3, "embed_bits": 7,
        "mlp_clip_sigmas": 11.5, "ttt_chunk_size": 48, "ttt_beta2": 0.99, "ttt_lora_rank": 80, "min_lr": 0.1,
        "sparse_attn_gate_enabled": True, "sparse_attn_gate_scale": 0.5, "smear_gate_mode": "input",
        "compressor": "ans", "lqer_enabled": True, "lqer_rank": 4, "lqer_top_k": 3, "lqer_factor_bits": 4,
        "caseops_enabled": True, "data_path": "./data/datasets/fineweb10B_sp8192_caseops"},
    # PR 2014 and PR 2135
    "CASEOPS_ENABLED=1 VOCAB_SIZE=8192 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 EVAL_INCLUDE_TAIL=1 "
    "TRAIN_SEQ_LEN=3072 ROPE_TRAIN_SEQ_LEN=3072 TRAIN_SEQ_SCHEDULE=1024@0.100,2048@0.700,3072@1.000 "
    "TRAIN_SEQ_SCHEDULE_MODE=wallclock SEQ_CHANGE_WARMUP_STEPS=32 EVAL_SEQ_LEN=3072 EVAL_STRIDE=1536 TTT_ENABLED=1 "
    "TTT_EVAL_SEQ_LEN=3072 TTT_BATCH_SIZE=24 TTT_CHUNK_SIZE=48 TTT_SHORT_SCORE_FIRST_ENABLED=1 "
    "TTT_SHORT_DOC_LEN=2000 TTT_SHORT_CHUNK_SIZE=24 TTT_SHORT_SCORE_FIRST_STEPS=256:8,2000:24 TTT_LORA_RANK=80 "
    "TTT_LORA_LR=0.0001 TTT_LOCAL_LR_MULT=0.75 TTT_MASK=no_qv TTT_Q_LORA=0 TTT_V_LORA=0 TTT_WEIGHT_DECAY=0.5 "
    "TTT_BETA2=0.99 PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=1 WARMDOWN_FRAC=0.85 BETA2=0.99 "
    "QK_GAIN_INIT=5.25 SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 GATED_ATTN_QUANT_GATE=1 "
    "SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 FUSED_CE_ENABLED=1 MATRIX_LR=0.026 MIN_LR=0.1 GRAD_CLIP_NORM=0.3 "
    "EMBED_BITS=7 EMBED_CLIP_SIGMAS=14.0 MATRIX_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=11.5 "
    "LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3 LQER_FACTOR_BITS=4 LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=64 "
    "AWQ_LITE_ENABLED=1 AWQ_LITE_BITS=8 AWQ_LITE_GROUP_TOP_K=1 AWQ_LITE_GROUP_SIZE=64 ASYM_LOGIT_RESCALE=1 "
    "GPTQ_RESERVE_SECONDS=4.0 GPTQ_CALIBRATION_BATCHES=16 COMPRESSOR=pergroup VAL_LOSS_EVERY=0": {
        "train_seq_len": 3072, "train_seq_schedule": "1024@0.100,2048@0.700,3072@1.000", "seq_change_warmup_steps": 32,
        "ttt_q_lora": False, "ttt_v_lora": False, "ttt_k_lora": True, "ttt_local_lr_mult": 0.75,
        "ttt_short_score_first_steps": "256:8,2000:24"},
    "CASEOPS_ENABLED=1 VOCAB_SIZE=8192 ASYM_LOGIT_RESCALE=1 NGRAM_TILT_ENABLED=1 NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 "
    "TOKEN_ORDER=16 TOKEN_THRESHOLD=0.800 TOKEN_BOOST=2.625 WITHIN_TAU=99.0 WITHIN_BOOST=0.0 WORD_TAU=99.0 "
    "WORD_BOOST=0.0 AGREE_ADD_BOOST=0.0 SMEAR_GATE_BOS_FIX=0 TTT_LORA_EMA_DECAY=0.0 TTT_UPDATE_EVERY=1 "
    "PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=1 EVAL_SEQ_LEN=2560 TTT_EVAL_SEQ_LEN=2560 "
    "COMPRESSOR=pergroup MATRIX_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=11.5 EMBED_BITS=7 "
    "EMBED_CLIP_SIGMAS=14.0 MATRIX_LR=0.028 MIN_LR=0.1 WARMDOWN_FRAC=0.85 BETA2=0.99 FUSED_CE_ENABLED=1 "
    "SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 LQER_ENABLED=1 "
    "LQER_RANK=4 LQER_TOP_K=3 LQER_FACTOR_BITS=4 LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=32 TTT_WARM_START_A=1 "
    "TTT_LORA_RANK=80 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=2.0 TTT_LORA_LR=8e-5 GPTQ_RESERVE_SECONDS=0.5 "
    "GPTQ_CALIBRATION_BATCHES=32 TTT_K_LORA=0 TTT_O_LORA=1 TTT_MLP_LORA=1 EMA_DECAY=0.9965 SEED=42": {
        "ngram_tilt_enabled": True, "token_boost": 2.625, "eval_seq_len": 2560, "ttt_warm_start_a": True,
        "ttt_k_lora": False, "ttt_weight_decay": 2.0, "lqer_asym_group": 32},
}
# the others are as they always are here: gates are int8, LQER's grids asymmetric
NOT_HERE = {"ASYM_LOGIT_RESCALE", "AWQ_LITE_ENABLED", "SMEAR_GATE_BOS_FIX"}


@pytest.mark.parametrize("command", COMMANDS)
def test_published_command_lines_are_accepted(command):
    settings, notes = read(**dict(part.split("=") for part in shlex.split(command)))
    assert {name: getattr(settings, name) for name in COMMANDS[command]} == COMMANDS[command]
    assert {line.split("=")[0] for line in notes.absent} == {part.split("=")[0] for part in command.split()} & NOT_HERE
    assert not notes.ignored


def test_readable_in_an_hour():
    source = (ROOT / "train_gpt.py").read_text()
    assert max(map(len, source.splitlines())) <= 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
