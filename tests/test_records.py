"""records/plot_runs.py draws what the files say; records/leaderboard.py keeps the table and whose figures they are."""

import json
import shutil

import leaderboard
import matplotlib.image
import numpy as np
import plot_runs
import pytest
from conftest import ROOT, TINY, read_result, run_script
from runs import PUBLISHED

# ----- plots


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Folder of a finished run with most kinds of tensors, validated on the way."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    more = {"VAL_LOSS_EVERY": "6", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "64", "VE_ENABLED": "1", "VE_LAYERS": "1,2",
            "LQER_ENABLED": "1", "SPARSE_ATTN_GATE_ENABLED": "1", "EVAL_STRIDE": "0", "ARTIFACT_DIR": str(folder)}
    done = run_script(tiny | more)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, kept after they are saved."""
    kept = []
    monkeypatch.setattr(plot_runs.plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plot_runs.plt.close("all")


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_is_drawn_as_the_files_say(run, tmp_path, figures, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    assert plot_runs.main([str(run), str(other), "--out", str(tmp_path / "new/plots")]) == 0
    pictures = [tmp_path / "new/plots" / name for name in ("training.png", "artifact.png")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in pictures]
    for path in pictures:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05
    steps = [m for m in metrics(run) if "step" in m]
    scores = {m["stage"]: m["val_bpb"] for m in metrics(run) if "stage" in m}
    (loss, loss_s), (bpb, bpb_s) = np.reshape(figures[0].axes, (2, 2))
    for axes, name in ((loss, "tokens"), (loss_s, "seconds")):
        assert axes.lines[0].get_xdata().tolist() == [m[name] for m in steps]
        assert axes.lines[0].get_ydata().tolist() == [m["train_loss"] for m in steps]
    assert bpb.lines[0].get_xdata().tolist() == [n * int(TINY["TRAIN_BATCH_TOKENS"]) for n in (6, 12, 18, 20)]
    assert bpb_s.lines[0].get_xdata().tolist() == [steps[i]["seconds"] for i in (5, 11, 17, 19)]
    assert bpb.lines[0].get_ydata().tolist() == [scores[s] for s in ("step6", "step12", "step18", "pre_quant")]
    assert bpb.lines[1].get_ydata() == [read_result(run)["val_bpb"]]
    assert [text.get_text() for text in loss_s.get_legend().get_texts()] == ["small", "other"]
    assert "nats" in loss.get_ylabel() and "bits per byte" in bpb.get_ylabel() and "(s)" in bpb_s.get_xlabel()


def test_bytes_by_role_are_all_bytes(run, tmp_path, figures):
    result, sizes = read_result(run), plot_runs.artifact_bytes(plot_runs.read_run(run))
    assert sum(sizes.values()) == pytest.approx(result["bytes_total"], abs=1e-3)
    assert sizes["code"] == result["code_bytes"]
    assert set(sizes) == set(plot_runs.ROLES) - {"head"}  # tied
    assert all(size > 0 for size in sizes.values())
    # 2 to 12 bits for each of the embedding's 512 x 64 weights; half as many keys as queries
    assert 2 < 8 * sizes["emb"] / (512 * 64) < 12 and 1.5 < sizes["q"] / sizes["k"] < 2.5
    plot_runs.main([str(run), "--out", str(tmp_path)])
    bars = [bar.get_width() for bar in figures[1].axes[0].patches]
    assert sum(bars) == pytest.approx(result["bytes_total"], abs=1e-3)


def test_bytes_by_role_of_another_packer(tiny, tmp_path):
    more = {"COMPRESSOR": "brotli", "QUANT_ALLOCATION": "sdclip", "ITERATIONS": "2", "EVAL_STRIDE": "0"}
    assert run_script(tiny | more | {"ARTIFACT_DIR": str(tmp_path)}).returncode == 0
    sizes = plot_runs.artifact_bytes(plot_runs.read_run(tmp_path))
    assert sum(sizes.values()) == pytest.approx(read_result(tmp_path)["bytes_total"], abs=1e-3)


def test_a_run_that_is_going_is_drawn_so_far(run, tmp_path, figures, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    assert plot_runs.main([str(tmp_path), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/training.png\n"
    assert len(figures[0].axes[0].lines[0].get_xdata()) == 4 and not (tmp_path / "artifact.png").exists()


def test_a_resumed_run_repeats_steps(run, tmp_path):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:5] + lines[2:]))
    again, once = plot_runs.read_run(tmp_path), plot_runs.read_run(run)
    assert (again.steps == once.steps).all() and (again.validations == once.validations).all()


@pytest.mark.parametrize(("name", "content", "words"), [
    ("metrics.jsonl", None, "No such file"), ("metrics.jsonl", b"", "holds no training steps"),
    ("metrics.jsonl", b"step 1\n", "not one JSON object a line"), ("metrics.jsonl", b"[1]\n", "not one JSON object"),
    ("metrics.jsonl", b'{"step": 1}\n', "not the files of a run (KeyError: 'train_loss')"),
    ("metrics.jsonl", b"\xff\n", "not the files of a run"), ("result.json", b"[]", "not the files of a run"),
    ("result.json", b"{}", "not the files of a run"), ("final_model.int6.ptz", None, "No such file"),
    ("final_model.int6.ptz", b"PGLF", "checksum"), ("final_model.int6.ptz", b"GIF89a", "not an artifact"),
])
def test_what_cannot_be_read_is_one_line(run, tmp_path, capsys, name, content, words):
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert plot_runs.main([str(folder), str(run), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}") and words in error and error.count("\n") == 1


# ----- leaderboard


@pytest.fixture
def records(tmp_path):
    """A copy of records/ as far as the leaderboard reads it, with one measured system."""
    for path in [ROOT / "records/README.md", *(folder / "published.json" for folder in PUBLISHED)]:
        copy = tmp_path / path.relative_to(ROOT / "records")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    folder = tmp_path / "track_10min_16mb/2027-01-01_Ours"
    folder.mkdir()
    (folder / "submission.json").write_text(json.dumps({
        "name": "Ours", "val_bpb": 1.0700123, "val_bpb_std": 0.0004, "seeds": [1, 2, 3], "bytes_total": 15_999_000,
        "hardware": "8 x cuda", "date": "2027-01-01"}))
    return tmp_path


def test_the_committed_leaderboard_is_what_the_folders_say():
    readme = ROOT / "records/README.md"
    assert leaderboard.with_leaderboard(readme, leaderboard.leaderboard(ROOT / "records")) == readme.read_text()


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda path: path.name)
def test_published_figures_are_those_of_the_recipe(recipe):
    """Every number stands in the recipe's own README, and so does where it is from."""
    entry = json.loads((recipe / "published.json").read_text(), parse_float=str)
    readme = " ".join((recipe / "README.md").read_text().split())
    published = readme[readme.index("**Published") :]
    assert f"PR {entry['pull_request']}" in published and entry["hardware"] == "8xH100" and "8×H100" in published
    for value in [entry["val_bpb"], *entry.get("seed_val_bpb", {}).values()]:
        assert value in published
    assert f"{entry.get('largest_artifact_bytes', 0):,}".strip("0") in published
    if "seed_val_bpb" in entry:
        assert entry["seeds"] == len(entry["seed_val_bpb"])
        assert "/".join(entry["seed_val_bpb"]) in published


