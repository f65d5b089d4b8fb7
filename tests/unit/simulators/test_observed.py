"""Simulators given losses of the runs: against one dense Gaussian, and shares of a pool."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_t

from bayes_simfluence.gaussian.designs import JITTER, designs_and_means
from bayes_simfluence.gaussian.queries import correlation
from bayes_simfluence.gaussian.trust import AS_MODELLED, Trust
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.base import RUN_COUNTS_AS
from bayes_simfluence.simulators.gaussian import GaussianSimulator
from bayes_simfluence.simulators.pooled import PooledSimulator

RUNS, STEPS, SLOTS, TRAIN, QUERY, NEW = 4, 6, 2, 6, 3, 2
ROWS = np.array([1, 3, 5])
DRAWS = 4000
FALSE_ALARM = 5.5
"""Monte Carlo errors are refused beyond this many standard errors: 4e-8 for each number."""


def simulator(rng, *, link="identity", df=1e6, coupling="none", **others):
    model = Simfluence(link=link, coefficients=Varying(2), coupling=coupling)
    known = ExampleFeatures(rng.normal(size=(TRAIN, 2)), rng.normal(size=(QUERY, 2)))
    fitted = RunArrays.of(
        rng.integers(0, TRAIN, (RUNS, STEPS, SLOTS)),
        rng.uniform(0.5, 1.5, (RUNS, STEPS + 1, QUERY)),
        features=known,
    ).in_units(STEPS, None)
    if model.coupled:
        fitted = fitted._replace(residual=rng.uniform(0.2, 0.8, fitted.batch.shape))
    hypers = hypers_of(model, known)
    settings = {
        "model": model,
        "free": start(hypers) + 0.3 * rng.normal(size=len(hypers)),
        "fitted": fitted,
        "rows": ROWS,
        "largest_step_size": None,
        "scale": np.array([0.3, 0.5, 0.4]),
        "log_inflation": np.log([1.0, 3.0]),
        "df": df,
        "loadings": np.array([[0.6, 0.3], [-0.5, 0.4], [0.9, 0.0]]),
    }
    return GaussianSimulator(**{**settings, **others})


def planned(rng, query=(0, 1, 2)):
    return RunArrays.of(
        rng.integers(0, TRAIN, (NEW, STEPS, SLOTS)),
        rng.uniform(0.5, 1.0, (NEW, 1, len(query))),
        query=np.array(query),
        features=no_features(TRAIN, QUERY),
    )


def some_observed(plan, near):
    """One query of the first run at three times, another of both runs at the last one."""
    loss = plan.loss.copy()
    loss[0, [2, 4, 5], 0] = near[0, [2, 4, 5], 0]
    loss[:, -1, 1] = near[:, -1, 1]
    return plan._replace(loss=loss)


def dense(post, plan):
    """Mean and two covariances of all losses after time 0, ``(run, step, query)`` in one row.

    In plain NumPy, from the fitted points alone; of coefficients, and with the runs' errors.
    """
    model, fitted = post.model, post.fitted
    run = plan._replace(features=fitted.features).in_units(STEPS, None)
    with double_precision():
        values = natural_values(hypers_of(model, fitted.features), jnp.asarray(post.free))
        knots = model.coefficients.count(1.0)
        old, old_mean, new, new_mean = (
            np.asarray(array)
            for runs, rows in ((fitted, ROWS), (run, np.arange(STEPS)))
            for array in designs_and_means(model, values, runs, jnp.asarray(rows), knots=knots)
        )
        progress = jnp.arange(1, STEPS + 1) / STEPS
        error = np.asarray(model.error.covariance(values, progress)) + JITTER * np.eye(STEPS)
    flat, points = old.reshape(-1, old.shape[-1]), new.reshape(-1, new.shape[-1])
    size = np.sqrt((flat**2).sum(axis=1).mean())
    flat, points = flat / size, points / size
    inside = flat @ flat.T + np.kron(np.eye(RUNS), error[np.ix_(ROWS, ROWS)])
    change = fitted.loss[:, 1:][:, ROWS] - fitted.loss[:, :1] - old_mean
    across = points @ flat.T @ np.linalg.inv(inside)
    mean = (across @ change.reshape(len(flat), QUERY)).reshape(*new.shape[:2], QUERY)
    mean = (mean + new_mean)[..., plan.query] + plan.initial[:, None]
    coefficients = points @ points.T - across @ flat @ points.T
    inflation = np.exp(0.5 * np.interp(np.asarray(progress), [0.0, 1.0], post.log_inflation))
    spread = np.tile(inflation[:, None] * post.scale[plan.query], (NEW, 1)).reshape(-1)
    of_queries = correlation(post.loadings[plan.query])
    covariances = [
        np.kron(one, of_queries) * np.outer(spread, spread)
        for one in (coefficients, coefficients + np.kron(np.eye(NEW), error))
    ]
    return mean.reshape(-1), *covariances


def conditional(post, plan):
    """The same given the losses that the runs have."""
    mean, coefficients, whole = dense(post, plan)
    flat = plan.loss[:, 1:].reshape(-1)
    seen = np.isfinite(flat)
    inside = np.linalg.inv(whole[np.ix_(seen, seen)])
    missing = flat[seen] - mean[seen]
    return [
        (mean + one[:, seen] @ inside @ missing, one - one[:, seen] @ inside @ one[seen])
        for one in (coefficients, whole)
    ]


def same_moments(drawn, mean, covariance):
    drawn, variance = drawn.reshape(DRAWS, -1).astype(float), np.diag(covariance).clip(0.0)
    se = np.sqrt(variance / DRAWS)
    np.testing.assert_array_less(np.abs(drawn.mean(axis=0) - mean), FALSE_ALARM * se + 1e-5)
    products = np.sqrt((np.outer(variance, variance) + covariance**2) / DRAWS)
    np.testing.assert_array_less(
        np.abs(np.cov(drawn, rowvar=False) - covariance), FALSE_ALARM * products + 1e-7
    )


@pytest.mark.parametrize("query", [(0, 1, 2), (2, 0)])
def test_draws_are_those_of_the_dense_conditional(rng, key, query):
    post, plan = simulator(rng), planned(rng, query)
    near = post.simulate(plan, key=jax.random.key(7), draws=1).loss[0, 0]
    plan = some_observed(plan, near)
    found = post.simulate_observed(plan, key=key, draws=DRAWS)
    for drawn, truth in zip(found, conditional(post, plan), strict=True):
        same_moments(drawn[0][:, :, 1:], *truth)
    seen = np.isfinite(plan.loss)
    gap = np.abs(found.loss[0][:, seen] - plan.loss[seen])
    assert gap.max() < 1e-5
    # Neither the draws before nor those of independent queries are.
    independent = dataclasses.replace(post, loadings=np.zeros((QUERY, 0)))
    for wrong in (
        post.simulate(plan, key=key, draws=DRAWS),
        independent.simulate_observed(plan, key=key, draws=DRAWS),
    ):
        with pytest.raises(AssertionError):
            same_moments(wrong.loss[0][:, :, 1:], *conditional(post, plan)[1])


@pytest.mark.parametrize(("link", "coupling"), [("log-odds", "none"), ("log-odds", "residual")])
def test_observed_losses_are_met_in_every_scenario(rng, key, link, coupling):
    post, plan = simulator(rng, link=link, coupling=coupling, df=5.0), planned(rng)
    plan = some_observed(plan, post.simulate(plan, key=jax.random.key(7), draws=1).loss[0, 0])
    before, found = (
        method(plan, key=key, draws=20) for method in (post.simulate, post.simulate_observed)
    )
    seen = np.isfinite(plan.loss)
    np.testing.assert_allclose(found.loss[0][:, seen], np.tile(plan.loss[seen], (20, 1)), rtol=1e-4)
    np.testing.assert_array_equal(found.loss[:, :, :, 0], before.loss[:, :, :, 0])
    assert np.isfinite(found.mean_loss).all()
    # A draw moves, and stays the draw that it was where little is known of it.
    last = [one.loss[0, :, 0, 1, 2] for one in (before, found)]
    assert not np.allclose(*last)
    assert np.corrcoef(*last)[0, 1] > 0.2


def test_no_query_moves_without_dependence(rng, key):
    post, plan = simulator(rng, loadings=np.zeros((QUERY, 0))), planned(rng)
    plan = some_observed(plan, np.ones(plan.loss.shape))
    before, found = (
        method(plan, key=key, draws=20) for method in (post.simulate, post.simulate_observed)
    )
    for one, other in zip(before, found, strict=True):
        np.testing.assert_array_equal(one[..., 2], other[..., 2])
        assert not np.allclose(one[..., 0], other[..., 0])


def test_trust_is_kept_and_decides_what_is_left(rng, key):
    post, plan = simulator(rng, trust=Trust(4.0, 2.0)), planned(rng)
    plan = some_observed(plan, np.full(plan.loss.shape, 0.9))
    arrays = {name: array for name, (_, array) in post.arrays().items()}
    assert GaussianSimulator.restore(arrays, post.settings()).trust == post.trust
    # Posteriors of before there was any.
    arrays.pop("trust")
    modelled = GaussianSimulator.restore(arrays, post.settings())
    assert modelled.trust == AS_MODELLED
    one, other = (
        each.simulate_observed(plan, key=key, draws=400).loss[0] for each in (post, modelled)
    )
    seen = np.isfinite(plan.loss)
    np.testing.assert_allclose(one[:, seen], np.tile(plan.loss[seen], (400, 1)), atol=1e-5)
    wide, narrow, before = (
        drawn.std(axis=0)[~seen].mean()
        for drawn in (one, other, post.simulate(plan, key=key, draws=400).loss[0])
    )
    assert 1.02 * narrow < wide < before
    np.testing.assert_array_equal(
        *(each.simulate(plan, key=key, draws=5).loss for each in (post, modelled))
    )


def test_shares_of_a_pool_follow_the_likelihood(rng, key):
    members = tuple(simulator(np.random.default_rng(seed), df=6.0) for seed in range(3))
    pool = PooledSimulator(members, np.array([0.5, 0.3, 0.2]))
    plan = planned(rng)
    plan = some_observed(plan, np.full(plan.loss.shape, 0.9))
    flat = plan.loss[:, 1:].reshape(-1)
    seen = np.isfinite(flat)
    log_density = []
    for member in members:
        mean, _, whole = dense(member, plan)
        own = multivariate_t.logpdf(
            flat[seen] - mean[seen], shape=whole[np.ix_(seen, seen)], df=member.df
        )
        assert member.log_density_observed(plan, key=key) == pytest.approx(own, rel=1e-6)
        log_density.append(own)
    # Five points of two runs, each of which counts as four at most.
    power = min(1.0, RUN_COUNTS_AS * 2 / seen.sum())
    expected = np.log(pool.weights) + power * np.array(log_density)
    shares = pool.shares_given(plan, key=key)
    np.testing.assert_allclose(shares, np.exp(expected - logsumexp(expected)), rtol=1e-5)
    found = pool.simulate_observed(plan, key=key, draws=40).loss[0]
    seen = np.isfinite(plan.loss)
    np.testing.assert_allclose(found[:, seen], np.tile(plan.loss[seen], (40, 1)), rtol=1e-4)
    owners = dataclasses.replace(pool, weights=shares).owners(key, 40)
    at = int(owners[0])
    alone = members[at].simulate_observed(plan, key=jax.random.fold_in(key, at), draws=40).loss
    np.testing.assert_allclose(found[0], alone[0, 0], rtol=1e-4)


def test_density_of_losses_is_per_nat(rng, key):
    """The density of linked losses times the slope of the link."""
    post, plan = simulator(rng, link="log-odds", df=6.0), planned(rng)
    plan = some_observed(plan, np.full(plan.loss.shape, 0.9))

    def linked(loss):
        return np.log(np.expm1(loss))

    inner = dataclasses.replace(
        post,
        model=dataclasses.replace(post.model, link="identity"),
        fitted=post.fitted._replace(loss=linked(post.fitted.loss)),
    )
    change = inner.log_density_observed(plan._replace(loss=linked(plan.loss)), key=key)
    seen = plan.loss[:, 1:][np.isfinite(plan.loss[:, 1:])]
    slope = -np.log(-np.expm1(-seen)).sum()
    assert post.log_density_observed(plan, key=key) == pytest.approx(change + slope, rel=1e-6)


def test_who_can_condition_says_so(rng):
    post = simulator(rng)
    assert post.by_observed is post
    unseen = post.for_queries(np.ones((1, 2)))
    assert unseen.by_observed is None
    assert PooledSimulator((post, unseen), np.array([0.5, 0.5])).by_observed is None
