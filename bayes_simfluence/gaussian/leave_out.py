"""Leave-one-run-out predictions of a Gaussian model, from blocks of one inverse.

With ``Q`` the inverse of the covariance of all points, block-diagonal ``Q_rr`` for run ``r`` and
``a = Q y``, the prediction of run ``r`` from all others misses by ``Q_rr^-1 a_r`` with covariance
``Q_rr^-1`` (Rasmussen & Williams 2006, section 5.4.2, in blocks), times the query's scale squared.
A change that was not recorded is NaN for every query, and its point one of those that
``fitted_covariance`` made independent: it is in no sum and no count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.linalg import spd_inverse

__all__ = ["LeftOut", "evidence_score", "left_out", "left_out_score"]

FLOOR = 1e-12
"""Smallest scale squared, so that a query whose loss never moves has a finite score."""


class LeftOut(NamedTuple):
    """Errors of the predictions of each run from all others.

    Attributes:
        error: true minus predicted; zero where not recorded.
        variance: of the error, up to the query's scale squared; one where not recorded.
    """

    error: Float[Array, "run row query"]
    variance: Float[Array, "run row"]


def left_out(
    covariance: Float[Array, "point point"], change: Float[Array, "run row query"]
) -> LeftOut:
    """Predictions of each run's change from all other runs."""
    blocks, pulled = _blocks(covariance, change)

    def one(block: Array, pull: Array) -> tuple[Array, Array]:
        inverse, _ = spd_inverse(block)
        return inverse @ pull, jnp.diagonal(inverse)

    return LeftOut(*jax.vmap(one)(blocks, pulled))


def left_out_score(
    covariance: Float[Array, "point point"], change: Float[Array, "run row query"]
) -> Float[Array, ""]:
    """Mean joint log density of a left-out run per point, at each query's best scale.

    Up to a constant; natural logarithm, averaged over queries.
    """
    blocks, pulled = _blocks(covariance, change)

    def one(block: Array, pull: Array) -> tuple[Array, Array]:
        inverse, log_determinant = spd_inverse(block)
        return log_determinant, (pull * (inverse @ pull)).sum(axis=0)

    log_determinant, squares = jax.vmap(one)(blocks, pulled)
    points = _count(change)
    return 0.5 * log_determinant.sum() / points - _log_scale(squares.sum(axis=0) / points)


def evidence_score(
    covariance: Float[Array, "point point"], change: Float[Array, "run row query"]
) -> Float[Array, ""]:
    """Log marginal likelihood per point, at each query's best scale; otherwise as above."""
    inverse, log_determinant = spd_inverse(covariance)
    flat = _zero_filled(change).reshape(len(covariance), -1)
    squares = (flat * (inverse @ flat)).sum(axis=0)
    points = _count(change)
    return -0.5 * log_determinant / points - _log_scale(squares / points)


def _log_scale(squared: Float[Array, " query"]) -> Float[Array, ""]:
    return 0.5 * jnp.log(squared + FLOOR).mean()


def _count(change: Float[Array, "run row query"]) -> Float[Array, ""]:
    return (~jnp.isnan(change[..., 0])).sum().astype(change.dtype)


def _zero_filled(change: Float[Array, "run row query"]) -> Float[Array, "run row query"]:
    return jnp.where(jnp.isnan(change), 0.0, change)


def _blocks(
    covariance: Float[Array, "point point"], change: Float[Array, "run row query"]
) -> tuple[Float[Array, "run row row"], Float[Array, "run row query"]]:
    runs, rows, queries = change.shape
    inverse, _ = spd_inverse(covariance)
    grid = inverse.reshape(runs, rows, runs, rows)
    blocks = jnp.stack([grid[run, :, run] for run in range(runs)])
    filled = _zero_filled(change).reshape(-1, queries)
    pulled = (inverse @ filled).reshape(runs, rows, queries)
    return blocks, pulled
