"""EK-FAC: linear layers' Gauss-Newton matrix in a Kronecker eigenbasis, eigenvalues corrected.

A linear layer's gradient on one example is ``sum_t d_t a_t^T`` over what enters it (``a``, with a 1
for the bias) and the slopes of what leaves it (``d``). The layer's block of the curvature is taken
to be diagonal in the basis of the eigenvectors of ``E[a a^T]`` and ``E[d d^T]`` (K-FAC: Martens and
Grosse 2015, arXiv 1503.05671), with the mean squared coordinates of gradients as eigenvalues
(George et al. 2018, arXiv 1806.03884); blocks of different layers are taken to be independent
(Grosse et al. 2023, arXiv 2308.03296, section 3.1). The layers are read from the trace of the
network's outputs, so any network has them. Gradients are written out one layer and a batch of
examples at a time, in float32.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bayes_simfluence.attribution.gradients.checkpoints import check_finite
from bayes_simfluence.attribution.gradients.linear_layers import (
    Layer,
    layers_of,
    probes_of,
    with_probes,
)
from bayes_simfluence.attribution.influence.curvature import Operands, output_slopes
from bayes_simfluence.attribution.influence.problem import SHARE_OF_MEAN, Problem, Solved, regular
from bayes_simfluence.checks import Misuse, positive_integer, shorten
from bayes_simfluence.networks.layers import wide
from bayes_simfluence.recording.batches import batches_of
from bayes_simfluence.tasks.task import Functions

BATCH = 8
"""Examples whose activations and gradients of one layer are held at once."""

MOST_SIDE = 16384
"""Inputs or outputs of a layer up to which their covariance is factored; the output layer over a
large vocabulary is longer."""

Layers = Mapping[int, Layer]
Blocks = dict[int, Float[Array, "..."]]
"""An array for each layer, by the number of its matrix among the trained parameters."""
Entered = Blocks  # rows of what enters each layer
Slopes = Blocks  # rows of the slopes of what leaves it


class Bases(NamedTuple):
    """Eigenvectors, as columns, of what enters and of the slopes of what leaves each layer."""

    inward: Blocks
    outward: Blocks


@dataclass(frozen=True)
class EKFAC:
    """Eigenvalue-corrected Kronecker factors of the linear layers that train.

    What trains besides them (embeddings, norms, an output layer that shares its matrix with the
    embeddings or has more than ``MOST_SIDE`` outputs) is left out of the scores, as published, and
    listed in their attributes.

    Attributes:
        draws: random slopes of the outputs for each example, whose mean is the Gauss-Newton matrix;
            None = all, exactly. A single draw is exact for two classes.
    """

    draws: int | None = 1

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``.

        Raises:
            Misuse: the Hessian, adapters, no linear layer that trains.
        """
        if self.draws is not None:
            positive_integer("draws", self.draws)
        layers, names = _covered(problem), _names(problem.params)
        passes = _Passes(problem.task.functions, tuple(layers.items()), self.draws)
        bases = _bases(problem, passes)
        inverses, damping = _inverses(problem, _eigenvalues(problem, passes, bases), names)
        covered = sum(math.prod(_block_shape(layer)) for layer in layers.values())
        members = {at for leaf, layer in layers.items() for at in (leaf, layer.bias)}
        left_out = [name for at, name in enumerate(names) if at not in members]
        attributes = {
            "solver": "EK-FAC",
            "draws": "all" if self.draws is None else self.draws,
            "precision": "float32",
            "layers": len(layers),
            "weights_covered": covered,
            "weights_left_out": problem.width - covered,
            "tensors_left_out": shorten(sorted(left_out), 1000),
            "damping": damping,
        }
        return _products(problem, passes, bases, inverses), attributes


