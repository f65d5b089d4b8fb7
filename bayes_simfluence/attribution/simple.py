"""Baselines that ignore what a run trains on."""

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.twins import without_twins
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.simulators.affine import AffineSimulator
from bayes_simfluence.simulators.mean import MeanSimulator


def persistence(runs: xr.Dataset) -> Posterior:
    """Every loss stays what it was before training, without spread.

    >>> import bayes_simfluence as bs
    >>> print(bs.persistence(bs.example_runs()).verdict)
    The initial loss kept; nothing is learned.
    """
    runs = usable_runs(runs)
    zero = np.zeros((runs.sizes["query"], runs.sizes["train"]))
    return Posterior(
        simulator=AffineSimulator(zero, zero),
        verdict=Verdict(True, "The initial loss kept; nothing is learned."),
        runs=runs,
        settings={"method": "persistence"},
    )


def mean_trajectory(runs: xr.Dataset) -> Posterior:
    """Every run follows the fitted runs' mean; their spread around it is the band.

    The band holds each run's difference from the mean of the others. Where losses are missing,
    the mean at a time is over the runs that were recorded then; times at which none was, and the
    differences of a run between its own recorded times, are interpolated linearly, and kept
    constant after the last. Of twins the first alone counts.

    >>> import bayes_simfluence as bs
    >>> bs.mean_trajectory(bs.example_runs()).settings
    {'method': 'mean trajectory'}
    """
    runs, _ = without_twins(usable_runs(runs))
    count = runs.sizes["run"]
    if count < 2:
        raise Misuse(
            "runs", got="one run", expected="at least two", do="record more runs for a spread"
        )
    loss = np.asarray(runs["loss"].values, float)
    change = loss - loss[:, :1]
    residual = [
        _filled(change[run] - _mean(np.delete(change, run, axis=0))) for run in range(count)
    ]
    return Posterior(
        simulator=MeanSimulator(_mean(change), np.stack(residual)),
        verdict=Verdict(True, f"The mean of {count} runs, with the spread between them."),
        runs=runs,
        settings={"method": "mean trajectory"},
    )


def _mean(change: Float[np.ndarray, "run time query"]) -> Float[np.ndarray, "time query"]:
    """Mean over the runs recorded at each time, interpolated between such times."""
    known = np.isfinite(change)
    total = np.where(known, change, 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return _filled(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _filled(change: Float[np.ndarray, "time query"]) -> Float[np.ndarray, "time query"]:
    """Straight lines between the known values of each query, constant after the last of them."""
    times = np.arange(len(change))
    columns = zip(change.T, np.isfinite(change).T, strict=True)
    filled = [np.interp(times, times[known], column[known]) for column, known in columns]
    return np.stack(filled, axis=1)
