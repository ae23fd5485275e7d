"""Paths for the tests, and one small real data set with a tiny model's settings shared by those that run the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny: threads would only wait for each other
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, one program after another
from forked import LONGEST, PLAIN, ROOT, TRAIN, ForkedRun, clean_environment

pytest.register_assert_rewrite("helpers", "reference", "runs")  # or what they assert would fail without a word
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "records")]

TINY = PLAIN | {
    "VOCAB_SIZE": "512", "NUM_LAYERS": "3", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
    "TRAIN_SEQ_LEN": "64", "TRAIN_BATCH_TOKENS": "768", "MICRO_BATCH_TOKENS": "384", "EVAL_BATCH_TOKENS": "4096",
    "ITERATIONS": "20", "MAX_WALLCLOCK_SECONDS": "0", "WARMUP_STEPS": "1", "TRAIN_LOG_EVERY": "1",
    "EMA_DECAY": "0.8", "EVAL_STRIDE": "32", "QUANT_MIN_WEIGHTS": "2048", "GPTQ_CALIBRATION_BATCHES": "4",
    "MUON_MOMENTUM_WARMUP_STEPS": "10", "DTYPE": "fp32", "DEVICE": "cpu",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed-shift", default=os.environ.get("TEST_SEED_SHIFT", "0"), metavar="N", type=int,
                     help="draw every random input of the tests, and the first weights of runs, from other seeds: N-th "
                     "set, 0 is the usual one")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TEST_SEED_SHIFT"] = str(config.getoption("--seed-shift"))  # before any test module is imported
    TINY["SEED"] = str(shifted(1337))  # of whole runs; the script's default is 1337


@pytest.hookimpl(wrapper=True, optionalhook=True)  # with -p no:xdist there is no such hook
def pytest_xdist_auto_num_workers():
    """Twice as many as there are cores: runs of several processes often wait for each other."""
    return (yield) * 2


# those that take longest; begun first, none of them is what all others wait for in the end
SLOWEST = [f"test_{name}.py" for name in (
    "audit", "pipeline", "pretend_gpu", "recipes", "techniques", "ttt", "packing", "training", "caseops_scoring",
    "scripts", "benchmarks", "caseops", "codegen", "kernels", "submission", "model", "tokenize_docs", "records",
    "cached_fineweb")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def shifted(seed: int) -> int:
    """The seed that a test draws from: `seed` itself, or with --seed-shift another one."""
    return seed + 100_003 * int(os.environ.get("TEST_SEED_SHIFT", "0"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Settings, as environment variables, of a model that trains in seconds on Python's own help topics."""
    from runs import export_topics, help_topics

    folder = tmp_path_factory.mktemp("data")
    export_topics(folder, [text[:1500] for text in help_topics()[:60:10]])  # most runs score it three times
    return TINY | {"DATA_PATH": str(folder / "datasets/topics_sp512"),
                   "TOKENIZER_PATH": str(folder / "tokenizers/topics_512_bpe.model")}


@pytest.fixture
def rt(tmp_path):
    """The runtime of a run of one process, in fp32 on the CPU, that writes into tmp_path."""
    import train_gpt as tg

    runtime = tg.Runtime(tg.Settings(device="cpu", dtype="fp32", artifact_dir=str(tmp_path)), tg.Launch())
    yield runtime
    runtime.close()


def run_script(settings: dict[str, str], *arguments: str, processes: int = 0, script: Path = TRAIN, fresh: bool = False,
               **options) -> subprocess.CompletedProcess:
    """Run a script to its end: forked (see there), or `fresh`, as a user starts it, under torchrun if of several."""
    if not fresh:
        return ForkedRun(settings, str(script), *arguments, processes=processes, **options).finish()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run([sys.executable, *torchrun, str(script), *arguments], env=clean_environment(settings),
                          capture_output=True, text=True, timeout=LONGEST, **options)


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def read_losses(folder: Path) -> list[float]:
    """Training losses of metrics.jsonl, by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]
