"""The floor of squared errors by twins: against its definition, and in tables and fits."""

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse, RunsWarning
from bayes_simfluence.evaluation.floor import floor
from bayes_simfluence.evaluation.leave_one_run_out import elpd_over_runs
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.report.tables import json_text, markdown

SD = 0.02


def recorded(losses, names):
    """Runs of one step and one query, with losses after it; runs of one name on one example."""
    batch = [[[int(name)]] for name in names]
    loss = [[[1.0], [last]] for last in losses]
    return bs.runs_from_arrays(batch=batch, loss=loss, twin=list(names), missing=True)


@pytest.fixture(scope="module")
def twice():
    """Twelve curricula, the last five recorded twice, all with deviations of their own."""
    runs, _ = linear_runs(key=jax.random.key(3), runs=12, train=12, per_run=8, query=4)
    both = runs.isel(run=[*range(12), *range(7, 12)])
    deviation = np.random.default_rng(0).normal(0.0, SD, both["loss"].shape)
    deviation[:, 0] = 0.0
    names = both["run"].values.astype(str)
    return both.assign(loss=both["loss"] + deviation.astype(np.float32)).assign_coords(
        run=np.arange(17), twin=("run", names)
    )


def test_it_is_half_the_mean_squared_difference(key):
    found = floor(recorded([0.5, 0.7, 0.4, 0.8, 0.9], "01210"), key=key)
    assert found.mse == pytest.approx((0.4**2 + 0.1**2) / 4) and found.curricula == 2
    np.testing.assert_allclose(found.by_time, [0.0, found.mse])
    assert found.low == pytest.approx(0.01 / 2) and found.high == pytest.approx(0.16 / 2)
    assert "by 2 curricula" in str(found) and "[0.005, 0.08] nats^2" in str(found)


def test_more_than_two_of_a_kind_have_a_variance(key):
    losses = [0.5, 0.7, 1.2]
    found = floor(recorded(losses, "000"), key=key)
    assert found.mse == pytest.approx(np.var(losses, ddof=1)) and np.isnan(found.low)
    assert "[" not in str(found)


@pytest.mark.filterwarnings("ignore:1 runs left out, no loss after time 0")
def test_what_was_not_recorded_twice_does_not_count(key):
    found = floor(recorded([0.5, 0.7, np.nan, 0.8, 0.4], "01210"), key=key)
    assert found.mse == pytest.approx((0.1**2 + 0.1**2) / 4)
    for names in ("012", "001"):
        with pytest.raises(Misuse, match="no curriculum that was trained more than once"):
            floor(recorded([0.5, np.nan, 0.6], names), key=key)


def test_no_prediction_errs_less_in_expectation(rng, key):
    expected = rng.random(400)
    losses = expected + rng.normal(0.0, SD, (2, 400))
    names = [str(run) for run in range(400)]
    found = floor(recorded(losses.ravel(), [*names, *names]), key=key)
    # A mean of 400 squares over 2 sd^2 each is off by more than four of its sds with p = 6e-5.
    off = 4 * np.sqrt(2 / 400)
    assert found.mse == pytest.approx(SD**2, rel=off)
    assert found.low < found.mse < found.high
    # Known expectations err by it; after the fact the mean of both errs by half of it.
    assert np.square(losses - expected).mean() == pytest.approx(found.mse, rel=off)
    assert np.square(losses - losses.mean(axis=0)).mean() == pytest.approx(found.mse / 2, rel=1e-4)


def test_tables_show_each_mse_over_it(twice, key):
    fitted, held_out = twice.isel(run=slice(0, 7)), twice.isel(run=slice(7, None))
    methods = {
        "linear": bs.fit(fitted, method=bs.Ridge(penalty=0.01), key=key),
        "still": bs.persistence(fitted),
    }
    settings = {"key": key, "draws": 4, "resamples": 50}
    table = bs.compare(methods, held_out, **settings)
    least = floor(held_out, key=key).mse
    # Five curricula, 4 queries, all times: 4 sd of the mean of that many squares.
    points = 5 * 4 * twice.sizes["step"]
    assert least == pytest.approx(SD**2, rel=4 * np.sqrt(2 / points))
    np.testing.assert_allclose(table["mse_over_floor"], table["mse"] / least, rtol=1e-6)
    assert (table["mse_over_floor_low"] < table["mse_over_floor"]).all()
    assert (table["mse_over_floor"] < table["mse_over_floor_high"]).all()
    assert "MSE / floor" in markdown(table) and '"mse_over_floor": {"value":' in json_text(table)
    still = {"still": methods["still"]}
    plain = bs.compare(still, held_out.isel(run=slice(0, 5)), **settings)
    assert "mse_over_floor" not in plain and "MSE / floor" not in markdown(plain)


def test_a_table_says_that_twins_of_fitted_runs_are_not_held_out(twice, key):
    methods = {"still": bs.persistence(twice.isel(run=slice(0, 9)))}
    with pytest.warns(RunsWarning, match=r"Runs 12, 13 were fitted, .* \(still\): they are not"):
        bs.compare(methods, twice.isel(run=slice(9, None)), key=key, draws=4, resamples=10)


def test_fits_do_without_twins_and_say_so(twice, key):
    first = twice.isel(run=slice(0, 12))
    for made in (
        lambda runs: bs.fit(runs, method=bs.Ridge(penalty=0.01), key=key),
        bs.mean_trajectory,
    ):
        xr.testing.assert_identical(made(twice).runs, first)
    assert "5 runs have the curricula of fitted runs" in str(
        bs.fit(twice, method=bs.Ridge(penalty=0.01), key=key).verdict
    )


def test_twins_are_left_out_together(twice, key):
    table = elpd_over_runs(twice, key=key, method=bs.Ridge(penalty=0.01), folds=4)
    assert table.index.tolist() == list(range(17))
    # Every fourth curriculum is left out at once; run 13 repeats that of run 8.
    out = (0, 4, 8, 13)
    rest = twice.isel(run=[run for run in range(17) if run not in out])
    posterior = bs.fit(rest, method=bs.Ridge(penalty=0.01), key=key)
    for run in out:
        left_out = twice.isel(run=[run])
        error = posterior.simulate(left_out, key=key)["mean_loss"][0, 0] - left_out["loss"]
        expected = float(np.square(error.isel(time=slice(1, None))).mean())
        np.testing.assert_allclose(table.loc[run, "mse"], expected, rtol=1e-4)


def test_twins_of_fitted_runs_neither_validate_nor_calibrate(twice, key):
    fitted, twins = twice.isel(run=slice(0, 12)), twice.isel(run=slice(12, None))
    with pytest.raises(Misuse, match=r"validation: got twins of fitted runs: 12, 13"):
        bs.fit(fitted, method=bs.Ridge(), validation=twins, key=key)
    band = bs.Conformal(twins, probability=0.8)
    with pytest.raises(Misuse, match="5 twins of fitted runs"):
        bs.mean_trajectory(fitted).simulate(fitted.isel(run=[0]), key=key, band=band)
