"""Runs with examples or queries that a posterior does not know, but whose features say enough.

A training example that was never trained on is one more row of features: its own effect has the
prior's spread, and what its features say of it is conditioned on as everything else is. A query
that was never recorded is one more draw from the population of queries: its prior mean follows from
its features, its weights are centred on what the recorded queries' say by theirs
(``gaussian.queries.carried_weights``) with the prior's spread, and the spread of its scale is that
of the recorded queries' scales.
"""

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.posterior.arrays import planned_arrays
from bayes_simfluence.posterior.observed import with_observed
from bayes_simfluence.simulators.base import FeatureSimulator, Simulated, Simulator


def simulated_runs(
    simulator: Simulator,
    fitted: xr.Dataset,
    runs: xr.Dataset,
    *,
    key: jax.Array,
    draws: int,
    observed: Float[np.ndarray, "run time query"] | None = None,
) -> Simulated:
    """Losses along ``runs``; examples and queries may be new if they have features.

    With ``observed``, given these losses (NaN where none was).

    Raises:
        Misuse: ids that are not among the fitted ones and have no features to go by; new queries
            beside ``observed``.
    """
    batch = runs["batch"].values
    used = runs["train"].values[np.unique(batch[batch >= 0])]
    new_train = _new(used, fitted["train"].values)
    queries = runs["query"].values
    new_query = _new(queries, fitted["query"].values)
    train_ids = fitted["train"].values
    if len(new_train):
        known = _by_features(simulator, "examples in the curricula", new_train)
        simulator = known.with_examples(_features(known, runs, "train", new_train))
        train_ids = np.concatenate([train_ids.astype(object), new_train.astype(object)])
    if not len(new_query):
        planned = planned_arrays(runs, train_ids, fitted["query"].values)
        if observed is None or not np.isfinite(observed[:, 1:]).any():
            return simulator.simulate(planned, key=key, draws=draws)
        planned.loss[:, 1:] = observed[:, 1:]
        return with_observed(simulator).simulate_observed(planned, key=key, draws=draws)
    if observed is not None:
        raise Misuse(
            "queries to simulate with observed=...",
            got=f"queries that were never recorded, {shorten(new_query)}",
            expected="queries of the fitted runs",
            do="leave these queries out with runs.sel(query=...)",
        )
    known = _by_features(simulator, "queries", new_query)
    other = known.for_queries(_features(known, runs, "query", new_query))
    old = ~np.isin(queries.astype(str), new_query.astype(str))
    parts = []
    cases = ((old, simulator, fitted["query"].values), (~old, other, new_query))
    for which, own_simulator, ids in cases:
        if which.any():
            planned = planned_arrays(runs.isel(query=which), train_ids, ids)
            parts.append((which, own_simulator.simulate(planned, key=key, draws=draws)))
    return Simulated(*(_merged(parts, place) for place in range(2)))


def _merged(parts: list[tuple[np.ndarray, Simulated]], place: int) -> np.ndarray:
    first = parts[0][1][place]
    merged = np.empty((*first.shape[:-1], len(parts[0][0])), first.dtype)
    for which, simulated in parts:
        merged[..., which] = simulated[place]
    return merged


def _new(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    return wanted[~np.isin(wanted.astype(str), known.astype(str))]


def _by_features(simulator: Simulator, what: str, new: np.ndarray) -> FeatureSimulator:
    known = simulator.by_features
    if known is None:
        raise Misuse(
            what,
            got=f"unknown ids {shorten(new)}",
            expected="ids of the fitted runs: this posterior has no features to tell of others by",
            do="fit Simfluence() by Exact() to runs with gradient features, or with "
            "prior=priors.Features(...)",
        )
    return known


def _features(
    simulator: FeatureSimulator, runs: xr.Dataset, axis: str, new: np.ndarray
) -> Float[np.ndarray, "new feature"]:
    name, width = f"{axis}_feature", simulator.features.train.shape[1]
    if axis == "query" and not simulator.features.query.shape[1]:
        return np.zeros((len(new), 0))
    if name not in runs or runs[name].shape[1] != width:
        raise Misuse(
            f"runs['{name}']",
            got="nothing" if name not in runs else f"{runs[name].shape[1]} features",
            expected=f"{width} features of {shorten(new)}, made as the fitted runs' were",
            do="compute them with recording.features.gradient_features and the same key, or "
            "simulate known ids alone",
        )
    place = {str(identifier): at for at, identifier in enumerate(runs[axis].values)}
    return np.asarray(runs[name].values, float)[[place[str(identifier)] for identifier in new]]
