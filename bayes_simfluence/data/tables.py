"""Long tables of runs as files: CSV with exact numbers, Parquet, and what lies beside them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import SCHEMA_VERSION
from bayes_simfluence.data.columns import COLUMNS
from bayes_simfluence.data.longform import rows_of
from bayes_simfluence.data.runs import validate_runs
from bayes_simfluence.data.tabular import pyarrow_for
from bayes_simfluence.files import atomically, first_line

__all__ = ["about_path", "read_about", "write_table"]

FEATURES = ("train_feature", "query_feature")


def about_path(path: Path) -> Path:
    """Where what a table cannot hold lies: beside it."""
    return path.with_name(f"{path.name}.about.json")


def read_about(path: Path) -> dict[str, Any]:
    """What lies beside a table that was exported, as arguments of ``longform.runs_of``.

    Raises:
        Misuse: a file there that is none of ours.
    """
    beside = about_path(path)
    if not beside.exists():
        return {}
    try:
        said = json.loads(beside.read_text("utf-8"))
        version = said["schema_version"]
        found = {one: said[one] for one in ("train_ids", "query_ids", "run_ids", "dtype")}
        found["attrs"] = said["attrs"]
    except (ValueError, KeyError, TypeError):
        version, found = None, {}
    if version != SCHEMA_VERSION:
        raise Misuse(
            str(beside),
            got="no description of exported runs of this version",
            expected=f"schema_version {SCHEMA_VERSION}, ids and attributes",
            do="remove the file, or export the runs again",
        )
    features = {one: np.array(said[one], np.float32) for one in FEATURES if one in said}
    return {**found, **features}


def write_table(runs: xr.Dataset, path: Path, *, parquet: bool) -> None:
    """Write valid runs as a table at ``path`` and what it cannot hold beside it.

    Raises:
        Misuse: blank ids, attributes that JSON cannot hold, pyarrow is not installed.
    """
    about = _about(validate_runs(runs))
    columns = [one for one in COLUMNS if one not in ("step_size", "weight") or one in runs]
    if (runs["status"].values == 1).all():
        columns.remove("status")
    kept = [COLUMNS.index(one) for one in columns]
    arrow = pyarrow_for(path) if parquet else None
    with atomically(about_path(path)) as partial:
        partial.write_text(about, "utf-8")
    with atomically(path) as partial:
        if arrow is not None:
            cells = zip(*rows_of(runs), strict=True)
            named = dict(zip(COLUMNS, map(list, cells), strict=True))
            arrow.parquet.write_table(arrow.table({one: named[one] for one in columns}), partial)
            return
        with partial.open("w", newline="", encoding="utf-8") as file:
            # With this end of a line, the writer quotes lone carriage returns too.
            writer = csv.writer(file, lineterminator="\r\n")
            writer.writerow(columns)
            writer.writerows([_text(row[at]) for at in kept] for row in rows_of(runs))


def _text(cell: Any) -> str:
    """A cell as text; ``repr`` of a float is read back as the same number."""
    return "" if cell is None else repr(cell) if isinstance(cell, float) else str(cell)


def _about(runs: xr.Dataset) -> str:
    ids = {name: runs[name].values.tolist() for name in ("train", "query", "run")}
    for name, listed in ids.items():
        bad = [one for one in listed if not isinstance(one, str | int) or not str(one).strip()]
        if bad:
            raise Misuse(
                f"runs['{name}']",
                got=f"the id {bad[0]!r}",
                expected="ids that are whole numbers or text that is not blank",
                do="rename them with runs.assign_coords(...)",
            )
    said: Mapping[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **{f"{name}_ids": listed for name, listed in ids.items()},
        "dtype": str(runs["loss"].dtype),
        "attrs": dict(runs.attrs),
        **{one: runs[one].values.tolist() for one in FEATURES if one in runs},
    }
    try:
        return json.dumps(said, ensure_ascii=False, default=_plain)
    except TypeError as error:
        raise Misuse(
            "runs.attrs",
            got=first_line(error),
            expected="numbers, text, lists and mappings",
            do="drop the attribute with runs.drop_attrs(deep=False)",
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
