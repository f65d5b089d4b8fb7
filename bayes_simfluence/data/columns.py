"""Cells of a long table of runs: what each says, and an error that names its place."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.data.tabular import Table

__all__ = [
    "COLUMNS",
    "columns_of",
    "members",
    "number",
    "places_of",
    "slot_weights",
    "sorted_ids",
    "step_number",
    "told",
    "typed_ids",
]

COLUMNS: Final = ("run", "step", "examples", "query", "loss", "step_size", "status", "weight")
"""Columns of the table; the last three may be absent."""
NEEDED: Final = COLUMNS[:5]


def columns_of(table: Table, names: Mapping[str, str]) -> dict[str, Sequence[Any]]:
    unknown = [one for one in names if one not in COLUMNS]
    if unknown:
        raise Misuse(
            "columns",
            got=f"names of {shorten(unknown)}",
            expected=f"names of {shorten(COLUMNS, 9)}",
            do="write columns={'loss': 'their name'}",
        )
    theirs = {one: names.get(one, one) for one in COLUMNS}
    needed = [theirs[one] for one in COLUMNS if one in NEEDED or one in names]
    missing = [one for one in needed if one not in table.columns]
    if missing:
        raise Misuse(
            str(table.path),
            got=f"columns {shorten(table.columns, 9)}",
            expected=f"also {shorten(missing)}",
            do="rename them, or tell their names by columns={'loss': 'their name'}",
        )
    if not table.lines:
        raise Misuse(str(table.path), got="no rows", expected="rows of runs", do="check the file")
    return {one: table.columns[name] for one, name in theirs.items() if name in table.columns}


def _blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _name(cell: Any) -> str:
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def places_of(
    table: Table, cells: Mapping[str, Sequence[Any]], column: str
) -> tuple[list[str], Int[np.ndarray, " row"]]:
    """Names in the order in which they occur, and the place of each row's; -1 = blank."""
    found: dict[str, int] = {}
    places = np.full(len(table.lines), -1)
    for row, cell in enumerate(cells[column]):
        if not _blank(cell):
            places[row] = found.setdefault(_name(cell), len(found))
        elif column == "run":
            raise Misuse(
                table.at(row, "run"), got="nothing", expected="the run's id", do="fill it in"
            )
    if not found:
        raise Misuse(
            f"{table.path}, column {column!r}",
            got="only blank cells",
            expected="ids",
            do="fill them in",
        )
    return list(found), places


def step_number(table: Table, row: int, cell: Any) -> int:
    found = number(table, row, "step", cell)
    if not found >= 0 or not found.is_integer():
        raise Misuse(
            table.at(row, "step"),
            got=repr(cell),
            expected="a whole number >= 0; 0 = before the first update",
            do="correct it",
        )
    return int(found)


def number(table: Table, row: int, column: str, cell: Any) -> float:
    if _blank(cell):
        return float("nan")
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise Misuse(
            table.at(row, column), got=repr(cell), expected="a number", do="correct it"
        ) from None


def members(table: Table, row: int, cell: Any) -> tuple[str | None, ...]:
    """Ids of a batch, ``None`` for an empty slot."""
    listed = cell
    if isinstance(cell, str):
        listed = cell.split()
        if cell.lstrip().startswith("["):
            try:
                listed = json.loads(cell)
            except ValueError:
                listed = None
    single = isinstance(listed, int) and not isinstance(listed, bool)
    listed = [listed] if single else listed
    if not isinstance(listed, list) or not all(
        one is None or (isinstance(one, str | int) and not isinstance(one, bool)) for one in listed
    ):
        raise Misuse(
            table.at(row, "examples"),
            got=shorten([repr(cell)]),
            expected="ids separated by spaces, or a JSON list of them with null for empty slots",
            do="correct it; [] is an empty batch",
        )
    return tuple(None if one is None else str(one) for one in listed)


def slot_weights(table: Table, row: int, cell: Any) -> tuple[float, ...]:
    """Weights of a batch's slots in the order of ``examples``; ``null`` for empty slots is 0."""
    listed = cell
    if isinstance(cell, str):
        try:
            listed = json.loads(cell) if cell.lstrip().startswith("[") else _floats(cell.split())
        except ValueError:
            listed = None
    listed = [listed] if isinstance(listed, int | float) else listed
    if not isinstance(listed, list) or not all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in listed
    ):
        raise Misuse(
            table.at(row, "weight"),
            got=shorten([repr(cell)]),
            expected="one number for each of the step's examples, separated by spaces, or a JSON "
            "list with null for empty slots",
            do="correct it; blank means 1 for every example",
        )
    return tuple(0.0 if value is None else float(value) for value in listed)


def _floats(words: list[str]) -> list[float]:
    return [float(word) for word in words]


def told(
    table: Table,
    cells: Mapping[str, Sequence[Any]],
    column: str,
    run_at: Int[np.ndarray, " row"],
    steps: Int[np.ndarray, " row"],
    read: Callable[[Table, int, Any], Any],
) -> dict[tuple[int, int], Any]:
    """What rows say of their step: (run, step) -> value; blank cells say nothing."""
    found: dict[tuple[int, int], tuple[Any, Any, int]] = {}
    for row, (run, step, cell) in enumerate(
        zip(run_at.tolist(), steps.tolist(), cells[column], strict=True)
    ):
        if _blank(cell) or (step == 0 and column != "examples"):
            continue
        if (run, step) not in found:
            found[run, step] = (cell, read(table, row, cell), row)
        before, value, first = found[run, step]
        if step == 0 and value:
            raise Misuse(
                table.at(row, column),
                got=f"{cell!r} at step 0",
                expected="nothing, step 0 is before the first update",
                do="count updates from 1",
            )
        if str(before) != str(cell) and value != read(table, row, cell):
            raise Misuse(
                table.at(row, column),
                got=repr(cell),
                expected=f"{before!r} as in {table.unit} {table.lines[first]}, of the same step",
                do="correct one of them",
            )
    return {key: value for key, (_, value, _) in found.items() if key[1]}


def typed_ids(ids: Sequence[str]) -> np.ndarray:
    """Ids as whole numbers where all of them read so; else as they are.

    >>> typed_ids(["10", "9"]), typed_ids(["10", "09"])
    (array([10,  9]), array(['10', '09'], dtype='<U2'))
    """
    whole = all(
        len(one) < 19 and one.removeprefix("-").isdecimal() and str(int(one)) == one for one in ids
    )
    return np.array(list(map(int, ids))) if whole else np.array(ids, dtype=str)


def sorted_ids(ids: Collection[str]) -> np.ndarray:
    """Ids as ``typed_ids`` in their order.

    >>> sorted_ids({"10", "9"})
    array([ 9, 10])
    """
    return np.sort(typed_ids(sorted(ids)))
