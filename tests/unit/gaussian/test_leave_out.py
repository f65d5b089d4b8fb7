"""Leave-one-run-out from one inverse against refitting without each run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bayes_simfluence.gaussian.leave_out import evidence_score, left_out, left_out_score
from scipy.stats import multivariate_normal

from bayes_simfluence.linalg import double_precision

RUNS, ROWS, QUERY = 4, 3, 2
POINTS = RUNS * ROWS
KNOWN = {
    "everything": np.ones((RUNS, ROWS), bool),
    "unlike": np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 0]], bool),
    "alike": np.tile(np.array([True, False, True]), (RUNS, 1)),
}
"""Which points were recorded."""
CONSTANT = -0.5 * (np.log(2 * np.pi) + 1)
"""What the scores leave out of a normal log density per point at its best scale."""


def covariance(rng):
    root = rng.normal(size=(POINTS, POINTS))
    return root @ root.T + 0.3 * np.eye(POINTS)


def refitted(whole, change, known):
    """Error and its covariance of each run's recorded points, by conditioning on all others."""
    errors, covariances = [], []
    points, flat = np.arange(POINTS).reshape(RUNS, ROWS), change.reshape(POINTS, QUERY)
    for run in range(RUNS):
        mine = points[run][known[run]]
        rest = np.setdiff1d(points[known], mine)
        across = whole[np.ix_(mine, rest)] @ np.linalg.inv(whole[np.ix_(rest, rest)])
        errors.append(flat[mine] - across @ flat[rest])
        covariances.append(whole[np.ix_(mine, mine)] - across @ whole[np.ix_(rest, mine)])
    return errors, covariances


def marginal(whole, change, known):
    """What the scores are given where only some points were recorded."""
    kept = known.ravel()
    return (
        np.where(kept[:, None] & kept[None, :], whole, np.eye(POINTS)),
        np.where(known[..., None], change, np.nan),
    )


def evaluated(function, whole, change):
    with double_precision():
        found = jax.jit(function)(jnp.asarray(whole), jnp.asarray(change))
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))
def test_left_out_runs_are_those_of_fits_without_them(rng, known):
    whole, change = covariance(rng), rng.normal(size=(RUNS, ROWS, QUERY))
    errors, covariances = refitted(whole, change, known)
    found = evaluated(left_out, *marginal(whole, change, known))
    for run in range(RUNS):
        np.testing.assert_allclose(found.error[run, known[run]], errors[run], rtol=1e-8)
        variance = found.variance[run, known[run]]
        np.testing.assert_allclose(variance, np.diag(covariances[run]), rtol=1e-8)
    np.testing.assert_array_equal(found.error[~known], 0.0)
    np.testing.assert_allclose(found.variance[~known], 1.0)


def by_density(errors, covariances):
    """Mean log density per point at each query's best scale, of independent blocks."""
    densities, points = [], sum(len(one) for one in errors)
    for query in range(QUERY):
        blocks = [(one[:, query], block) for one, block in zip(errors, covariances, strict=True)]
        squares = [one @ np.linalg.solve(block, one) for one, block in blocks]
        scale = sum(squares) / points
        logs = [multivariate_normal.logpdf(one, cov=scale * block) for one, block in blocks]
        densities.append(sum(logs) / points)
    return np.mean(densities)


@pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))
def test_the_score_is_the_joint_density_of_left_out_runs(rng, known):
    change = rng.normal(size=(RUNS, ROWS, QUERY))
    for _ in range(2):
        whole = covariance(rng)
        expected = by_density(*refitted(whole, change, known)) - CONSTANT
        found = evaluated(left_out_score, *marginal(whole, change, known))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))
def test_the_evidence_is_the_joint_density_of_all_runs(rng, known):
    change = rng.normal(size=(RUNS, ROWS, QUERY))
    for _ in range(2):
        whole, kept = covariance(rng), known.ravel()
        expected = by_density([change[known]], [whole[np.ix_(kept, kept)]]) - CONSTANT
        found = evaluated(evidence_score, *marginal(whole, change, known))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("score", [left_out_score, evidence_score])
def test_scores_know_no_unit_and_a_still_query_is_finite(rng, score):
    whole, change = covariance(rng), rng.normal(size=(RUNS, ROWS, QUERY))
    found = evaluated(score, whole, change)
    np.testing.assert_allclose(evaluated(score, 100 * whole, change), found, rtol=1e-8)
    change[..., 1] = 0.0
    assert np.isfinite(evaluated(score, whole, change))
