"""How far what was observed of a run tells of the rest of it, learned from left-out runs.

The conditional normal of ``gaussian.observed`` is right where the model is. But the correlation of
queries was learned from a handful of runs, and that of a run's error along training has the form of
a prior, so bands given observed losses come out too narrow, most of all where they narrow most.

So a point ``u`` that was not observed goes with those that were, ``o``, by a factor less than the
model says: their covariance is ``rho_u K_uo``, while each keeps its own. With the model's ``G =
K_uo K_oo^-1`` and conditional variance ``V`` the mean given ``z`` is ``rho_u G z`` and the variance
``K_uu - rho_u^2 (K_uu - V_uu)``. Where the model leaves the share ``r = V_uu / K_uu``,

    ``rho_u^2 = 1 / (1 + (f - 1) r)``,

which makes little variance ``f`` times as much, and never more than there was before anything was
observed. There is one ``f`` for queries of which nothing was observed in the run and one for other
times: the least with which errors of left-out runs, given half of their queries or their
beginnings, are no larger beside their predicted sd than they are when nothing is given.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from bayes_simfluence.gaussian.nested import Apart
from bayes_simfluence.gaussian.observed import Deviations
from bayes_simfluence.gaussian.queries import Shares, correlation, loadings_with

FACTORS = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0)
DOUBT = 1.0
"""Standard errors over runs by which a factor has to do: the fewer runs, the wider bands."""
HALVES = 4
"""Random halves of the queries that are observed in turn, in each left-out run."""
BEGINNINGS = (0.25, 0.5, 0.75)
"""Shares of a run that are observed in turn."""


class Trust(NamedTuple):
    """Factors on the variance that observed losses of a run leave, while it is little.

    Attributes:
        queries: of queries of which nothing was observed in the run.
        times: of times at which nothing was.
    """

    queries: float = 1.0
    times: float = 1.0

    def at(
        self, before: Deviations, known: Bool[np.ndarray, "run step query"]
    ) -> Float[np.ndarray, "run step query"]:
        """``rho`` of all points, one at those that are ``known``.

        Shares are those of a run's times and of its queries, each as if the other were observed in
        full. Of a run nothing of which was observed, others' observed queries tell, at any time.
        """
        squares = np.empty(known.shape)
        for run, of_run in enumerate(known):
            seen = np.asarray((of_run if of_run.any() else known.any(axis=0)).any(axis=0))
            of_queries = _kept(self.queries, _left(before.correlation, seen))
            between = before.of_coefficients(before.designs[run], before.designs[run])
            between = between + before.error
            by_others = _kept(self.times, _left(between, of_run.any(axis=1)))
            squares[run] = by_others[:, None] * of_queries
            for times in np.unique(of_run.T, axis=0):
                alike = (of_run == times[:, None]).all(axis=0)
                if times.any():
                    own = _kept(self.times, _left(between, times))[:, None]
                    squares[run][:, alike] = np.maximum(squares[run][:, alike], own)
        return np.sqrt(squares)


AS_MODELLED = Trust()
"""What is observed tells of the rest what the model says."""


def learned_trust(
    groups: Iterable[Apart],
    shares: Shares | None,
    known: Bool[np.ndarray, "run row"],
    features: Float[np.ndarray, "query feature"],
    inflation: Float[np.ndarray, " row"],
    progress: Float[np.ndarray, " row"],
) -> Trust:
    """The least factors with which bands of left-out runs hold, given a part of each.

    They hold where the mean square of errors over their predicted sd is at most one, or what it is
    of points when nothing is given. Given half of the queries, points and means over the others
    count alike, since these are what bands are read for. Given a beginning, points alone do, since
    queries go together as they do anyway, and for each share of the run that it may be, since those
    that are too wide make up for none that are too narrow.

    Args:
        groups: left-out runs, and what others say of how queries go together.
        shares: by which the correlation of queries is learned.
        known: whether the points were recorded.
        features: of the queries; without columns where there are none.
        inflation: of the sd.
        progress: through training.
    """
    by_queries, by_times = [], []
    for group in groups:
        others = known[group.others]
        of_queries = correlation(loadings_with(shares, group.z, others, features))
        inflated = group.covariance * np.outer(inflation, inflation)
        for run, error, covariance in zip(group.runs, group.error, inflated, strict=True):
            rows = np.flatnonzero(known[run])
            of_run = error[rows], covariance[np.ix_(rows, rows)], of_queries
            by_queries.append(_squares_of_queries(*of_run))
            by_times.append(_squares_of_times(*of_run[:2], progress[rows]))
    return Trust(_least(by_queries), _least(by_times))


def _least(squares: list[Float[np.ndarray, "part candidate_or_nothing"]]) -> float:
    """The least factor that does in all parts, from mean squares of each run; NaN: no such part.

    The largest where no run was left out.
    """
    if not squares:
        return FACTORS[-1]
    of_runs = np.array(squares)
    given, nothing = of_runs[:, :, :-1], of_runs[:, :, -1:]
    # At most one, or no more than when nothing is given.
    enough = (_at_most(given) <= 1.0) | (_at_most(given - nothing) <= 0.0)
    does = enough.all(axis=0)
    return FACTORS[int(does.argmax())] if does.any() else FACTORS[-1]


def _at_most(
    values: Float[np.ndarray, "run part candidate"],
) -> Float[np.ndarray, "part candidate"]:
    """Means over runs, and as many standard errors; zero where no run has such a part."""
    seen = np.isfinite(values)
    counts = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, values, 0.0).sum(axis=0) / counts
    variance = np.where(seen, np.square(values - mean), 0.0).sum(axis=0) / counts
    return np.asarray(mean + DOUBT * np.sqrt(variance / counts))


def _kept(factor: float, left: Float[np.ndarray, "*point"]) -> Float[np.ndarray, "*point"]:
    """``rho^2`` where the model leaves the share ``left`` of a variance."""
    return 1.0 / (1.0 + (factor - 1.0) * left)


def _left(
    covariance: Float[np.ndarray, "point point"], seen: Bool[np.ndarray, " point"]
) -> Float[np.ndarray, " point"]:
    """Share of each point's variance that the ``seen`` ones leave, zero of themselves."""
    across = covariance[seen]
    told = (across * np.linalg.solve(across[:, seen], across)).sum(axis=0)
    share = np.clip(1.0 - told / np.diagonal(covariance), 0.0, 1.0)
    return np.where(seen, 0.0, share)


