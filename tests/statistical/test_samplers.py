"""Samplers against one another, and simulation-based calibration of what they make of every prior.

Every comparison of right posteriors states its false-alarm rate, and the same ones are fed shifted,
too narrow and too wide draws, which they must refuse. The long set is

    python -m pytest -m statistical tests/statistical/test_samplers.py
"""

import warnings
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning
from bayes_simfluence.evaluation.calibration import sbc
from bayes_simfluence.evaluation.ranks import rank_histogram_test
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference.method import Method
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import Exposure
from bayes_simfluence.model.noise import Gaussian
from bayes_simfluence.model.priors import (
    Features,
    Horseshoe,
    Laplace,
    LowRank,
    Normal,
    StudentT,
)
from bayes_simfluence.posterior.prior import prior_draw

FALSE_ALARM = 1e-3
"""Of each test of a right posterior."""
KEY = jax.random.key(0)
TRAIN, QUERY = 3, 1
LEVELS = (0.05, 0.5, 0.95)
long = pytest.mark.statistical


def recording(seed=0, train=TRAIN, query=QUERY, sd_a=0.0):
    sizes = {"runs": 3, "per_run": 3, "batch_size": 1, "epochs": 2, "noise": 0.05}
    return linear_runs(key=jax.random.key(seed), train=train, query=query, sd_a=sd_a, **sizes)[0]


@dataclass(frozen=True)
class Distorted:
    """A method whose coefficients are shifted by so many sd, or spread this much wider."""

    method: Method
    shift: float = 0.0
    ratio: float = 1.0

    def default_model(self):
        return self.method.default_model()

    def as_dict(self):
        return {"distorted": True}

    def fit(self, runs, model, context):
        found = self.method.fit(runs, model, context)
        sites = dict(found.simulator.sites)
        # The product is what the data know; its factors alone are a ridge.
        scale = sites["scale"][..., None, None]
        effect = sites["staying_unit"] * scale
        mean, sd = (getattr(np, one)(effect, axis=(0, 1), keepdims=True) for one in ("mean", "std"))
        effect = mean + self.ratio * (effect - mean) + self.shift * sd
        sites["staying_unit"] = effect / scale
        return replace(found, simulator=replace(found.simulator, sites=sites))


def quietly(runs, model, method, key=KEY):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return bs.fit(runs, model=model, method=method, key=key)


def estimates(posterior):
    """Means, log sds and quantiles of every parameter, and their Monte Carlo errors."""
    import arviz as az

    drawn = posterior.samples(key=KEY, draws=10**6)
    drawn = xr.Dataset(
        {
            name: np.log(one) if name in ("scale", "noise") else one
            for name, one in drawn.data_vars.items()
        }
    )
    flat = drawn.mean(("chain", "draw")), drawn.std(("chain", "draw"))
    values, errors = [], []

    def add(found, error):
        for name in sorted(found.data_vars):
            values.append(np.ravel(found[name].values))
            errors.append(np.ravel(error[name].values))

    add(flat[0], az.mcse(drawn, method="mean"))
    add(np.log(flat[1]), az.mcse(drawn, method="sd") / flat[1])
    for level in LEVELS:
        quantile = drawn.quantile(level, ("chain", "draw"))
        add(quantile, az.mcse(drawn, method="quantile", prob=level))
    return np.concatenate(values), np.concatenate(errors)


def differ(one, other):
    """Whether any quantity differs by more than Monte Carlo error (Bonferroni over all).

    Quantities are heavily correlated, which makes the test conservative; Monte Carlo errors are
    estimated themselves, hence the factor.
    """
    (first, first_error), (second, second_error) = estimates(one), estimates(other)
    z = np.abs(first - second) / (1.1 * np.hypot(first_error, second_error))
    return bool(z.max() > norm.isf(0.5 * FALSE_ALARM / len(z))), float(z.max())


