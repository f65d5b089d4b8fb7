"""Losses of planned runs that were observed, as ``Posterior.simulate(observed=...)`` takes them."""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, named, shorten
from bayes_simfluence.simulators.base import ObservedSimulator, Simulator

DIMS = ("run", "time", "query")
MOST = 4000
"""Observed losses in one call: their covariance is factorized whole."""
ROUNDING = 1e-3
"""Relative difference up to which an observed loss at time 0 is the one that the run has."""


def observed_losses(observed: Any, runs: xr.Dataset) -> Float[np.ndarray, "run time query"]:
    """Observed losses in the places of ``runs``, NaN where none was; time 0 included.

    Raises:
        Misuse: no array with the dimensions run, time and query; ids or times that ``runs`` do not
            have, or repeated ones; infinite losses; at time 0 others than those of ``runs``; too
            many.

    >>> import bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(run=slice(0, 2))
    >>> some = runs["loss"].isel(run=[1], query=[0, 3], time=slice(0, None, 16))
    >>> int(np.isfinite(observed_losses(some, runs)).sum())  # 7 times of 2 queries
    14
    """
    if not isinstance(observed, xr.DataArray):
        raise Misuse(
            "observed",
            got=type(observed).__name__,
            expected="an xarray.DataArray of losses (run, time, query), NaN where not observed",
            do="pass such as runs['loss'].sel(query=[...])",
        )
    if set(observed.dims) != set(DIMS) or observed.dtype.kind not in "fiu":
        raise Misuse(
            "observed",
            got=f"{observed.dtype} of dimensions {', '.join(map(str, observed.dims))}",
            expected="losses in nats with the dimensions run, time, query",
            do="select with lists and slices, which keep dimensions",
        )
    place = [_places(observed, runs, name) for name in DIMS]
    values = np.asarray(observed.transpose(*DIMS).values, float)
    infinite = np.isinf(values).any(axis=(1, 2))
    if infinite.any():
        raise Misuse(
            "observed",
            got=f"infinite losses in runs {shorten(observed['run'].values[infinite])}",
            expected="finite ones, NaN where not observed",
            do="leave these runs out, or set such losses to NaN",
        )
    losses = np.full(runs["loss"].shape, np.nan)
    losses[np.ix_(*place)] = values
    start = np.asarray(runs["loss"].values[:, 0], float)
    other = np.isfinite(losses[:, 0]) & (np.abs(losses[:, 0] - start) > ROUNDING * np.abs(start))
    if other.any():
        raise Misuse(
            "observed at time 0",
            got=f"other losses than the runs have for queries "
            f"{shorten(runs['query'].values[other.any(axis=0)])}",
            expected="the losses before the first update that the runs start from",
            do="give the runs these, or leave time 0 out of observed",
        )
    count = int(np.isfinite(losses[:, 1:]).sum())
    if count > MOST:
        raise Misuse(
            "observed",
            got=f"{count} losses after time 0",
            expected=f"at most {MOST} in one call",
            do="observe at fewer times, such as observed.isel(time=slice(None, None, 8)), or fewer "
            "runs at once",
        )
    return losses


def with_observed(simulator: Simulator) -> ObservedSimulator:
    """The simulator, where it can condition on losses of the runs that it simulates.

    Raises:
        Misuse: it cannot.
    """
    known = simulator.by_observed
    if known is None:
        raise Misuse(
            "observed",
            got=f"a posterior with a {simulator.name} simulator",
            expected="a Gaussian posterior, in which queries are dependent",
            do="fit Simfluence() by Exact() or Stack(), or leave observed out",
        )
    return known


def _places(observed: xr.DataArray, runs: xr.Dataset, name: str) -> list[int]:
    what = f"observed: {name}"
    if name not in observed.coords:
        raise Misuse(
            what,
            got="no coordinate",
            expected=f"the ids that runs['{name}'] has",
            do=f"add them with observed.assign_coords({name}=...)",
        )
    ids = observed[name].values
    places = named(what, ids, runs[name].values)
    if len(set(places)) < len(places):
        raise Misuse(
            what,
            got=f"repeated ids in {shorten(ids)}",
            expected="each id once",
            do="select each once",
        )
    return places
