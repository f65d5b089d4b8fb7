"""Calibration over many synthetic recordings: held-out losses and true coefficients.

Each data set gives one number that is uniform when the posterior is right (a rank of the truth
among draws; simulation-based calibration, Talts et al. 2018), so that a chi-square test of ten
bins has its nominal false-alarm rate. Wrong draws are fed to the same test, which must see them.
"""

import jax
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

import bayes_simfluence as bs
from bayes_simfluence.evaluation.metrics import pit
from bayes_simfluence.evaluation.synthetic import linear_runs

pytestmark = pytest.mark.statistical

DATA_SETS, DRAWS = 400, 99
FALSE_ALARM = 1e-3
"""Of each test of a right posterior; there are three."""
WRONG = {
    "too narrow": lambda draws, mean, sd: mean + 0.7 * (draws - mean),
    "too wide": lambda draws, mean, sd: mean + 1.5 * (draws - mean),
    "shifted": lambda draws, mean, sd: draws + 0.4 * sd,
}


@pytest.fixture(scope="module")
def found():
    """Draws and truth of each data set: the final loss of a held-out run, and a coefficient."""
    final, coefficient = [], []
    for seed in range(DATA_SETS):
        data_key, fit_key, draw_key = jax.random.split(jax.random.key(seed), 3)
        # One query that starts at 0.5 and effects of 0.2 and 0.1: the prior of one scale is right.
        runs, truth = linear_runs(
            key=data_key, runs=11, train=8, query=1, per_run=6, epochs=5, noise=0.02
        )
        model = bs.Simfluence.linear()
        posterior = bs.fit(runs.isel(run=slice(0, 10)), model=model, key=fit_key)
        held_out = runs.isel(run=[10])
        simulated = posterior.simulate(held_out, key=draw_key, draws=DRAWS)
        final.append((simulated["loss"].values[0, :, 0, -1, 0], held_out["loss"].values[0, -1, 0]))
        samples = posterior.samples(key=draw_key, draws=DRAWS)
        name = "ab"[seed % 2]
        true = getattr(truth, name)[0, seed % 8]
        coefficient.append((samples[name].values[0, :, 0, seed % 8], true))
    return {"final loss": stacked(final), "coefficient": stacked(coefficient)}


def stacked(pairs):
    draws, truth = (np.array(one, dtype=float) for one in zip(*pairs, strict=True))
    return draws.T, truth


def p_value(draws, truth):
    """Of ten equally likely bins of the rank of the truth among the draws."""
    rank = (draws < truth[None]).sum(axis=0)
    counts = np.bincount(rank * 10 // (len(draws) + 1), minlength=10)
    return chisquare(counts).pvalue


@pytest.mark.parametrize("what", ["final loss", "coefficient"])
def test_ranks_of_the_truth_are_uniform(found, what):
    assert p_value(*found[what]) > FALSE_ALARM


def test_the_pit_of_final_losses_is_uniform(found):
    assert kstest(pit(*found["final loss"]), "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("what", ["final loss", "coefficient"])
def test_the_same_test_sees_wrong_draws(found, what, wrong):
    draws, truth = found[what]
    mean, sd = draws.mean(axis=0), draws.std(axis=0)
    assert p_value(wrong(draws, mean, sd), truth) < FALSE_ALARM
