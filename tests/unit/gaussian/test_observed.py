"""Draws given observed deviations, and the density of these, against textbook conditioning."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_t

from bayes_simfluence.gaussian.draws import Dependence, drawn_trajectories
from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian
from bayes_simfluence.gaussian.observed import Deviations, Observed
from bayes_simfluence.gaussian.queries import correlation, own_sd

RUNS, STEPS, WEIGHTS, QUERIES = 2, 3, 4, 3
LOADINGS = np.array([[0.9, 0.0], [0.7, 0.5], [0.0, 0.0]])
"""The third query depends on no other."""
EXACT = np.ones((RUNS, STEPS, QUERIES))
"""What is observed tells of all points what the model says."""
DRAWS = 20_000
FALSE_ALARM = 5.5
"""Monte Carlo errors are refused beyond this many standard errors: 4e-8 for each number."""


@pytest.fixture
def fitted(rng):
    designs = rng.normal(size=(3, 2, WEIGHTS))
    gaussian = LinearGaussian(jnp.asarray(designs), 0.3 * jnp.eye(2), jnp.ones((3, 2), bool))
    return gaussian.condition(jnp.zeros((3, 2, QUERIES)))


@pytest.fixture
def before(rng, fitted):
    root = rng.normal(size=(STEPS, STEPS))
    designs = rng.normal(size=(RUNS, STEPS, WEIGHTS))
    return Deviations(fitted, designs, 0.2 * root @ root.T, correlation(LOADINGS))


@pytest.fixture
def value(rng):
    """A query of one run at two steps, the second of both runs at one."""
    seen = np.full((RUNS, STEPS, QUERIES), np.nan)
    seen[0, [0, 2], 0] = seen[:, 1, 1] = rng.normal(size=2)
    return seen


def joint(before):
    """Covariances of all points, run, step, query: by the coefficients, and with errors."""
    designs = np.asarray(before.weights.designs)
    precision = np.eye(WEIGHTS) + designs.T @ designs / 0.3
    flat = before.designs.reshape(-1, WEIGHTS)
    mean = flat @ np.linalg.solve(precision, flat.T)
    whole = mean + np.kron(np.eye(RUNS), before.error)
    return [np.kron(one, before.correlation) for one in (mean, whole)]


def conditional(before, value, trust=EXACT):
    """Means and covariances of all deviations given the values (Bishop 2006, eqs. 2.81, 2.82).

    Where a point is trusted less to go with the values, its covariance with them is so much less;
    what all such points then do not owe to the values they have in common.
    """
    mean, whole = joint(before)
    flat = value.reshape(-1)
    seen, share = np.isfinite(flat), trust.reshape(-1)
    inside = np.linalg.inv(whole[np.ix_(seen, seen)])
    rest = np.sqrt(1.0 - share**2)
    # What is observed has errors, so coefficients go with it by their own covariance.
    return [
        (
            share * (one[:, seen] @ inside @ flat[seen]),
            one - (1.0 - np.outer(rest, rest)) * (one[:, seen] @ inside @ one[seen]),
        )
        for one in (mean, whole)
    ]


def draws_of(before, key):
    fitted = before.weights.single()
    drawn = drawn_trajectories(
        fitted,
        before.designs[None].astype(np.float32),
        np.linalg.cholesky(before.error).astype(np.float32),
        np.ones((QUERIES, STEPS), np.float32),
        Dependence(np.arange(QUERIES), LOADINGS.astype(np.float32), own_sd(LOADINGS)),
        key,
        np.float32(1e6),
        draws=DRAWS,
        knots=2,
        parts=1,
    )
    return [np.moveaxis(np.asarray(one, float), 0, -1) for one in drawn]


def same_moments(drawn, mean, covariance):
    drawn, variance = drawn.reshape(len(drawn), -1), np.diag(covariance).clip(0.0)
    se = np.sqrt(variance / len(drawn))
    np.testing.assert_array_less(np.abs(drawn.mean(axis=0) - mean), FALSE_ALARM * se + 1e-5)
    products = np.sqrt((np.outer(variance, variance) + covariance**2) / len(drawn))
    np.testing.assert_array_less(
        np.abs(np.cov(drawn, rowvar=False) - covariance), FALSE_ALARM * products + 1e-6
    )


@pytest.mark.optimized
def test_moved_draws_are_those_of_the_conditional_normal(key, before, value):
    mean, whole = draws_of(before, key)
    moves = Observed.of(before, value).moves(whole, EXACT)
    found = [drawn + move for drawn, move in zip((mean, whole), moves, strict=True)]
    for drawn, truth in zip(found, conditional(before, value), strict=True):
        same_moments(drawn, *truth)
    seen = np.isfinite(value)
    np.testing.assert_allclose(found[1][:, seen], np.tile(value[seen], (DRAWS, 1)), atol=1e-6)
    # A check that takes the draws before, or one that leaves their dependence out, refuses.
    alone = before._replace(correlation=np.eye(QUERIES))
    for wrong in (whole, whole + Observed.of(alone, value).moves(whole, EXACT)[1]):
        with pytest.raises(AssertionError):
            same_moments(wrong, *conditional(before, value)[1])


@pytest.mark.optimized
def test_less_trust_is_less_covariance_with_what_was_observed(rng, key, before, value):
    trust = np.where(np.isfinite(value), 1.0, rng.uniform(size=value.shape))
    mean, whole = draws_of(before, key)
    moves = Observed.of(before, value).moves(whole, trust)
    found = [drawn + move for drawn, move in zip((mean, whole), moves, strict=True)]
    truths = conditional(before, value, trust)
    for drawn, truth in zip(found, truths, strict=True):
        same_moments(drawn, *truth)
    # Variances are between those before and those of full trust.
    exact = np.diag(conditional(before, value)[1][1])
    assert (np.diag(truths[1][1]) > exact - 1e-9).all()
    assert (np.diag(truths[1][1]) < np.diag(joint(before)[1]) + 1e-9).all()
    moves = Observed.of(before, value).moves(whole, np.zeros(value.shape))
    assert np.abs(moves[0]).max() == np.abs(moves[1]).max() == 0.0


@pytest.mark.optimized
def test_who_depends_on_none_is_not_moved(key, before, value):
    _, whole = draws_of(before, key)
    mean, both = Observed.of(before, value).moves(whole, EXACT)
    assert np.abs(mean[..., 2]).max() == np.abs(both[..., 2]).max() == 0.0
    # Independent queries: what was not observed itself stays as wide as it was.
    alone = before._replace(correlation=np.eye(QUERIES))
    of_one = np.where(np.arange(QUERIES) == 0, value, np.nan)
    assert np.abs(Observed.of(alone, of_one).moves(whole, EXACT)[1][..., 1:]).max() == 0.0
    # The other run shares coefficients alone.
    mean, both = Observed.of(before, of_one).moves(whole, EXACT)
    np.testing.assert_array_equal(mean[:, 1], both[:, 1])
    assert np.abs(both[:, 1, :, 1]).max() > 0.1
    assert (np.abs(both - mean)[:, 0, :, :2].max(axis=(0, 1)) > 0.1).all()


@pytest.mark.parametrize("df", [3.0, 50.0])
def test_the_density_is_a_students(before, value, df):
    seen = np.isfinite(value).reshape(-1)
    whole = joint(before)[1][np.ix_(seen, seen)]
    expected = multivariate_t.logpdf(value.reshape(-1)[seen], shape=whole, df=df)
    assert Observed.of(before, value).log_density(df) == pytest.approx(expected)
