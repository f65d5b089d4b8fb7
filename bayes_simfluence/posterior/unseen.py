"""Runs with examples or queries that a posterior does not know, but whose features say enough.

A training example that was never trained on is one more row of features: its own effect has the
prior's spread, and what its features say of it is conditioned on as everything else is. A query
that was never recorded is one more draw from the population of queries: its prior mean follows from
its features, its weights are centred on the recorded queries' mean with the prior's spread, and the
spread of its scale is that of the recorded queries' scales.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import polygamma

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.posterior.arrays import planned_arrays
from bayes_simfluence.simulators.base import Simulated, Simulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator

DFS = (1.0, 200.0)
"""Fewest and most degrees of freedom of a scale that is only known from other queries'."""


def simulated_runs(
    simulator: Simulator, fitted: xr.Dataset, runs: xr.Dataset, *, key: jax.Array, draws: int
) -> Simulated:
    """Losses along ``runs``; examples and queries may be new if they have features.

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
        simulator = _with_unseen_examples(known, features)
        train_ids = np.concatenate([train_ids.astype(object), new_train.astype(object)])
    if not len(new_query):
        planned = planned_arrays(runs, train_ids, fitted["query"].values)
        return simulator.simulate(planned, key=key, draws=draws)
    known = _gaussian(simulator, "queries", new_query)
    other = _for_unseen_queries(known, _features(known, runs, "query", new_query))
    old = ~np.isin(queries.astype(str), new_query.astype(str))
    parts = []
    cases = ((old, simulator, fitted["query"].values), (~old, other, new_query))
    for which, own_simulator, ids in cases:
        if which.any():
            planned = planned_arrays(runs.isel(query=which), train_ids, ids)
            own = key if own_simulator is simulator else jax.random.fold_in(key, 1)
            parts.append((which, own_simulator.simulate(planned, key=own, draws=draws)))
    return Simulated(*(_merged(parts, place) for place in range(2)))


def _merged(parts: list[tuple[np.ndarray, Simulated]], place: int) -> np.ndarray:
    first = parts[0][1][place]
    merged = np.empty((*first.shape[:-1], len(parts[0][0])), first.dtype)
    for which, simulated in parts:
        merged[..., which] = simulated[place]
    return merged


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
    place = {str(identifier): at for at, identifier in enumerate(runs[axis].values)}
    return np.asarray(runs[name].values, float)[[place[str(identifier)] for identifier in new]]


def _with_unseen_examples(
    simulator: GaussianSimulator, train: Float[np.ndarray, "new feature"]
) -> GaussianSimulator:
    """The same posterior with further training examples after the fitted ones."""
    features = simulator.fitted.features
    with double_precision():
        rows = jnp.concatenate([features.train, jnp.asarray(train, float)])
    longer = ExampleFeatures(rows, features.query)
    return replace(simulator, fitted=simulator.fitted._replace(features=longer))


def _for_unseen_queries(
    simulator: GaussianSimulator, query: Float[np.ndarray, "new feature"]
) -> GaussianSimulator:
    """The posterior of queries that were never recorded, in the order of their features."""
    variance = np.log(np.maximum(simulator.scale, np.finfo(float).tiny) ** 2)
    with double_precision():
        features = simulator.fitted.features._replace(query=jnp.asarray(query, float))
    return replace(
        simulator,
        unseen=features,
        scale=np.full(len(query), np.exp(0.5 * variance.mean())),
        df=_df(float(variance.var(ddof=1)) if len(variance) > 1 else np.inf),
    )


def _df(variance: float) -> float:
    """Degrees of freedom of a scaled inverse chi-square whose logarithm has this variance."""
    fewest, most = DFS
    if variance >= polygamma(1, 0.5 * fewest):
        return fewest
    if variance <= polygamma(1, 0.5 * most):
        return most
    df: float = brentq(lambda df: polygamma(1, 0.5 * df) - variance, fewest, most)
    return df
