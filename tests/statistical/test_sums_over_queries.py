"""Bands of sums over queries on real recordings, and that independent draws would not hold.

``-s`` prints the figures of docs/models.md.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

import bayes_simfluence as bs

pytestmark = pytest.mark.statistical
DRAWS, EVERY = 400, 6
CASES = [("trec", 25, 0.85), ("sst2", 25, 0.85), ("copa", 25, 1.0), ("sst2", 8, 0.85)]
"""Recording, fitted runs, the most that a mean over independent queries covers."""


def covered(drawn, truth):
    """Share of points within the 90% band, at all steps and at the last one."""
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    inside = (truth >= low) & (truth <= high)
    return inside.mean(), inside[:, -1].mean()


def energy_score(drawn, truth):
    """Of all queries together (Gneiting & Raftery 2007, eq. 22); lower is better."""
    half = len(drawn) // 2
    error = np.linalg.norm(drawn - truth[None], axis=-1).mean()
    return error - 0.5 * np.linalg.norm(drawn[:half] - drawn[half:], axis=-1).mean()


def judged(posterior, held_out):
    simulated = posterior.simulate(held_out, key=jax.random.key(1), draws=DRAWS)["loss"]
    drawn, truth = simulated.values[0][:, :, 1:], held_out["loss"].values[:, 1:]
    return {
        "one": covered(drawn, truth),
        "mean": covered(drawn.mean(axis=-1), truth.mean(axis=-1)),
        "half": covered(drawn[..., ::2].mean(axis=-1), truth[..., ::2].mean(axis=-1)),
        "energy": energy_score(drawn[:, :, ::EVERY], truth[:, ::EVERY]),
    }


@pytest.mark.parametrize(("name", "count", "below"), CASES)
def test_means_over_queries_are_covered(name, count, below):
    """Few held-out runs: the bounds are where a right band of their size hardly ever ends."""
    runs = bs.example_runs(name)
    fitted, held_out = runs.isel(run=slice(0, count)), runs.isel(run=slice(count, None))
    posterior = bs.fit(fitted, key=jax.random.key(0))
    simulator = posterior.simulator
    none = np.zeros((runs.sizes["query"], 0))
    independent = replace(posterior, simulator=replace(simulator, loadings=none))
    rows = {"independent": judged(independent, held_out), "dependent": judged(posterior, held_out)}
    for label, row in rows.items():
        told = "  ".join(f"{what} {np.round(value, 4)}" for what, value in row.items())
        print(f"\n{name}, {count} runs, {label}: {told}")
    before, after = rows["independent"], rows["dependent"]
    assert after["mean"][0] > 0.85
    assert before["mean"][0] <= below
    assert after["half"][0] > 0.75
    # Of two hundred pairs of draws a score is known to less than half a percent.
    assert after["energy"] < 1.005 * before["energy"]
    # What is said of one query does not change, up to the chance of other draws.
    assert abs(after["one"][0] - before["one"][0]) < 0.02
