"""Edits of a curriculum: pure functions on a batch and its weights, and of whole runs.

An edit takes ``batch (step, slot)`` and ``weight (step, slot)``, or ``None`` for weights of 1, and
returns both, edited; it never changes its arguments. Examples are positions in ``train`` there.
``edit_runs`` applies an edit to runs, where examples are named by their ids.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.checks import Misuse, named, positive_integer, shorten
from bayes_simfluence.conventions import EMPTY_SLOT, Curriculum, Weights
from bayes_simfluence.data.curriculum import Examples, example_indices
from bayes_simfluence.data.runs import planned_runs
from bayes_simfluence.data.weights import ones_of

Edited: TypeAlias = tuple[
    Int[np.ndarray, "edited slot"], Float[np.ndarray, "edited slot"] | None
]  # fmt: skip
Edit: TypeAlias = Callable[..., Edited]


def drop(batch: Curriculum, weight: Weights | None, examples: Sequence[int] | Examples) -> Edited:
    """Without ``examples``: their slots become empty, the others keep their step.

    >>> drop(np.array([[0, 1], [2, 3]]), None, [1])[0].tolist()
    [[0, -1], [2, 3]]
    """
    return _emptied(batch, weight, np.isin(batch, example_indices(examples)))


def keep(batch: Curriculum, weight: Weights | None, examples: Sequence[int] | Examples) -> Edited:
    """With ``examples`` only: every other slot becomes empty.

    >>> keep(np.array([[0, 1], [2, 3]]), None, [1, 2])[0].tolist()
    [[-1, 1], [2, -1]]
    """
    return _emptied(batch, weight, ~np.isin(batch, example_indices(examples)))


def repeat(batch: Curriculum, weight: Weights | None, times: int) -> Edited:
    """The whole curriculum ``times`` times, one after the other.

    >>> repeat(np.array([[0, 1]]), None, 2)[0].tolist()
    [[0, 1], [0, 1]]
    """
    return _steps(batch, weight, np.tile(np.arange(len(batch)), positive_integer("times", times)))


def insert(
    batch: Curriculum,
    weight: Weights | None,
    at: int,
    other: Int[np.ndarray, "more fewer"],
    other_weight: Float[np.ndarray, "more fewer"] | None = None,
) -> Edited:
    """The steps of ``other`` before step index ``at`` (0 = first; ``len(batch)`` = at the end).

    >>> insert(np.array([[0, 1], [2, 3]]), None, 1, np.array([[9, -1]]))[0].tolist()
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
    free = ((0, 0), (0, batch.shape[1] - other.shape[1]))
    steps = np.pad(other, free, constant_values=EMPTY_SLOT).astype(batch.dtype)
    edited = np.concatenate([batch[:at], steps, batch[at:]])
    if weight is None and other_weight is None:
        return edited, None
    weight = ones_of(batch) if weight is None else weight
    more = ones_of(other) if other_weight is None else other_weight
    more = np.pad(more, free).astype(weight.dtype)
    return edited, np.concatenate([weight[:at], more, weight[at:]])


def swap(batch: Curriculum, weight: Weights | None, first: int, second: int) -> Edited:
    """Two steps exchanged.

    >>> swap(np.array([[0], [1], [2]]), None, 0, 2)[0].tolist()
    [[2], [1], [0]]
    """
    order = np.arange(len(batch))
    order[[first, second]] = order[[_step(batch, second), _step(batch, first)]]
    return _steps(batch, weight, order)


