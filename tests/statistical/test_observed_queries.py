"""Observing half of the queries of new runs: the others are known better, and their bands hold.

``-s`` prints the figures.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

import bayes_simfluence as bs

pytestmark = pytest.mark.statistical
FITTED, NEW = 14, 6


def judged(posterior, held_out, observed, query):
    """MSE, mean width and cover of the 90% band of some queries after time 0."""
    simulated = posterior.simulate(held_out, key=jax.random.key(1), observed=observed)
    drawn = simulated["loss"].values[0][:, :, 1:, query]
    truth = held_out["loss"].values[:, 1:, query]
    low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95], axis=0)
    inside = (truth >= low) & (truth <= high)
    return np.square(middle - truth).mean(), (high - low).mean(), inside.mean()


def test_half_of_the_queries_tell_of_the_others():
    """Six runs: at a cover of .9 that varies by .05 from run to run, .85 is 2.5 sd below."""
    runs = bs.example_runs("trec").isel(run=slice(0, FITTED + NEW))
    fitted, held_out = runs.isel(run=slice(0, FITTED)), runs.isel(run=slice(FITTED, None))
    posterior = bs.fit(fitted, method=bs.Exact(times=8), key=jax.random.key(0))
    loadings = np.zeros((runs.sizes["query"], 0))
    independent = replace(posterior, simulator=replace(posterior.simulator, loadings=loadings))
    others = np.arange(1, runs.sizes["query"], 2)
    seen = held_out["loss"].isel(query=slice(None, None, 2), time=slice(None, None, 12))
    rows = {
        (name, observed is not None): judged(one, held_out, observed, others)
        for name, one in (("dependent", posterior), ("independent", independent))
        for observed in (None, seen)
    }
    for label, row in rows.items():
        print(f"\n{label}: mse {row[0]:.5f}, width {row[1]:.4f}, cover {row[2]:.3f}")
    before, given = (rows["dependent", observed] for observed in (False, True))
    assert given[0] < 0.8 * before[0]
    assert given[1] < 0.85 * before[1]
    assert given[2] > 0.85
    # Where queries depend on nothing in common, one says nothing of another.
    np.testing.assert_allclose(rows["independent", True], rows["independent", False], rtol=1e-5)
