"""Trust in what was observed: full where the model is right, less where it is not, and where."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian
from bayes_simfluence.gaussian.nested import GROUPS, Apart, groups_apart
from bayes_simfluence.gaussian.observed import Deviations
from bayes_simfluence.gaussian.queries import Shares, correlation
from bayes_simfluence.gaussian.trust import FACTORS, Trust, learned_trust
from bayes_simfluence.linalg import double_precision

RUNS, ROWS, QUERIES = 40, 6, 8
PROGRESS = np.arange(1, ROWS + 1) / ROWS
COMMON = correlation(np.full((QUERIES, 1), 0.95))
NO_FEATURES = np.zeros((QUERIES, 0))
WHOLE = np.ones((RUNS, ROWS), bool)


def smooth(length):
    apart = np.abs(PROGRESS[:, None] - PROGRESS[None, :])
    return np.exp(-0.5 * np.square(apart / length)) + 1e-6 * np.eye(ROWS)


def drawn(rng, of_queries, length=1.0, runs=RUNS):
    roots = np.linalg.cholesky(smooth(length)), np.linalg.cholesky(of_queries)
    return roots[0] @ rng.normal(size=(runs, ROWS, QUERIES)) @ roots[1].T


def learned(rng, of_queries=COMMON, length=1.0):
    """From errors of such queries and times; the others say one factor, and the model length 1."""
    others = np.arange(RUNS)
    group = Apart(
        runs=others,
        error=drawn(rng, of_queries, length),
        covariance=np.repeat(smooth(1.0)[None], RUNS, axis=0),
        others=others,
        z=drawn(rng, COMMON),
    )
    even = np.ones(ROWS)
    return learned_trust([group], Shares(0.95, 0.0), WHOLE, NO_FEATURES, even, PROGRESS)


def test_a_right_model_is_trusted(rng):
    trust = learned(rng)
    assert trust.queries <= 1.5
    assert trust.times <= 1.2


def test_queries_that_go_together_less_than_learned(rng):
    trust = learned(rng, correlation(np.full((QUERIES, 1), 0.8)))
    assert trust.queries >= 2.7
    assert trust.times <= 1.2
    assert learned(rng, np.eye(QUERIES)).queries > trust.queries


def test_times_that_go_together_less_than_the_model_says(rng):
    trust = learned(rng, length=0.7)
    assert trust.times >= 2.7
    assert trust.queries <= 1.5
    assert learned(rng, length=0.1).times > trust.times


def test_means_alone_can_lose_trust(rng):
    """Half of the queries have a factor of their own: of single ones little is lost."""
    loadings = np.stack([np.full(QUERIES, 0.9), np.repeat([0.35, -0.35], QUERIES // 2)], axis=1)
    assert learned(rng, correlation(loadings)).queries >= 1.5


@pytest.mark.parametrize("known", [0, 1])
def test_without_two_times_nothing_is_learned_of_times(rng, known):
    seen = np.zeros((3, ROWS), bool)
    seen[:, :known] = True
    gaussian = LinearGaussian(
        jnp.asarray(rng.normal(size=(3, ROWS, 2))), jnp.eye(ROWS), jnp.asarray(seen)
    )
    with double_precision():
        left_out = gaussian.left_out(jnp.asarray(rng.normal(size=(3, ROWS, 2))))
    groups = groups_apart(left_out, seen)
    trust = learned_trust(groups, None, seen, np.zeros((2, 0)), np.ones(ROWS), PROGRESS)
    assert trust.times == 1.0
    assert known or trust.queries == 1.0


def test_where_it_falls():
    """By the definition: little variance becomes as many times as much, all stays as it was."""
    known = np.zeros((2, ROWS, QUERIES), bool)
    known[0, [0, 3], 1], known[0, 5, 2] = True, True
    # No weights: what goes together are a run's errors.
    nothing = LinearGaussian(jnp.zeros((1, 1, 1)), jnp.eye(1), jnp.ones((1, 1), bool))
    weights = nothing.condition(jnp.zeros((1, 1, 1)))
    loadings = np.full((QUERIES, 1), 0.8)
    loadings[0] = 0.0
    before = Deviations(weights, np.zeros((2, ROWS, 1)), smooth(0.3), correlation(loadings))
    trust = Trust(3.0, 5.0)
    at = trust.at(before, known)
    assert (at[known] == 1.0).all()

    def left(covariance, seen, at):
        across = covariance[np.ix_(seen, [at])]
        inside = np.linalg.inv(covariance[np.ix_(seen, seen)])
        return 1.0 - (across.T @ inside @ across).item() / covariance[at, at]

    def squared(factor, share):
        # rho^2 (1 - share) is what is lost of the variance; what is left is then:
        kept = 1.0 / (1.0 + (factor - 1.0) * share)
        after = 1.0 - kept * (1.0 - share)
        assert after == pytest.approx(factor * share / (1.0 + (factor - 1.0) * share))
        return kept

    of_other = squared(3.0, left(before.correlation, [1, 2], 4))
    by_any = squared(5.0, left(smooth(0.3), [0, 3, 5], 4))
    assert at[0, 4, 4] == pytest.approx(np.sqrt(of_other * by_any), abs=1e-6)
    # A query is known from its own times, or from all that were observed of others.
    own = squared(5.0, left(smooth(0.3), [5], 2))
    by_others = squared(5.0, left(smooth(0.3), [0, 3, 5], 2))
    assert at[0, 2, 2] == pytest.approx(np.sqrt(max(own, by_others)), abs=1e-6)
    # One that goes with no other, and a run of which nothing is known, are trusted least.
    assert at[0, 0, 0] == pytest.approx(np.sqrt(1.0 / 3.0), abs=1e-6)
    np.testing.assert_allclose(at[1, :, [1, 2]], np.sqrt(1.0 / 5.0), atol=1e-6)
    np.testing.assert_allclose(at[1, :, 0], np.sqrt(1.0 / 15.0), atol=1e-6)
    np.testing.assert_array_equal(Trust().at(before, known), 1.0)


def test_factors_begin_with_full_trust():
    assert FACTORS[0] == 1.0 and (np.diff(FACTORS) > 0).all()


@pytest.mark.parametrize("runs", [5, GROUPS + 3])
def test_groups_apart_are_those_of_fits_without_them(rng, runs):
    """Predictions of the group from all others, and of these from one another, by plain algebra."""
    rows, queries = 2, 3
    known = rng.uniform(size=(runs, rows)) > 0.2
    known[:, 0] = True
    root = rng.normal(size=(rows, rows))
    designs = rng.normal(size=(runs, rows, 4))
    change = rng.normal(size=(runs, rows, queries)) * known[..., None]
    moved = rng.normal(size=change.shape) * known[..., None]
    with double_precision():
        gaussian = LinearGaussian(
            jnp.asarray(designs), jnp.asarray(root @ root.T + np.eye(rows)), jnp.asarray(known)
        )
        whole = np.asarray(gaussian.covariance()).reshape(runs, rows, runs, rows)
        left_out = gaussian.left_out(jnp.asarray(change))

    def predicted(run, used):
        """Error and covariance of a run's prediction from others."""
        inside = whole[used][:, :, used].reshape(len(used) * rows, -1)
        across = whole[run][:, used].reshape(rows, -1)
        gain = across @ np.linalg.inv(inside)
        error = change[run] - gain @ change[used].reshape(-1, queries)
        return error + moved[run], whole[run, :, run] - gain @ across.T

    met = []
    for group in groups_apart(left_out, known, moved):
        met.extend(group.runs)
        z = np.zeros(group.z.shape)
        for at, run in enumerate(group.others):
            error, covariance = predicted(run, group.others[group.others != run])
            z[at] = error / np.sqrt(np.diagonal(covariance))[:, None] * known[run][:, None]
        scale = np.sqrt(np.square(z).sum(axis=(0, 1)) / known[group.others].sum())
        np.testing.assert_allclose(group.z, z / scale, rtol=1e-6, atol=1e-9)
        for at, run in enumerate(group.runs):
            error, covariance = predicted(run, group.others)
            np.testing.assert_allclose(group.error[at], error / scale, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(group.covariance[at], covariance, rtol=1e-6, atol=1e-9)
    assert sorted(met) == list(range(runs))
