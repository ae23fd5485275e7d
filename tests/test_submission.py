"""Submission folders: three real tiny runs make one that passes, and each planted fault is caught by the line it names.

The record track's machine and document count are written into copies of the runs before the folder is made; everything
else is as the runs left it.
"""

import ast
import dataclasses
import hashlib
import json
import math
import re
import shutil
import string
import subprocess
from decimal import Decimal
from pathlib import Path

import check_submission
import leaderboard
import make_submission
import numpy as np
import pytest
import sentencepiece
import submission as s
import summary
from conftest import ROOT, read_result, shifted
from forked import ForkedRun
from shards import read_shard, write_shard

import train_gpt as tg

SEEDS, MODEL = ("1", "2", "3"), "final_model_seed1.int6.ptz"
AUTHOR = ["--author", "A. Nonymous", "--github-id", "nobody"]
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """What environment() answered for the same settings before; it takes most of a check's time."""
    answers, answer = {}, s.environment

    def environment(config: dict) -> dict[str, str]:
        key = repr(config)
        if key not in answers:
            answers[key] = answer(config)
        return dict(answers[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s, "environment", environment)
        yield


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory) -> Path:
    """Folder of three finished runs; in this process, to save time. The first is audited, for all."""
    folder = tmp_path_factory.mktemp("runs")
    settings = tiny | {"ITERATIONS": "4", "NUM_LAYERS": "2", "EVAL_STRIDE": "0", "VAL_LOSS_EVERY": "2",
                       "SMEAR_GATE_ENABLED": "1", "EVAL_BATCH_TOKENS": "1024"}
    for seed in SEEDS:
        assert tg.start([], tg.Launch(), settings | {"SEED": seed, "ARTIFACT_DIR": str(folder / seed)}) == 0
    done = ForkedRun({}, str(ROOT / "records/audit.py"), str(folder / SEEDS[0])).finish()
    assert done.returncode == 0, done.stderr
    verdict = json.loads((folder / SEEDS[0] / "audit.json").read_text())
    for seed in SEEDS:
        result = read_result(folder / seed)
        hashes = {key: result[key] for key in ("code_sha256", "model_sha256")}
        (folder / seed / "audit.json").write_text(json.dumps(verdict | hashes))
    return folder


def make(runs: Path, out: Path, track: str, *arguments: str) -> Path:
    status = make_submission.main(["Tiny", "--track", track, "--logs", *(str(runs / seed) for seed in SEEDS), "--out",
                                   str(out), "--date", "2026-11-20", *AUTHOR, *arguments])
    assert status == 0
    return out / track / "2026-11-20_Tiny"


@pytest.fixture(scope="session")
def relabelled(runs, tmp_path_factory) -> Path:
    """The runs as if made on the record track's machine and documents."""
    folder = tmp_path_factory.mktemp("relabelled")
    for seed in SEEDS:
        shutil.copytree(runs / seed, folder / seed)
        edit_json(folder / seed / "result.json", world_size=8, device=H100, val_docs=50_000)
        replace(folder / seed / "train.log", "1 x cpu", f"8 x {H100}")
        replace(folder / seed / "train.log", "validation: 6 documents", "validation: 50000 documents")
    return folder


@pytest.fixture(scope="session")
def record(relabelled, tmp_path_factory) -> Path:
    """A clean folder on the record track."""
    return make(relabelled, tmp_path_factory.mktemp("record"), s.RECORD_TRACK)


@pytest.fixture
def folder(record, tmp_path) -> Path:
    """A copy to plant faults in."""
    copy = tmp_path / record.parent.name / record.name
    shutil.copytree(record, copy)
    return copy


def edit_json(path: Path, change=None, **values) -> None:
    content = json.loads(path.read_text()) | values
    if change:
        change(content)
    path.write_text(json.dumps(content))


def edit(folder: Path, change=None, **values) -> None:
    edit_json(folder / s.SUBMISSION, change, **values)


def edit_result(folder: Path, seed: int, change=None, **values) -> None:
    edit_json(folder / f"result_seed{seed}.json", change, **values)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (text.count(old), old)
    path.write_text(text.replace(old, new))


def edit_readme(folder: Path, old: str, new: str) -> None:
    replace(folder / s.README, old, new)


def add_prose(folder: Path, text: str) -> None:
    edit_readme(folder, "# Tiny\n", f"# Tiny\n\n{text}\n")


def rewrite(folder: Path) -> None:
    """Settings in submission.json and the README as the results in the folder have them: a thorough forger's work."""
    results = [json.loads((folder / f"result_seed{seed}.json").read_text()) for seed in SEEDS]
    rows = {str(run["seed"]): make_submission.seed_result(folder / MODEL, run) for run in results}

    def change(data):
        for seed, row in rows.items():
            data["seed_results"][seed] |= {k: v for k, v in row.items() if k != "model_sha256"}
        data["val_loss"], data["val_loss_std"] = s.mean_std([row["val_loss"] for row in rows.values()])
        data["val_bpb"], data["val_bpb_std"] = s.mean_std([row["val_bpb"] for row in rows.values()])
        data["settings"] = s.environment(results[0]["config"])
    edit(folder, change, blurb="As made.")
    (folder / s.README).write_text(s.write_readme("Tiny", "As made.", results))


def configure(folder: Path, **values) -> None:
    """Other settings, in results and logs alike."""
    for seed in SEEDS:
        path = folder / f"result_seed{seed}.json"
        old = json.loads(path.read_text())["config"]
        edit_result(folder, seed, config=old | values)
        replace(folder / f"train_seed{seed}.log", json.dumps(old), json.dumps(old | values))


def caught(folder: Path, against: Path | None = None) -> set[str]:
    """Names of the lines that do not pass."""
    sub = check_submission.Submission(folder)
    sub.against = check_submission.Submission(against) if against else None
    return {line.name for line in check_submission.check(sub) if line.status in ("FAIL", "missing")}


# ----------------------------------------------------------------------------------------------------------------------
# Clean folders


