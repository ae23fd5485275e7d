"""The auditor: clean runs pass it whole, each planted fault is caught by the check that names it.

Faults are planted by replacing functions of the packed script once it is imported; how a user calls the auditor, on a
packed script of several parts and of a faulty one, is tested apart.
"""

import dataclasses
import json
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path

import audit
import numpy as np
import overlap
import pytest
import sentencepiece
import torch
from conftest import ROOT, shifted
from forked import ForkedRun
from shards import read_shard, write_shard

import train_gpt as tg

F = torch.nn.functional
AUDIT = ROOT / "records/audit.py"
SMALL = {"NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "ROPE_DIMS": "8",
         "ITERATIONS": "6", "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "1", "ENABLE_LOOPING_AT": "3",
         "SMEAR_GATE_ENABLED": "1", "KEY_OFFSET": "1", "SCALAR_LR": "0.2", "EVAL_STRIDE": "32",
         "EVAL_BATCH_TOKENS": "1024"}
EVALUATION = {"ttt_eval_seq_len": 64, "ttt_chunk_size": 16, "ttt_batch_size": 4, "ttt_lora_rank": 4,
              "ttt_lora_alpha": 8.0, "ttt_lora_lr": 0.003, "ttt_chunk_tokens": 256, "ttt_epochs": 1, "ttt_lr": 0.02,
              "phased_ttt_prefix_docs": 3, "global_ttt_chunk_tokens": 256, "global_ttt_lr": 0.02}


def short_documents(tokens: np.ndarray, most: int) -> np.ndarray:
    """The stream with every document cut to its first `most` tokens."""
    starts = [*np.flatnonzero(tokens == tokens[0]), len(tokens)]
    return np.concatenate([tokens[a : min(b, a + most)] for a, b in zip(starts, starts[1:])])


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """Folder of two runs on a copy of tiny's data with six short documents: 0, and 1 with VARLEN_ENABLED."""
    folder = tmp_path_factory.mktemp("audit")
    data = folder / "data"
    data.mkdir()
    for path in Path(tiny["DATA_PATH"]).glob("*.bin"):
        tokens = read_shard(path)
        write_shard(data / path.name, short_documents(tokens, 160) if "val" in path.name else tokens)
    for varlen in "01":
        environ = tiny | SMALL | {"DATA_PATH": str(data), "ARTIFACT_DIR": str(folder / varlen)}
        assert tg.start([], tg.Launch(), environ | {"VARLEN_ENABLED": varlen}) == 0
    return folder


def skip_without_bf16():
    """Skip the test where PyTorch's own bf16 does not run: where ATEN_CPU_CAPABILITY forbids what the CPU has."""
    q = torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16)
    try:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError as error:
        if not (told := tg.explain(error)):
            raise
        pytest.skip(told)


@pytest.fixture
def judged(trained, monkeypatch):
    """Checks of these names, of a run whose evaluation has these settings instead of its own, with a fault planted in
    the script whenever it is imported.
    """
    monkeypatch.setitem(sys.modules, "train_gpt", tg)  # to be put back
    real = audit.Script.fresh

    def judge(*names: str, plant=None, full: bool = False, change=None, **changes) -> dict[str, audit.Check | None]:
        if changes.get("dtype") == "bf16":
            skip_without_bf16()

        def fresh(self):
            script = real(self)
            if plant:
                plant(script)
            return script

        monkeypatch.setattr(audit.Script, "fresh", fresh)
        subject = audit.Subject(trained / str(changes.get("varlen_enabled", 0)), {"DEVICE": "cpu"})
        subject.config |= EVALUATION | changes
        if change:
            change(subject)
        return audit.judge(subject, full, names)

    return judge


EVALUATED = "bytes", "single_pass", "normalized", "causal", "score"


