"""How wide a guide is: its coefficients' sds over those that the posterior's curvature implies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import potential_energy, unconstrain_fn

from bayes_simfluence.inference.program import Program

__all__ = ["dispersion"]

MEASURED = 16
"""Coefficients measured; each costs a solve by conjugate gradients."""
ITERATIONS = 500
LINEAR = ("_own", "_of_features", "_time", "_traits")
"""Ends of the names of sites in which the log posterior is (nearly) quadratic."""


def dispersion(program: Program, drawn: dict[str, jax.Array], *, key: jax.Array) -> float:
    """Geometric mean ratio of sds of a few coefficients: below one, the guide is too narrow.

    With ``H`` the Hessian of the negative log posterior over coefficients at the guide's median,
    all else fixed there, a coefficient's variance is its diagonal entry of ``H^-1``: exactly, where
    prior and error are Gaussian. Hessian-vector products and conjugate gradients give it without a
    matrix. NaN where no site is a coefficient, or the curvature is not positive.

    Args:
        program: the whole data, no minibatches.
        drawn: draws of the guide by site, leading axis of draws.
        key: decides which coefficients are measured.
    """
    run = program()
    # A guide's draws may hold what follows from its sites; put in, that would cut them off.
    medians = {name: jnp.median(one, axis=0) for name, one in program.sampled(drawn).items()}
    centre = unconstrain_fn(run, (program.observed,), {}, medians)
    free = {name: one for name, one in centre.items() if name.endswith(LINEAR)}
    if not free:
        return float("nan")
    flat, unravel = ravel_pytree(free)
    spread, _ = ravel_pytree({name: jnp.std(drawn[name], axis=0) for name in free})

    def energy(vector: jax.Array) -> jax.Array:
        found: jax.Array = potential_energy(
            run, (program.observed,), {}, {**centre, **unravel(vector)}
        )
        return found

    def curvature(vector: jax.Array) -> jax.Array:
        # Backward twice: the factorizations have no forward derivative.
        found: jax.Array = jax.grad(lambda at: jnp.vdot(jax.grad(energy)(at), vector))(flat)
        return found

    @jax.jit
    def variance(at: jax.Array) -> jax.Array:
        solve: Any = jax.scipy.sparse.linalg.cg
        solved, _ = solve(curvature, jnp.zeros_like(flat).at[at].set(1.0), maxiter=ITERATIONS)
        return solved[at]

    chosen = jax.random.choice(key, len(flat), (min(MEASURED, len(flat)),), replace=False)
    implied = np.array([float(variance(at)) for at in chosen])
    known = implied > 0
    ratios = np.asarray(spread)[np.asarray(chosen)][known] / np.sqrt(implied[known])
    return float(np.exp(np.log(ratios).mean())) if known.any() else float("nan")
