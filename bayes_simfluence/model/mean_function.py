"""What given coefficients explain of a run: the same parts as ``bayesian``, for any prior's draws.

``bayesian.design`` is the model as a matrix, for Gaussian priors; this is the model as a function
of coefficients, for samplers and for simulating with their draws.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.simfluence import Path, Simfluence, gather

__all__ = ["Coefficients", "batch_effects", "explained", "multipliers"]


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
    model: Simfluence, coefficients: Coefficients, part: str, path: Path
) -> Float[Array, "step query"]:
    """What each step's batch does by itself, multiplicative terms left out."""
    if part not in coefficients.additive:
        queries = 0 if coefficients.multiplicative is None else len(coefficients.multiplicative)
        return jnp.zeros((len(path.progress), queries))
    at_knots = coefficients.additive[part]
    queries, train, knots = at_knots.shape
    by_knot = path.exposure @ jnp.moveaxis(at_knots, 1, 0).reshape(train, -1)
    by_knot = by_knot.reshape(-1, queries, knots)
    if part in coefficients.common:
        by_knot = by_knot + coefficients.common[part][None]
    if knots == 1:
        return by_knot[..., 0]
    weights = model.coefficients.interpolation(path.progress, knots)
    return jnp.einsum("sqk,sk->sq", by_knot, weights)


def multipliers(coefficients: Coefficients, path: Path) -> Float[Array, "step query"] | None:
    """``e_s . a``: what multiplies the loss before each step; None without such terms."""
    if coefficients.multiplicative is None:
        return None
    return path.exposure @ coefficients.multiplicative.T


def explained(
    model: Simfluence,
    values: Values,
    coefficients: Coefficients,
    path: Path,
    before: Float[Array, "step query"],
) -> Float[Array, "step query"]:
    """``u_t + v_t`` of one run for all queries, given the losses before each step (link units)."""
    steps = len(path.progress)
    total = jnp.zeros_like(before)
    factor = multipliers(coefficients, path)
    for part in model.parts:
        moved = batch_effects(model, coefficients, part, path)
        # Multiplicative terms belong to what stays, or to the only part there is.
        if factor is not None and part == model.parts[0]:
            moved = moved + factor * before
        total = total + gather(model, values, path, part, jnp.arange(steps)) @ moved
    return total
