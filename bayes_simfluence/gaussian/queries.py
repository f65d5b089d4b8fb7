"""How queries depend on one another: a correlation of low rank plus a diagonal.

Effects, scales and errors are separable: with ``C`` the correlation of queries, a draw of all
queries' deviations is a draw for independent ones times ``C^(1/2)``. The posterior mean and the one
factorization over points do not change, because all queries were recorded at the same times.

``C = A A' + diag(1 - rows of A squared)`` is learned from standardized errors of left-out runs: a
part of their sample correlation, a part of what gradient features say (queries with alike gradients
move alike), the rest each query's own. The parts are those under which errors of further left-out
runs are most likely.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

RANK = 16
"""Most common factors; what they leave out is each query's own."""
SAMPLE_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
FEATURE_SHARES = (0.0, 0.3, 0.8)
"""Of what the sample correlation leaves."""
FOLDS = 8
"""Most groups of runs that are left out in turn to choose the shares."""
OWN = 0.02
"""Least variance that is a query's own."""
PENALTIES = np.geomspace(1e-3, 1e3, 13)
"""Of the regression of weights on features, over the mean size of features."""
RIDGE = 0.1
"""Added to the features' kernel where loadings are carried to queries that were not recorded."""


class Shares(NamedTuple):
    """Of a correlation: of the sample's, and of what features say."""

    sample: float
    features: float


def query_loadings(
    z: Float[np.ndarray, "run row query"],
    known: Bool[np.ndarray, "run row"],
    features: Float[np.ndarray, "query feature"],
) -> Float[np.ndarray, "query factor"]:
    """Loadings ``A`` of the queries on common factors.

    Args:
        z: errors of left-out runs over their predicted sd.
        known: whether the points were recorded.
        features: of the queries; without columns where there are none.

    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(20, 4, 1)) * np.ones(3)  # all queries move as one
    >>> loadings = query_loadings(z, np.ones((20, 4), bool), np.zeros((3, 0)))
    >>> bool((loadings @ loadings.T > 0.9).all())
    True
    """
    return loadings_with(chosen_shares(z, known, features), z, known, features)


def chosen_shares(
    z: Float[np.ndarray, "run row query"],
    known: Bool[np.ndarray, "run row"],
    features: Float[np.ndarray, "query feature"],
) -> Shares | None:
    """The shares under which left-out runs are most likely; None where nothing can be learned.

    Arguments as for ``query_loadings``.
    """
    groups = [z[run][known[run]] for run in np.flatnonzero(known.any(axis=1))]
    if z.shape[2] < 2 or len(groups) < 3:
        return None
    directions = _unit_rows(features)
    folds = [range(first, len(groups), FOLDS) for first in range(min(FOLDS, len(groups)))]
    shares = [
        Shares(sample, (1.0 - sample) * of_rest)
        for sample, of_rest in product(SAMPLE_SHARES, FEATURE_SHARES)
        if directions.any() or not of_rest
    ]
    scores = np.zeros(len(shares))
    for fold in folds:
        kept = np.concatenate([group for at, group in enumerate(groups) if at not in fold])
        left_out = np.concatenate([groups[at] for at in fold])
        scores += [
            _log_density(left_out, _loadings(_standardized(kept), directions, *both))
            for both in shares
        ]
    return shares[int(scores.argmax())]


def loadings_with(
    shares: Shares | None,
    z: Float[np.ndarray, "run row query"],
    known: Bool[np.ndarray, "run row"],
    features: Float[np.ndarray, "query feature"],
) -> Float[np.ndarray, "query factor"]:
    """Loadings with given shares; other arguments as for ``query_loadings``."""
    if shares is None:
        return np.zeros((z.shape[2], 0))
    return _loadings(_standardized(z[known]), _unit_rows(features), *shares)


def carried_loadings(
    loadings: Float[np.ndarray, "query factor"],
    features: Float[np.ndarray, "query feature"],
    new: Float[np.ndarray, "new feature"],
) -> Float[np.ndarray, "new factor"]:
    """Loadings of queries that were not recorded, by kernel regression on features.

    Zero where there are no features: such a query depends on no other.
    """
    known, other = _unit_rows(features), _unit_rows(new)
    kernel = known @ known.T + RIDGE * np.eye(len(known))
    return _bounded(other @ known.T @ np.linalg.solve(kernel, loadings))


