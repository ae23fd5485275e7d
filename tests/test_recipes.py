"""Every recipe, scaled down with all its techniques on, goes through training, compression and scoring."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, clean_environment, read_result, run_script
from shards import write_shard

import train_gpt as tg

RECIPES = sorted(path.parent for path in ROOT.glob("records/track_*/*/recipe.env"))
# what the recipe's techniques must add to the model; sizes are overridden, techniques never
PARAMETERS = {
    "SP4096_LinearLR_DepthRecurrence": set(),
    "SP8192_VarLen_Lanes_Muon097": {"lane_mix"},
    "SP8192_PR1855_Stack": {"lane_keep", "lane_write", "smear_weight", "smear_scale", "attn_gate"},
    "SP8192_Loop042_RecurAB_QATLite": {"recur_blend"},
    "11L_GPTQ_XSA11_BigramHash3072": {"recur_blend", "bigram_table", "bigram_bank", "bigram_scale", "smear_theta",
                                      "ve_table", "ve_bank", "ve_scale", "ve_layer_scale"},
}
SCALED = {"MODEL_DIM": "64", "MLP_MULT": "2", "EVAL_STRIDE": "0", "TRAIN_BATCH_TOKENS": "768",
          "MICRO_BATCH_TOKENS": "384", "NUM_LAYERS": "11", "ITERATIONS": "12", "WARMUP_STEPS": "1", "SWA_EVERY": "1",
          "GPTQ_RESERVE_SECONDS": "0", "TTT_LORA_RANK": "4", "PHASED_TTT_PREFIX_DOCS": "2", "TTT_CHUNK_TOKENS": "512"}


def settings_of(recipe) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (recipe / "recipe.env").read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line)


def test_all_five_are_here():
    assert sorted(path.name.split("_", 1)[1] for path in RECIPES) == sorted(PARAMETERS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_is_understood_word_for_word_and_says_what_was_not_run(recipe):
    settings, notes = tg.read_settings(settings_of(recipe))
    assert len(notes.explicit) == len(settings_of(recipe)) and not notes.ignored and not notes.aliases
    readme = (recipe / "README.md").read_text()
    assert "**Published, by the author" in readme and "Never at full size" in readme
    assert not (recipe / "submission.json").exists()
    for word in readme.replace("`", " ").split():  # settings named in the text are those of the recipe
        name, equals, value = word.strip(",;.").partition("=")
        if equals and name.isupper() and not name.startswith("SETTING"):
            assert float(settings_of(recipe)[name]) == float(value) if value.replace(".", "").isdigit() else (
                settings_of(recipe)[name] == value), word


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory) -> dict[str, str]:
    """The tiny data set with only the first tokens of its validation text: test-time training goes token by token."""
    folder = tmp_path_factory.mktemp("short")
    shutil.copy(f"{tiny['DATA_PATH']}/fineweb_train_000000.bin", folder)
    tokens = tg.read_shard(f"{tiny['DATA_PATH']}/fineweb_val_000000.bin")
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate([tokens[:300], tokens[:200], tokens[:100]]))
    return tiny | {"DATA_PATH": str(folder)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_runs_through_compression_and_scoring(recipe, short, tmp_path):
    ours = settings_of(recipe)
    sizes = short | SCALED
    if float(ours.get("ENABLE_LOOPING_AT", 0)) > 1:
        sizes["ENABLE_LOOPING_AT"] = "4"
    if ours.get("EMA_DECAY") == "0":
        sizes["EMA_DECAY"] = "0"
    done = run_script(ours | sizes | {"ARTIFACT_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path)
    cfg = tg.Settings(**result["config"])
    plain = tg.Settings(num_layers=11, model_dim=64, num_heads=4, num_kv_heads=2, vocab_size=512)
    added = set(dict(tg.GPT(cfg).named_parameters())) - set(dict(tg.GPT(plain).named_parameters()))
    assert added == PARAMETERS[recipe.name.split("_", 1)[1]]
    log = (tmp_path / "train.log").read_text()
    assert "loops:" in log and result["stages"]["quantized"]["val_bpb"] < 9
    steps = [line for line in log.splitlines() if line.startswith("step:")]
    assert len(steps) == 12 and steps[-1].endswith(" qat") == cfg.qat_enabled
    assert ("snapshots" in done.stdout) == cfg.swa_enabled
    assert ("ttt" in result["stages"]) == (cfg.ttt_mode != "none")


def test_run_scripts_take_a_recipe_and_the_user_wins(short, tmp_path):
    """The smoke script as a user calls it, with a recipe, on data of the user's own."""
    folder = next(path for path in RECIPES if "RecurAB" in path.name)
    shutil.copytree(short["DATA_PATH"], tmp_path / "data")
    mine = {k: short[k] for k in ("TOKENIZER_PATH", "VOCAB_SIZE", "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS", "DTYPE")}
    mine |= {"RECIPE": str(folder), "DATA_PATH": str(tmp_path / "data"), "PYTHON": sys.executable, "DEVICE": "cpu",
             "ITERATIONS": "2", "MAX_WALLCLOCK_SECONDS": "0", "EVAL_STRIDE": "0", "MODEL_DIM": "64", "ROPE_DIMS": "8",
             "ARTIFACT_DIR": str(tmp_path / "run"), "QAT_LITE_EVERY": "1"}
    done = subprocess.run([ROOT / "run_smoke_1gpu.sh"], env=clean_environment(mine), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/result.json").read_text())["config"]
    assert (config["recur_blend"], config["ema_decay"], config["num_layers"]) == ("ab", 0.0, 11)  # of the recipe
    assert (config["model_dim"], config["qat_lite_every"], config["vocab_size"]) == (64, 1, 512)  # of the user
    assert "bits per byte   after compression, reloaded" in done.stdout and "xz -9e" in done.stdout
