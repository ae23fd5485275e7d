"""The audit: clean runs pass it whole, each planted fault is caught by the check that names it."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_result, run_script, shifted
from shards import read_shard, write_shard

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_text()
CHECKS = ["bytes", "single_pass", "normalized", "causal", "no_overlap"]
SMALL = {"TTT_EVAL_SEQ_LEN": "64", "TTT_CHUNK_SIZE": "16", "TTT_BATCH_SIZE": "4", "TTT_LORA_RANK": "4",
         "TTT_LORA_ALPHA": "8", "TTT_LORA_LR": "0.003", "TTT_CHUNK_TOKENS": "256", "TTT_EPOCHS": "1", "TTT_LR": "0.02",
         "PHASED_TTT_PREFIX_DOCS": "3", "GLOBAL_TTT_CHUNK_TOKENS": "256", "GLOBAL_TTT_LR": "0.02",
         "EVAL_BUDGET_SECONDS": "0", "AUDIT": "1", "EVAL_STRIDE": "32", "EVAL_BATCH_TOKENS": "1024"}


def script(*changes: tuple[str, str]) -> types.ModuleType:
    """train_gpt as a module of its own, with pieces of its text, each there exactly once, replaced."""
    text = SOURCE
    for old, new in changes:
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    module = types.ModuleType("planted")
    module.__file__ = str(ROOT / "train_gpt.py")
    exec(compile(text, "planted", "exec"), module.__dict__)
    module.pack_code = lambda source: b"code"  # not what is looked at here
    return module


def short_documents(tokens: np.ndarray, most: int) -> np.ndarray:
    """The stream with every document cut to its first `most` tokens."""
    starts = [*np.flatnonzero(tokens == tokens[0]), len(tokens)]
    return np.concatenate([tokens[a : min(b, a + most)] for a, b in zip(starts, starts[1:])])


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> dict[str, str]:
    """Settings that score an artifact with a SmearGate on six short documents, a copy of tiny's data being theirs."""
    folder = tmp_path_factory.mktemp("audit")
    data = folder / "datasets/topics"
    data.mkdir(parents=True)
    for path in Path(tiny["DATA_PATH"]).glob("*.bin"):
        tokens = read_shard(path)
        # as long as sets them apart and no longer: ends inside a character would change the count of bytes
        write_shard(data / path.name, short_documents(tokens, 400) if "val" in path.name else tokens)
    val = read_shard(data / "fineweb_val_000000.bin")
    stats = {"files_val": 1, "tokens_val": len(val), "docs_val": int((val == val[0]).sum())}
    (folder / "manifest.json").write_text(json.dumps({"datasets": [{"name": "topics", "stats": stats}]}))
    settings = tiny | SMALL | {"DATA_PATH": str(data), "SMEAR_GATE_ENABLED": "1", "SCALAR_LR": "0.2"}
    for varlen in "01":
        training = {"ARTIFACT_DIR": str(folder / varlen), "VARLEN_ENABLED": varlen, "EVAL_STRIDE": "0", "AUDIT": "0"}
        assert script().start([], tg.Launch(0, 0, 1), settings | training) == 0
    return settings | {"ARTIFACTS": str(folder)}


def audited(trained: dict[str, str], folder: Path, module: types.ModuleType, **changes: str) -> tuple[int, dict]:
    """Exit status and result.json of scoring the artifact, which was trained with document bounds if they are used."""
    artifact = f"{trained['ARTIFACTS']}/{changes.get('VARLEN_ENABLED', 0)}/final_model.int6.ptz"
    status = module.start([], module.Launch(0, 0, 1),
                          trained | {"ARTIFACT_DIR": str(folder), "EVAL_ONLY": artifact} | changes)
    return status, read_result(folder)


