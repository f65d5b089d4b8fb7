"""Fits of losses that were recorded only at some times: exact, or refused."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning, Misuse
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.gaussian.designs import JITTER, designs_and_means
from bayes_simfluence.gaussian.search import (
    band_of,
    even_rows,
    interpolated_inflation,
    recorded_rows,
)
from bayes_simfluence.inference.ridge import PENALTIES
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.hyper import natural_values
from bayes_simfluence.model.simfluence import KINDS, hypers_of
from bayes_simfluence.posterior.arrays import recorded_arrays

RUNS, STEPS, TIMES, QUERY = 4, 16, 4, 3
EXACT = bs.Exact(times=TIMES)
KEY = jax.random.key(0)
UNLIKE = np.array([np.arange(1, STEPS + 1) % every == 0 for every in (1, 2, 3, 16)])
"""Steps after which each of four runs was recorded."""

examples = cache(bs.example_runs)


def recording(runs=RUNS, first=0, steps=STEPS):
    """A corner of the example recording, small enough to be fitted in a test."""
    chosen = {"step": slice(0, steps), "time": slice(0, steps + 1), "query": slice(0, QUERY)}
    return examples().isel(run=slice(first, first + runs), **chosen).copy(deep=True)


def thinned(runs, known):
    """The same runs with losses recorded only after the steps ``known ([run,] step)``."""
    runs = runs.copy(deep=True)
    later = runs["loss"].values[:, 1:]
    later[~np.broadcast_to(known, later.shape[:2])] = np.nan
    return runs


def fitted_to(runs, method=EXACT, **settings):
    """A fit whose verdict may be bad."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return bs.fit(runs, method=method, key=KEY, **settings)


def every(count, steps=STEPS):
    return np.arange(1, steps + 1) % count == 0


@pytest.fixture(scope="module")
def posterior():
    return fitted_to(thinned(recording(), UNLIKE))


def test_times_that_are_not_used_do_not_matter():
    whole = recording()
    one, other = fitted_to(whole), fitted_to(thinned(whole, every(4)))
    for name in ("free", "scale", "log_inflation", "rows", "df"):
        np.testing.assert_array_equal(getattr(one.simulator, name), getattr(other.simulator, name))
    assert one.verdict == other.verdict
    assert one.left_out.equals(other.left_out)
    simulated = (post.simulate(recording(2, 6), key=KEY, draws=6) for post in (one, other))
    assert next(simulated).equals(next(simulated))


