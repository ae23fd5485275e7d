"""Every recipe, scaled down with all its techniques on, goes through training, compression and scoring."""

import dataclasses
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import check_submission
import numpy as np
import pytest
from conftest import PLAIN, ROOT, clean_environment, read_result, run_script
from forked import stand_in
from helpers import bare
from runs import PUBLISHED, RECIPE_OF, RECIPES, settings_of
from shards import write_shard

import train_gpt as tg

# what the recipe's techniques must add to the model; sizes are overridden, techniques never
PARAMETERS = {
    "SP4096_LinearLR_DepthRecurrence": {"lane_mix", "ve_table", "ve_bank", "ve_scale", "ve_layer_scale"},
    "SP8192_VarLen_Lanes_Muon097": {"lane_mix"},
    **dict.fromkeys(("SP8192_PR1855_Stack", "SP8192_PR2135_Stack", "SP8192_PR2014_GrowingContext",
                     "SP8192_14L_WithoutLoops", "SP8192_PR2135_OffsetKeys_WeightedSteps"),
                    {"lane_keep", "lane_write", "smear_weight", "smear_scale", "attn_gate"}),
    "SP8192_Loop042_RecurAB_QATLite": {"recur_blend"},
    "11L_GPTQ_XSA11_BigramHash3072": {"recur_blend", "bigram_table", "bigram_bank", "bigram_scale", "smear_theta",
                                      "ve_table", "ve_bank", "ve_scale", "ve_layer_scale"},
}
SCALED = {"MODEL_DIM": "64", "MLP_MULT": "2", "EVAL_STRIDE": "0", "TRAIN_BATCH_TOKENS": "768",
          "MICRO_BATCH_TOKENS": "384", "NUM_LAYERS": "11", "ITERATIONS": "12", "WARMUP_STEPS": "1", "SWA_EVERY": "1",
          "GPTQ_RESERVE_SECONDS": "0", "GPTQ_CALIBRATION_BATCHES": "2", "EVAL_SEQ_LEN": "auto", "CASEOPS_ENABLED": "0",
          "TTT_LORA_RANK": "4", "PHASED_TTT_PREFIX_DOCS": "2", "TTT_CHUNK_TOKENS": "512"}


def published() -> dict[str, dict[str, str]]:
    """By pull request, the settings its run used, name -> value (records/published_settings.tsv)."""
    lines = (ROOT / "records/published_settings.tsv").read_text().splitlines()
    (_, *requests), *rows = (line.split("\t") for line in lines if not line.startswith("#"))
    found = {request: {} for request in requests}
    for name, *values in rows:
        for request, value in zip(requests, values):
            if value:
                assert name not in found[request], name
                found[request][name] = value
    return found


def request_of(recipe) -> str:
    return str(json.loads((recipe / "published.json").read_text())["pull_request"])


def named_differences(recipe) -> dict[str, tuple[str, str]]:
    """Setting -> (there, here), of the rows of the README's table of what cannot be the same."""
    table = (recipe / "README.md").read_text().split("## What cannot be the same\n")[1].split("\n**Published")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| .+ \|$", table, re.M)
    return {name: (there, here) for name, there, here in rows}


