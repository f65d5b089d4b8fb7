"""Folders as GPTfluence's public code writes them, and what is message of those that are broken."""

import json

import numpy as np
import pytest

from bayes_simfluence.checks import Misuse, RunsWarning
from bayes_simfluence.conventions import COMPLETE, DIVERGED
from bayes_simfluence.data.importers import import_runs

STEPS, QUERIES = 4, (7, 3)
RUNS = ("output_rte_bs-2_shot-6_lr-5e-7_seed-2", "output_rte_bs-2_shot-6_lr-5e-7_seed-10")
BATCHES, LOSSES = "train_samples_id.json", "all_loss_trajectory.out"


def batches_of(seed):
    rng = np.random.default_rng(seed)
    return [{"step": step, "samples_id": rng.integers(0, 9, 2).tolist()} for step in range(1, 5)]


def losses_of(seed, first=0):
    return [
        {
            "id": query,
            "loss_trajectory": [
                {"step": step, "loss": 1.0 + query / 10 - step / 8 - seed / 100}
                for step in range(first, STEPS + 1)
            ],
        }
        for query in QUERIES
    ]


def written(folder, batches, losses):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in ((BATCHES, batches), (LOSSES, losses)):
        text = lines if isinstance(lines, str) else "".join(f"{json.dumps(x)}\n" for x in lines)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def root(tmp_path):
    """Two runs, evaluated before training too; and a folder that is no run."""
    (tmp_path / "notes").mkdir()
    for seed, name in enumerate(RUNS):
        written(tmp_path / name, batches_of(seed), losses_of(seed))
    return tmp_path


def test_a_folder_of_runs(root):
    runs = import_runs(root)
    assert runs["run"].values.tolist() == list(RUNS), "in the natural order of their names"
    assert runs["query"].values.tolist() == list(QUERIES)
    for seed in range(2):
        ids = runs["train"].values[runs["batch"].values[seed]]
        assert ids.tolist() == [entry["samples_id"] for entry in batches_of(seed)]
        expected = [[x["loss"] for x in entry["loss_trajectory"]] for entry in losses_of(seed)]
        np.testing.assert_array_equal(runs["loss"][seed].T, expected)
    assert (runs["status"] == COMPLETE).all() and "step_size" not in runs
    assert runs.attrs["imported_from"] == "gptdynamics" and runs.attrs["batch_size"] == 2
    alone = import_runs(root / RUNS[1], train_ids=range(20))
    assert alone.sizes["run"] == 1 and alone.sizes["train"] == 20
    np.testing.assert_array_equal(alone["loss"][0], runs["loss"][1])


def test_without_losses_before_training_the_first_ones_are_time_0(root):
    for seed, name in enumerate(RUNS):
        written(root / name, batches_of(seed), losses_of(seed, first=1))
    with pytest.warns(
        RunsWarning, match=r"those after step 1 are taken as time 0, and the updates"
    ):
        runs = import_runs(root)
    assert runs.sizes["step"] == STEPS - 1 and runs.attrs["first_step"] == 1
    ids = runs["train"].values[runs["batch"].values[0]]
    assert ids.tolist() == [entry["samples_id"] for entry in batches_of(0)[1:]]
    expected = [[x["loss"] for x in entry["loss_trajectory"]] for entry in losses_of(0, first=1)]
    np.testing.assert_array_equal(runs["loss"][0].T, expected)


def test_losses_every_few_steps_and_short_batches(root):
    batches, losses = batches_of(0), losses_of(0)
    batches[1]["samples_id"] = batches[1]["samples_id"][:1]
    for line in losses:
        line["loss_trajectory"] = line["loss_trajectory"][::2]
    written(root / RUNS[0], batches, losses)
    runs = import_runs(root)
    assert np.isnan(runs["loss"].values[0, [1, 3]]).all()
    assert np.isfinite(runs["loss"].values[0, [0, 2, 4]]).all()
    assert np.isfinite(runs["loss"].values[1]).all()
    assert runs["batch"].values[0, 1, 1] == -1
    (root / "config.json").write_text('{"eval_steps": 2, "other": "x"}')
    import_runs(root)
    (root / RUNS[0] / "config.json").write_text('{"eval_steps": 1}')
    with pytest.raises(
        Misuse, match=r"'step': got no losses at steps 1, 3; expected losses every 1"
    ):
        import_runs(root)


def test_batches_as_one_list(root):
    lists = [entry["samples_id"] for entry in batches_of(0)]
    flat = [name for members in lists for name in members]
    expected = import_runs(root)["batch"]
    for text in (json.dumps(lists), json.dumps(flat, indent=1)):
        written(root / RUNS[0], text, losses_of(0))
        np.testing.assert_array_equal(import_runs(root)["batch"], expected)
    plain = written(root / "plain", json.dumps(flat), losses_of(0))
    with pytest.raises(Misuse, match=r"one flat list of examples and no batch size.*batch_size"):
        import_runs(plain)
    (plain / "config.json").write_text('{"batch_size": 2}')
    alone = import_runs(plain)
    assert alone["train"].values[alone["batch"].values[0]].tolist() == lists


