"""How good simulated runs are: kernels on plain arrays for ONE run or ONE point, mapped outside.

Losses are in nats. Kernels take true losses and draws of them; time 0 is given to every method
and never scored, nor is a time that was not recorded. A point method has one draw.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import norm, rankdata

AT_ONCE = 5_000_000
"""Numbers that are ranked at once."""

INTERVAL = 0.90
"""Probability of bootstrap intervals."""

COVERAGES = (0.50, 0.80, 0.90, 0.95)
"""Probabilities of the central intervals whose coverage is reported."""


def spearman(first: Float[np.ndarray, " item"], second: Float[np.ndarray, " item"]) -> float:
    """Rank correlation in [-1, 1]; NaN where either side is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 40.0]))
    1.0
    """
    left, right = (rankdata(side) - (len(side) + 1) / 2 for side in (first, second))
    spread = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / spread) if spread > 0 else float("nan")


def crps(
    draws: Float[np.ndarray, "draw *point"], truth: Float[np.ndarray, "*point"]
) -> Float[np.ndarray, "*point"]:
    """Continuous ranked probability score in nats, lower is better; unbiased in the draws.

    ``E|X - y| - E|X - X'| / 2`` with distinct pairs of draws (Gneiting & Raftery 2007, eq. 21;
    Ferro 2014); the absolute error when there is one draw.
    """
    size = len(draws)
    error = np.abs(draws - truth[None]).mean(axis=0)
    if size == 1:
        return error
    # Sum of |x_i - x_j| over pairs, from the order statistics.
    weights = 2.0 * np.arange(1, size + 1) - size - 1.0
    pairs = np.tensordot(weights, np.sort(draws, axis=0), axes=1)
    return error - pairs / (size * (size - 1))


def coverage(
    draws: Float[np.ndarray, "draw *point"],
    truth: Float[np.ndarray, "*point"],
    probabilities: Sequence[float] = COVERAGES,
) -> Float[np.ndarray, "probability *point"]:
    """1 where the central interval of the draws holds the truth, else 0; NaN for one draw.

    The quantiles are Weibull's plotting positions, whose expected coverage is exact when both
    tails fall on a draw (as for 90% of 199 draws), and close to it for a hundred or more.
    """
    if len(draws) == 1:
        return np.full((len(probabilities), *truth.shape), np.nan)
    ends = [tails(probability) for probability in probabilities]
    low, high = np.moveaxis(np.quantile(draws, ends, axis=0, method="weibull"), 1, 0)
    return ((truth[None] >= low) & (truth[None] <= high)).astype(float)


def pit(
    draws: Float[np.ndarray, "draw *point"], truth: Float[np.ndarray, "*point"]
) -> Float[np.ndarray, "*point"]:
    """Probability integral transform: the share of draws below the truth, in (0, 1)."""
    below = (draws < truth[None]).sum(axis=0) + 0.5 * (draws == truth[None]).sum(axis=0)
    return (below + 0.5) / (len(draws) + 1.0)


def log_density(
    draws: Float[np.ndarray, "draw *point"], truth: Float[np.ndarray, "*point"]
) -> Float[np.ndarray, "*point"]:
    """Log density (1/nats, natural log) of the truth under a normal with the draws' moments.

    NaN where the draws have no spread.
    """
    if len(draws) == 1:
        return np.full(truth.shape, np.nan)
    sd = draws.std(axis=0, ddof=1)
    known = np.where(sd > 0, sd, 1.0)
    return np.where(sd > 0, norm.logpdf(truth, draws.mean(axis=0), known), np.nan)


def run_scores(
    draws: Float[np.ndarray, "draw time query"],
    mean: Float[np.ndarray, "time query"],
    truth: Float[np.ndarray, "time query"],
) -> dict[str, float]:
    """Every score of one run that is an average over its recorded points.

    A query's final loss is the last that was recorded in the run.

    Args:
        draws: predictive draws, time 0 first.
        mean: noise-free mean trajectory, time 0 first.
        truth: recorded losses, time 0 first; NaN where not recorded, but not everywhere.
    """
    known = np.isfinite(truth[1:])
    last = last_known(known)
    start, true_start = (np.broadcast_to(loss[:1], known.shape)[last] for loss in (mean, truth))
    final, true_final = mean[1:][last], truth[1:][last]
    drawn, true = draws[:, 1:][:, known], truth[1:][known]
    error = mean[1:][known] - true
    covers = dict(zip(COVERAGES, coverage(drawn, true), strict=True))
    return {
        "mse": float(np.square(error).mean()),
        "mae": float(np.abs(error).mean()),
        "spearman_query": spearman(final, true_final),
        "spearman_change": spearman(final - start, true_final - true_start),
        "crps": float(crps(drawn, true).mean()),
        **{f"coverage_{round(100 * p)}": float(inside.mean()) for p, inside in covers.items()},
        "final_coverage_90": float(covers[0.90][last[known]].mean()),
        "elpd": float(log_density(drawn, true).mean()),
    }


def last_known(known: Bool[np.ndarray, "time query"]) -> Bool[np.ndarray, "time query"]:
    """Marks the last known time of each query that has one.

    >>> last_known(np.array([[True, False], [True, False], [False, False]])).astype(int).tolist()
    [[0, 0], [1, 0], [0, 0]]
    """
    later = np.cumsum(known[::-1], axis=0)[::-1]
    return known & (later == 1)


def spearman_across_runs(
    mean: Float[np.ndarray, "run query"], truth: Float[np.ndarray, "run query"]
) -> float:
    """Rank correlation over runs of the final losses, averaged over queries (the form of LDS).

    A query whose losses are all equal on either side, or that has a NaN, is left out; NaN when no
    query remains.
    """
    every = np.arange(len(mean))[None]
    return float(spearman_resampled(mean, truth, every)[0])


def spearman_resampled(
    mean: Float[np.ndarray, "run query"],
    truth: Float[np.ndarray, "run query"],
    chosen: Int[np.ndarray, "resample again"],
) -> Float[np.ndarray, " resample"]:
    """``spearman_across_runs`` of resampled runs, many at once.

    Args:
        mean, truth: final losses.
        chosen: runs of each resample, by number.
    """
    size = max(1, AT_ONCE // (chosen.shape[1] * mean.shape[1]))
    correlations = [
        _rank_correlations(mean[batch], truth[batch])
        for batch in np.split(chosen, range(size, len(chosen), size))
    ]
    return np.concatenate(correlations)


def tails(probability: float) -> list[float]:
    """Levels of the two quantiles between which a central interval lies.

    >>> tails(0.5)
    [0.25, 0.75]
    """
    return [(1.0 - probability) / 2.0, (1.0 + probability) / 2.0]


def resamples_of(key: jax.Array, resamples: int, count: int) -> Int[np.ndarray, "resample again"]:
    """Items drawn with replacement for a bootstrap, by number; the same ones for the same key."""
    return np.asarray(jax.random.randint(key, (resamples, count), 0, count))


def bootstrap_interval(values: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    """Central interval of a statistic's resamples, those that are NaN left out; NaN without any."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, tails(INTERVAL))
    return float(low), float(high)


def _rank_correlations(
    mean: Float[np.ndarray, "resample run query"], truth: Float[np.ndarray, "resample run query"]
) -> Float[np.ndarray, " resample"]:
    left, right = (rankdata(side, axis=1) - (side.shape[1] + 1) / 2 for side in (mean, truth))
    spread = np.sqrt(np.square(left).sum(axis=1) * np.square(right).sum(axis=1))
    kept = spread > 0
    rho = np.divide((left * right).sum(axis=1), spread, out=np.zeros_like(spread), where=kept)
    count = kept.sum(axis=1)
    return np.where(count > 0, rho.sum(axis=1) / np.maximum(count, 1), np.nan)
