"""The fitted two-timescale model for examples and queries that no run knows.

A training example that was never trained on is one more row of features: its own effect has the
prior's spread, and what its features say of it is conditioned on as everything else is. A query
that was never recorded is one more draw from the population of queries: its prior mean follows from
its features, its weights are centred on the recorded queries' mean with the prior's spread, and the
spread of its scale is that of the recorded queries' scales.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import polygamma

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.simulators.gaussian import GaussianSimulator

__all__ = ["for_unseen_queries", "with_unseen_examples"]

DFS = (1.0, 200.0)
"""Fewest and most degrees of freedom of a scale that is only known from other queries'."""


def with_unseen_examples(
    simulator: GaussianSimulator, train: Float[np.ndarray, "new feature"]
) -> GaussianSimulator:
    """The same posterior with further training examples after the fitted ones."""
    features = simulator.fitted.features
    with double_precision():
        rows = jnp.concatenate([features.train, jnp.asarray(train, float)])
    longer = ExampleFeatures(rows, features.query)
    return replace(simulator, fitted=simulator.fitted._replace(features=longer))


def for_unseen_queries(
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
    found: float = brentq(lambda df: polygamma(1, 0.5 * df) - variance, fewest, most)
    return found