def samplers(warmup, draws):
    sampler = bs.NUTS(warmup=warmup, draws=draws, chains=4, target_accept=0.9)
    return sampler, bs.Exact(hyperparameters="nuts", sampler=sampler)


def both(runs, model, warmup, draws, **distorted):
    plain, collapsed = samplers(warmup, draws)
    right = quietly(runs, model, plain, jax.random.key(1))
    return right, [
        quietly(runs, model, one, jax.random.key(2))
        for one in (collapsed, *(Distorted(collapsed, **{name: value}) for name, value in
                                 distorted.items()))
    ]  # fmt: skip


@long
def test_collapsed_and_plain_nuts_agree():
    model = bs.Simfluence.additive()
    right, (same, shifted, narrow) = both(recording(), model, 200, 400, shift=0.5, ratio=0.6)
    assert not differ(right, same)[0]
    assert differ(right, shifted)[0] and differ(right, narrow)[0]


@long
@pytest.mark.parametrize("kind", ["linear", "additive"])
def test_collapsed_and_plain_nuts_agree_closely(kind):
    runs = recording(query=2, sd_a=0.1 if kind == "linear" else 0.0)
    found = both(runs, getattr(bs.Simfluence, kind)(), 1000, 4000, shift=0.2, ratio=0.85)
    right, (same, shifted, narrow) = found
    assert not differ(right, same)[0], differ(right, same)
    assert differ(right, shifted)[0] and differ(right, narrow)[0]


@long
@pytest.mark.parametrize("knots", [1, 2])
def test_both_agree_on_two_timescales(knots):
    model = bs.Simfluence(
        exposure=Exposure.memoryless(),
        coefficients=Varying(knots=knots),
        error=Gaussian(),
        time_effect="none",
        prior=Normal(features=False),
    )
    plain, _ = samplers(1000, 2000)
    collapsed = bs.Exact(hyperparameters="nuts", times=96, sampler=plain)
    right = quietly(recording(), model, plain, jax.random.key(1))
    same = quietly(recording(), model, collapsed, jax.random.key(2))
    assert not differ(right, same)[0], differ(right, same)
    fewer = bs.Exact(hyperparameters="nuts", times=1, sampler=plain)
    assert differ(right, quietly(recording(), model, fewer, jax.random.key(3)))[0]


EMBEDDED = Features(np.array([[1.0, 0.2], [0.9, -0.1], [-0.3, 1.0]]))
PRIORS = {
    "normal": Normal(features=False),
    "student-t": StudentT(features=False),
    "laplace": Laplace(features=False),
    "horseshoe": Horseshoe(features=False, share=0.3),
    "low-rank": LowRank(features=False, rank=1),
    "features": EMBEDDED,
    "pooled": Normal(features=False, pooled=True),
}
NUTS = bs.NUTS(warmup=300, draws=99, chains=1, target_accept=0.95)
COLLAPSED = bs.Exact(hyperparameters="nuts", sampler=bs.NUTS(warmup=200, draws=99, chains=1))
FULL_RANK = bs.SVI(guide="full-rank", steps=4000, draws=99)


def density(values, runs):
    """Gaussian log density of the changes given coefficients and noise: it looks at the data."""
    share = xr.DataArray(
        np.stack(
            [(runs["batch"].values == one).mean(axis=2) for one in range(runs.sizes["train"])]
        ),
        dims=("train", "run", "step"),
    )
    change = xr.DataArray(
        np.diff(runs["loss"].values.astype(float), axis=1), dims=("run", "step", "query")
    )
    coefficient = values["b"].drop_vars(["train", "query"], errors="ignore")
    noise = values["noise"].drop_vars("query", errors="ignore")
    miss = (change - (coefficient * share).sum("train")) / noise
    return (-0.5 * miss**2 - np.log(noise)).sum(("run", "step", "query"))