@pytest.mark.parametrize("changes", [
    {"TTT_MODE": "none"}, {"TTT_MODE": "none", "EVAL_STRIDE": "0"}, {"TTT_MODE": "none", "VARLEN_ENABLED": "1"},
    {"TTT_MODE": "chunk"}, {"TTT_MODE": "chunk", "VARLEN_ENABLED": "1"}, {"TTT_MODE": "lora"},
    {"TTT_MODE": "lora", "TTT_OPTIMIZER": "sgd", "TTT_DOC_ORDER": "sorted"}, {"TTT_MODE": "phased"},
    {"TTT_MODE": "phased", "PHASED_TTT_NUM_PHASES": "3", "EVAL_BUDGET_SECONDS": "0.001"},
    {"TTT_MODE": "lora", "DTYPE": "bf16"}, {"TTT_MODE": "none", "VARLEN_ENABLED": "1", "EVAL_SEQ_LEN": "192"}], ids=str)
def test_a_clean_run_passes_all(trained, tmp_path, changes):
    status, result = audited(trained, tmp_path, script(), **changes)
    assert status == 0 and list(result["audit"]) == CHECKS and result["val_complete"] is True
    assert all(check["ok"] is True and check["detail"] for check in result["audit"].values()), result["audit"]
    log = (tmp_path / "train.log").read_text()
    assert all(f"audit {name}: ok: " in log for name in CHECKS)


def test_without_the_audit_there_is_none(trained, tmp_path):
    status, result = audited(trained, tmp_path, script(), AUDIT="0")
    assert status == 0 and result["audit"] is None


def test_without_training_shards_there_is_nothing_to_compare_with(trained, tmp_path):
    data = tmp_path / "topics"
    data.mkdir()
    (data / "fineweb_val_000000.bin").symlink_to(Path(trained["DATA_PATH"], "fineweb_val_000000.bin"))
    status, result = audited(trained, tmp_path / "run", script(), DATA_PATH=str(data))
    assert status == 0 and result["audit"]["no_overlap"] is None and result["audit"]["causal"]["ok"]
    assert result["val_complete"] is None  # nor is there a manifest


# ----- planted faults


