"""The plain reference of ``linear_gaussian``: big covariances, solved as textbooks write them.

Slow, in NumPy, for tests and for reading: nothing is shared between queries or between the runs
that are left out.
"""

import numpy as np
from jaxtyping import Array, Float
from scipy.stats import multivariate_normal

from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian


def posterior_of_weights(
    gaussian: LinearGaussian, change: Float[Array | np.ndarray, "run row query"]
) -> tuple[Float[np.ndarray, "weight query"], Float[np.ndarray, "weight weight"]]:
    """Mean of the weights given the points, and their covariance, up to each query's scale.

    By conditioning the joint normal of weights and recorded points (Bishop 2006, eqs. 2.81, 2.82).
    """
    designs, covariance, points = _recorded(gaussian, change)
    across = designs.T @ np.linalg.inv(covariance)
    return across @ points, np.eye(designs.shape[1]) - across @ designs


def predictions_of_left_out(
    gaussian: LinearGaussian, change: Float[Array | np.ndarray, "run row query"], run: int
) -> tuple[Float[np.ndarray, "recorded query"], Float[np.ndarray, "recorded recorded"]]:
    """Error (true minus predicted) of a run's recorded points, and its covariance.

    By really leaving the run out, up to each query's scale squared.
    """
    _, covariance, points = _recorded(gaussian, change)
    known = np.asarray(gaussian.known)
    own = np.repeat(np.arange(len(known)), known.sum(axis=1)) == run
    across = covariance[own][:, ~own] @ np.linalg.inv(covariance[~own][:, ~own])
    return (
        points[own] - across @ points[~own],
        covariance[own][:, own] - across @ covariance[~own][:, own],
    )


def score_of_evidence(
    gaussian: LinearGaussian, change: Float[Array | np.ndarray, "run row query"]
) -> float:
    """Log density per recorded point at each query's best scale, averaged over queries."""
    _, covariance, points = _recorded(gaussian, change)
    densities = []
    for point in points.T:
        squared_scale = point @ np.linalg.solve(covariance, point) / len(point)
        densities.append(multivariate_normal.logpdf(point, cov=squared_scale * covariance))
    return float(np.mean(densities) / len(points))


def _recorded(
    gaussian: LinearGaussian, change: Float[Array | np.ndarray, "run row query"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Designs, covariance and changes of the recorded points alone."""
    known = np.asarray(gaussian.known).reshape(-1)
    designs = np.asarray(gaussian.designs).reshape(len(known), -1)[known]
    errors = np.kron(np.eye(len(gaussian.known)), np.asarray(gaussian.error))
    covariance = designs @ designs.T + errors[known][:, known]
    return designs, covariance, np.asarray(change).reshape(len(known), -1)[known]
