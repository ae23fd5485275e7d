"""CaseOps in the script: charged by the sidecar what the raw text takes, and never mixed up with plain data."""

import json
import math
import shutil
from pathlib import Path

import audit
import caseops
import numpy as np
import pytest
import sentencepiece
import summary
from conftest import ROOT, TINY, read_result, run_script
from forked import ForkedRun
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs import export_topics, help_topics
from shards import read_shard, write_shard

import train_gpt as tg

VAL = [*(text[:1500] for text in help_topics()[:50:10]),
       "NASA's Straße, İstanbul: ǅ Ⱥ ΑΣ McDonald \ue001 iPhone", "  TWO  Spaces\r\n\tand a tab "]


@pytest.fixture(scope="module")
def cased(tmp_path_factory) -> dict[str, str]:
    """Settings as environment variables; a tiny model on a CaseOps data set."""
    folder = tmp_path_factory.mktemp("cased")
    export_topics(folder, VAL, "--caseops")
    return TINY | {"DATA_PATH": str(folder / "datasets/topics_sp512_caseops"), "CASEOPS_ENABLED": "1",
                   "TOKENIZER_PATH": str(folder / "tokenizers/topics_512_bpe_caseops.model")}


def settings(environ: dict[str, str]) -> tg.Settings:
    return tg.read_settings(environ)[0]


def load(environ: dict[str, str]) -> tg.Validation:
    cfg = settings(environ)
    return tg.Validation.load(cfg, tg.read_tokenizer(cfg.tokenizer_path, cfg.vocab_size))


def test_every_document_is_charged_its_raw_bytes(cased):
    val = load(cased)
    starts = [*np.flatnonzero(val.tokens.numpy() == val.bos), len(val.tokens)]
    charged = [int(val.bytes[a:b].sum()) for a, b in zip(starts, starts[1:])]
    assert charged == [len(text.encode()) for text in VAL] and not val.bytes[starts[:-1]].any()


def test_the_summary_compresses_the_raw_text(cased):
    config = {"data_path": cased["DATA_PATH"], "tokenizer_path": cased["TOKENIZER_PATH"], "vocab_size": 512,
              "caseops_enabled": True}
    assert summary.validation_text(config) == "".join(VAL).encode()


def test_a_run_is_scored_by_raw_bytes_and_passes_its_audit(cased, tmp_path):
    environ = cased | {"ARTIFACT_DIR": str(tmp_path / "run"), "EVAL_STRIDE": "0"}
    done = run_script(environ)
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run")
    raw = sum(len(text.encode()) for text in VAL)
    assert result["val_bytes"] == raw and failed_checks(tmp_path / "run") == []
    for stage in result["stages"].values():
        nats = stage["val_loss"] * stage["tokens"]
        assert math.isclose(stage["val_bpb"], nats / math.log(2) / raw, rel_tol=1e-9)
    environ = {k: cased[k] for k in ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "DTYPE")} | {
        "EVAL_ONLY": str(tmp_path / "run/final_model.int6.ptz"), "ARTIFACT_DIR": str(tmp_path / "e")}
    packed = run_script(environ, script=tmp_path / "run/train_gpt.packed.py")
    assert packed.returncode == 0, packed.stderr  # the artifact says that it takes CaseOps data
    assert read_result(tmp_path / "e")["val_bpb"] == pytest.approx(result["val_bpb"], abs=1e-9)


def test_a_wrong_sidecar_fails_the_audit(cased, tmp_path):
    folder = copy_of(cased, tmp_path)
    path = folder / "fineweb_val_bytes_000000.bin"
    data = bytearray(path.read_bytes())
    where = 1024 + 2 * int(np.flatnonzero(tg.read_shard(str(path)))[7])
    data[where] += 1
    path.write_bytes(data)
    done = run_script(cased | {"DATA_PATH": str(folder), "ARTIFACT_DIR": str(tmp_path / "run"), "ITERATIONS": "2",
                               "EVAL_STRIDE": "0"})
    assert done.returncode == 0
    assert failed_checks(tmp_path / "run") == ["bytes", "score"]


def test_the_auditors_sidecar_is_the_exporters(cased):
    """Also for a text that was altered: what it charges is what the documents come to."""
    sp = sentencepiece.SentencePieceProcessor(model_file=cased["TOKENIZER_PATH"])
    tokens, charges = (np.concatenate([np.array(read_shard(path)) for path in audit.find_shards(
        Path(cased["DATA_PATH"]), split)]) for split in ("val", "val_bytes"))
    text = audit.Text(tokens, sp, sp.bos_id(), True)
    assert text.sidecar().tolist() == charges.tolist()
    other = text.replaced(text.altered())
    assert int(other.sidecar().sum(dtype=int)) == other.count_bytes(other.documents())
    assert ((other.tokens == text.tokens) == (text.tokens == text.bos)).all()


