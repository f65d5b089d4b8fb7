"""Runs as a long table, one row per run, time and query: what its cells say, and back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from bayes_simfluence.checks import Misuse, named, shorten
from bayes_simfluence.conventions import COMPLETE, DIVERGED, EMPTY_SLOT, UNRECORDED, Curricula
from bayes_simfluence.data.columns import (
    columns_of,
    members,
    number,
    places_of,
    slot_weights,
    sorted_ids,
    step_number,
    told,
    typed_ids,
)
from bayes_simfluence.data.runs import Ids, run_statuses, runs_from_arrays
from bayes_simfluence.data.tabular import Table

__all__ = ["rows_of", "runs_of"]

STATUSES = {"unrecorded": UNRECORDED, "complete": COMPLETE, "diverged": DIVERGED}


def rows_of(runs: xr.Dataset) -> Iterator[list[Any]]:
    """Rows of valid runs: one per recorded loss, and per step where nobody looked.

    ``examples`` is a JSON list with ``null`` for empty slots; steps are counted from 1, whatever
    the coordinate says, and time 0 has every query. ``step_size`` and ``status`` are ``None``
    where the runs have none, or all are complete. ``weight`` is a JSON list as long as
    ``examples``, or ``None`` where the runs have no weights.
    """
    words = {value: word for word, value in STATUSES.items()}
    complete = bool((runs["status"].values == COMPLETE).all())
    train, queries = runs["train"].values.tolist(), runs["query"].values.tolist()
    for place, run in enumerate(runs["run"].values.tolist()):
        one = runs.isel(run=place)
        status = None if complete else words[int(one["status"])]
        sizes = one["step_size"].values.tolist() if "step_size" in one else None
        weights = one["weight"].values.tolist() if "weight" in one else None
        losses, batches = one["loss"].values.tolist(), one["batch"].values.tolist()
        for step, row in enumerate(losses):
            ids = [None if at == EMPTY_SLOT else train[at] for at in batches[step - 1]]
            examples = json.dumps(ids, ensure_ascii=False) if step else None
            size = sizes[step - 1] if sizes is not None and step else None
            weight = json.dumps(weights[step - 1]) if weights is not None and step else None
            known = [
                (query, None if np.isnan(loss) else loss)
                for query, loss in zip(queries, row, strict=True)
                if not step or not np.isnan(loss)
            ]
            for query, loss in known or [(None, None)]:
                yield [run, step, examples, query, loss, size, status, weight]


def runs_of(
    table: Table,
    *,
    names: Mapping[str, str] | None = None,
    train_ids: Ids | None = None,
    query_ids: Ids | None = None,
    run_ids: Ids | None = None,
    keep_diverged: bool = False,
    dtype: str = "float64",
    **about: Any,
) -> xr.Dataset:
    """The runs that a table tells of, validated.

    Args:
        names: our column -> the table's.
        train_ids, query_ids, run_ids: ids in their order; else runs and queries stand as they
            first occur, examples sorted.
        keep_diverged: mark runs with an infinite loss instead of refusing them.
        about: further arguments of ``runs_from_arrays``.

    Raises:
        Misuse: missing columns; cells that cannot be read; rows that contradict or repeat one
            another; steps without examples; runs of different length; no loss at time 0.
    """
    cells = columns_of(table, dict(names or {}))
    runs, run_at = places_of(table, cells, "run")
    queries, query_at = places_of(table, cells, "query")
    steps = np.array(
        [step_number(table, row, one) for row, one in enumerate(cells["step"])], np.int64
    )
    batches = told(table, cells, "examples", run_at, steps, members)
    last = _length(table, runs, batches)
    losses = np.array([number(table, row, "loss", one) for row, one in enumerate(cells["loss"])])
    loss = _losses(table, losses, (run_at, steps, query_at), (len(runs), last + 1, len(queries)))
    sizes = None
    if "step_size" in cells:
        rates = told(table, cells, "step_size", run_at, steps, _size)
        _every_step(table, "step_size", runs, rates, last)
        sizes = np.array([[rates[at, step] for step in _steps(last)] for at in range(len(runs))])
    weights = None
    if "weight" in cells:
        weights = told(table, cells, "weight", run_at, steps, slot_weights)
    statuses = _statuses(table, cells, run_at, len(runs))
    if statuses is None:
        statuses = run_statuses(loss, missing=True) if keep_diverged else None
    _initial(table, runs, queries, loss, statuses)
    seen = {one for batch in batches.values() for one in batch if one is not None}
    train = sorted_ids(seen) if train_ids is None else np.asarray(train_ids)
    order = [
        np.arange(len(found)) if wanted is None else _order(table, what, found, wanted)
        for what, found, wanted in (("run", runs, run_ids), ("query", queries, query_ids))
    ]
    batch = _batch(table, batches, train, len(runs), last)
    return runs_from_arrays(
        batch=batch[order[0]],
        loss=loss[order[0]][:, :, order[1]].astype(dtype),
        weight=None if weights is None else _weight(table, weights, batches, batch)[order[0]],
        step_size=None if sizes is None else sizes[order[0]],
        train_ids=train,
        query_ids=_kept(queries, order[1], query_ids),
        run_ids=_kept(runs, order[0], run_ids),
        missing=True,
        status=None if statuses is None else statuses[order[0]],
        **about,
    )


def _kept(found: Sequence[str], order: Int[np.ndarray, " item"], wanted: Ids | None) -> np.ndarray:
    names = [found[at] for at in order]
    if wanted is None:
        return typed_ids(names)
    known = {str(one): one for one in np.asarray(wanted).tolist()}
    return np.array([known[one] for one in names])


def _order(table: Table, what: str, found: Sequence[str], wanted: Ids) -> Int[np.ndarray, " item"]:
    """Places of what was found, in the order of the wanted ids that occur."""
    at = named(f"{table.path}, ids of {what}", found, wanted)
    return np.argsort(at)


def _size(table: Table, row: int, cell: Any) -> float:
    return number(table, row, "step_size", cell)


def _steps(last: int) -> range:
    return range(1, last + 1)


def _length(table: Table, runs: Sequence[str], batches: Mapping[tuple[int, int], Any]) -> int:
    """Number of steps, the same in all runs."""
    last = max((step for _, step in batches), default=0)
    if not last:
        raise Misuse(
            f"{table.path}, column 'examples'",
            got="no step with examples",
            expected="the examples of each step from 1",
            do="fill them in; rows of step 0 have none",
        )
    lengths = np.zeros(len(runs), int)
    for at, step in batches:
        lengths[at] = max(lengths[at], step)
    short = np.flatnonzero(lengths < last)
    if len(short):
        raise Misuse(
            f"{table.path}, column 'step'",
            got=f"steps up to {lengths[short[0]]} in run {runs[short[0]]}",
            expected=f"steps up to {last}, as in run {runs[int(lengths.argmax())]}",
            do="cut all runs to the same number of steps, or leave the short ones out",
        )
    _every_step(table, "examples", runs, batches, last)
    return last


def _every_step(
    table: Table, column: str, runs: Sequence[str], known: Mapping[tuple[int, int], Any], last: int
) -> None:
    for at, run in enumerate(runs):
        gaps = [step for step in _steps(last) if (at, step) not in known]
        if gaps:
            raise Misuse(
                f"{table.path}, column {column!r}",
                got=f"nothing at steps {shorten(gaps)} of run {run}",
                expected=f"a row that says it at each step from 1 to {last}",
                do="fill the gaps; an empty batch is []",
            )


def _losses(
    table: Table,
    losses: Float[np.ndarray, " row"],
    at: tuple[Int[np.ndarray, " row"], ...],
    shape: tuple[int, int, int],
) -> Float[np.ndarray, "run time query"]:
    _, step, query = at
    late = step >= shape[1]
    if late.any():
        row = int(np.flatnonzero(late)[0])
        raise Misuse(
            table.at(row, "step"),
            got=f"{step[row]}",
            expected=f"steps up to {shape[1] - 1}, the last one with examples",
            do="fill in its examples, or leave the row out",
        )
    orphans = np.flatnonzero((query < 0) & ~np.isnan(losses))
    if len(orphans):
        row = int(orphans[0])
        raise Misuse(
            table.at(row, "query"),
            got=f"nothing beside a loss of {losses[row]}",
            expected="the query's id",
            do="fill it in",
        )
    named_rows = np.flatnonzero(query >= 0)
    flat = np.ravel_multi_index(tuple(one[named_rows] for one in at), shape)
    order = np.argsort(flat, kind="stable")
    again = order[1:][flat[order][1:] == flat[order][:-1]]
    if len(again):
        row = int(named_rows[again.min()])
        raise Misuse(
            table.at(row, "query"),
            got=f"run, step {step[row]} and query of an earlier {table.unit}",
            expected="each run, step and query once",
            do="remove the repeated row",
        )
    loss = np.full(shape, np.nan)
    loss.ravel()[flat] = losses[named_rows]
    return loss


def _initial(
    table: Table,
    runs: Sequence[str],
    queries: Sequence[str],
    loss: Float[np.ndarray, "run time query"],
    statuses: Int[np.ndarray, " run"] | None,
) -> None:
    complete = np.ones(len(runs), bool) if statuses is None else statuses == COMPLETE
    missing = np.argwhere(np.isnan(loss[:, 0]) & complete[:, None])
    if len(missing):
        run, query = missing[0]
        raise Misuse(
            f"{table.path}, column 'loss'",
            got=f"nothing at step 0 of run {runs[run]}, query {queries[query]}",
            expected="every query's loss before the first update",
            do="record it, or leave the run or the query out",
        )


def _statuses(
    table: Table,
    cells: Mapping[str, Sequence[Any]],
    run_at: Int[np.ndarray, " row"],
    runs: int,
) -> Int[np.ndarray, " run"] | None:
    if "status" not in cells:
        return None
    found = np.full(runs, -1, np.int8)
    for row, (at, cell) in enumerate(zip(run_at.tolist(), cells["status"], strict=True)):
        value = STATUSES.get(cell, -1)
        if value < 0 or found[at] not in (-1, value):
            raise Misuse(
                table.at(row, "status"),
                got=repr(cell),
                expected=f"one of {shorten(STATUSES)}, the same in all rows of a run",
                do="correct it, or leave the column out",
            )
        found[at] = value
    return found


def _batch(
    table: Table,
    batches: Mapping[tuple[int, int], tuple[str | None, ...]],
    train: np.ndarray,
    runs: int,
    last: int,
) -> Curricula:
    width = max(1, *map(len, batches.values()))
    batch = np.full((runs, last, width), EMPTY_SLOT, np.int32)
    places = {str(one): at for at, one in enumerate(train)}
    for (run, step), ids in batches.items():
        unknown = [one for one in ids if one is not None and one not in places]
        if unknown:
            raise Misuse(
                f"{table.path}, column 'examples'",
                got=f"unknown ids {shorten(unknown)} at step {step}",
                expected=f"ids among {shorten(places)}",
                do="complete train_ids",
            )
        batch[run, step - 1, : len(ids)] = [
            EMPTY_SLOT if one is None else places[one] for one in ids
        ]
    return batch


def _weight(
    table: Table,
    weights: Mapping[tuple[int, int], tuple[float, ...]],
    batches: Mapping[tuple[int, int], tuple[str | None, ...]],
    batch: Curricula,
) -> Float[np.ndarray, "run step slot"]:
    weight = np.ones(batch.shape)
    for (run, step), values in weights.items():
        if len(values) != len(batches[run, step]):
            raise Misuse(
                f"{table.path}, column 'weight'",
                got=f"{len(values)} weights at step {step}",
                expected=f"{len(batches[run, step])}, one for each of the step's examples",
                do="correct them; null stands for an empty slot",
            )
        weight[run, step - 1, : len(values)] = values
    return weight
