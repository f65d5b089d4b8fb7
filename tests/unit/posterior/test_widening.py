"""Bands grow with distance by what far left-out runs erred, and not within what was recorded."""

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.posterior.widening import (
    BELIEVED,
    FREE,
    Widening,
    as_dataset,
    for_queries,
    from_dataset,
    widened,
    widening_of,
)

KEY = jax.random.key(0)
LINK = np.array([0.3, -0.2])


def linked(loss):
    return np.log(np.expm1(np.asarray(loss, float)))


def test_the_added_error_has_the_size_that_distance_says():
    size = np.array([[0.0, 0.0], [0.2, 0.4]])
    own = Widening(1.5, size, np.zeros((2, 0)), True)
    # The second query moves and comes back; the largest move so far counts.
    link = LINK + np.array([[0.0, 0.0], [0.0, -0.7], [0.0, 0.1]])
    loss = np.broadcast_to(np.log1p(np.exp(link)), (1, 4000, 2, 3, 2)).astype("f4")
    distance = np.array([[0.0, FREE, 1.5], [0.0, 0.1, FREE]])
    spread = widened(loss, distance, own, key=KEY)
    # Within what was recorded nothing changes.
    np.testing.assert_array_equal(spread[:, :, 1], loss[:, :, 1])
    np.testing.assert_array_equal(spread[:, :, 0, :2], loss[:, :, 0, :2])
    moved = linked(spread[0, :, 0, 2]) - link[2]
    expected = 1.5 * np.log1p(1.5 - FREE) * np.hypot(size[1], [0.0, 0.7])
    # The sd of 4000 draws is known to 1.1%; beyond 4.5 of that in 1 of 100,000.
    np.testing.assert_allclose(moved.std(axis=0), expected, rtol=0.05)
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.07


def test_all_queries_move_too_much_or_too_little_together():
    own = Widening(1.0, np.zeros((2, 2)), np.zeros((2, 0)), False)
    loss = np.broadcast_to(np.array([[0.0, 0.0], [2.0, -1.0]]), (1, 100, 1, 2, 2)).astype("f4")
    spread = widened(loss, np.array([[0.0, 2.0]]), own, key=KEY) - loss
    np.testing.assert_allclose(spread[0, :, 0, 1, 0], -2 * spread[0, :, 0, 1, 1], rtol=1e-4)
    assert spread[0, :, 0, 1].std() > 0.5


def test_queries_that_go_together_err_together():
    own = Widening(1.0, np.ones((1, 2)), np.array([[0.9], [-0.9]]), False)
    spread = widened(np.zeros((1, 2000, 1, 1, 2), "f4"), np.array([[2.0]]), own, key=KEY)
    assert np.corrcoef(spread[0, :, 0, 0].T)[0, 1] == pytest.approx(-0.81, abs=0.05)


def test_one_draw_without_a_band_stays_a_point():
    own = Widening(1.0, np.ones((1, 1)), np.zeros((1, 0)), True)
    loss = np.ones((1, 1, 1, 1, 1), "f4")
    assert widened(loss, np.array([[9.0]]), own, key=KEY) is loss


def far_recording(rate):
    """Runs alike, but for the first, which trains on few examples and moves by ``rate`` more."""
    runs = bs.example_runs().isel(run=slice(0, 12), query=slice(0, 8)).copy(deep=True)
    batch = runs["batch"].values.copy()
    batch[0] = batch[0, :, :1] % 3
    rng, times = np.random.default_rng(0), np.array([32, 64, 96])
    centre = linked(runs["loss"].sel(time=times))
    size = widening_of(runs, None).size[times]
    loss = runs["loss"].values.copy()
    loss[0, times] = np.log1p(np.exp(centre[0] + rate * size * rng.normal(size=8)))
    runs = runs.assign(batch=(runs["batch"].dims, batch), loss=(runs["loss"].dims, loss))
    error = 0.02 * rng.normal(size=centre.shape)
    parts = {"predicted": 0.0, "low": -0.033, "high": 0.033}
    left_out = {
        name: (("run", "time", "query"), np.log1p(np.exp(centre + error + edge)))
        for name, edge in parts.items()
    }
    return runs, xr.Dataset(left_out, coords={"time": times})


