"""Coupled runs under a sampler's draws: residuals of planned runs' examples, by shares of draws.

Each share of the draws is simulated with the residuals of one roll-out of the training examples,
under the hyperparameters and scales of the draw in its middle.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayes_simfluence.gaussian.fitted import typical_step
from bayes_simfluence.gaussian.rollout import OF_STATES, SCENARIOS, drawn_residuals
from bayes_simfluence.gaussian.search import typical
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.hyper import free_values
from bayes_simfluence.model.numpyro_model import Sites, Units
from bayes_simfluence.model.simfluence import Simfluence, hypers_of


def shares_of(draws: int) -> list[Int[np.ndarray, " draw"]]:
    """Draws that have one scenario in common: successive ones."""
    return np.array_split(np.arange(draws), min(SCENARIOS, draws))


def residuals_under(
    model: Simfluence,
    draws: Sites,
    units: Units,
    fitted: RunArrays,
    planned: RunArrays,
    key: jax.Array,
    *,
    knots: int,
) -> Iterator[Float[np.ndarray, "run step slot"]]:
    """Residuals of the planned runs' examples, one draw of them for each of ``shares_of``.

    Args:
        model, draws, units: what was inferred; sites with a leading axis of draws.
        fitted: the runs whose residuals tell of the training examples, in units.
        planned: the runs, in units.
        key: decides the examples' states and errors, and nothing else.
        knots: of coefficients along training.
    """
    for number, share in enumerate(shares_of(len(draws["scale"]))):
        one = {name: value[share[len(share) // 2]] for name, value in draws.items()}
        with double_precision():
            free = free_of(model, one, fitted)
        # The scales are those of effects in units of ``spread``, as those of the Gaussian form are.
        yield from drawn_residuals(
            model, free, fitted, planned, units.spread, typical(np.asarray(one["scale"])),
            jax.random.fold_in(jax.random.fold_in(key, OF_STATES), number), knots=knots,
            scenarios=1,
        )  # fmt: skip


def free_of(model: Simfluence, draw: Sites, fitted: RunArrays) -> Float[Array, " hyper"]:
    """A draw's hyperparameters as the Gaussian form takes them."""
    return free_values(hypers_of(model, fitted.features), draw)


def typical_steps(
    model: Simfluence, draws: Sites, fitted: RunArrays | None
) -> Float[Array, " draw"]:
    """With what factor a fitted run's example acts at a step under each draw; 1 if not coupled."""
    if fitted is None:
        return jnp.ones(len(draws["scale"]))
    scalars = {name: draws[name] for name in hypers_of(model, fitted.features)}

    def of_draw(draw: Sites) -> Array:
        return typical_step(model, free_of(model, draw, fitted), fitted)

    steps: Array = jax.lax.map(of_draw, scalars)
    return steps
