"""Simulation-based calibration of the coupled model: held-out runs that were drawn with the rest.

Coefficients, hyperparameters and training examples' states are drawn from the prior, and all runs
from them; some of the runs are fitted, the others simulated, and their true losses ranked among the
draws. Far from 0 or 1 a residual tells of its example's loss, so only recordings are kept whose
fitted runs have such residuals, and residuals that move: a choice by what is fitted, which leaves
ranks uniform. As many draws as scenarios at most, so that no two draws share a roll-out.

Posteriors take recorded residuals as given, and learn nothing of the hyperparameters from them;
the model that draws them knows better. The fitted losses tell far more, and the test would see what
is left if it mattered.

    python -m pytest -m statistical tests/statistical/test_coupled.py
"""

import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning, SupportWarning
from bayes_simfluence.data.training import residuals_of
from bayes_simfluence.evaluation.ranks import even_bins, rank_among, rank_histogram_test
from bayes_simfluence.model import noise
from bayes_simfluence.posterior.prior import prior_draw

pytestmark = pytest.mark.statistical
FALSE_ALARM = 1e-3
"""Of each test of the right posterior."""
SIMULATIONS, DRAWS = 120, 7
FITTED, STEPS, SLOTS, TRAIN, QUERIES = 8, 10, 2, 5, 3
FARTHEST, LEAST_MOVE = 0.02, 0.1
MODEL = bs.Simfluence(
    coefficients=bs.Varying(knots=1),
    timescales="staying",
    time_effect="none",
    exposure=bs.Exposure(momentum=0.0, step_size_power=0.0),
    error=noise.Gaussian(),
    prior=bs.priors.Normal(features=False),
)
NUTS = bs.NUTS(warmup=150, draws=140, chains=1, target_accept=0.9)
METHODS = {
    "collapsed": bs.Exact(hyperparameters="nuts", sampler=NUTS, times=STEPS),
    "nuts": replace(NUTS, warmup=300),
}


def curricula():
    """Random runs to be fitted; then one that repeats an example, one that goes one by one."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, TRAIN, (FITTED, STEPS, SLOTS))
    alone = np.zeros((1, STEPS, SLOTS), int)
    ordered = np.sort(np.arange(STEPS * SLOTS) % TRAIN).reshape(1, STEPS, SLOTS)
    batch = np.concatenate([some, alone, ordered])
    return bs.runs_from_arrays(
        batch=batch,
        loss=np.full((len(batch), STEPS + 1, QUERIES), 0.7),
        train_loss=rng.uniform(0.4, 1.0, batch.shape),
        train_ids=range(TRAIN),
        query_ids=range(QUERIES),
    )


def recordings():
    """Drawn ones of which the fitted part tells how its examples are learned."""
    draw, kept, number = prior_draw(MODEL, curricula()), [], 0
    while len(kept) < SIMULATIONS:
        runs, _ = draw(jax.random.fold_in(jax.random.key(7), number))
        residual = residuals_of(runs.isel(run=slice(0, FITTED)))
        inside = residual.min() > FARTHEST and residual.max() < 1 - FARTHEST
        if inside and residual.std() > LEAST_MOVE:
            kept.append(runs)
        number += 1
    return kept


@pytest.fixture(scope="module")
def drawn():
    return recordings()


def ranks(drawn, method, model):
    """Of the losses halfway and at the end of the runs that were not fitted, query by query."""
    found = []
    for number, runs in enumerate(drawn):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(8), number), 3)
        fitted, other = runs.isel(run=slice(0, FITTED)), runs.isel(run=slice(FITTED, None))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            warnings.simplefilter("ignore", SupportWarning)
            posterior = bs.fit(fitted, model=model, method=method, key=keys[0])
            # The model's own draws: widening is for curricula that leave the model.
            losses = replace(posterior, widening=None).simulate(other, key=keys[1], draws=DRAWS)
        assert posterior.simulator.coupled == model.coupled
        at = [STEPS // 2, STEPS]
        draws = losses["loss"].values[0][:, :, at].astype(float).reshape(DRAWS, -1)
        truth = other["loss"].values[:, at].astype(float).ravel()
        found.append(rank_among(draws, truth, key=keys[2]))
    names = [f"{run} {time} {q}" for run in ("alone", "ordered") for time in ("half", "end")
             for q in range(QUERIES)]  # fmt: skip
    attrs = {"draws": DRAWS, "bins": even_bins(DRAWS, SIMULATIONS)}
    return xr.Dataset(
        {"rank": (("simulation", "quantity"), np.stack(found), attrs)}, coords={"quantity": names}
    )


@pytest.mark.parametrize("method", METHODS)
def test_simulated_runs_of_the_coupled_model_are_calibrated(drawn, method):
    test = rank_histogram_test(ranks(drawn, METHODS[method], MODEL), false_alarm=FALSE_ALARM)
    assert test.ok, test.sentence


def test_the_additive_posterior_is_seen_to_be_wrong(drawn):
    additive = replace(MODEL, coupling="none")
    found = ranks(drawn, METHODS["collapsed"], additive)
    test = rank_histogram_test(found, false_alarm=FALSE_ALARM)
    assert not test.ok, test.sentence
