"""Recurrences against plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.recurrence import accumulation, affine_trajectory

NUMBER = st.floats(-2.0, 2.0, allow_subnormal=False)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=7, max_size=7), NUMBER)
def test_an_affine_trajectory_is_the_plain_loop(steps, initial):
    expected = [initial]
    for alpha, beta in steps:
        expected.append(alpha * expected[-1] + beta)
    with double_precision():
        alpha, beta = (jnp.asarray(column) for column in zip(*steps, strict=True))
        losses = np.asarray(affine_trajectory(alpha, beta, jnp.asarray(initial)))
    np.testing.assert_allclose(losses, expected, rtol=1e-10, atol=1e-10)


def test_a_trajectory_of_one_step_and_a_long_one():
    short = affine_trajectory(jnp.array([3.0]), jnp.array([1.0]), jnp.array(2.0))
    assert short.tolist() == [2.0, 7.0]
    halved = affine_trajectory(jnp.full(31, 0.5), jnp.ones(31), jnp.array(0.0))
    np.testing.assert_allclose(halved[-1], 2.0, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1.3, -7.0])
@pytest.mark.parametrize("steps", [1, 9, 80])
def test_accumulation_is_the_plain_recurrence(rng, rate, steps):
    progress = np.arange(1, steps + 1) / 60
    pushes, total, expected = rng.normal(size=steps), 0.0, []
    for push in pushes:
        total = np.exp(rate / 60) * total + push
        expected.append(total)
    with double_precision():
        matrix = accumulation(jnp.asarray(rate), jnp.asarray(progress))
        totals = np.asarray(matrix) @ pushes
    np.testing.assert_allclose(totals, expected, rtol=1e-10, atol=1e-12)


def test_single_precision_loses_no_step():
    matrix = accumulation(jnp.asarray(0.0), jnp.arange(1, 401) / 400)
    np.testing.assert_array_equal(matrix, np.tri(400))
