"""Inner products of gradients without whole gradients.

A matrix that multiplies vectors has the gradient ``sum_t d_t x_t^T`` (what entered, and the
gradient of what left, at each token t), so the product of two examples' gradients is
``sum_ts (x_it . x_js) (d_it . d_js)``, and neither gradient has to be written out. Where sequences
are long it is cheaper to write out the gradients of one matrix at a time. Of a table whose rows are
taken (embeddings) only the rows that both examples take count. Everything else (norms, biases,
adapters, matrices used in other ways) is small, and differentiated directly.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.attribution.gradients.factors import Factors, Way
from bayes_simfluence.attribution.gradients.linear_layers import layers_of, probes_of, with_probes
from bayes_simfluence.attribution.gradients.per_example import MEMORY, Products, flat
from bayes_simfluence.attribution.gradients.trace import Use, trace_bytes
from bayes_simfluence.networks.layers import wide
from bayes_simfluence.progress import Meter
from bayes_simfluence.recording.batches import batches_of, over_batches
from bayes_simfluence.tasks.task import Functions, Task

DIRECT = -1
"""Stands for all leaves without factors together, among the numbers of leaves."""

_Parts = dict[int, Any]
"""The gradients of several examples, taken apart: the number of a leaf -> its ``Factors``, and
under ``DIRECT`` the rows of the rest."""

SLOWER = 5
"""How many times longer a multiplication takes on gradients that are written out than on factors:
memory bounds it (measured on a CPU at the sizes of MiniLM)."""


@dataclass(frozen=True)
class Partition:
    """How the gradients of a task are taken apart; keep it, so that it is found out once.

    Attributes:
        shapes: number of a leaf of the parameters -> its two lengths, of those that have factors.
        tokens: the same -> products and taken rows of one example.
        direct: numbers of the other leaves.
        parts: ``parts(params, examples)``, compiled.
        kept, traced: bytes of one example's parts, and of what its trace computes.
    """

    shapes: dict[int, tuple[int, int]]
    tokens: dict[int, tuple[int, int]]
    direct: tuple[int, ...]
    parts: Callable[[PyTree, PyTree], _Parts]
    kept: int
    traced: int


def partition_of(task: Task) -> Partition:
    """Find out how a task's loss uses its parameters; nothing is computed."""
    leaves, functions = jax.tree.leaves(task.params), task.functions
    layers, traced_bytes = [], 1
    for examples in (task.train, task.query):
        example = jax.eval_shape(partial(jax.tree.map, lambda leaf: leaf[0]), examples)
        closed = jax.make_jaxpr(functions.loss_at)(task.params, task.frozen, example)
        layers.append(layers_of(closed, len(leaves)))
        traced_bytes = max(traced_bytes, trace_bytes(closed))
    train, query = layers
    tokens = {
        at: (max(train[at].multiplied, query[at].multiplied), max(train[at].taken, query[at].taken))
        for at in sorted(train.keys() & query.keys())
    }
    # Factors larger than the gradient itself save nothing.
    shapes = {
        at: train[at].shape
        for at in tokens
        if _factor_size(tokens[at], train[at].shape) < math.prod(train[at].shape)
    }
    direct = tuple(at for at in range(len(leaves)) if at not in shapes)
    kept = sum(_factor_size(tokens[at], shape) for at, shape in shapes.items())
    kept += sum(jnp.size(leaves[at]) for at in direct)
    return Partition(
        shapes=shapes,
        tokens={at: tokens[at] for at in shapes},
        direct=direct,
        parts=lambda params, examples: _parts(functions, direct, params, task.frozen, examples),
        kept=4 * kept,
        traced=traced_bytes,
    )


