"""The linear-Gaussian object from one inverse against conditioning as textbooks write it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bayes_simfluence.gaussian import dense
from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian
from bayes_simfluence.linalg import double_precision

RUNS, ROWS, QUERY, WEIGHTS = 4, 3, 2, 5
POINTS = RUNS * ROWS
KNOWN = {
    "everything": np.ones((RUNS, ROWS), bool),
    "unlike": np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 0]], bool),
    "alike": np.tile(np.array([True, False, True]), (RUNS, 1)),
}
"""Which points were recorded."""
CONSTANT = -0.5 * (np.log(2 * np.pi) + 1)
"""What the scores leave out of a normal log density per point at its best scale."""


def joint_score(gaussian, change):
    return gaussian.left_out_scores(change).joint


def marginal_score(gaussian, change):
    return gaussian.left_out_scores(change).marginal


SCORES = (joint_score, marginal_score, LinearGaussian.evidence_score)


def drawn(rng, known=KNOWN["everything"], scale=1.0):
    """An object with random parts, the parts, and changes that are NaN where unknown."""
    designs = scale * rng.normal(size=(RUNS, ROWS, WEIGHTS))
    root = scale * rng.normal(size=(ROWS, ROWS))
    error = root @ root.T + 0.3 * scale**2 * np.eye(ROWS)
    change = rng.normal(size=(RUNS, ROWS, QUERY))
    change[~known] = np.nan
    with double_precision():
        arrays = (jnp.asarray(array) for array in (designs, error, known))
        return LinearGaussian(*arrays), (designs, error), jnp.asarray(change)


def covariance(designs, error):
    """Of all points, recorded or not, entry by entry."""
    whole = np.zeros((POINTS, POINTS))
    for i in range(POINTS):
        for j in range(POINTS):
            (run, row), (other, column) = divmod(i, ROWS), divmod(j, ROWS)
            whole[i, j] = designs[run, row] @ designs[other, column]
            whole[i, j] += error[row, column] if run == other else 0.0
    return whole


def refitted(whole, change, known):
    """Error and its covariance of each run's recorded points, by conditioning on all others."""
    errors, covariances = [], []
    points, flat = np.arange(POINTS).reshape(RUNS, ROWS), np.asarray(change).reshape(POINTS, QUERY)
    for run in range(RUNS):
        own = points[run][known[run]]
        rest = np.setdiff1d(points[known], own)
        across = whole[np.ix_(own, rest)] @ np.linalg.inv(whole[np.ix_(rest, rest)])
        errors.append(flat[own] - across @ flat[rest])
        covariances.append(whole[np.ix_(own, own)] - across @ whole[np.ix_(rest, own)])
    return errors, covariances


def evaluated(method, gaussian, *arguments):
    with double_precision():
        return jax.tree.map(np.asarray, jax.jit(method)(gaussian, *arguments))


def close(found, expected, rtol=1e-8):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


masks = pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))


@masks
def test_the_covariance_is_that_of_the_recorded_points(rng, known):
    gaussian, parts, _ = drawn(rng, known)
    found, kept = evaluated(LinearGaussian.covariance, gaussian), known.ravel()
    close(found[np.ix_(kept, kept)], covariance(*parts)[np.ix_(kept, kept)])
    # What was not recorded is independent of all other points.
    np.testing.assert_array_equal(found[~kept], np.eye(POINTS)[~kept])
    np.testing.assert_array_equal(found[:, ~kept], np.eye(POINTS)[:, ~kept])


@masks
def test_weights_are_those_of_bayesian_regression(rng, known):
    """In the form of Bishop (2006), eq. 3.53: by the weights' precision, not the points'."""
    gaussian, (designs, error), change = drawn(rng, known)
    precision, pulled = np.eye(WEIGHTS), np.zeros((WEIGHTS, QUERY))
    for run in range(RUNS):
        rows = np.flatnonzero(known[run])
        weight = designs[run, rows].T @ np.linalg.inv(error[np.ix_(rows, rows)])
        precision += weight @ designs[run, rows]
        pulled += weight @ np.asarray(change)[run, rows]
    found = evaluated(LinearGaussian.condition, gaussian, change)
    close(found.mean, np.linalg.solve(precision, pulled))
    left = np.eye(WEIGHTS) - found.gain.T @ found.designs
    close(left, np.linalg.inv(precision))
    close(found.error_factor @ found.error_factor.T, error)
    np.testing.assert_array_equal(found.designs[~known.ravel()], 0.0)


@masks
def test_deviations_are_a_map_of_the_prior_onto_the_posterior(rng, known):
    """Of independent standard normal inputs; its square is the posterior covariance, exactly."""
    gaussian, parts, change = drawn(rng, known)
    conditioned = evaluated(LinearGaussian.condition, gaussian, change)
    inputs = np.eye(WEIGHTS + POINTS)
    with double_precision():
        weights, errors = jnp.asarray(inputs[:, :WEIGHTS]), jnp.asarray(inputs[:, WEIGHTS:])
        errors = errors.reshape(-1, RUNS, ROWS)
        maps = np.asarray(conditioned.deviations(weights, errors))
    whole, kept = covariance(*parts), known.ravel()
    flat = parts[0].reshape(POINTS, WEIGHTS)[kept]
    across = flat.T @ np.linalg.inv(whole[np.ix_(kept, kept)])
    close(maps.T @ maps, np.eye(WEIGHTS) - across @ flat)
    single = conditioned.single()
    assert {array.dtype for array in single} == {np.dtype(np.float32)}


