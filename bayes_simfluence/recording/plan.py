"""When a recording does what: stretches of steps, times to measure at, runs that train together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index

import numpy as np
from jaxtyping import Bool

from bayes_simfluence.checks import Misuse, at_most
from bayes_simfluence.recording.checkpoints import checkpoint_steps
from bayes_simfluence.recording.settings import Choice, Evaluation

STRETCH = 16
"""Most steps in one call of the compiled steps: progress is reported between calls."""


@dataclass(frozen=True)
class Plan:
    """The times of a recording at which something is done.

    Attributes:
        steps: steps of a run.
        evaluation: what is measured and saved, and how often.
    """

    steps: int
    evaluation: Evaluation = field(default_factory=Evaluation)

    def validate(self) -> "Plan":
        """The plan itself when it is possible.

        Raises:
            Misuse: the first number that is not.
        """
        checkpoints = self.evaluation.validate().checkpoints
        at_most("checkpoints", checkpoints, self.steps, "steps of a run", do="ask for fewer")
        return self

    @property
    def looks(self) -> Bool[np.ndarray, " step"]:
        """After which steps the queries are measured."""
        return self._every(self.evaluation.evaluate_every)

    @property
    def times(self) -> list[int]:
        """Times at which the queries' losses are recorded."""
        return [0, *(np.flatnonzero(self.looks) + 1).tolist()]

    @property
    def score_times(self) -> list[int]:
        """Times at which scores are computed."""
        gap = self.evaluation.scores_every or self.steps
        return [0, *(np.flatnonzero(self._every(gap)) + 1).tolist()]

    @property
    def saved(self) -> dict[int, int]:
        """Time -> the step that starts then and whose starting weights are saved."""
        steps = checkpoint_steps(self.steps, self.evaluation.checkpoints)
        return {step - 1: step for step in steps}

    def stretches(self, stops: Sequence[int]) -> Iterator[tuple[int, int]]:
        """First and last time of each call of the compiled steps, none across one of ``stops``.

        >>> list(Plan(steps=40).stretches([0, 20]))
        [(0, 16), (16, 20), (20, 36), (36, 40)]
        """
        ends = sorted({*stops, self.steps} - {0})
        for first, end in zip([0, *ends], ends, strict=False):
            for begin in range(first, end, self.longest):
                yield begin, min(begin + self.longest, end)

    @property
    def longest(self) -> int:
        """Steps of the longest stretch."""
        return min(STRETCH, self.steps)

    def _every(self, gap: int) -> Bool[np.ndarray, " step"]:
        after = np.arange(1, self.steps + 1)
        return (after % gap == 0) | (after == self.steps)


def units(runs: int, size: int) -> list[list[int]]:
    """Runs that train together, fixed by their number: bits do not depend on what else is recorded.

    The last unit is filled up with its last run, which counts once.

    >>> units(5, 2)
    [[0, 1], [2, 3], [4, 4]]
    """
    firsts = range(0, runs, size)
    return [[min(first + place, runs - 1) for place in range(size)] for first in firsts]


def chosen_runs(runs: Choice, total: int) -> Bool[np.ndarray, " run"]:
    """Which of ``total`` runs were asked for.

    Raises:
        Misuse: none, or one that does not exist.
    """
    chosen = np.zeros(total, bool)
    if runs is None:
        return ~chosen
    try:
        numbers = range(total)[runs] if isinstance(runs, slice) else [index(run) for run in runs]
        if min(numbers, default=-1) < 0 or max(numbers) >= total:
            raise IndexError
    except (TypeError, IndexError):
        raise Misuse(
            "only",
            got=repr(runs),
            expected=f"a slice or numbers among 0..{total - 1}, at least one",
            do="choose runs that the curricula have",
        ) from None
    chosen[list(numbers)] = True
    return chosen
