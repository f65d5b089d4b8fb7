"""Draws of the two-timescale model: of weights by perturb-and-solve, and of the paths they make.

A draw belongs to the key and the query alone, so that simulations of any curricula, effects of
examples and densities of recorded runs meet the same coefficients.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["DrawnWeights", "drawn_paths", "drawn_weights"]


class DrawnWeights(NamedTuple):
    """Draws of one query.

    Attributes:
        deviation: of the weights from their posterior mean, in units of the query's scale.
        scale: factor on that scale; its uncertainty makes the band Student-t.
        error_key: for the errors of new runs.
    """

    deviation: Float[Array, "draw weight"]
    scale: Float[Array, " draw"]
    error_key: Array


def _normal_weights(
    key: jax.Array, draws: int, parts: int, knots: int, sources: int
) -> Float[Array, "draw weight"]:
    # A key for each part and knot: a longer run adds knots and leaves the others' draws alone.
    def of_part(part: Array) -> Array:
        def of_knot(knot: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, part), knot)
            return jax.random.normal(own, (draws, sources))

        return jax.vmap(of_knot)(jnp.arange(knots))

    blocks = jax.vmap(of_part)(jnp.arange(parts))
    return jnp.moveaxis(blocks, 2, 0).reshape(draws, -1)


@partial(jax.jit, static_argnames=("draws", "knots", "parts"))
def drawn_weights(
    solved: tuple[Array, Array, Array],
    query: Int[Array, ""],
    key: jax.Array,
    freedom: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
) -> DrawnWeights:
    """The key's draws for one query, whatever is made of them."""
    train, gain, fitted_error = solved
    weights = train.shape[1]
    mine = jax.random.fold_in(key, query)
    weight_key, fitted_key, error_key, scale_key = jax.random.split(mine, 4)
    prior = _normal_weights(weight_key, draws, parts, knots, weights // parts // knots)
    errors = jax.random.normal(
        fitted_key, (draws, len(train) // len(fitted_error), len(fitted_error))
    )
    errors = (errors @ fitted_error.T).reshape(draws, -1)
    # Scaled inverse chi-square scales.
    chi_square = 2.0 * jax.random.gamma(scale_key, 0.5 * freedom, (draws,))
    deviation = prior - (prior @ train.T + errors) @ gain
    return DrawnWeights(deviation, jnp.sqrt(freedom / chi_square), error_key)


@partial(jax.jit, static_argnames=("draws", "knots", "parts"))
def drawn_paths(
    solved: tuple[Array, Array, Array],
    designs: Float[Array, "run step weight"],
    new_error: Float[Array, "step step"],
    spread: Float[Array, "query step"],
    query: Int[Array, " query"],
    key: jax.Array,
    freedom: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
) -> tuple[Float[Array, "query draw run step"], Float[Array, "query draw run step"]]:
    """Deviations from the posterior mean path: of the coefficients alone, and with the error."""
    runs, steps, weights = designs.shape
    flat = designs.reshape(-1, weights)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        number, wide = inputs
        deviation, factor, new_key = drawn_weights(
            solved, number, key, freedom, draws=draws, knots=knots, parts=parts
        )
        scale = factor[:, None, None] * wide[None, None]
        mean = (deviation @ flat.T).reshape(draws, runs, steps) * scale
        run_keys = jax.vmap(lambda run: jax.random.fold_in(new_key, run))(jnp.arange(runs))
        white = jax.vmap(lambda run: jax.random.normal(run, (draws, steps)))(run_keys)
        return mean, mean + jnp.moveaxis(white @ new_error.T, 0, 1) * scale

    drawn: tuple[Array, Array] = jax.lax.map(one, (query, spread))
    return drawn
