"""Courses of runs: what the curricula did, step by step, in the terms that tell runs apart.

A course knows nothing of losses. It says how large batches and steps were, how often examples had
been used, and where the batches lie in a few directions of the examples' features, which tell
classes apart (or, without features, in the examples themselves where there are only a few).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.model.arrays import RunArrays

DIRECTIONS = 8
"""Most directions of the features that are looked at."""
FEW_EXAMPLES = 32
"""Most examples that are directions of their own where there are no features."""
FARTHEST = 3.0
"""A coordinate of an example stops here, in standard deviations: one odd example is no class."""


class Course(NamedTuple):
    """Of each run, after each of its steps.

    Attributes:
        filled: slots of the step's batch that hold an example with weight.
        step_size: learning rate of the step; None when not recorded.
        unknown: exposure of the step's batch on examples that no fitted run trained on.
        repeated: how much an example had been used so far, in exposures, averaged over all
            exposures: the sum of squares of the examples' summed exposures over their sum.
        most: summed exposure of the example used most so far.
        place: mean coordinates of the step's batch, 0 = the mean of the fitted runs' examples.
    """

    filled: Int[np.ndarray, "run step"]
    step_size: Float[np.ndarray, "run step"] | None
    unknown: Float[np.ndarray, "run step"]
    repeated: Float[np.ndarray, "run step"]
    most: Float[np.ndarray, "run step"]
    place: Float[np.ndarray, "run step direction"]

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return self.filled.shape[1]


class Directions(NamedTuple):
    """A linear map from features of examples to coordinates with unit spread.

    Attributes:
        centre: mean features of the examples that fitted runs trained on.
        axes: of unit variance over those examples; without columns when nothing is known of them.
        seen: whether a fitted run trained on the example.
    """

    centre: Float[np.ndarray, " feature"]
    axes: Float[np.ndarray, "feature direction"]
    seen: Bool[np.ndarray, " train"]

    def coordinates(
        self, features: Float[np.ndarray, "example feature"]
    ) -> Float[np.ndarray, "example direction"]:
        """Of examples, in standard deviations of the fitted runs' examples."""
        return np.clip((features - self.centre) @ self.axes, -FARTHEST, FARTHEST)


def directions_of(fitted: RunArrays) -> Directions:
    """The leading directions in which the examples of fitted runs differ.

    Without features, a few examples are told apart by themselves, many not at all.
    """
    used = fitted.batch[(fitted.batch != EMPTY_SLOT) & (fitted.weight > 0)]
    seen = np.isin(np.arange(fitted.train), used)
    rows = features_of(fitted)[seen]
    if not rows.shape[1] or len(rows) < 2:
        return Directions(np.zeros(rows.shape[1]), np.zeros((rows.shape[1], 0)), seen)
    centre = rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(rows - centre, full_matrices=False)
    kept = slice(0, min(DIRECTIONS, int((sizes > 1e-6 * max(sizes[0], 1e-300)).sum())))
    spread = sizes[kept] / np.sqrt(len(rows))
    return Directions(centre, axes[kept].T / spread, seen)


def features_of(runs: RunArrays) -> Float[np.ndarray, "train feature"]:
    """Gradient features, or what stands for them where there are none."""
    features = np.asarray(runs.features.train, float)
    if not features.shape[1] and runs.train <= FEW_EXAMPLES:
        return np.eye(runs.train)
    return features


def course_of(
    runs: RunArrays, directions: Directions, features: Float[np.ndarray, "train feature"]
) -> Course:
    """The course of runs whose examples are positions in ``features`` (the fitted ones first)."""
    seen = np.zeros(len(features), bool)
    seen[: len(directions.seen)] = directions.seen
    coordinates = directions.coordinates(features)
    # One run after the other: all slots of all runs at once would fill the memory.
    each = [
        _of_one(batch, np.asarray(weight, float), coordinates, seen)
        for batch, weight in zip(runs.batch, runs.weight, strict=True)
    ]
    filled, unknown, repeated, most, place = map(np.stack, zip(*each, strict=True))
    step_size = None if runs.step_size is None else np.asarray(runs.step_size, float)
    return Course(filled, step_size, unknown, repeated, most, place)


def _of_one(
    batch: Int[np.ndarray, "step slot"],
    weight: Float[np.ndarray, "step slot"],
    coordinates: Float[np.ndarray, "train direction"],
    seen: Bool[np.ndarray, " train"],
) -> tuple[np.ndarray, ...]:
    """``filled``, ``unknown``, ``repeated``, ``most`` and ``place`` of one run."""
    # An empty slot's index -1 is the last row, where its weight of zero changes nothing.
    weight = np.where(batch != EMPTY_SLOT, weight, 0.0)
    total = weight.sum(axis=1, keepdims=True)
    share = weight / np.where(total > 0, total, 1.0)
    unknown = np.where(seen[batch], 0.0, share).sum(axis=1)
    place = np.einsum("ts,tsd->td", share, coordinates[batch])
    return (weight > 0).sum(axis=1), unknown, *_used(batch, share), place


def _used(
    batch: Int[np.ndarray, "step slot"], share: Float[np.ndarray, "step slot"]
) -> tuple[Float[np.ndarray, " step"], Float[np.ndarray, " step"]]:
    """``repeated`` and ``most`` of one run, from each example's uses in turn.

    A use of exposure e that takes an example's sum from c - e to c adds e (2 c - e) to the squares.
    """
    order = np.argsort(batch, axis=None, kind="stable")
    exposure, example = share.ravel()[order], batch.ravel()[order]
    first = np.flatnonzero(np.r_[True, example[1:] != example[:-1]])
    running = np.cumsum(exposure)
    others = np.repeat((running - exposure)[first], np.diff(np.r_[first, len(example)]))
    summed = np.empty(len(example))
    summed[order] = running - others
    summed = np.where(share > 0, summed.reshape(share.shape), 0.0)
    squares = (share * (2 * summed - share)).sum(axis=1).cumsum()
    total = share.sum(axis=1).cumsum()
    repeated = np.divide(squares, total, out=np.zeros(len(share)), where=total > 0)
    return repeated, np.maximum.accumulate(summed.max(axis=1, initial=0.0))