def reorder(
    batch: Curriculum, weight: Weights | None, order: Sequence[int] | Int[np.ndarray, " step"]
) -> Edited:
    """The steps in the given order, a permutation of ``0..T-1``.

    >>> reorder(np.array([[0], [1], [2]]), None, [1, 2, 0])[0].tolist()
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
    return _steps(batch, weight, order)


def reverse(batch: Curriculum, weight: Weights | None) -> Edited:
    """The last step first.

    >>> reverse(np.array([[0], [1], [2]]), None)[0].tolist()
    [[2], [1], [0]]
    """
    return _steps(batch, weight, np.arange(len(batch))[::-1])


def replace(batch: Curriculum, weight: Weights | None, new: Mapping[int, int]) -> Edited:
    """Examples exchanged for others wherever they occur, all at once; slots keep their weights.

    >>> replace(np.array([[0, 1], [1, 2]]), None, {1: 2, 2: 1})[0].tolist()
    [[0, 2], [2, 1]]
    """
    before, after = example_indices(list(new.keys())), example_indices(list(new.values()))
    edited = batch.copy()
    for old, other in zip(before, after, strict=True):
        edited[batch == old] = other
    return edited, None if weight is None else weight.copy()


def upweight(batch: Curriculum, weight: Weights | None, factors: Mapping[int, float]) -> Edited:
    """The weight of each example in ``factors`` times its factor, wherever it occurs.

    A factor is finite and >= 0; below 1 it makes the example count less.

    >>> upweight(np.array([[0, 1], [1, -1]]), None, {1: 2.0})[1].tolist()
    [[1.0, 2.0], [2.0, 0.0]]
    """
    edited = ones_of(batch) if weight is None else weight.copy()
    for example, factor in zip(example_indices(list(factors)), factors.values(), strict=True):
        if not 0 <= factor < np.inf:
            raise Misuse(
                "upweight",
                got=f"a factor of {factor}",
                expected="finite factors >= 0",
                do="pass 2.0 to make an example count twice, or drop it instead",
            )
        edited[batch == example] *= factor
    return batch.copy(), edited


def edit_runs(runs: xr.Dataset, edit: Edit, *arguments: Any, step_size: Any = None) -> xr.Dataset:
    """The same runs planned with an edited curriculum; they start from the same losses.

    Train losses and residuals stay behind: they were recorded under the curriculum as it was.

    Args:
        runs: recorded or planned runs.
        edit: one of this module, or any function of its form.
        arguments: what the edit takes after batch and weight. The edits of this module take ids
            of examples here (``None`` for an empty slot); another function gets its arguments
            as they are.
        step_size: learning rates as in ``planned_runs``; those of ``runs`` when omitted and the
            number of steps stays the same.

    Raises:
        Misuse: ids that are not in ``runs``, and whatever the edit refuses.

    >>> import bayes_simfluence as bs
    >>> runs = bs.runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]], train_ids=["a", "b"])
    >>> edit_runs(runs, drop, ["b"])["batch"].values.tolist()
    [[[0, -1]]]
    >>> edit_runs(runs, upweight, {"b": 3.0})["weight"].values.tolist()
    [[[1.0, 3.0]]]
    """
    if edit in WITH_POSITIONS:
        known = runs["train"].values
        what = f"examples to {edit.__name__}"
        arguments = WITH_POSITIONS[edit](partial(named, what, known=known), *arguments)
    weights = runs["weight"].values if "weight" in runs else [None] * runs.sizes["run"]
    pairs = [
        edit(batch, weight, *arguments)
        for batch, weight in zip(runs["batch"].values, weights, strict=True)
    ]
    batch = np.stack([batch for batch, _ in pairs])
    weight = [weight for _, weight in pairs if weight is not None]
    if step_size is None and "step_size" in runs and batch.shape[1] == runs.sizes["step"]:
        step_size = runs["step_size"].values
    planned = planned_runs(
        runs,
        batch,
        weight=np.stack(weight) if weight else None,
        step_size=step_size,
        run_ids=runs["run"].values,
    )
    planned["loss"].values[:, 0] = runs["loss"].values[:, 0]
    return planned


Places: TypeAlias = Callable[[Iterable[Any]], list[int]]


def _of_list(places: Places, examples: Sequence[Any] | np.ndarray) -> tuple[Any, ...]:
    return (places(examples),)


def _of_batches(
    places: Places, at: int, other: Sequence[Sequence[Any]], *weight: Any
) -> tuple[Any, ...]:
    rows = np.full((len(other), max(map(len, other), default=0)), EMPTY_SLOT, np.int32)
    for row, ids in zip(rows, other, strict=True):
        row[: len(ids)] = [EMPTY_SLOT if name is None else places([name])[0] for name in ids]
    return (at, rows, *map(np.asarray, weight))


WITH_POSITIONS: Final[Mapping[Edit, Callable[..., tuple[Any, ...]]]] = {
    drop: _of_list,
    keep: _of_list,
    upweight: lambda at, factors: (dict(zip(at(factors), factors.values(), strict=True)),),
    replace: lambda at, new: (dict(zip(at(new), at(new.values()), strict=True)),),
    insert: _of_batches,
}
"""Edits whose arguments name examples -> those arguments with positions in place of ids."""


def _emptied(
    batch: Curriculum, weight: Weights | None, gone: Bool[np.ndarray, "step slot"]
) -> Edited:
    return np.where(gone, EMPTY_SLOT, batch), None if weight is None else np.where(gone, 0, weight)


def _steps(batch: Curriculum, weight: Weights | None, order: Int[np.ndarray, " steps"]) -> Edited:
    return batch[order], None if weight is None else weight[order]


def _step(batch: Curriculum, step: int) -> int:
    if not 0 <= step < len(batch):
        raise Misuse(
            "step", got=step, expected=f"an index in 0..{len(batch) - 1}", do="pass such an index"
        )
    return step
