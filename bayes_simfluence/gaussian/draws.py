"""Draws of a conditioned linear-Gaussian object, and of the trajectories that they make.

A draw belongs to the key and the query alone, so that simulations of any curricula, effects of
examples and densities of recorded runs meet the same coefficients. What queries have in common is
drawn once (``gaussian.queries``).
"""

from functools import partial
from typing import Any, NamedTuple

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
    """

    deviation: Float[Array, "draw weight"]
    scale: Float[Array, " draw"]


class Dependence(NamedTuple):
    """Some queries' shares in common factors (``gaussian.queries``), and which draws are theirs.

    Attributes:
        number: of each query, which decides its own draws.
        loading: on the common factors.
        own: sd of what is the query's own.
    """

    number: Int[Any, "*query"]
    loading: Float[Any, "*query factor"]
    own: Float[Any, "*query"]

    def of(self, own: Float[Array, "*drawn"], common: Float[Array, "factor *drawn"]) -> Array:
        """One query's draws, of its own source's and of the common ones'."""
        return self.own * own + jnp.tensordot(self.loading, common, axes=1)


class Sources(NamedTuple):
    """A key's draws of one source, which all of a query's deviations are made of.

    Attributes:
        deviation: of the weights.
        error_key: for the errors of new runs.
    """

    deviation: Float[Array, "*source draw weight"]
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


class _Keys(NamedTuple):
    """Of what is drawn under one key: each query's own source, the common ones, the scales."""

    own: Array
    common: Array
    scale: Array

    @classmethod
    def of(cls, key: jax.Array) -> "_Keys":
        return cls(*jax.random.split(key, 3))

    def scale_of(self, number: Int[Array, ""], own: bool) -> Array:
        """Of the scales: one for all queries, which are jointly Student-t, or each query's own.

        What is not known of recorded queries' scales is how far all of them are off, since a run's
        errors go together; of queries that were not recorded, how they differ from one another.
        """
        return jax.random.fold_in(self.scale, number) if own else self.scale


def _source(
    conditioned: Conditioned,
    key: jax.Array,
    number: Int[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
) -> Sources:
    points, weights = conditioned.designs.shape
    rows = len(conditioned.error_factor)
    weight_key, fitted_key, error_key = jax.random.split(jax.random.fold_in(key, number), 3)
    prior = _normal_weights(weight_key, draws, parts, knots, weights // parts // knots)
    errors = jax.random.normal(fitted_key, (draws, points // rows, rows))
    return Sources(conditioned.deviations(prior, errors), error_key)


@partial(jax.jit, static_argnames=("factors", "draws", "knots", "parts"))
def common_sources(
    conditioned: Conditioned, key: jax.Array, *, factors: int, draws: int, knots: int, parts: int
) -> Sources:
    """The key's draws of the common factors."""
    own = _Keys.of(key).common
    source = partial(_source, conditioned, own, draws=draws, knots=knots, parts=parts)
    made: Sources = jax.lax.map(source, jnp.arange(factors))
    return made


@partial(jax.jit, static_argnames=("draws", "knots", "parts", "own_scales"))
def drawn_weights(
    conditioned: Conditioned,
    common: Sources,
    query: Dependence,
    key: jax.Array,
    df: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
    own_scales: bool = False,
) -> DrawnWeights:
    """The key's draws for one query, whatever is made of them."""
    keys = _Keys.of(key)
    own = _source(conditioned, keys.own, query.number, draws=draws, knots=knots, parts=parts)
    scale = _scales(keys.scale_of(query.number, own_scales), df, draws)
    return DrawnWeights(query.of(own.deviation, common.deviation), scale)


def _scales(key: jax.Array, df: Float[Array, ""], draws: int) -> Float[Array, " draw"]:
    """Scaled inverse chi-square scales."""
    return jnp.sqrt(df / (2.0 * jax.random.gamma(key, 0.5 * df, (draws,))))


@partial(jax.jit, static_argnames=("draws", "knots", "parts", "own_scales"))
def drawn_trajectories(
    conditioned: Conditioned,
    designs: Float[Array, "scenario run step weight"],
    error_factor: Float[Array, "step step"],
    spread: Float[Array, "query step"],
    queries: Dependence,
    key: jax.Array,
    df: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
    own_scales: bool = False,
) -> tuple[Float[Array, "query draw run step"], Float[Array, "query draw run step"]]:
    """Deviations from the posterior mean: of the coefficients alone, and with the run's error.

    Args:
        conditioned: the weights' posterior.
        designs: of the runs to be drawn, in as many scenarios; the first draws are of the first.
        error_factor: of their errors' covariance.
        spread: sd of each query's effects at each step, link units.
        queries, key: decide the draws.
        df: degrees of freedom of the scales.
        draws, knots, parts: how many.
        own_scales: each query's scale is drawn for itself.
    """
    scenarios, runs, steps, weights = designs.shape
    flat = designs.reshape(scenarios, -1, weights)
    sizes: Any = {"draws": draws, "knots": knots, "parts": parts}
    common = common_sources(conditioned, key, factors=queries.loading.shape[1], **sizes)
    keys = _Keys.of(key)

    def of_source(source: Sources) -> tuple[Array, Array]:
        # An equal share of the draws for each scenario, filled up and cut.
        share = -(-draws // scenarios)
        deviation = jnp.pad(source.deviation, ((0, share * scenarios - draws), (0, 0)))
        mean = deviation.reshape(scenarios, share, weights) @ jnp.swapaxes(flat, 1, 2)
        mean = mean.reshape(-1, runs, steps)[:draws]
        run_keys = jax.vmap(lambda run: jax.random.fold_in(source.error_key, run))(jnp.arange(runs))
        white = jax.vmap(lambda run: jax.random.normal(run, (draws, steps)))(run_keys)
        return mean, jnp.moveaxis(white @ error_factor.T, 0, 1)

    factors: tuple[Array, Array] = jax.vmap(of_source)(common)

    def of_query(inputs: tuple[Dependence, Array]) -> tuple[Array, Array]:
        query, sd = inputs
        own = of_source(_source(conditioned, keys.own, query.number, **sizes))
        scale = _scales(keys.scale_of(query.number, own_scales), df, draws)
        size = scale[:, None, None] * sd[None, None]
        mean, error = (size * query.of(*pair) for pair in zip(own, factors, strict=True))
        return mean, mean + error

    drawn: tuple[Array, Array] = jax.lax.map(of_query, (queries, spread))
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
