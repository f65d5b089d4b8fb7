"""Inner products of gradients without whole gradients.

A matrix that multiplies vectors has the gradient ``sum_t d_t x_t^T`` (what entered, and the
gradient of what left, at each token t), so the product of two examples' gradients is
``sum_ts (x_it . x_js) (d_it . d_js)`` and nobody needs to write either out. Where sequences are
long it is cheaper to write the gradients of one matrix at a time. Tables of which rows are taken
(embeddings) meet only in rows that both examples take. Everything else (norms, biases, adapters,
matrices used in other ways) is small, and differentiated directly.
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
from bayes_simfluence.attribution.gradients.gradients import MEMORY, Products, flat
from bayes_simfluence.attribution.gradients.linear_layers import Use, rerun, trace_bytes, uses_of
from bayes_simfluence.networks.layers import wide
from bayes_simfluence.progress import Meter
from bayes_simfluence.recording.batches import pieces_of
from bayes_simfluence.tasks.task import Task

__all__ = ["Gram", "Layers", "layer_gram", "layer_products", "layers_of", "squared_norms"]


DIRECT = -1
"""Stands for all leaves without factors together, among the numbers of leaves."""

SLOWER = 5
"""Times that a multiplication takes longer on gradients that are written out than on factors: they
are bound by memory (measured on a CPU at the sizes of MiniLM)."""


class _Parts(NamedTuple):
    """The gradients of several examples, taken apart; a pytree."""

    matrices: dict[int, Factors]
    direct: Float[Array, "example weight"]


@dataclass(frozen=True)
class Layers:
    """How the gradients of a task are taken apart; keep it, so that all points share compilations.

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


def layers_of(task: Task) -> Layers:
    """Find out how a task's loss uses its parameters; nothing is computed."""
    leaves = [jnp.asarray(one) for one in jax.tree.leaves(task.params)]
    every = range(len(leaves))
    tokens, factored, traced = dict.fromkeys(every, (0, 0)), set(every), 1
    for examples in (task.train, task.query):
        one = jax.eval_shape(partial(jax.tree.map, lambda leaf: leaf[0]), examples)
        closed = _traced(task, leaves, task.frozen, one)
        uses, others = uses_of(closed, len(leaves))
        factored &= {use.leaf for use in uses} - others
        tokens = {at: _longer(tokens[at], _tokens(uses, at)) for at in every}
        traced = max(traced, trace_bytes(closed))
    # Factors larger than the gradient itself save nothing.
    shapes = {
        at: (leaves[at].shape[0], leaves[at].shape[1])
        for at in sorted(factored)
        if _factor_size(tokens[at], leaves[at].shape) < leaves[at].size
    }
    direct = tuple(at for at in every if at not in shapes)
    kept = sum(_factor_size(tokens[at], shape) for at, shape in shapes.items())
    kept += sum(leaves[at].size for at in direct)
    made = _maker(task, direct)
    return Layers(
        shapes=shapes,
        tokens={at: tokens[at] for at in shapes},
        direct=direct,
        parts=lambda params, examples: made(params, task.frozen, examples),
        kept=4 * kept,
        traced=traced,
    )


