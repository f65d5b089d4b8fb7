"""Columns of a long table of runs: what each value means, and errors that name its place."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.conventions import OF_TRAINING
from bayes_simfluence.data.tabular import Table

NEEDED: Final = ("run", "step", "examples", "query", "loss")
COLUMNS: Final = (*NEEDED, "step_size", "status", "weight", *OF_TRAINING)
"""Columns of the table; those not in ``NEEDED`` may be absent."""
BLANK: Final = {"weight": "1 for every example", **dict.fromkeys(OF_TRAINING, "not recorded")}
"""Columns with a number for each of ``examples``, and what a blank in them means."""

Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Our name of a column -> its values in all rows."""


def known_columns(table: Table, names: Mapping[str, str]) -> Columns:
    """The columns of ``COLUMNS`` that the table has; ``names`` are ours -> the table's.

    Raises:
        Misuse: names of other columns, a column that is needed or named and is absent, no rows.
    """
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise Misuse(
            "columns",
            got=f"names of {shorten(unknown)}",
            expected=f"names of {shorten(COLUMNS, 9)}",
            do="write columns={'loss': 'their name'}",
        )
    theirs = {name: names.get(name, name) for name in COLUMNS}
    needed = [theirs[name] for name in COLUMNS if name in NEEDED or name in names]
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise Misuse(
            str(table.path),
            got=f"columns {shorten(table.columns, 9)}",
            expected=f"also {shorten(missing)}",
            do="rename them, or name them with columns={'loss': 'their name'}",
        )
    if not table.lines:
        raise Misuse(str(table.path), got="no rows", expected="rows of runs", do="check the file")
    return {ours: table.columns[name] for ours, name in theirs.items() if name in table.columns}


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def id_places(
    table: Table, columns: Columns, name: str
) -> tuple[list[str], Int[np.ndarray, " row"]]:
    """The ids of a column in the order in which they first occur, and each row's place among them.

    The place of a blank value is -1; a run must be named in every row.
    """
    order: dict[str, int] = {}
    places = np.full(len(table.lines), -1)
    for row, value in enumerate(columns[name]):
        if not _blank(value):
            places[row] = order.setdefault(_name(value), len(order))
        elif name == "run":
            raise Misuse(
                table.at(row, "run"), got="nothing", expected="the run's id", do="fill it in"
            )
    if not order:
        raise Misuse(
            f"{table.path}, column {name!r}",
            got="only blank values",
            expected="ids",
            do="fill them in",
        )
    return list(order), places


def step_number(table: Table, row: int, value: Any) -> int:
    """A step, 0 = before the first update."""
    step = number(table, row, "step", value)
    if not step >= 0 or not step.is_integer():
        raise Misuse(
            table.at(row, "step"),
            got=repr(value),
            expected="a whole number >= 0; 0 = before the first update",
            do="correct it",
        )
    return int(step)


def number(table: Table, row: int, column: str, value: Any) -> float:
    """A number; NaN where nothing is written."""
    if _blank(value):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Misuse(
            table.at(row, column), got=repr(value), expected="a number", do="correct it"
        ) from None


def batch_ids(table: Table, row: int, value: Any) -> tuple[str | None, ...]:
    """Ids of a batch, ``None`` for an empty slot."""
    ids = _listed(value, str)
    if ids is None or not all(_is(item, str, int) for item in ids):
        raise Misuse(
            table.at(row, "examples"),
            got=shorten([repr(value)]),
            expected="ids separated by spaces, or a JSON list of them with null for empty slots",
            do="correct it; [] is an empty batch",
        )
    return tuple(None if name is None else str(name) for name in ids)


def slot_numbers(table: Table, row: int, value: Any, column: str) -> tuple[float | None, ...]:
    """Numbers of a batch's slots in the order of ``examples``; ``None`` where there is none."""
    numbers = _listed(value, float)
    if numbers is None or not all(_is(item, int, float) for item in numbers):
        raise Misuse(
            table.at(row, column),
            got=shorten([repr(value)]),
            expected="one number for each of the step's examples, separated by spaces, or a JSON "
            "list with null for empty slots",
            do=f"correct it; blank means {BLANK[column]}",
        )
    return tuple(None if item is None else float(item) for item in numbers)


def _listed(value: Any, kind: Callable[[str], Any]) -> list[Any] | None:
    """A list as it is, or from text: JSON, or items separated by spaces; ``None`` if it is none."""
    if isinstance(value, str):
        try:
            if value.lstrip().startswith("["):
                value = json.loads(value)
            else:
                value = [kind(item) for item in value.split()]
        except ValueError:
            return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    return value if isinstance(value, list) else None


def _is(item: Any, *kinds: type) -> bool:
    return item is None or (isinstance(item, kinds) and not isinstance(item, bool))


def step_values(
    table: Table,
    columns: Columns,
    name: str,
    run_at: Int[np.ndarray, " row"],
    steps: Int[np.ndarray, " row"],
    read: Callable[[Table, int, Any], Any],
) -> dict[tuple[int, int], Any]:
    """A column that belongs to steps: (run, step) -> value; blank values are left out.

    Raises:
        Misuse: examples at step 0, rows of the same step that disagree.
    """
    first: dict[tuple[int, int], tuple[Any, Any, int]] = {}
    for row, (run, step, value) in enumerate(
        zip(run_at.tolist(), steps.tolist(), columns[name], strict=True)
    ):
        if _blank(value) or (step == 0 and name != "examples"):
            continue
        if (run, step) not in first:
            first[run, step] = (value, read(table, row, value), row)
        before, meaning, earlier = first[run, step]
        if step == 0 and meaning:
            raise Misuse(
                table.at(row, name),
                got=f"{value!r} at step 0",
                expected="nothing, step 0 is before the first update",
                do="count updates from 1",
            )
        if str(before) != str(value) and meaning != read(table, row, value):
            raise Misuse(
                table.at(row, name),
                got=repr(value),
                expected=f"{before!r} as in {table.unit} {table.lines[earlier]}, of the same step",
                do="correct one of them",
            )
    return {place: meaning for place, (_, meaning, _) in first.items() if place[1]}


def typed_ids(ids: Sequence[str]) -> np.ndarray:
    """Ids as whole numbers where all of them are written so; else as they are.

    >>> typed_ids(["10", "9"]), typed_ids(["10", "09"])
    (array([10,  9]), array(['10', '09'], dtype='<U2'))
    """
    whole = all(
        len(name) < 19 and name.removeprefix("-").isdecimal() and str(int(name)) == name
        for name in ids
    )
    return np.array(list(map(int, ids))) if whole else np.array(ids, dtype=str)


def sorted_ids(ids: Collection[str]) -> np.ndarray:
    """Ids as ``typed_ids``, sorted.

    >>> sorted_ids({"10", "9"})
    array([ 9, 10])
    """
    return np.sort(typed_ids(sorted(ids)))
