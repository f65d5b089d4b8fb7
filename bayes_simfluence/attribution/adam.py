"""The diagonal by which Adam divides gradients, at weights saved without the optimizer's state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.attribution.gradients.checkpoints import check_finite
from bayes_simfluence.attribution.gradients.per_example import (
    MEMORY,
    flat,
    flat_gradients,
)
from bayes_simfluence.checks import Misuse, at_most, positive_integer, positive_number
from bayes_simfluence.recording.checkpoints import named_tensors
from bayes_simfluence.tasks.task import Task


@dataclass(frozen=True)
class AdamDiagonal:
    """Steps of Adam (Kingma and Ba 2015) in place of plain gradient steps.

    A gradient enters Adam's update divided by ``sqrt(v) + epsilon``, with v the running mean of
    the squared batch gradients; momentum only spreads it over later steps. The small change that an
    example's own gradient makes to v is left out. Estimates of v are for batches of equal weights.

    Attributes:
        batch_size: examples in a batch while training.
        epsilon: added to the root, > 0.
        moments: v for each checkpoint, bias corrected, each a pytree like ``task.params``; when
            omitted, v is estimated at each checkpoint (``second_moments``).
    """

    batch_size: int
    epsilon: float = 1e-8
    moments: Sequence[PyTree] | None = None

    def validate(self, task: Task, checkpoints: int) -> "AdamDiagonal":
        """The diagonal itself when it fits the task.

        Raises:
            Misuse: batches larger than the training set, moments of other weights.
        """
        size = positive_integer("batch_size", self.batch_size)
        positive_number("epsilon", self.epsilon)
        do = "pass the size of the batches of the recorded runs"
        at_most("batch_size", size, len(task.train_ids), "training examples", do=do)
        if self.moments is not None:
            _check_moments(task, self.moments, checkpoints)
        return self

    def scale(
        self,
        task: Task,
        params: PyTree,
        place: int,
        *,
        memory: int = MEMORY,
        where: str = "these weights",
    ) -> Float[Array, " weight"]:
        """What gradients are multiplied by at the checkpoint of number ``place``.

        Other arguments and errors as for ``second_moments``.
        """
        if self.moments is not None:
            squares = flat(jax.tree.map(jnp.asarray, self.moments[place]))
        else:
            squares = second_moments(
                task, params, batch_size=self.batch_size, memory=memory, where=where
            )
        return 1.0 / (jnp.sqrt(squares) + self.epsilon)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for attributes."""
        return {
            "preconditioner": "adam",
            "epsilon": self.epsilon,
            "batch_size": self.batch_size,
            "second_moments": "estimated" if self.moments is None else "given",
        }


def second_moments(
    task: Task,
    params: PyTree,
    *,
    batch_size: int,
    memory: int = MEMORY,
    where: str = "these weights",
) -> Float[Array, " weight"]:
    """Mean of the squared batch gradients over all batches of training examples, at given weights.

    With m the mean and s the variance (divided by N) of the N examples' gradients, the mean
    gradient of b of them, drawn without replacement, has the mean square
    ``m^2 + s/b (N - b)/(N - 1)``. Adam's own running mean looks back over some 1000 steps
    (``beta2 = 0.999``) where this stands still.

    Args:
        where: what errors call the weights.

    Raises:
        Misuse: a gradient that is not finite (its example is named).
    """
    count = len(task.train_ids)
    width = sum(leaf.size for leaf in jax.tree.leaves(params))
    total = squares = jnp.zeros(width)
    sums = np.zeros(count)
    for places, rows in flat_gradients(task, params, task.train, memory=memory):
        total, squares = _added(total, squares, rows)
        sums[places] = np.asarray(rows.sum(axis=1))
    check_finite(task, where, train=sums)
    mean = total / count
    variance = jnp.maximum(squares / count - mean**2, 0.0)
    return mean**2 + variance / batch_size * (count - batch_size) / max(count - 1, 1)


@jax.jit
def _added(
    total: Float[Array, " weight"],
    squares: Float[Array, " weight"],
    rows: Float[Array, "batch weight"],
) -> tuple[Float[Array, " weight"], Float[Array, " weight"]]:
    return total + rows.sum(axis=0), squares + jnp.square(rows).sum(axis=0)


def _check_moments(task: Task, moments: Sequence[PyTree], checkpoints: int) -> None:
    if len(moments) != checkpoints:
        raise Misuse(
            "moments",
            got=f"{len(moments)} second moments for {checkpoints} checkpoints",
            expected="one for each checkpoint",
            do="pass them in the order of the checkpoints",
        )
    wanted = {name: array.shape for name, array in named_tensors(task.params).items()}
    for place, moment in enumerate(moments):
        tensors = named_tensors(moment)
        if {name: array.shape for name, array in tensors.items()} != wanted:
            raise Misuse(
                f"moments[{place}]",
                got="other arrays than the trained parameters",
                expected="a pytree like task.params",
                do="pass the optimizer's second moments (nu of optax.scale_by_adam)",
            )
        if any(not np.isfinite(array).all() or (array < 0).any() for array in tensors.values()):
            raise Misuse(
                f"moments[{place}]",
                got="numbers below 0 or not finite",
                expected="means of squares",
                do="pass the optimizer's second moments (nu of optax.scale_by_adam)",
            )
