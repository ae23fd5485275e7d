"""Whole runs of train_gpt.py on a pretend GPU (pretend_gpu.py), on one rank and on two: what CUDA and NCCL would
refuse, what the host would wait for, what would be compiled on the clock. Faults of these kinds, put back, are caught.

The ranks are two processes that do one run after another.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, clean_environment, read_losses, read_result
from runs import BARE, RECIPE_OF, SMALL, TOGETHER, scaled, short_data, watch

# ----------------------------------------------------------------------------------------------------------------------
# In the processes of the ranks


def do(job: dict, tg, gpu) -> dict:
    """One run, as torchrun starts it on this rank, with faults planted; what became of it."""
    rank, world = int(os.environ["RANK"]), job["world"]
    os.environ.update(WORLD_SIZE=str(world), INIT_METHOD=f"file://{job['store']}")
    answer = {"status": None, "error": ""}
    for known in (gpu.WAITS, gpu.USED, gpu.GRAPHS, gpu.UNFINISHED):
        known.clear()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(tg, "pack_code", lambda *_: b"the code, which no GPU packs")
        for name in job["faults"]:
            FAULTS[name](tg, patch)
        watch(tg, patch, gpu, answer)
        try:
            answer["status"] = tg.start([], tg.Launch(rank, rank, world), job["settings"])
        except Exception as e:
            answer["error"] = f"{type(e).__name__}: {e}"
        if tg.dist.is_initialized():
            tg.dist.destroy_process_group()
    return answer | {"graphs": gpu.GRAPHS, "unfinished": gpu.UNFINISHED}


def evaluated(line: str, names: dict) -> str:
    """What becomes of a line of Python there."""
    try:
        return str(eval(line, names))
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def serve() -> None:
    """Do the jobs that come in, a line of JSON each, and answer each by a line."""
    import pretend_gpu as gpu

    gpu.install()
    import torch

    import train_gpt as tg

    for line in sys.stdin:
        job = json.loads(line)
        gpu.WAITS.clear()
        names = {"torch": torch, "gpu": gpu, "np": np, "tg": tg}
        print(json.dumps(evaluated(job, names) if isinstance(job, str) else do(job, tg, gpu)), flush=True)


# Faults, planted by replacing a function of the script


def tall_updates(tg, patch) -> None:
    """1: Newton-Schulz gives updates of tall banks as a view, x.mT."""
    patch.setattr(tg, "newton_schulz", transposed(tg.newton_schulz))


def transposed(real):
    return lambda *args: real(*args).mT.contiguous().mT


def common_part_as_it_comes(tg, patch) -> None:
    """2: the factors of the common part have the strides of a product's transpose."""
    real = tg.common_part
    patch.setattr(tg, "common_part", lambda table: tuple(part.mT.contiguous().mT for part in real(table)))


def padding_with_the_last_token(tg, patch) -> None:
    """3: padding repeats the last token, which may start a document."""
    def gather(tokens, place, scored, bos):
        place = place.clamp(max=len(tokens) - 1)
        ids, targets = tokens[place].long(), tokens[(place + 1).clamp(max=len(tokens) - 1)].long()
        return ids, targets.masked_fill(~scored, tg.IGNORE)

    patch.setattr(tg, "gather", gather)


def calibration_not_warmed_up(tg, patch) -> None:
    """5: with an explicit reserve the warm-up leaves calibration out."""
    patch.setattr(tg, "calibration_seconds", lambda cfg, *_: cfg.gptq_reserve_seconds)


def no_checks_in_runtime(tg, patch) -> None:
    """7: what a collective raises comes through; and nothing but NCCL checks what ranks exchange."""
    patch.setattr(tg.Runtime, "exchange", lambda *_: contextlib.nullcontext())


def nccl_refuses(tg, patch) -> None:
    def refuse(*_, **__):
        raise ValueError("refused\nas ever")

    patch.setattr(tg.dist, "all_gather_into_tensor", refuse)


