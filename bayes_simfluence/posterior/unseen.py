"""Runs with examples or queries that a posterior does not know: whose features say enough."""

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.posterior.arrays import planned_arrays
from bayes_simfluence.simulators.base import Simulated, Simulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator
from bayes_simfluence.simulators.unseen import for_unseen_queries, with_unseen_examples

__all__ = ["simulated_runs"]


def simulated_runs(
    simulator: Simulator, fitted: xr.Dataset, runs: xr.Dataset, *, key: jax.Array, draws: int
) -> Simulated:
    """Losses along ``runs``, whose examples and queries may be new where features say what of them.

    Raises:
        Misuse: ids that are not among the fitted ones and have no features to go by.
    """
    batch = runs["batch"].values
    used = runs["train"].values[np.unique(batch[batch >= 0])]
    new_train = _new(used, fitted["train"].values)
    queries = runs["query"].values
    new_query = _new(queries, fitted["query"].values)
    train_ids = fitted["train"].values
    if len(new_train):
        known = _gaussian(simulator, "examples in the curricula", new_train)
        features = _features(known, runs, "train", new_train)
        simulator = with_unseen_examples(known, features)
        train_ids = np.concatenate([train_ids.astype(object), new_train.astype(object)])
    if not len(new_query):
        planned = planned_arrays(runs, train_ids, fitted["query"].values)
        return simulator.simulate(planned, key=key, draws=draws)
    known = _gaussian(simulator, "queries", new_query)
    other = for_unseen_queries(known, _features(known, runs, "query", new_query))
    old = ~np.isin(queries.astype(str), new_query.astype(str))
    parts = []
    for which, one, ids in ((old, simulator, fitted["query"].values), (~old, other, new_query)):
        if which.any():
            planned = planned_arrays(runs.isel(query=which), train_ids, ids)
            own = key if one is simulator else jax.random.fold_in(key, 1)
            parts.append((which, one.simulate(planned, key=own, draws=draws)))
    return Simulated(*(_merged(parts, place) for place in range(2)))


def _merged(parts: list[tuple[np.ndarray, Simulated]], place: int) -> np.ndarray:
    first = parts[0][1][place]
    found = np.empty((*first.shape[:-1], len(parts[0][0])), first.dtype)
    for which, one in parts:
        found[..., which] = one[place]
    return found


def _new(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    return wanted[~np.isin(wanted.astype(str), known.astype(str))]


def _gaussian(simulator: Simulator, what: str, new: np.ndarray) -> GaussianSimulator:
    if isinstance(simulator, GaussianSimulator) and simulator.fitted.features.train.shape[1]:
        return simulator
    raise Misuse(
        what,
        got=f"unknown ids {shorten(new)}",
        expected="ids of the fitted runs: this posterior has no features to tell of others by",
        do="fit Simfluence() by Exact() to runs with gradient features, or with "
        "prior=priors.Features(...)",
    )


def _features(
    simulator: GaussianSimulator, runs: xr.Dataset, axis: str, new: np.ndarray
) -> Float[np.ndarray, "new feature"]:
    name, width = f"{axis}_feature", simulator.fitted.features.train.shape[1]
    if axis == "query" and not simulator.fitted.features.query.shape[1]:
        return np.zeros((len(new), 0))
    if name not in runs or runs[name].shape[1] != width:
        raise Misuse(
            f"runs['{name}']",
            got="nothing" if name not in runs else f"{runs[name].shape[1]} features",
            expected=f"{width} features of {shorten(new)}, made as the fitted runs' were",
            do="compute them with recording.features.gradient_features and the same key, or "
            "simulate known ids alone",
        )
    place = {str(one): at for at, one in enumerate(runs[axis].values)}
    return np.asarray(runs[name].values, float)[[place[str(one)] for one in new]]
