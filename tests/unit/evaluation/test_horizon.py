"""Calibration along training, and scores of refits without runs."""

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.horizon import by_horizon, elpd_over_runs
from bayes_simfluence.evaluation.metrics import COVERAGES
from bayes_simfluence.evaluation.synthetic import linear_runs

LINEAR = bs.Simfluence(kind="linear")


@pytest.fixture(scope="module")
def runs():
    return linear_runs(key=jax.random.key(4), runs=7, query=2, epochs=2)[0]


def test_calibration_has_a_value_for_every_time(runs, key):
    posterior = bs.mean_trajectory(runs.isel(run=slice(0, 5)))
    held_out = runs.isel(run=[5, 6])
    found = by_horizon(posterior, held_out, key=key, draws=80)
    steps = runs.sizes["step"]
    assert found["pit"].dims == ("run", "time", "query")
    assert found["coverage"].dims == ("probability", "time")
    assert found["time"].values.tolist() == list(range(1, steps + 1))
    assert found["run"].values.tolist() == [5, 6]
    assert found["probability"].values.tolist() == list(COVERAGES)
    assert ((found["pit"] > 0) & (found["pit"] < 1)).all()
    loss = posterior.simulate(held_out, key=key, draws=80)["loss"].values[0]
    truth = held_out["loss"].values
    below = (loss < truth[None]).sum(axis=0)
    np.testing.assert_allclose(found["pit"], (below[:, 1:] + 0.5) / 81, atol=1e-12)
    low, high = np.quantile(loss, [0.05, 0.95], axis=0, method="weibull")
    inside = ((truth >= low) & (truth <= high))[:, 1:].mean(axis=(0, 2))
    np.testing.assert_allclose(found["coverage"].sel(probability=0.90), inside)
    assert (np.diff(found["coverage"], axis=0) >= 0).all()


def test_calibration_is_of_recorded_times(runs, key):
    posterior, whole = bs.mean_trajectory(runs.isel(run=slice(0, 5))), runs.isel(run=[5, 6])
    thinned = whole.copy(deep=True)
    thinned["loss"].values[:, 1::2] = np.nan
    thinned["loss"].values[0, 2] = np.nan
    full, found = (by_horizon(posterior, one, key=key, draws=40) for one in (whole, thinned))
    known = np.isfinite(thinned["loss"].values[:, 1:])
    np.testing.assert_array_equal(found["pit"], np.where(known, full["pit"], np.nan))
    times = runs["time"].values[1:]
    np.testing.assert_array_equal(np.isnan(found["coverage"]).all("probability"), times % 2 == 1)
    both = times[(times % 2 == 0) & (times > 2)]
    np.testing.assert_allclose(found["coverage"].sel(time=both), full["coverage"].sel(time=both))
    # At time 2 only the second run was recorded.
    loss = posterior.simulate(whole, key=key, draws=40)["loss"].values[0, :, 1, 2]
    low, high = np.quantile(loss, [0.05, 0.95], axis=0, method="weibull")
    truth = whole["loss"].values[1, 2]
    inside = ((truth >= low) & (truth <= high)).mean()
    np.testing.assert_allclose(found["coverage"].sel(time=2, probability=0.90), inside)


@pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning")
def test_refits_score_what_was_recorded(runs, key):
    thinned = runs.isel(run=slice(0, 6)).copy(deep=True)
    thinned["loss"].values[1::2, 3:6] = np.nan
    method = bs.Exact(times=2)
    found = elpd_over_runs(thinned, key=key, method=method, folds=2, draws=20)
    assert np.isfinite(found.to_numpy()).all()


@pytest.mark.parametrize("folds", [3, 50])
def test_every_run_is_scored_by_a_fit_without_it(runs, key, folds):
    method = bs.Ridge(penalty=0.01, objective="centred")
    found = elpd_over_runs(runs, key=key, method=method, folds=folds)
    assert found.index.tolist() == runs["run"].values.tolist() and found.index.name == "run"
    assert found.columns.tolist() == ["elpd", "mse"]
    count = min(folds, runs.sizes["run"])
    for run in range(runs.sizes["run"]):
        rest = [one for one in range(runs.sizes["run"]) if one % count != run % count]
        posterior = bs.fit(runs.isel(run=rest), method=method, key=key)
        one = runs.isel(run=[run])
        error = posterior.simulate(one, key=key)["mean_loss"][0, 0] - one["loss"]
        expected = float((error.isel(time=slice(1, None)) ** 2).mean())
        np.testing.assert_allclose(found.loc[run, "mse"], expected, rtol=1e-3)
    assert found["elpd"].isna().all()


def test_a_band_has_a_density(runs, key):
    found = elpd_over_runs(runs, key=key, model=LINEAR, folds=2, draws=50)
    assert np.isfinite(found.to_numpy()).all() and len(found) == 7


def test_folds_are_counted(runs, key):
    with pytest.raises(Misuse, match=r"folds: got 0"):
        elpd_over_runs(runs, key=key, folds=0)
