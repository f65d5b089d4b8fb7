"""The mean of a run's losses given coefficients: the model's parts for any prior's draws.

``design.design`` is the model as a matrix, for Gaussian priors; this is the model as a function
of coefficients, for samplers and for simulating with their draws.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.design import gather
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.simfluence import Simfluence


class Coefficients(NamedTuple):
    """Coefficients of all queries, in units of the link.

    Attributes:
        additive: by part, values at the knots of training time.
        common: by part, the time effect at the knots; empty without one.
        multiplicative: unitless; None without such terms.
    """

    additive: Mapping[str, Float[Array, "query train knot"]]
    common: Mapping[str, Float[Array, "query knot"]]
    multiplicative: Float[Array, "query train"] | None


def batch_effects(
    model: Simfluence, coefficients: Coefficients, part: str, run: RunArrays
) -> Float[Array, "step query"]:
    """What each step's batch does by itself, multiplicative terms left out."""
    if part not in coefficients.additive:
        queries = 0 if coefficients.multiplicative is None else len(coefficients.multiplicative)
        return jnp.zeros((len(run.progress), queries))
    at_knots = coefficients.additive[part]
    queries, train, knots = at_knots.shape
    exposure = run.exposures()
    by_knot = exposure @ jnp.moveaxis(at_knots, 1, 0).reshape(train, -1)
    by_knot = by_knot.reshape(-1, queries, knots)
    if part in coefficients.common:
        # What any step does, it does by what its examples have still to learn.
        acting = jnp.ones(len(exposure)) if run.residual is None else exposure.sum(axis=1)
        by_knot = by_knot + acting[:, None, None] * coefficients.common[part][None]
    if knots == 1:
        return by_knot[..., 0]
    weights = model.coefficients.interpolation(run.progress, knots)
    return jnp.einsum("sqk,sk->sq", by_knot, weights)


def multipliers(coefficients: Coefficients, run: RunArrays) -> Float[Array, "step query"] | None:
    """``e_s . a``: what multiplies the loss before each step; None without such terms."""
    if coefficients.multiplicative is None:
        return None
    return run.exposures() @ coefficients.multiplicative.T


def mean_function(
    model: Simfluence,
    values: Values,
    coefficients: Coefficients,
    run: RunArrays,
    before: Float[Array, "step query"],
) -> Float[Array, "step query"]:
    """``u_t + v_t`` of one run for all queries, given the losses before each step (link units)."""
    steps = len(run.progress)
    total = jnp.zeros_like(before)
    factor = multipliers(coefficients, run)
    for part in model.parts:
        moved = batch_effects(model, coefficients, part, run)
        # Multiplicative terms belong to what stays, or to the only part there is.
        if factor is not None and part == model.parts[0]:
            moved = moved + factor * before
        total = total + gather(model, values, run, part, jnp.arange(steps)) @ moved
    return total
