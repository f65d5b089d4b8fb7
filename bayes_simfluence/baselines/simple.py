"""Baselines that do not look at what a run trains on."""

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.counterfactual.mean import MeanSimulator
from bayes_simfluence.counterfactual.rollout import AffineSimulator
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.inference.posterior import Posterior
from bayes_simfluence.inference.verdict import Verdict

__all__ = ["mean_trajectory", "persistence"]


def persistence(runs: xr.Dataset) -> Posterior:
    """Every loss stays what it was before training; a point.

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
    """Every run goes the way of the fitted runs' mean; their spread around it is the band.

    The band holds each run's difference from the mean of the others.

    >>> import bayes_simfluence as bs
    >>> bs.mean_trajectory(bs.example_runs()).settings
    {'method': 'mean trajectory'}
    """
    runs = usable_runs(runs)
    count = runs.sizes["run"]
    if count < 2:
        raise Misuse(
            "runs", got="one run", expected="at least two", do="record more runs for a spread"
        )
    loss = np.asarray(runs["loss"].values, float)
    change = loss - loss[:, :1]
    mean = change.mean(axis=0)
    return Posterior(
        simulator=MeanSimulator(mean, (change - mean) * count / (count - 1)),
        verdict=Verdict(True, f"The mean of {count} runs, with the spread between them."),
        runs=runs,
        settings={"method": "mean trajectory"},
    )