@pytest.mark.parametrize("changes", [
    {}, {"eval_stride": 0}, {"varlen_enabled": 1}, {"ttt_mode": "chunk"}, {"ttt_mode": "chunk", "varlen_enabled": 1},
    {"ttt_mode": "lora"}, {"ttt_mode": "lora", "ttt_optimizer": "sgd", "ttt_doc_order": "sorted"},
    {"ttt_mode": "phased", "phased_ttt_num_phases": 3, "eval_budget_seconds": 0.001},
    {"ttt_mode": "lora", "dtype": "bf16"}, {"varlen_enabled": 1, "eval_seq_len": 192},
    {"ngram_tilt_enabled": 1},
    {"ngram_tilt_enabled": 1, "hedge_enabled": 1, "token_order": "9,4", "ttt_mode": "phased"},
    {"ngram_tilt_enabled": 1, "hedge_enabled": 1, "ttt_mode": "phased", "varlen_enabled": 1, "ttt_doc_order": "sorted",
     "ttt_warm_start_a": 1, "ttt_warm_start_docs": 2, "ttt_short_score_first_steps": "60:20"}], ids=str)
def test_a_clean_run_passes(judged, changes):
    checks = judged(*EVALUATED, **changes)
    assert all(check.ok and check.detail for check in checks.values()), checks


CHANCE = torch.Generator().manual_seed(0)  # not that of a run, which draws the same numbers each time


def shaky_attention(script):
    """Gradients that no two runs have alike, as where a GPU's threads add them up in any order."""
    attend = script.attend_sdpa

    def shaky(q, k, v, bounds):
        if q.requires_grad:
            size = 1e-3 if q.dtype == torch.bfloat16 else 1e-7
            q = q.view_as(q)
            q.register_hook(lambda g: g * (1 + size * torch.randn(g.shape, generator=CHANCE).to(g.dtype)))
        return attend(q, k, v, bounds)

    script.attend_sdpa = shaky


def on_gpu(subject):
    subject.on_gpu = True


@pytest.mark.parametrize("changes", [{"ttt_mode": "lora", "dtype": "bf16"}, {"ttt_mode": "phased", "dtype": "bf16"},
                                     {"ttt_mode": "chunk", "dtype": "fp32"}], ids=str)
def test_a_clean_run_passes_where_no_two_runs_learn_alike(judged, changes):
    check = judged("causal", plant=shaky_attention, change=on_gpu, **changes)["causal"]
    noise = [float(n) for n in re.findall(r"equal runs differ by ([\d.e+-]+)", check.detail)]
    assert check.ok and noise[0] == 0 and noise[1] < 1e-5, check


# ----- planted faults


def charging(change):
    """Plant `change(scorer, positions, losses)` where the script charges losses."""
    def plant(script):
        def wrap(function):
            def planted(self, *inputs):
                scorer = self.scorer
                self.scorer = types.SimpleNamespace(add=lambda *given: change(scorer, *given), running=scorer.running)
                function(self, *inputs)
                self.scorer = scorer
            return planted

        script.Evaluator.score_windows = wrap(script.Evaluator.score_windows)
        script.Evaluator.score_documents = wrap(script.Evaluator.score_documents)
    return plant


def twice(scorer, positions, losses):
    scorer.add(positions, losses)
    scorer.add(positions, losses)


def all_but_one(scorer, positions, losses):
    positions = positions.clone()
    positions.flatten()[positions.flatten().nonzero()[:1]] = 0
    scorer.add(positions, losses)


def off_by_one(script):
    real = script.attend_sdpa
    script.attend_sdpa = lambda q, k, v, bounds: real(q, k.roll(-1, 1), v.roll(-1, 1), bounds)


def across_documents(script):
    real = script.attend_sdpa
    script.attend_sdpa = lambda q, k, v, bounds: real(q, k, v, None)


def smear_without_mask(script):
    script.previous = lambda x, starts: F.pad(x, (0, 0, 1, 0))[:, :-1]


def step_before_charge(script):
    real = script.Evaluator.score_documents

    def planted(self, batch, adapters):
        def learned(*inputs, **options):
            adapters.learn(forward(*inputs, **options).sum() / self.cfg.ttt_chunk_size)
            return forward(*inputs, **options)

        forward, self.forward = self.forward, learned
        real(self, batch, adapters)
        self.forward = forward

    script.Evaluator.score_documents = planted


