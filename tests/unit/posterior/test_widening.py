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
    own = Widening(1.5, np.array([0.2, 0.4]), np.zeros((2, 0)), True)
    loss = np.broadcast_to(np.log1p(np.exp(LINK)), (1, 4000, 2, 3, 2)).astype("f4")
    distance = np.array([[0.0, FREE, 1.5], [0.0, 0.1, FREE]])
    spread = widened(loss, distance, own, key=KEY)
    # Within what was recorded nothing changes.
    np.testing.assert_array_equal(spread[:, :, 1], loss[:, :, 1])
    np.testing.assert_array_equal(spread[:, :, 0, :2], loss[:, :, 0, :2])
    moved = linked(spread[0, :, 0, 2]) - LINK
    # The sd of 4000 draws is known to 1.1%; beyond 4.5 of that in 1 of 100,000.
    np.testing.assert_allclose(moved.std(axis=0), 1.5 * own.size * (1.5 - FREE), rtol=0.05)
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.07


def test_queries_that_go_together_err_together():
    own = Widening(1.0, np.ones(2), np.array([[0.9], [-0.9]]), False)
    spread = widened(np.zeros((1, 2000, 1, 1, 2), "f4"), np.array([[2.0]]), own, key=KEY)
    assert np.corrcoef(spread[0, :, 0, 0].T)[0, 1] == pytest.approx(-0.81, abs=0.05)


def test_one_draw_without_a_band_stays_a_point():
    own = Widening(1.0, np.ones(1), np.zeros((1, 0)), True)
    loss = np.ones((1, 1, 1, 1, 1), "f4")
    assert widened(loss, np.array([[9.0]]), own, key=KEY) is loss


def far_recording(rate):
    """Runs alike, but for the first, which trains on few examples and errs by ``rate``."""
    runs = bs.example_runs().isel(run=slice(0, 12), query=slice(0, 8)).copy(deep=True)
    batch = runs["batch"].values.copy()
    batch[0] = batch[0, :, :1] % 3
    runs["batch"] = (runs["batch"].dims, batch)
    rng, times = np.random.default_rng(0), np.array([32, 64, 96])
    size = widening_of(runs, None).size
    centre = linked(runs["loss"].sel(time=times))
    error = 0.02 * rng.normal(size=centre.shape)
    error[0] += rate * 2.0 * size * rng.normal(size=8)
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
    rates = [widening_of(*far_recording(rate)).rate for rate in (0.0, 3.0, 30.0)]
    # One run against a prior: each rate is drawn towards what is believed.
    assert rates[0] < 0.5 * rates[1] < 0.5 * BELIEVED < BELIEVED < 0.5 * rates[2]


def test_queries_that_were_not_fitted_have_the_others_size():
    runs = bs.example_runs().isel(run=slice(0, 4), query=slice(0, 4))
    own = widening_of(runs, None)
    other = runs.isel(query=[2, 0]).assign_coords(query=["2", "new"])
    found = for_queries(own, runs.assign_coords(query=["0", "1", "2", "3"]), other)
    assert found.size[0] == own.size[2]
    assert found.size[1] == pytest.approx(np.sqrt(np.square(own.size).mean()))
    assert found.loadings.shape == (2, own.loadings.shape[1])


def test_what_is_saved_is_what_is_opened():
    own = Widening(1.5, np.array([0.2, 0.4]), np.array([[0.5], [0.1]]), True)
    again = from_dataset(as_dataset(own))
    assert (again.rate, again.positive) == (own.rate, own.positive)
    np.testing.assert_array_equal(again.size, own.size)
    np.testing.assert_array_equal(again.loadings, own.loadings)


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
