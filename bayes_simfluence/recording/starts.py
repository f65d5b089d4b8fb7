"""The weights that runs start from: a task's own, or for twins these moved at rounding level.

Training is chaotic where a small step size does not prevent it: what differs in the last bit before
the first step grows from step to step. A twin makes that visible.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bayes_simfluence.checks import Misuse, at_most, count_of, keyed

STREAM = 1
"""Of the recording's key, beside those of features: the twins' signs."""


@dataclass(frozen=True)
class Starts:
    """From which weights each run of a recording starts.

    Attributes:
        curricula: how many are recorded; runs of these numbers start from the task's own weights.
        twins: how many of them, the last, are trained a second time; runs of the numbers above.
        key: decides in which direction each weight of a twin is moved.
    """

    curricula: int
    twins: int
    key: jax.Array

    def validate(self, params: PyTree) -> "Starts":
        """The starts themselves when twins of ``params`` differ from them.

        Raises:
            Misuse: no number of twins, more than there are curricula, or no weight other than 0.
        """
        count_of("twins", self.twins)
        at_most("twins", self.twins, self.curricula, "curricula", do="ask for fewer")
        keyed(self.key)
        if self.twins and not any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(params)):
            raise Misuse(
                "twins",
                got="a task whose initial weights are all 0",
                expected="weights that rounding can move",
                do="draw the initial weights at random, or leave twins out",
            )
        return self

    @property
    def repeated(self) -> list[int]:
        """The curriculum of each run."""
        return [*range(self.curricula), *range(self.curricula - self.twins, self.curricula)]

    @property
    def kept(self) -> dict[str, Any]:
        """What a store keeps of it as attributes; nothing where there are no twins."""
        if not self.twins:
            return {}
        return {"twins": self.twins, "twins_key": jax.random.key_data(self.key).tolist()}

    def moved(self, run: int) -> bool:
        """Whether a run does not start from the task's own weights."""
        return run >= self.curricula

    def params(self, run: int, params: PyTree) -> PyTree:
        """The weights that a run starts from, given the task's own."""
        if not self.moved(run):
            return params
        # By the number of the twin, so that a resumed recording draws the same.
        key = jax.random.fold_in(self.key, STREAM)
        return perturbed(params, jax.random.fold_in(key, run - self.curricula))


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
