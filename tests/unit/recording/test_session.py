"""The settings of a recording reach it."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording import session
from bayes_simfluence.recording.checkpoints import open_checkpoints
from bayes_simfluence.recording.config import RecordConfig

SETTINGS = {
    "examples": 6,
    "queries": 4,
    "runs": 3,
    "per_run": 4,
    "batch_size": 2,
    "epochs": 2,
    "features": 0,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "evaluate_every": 3,
    "checkpoints": 2,
    "accumulate": 2,
    "remat": True,
    "parallel": "auto",
}


def test_settings_are_those_of_the_recording(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "task_of", lambda config: squares)
    config = session.merged(SETTINGS)
    store = tmp_path / "runs.zarr"
    runs = session.record_from_config(config, store)
    kept = {name: runs.attrs[name] for name in ("evaluate_every", "checkpoints", "accumulate")}
    assert kept == {"evaluate_every": 3, "checkpoints": 2, "accumulate": 2}
    assert runs.attrs["remat"] and runs.attrs["parallel"] == 3
    assert runs.attrs["settings"]["parallel"] == "auto"
    looked = np.isfinite(runs["loss"]).all(("run", "query")).values
    assert np.flatnonzero(looked).tolist() == [0, 3, 4]
    assert [saved.step for saved in open_checkpoints(store, 2)] == [2, 4]
    parts = tmp_path / "parts.zarr"
    with pytest.warns(UserWarning, match="2 of 3 runs recorded"):
        session.record_from_config(config, parts, only=[0, 2], resume=True)
    again = session.record_from_config(config, parts, only=slice(1, 2), resume=True)
    xr.testing.assert_identical(again, runs)


def test_starts_and_twins_are_recorded_and_said(squares, tmp_path, monkeypatch):
    drawn = replace(squares, fresh=lambda params, key: {**params, "v": 2 * params["v"]})
    monkeypatch.setattr(session, "task_of", lambda config: drawn)
    plain = {"evaluate_every": 1, "checkpoints": 0, "accumulate": 1, "remat": False}
    config = session.merged(SETTINGS, plain, {"starts": 2, "twins": 1})
    runs = session.record_from_config(config, tmp_path / "runs.zarr")
    assert runs["start"].values.tolist() == [0, 1, 0, 0]
    assert runs["twin"].values.tolist() == ["0", "1", "2", "2"]
    said = runs.attrs["settings"]
    assert (said["starts"], said["twins"], said["runs"]) == (2, 1, 3)
    # What earlier versions did not know is not said where it changes nothing.
    silent = session._provenance(session.merged(SETTINGS))["settings"]
    assert not {"starts", "twins", "design"} & set(silent)


def test_a_number_of_runs_at_once_may_come_as_text():
    assert RecordConfig(parallel="4").validate().placement.parallel == 4
    assert RecordConfig(parallel="auto").validate().placement.parallel == "auto"
    for bad in ("many", "0", 0):
        with pytest.raises(Misuse, match="parallel"):
            RecordConfig(parallel=bad).validate()


def designed(squares, monkeypatch, **settings):
    monkeypatch.setattr(session, "task_of", lambda config: squares)
    rest = {name: SETTINGS[name] for name in ("examples", "queries", "per_run", "batch_size")}
    rest |= {"runs": 5, "epochs": 2, "features": 3, "optimizer": "sgd"}
    shares = "sorted=0.4, half = 0.2"
    return session.merged({**rest, "design": "diverse", "shares": shares, **settings})


def test_a_diverse_design_is_recorded_with_the_kinds_of_its_curricula(
    squares, tmp_path, monkeypatch
):
    """This task has no classes: gradient features tell examples apart, the store's own later."""
    config = designed(squares, monkeypatch)
    runs = session.record_from_config(config, tmp_path / "runs.zarr")
    kinds = runs["curriculum"]
    assert kinds.dims == ("run",)
    assert sorted(kinds.values) == ["half", "random", "random", "sorted", "sorted"]
    plain = session.merged({**config.as_dict(), "design": "random", "shares": ""})
    random = session.record_from_config(plain, tmp_path / "plain.zarr")
    assert "curriculum" not in random.coords and "design" not in random.attrs["settings"]
    same = (runs["batch"] == random["batch"]).all(("step", "slot"))
    np.testing.assert_array_equal(same, kinds == "random")
    xr.testing.assert_equal(runs["train_feature"], random["train_feature"])

    parts = tmp_path / "parts.zarr"
    with pytest.warns(UserWarning, match="2 of 5 runs recorded"):
        session.record_from_config(config, parts, only=[0, 2], resume=True)
    monkeypatch.setattr("bayes_simfluence.recording.features.gradient_features", None)
    again = session.record_from_config(config, parts, resume=True)
    xr.testing.assert_identical(again, runs)
    with pytest.raises(Misuse, match="other curricula, kinds of curricula, settings"):
        session.record_from_config(
            designed(squares, monkeypatch, shares="half=0.4"), parts, resume=True
        )


def test_a_diverse_design_by_nothing_is_refused(squares, tmp_path, monkeypatch):
    config = designed(squares, monkeypatch, features=0)
    with pytest.raises(Misuse, match="labels and features: got neither"):
        session.record_from_config(config, tmp_path / "runs.zarr")
    assert not list(tmp_path.iterdir())
    repeated = designed(squares, monkeypatch, features=0, shares="half=0.2")
    assert "half" in session.record_from_config(repeated, tmp_path / "runs.zarr")["curriculum"]


def test_several_processes_do_not_each_make_curricula_of_features(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(session.Processes, "here", lambda distributed: session.Processes(1, 2))
    with pytest.raises(Misuse, match=r"several processes.*--only 0:1"):
        session.record_from_config(designed(squares, monkeypatch), tmp_path / "runs.zarr")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"design": "varied"}, "design: got 'varied'; expected one of random, diverse"),
        ({"shares": "half=0.1"}, r"shares: got 'half=0.1' for the design random"),
        ({"design": "diverse", "shares": "half"}, r"shares: got 'half'; .*a number for each kind"),
        ({"design": "diverse", "shares": "halved=0.1"}, "kind in shares: got 'halved'"),
        ({"design": "diverse", "shares": "half=1.5"}, "got 1.5"),
    ],
)
def test_designs_that_do_not_exist_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        session.merged(settings)