def test_only_recorded_points_are_in_the_scales_the_band_and_the_verdict(posterior):
    """Against conditioning the dense Gaussian of recorded points on all other runs' ones."""
    runs, simulator = recorded_arrays(thinned(recording(), UNLIKE)), posterior.simulator
    model, rows = simulator.model, simulator.rows
    fitted = runs._replace(step_size=runs.step_size / runs.step_size.max())
    loss = np.log(np.expm1(runs.loss))
    change = (loss[:, 1:] - loss[:, :1])[:, rows].reshape(-1, QUERY)
    with double_precision():
        values = natural_values(hypers_of(model, fitted.features), jnp.asarray(simulator.free))
        designs, mean = designs_and_means(model, values, fitted, jnp.asarray(rows), knots=6)
        error = np.asarray(model.error.covariance(values, jnp.arange(1, STEPS + 1) / STEPS))
    known = UNLIKE[:, rows].ravel()
    flat = np.asarray(designs).reshape(len(known), -1)
    error = np.kron(np.eye(RUNS), error[np.ix_(rows, rows)] + JITTER * np.eye(len(rows)))
    whole = flat @ flat.T / np.square(flat[known]).sum(axis=1).mean() + error
    residual = change - np.asarray(mean).reshape(-1, QUERY)
    of_run, of_row = np.divmod(np.arange(len(known)), len(rows))
    missed, variance = np.full(change.shape, np.nan), np.full(len(known), np.nan)
    for run in range(RUNS):
        mine, rest = (np.flatnonzero(known & one) for one in (of_run == run, of_run != run))
        across = whole[np.ix_(mine, rest)] @ np.linalg.inv(whole[np.ix_(rest, rest)])
        missed[mine] = residual[mine] - across @ residual[rest]
        variance[mine] = np.diag(whole[np.ix_(mine, mine)] - across @ whole[np.ix_(rest, mine)])
    z = missed / np.sqrt(variance)[:, None]
    scale = np.sqrt(np.nanmean(z**2, axis=0))
    np.testing.assert_allclose(simulator.scale, scale, rtol=1e-5)
    # Variance inflation: least squares on the log mean square of each time, weighted by its runs.
    square = [np.log(np.nanmean((z / scale)[of_row == row] ** 2)) for row in range(len(rows))]
    at = (rows + 1) / STEPS
    knots = len(simulator.log_inflation)
    lines = np.stack([interpolated_inflation(at, unit) for unit in np.eye(knots)], axis=1)
    count = UNLIKE[:, rows].sum(axis=0)
    slack = lines.T @ (count * (square - lines @ simulator.log_inflation))
    np.testing.assert_allclose(slack, 0.0, atol=1e-4)
    assert simulator.df == 3.0 and len(set(count)) > 1
    band = band_of(model, fitted, rows, simulator.free)
    expected = np.logaddexp(0.0, (loss[:, 1:][:, rows].reshape(-1, QUERY) - missed)[known])
    np.testing.assert_allclose(band.predicted.reshape(-1, QUERY)[known], expected, rtol=1e-5)
    truth = thinned(recording(), UNLIKE)["loss"].values[:, 1:][:, rows]
    inside = (truth >= band.low) & (truth <= band.high)
    numbers = posterior.verdict.numbers
    assert numbers["left_out_coverage_90"] == pytest.approx(inside[np.isfinite(truth)].mean())
    assert numbers["left_out_mse"] == pytest.approx(np.nanmean((band.predicted - truth) ** 2))
    raw = np.abs(z / scale)[known] <= 2.3533634  # 95% quantile of Student-t with 3 degrees
    assert numbers["left_out_coverage_90_before_recalibration"] == pytest.approx(raw.mean())


def test_the_rival_mean_is_that_of_the_other_runs_recorded_then(posterior):
    rows = posterior.simulator.rows
    loss = thinned(recording(), UNLIKE)["loss"].values.astype(float)
    change = (loss[:, 1:] - loss[:, :1])[:, rows]
    pairs = []
    for run, row, query in np.argwhere(np.isfinite(change)):
        others = np.delete(change, run, axis=0)[:, row, query]
        kept = others[np.isfinite(others)]
        pairs.append((kept.mean() if len(kept) else 0.0, change[run, row, query]))
    others, own = np.array(pairs).T
    factor = np.clip(others @ own / (others @ others), 0.0, 1.0)
    expected = np.square(factor * others - own).mean()
    found = posterior.verdict.numbers["left_out_mse_of_mean_trajectory"]
    assert found == pytest.approx(expected)


def test_left_out_runs_are_predicted_where_they_were_recorded(posterior):
    left = posterior.left_out
    known = UNLIKE[:, left["time"].values - 1]
    for name in ("predicted", "low", "high"):
        finite = np.isfinite(left[name].values)
        np.testing.assert_array_equal(finite, np.broadcast_to(known[..., None], finite.shape))


def test_saved_and_loaded_it_is_the_same(posterior, tmp_path):
    again = bs.load_posterior(posterior.save(tmp_path / "posterior.nc"))
    assert again.runs.equals(posterior.runs) and again.left_out.equals(posterior.left_out)
    new = recording(2, 6)
    one, other = (post.simulate(new, key=KEY, draws=6) for post in (posterior, again))
    assert one.equals(other) and np.isfinite(one["loss"]).all()


def test_a_simulation_needs_nothing_but_the_start(posterior):
    whole = recording(2, 6)
    one, other = (
        posterior.simulate(runs, key=KEY, draws=6)
        for runs in (whole, thinned(whole, np.zeros(STEPS, bool)))
    )
    assert one.equals(other)


