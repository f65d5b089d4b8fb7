"""Recorded runs as the arrays that fits work on."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.checks import named
from bayes_simfluence.model.priors import ExampleFeatures, Prior
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.simulators.base import Planned

__all__ = ["Recorded", "features_of", "planned_from", "recorded_from"]


class Recorded(NamedTuple):
    """Usable runs of one recording.

    Attributes:
        batch: indices into ``train``, -1 = empty slot.
        loss: nats, time 0 first; NaN where not recorded, never at time 0.
        step_size: learning rates; None when not recorded.
        train_feature, query_feature: gradient features; None when not recorded.
        train: number of training examples, seen or not.
    """

    batch: Int[np.ndarray, "run step slot"]
    loss: Float[np.ndarray, "run time query"]
    step_size: Float[np.ndarray, "run step"] | None
    train_feature: Float[np.ndarray, "train feature"] | None
    query_feature: Float[np.ndarray, "query feature"] | None
    train: int

    @property
    def known(self) -> Bool[np.ndarray, "run step query"]:
        """Whether the loss after each step was recorded."""
        return np.isfinite(self.loss[:, 1:])

    def take(self, runs: Int[np.ndarray, " chosen"]) -> "Recorded":
        """Some of the runs."""
        sizes = None if self.step_size is None else self.step_size[runs]
        return self._replace(batch=self.batch[runs], loss=self.loss[runs], step_size=sizes)

    def relative_step_size(self) -> tuple[Float[np.ndarray, "run step"], float | None]:
        """Step sizes in units of the largest one, and that; ones and None where there are none."""
        largest = None if self.step_size is None else float(np.max(self.step_size)) or None
        if self.step_size is None or largest is None:
            return np.ones(self.batch.shape[:2]), None
        return self.step_size / largest, largest

    def plan(self) -> Planned:
        """The same runs, to be simulated."""
        queries = np.arange(self.loss.shape[2])
        return Planned(self.batch, self.step_size, self.loss[:, 0], queries)


def recorded_from(runs: xr.Dataset, prior: Prior | None = None) -> Recorded:
    """The arrays of valid, usable runs; with the embeddings of a prior that brings its own."""

    def optional(name: str) -> np.ndarray | None:
        return np.asarray(runs[name].values, float) if name in runs else None

    recorded = Recorded(
        batch=runs["batch"].values,
        loss=np.asarray(runs["loss"].values, float),
        step_size=optional("step_size"),
        train_feature=optional("train_feature"),
        query_feature=optional("query_feature"),
        train=runs.sizes["train"],
    )
    own = None if prior is None else prior.resolve(runs["train"].values, runs["query"].values)
    if own is None:
        return recorded
    return recorded._replace(
        train_feature=np.asarray(own.train), query_feature=np.asarray(own.query)
    )


def features_of(runs: Recorded, model: Simfluence) -> ExampleFeatures:
    """The features that a model's prior uses; without columns when it uses none."""
    train, query = runs.train_feature, runs.query_feature
    if train is None or not model.prior.features:
        train = np.zeros((runs.train, 0))
    if query is None or not train.shape[1]:
        query = np.zeros((runs.loss.shape[2], 0))
    return ExampleFeatures(jnp.asarray(train), jnp.asarray(query))


def planned_from(runs: xr.Dataset, train: np.ndarray, query: np.ndarray) -> Planned:
    """Runs to be simulated, in the positions of the fitted ``train`` and ``query`` ids."""
    batch = runs["batch"].values
    used = np.unique(batch[batch >= 0])
    place = np.full(runs.sizes["train"] + 1, -1, np.int32)
    place[used] = named("examples in the curricula", runs["train"].values[used], train)
    return Planned(
        batch=place[batch],
        step_size=np.asarray(runs["step_size"].values, float) if "step_size" in runs else None,
        initial=np.asarray(runs["loss"].values[:, 0], float),
        query=np.asarray(named("queries", runs["query"].values, query)),
    )
