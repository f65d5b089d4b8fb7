"""How wide a guide is: its coefficients' sds over those that the posterior's curvature implies."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Int
from numpyro.infer.util import potential_energy, unconstrain_fn

from bayes_simfluence.inference.compiled import CompiledModel, Data
from bayes_simfluence.model.sites import is_coefficient, is_sampled

MEASURED = 16
"""Coefficients measured; each costs a solve by conjugate gradients."""
ITERATIONS = 500
SMALLEST = 1e-6
"""Of a ratio: a guide without any spread has no logarithm."""


def dispersion(
    model: CompiledModel, data: Data, drawn: dict[str, jax.Array], *, key: jax.Array
) -> float:
    """Geometric mean ratio of sds of a few coefficients: below one, the guide is too narrow.

    With ``H`` the Hessian of the negative log posterior over coefficients at the guide's median,
    all else fixed there, a coefficient's variance is its diagonal entry of ``H^-1``: exactly, where
    prior and error are Gaussian. Hessian-vector products and conjugate gradients give it without a
    matrix. NaN where no site is a coefficient, or the curvature is not positive.

    Args:
        model, data: of all runs, no minibatches.
        drawn: draws of the guide by site, leading axis of draws.
        key: decides which coefficients are measured.
    """
    # A guide's draws may hold what follows from its sites; put in, that would cut them off.
    trace = model.trace(data, {name: draws[0] for name, draws in drawn.items()})
    sampled = [name for name in drawn if name in trace and is_sampled(trace[name])]
    medians = {name: jnp.median(drawn[name], axis=0) for name in sampled}
    # In these the log posterior is (nearly) quadratic.
    free = tuple(name for name in sampled if is_coefficient(trace[name]))
    if not free:
        return float("nan")
    spread, _ = ravel_pytree({name: jnp.std(drawn[name], axis=0) for name in free})
    measured = min(MEASURED, len(spread))
    chosen = jax.random.choice(key, len(spread), (measured,), replace=False)
    implied = np.asarray(_variances(model, data, free, medians, chosen))
    known = implied > 0
    ratios = np.asarray(spread)[np.asarray(chosen)][known] / np.sqrt(implied[known])
    if not known.any():
        return float("nan")
    return float(np.exp(np.log(np.maximum(ratios, SMALLEST)).mean()))


@partial(jax.jit, static_argnums=(0, 2))
def _variances(
    model: CompiledModel,
    data: Data,
    free: tuple[str, ...],
    medians: dict[str, jax.Array],
    chosen: Int[jax.Array, " chosen"],
) -> Float[jax.Array, " chosen"]:
    """Entries of the diagonal of the inverse Hessian over the coefficients."""
    centre = unconstrain_fn(model, data, {}, medians)
    flat, unravel = ravel_pytree({name: centre[name] for name in free})

    def energy(vector: jax.Array) -> Any:
        return potential_energy(model, data, {}, {**centre, **unravel(vector)})

    def curvature(vector: jax.Array) -> jax.Array:
        # Backward twice: the factorizations have no forward derivative.
        product: jax.Array = jax.grad(lambda at: jnp.vdot(jax.grad(energy)(at), vector))(flat)
        return product

    def variance(at: jax.Array) -> jax.Array:
        solve: Any = jax.scipy.sparse.linalg.cg
        solved, _ = solve(curvature, jnp.zeros_like(flat).at[at].set(1.0), maxiter=ITERATIONS)
        return solved[at]

    variances: jax.Array = jax.lax.map(variance, chosen)
    return variances
