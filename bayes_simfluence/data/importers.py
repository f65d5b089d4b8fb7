"""Runs from elsewhere and to elsewhere: long tables, plain arrays, the layout of GPTDynamics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, choice_of, shorten
from bayes_simfluence.conventions import COMPLETE, OF_RUNS, OPTIONAL
from bayes_simfluence.data.gptdynamics import is_gptdynamics, read_gptdynamics
from bayes_simfluence.data.longform import runs_of
from bayes_simfluence.data.runs import Ids, runs_from_arrays
from bayes_simfluence.data.tables import IDS, about_path, read_about, write_table
from bayes_simfluence.data.tabular import read_csv, read_parquet
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.files import PathLike, atomically, new_path, readable

FORMATS: Final = ("csv", "parquet", "npz", "gptdynamics")
SUFFIXES: Final = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet", ".npz": "npz"}
ARRAYS: Final = ("batch", "loss", *OPTIONAL, *OF_RUNS, *IDS, "status", "attrs")
"""Arrays of an ``.npz`` file, named as arguments of ``runs_from_arrays``; attrs as JSON text."""


def import_runs(
    path: PathLike,
    format: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    train_ids: Ids | None = None,
    keep_diverged: bool = False,
) -> xr.Dataset:
    """Runs that were recorded elsewhere, in memory and validated.

    ``csv``, ``parquet``: a long table, one row per run, step and query in any order, with columns
    ``run``, ``step`` (0 = before the first update), ``examples`` (of the update of this step: ids
    separated by spaces, or a JSON list with ``null`` for empty slots; in any row of the step),
    ``query``, ``loss`` (after the update, nats; a row that is absent or blank was not recorded),
    and maybe ``step_size``, ``status``, and of each of ``examples``, listed as they are,
    ``weight`` (1 where blank), ``train_loss`` and ``train_residual`` (not recorded where blank;
    at all steps of a run or at none). Every query needs its loss at step 0.

    ``npz``: arrays named as the arguments of ``runs_from_arrays``; NaN is a loss that was not
    recorded.

    ``gptdynamics``: a folder per run, see ``data.gptdynamics``; the recordings behind GPTfluence
    (arXiv 2404.07840) come so.

    Args:
        path: a file, or a folder of run folders.
        format: one of these; found from the path when omitted.
        columns: our name of a table's column -> its name.
        train_ids: ids of all examples in their order, also those in no batch; those in some
            batch, sorted, when omitted.
        keep_diverged: mark runs with a loss that is not finite instead of refusing them.

    Raises:
        Misuse: nothing there, an unknown format, or whatever in it does not fit, with its place.
    """
    path = Path(path)
    if not path.exists():
        raise Misuse(str(path), got="nothing there", expected="recorded runs", do="check the path")
    kind = _format(path, format)
    if columns and kind not in ("csv", "parquet"):
        raise Misuse(
            "columns", got=f"format {kind}", expected="a long table", do="leave columns out"
        )
    if kind == "gptdynamics":
        return read_gptdynamics(path, train_ids=train_ids, keep_diverged=keep_diverged)
    if kind == "npz":
        return _from_npz(path, train_ids=train_ids, keep_diverged=keep_diverged)
    about = {"attrs": {"imported_from": kind}, **read_about(path)}
    if train_ids is not None:
        about["train_ids"] = train_ids
    table = read_csv(path) if kind == "csv" else read_parquet(path)
    return runs_of(table, names=columns, keep_diverged=keep_diverged, **about)


def export_runs(
    runs: xr.Dataset, path: PathLike, format: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write valid runs in a format that ``import_runs`` reads back exactly.

    A long table has one row per recorded loss; every number is written so that it is read back as
    it was. What a table cannot hold (ids in their order, attributes, features) lies beside it, in
    ``NAME.about.json``; without that file the import has the same losses, batches and step sizes.
    Steps are counted from 1.

    Args:
        path: new file.
        format: ``csv``, ``parquet`` or ``npz``; found from the path when omitted.

    Raises:
        Misuse: invalid runs, a file that exists and ``overwrite`` is not set, an unknown format.
    """
    validate_runs(runs)
    path = new_path(path, overwrite=overwrite)
    kind = choice_of("format", _format(path, format), FORMATS[:3])
    if kind == "npz":
        return _to_npz(runs, path)
    new_path(about_path(path), overwrite=overwrite)
    write_table(runs, path, parquet=kind == "parquet")
    return path


def _format(path: Path, wanted: str | None) -> str:
    if wanted is not None:
        return choice_of("format", wanted, FORMATS)
    kind = "gptdynamics" if is_gptdynamics(path) else SUFFIXES.get(path.suffix.lower())
    if kind is None:
        ours = path.suffix in (".zarr", ".nc")
        raise Misuse(
            str(path),
            got="a store of this package" if ours else "a name and content of no known format",
            expected=".csv, .parquet, .npz, or a folder of run folders as in GPTDynamics",
            do="use open_runs, save_runs or export_netcdf"
            if ours
            else f"name the format: {shorten(FORMATS)}",
        )
    return kind


def _from_npz(path: Path, *, train_ids: Ids | None, keep_diverged: bool) -> xr.Dataset:
    expected = "arrays saved by numpy.savez, no Python objects"
    do = "save numbers and fixed-width text alone"
    with (
        readable(path, Exception, expected=expected, do=do),
        np.load(path, allow_pickle=False) as file,
    ):
        arrays = {name: file[name] for name in file.files}
    unknown = [name for name in arrays if name not in ARRAYS]
    missing = [name for name in ("batch", "loss") if name not in arrays]
    if unknown or missing:
        raise Misuse(
            str(path),
            got=f"arrays {shorten(arrays, 9)}",
            expected=f"batch, loss, and maybe {shorten(ARRAYS[2:], 9)}",
            do=f"rename {shorten(unknown)}" if unknown else f"add {shorten(missing)}",
        )
    if train_ids is not None:
        arrays["train_ids"] = np.asarray(train_ids)
    attrs = _attrs(path, arrays.pop("attrs", None))
    return runs_from_arrays(**arrays, attrs=attrs, keep_diverged=keep_diverged, missing=True)


def _attrs(path: Path, text: np.ndarray | None) -> dict[str, Any]:
    if text is None:
        return {"imported_from": "npz"}
    try:
        attrs = json.loads(str(text))
    except ValueError:
        attrs = None
    if not isinstance(attrs, dict):
        raise Misuse(
            f"{path}, array 'attrs'",
            got="no JSON object",
            expected="attributes as JSON text",
            do="write json.dumps(attrs), or leave it out",
        )
    return attrs


def _to_npz(runs: xr.Dataset, path: Path) -> Path:
    arrays: dict[str, Any] = {
        name: runs[name].values for name in ("batch", "loss", *OPTIONAL, *OF_RUNS) if name in runs
    }
    if not (runs["status"].values == COMPLETE).all():
        arrays["status"] = runs["status"].values
    for name in ("train", "query", "run"):
        arrays[f"{name}_ids"] = runs[name].values
    arrays["attrs"] = np.array(json.dumps(dict(runs.attrs)))
    with atomically(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path
