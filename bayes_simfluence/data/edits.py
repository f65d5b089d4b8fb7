"""The same runs, planned with other curricula."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayes_simfluence.checks import named
from bayes_simfluence.data.curriculum import drop
from bayes_simfluence.data.runs import planned_runs

__all__ = ["without_examples"]


def without_examples(runs: xr.Dataset, ids: Sequence[Any] | np.ndarray) -> xr.Dataset:
    """The same runs planned without the examples of these ids: their slots are empty.

    >>> import bayes_simfluence as bs
    >>> runs = bs.runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]], train_ids=["a", "b"])
    >>> without_examples(runs, ["b"])["batch"].values.tolist()
    [[[0, -1]]]
    """
    indices = named("examples to drop", ids, runs["train"].values)
    return planned_runs(
        runs,
        np.stack([drop(batch, indices) for batch in runs["batch"].values]),
        step_size=runs["step_size"].values if "step_size" in runs else None,
        run_ids=runs["run"].values,
    )