def differences(settings: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """Setting -> our value, "–" for none, of every published setting that these do not have or have otherwise."""
    ours, notes = tg.read_settings(settings | {"RUN_ID": "r"})
    wanted = tg.read_environment(theirs)
    assert not wanted.ignored
    found = {line.split("=")[0]: "–" for line in wanted.absent}
    for name, value in wanted.explicit.items():
        if tg.Settings(**notes.explicit | {name: value}) != ours:  # as resolved: auto may be the same
            found[name.upper()] = str(tg.shown(getattr(ours, name)))
    return found


def test_all_nine_are_here():
    assert sorted(RECIPE_OF) == sorted(PARAMETERS) and len(PUBLISHED) == len(RECIPES) - 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_is_understood_word_for_word_and_says_what_was_not_run(recipe):
    settings, notes = tg.read_settings(settings_of(recipe))
    assert len(notes.explicit) == len(settings_of(recipe)) and not notes.ignored and not notes.aliases
    readme = (recipe / "README.md").read_text()
    assert ("**Published, by the author" in readme) == (recipe in PUBLISHED) and "Never at full size" in readme
    assert not (recipe / "submission.json").exists()
    for word in readme.replace("`", " ").split():  # settings named in the text are those of the recipe
        name, equals, value = word.strip(",;.").partition("=")
        if equals and name.isupper() and not name.startswith("SETTING"):
            assert float(settings_of(recipe)[name]) == float(value) if value.replace(".", "").isdigit() else (
                settings_of(recipe)[name] == value), word


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda path: path.name)
def test_recipe_is_what_was_published_but_for_what_its_readme_names(recipe):
    theirs = published()[request_of(recipe)]
    found, named = differences(settings_of(recipe), theirs), named_differences(recipe)
    assert set(found) == set(named)
    for name, (there, here) in named.items():
        assert there == theirs[name], name
        assert here == found[name] or float(here) == float(found[name]), name


@pytest.mark.parametrize(("name", "value"), [
    ("MATRIX_LR", "0.0261"), ("EMA_DECAY", "0.9"), ("QK_GAIN_INIT", "4"), ("XSA_LAST_N", "3"), ("NUM_LOOPS", "3"),
    ("PARALLEL_START_LAYER", "6"), ("WARMDOWN_FRAC", "0.5"), ("BETA2", "0.98"), ("GRAD_CLIP_NORM", "1"),
])
@pytest.mark.parametrize("recipe", PUBLISHED[:3], ids=lambda path: path.name)
def test_a_changed_setting_is_seen(recipe, name, value):
    """The comparison is no formality: one wrong value more is one difference more."""
    theirs = published()[request_of(recipe)]
    before = differences(settings_of(recipe), theirs)
    after = differences(settings_of(recipe) | {name: value}, theirs)
    assert name in after and set(after) == set(before) | {name}


