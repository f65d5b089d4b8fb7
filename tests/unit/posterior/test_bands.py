"""Credible and conformal bands: their shapes, their coverage, and what they refuse."""

import jax
import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest, ttest_1samp

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.posterior.conformal import conformal_quantile, runs_needed
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.simulators.affine import AffineSimulator

KEY = jax.random.key(0)
SETTINGS = {"key": KEY, "draws": 60}
FALSE_ALARM = 1e-3
"""Of each test of coverage."""
STEPS = 6


def walks(rng, runs, queries=1, sd=1.0, name="r"):
    """Exchangeable runs: random walks whose scale differs between runs, shared by its queries."""
    scale = sd * np.exp(0.5 * rng.normal(size=(runs, 1, 1)))
    walk = np.cumsum(scale * rng.normal(size=(runs, STEPS, queries)), axis=1)
    loss = np.concatenate([np.full((runs, 1, queries), 5.0), 5.0 + walk], axis=1)
    return bs.runs_from_arrays(
        batch=np.zeros((runs, STEPS, 1), int),
        loss=loss,
        run_ids=[f"{name}{one}" for one in range(runs)],
    )


def believing(runs, noise=1.0, left_out=None):
    """A posterior that takes runs for random walks of this step."""
    queries = runs.sizes["query"]
    zero = np.zeros((queries, 1))
    simulator = AffineSimulator(
        zero, zero, noise=None if noise is None else np.full(queries, noise)
    )
    return Posterior(simulator, Verdict(True, ""), runs, {}, left_out)


def inside(banded, runs):
    truth = runs["loss"]
    return ((truth >= banded["low"]) & (truth <= banded["high"])).isel(time=slice(1, None))


@pytest.fixture(scope="module")
def many():
    return walks(np.random.default_rng(1), 60, queries=2, name="m")


@pytest.mark.parametrize("simultaneous", [False, True])
@pytest.mark.parametrize("kind", ["credible", "conformal", "left out"])
def test_a_band_explains_itself_and_changes_no_draw(many, kind, simultaneous):
    fitted, runs = many.isel(run=slice(0, 20)), many.isel(run=slice(20, 23))
    posterior = believing(fitted, left_out=predictions(fitted))
    band = {
        "credible": bs.Credible(0.8, simultaneous),
        "conformal": bs.Conformal(many.isel(run=slice(30, 50)), 0.8, simultaneous),
        "left out": bs.Conformal(None, 0.8, simultaneous),
    }[kind]
    found = posterior.simulate(runs, **SETTINGS, band=band)
    plain = posterior.simulate(runs, **SETTINGS)
    xr.testing.assert_identical(found.drop_vars(["low", "high"]), plain)
    for name in ("low", "high"):
        assert found[name].dims == ("run", "time", "query") and found[name].shape == (3, 7, 2)
        attrs = found[name].attrs
        assert attrs["kind"] == ("credible" if kind == "credible" else "conformal")
        assert attrs["probability"] == 0.8 and attrs["simultaneous"] == simultaneous
        assert attrs["units"] == "nat" and name in attrs["long_name"]
        assert ("n_calibration" in attrs) == (kind != "credible")
    if kind != "credible":
        assert found["low"].attrs["n_calibration"] == 20
        assert ("left out" in found["low"].attrs["calibration"]) == (kind == "left out")
    np.testing.assert_array_equal(found["low"].isel(time=0), runs["loss"].isel(time=0))
    np.testing.assert_array_equal(found["high"].isel(time=0), runs["loss"].isel(time=0))
    assert (found["low"] < found["high"]).isel(time=slice(1, None)).all()


def predictions(fitted, every=1, sd=1.0, band=True):
    """Left-out predictions as a method would make them: the first loss, with a walk's band."""
    kept = fitted["loss"].isel(time=slice(every, None, every))
    centre = xr.ones_like(kept) * fitted["loss"].isel(time=0, drop=True)
    width = 1.645 * sd * np.sqrt(kept["time"])
    found = {"predicted": centre}
    if band:
        found |= {"low": centre - width, "high": centre + width}
    return xr.Dataset(found).transpose("run", "time", "query")


