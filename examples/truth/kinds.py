"""Kinds of counterfactuals: what becomes of a run's curriculum when it is edited or rearranged."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayes_simfluence.counterfactual.edits import drop, reverse

Batches = np.ndarray
"""``(step, slot)``, positions of training examples, -1 = empty."""


@dataclass(frozen=True)
class Source:
    """What a counterfactual is made of.

    Attributes:
        batches: of the unedited run.
        side: the class that this run's edit is about.
        labels: of all training examples.
        new: examples that no fitted run trains on.
        rng: decides what is drawn.
    """

    batches: Batches
    side: int
    labels: np.ndarray
    new: np.ndarray
    rng: np.random.Generator

    @property
    def members(self) -> np.ndarray:
        """The examples that the run trains on."""
        return np.unique(self.batches)

    def epochs(self, members: np.ndarray, steps: int | None = None) -> Batches:
        """Shuffled epochs of some examples in as many steps as the run has, or others."""
        steps, slots = steps or len(self.batches), self.batches.shape[1]
        passes = -(-steps * slots // len(members))
        order = np.concatenate([self.rng.permutation(members) for _ in range(passes)])
        return order[: steps * slots].reshape(steps, slots)

    def some(self, members: np.ndarray, count: int) -> np.ndarray:
        """As many of some examples, drawn; of few no more than half."""
        return self.rng.choice(members, max(min(count, len(members) // 2), 1), replace=False)

    def without(self, members: np.ndarray) -> Batches:
        """The run with the slots of some examples empty."""
        return drop(self.batches, None, members)[0]


def dropped(count: int) -> Callable[[Source], Batches]:
    """Without ``count`` of the run's examples."""
    return lambda run: run.without(run.some(run.members, count))


def one_class_halved(run: Source) -> Batches:
    """Without half of the examples of one class."""
    of_class = run.members[run.labels[run.members] == run.side]
    return run.without(run.some(of_class, len(of_class) // 2))


def sorted_by_class(run: Source) -> Batches:
    """All of one class first, then the other; within each in the run's order."""
    flat = run.batches.reshape(-1)
    return flat[np.argsort(run.labels[flat] != run.side, kind="stable")].reshape(run.batches.shape)


def one_class(run: Source) -> Batches:
    """The run's examples of one class alone, more often."""
    return run.epochs(run.members[run.labels[run.members] == run.side])


def with_new_examples(run: Source) -> Batches:
    """Examples that no fitted run trains on in the places of as many of the run's own."""
    place = np.arange(len(run.labels))
    place[run.some(run.members, len(run.new))] = run.new
    return place[run.batches]


def half_batches(run: Source) -> Batches:
    """The first half of each step's slots."""
    return np.where(np.arange(run.batches.shape[1]) < run.batches.shape[1] // 2, run.batches, -1)


def longer(run: Source) -> Batches:
    """Half as many steps again."""
    return np.concatenate([run.batches, run.epochs(run.members, len(run.batches) // 2)])


@dataclass(frozen=True)
class Kind:
    """A kind of counterfactual.

    Attributes:
        trained: what was trained, in words.
        make: its batches.
        step_size: factor on the highest step size.
        length: factor on the number of steps.
    """

    trained: str
    make: Callable[[Source], Batches]
    step_size: float = 1.0
    length: float = 1.0


LIKE = "like the random runs"
NEW_QUERIES = "new queries"
KINDS = {
    LIKE: Kind("random subsets in shuffled epochs, not edited", lambda run: run.batches),
    "one dropped": Kind("one of its examples left out, its slots empty", dropped(1)),
    "ten dropped": Kind("ten of its examples left out", dropped(10)),
    "thirty dropped": Kind("thirty of its examples left out", dropped(30)),
    "one class halved": Kind("half of one class left out", one_class_halved),
    "reversed": Kind("the last step first", lambda run: reverse(run.batches, None)[0]),
    "sorted by class": Kind("all of one class first, all epochs at once", sorted_by_class),
    "one class only": Kind("its examples of one class alone, in more epochs", one_class),
    "half subset": Kind(
        "half of its examples, twice the epochs",
        lambda run: run.epochs(run.some(run.members, len(run.members) // 2)),
    ),
    "sixteen repeated": Kind(
        "sixteen of its examples, as many epochs as fill the steps",
        lambda run: run.epochs(run.some(run.members, 16)),
    ),
    "new examples": Kind(
        "examples that no fitted run trained on in the places of as many", with_new_examples
    ),
    NEW_QUERIES: Kind("the first kind again, queries that no fit knew", lambda run: run.batches),
    "half batches": Kind("the first half of each step's examples, as many steps", half_batches),
    "1.5 x steps": Kind(
        "half as many steps again, over which the step size decays", longer, length=1.5
    ),
    "3 x step size": Kind("three times the step size", lambda run: run.batches, step_size=3.0),
    "1/3 step size": Kind("a third of the step size", lambda run: run.batches, step_size=1 / 3),
}