def _squares_of_queries(
    error: Float[np.ndarray, "row query"],
    covariance: Float[np.ndarray, "row row"],
    of_queries: Float[np.ndarray, "query query"],
) -> Float[np.ndarray, "one candidate_or_nothing"]:
    """Of a run given half of its queries at all times; NaN where there are no two, or no time."""
    z = error / np.sqrt(np.diagonal(covariance))[:, None]
    count, total = z.shape[1], np.zeros((1, len(FACTORS) + 1))
    if count < 2 or not len(z):
        return np.full(total.shape, np.nan)
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(count), (HALVES, 1)), axis=1):
        seen, other = order[: count // 2], order[count // 2 :]
        across = of_queries[np.ix_(seen, other)]
        gain = np.linalg.solve(of_queries[np.ix_(seen, seen)], across)
        told, own = across.T @ gain, of_queries[np.ix_(other, other)]
        read = _points_and_mean(len(other))
        for at, square in enumerate(_candidates(1.0 - np.diagonal(told))):
            rest = np.sqrt(1.0 - square)
            whole = own - told + np.outer(rest, rest) * told
            missed = (z[:, other] - np.sqrt(square) * (z[:, seen] @ gain)) @ read
            variance = np.einsum("kq,kl,lq->q", read, whole, read)[None]
            squares = (np.square(missed) / variance).mean(axis=0)
            both = 0.5 * (squares[:-1].mean() + squares[-1])
            total[0, at] += (both if at < len(FACTORS) else squares[:-1].mean()) / HALVES
    return total


def _squares_of_times(
    error: Float[np.ndarray, "row query"],
    covariance: Float[np.ndarray, "row row"],
    progress: Float[np.ndarray, " row"],
) -> Float[np.ndarray, "beginning candidate_or_nothing"]:
    """Of a run given all queries of its beginnings; NaN where there is nothing then or later."""
    found = np.full((len(BEGINNINGS), len(FACTORS) + 1), np.nan)
    for part, share in enumerate(BEGINNINGS):
        seen = progress <= share
        if not seen.any() or seen.all():
            continue
        gain = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, ~seen)])
        told = gain.T @ error[seen]
        own = np.diagonal(covariance)[~seen][:, None]
        left = _left(covariance, seen)[~seen][:, None]
        for at, square in enumerate(_candidates(left)):
            missed = error[~seen] - np.sqrt(square) * told
            found[part, at] = (np.square(missed) / (own * (1.0 - square * (1.0 - left)))).mean()
    return found


def _candidates(left: Float[np.ndarray, "*point"]) -> list[Float[np.ndarray, "*point"]]:
    """``rho^2`` at each factor, and at last where nothing is given."""
    return [*(_kept(factor, left) for factor in FACTORS), np.zeros(left.shape)]


def _points_and_mean(count: int) -> Float[np.ndarray, "point point_or_mean"]:
    return np.concatenate([np.eye(count), np.full((count, 1), 1.0 / count)], axis=1)
