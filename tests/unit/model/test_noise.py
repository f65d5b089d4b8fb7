"""The run's error against the covariance recurrence and against conditioning by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.noise import Smooth

VALUES = {
    "growth": 0.8,
    "drift": 0.3,
    "wobble": 0.7,
    "wobble_length": 0.2,
    "wobble_trend": -0.9,
}


def covariance(progress, **changes):
    with double_precision():
        values = {name: jnp.asarray(float(one)) for name, one in {**VALUES, **changes}.items()}
        return np.asarray(Smooth().covariance(values, jnp.asarray(progress)))


def walk_by_recurrence(steps, dt, growth, drift):
    """Covariance of ``w_t = exp(growth dt) w_{t-1} + drift sqrt(dt) xi_t``, entry by entry."""
    found = np.zeros((steps + 1, steps + 1))
    for t in range(1, steps + 1):
        for s in range(t):
            found[t, s] = found[s, t] = np.exp(growth * dt) * found[t - 1, s]
        found[t, t] = np.exp(2 * growth * dt) * found[t - 1, t - 1] + drift**2 * dt
    return found[1:, 1:]


def smooth_by_conditioning(progress, wobble, length, trend):
    """Matern-3/2 at time 0 and the steps, conditioned on zero at time 0."""
    at = np.concatenate([[0.0], progress])
    scaled = np.sqrt(3) * np.abs(at[:, None] - at[None]) / length
    joint = (1 + scaled) * np.exp(-scaled)
    after = joint[1:, 1:] - np.outer(joint[1:, 0], joint[0, 1:]) / joint[0, 0]
    sd = wobble * np.exp(trend * (progress - 0.5))
    return after * np.outer(sd, sd)


@pytest.mark.parametrize("growth", [0.0, 0.8, -0.5])
@pytest.mark.parametrize("steps", [10, 15])
def test_the_covariance_is_a_walk_plus_a_conditioned_curve(growth, steps):
    progress = np.arange(1, steps + 1) / 10
    expected = walk_by_recurrence(steps, 0.1, growth, VALUES["drift"]) + smooth_by_conditioning(
        progress, VALUES["wobble"], VALUES["wobble_length"], VALUES["wobble_trend"]
    )
    found = covariance(progress, growth=growth)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-14)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_a_run_starts_without_error():
    early = [np.diag(covariance(np.arange(1, 11) * dt))[0] for dt in (1e-2, 1e-4, 1e-6)]
    np.testing.assert_array_less(np.array(early), [0.1, 2e-5, 2e-7])
    assert (np.array(early) > 0).all()


def test_the_walk_has_its_sd_after_a_recorded_length():
    found = covariance(np.arange(1, 51) / 50, wobble=0.0, growth=0.0)
    np.testing.assert_allclose(np.diag(found)[-1], VALUES["drift"] ** 2, rtol=1e-10)


def test_longer_runs_begin_like_shorter_ones():
    short, long = covariance(np.arange(1, 11) / 10), covariance(np.arange(1, 16) / 10)
    np.testing.assert_allclose(long[:10, :10], short, rtol=1e-12)
