"""Draws of runs given some of their losses: pathwise conditioning.

In units of each query's spread, the deviation ``u_q(p)`` of query ``q`` at a point ``p``, a run
after a step, from the posterior mean has

    ``Cov[u_q(p), u_k(r)] = C_qk (X_p P X_r' + E_pr)``,

with ``C`` the correlation of queries (``gaussian.queries``), ``P`` the posterior covariance of the
weights, ``E`` that of a run's error, zero between runs. Given values ``z`` at observed points ``o``
a draw ``u`` becomes

    ``u + Cov[u, u_o] Cov[u_o, u_o]^-1 (z - u_o)``,

which is a draw of the conditional normal (Matheron's rule: Papandreou & Yuille 2010, Wilson et al.
2020). A factor common to all deviations of a draw, its scale, cancels in the matrix. Coefficients
are the same in all runs, so one system holds what was observed in any of them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import gammaln

from bayes_simfluence.gaussian.linear_gaussian import Conditioned


class Deviations(NamedTuple):
    """What is believed of some runs' deviations before any of their losses is observed.

    Attributes:
        weights: their posterior, given the fitted runs.
        designs: of the runs to be simulated.
        error: covariance of a run's error.
        correlation: of the queries.
    """

    weights: Conditioned
    designs: Float[np.ndarray, "run step weight"]
    error: Float[np.ndarray, "step step"]
    correlation: Float[np.ndarray, "query query"]

    def of_coefficients(
        self, one: Float[np.ndarray, "a weight"], other: Float[np.ndarray, "b weight"]
    ) -> Float[np.ndarray, "a b"]:
        """``X_a P X_b'``, with ``P = I - D' K^-1 D`` of the fitted runs' designs ``D``."""
        fitted, gain = np.asarray(self.weights.designs), np.asarray(self.weights.gain)
        return one @ other.T - (one @ fitted.T) @ (gain @ other.T)


class Observed(NamedTuple):
    """Deviations that were observed, and their covariance's Cholesky factor.

    Attributes:
        before: of all points, before any was observed.
        run, step: of each point at which some query was observed.
        point: of each observed deviation, among these.
        query: of each observed deviation.
        value: the deviations, in units of each query's spread.
        factor: lower.
    """

    before: Deviations
    run: Int[np.ndarray, " point"]
    step: Int[np.ndarray, " point"]
    point: Int[np.ndarray, " seen"]
    query: Int[np.ndarray, " seen"]
    value: Float[np.ndarray, " seen"]
    factor: Float[np.ndarray, "seen seen"]

    @classmethod
    def of(cls, before: Deviations, value: Float[np.ndarray, "run step query"]) -> "Observed":
        """From deviations, NaN where not observed; at least one is."""
        known = np.isfinite(value)
        run, step = np.nonzero(known.any(axis=2))
        point, query = np.nonzero(known[run, step])
        designs = before.designs[run, step]
        points = before.of_coefficients(designs, designs)
        same = run[:, None] == run[None, :]
        points = points + np.where(same, before.error[np.ix_(step, step)], 0.0)
        whole = points[np.ix_(point, point)] * before.correlation[np.ix_(query, query)]
        factor = cholesky(whole, lower=True, check_finite=False)
        return cls(before, run, step, point, query, value[known], factor)

    def among(self, points: Float[np.ndarray, "*draw run step query"]) -> np.ndarray:
        """What was observed among all points."""
        return points[..., self.run[self.point], self.step[self.point], self.query]

    def moves(
        self,
        drawn: Float[np.ndarray, "draw run step query"],
        trust: Float[np.ndarray, "run step query"],
    ) -> tuple[Float[np.ndarray, "draw run step query"], Float[np.ndarray, "draw run step query"]]:
        """What draws of all deviations lack, in units of each query's spread.

        Args:
            drawn: deviations with runs' errors.
            trust: factor on the covariance of each point with what was observed, one at that
                (``gaussian.trust``).

        Returns:
            To be added to deviations by the coefficients alone, and to those with runs' errors.
        """
        before, point = self.before, self.point
        # The last column is what was observed, the others what draws have there.
        known = np.concatenate([self.among(drawn), self.value[None]]).T
        grid = np.zeros((len(self.run), len(before.correlation), known.shape[1]))
        grid[point, self.query] = cho_solve((self.factor, True), known, check_finite=False)
        pulls = np.einsum("pkd,kq->pdq", grid, before.correlation, optimize=True)
        designs = before.designs[self.run, self.step]
        mean, whole = np.empty(drawn.shape), np.empty(drawn.shape)
        for run, of_run in enumerate(before.designs):
            across = before.of_coefficients(of_run, designs)
            own = self.run == run
            of_mean = np.tensordot(across, pulls, axes=1)
            error = np.tensordot(before.error[:, self.step[own]], pulls[own], axes=1)
            mean[:, run] = _moved(of_mean, trust[run])
            whole[:, run] = _moved(of_mean + error, trust[run])
        return mean, whole

    def log_density(self, df: float) -> float:
        """Of all values together: a multivariate Student-t, since they share an unknown scale."""
        count = len(self.value)
        white = solve_triangular(self.factor, self.value, lower=True, check_finite=False)
        volume = np.log(np.diagonal(self.factor)).sum() + 0.5 * count * np.log(df * np.pi)
        tails = 0.5 * (df + count) * np.log1p(white @ white / df)
        return float(gammaln(0.5 * (df + count)) - gammaln(0.5 * df) - volume - tails)


def _moved(
    told: Float[np.ndarray, "step column query"], trust: Float[np.ndarray, "step query"]
) -> Float[np.ndarray, "draw step query"]:
    """Moves of a run's draws from what their own values tell, and in the last column the true ones.

    A draw ``u`` becomes ``u - G u_o + sqrt(1 - rho^2) G u_o + rho G z``: its first difference is
    independent of ``u_o``.
    """
    told = np.moveaxis(told, 1, 0)
    return trust * told[-1] - (1.0 - np.sqrt(1.0 - np.square(trust))) * told[:-1]