def _covered(problem: Problem) -> Layers:
    """The linear layers whose own weights train.

    Raises:
        Misuse: the Hessian, weights made of others (adapters), no such layer.
    """
    task, params = problem.task, problem.params
    problem.check_ggn("EK-FAC")
    weights = jax.eval_shape(task.weights, params, task.frozen)
    made = sorted(set(_names(params)) - set(_names(weights)))
    if made:
        raise Misuse(
            "solver",
            got=f"EK-FAC for trained parameters that are no tensors of the network: {made[0]}",
            expected="linear layers whose own weights train",
            do="take InGram(), Arnoldi or ConjugateGradient",
        )
    example = jax.tree.map(lambda leaf: leaf[0], task.train)
    closed = jax.make_jaxpr(task.functions.outputs_at)(params, task.frozen, example)
    leaves = len(jax.tree.leaves(params))
    layers = {
        leaf: layer
        for leaf, layer in layers_of(closed, leaves).items()
        if not layer.taken and max(layer.shape) <= MOST_SIDE
    }
    if not layers:
        raise Misuse(
            "solver",
            got=f"EK-FAC where none of the {leaves} trained parameters is a linear layer's matrix",
            expected="at least one matrix that only multiplies vectors",
            do="take InGram(), Arnoldi or ConjugateGradient",
        )
    return layers


def _names(params: PyTree) -> list[str]:
    """Names of the parameters in the order of the leaves."""
    paths = jax.tree.leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _block_shape(layer: Layer) -> tuple[int, int]:
    """Of a layer's gradient, outward x inward, the bias as its last column."""
    outward = layer.uses[0].outward
    return outward, math.prod(layer.shape) // outward + (layer.bias is not None)


@dataclass(frozen=True)
class _Passes:
    """Forward and backward passes of one example that keep what the layers' gradients are of."""

    task: Functions
    layers_by_leaf: tuple[tuple[int, Layer], ...]
    draws: int | None

    @property
    def layers(self) -> Layers:
        """The layers by the number of their matrix."""
        return dict(self.layers_by_leaf)

    def pseudo(
        self, params: PyTree, frozen: PyTree, example: PyTree, key: jax.Array
    ) -> tuple[Entered, Slopes]:
        """What enters the layers, and the layers' slopes for slopes drawn for the outputs
        (a leading axis of draws)."""
        outputs, pull, entered = self._passed(params, frozen, example)
        slopes = output_slopes(self.task, outputs, example, key, self.draws)
        return entered, jax.vmap(lambda slope: _rows(pull(slope)[0]))(slopes)

    def rotated(
        self, params: PyTree, frozen: PyTree, bases: Bases, example: PyTree
    ) -> tuple[Blocks, Float[Array, ""]]:
        """The layers' gradients of the example's loss in their eigenbases, and the sum of all
        coordinates: it is finite where they are."""
        outputs, pull, entered = self._passed(params, frozen, example)
        slope = jax.grad(self.task.output_loss)(outputs, example)  # type: ignore[arg-type]
        slopes = _rows(pull(slope)[0])
        blocks = {
            leaf: _rotated(entered[leaf], slopes[leaf], bases.inward[leaf], bases.outward[leaf])
            for leaf in self.layers
        }
        return blocks, jnp.stack([block.sum() for block in blocks.values()]).sum()

    def _passed(
        self, params: PyTree, frozen: PyTree, example: PyTree
    ) -> tuple[Array, Any, Entered]:
        closed = jax.make_jaxpr(self.task.outputs_at)(params, frozen, example)
        leaves = len(jax.tree.leaves(params))
        args = jax.tree.leaves((params, frozen, example))

        def outputs(probes: dict[int, list[Array]]) -> tuple[Array, dict[int, list[Array]]]:
            (value,), entered = with_probes(closed, leaves, args, probes)
            return value, entered

        value, pull, entered = jax.vjp(outputs, probes_of(self.layers), has_aux=True)
        rows = _rows(entered)
        for leaf, layer in self.layers.items():
            if layer.bias is not None:
                rows[leaf] = jnp.pad(rows[leaf], ((0, 0), (0, 1)), constant_values=1.0)
        return value, pull, rows


