"""The methods of a study by name: one line each.

An attribution takes a pilot run (its task and weights) and returns scores ``(train, query)``; a
simulator takes the fitted runs. To add a method, add a line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import xarray as xr
from jaxtyping import PyTree

from bayes_simfluence.attribution.adam import AdamDiagonal
from bayes_simfluence.attribution.gradients.checkpoints import weights_at
from bayes_simfluence.attribution.influence.gram import Gram, gram_of
from bayes_simfluence.attribution.influence.influence_functions import (
    EKFAC,
    Arnoldi,
    ConjugateGradient,
    InGram,
    LiSSA,
    influence,
)
from bayes_simfluence.attribution.influence.problem import SHARE_OF_MEAN, Solver
from bayes_simfluence.attribution.simple import mean_trajectory, persistence
from bayes_simfluence.attribution.tracin import grad_cos, grad_dot, tracin
from bayes_simfluence.attribution.trak import trak
from bayes_simfluence.checks import Misuse
from bayes_simfluence.inference.ridge import Ridge
from bayes_simfluence.model.simfluence import KINDS
from bayes_simfluence.posterior.fit import fit
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.progress import Progress
from bayes_simfluence.recording.checkpoints import (
    SavedWeights,
    checkpoint_steps,
    final_weights,
    open_checkpoints,
)
from bayes_simfluence.tasks.task import Task

BAYES = "bayes"
"""The reference that all others are compared with."""

MEMORY = 4 * 2**30
"""Bytes of gradients held at once where that saves passes through the network."""


@dataclass(frozen=True)
class Pilot:
    """A run whose weights were saved, for methods that need gradients of the network.

    Attributes:
        task: the task that was trained and evaluated.
        store: the recording that holds the weights.
        steps: of the run.
        batch_size: examples in a step of it.
        key: decides projections and starting vectors.
        progress: told of long work.
    """

    task: Task
    store: Path
    steps: int
    batch_size: int
    key: jax.Array
    progress: Progress

    def checkpoints(self, count: int | None = None) -> list[SavedWeights]:
        """The saved weights, or ``count`` of them that represent equal parts of the run."""
        saved = open_checkpoints(self.store, 0)
        if count is None or count >= len(saved):
            return saved
        if len(saved) == self.steps:
            wanted = set(checkpoint_steps(self.steps, count))
            return [weights for weights in saved if weights.step in wanted]
        middles = (np.arange(count) + 0.5) * len(saved) / count
        return [saved[int(place)] for place in middles]

    def final(self) -> PyTree:
        """The trained parameters after the last step."""
        tensors = final_weights(self.store, 0)
        return weights_at(self.task, SavedWeights(self.steps, float("nan"), tensors))

    @cached_property
    def gram(self) -> Gram:
        """Of the gradients at the end; the first solver that needs it computes it."""
        return gram_of(self.task, self.final(), memory=MEMORY, progress=self.progress)


@dataclass(frozen=True)
class Fitting:
    """What a simulator is fitted to.

    Attributes:
        runs: the fitted runs.
        validation: further runs on which settings are chosen, or None.
        key: decides all random numbers of a method.
        progress: told of long work.
    """

    runs: xr.Dataset
    validation: xr.Dataset | None
    key: jax.Array
    progress: Progress


def _tracin_all(pilot: Pilot) -> xr.DataArray:
    saved = pilot.checkpoints()
    if len(saved) < pilot.steps:
        raise Misuse(
            "tracin-all",
            got=f"{len(saved)} checkpoints",
            expected=f"the weights of all {pilot.steps} steps",
            do="set checkpoints: all, or leave this method out",
        )
    return tracin(pilot.task, saved, progress=pilot.progress)


def _in_gram(solver: Solver | None, pilot: Pilot) -> xr.DataArray:
    return _influence(InGram(solver, pilot.gram), pilot)


def _influence(solver: Solver, pilot: Pilot, damping: float | None = None) -> xr.DataArray:
    return influence(
        pilot.task,
        pilot.final(),
        solver=solver,
        damping=damping,
        key=pilot.key,
        progress=pilot.progress,
    )


def _ridge(kind: Literal["linear", "additive", "multiplicative"], fitting: Fitting) -> Posterior:
    return fit(
        fitting.runs,
        model=KINDS[kind](),
        method=Ridge(band=True),
        validation=fitting.validation,
        key=fitting.key,
        progress=fitting.progress,
    )


ATTRIBUTIONS: Mapping[str, Callable[[Pilot], xr.DataArray]] = {
    "grad-dot": lambda pilot: grad_dot(pilot.task, pilot.final(), progress=pilot.progress),
    "grad-cos": lambda pilot: grad_cos(pilot.task, pilot.final(), progress=pilot.progress),
    "tracin-10": lambda pilot: tracin(pilot.task, pilot.checkpoints(10), progress=pilot.progress),
    "tracin-10-adam": lambda pilot: tracin(
        pilot.task,
        pilot.checkpoints(10),
        preconditioner=AdamDiagonal(batch_size=pilot.batch_size),
        progress=pilot.progress,
    ),
    "tracin-all": _tracin_all,
    "trak": lambda pilot: trak(
        pilot.task, pilot.checkpoints(10), key=pilot.key, progress=pilot.progress
    ),
    "influence-exact": partial(_in_gram, None),
    # Exact, with .1 of the mean eigenvalue in Gram coordinates: far more than over all weights.
    "influence-damped": lambda pilot: _influence(
        InGram(gram=pilot.gram), pilot, SHARE_OF_MEAN * pilot.gram.mean_within
    ),
    "influence-cg": partial(_in_gram, ConjugateGradient()),
    # The smallest scale that is sure to converge with batches of single examples.
    "influence-lissa": lambda pilot: _in_gram(LiSSA(scale=pilot.gram.largest), pilot),
    "influence-arnoldi": partial(_in_gram, Arnoldi()),
    "influence-ekfac": partial(_influence, EKFAC()),
}
"""Name -> scores of a pilot run; negative = lowers the query's loss."""

SIMULATORS: Mapping[str, Callable[[Fitting], Any]] = {
    "persistence": lambda fitting: persistence(fitting.runs),
    "mean-trajectory": lambda fitting: mean_trajectory(fitting.runs),
    "ridge-linear": lambda fitting: _ridge("linear", fitting),
    "ridge-additive": lambda fitting: _ridge("additive", fitting),
    "ridge-multiplicative": lambda fitting: _ridge("multiplicative", fitting),
    BAYES: lambda fitting: fit(fitting.runs, key=fitting.key, progress=fitting.progress),
}
"""Name -> a simulator fitted to runs."""
