"""Datasets in netCDF-4 files: compressed, in groups, with attributes of any plain value."""

import json
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

ENGINE: Final = "h5netcdf"
AS_JSON = "json_attributes"
"""Names of the attributes that netCDF cannot hold and that are kept as JSON text."""


def write_groups(path: Path, groups: dict[str, xr.Dataset]) -> None:
    """Write datasets as groups of one new file; ``"/"`` is the root group."""
    for number, (group, dataset) in enumerate(groups.items()):
        packed: dict[str, Any] = {"zlib": True, "complevel": 9, "shuffle": True}
        encoding = {name: packed for name, variable in dataset.data_vars.items() if variable.ndim}
        mode: Literal["a", "w"] = "a" if number else "w"
        dataset.assign_attrs(_encoded(dataset.attrs)).to_netcdf(
            path, mode=mode, group=group, engine=ENGINE, encoding=encoding
        )


def read_group(path: Path, group: str = "/") -> xr.Dataset:
    """One group of a file, in memory; texts as fixed-width strings."""
    with xr.open_dataset(path, group=group, engine=ENGINE) as opened:
        dataset = opened.load()
    dataset = plain(dataset)
    attrs = dict(dataset.attrs)
    as_json = json.loads(attrs.pop(AS_JSON, "[]"))
    decoded = {name: json.loads(attrs[name]) for name in as_json}
    scalars = {name: x.item() if isinstance(x, np.generic) else x for name, x in attrs.items()}
    dataset.attrs = {**scalars, **decoded}
    return dataset


def plain(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset without traces of the file it came from; texts as fixed-width strings."""
    texts = [name for name in dataset.coords if dataset[name].dtype.kind in "OT"]
    dataset = dataset.assign_coords(
        {
            name: (dataset[name].dims, np.array(dataset[name].values.tolist(), dtype=str))
            for name in texts
        }
    )
    for name in dataset.variables:
        dataset[name].encoding = {}
    return dataset


def _encoded(attrs: dict[Any, Any]) -> dict[str, Any]:
    as_json = [
        name
        for name, value in attrs.items()
        if isinstance(value, bool) or not isinstance(value, str | int | float | np.generic)
    ]
    encoded = {name: json.dumps(attrs[name]) for name in as_json}
    return {**attrs, **encoded, AS_JSON: json.dumps(as_json)}
