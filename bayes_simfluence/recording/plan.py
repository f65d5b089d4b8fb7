"""What a recording does when: stretches of steps, times to look at, runs that train together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
from jaxtyping import Bool, Int

from bayes_simfluence.checks import Misuse, count_of, positive_integer
from bayes_simfluence.recording.checkpoints import checkpoint_steps

__all__ = ["Choice", "Plan", "chosen_runs", "units"]

Choice = slice | Sequence[int] | Int[np.ndarray, " some"] | None
"""Runs by number, all when ``None``."""

STRETCH = 16
"""Most steps in one call of the compiled program: progress is reported between calls."""


@dataclass(frozen=True)
class Plan:
    """The times of a recording at which something is done.

    Attributes:
        steps: steps of a run.
        evaluate_every: queries are measured after every so many steps, and after the last.
        scores_every: scores are computed after every so many steps; 0 = only before the first
            step and after the last.
        checkpoints: how many weights a run saves on its way.
    """

    steps: int
    evaluate_every: int = 1
    scores_every: int = 0
    checkpoints: int = 0

    def validate(self) -> "Plan":
        """The plan itself when it is possible.

        Raises:
            Misuse: the first number that is not.
        """
        positive_integer("evaluate_every", self.evaluate_every)
        count_of("scores_every", self.scores_every)
        if count_of("checkpoints", self.checkpoints) > self.steps:
            raise Misuse(
                "checkpoints",
                got=self.checkpoints,
                expected=f"at most the {self.steps} steps of a run",
                do="ask for fewer",
            )
        return self

    @property
    def looks(self) -> Bool[np.ndarray, " step"]:
        """After which steps the queries are measured."""
        return self._every(self.evaluate_every)

    @property
    def times(self) -> list[int]:
        """Times at which the queries' losses are recorded."""
        return [0, *(np.flatnonzero(self.looks) + 1).tolist()]

    @property
    def score_times(self) -> list[int]:
        """Times at which scores are computed."""
        return [0, *(np.flatnonzero(self._every(self.scores_every or self.steps)) + 1).tolist()]

    @property
    def saved(self) -> dict[int, int]:
        """Time -> the step that starts then and whose starting weights are saved."""
        return {step - 1: step for step in checkpoint_steps(self.steps, self.checkpoints)}

    def stretches(self, stops: Sequence[int]) -> Iterator[tuple[int, int]]:
        """First and last time of each call of the program, none across one of ``stops``.

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
        numbers = range(total)[runs] if isinstance(runs, slice) else [index(one) for one in runs]
        if min(numbers, default=-1) < 0 or max(numbers) >= total:
            raise IndexError
    except (TypeError, IndexError):
        raise Misuse(
            "runs",
            got=repr(runs),
            expected=f"a slice or numbers among 0..{total - 1}, at least one",
            do="choose runs that the curricula have",
        ) from None
    chosen[list(numbers)] = True
    return chosen