def test_a_credible_band_is_the_draws_central_interval(many):
    posterior, runs = believing(many), many.isel(run=[3, 4])
    found = posterior.simulate(runs, key=KEY, draws=99, band=bs.Credible(0.8))
    expected = np.quantile(found["loss"].values[0], [0.1, 0.9], axis=0, method="weibull")
    np.testing.assert_allclose(found["low"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found["high"], expected[1], rtol=1e-6)


def test_a_simultaneous_credible_band_holds_whole_trajectories_of_the_posterior(many):
    posterior, runs = believing(many), many.isel(run=[0])
    found = posterior.simulate(runs, key=KEY, draws=999, band=bs.Credible(0.8, simultaneous=True))
    by_time = posterior.simulate(runs, key=KEY, draws=999, band=bs.Credible(0.8))
    fresh = posterior.simulate(runs, key=jax.random.key(1), draws=2000)["loss"]

    def whole(banded):
        held = (fresh >= banded["low"]) & (fresh <= banded["high"])
        return held.all("time").isel(chain=0, run=0).values

    # Both queries' bands come from 999 draws: their own error is a third of the fresh draws'.
    assert abs(whole(found).mean() - 0.8) < 0.03
    assert whole(by_time).mean() < 0.7


@pytest.mark.parametrize("held_out", [True, False])
def test_a_simultaneous_band_contains_the_pointwise_one(many, held_out):
    fitted, runs = many.isel(run=slice(0, 20)), many.isel(run=slice(20, 25))
    posterior = believing(fitted, left_out=predictions(fitted, every=2))
    calibration = many.isel(run=slice(30, 50)) if held_out else None
    for band in (bs.Conformal(calibration), bs.Credible()):
        each, whole = (
            posterior.simulate(
                runs, **SETTINGS, band=type(band)(**{**vars(band), "simultaneous": simultaneous})
            )
            for simultaneous in (False, True)
        )
        assert (whole["low"] <= each["low"]).all() and (whole["high"] >= each["high"]).all()
        assert (whole["high"] > each["high"]).any()


def test_the_quantile_of_one_query_is_an_order_statistic(rng):
    scores = rng.exponential(size=(19, 1))
    assert conformal_quantile(scores, 0.9) == np.sort(scores[:, 0])[17]
    assert conformal_quantile(scores, 0.95) == scores.max()
    assert conformal_quantile(scores, 0.5) == np.sort(scores[:, 0])[9]
    assert [runs_needed(one) for one in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


@pytest.mark.parametrize("queries", [1, 6])
def test_finitely_many_runs_cover_what_they_promise(rng, queries):
    """Scores of a run's queries depend; the pooled quantile of so few runs would be too small."""
    runs, probability, tries = 9, 0.8, 4000
    scale = np.exp(rng.normal(size=(tries, runs + 1, 1)))
    scores = scale * rng.exponential(size=(tries, runs + 1, queries))
    limit = np.array([conformal_quantile(one[:-1], probability) for one in scores])
    share = (scores[:, -1] <= limit[:, None]).mean(axis=1)
    assert ttest_1samp(share, probability, alternative="less").pvalue > FALSE_ALARM
    above = probability + 1.0 / (runs + 1)
    assert ttest_1samp(share, above, alternative="greater").pvalue > FALSE_ALARM
    if queries == 1:
        assert binomtest(int(share.sum()), tries, probability).pvalue > FALSE_ALARM
    naive = np.quantile(scores[:, :-1].reshape(tries, -1), probability, axis=1)
    missed = (scores[:, -1] <= naive[:, None]).mean(axis=1)
    assert ttest_1samp(missed, probability, alternative="less").pvalue < FALSE_ALARM


def coverage_of_recordings(band_of, noise, tries=60, calibration=1.0):
    """One new run per recording: independent successes, at the last time and over all times."""
    last, whole = 0, 0
    for seed in range(tries):
        rng = np.random.default_rng(seed)
        runs = walks(rng, 10, name="a")
        quiet = walks(rng, 9, sd=calibration, name="b")
        posterior = believing(walks(rng, 2, name="f"), noise=noise)
        new = runs.isel(run=[0])
        simulate = posterior.simulate
        each = simulate(new, key=jax.random.key(seed), draws=60, band=band_of(quiet, False))
        all_times = simulate(new, key=jax.random.key(seed), draws=60, band=band_of(quiet, True))
        last += bool(inside(each, new).isel(time=-1).all())
        whole += bool(inside(all_times, new).all())
    return {"last": last, "whole": whole, "tries": tries}


def conformal(runs, simultaneous):
    return bs.Conformal(runs, 0.8, simultaneous)


def believed(runs, simultaneous):
    return bs.Credible(0.8, simultaneous)


@pytest.mark.parametrize("noise", [1.0, 0.3], ids=["right step", "too narrow"])
def test_conformal_bands_cover_new_runs_exactly_whatever_the_model(noise):
    found = coverage_of_recordings(conformal, noise)
    # (9 + 1) * 0.8 is whole, so that coverage is exactly 0.8.
    for what in ("last", "whole"):
        assert binomtest(found[what], found["tries"], 0.8).pvalue > FALSE_ALARM


def test_the_same_test_sees_a_narrow_posterior_and_wrong_calibration_runs():
    for found in (
        coverage_of_recordings(believed, 0.3, tries=40),
        coverage_of_recordings(conformal, 1.0, tries=40, calibration=0.4),
    ):
        for what in ("last", "whole"):
            assert binomtest(found[what], found["tries"], 0.8).pvalue < FALSE_ALARM


def test_left_out_runs_mend_a_narrow_posterior():
    runs = walks(np.random.default_rng(5), 200, name="r")
    fitted, new = runs.isel(run=slice(0, 60)), runs.isel(run=slice(60, None))
    posterior = believing(fitted, 0.3, left_out=predictions(fitted, every=2, sd=0.3))
    narrow = posterior.simulate(new, **SETTINGS, band=bs.Credible())
    mended = posterior.simulate(new, **SETTINGS, band=bs.Conformal())
    assert inside(narrow, new).mean() < 0.6
    # The sd of the share over 60 calibration and 140 new runs is 5%.
    assert 0.78 < inside(mended, new).mean() < 0.98


def test_factors_between_left_out_times_lie_on_straight_lines(many):
    fitted = many.isel(run=slice(0, 30))
    posterior = believing(fitted, left_out=predictions(fitted, every=2))
    found = posterior.simulate(many.isel(run=[40]), key=KEY, draws=999, band=bs.Conformal())
    loss = found["loss"].values[0, :, 0, 1:, 0]
    centre, edge = np.quantile(loss, [0.5, 0.95], axis=0, method="weibull")
    factor = (found["high"].values[0, 1:, 0] - centre) / (edge - centre)
    np.testing.assert_allclose(factor[[2, 4]], (factor[[1, 3]] + factor[[3, 5]]) / 2, rtol=1e-4)
    assert factor[0] == pytest.approx(factor[1], rel=1e-4)
    left_out = posterior.left_out
    error = np.abs(fitted["loss"].sel(time=2) - left_out["predicted"].sel(time=2))
    width = (left_out["high"] - left_out["predicted"]).sel(time=2)
    assert factor[1] == pytest.approx(conformal_quantile((error / width).values, 0.9), rel=1e-4)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_point_gets_a_band_in_nats(many, held_out):
    fitted, new = many.isel(run=slice(0, 20)), many.isel(run=[50])
    calibration = many.isel(run=slice(20, 39)) if held_out else fitted
    posterior = believing(fitted, noise=None, left_out=predictions(fitted, band=False))
    band = bs.Conformal(calibration if held_out else None)
    found = posterior.simulate(new, **SETTINGS, band=band)
    error = np.abs(calibration["loss"] - 5.0).values
    for time in (1, 6):
        expected = conformal_quantile(error[:, time].astype(float), 0.9)
        np.testing.assert_allclose(found["high"].values[0, time] - 5.0, expected, rtol=1e-5)
        np.testing.assert_allclose(5.0 - found["low"].values[0, time], expected, rtol=1e-5)


def sparse(runs, rng, kept=None):
    """The same runs with losses that were not recorded; the queries' gaps differ."""
    loss = runs["loss"].values.copy()
    gone = rng.random(loss.shape) < 0.4 if kept is None else np.ones(loss.shape, bool)
    if kept is not None:
        gone[:, kept] = False
    gone[:, 0] = False
    return runs.assign(loss=runs["loss"].copy(data=np.where(gone, np.nan, loss)))


def test_a_run_weighs_one_however_many_queries_were_recorded(rng):
    scores = rng.exponential(size=(12, 3))
    full = conformal_quantile(scores, 0.9)
    with_empty = np.vstack([scores, np.full((2, 3), np.nan)])
    assert conformal_quantile(with_empty, 0.9) == full
    # One query of each run is one score of each run.
    alone = np.full((19, 3), np.nan)
    alone[np.arange(19), np.arange(19) % 3] = np.arange(19.0)
    assert conformal_quantile(alone, 0.9) == 17.0
    # The last run's two scores weigh half each: 18 + 1/2 of the 19 runs lie below 18.5.
    alone[18] = [18.0, 18.5, np.nan]
    assert [conformal_quantile(alone, one) for one in (0.92, 0.925, 0.94)] == [18.0, 18.0, 18.5]
    with pytest.raises(Misuse, match="got 8; expected at least 9"):
        conformal_quantile(np.where(np.arange(12)[:, None] < 8, scores, np.nan), 0.9)


@pytest.mark.parametrize("simultaneous", [False, True])
@pytest.mark.parametrize("held_out", [True, False])
def test_losses_that_were_not_recorded_are_in_no_score(many, rng, held_out, simultaneous):
    runs = sparse(many, rng)
    fitted, new = runs.isel(run=slice(0, 25)), many.isel(run=[58])
    calibration = runs.isel(run=slice(30, 55)) if held_out else fitted
    posterior = believing(fitted, noise=None, left_out=predictions(fitted, band=False))
    band = bs.Conformal(calibration if held_out else None, 0.8, simultaneous)
    found = posterior.simulate(new, **SETTINGS, band=band)
    error = np.abs(calibration["loss"] - 5.0).values.astype(float)[:, 1:]
    assert np.isnan(error).any()
    if simultaneous:
        error = np.repeat(np.nanmax(error, axis=1, keepdims=True), STEPS, axis=1)
    expected = [conformal_quantile(one, 0.8) for one in np.moveaxis(error, 1, 0)]
    np.testing.assert_allclose(found["high"].values[0, 1:, 0] - 5.0, expected, rtol=1e-5)
    np.testing.assert_allclose(5.0 - found["low"].values[0, 1:, 0], expected, rtol=1e-5)


def test_times_that_too_few_runs_recorded_lie_between_their_neighbours(many, rng):
    fitted, new = many.isel(run=slice(0, 20)), many.isel(run=[50])
    calibration = sparse(many.isel(run=slice(20, 45)), rng, kept=[2, 4, 6])
    calibration["loss"].values[:5, 3] = 5.0  # five runs: too few for 90%
    found = believing(fitted).simulate(new, key=KEY, draws=999, band=bs.Conformal(calibration))
    loss = found["loss"].values[0, :, 0, 1:, 0]
    centre, edge = np.quantile(loss, [0.5, 0.95], axis=0, method="weibull")
    factor = (found["high"].values[0, 1:, 0] - centre) / (edge - centre)
    np.testing.assert_allclose(factor[[2, 4]], (factor[[1, 3]] + factor[[3, 5]]) / 2, rtol=1e-4)
    assert found["low"].attrs["n_calibration"] == 25
    late = sparse(many.isel(run=slice(20, 45)), rng, kept=[2, 4])
    with pytest.raises(Misuse, match=r"got time 6; expected times up to 4"):
        believing(fitted).simulate(new, **SETTINGS, band=bs.Conformal(late))


def test_a_banded_simulation_can_be_saved(many, tmp_path):
    found = believing(many).simulate(many.isel(run=[3]), **SETTINGS, band=bs.Credible(0.8, True))
    found.to_netcdf(tmp_path / "s.nc", engine="h5netcdf")
    again = xr.open_dataset(tmp_path / "s.nc", engine="h5netcdf")
    assert again["low"].attrs["simultaneous"] == 1


def test_queries_are_calibrated_by_their_ids(many):
    fitted, new = many.isel(run=slice(0, 20)), many.isel(run=[50, 51])
    calibration = many.isel(run=slice(20, 40)).copy(deep=True)
    calibration["loss"].values[:, 1:, 1] += 30.0
    posterior = believing(fitted)
    alone = posterior.simulate(
        new.isel(query=[0]), **SETTINGS, band=bs.Conformal(calibration.isel(query=[1, 0]))
    )
    both = posterior.simulate(new, **SETTINGS, band=bs.Conformal(calibration))
    assert alone["high"].max() < 30.0 < both["high"].isel(query=0).max()


def test_what_cannot_be_banded_is_refused(many):
    fitted, new = many.isel(run=slice(0, 20)), many.isel(run=[50])
    posterior = believing(fitted)
    few = many.isel(run=slice(20, 28))
    with pytest.raises(Misuse, match=r"got 8; expected at least 9.*probability to at most 0.888"):
        bs.Conformal(few)  # before anything is simulated
    with pytest.raises(Misuse, match=r"at least 19.*infinitely wide"):
        bs.Conformal(few, probability=0.95)
    posterior.simulate(new, **SETTINGS, band=bs.Conformal(few, probability=0.888))
    with pytest.raises(Misuse, match=r"without predictions of left-out runs.*pass Conformal\(runs"):
        posterior.simulate(new, **SETTINGS, band=bs.Conformal())
    with pytest.raises(Misuse, match=r"got 10 fitted runs \(m10, ...\).*hold runs out"):
        posterior.simulate(new, **SETTINGS, band=bs.Conformal(many.isel(run=slice(10, 30))))
    short = many.isel(run=slice(20, 40), step=slice(0, 3), time=slice(0, 4))
    with pytest.raises(Misuse, match=r"got time 6; expected times up to 3"):
        posterior.simulate(new, **SETTINGS, band=bs.Conformal(short))
    with pytest.raises(Misuse, match=r"got one draw.*Conformal"):
        believing(fitted, noise=None).simulate(new, **SETTINGS, band=bs.Credible())
    with pytest.raises(Misuse, match=r"queries: got unknown ids"):
        strange = many.isel(run=slice(20, 30)).assign_coords(query=["x", "y"])
        posterior.simulate(new, **SETTINGS, band=bs.Conformal(strange))
    with pytest.raises(Misuse, match=r"band: got Conformal; expected.*pass an instance"):
        posterior.simulate(new, **SETTINGS, band=bs.Conformal)
    for probability in (0.0, 1.0, 1.5):
        with pytest.raises(Misuse, match=r"Credible\(probability=...\).*\(0, 1\)"):
            bs.Credible(probability)
        with pytest.raises(Misuse, match=r"Conformal\(probability=...\).*\(0, 1\)"):
            bs.Conformal(probability=probability)
