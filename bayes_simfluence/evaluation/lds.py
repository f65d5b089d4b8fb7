"""The linear datamodeling score: do predicted outcomes of training subsets rank them rightly?

Park et al. (2023), definition 2.3: for each query the Spearman correlation, over subsets, of the
outcomes of retraining with those that an attribution predicts (the sum of the scores of the
subset's examples); then the mean over queries.
"""

import jax
import numpy as np
import xarray as xr

from bayes_simfluence.attribution.scores import check_scores
from bayes_simfluence.checks import Misuse, keyed, named, positive_integer
from bayes_simfluence.evaluation.metrics import (
    INTERVAL,
    bootstrap_interval,
    resamples_of,
    spearman,
    spearman_across_runs,
    spearman_resampled,
)
from bayes_simfluence.posterior.posterior import Posterior

DIMS = ("subset", "query")


def predicted_outcomes(scores: xr.DataArray, mask: xr.DataArray) -> xr.DataArray:
    """Outcomes of subsets by additive scores: the sum of the scores of a subset's examples.

    Args:
        scores: effects on the outcome, ``(train, query)``; an example that lowers a loss has a
            negative one.
        mask: ``(subset, train)``, with ids as the scores have them, in any order.

    >>> from bayes_simfluence.attribution.scores import score_array
    >>> scores = score_array(np.array([[-2.0], [0.5]]), ["a", "b"], ["q"], method="m", units="nat")
    >>> mask = xr.DataArray([[1, 0], [1, 1]], dims=("subset", "train"),
    ...                     coords={"subset": [0, 1], "train": ["a", "b"]})
    >>> predicted_outcomes(scores, mask).values[:, 0].tolist()
    [-2.0, -1.5]

    Raises:
        Misuse: examples without a score, scores that are not finite.
    """
    check_scores(scores)
    rows = named("scores of train ids", mask["train"].values, scores["train"].values)
    summed = np.asarray(mask.values, float) @ np.asarray(scores.values, float)[rows]
    coords = {"subset": mask["subset"].values, "query": scores["query"].values}
    return xr.DataArray(summed, dims=DIMS, coords=coords, name="outcome", attrs=scores.attrs)


def simulated_outcomes(
    posterior: Posterior, runs: xr.Dataset, *, key: jax.Array, draws: int = 200
) -> xr.DataArray:
    """Outcomes of subsets by a simulator: the mean over draws of the losses after the last step.

    Args:
        posterior: any fit or baseline.
        runs: a run for each subset, recorded or planned (``planned_subsets``).
        key: decides the draws.
        draws: per run.
    """
    final = posterior.simulate(runs, key=key, draws=draws)["mean_loss"].isel(time=-1)
    outcome = final.mean(("chain", "draw")).drop_vars("time").rename({"run": "subset"})
    return outcome.transpose(*DIMS).assign_attrs(units="nat")


def linear_datamodeling_score(
    predicted: xr.DataArray, outcomes: xr.DataArray, *, key: jax.Array, resamples: int = 200
) -> xr.Dataset:
    """Rank correlation of predicted with measured outcomes over subsets, averaged over queries.

    Args:
        predicted: ``(subset, query)``, of ``predicted_outcomes`` or ``simulated_outcomes``.
        outcomes: measured after training, ``(subset, query)``, ids as in ``predicted``.
        key: decides the bootstrap resamples.
        resamples: of the bootstrap over subsets.

    Returns:
        ``lds`` in [-1, 1] with ``lds_low`` and ``lds_high`` (90% bootstrap interval), and
        ``by_query``, NaN for queries whose outcomes, or predictions, are all equal.

    Raises:
        Misuse: predictions and outcomes of different subsets or queries, fewer than three subsets.
    """
    keyed(key)
    positive_integer("resamples", resamples)
    left, right = _aligned(predicted, outcomes)
    by_query = [spearman(*pair) for pair in zip(left.T, right.T, strict=True)]
    count = len(left)
    again = spearman_resampled(left, right, resamples_of(key, resamples, count))
    low, high = bootstrap_interval(again)
    return xr.Dataset(
        {
            "lds": ((), spearman_across_runs(left, right)),
            "lds_low": ((), low),
            "lds_high": ((), high),
            "by_query": ("query", np.array(by_query)),
        },
        coords={"query": outcomes["query"].values},
        attrs={
            "long_name": "linear datamodeling score",
            "subsets": count,
            "probability": INTERVAL,
            "method": str(predicted.attrs.get("method", "")),
        },
    )


def _aligned(predicted: xr.DataArray, outcomes: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays ``(subset, query)`` with one order of ids."""
    for array, name in ((predicted, "predicted"), (outcomes, "outcomes")):
        if set(array.dims) != set(DIMS):
            raise Misuse(
                name, got=f"dimensions {array.dims}", expected=f"{DIMS}",
                do="make it by predicted_outcomes, or take subsets['outcome']",
            )  # fmt: skip
    ours, theirs = predicted.transpose(*DIMS), outcomes.transpose(*DIMS)
    for dim in DIMS:
        if ours.sizes[dim] != theirs.sizes[dim]:
            raise Misuse(
                f"predicted: {dim}",
                got=f"{ours.sizes[dim]} of them",
                expected=f"{theirs.sizes[dim]}, as in the outcomes",
                do="predict the subsets and queries that were measured",
            )
    if ours.sizes["subset"] < 3:
        raise Misuse(
            "subsets", got=ours.sizes["subset"], expected="at least three", do="measure more"
        )
    rows, columns = (
        named(f"predicted: {dim}", theirs[dim].values, ours[dim].values) for dim in DIMS
    )
    ordered = np.asarray(ours.values, float)[np.ix_(rows, columns)]
    return ordered, np.asarray(theirs.values, float)