def layer_products(
    task: Task,
    params: PyTree,
    *,
    layers: Layers | None = None,
    scale: Float[Array, " weight"] | None = None,
    memory: int = MEMORY,
    meter: Meter | None = None,
) -> Products:
    """Inner products of every training example's gradient with every query's.

    The same numbers as ``gradients.gradient_products``, the plain reference.

    Args:
        params: the trained parameters at which gradients are taken.
        layers: of this task, to share compilations between points.
        scale: a positive weight for each coordinate (the diagonal of a preconditioner); all norms
            are then in that metric.
        memory: bytes held at once, about: half for work, most of the rest for the queries. Where
            they do not fit, the training examples are gone through again for each part of them.
        meter: told of every pair of examples.
    """
    layers = layers or layers_of(task)
    counts = len(task.train_ids), len(task.query_ids)
    scales = _scales(layers, params, scale)
    ways = _ways(layers, counts, scaled=scale is not None)
    found = Products(np.zeros(counts), np.zeros(counts[0]), np.zeros(counts[1]))
    new = np.ones(counts, bool)
    for columns, queries in _blocks(layers, params, task.query, 3 * memory // 8, memory // 2):
        found.query[columns] = _norms(ways, queries, scales, memory // 2)
        for rows, trains in _blocks(layers, params, task.train, memory // 8, memory // 2):
            if columns.start == 0:
                found.train[rows] = _norms(ways, trains, scales, memory // 2)
            found.products[rows, columns] = _products(ways, trains, queries, scales, memory // 2)
            if meter is not None:
                done = np.count_nonzero(new[rows, columns])
                new[rows, columns] = False
                meter.advance(int(done))
    return found


class Gram(NamedTuple):
    """All inner products of a task's gradients but those between two queries.

    Attributes:
        train: between training examples.
        cross: of a training example's gradient with a query's.
        query: squared norms of the queries' gradients.
    """

    train: Float[np.ndarray, "train train"]
    cross: Float[np.ndarray, "train query"]
    query: Float[np.ndarray, " query"]


def layer_gram(
    task: Task, params: PyTree, *, memory: int = MEMORY, meter: Meter | None = None
) -> Gram:
    """Inner products of the training examples' gradients with one another and with the queries'.

    Gradients of as many training examples as fit are held, and those before them are made again.

    Args:
        params: the trained parameters at which gradients are taken.
        memory: bytes held at once, about: half for work, most of the rest for gradients.
        meter: told of every pair, of two training examples twice.
    """
    layers = layers_of(task)
    trains, queries = len(task.train_ids), len(task.query_ids)
    own, across = (_ways(layers, (trains, one), scaled=False) for one in (trains, queries))
    none = _scales(layers, params, None)
    work, part = memory // 2, memory // 8
    found = Gram(np.zeros((trains, trains)), np.zeros((trains, queries)), np.zeros(queries))
    done = 0
    for here, held in _blocks(layers, params, task.train, 3 * memory // 8, work):
        found.train[here, here] = _products(own, held, held, none, work)
        if here.start:
            before = jax.tree.map(lambda leaf, end=here.start: leaf[:end], task.train)
            for rows, some in _blocks(layers, params, before, part, work):
                products = _products(own, some, held, none, work)
                found.train[rows, here] = products
                found.train[here, rows] = products.T
        for columns, some in _blocks(layers, params, task.query, part, work):
            found.cross[here, columns] = _products(across, held, some, none, work)
            found.query[columns] = _norms(across, some, none, work)
        if meter is not None:
            meter.advance((here.stop - done) * (here.stop + done + queries))
        done = here.stop
    return found


def squared_norms(
    task: Task,
    params: PyTree,
    *,
    layers: Layers | None = None,
    scale: Float[Array, " weight"] | None = None,
    memory: int = MEMORY,
    meter: Meter | None = None,
) -> Float[np.ndarray, " train"]:
    """Squared norms of the training examples' gradients; arguments as for ``layer_products``.

    The meter is told of every example.
    """
    layers = layers or layers_of(task)
    count = len(task.train_ids)
    scales = _scales(layers, params, scale)
    ways = _ways(layers, (count, 1), scaled=scale is not None)
    found, done = np.zeros(count), 0
    for rows, trains in _blocks(layers, params, task.train, memory // 8, memory // 2):
        found[rows] = _norms(ways, trains, scales, memory // 2)
        if meter is not None:
            meter.advance(rows.stop - done)
        done = rows.stop
    return found


def _traced(task: Task, leaves: Sequence[Any], frozen: PyTree, example: PyTree) -> Any:
    """The trace of one example's loss; its first arguments are the leaves of the parameters."""
    structure = jax.tree.structure(task.params)

    def loss(leaves: Sequence[Any], frozen: PyTree, example: PyTree) -> Float[Array, ""]:
        return task.loss(task.weights(jax.tree.unflatten(structure, leaves), frozen), example)

    return jax.make_jaxpr(loss)(list(leaves), frozen, example)


def _maker(task: Task, direct: Sequence[int]) -> Callable[[PyTree, PyTree, PyTree], _Parts]:
    def one(leaves: Sequence[Array], frozen: PyTree, example: PyTree) -> _Parts:
        closed = _traced(task, leaves, frozen, example)
        rest = jax.tree.leaves((frozen, example))
        uses = [use for use in uses_of(closed, len(leaves))[0] if use.leaf not in direct]

        def run(
            probes: list[Array], free: dict[int, Array]
        ) -> tuple[Float[Array, ""], list[Array]]:
            entered: list[Array] = []
            waiting = iter(probes)

            def watch(use: Use, value: Array, left: Array) -> Array:
                if use.leaf in direct:
                    return left
                entered.append(value)
                return left + next(waiting)

            args = [free.get(at, leaf) for at, leaf in enumerate(leaves)]
            (loss,) = rerun(closed, len(leaves), [*args, *rest], watch)
            return loss, entered

        # The gradient of a probe of zeros is that of what it is added to.
        probes = [jnp.zeros((use.tokens, use.outward), use.dtype) for use in uses]
        free = {at: leaves[at] for at in direct}
        (slopes, gradients), entered = jax.grad(run, argnums=(0, 1), has_aux=True)(probes, free)
        seen = list(zip(uses, entered, slopes, strict=True))
        places = sorted({use.leaf for use in uses})
        matrices = {at: _factors([one for one in seen if one[0].leaf == at]) for at in places}
        return _Parts(matrices, flat(gradients) if gradients else jnp.zeros(0))

    @jax.jit
    def made(params: PyTree, frozen: PyTree, examples: PyTree) -> _Parts:
        leaves = jax.tree.leaves(params)
        return jax.vmap(lambda example: one(leaves, frozen, example))(examples)

    return made


def _factors(seen: Sequence[tuple[Use, Array, Array]]) -> Factors:
    """The uses of one matrix together, one after the other in the axis of tokens."""
    left, right, rows, slopes = [], [], [], []
    for use, entered, slope in seen:
        if use.kind == "rows":
            rows.append(entered)
            slopes.append(wide(slope))
        else:
            pair = (slope, entered) if use.kind == "left" else (entered, slope)
            left.append(wide(pair[0]))
            right.append(wide(pair[1]))
    return Factors(*(jnp.concatenate(one) if one else None for one in (left, right, rows, slopes)))


def _tokens(uses: Sequence[Use], leaf: int) -> tuple[int, int]:
    mine = [use for use in uses if use.leaf == leaf]
    taken = sum(use.tokens for use in mine if use.kind == "rows")
    return sum(use.tokens for use in mine) - taken, taken


def _longer(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])


def _factor_size(tokens: tuple[int, int], shape: Sequence[int]) -> int:
    multiplied, taken = tokens
    return multiplied * sum(shape) + taken * (shape[1] + 1)


def _blocks(
    layers: Layers, params: PyTree, examples: PyTree, memory: int, work: int
) -> Iterator[tuple[slice, _Parts]]:
    """The parts of all examples, as many at once as fit in the memory."""
    for block, some in pieces_of(examples, memory // layers.kept):
        # One backward pass holds more than it leaves behind.
        made, done = [], 0
        for piece, few in pieces_of(some, work // layers.traced):
            parts = layers.parts(params, few)
            made.append(jax.tree.map(lambda leaf, at=done - piece.start: leaf[at:], parts))
            done = piece.stop
        yield block, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *made)


def _scales(
    layers: Layers, params: PyTree, scale: Float[Array, " weight"] | None
) -> dict[int, Array | None]:
    """The part of the scale that belongs to each matrix, and to what is direct."""
    names = [*layers.shapes, DIRECT]
    if scale is None:
        return dict.fromkeys(names)
    leaves = jax.tree.leaves(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = [scale[end - leaf.size : end] for leaf, end in zip(leaves, ends, strict=True)]
    found = {at: parts[at].reshape(shape) for at, shape in layers.shapes.items()}
    direct = [parts[at] for at in layers.direct]
    return {**found, DIRECT: jnp.concatenate(direct) if direct else jnp.zeros(0)}


def _ways(layers: Layers, counts: tuple[int, int], *, scaled: bool) -> dict[int, Way]:
    """The cheaper way for each matrix, by its multiplications and how fast they are."""
    pairs, each = counts[0] * counts[1], sum(counts)
    found: dict[int, Way] = {}
    for at, shape in layers.shapes.items():
        (multiplied, taken), size = layers.tokens[at], math.prod(shape)
        written = SLOWER * (pairs * size + each * multiplied * size)
        by_token = pairs * multiplied**2 * sum(shape)
        by_row = pairs * taken**2 * shape[1]
        if not taken and not scaled and by_token < written:
            found[at] = Way("tokens", shape, 2 * multiplied**2)
        elif not multiplied and by_row < written:
            found[at] = Way("rows", shape, taken**2)
        else:
            found[at] = Way("written", shape, size)
    width = layers.kept // 4 - sum(_factor_size(layers.tokens[at], found[at].shape) for at in found)
    return {**found, DIRECT: Way("direct", (1, width), 1)}


def _part(parts: _Parts, name: int) -> Any:
    return parts.direct if name == DIRECT else parts.matrices[name]


def _products(
    ways: dict[int, Way], trains: _Parts, queries: _Parts, scales: dict[int, Any], memory: int
) -> Float[np.ndarray, "train query"]:
    total = np.zeros((len(trains.direct), len(queries.direct)))
    for name, way in ways.items():
        found, side = np.zeros(total.shape), way.side(memory)
        for columns, few in pieces_of(_part(queries, name), side):
            prepared = way.prepared(few)
            for rows, some in pieces_of(_part(trains, name), side):
                block = way.multiplied(way.prepared(some), prepared, scales[name])
                found[rows, columns] = np.asarray(block, float)
        total += found
    return total


def _norms(
    ways: dict[int, Way], parts: _Parts, scales: dict[int, Any], memory: int
) -> Float[np.ndarray, " example"]:
    total = np.zeros(len(parts.direct))
    for name, way in ways.items():
        found = np.zeros(total.shape)
        for rows, some in pieces_of(_part(parts, name), way.side(memory)):
            found[rows] = np.asarray(way.norms(way.prepared(some), scales[name]), float)
        total += found
    return total