def test_divergence_is_refused_or_kept(root):
    losses = losses_of(0)
    losses[1]["loss_trajectory"][3]["loss"] = float("nan")
    written(root / RUNS[0], batches_of(0), losses)
    with pytest.raises(
        Misuse, match=r"out, line 2, .*, entry 4: got a loss of nan at step 3; .*keep"
    ):
        import_runs(root)
    runs = import_runs(root, keep_diverged=True)
    assert runs["status"].values.tolist() == [DIVERGED, COMPLETE]


def batches_with(step, /, **fields):
    lines = batches_of(0)
    lines[step - 1].update(fields)
    return lines


def losses_with(line, entry, /, **fields):
    lines = losses_of(0)
    lines[line - 1]["loss_trajectory"][entry - 1].update(fields)
    return lines


def shorter(lines, last):
    return [{**x, "loss_trajectory": x["loss_trajectory"][:last]} for x in lines]


FLAWS = {
    "gap": (batches_with(3, step=4), None, r"json, line 3, field 'step': got 4; expected 3, ste"),
    "repeat": (batches_with(3, step=2), None, r"line 3, field 'step': got 2; expected 3"),
    "from 0": (batches_with(1, step=0), None, r"line 1, field 'step': got 0; expected 1"),
    "text step": (batches_with(1, step="1"), None, r"line 1, field 'step': got '1'; expected 1"),
    "no list": (batches_with(2, samples_id=7), None, r"line 2, field 'samples_id': got 7; expe"),
    "no ids": (batches_with(2, samples_id=[0.5]), None, r"line 2, field 'samples_id': got \[0"),
    "large": (batches_with(2, samples_id=[1, 2, 3]), None, r"got 3 ids; expected at most 2, t"),
    "no field": ([{"step": 1}], None, r"line 1: got no field samples_id; expected an object with"),
    "no object": ("7\n", None, r"line 1: got no field step, samples_id"),
    "no JSON": ("{'step': 1}\n", None, r"id.json, line 1: got .*; expected JSON; write the file "),
    "half a list": ("[[1, 2], [3", None, r"id.json: got .*expected JSON lines, or one JSON list"),
    "no step": ("\n", None, r"id.json: got no step; expected a line for each update"),
    "fewer steps": (batches_of(0)[:3], shorter(losses_of(0), 4), r"got steps up to \d; expected"),
    "late loss": (None, losses_with(1, 5, step=9), r"line 2, .*got other steps than the lines be"),
    "all late": (batches_of(0)[:3], None, r"out, field 'step': got 4; expected steps up to 3"),
    "loss twice": (None, losses_with(2, 3, step=1), r"line 2, .*, entry 3: got step 1 again;"),
    "loss hole": (None, losses_with(2, 3, step=8), r"line 2, .*: 2, 8 are in only one of them;"),
    "loss text": (None, losses_with(2, 3, loss="1"), r"line 2, .*, entry 3: got .*a number"),
    "truth": (None, losses_with(2, 3, loss=True), r"line 2, .*, entry 3: got .*a number"),
    "below 0": (None, losses_with(1, 1, step=-1), r"line 1, .*, entry 1: got .*whole number"),
    "no entries": (None, [{"id": 7, "loss_trajectory": 3}], r"line 1, .*, entry 1: got 3; expe"),
    "query twice": (None, losses_of(0) * 2, r"line 3, field 'id': got 7 again; expected "),
    "query list": (None, [{"id": [1], "loss_trajectory": []}], r"line 1, field 'id': got \[1\]; "),
    "no losses": (None, "", r"trajectory.out: got no loss; expected a line for each query"),
    "other queries": (None, losses_of(0)[:1], r"got queries 3 in only one of two runs; expected"),
    "later start": (None, losses_of(0, 2), r"out: got losses from step \d; expected losses"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_a_flaw_is_named_with_its_place(root, case):
    batches, losses, message = FLAWS[case]
    folder = written(
        root / RUNS[0], batches or batches_of(0), losses_of(0) if losses is None else losses
    )
    with pytest.raises(Misuse, match=message) as raised:
        import_runs(root)
    assert str(folder.parent) in str(raised.value)


def test_other_flaws_of_a_folder(root):
    with pytest.raises(Misuse, match=r"samples_id': got unknown ids .*; expected ids among 0, 1"):
        import_runs(root, train_ids=[0, 1])
    only = losses_of(0, STEPS)
    with pytest.raises(Misuse, match=r"got losses at step 4 alone; expected losses at two steps"):
        import_runs(written(root / "last", batches_of(0), only))
    (root / RUNS[0] / "config.json").write_text('{"batch_size": 0}')
    with pytest.raises(
        Misuse, match=r"config.json, field 'batch_size': got 0; expected an integer"
    ):
        import_runs(root)
    (root / RUNS[0] / "config.json").write_text("{")
    with pytest.raises(Misuse, match=r"config.json: got .*expected one JSON object"):
        import_runs(root)
    (root / RUNS[0] / BATCHES).write_bytes(b"\xff")
    (root / RUNS[0] / "config.json").unlink()
    with pytest.raises(Misuse, match=r"json: got .*expected UTF-8 text"):
        import_runs(root)
    (root / RUNS[0] / BATCHES).unlink()
    with pytest.raises(
        Misuse, match=r"train_samples_id.json: got no such file; .*each run's folder"
    ):
        import_runs(root)
    with pytest.raises(
        Misuse, match=r"notes: got no folder with train_samples_id.json; expected a"
    ):
        import_runs(root / "notes", "gptdynamics")
