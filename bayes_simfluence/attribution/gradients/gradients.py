"""Gradients of single examples in bounded memory, and inner products between them.

This is the plain way: every gradient is written out, a piece of examples at a time. Whatever is
faster is tested against it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.batches import pieces_of
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors, with_tensors
from bayes_simfluence.tasks.task import Task

__all__ = [
    "MEMORY",
    "GradientMaker",
    "Products",
    "flat",
    "flat_gradients",
    "gradient_maker",
    "gradient_products",
    "weights_at",
]

MEMORY = 2**30
"""Bytes of gradients held at once, unless the caller says otherwise."""

GradientMaker = Callable[[PyTree, PyTree], Float[Array, "piece weight"]]
"""Trained parameters and examples (leading axis) -> each example's gradient as one row."""


class Products(NamedTuple):
    """Inner products of gradients at one point.

    Attributes:
        products: of a training example's gradient with a query's.
        train, query: squared norms of the gradients.
    """

    products: Float[np.ndarray, "train query"]
    train: Float[np.ndarray, " train"]
    query: Float[np.ndarray, " query"]


def flat(tree: PyTree) -> Float[Array, " weight"]:
    """The arrays of a pytree one after the other, in the order of its leaves."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def weights_at(task: Task, saved: SavedWeights) -> PyTree:
    """A checkpoint's tensors in the place of the task's trained parameters.

    Raises:
        Misuse: tensors of another task: other names or shapes.
    """
    wanted = {name: leaf.shape for name, leaf in named_tensors(task.params).items()}
    got = {name: leaf.shape for name, leaf in saved.tensors.items()}
    if wanted != got:
        other = sorted(
            {name for name in wanted | got if wanted.get(name) != got.get(name)}, key=str
        )
        raise Misuse(
            f"checkpoint of step {saved.step}",
            got=f"tensors that differ from the task's: {other[0]} "
            f"{got.get(other[0], 'absent')}, and {len(other) - 1} more",
            expected=f"the {len(wanted)} tensors that the task trains",
            do="open the checkpoints of a run of this very task",
        )
    return jax.tree.map(jnp.asarray, with_tensors(task.params, saved.tensors))


def gradient_maker(task: Task) -> GradientMaker:
    """The compiled gradients of a task; keep it, so that all points share one compilation."""

    @jax.jit
    def made(params: PyTree, frozen: PyTree, examples: PyTree) -> Float[Array, "piece weight"]:
        def one(example: PyTree) -> Float[Array, " weight"]:
            def loss(params: PyTree) -> Float[Array, ""]:
                return task.loss(task.weights(params, frozen), example)

            return flat(jax.grad(loss)(params))

        found: Array = jax.vmap(one)(examples)
        return found

    return lambda params, examples: made(params, task.frozen, examples)


def flat_gradients(
    maker: GradientMaker, params: PyTree, examples: PyTree, *, memory: int = MEMORY
) -> Iterator[tuple[slice, Float[Array, "piece weight"]]]:
    """Gradients of all examples, a piece of them at a time: where the piece stands, its rows."""
    width, done = sum(leaf.size for leaf in jax.tree.leaves(params)), 0
    for where, some in pieces_of(examples, memory // (4 * width)):
        yield slice(done, where.stop), maker(params, some)[done - where.start :]
        done = where.stop


def gradient_products(
    task: Task,
    params: PyTree,
    *,
    maker: GradientMaker | None = None,
    scale: Float[Array, " weight"] | None = None,
    memory: int = MEMORY,
) -> Products:
    """Inner products of every training example's gradient with every query's.

    Args:
        params: the trained parameters at which gradients are taken.
        maker: of this task, to share a compilation between points.
        scale: a positive weight for each coordinate (the diagonal of a preconditioner); all norms
            are then in that metric.
        memory: bytes of gradients held at once; the training examples' gradients are computed
            again for each part of the queries that fits.
    """
    pieces = partial(flat_gradients, maker or gradient_maker(task), params, memory=memory // 2)
    counts = len(task.train_ids), len(task.query_ids)
    found = Products(np.zeros(counts), np.zeros(counts[0]), np.zeros(counts[1]))
    for columns, queries in pieces(task.query):
        weighed = queries if scale is None else queries * scale[None]
        found.query[columns] = np.asarray(_norms(queries, weighed), float)
        for rows, trains in pieces(task.train):
            found.products[rows, columns] = np.asarray(trains @ weighed.T, float)
            if columns.start == 0:
                again = trains if scale is None else trains * scale[None]
                found.train[rows] = np.asarray(_norms(trains, again), float)
    return found


@jax.jit
def _norms(
    rows: Float[Array, "piece weight"], weighed: Float[Array, "piece weight"]
) -> Float[Array, " piece"]:
    return jnp.einsum("pw,pw->p", rows, weighed)
