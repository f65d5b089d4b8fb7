"""Dependence of queries: learned from left-out errors, carried to others, drawn as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.gaussian.draws import (
    Dependence,
    common_sources,
    drawn_trajectories,
    drawn_weights,
)
from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian
from bayes_simfluence.gaussian.queries import (
    OWN,
    RANK,
    RIDGE,
    _log_density,
    carried_loadings,
    carried_weights,
    own_sd,
    query_loadings,
)

RUNS, ROWS, QUERIES = 30, 6, 12
KNOWN = np.ones((RUNS, ROWS), bool)
CLASS = np.repeat([1.0, -1.0], QUERIES // 2)


def correlation(loadings):
    return loadings @ loadings.T + np.diag(own_sd(loadings) ** 2)


def by_class(rng, share):
    """Standardized errors of which ``share`` is common to a class, against the other one."""
    common = rng.normal(size=(RUNS, ROWS, 1)) * CLASS
    own = rng.normal(size=(RUNS, ROWS, QUERIES))
    return np.sqrt(share) * common + np.sqrt(1 - share) * own


def test_what_queries_have_in_common_is_found(rng):
    learned = correlation(query_loadings(by_class(rng, 0.6), KNOWN, np.zeros((QUERIES, 0))))
    truth = 0.6 * np.outer(CLASS, CLASS) + 0.4 * np.eye(QUERIES)
    # 180 points: a correlation of .6 is known to about .05; the worst of 66 pairs within 4 of it.
    assert np.abs(learned - truth).max() < 0.2
    assert np.abs(np.eye(QUERIES) - truth).max() > 0.2


def test_independent_queries_stay_so(rng):
    loadings = query_loadings(by_class(rng, 0.0), KNOWN, np.zeros((QUERIES, 0)))
    assert np.abs(correlation(loadings) - np.eye(QUERIES)).max() < 0.15


def test_few_runs_go_by_features(rng):
    """One row each of three runs says little of pairs of queries; their features tell the class."""
    features, known = CLASS[:, None] * np.array([[1.0, 0.5]]), KNOWN[:3, :1]
    classes, off = np.outer(CLASS, CLASS), ~np.eye(QUERIES, dtype=bool)
    alike = correlation(query_loadings(by_class(rng, 0.9)[:3, :1], known, features))
    assert (alike * classes)[off].min() > 0.2
    misses = []
    for _ in range(20):
        z = by_class(rng, 0.5)[:3, :1]
        for told in (features, features[:, :0]):
            learned = correlation(query_loadings(z, known, told))
            misses.append(np.abs(learned - 0.5 * classes)[off].mean())
    assert sum(misses[::2]) < 0.8 * sum(misses[1::2])


def test_missing_runs_and_few_queries(rng):
    z = by_class(rng, 0.6)
    half = np.where(np.arange(RUNS)[:, None] < 15, KNOWN, False)
    z[15:] = np.nan
    assert np.isfinite(query_loadings(z, half, np.zeros((QUERIES, 0)))).all()
    assert query_loadings(z[:2], half[:2], np.zeros((QUERIES, 0))).shape == (QUERIES, 0)
    assert query_loadings(z[:15, :, :1], half[:15], np.zeros((1, 0))).shape == (1, 0)


def test_a_correlation_has_unit_variances_and_few_factors(rng):
    many = rng.normal(size=(RUNS, ROWS, 40)) + rng.normal(size=(RUNS, ROWS, 1))
    loadings = query_loadings(many, KNOWN, rng.normal(size=(40, 5)))
    assert loadings.shape[1] <= RANK
    assert own_sd(loadings).min() ** 2 >= OWN - 1e-12
    np.testing.assert_allclose(np.diag(correlation(loadings)), 1.0)


def test_the_density_is_that_of_the_whole_matrix(rng):
    loadings = 0.5 * rng.uniform(-1, 1, (QUERIES, 3))
    z, whole = rng.normal(size=(7, QUERIES)), correlation(loadings)
    dense = -0.5 * np.trace(z @ np.linalg.solve(whole, z.T)) - 3.5 * np.linalg.slogdet(whole)[1]
    assert _log_density(z, loadings) == pytest.approx(dense)


def test_queries_that_were_not_recorded_follow_those_with_alike_features():
    features = np.eye(QUERIES)
    loadings = np.stack([0.8 * CLASS, np.zeros(QUERIES)], axis=1)
    new = carried_loadings(
        loadings, features, np.concatenate([2 * features, np.zeros((1, QUERIES))])
    )
    np.testing.assert_allclose(new[:-1], loadings / (1 + RIDGE))
    assert (new[-1] == 0).all()
    none = carried_loadings(loadings, features[:, :0], np.zeros((2, 0)))
    assert (none == 0).all()


@pytest.mark.optimized
def test_draws_have_the_correlation_and_each_query_its_own_variance(rng):
    designs = rng.normal(size=(3, 2, 4)).astype(np.float32)
    gaussian = LinearGaussian(jnp.asarray(designs), 0.3 * jnp.eye(2), jnp.ones((3, 2), bool))
    conditioned = gaussian.condition(jnp.zeros((3, 2, 3))).single()
    loadings = np.array([[0.9, 0.0], [0.7, 0.5], [0.0, 0.0]], np.float32)
    numbers = np.arange(3, dtype=np.int32)
    draws = 40_000
    mean, whole = drawn_trajectories(
        conditioned,
        designs[None],
        np.sqrt(0.3) * np.eye(2, dtype=np.float32),
        np.ones((3, 2), np.float32),
        Dependence(numbers, loadings, own_sd(loadings)),
        jax.random.key(0),
        np.float32(1e6),
        draws=draws,
        knots=2,
        parts=1,
    )
    precision = np.eye(4) + np.einsum("rtw,rtv->wv", designs, designs) / 0.3
    flat = designs.reshape(-1, 4)
    expected = flat @ np.linalg.solve(precision, flat.T)
    for drawn, over_points in ((mean, expected), (whole, expected + 0.3 * np.eye(6))):
        points = np.asarray(drawn).reshape(3, draws, 6)
        sample = np.einsum("qdp,kdr->qpkr", points, points) / draws
        truth = np.einsum("qk,pr->qpkr", correlation(loadings), over_points)
        # Five sd of a product's mean: less than one false alarm in 10,000 runs of this test.
        assert np.abs(sample - truth).max() < 5 * np.sqrt(2 / draws) * over_points.max()
        independent = np.einsum("qk,pr->qpkr", np.eye(3), over_points)
        assert np.abs(sample - independent).max() > 5 * np.sqrt(2 / draws) * over_points.max()


@pytest.mark.optimized
@pytest.mark.parametrize("own_scales", [False, True])
def test_scales_are_one_for_all_recorded_queries_and_each_new_ones_own(rng, own_scales):
    designs = rng.normal(size=(3, 2, 4)).astype(np.float32)
    gaussian = LinearGaussian(jnp.asarray(designs), 0.3 * jnp.eye(2), jnp.ones((3, 2), bool))
    conditioned = gaussian.condition(jnp.zeros((3, 2, 2))).single()
    sizes = {"draws": 4000, "knots": 2, "parts": 1}
    key, loadings = jax.random.key(0), np.zeros((2, 0), np.float32)
    common = common_sources(conditioned, key, factors=0, **sizes)
    scales = [
        drawn_weights(
            conditioned, common, Dependence(np.int32(at), loadings[at], np.float32(1.0)), key,
            np.float32(5.0), own_scales=own_scales, **sizes,
        ).scale
        for at in range(2)
    ]  # fmt: skip
    # Of 4000 independent pairs a correlation is known to 1.6%.
    assert np.corrcoef(np.log(scales))[0, 1] == pytest.approx(float(not own_scales), abs=0.08)


def test_weights_follow_features_only_where_they_do():
    """Ten queries of three features: a drift along them is carried over, noise is not."""
    rng = np.random.default_rng(0)
    features, new = rng.normal(size=(10, 3)), rng.normal(size=(4, 3))
    slope, noise = rng.normal(size=(50, 3)), rng.normal(size=(50, 10))
    drift = slope @ features.T + 0.01 * noise
    np.testing.assert_allclose(carried_weights(drift, features, new), slope @ new.T, atol=0.1)
    mean = noise.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(carried_weights(noise, features, new), mean + np.zeros(4), atol=0.2)
    nothing = carried_weights(noise, np.zeros((10, 0)), np.zeros((4, 0)))
    np.testing.assert_allclose(nothing, np.repeat(mean, 4, axis=1))
