"""The Kalman filter: exact likelihood of losses seen through noise, or not at every time.

``L_t = alpha_t L_{t-1} + beta_t + N(0, process)`` starts from a known ``L_0`` and is seen as
``L_t + N(0, observation)``, or not at all (NaN). One run and one query; filtering is an associative
scan (Sarkka & Garcia-Fernandez 2021, arXiv 1905.13002, lemmas 7 and 8), so long runs take a
logarithmic number of sweeps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class _Element(NamedTuple):
    """What losses seen between steps ``s`` and ``t`` say of ``L_t`` given ``L_s``, and of ``L_s``.

    ``L_t`` is normal(``gain L_s + shift``, ``spread``); the likelihood of ``L_s`` is proportional
    to ``exp(pull L_s - weight L_s^2 / 2)``.
    """

    gain: Array
    shift: Array
    spread: Array
    pull: Array
    weight: Array


def log_density(
    alpha: Float[Array, " step"],
    beta: Float[Array, " step"],
    initial: Float[Array, ""],
    seen: Float[Array, " step"],
    process: Float[Array, ""],
    observation: Float[Array, ""],
) -> Float[Array, " step"]:
    """Log density of each seen loss given those before it; zero where none was seen.

    Args:
        alpha, beta: of the recurrence (unitless, nats).
        initial: the loss before the first update, known.
        seen: losses after each step, NaN = not recorded.
        process: variance of a step's error, above zero.
        observation: variance of a measurement's error, zero for none.

    >>> import jax.numpy as jnp
    >>> seen = jnp.array([jnp.nan, 2.0])
    >>> alpha, beta = jnp.ones(2), jnp.zeros(2)
    >>> density = log_density(alpha, beta, jnp.array(1.0), seen, jnp.array(0.5), jnp.array(0.0))
    >>> round(float(density[1]), 3)
    -1.419
    """
    elements = _elements(alpha, beta, initial, seen, process, observation)
    filtered = jax.lax.associative_scan(_combined, elements)
    mean = jnp.concatenate([initial[None], filtered.shift[:-1]])
    variance = jnp.concatenate([jnp.zeros(1), filtered.spread[:-1]])
    expected = alpha * mean + beta
    spread = jnp.square(alpha) * variance + process + observation
    known = jnp.isfinite(seen)
    error = jnp.where(known, seen, expected) - expected
    density = -0.5 * (jnp.log(2.0 * jnp.pi * spread) + jnp.square(error) / spread)
    return jnp.where(known, density, 0.0)


def _elements(
    alpha: Array, beta: Array, initial: Array, seen: Array, process: Array, observation: Array
) -> _Element:
    known = jnp.isfinite(seen)
    total = process + observation
    trust = jnp.where(known, process / total, 0.0)
    # The first step starts from a number, not from a state: its gain folds into the shift.
    first = jnp.arange(len(alpha)) == 0
    start = beta + jnp.where(first, alpha * initial, 0.0)
    gain = jnp.where(first, 0.0, alpha)
    error = jnp.where(known, seen, start) - start
    return _Element(
        gain=(1.0 - trust) * gain,
        shift=start + trust * error,
        spread=(1.0 - trust) * process,
        pull=jnp.where(known, gain * error / total, 0.0),
        weight=jnp.where(known, jnp.square(gain) / total, 0.0),
    )


def _combined(first: _Element, second: _Element) -> _Element:
    shared = 1.0 / (1.0 + first.spread * second.weight)
    forward = second.gain * shared
    backward = first.gain * shared
    return _Element(
        gain=forward * first.gain,
        shift=forward * (first.shift + first.spread * second.pull) + second.shift,
        spread=forward * first.spread * second.gain + second.spread,
        pull=backward * (second.pull - second.weight * first.shift) + first.pull,
        weight=backward * second.weight * first.gain + first.weight,
    )