def test_runs_that_are_alike_say_nothing_of_distance():
    runs, left_out = far_recording(0.0)
    alike = {"run": slice(1, None)}
    assert widening_of(runs.isel(alike), left_out.isel(alike)).rate == pytest.approx(BELIEVED)


def test_the_rate_is_learned_from_far_runs():
    rates = [widening_of(*far_recording(rate)).rate for rate in (0.0, 1.0, 30.0)]
    # One run against a prior: each rate is drawn towards what is believed.
    assert rates[0] < 0.5 * rates[1] < 0.5 * BELIEVED < BELIEVED < rates[2]


def test_queries_that_were_not_fitted_have_the_others_size():
    runs = bs.example_runs().isel(run=slice(0, 4), query=slice(0, 4))
    own = widening_of(runs, None)
    other = runs.isel(query=[2, 0]).assign_coords(query=["2", "new"])
    found = for_queries(own, runs.assign_coords(query=["0", "1", "2", "3"]), other)
    np.testing.assert_array_equal(found.size[:, 0], own.size[:, 2])
    np.testing.assert_allclose(found.size[:, 1], np.sqrt(np.square(own.size).mean(axis=1)))
    assert found.loadings.shape == (2, own.loadings.shape[1])


def test_sizes_are_the_largest_changes_so_far():
    runs = bs.example_runs().isel(run=slice(0, 5), query=slice(0, 4))
    loss = runs["loss"].values.copy()
    change = linked(loss) - linked(loss[:, :1])
    loss[:, 1::2] = np.nan
    own = widening_of(runs.assign(loss=(runs["loss"].dims, loss)), None)
    square = np.square(change).mean(axis=0)
    square[1:-1:2] = (square[:-2:2] + square[2::2]) / 2
    np.testing.assert_allclose(own.size, np.sqrt(np.maximum.accumulate(square)), rtol=1e-4)


def test_what_is_saved_is_what_is_opened():
    runs = bs.example_runs().isel(run=slice(0, 4), query=slice(0, 2))
    own = Widening(1.5, np.array([[0.2, 0.4]]), np.array([[0.5], [0.1]]), True)
    again = from_dataset(as_dataset(own), runs, None)
    assert (again.rate, again.positive) == (own.rate, own.positive)
    np.testing.assert_array_equal(again.size, own.size)
    np.testing.assert_array_equal(again.loadings, own.loadings)
    # Of the form before: one size for all times.
    former = as_dataset(own).isel(time=0)
    assert from_dataset(former, runs, None).rate == widening_of(runs, None).rate == BELIEVED


def test_simulations_spread_where_support_falls(tmp_path):
    runs = bs.example_runs().isel(query=slice(0, 3))
    model = bs.Simfluence.additive()
    posterior = bs.fit(runs.isel(run=slice(0, 6)), model=model, key=KEY)
    other = runs.isel(run=[6])
    batch = np.broadcast_to(other["batch"].values[:, :, :1] % 3, other["batch"].shape)
    few = other.assign(batch=(other["batch"].dims, batch))
    opened = bs.load_posterior(posterior.save(tmp_path / "posterior.nc"))
    for one in (posterior, opened):
        with pytest.warns(bs.SupportWarning):
            far = one.simulate(few, key=KEY, draws=100)
        near = one.simulate(other, key=KEY, draws=100)
        assert float(far["support"][0, -1]) < 0.5 < float(near["support"][0, -1])
        wide, narrow = (float(sim["loss"][0, :, 0, -1].std("draw").mean()) for sim in (far, near))
        assert wide > 1.5 * narrow
