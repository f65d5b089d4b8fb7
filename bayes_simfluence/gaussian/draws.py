"""Draws of a conditioned linear-Gaussian object, and of the trajectories that they make.

A draw belongs to the key and the query alone, so that simulations of any curricula, effects of
examples and densities of recorded runs meet the same coefficients.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from scipy.optimize import brentq
from scipy.special import polygamma

from bayes_simfluence.gaussian.linear_gaussian import Conditioned

DFS = (1.0, 200.0)
"""Fewest and most degrees of freedom of a scale that is only known from other queries'."""


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
    conditioned: Conditioned,
    query: Int[Array, ""],
    key: jax.Array,
    df: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
) -> DrawnWeights:
    """The key's draws for one query, whatever is made of them."""
    points, weights = conditioned.designs.shape
    rows = len(conditioned.error_factor)
    own = jax.random.fold_in(key, query)
    weight_key, fitted_key, error_key, scale_key = jax.random.split(own, 4)
    prior = _normal_weights(weight_key, draws, parts, knots, weights // parts // knots)
    errors = jax.random.normal(fitted_key, (draws, points // rows, rows))
    # Scaled inverse chi-square scales.
    chi_square = 2.0 * jax.random.gamma(scale_key, 0.5 * df, (draws,))
    return DrawnWeights(conditioned.deviations(prior, errors), jnp.sqrt(df / chi_square), error_key)


@partial(jax.jit, static_argnames=("draws", "knots", "parts"))
def drawn_trajectories(
    conditioned: Conditioned,
    designs: Float[Array, "run step weight"],
    error_factor: Float[Array, "step step"],
    spread: Float[Array, "query step"],
    query: Int[Array, " query"],
    key: jax.Array,
    df: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
) -> tuple[Float[Array, "query draw run step"], Float[Array, "query draw run step"]]:
    """Deviations from the posterior mean: of the coefficients alone, and with the run's error.

    Args:
        conditioned: the weights' posterior.
        designs, error_factor: of the runs to be drawn; factor of their errors' covariance.
        spread: sd of each query's effects at each step, link units.
        query, key: decide the draws.
        df: degrees of freedom of the scales.
        draws, knots, parts: how many.
    """
    runs, steps, weights = designs.shape
    flat = designs.reshape(-1, weights)

    def of_query(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        number, sd = inputs
        drawn = drawn_weights(conditioned, number, key, df, draws=draws, knots=knots, parts=parts)
        scale = drawn.scale[:, None, None] * sd[None, None]
        mean = (drawn.deviation @ flat.T).reshape(draws, runs, steps) * scale
        run_keys = jax.vmap(lambda run: jax.random.fold_in(drawn.error_key, run))(jnp.arange(runs))
        white = jax.vmap(lambda run: jax.random.normal(run, (draws, steps)))(run_keys)
        return mean, mean + jnp.moveaxis(white @ error_factor.T, 0, 1) * scale

    drawn: tuple[Array, Array] = jax.lax.map(of_query, (query, spread))
    return drawn


def df_of_scales(variance: float) -> float:
    """Degrees of freedom of a scaled inverse chi-square whose logarithm has this variance."""
    fewest, most = DFS
    if variance >= polygamma(1, 0.5 * fewest):
        return fewest
    if variance <= polygamma(1, 0.5 * most):
        return most
    df: float = brentq(lambda df: polygamma(1, 0.5 * df) - variance, fewest, most)
    return df
