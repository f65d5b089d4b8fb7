"""Rearranging a run: what stands in the filled slots of its batches, one after the other.

Every kind takes a curriculum of shuffled epochs and keeps which slots are filled.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Int

from bayes_simfluence.conventions import EMPTY_SLOT, Curriculum
from bayes_simfluence.data.curriculum import shuffled_epochs
from bayes_simfluence.data.sides import Members, Sides

FEW = 8
"""A repeated run has one of so many of its examples left."""

Filled: TypeAlias = Int[np.ndarray, " filled"]
Maker: TypeAlias = Callable[[Curriculum, int, Sides, jax.Array], Filled]
"""Takes a curriculum, its epochs, a way to tell examples apart and a key."""


def few_of(per_run: int, batch_size: int) -> int:
    """Examples of a repeated run: at least a batch."""
    return max(batch_size, per_run // FEW)


def _sorted(batch: Curriculum, epochs: int, sides: Sides, key: jax.Array) -> Filled:
    side_key, order_key = jax.random.split(key)
    filled, groups = _grouped(batch, sides, side_key)
    return filled[_group_by_group(groups, order_key)]


def _blocked(batch: Curriculum, epochs: int, sides: Sides, key: jax.Array) -> Filled:
    side_key, order_key = jax.random.split(key)
    filled, groups = _grouped(batch, sides, side_key)
    passes = zip(
        filled.reshape(epochs, -1),
        groups.reshape(epochs, -1),
        jax.random.split(order_key, epochs),
        strict=True,
    )
    return np.concatenate([one[_group_by_group(group, own)] for one, group, own in passes])


def _one_sided(batch: Curriculum, epochs: int, sides: Sides, key: jax.Array) -> Filled:
    told_key, length_key, start_key, side_key, order_key = jax.random.split(key, 5)
    filled, groups = _grouped(batch, sides, told_key)
    steps = len(batch)
    longest, shortest = max(steps // 2, 1), max(steps // 4, 1)
    length = int(jax.random.randint(length_key, (), shortest, longest + 1))
    start = int(jax.random.randint(start_key, (), 0, steps - length + 1))
    side = int(jax.random.choice(side_key, np.unique(groups)))
    window = _slots_of(batch, start, start + length)
    members = np.unique(filled[groups == side])
    filled[window] = _shuffled(members, int(window.sum()), order_key)
    return filled


def _repeated(batch: Curriculum, epochs: int, sides: Sides, key: jax.Array) -> Filled:
    size = len(np.unique(batch[batch != EMPTY_SLOT]))
    return _fewer(batch, few_of(size, batch.shape[1]), key)


def _half(batch: Curriculum, epochs: int, sides: Sides, key: jax.Array) -> Filled:
    return _fewer(batch, len(np.unique(batch[batch != EMPTY_SLOT])) // 2, key)


REARRANGED: Final[dict[str, Maker]] = {
    "sorted": _sorted,
    "blocked": _blocked,
    "one-sided": _one_sided,
    "repeated": _repeated,
    "half": _half,
}
"""Kind -> what stands in the filled slots of a run that is rearranged so."""


def _grouped(batch: Curriculum, sides: Sides, key: jax.Array) -> tuple[Filled, Filled]:
    """What stands in the filled slots, and the group of each."""
    filled = batch[batch != EMPTY_SLOT]
    members, places = np.unique(filled, return_inverse=True)
    return filled, sides(members, key)[places]


def _group_by_group(groups: Filled, key: jax.Array) -> Filled:
    """An order of places: the groups one after the other, drawn; within one as they stand."""
    found, codes = np.unique(groups, return_inverse=True)
    rank = np.asarray(jax.random.permutation(key, len(found)))
    return rank[codes].argsort(kind="stable")


def _slots_of(batch: Curriculum, first: int, end: int) -> Bool[np.ndarray, " filled"]:
    """Which of the filled slots lie in steps ``first..end-1``."""
    steps = np.broadcast_to(np.arange(len(batch))[:, None], batch.shape)[batch != EMPTY_SLOT]
    return (steps >= first) & (steps < end)


def _fewer(batch: Curriculum, size: int, key: jax.Array) -> Filled:
    """Only ``size`` of a run's examples, in as many epochs as fill it."""
    filled = batch[batch != EMPTY_SLOT]
    pick, order = jax.random.split(key)
    members = jax.random.choice(pick, np.unique(filled), (size,), replace=False)
    return _shuffled(np.asarray(members), len(filled), order)


def _shuffled(members: Members, count: int, key: jax.Array) -> Filled:
    """``count`` examples from shuffled epochs over ``members``, the last of them cut short."""
    epochs = -(-count // len(members))
    return shuffled_epochs(members, batch_size=len(members), epochs=epochs, key=key).ravel()[:count]