@pytest.mark.statistical
def test_a_thin_recording_predicts_nearly_as_well_as_the_whole():
    steps = 48
    fitted, held_out = recording(8, steps=steps), recording(8, first=16, steps=steps)
    whole = fitted_to(fitted, bs.Exact(times=16)).simulate(held_out, key=KEY, draws=100)
    mean, band = whole["mean_loss"].mean(("chain", "draw")), float(whole["loss"].std("draw").mean())
    rival = bs.mean_trajectory(fitted).simulate(held_out, key=KEY, draws=1)["mean_loss"][0, 0]

    def mse(one, other=held_out["loss"]):
        return float(np.square(one - other).mean())

    staggered = np.array([(np.arange(1, steps + 1) + 2 * (run % 2)) % 4 == 0 for run in range(8)])
    for known in (every(4, steps), staggered):
        thin = fitted_to(thinned(fitted, known), bs.Exact(times=16))
        again = thin.simulate(held_out, key=KEY, draws=100)
        other = again["mean_loss"].mean(("chain", "draw"))
        # Fewer and other times of each run: close beside the band's own width, and most of what
        # simulating gains on the mean of runs is kept.
        assert mse(other, mean) < (0.7 * band) ** 2
        assert mse(other, mean) < 0.1 * mse(rival, mean)
        assert mse(rival) - mse(other) > 0.9 * (mse(rival) - mse(mean)) > 0
        assert 0.7 * band < float(again["loss"].std("draw").mean()) < 1.4 * band


def test_queries_recorded_at_different_times_are_for_other_methods():
    runs = recording()
    runs["loss"].values[1, 5, 2] = np.nan
    match = r"got 1 queries recorded at other times than the first.*NUTS\(\) or SVI\(\)"
    with pytest.raises(Misuse, match=match):
        bs.fit(runs, method=EXACT, key=KEY)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("linear", bs.Exact()), ("additive", bs.Exact()), ("multiplicative", bs.Ridge(penalty=1.0))],
)
def test_the_published_kinds_regress_every_step_on_the_one_before(kind, method):
    runs = thinned(recording(), every(4))
    match = f"expected one at every time: kind '{kind}'.*method=Exact.*NUTS.*SVI"
    with pytest.raises(Misuse, match=match):
        bs.fit(runs, model=KINDS[kind](), method=method, key=KEY)


def test_validation_runs_count_where_they_were_recorded():
    runs, _ = linear_runs(key=jax.random.key(1), runs=9, train=6, per_run=4, query=2, noise=0.05)
    fitted, validation = runs.isel(run=slice(0, 6)), runs.isel(run=slice(6, 9))
    known = np.zeros((3, runs.sizes["step"]), bool)
    known[0, 1], known[2, -1] = True, True
    thin = thinned(validation, known).isel(run=[0, 2])
    found = bs.fit(fitted, method=bs.Ridge(), validation=thin, key=KEY)
    errors = []
    for penalty in PENALTIES:
        one = bs.fit(fitted, method=bs.Ridge(penalty=penalty), key=KEY)
        mean = one.simulate(thin, key=KEY)["mean_loss"].values[0, 0]
        errors.append(np.nansum(np.square(mean - thin["loss"].values)))
    assert found.verdict.numbers["penalty"] == PENALTIES[int(np.argmin(errors))]


@pytest.mark.parametrize(("steps", "count"), [(96, 24), (10, 24), (7, 3), (5, 1)])
def test_rows_of_a_whole_recording_are_spread_evenly(steps, count):
    np.testing.assert_array_equal(
        recorded_rows(np.ones((3, steps), bool), count), even_rows(steps, count)
    )


def test_rows_are_recorded_and_shared_fairly_between_runs(rng):
    common = np.tile(every(4, 96), (5, 1))
    assert recorded_rows(common, 24).tolist() == list(range(3, 96, 4))
    assert recorded_rows(common, 6).tolist() == list(range(15, 96, 16))
    odd_even = np.array([every(2, 96), ~every(2, 96)])
    counts = odd_even[:, recorded_rows(odd_even, 24)].sum(axis=1)
    assert counts.sum() == 24 and abs(np.diff(counts)[0]) <= 1
    for _ in range(20):
        known = rng.random((6, 40)) < rng.uniform(0.02, 0.9)
        rows = recorded_rows(known, 8) if known.any() else np.array([0])
        assert len(rows) <= 8 + 6 and (np.diff(rows) > 0).all()
        some = known.any(axis=1)
        assert known[:, rows].any(axis=0).all() or not known.any()
        assert known[some][:, rows].any(axis=1).all()
