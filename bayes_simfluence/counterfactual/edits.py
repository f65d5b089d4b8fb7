"""Edits of a curriculum: pure functions on batches, which never change their argument."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from bayes_simfluence.checks import Misuse, named, positive_integer, shorten
from bayes_simfluence.conventions import EMPTY_SLOT, Curriculum
from bayes_simfluence.data.curriculum import Examples, example_indices
from bayes_simfluence.data.runs import planned_runs

__all__ = [
    "drop",
    "insert",
    "keep",
    "reorder",
    "repeat",
    "replace",
    "reverse",
    "swap",
    "without_examples",
]


def drop(batch: Curriculum, examples: Sequence[int] | Examples) -> Curriculum:
    """Without ``examples``: their slots become empty, the others keep their step.

    >>> drop(np.array([[0, 1], [2, 3]]), [1]).tolist()
    [[0, -1], [2, 3]]
    """
    return np.where(np.isin(batch, example_indices(examples)), EMPTY_SLOT, batch)


def keep(batch: Curriculum, examples: Sequence[int] | Examples) -> Curriculum:
    """With ``examples`` only: every other slot becomes empty.

    >>> keep(np.array([[0, 1], [2, 3]]), [1, 2]).tolist()
    [[-1, 1], [2, -1]]
    """
    return np.where(np.isin(batch, example_indices(examples)), batch, EMPTY_SLOT)


def repeat(batch: Curriculum, times: int) -> Int[np.ndarray, "longer slot"]:
    """The whole curriculum ``times`` times, one after the other.

    >>> repeat(np.array([[0, 1]]), 2).tolist()
    [[0, 1], [0, 1]]
    """
    return np.tile(batch, (positive_integer("times", times), 1))


def insert(
    batch: Curriculum, at: int, other: Int[np.ndarray, "more fewer"]
) -> Int[np.ndarray, "longer slot"]:
    """The steps of ``other`` before step index ``at`` (0 = first; ``len(batch)`` = at the end).

    >>> insert(np.array([[0, 1], [2, 3]]), 1, np.array([[9, -1]])).tolist()
    [[0, 1], [9, -1], [2, 3]]
    """
    if not 0 <= at <= len(batch):
        raise Misuse(
            "at", got=at, expected=f"a step index in 0..{len(batch)}", do="pass such an index"
        )
    if other.ndim != 2 or other.shape[1] > batch.shape[1]:
        raise Misuse(
            "other",
            got=f"shape {other.shape}",
            expected=f"(step, slot) with at most {batch.shape[1]} slots",
            do="split its batches",
        )
    free = batch.shape[1] - other.shape[1]
    padded = np.pad(other, ((0, 0), (0, free)), constant_values=EMPTY_SLOT)
    return np.concatenate([batch[:at], padded.astype(batch.dtype), batch[at:]])


def swap(batch: Curriculum, first: int, second: int) -> Curriculum:
    """Two steps exchanged.

    >>> swap(np.array([[0], [1], [2]]), 0, 2).tolist()
    [[2], [1], [0]]
    """
    order = np.arange(len(batch))
    order[[first, second]] = order[[_step(batch, second), _step(batch, first)]]
    return batch[order]


def reorder(batch: Curriculum, order: Sequence[int] | Int[np.ndarray, " step"]) -> Curriculum:
    """The steps in the given order, a permutation of ``0..T-1``.

    >>> reorder(np.array([[0], [1], [2]]), [1, 2, 0]).tolist()
    [[1], [2], [0]]
    """
    order = np.asarray(order)
    if not np.array_equal(np.sort(order), np.arange(len(batch))):
        raise Misuse(
            "order",
            got=shorten(order),
            expected=f"a permutation of 0..{len(batch) - 1}",
            do="name every step once",
        )
    return batch[order]


def reverse(batch: Curriculum) -> Curriculum:
    """The last step first.

    >>> reverse(np.array([[0], [1], [2]])).tolist()
    [[2], [1], [0]]
    """
    return batch[::-1].copy()


def replace(batch: Curriculum, new: Mapping[int, int]) -> Curriculum:
    """Examples exchanged for others wherever they occur, all at once.

    >>> replace(np.array([[0, 1], [1, 2]]), {1: 2, 2: 1}).tolist()
    [[0, 2], [2, 1]]
    """
    before, after = example_indices(list(new.keys())), example_indices(list(new.values()))
    edited = batch.copy()
    for old, other in zip(before, after, strict=True):
        edited[batch == old] = other
    return edited


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


def _step(batch: Curriculum, step: int) -> int:
    if not 0 <= step < len(batch):
        raise Misuse(
            "step", got=step, expected=f"an index in 0..{len(batch) - 1}", do="pass such an index"
        )
    return step