def lasting_adapters(script):
    real = script.DocumentAdapters.reset

    def planted(self):
        if hasattr(self, "optimizer"):
            self.narrow(len(self.whole[0]))  # to all rows again, as they were left
        else:
            real(self)

    script.DocumentAdapters.reset = planted


def two_windows(script):
    real = script.find_windows

    def planted(*inputs):
        windows = real(*inputs)
        windows[1:, 1] -= 1
        return windows

    script.find_windows = planted


def from_the_end(script):
    real = script.plan_passes

    def planted(cfg, batch, adapted):
        rows, passes = real(cfg, batch, adapted)
        return rows, [step._replace(rows=len(rows)) for step in reversed(passes)]

    script.plan_passes = planted


def spaces_counted_twice(script):
    real = script.read_tokenizer

    def planted(*inputs):
        table = real(*inputs)
        return dataclasses.replace(table, length=table.length + table.space)

    script.read_tokenizer = planted


def finish_with(**values):
    """Plant what the script's Scorer says at the end; values are functions of what it should have said."""
    def plant(script):
        real = script.Scorer.finish

        def planted(self):
            score = real(self)
            return score._replace(**{name: value(getattr(score, name)) for name, value in values.items()})
        script.Scorer.finish = planted
    return plant


def losses_with(change):
    """Plant `change(loss, logits, targets)` for the model's loss, which is a function of logits."""
    def plant(script):
        real = script.cross_entropy
        script.cross_entropy = lambda logits, targets, cap: change(lambda z: real(z, targets, cap), logits, targets)
    return plant


def train_first(name):
    """Plant a step on the first tokens of the text before test-time training scores any."""
    def plant(script):
        real = getattr(script.Evaluator, name)

        def planted(self):
            sgd = script.Sgd(self.cfg, self.rt, self.model, self.forward)
            sgd.lr = 0.02
            sgd.step(self.val.tokens[:300], self.val.bos, 1.0)
            return real(self)
        setattr(script.Evaluator, name, planted)
    return plant


def hints(script):
    """The targets, kept beside the text when it is read, and the model is told."""
    kept, load, gather, predict = {}, script.Validation.load.__func__, script.gather, script.GPT.predict

    def planted_load(cls, *inputs):
        kept["text"] = load(cls, *inputs)
        return kept["text"]

    def planted_gather(tokens, place, scored, bos):
        text = kept["text"].tokens.long()
        kept["targets"] = text[(place + 1).clamp(max=len(text) - 1)]
        return gather(tokens, place, scored, bos)

    def planted_predict(self, x, lane, targets, *rest):
        logits = predict(self, x, lane, None, *rest)
        if kept["targets"].shape == x.shape[:2]:
            logits = logits + 0.1 * F.one_hot(kept["targets"], logits.size(-1))
        return logits if targets is None else F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none").view_as(targets)

    script.Validation.load = classmethod(planted_load)
    script.gather, script.GPT.predict = planted_gather, planted_predict