def test_rows_are_ranked_and_say_whose_they_are(records):
    rows = leaderboard.leaderboard(records).splitlines()[2:]
    assert len(rows) == 8  # and no line that nothing was measured
    scores = [row.split()[1].strip("*")[:6] for row in rows]
    assert scores == ["1.0565", "1.0575", "1.0610", "1.0700", "1.0774", "1.0924", "1.0996", "1.1600"]
    assert rows[3] == ("| **1.07001** ± 0.00040 | [Ours](track_10min_16mb/2027-01-01_Ours) | **measured here**, "
                       "8 x cuda, 2027-01-01 | 3 | 15,999,000 | – | no: files: README.md, train_gpt.py, "
                       "requirements.txt, logs of 3 seeds (0 here) |")
    for row in rows[:3] + rows[4:]:
        assert "published in PR " in row and "measured here" not in row
        assert row.endswith("| no: none of ours in this folder |")


@pytest.mark.parametrize(("at_steps", "shown"), [
    ({"1000": 1.2345678}, "1.23457"), ({"500": 1.4, "1000": 1.25, "2000": 1.1}, "1.25000"), ({"500": 1.4}, "–"),
    ({}, "–")], ids=str)
def test_the_score_at_the_fixed_step_has_its_column(records, at_steps, shown):
    path = records / "track_10min_16mb/2027-01-01_Ours/submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_bpb_at_step": at_steps}))
    head, _, *rows = (line.split(" | ") for line in leaderboard.leaderboard(records).splitlines())
    column = head.index("val_bpb at step 1000")
    assert [row[column] for row in rows] == ["–"] * 3 + [shown] + ["–"] * 4


def test_write_puts_it_in_its_place_and_nothing_else(records):
    before = (records / "README.md").read_text()
    assert leaderboard.main(["--write"], records) == 0
    after = (records / "README.md").read_text()
    assert "| **1.07001**" in after and "No folder holds" not in after
    for part, cut in ((0, leaderboard.START), (1, leaderboard.END)):
        assert before.split(cut)[part] == after.split(cut)[part]
    assert leaderboard.main(["--write"], records) == 0
    assert (records / "README.md").read_text() == after
    assert [path.name for path in records.iterdir() if path.is_file()] == ["README.md"]


@pytest.mark.parametrize(("name", "old", "new", "words"), [
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "{", "", "not a JSON object"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", '"hardware": "8 x cuda"', '"hardware": null', "no hardware"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "1.0700123", '"best"', "val_bpb is 'best'"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "[1, 2, 3]", "5", "seeds is 5"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "15999000", '"abc"', "bytes_total is 'abc'"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "0.0004", '"abc"', "val_bpb_std is 'abc'"),
    (f"{PUBLISHED[0].parent.name}/{PUBLISHED[0].name}/published.json", '"largest_artifact_bytes":',
     '"largest_artifact_bytes": "abc", "was":', "largest_artifact_bytes is 'abc'"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "{", '{"val_bpb_at_step": {"1000": "best"}, ',
     "val_bpb_at_step has 'best'"),
    ("track_10min_16mb/2027-01-01_Ours/submission.json", "{", '{"val_bpb_at_step": [1.2], ', "val_bpb_at_step has ["),
    (f"{PUBLISHED[0].parent.name}/{PUBLISHED[0].name}/published.json", '"pull_request"', '"pr"', "no pull_request"),
    ("README.md", leaderboard.END, "", "expected the line"),
])
def test_a_bad_file_is_one_line_and_changes_nothing(records, capsys, name, old, new, words):
    content = (records / name).read_text()
    (records / name).write_text(content.replace(old, new))
    before = (records / "README.md").read_text()
    assert leaderboard.main(["--write"], records) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {records / name}: ") and words in error and error.count("\n") == 1
    assert (records / "README.md").read_text() == before
