"""Weights saved during a run, at which gradients are taken, and the check that these are finite."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors, with_tensors
from bayes_simfluence.tasks.task import Task


def weights_at(task: Task, saved: SavedWeights) -> PyTree:
    """A checkpoint's tensors in the place of the task's trained parameters.

    Raises:
        Misuse: tensors of another task: other names or shapes.
    """
    wanted = {name: leaf.shape for name, leaf in named_tensors(task.params).items()}
    got = {name: leaf.shape for name, leaf in saved.tensors.items()}
    if wanted != got:
        other = sorted({name for name in wanted | got if wanted.get(name) != got.get(name)})
        raise Misuse(
            f"checkpoint of step {saved.step}",
            got=f"tensors that differ from the task's: {other[0]} "
            f"{got.get(other[0], 'absent')}, and {len(other) - 1} more",
            expected=f"the {len(wanted)} tensors that the task trains",
            do="open the checkpoints of a run of this very task",
        )
    return jax.tree.map(jnp.asarray, with_tensors(task.params, saved.tensors))


def weights_along(task: Task, checkpoints: Sequence[SavedWeights]) -> Iterator[tuple[str, PyTree]]:
    """What errors call each checkpoint, and its weights."""
    for saved in checkpoints:
        yield f"step {saved.step}", weights_at(task, saved)


def check_checkpoints(task: Task, checkpoints: Sequence[SavedWeights]) -> None:
    """Raise unless there are checkpoints, all of this task.

    Raises:
        Misuse: there are none, or tensors of another task.
    """
    if not checkpoints:
        raise Misuse(
            "checkpoints",
            got="none",
            expected="weights that were saved during a run",
            do="record(..., evaluation=Evaluation(checkpoints=10)) saves them, "
            "open_checkpoints(store, run) reads them",
        )
    for saved in checkpoints:
        weights_at(task, saved)


def step_sizes_of(checkpoints: Sequence[SavedWeights]) -> list[float]:
    """The checkpoints' step sizes.

    Raises:
        Misuse: a step size that was not recorded, or is no finite number of at least 0.
    """
    wrong = [saved for saved in checkpoints if not 0 <= saved.step_size < np.inf]
    if wrong:
        raise Misuse(
            f"step size of the checkpoints of steps {shorten([saved.step for saved in wrong])}",
            got=wrong[0].step_size,
            expected="the learning rate of that step, a number >= 0",
            do="record with an optimizer that tells it, or replace it: saved._replace(step_size=1)",
        )
    return [float(saved.step_size) for saved in checkpoints]


def check_finite(
    task: Task,
    where: str = "the given weights",
    *,
    train: Float[np.ndarray, " train"] | Float[Array, " train"] | None = None,
    query: Float[np.ndarray, " query"] | Float[Array, " query"] | None = None,
    start: int = 0,
) -> None:
    """Raise unless these numbers, one for the gradient of each example, are finite.

    Args:
        where: what the error calls the weights.
        train, query: norms or sums of the gradients of examples from number ``start`` on.

    Raises:
        Misuse: a number is not finite; the first such example is named.
    """
    for part, numbers in (("train", train), ("query", query)):
        wrong = np.flatnonzero(~np.isfinite([] if numbers is None else numbers))
        if len(wrong):
            example = getattr(task, f"{part}_ids")[start + int(wrong[0])]
            raise Misuse(
                f"gradient of {part} example {example} at {where}",
                got=f"values that are not finite ({len(wrong)} such {part} examples)",
                expected="finite gradients",
                do="look at that example's loss, leave it out, or take weights from before "
                "training diverged",
            )
