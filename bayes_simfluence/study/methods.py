"""The methods of a study by name: one line each.

An attribution takes a pilot run (its task and weights) and gives scores ``(train, query)``; a
simulator takes the fitted runs. To add one, add a line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import xarray as xr
from jaxtyping import PyTree

from bayes_simfluence.baselines.gradients import gradient_products, weights_at
from bayes_simfluence.baselines.scores import score_array
from bayes_simfluence.baselines.simple import mean_trajectory, persistence
from bayes_simfluence.inference.fit import fit
from bayes_simfluence.inference.posterior import Posterior
from bayes_simfluence.inference.ridge import Ridge
from bayes_simfluence.model.bayesian import Simfluence
from bayes_simfluence.progress import Progress
from bayes_simfluence.recording.checkpoints import (
    SavedWeights,
    checkpoint_steps,
    final_weights,
    open_checkpoints,
)
from bayes_simfluence.recording.task import Task

__all__ = ["ATTRIBUTIONS", "SIMULATORS", "Fitting", "Pilot"]


@dataclass(frozen=True)
class Pilot:
    """A run whose weights were saved, for methods that look into the network.

    Attributes:
        task: what was trained and measured.
        store: the recording that holds the weights.
        steps: of the run.
        key: decides projections and starting vectors.
        progress: told of long work.
    """

    task: Task
    store: Path
    steps: int
    key: jax.Array
    progress: Progress

    def checkpoints(self, count: int | None = None) -> list[SavedWeights]:
        """The saved weights, or ``count`` of them that stand for equal parts of the run."""
        saved = open_checkpoints(self.store, 0)
        if count is None or count >= len(saved):
            return saved
        if len(saved) == self.steps:
            wanted = set(checkpoint_steps(self.steps, count))
            return [one for one in saved if one.step in wanted]
        middles = (np.arange(count) + 0.5) * len(saved) / count
        return [saved[int(place)] for place in middles]

    def final(self) -> PyTree:
        """The trained parameters after the last step."""
        tensors = final_weights(self.store, 0)
        return weights_at(self.task, SavedWeights(self.steps, float("nan"), tensors))


@dataclass(frozen=True)
class Fitting:
    """What a simulator may be fitted to.

    Attributes:
        runs: the fitted runs.
        validation: further ones that choose settings, or None.
        key: decides whatever a method draws.
        progress: told of long work.
    """

    runs: xr.Dataset
    validation: xr.Dataset | None
    key: jax.Array
    progress: Progress


def _grad_dot(pilot: Pilot) -> xr.DataArray:
    found = gradient_products(pilot.task, pilot.final())
    return _scores(pilot, -found.products, "Grad-Dot", "nat")


def _grad_cos(pilot: Pilot) -> xr.DataArray:
    found = gradient_products(pilot.task, pilot.final())
    norms = np.sqrt(np.outer(found.train, found.query))
    cosine = np.divide(found.products, norms, out=np.zeros_like(norms), where=norms > 0)
    return _scores(pilot, -cosine, "Grad-Cos", "1")


def _scores(pilot: Pilot, values: np.ndarray, method: str, units: str) -> xr.DataArray:
    train, query = list(pilot.task.train_ids), list(pilot.task.query_ids)
    return score_array(values, train, query, method=method, units=units, weights="final")


def _ridge(kind: Literal["linear", "additive", "multiplicative"], some: Fitting) -> Posterior:
    return fit(
        some.runs,
        model=Simfluence(kind=kind),
        method=Ridge(band=True),
        validation=some.validation,
        key=some.key,
        progress=some.progress,
    )


ATTRIBUTIONS: Mapping[str, Callable[[Pilot], xr.DataArray]] = {
    "grad-dot": _grad_dot,
    "grad-cos": _grad_cos,
}
"""Name -> scores of a pilot run; negative = lowers the query's loss."""

SIMULATORS: Mapping[str, Callable[[Fitting], Any]] = {
    "persistence": lambda some: persistence(some.runs),
    "mean-trajectory": lambda some: mean_trajectory(some.runs),
    "ridge-linear": lambda some: _ridge("linear", some),
    "ridge-additive": lambda some: _ridge("additive", some),
    "ridge-multiplicative": lambda some: _ridge("multiplicative", some),
    "bayes": lambda some: fit(some.runs, key=some.key, progress=some.progress),
}
"""Name -> a simulator of fitted runs."""
