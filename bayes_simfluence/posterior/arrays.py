"""Datasets of runs as the arrays that fits and simulators work on."""

import numpy as np
import xarray as xr
from jaxtyping import Int

from bayes_simfluence.checks import named
from bayes_simfluence.data.training import residuals_of
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.priors import Prior


def recorded_arrays(
    runs: xr.Dataset, prior: Prior | None = None, *, residuals: bool = False
) -> RunArrays:
    """The arrays of valid, usable runs; with what a prior brings of its own.

    With ``residuals``, those of each step's examples where all runs tell them, for coupled models.
    """
    features = no_features(runs.sizes["train"], runs.sizes["query"])
    known = {axis: _optional(runs, f"{axis}_feature") for axis in ("train", "query")}
    features = features._replace(
        **{axis: array for axis, array in known.items() if array is not None}
    )
    if prior is not None:
        resolved = prior.resolve(runs["train"].values, runs["query"].values, features)
        features = ExampleFeatures(*map(np.asarray, resolved))
    arrays = RunArrays.of(
        runs["batch"].values,
        np.asarray(runs["loss"].values, float),
        weight=_optional(runs, "weight"),
        step_size=_optional(runs, "step_size"),
        features=features,
    )
    return arrays._replace(residual=residuals_of(runs)) if residuals else arrays


def planned_arrays(runs: xr.Dataset, train: np.ndarray, query: np.ndarray) -> RunArrays:
    """Runs to be simulated, in the positions of the fitted ``train`` and ``query`` ids.

    Of their losses only those before the first update are known.
    """
    batch = runs["batch"].values
    used = np.unique(batch[batch >= 0])
    place = np.full(runs.sizes["train"] + 1, -1, np.int32)
    place[used] = named("examples in the curricula", runs["train"].values[used], train)
    return RunArrays.of(
        place[batch],
        np.asarray(runs["loss"].values[:, :1], float),
        weight=_optional(runs, "weight"),
        step_size=_optional(runs, "step_size"),
        query=np.asarray(named("queries", runs["query"].values, query)),
        features=no_features(len(train), len(query)),
    )


def fitted_queries(fitted: xr.Dataset, runs: xr.Dataset) -> Int[np.ndarray, " query"]:
    """Positions of the queries of ``runs`` among the fitted ones, by id; -1 = not fitted."""
    place = {str(name): at for at, name in enumerate(fitted["query"].values)}
    return np.array([place.get(str(name), -1) for name in runs["query"].values])


def positions_with_new(
    runs: xr.Dataset, train: np.ndarray
) -> tuple[RunArrays, Int[np.ndarray, " new"]]:
    """Curricula in the positions of the ``train`` ids, examples that are not among them after.

    Returns:
        The runs, of which no query is looked at, and where the new examples are in ``runs``.
    """
    batch = runs["batch"].values
    used = np.unique(batch[batch >= 0])
    names = runs["train"].values[used].astype(str)
    places = {str(name): place for place, name in enumerate(train)}
    new = used[[name not in places for name in names]]
    places.update({str(runs["train"].values[at]): len(train) + n for n, at in enumerate(new)})
    place = np.full(runs.sizes["train"] + 1, -1, np.int32)
    place[used] = [places[name] for name in names]
    arrays = RunArrays.of(
        place[batch],
        np.zeros((len(batch), 1, 0)),
        weight=_optional(runs, "weight"),
        step_size=_optional(runs, "step_size"),
        features=no_features(len(train) + len(new), 0),
    )
    return arrays, new


def _optional(runs: xr.Dataset, name: str) -> np.ndarray | None:
    return np.asarray(runs[name].values, float) if name in runs else None
