"""The step size of each step, told by the optimizer's state or by its schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from bayes_simfluence.checks import Misuse, positive_number
from bayes_simfluence.recording.program import StepSizeReader

__all__ = ["StepSize", "step_size_reader"]

StepSize = float | Callable[[Any], Any]


def step_size_reader(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    step_size: StepSize | None,
    steps: int,
) -> StepSizeReader:
    """What tells the size of a step from the optimizer's state and the steps before it.

    Args:
        step_size: the learning rate or schedule; not needed when the optimizer was made by
            ``optax.inject_hyperparams``.

    Raises:
        Misuse: it cannot be told, or it is zero at every one of the ``steps``.
    """
    if step_size is None and jax.eval_shape(lambda one: _told(optimizer.init(one)), params) is None:
        raise Misuse(
            "step_size",
            got="nothing, and the optimizer's state does not tell it",
            expected="the learning rate or schedule of the optimizer",
            do="pass step_size=schedule, or make the optimizer with "
            "optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)",
        )
    if step_size is None:
        rates = _injected(optimizer, params, steps)
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
    if step_size is None:
        return lambda state, count: jnp.asarray(_told(state), jnp.float32)
    schedule = step_size if callable(step_size) else lambda count: step_size
    return lambda state, count: jnp.asarray(schedule(count), jnp.float32)


def _told(state: PyTree) -> Any:
    parts = jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "hyperparams"))
    rates = [getattr(part, "hyperparams", {}).get("learning_rate") for part in parts]
    return next((rate for rate in rates if rate is not None), None)


def _injected(
    optimizer: optax.GradientTransformation, params: PyTree, steps: int
) -> Float[np.ndarray, " step"]:
    """The optimizer's step sizes, found on arrays of the same structure and one element each."""
    tiny = jax.tree.map(lambda leaf: jnp.zeros((1,) * jnp.ndim(leaf), leaf.dtype), params)
    first = optimizer.init(tiny)
    if np.any(_told(first)):
        return np.asarray(_told(first))[None]

    def step(state: PyTree, _: Int[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        state = optimizer.update(tiny, state, tiny)[1]
        return state, jnp.asarray(_told(state), jnp.float32)

    return np.asarray(jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps))[1])(first))
