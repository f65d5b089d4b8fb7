"""The filter against a dense normal distribution of all losses that were seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.kalman import log_density

STEPS = 7


def recurrence(rng):
    return rng.uniform(0.5, 1.2, STEPS), rng.normal(size=STEPS), 1.3


def dense(alpha, beta, initial, process):
    """Mean and covariance of the losses, entry by entry."""
    mean, covariance = np.zeros(STEPS), np.zeros((STEPS, STEPS))
    for t in range(STEPS):
        mean[t] = alpha[t] * (mean[t - 1] if t else initial) + beta[t]
        for s in range(t):
            covariance[t, s] = covariance[s, t] = alpha[t] * covariance[t - 1, s]
        before = covariance[t - 1, t - 1] if t else 0.0
        covariance[t, t] = alpha[t] ** 2 * before + process
    return mean, covariance


def filtered(*arguments):
    with double_precision():
        return np.asarray(log_density(*(jnp.asarray(argument, float) for argument in arguments)))


@pytest.mark.parametrize("observation", [0.0, 0.4])
@pytest.mark.parametrize("lost", [(), (0,), (6,), (0, 1, 4), (2, 3, 5, 6), tuple(range(7))])
def test_the_filter_is_the_dense_normal(rng, lost, observation):
    alpha, beta, initial = recurrence(rng)
    mean, covariance = dense(alpha, beta, initial, 0.3)
    seen = rng.multivariate_normal(mean, covariance)
    seen[list(lost)] = np.nan
    density = filtered(alpha, beta, initial, seen, 0.3, observation)
    covariance = covariance + observation * np.eye(STEPS)
    known = [step for step in range(STEPS) if step not in lost]
    total = 0.0
    for count, step in enumerate(known, start=1):
        rows = known[:count]
        law = multivariate_normal(mean[rows], covariance[np.ix_(rows, rows)])
        now = law.logpdf(seen[rows])
        np.testing.assert_allclose(density[step], now - total, rtol=1e-8, atol=1e-10)
        total = now
    np.testing.assert_array_equal(density[list(lost)], 0.0)


@pytest.mark.parametrize("observation", [0.0, 0.4])
def test_derivatives_are_those_of_differences_where_losses_are_missing(rng, observation):
    alpha, beta, initial = recurrence(rng)
    seen = rng.normal(size=STEPS)
    seen[[0, 3, 4]] = np.nan
    values = (alpha, beta, initial, np.asarray(0.3), np.asarray(observation + 1e-3))

    def total(alpha, beta, initial, process, observation):
        return log_density(alpha, beta, initial, jnp.asarray(seen), process, observation).sum()

    with double_precision():
        arguments = tuple(map(jnp.asarray, map(np.asarray, values)))
        gradients = jax.grad(total, argnums=tuple(range(5)))(*arguments)
        for at, gradient in enumerate(gradients):
            direction = rng.normal(size=np.shape(values[at]))
            up, down = (
                float(
                    total(*arguments[:at], arguments[at] + sign * direction, *arguments[at + 1 :])
                )
                for sign in (1e-6, -1e-6)
            )
            slope = float((np.asarray(gradient) * direction).sum())
            np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-5, atol=1e-6)


def test_without_noise_of_observation_the_gradient_is_finite(rng):
    alpha, beta, initial = recurrence(rng)
    seen = rng.normal(size=STEPS)
    seen[2:4] = np.nan
    with double_precision():
        gradient = jax.grad(lambda x: log_density(*x[:3], jnp.asarray(seen), *x[3:]).sum())(
            tuple(jnp.asarray(value, float) for value in (alpha, beta, initial, 0.3, 0.0))
        )
    assert all(np.isfinite(np.asarray(part)).all() for part in gradient)
