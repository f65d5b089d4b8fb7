"""Simulation-based calibration of the package's own posteriors, and coverage of conformal bands.

Every test of something right states its false-alarm rate; the same tests are shown to fail on
planted errors.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest

import bayes_simfluence as bs
from bayes_simfluence.evaluation.calibration import sbc
from bayes_simfluence.evaluation.ranks import rank_histogram_test
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference.method import Method

pytestmark = pytest.mark.statistical

FALSE_ALARM = 1e-3
"""Of each test of a right posterior or band; there are five."""
KEY = jax.random.key(0)
LINEAR = bs.Simfluence.linear()


def linear_draw(key):
    """One query that starts at 0.5 and effects of 0.2 and 0.1: a prior of one scale is right."""
    runs, truth = linear_runs(key=key, runs=10, train=8, query=1, per_run=6, epochs=5, noise=0.02)
    return runs, xr.Dataset({name: (("query", "train"), getattr(truth, name)) for name in "ab"})


@dataclass(frozen=True)
class Distorted:
    """A method whose posterior is shifted by so many sd, or this much wider."""

    method: Method
    shift: float = 0.0
    ratio: float = 1.0

    def default_model(self):
        return self.method.default_model()

    def as_dict(self):
        return {"distorted": True}

    def fit(self, runs, model, context):
        found = self.method.fit(runs, model, context)
        simulator = found.simulator
        sd = np.sqrt(np.square(simulator.factor).sum(axis=2))
        shift_a, shift_b = np.split(self.shift * sd, 2, axis=1)
        wrong = replace(
            simulator,
            a=simulator.a + shift_a,
            b=simulator.b + shift_b,
            factor=simulator.factor * np.float32(self.ratio),
        )
        return replace(found, simulator=wrong)


def calibration_of(method, simulations=300):
    ranks = sbc(linear_draw, method, model=LINEAR, key=KEY, simulations=simulations)
    return rank_histogram_test(ranks, false_alarm=FALSE_ALARM)


def test_coefficients_of_the_linear_model_are_calibrated():
    test = calibration_of(bs.Exact())
    assert test.ok, test.sentence


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Distorted(bs.Exact(), shift=0.5), "too high"),
        (Distorted(bs.Exact(), ratio=0.6), "too narrow"),
        (Distorted(bs.Exact(), ratio=1.6), "too wide"),
    ],
)
def test_the_same_test_sees_planted_errors(method, said):
    test = calibration_of(method)
    assert not test.ok and said in test.sentence


def covered(band_of, ratio=1.0, recordings=300):
    """Recordings whose new run is within the band at its last time, and at all times."""
    last, whole = 0, 0
    for seed in range(recordings):
        data_key, fit_key, draw_key = jax.random.split(jax.random.key(seed), 3)
        runs, _ = linear_runs(
            key=data_key, runs=20, train=8, query=1, per_run=6, epochs=3, noise=0.02
        )
        fitted, held_out = runs.isel(run=slice(0, 10)), runs.isel(run=slice(10, 19))
        new = runs.isel(run=[19])
        method = Distorted(bs.Exact(), ratio=ratio)
        posterior = bs.fit(fitted, model=LINEAR, method=method, key=fit_key)
        simulator = replace(posterior.simulator, noise=ratio * posterior.simulator.noise)
        posterior = replace(posterior, simulator=simulator)
        inside = []
        for simultaneous in (False, True):
            band = band_of(held_out, simultaneous)
            found = posterior.simulate(new, key=draw_key, draws=99, band=band)
            inside.append(((new["loss"] >= found["low"]) & (new["loss"] <= found["high"])).values)
        last += bool(inside[0][0, -1, 0])
        whole += bool(inside[1].all())
    return last, whole, recordings


def conformal(runs, simultaneous):
    return bs.Conformal(runs, 0.8, simultaneous)


def credible(runs, simultaneous):
    return bs.Credible(0.8, simultaneous)


@pytest.mark.parametrize("ratio", [1.0, 0.3], ids=["as fitted", "far too narrow"])
def test_conformal_bands_cover_exactly(ratio):
    *found, recordings = covered(conformal, ratio)
    # Nine calibration runs: (9 + 1) * 0.8 is whole, so that coverage is exactly 0.8.
    for one in found:
        assert binomtest(one, recordings, 0.8).pvalue > FALSE_ALARM


def test_a_narrow_posterior_does_not():
    *found, recordings = covered(credible, 0.3, recordings=100)
    for one in found:
        assert binomtest(one, recordings, 0.8).pvalue < FALSE_ALARM