def failed_checks(run: Path) -> list[str]:
    """Names of what the auditor finds wrong."""
    done = ForkedRun({}, str(ROOT / "records/audit.py"), str(run)).finish()
    assert done.returncode in (0, 3), done.stderr
    checks = json.loads((run / "audit.json").read_text())["checks"]
    return [name for name, check in checks.items() if not check["ok"]]


def copy_of(cased: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(cased["DATA_PATH"], tmp_path / "copy"))


def refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(tg.RunError, match=words):
        load(environ)


def test_caseops_shards_are_refused_by_plain_counting(cased, tiny):
    refused(cased | {"CASEOPS_ENABLED": "0"}, "CASEOPS_ENABLED=0: DATA_PATH=.* has fineweb_val_bytes")


def test_plain_shards_are_refused_by_caseops(cased, tiny):
    refused(tiny | {"CASEOPS_ENABLED": "1"}, "CASEOPS_ENABLED=1: DATA_PATH=.* has no fineweb_val_bytes")


def test_a_sidecar_taken_away_or_a_tokenizer_exchanged_is_refused(cased, tiny, tmp_path):
    folder = copy_of(cased, tmp_path)
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    environ = cased | {"DATA_PATH": str(folder)}
    refused(environ, "CASEOPS_ENABLED=1: DATA_PATH=.* has no fineweb_val_bytes")
    refused(environ | {"CASEOPS_ENABLED": "0"}, "CASEOPS_ENABLED=0: TOKENIZER_PATH=.* has pieces for CaseOps")
    refused(cased | {"TOKENIZER_PATH": tiny["TOKENIZER_PATH"]}, "CASEOPS_ENABLED=1: TOKENIZER_PATH=.* has no pieces")


@pytest.mark.parametrize("fault", ["short", "another", "extra", "bos"])
def test_a_sidecar_that_does_not_fit_its_shard_is_refused(cased, tmp_path, fault):
    folder = copy_of(cased, tmp_path)
    path = folder / "fineweb_val_bytes_000000.bin"
    counts = np.array(tg.read_shard(str(path)))
    words = "fineweb_val_bytes_00000[01].bin: (expected one number for each token|missing)"
    if fault == "short":
        write_shard(path, counts[:-1])
    elif fault == "another":
        path.rename(folder / "fineweb_val_bytes_000001.bin")
    elif fault == "extra":
        write_shard(folder / "fineweb_val_bytes_000001.bin", counts)
    else:
        counts[0] = 1
        write_shard(path, counts)
        words = "charge bytes to tokens that start a document"
    refused(cased | {"DATA_PATH": str(folder)}, words)


def test_the_manifest_knows_how_many_bytes_there_are(cased, tmp_path):
    """Charges that sum to another number than the manifest says: the set is not the one that was made."""
    folder = copy_of(cased, tmp_path)
    assert load(cased).complete is True
    entry = json.loads((Path(cased["DATA_PATH"]).parent.parent / "manifest.json").read_text())["datasets"][0]
    raw = sum(len(text.encode()) for text in VAL)
    for said in (raw, raw - 1):
        stats = entry["stats"] | {"bytes_val": said}
        manifest = {"datasets": [entry | {"name": "copy", "stats": stats}]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert load(cased | {"DATA_PATH": str(folder)}).complete is (said == raw)


def test_one_private_character_is_no_caseops_tokenizer(cased, tiny):
    table = tg.read_tokenizer(cased["TOKENIZER_PATH"], 512)
    assert table.case_markers and not tg.read_tokenizer(tiny["TOKENIZER_PATH"], 512).case_markers


def test_an_artifact_for_caseops_is_not_scored_on_plain_data(cased, tiny, tmp_path):
    environ = {"ITERATIONS": "1", "EVAL_STRIDE": "0", "ARTIFACT_DIR": str(tmp_path / "run")}
    assert run_script(cased | environ).returncode == 0
    done = run_script({k: tiny[k] for k in ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "DTYPE")} | {
        "EVAL_ONLY": str(tmp_path / "run/final_model.int6.ptz"), "ARTIFACT_DIR": str(tmp_path / "e")})
    assert done.returncode == 1 and "CASEOPS_ENABLED=1: DATA_PATH=" in done.stderr
    done = run_script({k: tiny[k] for k in ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "DTYPE")} | {
        "EVAL_ONLY": str(tmp_path / "run/final_model.int6.ptz"), "CASEOPS_ENABLED": "0",
        "ARTIFACT_DIR": str(tmp_path / "e")})
    assert done.returncode == 1 and "made with CASEOPS_ENABLED=True" in done.stderr


def test_default_paths_follow_the_setting():
    cfg = tg.Settings(caseops_enabled=True, vocab_size=4096)
    assert cfg.data_path.endswith("datasets/fineweb10B_sp4096_caseops")
    assert cfg.tokenizer_path.endswith("tokenizers/fineweb_4096_bpe_caseops.model")


@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text() | st.text(alphabet="aAbBßİıǅǆΣσςȺⱥÀé' -1\ue001\ue002\ue003\ue004"))
def test_the_lenient_inverse_gives_the_text_back(text):
    assert caseops.restore(caseops.transform(text), strict=False) == text
