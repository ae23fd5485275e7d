"""What torch.compile makes of a whole run: no graph on a clock that the warm-up did not make, by Dynamo's own guards;
and, with a CUDA build of PyTorch, machine code for an H100 of every graph (benchmarks/codegen.py).
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_environment
from runs import RECIPE_OF, SMALL, TOGETHER, scaled, settings_of, short_data, watch

sys.path.append(str(ROOT / "benchmarks"))
import codegen

import train_gpt as tg

CUDA_TORCH = os.environ.get("CUDA_TORCH")  # the folder of codegen.py's pip line
WITHOUT = "CUDA_TORCH names no folder with a CUDA build of PyTorch (benchmarks/codegen.py)"


# ----- graphs on the clock


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory) -> dict[str, str]:
    return short_data(tiny, tmp_path_factory.mktemp("graphs"))


def graphs_of(settings: dict[str, str], folder, *faults) -> tuple[int, list[str]]:
    """A whole run under Dynamo; how many graphs it made, and the shapes that those on a clock take."""
    count, seen = [], SimpleNamespace(GRAPHS=[], USED=set(), WAITS={})

    def backend(graph, inputs):
        count.append(graph)
        seen.GRAPHS.append(str([tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor)]))
        return graph.forward

    torch._dynamo.reset()
    logging.disable(logging.DEBUG)  # or pytest's log handler has every graph printed
    with pytest.MonkeyPatch.context() as patch:
        real = tg.compile_model
        patch.setattr(tg, "compile_model", lambda model: real(model, backend))
        patch.setattr(tg, "pack_code", lambda *_: b"the code")
        for fault in faults:
            fault(tg, patch)
        watch(tg, patch, seen, {})
        status = tg.start([], tg.Launch(0, 0, 1), clean_environment(
            SMALL | settings | {"DEVICE": "cpu", "DTYPE": "fp32", "COMPILE": "1", "ATTENTION": "auto",
                                "ARTIFACT_DIR": str(folder)}))
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()
    assert status == 0
    return len(count), seen.GRAPHS


# a layer that loops, and one of lanes with value embeddings; Dynamo takes its time for each, and for each technique
LAYERS = {"NUM_LAYERS": "2", "LOOP_START": "0", "LOOP_END": "0", "PARALLEL_START_LAYER": "1", "VE_LAYERS": "0,1",
          "QAT_LITE_LAYER_START": "1"}
# all the others when there is time
USUAL = ["chunk", "phased"]


@pytest.mark.parametrize("case", [*TOGETHER, *RECIPE_OF])
def test_the_warm_up_makes_all_graphs_of_a_run(data, tmp_path, case):
    if case not in USUAL and not CUDA_TORCH:
        pytest.skip(WITHOUT)
    settings = scaled(RECIPE_OF[case]) if case in RECIPE_OF else TOGETHER[case]
    made, late = graphs_of(settings | LAYERS | data, tmp_path)
    assert late == [] and made >= 2  # training and the score


def no_evaluation(tg, patch) -> None:
    patch.setattr(tg.Evaluator, "warm_windows", lambda self: None)


def no_test_time_training(tg, patch) -> None:
    patch.setattr(tg.Evaluator, "warm_ttt", lambda self: None)


@pytest.mark.parametrize("fault, settings", [(no_evaluation, TOGETHER["sliding"]),
                                             (no_test_time_training, TOGETHER["chunk"])])
def test_a_graph_that_the_warm_up_lacks_is_seen(data, tmp_path, fault, settings):
    assert graphs_of(settings | LAYERS | data, tmp_path, fault)[1]


@pytest.mark.parametrize("mode, faults", [("chunk", []), ("sliding", [no_evaluation])])
def test_scoring_an_artifact_makes_no_graph_on_its_clock(data, tmp_path, mode, faults):
    """Where no training has compiled anything before. Without a part of the warm-up it would."""
    settings = TOGETHER[mode] | LAYERS | data
    graphs_of(settings, tmp_path / "run")
    artifact = {"EVAL_ONLY": str(tmp_path / "run/final_model.int6.ptz")}
    made, late = graphs_of(settings | artifact, tmp_path / "score", *faults)
    assert made >= 1 and (late != []) == bool(faults)


# ----- machine code


def kinds_of_layers(settings: dict[str, str]) -> set[tuple]:
    """What layers of a run have and are, as far as it makes another graph."""
    cfg = dataclasses.replace(
        tg.read_settings(settings)[0], model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=1, vocab_size=64)
    model, ids, found = tg.GPT(cfg), torch.zeros(1, 8, dtype=torch.long), set()

    def layer(x, lane, skip, last, own, shared, here):
        found.add((*(t is None for t in (lane, skip, last)), *own.weights, own.xsa, own.parallel))
        return model.layer(x, lane, skip, last, own, shared, here)

    for loops in {0, *(loops for _, loops in cfg.loop_stages())}:
        model(ids, ids, loops=loops, parts=[model.embed, layer, model.predict])
    return found


@pytest.mark.parametrize("form", [*codegen.FORMS, *codegen.RECIPES])
def test_few_layers_are_of_all_kinds(form):
    """And all else is the form's own."""
    whole = codegen.FORMS[form] if form in codegen.FORMS else settings_of(codegen.RECIPES[form].parent)
    few = codegen.settings_of(form)
    changed = {name for name in whole if few[name] != whole[name]}
    assert changed <= {"NUM_LAYERS", "LOOP_START", "LOOP_END", "PARALLEL_START_LAYER", "VE_LAYERS",
                       "QAT_LITE_LAYER_START", "MAX_WALLCLOCK_SECONDS"}
    assert kinds_of_layers(few) >= kinds_of_layers(whole)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch")
