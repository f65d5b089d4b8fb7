"""The one linear-Gaussian object: condition on its points, draw given them, score them.

For run ``r``, query ``q``, with standard normal weights ``w`` and the run's own error ``eta_r``,

    ``y_rq = s_q (X_r w_q + eta_rq)``,    ``w ~ N(0, I)``,    ``eta_r ~ N(0, E)``.

Points of all runs have the covariance ``s_q^2 K`` with ``K = X X' + I (x) E``, common to all
queries, so one factorization serves all of them. The posterior mean of the weights, in units of the
scale, is ``X' K^-1 y / s``; a draw deviates from it by ``w0 - X' K^-1 (X w0 + eta0)`` with ``w0``,
``eta0`` from the prior (Papandreou & Yuille 2010). ``dense`` has the same as plain algebra.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bayes_simfluence.linalg import cholesky, solve_lower, spd_inverse

FLOOR = 1e-12
"""Smallest scale squared, so that a query whose loss never moves has a finite score."""


class Conditioned(NamedTuple):
    """The posterior of the weights given the points, up to each query's scale.

    Attributes:
        designs: of all points, zero where not recorded.
        gain: ``K^-1 X``: its transpose takes points to the weights' posterior mean.
        mean: of the weights.
        error_factor: Cholesky factor of a run's error.
    """

    designs: Float[Any, "point weight"]
    gain: Float[Any, "point weight"]
    mean: Float[Any, "weight query"]
    error_factor: Float[Any, "row row"]

    def single(self) -> "Conditioned":
        """In single precision, which is enough for deviations from the mean."""
        return Conditioned(*(np.asarray(array, np.float32) for array in self))

    def deviations(
        self, weights: Float[Array, "draw weight"], errors: Float[Array, "draw run row"]
    ) -> Float[Array, "draw weight"]:
        """Draws of the weights minus their mean, from draws of the prior.

        Args:
            weights: standard normal.
            errors: standard normal, one for each point.
        """
        eta = (errors @ self.error_factor.T).reshape(len(weights), -1)
        return weights - (weights @ self.designs.T + eta) @ self.gain


class LeftOut(NamedTuple):
    """Errors of the predictions of each run from all others.

    Attributes:
        error: true minus predicted; zero where not recorded.
        variance: of the error, up to the query's scale squared; one where not recorded.
        precision: ``Q``, by which any runs can be left out (``gaussian.nested``).
        pulled: ``Q y``.
    """

    error: Float[Array, "run row query"]
    variance: Float[Array, "run row"]
    precision: Float[Array, "point point"]
    pulled: Float[Array, "run row query"]


class LeftOutScores(NamedTuple):
    """Mean log density of left-out runs per point.

    Attributes:
        joint: of all points of a run together.
        marginal: of each point alone: what a run's points say of one another does not count, so
            that an error which explains a run by itself gains nothing.
    """

    joint: Float[Array, ""]
    marginal: Float[Array, ""]


class LinearGaussian(NamedTuple):
    """Changes of the loss at some steps of several runs, up to each query's scale.

    Attributes:
        designs: ``X``, maps the weights to points.
        error: ``E``, covariance of a run's error between its rows.
        known: whether the points were recorded.
    """

    designs: Float[Array, "run row weight"]
    error: Float[Array, "row row"]
    known: Bool[Array, "run row"]

    def covariance(self) -> Float[Array, "point point"]:
        """``K``: of all points, run after run.

        Points that are not known become independent of all others, with variance one: given a zero
        as their value, they change neither a solution for the others nor a log determinant.
        """
        flat = self.designs.reshape(-1, self.designs.shape[-1])
        whole = flat @ flat.T + jnp.kron(jnp.eye(len(self.designs)), self.error)
        known = self.known.reshape(-1)
        return jnp.where(known[:, None] & known[None, :], whole, jnp.eye(len(known)))

    def condition(self, change: Float[Array, "run row query"]) -> Conditioned:
        """The weights' posterior given the changes minus their prior mean."""
        designs = jnp.where(self.known[..., None], self.designs, 0.0)
        designs = designs.reshape(-1, designs.shape[-1])
        factor = cholesky(self.covariance())
        gain = solve_lower(factor, solve_lower(factor, designs), transposed=True)
        mean = gain.T @ self._points(change)
        return Conditioned(designs, gain, mean, cholesky(self.error))

    def log_density(
        self, change: Float[Array, "run row query"], scale: Float[Array, " query"]
    ) -> Float[Array, ""]:
        """Of the changes of all queries given their scales; natural log, up to a constant."""
        factor = cholesky(self.covariance())
        white = solve_lower(factor, self._points(change)) / scale[None]
        volume = jnp.log(jnp.diagonal(factor)).sum() + self.known.sum() * jnp.log(scale)
        return -0.5 * jnp.square(white).sum() - volume.sum()

    def evidence_score(self, change: Float[Array, "run row query"]) -> Float[Array, ""]:
        """Log marginal likelihood per point, at each query's best scale.

        Up to a constant; natural logarithm, averaged over queries.
        """
        inverse, log_determinant = spd_inverse(self.covariance())
        flat = self._points(change)
        squares = (flat * (inverse @ flat)).sum(axis=0)
        points = self.known.sum()
        return -0.5 * log_determinant / points - _log_scale(squares / points)

    def left_out_scores(self, change: Float[Array, "run row query"]) -> LeftOutScores:
        """Mean log densities of left-out runs per point; otherwise as ``evidence_score``."""
        blocks, pulled, _ = self._blocks(change)

        def of_run(block: Array, pull: Array) -> tuple[Array, Array, Array]:
            inverse, log_determinant = spd_inverse(block)
            error, variance = inverse @ pull, jnp.diagonal(inverse)
            apart = jnp.square(error) / variance[:, None]
            return jnp.stack([log_determinant, -jnp.log(variance).sum()]), pull * error, apart

        volume, *squares = jax.vmap(of_run)(blocks, pulled)
        points = self.known.sum()
        scale = jnp.stack([_log_scale(square.sum(axis=(0, 1)) / points) for square in squares])
        return LeftOutScores(*(0.5 * volume.sum(axis=0) / points - scale))

    def left_out(self, change: Float[Array, "run row query"]) -> LeftOut:
        """Predictions of each run's change from all other runs.

        With ``Q`` the inverse of ``K`` and ``a = Q y``, the prediction of run ``r`` from all others
        misses by ``Q_rr^-1 a_r`` with covariance ``Q_rr^-1`` (Rasmussen & Williams 2006, section
        5.4.2, in blocks), times the query's scale squared.
        """
        blocks, pulled, precision = self._blocks(change)

        def of_run(block: Array, pull: Array) -> tuple[Array, Array]:
            inverse, _ = spd_inverse(block)
            return inverse @ pull, jnp.diagonal(inverse)

        return LeftOut(*jax.vmap(of_run)(blocks, pulled), precision, pulled)

    def _points(self, change: Float[Array, "run row query"]) -> Float[Array, "point query"]:
        return jnp.where(self.known[..., None], change, 0.0).reshape(-1, change.shape[2])

    def _blocks(
        self, change: Float[Array, "run row query"]
    ) -> tuple[
        Float[Array, "run row row"], Float[Array, "run row query"], Float[Array, "point point"]
    ]:
        """Each run's block of ``Q``, its part of ``Q y``, and ``Q``."""
        runs, rows, _ = change.shape
        inverse, _ = spd_inverse(self.covariance())
        grid = inverse.reshape(runs, rows, runs, rows)
        blocks = jnp.stack([grid[run, :, run] for run in range(runs)])
        return blocks, (inverse @ self._points(change)).reshape(change.shape), inverse


def _log_scale(squared: Float[Array, " query"]) -> Float[Array, ""]:
    return 0.5 * jnp.log(squared + FLOOR).mean()
