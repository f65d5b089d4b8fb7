"""Runs as a long table with one row per run, time and query, and back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from bayes_simfluence.checks import Misuse, named, shorten
from bayes_simfluence.conventions import COMPLETE, DIVERGED, EMPTY_SLOT, UNRECORDED, Curricula
from bayes_simfluence.data.columns import (
    BLANK,
    Columns,
    batch_ids,
    id_places,
    known_columns,
    number,
    slot_numbers,
    sorted_ids,
    step_number,
    step_values,
    typed_ids,
)
from bayes_simfluence.data.runs import Ids, run_statuses, runs_from_arrays
from bayes_simfluence.data.tabular import Table

STATUSES = {"unrecorded": UNRECORDED, "complete": COMPLETE, "diverged": DIVERGED}

Batches: TypeAlias = Mapping[tuple[int, int], tuple[str | None, ...]]
"""(run, step) -> ids of the batch."""


def rows_of(runs: xr.Dataset) -> Iterator[list[Any]]:
    """Rows of valid runs, as ``COLUMNS``: one per recorded loss, and one per step without any.

    ``examples`` is a JSON list with ``null`` for empty slots; steps are counted from 1, whatever
    the coordinate says, and time 0 has every query. ``step_size`` and ``status`` are ``None``
    where the runs have none, or all are complete. ``weight``, ``train_loss`` and
    ``train_residual`` are JSON lists as long as ``examples``, with ``null`` for NaN, or ``None``
    where the runs have none.
    """
    words = {value: word for word, value in STATUSES.items()}
    complete = bool((runs["status"].values == COMPLETE).all())
    train, queries = runs["train"].values.tolist(), runs["query"].values.tolist()
    for place, name in enumerate(runs["run"].values.tolist()):
        run = runs.isel(run=place)
        status = None if complete else words[int(run["status"])]
        sizes = run["step_size"].values.tolist() if "step_size" in run else None
        of_slots = [run[name].values.tolist() if name in run else None for name in BLANK]
        batches = run["batch"].values.tolist()
        for step, losses in enumerate(run["loss"].values.tolist()):
            ids = [None if at == EMPTY_SLOT else train[at] for at in batches[step - 1]]
            examples = json.dumps(ids, ensure_ascii=False) if step else None
            size = sizes[step - 1] if sizes is not None and step else None
            beside = [
                None if rows is None or not step else _slot_list(rows[step - 1])
                for rows in of_slots
            ]
            recorded = [
                (query, None if np.isnan(loss) else loss)
                for query, loss in zip(queries, losses, strict=True)
                if not step or not np.isnan(loss)
            ]
            for query, loss in recorded or [(None, None)]:
                yield [name, step, examples, query, loss, size, status, *beside]


def _slot_list(numbers: Sequence[float]) -> str | None:
    """Numbers of slots as JSON; ``None`` where none is known."""
    listed = [None if np.isnan(number) else number for number in numbers]
    return json.dumps(listed) if any(number is not None for number in listed) else None


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
    """The runs in a table, validated.

    Args:
        names: our column -> the table's.
        train_ids, query_ids, run_ids: ids in their order; when omitted, runs and queries are in
            the order in which they first occur, and examples are sorted.
        keep_diverged: mark runs with an infinite loss instead of refusing them.
        about: further arguments of ``runs_from_arrays``.

    Raises:
        Misuse: missing columns; values that cannot be read; rows that contradict or repeat one
            another; steps without examples; runs of different length; no loss at time 0.
    """
    columns = known_columns(table, dict(names or {}))
    runs, run_at = id_places(table, columns, "run")
    queries, query_at = id_places(table, columns, "query")
    steps = np.array(
        [step_number(table, row, value) for row, value in enumerate(columns["step"])], np.int64
    )
    batches = step_values(table, columns, "examples", run_at, steps, batch_ids)
    last = _length(table, runs, batches)
    loss = _losses(table, columns, (run_at, steps, query_at), (len(runs), last + 1, len(queries)))
    sizes = _step_sizes(table, columns, runs, run_at, steps, last)
    statuses = _statuses(table, columns, run_at, len(runs))
    if statuses is None:
        statuses = run_statuses(loss, missing=True) if keep_diverged else None
    _initial(table, runs, queries, loss, statuses)
    seen = {name for ids in batches.values() for name in ids if name is not None}
    train = sorted_ids(seen) if train_ids is None else np.asarray(train_ids)
    batch = _batch(table, batches, train, len(runs), last)
    beside = {
        name: _of_slots(
            table,
            name,
            step_values(table, columns, name, run_at, steps, partial(slot_numbers, column=name)),
            batches,
            batch,
        )
        for name in BLANK
        if name in columns
    }
    run, run_order = _arranged(table, "run", runs, run_ids)
    query, query_order = _arranged(table, "query", queries, query_ids)
    return runs_from_arrays(
        batch=batch[run_order],
        loss=loss[run_order][:, :, query_order].astype(dtype),
        **{name: values[run_order] for name, values in beside.items()},
        step_size=None if sizes is None else sizes[run_order],
        train_ids=train,
        query_ids=query,
        run_ids=run,
        missing=True,
        status=None if statuses is None else statuses[run_order],
        **about,
    )


def _arranged(
    table: Table, what: str, ids: Sequence[str], wanted: Ids | None
) -> tuple[np.ndarray, Int[np.ndarray, " item"]]:
    """The table's ids in the order of the wanted ids, and their places in the table."""
    if wanted is None:
        return typed_ids(ids), np.arange(len(ids))
    places = np.array(named(f"{table.path}, ids of {what}", ids, wanted))
    order = np.argsort(places)
    return np.asarray(wanted)[places[order]], order


