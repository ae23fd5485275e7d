"""records/summary.py: what it says of a run's score beside the one that the smoke run gives everywhere."""

import json

import numpy as np
import pytest
import summary
from conftest import ROOT
from helpers import bare
from shards import read_shard, write_shard

import train_gpt as tg


@pytest.fixture
def result(tmp_path):
    """result.json of a run on two small shards, and what is expected of it."""
    for split, tokens in (("train", range(50)), ("val", range(9))):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", summary.tg.np.array(tokens, dtype="<u2"))
    config = tg.dataclasses.asdict(bare(data_path=str(tmp_path), vocab_size=64, max_wallclock_seconds=60.0))
    return {"val_bpb": 1.76543, "steps": 490, "config": config}


def changed(result: dict, **config) -> dict:
    return result | {"config": result["config"] | config}


def test_equal_to_a_hundredth_is_as_expected(result):
    expected = summary.expectation(result)
    assert expected["val_bpb"] == 1.7654 and expected["steps"] == 490 and json.dumps(expected)
    for off in (0, 0.0099, -0.0099):
        assert summary.comparison(result | {"val_bpb": 1.7654 + off}, expected).startswith("as expected: 1.7654")
    for off, said in ((0.011, "+0.0110"), (-0.3, "-0.3000")):
        said_now = summary.comparison(result | {"val_bpb": 1.7654 + off}, expected)
        assert said_now.startswith(f"NOT AS EXPECTED: {said} from 1.7654")


def test_where_things_lie_does_not_matter(result):
    elsewhere = changed(result, artifact_dir="x", run_id="y", audit=True, train_log_every=3)
    assert summary.comparison(elsewhere, summary.expectation(result)).startswith("as expected")


@pytest.mark.parametrize("change, said", [
    ({"num_layers": 6}, "of other settings: here NUM_LAYERS=6"), ({"seed": 7}, "here SEED=7"),
    ({"num_layers": 6, "seed": 7, "model_dim": 64, "num_heads": 2, "ema_decay": 0.0}, "and 2 more")])
def test_settings_of_the_users_own_are_not_compared(result, change, said):
    expected = summary.expectation(result)
    assert said in summary.comparison(changed(result, **change) | {"val_bpb": 9.0}, expected)


def test_another_text_is_not_compared(result, tmp_path):
    expected = summary.expectation(result)
    for split in ("train", "val"):
        path = tmp_path / f"fineweb_{split}_000000.bin"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"\1")
        assert "the text is another one" in summary.comparison(result | {"val_bpb": 9.0}, expected)
        path.write_bytes(good)
    assert summary.comparison(result, expected).startswith("as expected")


def test_a_run_that_the_clock_ended_is_not_compared(result):
    said = summary.comparison(result | {"steps": 300, "val_bpb": 9.0}, summary.expectation(result))
    assert "MAX_WALLCLOCK_SECONDS=60 ended training after 300 of 490 steps" in said


def test_what_is_expected_names_only_settings_that_exist():
    expected = json.loads((ROOT / "records/smoke.json").read_text())
    assert set(expected["config"]) <= set(tg.Settings.__dataclass_fields__) - summary.FREE
    assert 0 < expected["val_bpb"] < 2 and expected["steps"] == expected["config"]["iterations"]


def test_text_of_shards_whose_documents_begin_with_another_token(tiny, tmp_path):
    """BOS_ID's token begins a document and is no part of its text."""
    tokens = np.array(read_shard(f"{tiny['DATA_PATH']}/fineweb_val_000000.bin"))
    bos, other = tokens[0], np.setdiff1d(np.arange(100, 512), tokens)[0]  # a piece that the text does without
    for name, start in (("usual", bos), ("other", other)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "fineweb_val_000000.bin", np.where(tokens == bos, start, tokens).astype("<u2"))
    config = {"tokenizer_path": tiny["TOKENIZER_PATH"], "vocab_size": 512, "caseops_enabled": False}
    usual = summary.validation_text(config | {"data_path": str(tmp_path / "usual"), "bos_id": None})
    assert summary.validation_text(config | {"data_path": str(tmp_path / "other"), "bos_id": int(other)}) == usual
    assert len(usual) > 5000


# ----- on a GPU


def test_what_a_gpu_did_is_told_from_the_log_and_the_result(result):
    log = ("environment: python 3, attention fa3 of x version 1\nattention: not fa4: why\nstep:1/2\nwarm-up: 0 loops: "
           "first step 40.00s, last one 0.500s, in which the host waited for the GPU at: no line\n")
    ran = result | {"device": "NVIDIA H100 80GB HBM3", "tok_per_s": 1e6, "world_size": 1, "peak_memory_bytes": 5e10,
                    "train_seconds": 120.0, "stages": {"pre_quant": {"seconds": 3.04}}}
    said = summary.gpu_report(ran, log).splitlines()
    assert said[:3] == [log.splitlines()[i] for i in (0, 1, 3)]
    cfg = tg.Settings(**ran["config"])
    d, layers, hidden, kv = cfg.model_dim, cfg.num_layers, int(cfg.mlp_mult * cfg.model_dim), 4 * 64
    weights = layers * (2 * d * d + 2 * d * kv + 2 * d * hidden) + cfg.vocab_size * d
    attention = layers * 4 * d * (cfg.train_seq_len + 1) / 2  # two products over the keys a token meets, on average
    flops = 3 * (2 * weights + attention)  # backward costs twice the forward pass
    share = float(said[3].split("MFU ")[1].rstrip("%")) / 100
    assert share == pytest.approx(flops * 1e6 / 989e12, rel=0.01)
    assert said[4:] == ["memory: 50.0 GB at most on one GPU", "seconds: train 120.0, pre_quant 3.0"]
    for other in ("NVIDIA A100", "NVIDIA H100 PCIe"):  # the second has another peak
        assert "MFU unknown of this GPU" in summary.gpu_report(ran | {"device": other}, log)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"config": {}, "stages": {}}'])
def test_what_is_no_result_is_one_line(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "result.json").write_text(content)
    monkeypatch.setattr("sys.argv", ["summary.py", str(tmp_path)])
    assert summary.main() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/result.json: ") and error.count("\n") == 1


def test_a_summary_may_be_asked_for_from_anywhere(tiny, tmp_path, monkeypatch, capsys):
    """A run's paths may be relative to where it was started; the environment's come first."""
    config = tg.dataclasses.asdict(bare(data_path="data", tokenizer_path="no.model", vocab_size=512))
    run = {"config": config, "stages": {}, "steps": 1, "tokens_seen": 1, "train_seconds": 1, "tok_per_s": 1,
           "fits": True, "world_size": 1, "device": "cpu", "val_bytes": 1, "bytes_total": 2, "budget_bytes": 3,
           "model_bytes": 1, "code_bytes": 1}
    (tmp_path / "result.json").write_text(json.dumps(run))
    monkeypatch.setattr("sys.argv", ["summary.py", str(tmp_path)])
    assert summary.main() == 1
    assert "no.model" in capsys.readouterr().err
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.setenv(name, tiny[name])
    assert summary.main() == 0
    assert "bits per byte   gzip -9" in capsys.readouterr().out