def used_before_waited_for(tg, patch) -> None:
    def exchange_shares(self, what, tensor, count, run):
        out = tensor.new_empty(count, *tensor.shape[1:])
        run(out, tensor, async_op=True)
        return lambda: out

    patch.setattr(tg.Runtime, "exchange_shares", exchange_shares)


def changed_before_waited_for(tg, patch) -> None:
    real = tg.Muon.start_reduce

    def start_reduce(self):
        real(self)
        self.params[0].grad.zero_()

    patch.setattr(tg.Muon, "start_reduce", start_reduce)


def unlike_on_each_rank(tg, patch) -> None:
    real = tg.Runtime.sum_
    patch.setattr(tg.Runtime, "sum_", lambda self, tensor, *rest: real(self, tensor[self.rank :], *rest)
                  if tensor.ndim else real(self, tensor, *rest))


def int16_exchanged(tg, patch) -> None:
    patch.setattr(tg.Tensor, "int", lambda self: self)


def made_on_the_cpu(tg, patch) -> None:
    real = tg.rotary_table
    patch.setattr(tg, "rotary_table", lambda cfg, ids, bounds: real(cfg, tg.torch.empty(ids.shape), bounds))


def loss_read_in_the_step(tg, patch) -> None:
    real = tg.Trainer.step

    def step(self, batches, phase):
        total = real(self, batches, phase)
        assert total.item() >= 0
        return total

    patch.setattr(tg.Trainer, "step", step)


def batches_not_pinned(tg, patch) -> None:
    patch.setattr(tg.Tensor, "pin_memory", lambda self: self)


FAULTS = {f.__name__: f for f in (
    tall_updates, common_part_as_it_comes, padding_with_the_last_token, calibration_not_warmed_up, no_checks_in_runtime,
    nccl_refuses, used_before_waited_for, changed_before_waited_for, unlike_on_each_rank, int16_exchanged,
    made_on_the_cpu, loss_read_in_the_step, batches_not_pinned)}


# ----------------------------------------------------------------------------------------------------------------------
# Tests


