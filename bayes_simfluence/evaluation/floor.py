"""The floor of any simulator's squared error: what runs of one curriculum differ by.

A run's loss is ``L = f + d``: what its curriculum and initial losses make of it on average, and a
deviation ``d`` that has grown from rounding. Twins have the same ``f`` and deviations of their own,
so that ``E (L - L')^2 = 2 Var d``. A simulator can only give both the same prediction ``p``, whose
expected squared error ``(p - f)^2 + Var d`` is at least half of the twins' mean squared difference.
"""

from dataclasses import dataclass

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, keyed, positive_integer
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.twins import twin_groups
from bayes_simfluence.evaluation.metrics import bootstrap_interval, resamples_of


@dataclass(frozen=True)
class Floor:
    """The least expected squared error that any simulator can have, as twins show it.

    Attributes:
        mse: nats squared, mean over twins, times after the first and queries.
        low, high: ends of its 90% bootstrap interval over curricula; NaN with fewer than two.
        by_time: the same at each time, 0 to T; NaN where not recorded.
        curricula: how many have twins.
    """

    mse: float
    low: float
    high: float
    by_time: Float[np.ndarray, " time"]
    curricula: int

    def __str__(self) -> str:
        interval = f" [{self.low:.2g}, {self.high:.2g}]" if np.isfinite(self.low) else ""
        return (
            f"Floor of any simulator's MSE, by {self.curricula} curricula that were trained again "
            f"from weights off by rounding: {self.mse:.2g}{interval} nats^2."
        )


def floor(runs: xr.Dataset, *, key: jax.Array, resamples: int = 1000) -> Floor:
    """Half of the mean squared difference between twins: no simulator errs less in expectation.

    In terms of one pair, after the fact: the best prediction is the twins' mean, whose squared
    error is a quarter of the squared difference, half of what can be expected of a prediction that
    was made before.

    Args:
        runs: recorded with twins (``bs.record(..., twins=K)``); other runs do not matter.
        key: decides the resamples.
        resamples: of the bootstrap over curricula.

    Raises:
        Misuse: no curriculum that was trained more than once among usable ``runs``.

    >>> import jax, bayes_simfluence as bs
    >>> runs = bs.runs_from_arrays(
    ...     batch=[[[0]], [[1]], [[1]]], loss=[[[1.0], [0.9]], [[1.0], [0.8]], [[1.0], [0.6]]],
    ...     twin=["0", "1", "1"])
    >>> round(floor(runs, key=jax.random.key(0)).mse, 4)
    0.02
    """
    keyed(key)
    positive_integer("resamples", resamples)
    runs = usable_runs(runs)
    variance = twin_variances(runs)
    if not len(variance):
        raise Misuse(
            "runs",
            got="no curriculum that was trained more than once",
            expected="twins",
            do="record them with record(..., twins=K), and keep both runs of a pair",
        )
    means = by_curriculum(variance)
    again = means[resamples_of(key, resamples, len(means))].mean(axis=1)
    low, high = bootstrap_interval(again) if len(means) > 1 else (float("nan"),) * 2
    known = np.isfinite(variance)
    count = known.sum(axis=(0, 2))
    total = np.where(known, variance, 0.0).sum(axis=(0, 2))
    by_time = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return Floor(float(means.mean()), low, high, by_time, len(means))


def twin_variances(runs: xr.Dataset) -> Float[np.ndarray, "curriculum time query"]:
    """Variances of the losses between twins, nats squared; of a pair, half the squared difference.

    NaN where fewer than two of the twins were recorded. Curricula without any loss of two twins
    after time 0 are left out.
    """
    loss = np.asarray(runs["loss"].values, float)
    found = [_variance(loss[group]) for group in twin_groups(runs)]
    kept = [one for one in found if np.isfinite(one[1:]).any()]
    return np.stack(kept) if kept else np.zeros((0, *loss.shape[1:]))


def by_curriculum(
    variance: Float[np.ndarray, "curriculum time query"],
) -> Float[np.ndarray, " curriculum"]:
    """Means over the recorded points after time 0, as the MSE of a run has them."""
    later = variance[:, 1:]
    return np.asarray(later.mean(axis=(1, 2), where=np.isfinite(later)))


def _variance(loss: Float[np.ndarray, "twin time query"]) -> Float[np.ndarray, "time query"]:
    known = np.isfinite(loss)
    count = known.sum(axis=0)
    mean = np.where(known, loss, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.square(np.where(known, loss - mean, 0.0)).sum(axis=0)
    return np.where(count > 1, squares / np.maximum(count - 1, 1), np.nan)
