"""A whole study on a tiny network: stages, going on, failures, the report, the command."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import bayes_simfluence as bs
from bayes_simfluence import cli
from bayes_simfluence.attribution.score_files import load_scores
from bayes_simfluence.attribution.simulators import additive_simulator
from bayes_simfluence.attribution.tracin import grad_dot
from bayes_simfluence.checks import Misuse
from bayes_simfluence.progress import Silent
from bayes_simfluence.recording.from_config import task_of
from bayes_simfluence.study import methods, stages
from bayes_simfluence.study.cell import Cell
from bayes_simfluence.study.config import study_of
from bayes_simfluence.study.jobs import outcome_of
from bayes_simfluence.study.methods import Pilot
from bayes_simfluence.study.run import run_study

text = runpy.run_path(str(Path(__file__).parents[1] / "recording" / "test_text.py"))
# A few short runs have not trained on all examples that the others have.
pytestmark = [
    pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning"),
    pytest.mark.filterwarnings("ignore:.*unseen examples:bayes_simfluence.checks.SupportWarning"),
]
COUNTS = [3, 4]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One cell that is recorded, one that takes runs without a task."""
    folder = tmp_path_factory.mktemp("in")
    few = bs.example_runs("trec").isel(query=[0, 1], run=slice(0, 7))
    few = few.isel(step=slice(0, 12), time=slice(0, 13)).drop_vars(
        ["train_feature", "query_feature"]
    )
    return {
        "common": {
            "checkpoint": str(text["tiny_checkpoint"](folder / "tiny", np.random.default_rng(0))),
            "train": str(text["write_lines"](folder / "train.jsonl", text["some_rows"](12, 0))),
            "query": str(text["write_lines"](folder / "query.jsonl", text["some_rows"](9, 1))),
            "examples": 8, "queries": 5, "runs": 7, "per_run": 4, "batch_size": 2, "epochs": 2,
            "learning_rate": 0.01, "features": 0, "max_tokens": 16,
        },
        "counts": COUNTS, "validate": 1, "held_out": 2, "checkpoints": 2, "draws": 8,
        "resamples": 20,
        "simulators": ["persistence", "mean-trajectory", "ridge-additive"],
        "methods": ["grad-dot"],
        "cells": [
            {"name": "tiny", "record": {"tuning": "full"}},
            {"name": "plain", "runs": str(bs.export_netcdf(few, folder / "few.nc"))},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def studied(settings, tmp_path_factory):
    """Where the study was done, and its settings; tests leave the folder as it is."""
    config = study_of(settings)
    return run_study(config, tmp_path_factory.mktemp("out") / "study"), config


def cell_of(studied, place=0):
    folder, config = studied
    return Cell(config.cells[place], config, folder / config.cells[place].name)


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_scores_are_those_of_the_pilot_run_and_their_cost_is_known(studied):
    cell = cell_of(studied)
    scores = load_scores(cell.scores("grad-dot"))
    assert scores.sizes == {"train": 8, "query": 5}
    outcome = outcome_of(cell.scores("grad-dot"))
    assert outcome.seconds > 0 and outcome.peak_bytes != 0
    # The pilot run is run 0 of the recording, with its weights.
    pilot = bs.open_runs(cell.pilot)
    np.testing.assert_array_equal(pilot["batch"][0], cell.runs["batch"][0])
    # The same run, in a program of its own: equal up to rounding.
    np.testing.assert_allclose(pilot["loss"][0, [0, -1]], cell.runs["loss"][0, [0, -1]], rtol=1e-6)
    pilot = Pilot(task_of(cell.config.record), cell.pilot, 4, 2, cell.key("x"), Silent())
    assert [saved.step for saved in pilot.checkpoints()] == [2, 4]
    assert [saved.step for saved in pilot.checkpoints(1)] == [4]
    import jax

    losses = jax.vmap(pilot.task.loss, in_axes=(None, 0))(
        pilot.task.weights(pilot.final(), pilot.task.frozen), pilot.task.query
    )
    np.testing.assert_allclose(losses, cell.runs["loss"][0, -1], rtol=1e-5)
    np.testing.assert_allclose(scores, grad_dot(pilot.task, pilot.final()), rtol=1e-4, atol=1e-7)


def test_tables_are_comparisons_of_fits_to_the_first_runs(studied):
    cell = cell_of(studied)
    names = ["persistence", "mean-trajectory", "ridge-additive", "grad-dot"]
    for count in COUNTS:
        table = cell.tables()[count]
        assert list(table.index) == names and "failed" not in table
        split = cell.split(count)
        assert split.fitted.sizes["run"] == count and split.held_out["run"].values.tolist() == [
            5,
            6,
        ]
        mean = bs.compare(
            {
                "mean-trajectory": bs.mean_trajectory(split.fitted),
                "grad-dot": additive_simulator(load_scores(cell.scores("grad-dot")), split.fitted),
            },
            split.held_out,
            key=cell.key("compare"),
            draws=8,
            resamples=20,
        )
        pd.testing.assert_frame_equal(
            table.loc[mean.index, mean.columns], mean, check_exact=False, rtol=1e-5
        )
    # Ridge chose its penalty on the validation run.
    kept = bs.load_posterior(cell.fit("ridge-additive", 3))
    assert kept.runs["run"].values.tolist() == [0, 1, 2]


def test_a_cell_without_a_task_has_its_failures_in_the_table(studied):
    table = cell_of(studied, 1).tables()[3]
    assert table.loc["ridge-additive", "mse"] > 0 and table.loc["ridge-additive", "failed"] == ""
    assert np.isnan(table.loc["grad-dot", "mse"])
    assert "without the settings that recorded them" in table.loc["grad-dot", "failed"]


def test_the_report_has_tables_pictures_and_costs(studied):
    folder = studied[0] / "report"
    page = (folder / "index.md").read_text()
    assert "## tiny" in page and "## plain" in page
    # Seconds of scores only where there are scores, and of the fit of their scale.
    costs = [line for line in page.splitlines() if line.startswith("| method | scores (s) |")]
    assert (
        costs
        == ["| method | scores (s) | fit to 4 runs (s) | peak memory (GiB) | at its start |"] * 2
    )
    assert re.search(r"\| grad-dot \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", page)
    assert re.search(r"\| persistence \|  \| [\d.]+ \|", page)
    assert "* grad-dot failed: cell 'plain'" in page and "| method | 3 runs | 4 runs |" in page
    for name in ("tiny-mse.png", "plain-spearman_change.png"):
        assert f"({name})" in page and (folder / name).read_bytes().startswith(b"\x89PNG")
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.groupby(["cell", "runs"]).size().tolist() == [4] * 4
    costs = pd.read_csv(folder / "costs.csv", keep_default_na=False)
    assert set(costs["stage"]) == {"attribute", "fit"}
    assert (costs[costs["failed"] == ""]["seconds"] > 0).all()
    assert r"\begin{tabular}" in (folder / "tiny.tex").read_text()


def test_a_second_call_does_nothing_again(studied):
    folder, config = studied
    before = files_in(folder)
    run_study(config, folder)
    after = files_in(folder)
    changed = {
        path.relative_to(folder).parts[0] for path in after if before.get(path) != after[path]
    }
    assert before.keys() == after.keys() and changed == {"report", "study.yaml"}


def test_it_goes_on_where_it_stopped(studied, settings, tmp_path, monkeypatch):
    """A method joins and fails, a result is lost; the failure is repaired by --retry."""
    folder = shutil.copytree(studied[0], tmp_path / "study")
    grown = study_of({**settings, "methods": ["grad-dot", "new"], "counts": [2, 3, 4]})
    cell = Cell(grown.cells[0], grown, folder / "tiny")

    def broken(pilot):
        raise np.linalg.LinAlgError("singular curvature: raise the damping")

    table = dict(methods.ATTRIBUTIONS)
    monkeypatch.setattr(stages, "ATTRIBUTIONS", {**table, "new": broken})
    monkeypatch.setattr("bayes_simfluence.study.run.ATTRIBUTIONS", {**table, "new": broken})
    scores = load_scores(cell.scores("grad-dot"))
    kept = cell.fit("grad-dot", 3).stat().st_mtime_ns
    cell.fit("ridge-additive", 3).unlink()
    for _ in range(2):
        run_study(grown, folder, cells=["tiny"], stages=["attribute", "fit", "compare"])
    assert cell.fit("grad-dot", 3).stat().st_mtime_ns == kept
    assert cell.fit("ridge-additive", 3).exists()
    tables = cell.tables()
    assert list(tables) == [2, 3, 4]
    assert tables[2].loc["new", "failed"] == "singular curvature: raise the damping"
    assert tables[2].loc["grad-dot", "mse"] > 0 and tables[2].loc["grad-dot", "failed"] == ""
    monkeypatch.setattr(stages, "ATTRIBUTIONS", {**table, "new": lambda _: scores})
    run_study(grown, folder, cells=["tiny"], stages=["attribute", "fit", "compare"], retry=True)
    repaired = cell.tables()[2]
    assert repaired.loc["new", "mse"] == pytest.approx(repaired.loc["grad-dot", "mse"])
    # The other cell waits for its turn, and the report says so where nothing is.
    assert list(Cell(grown.cells[1], grown, folder / "plain").tables()) == [3, 4]


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bayes-simfluence", *(str(word) for word in words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, errors = capsys.readouterr()
        return stopped.value.code or 0, out, errors

    return run


def test_the_command_does_the_stages_that_are_named(command, settings, tmp_path):
    given = tmp_path / "mine.yaml"
    given.write_text(yaml.safe_dump({**settings, "simulators": ["persistence"], "counts": [4]}))
    words = ["study", "--config", given, "--out", tmp_path / "s", "--quiet"]
    code, _, errors = command(*words, "--stage", "fit")
    assert code == 2 and "cell 'tiny': got runs that are not all recorded" in errors
    assert "run the stage record" in errors and not (tmp_path / "s" / "tiny").exists()
    code, _, errors = command(*words, "--stage", "attribute")
    assert code == 2 and "run the stage checkpoints" in errors
    chosen = ["--cell", "plain", "--stage", "compare", "--stage", "fit"]
    code, out, errors = command(*words, *chosen)
    assert code == 0, errors
    assert "results in" in out and not (tmp_path / "s" / "report").exists()
    assert (tmp_path / "s" / "plain" / "tables" / "4.csv").is_file()
    code, out, errors = command(*words, "--stage", "report")
    assert code == 0 and "report in" in out
    page = (tmp_path / "s" / "report" / "index.md").read_text()
    assert page.index("## tiny") < page.index("Not compared yet.") < page.index("## plain")


@pytest.mark.parametrize(
    ("changed", "options", "match"),
    [
        ({"methods": ["magic"]}, [], "methods: got 'magic'; expected one of .*grad-dot"),
        ({"simulators": ["magic"]}, [], "simulators: got 'magic'; expected one of persistence"),
        ({}, ["--cell", "x"], "cell: got 'x'; expected one of tiny, plain"),
        ({}, ["--stage", "x"], "stage: got 'x'; expected one of record, checkpoints"),
        ({"counts": [30]}, [], "cell 'tiny': runs: got 7; expected at least 33"),
        ({"nonsense": 1}, [], "unknown names nonsense"),
    ],
)
def test_misuse_is_one_line_before_any_work(command, settings, tmp_path, changed, options, match):
    given = tmp_path / "mine.yaml"
    given.write_text(yaml.safe_dump({**settings, **changed}))
    code, _, errors = command("study", "--config", given, "--out", tmp_path / "s", *options)
    assert code == 2 and __import__("re").search(match, errors), errors
    assert not (tmp_path / "s").exists()


def test_another_study_and_other_recordings_are_refused(studied, settings, tmp_path):
    folder, _ = studied
    with pytest.raises(Misuse, match="a study whose draws differ"):
        run_study(study_of({**settings, "draws": 9}), folder)
    other = {**settings["common"], "seed": 1}
    wrong = study_of(
        {
            **settings,
            "cells": [{"name": "one", "runs": str(folder / "tiny" / "runs.zarr"), "record": other}],
        }
    )
    with pytest.raises(Misuse, match="cell 'one': record: got settings that draw other examples"):
        run_study(wrong, tmp_path / "s", stages=["checkpoints"])
    few = study_of({**settings, "counts": [6], "cells": [settings["cells"][1]]})
    with pytest.raises(Misuse, match="cell 'plain': runs: got 7; expected at least 9 usable"):
        run_study(few, tmp_path / "t", stages=["record"])