@pytest.mark.parametrize("request_", published())
def test_every_published_name_is_understood(request_):
    """Each alone is a setting, an alias, harmless here, or told; together they are accepted as one environment."""
    fields = tg.Settings.__dataclass_fields__
    aliases = {alias for f in fields.values() for alias in f.metadata["aliases"]}
    for name, value in published()[request_].items():
        notes = tg.read_environment({name: value})
        if name.lower() in fields or name in aliases:
            assert notes.explicit and not notes.absent, name
        else:
            assert name in tg.ELSEWHERE and not notes.explicit, name
            off = value in ("False", "0", "0.0") and tg.ELSEWHERE[name] in ("0", "*")
            told = [line.startswith(f"{name}={value}: not ") for line in notes.absent]
            assert told in ([], [True]) and not (off and told), name
        assert not notes.ignored, name
    assert tg.read_environment(published()[request_]).explicit


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_does_not_hang_on_the_defaults(recipe):
    """It is the same where all that is on by default is off, but for settings of what it has off itself."""
    mine, other = (tg.read_settings(before | settings_of(recipe) | {"RUN_ID": "r"})[0] for before in ({}, PLAIN))
    differ = {name for name in vars(mine) if getattr(mine, name) != getattr(other, name)} - {"eval_stages"}
    idle = {"sparse_attn_gate_scale": mine.sparse_attn_gate_enabled, "parallel_mode": mine.parallel_start_layer < 11,
            "quant_trellis": mine.quant_allocation == "auto",
            **dict.fromkeys(("loop_start", "loop_end"), mine.num_loops),
            **dict.fromkeys(("ttt_lora_rank", "ttt_beta2", "phased_ttt_prefix_docs", "ttt_bucket_window"),
                            mine.ttt_mode == "phased"),
            **dict.fromkeys(("hedge_enabled", "token_order"), mine.ngram_tilt_enabled)}
    assert not {name for name in differ if idle.get(name, True)}


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory) -> dict[str, str]:
    """The tiny data set with only the first tokens of its validation text: test-time training goes token by token."""
    folder = tmp_path_factory.mktemp("short")
    shutil.copy(f"{tiny['DATA_PATH']}/fineweb_train_000000.bin", folder)
    tokens = tg.read_shard(f"{tiny['DATA_PATH']}/fineweb_val_000000.bin")
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate([tokens[:130], tokens[:80], tokens[:40]]))
    return tiny | {"DATA_PATH": str(folder)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_runs_through_compression_and_scoring(recipe, short, tmp_path):
    ours = settings_of(recipe)
    sizes = {name: value for name, value in short.items() if PLAIN.get(name) != value} | SCALED
    if float(ours.get("ENABLE_LOOPING_AT", 0)) > 1:
        sizes["ENABLE_LOOPING_AT"] = "4"
    if ours.get("EMA_DECAY") == "0":
        sizes["EMA_DECAY"] = "0"
    done = run_script(PLAIN | ours | sizes | {"ARTIFACT_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path)
    cfg = tg.Settings(**result["config"])
    base = bare(num_layers=11, model_dim=64, num_heads=4, num_kv_heads=2, vocab_size=512)
    added = set(dict(tg.GPT(cfg).named_parameters())) - set(dict(tg.GPT(base).named_parameters()))
    assert added == PARAMETERS[recipe.name.split("_", 1)[1]]
    log = (tmp_path / "train.log").read_text()
    assert result["stages"]["quantized"]["val_bpb"] < 9
    steps = [line for line in log.splitlines() if line.startswith("step:")]
    assert len(steps) == 12 and any(" loops:" in line for line in steps) == (cfg.num_loops > 0)
    assert steps[-1].endswith(" qat") == cfg.qat_enabled
    assert ("snapshots" in done.stdout) == ("swa" in cfg.average)
    assert ("ttt" in result["stages"]) == (cfg.ttt_mode != "none")


def test_run_scripts_take_a_recipe_and_the_user_wins(short, tmp_path):
    """The smoke script as a user calls it, with a recipe, on data of the user's own."""
    folder = next(path for path in RECIPES if "RecurAB" in path.name)
    shutil.copytree(short["DATA_PATH"], tmp_path / "data")
    mine = {k: short[k] for k in ("TOKENIZER_PATH", "VOCAB_SIZE", "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS", "DTYPE")}
    mine |= {"RECIPE": str(folder), "DATA_PATH": str(tmp_path / "data"), "DEVICE": "cpu",
             "ITERATIONS": "2", "MAX_WALLCLOCK_SECONDS": "0", "EVAL_STRIDE": "0", "MODEL_DIM": "64", "ROPE_DIMS": "8",
             "ARTIFACT_DIR": str(tmp_path / "run"), "QAT_LITE_EVERY": "1", "GPTQ_CALIBRATION_BATCHES": "1",
             "TTT_MODE": "none"}
    python = stand_in(tmp_path)
    done = subprocess.run([ROOT / "run_smoke_1gpu.sh"], capture_output=True, text=True,
                          **python | {"env": clean_environment(mine | python["env"])})
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/result.json").read_text())["config"]
    assert (config["recur_blend"], config["ema_decay"], config["num_layers"]) == ("ab", 0.0, 11)  # of the recipe
    assert (config["model_dim"], config["qat_lite_every"], config["vocab_size"]) == (64, 1, 512)  # of the user
    assert "bits per byte   after compression, reloaded" in done.stdout and "xz -9e" in done.stdout


def test_defaults_and_recipes_sort_no_more_documents_than_the_checker_allows():
    """A default that records/check_submission.py refuses would cost a record attempt all of its runs."""
    for settings in ({}, *map(settings_of, RECIPES)):
        cfg = tg.read_settings(settings)[0]
        sub = SimpleNamespace(config=lambda cfg=cfg: dataclasses.asdict(cfg), audit=lambda name: [])
        assert check_submission.check_order(sub)
        with pytest.raises(check_submission.Verdict, match="sorted by length"):
            sub.config = lambda cfg=cfg: dataclasses.asdict(cfg) | {"ttt_mode": "lora", "ttt_doc_order": "sorted"}
            check_submission.check_order(sub)
