"""Log densities of recorded runs, one loss after the other: each given the run's earlier ones.

By the chain rule the sum over the recorded losses is the log density of the run. A loss that was
not recorded (NaN) is integrated out and has no density of its own (NaN).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.linalg import cholesky, solve_lower


def whitening(
    covariance: Float[Array, "step step"], recorded: Bool[np.ndarray, "run step query"]
) -> tuple[Float[Array, "pattern step step"], Int[np.ndarray, "run query"]]:
    """Inverse Cholesky factors of the recorded part of ``covariance``, one for each pattern.

    Returns:
        The factors, identity at what is not recorded, and the pattern of each run and query.
    """
    runs, steps, queries = recorded.shape
    flat = np.moveaxis(recorded, 1, 2).reshape(-1, steps)
    patterns, place = np.unique(flat, axis=0, return_inverse=True)
    return _roots(covariance, patterns), place.reshape(runs, queries)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
def _roots(
    covariance: Float[Array, "step step"], recorded: Bool[Array, " step"]
) -> Float[Array, "step step"]:
    pattern = recorded.astype(covariance.dtype)
    # Cutting the ties of what is not recorded integrates it out.
    kept = covariance * pattern[:, None] * pattern[None, :] + jnp.diag(1.0 - pattern)
    return solve_lower(cholesky(kept), jnp.eye(len(pattern), dtype=covariance.dtype))


@jax.jit
@partial(jax.vmap, in_axes=(0, None, 0))
@partial(jax.vmap, in_axes=(0, 0, None))
def correlated_log_density(
    deviation: Float[Array, " step"], root: Float[Array, "step step"], sd: Float[Array, " step"]
) -> Float[Array, " step"]:
    """Of a Gaussian error with standard deviations ``sd`` times a covariance whitened by ``root``.

    Written for one run and one draw; called with axes ``draw run step`` of ``deviation``, ``run
    step step`` of ``root``, ``draw step`` of ``sd``. NaN deviations are not recorded.
    """
    recorded = jnp.isfinite(deviation)
    white = root @ (jnp.where(recorded, deviation, 0.0) / sd)
    conditional = sd / jnp.diagonal(root)
    # z^2 / 2 of the whitened residual: the deviation from its conditional mean over its sd.
    variance = jnp.square(conditional)
    density = -0.5 * (jnp.log(2.0 * jnp.pi * variance) + jnp.square(white * conditional) / variance)
    return jnp.where(recorded, density, jnp.nan)