class Ranks:
    """The processes, and the settings of a run in them."""

    def __init__(self, settings: dict[str, str], folder):
        self.settings, self.folder, self.runs, self.processes = settings, folder, 0, []
        for rank in range(2):
            paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", ROOT / "data"))
            environment = clean_environment({"RANK": str(rank), "PYTHONPATH": paths})
            self.processes.append(subprocess.Popen([sys.executable, __file__], env=environment, text=True,
                                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def ask(self, job, count: int = 1) -> list:
        """Have the first `count` processes do a job; their answers."""
        guard = threading.Timer(900, self.kill)
        guard.start()
        try:
            for process in self.processes[:count]:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            lines = [process.stdout.readline() for process in self.processes[:count]]
        finally:
            guard.cancel()
        assert all(lines), f"a rank ended, or did not answer in {guard.interval} s"
        return [json.loads(line) for line in lines]

    def run(self, world: int, settings: dict[str, str], *faults: str) -> tuple[list[dict], object]:
        """Each rank's answer, and the folder of the run."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        return self.ask({"world": world, "store": f"{folder}.store", "faults": faults, "settings": {
            **self.settings, "ARTIFACT_DIR": str(folder), **settings}}, world), folder

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretend_gpu")
    made = Ranks(SMALL | short_data(tiny, folder), folder)
    yield made
    made.kill()


def check_run(answers: list[dict], calibration: str = "train") -> None:
    """Nothing was refused, no training step waited for the GPU but to log, nothing ran for the first time or was
    compiled on a clock, no collective was left unfinished.
    """
    for answer in answers:
        if calibration != "train":  # off the clock
            assert answer.pop("first_used") != []
            answer |= {"first_used": []}
        assert (answer["status"], answer["error"]) == (0, "")
        assert [*answer["waits"]] == ["tolist: log_losses"]
        assert answer["first_used"] == []
        assert answer["graphs"] == [] and answer["unfinished"] == []


# left out: stacks that have nothing which neither the defaults nor another recipe has
ALIKE = ("SP8192_PR1855_Stack", "SP8192_PR2135_Stack", "SP8192_14L_WithoutLoops",
         "SP8192_PR2135_OffsetKeys_WeightedSteps")
CASES = [*TOGETHER, *(name for name in RECIPE_OF if name not in ALIKE)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_one_that_gpus_take(ranks, case):
    """On two ranks; the defaults on one too, which gives the same up to the rounding of bf16."""
    settings = scaled(RECIPE_OF[case]) if case in RECIPE_OF else TOGETHER[case]
    answers, folder = ranks.run(2, settings)
    result, calibration = read_result(folder), settings.get("GPTQ_CALIBRATION", "train")
    check_run(answers, calibration)
    assert (result["device"], result["attention"]) == ("NVIDIA H100 80GB HBM3", settings.get("ATTENTION", "fa3"))
    assert ("ttt" in result["stages"]) == (result["config"]["ttt_mode"] != "none")
    if case == "defaults":
        answers, folder = ranks.run(1, settings)
        check_run(answers, calibration)
        assert read_result(folder)["val_loss"] == pytest.approx(result["val_loss"], rel=2e-3)


def test_a_checkpoint_and_an_artifact_serve_another_number_of_ranks(ranks):
    """Three steps on two ranks, the third again on one from the checkpoint; and the artifact scored by two."""
    settings = BARE | {"ITERATIONS": "3", "EMA_DECAY": "0.5"}
    answers, folder = ranks.run(2, settings | {"CHECKPOINT_EVERY": "2"})
    assert [answer["status"] for answer in answers] == [0, 0], answers
    losses, first = read_losses(folder), read_result(folder)
    answers, _ = ranks.run(1, settings | {"RESUME": "1", "ARTIFACT_DIR": str(folder)})
    check_run(answers)
    assert "resumed at step 2" in (folder / "train.log").read_text()
    assert read_losses(folder) == pytest.approx(losses, rel=1e-3) and len(losses) == 3
    second = read_result(folder)
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=2e-3)
    answers, alone = ranks.run(2, settings | {"EVAL_ONLY": f"{folder}/final_model.int6.ptz"})
    assert [(answer["status"], answer["error"]) for answer in answers] == [(0, "")] * 2
    assert read_result(alone)["val_loss"] == pytest.approx(second["val_loss"], abs=1e-6)


# What each fault, or several together, leads to: on how many ranks, under which settings, where it says so and what
CAUGHT = {
    ("tall_updates",): (1, {}, "error", r"RunError: updates of a bank over ranks: .* strides \(\d+, 1, \d+\)"),
    ("tall_updates", "no_checks_in_runtime"): (2, {}, "error", "ValueError: Tensors must be contiguous .all_gather"),
    ("common_part_as_it_comes",): (1, {}, "error", r"RunError: common part over ranks: .* strides \(1, \d+\)"),
    ("common_part_as_it_comes", "no_checks_in_runtime"): (
        2, {}, "error", "ValueError: Tensors must be contiguous .broadcast"),
    ("padding_with_the_last_token",): (1, TOGETHER["chunk"], "graphs", r"layer True \[\(2, 100, 32\)"),
    ("calibration_not_warmed_up",): (1, {}, "first_used", r"aten\.addmm_"),
    ("nccl_refuses",): (2, {}, "error", "RunError: updates of a bank over ranks: refused\nas ever$"),
    ("nccl_refuses", "no_checks_in_runtime"): (2, {}, "error", "^ValueError: refused"),
    ("used_before_waited_for",): (
        2, {}, "unfinished", r"RunError: train_loss is nan at step 1;.*\nreduce_scatter_tensor\n"),
    ("changed_before_waited_for",): (2, {}, "error", "the input of reduce_scatter_tensor was changed before"),
    ("unlike_on_each_rank",): (2, {}, "error", "RunError: .*: all_reduce of .* is another on other ranks"),
    ("int16_exchanged",): (1, {}, "error", "RunError: common part over ranks: .* torch.int16"),
    ("int16_exchanged", "no_checks_in_runtime"): (2, {}, "error", "data type is not supported .*: torch.int16"),
    ("made_on_the_cpu",): (1, {}, "error", "all tensors to be on the same device, .* cpu, cuda:0!"),
    ("loss_read_in_the_step",): (1, {}, "waits", "_local_scalar_dense: loss_read_in_the_step.*step"),
    ("batches_not_pinned",): (1, {}, "waits", "copy between devices: Batch.to"),
}


@pytest.mark.parametrize("faults", CAUGHT, ids=" and ".join)
def test_a_fault_is_caught(ranks, faults):
    world, settings, where, said = CAUGHT[faults]
    answers, _ = ranks.run(world, BARE | settings, *faults)
    for answer in answers:
        found = "\n".join([answer["error"], *(answer[where] if where != "error" else ())])
        assert re.search(said, found), (answer, found)
        with pytest.raises(AssertionError):
            check_run([answer])


@pytest.mark.parametrize("line, said", [
    ("torch.ones(2, device='cuda').sum().item()", "2.0"),
    ("torch.ones(2, device='cuda:1').device", "cuda:1"),
    ("torch.empty(2, device='cuda').isnan().all().item()", "True"),
    ("torch.ones(2, device='cuda').new_empty(2).isnan().all().item()", "True"),
    ("torch.ones(2, device='cuda') + torch.ones(2)", "RuntimeError: Expected all tensors to be on the same device"),
    ("torch.ones(2, device='cuda') + torch.ones(2, device='cuda:1')", "RuntimeError: .* cuda:0, cuda:1!"),
    ("(torch.ones(2, device='cuda') + torch.tensor(1.0)).tolist()", r"\[2.0, 2.0\]"),
    ("torch.zeros(()).add_(torch.ones((), device='cuda'))", "RuntimeError: Expected all tensors"),
    ("torch.ones(2)[torch.zeros(1, dtype=torch.long, device='cuda')]", "RuntimeError: Expected all tensors"),
    ("torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 2, device='cuda'))", "RuntimeError: Expected all"),
    ("torch.ones(2, device='cuda').numpy()", "TypeError: can't convert cuda:0"),
    ("np.asarray(torch.ones(2, device='cuda'))", "TypeError: can't convert cuda:0"),
    ("torch.ones(2, device='cuda').pin_memory()", "RuntimeError: cannot pin"),
    ("torch.randn(2, device='cuda', generator=torch.Generator())", "RuntimeError: Expected a 'cuda' device type"),
    ("torch.cuda.set_device(8)", "RuntimeError: CUDA error: invalid device"),
    ("torch.cuda.Event().synchronize()", "RuntimeError"),
    ("[torch.ones(2).pin_memory().to('cuda', non_blocking=True), dict(gpu.WAITS)][1]", "{}"),
    ("[torch.ones(2).to('cuda', non_blocking=True), dict(gpu.WAITS)][1]", "{'copy between devices: <module>': 1}"),
    ("[torch.tensor([1], device='cuda'), dict(gpu.WAITS)][1]", "{'copy between devices: <module>': 1}"),
    ("[bool(torch.ones(2, device='cuda')[0] > 0), dict(gpu.WAITS)][1]", "{'_local_scalar_dense: <module>': 1}"),
])
def test_the_device_itself(ranks, line, said):
    """That it gives what a GPU gives and refuses what CUDA refuses."""
    assert re.match(said, ranks.ask(line)[0])


if __name__ == "__main__":
    serve()
