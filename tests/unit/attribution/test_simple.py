"""Baselines against plain NumPy."""

import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse, RunsWarning

STEPS, TRAIN, QUERY = 5, 4, 3


def recording(rng, runs=4):
    loss = rng.uniform(0.2, 1.5, (runs, STEPS + 1, QUERY)).astype(np.float32)
    batch = rng.integers(0, TRAIN, (runs, STEPS, 2))
    return bs.runs_from_arrays(batch=batch, loss=loss, train_ids=list("abcd"))


def test_persistence_keeps_the_initial_loss(rng, key):
    runs, other = recording(rng), recording(rng, runs=2)
    simulated = bs.persistence(runs).simulate(other, key=key, draws=7)
    assert simulated["loss"].shape == (1, 1, 2, STEPS + 1, QUERY)
    expected = np.repeat(other["loss"].values[:, :1], STEPS + 1, axis=1)
    for kind in ("loss", "mean_loss"):
        np.testing.assert_allclose(simulated[kind][0, 0], expected, rtol=1e-6)


def test_the_mean_trajectory_is_the_mean_of_changes(rng, key):
    runs, other = recording(rng), recording(rng, runs=2)
    posterior = bs.mean_trajectory(runs)
    simulated = posterior.simulate(other, key=key, draws=60)
    loss = runs["loss"].values.astype(float)
    change = loss - loss[:, :1]
    expected = other["loss"].values[:, :1] + change.mean(axis=0)
    for draw in simulated["mean_loss"].values[0]:
        np.testing.assert_allclose(draw, expected, rtol=1e-5, atol=1e-6)
    # The band: each run's distance from the mean of the others.
    residual = np.stack(
        [own - np.delete(change, run, axis=0).mean(axis=0) for run, own in enumerate(change)]
    )
    np.testing.assert_allclose(posterior.simulator.residual, residual, rtol=1e-6, atol=1e-9)
    added = (simulated["loss"] - simulated["mean_loss"]).values[0]
    nearest = np.abs(added[:, :, None] - residual[None, None]).max(axis=(3, 4))
    assert nearest.min(axis=2).max() < 1e-5
    assert set(nearest.argmin(axis=2).ravel()) == {0, 1, 2, 3}


def without(runs, known):
    """The same runs with losses recorded only where ``known``."""
    kept = runs.copy(deep=True)
    kept["loss"].values[:] = np.where(known, runs["loss"].values, np.nan)
    return kept


def test_the_mean_is_over_recorded_runs_and_straight_between_recorded_times(rng, key):
    runs = recording(rng)
    known = np.ones((4, STEPS + 1, QUERY), bool)
    known[:, [2, 3], 0] = False
    known[1:, 4, 1] = False
    known[2, 3:, 2] = False
    posterior = bs.mean_trajectory(without(runs, known))
    change = runs["loss"].values.astype(float)
    change = change - change[:, :1]

    def by_hand(change, known):
        mean = np.zeros((STEPS + 1, QUERY))
        for query in range(QUERY):
            at = [time for time in range(STEPS + 1) if known[:, time, query].any()]
            known_means = [change[known[:, time, query], time, query].mean() for time in at]
            mean[:, query] = np.interp(range(STEPS + 1), at, known_means)
        return mean

    np.testing.assert_allclose(posterior.simulator.change, by_hand(change, known), atol=1e-6)
    middle = posterior.simulator.change[1:5, 0]
    np.testing.assert_allclose(np.diff(middle), np.diff(middle)[0], atol=1e-6)
    residual = posterior.simulator.residual
    for run in range(4):
        others = np.delete(np.arange(4), run)
        apart = change[run] - by_hand(change[others], known[others])
        np.testing.assert_allclose(residual[run][known[run]], apart[known[run]], atol=1e-6)
    np.testing.assert_allclose(residual[2, 3:, 2], residual[2, 2, 2])
    np.testing.assert_allclose(np.diff(residual[0, 1:5, 0]), np.diff(residual[0, 1:3, 0])[0])
    assert np.isfinite(posterior.simulate(runs, key=key, draws=9)["loss"]).all()


def test_queries_are_found_by_name(rng, key):
    runs = recording(rng)
    for baseline in (bs.persistence, bs.mean_trajectory):
        posterior = baseline(runs)
        every = posterior.simulate(runs, key=key, draws=3)["mean_loss"]
        some = posterior.simulate(runs.isel(query=[2, 0]), key=key, draws=3)
        np.testing.assert_array_equal(some["mean_loss"], every.isel(query=[2, 0]))
        assert some["loss"].shape == (1, some.sizes["draw"], 4, STEPS + 1, 2)


def test_a_spread_needs_two_runs(rng):
    with pytest.raises(Misuse, match=r"got one run; expected at least two.*for a spread"):
        bs.mean_trajectory(recording(rng, runs=1))
    assert bs.persistence(recording(rng, runs=1)).verdict.ok


def test_diverged_runs_are_left_out(rng):
    runs = recording(rng)
    runs["loss"].values[1, 3] = np.inf
    runs["status"].values[1] = 2
    with pytest.warns(RunsWarning, match="1 runs left out"):
        posterior = bs.mean_trajectory(runs)
    assert np.isfinite(posterior.simulator.change).all() and len(posterior.simulator.residual) == 3
