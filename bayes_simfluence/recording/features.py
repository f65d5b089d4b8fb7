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

from bayes_simfluence.checks import Misuse, count_of, keyed, of_shape, positive_integer, shorten
from bayes_simfluence.progress import Meter, Progress
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


def features_key(seed: int = 0) -> jax.Array:
    """The key of the signs of a recording's features: of the command's ``--seed``, 0 in Python."""
    return jax.random.fold_in(jax.random.key(seed), 4)


def checked_features(task: Task, features: int | Features) -> int | Features:
    """A number of features to be made, or features that fit the examples of ``task``.

    Raises:
        Misuse: a number below 0, or arrays of another shape than ``(examples, feature)``.
    """
    if not isinstance(features, Features):
        return count_of("features", features, do="pass 0 to leave them out")
    width = features.train.shape[-1]
    for name, ids in (("train", task.train_ids), ("query", task.query_ids)):
        of_shape(
            f"features.{name}",
            getattr(features, name),
            (len(ids), width),
            f"(examples of task.{name}, {width} features)",
            do="make them of this task, with recording.features.gradient_features",
        )
    return features


def features_of(
    task: Task, features: int | Features, *, key: jax.Array, progress: Progress
) -> Features | None:
    """Features as they are or, where their number is given, made; None where that is 0.

    Raises:
        Misuse: as for ``gradient_features``.
    """
    if isinstance(features, Features):
        return features
    if features == 0:
        return None
    with progress.work("gradient features", len(task.train_ids) + len(task.query_ids)) as meter:
        return gradient_features(task, rank=features, key=key, meter=meter)


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

    Raises:
        Misuse: the loss of some example has a gradient that is not finite.
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
    _finite(task, train, query)
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


def _finite(
    task: Task, train: Float[np.ndarray, "train sketch"], query: Float[np.ndarray, "query sketch"]
) -> None:
    for name, rows, ids in (("train", train, task.train_ids), ("query", query, task.query_ids)):
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise Misuse(
                "features",
                got=f"loss gradients of {bad.sum()} examples of task.{name} at the initial weights "
                f"that are not finite: {shorten(np.asarray(ids)[bad])}",
                expected="a finite gradient of every example's loss",
                do="mend the loss, leave these examples out, or record with features=0",
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