def test_a_record_made_from_three_runs_passes(record, capsys):
    assert check_submission.main([str(record)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("26 pass, 0 FAIL, 0 missing, 0 note, 2 not run")
    assert sorted(path.name for path in record.iterdir()) == sorted(
        [s.README, s.SUBMISSION, s.CODE, s.REQUIREMENTS, s.TOKENIZER, "final_model_seed1.int6.ptz"]
        + [name for seed in SEEDS for name in (f"train_seed{seed}.log", f"result_seed{seed}.json",
                                               f"audit_seed{seed}.json", f"metrics_seed{seed}.jsonl")])


def test_the_leaderboard_says_what_fails_first(record, folder):
    """A clean folder counts; each fault is told as the checker's own line tells it."""
    assert leaderboard.counts(record) == "yes"
    edit(folder, hardware="8 x H100 | two")
    assert leaderboard.counts(folder).startswith("no: hardware: 8 x H100 \\| two, but the run of seed 1 says")
    edit(folder, bytes_total=17_000_000)
    assert leaderboard.counts(folder).startswith("no: bytes: 17,000,000 bytes, 1,000,000 over")
    (folder / s.REQUIREMENTS).unlink()
    assert leaderboard.counts(folder) == "no: files: requirements.txt"
    (folder / "result_seed2.json").write_text("[]")
    assert "result_seed2.json: holds list" in leaderboard.counts(folder)


def test_a_laptop_gets_a_checked_folder_whose_limits_are_notes(runs, tmp_path, capsys):
    folder = make(runs, tmp_path, s.OTHER_TRACK, "--artifacts", "--blurb", "Two layers, no test-time training.")
    assert len(list(folder.glob("final_model_seed*.int6.ptz"))) == 3
    slow(folder, 3600.0)
    capsys.readouterr()
    assert check_submission.main([str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clean"] and told["track"] == s.OTHER_TRACK
    assert {line["name"] for line in told["checks"] if line["status"] == "note"} == {
        "hardware", "documents", "train_time"}


def test_the_score_is_that_of_the_artifact_run_from_the_folder(runs, tiny, tmp_path, capsys, monkeypatch):
    folder = make(runs, tmp_path, s.OTHER_TRACK)
    monkeypatch.setenv("EVAL_ONLY_PATH", "elsewhere")  # no setting of the environment counts, by any name
    assert check_submission.main([str(folder), "--data", tiny["DATA_PATH"]]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("pass")}
    assert "from the artifact alone" in lines["score"] and "and once more here" in lines["audit"]
    assert "starts the validation text" in lines["bos"]
    assert not {"out", "logs", "__pycache__"} & {path.name for path in folder.iterdir()}


def test_readme_states_every_setting_and_runs_as_it_says(record, relabelled):
    text = (record / s.README).read_text()
    config = read_result(relabelled / "1")["config"]
    assert "SmearGate (input)" in text and "torchrun --standalone --nproc_per_node=8 train_gpt.py" in text
    said = text.split("| setting |")[0]  # before the table of settings, which describes each
    assert "XSA on the last 2 layers" in said and "test-time" not in said and "SWA" not in said
    environment = s.environment(config)
    assert environment["NUM_LAYERS"] == "2" and "ATTN_CLIP_SIGMAS" not in environment  # follows from another
    cfg, notes = tg.read_settings(environment | {"SEED": "1"} | s.places(config))
    same = s.OF_A_RUN + s.OF_A_MACHINE
    assert {k: v for k, v in vars(cfg).items() if k not in same} == {k: v for k, v in config.items() if k not in same}
    assert not notes.ignored and not notes.aliases


def test_the_settings_of_a_run_hang_on_no_file_of_the_machine(tmp_path):
    """CASEOPS_ENABLED=auto looks at the disk: who checks a submission may not have what the run found there."""
    (tmp_path / "fineweb_val_bytes_000000.bin").touch()
    for given in ({}, {"CASEOPS_ENABLED": "1"}):
        config = dataclasses.asdict(tg.read_settings(given | {"DATA_PATH": str(tmp_path)})[0])
        assert config["caseops_enabled"]
        here, elsewhere = s.environment(config), s.environment(config | {"data_path": str(tmp_path / "not")})
        assert here == elsewhere == {"CASEOPS_ENABLED": "1"}
    config = dataclasses.asdict(tg.read_settings({"RESUME": "1", "CHECKPOINT_EVERY": "5", "SAVE_MODEL": "1"})[0])
    assert s.environment(config) == {}  # what changes no result


def test_every_feature_speaks_of_itself_and_is_no_false_claim(record):
    """A feature's line matches its own claim, and passes where it is on."""
    run = json.loads((record / "result_seed1.json").read_text())
    for feature in s.FEATURES:
        line = feature.says.format(**s.facts(run))
        assert not feature.claim or re.search(feature.claim, line, re.I), line
        if feature.on(s.facts(run)):
            assert s.false_claims(line, run) == []
    assert s.false_claims("There is no SWA, without varlen attention; LoRA is not used; `TTT_MODE=none`", run) == []
    for changes, faults in (({"eval_stages": "final"}, 1), ({"eval_stages": "all"}, 0), ({"ttt_mode": "chunk"}, 0)):
        other = run | {"config": run["config"] | {"ttt_mode": "phased", "eval_stride": 32} | changes}
        assert len(s.false_claims("Scored by a sliding window.", other)) == faults, changes
    assert len(s.false_claims("Phased LoRA TTT, cosine schedule, not only EMA. SWA", run)) == 5


@pytest.mark.parametrize("words", ["Triton kernels", "a fused MLP", "fused cross-entropy", "fused CE, fused kernels"])
def test_kernels_are_claimed_by_runs_with_fused_alone(words):
    for fused in (False, True):
        run = {"config": dataclasses.asdict(tg.Settings(fused=fused)), "attention": "sdpa"}
        assert (s.false_claims(words, run) == []) == fused
        assert ("fused Triton kernels" in s.features_section([run])) == fused


def named_settings(source: str) -> set[str]:
    """Settings that a script reads: c["x"] and config["x"], their get("x"), and attributes of cfg."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        of = getattr(node, "value", None)
        match node:
            case ast.Subscript(slice=ast.Constant(str(name))) if ast.unparse(of).split("[")[-1] in CONFIGS:
                found.add(name)
            case ast.Call(func=ast.Attribute(value=of, attr="get"), args=[ast.Constant(str(name)), *_]) if (
                    ast.unparse(of).split("[")[-1] in CONFIGS):
                found.add(name)
            case ast.Attribute(value=ast.Name("cfg"), attr=name):
                found.add(name)
    return found


CONFIGS = ("c", "config", "'config']")
DERIVED = {"ve_tables", "head_dim", "xsa_layers", "visits", "backend", "loops_from"}  # what submission.facts adds


def test_every_setting_that_the_scripts_name_exists():
    known = set(tg.Settings.__dataclass_fields__)
    scripts = sorted((ROOT / "records").glob("*.py"))
    named = {path.name: named_settings(path.read_text()) for path in scripts}
    assert {name: found - known - DERIVED for name, found in named.items() if found - known - DERIVED} == {}
    assert len(named["submission.py"]) > 30 and "vocab_size" in named["summary.py"]
    says = {name for feature in s.FEATURES for _, name, _, _ in string.Formatter().parse(feature.says) if name}
    assert says - known <= DERIVED
    assert {*s.OF_A_RUN, *s.OF_A_MACHINE, *summary.FREE} <= known
    run = {"config": dataclasses.asdict(tg.Settings()), "attention": "sdpa"}
    assert s.facts(run).keys() - known == DERIVED
    for planted in ('lambda c: c["fused_mlp_enabled"]', 'run["config"]["fused_mlp_enabled"]',
                    'config.get("fused_mlp_enabled", 0)', "cfg.fused_mlp_enabled",
                    'run["config"].get("fused_mlp_enabled")'):
        assert named_settings(planted) == {"fused_mlp_enabled"}


# ----------------------------------------------------------------------------------------------------------------------
# Planted faults: what is done to the folder, and exactly the lines that must not pass, the one that names it first. A
# line with "?" may pass: whether it does hangs on how a last digit is rounded


def twin(folder: Path) -> None:
    """Seed 2 is seed 1's run again, relabelled."""
    run = json.loads((folder / "result_seed1.json").read_text())
    other = run | {"seed": 2, "config": run["config"] | {"seed": 2}}
    (folder / "result_seed2.json").write_text(json.dumps(other))
    log = (folder / "train_seed1.log").read_text()
    (folder / "train_seed2.log").write_text(log.replace('"seed": 1,', '"seed": 2,'))
    rewrite(folder)
    edit(folder, lambda d: d["seed_results"]["2"].update(model_sha256=d["seed_results"]["1"]["model_sha256"]))


def audit(folder: Path, name: str) -> None:
    edit_json(folder / "audit_seed2.json", lambda verdict: verdict["checks"][name].update(ok=False, detail="planted"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def slow(folder: Path, train_seconds: float) -> None:
    """In result, log and all that is written from them."""
    edit_result(folder, 2, train_seconds=train_seconds)
    path = folder / "train_seed2.log"
    path.write_text(re.sub(r"( tokens in )[\d.]+s", rf"\g<1>{train_seconds:.1f}s", path.read_text()))
    rewrite(folder)


def other_code_size(folder: Path) -> None:
    edit_result(folder, 2, lambda run: run.update(code_bytes=run["code_bytes"] + 1, model_bytes=run["model_bytes"] - 1))
    rewrite(folder)


def better_bits(folder: Path) -> None:
    """Bits a byte 10 % better than the losses say, in all places alike."""
    for seed in SEEDS:
        path = folder / f"train_seed{seed}.log"
        run = json.loads((folder / f"result_seed{seed}.json").read_text())
        new = 0.9 * run["val_bpb"]
        run["stages"]["quantized"]["val_bpb"] = new
        edit_result(folder, seed, val_bpb=new, stages=run["stages"])
        replace(path, f"val_bpb:{run['val_bpb']:.8f}", f"val_bpb:{new:.8f}")
    rewrite(folder)


def put_tokenizer(folder: Path, *user_defined: str) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer that has no BOS of its own, but these pieces, counted as the run's."""
    from pydoc_data.topics import topics

    with open(folder / s.TOKENIZER, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(list(topics.values())[:40]), model_writer=file, vocab_size=512, model_type="bpe",
            bos_id=-1, byte_fallback=True, user_defined_symbols=["▁", *user_defined], minloglevel=2)
    edit(folder, lambda d: d["tokenizer"].update(sha256=s.sha256(folder / s.TOKENIZER)))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / s.TOKENIZER))


def without_seed(folder: Path, seed: str) -> None:
    edit(folder, lambda d: (d["seeds"].remove(int(seed)), d["seed_results"].pop(seed)))


def resay(folder: Path, name: str, change) -> None:
    edit(folder, lambda d: d.update({name: change(d[name])}))


def in_row(folder: Path, seed: str, name: str, change) -> None:
    edit(folder, lambda d: d["seed_results"][seed].update({name: change(d["seed_results"][seed][name])}))


def another_last_digit(value: float) -> float:
    """One less for 9: 0 would not be written, and seven digits say less than eight."""
    return round(value + (1e-8 if round(value * 1e8) % 10 < 9 else -1e-8), 8)


def repeat_key(folder: Path) -> None:
    replace(folder / s.SUBMISSION, '"author":', '"author": "Another", "author":')


def link(folder: Path) -> None:
    (folder / "notes.txt").symlink_to(folder / s.README)


def rounded(folder: Path) -> None:
    """Every score, mean and deviation without its digits."""
    def change(data):
        for row in (data, *data["seed_results"].values()):
            row |= {k: round(v) for k, v in row.items() if k in ("val_loss", "val_bpb", "val_loss_std", "val_bpb_std")}
    edit(folder, change)


FAULTS = {
    "score, a digit": (lambda f: in_row(f, "2", "val_bpb", lambda v: v + 1e-3), "scores"),
    "loss, the last digit": (lambda f: in_row(f, "2", "val_loss", another_last_digit), "scores"),
    "score rounded to one digit": (lambda f: in_row(f, "2", "val_bpb", lambda v: round(v, 1)), "scores"),
    "loss rounded to a whole number": (lambda f: in_row(f, "2", "val_loss", round), "scores"),
    "mean rounded": (lambda f: resay(f, "val_bpb", lambda v: round(v, 2)), "means"),
    "std rounded to nothing": (lambda f: edit(f, val_bpb_std=0), "means"),
    "all rounded alike": (rounded, "scores means"),
    "score in the log, a digit": (lambda f: edit_log_score(f), "scores"),
    "mean, a digit": (lambda f: resay(f, "val_bpb", lambda v: v + 1e-7), "means"),
    "std, a digit": (lambda f: resay(f, "val_loss_std", lambda v: v + 1e-7), "means"),
    "std over n": (lambda f: resay(f, "val_bpb_std", lambda v: v * math.sqrt(2 / 3)), "means"),
    "steps": (lambda f: in_row(f, "3", "steps", lambda v: v + 1), "scores"),
    "bits that do not follow from nats": (better_bits, "bpb"),
    "log of another seed": (lambda f: shutil.copy(f / "train_seed1.log", f / "train_seed2.log"),
                            "seeds scores settings at_step"),
    "a seed twice": (lambda f: edit(f, seeds=[1, 1, 3]), "seeds"),
    "one run under two seeds": (twin, "seeds audit at_step"),
    "seed list": (lambda f: edit(f, seeds=[1, 2, 4]), "seeds"),
    "too few seeds": (lambda f: without_seed(f, "3"), "seeds means numbers command at_step bytes?"),
    "a key twice": (repeat_key, "seeds"),
    "null field": (lambda f: edit(f, github_id=None), "schema"),
    "null field of a seed": (lambda f: in_row(f, "1", "eval_time_s", lambda v: None), "schema"),
    "missing field": (lambda f: edit(f, lambda d: d.pop("attention")), "schema"),
    "no hardware": (lambda f: edit(f, lambda d: d.pop("hardware")), "schema hardware"),
    "other hardware": (lambda f: edit(f, hardware="8 x NVIDIA B200"), "hardware"),
    "artifact of another run": (lambda f: swap_artifact(f), "artifact"),
    "artifact cut": (lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:-5]), "artifact"),
    "artifact, a bit": (lambda f: flip(f / MODEL, 5000), "artifact"),
    "garbage with its hash": (lambda f: put_artifact(f, bytes(range(70)) * 10), "artifact audit"),
    "garbage after the magic": (lambda f: put_artifact(f, tg.ARTIFACT_MAGIC + b"x" * 700), "artifact audit"),
    "garbage with a right checksum": (lambda f: put_artifact(f, sealed(bytes([tg.ARTIFACT_VERSION]) + bytes(700))),
                                      "artifact audit"),
    "unknown compressor": (lambda f: put_artifact(f, sealed(bytes([tg.ARTIFACT_VERSION, 99]) + bytes(99))),
                           "artifact audit"),
    "version changed, checksum not": (lambda f: put_artifact(f, of_version(f, tg.ARTIFACT_VERSION + 1, seal=False)),
                                      "artifact audit"),
    "no artifact": (lambda f: (f / MODEL).unlink(), "artifact"),
    "over the cap": (lambda f: edit(f, lambda d: d["seed_results"]["1"].update(artifact_bytes=16_000_001),
                                    bytes_total=16_000_001), "bytes scores"),
    "bytes_total not the largest": (lambda f: edit(f, bytes_total=smallest(f)), "bytes"),
    "code longer than counted": (lambda f: append(f / s.CODE, b"\n"), "code"),
    "code changed, same size": (lambda f: flip(f / s.CODE, -20), "code"),
    "other code in one seed": (other_code_size, "code"),
    "no log": (lambda f: (f / "train_seed2.log").unlink(), "files at_step"),
    "no README": (lambda f: (f / s.README).unlink(), "files claims numbers command"),
    "README of bytes": (lambda f: (f / s.README).write_bytes(b"\xff\x00\xfe"), "files claims numbers command"),
    "no requirements": (lambda f: (f / s.REQUIREMENTS).unlink(), "files"),
    "a link": (link, "files"),
    "no tokenizer": (lambda f: (f / s.TOKENIZER).unlink(), "tokenizer"),
    "no tokenizer, a published name": (lambda f: (
        configure(f, tokenizer_path="data/tokenizers/fineweb_512_bpe.model"), rewrite(f),
        (f / s.TOKENIZER).unlink()), "tokenizer"),
    "other tokenizer": (lambda f: append(f / s.TOKENIZER, b"\x22\x00"), "tokenizer"),
    "no BOS": (put_tokenizer, "bos"),
    "BOS_ID of a byte": (lambda f: (configure(f, bos_id=7), rewrite(f)), "tokenizer bos artifact"),
    "part of the validation set": (lambda f: edit_result(f, 2, val_complete=False), "validation"),
    "no manifest": (lambda f: edit_result(f, 2, val_complete=None), "validation"),
    "fewer tokens in a stage": (lambda f: edit_result(f, 3, lambda r: r["stages"]["quantized"].update(tokens=26_000)),
                                "validation bpb"),
    "fewer documents in a seed": (lambda f: edit_result(f, 2, val_docs=10_000), "validation documents"),
    "fewer documents in all": (lambda f: fewer_documents(f), "documents"),
    "documents sorted": (lambda f: (configure(f, ttt_mode="lora", ttt_doc_order="sorted"), rewrite(f)),
                         "order artifact"),
    "scored out of order": (lambda f: audit(f, "single_pass"), "order"),
    "training over 600 s": (lambda f: slow(f, train_seconds=600.4), "train_time"),
    "training over 600 s by a hair": (lambda f: (edit_result(f, 2, train_seconds=600.004), rewrite(f)),
                                      "train_time scores"),
    "evaluation over 600 s": (lambda f: (edit_result(f, 2, eval_seconds=611.0), rewrite(f)), "eval_time"),
    "another training time in the result": (lambda f: (edit_result(f, 2, train_seconds=90.0), rewrite(f)), "scores"),
    "no audit": (lambda f: (f / "audit_seed2.json").unlink(), "files audit overlap order"),
    "audit failed": (lambda f: audit(f, "causal"), "audit"),
    "audit of another script": (lambda f: edit_json(f / "audit_seed3.json", code_sha256="0" * 64), "audit"),
    "audit of another run": (lambda f: shutil.copy(f / "audit_seed1.json", f / "audit_seed3.json"), "audit"),
    "overlap": (lambda f: audit(f, "no_overlap"), "overlap"),
    "no training shards to compare with": (lambda f: edit_json(
        f / "audit_seed1.json", lambda verdict: verdict["checks"].update(no_overlap=None)), "overlap"),
    "calibration after the clock": (lambda f: replace(f / "train_seed3.log", "; kept:", "; OVER the clock; kept:"),
                                    "calibration"),
    "calibration on validation text": (lambda f: configure(f, gptq_calibration="val"),
                                       "calibration settings claims command"),
    "other settings in a seed": (lambda f: edit_result(f, 2, lambda r: r["config"].update(matrix_lr=0.03)), "settings"),
    "settings in submission.json": (lambda f: edit(f, lambda d: d["settings"].update(EMA_DECAY="0.9")), "settings"),
    "README claims a feature": (lambda f: edit_readme(f, "- SmearGate (input)\n", "- SmearGate (input)\n- YaRN\n"),
                                "claims"),
    "README drops a feature": (lambda f: edit_readme(f, "- SmearGate (input)\n", ""), "claims"),
    "prose claims a feature": (lambda f: add_prose(f, "Trained with varlen attention."), "claims"),
    "prose claims a setting": (lambda f: add_prose(f, "Ours is `EMA_DECAY=0.997`."), "claims"),
    "blurb claims a feature": (lambda f: edit(f, blurb="SmearGate with score-first LoRA."), "claims"),
    "name claims a feature": (lambda f: edit(f, name="Tiny_VE128"), "claims"),
    "README's settings": (lambda f: edit_readme(f, "| `EMA_DECAY` | `0.8` |", "| `EMA_DECAY` | `0.9` |"), "claims"),
    "README, a figure of the table": (lambda f: edit_readme(f, "| 1 | 5.", "| 1 | 4."), "numbers"),
    "prose, a figure": (lambda f: add_prose(f, "It reaches 1.0501 in 15,999,000 bytes."), "numbers"),
    "command": (lambda f: edit_readme(f, "EMA_DECAY=0.8 ", "EMA_DECAY=0.9 "), "command"),
    "command, seeds": (lambda f: edit_readme(f, "for SEED in 1 2 3;", "for SEED in 1 2 4;"), "command"),
    "score at a step, a digit": (lambda f: at_step(f, {"2": 1e-6}), "at_step"),
    "score at a step, rounded": (lambda f: edit(f, lambda d: d[s.AT_STEP].update({"2": round(d[s.AT_STEP]["2"], 2)})),
                                 "at_step"),
    "score at a step is text": (lambda f: edit(f, lambda d: d[s.AT_STEP].update({"2": str(d[s.AT_STEP]["2"])})),
                                "at_step numbers?"),
    "score at a step that was not validated": (lambda f: edit(f, lambda d: d[s.AT_STEP].update({"3": 1.5})), "at_step"),
    "score at a step left out": (lambda f: edit(f, lambda d: d.pop(s.AT_STEP)), "at_step"),
    "scores at steps, a list": (lambda f: edit(f, lambda d: d.update({s.AT_STEP: [d[s.AT_STEP]["2"]]})),
                                "at_step numbers"),
    "metrics altered": (lambda f: change_metrics(f, "2", 1e-4), "at_step"),
    "metrics and mean altered": (lambda f: (change_metrics(f, "2", -0.3), at_step(f, {"2": -0.1})), "at_step"),
    "metrics of another seed": (lambda f: shutil.copy(f / "metrics_seed1.jsonl", f / "metrics_seed2.jsonl"), "at_step"),
    "no metrics of a seed": (lambda f: (f / "metrics_seed3.jsonl").unlink(), "at_step"),
    "metrics, half a line": (lambda f: append(f / "metrics_seed3.jsonl", b'{"stage": "st'), "at_step"),
    "track": (lambda f: edit(f, track=s.OTHER_TRACK), "folder"),
    "date": (lambda f: edit(f, date="2026-04-30"), "folder"),
}


def at_step(folder: Path, change: dict[str, float]) -> None:
    """Other scores at these steps in submission.json, by so much."""
    edit(folder, lambda d: d[s.AT_STEP].update({step: d[s.AT_STEP][step] + more for step, more in change.items()}))


def change_metrics(folder: Path, seed: str, more: float) -> None:
    """Another score at step 2 in a seed's metrics, by so much."""
    path = folder / f"metrics_seed{seed}.jsonl"
    bpb = step_scores(path)[2]
    replace(path, json.dumps(bpb), json.dumps(bpb + more))


def step_scores(path: Path) -> dict[int, float]:
    """Step -> val_bpb, read in another way: the first figure behind the name in the line of its stage."""
    found = re.findall(r'"stage": "step(\d+)".*"val_bpb": ([\d.]+)', path.read_text())
    return {int(step): float(bpb) for step, bpb in found}


def edit_log_score(folder: Path) -> None:
    score = json.loads((folder / "result_seed2.json").read_text())["val_bpb"]
    replace(folder / "train_seed2.log", f"val_bpb:{score:.8f}", f"val_bpb:{score - 2e-8:.8f}")


def swap_artifact(folder: Path) -> None:
    """Another run's, whole in itself."""
    path = folder / MODEL
    settings, stored = tg.read_artifact(path.read_bytes(), path.name)
    other = {name: item._replace(parts={part: 0 * tensor if tensor.is_floating_point() else tensor
                                        for part, tensor in item.parts.items()}) for name, item in stored.items()}
    path.write_bytes(tg.write_artifact(settings, other, "ans"))


def put_artifact(folder: Path, data: bytes) -> None:
    """Other bytes as seed 1's artifact, with their size and hash wherever one is told."""
    run = json.loads((folder / "result_seed1.json").read_text())
    total = len(data) + run["code_bytes"]
    (folder / MODEL).write_bytes(data)
    edit_result(folder, 1, model_bytes=len(data), bytes_total=total, model_sha256=s.sha256(folder / MODEL))
    replace(folder / "train_seed1.log", f"bytes_total:{run['bytes_total']}", f"bytes_total:{total}")
    rewrite(folder)
    edit(folder, lambda d: d["seed_results"]["1"].update(model_sha256=s.sha256(folder / MODEL)))
    edit(folder, lambda d: d.update(bytes_total=max(row["artifact_bytes"] for row in d["seed_results"].values())))


def sealed(body: bytes) -> bytes:
    return tg.ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body


def of_version(folder: Path, version: int, seal: bool = True) -> bytes:
    """Seed 1's artifact with another version in it, under a checksum that fits or under the old one."""
    data = (folder / MODEL).read_bytes()
    body = bytes([version]) + data[21:]
    return sealed(body) if seal else data[:20] + body


def smallest(folder: Path) -> int:
    rows = json.loads((folder / s.SUBMISSION).read_text())["seed_results"].values()
    return min(row["artifact_bytes"] for row in rows)


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def fewer_documents(folder: Path) -> None:
    for seed in SEEDS:
        edit_result(folder, seed, val_docs=10_000)
        replace(folder / f"train_seed{seed}.log", "validation: 50000 documents", "validation: 10000 documents")
    edit(folder, val_docs=10_000)
    rewrite(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught_by_its_line(folder, fault):
    plant, names = FAULTS[fault]
    plant(folder)
    may = {name.rstrip("?") for name in names.split()}
    assert {name for name in names.split() if name in may} <= caught(folder) <= may


def test_an_artifact_of_another_version_is_not_passed_but_said_to_be_unread(folder):
    put_artifact(folder, of_version(folder, tg.ARTIFACT_VERSION + 1))
    assert caught(folder) == {"audit"}  # which was of the run's artifact
    line = next(x for x in check_submission.check(check_submission.Submission(folder)) if x.name == "artifact")
    assert line.status == "not run" and "another version of artifact" in line.evidence
    edit(folder, lambda d: d["seed_results"]["1"].update(model_sha256="0" * 64))
    assert caught(folder) == {"artifact", "audit"}


def test_a_thorough_rewrite_of_a_clean_folder_is_clean(folder):
    """What the faults above lean on changes nothing by itself."""
    configure(folder)
    rewrite(folder)
    assert caught(folder) == set()


@pytest.mark.parametrize("name", ["Tiny", "20261120_Tiny", "2026-11-21_Tiny"])
def test_a_wrong_folder_name_is_caught(folder, name):
    moved = folder.rename(folder.parent / name)
    assert caught(moved) == {"folder"}
    other = moved.parent.parent / "elsewhere"
    moved.parent.rename(other)
    assert caught(other / name) == {"folder"}


def test_a_tokenizer_is_kept_whatever_its_name_and_must_be_that_of_the_data(relabelled, tiny, tmp_path):
    runs = shutil.copytree(relabelled, tmp_path / "runs")
    for seed in SEEDS:
        old = read_result(runs / seed)["config"]
        new = old | {"tokenizer_path": "data/tokenizers/fineweb_512_bpe.model"}
        edit_json(runs / seed / "result.json", config=new)
        replace(runs / seed / "train.log", json.dumps(old), json.dumps(new))
    folder = make(runs, tmp_path / "out", s.RECORD_TRACK, "--tokenizer", tiny["TOKENIZER_PATH"])
    assert (folder / s.TOKENIZER).read_bytes() == Path(tiny["TOKENIZER_PATH"]).read_bytes()
    assert "TOKENIZER_PATH=tokenizer.model" in (folder / s.README).read_text()
    sub = check_submission.Submission(folder)
    sub.tokenizer_path = Path(tiny["TOKENIZER_PATH"])
    assert "512 pieces" in check_submission.check_tokenizer(sub)
    sub.tokenizer_path = tmp_path / "fineweb_512_bpe.model"
    sub.tokenizer_path.write_bytes(b"another")
    with pytest.raises(check_submission.Verdict, match="fineweb_512_bpe.model is not that of the runs"):
        check_submission.check_tokenizer(sub)


def test_validation_shards_that_do_not_start_with_bos_are_caught(folder, tiny, tmp_path):
    tokens = read_shard(Path(tiny["DATA_PATH"]) / "fineweb_val_000000.bin")
    (tmp_path / "data").mkdir()
    sub = check_submission.Submission(folder)
    sub.data_path = tmp_path / "data"
    for shard, words in ((tokens[1:], "starts with token"), (np.append(tokens, tokens[:1]), "7 BOS in the shards")):
        write_shard(tmp_path / "data/fineweb_val_000000.bin", shard)
        with pytest.raises(check_submission.Verdict, match=words):
            check_submission.check_bos(sub)


def test_a_mark_of_documents_named_by_bos_id_is_checked_as_the_run_had_it(folder, tiny, tmp_path):
    """The tokenizer has no BOS; documents start with a piece of the user's."""
    sp = put_tokenizer(folder, "<doc>")
    mark, word = sp.piece_to_id("<doc>"), sp.piece_to_id("e")
    sub = check_submission.Submission(folder)
    with pytest.raises(check_submission.Verdict, match="no BOS, and no BOS_ID names another mark"):
        check_submission.check_bos(sub)
    assert "512 pieces" in check_submission.check_tokenizer(sub)
    sub.config()["bos_id"] = mark
    assert "512 pieces" in check_submission.check_tokenizer(sub)
    assert check_submission.check_bos(sub).startswith(f"id {mark}, by BOS_ID")
    tokens = read_shard(Path(tiny["DATA_PATH"]) / "fineweb_val_000000.bin").copy()
    tokens[tokens == mark] = word
    (tmp_path / "data").mkdir()
    sub.data_path, sub.runs[0]["val_docs"] = tmp_path / "data", int((tokens == 1).sum())
    write_shard(tmp_path / "data/fineweb_val_000000.bin", tokens)
    with pytest.raises(check_submission.Verdict, match=f"with token 1, not with BOS {mark}; 0 BOS in the shards"):
        check_submission.check_bos(sub)
    write_shard(tmp_path / "data/fineweb_val_000000.bin", np.where(tokens == 1, mark, tokens).astype(tokens.dtype))
    assert "each of 6 documents" in check_submission.check_bos(sub)
    for bos_id in (word, 512):
        sub.config()["bos_id"] = bos_id
        for check in (check_submission.check_tokenizer, check_submission.check_bos):
            with pytest.raises(check_submission.Verdict, match=f"BOS_ID={bos_id}: takes a control or user-defined"):
                check(sub)


def test_a_score_that_the_artifact_does_not_give_is_caught(runs, tiny, tmp_path, monkeypatch):
    """A forger who edits result, log, submission.json and README alike is caught by what running it gives."""

    def score(*_: object, cwd: str, **options: object) -> subprocess.CompletedProcess:
        (Path(cwd) / "out").mkdir()  # the test above runs it; what comes out is what the run had
        shutil.copy(runs / "1/result.json", Path(cwd) / "out")
        return subprocess.CompletedProcess([], 0, "", "")

    folder = make(runs, tmp_path, s.OTHER_TRACK)
    for seed in SEEDS:
        run = json.loads((folder / f"result_seed{seed}.json").read_text())
        better = {"val_loss": 0.9 * run["val_loss"], "val_bpb": 0.9 * run["val_bpb"]}
        run["stages"]["quantized"] |= better
        edit_result(folder, seed, stages=run["stages"], **better)
        for key, value in better.items():
            replace(folder / f"train_seed{seed}.log", f"{key}:{run[key]:.8f}", f"{key}:{value:.8f}")
    rewrite(folder)
    assert caught(folder) == set()
    sub = check_submission.Submission(folder)
    sub.data_path = Path(tiny["DATA_PATH"])
    monkeypatch.setattr(check_submission.subprocess, "run", score)
    with pytest.raises(check_submission.Verdict, match="seed 1: ") as refused:
        check_submission.check_score(sub)
    right, told = map(float, re.search(r"seed 1: ([\d.]+), its run says ([\d.]+)", str(refused.value)).groups())
    assert told == pytest.approx(0.9 * right, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Scores at fixed steps


def test_the_score_at_a_step_is_the_mean_of_what_every_seed_logged_there(record, runs):
    for seed in SEEDS:
        assert (record / f"metrics_seed{seed}.jsonl").read_bytes() == (runs / seed / "metrics.jsonl").read_bytes()
    scores = [step_scores(record / f"metrics_seed{seed}.jsonl")[2] for seed in SEEDS]
    logged = [float(re.search(r"^stage:step2 .*val_bpb:(\S+)", (record / f"train_seed{seed}.log").read_text(), re.M)[1])
              for seed in SEEDS]
    assert len(set(scores)) == 3 and scores == pytest.approx(logged, abs=6e-7)
    told = json.loads((record / s.SUBMISSION).read_text())[s.AT_STEP]
    assert told.keys() == {"2"} and told["2"] == pytest.approx(np.mean(scores), abs=6e-9)


@pytest.mark.parametrize("drop", ["the file", "the line", "all files", "all lines"])
def test_a_step_that_a_seed_lacks_is_not_told(relabelled, tmp_path, drop):
    runs = shutil.copytree(relabelled, tmp_path / "runs")
    for path in [runs / seed / "metrics.jsonl" for seed in (SEEDS if "all" in drop else SEEDS[1:2])]:
        lines = path.read_text().splitlines(keepends=True)
        path.unlink()
        if "line" in drop:
            path.write_text("".join(line for line in lines if "step2" not in line))
    folder = make(runs, tmp_path / "out", s.RECORD_TRACK)
    assert s.AT_STEP not in json.loads((folder / s.SUBMISSION).read_text())
    assert [(folder / f"metrics_seed{seed}.jsonl").exists() for seed in SEEDS] == [
        (runs / seed / "metrics.jsonl").exists() for seed in SEEDS]
    line = next(x for x in check_submission.check(check_submission.Submission(folder)) if x.name == "at_step")
    assert line.status == ("not run" if "all" in drop else "pass")
    add_prose(folder, "At step 2 it has 9.8765.")
    assert caught(folder) == {"numbers"}


def test_the_prose_may_tell_the_score_at_a_step_and_what_was_gained_since(folder):
    data = json.loads((folder / s.SUBMISSION).read_text())
    early = data[s.AT_STEP]["2"]
    add_prose(folder, f"At step 2 it has {early:.4f}, and gains {early - data['val_bpb']:.4f} from there.")
    assert caught(folder) == set()


@pytest.mark.parametrize(("scores", "means"), [
    ([], {}), ([{}], {}), ([{1000: 1.5}, {}], {}), ([{1000: 1.5}, {2000: 1.4}], {}),
    ([{1000: 1.5, 2000: 1.25}, {1000: 1.0, 3000: 1.0}], {"1000": 1.25}),
    ([{2000: 3.0, 1000: 1.0}, {1000: 2.0, 2000: 4.5}, {1000: 6.0, 2000: 3.0}], {"1000": 3.0, "2000": 3.5})])
def test_means_at_steps_are_of_steps_that_all_have(scores, means):
    assert s.means_at_steps(scores) == means and list(s.means_at_steps(scores)) == list(means)


DAMAGED = {
    "half a line": (b'{"stage": "step4", "val_b', "not JSON"), "no object": (b"[4, 5.0]", "holds list"),
    "not a number": (b'{"stage": "step4", "val_bpb": NaN}', "not JSON"),
    "no score": (b'{"stage": "step4"}', "step4 stands twice, or has no number as val_bpb"),
    "text": (b'{"stage": "step4", "val_bpb": "5.0"}', "step4 stands twice, or has no number as val_bpb"),
    "a step twice": (b'{"stage": "step2", "val_bpb": 1.0}', "step2 stands twice"),
    "other bytes": (b"\xff\x00", "not JSON"), "an empty line": (b"\n", "not JSON")}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_line_of_metrics_is_named(relabelled, folder, tmp_path, capsys, what):
    """By make_submission.py as its one line, by check_submission.py as the evidence of at_step."""
    line, words = DAMAGED[what]
    runs = shutil.copytree(relabelled, tmp_path / "runs")
    path = runs / "2/metrics.jsonl"
    place = f"line {len(path.read_bytes().splitlines()) + 1}: {words}"
    append(path, line)
    shutil.copy(path, folder / "metrics_seed2.jsonl")
    arguments = ["--logs", *(str(runs / seed) for seed in SEEDS), "--out", str(tmp_path / "out"), *AUTHOR]
    assert make_submission.main(["Tiny", "--track", s.RECORD_TRACK, *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {path}, {place}") and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))
    failed = [x for x in check_submission.check(check_submission.Submission(folder)) if x.status in ("FAIL", "missing")]
    assert [(x.status, x.name) for x in failed] == [("FAIL", "at_step")] and place in failed[0].evidence


# ----------------------------------------------------------------------------------------------------------------------
# Significance


def standing(folder: Path, record: Path, gains: list[float]) -> Path:
    """A standing record, worse than `record` by so many nats in each seed."""
    data = json.loads((record / s.SUBMISSION).read_text())
    nats = data["val_loss"] / data["val_bpb"]
    mean = data["val_loss"]
    rows = {str(i): {"val_loss": mean + gain, "val_bpb": (mean + gain) / nats} for i, gain in enumerate(gains)}
    folder.mkdir(parents=True)
    (folder / s.SUBMISSION).write_text(json.dumps({"seed_results": rows}))
    return folder


def test_a_record_must_beat_the_standing_one_by_enough_and_for_certain(folder, tmp_path):
    mean = json.loads((folder / s.SUBMISSION).read_text())["val_loss"]
    for seed, shift in zip(SEEDS, (-0.0005, 0.0, 0.0005)):  # closer together than four steps of training leave them
        edit_result(folder, int(seed), val_loss=mean + shift)
    edit(folder, lambda d: [row.update(val_loss=1.0 + int(seed)) for seed, row in d["seed_results"].items()])
    for i, (gains, fault) in enumerate((
        ([0.0200, 0.0210, 0.0205], ""),
        ([0.0040, 0.0041, 0.0042], "0.005 are needed"),
        ([0.0060, 0.0062, 0.0064], "p < 0.01 is needed"),  # 0.0062 better, but not surely 0.005
        ([-0.0200, -0.0210, -0.0190], "0.005 are needed"),
        ([0.0200], "tells one seed"),
    )):
        sub = check_submission.Submission(folder)
        sub.against = check_submission.Submission(standing(tmp_path / str(i), folder, gains))
        line = next(x for x in check_submission.check(sub) if x.name == "significance")
        assert (line.status == "pass") == (not fault) and fault in line.evidence, line


def test_records_on_other_tokens_are_compared_by_bits_a_byte(folder, tmp_path):
    other = standing(tmp_path / "other", folder, [0.5, 0.501, 0.502])
    edit_json(other / s.SUBMISSION, lambda d: [row.update(val_loss=row["val_loss"] * 1.3)
                                               for row in d["seed_results"].values()])
    sub = check_submission.Submission(folder)
    sub.against = check_submission.Submission(other)
    assert "its tokens are others" in check_submission.check_significance(sub)
    assert "0.50100 nats better" in check_submission.check_significance(sub)


def test_welch_agrees_with_formulas_made_otherwise():
    """Of the t-distribution: closed forms for 2 and 4 degrees of freedom; of the statistic: numpy's moments."""
    for shift in (-3.0, -0.4, 0.0, 0.2, 1.5, 9.0):
        for ours in ([0.0, 2.0], [0.0, 1.0, 2.0]):  # and as many others of the same variance
            found = s.welch(ours, [loss + shift for loss in ours], 0.05)
            t = found.statistic
            x = t / math.sqrt(4 + t**2)
            dof, p = (2, 0.5 - t / (2 * math.sqrt(2 + t * t))) if len(ours) == 2 else (4, 0.5 - 0.25 * x * (3 - x * x))
            assert found.df == pytest.approx(dof) and found.pvalue == pytest.approx(p, rel=1e-6, abs=1e-10)
    rng = np.random.default_rng(shifted(0))
    for _ in range(20):
        ours, theirs = rng.normal(2.32, 0.002, rng.integers(2, 6)), rng.normal(2.33, 0.001, rng.integers(2, 6))
        a, b = ours.var(ddof=1) / len(ours), theirs.var(ddof=1) / len(theirs)
        found = s.welch(list(ours), list(theirs), 0.005)
        assert found.statistic == pytest.approx((theirs.mean() - ours.mean() - 0.005) / np.sqrt(a + b))
        assert found.df == pytest.approx((a + b) ** 2 / (a * a / (len(ours) - 1) + b * b / (len(theirs) - 1)))


@pytest.mark.filterwarnings("ignore:Precision loss")
@pytest.mark.parametrize(("theirs", "p"), [(1.1, 0), (1.0, 1)])
def test_welch_of_samples_without_spread(theirs, p):
    assert s.welch([1.0, 1.0], [theirs, theirs], 0.005).pvalue == p


# ----------------------------------------------------------------------------------------------------------------------
# What others hand in


FIELD_LOG = """seed: {seed}
val_tokens: 47851520
step:{steps}/20000 train_loss: 2.3 train_time: 596137ms step_avg: 121.3ms
stopping_early: wallclock_cap train_time: 596137ms step: {steps}/20000
diagnostic quantized val_loss:2.34613048 val_bpb:1.07199665 eval_time:7480ms
Code size: 31415 bytes
Total submission size quantized+pergroup: {size} bytes
ttt_phased: total_docs:50000 prefix_docs:2500
quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:508800ms
total_eval_time:508.8s
"""


@pytest.fixture
def field(tmp_path) -> Path:
    """A submission in the form of the field's: figures as published, no result files, std over n."""
    folder = tmp_path / "field" / s.RECORD_TRACK / "2026-04-27_SP8192_LQER_1.0611"
    folder.mkdir(parents=True)
    rows = {"42": (2.31944212, 1.05989454, 15897259, 4945), "0": (2.32239991, 1.06124613, 15900947, 4932),
            "1234": (2.32423994, 1.06208695, 15907550, 4917)}
    for seed, (loss, bpb, size, steps) in rows.items():
        (folder / f"train_seed{seed}.log").write_text(
            FIELD_LOG.format(seed=seed, loss=loss, bpb=bpb, size=size, steps=steps))
    results = {seed: {"val_loss": loss, "val_bpb": bpb, "artifact_bytes": size, "steps": steps, "eval_time_s": 508.8}
               for seed, (loss, bpb, size, steps) in rows.items()}
    data = {"author": "someone", "github_id": "someone", "name": "SP8192 LQER", "blurb": "LQER and SmearGate.",
            "date": "2026-04-27T12:00:00Z", "track": "10min_16mb", "val_loss": 2.32202732, "val_bpb": 1.06107587,
            "val_loss_std": 0.00198, "val_bpb_std": 0.0009, "seeds": [42, 0, 1234], "seed_results": results,
            "bytes_total": 15907550, "hardware": "8xH100 80GB SXM", "technique_summary": "11L XSA"}
    (folder / s.SUBMISSION).write_text(json.dumps(data))
    (folder / s.README).write_text("# SP8192 LQER\n")
    (folder / s.CODE).write_bytes(b"x" * 31415)
    return folder


def test_a_submission_of_the_field_is_read_as_far_as_it_goes(field):
    lines = {line.name: line for line in check_submission.check(check_submission.Submission(field))}
    passed = {name for name, line in lines.items() if line.status == "pass"}
    assert passed == {"folder", "seeds", "means", "scores", "code", "bytes", "train_time", "eval_time", "hardware",
                      "documents"}
    assert {name for name, line in lines.items() if line.status == "FAIL"} == set()
    assert "requirements.txt" in lines["files"].evidence and "pytorch_version" in lines["schema"].evidence
    edit(field, lambda data: data["seed_results"]["42"].update(val_bpb=1.05979454))
    assert {"means", "scores"} < caught(field)


def test_scores_of_the_field_may_be_rounded_to_four_digits_and_no_fewer(field):
    clean, content = caught(field), json.loads((field / s.SUBMISSION).read_text())
    rows = content["seed_results"]
    for places in (4, 3, 0):
        edit(field, val_bpb=round(content["val_bpb"], places), seed_results=rows)
        assert caught(field) - clean == ({"means"} if places < 4 else set())
        short = {seed: row | {"val_bpb": round(row["val_bpb"], places)} for seed, row in rows.items()}
        edit(field, val_bpb=content["val_bpb"], seed_results=short)
        assert ("scores" in caught(field)) == (places < 4)


@pytest.mark.parametrize(("said", "found", "least", "same"), [
    ("3.22", "3.22001111", 0, True), ("3.22", "3.22001111", 4, True), ("3.22", "3.22001111", 6, False),
    ("3", "3.22001111", 0, True), ("3", "3.22001111", 4, False), ("3.22001111", "3.22", 0, True),
    ("3.2249", 3.22, 0, False), ("3.22", 3.22, 6, True), ("7", 7, 6, True), ("7", 8, 0, False)])
def test_figures_agree_to_the_digits_that_both_have_and_to_the_least(said, found, least, same):
    said = int(said) if "." not in said else Decimal(said)
    assert s.agrees(said, Decimal(found) if isinstance(found, str) else found, least) == same


@pytest.mark.parametrize("form", [
    {"seed_results": {"42": 1.0599, "0": 1.0612, "1234": 1.0621}},
    {"seed_results": [{"seed": 42, "val_bpb": 1.0599}, {"seed": 0, "val_bpb": 1.0612}]},
    {"seed_results": {"seed_42": {"val_bpb": "1.06"}}}, {"seed_results": None}, {"seed_results": 7},
    {"seed_results": [3]}, {"seeds": "42"}, {"seeds": None}, {"date": 20260427}, {"track": 7},
    {"bytes_total": "15.9 MB"}, {"bytes_total": []},
    {"val_bpb": {"mean": 1.06}}, {"val_bpb": True}, {"hardware": None}, {"hardware": 8}, {"tokenizer": "sp8192"},
    {"blurb": None}, {"blurb": 5}, {"name": []}, {s.AT_STEP: 5}, {s.AT_STEP: {"x": 1.0}}, {s.AT_STEP: {"2": None}},
], ids=str)
def test_alien_fields_do_not_stop_the_check(field, folder, form):
    for target in (field, folder):
        edit(target, **form)
        lines = check_submission.check(check_submission.Submission(target))
        assert len(lines) == len(check_submission.CHECKS)
        assert {line.status for line in lines} <= {"pass", "FAIL", "missing", "note", "not run"}
        assert not check_submission.is_clean(lines)


@pytest.mark.parametrize("value", [None, "x", [], -1, 10**400], ids=["null", "text", "list", "negative", "huge"])
def test_alien_results_do_not_stop_the_check(folder, value):
    names = json.loads((folder / "result_seed2.json").read_text())
    for name in names:
        run = names | {name: value}
        (folder / "result_seed2.json").write_text(json.dumps(run))
        lines = check_submission.check(check_submission.Submission(folder))
        assert len(lines) == len(check_submission.CHECKS)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"val_bpb": NaN}', b"[" * 100_000, None])
def test_what_cannot_be_read_is_one_line(folder, content, capsys):
    if content is None:
        (folder / s.SUBMISSION).unlink()
    else:
        (folder / s.SUBMISSION).write_bytes(content)
    assert check_submission.main([str(folder)]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and s.SUBMISSION in err


def test_other_unreadable_input_is_one_line(folder, tmp_path, capsys):
    (folder / "result_seed3.json").write_text("{")
    for arguments in ([str(folder)], [str(tmp_path / "nowhere")]):
        assert check_submission.main(arguments) == 1
        assert capsys.readouterr().err.count("\n") == 1
    (folder / "result_seed3.json").unlink()
    for option in ("--data", "--tokenizer"):
        assert check_submission.main([str(folder), option, str(tmp_path / "nowhere")]) == 1
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}/nowhere: no such")


def test_a_log_that_looks_like_ours_is_read_as_far_as_it_goes():
    log = ("final val_loss:2.31, val_bpb:1.06\ntotal_eval_time:1.2.3s\ntrained 5 steps, 9 tokens in 1.2.3s\n"
           'settings: ' + '{"a":' * 50_000 + '1' + '}' * 50_000)
    assert s.read_log(log) == {"steps": 5, "over_clock": False}


def test_nothing_is_executed_without_data(folder, tmp_path):
    witness = tmp_path / "ran"
    (folder / s.CODE).write_text(f"open({str(witness)!r}, 'w')\n")
    assert caught(folder) == {"code"} and not witness.exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is not made


def change_run(run: Path, **values) -> None:
    edit_json(run / "result.json", **values)


def over_budget(run: Path) -> None:
    result = read_result(run)
    change_run(run, bytes_total=16_000_001, fits=False)
    replace(run / "train.log", f"bytes_total:{result['bytes_total']}", "bytes_total:16000001")


REFUSALS = {
    "two runs": (lambda f: shutil.rmtree(f / "3"), "2 runs; at least 3 seeds"),
    "a seed twice": (lambda f: change_run(f / "2", seed=1), "seed 1 twice"),
    "unfinished": (lambda f: (f / "2/result.json").unlink(), "no result.json: not the folder of a finished run"),
    "other code": (lambda f: append(f / "3/train_gpt.packed.py", b"\n"), "other code than in"),
    "other settings": (lambda f: edit_json(f / "3/result.json", lambda r: r["config"].update(min_lr=0.1)),
                       "MIN_LR=0.1"),
    "other machine": (lambda f: change_run(f / "3", device="cpu"), "run on 8 x cpu"),
    "over budget": (lambda f: over_budget(f / "3"), "bytes: 16,000,001 bytes, 1 over"),
    "no audit": (lambda f: (f / "3/audit.json").unlink(), "no audit.json; python records/audit.py"),
    "audit failed": (lambda f: edit_json(f / "3/audit.json", lambda v: v["checks"]["causal"].update(ok=False)),
                     "audit: seed 3: causal failed"),
    "part of the validation set": (lambda f: change_run(f / "3", val_complete=False), "part of the validation set"),
    "artifact cut": (lambda f: (f / "3/final_model.int6.ptz").write_bytes(b"PGA1"), "4 bytes, its result says"),
    "settings of no kind": (lambda f: change_run(f / "3", config=[]), "error: "),
    "not trained": (lambda f: edit_json(f / "3/result.json", lambda r: r["config"].update(eval_only="x")), "EVAL_ONLY"),
    "too slow": (lambda f: change_run(f / "3", eval_seconds=700.0), "eval_time: seed 3: 700.0 s"),
    "garbage": (lambda f: (f / "3/result.json").write_text("{"), "not JSON"),
    "alien": (lambda f: (f / "3/result.json").write_text("{}"), "not the result of this train_gpt.py"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_may_not_be_submitted_is_refused_in_one_line_and_leaves_nothing(relabelled, tmp_path, capsys, why):
    shutil.copytree(relabelled, tmp_path / "runs")
    plant, words = REFUSALS[why]
    plant(tmp_path / "runs")
    places = [str(tmp_path / "runs" / seed) for seed in SEEDS if (tmp_path / "runs" / seed).exists()]
    arguments = ["Tiny", "--track", s.RECORD_TRACK, "--logs", *places, "--out", str(tmp_path / "out"), *AUTHOR]
    assert make_submission.main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.glob("out/*"))


def test_author_name_and_date_are_asked_for(relabelled, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    base = ["--track", s.RECORD_TRACK, "--out", str(tmp_path), "--logs", *(str(relabelled / seed) for seed in SEEDS)]
    for arguments, words in ((["Tiny"], "no author: give --author, or set git's user.name"),
                             (["Tiny", "--author", "A"], "no github_id: give --github-id"),
                             (["a/b", *AUTHOR], "names a folder"),
                             (["Tiny", "--date", "today", *AUTHOR], "YYYY-MM-DD")):
        assert make_submission.main([*arguments, *base]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert make_submission.main(["Tiny", *AUTHOR, *base]) == 0
    assert make_submission.main(["Tiny", *AUTHOR, *base]) == 1
    assert "is there already" in capsys.readouterr().err