QUANTITIES = {
    "coefficient": lambda values, _: values["b"].isel(train=0, query=0, drop=True),
    "scale": lambda values, _: values["scale"].isel(query=0, drop=True),
    "noise": lambda values, _: values["noise"].isel(query=0, drop=True),
    "density": density,
}


def calibration(method, prior=PRIORS["normal"], simulations=200, query=QUERY, draws=19):
    model = bs.Simfluence.additive(prior=prior)
    runs = recording(query=query)
    ranks = sbc(
        prior_draw(model, runs), method, model=model, key=KEY, simulations=simulations,
        draws=draws, quantities=QUANTITIES,
    )  # fmt: skip
    return rank_histogram_test(ranks, false_alarm=FALSE_ALARM)


def test_collapsed_draws_are_calibrated():
    test = calibration(COLLAPSED, simulations=24)
    assert test.ok, test.sentence


def test_a_shift_is_seen_by_the_same_test():
    test = calibration(Distorted(COLLAPSED, shift=1.5), simulations=24)
    assert not test.ok and "too high" in test.sentence
    assert float(test.p_values.sel(quantity="coefficient")) < FALSE_ALARM


@long
@pytest.mark.parametrize("prior", PRIORS)
def test_nuts_is_calibrated_under_every_prior(prior):
    query = 2 if prior in ("low-rank", "pooled") else 1
    test = calibration(NUTS, PRIORS[prior], query=query)
    assert test.ok, test.sentence


@long
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        ({"shift": 0.7}, "too high"),
        ({"ratio": 0.5}, "too narrow"),
        ({"ratio": 2.0}, "too wide"),
    ],
)
def test_collapsed_nuts_is_calibrated_and_planted_errors_are_seen(settings, said):
    method = Distorted(COLLAPSED, **settings) if settings else COLLAPSED
    test = calibration(method)
    assert test.ok == (not said) and said in test.sentence, test.sentence


@long
@pytest.mark.parametrize(
    ("settings", "said"),
    [({"shift": 0.7}, "too high"), ({"ratio": 0.5}, "too narrow"), ({"ratio": 2.0}, "too wide")],
)
def test_planted_errors_of_nuts_are_seen(settings, said):
    test = calibration(Distorted(NUTS, **settings))
    assert not test.ok and said in test.sentence, test.sentence


@long
def test_the_full_rank_guide_is_nearly_calibrated():
    """The guide is an approximation: its coefficients may not look wrong over 60 simulations."""
    test = calibration(FULL_RANK, simulations=60)
    assert float(test.p_values.sel(quantity="coefficient")) > FALSE_ALARM, test.sentence


@long
def test_guides_are_as_narrow_as_their_verdicts_say():
    # Two examples that are always trained on together: their effects are anticorrelated.
    runs = recording(train=4)
    joined = np.repeat(runs["batch"].values[..., :1] // 2 * 2, 2, axis=2) + np.arange(2)
    model = bs.Simfluence.additive()
    pairs = bs.runs_from_arrays(batch=joined, loss=runs["loss"].values, train_ids=range(4))
    sampler = bs.NUTS(warmup=500, draws=1000, chains=2, target_accept=0.95)
    found = {
        "nuts": quietly(pairs, model, sampler),
        **{
            guide: quietly(pairs, model, bs.SVI(guide=guide, steps=8000, draws=1000))
            for guide in ("normal", "full-rank")
        },
    }
    log_sd = {
        name: np.log(one.samples(key=KEY, draws=10**6)["b"].std(("chain", "draw"))).mean().item()
        for name, one in found.items()
    }
    said = {guide: found[guide].verdict.numbers["dispersion"] for guide in ("normal", "full-rank")}
    for guide, ratio in said.items():
        # The sampler knows the tails of the scales, the curvature does not.
        assert 1.0 < ratio / np.exp(log_sd[guide] - log_sd["nuts"]) < 1.6
    assert said["normal"] < 0.7 * said["full-rank"] < 0.7
