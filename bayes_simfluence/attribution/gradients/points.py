"""The points at which gradients are taken, and what is wrong with them, said by name."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, PyTree

from bayes_simfluence.attribution.gradients.gradients import weights_at
from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.recording.checkpoints import SavedWeights
from bayes_simfluence.tasks.task import Task

__all__ = ["check_checkpoints", "check_finite", "points_of", "step_sizes_of"]


def check_checkpoints(task: Task, checkpoints: Sequence[SavedWeights]) -> None:
    """Raise unless there are checkpoints, all of this task.

    Raises:
        Misuse: there are none, or tensors of another task.
    """
    if not checkpoints:
        raise Misuse(
            "checkpoints",
            got="none",
            expected="weights that were saved on the way of a run",
            do="record(..., evaluation=Evaluation(checkpoints=10)) saves them, "
            "open_checkpoints(store, run) reads them",
        )
    for saved in checkpoints:
        weights_at(task, saved)


def step_sizes_of(checkpoints: Sequence[SavedWeights]) -> list[float]:
    """The checkpoints' step sizes.

    Raises:
        Misuse: one that was not recorded, or is no finite number of at least 0.
    """
    wrong = [one.step for one in checkpoints if not 0 <= one.step_size < np.inf]
    if wrong:
        first = next(one for one in checkpoints if one.step == wrong[0])
        raise Misuse(
            f"step size of the checkpoints of steps {shorten(wrong)}",
            got=first.step_size,
            expected="the learning rate of that step, a number >= 0",
            do="record with an optimizer that tells it, or replace it: saved._replace(step_size=1)",
        )
    return [float(one.step_size) for one in checkpoints]


def points_of(task: Task, checkpoints: Sequence[SavedWeights]) -> Iterator[tuple[str, PyTree]]:
    """Each checkpoint's name and weights."""
    for saved in checkpoints:
        yield f"step {saved.step}", weights_at(task, saved)


def check_finite(
    task: Task,
    where: str,
    *,
    train: Float[np.ndarray, " train"],
    query: Float[np.ndarray, " query"],
) -> None:
    """Raise unless these numbers of all examples (norms of gradients) are finite.

    Raises:
        Misuse: one is not; the first example is named.
    """
    for name, values in (("train", train), ("query", query)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            ids = getattr(task, f"{name}_ids")
            raise Misuse(
                f"gradient of {name} example {ids[int(wrong[0])]} at {where}",
                got=f"values that are not finite ({len(wrong)} such {name} examples)",
                expected="finite gradients",
                do="look at that example's loss, leave it out, or take earlier checkpoints",
            )
