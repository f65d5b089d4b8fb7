"""Support: how far a simulated run is from anything that was recorded, and what makes it so."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter, warn

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, SupportWarning
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.posterior.arrays import (
    fitted_queries,
    positions_with_new,
    recorded_arrays,
)
from bayes_simfluence.posterior.courses import (
    Course,
    Directions,
    course_of,
    directions_of,
    features_of,
)
from bayes_simfluence.posterior.departures import Departure, departures, other_start

ENOUGH = 0.5
"""Below this a run has left what was recorded."""

MEANING = (
    "1 = all of the run so far is like what the fitted runs did; it falls to 0 the farther the run "
    "has been from it, 1 / (1 + largest distance so far), and never rises again. Below "
    f"{ENOUGH} bands, which widen with the distance, may be too narrow. It looks at step size, "
    "batch size, length, class balance over windows (by gradient features; without them only where "
    "examples are few), repetition, unseen examples and initial losses, at no later ones. "
    "0 = no run was recorded."
)


@dataclass(frozen=True)
class Support:
    """Of simulated runs.

    Attributes:
        value: in (0, 1], never rising with time; 1 before the first update; 0 after it where no run
            was recorded.
        reasons: of each run that has left what was recorded, the names of what makes it so, the
            farthest first; none for the others.
        sentence: the same for all runs in words; empty when none has left.
    """

    value: Float[np.ndarray, "run time"]
    reasons: list[list[str]]
    sentence: str

    @property
    def distance(self) -> Float[np.ndarray, "run time"]:
        """The largest one so far: 0 = as recorded, 1 = has clearly left it."""
        with np.errstate(divide="ignore"):
            return 1.0 / self.value - 1.0

    def variable(self) -> tuple[tuple[str, str], np.ndarray, dict[str, Any]]:
        """Dimensions, values and attributes: the meaning, and the reasons of each run in order."""
        attrs = {
            "long_name": "support of the simulation by the fitted runs",
            "units": "1",
            "meaning": MEANING,
            "enough": ENOUGH,
            "reasons": json.dumps(self.reasons),
            "sentence": self.sentence,
        }
        return ("run", "time"), self.value, attrs


@dataclass(frozen=True)
class Recorded:
    """What the fitted runs did, made once for each posterior."""

    arrays: RunArrays
    directions: Directions
    course: Course

    @classmethod
    def of(cls, runs: xr.Dataset) -> "Recorded":
        """Of fitted runs."""
        arrays = recorded_arrays(runs)
        directions = directions_of(arrays)
        return cls(arrays, directions, course_of(arrays, directions, features_of(arrays)))


def support_of(recorded: Recorded | None, fitted: xr.Dataset, runs: xr.Dataset) -> Support:
    """How far planned runs are from the fitted ones; examples may be new.

    Where no run was fitted, ``recorded`` is None, and all runs are as far as can be.

    >>> import bayes_simfluence as bs
    >>> runs = bs.example_runs()
    >>> fitted, other = runs.isel(run=slice(0, 16)), runs.isel(run=[16])
    >>> recorded = Recorded.of(fitted)
    >>> support_of(recorded, fitted, other).value.min().round(1).item()
    1.0
    >>> far = support_of(recorded, fitted, other.assign(step_size=10 * other["step_size"]))
    >>> far.reasons, far.value[0, -1].round(2).item()
    ([['step size']], 0.09)
    """
    if recorded is None:
        return _of_nothing(runs)
    planned, new = positions_with_new(runs, fitted["train"].values)
    known = features_of(recorded.arrays)
    own = np.zeros((len(new), known.shape[1]))
    # Without comparable features, a new example says nothing of balance.
    own[:] = recorded.directions.centre
    width = recorded.arrays.features.train.shape[1]
    if width and "train_feature" in runs and runs["train_feature"].shape[1] == width:
        own = np.asarray(runs["train_feature"].values, float)[new]
    course = course_of(planned, recorded.directions, np.concatenate([known, own]))
    found = departures(recorded.course, course)
    return _support([*found, *_starts(fitted, runs, course.steps)])


def _starts(fitted: xr.Dataset, runs: xr.Dataset, steps: int) -> list[Departure]:
    """How far initial losses are from the fitted runs', by queries that both have."""
    own = fitted_queries(fitted, runs)
    loss = np.asarray(fitted["loss"].values[:, :, own[own >= 0]], float)
    if not loss.size:
        return []
    initial = np.asarray(runs["loss"].values[:, 0, own >= 0], float)
    moved = np.sqrt(np.nanmean(np.square(loss - loss[:, :1]), axis=(0, 1)))
    return [other_start(loss[:, 0], moved, initial, steps)]


def _of_nothing(runs: xr.Dataset) -> Support:
    value = np.zeros((runs.sizes["run"], runs.sizes["time"]))
    value[:, 0] = 1.0
    sentence = "no run was recorded: everything is the prior"
    return Support(value, [["no recorded run"]] * len(value), sentence)


def _support(found: list[Departure]) -> Support:
    distance = np.stack([one.distance for one in found])
    so_far = np.maximum.accumulate(distance.max(axis=0), axis=1)
    value = np.pad(1 / (1 + so_far), ((0, 0), (1, 0)), constant_values=1.0)
    farthest = distance.max(axis=2)
    left = 1 / (1 + farthest) < ENOUGH
    reasons = [
        [found[at].name for at in np.argsort(-farthest[:, run], kind="stable") if left[at, run]]
        for run in range(len(value))
    ]
    words = [one.words for one, run in zip(found, left, strict=True) if run.any()]
    return Support(value, reasons, _sentence(int(left.any(axis=0).sum()), len(value), words))


def _sentence(left: int, runs: int, words: list[str]) -> str:
    if not left:
        return ""
    who = "the run leaves" if runs == 1 else f"{left} of {runs} runs leave"
    return f"{who} what was recorded ({'; '.join(words)}): bands may be too narrow there"


def tell(support: Support, *, stacklevel: int) -> None:
    """Warn where a run leaves what was recorded; ``stacklevel`` as seen by the caller."""
    if support.sentence:
        warn(
            f"{support.sentence}. See support in the result; strict=True refuses.",
            SupportWarning,
            stacklevel=stacklevel + 1,
        )


@contextmanager
def told_elsewhere() -> Iterator[None]:
    """No warning of runs that leave what was recorded: the caller says it, or said it."""
    with catch_warnings():
        simplefilter("ignore", SupportWarning)
        yield


def refuse(support: Support) -> None:
    """Raise where a run leaves what was recorded."""
    if support.sentence:
        raise Misuse(
            "runs to simulate with strict=True",
            got=support.sentence.split(": bands")[0],
            expected=f"curricula like those of the fitted runs (support of at least {ENOUGH})",
            do="record such runs and fit again, or pass strict=False and read support",
        )
