"""Long tables of runs as files: CSV with exact numbers, Parquet, and what lies beside them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, OF_RUNS, OPTIONAL, SCHEMA_VERSION
from bayes_simfluence.data.columns import COLUMNS
from bayes_simfluence.data.longform import rows_of
from bayes_simfluence.data.tabular import pyarrow_for
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.files import atomically, first_line

IDS = ("train_ids", "query_ids", "run_ids")
FEATURES = ("train_feature", "query_feature")


def about_path(path: Path) -> Path:
    """The file beside a table that holds what the table cannot."""
    return path.with_name(f"{path.name}.about.json")


def read_about(path: Path) -> dict[str, Any]:
    """What lies beside an exported table, as arguments of ``longform.runs_of``; may be nothing.

    Raises:
        Misuse: a file there that ``write_table`` of this version has not written.
    """
    beside = about_path(path)
    if not beside.exists():
        return {}
    try:
        content = json.loads(beside.read_text("utf-8"))
        version = content["schema_version"]
        about = {name: content[name] for name in (*IDS, "dtype", "attrs")}
    except (ValueError, KeyError, TypeError):
        version, about = None, {}
    if version != SCHEMA_VERSION:
        raise Misuse(
            str(beside),
            got="no description of exported runs of this version",
            expected=f"schema_version {SCHEMA_VERSION}, ids and attributes",
            do="remove the file, or export the runs again",
        )
    features = {name: np.array(content[name], np.float32) for name in FEATURES if name in content}
    said = {name: content[name] for name in OF_RUNS if name in content}
    return {**about, **features, **said}


def write_table(runs: xr.Dataset, path: Path, *, parquet: bool) -> None:
    """Write valid runs as a table at ``path`` and what it cannot hold beside it.

    Raises:
        Misuse: blank ids, attributes that JSON cannot hold, pyarrow is not installed.
    """
    about = _about(validate_runs(runs))
    columns = [name for name in COLUMNS if name not in OPTIONAL or name in runs]
    if (runs["status"].values == COMPLETE).all():
        columns.remove("status")
    kept = [COLUMNS.index(name) for name in columns]
    pyarrow = pyarrow_for(path) if parquet else None
    with atomically(about_path(path)) as partial:
        partial.write_text(about, "utf-8")
    with atomically(path) as partial:
        if pyarrow is not None:
            values = list(zip(*rows_of(runs), strict=True))
            table = {name: list(values[at]) for name, at in zip(columns, kept, strict=True)}
            pyarrow.parquet.write_table(pyarrow.table(table), partial)
            return
        with partial.open("w", newline="", encoding="utf-8") as file:
            # With this end of a line, the writer quotes lone carriage returns too.
            writer = csv.writer(file, lineterminator="\r\n")
            writer.writerow(columns)
            writer.writerows([_text(row[at]) for at in kept] for row in rows_of(runs))


def _text(value: Any) -> str:
    """A value as text; ``repr`` of a float is read back as the same number."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _about(runs: xr.Dataset) -> str:
    ids = {name: runs[name].values.tolist() for name in ("train", "query", "run")}
    for name, listed in ids.items():
        bad = [item for item in listed if not isinstance(item, str | int) or not str(item).strip()]
        if bad:
            raise Misuse(
                f"runs['{name}']",
                got=f"the id {bad[0]!r}",
                expected="ids that are whole numbers or text that is not blank",
                do="rename them with runs.assign_coords(...)",
            )
    about: Mapping[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **{f"{name}_ids": listed for name, listed in ids.items()},
        "dtype": str(runs["loss"].dtype),
        "attrs": dict(runs.attrs),
        **{name: runs[name].values.tolist() for name in (*FEATURES, *OF_RUNS) if name in runs},
    }
    try:
        return json.dumps(about, ensure_ascii=False, default=_plain)
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
