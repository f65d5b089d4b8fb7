"""Gradients of single examples in bounded memory, and inner products between them.

This is the plain way: every gradient is written out, a batch of examples at a time. Whatever is
faster is tested against it.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.recording.batches import over_batches
from bayes_simfluence.tasks.task import Functions, Task

MEMORY = 2**30
"""Bytes of gradients held at once, unless the caller says otherwise."""


class Products(NamedTuple):
    """Inner products of gradients at given weights.

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


@partial(jax.jit, static_argnums=0)
def _gradients(
    task: Functions, params: PyTree, frozen: PyTree, examples: PyTree
) -> Float[Array, "batch weight"]:
    return jax.vmap(lambda example: flat(jax.grad(task.loss_at)(params, frozen, example)))(examples)


def flat_gradients(
    task: Task, params: PyTree, examples: PyTree, *, memory: int = MEMORY
) -> Iterator[tuple[slice, Float[Array, "batch weight"]]]:
    """Gradients of all examples, a batch of them at a time: where they stand, their rows."""
    width = sum(leaf.size for leaf in jax.tree.leaves(params))
    of_batch = partial(_gradients, task.functions, params, task.frozen)
    return over_batches(of_batch, examples, memory // (4 * width))


def gradient_products(
    task: Task,
    params: PyTree,
    *,
    scale: Float[Array, " weight"] | None = None,
    memory: int = MEMORY,
) -> Products:
    """Inner products of every training example's gradient with every query's.

    Args:
        params: the trained parameters at which gradients are taken.
        scale: a positive weight for each coordinate (the diagonal of a preconditioner); all norms
            are then in that metric.
        memory: bytes of gradients held at once; the training examples' gradients are computed
            again for each part of the queries that fits.
    """
    batches = partial(flat_gradients, task, params, memory=memory // 2)
    counts = len(task.train_ids), len(task.query_ids)
    products = Products(np.zeros(counts), np.zeros(counts[0]), np.zeros(counts[1]))
    for columns, queries in batches(task.query):
        weighed = queries if scale is None else queries * scale[None]
        products.query[columns] = np.asarray(_norms(queries, weighed), float)
        for rows, trains in batches(task.train):
            products.products[rows, columns] = np.asarray(trains @ weighed.T, float)
            if columns.start == 0:
                again = trains if scale is None else trains * scale[None]
                products.train[rows] = np.asarray(_norms(trains, again), float)
    return products


@jax.jit
def _norms(
    rows: Float[Array, "batch weight"], weighed: Float[Array, "batch weight"]
) -> Float[Array, " batch"]:
    return jnp.einsum("pw,pw->p", rows, weighed)
