"""Gradient features: low-rank coordinates of every example's loss gradient at the initial weights.

Inner products of these features approximate those of the gradients, hence what one SGD step on a
training example does to a query's loss (TracIn with one checkpoint: Pruthi et al. 2020, eq. 1).
They are what a prior can know of an example before any run: examples with similar gradients have
similar effects. Each gradient is compressed by random signs and folding (a count sketch: Charikar
et al. 2002) as it is made, so memory holds one gradient at a time. The inner product of two
sketches is that of the gradients, on average over the signs; it is off by about
``1 / sqrt(length)`` of the product of their norms.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, PyTree

from bayes_simfluence.checks import keyed, positive_integer
from bayes_simfluence.progress import Meter
from bayes_simfluence.recording.batches import over_batches
from bayes_simfluence.tasks.task import Functions, Task

BATCH = 25
"""Examples between two reports of progress."""


@dataclass(frozen=True)
class Features:
    """Gradient features of a task's examples.

    Attributes:
        train: of the training examples; at full rank their mean squared norm is 1.
        query: of the queries, in the same coordinates and scale.
        kept: share of the training gradients' squared norm that the coordinates hold, in (0, 1].
    """

    train: Float[np.ndarray, "train feature"]
    query: Float[np.ndarray, "query feature"]
    kept: float


def gradient_features(
    task: Task, *, rank: int = 64, sketch: int = 2048, key: jax.Array, meter: Meter | None = None
) -> Features:
    """The leading ``rank`` coordinates of the examples' loss gradients.

    Args:
        task: the examples, their loss and the initial weights.
        rank: coordinates kept (at most the number of training examples).
        sketch: length of a compressed gradient; an inner product of two gradients is then off by
            about ``1 / sqrt(sketch)`` of the product of their norms.
        key: decides the random signs.
        meter: advanced every few examples.
    """
    keyed(key)
    rank = min(positive_integer("rank", rank), len(task.train_ids))
    length = positive_integer("sketch", sketch)
    signs = random_signs(task.params, key)
    of_batch = partial(_sketches, task.functions, length, task.params, task.frozen, signs)
    train, query = (
        np.concatenate(
            [np.asarray(rows, float) for _, rows in over_batches(of_batch, part, BATCH, meter)]
        )
        for part in (task.train, task.query)
    )
    values, vectors = np.linalg.eigh(train @ train.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    scale = np.sqrt(max(values.sum() / len(train), np.finfo(float).tiny))
    # train = vectors sqrt(values) right^T: coordinates along right, for queries too.
    # Directions that are rounding alone have no coordinates.
    kept = values[:rank] > len(train) * np.finfo(float).eps * values[0]
    right = train.T @ vectors[:, :rank] / np.sqrt(np.where(kept, values[:rank], np.inf))
    return Features(
        train=(train @ right / scale).astype(np.float32),
        query=(query @ right / scale).astype(np.float32),
        kept=float(values[:rank].sum() / max(values.sum(), np.finfo(float).tiny)),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _sketches(
    task: Functions,
    length: int,
    params: PyTree,
    frozen: PyTree,
    signs: list[Array],
    examples: PyTree,
) -> Float[Array, "batch sketch"]:
    gradient = partial(jax.grad(task.loss_at), params, frozen)
    return jax.lax.map(lambda example: sketched(gradient(example), signs, length), examples)


def random_signs(params: PyTree, key: jax.Array) -> list[Int8[Array, " weight"]]:
    """A sign for each coordinate of every array."""
    leaves = jax.tree.leaves(params)
    keys = jax.random.split(key, len(leaves))
    return [
        jax.random.rademacher(drawn, (leaf.size,), jnp.int8)
        for leaf, drawn in zip(leaves, keys, strict=True)
    ]


def sketched(
    gradient: PyTree, signs: list[Int8[Array, "..."]], length: int
) -> Float[Array, " sketch"]:
    """Signed sums of every ``length``-th coordinate, all arrays one after the other."""
    folded, start = jnp.zeros(length), 0
    for leaf, sign in zip(jax.tree.leaves(gradient), signs, strict=True):
        front = start % length
        padded = jnp.pad(leaf.ravel() * sign, (front, -(front + leaf.size) % length))
        folded = folded + padded.reshape(-1, length).sum(axis=0)
        start += leaf.size
    return folded
