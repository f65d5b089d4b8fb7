"""Which initial weights a run started from: the coordinate ``start`` of ``run``.

A whole number for each run: 0 = the weights of the recording's task, others drawn anew (a fresh
head). All runs of a recording without it started from the same weights.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import START


def with_starts(runs: xr.Dataset, numbers: Any = None) -> xr.Dataset:
    """``runs`` with the coordinate ``start``.

    Args:
        numbers: of each run's start, ``(run,)``; what ``runs`` say already when omitted, or else 0.

    Raises:
        Misuse: another number of starts than runs.
    """
    found = starts_of(runs) if numbers is None else np.asarray(numbers)
    if found.shape != (runs.sizes["run"],):
        raise Misuse(
            START,
            got=f"shape {found.shape}",
            expected=f"the number of a start for each of {runs.sizes['run']} runs",
            do="pass 0 for runs from the first weights, 1, 2, ... for others",
        )
    return runs.assign_coords({START: ("run", found)})


def starts_of(runs: xr.Dataset) -> Int[np.ndarray, " run"]:
    """The number of each run's start, 0 where ``runs`` do not say.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> starts_of(runs_from_arrays(batch=[[[0]]] * 2, loss=[[[1.0], [0.9]]] * 2)).tolist()
    [0, 0]
    """
    return runs[START].values if START in runs.coords else np.zeros(runs.sizes["run"], int)


def validate_starts(runs: xr.Dataset) -> None:
    """Raise unless starts are whole numbers >= 0, one for each run."""
    if START not in runs.coords:
        return
    numbers = runs[START]
    whole = numbers.dims == ("run",) and np.issubdtype(numbers.dtype, np.integer)
    if not whole or (numbers.values < 0).any():
        raise Misuse(
            f"runs['{START}']",
            got=f"{numbers.dtype} over {numbers.dims}, least {numbers.min().item()}",
            expected="a whole number >= 0 for each run",
            do=f"correct them, or drop them with runs.drop_vars('{START}')",
        )
