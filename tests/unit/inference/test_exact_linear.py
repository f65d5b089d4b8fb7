"""The exact posterior of the published kinds against dense Bayesian linear regression."""

import jax
import numpy as np
import pytest
from scipy.stats import binom, multivariate_normal

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference.evidence import log_evidence, scales_of

TRAIN, QUERY = 6, 2
KINDS = ("linear", "additive", "multiplicative")


def recording(seed=0, **changes):
    sizes = {"runs": 5, "train": TRAIN, "query": QUERY, "per_run": 4, "epochs": 3, "noise": 0.03}
    return linear_runs(key=jax.random.key(seed), **{**sizes, **changes})


def design(runs, kind, query):
    """Rows, columns in their units, and target of one query."""
    batch, loss = runs["batch"].values, runs["loss"].values[..., query].astype(float)
    count = runs.sizes["train"]
    share = np.stack([(batch == one).mean(axis=-1) for one in range(count)], axis=-1)
    share, before = share.reshape(-1, count), loss[:, :-1].ravel()
    size = np.sqrt(np.mean(loss[:, 0] ** 2))
    blocks = {"linear": (1, 0), "additive": (0,), "multiplicative": (1,)}[kind]
    columns = np.concatenate([share * before[:, None] ** power for power in blocks], axis=1)
    unit = np.repeat([size**power for power in blocks], count)
    return columns / unit, unit, loss[:, 1:].ravel() - before


def eigenbasis(columns, target):
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return values, vectors.T @ (columns.T @ target), float(target @ target), len(target)


def marginal(columns, target, ratio, noise):
    covariance = noise**2 * (np.eye(len(target)) + columns @ columns.T / ratio)
    return multivariate_normal.logpdf(target, cov=covariance)


def test_log_evidence_is_the_marginal_likelihood_up_to_a_constant():
    columns, _, target = design(recording()[0], "linear", 0)
    ratios = np.array([1e-4, 1e-2, 0.3, 20.0])
    score, variance = log_evidence(*eigenbasis(columns, target), ratios)
    expected = [
        marginal(columns, target, ratio, np.sqrt(one))
        for ratio, one in zip(ratios, variance, strict=True)
    ]
    np.testing.assert_allclose(np.diff(score), np.diff(expected), rtol=1e-6)
    # The noise is the best for its ratio.
    for ratio, one, best in zip(ratios, variance, expected, strict=True):
        for factor in (0.98, 1.02):
            assert marginal(columns, target, ratio, factor * np.sqrt(one)) < best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_scales_have_the_highest_evidence(seed, kind):
    columns, _, target = design(recording(seed)[0], kind, 1)
    basis = eigenbasis(columns, target)
    found = scales_of(*basis)
    best = marginal(columns, target, found.ratio, found.noise)
    grid = found.ratio * np.exp(np.linspace(-6, 6, 121))
    noises = found.noise * np.exp(np.linspace(-1, 1, 41))
    score, _ = log_evidence(*basis, grid)
    assert score.max() <= found.log_evidence + 1e-3
    values, cross, square, rows = basis
    volume = np.log1p(values[None] / grid[:, None]).sum(axis=1)
    squares = square - (cross[None] ** 2 / (values[None] + grid[:, None])).sum(axis=1)
    both = -0.5 * (
        rows * np.log(2 * np.pi * noises[:, None] ** 2)
        + volume[None]
        + squares[None] / noises[:, None] ** 2
    )
    np.testing.assert_allclose(both[20, 60], best, rtol=1e-8)
    assert both.max() <= best + 1e-3