def _rows(uses: dict[int, list[Array]]) -> Blocks:
    """Rows of all uses of each layer, one use after the other."""
    return {leaf: wide(jnp.concatenate(arrays)) for leaf, arrays in uses.items()}


Summand = Callable[[Bases | None, Entered, Slopes], PyTree]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _summed(
    passes: _Passes,
    summand: Summand,
    start: PyTree,
    bases: Bases | None,
    operands: Operands,
    keys: jax.Array,
) -> PyTree:
    """``start`` plus ``summand(bases, entered, slopes)`` of all training examples, in batches.

    The arguments of the summand have a leading axis of examples; its pseudo slopes are 0 for the
    examples that fill the last batch up.
    """
    params, frozen, examples = operands
    size = len(keys)
    batch = min(BATCH, size)
    numbers = jnp.arange(-(-size // batch) * batch).reshape(-1, batch)

    def step(total: PyTree, at: Int[Array, " batch"]) -> tuple[PyTree, None]:
        rows = jnp.minimum(at, size - 1)
        some = jax.tree.map(lambda leaf: leaf[rows], examples)
        entered, slopes = jax.vmap(passes.pseudo, (None, None, 0, 0))(
            params, frozen, some, keys[rows]
        )
        counts = (at < size)[:, None, None, None]
        slopes = {leaf: jnp.where(counts, block, 0.0) for leaf, block in slopes.items()}
        return jax.tree.map(jnp.add, total, summand(bases, entered, slopes)), None

    return jax.lax.scan(step, start, numbers)[0]


def _covariances(_: Any, entered: Entered, slopes: Slopes) -> tuple[Blocks, Blocks]:
    """Of what enters and of pseudo slopes; a row that no slope reaches (padding) is left out."""
    inward, outward = {}, {}
    for leaf, d in slopes.items():
        reached = (d != 0).any(axis=(1, 3))
        a = jnp.where(reached[:, :, None], entered[leaf], 0.0)
        inward[leaf] = jnp.einsum("pri,prj->ij", a, a)
        outward[leaf] = jnp.einsum("psri,psrj->ij", d, d)
    return inward, outward


def _squares(bases: Any, entered: Entered, slopes: Slopes) -> Blocks:
    """Of the coordinates of pseudo gradients."""
    of_draws = jax.vmap(_rotated, in_axes=(None, 0, None, None))
    of_examples = jax.vmap(of_draws, in_axes=(0, 0, None, None))
    return {
        leaf: jnp.square(
            of_examples(entered[leaf], d, bases.inward[leaf], bases.outward[leaf])
        ).sum(axis=(0, 1))
        for leaf, d in slopes.items()
    }


def _bases(problem: Problem, passes: _Passes) -> Bases:
    """Eigenvectors of the covariances of what enters and of pseudo slopes."""
    start = tuple(
        {leaf: jnp.zeros((_block_shape(layer)[axis],) * 2) for leaf, layer in passes.layers.items()}
        for axis in (1, 0)
    )
    keys = jax.random.split(problem.key, len(problem.task.train_ids))
    sums = _summed(passes, _covariances, start, None, problem.operands, keys)
    names = _names(problem.params)
    for leaf, matrix in (*sums[0].items(), *sums[1].items()):
        if not np.isfinite(matrix).all():
            problem.blame(f"The covariance of layer {names[leaf].removesuffix('.weight')}")
    return Bases(
        *(
            jax.tree.map(lambda matrix: jnp.asarray(np.linalg.eigh(matrix)[1]), some)
            for some in sums
        )
    )


def _rotated(
    entered: Float[Array, "row inward"],
    slopes: Float[Array, "row outward"],
    inward: Float[Array, "inward inward"],
    outward: Float[Array, "outward outward"],
) -> Float[Array, "outward inward"]:
    """A gradient in the eigenbasis; rows are turned, or the gradient where that is less work."""
    rows, (across, high) = len(entered), (len(inward), len(outward))
    if rows * (across**2 + high**2) <= across * high * (rows + across + high):
        return (slopes @ outward).T @ (entered @ inward)
    return outward.T @ (slopes.T @ entered) @ inward


def _eigenvalues(problem: Problem, passes: _Passes, bases: Bases) -> Blocks:
    """Mean squared coordinates of the pseudo gradients: the corrected eigenvalues."""
    start = {leaf: jnp.zeros(_block_shape(layer)) for leaf, layer in passes.layers.items()}
    keys = jax.random.split(problem.key, len(problem.task.train_ids))
    sums = _summed(passes, _squares, start, bases, problem.operands, keys)
    return {leaf: block / len(problem.task.train_ids) for leaf, block in sums.items()}


def _inverses(problem: Problem, values: Blocks, names: list[str]) -> tuple[Blocks, Any]:
    """One over the damped eigenvalues, and the damping: a number, or one for each layer."""
    inverses, dampings = {}, []
    for leaf, block in values.items():
        name, damping = names[leaf].removesuffix(".weight"), problem.damping
        if damping is None:
            damping = SHARE_OF_MEAN * float(block.mean())
        smallest, largest = float(block.min()) + damping, float(block.max()) + damping
        regular(smallest, largest, damping, f"ggn of layer {name}")
        inverses[leaf] = 1.0 / (block + damping)
        dampings.append(f"{name} {damping:.6g}")
    if problem.damping is None:
        return inverses, f".1 of each layer's mean eigenvalue: {', '.join(dampings)}"
    return inverses, problem.damping


@partial(jax.jit, static_argnums=0)
def _of_queries(
    passes: _Passes,
    params: PyTree,
    frozen: PyTree,
    bases: Bases,
    inverses: Blocks,
    examples: PyTree,
) -> tuple[Blocks, Float[Array, " query"]]:
    def of_query(example: PyTree) -> tuple[Blocks, Float[Array, ""]]:
        blocks, total = passes.rotated(params, frozen, bases, example)
        return {leaf: block * inverses[leaf] for leaf, block in blocks.items()}, total

    return jax.lax.map(of_query, examples)


@partial(jax.jit, static_argnums=0)
def _of_trains(
    passes: _Passes, params: PyTree, frozen: PyTree, bases: Bases, solved: Blocks, examples: PyTree
) -> tuple[Float[Array, "query train"], Float[Array, " train"]]:
    blocks, totals = jax.vmap(lambda example: passes.rotated(params, frozen, bases, example))(
        examples
    )
    # Queries first and rows flat: the products are 15 times faster than in another order.
    parts = [
        solved[leaf].reshape(len(solved[leaf]), -1) @ block.reshape(len(block), -1).T
        for leaf, block in blocks.items()
    ]
    return sum(parts[1:], start=parts[0]), totals


def _products(
    problem: Problem, passes: _Passes, bases: Bases, inverses: Blocks
) -> Float[np.ndarray, "train query"]:
    """Products of all gradients, queries in groups whose rotated gradients fit into memory."""
    task = problem.task
    products = np.zeros((len(task.train_ids), len(task.query_ids)))
    covered = 4 * sum(math.prod(_block_shape(layer)) for layer in passes.layers.values())
    at, where, done = (passes, problem.params, task.frozen, bases), "the given weights", 0
    for columns, queries in batches_of(task.query, problem.memory // covered):
        solved, totals = _of_queries(*at, inverses, queries)
        check_finite(task, where, query=totals, start=columns.start)
        for rows, trains in batches_of(task.train, BATCH):
            block, totals = _of_trains(*at, solved, trains)
            check_finite(task, where, train=totals, start=rows.start)
            products[rows, columns] = np.asarray(block, float).T
        problem.meter.advance(columns.stop - done)
        done = columns.stop
    return products