def half_of_the_documents(script):
    """Only the first half is scored, and all of it is reported."""
    load = script.Validation.load.__func__
    script.Validation.load = classmethod(lambda cls, *inputs: dataclasses.replace(
        val := load(cls, *inputs), tokens=val.tokens[: len(val.tokens) // 2]))
    without_checks(script)


def without_checks(script):
    """The script's Scorer refuses nothing."""
    def finish(self):
        nats, tokens = float(self.rt.sum_(self.losses.clone())[1:].double().sum()), len(self.target_bytes) - 1
        n_bytes = int(self.target_bytes.sum())
        return script.Score(nats / tokens, nats / (tg.math.log(2) * n_bytes), tokens, n_bytes, 0.0)

    script.Scorer.finish = finish


def trains_on_validation(script):
    real = script.Windows.__init__

    def planted(self, cfg, rt, bos=-1):
        shard_paths, script.shard_paths = script.shard_paths, lambda cfg, split: shard_paths(cfg, "val")
        real(self, cfg, rt, bos)
        script.shard_paths = shard_paths

    script.Windows.__init__ = planted


def hints_with(change):
    """Plant `change(hints, tokens, longest order)` where the script finds hints."""
    def plant(script):
        real = script.find_hints
        script.find_hints = lambda tokens, orders, threshold: change(real(tokens, orders, threshold), tokens, orders[0])
    return plant


def counted_too_early(hints, tokens, order):
    """As if a token were in the table when its own hint is looked up: in a new context it is its own hint."""
    known, hints = set(), hints.clone()
    for t in range(order - 1, len(tokens)):
        context = tuple(tokens[t - order + 1 : t].tolist())
        if context not in known:
            hints[t] = tokens[t]
        known.add(context)
    return hints


def not_normalized(script):
    """The hint is raised, and nothing is taken from the others."""
    def apply(self, losses, hint_losses):
        losses = losses.double()
        losses[self.places] -= self.boosts[-1] * self.right
        return losses
    script.Tilt.apply = apply


def hedge_that_knows_the_end(script):
    """The boost that is best in all, from the start."""
    real = script.Tilt.apply

    def apply(self, losses, hint_losses):
        each = [real(self._replace(boosts=[boost]), losses.clone(), hint_losses) for boost in self.boosts]
        return min(each, key=lambda found: float(found.sum()))
    script.Tilt.apply = apply


LORA, VARLEN = {"ttt_mode": "lora", "eval_stride": 0}, {"varlen_enabled": 1, "eval_stride": 0}
TILT = {"ngram_tilt_enabled": 1, "eval_stride": 0}
FAULTS = {  # the check that names it, settings, what is planted
    "an attention mask off by one": ("causal", LORA, off_by_one),
    "the same inside documents": ("causal", VARLEN, off_by_one),
    "attention across documents": ("causal", VARLEN, across_documents),
    "a smear gate without the document mask": ("causal", LORA, smear_without_mask),
    "the same with document bounds": ("causal", VARLEN, smear_without_mask),
    "an adapter's step before the charge": ("causal", LORA, step_before_charge),
    "adapters that outlive their document": ("causal", LORA | {"ttt_batch_size": 1}, lasting_adapters),
    "adaptation on a document not yet scored": ("causal", {"ttt_mode": "phased"}, train_first("lora_ttt")),
    "training on a chunk not yet scored": ("causal", {"ttt_mode": "chunk"}, train_first("chunk_ttt")),
    "hints that are the targets": ("causal", {}, hints),
    "a token scored twice": ("single_pass", LORA, charging(twice)),
    "the same without its own checks": ("single_pass", LORA, lambda script: (
        charging(twice)(script), without_checks(script))),
    "a token scored by two windows": ("single_pass", {}, two_windows),
    "a token skipped": ("single_pass", LORA, charging(all_but_one)),
    "a document scored from its end": ("single_pass", LORA, from_the_end),
    "half of the documents": ("single_pass", LORA, half_of_the_documents),
    "a loss charged to another token": ("single_pass", {}, charging(
        lambda scorer, positions, losses: scorer.add(positions.flip(-1), losses))),
    "a byte table that counts ▁ twice": ("bytes", {}, spaces_counted_twice),
    "bytes of another text": ("bytes", {}, finish_with(bytes=lambda n: n + 1)),
    "a distribution scaled by 1.01": ("normalized", LORA, losses_with(
        lambda loss, logits, targets: loss(logits) - 0.01 * (targets >= 0))),
    "losses scaled where they are charged": ("normalized", {}, charging(
        lambda scorer, positions, losses: scorer.add(positions, 0.99 * losses))),
    "a model that looks at the target": ("normalized", LORA, losses_with(
        lambda loss, logits, targets: loss(logits + 0.1 * F.one_hot(targets.clamp(min=0), logits.size(-1))))),
    "another score than was computed": ("score", {}, finish_with(val_bpb=lambda v: 0.99 * v)),
    "another loss than was computed": ("score", LORA, finish_with(val_loss=lambda v: v - 1e-4)),
    "training on validation shards": ("training", {}, trains_on_validation),
    "a tilt that reads its own target": ("causal", TILT, hints_with(
        lambda hints, tokens, _: torch.where(hints >= 0, tokens.long(), hints))),
    "the same where documents have adapters": ("causal", TILT | LORA, hints_with(
        lambda hints, tokens, _: torch.where(hints >= 0, tokens.long(), hints))),
    "a tilt that counts a token before it is scored": ("causal", TILT, hints_with(counted_too_early)),
    "a tilt that looks ahead": ("causal", TILT, hints_with(lambda hints, tokens, _: hints.roll(-1))),
    "a tilt that is not normalized": ("score", TILT, not_normalized),
    "Hedge that knows the end": ("score", TILT | {"hedge_enabled": 1}, hedge_that_knows_the_end),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_its_name(judged, fault):
    check, changes, plant = FAULTS[fault]
    assert judged(check, plant=plant, **changes)[check].ok is False


@pytest.mark.parametrize("fault", ["an attention mask off by one", "an adapter's step before the charge",
                                   "training on a chunk not yet scored"])
def test_a_planted_fault_is_caught_where_no_two_runs_learn_alike(judged, fault):
    check, changes, plant = FAULTS[fault]
    checks = judged(check, plant=lambda script: (plant(script), shaky_attention(script)), change=on_gpu, **changes)
    assert checks[check].ok is False


def test_a_result_that_was_edited_does_not_add_up(judged):
    """Alone a figure contradicts others; all of them changed, the whole evaluation again says another."""
    def edit(*names):
        def change(subject):
            for figures in (subject.result, *subject.result["stages"].values()):
                figures |= {name: 0.999 * figures[name] for name in names}
        return change

    assert judged("score", full=True, eval_stride=32)["score"].ok
    assert not judged("score", change=edit("val_bpb"))["score"].ok
    assert judged("score", change=edit("val_bpb", "val_loss"))["score"].ok
    assert not judged("score", full=True, change=edit("val_bpb", "val_loss"))["score"].ok
    assert not judged("score", change=lambda subject: subject.result.update(val_docs=5))["score"].ok
    assert not judged("bytes", change=lambda subject: subject.result.update(val_bytes=5))["bytes"].ok


def test_training_that_reads_no_validation_text_passes(judged):
    assert judged("training")["training"].ok
    assert judged("training", change=lambda subject: subject.train_shards.clear())["training"] is None


# ----- bytes


@pytest.fixture(scope="module")
def tokenizer(tiny) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=tiny["TOKENIZER_PATH"])


def count(tokenizer, ids: list[int], mark: int = 1) -> int:
    text = audit.Text(np.array(ids), tokenizer, mark, False)
    return text.count_bytes(text.documents())


def test_a_cut_character_is_as_many_bytes_as_pieces_are_left(tokenizer):
    ids = tokenizer.encode("so: \u6f22")
    assert all(map(tokenizer.is_byte, ids[-3:]))
    assert [count(tokenizer, [1, *ids[:end]]) for end in range(len(ids) - 3, len(ids) + 1)] == [4, 5, 6, 7]
    assert count(tokenizer, [1, *ids[:-1], 1, *ids[-1:], *ids]) == 6 + 1 + len(" so: \u6f22".encode())
    chance, first = np.random.default_rng(shifted(0)), tokenizer.piece_to_id("<0x00>")
    for _ in range(500):  # bytes of all kinds, whole characters and a literal U+FFFD among them
        raw = chance.choice([0xE6, 0xBC, 0xA2, 0x41, 0xF0, 0x9F, 0x98, 0x80, 0xC0, 0xED, 0xEF, 0xBF, 0xBD, 0xFF], 9)
        assert count(tokenizer, [1, *(first + raw)]) == 9


def test_the_mark_of_a_document_stands_for_nothing(tokenizer):
    """Also one that decodes to text, or if the text starts without one; the first token is no target."""
    ids, word = tokenizer.encode("some words"), tokenizer.encode("and")[0]
    assert count(tokenizer, [1, *ids, 1, *ids]) == 2 * len("some words")
    assert count(tokenizer, [word, *ids, word, *ids], word) == 2 * len("some words")
    assert count(tokenizer, [*ids, 1, *ids]) == 2 * len("some words") - len(tokenizer.decode(ids[:1]))


# ----- documents in training shards


def test_overlap_equals_a_search_by_hand(tmp_path):
    """Random documents of few tokens, so that many are equal, in shards that cut them anywhere."""
    chance = np.random.default_rng(shifted(0))
    for round_ in range(16):
        def documents(count, chance=chance):
            return [chance.integers(2, 4, chance.choice([0, 1, 2, 3, 63, 64, 65, 70])) for _ in range(count)]

        train, val = documents(40), documents(12)
        long = chance.integers(2, 4, 64)
        train.append(np.concatenate((long, [2, 3])))
        val += [np.concatenate((long, [3])), long[:63]]  # as far as anyone looks, and one shorter
        stream = np.concatenate([np.concatenate(([1], d)) for d in train]).astype(np.uint16)
        cuts = [0, *sorted(chance.integers(0, len(stream), 2 if round_ % 2 else 40)), len(stream)]
        paths = [str(tmp_path / f"{round_}-{i}.bin") for i in range(len(cuts) - 1)]
        for path, a, b in zip(paths, cuts, cuts[1:]):
            write_shard(path, stream[a:b])
        known = {tuple(d[:64]) for d in train}
        expected = [len(d) > 0 and tuple(d[:64]) in known for d in val]
        tokens = np.concatenate([np.concatenate(([1], d)) for d in val]).astype(np.uint16)
        assert overlap.find_overlap(tokens, paths, range(len(paths)), 1).tolist() == expected
        parts = [overlap.find_overlap(tokens, paths, [i], 1) for i in range(len(paths))]
        assert np.logical_or.reduce(parts).tolist() == expected


@pytest.mark.parametrize("copied, ok", [(0, True), (2, True), (3, False)])
def test_published_duplicates_are_listed_and_half_a_percent_of_them_allowed(tokenizer, tmp_path, copied, ok):
    documents = [[1, *np.random.default_rng(shifted(i)).integers(2, 99, 20)] for i in range(400)]
    write_shard(tmp_path / "t.bin", np.array(sum(documents[:copied], [1, 5]), dtype=np.uint16))
    text = audit.Text(np.array(sum(documents, [])), tokenizer, 1, False)
    subject = types.SimpleNamespace(text=text, train_shards=[str(tmp_path / "t.bin")], rank=0, world=1)
    check = audit.check_overlap(subject)
    assert check.ok is ok and check.detail.startswith(f"{copied} of 400")
    assert copied == 0 or f"the first of them {[*range(copied)]}" in check.detail


def test_training_text_that_marks_no_documents_is_not_passed(tokenizer, tmp_path):
    """Documents of another mark, of which none can be found."""
    write_shard(tmp_path / "t.bin", np.array([2, 5, 6, 2, 7], dtype=np.uint16))
    text = audit.Text(np.array([1, 5, 6, 1, 7]), tokenizer, 1, False)
    subject = types.SimpleNamespace(text=text, train_shards=[str(tmp_path / "t.bin")], rank=0, world=1)
    assert audit.check_overlap(subject) == (False, "no training shard holds token 1, by which documents would be found")


# ----- as a user calls it


def run_audit(*arguments: str, processes: int = 0, **environ: str):
    return ForkedRun(environ, str(AUDIT), *arguments, processes=processes).finish()


def test_two_processes_judge_a_run_and_repeat_it_whole(trained, tmp_path):
    shutil.copytree(trained / "0", tmp_path / "run")
    done = run_audit(str(tmp_path / "run"), "--full", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    verdict, result = (json.loads((tmp_path / "run" / name).read_text()) for name in ("audit.json", "result.json"))
    assert list(verdict["checks"]) == list(audit.CHECKS) and verdict["ok"] and verdict["world_size"] == 2
    assert all(check["ok"] for check in verdict["checks"].values())
    assert {k: verdict[k] for k in ("code_sha256", "model_sha256")} == {
        k: result[k] for k in ("code_sha256", "model_sha256")}
    assert "the whole evaluation again" in verdict["checks"]["score"]["detail"]
    assert all(f"audit {name}: ok: " in done.stdout for name in audit.CHECKS)


def test_a_faulty_script_ends_with_3_and_a_verdict(trained, tmp_path):
    """The packed script is another, and the run's own; other documents' training shards are searched."""
    run, data = shutil.copytree(trained / "0", tmp_path / "run"), shutil.copytree(trained / "data", tmp_path / "data")
    val = read_shard(data / "fineweb_val_000000.bin")
    write_shard(data / "fineweb_train_000001.bin", np.array(val[: np.flatnonzero(val == 1)[1]]))
    source = (ROOT / "train_gpt.py").read_text() + "\n_add = Scorer.add\n" \
        "Scorer.add = lambda self, positions, losses: _add(self, positions, 0.99 * losses)\n" \
        "_loss = cross_entropy\ncross_entropy = lambda *inputs: 0.98 * _loss(*inputs)\n"
    with zipfile.ZipFile(run / audit.CODE, "w") as archive:
        archive.writestr("train_gpt.py", source)
        archive.writestr("__main__.py", tg.PACKED_MAIN)
    result = json.loads((run / "result.json").read_text())
    result["code_sha256"] = audit.file_sha256(run / audit.CODE)
    (run / "result.json").write_text(json.dumps(result))
    done = run_audit(str(run), DATA_PATH=str(data))
    assert done.returncode == 3, done.stderr[-2000:]
    verdict = json.loads((run / "audit.json").read_text())
    assert {name for name, check in verdict["checks"].items() if not check["ok"]} == {
        "normalized", "no_overlap", "score"}
    assert verdict["checks"]["no_overlap"]["detail"].startswith("1 of 6 ")


@pytest.mark.parametrize("here, cut, same", [
    (1.0001, False, True), (0.9999, False, True), (1.0003, False, False), (0.9997, False, False),
    (0.9, True, True), (1.0003, True, False)])  # who ran out of time could have done better, and not worse
def test_the_score_of_a_run_that_ran_out_of_time_may_be_worse_than_here(here, cut, same):
    assert audit.same_score(here, 1.0, "EVAL_BUDGET_SECONDS=600: 9 tokens scored and not trained on" * cut) == same


def edit_result(run: Path, **values) -> None:
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | values))


@pytest.mark.parametrize("spoil, said", [
    (lambda run: (run / "result.json").unlink(), "result.json: No such file or directory: not the folder of"),
    (lambda run: (run / "result.json").write_text("{"), "result.json: not JSON"),
    (lambda run: (run / "result.json").write_text("{}"), "result.json: has no config"),
    (lambda run: edit_result(run, config={"vocab_size": 512}), "result.json: has no config.data_path"),
    (lambda run: edit_result(run, stages={"quantized": {"val_bpb": 1.0}}), "has no stages.quantized.val_loss"),
    (lambda run: edit_result(run, stages=[]), "result.json: not JSON of a result"),
    (lambda run: (run / audit.CODE).unlink(), "train_gpt.packed.py: no such file"),
    (lambda run: (run / audit.ARTIFACT).unlink(), "final_model.int6.ptz: no such file"),
    (lambda run: (run / audit.ARTIFACT).write_bytes(b"x"), "is not the file of"),
    (lambda run: ((run / audit.CODE).write_text("x = 1"), edit_result(
        run, code_sha256=audit.file_sha256(run / audit.CODE))), "train_gpt.packed.py: not a packed script"),
    (lambda run: {"DATA_PATH": str(run)}, "no fineweb_val_*.bin there"),
    (lambda run: {"TOKENIZER_PATH": str(run / "none")}, "none: no such file"),
    (lambda run: {"TOKENIZER_PATH": str(run / "result.json")}, "result.json: not a SentencePiece model")])
def test_what_cannot_be_judged_is_one_line(trained, tmp_path, monkeypatch, capsys, spoil, said):
    run = shutil.copytree(trained / "0", tmp_path / "run")
    environ = spoil(run)
    for name, value in (environ if isinstance(environ, dict) else {}).items():
        monkeypatch.setenv(name, value)
    assert audit.main([str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (run / audit.VERDICT).exists()
