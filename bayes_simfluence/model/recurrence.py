"""Recurrences of the loss: trajectories for given coefficients, and sums as matrices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def affine_trajectory(
    alpha: Float[Array, " step"], beta: Float[Array, " step"], initial: Float[Array, ""]
) -> Float[Array, " time"]:
    """``L_t = alpha_t L_{t-1} + beta_t`` from ``L_0``: Simfluence-Linear (Guu et al. 2023, eq. 2).

    One run and one query; a parallel scan over the composition of affine maps, so that long runs
    take a logarithmic number of sweeps.

    >>> import jax.numpy as jnp
    >>> affine_trajectory(jnp.array([0.5, 1.0]), jnp.array([0.0, 0.25]), jnp.array(1.0)).tolist()
    [1.0, 0.5, 0.75]
    """

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    scale, shift = jax.lax.associative_scan(compose, (alpha, beta))
    return jnp.concatenate([initial[None], scale * initial[None] + shift])


def accumulation(
    rate: Float[Array, ""], progress: Float[Array, " step"]
) -> Float[Array, "step source"]:
    """Sums of ``u_t = exp(rate * dt) u_{t-1} + x_t`` as a matrix: ``u = accumulation @ x``.

    Args:
        rate: log growth per recorded length; 0 = what a step adds stays, negative = it fades.
        progress: step / recorded steps.
    """
    elapsed = progress[:, None] - progress[None, :]
    # Rounding must not drop the diagonal; steps are further apart than half of the first one.
    reached = elapsed > -0.5 * progress[0]
    return jnp.where(reached, jnp.exp(rate * jnp.maximum(elapsed, 0.0)), 0.0)
