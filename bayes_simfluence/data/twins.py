"""Twins: runs of one curriculum whose initial weights differ at rounding level.

A recording may train some curricula twice. What twins differ by, nobody can tell from curricula and
initial losses: it is the floor of any simulator's squared error (``evaluation.floor``). The
coordinate ``twin`` of ``run`` names, as text, the run whose curriculum a run repeats, and the run
itself where it repeats none. Runs of one name are twins, whichever of them a selection keeps.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.conventions import TWIN
from bayes_simfluence.data.starts import starts_of
from bayes_simfluence.data.weights import weights_of


def with_twins(runs: xr.Dataset, names: Any = None) -> xr.Dataset:
    """``runs`` with the coordinate ``twin``.

    Args:
        names: for each run the id of the run that it repeats, its own where it repeats none,
            ``(run,)``; what ``runs`` say already when omitted, or else every run alone.

    Raises:
        Misuse: another number of names than runs.
    """
    if names is None:
        names = runs[TWIN if TWIN in runs.coords else "run"].values
    words = np.asarray(names).astype(str)
    if words.shape != (runs.sizes["run"],):
        raise Misuse(
            TWIN,
            got=f"shape {words.shape}",
            expected=f"the id of a run for each of {runs.sizes['run']} runs",
            do="name the run that is repeated, and the run itself where it repeats none",
        )
    return runs.assign_coords({TWIN: ("run", words)})


def twin_groups(runs: xr.Dataset) -> list[Int[np.ndarray, " twin"]]:
    """Positions of the runs of each curriculum that was trained more than once.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> runs = runs_from_arrays(
    ...     batch=[[[0]], [[1]], [[1]]], loss=[[[1.0], [0.9]]] * 3, twin=["0", "1", "1"])
    >>> [group.tolist() for group in twin_groups(runs)]
    [[1, 2]]
    """
    if TWIN not in runs.coords:
        return []
    names = runs[TWIN].values
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    return [group for group in groups if len(group) > 1]


def without_twins(runs: xr.Dataset) -> tuple[xr.Dataset, int]:
    """The first run of every curriculum that has twins, all other runs, and how many are left out.

    Where a run is left out to judge predictions of it, its twin must be left out too. A twin tells
    little of effects, so that fits do without.
    """
    others = [run for group in twin_groups(runs) for run in group[1:]]
    if not others:
        return runs, 0
    return runs.isel(run=np.setdiff1d(np.arange(runs.sizes["run"]), others)), len(others)


def twins_between(runs: xr.Dataset, others: xr.Dataset) -> list[str]:
    """Ids of those of ``runs`` that share curriculum and name with one of ``others``.

    Names alone may repeat between recordings.
    """
    if TWIN not in runs.coords or TWIN not in others.coords:
        return []
    names, other_names = runs[TWIN].values, others[TWIN].values
    return [
        str(runs["run"].values[at])
        for at in np.flatnonzero(np.isin(names, other_names))
        if any(
            np.array_equal(runs["batch"].values[at], others["batch"].values[other])
            for other in np.flatnonzero(other_names == names[at])
        )
    ]


def validate_twins(runs: xr.Dataset) -> None:
    """Raise unless twins have one curriculum and one start; ``runs`` are valid otherwise."""
    if TWIN not in runs.coords:
        return
    names = runs[TWIN]
    if names.dims != ("run",) or names.dtype.kind != "U":
        raise Misuse(
            f"runs['{TWIN}']",
            got=f"{names.dtype} over {names.dims}",
            expected="a text for each run",
            do=f"pass {TWIN}=... to runs_from_arrays, or drop it with runs.drop_vars('{TWIN}')",
        )
    trained = (runs["batch"].values, weights_of(runs), starts_of(runs))
    for group in twin_groups(runs):
        if any((values[group] != values[group[:1]]).any() for values in trained):
            raise Misuse(
                f"runs['{TWIN}']",
                got=f"runs {shorten(runs['run'].values[group])} of other curricula or starts",
                expected="the same batches, weights and starts in all runs of one name",
                do=f"correct the names, or drop them with runs.drop_vars('{TWIN}')",
            )
