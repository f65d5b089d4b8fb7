"""The weights that runs start from: a task's own, others drawn by a key, and twins' beside them.

Where training is chaotic, what differs in the last bit before the first step grows from step to
step. A twin shows by how much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from bayes_simfluence.checks import Misuse, at_most, count_of, keyed, positive_integer
from bayes_simfluence.tasks.task import Task

Chosen: TypeAlias = int | Sequence[int] | Int[np.ndarray, " start"]
"""How many starts the curricula of a recording take turns with, or the number of each one's."""

TWINS, FRESH = 1, 2
"""Streams of the recording's key, beside that of features."""


@dataclass(frozen=True)
class Starts:
    """From which weights each run of a recording starts.

    Attributes:
        numbers: of the start of each curriculum, 0 = the task's own weights.
        twins: how many curricula, the last ones, are trained a second time by runs of their own
            after all others.
        key: decides the other starts, and in which direction each weight of a twin is moved.
    """

    numbers: tuple[int, ...]
    twins: int
    key: jax.Array

    @classmethod
    def of(cls, task: Task, curricula: int, starts: Chosen, twins: int, key: jax.Array) -> "Starts":
        """Those of a recording of ``curricula`` runs, as ``record`` is asked for them.

        Raises:
            Misuse: other numbers than there are curricula, starts that the task cannot draw, more
                twins than curricula, or twins of weights that are all 0.
        """
        if isinstance(starts, int | np.integer):
            turns = positive_integer("starts", starts)
            at_most("starts", turns, curricula, "curricula", do="ask for fewer")
            starts = [run % turns for run in range(curricula)]
        numbers = tuple(count_of("starts", number) for number in starts)
        if len(numbers) != curricula:
            raise Misuse(
                "starts",
                got=f"{len(numbers)} numbers",
                expected=f"one for each of {curricula} curricula, or how many starts they share",
                do="pass the number of each curriculum's start",
            )
        keyed(key)
        made = cls(numbers, twins, key)
        made._check(task)
        return made

    def _check(self, task: Task) -> None:
        most = len(self.numbers)
        at_most("twins", count_of("twins", self.twins), most, "curricula", do="ask for fewer")
        if task.fresh is None and any(self.numbers):
            raise Misuse(
                "starts",
                got="a task that cannot draw other initial weights",
                expected="task.fresh, as tasks with a classification head that trains have it",
                do="give the task fresh=..., or leave starts out",
            )
        if any(self.numbers) and task.fresh is not None:
            own, other = (
                jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), params)
                for params in (task.params, jax.eval_shape(task.fresh, task.params, self.key))
            )
            if own != other:
                raise Misuse(
                    "task.fresh",
                    got="weights of other names, shapes or types",
                    expected="those of task.params",
                    do="return a pytree like task.params",
                )
        leaves = jax.tree.leaves(task.params)
        if self.twins and not any(bool(jnp.any(leaf != 0)) for leaf in leaves):
            raise Misuse(
                "twins",
                got="a task whose initial weights are all 0",
                expected="weights that rounding can move",
                do="draw the initial weights at random, or leave twins out",
            )

    @property
    def repeated(self) -> list[int]:
        """The curriculum of each run."""
        curricula = len(self.numbers)
        return [*range(curricula), *range(curricula - self.twins, curricula)]

    @property
    def of_runs(self) -> list[int]:
        """The number of each run's start; empty where all start from the task's own weights."""
        return [self.numbers[run] for run in self.repeated] if any(self.numbers) else []

    @property
    def kept(self) -> dict[str, Any]:
        """What a store keeps of it as attributes; nothing where all runs start alike."""
        made = {"twins": self.twins} if self.twins else {}
        alike = not self.twins and not any(self.numbers)
        return {} if alike else {**made, "starts_key": jax.random.key_data(self.key).tolist()}

    def moved(self, run: int) -> bool:
        """Whether a run does not start from the task's own weights."""
        return run >= len(self.numbers) or self.numbers[run] > 0

    def params(self, run: int, task: Task) -> PyTree:
        """The weights that a run starts from."""
        number, twin = self.numbers[self.repeated[run]], run - len(self.numbers)
        fresh, moved = (jax.random.fold_in(self.key, stream) for stream in (FRESH, TWINS))
        params = task.params
        if number:
            params = task.fresh(params, jax.random.fold_in(fresh, number))  # type: ignore[misc]
        # By the number of the twin, so that a resumed recording draws the same.
        return params if twin < 0 else perturbed(params, jax.random.fold_in(moved, twin))


@jax.jit
def perturbed(params: PyTree, key: jax.Array) -> PyTree:
    """Each weight times ``1 + eps`` or ``1 - eps``, by chance; ``eps`` is that of its type.

    Every weight but 0 moves by one or two units in its last place.

    >>> weights = jnp.array([0.5, -3.0, 0.0])
    >>> moved = perturbed({"w": weights}, jax.random.key(0))["w"]
    >>> (abs(moved - weights) / jnp.finfo(jnp.float32).eps).tolist()
    [0.5, 4.0, 0.0]
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = []
    for leaf, drawn in zip(leaves, keys, strict=True):
        values = jnp.asarray(leaf)
        signs = jax.random.rademacher(drawn, values.shape, values.dtype)
        eps = float(jnp.finfo(values.dtype).eps)  # type: ignore[no-untyped-call]
        moved.append(values * (1 + eps * signs))
    return jax.tree.unflatten(structure, moved)
