"""Subsets of the training examples and the outcome of training on each: the data of datamodels.

Only which examples were in is kept, not their order: ``mask[subset, train]`` and
``outcome[subset, query]`` (Ilyas et al. 2022, "Datamodels").
"""

from typing import Any

import jax
import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, keyed
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.data.curriculum import shuffled_epochs
from bayes_simfluence.data.runs import Ids, ids_of, planned_runs, usable_runs
from bayes_simfluence.data.twins import without_twins
from bayes_simfluence.data.weights import weights_of


def subsets_from_arrays(
    masks: Any,
    outcomes: Any,
    *,
    train_ids: Ids | None = None,
    query_ids: Ids | None = None,
    units: str = "nat",
) -> xr.Dataset:
    """Masks and outcomes of retraining under their ids.

    Args:
        masks: which examples each model was trained on, ``(subset, train)``, 0 or 1.
        outcomes: what was measured of each query afterwards, ``(subset, query)``.
        train_ids, query_ids: numbers from 0 when omitted.
        units: of the outcomes.

    >>> subsets = subsets_from_arrays([[1, 0], [0, 1]], [[0.5], [0.7]])
    >>> dict(subsets.sizes)
    {'subset': 2, 'train': 2, 'query': 1}

    Raises:
        Misuse: masks and outcomes of different length, other values than 0 and 1, outcomes that
            are not finite, ids of another number.
    """
    mask, outcome = np.asarray(masks), np.asarray(outcomes, float)
    if mask.ndim != 2 or outcome.ndim != 2 or len(mask) != len(outcome) or not len(mask):
        raise Misuse(
            "masks and outcomes",
            got=f"shapes {mask.shape} and {outcome.shape}",
            expected="(subset, train) and (subset, query) of the same subsets",
            do="keep one row of both for each model",
        )
    if not np.isin(mask, (0, 1)).all():
        raise Misuse(
            "masks", got="other values than 0 and 1", expected="1 where an example was trained on",
            do="pass memberships, not weights",
        )  # fmt: skip
    wrong = np.argwhere(~np.isfinite(outcome))
    if len(wrong):
        raise Misuse(
            f"outcome of subset {wrong[0][0]}, query {wrong[0][1]}",
            got=f"{outcome[tuple(wrong[0])]} ({len(wrong)} values are not finite)",
            expected="finite numbers",
            do="leave out subsets whose training failed",
        )
    return xr.Dataset(
        {
            "mask": (("subset", "train"), mask.astype(bool), {"long_name": "trained on"}),
            "outcome": (
                ("subset", "query"),
                outcome,
                {"long_name": "measured after training", "units": units},
            ),
        },
        coords={
            "subset": np.arange(len(mask)),
            "train": ids_of("train_ids", train_ids, mask.shape[1]),
            "query": ids_of("query_ids", query_ids, outcome.shape[1]),
        },
    )


def subsets_of_runs(runs: xr.Dataset) -> xr.Dataset:
    """Recorded runs as subsets: who was in a run's batches, and the losses after its last step.

    An example that has weight 0 wherever it occurs in a run was not trained on. Of twins the first
    alone is a subset.

    Raises:
        Misuse: runs whose last losses were not recorded.
    """
    runs, _ = without_twins(usable_runs(runs))
    size = runs.sizes["train"]
    # A further column takes the empty slots and those of no weight.
    counted = (weights_of(runs) > 0) & (runs["batch"].values != EMPTY_SLOT)
    batch = np.where(counted, runs["batch"].values, size)
    mask = np.zeros((len(batch), size + 1), bool)
    mask[np.arange(len(batch))[:, None, None], batch] = True
    subsets = subsets_from_arrays(
        mask[:, :-1],
        runs["loss"].values[:, -1],
        train_ids=runs["train"].values,
        query_ids=runs["query"].values,
    )
    return subsets.assign_coords(subset=runs["run"].values)


def planned_subsets(
    like: xr.Dataset, mask: xr.DataArray, *, batch_size: int, epochs: int, key: jax.Array
) -> xr.Dataset:
    """A run to be simulated for each subset: its examples in shuffled epochs.

    Args:
        like: recorded runs; the initial losses, examples and queries are theirs.
        mask: ``(subset, train)``, all of one size, so that the runs are equally long.
        batch_size, epochs: as training would have them.
        key: decides the orders.

    Raises:
        Misuse: subsets of different sizes.
    """
    keyed(key)
    members = [np.flatnonzero(row) for row in mask.sel(train=like["train"].values).values]
    sizes = sorted(set(map(len, members)))
    if len(sizes) > 1:
        raise Misuse(
            "mask",
            got=f"subsets of {sizes[0]} to {sizes[-1]} examples",
            expected="subsets of one size",
            do="plan the subsets of one size at a time",
        )
    keys = jax.random.split(key, len(members))
    batch = [
        shuffled_epochs(examples, batch_size=batch_size, epochs=epochs, key=order_key)
        for examples, order_key in zip(members, keys, strict=True)
    ]
    return planned_runs(like, np.stack(batch), run_ids=mask["subset"].values)
