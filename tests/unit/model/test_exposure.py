"""Smoothed exposure against the optimizer's own recurrence."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.exposure import FLOOR, Exposure

STEPS = 12


def first_moment(pushes, momentum, factors):
    """Adam's bias-corrected first moment, then the step's factor (Kingma & Ba, algorithm 1)."""
    moment, found = 0.0, []
    for step, (push, factor) in enumerate(zip(pushes, factors, strict=True), start=1):
        moment = momentum * moment + (1.0 - momentum) * push
        found.append(factor * moment / (1.0 - momentum**step))
    return np.array(found)


@pytest.mark.parametrize("inferred", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("power", [0.0, 1.0, 0.3])
def test_weights_are_those_of_adam(rng, momentum, power, inferred):
    step_size, pushes = np.linspace(1.0, 0.0, STEPS), rng.normal(size=STEPS)
    part = Exposure() if inferred else Exposure(momentum=momentum, step_size_power=power)
    with double_precision():
        # A setting that is fixed wins over a value of that name.
        given = (momentum, power) if inferred else (0.77, 0.77)
        values = {
            "momentum": jnp.asarray(given[0]),
            "step_size_power": jnp.asarray(given[1]),
        }
        weights = np.asarray(part.weights(values, jnp.asarray(step_size)))
    expected = first_moment(pushes, momentum, (step_size + FLOOR) ** power)
    np.testing.assert_allclose(weights @ pushes, expected, rtol=1e-10, atol=1e-12)


def test_without_memory_or_step_size_every_batch_acts_once():
    weights = Exposure(0.0, 0.0).weights({}, jnp.linspace(1.0, 0.1, STEPS))
    np.testing.assert_array_equal(weights, np.eye(STEPS))


def test_only_what_is_not_given_is_inferred():
    assert set(Exposure().hypers()) == {"momentum", "step_size_power"}
    assert set(Exposure(momentum=0.9).hypers()) == {"step_size_power"}
    assert set(Exposure(step_size_power=0.0).hypers()) == {"momentum"}
    assert Exposure(0.0, 0.0).hypers() == {}


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_momentum_is_a_share(momentum):
    with pytest.raises(Misuse, match=r"Exposure\(momentum=...\).*number in \[0, 1\)"):
        Exposure(momentum=momentum)


SHARES = {"lag_1": 0.5, "lag_2": 0.2, "lag_3": 1.4}


@pytest.mark.parametrize("order", [1, 2, 4, 20])
@pytest.mark.parametrize("power", [0.0, 0.7])
def test_a_memory_of_some_steps_is_a_weighted_mean(order, power):
    step_size = np.linspace(1.0, 0.2, STEPS)
    part = Exposure(step_size_power=power, order=order)
    given = {f"lag_{lag}": SHARES.get(f"lag_{lag}", 0.1 * lag) for lag in range(1, order)}
    with double_precision():
        values = {name: jnp.asarray(float(one)) for name, one in given.items()}
        weights = np.asarray(part.weights(values, jnp.asarray(step_size)))
    expected = np.zeros((STEPS, STEPS))
    for step in range(STEPS):
        share = {
            step - lag: 1.0 if lag == 0 else given[f"lag_{lag}"]
            for lag in range(order)
            if step >= lag
        }
        for source, one in share.items():
            expected[step, source] = one / sum(share.values())
    if power == 0:
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    expected *= (step_size[:, None] + FLOOR) ** power if power else 1.0
    np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-14)


def test_shares_of_lags_are_inferred_in_place_of_momentum():
    assert set(Exposure(order=3).hypers()) == {"lag_1", "lag_2", "step_size_power"}
    assert set(Exposure(order=1, step_size_power=0.0).hypers()) == set()
    assert Exposure(order=1).is_memoryless
    assert Exposure.memoryless().is_memoryless
    assert not Exposure(order=2).is_memoryless
    assert not Exposure().is_memoryless


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"order": 0}, r"Exposure\(order=...\).*got 0.*integer >= 1"),
        ({"order": 2, "momentum": 0.5}, r"got momentum=0.5 and order=2.*one of them.*leave one"),
        ({"step_size_power": float("nan")}, r"step_size_power=.*got nan.*finite"),
    ],
)
def test_memories_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        Exposure(**settings)