def layer_products(
    task: Task,
    params: PyTree,
    *,
    partition: Partition | None = None,
    scale: Float[Array, " weight"] | None = None,
    memory: int = MEMORY,
    meter: Meter | None = None,
) -> Products:
    """Inner products of every training example's gradient with every query's.

    The same numbers as ``per_example.gradient_products``, the plain reference.

    Args:
        params: the trained parameters at which gradients are taken.
        partition: of this task, to share its compilations between checkpoints.
        scale: a positive weight for each coordinate (the diagonal of a preconditioner); all norms
            are then in that metric.
        memory: bytes held at once, about: half for work, most of the rest for the queries. Where
            they do not fit, the training examples are gone through again for each part of them.
        meter: advanced by the pairs of examples that are done.
    """
    partition = partition or partition_of(task)
    counts = len(task.train_ids), len(task.query_ids)
    scales = _scales(partition, params, scale)
    ways = _ways(partition, counts, scaled=scale is not None)
    products = Products(np.zeros(counts), np.zeros(counts[0]), np.zeros(counts[1]))
    new = np.ones(counts, bool)
    for columns, queries in _blocks(partition, params, task.query, 3 * memory // 8, memory // 2):
        products.query[columns] = _norms(ways, queries, scales, memory // 2)
        for rows, trains in _blocks(partition, params, task.train, memory // 8, memory // 2):
            if columns.start == 0:
                products.train[rows] = _norms(ways, trains, scales, memory // 2)
            block = _products(ways, trains, queries, scales, memory // 2)
            products.products[rows, columns] = block
            if meter is not None:
                done = np.count_nonzero(new[rows, columns])
                new[rows, columns] = False
                meter.advance(int(done))
    return products


class GramMatrix(NamedTuple):
    """All inner products of a task's gradients but those between two queries.

    Attributes:
        train: between training examples.
        cross: of a training example's gradient with a query's.
        query: squared norms of the queries' gradients.
    """

    train: Float[np.ndarray, "train train"]
    cross: Float[np.ndarray, "train query"]
    query: Float[np.ndarray, " query"]


def gram_matrix(
    task: Task, params: PyTree, *, memory: int = MEMORY, meter: Meter | None = None
) -> GramMatrix:
    """Inner products of the training examples' gradients with one another and with the queries'.

    Gradients of as many training examples as fit are held, and those before them are made again.

    Args:
        params: the trained parameters at which gradients are taken.
        memory: bytes held at once, about: half for work, most of the rest for gradients.
        meter: advanced by the pairs that are done; two training examples are two pairs.
    """
    partition = partition_of(task)
    trains, queries = len(task.train_ids), len(task.query_ids)
    own, across = (_ways(partition, (trains, others), scaled=False) for others in (trains, queries))
    none = _scales(partition, params, None)
    work, part = memory // 2, memory // 8
    gram = GramMatrix(np.zeros((trains, trains)), np.zeros((trains, queries)), np.zeros(queries))
    done = 0
    for here, held in _blocks(partition, params, task.train, 3 * memory // 8, work):
        gram.train[here, here] = _products(own, held, held, none, work)
        if here.start:
            before = jax.tree.map(lambda leaf, end=here.start: leaf[:end], task.train)
            for rows, some in _blocks(partition, params, before, part, work):
                products = _products(own, some, held, none, work)
                gram.train[rows, here] = products
                gram.train[here, rows] = products.T
        for columns, some in _blocks(partition, params, task.query, part, work):
            gram.cross[here, columns] = _products(across, held, some, none, work)
            gram.query[columns] = _norms(across, some, none, work)
        if meter is not None:
            meter.advance((here.stop - done) * (here.stop + done + queries))
        done = here.stop
    return gram


def squared_norms(
    task: Task,
    params: PyTree,
    *,
    partition: Partition | None = None,
    scale: Float[Array, " weight"] | None = None,
    memory: int = MEMORY,
    meter: Meter | None = None,
) -> Float[np.ndarray, " train"]:
    """Squared norms of the training examples' gradients; arguments as for ``layer_products``.

    The meter is advanced by the examples that are done.
    """
    partition = partition or partition_of(task)
    count = len(task.train_ids)
    scales = _scales(partition, params, scale)
    ways = _ways(partition, (count, 1), scaled=scale is not None)
    norms, done = np.zeros(count), 0
    for rows, trains in _blocks(partition, params, task.train, memory // 8, memory // 2):
        norms[rows] = _norms(ways, trains, scales, memory // 2)
        if meter is not None:
            meter.advance(rows.stop - done)
        done = rows.stop
    return norms


@partial(jax.jit, static_argnums=(0, 1))
def _parts(
    task: Functions, direct: tuple[int, ...], params: PyTree, frozen: PyTree, examples: PyTree
) -> _Parts:
    def of_example(example: PyTree) -> _Parts:
        closed = jax.make_jaxpr(task.loss_at)(params, frozen, example)
        leaves, rest = jax.tree.leaves(params), jax.tree.leaves((frozen, example))
        layers = layers_of(closed, len(leaves))
        layers = {at: layer for at, layer in layers.items() if at not in direct}

        def loss(
            probes: dict[int, list[Array]], free: dict[int, Array]
        ) -> tuple[Float[Array, ""], dict[int, list[Array]]]:
            args = [*(free.get(at, leaf) for at, leaf in enumerate(leaves)), *rest]
            (value,), entered = with_probes(closed, len(leaves), args, probes)
            return value, entered

        free = {at: leaves[at] for at in direct}
        (slopes, gradients), entered = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            probes_of(layers), free
        )
        parts: _Parts = {
            at: _factors(layer.uses, entered[at], slopes[at]) for at, layer in layers.items()
        }
        return {**parts, DIRECT: flat(gradients) if gradients else jnp.zeros(0)}

    return jax.vmap(of_example)(examples)


def _factors(uses: Sequence[Use], entered: Sequence[Array], slopes: Sequence[Array]) -> Factors:
    """The uses of one matrix together, one after the other in the axis of tokens."""
    left, right, rows, taken = [], [], [], []
    for use, value, slope in zip(uses, entered, slopes, strict=True):
        if use.kind == "rows":
            rows.append(value)
            taken.append(wide(slope))
        else:
            pair = (slope, value) if use.kind == "left" else (value, slope)
            left.append(wide(pair[0]))
            right.append(wide(pair[1]))
    return Factors(
        *(jnp.concatenate(parts) if parts else None for parts in (left, right, rows, taken))
    )


def _factor_size(tokens: tuple[int, int], shape: Sequence[int]) -> int:
    multiplied, taken = tokens
    return multiplied * sum(shape) + taken * (shape[1] + 1)


def _blocks(
    partition: Partition, params: PyTree, examples: PyTree, memory: int, work: int
) -> Iterator[tuple[slice, _Parts]]:
    """The parts of all examples, as many at once as fit in the memory."""
    for block, some in batches_of(examples, memory // partition.kept):
        # One backward pass holds more than it leaves behind.
        batches = over_batches(partial(partition.parts, params), some, work // partition.traced)
        parts = [batch for _, batch in batches]
        yield block, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _scales(
    partition: Partition, params: PyTree, scale: Float[Array, " weight"] | None
) -> dict[int, Array | None]:
    """The part of the scale that belongs to each matrix, and to what is direct."""
    names = [*partition.shapes, DIRECT]
    if scale is None:
        return dict.fromkeys(names)
    leaves = jax.tree.leaves(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = [scale[end - leaf.size : end] for leaf, end in zip(leaves, ends, strict=True)]
    matrices = {at: parts[at].reshape(shape) for at, shape in partition.shapes.items()}
    direct = [parts[at] for at in partition.direct]
    return {**matrices, DIRECT: jnp.concatenate(direct) if direct else jnp.zeros(0)}


def _ways(partition: Partition, counts: tuple[int, int], *, scaled: bool) -> dict[int, Way]:
    """The cheaper way for each matrix, by its multiplications and how fast they are."""
    pairs, examples = counts[0] * counts[1], sum(counts)
    ways: dict[int, Way] = {}
    for at, shape in partition.shapes.items():
        (multiplied, taken), size = partition.tokens[at], math.prod(shape)
        written = SLOWER * (pairs * size + examples * multiplied * size)
        by_token = pairs * multiplied**2 * sum(shape)
        by_row = pairs * taken**2 * shape[1]
        if not taken and not scaled and by_token < written:
            ways[at] = Way("tokens", shape, 2 * multiplied**2)
        elif not multiplied and by_row < written:
            ways[at] = Way("rows", shape, taken**2)
        else:
            ways[at] = Way("written", shape, size)
    factors = sum(_factor_size(partition.tokens[at], way.shape) for at, way in ways.items())
    width = partition.kept // 4 - factors
    return {**ways, DIRECT: Way("direct", (1, width), 1)}


def _products(
    ways: dict[int, Way], trains: _Parts, queries: _Parts, scales: dict[int, Any], memory: int
) -> Float[np.ndarray, "train query"]:
    total = np.zeros((len(trains[DIRECT]), len(queries[DIRECT])))
    for name, way in ways.items():
        products, side = np.zeros(total.shape), way.side(memory)
        for columns, few in batches_of(queries[name], side):
            prepared = way.prepared(few)
            for rows, some in batches_of(trains[name], side):
                block = way.multiplied(way.prepared(some), prepared, scales[name])
                products[rows, columns] = np.asarray(block, float)
        total += products
    return total


def _norms(
    ways: dict[int, Way], parts: _Parts, scales: dict[int, Any], memory: int
) -> Float[np.ndarray, " example"]:
    total = np.zeros(len(parts[DIRECT]))
    for name, way in ways.items():
        norms = np.zeros(total.shape)
        for rows, some in batches_of(parts[name], way.side(memory)):
            norms[rows] = np.asarray(way.norms(way.prepared(some), scales[name]), float)
        total += norms
    return total
