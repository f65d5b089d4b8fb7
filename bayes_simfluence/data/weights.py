"""Weights of the examples in a batch: optional in a recording, 1 where it has none."""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT, VARIABLES, Curricula, Curriculum, Weights


def weights_of(runs: xr.Dataset) -> Float[np.ndarray, "run step slot"]:
    """The weight of every slot; 1 where none was recorded, 0 in empty slots.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> runs = runs_from_arrays(batch=[[[0, 1, -1]]], loss=[[[0.7], [0.6]]])
    >>> weights_of(runs).tolist()
    [[[1.0, 1.0, 0.0]]]
    """
    if "weight" in runs:
        return runs["weight"].values
    return (runs["batch"].values != EMPTY_SLOT).astype(np.float32)


def ones_of(batch: Curriculum) -> Weights:
    """Equal weights: 1 for every example, 0 in empty slots."""
    return (batch != EMPTY_SLOT).astype(np.float32)


def with_weights(runs: xr.Dataset) -> xr.Dataset:
    """``runs`` whose weights are written out, also where they are all 1."""
    if "weight" in runs:
        return runs
    dims, attrs = VARIABLES["weight"]
    return runs.assign(weight=(dims, weights_of(runs), dict(attrs)))


def checked_weights(weight: Any, batch: Curricula) -> Float[np.ndarray, "run step slot"]:
    """``weight`` as an array of the shape of ``batch``, 0 in empty slots.

    Raises:
        Misuse: another shape.
    """
    do = "give every slot a weight >= 0; leave weight out where all are 1"
    array = for_each_slot("weight", weight, batch, do=do)
    return np.where(batch == EMPTY_SLOT, np.float32(0), array)


def for_each_slot(
    name: str, values: Any, batch: Curricula, *, do: str
) -> Float[np.ndarray, "run step slot"]:
    """``values`` as an array of the shape of ``batch``.

    Raises:
        Misuse: another shape.
    """
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, np.float32)
    if array.shape != batch.shape:
        raise Misuse(
            name,
            got=f"shape {np.shape(values) if array.size else 'that is not rectangular'}",
            expected=f"the shape of batch, {batch.shape}: one number for each slot",
            do=do,
        )
    return array


def validate_weights(runs: xr.Dataset) -> None:
    """Raise unless weights are finite, >= 0, and sum to more than 0 in a batch with examples.

    ``runs`` have a valid ``batch``.
    """
    if "weight" not in runs:
        return
    weight = runs["weight"].values
    if not np.issubdtype(weight.dtype, np.floating):
        raise Misuse(
            "runs['weight']", got=f"{weight.dtype}", expected="floats", do="convert them to float32"
        )
    bad = ~np.isfinite(weight) | (weight < 0)
    if bad.any():
        run, step, slot = np.argwhere(bad)[0].tolist()
        raise Misuse(
            "runs['weight']",
            got=f"{weight[run, step, slot]} in {_place(runs, run, step)}, slot {slot}",
            expected="finite weights >= 0",
            do="correct it; 1 is the weight of an ordinary example, an empty slot has 0",
        )
    filled = runs["batch"].values != EMPTY_SLOT
    lost = filled.any(axis=2) & (np.where(filled, weight, 0).sum(axis=2) == 0)
    if lost.any():
        run, step = np.argwhere(lost)[0].tolist()
        raise Misuse(
            "runs['weight']",
            got=f"weights that sum to 0 in {_place(runs, run, step)}, which has examples",
            expected="a positive sum in every batch with examples",
            do="give one of its examples a positive weight, or empty its slots with -1",
        )


def _place(runs: xr.Dataset, run: int, step: int) -> str:
    return f"run {runs['run'].values[run]}, step {step + 1}"