def test_without_a_cuda_build_it_says_so_in_one_line(capsys):
    assert codegen.main(["defaults"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"error: torch {torch.__version__} compiles nothing for a GPU; takes a CUDA build (and no GPU)\n")


def compiled(path, *forms: str, **environment: str) -> tuple[int, dict]:
    """Status and figures of codegen.py, of a model of two layers."""
    done = subprocess.run(
        [sys.executable, codegen.__file__, *forms, "--json", str(path)], capture_output=True, text=True,
        env=clean_environment({"NUM_LAYERS": "2", "PYTHONPATH": CUDA_TORCH, "TTT_MODE": "none"} | environment))
    assert path.exists(), done.stderr[-3000:]
    return done.returncode, json.loads(path.read_text())


@pytest.mark.skipif(not CUDA_TORCH, reason=WITHOUT)
def test_graphs_become_machine_code(tmp_path):
    status, found = compiled(tmp_path / "json", "defaults", "fused", "lora", TTT_MODE="lora", TTT_CHUNK_SIZE="512")
    assert status == 0
    for form in found.values():
        assert form["failed"] == {} and form["graphs"] > 10 and form["kernels"] > 50 and form["made"]
        assert all(registers > 8 for kernel in form["made"] for registers in kernel["registers"])
    own = [kernel["name"] for kernel in found["fused"]["made"][-4:]]
    assert own == ["mlp_kernel", "mlp_kernel", "loss_kernel", "loss_kernel"]


@pytest.mark.skipif(not CUDA_TORCH, reason=WITHOUT)
def test_what_spills_or_fails_is_told(tmp_path):
    small = {"MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "NUM_LAYERS": "1"}
    status, found = compiled(tmp_path / "few", "defaults", PTXAS_OPTIONS="--maxrregcount=24", **small)
    assert status == 0 and any(min(kernel["spilled"]) for kernel in found["defaults"]["made"])
    status, found = compiled(tmp_path / "none", "defaults", PTXAS_OPTIONS="--no-such-option", **small)
    assert status == 1 and found["defaults"]["made"] == [] and len(found["defaults"]["failed"]) > 20
