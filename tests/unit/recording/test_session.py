"""The settings of a recording reach it."""

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


def test_a_number_of_runs_at_once_may_come_as_text():
    assert RecordConfig(parallel="4").validate().placement.parallel == 4
    assert RecordConfig(parallel="auto").validate().placement.parallel == "auto"
    for bad in ("many", "0", 0):
        with pytest.raises(Misuse, match="parallel"):
            RecordConfig(parallel=bad).validate()