def carried_weights(
    weights: Float[np.ndarray, "weight query"],
    features: Float[np.ndarray, "query feature"],
    new: Float[np.ndarray, "new feature"],
) -> Float[np.ndarray, "weight new"]:
    """Weights of queries that were not recorded: linear in features, by ridge regression.

    What recorded queries taught of a prior mean that goes by features, such as too large a drift,
    holds for others as well. The penalty is the one under which queries left out in turn are
    predicted best; an infinite one leaves the recorded queries' mean, as does having no features.

    >>> features = np.random.default_rng(0).normal(size=(30, 2))
    >>> weights = np.array([[1.0, -2.0]]) @ features.T + 3.0
    >>> carried_weights(weights, features, np.array([[1.0, 1.0]])).round(1).tolist()
    [[2.0]]
    """
    mean = weights.mean(axis=1, keepdims=True)
    centre = features.mean(axis=0)
    inside, across = features - centre, new - centre
    values, vectors = np.linalg.eigh(inside @ inside.T)
    values = np.maximum(values, 0.0)
    told = vectors.T @ (weights - mean).T

    def missed(penalty: float) -> float:
        kept = values / (values + penalty)
        residual = vectors @ ((1.0 - kept)[:, None] * told)
        own = np.einsum("qv,v,qv->q", vectors, kept, vectors) + 1.0 / len(features)
        return float(np.square(residual / np.maximum(1.0 - own, 1e-6)[:, None]).sum())

    penalty = min((*((values.mean() or 1.0) * PENALTIES), np.inf), key=missed)
    carried = across @ inside.T @ vectors @ (told / (values + penalty)[:, None])
    return np.asarray(mean + carried.T)


def own_sd(loadings: Float[np.ndarray, "query factor"]) -> Float[np.ndarray, " query"]:
    """Sd of what is each query's own, beside its share in the common factors."""
    return np.sqrt(1.0 - np.square(loadings).sum(axis=1))


def correlation(loadings: Float[np.ndarray, "query factor"]) -> Float[np.ndarray, "query query"]:
    """``C``, whole."""
    return loadings @ loadings.T + np.diag(np.square(own_sd(loadings)))


def _loadings(
    standardized: Float[np.ndarray, "point query"],
    directions: Float[np.ndarray, "query feature"],
    sample: float,
    of_features: float,
) -> Float[np.ndarray, "query factor"]:
    parts = [np.sqrt(sample) * standardized.T, np.sqrt(of_features) * directions]
    left, size, _ = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
    return _bounded(left[:, :RANK] * size[:RANK])


def _bounded(loadings: Float[np.ndarray, "query factor"]) -> Float[np.ndarray, "query factor"]:
    size = np.sqrt(np.square(loadings).sum(axis=1, keepdims=True))
    return loadings * np.minimum(1.0, np.sqrt(1.0 - OWN) / np.maximum(size, 1e-12))


def _standardized(z: Float[np.ndarray, "point query"]) -> Float[np.ndarray, "point query"]:
    """Columns of unit length, so that products of columns are correlations around zero."""
    return z / np.maximum(np.sqrt(np.square(z).sum(axis=0, keepdims=True)), 1e-12)


def _unit_rows(features: Float[np.ndarray, "query feature"]) -> Float[np.ndarray, "query feature"]:
    size = np.sqrt(np.square(features).sum(axis=1, keepdims=True))
    return np.asarray(features) / np.where(size > 0, size, 1.0)


def _log_density(
    z: Float[np.ndarray, "point query"], loadings: Float[np.ndarray, "query factor"]
) -> float:
    """Of the points' rows under normal(0, C), up to a constant, by the Woodbury identity."""
    sd = own_sd(loadings)
    white, scaled = z / sd, loadings / sd[:, None]
    factor = np.linalg.cholesky(np.eye(loadings.shape[1]) + scaled.T @ scaled)
    common = np.linalg.solve(factor, scaled.T @ white.T)
    squares = np.square(white).sum() - np.square(common).sum()
    volume = np.log(sd).sum() + np.log(np.diagonal(factor)).sum()
    return float(-0.5 * squares - len(z) * volume)
