"""Leave-one-run-out from one inverse against refitting without each run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bayes_simfluence.inference.leave_out import evidence_score, left_out, left_out_score
from bayes_simfluence.linalg import double_precision

RUNS, ROWS, QUERY = 4, 3, 2
POINTS = RUNS * ROWS
CONSTANT = -0.5 * (np.log(2 * np.pi) + 1)
"""What the scores leave out of a normal log density per point at its best scale."""


def covariance(rng):
    root = rng.normal(size=(POINTS, POINTS))
    return root @ root.T + 0.3 * np.eye(POINTS)


def refitted(whole, change):
    """Error and its covariance of each run, by conditioning on all the others."""
    errors, covariances = [], []
    for run in range(RUNS):
        mine = np.arange(run * ROWS, (run + 1) * ROWS)
        rest = np.setdiff1d(np.arange(POINTS), mine)
        across = whole[np.ix_(mine, rest)] @ np.linalg.inv(whole[np.ix_(rest, rest)])
        errors.append(change[run] - across @ np.delete(change, run, axis=0).reshape(-1, QUERY))
        covariances.append(whole[np.ix_(mine, mine)] - across @ whole[np.ix_(rest, mine)])
    return np.stack(errors), np.stack(covariances)


def evaluated(function, whole, change):
    with double_precision():
        found = jax.jit(function)(jnp.asarray(whole), jnp.asarray(change))
        return jax.tree.map(np.asarray, found)


def test_left_out_runs_are_those_of_fits_without_them(rng):
    whole, change = covariance(rng), rng.normal(size=(RUNS, ROWS, QUERY))
    errors, covariances = refitted(whole, change)
    found = evaluated(left_out, whole, change)
    np.testing.assert_allclose(found.error, errors, rtol=1e-8)
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    np.testing.assert_allclose(found.variance, variances, rtol=1e-8)


def by_density(errors, covariances):
    """Mean log density per point at each query's best scale, of independent blocks."""
    densities = []
    for query in range(QUERY):
        blocks = list(zip(errors[..., query], covariances, strict=True))
        squares = [one @ np.linalg.solve(block, one) for one, block in blocks]
        scale = sum(squares) / POINTS
        logs = [multivariate_normal.logpdf(one, cov=scale * block) for one, block in blocks]
        densities.append(sum(logs) / POINTS)
    return np.mean(densities)


def test_the_score_is_the_joint_density_of_left_out_runs(rng):
    change = rng.normal(size=(RUNS, ROWS, QUERY))
    for _ in range(2):
        whole = covariance(rng)
        expected = by_density(*refitted(whole, change)) - CONSTANT
        np.testing.assert_allclose(evaluated(left_out_score, whole, change), expected, rtol=1e-7)


def test_the_evidence_is_the_joint_density_of_all_runs(rng):
    change = rng.normal(size=(RUNS, ROWS, QUERY))
    for _ in range(2):
        whole = covariance(rng)
        flat = change.reshape(1, POINTS, QUERY)
        expected = by_density(flat, whole[None]) - CONSTANT
        np.testing.assert_allclose(evaluated(evidence_score, whole, change), expected, rtol=1e-7)


@pytest.mark.parametrize("score", [left_out_score, evidence_score])
def test_scores_know_no_unit_and_a_still_query_is_finite(rng, score):
    whole, change = covariance(rng), rng.normal(size=(RUNS, ROWS, QUERY))
    found = evaluated(score, whole, change)
    np.testing.assert_allclose(evaluated(score, 100 * whole, change), found, rtol=1e-8)
    change[..., 1] = 0.0
    assert np.isfinite(evaluated(score, whole, change))
