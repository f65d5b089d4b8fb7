"""How wide a guide is: its coefficients' sds over those that the posterior's curvature implies."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Int
from numpyro.infer.util import potential_energy, unconstrain_fn

from bayes_simfluence.inference.compiled import JointProgram
from bayes_simfluence.model.numpyro_model import Observed

__all__ = ["dispersion"]

MEASURED = 16
"""Coefficients measured; each costs a solve by conjugate gradients."""
ITERATIONS = 500
SMALLEST = 1e-6
"""Of a ratio: a guide without any spread has no logarithm."""
LINEAR = ("_own", "_of_features", "_time", "_traits")
"""Ends of the names of sites in which the log posterior is (nearly) quadratic."""


def dispersion(
    program: JointProgram, observed: Observed, drawn: dict[str, jax.Array], *, key: jax.Array
) -> float:
    """Geometric mean ratio of sds of a few coefficients: below one, the guide is too narrow.

    With ``H`` the Hessian of the negative log posterior over coefficients at the guide's median,
    all else fixed there, a coefficient's variance is its diagonal entry of ``H^-1``: exactly, where
    prior and error are Gaussian. Hessian-vector products and conjugate gradients give it without a
    matrix. NaN where no site is a coefficient, or the curvature is not positive.

    Args:
        program, observed: the whole data, no minibatches.
        drawn: draws of the guide by site, leading axis of draws.
        key: decides which coefficients are measured.
    """
    # A guide's draws may hold what follows from its sites; put in, that would cut them off.
    own = program.sampled(observed, drawn)
    medians = {name: jnp.median(one, axis=0) for name, one in own.items()}
    free = {name: one for name, one in own.items() if name.endswith(LINEAR)}
    if not free:
        return float("nan")
    spread, _ = ravel_pytree({name: jnp.std(one, axis=0) for name, one in free.items()})
    measured = min(MEASURED, len(spread))
    chosen = jax.random.choice(key, len(spread), (measured,), replace=False)
    implied = np.asarray(_variances(program, observed, medians, chosen))
    known = implied > 0
    ratios = np.asarray(spread)[np.asarray(chosen)][known] / np.sqrt(implied[known])
    if not known.any():
        return float("nan")
    return float(np.exp(np.log(np.maximum(ratios, SMALLEST)).mean()))


@partial(jax.jit, static_argnums=0)
def _variances(
    program: JointProgram,
    observed: Observed,
    medians: dict[str, jax.Array],
    chosen: Int[jax.Array, " chosen"],
) -> Float[jax.Array, " chosen"]:
    """Entries of the diagonal of the inverse Hessian over the coefficients."""
    centre = unconstrain_fn(program, (observed,), {}, medians)
    flat, unravel = ravel_pytree(
        {name: one for name, one in centre.items() if name.endswith(LINEAR)}
    )

    def energy(vector: jax.Array) -> jax.Array:
        found: jax.Array = potential_energy(program, (observed,), {}, {**centre, **unravel(vector)})
        return found

    def curvature(vector: jax.Array) -> jax.Array:
        # Backward twice: the factorizations have no forward derivative.
        found: jax.Array = jax.grad(lambda at: jnp.vdot(jax.grad(energy)(at), vector))(flat)
        return found

    def variance(at: jax.Array) -> jax.Array:
        solve: Any = jax.scipy.sparse.linalg.cg
        solved, _ = solve(curvature, jnp.zeros_like(flat).at[at].set(1.0), maxiter=ITERATIONS)
        return solved[at]

    found: jax.Array = jax.lax.map(variance, chosen)
    return found