FAULTS = {
    "an attention mask off by one": ("causal", {}, [
        ("k.transpose(1, 2), v.transpose(1, 2), is_causal=True,\n",
         "k.transpose(1, 2), v.transpose(1, 2), attn_mask=torch.ones(q.size(1), q.size(1)).bool().tril(1),\n")]),
    "the same inside documents": ("causal", {"TTT_MODE": "none", "VARLEN_ENABLED": "1"}, [
        ("(place <= place[-size:, None])", "(place <= place[-size:, None] + 1)")]),
    "attention across documents": ("causal", {"TTT_MODE": "none", "VARLEN_ENABLED": "1"}, [
        ("mask = (segment[:, :, None] == key_segment[:, None, :])", "mask = (segment[:, :, None] > -9)")]),
    "a smear gate without the document mask": ("causal", {}, [
        ("[:, :-1].masked_fill(starts[..., None], 0.0)", "[:, :-1]")]),
    "the same with document bounds": ("causal", {"TTT_MODE": "none", "VARLEN_ENABLED": "1"}, [
        ("[:, :-1].masked_fill(starts[..., None], 0.0)", "[:, :-1]")]),
    "an adapter's step before the charge": ("causal", {}, [
        ("        scorer.add(torch.where(scored, place + 1, 0), losses.detach())",
         "        if adapters:\n"
         "            adapters.learn((losses * goes_on).sum() / chunk)\n"
         "            losses = forward(ids, targets, hooks=adapters.hooks, loops=cfg.num_loops)\n"
         "        scorer.add(torch.where(scored, place + 1, 0), losses.detach())")]),
    "adapters that outlive their document": ("causal", {"TTT_BATCH_SIZE": "1"}, [
        ("    if adapters:\n        adapters.reset()",
         "    if adapters and not hasattr(adapters, 'optimizer'):\n        adapters.reset()")]),
    "a token scored twice": ("single_pass", {}, [
        ("(place < starts + high) & (place < ends)", "(place <= starts + high) & (place < ends)")]),
    "a token scored by two windows": ("single_pass", {"TTT_MODE": "none"}, [
        ("scored = (place >= fresh)", "scored = (place >= fresh - 1)")]),
    "a token skipped": ("single_pass", {}, [
        ("scored = (place >= starts + low)", "scored = (place > starts + low)")]),
    "a document scored from its end": ("single_pass", {}, [
        ("for low in range(0, longest, chunk):", "for low in reversed(range(0, longest, chunk)):")]),
    "a byte table that counts ▁ twice": ("bytes", {}, [
        ('length[i] = len(piece[space[i]:].replace("▁", " ").encode())',
         'length[i] = len(piece.replace("▁", " ").encode())')]),
    "bytes of another text": ("bytes", {}, [
        ("self.target_bytes[1:].sum(dtype=torch.int64))\n        if not math",
         "self.target_bytes[1:].sum(dtype=torch.int64)) + 1\n        if not math")]),
    "a distribution scaled by 1.01": ("normalized", {}, [
        ("return losses.view_as(targets)", "return losses.view_as(targets) - math.log(1.01)")]),
    "losses scaled where they are charged": ("normalized", {"TTT_MODE": "none"}, [
        ("scorer.add(torch.where(scored, place + 1, 0), forward(ids, targets, bounds=bounds, loops=loops))",
         "scorer.add(torch.where(scored, place + 1, 0), 0.99 * forward(ids, targets, bounds=bounds, loops=loops))")]),
    "a model that looks at the target": ("normalized", {}, [
        ("    losses = F.cross_entropy(softcap(logits, cap)",
         "    logits = logits + 0.1 * F.one_hot(targets.clamp(min=0), logits.size(-1))\n"
         "    losses = F.cross_entropy(softcap(logits, cap)")]),
    "adaptation on a document not yet scored": ("causal", {"TTT_MODE": "phased"}, [
        ("end, size = documents[high - 1][1], cfg", "end, size = documents[high][1], cfg")]),
    "training on a chunk not yet scored": ("causal", {"TTT_MODE": "chunk"}, [
        ("sgd.step(val.tokens[trained : scored + 1]", "sgd.step(val.tokens[trained : scored + 20]")]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_its_name(trained, tmp_path, fault):
    check, changes, edits = FAULTS[fault]
    status, result = audited(trained, tmp_path, script(*edits), **{"TTT_MODE": "lora"} | changes)
    assert status == 3 and result["audit"][check]["ok"] is False, result["audit"]
    assert f"audit {check}: FAILED: " in (tmp_path / "train.log").read_text()


def test_a_score_that_counts_a_target_twice_is_refused_without_the_audit(trained, tmp_path):
    planted = script(*FAULTS["a token scored twice"][2])
    with pytest.raises(planted.RunError, match="score refused: .* more than once"):
        audited(trained, tmp_path, planted, AUDIT="0", TTT_MODE="lora")


def copy_data(trained: dict[str, str], folder: Path) -> Path:
    """The data of the fixture with its manifest, in files that may be written."""
    data = folder / "datasets/topics"
    data.mkdir(parents=True)
    for path in Path(trained["DATA_PATH"]).glob("*.bin"):
        (data / path.name).write_bytes(path.read_bytes())
    (folder / "manifest.json").write_bytes(Path(trained["DATA_PATH"], "../../manifest.json").read_bytes())
    return data


def test_a_truncated_validation_shard_is_not_complete(trained, tmp_path):
    data = copy_data(trained, tmp_path)
    path = data / "fineweb_val_000000.bin"
    tokens = read_shard(path)
    write_shard(path, np.array(tokens[: np.flatnonzero(tokens == tokens[0])[-1]]))
    status, result = audited(trained, tmp_path / "run", script(), DATA_PATH=str(data))
    assert status == 0 and result["val_complete"] is False and all(c["ok"] for c in result["audit"].values())
    log = (tmp_path / "run/train.log").read_text()
    assert "complete: NO" in log and "PARTIAL" in log.splitlines()[-1]
    path.write_bytes(path.read_bytes()[:-2])  # and one that its own header contradicts is not read at all
    with pytest.raises(tg.RunError, match="expected .* bytes"):
        audited(trained, tmp_path / "run", tg, DATA_PATH=str(data))


@pytest.mark.parametrize("where", ["at the end", "as a shard", "across two shards"])
def test_validation_documents_in_a_training_shard_are_found(trained, tmp_path, where):
    data = copy_data(trained, tmp_path)
    val = np.array(read_shard(data / "fineweb_val_000000.bin"))
    last, second = data / "fineweb_train_000000.bin", np.flatnonzero(val == val[0])[1]
    if where == "at the end":
        write_shard(last, np.concatenate((read_shard(last), val[:second])))
    elif where == "as a shard":
        write_shard(data / "fineweb_train_000001.bin", val)
    else:
        write_shard(last, np.concatenate((read_shard(last), val[:7])))
        write_shard(data / "fineweb_train_000001.bin", val[7:second])
    status, result = audited(trained, tmp_path / "run", script(), DATA_PATH=str(data))
    check, count = result["audit"]["no_overlap"], 6 if where == "as a shard" else 1
    assert status == 3 and check["ok"] is False and check["detail"].startswith(f"{count} of 6 validation documents")
    assert "the first of them [0" in check["detail"]
    assert all(result["audit"][name]["ok"] for name in CHECKS[:4])


# ----- overlap by hand


def test_overlap_equals_a_search_by_hand(tmp_path):
    """Random documents of few tokens, so that many are equal, in shards that cut them anywhere."""
    chance = np.random.default_rng(shifted(0))
    for round_ in range(30):
        def documents(count, chance=chance):
            return [chance.integers(2, 4, chance.choice([0, 1, 2, 3, 63, 64, 65, 70])) for _ in range(count)]

        train, val = documents(40), documents(12)
        long = chance.integers(2, 4, 64)
        train.append(np.concatenate((long, [2, 3])))
        val += [np.concatenate((long, [3])), long[:63]]  # as far as anyone looks, and one shorter
        stream = np.concatenate([np.concatenate(([1], d)) for d in train]).astype(np.uint16)
        cuts = [0, *sorted(chance.integers(0, len(stream), 2)), len(stream)]
        if min(b - a for a, b in zip(cuts, cuts[1:])) < 65:
            continue
        paths = [str(tmp_path / f"{round_}-{i}.bin") for i in range(3)]
        for path, a, b in zip(paths, cuts, cuts[1:]):
            write_shard(path, stream[a:b])
        known = {tuple(d[:64]) for d in train}
        expected = [len(d) > 0 and tuple(d[:64]) in known for d in val]
        tokens = np.concatenate([np.concatenate(([1], d)) for d in val]).astype(np.uint16)
        assert tg.find_overlap(tokens, paths, range(3), 1).tolist() == expected
        parts = [tg.find_overlap(tokens, paths, [i], 1) for i in range(3)]
        assert np.logical_or.reduce(parts).tolist() == expected


def test_published_duplicates_are_listed_and_half_a_percent_of_them_allowed(tmp_path, monkeypatch):
    document = [[1, *np.random.default_rng(shifted(i)).integers(2, 99, 20)] for i in range(400)]
    for copied, ok in ((0, True), (2, True), (3, False)):
        monkeypatch.setattr(tg, "find_shards", lambda folder, split: [str(tmp_path / "t.bin")])
        write_shard(tmp_path / "t.bin", np.array(sum(document[:copied], [1, 5]), dtype=np.uint16))
        val = tg.Validation(torch.tensor(sum(document, [])), torch.ones(400 * 21), 400, None, 1)
        rt = types.SimpleNamespace(rank=0, world=1, device="cpu", sum_=lambda t: t, progress=lambda items, what: items)
        check = tg.audit_overlap(tg.Settings(), rt, val)
        assert check.ok is ok and check.detail.startswith(f"{copied} of 400")
        assert copied == 0 or f"the first of them {[*range(copied)]}" in check.detail


# ----- several processes


def test_the_audit_of_three_processes(trained, tmp_path):
    settings = trained | {"EVAL_ONLY": f"{trained['ARTIFACTS']}/0/final_model.int6.ptz", "ARTIFACT_DIR": str(tmp_path),
                          "TTT_MODE": "phased", "TTT_BATCH_SIZE": "1"}
    done = run_script(settings, processes=3)
    assert done.returncode == 0, done.stderr[-2000:]
    result = read_result(tmp_path)
    assert result["world_size"] == 3 and all(check["ok"] for check in result["audit"].values()), result["audit"]
