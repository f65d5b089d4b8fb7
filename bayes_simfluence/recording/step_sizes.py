"""The step size of each step, read from the optimizer's state or from its schedule."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from bayes_simfluence.checks import Misuse, hashable, positive_number
from bayes_simfluence.recording.compiled import StepSizeReader

StepSize = float | Callable[[Any], Any]


def step_size_reader(
    optimizer: optax.GradientTransformation, params: PyTree, step_size: StepSize | None, steps: int
) -> StepSizeReader:
    """What reads the size of a step from the optimizer's state and the number of steps before it.

    Args:
        step_size: the learning rate or schedule; not needed when the optimizer was made by
            ``optax.inject_hyperparams``.

    Raises:
        Misuse: it cannot be read, or it is zero at every one of the ``steps``.
    """
    if step_size is None:
        rates = _injected_rates(optimizer, params, steps)
    elif callable(step_size):
        rates = np.asarray(jax.vmap(step_size)(jnp.arange(steps)))
    else:
        rates = np.asarray(positive_number("step_size", step_size))
    if not rates.any():
        raise Misuse(
            "step_size",
            got=f"0 at each of the {steps} steps",
            expected="a learning rate above 0 at one of them",
            do="raise the learning rate: nothing would be trained",
        )
    return _Reader(hashable("step_size", step_size))


@dataclass(frozen=True)
class _Reader:
    """Of the optimizer's state where there is no ``step_size``."""

    step_size: StepSize | None

    def __call__(self, state: PyTree, count: Int[Array, ""]) -> Float[Array, ""]:
        size = _rate_in(state) if self.step_size is None else self.step_size
        return jnp.asarray(size(count) if callable(size) else size, jnp.float32)


def _rate_in(state: PyTree) -> Any:
    """The learning rate that ``optax.inject_hyperparams`` keeps in an optimizer's state, if any."""
    parts = jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "hyperparams"))
    rates = [getattr(part, "hyperparams", {}).get("learning_rate") for part in parts]
    return next((rate for rate in rates if rate is not None), None)


def _injected_rates(
    optimizer: optax.GradientTransformation, params: PyTree, steps: int
) -> Float[np.ndarray, " step"]:
    """The optimizer's step sizes, found on arrays of the same structure and one element each."""
    tiny = jax.tree.map(lambda leaf: jnp.zeros((1,) * jnp.ndim(leaf), leaf.dtype), params)
    first = optimizer.init(tiny)
    rate = _rate_in(first)
    if rate is None:
        raise Misuse(
            "step_size",
            got="nothing, and the optimizer's state does not hold it",
            expected="the learning rate or schedule of the optimizer",
            do="pass step_size=schedule, or make the optimizer with "
            "optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)",
        )
    return (
        np.asarray(rate)[None]
        if np.any(rate)
        else np.asarray(_scanned_rates(optimizer, steps, tiny, first))
    )


@partial(jax.jit, static_argnames=("optimizer", "steps"))
def _scanned_rates(
    optimizer: optax.GradientTransformation, steps: int, params: PyTree, state: PyTree
) -> Float[Array, " step"]:
    def step(state: PyTree, _: Int[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        state = optimizer.update(params, state, params)[1]
        return state, jnp.asarray(_rate_in(state), jnp.float32)

    return jax.lax.scan(step, state, jnp.arange(steps))[1]
