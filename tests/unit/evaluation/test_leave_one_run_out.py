"""Runs left out by refitting; by importance sampling see ``tests/contracts/test_arviz.py``."""

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.leave_one_run_out import elpd_over_runs
from bayes_simfluence.evaluation.synthetic import linear_runs


@pytest.fixture(scope="module")
def recording():
    return linear_runs(key=jax.random.key(4), runs=7, query=2, epochs=2)[0]


@pytest.mark.parametrize("folds", [3, 50])
def test_every_run_is_scored_by_a_fit_without_it(recording, key, folds):
    method = bs.Ridge(penalty=0.01, objective="centred")
    table = elpd_over_runs(recording, key=key, method=method, folds=folds)
    assert table.index.tolist() == recording["run"].values.tolist() and table.index.name == "run"
    assert table.columns.tolist() == ["elpd", "mse"]
    count = min(folds, recording.sizes["run"])
    for run in range(recording.sizes["run"]):
        rest = [other for other in range(recording.sizes["run"]) if other % count != run % count]
        posterior = bs.fit(recording.isel(run=rest), method=method, key=key)
        left_out = recording.isel(run=[run])
        error = posterior.simulate(left_out, key=key)["mean_loss"][0, 0] - left_out["loss"]
        expected = float((error.isel(time=slice(1, None)) ** 2).mean())
        np.testing.assert_allclose(table.loc[run, "mse"], expected, rtol=1e-3)
    assert table["elpd"].isna().all()


def test_a_band_has_a_density(recording, key):
    table = elpd_over_runs(recording, key=key, model=bs.Simfluence.linear(), folds=2, draws=50)
    assert np.isfinite(table.to_numpy()).all() and len(table) == 7


def test_folds_are_counted(recording, key):
    with pytest.raises(Misuse, match=r"folds: got 0"):
        elpd_over_runs(recording, key=key, folds=0)


@pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning")
def test_refits_score_what_was_recorded(key):
    runs, _ = linear_runs(key=jax.random.key(3), runs=6, train=12, per_run=8, query=4)
    thinned = runs.copy(deep=True)
    thinned["loss"].values[1::2, 3:6] = np.nan
    method = bs.Exact(times=2)
    table = elpd_over_runs(thinned, key=key, method=method, folds=2, draws=20)
    assert np.isfinite(table.to_numpy()).all()