def _length(table: Table, runs: Sequence[str], batches: Batches) -> int:
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
    table: Table, column: str, runs: Sequence[str], values: Mapping[tuple[int, int], Any], last: int
) -> None:
    """Raise unless the column has a value at each step of each run."""
    for at, run in enumerate(runs):
        gaps = [step for step in range(1, last + 1) if (at, step) not in values]
        if gaps:
            raise Misuse(
                f"{table.path}, column {column!r}",
                got=f"nothing at steps {shorten(gaps)} of run {run}",
                expected=f"a value in some row of each step from 1 to {last}",
                do="fill the gaps; an empty batch is []",
            )


def _step_sizes(
    table: Table,
    columns: Columns,
    runs: Sequence[str],
    run_at: Int[np.ndarray, " row"],
    steps: Int[np.ndarray, " row"],
    last: int,
) -> Float[np.ndarray, "run step"] | None:
    if "step_size" not in columns:
        return None

    def read(table: Table, row: int, value: Any) -> float:
        return number(table, row, "step_size", value)

    sizes = step_values(table, columns, "step_size", run_at, steps, read)
    _every_step(table, "step_size", runs, sizes, last)
    return np.array([[sizes[at, step] for step in range(1, last + 1)] for at in range(len(runs))])


def _losses(
    table: Table,
    columns: Columns,
    at: tuple[Int[np.ndarray, " row"], ...],
    shape: tuple[int, int, int],
) -> Float[np.ndarray, "run time query"]:
    """Losses at their places; NaN where no row has one."""
    losses = np.array(
        [number(table, row, "loss", value) for row, value in enumerate(columns["loss"])]
    )
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
    rows = np.flatnonzero(query >= 0)
    flat = np.ravel_multi_index(tuple(places[rows] for places in at), shape)
    order = np.argsort(flat, kind="stable")
    again = order[1:][flat[order][1:] == flat[order][:-1]]
    if len(again):
        row = int(rows[again.min()])
        raise Misuse(
            table.at(row, "query"),
            got=f"run, step {step[row]} and query of an earlier {table.unit}",
            expected="each run, step and query once",
            do="remove the repeated row",
        )
    loss = np.full(shape, np.nan)
    loss.ravel()[flat] = losses[rows]
    return loss


def _initial(
    table: Table,
    runs: Sequence[str],
    queries: Sequence[str],
    loss: Float[np.ndarray, "run time query"],
    statuses: Int[np.ndarray, " run"] | None,
) -> None:
    """Raise unless complete runs have every query's loss at step 0."""
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
    table: Table, columns: Columns, run_at: Int[np.ndarray, " row"], runs: int
) -> Int[np.ndarray, " run"] | None:
    if "status" not in columns:
        return None
    statuses = np.full(runs, -1, np.int8)
    for row, (at, word) in enumerate(zip(run_at.tolist(), columns["status"], strict=True)):
        status = STATUSES.get(word, -1)
        if status < 0 or statuses[at] not in (-1, status):
            raise Misuse(
                table.at(row, "status"),
                got=repr(word),
                expected=f"one of {shorten(STATUSES)}, the same in all rows of a run",
                do="correct it, or leave the column out",
            )
        statuses[at] = status
    return statuses


def _batch(table: Table, batches: Batches, train: np.ndarray, runs: int, last: int) -> Curricula:
    width = max(1, *map(len, batches.values()))
    batch = np.full((runs, last, width), EMPTY_SLOT, np.int32)
    places = {str(name): place for place, name in enumerate(train)}
    for (run, step), ids in batches.items():
        unknown = [name for name in ids if name is not None and name not in places]
        if unknown:
            raise Misuse(
                f"{table.path}, column 'examples'",
                got=f"unknown ids {shorten(unknown)} at step {step}",
                expected=f"ids among {shorten(places)}",
                do="complete train_ids",
            )
        batch[run, step - 1, : len(ids)] = [
            EMPTY_SLOT if name is None else places[name] for name in ids
        ]
    return batch


def _of_slots(
    table: Table,
    column: str,
    listed: Mapping[tuple[int, int], tuple[float | None, ...]],
    batches: Batches,
    batch: Curricula,
) -> Float[np.ndarray, "run step slot"]:
    """The numbers of a column at their slots, and what blank means elsewhere."""
    empty, blank = (0.0, 1.0) if column == "weight" else (np.nan, np.nan)
    values = np.full(batch.shape, blank)
    for (run, step), numbers in listed.items():
        if len(numbers) != len(batches[run, step]):
            raise Misuse(
                f"{table.path}, column {column!r}",
                got=f"{len(numbers)} numbers at step {step}",
                expected=f"{len(batches[run, step])}, one for each of the step's examples",
                do="correct them; null stands for an empty slot",
            )
        values[run, step - 1, : len(numbers)] = [
            empty if number is None else number for number in numbers
        ]
    return values