@masks
def test_left_out_runs_are_those_of_fits_without_them(rng, known):
    gaussian, parts, change = drawn(rng, known)
    errors, covariances = refitted(covariance(*parts), change, known)
    found = evaluated(LinearGaussian.left_out, gaussian, change)
    for run in range(RUNS):
        np.testing.assert_allclose(found.error[run, known[run]], errors[run], rtol=1e-8)
        variance = found.variance[run, known[run]]
        np.testing.assert_allclose(variance, np.diag(covariances[run]), rtol=1e-8)
    np.testing.assert_array_equal(found.error[~known], 0.0)
    np.testing.assert_allclose(found.variance[~known], 1.0)


def by_density(errors, covariances):
    """Mean log density per point at each query's best scale, of independent blocks."""
    densities, points = [], sum(len(error) for error in errors)
    for query in range(QUERY):
        blocks = [
            (error[:, query], block) for error, block in zip(errors, covariances, strict=True)
        ]
        squares = [error @ np.linalg.solve(block, error) for error, block in blocks]
        scale = sum(squares) / points
        logs = [multivariate_normal.logpdf(error, cov=scale * block) for error, block in blocks]
        densities.append(sum(logs) / points)
    return np.mean(densities)


@masks
def test_the_score_is_the_joint_density_of_left_out_runs(rng, known):
    for _ in range(2):
        gaussian, parts, change = drawn(rng, known)
        expected = by_density(*refitted(covariance(*parts), change, known)) - CONSTANT
        found = evaluated(joint_score, gaussian, change)
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@masks
def test_the_marginal_score_is_the_density_of_each_left_out_point(rng, known):
    for _ in range(2):
        gaussian, parts, change = drawn(rng, known)
        errors, covariances = refitted(covariance(*parts), change, known)
        points = [error[[at]] for error in errors for at in range(len(error))]
        variances = [block[[at]][:, [at]] for block in covariances for at in range(len(block))]
        found = evaluated(marginal_score, gaussian, change)
        np.testing.assert_allclose(found, by_density(points, variances) - CONSTANT, rtol=1e-7)


@masks
def test_the_evidence_is_the_joint_density_of_all_runs(rng, known):
    for _ in range(2):
        gaussian, parts, change = drawn(rng, known)
        kept = known.ravel()
        whole = covariance(*parts)[np.ix_(kept, kept)]
        expected = by_density([np.asarray(change)[known]], [whole]) - CONSTANT
        found = evaluated(LinearGaussian.evidence_score, gaussian, change)
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@masks
def test_the_log_density_is_scipys_at_given_scales(rng, known):
    gaussian, parts, change = drawn(rng, known)
    kept = known.ravel()
    whole, points = covariance(*parts)[np.ix_(kept, kept)], np.asarray(change)[known]
    scale = np.array([0.3, 2.0])
    expected = sum(
        multivariate_normal.logpdf(point, cov=sd**2 * whole)
        for point, sd in zip(points.T, scale, strict=True)
    )
    expected += 0.5 * points.size * np.log(2 * np.pi)
    with double_precision():
        scales = jnp.asarray(scale)
    found = evaluated(LinearGaussian.log_density, gaussian, change, scales)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("score", SCORES)
def test_scores_know_no_unit_and_a_still_query_is_finite(rng, score):
    seed = rng.integers(1 << 30)
    (gaussian, _, change), (larger, _, _) = (
        drawn(np.random.default_rng(seed), scale=scale) for scale in (1.0, 10.0)
    )
    found = evaluated(score, gaussian, change)
    np.testing.assert_allclose(evaluated(score, larger, change), found, rtol=1e-8)
    with double_precision():
        still = change.at[..., 1].set(0.0)
    assert np.isfinite(evaluated(score, gaussian, still))


@masks
def test_the_plain_reference_says_the_same(rng, known):
    gaussian, _, change = drawn(rng, known)
    mean, left = dense.posterior_of_weights(gaussian, change)
    conditioned = evaluated(LinearGaussian.condition, gaussian, change)
    close(conditioned.mean, mean)
    close(np.eye(WEIGHTS) - conditioned.gain.T @ conditioned.designs, left)
    left_out = evaluated(LinearGaussian.left_out, gaussian, change)
    for run in range(RUNS):
        missed, spread = dense.predictions_of_left_out(gaussian, change, run)
        np.testing.assert_allclose(left_out.error[run, known[run]], missed, rtol=1e-8)
        np.testing.assert_allclose(left_out.variance[run, known[run]], np.diag(spread), rtol=1e-8)
    score = evaluated(LinearGaussian.evidence_score, gaussian, change)
    np.testing.assert_allclose(
        score, dense.score_of_evidence(gaussian, change) - CONSTANT, rtol=1e-7
    )
