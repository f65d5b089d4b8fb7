"""Coefficients over training: interpolation, prior covariance, and knots beyond the end."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.coefficients import JITTER, Varying

VALUES = {"staying_constant_share": 0.3, "staying_length": 0.4}


def values():
    return {name: jnp.asarray(value) for name, value in VALUES.items()}


@pytest.mark.parametrize(
    ("knots", "reach", "count"),
    [(6, 1.0, 6), (6, 0.5, 6), (6, 1.2, 7), (6, 1.21, 8), (6, 2.0, 11), (2, 1.5, 3), (1, 3.0, 1)],
)
def test_knots_cover_the_reach(knots, reach, count):
    assert Varying(knots).count(reach) == count


@pytest.mark.parametrize("knots", [1, 2, 5])
@pytest.mark.parametrize("reach", [1.0, 1.5])
def test_interpolation_is_straight_lines_between_knots(rng, knots, reach):
    part, progress = Varying(knots), np.arange(1, int(20 * reach) + 1) / 20
    count = part.count(reach)
    with double_precision():
        weights = np.asarray(part.interpolation(jnp.asarray(progress), count))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    heights = rng.normal(size=count)
    at = np.arange(count) / max(knots - 1, 1)
    expected = np.interp(progress, at, heights) if knots > 1 else np.full(len(progress), heights[0])
    np.testing.assert_allclose(weights @ heights, expected, rtol=1e-10, atol=1e-12)


def test_the_root_is_that_of_the_stated_covariance():
    share, length = VALUES["staying_constant_share"], VALUES["staying_length"]
    at = np.arange(8) / 5
    distance = at[:, None] - at[None]
    expected = share + (1 - share) * np.exp(-(distance**2) / (2 * length**2))
    with double_precision():
        root = np.asarray(Varying(6).root(values(), "staying", 8))
        shorter = np.asarray(Varying(6).root(values(), "staying", 6))
    np.testing.assert_allclose(root @ root.T, expected + JITTER * np.eye(8), atol=1e-12)
    np.testing.assert_array_equal(root, np.tril(root))
    np.testing.assert_allclose(root[:6, :6], shorter, atol=1e-12)


def test_one_knot_is_a_constant():
    assert Varying(1).hypers("staying") == {}
    np.testing.assert_array_equal(Varying(1).root({}, "staying", 1), [[1.0]])
    assert set(Varying(2).hypers("fading")) == {"fading_constant_share", "fading_length"}


@pytest.mark.parametrize("knots", [0, -1])
def test_knots_are_counted(knots):
    with pytest.raises(Misuse, match=r"Varying\(knots=...\).*integer >= 1"):
        Varying(knots)