def test_a_target_that_never_moves_has_finite_scales():
    columns, _, _ = design(recording()[0], "linear", 0)
    found = scales_of(*eigenbasis(columns, np.zeros(len(columns))))
    assert np.isfinite(found).all() and found.noise > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_that_of_dense_linear_regression(key, kind):
    runs, _ = recording()
    posterior = bs.fit(runs, model=getattr(bs.Simfluence, kind)(), method=bs.Exact(), key=key)
    simulator, total = posterior.simulator, 0.0
    blocks = {"linear": [0, 1], "additive": [1], "multiplicative": [0]}[kind]
    for query in range(QUERY):
        columns, unit, target = design(runs, kind, query)
        scales = scales_of(*eigenbasis(columns, target))
        total += scales.log_evidence
        prior = np.diag(unit**2) * scales.ratio / scales.noise**2
        literal = columns * unit
        covariance = np.linalg.inv(literal.T @ literal / scales.noise**2 + prior)
        mean = covariance @ literal.T @ target / scales.noise**2
        found = np.stack([simulator.a[query], simulator.b[query]])
        np.testing.assert_allclose(found[blocks].ravel(), mean, rtol=1e-5, atol=1e-8)
        factor = simulator.factor[query].astype(float)
        spread = (factor @ factor.T).reshape(2, TRAIN, 2, TRAIN)
        kept = spread[blocks][:, :, blocks].reshape(len(mean), len(mean))
        np.testing.assert_allclose(kept, covariance, rtol=1e-3, atol=1e-5 * covariance.max())
        np.testing.assert_allclose(simulator.noise[query], scales.noise, rtol=1e-6)
        rest = np.setdiff1d([0, 1], blocks)
        assert (found[rest] == 0).all() and (spread[rest] == 0).all()
    np.testing.assert_allclose(posterior.verdict.numbers["log_evidence"], total, rtol=1e-8)
    assert posterior.verdict.ok and (simulator.keep, simulator.count) == (1.0, False)


# Recovery: whitened errors of the coefficients are independent standard normal numbers when the
# posterior is right, so that those within +-1.645 are binomial. Scales are estimated from about
# 300 steps each; the bound is that of a binomial at a false alarm of 1e-4.
DATA_SETS, FALSE_ALARM = 10, 1e-4


@pytest.fixture(scope="module")
def recoveries():
    """True coefficients minus means, and factors, of several synthetic data sets."""
    found = []
    for seed in range(DATA_SETS):
        # Queries start at 0.5, so that one prior sd fits both kinds of coefficients in units.
        runs, truth = recording(seed, runs=12, epochs=4, query=1, sd_a=0.2, sd_b=0.1, noise=0.02)
        model = bs.Simfluence.linear()
        post = bs.fit(runs, model=model, method=bs.Exact(), key=jax.random.key(0)).simulator
        error = np.concatenate([truth.a - post.a, truth.b - post.b], axis=1)[0]
        found.append((error, post.factor[0].astype(float)))
    return found


def covered(recoveries, *, narrow=1.0, shift=0.0):
    """How many whitened errors are within the central 90%, and of how many."""
    white = [np.linalg.solve(narrow * factor, error) + shift for error, factor in recoveries]
    inside = np.abs(np.concatenate(white)) < 1.6448536
    return int(inside.sum()), len(inside)


def accepted(inside, count):
    low, high = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count, 0.9)
    return low <= inside <= high


def test_the_posterior_covers_the_true_coefficients(recoveries):
    assert accepted(*covered(recoveries))
    # Each coefficient alone, too; they are correlated, so only roughly so.
    alone = np.concatenate(
        [error / np.sqrt((factor**2).sum(axis=1)) for error, factor in recoveries]
    )
    assert 0.75 < (np.abs(alone) < 1.6448536).mean() < 0.99


@pytest.mark.parametrize("wrong", [{"narrow": 0.5}, {"narrow": 2.0}, {"shift": 1.0}])
def test_the_check_of_recovery_refuses_wrong_posteriors(recoveries, wrong):
    assert not accepted(*covered(recoveries, **wrong))


def test_a_query_that_never_moves_is_said(key):
    runs, _ = recording()
    runs["loss"].values[..., 1] = 0.7
    with pytest.warns(FitWarning, match="1 queries never change their loss"):
        posterior = bs.fit(runs, model=bs.Simfluence.linear(), key=key)
    simulated = posterior.simulate(runs, key=key, draws=5)["loss"]
    assert np.isfinite(simulated).all()
    np.testing.assert_allclose(simulated[..., 1], 0.7, atol=1e-3)
