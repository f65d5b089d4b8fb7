"""Scores in files: netCDF, so that whatever tool made them can write them."""

from pathlib import Path

import xarray as xr

from bayes_simfluence.attribution.scores import check_scores
from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.netcdf import read_group, write_groups
from bayes_simfluence.files import PathLike, atomically, existing_file, new_path, readable

NAME = "score"


def save_scores(scores: xr.DataArray, path: PathLike, *, overwrite: bool = False) -> Path:
    """Write scores ``(train, query)`` with their attributes as one netCDF-4 file, all or nothing.

    Raises:
        Misuse: scores that are not finite, a file that exists and ``overwrite`` is not set.
    """
    check_scores(scores)
    path = new_path(path, overwrite=overwrite)
    # On the dataset, where attributes of any plain value survive.
    bare = scores.drop_attrs().to_dataset(name=NAME)
    with atomically(path) as partial:
        write_groups(partial, {"/": bare.assign_attrs(scores.attrs)})
    return path


def load_scores(path: PathLike) -> xr.DataArray:
    """Scores from a file of ``save_scores``, or from any netCDF file with one variable
    ``(train, query)``, such as ``scores.to_netcdf(path)`` writes.

    Raises:
        Misuse: no such file, one that cannot be read, other variables, scores that are not finite.
    """
    path = existing_file(path, expected="saved scores")
    with readable(path, Exception, expected="a netCDF file", do="save the scores again"):
        dataset = read_group(path)
    held = [str(name) for name in dataset.data_vars]
    unnamed = sorted({"train", "query"} - set(dataset.coords))
    if len(held) != 1 or unnamed:
        raise Misuse(
            str(path),
            got=f"variables {held or 'none'}, no ids of {unnamed}" if unnamed else f"{held}",
            expected="one variable (train, query) with ids along both",
            do="save scores made by score_array",
        )
    scores = dataset[held[0]].rename(NAME)
    return check_scores(scores.assign_attrs({**dataset.attrs, **scores.attrs}))
