"""EK-FAC: linear layers' Gauss-Newton matrix in a Kronecker eigenbasis, eigenvalues corrected.

A linear layer's gradient on one example is ``sum_t d_t a_t^T`` over what enters it (``a``, with a 1
for the bias) and the slopes of what leaves it (``d``). The layer's block of the curvature is taken
to be diagonal in the basis of the eigenvectors of ``E[a a^T]`` and ``E[d d^T]`` (K-FAC: Martens and
Grosse 2015, arXiv 1503.05671), with the mean squared coordinates of gradients as eigenvalues
(George et al. 2018, arXiv 1806.03884); blocks of different layers are taken to be independent
(Grosse et al. 2023, arXiv 2308.03296, section 3.1). Gradients are written out one layer and a piece
of examples at a time, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.attribution.influence.curvature import output_slopes
from bayes_simfluence.attribution.influence.problem import (
    SHARE_OF_MEAN,
    Problem,
    Solved,
    check_finite,
    regular,
)
from bayes_simfluence.checks import Misuse, positive_integer, shorten
from bayes_simfluence.networks.layers import watching
from bayes_simfluence.recording.batches import pieces_of
from bayes_simfluence.tasks.task import Task

__all__ = ["EKFAC", "Layer", "Layers", "layers_of"]

PIECE = 8
"""Examples whose activations and gradients of one layer are held at once."""


class Layer(NamedTuple):
    """A linear layer that trains.

    Attributes:
        inward, outward: sizes of what enters (without the 1 of the bias) and of what leaves.
        bias: whether a bias trains with it.
        calls: rows of each call of it on one example.
    """

    inward: int
    outward: int
    bias: bool
    calls: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the gradient, the bias as its last column."""
        return self.outward, self.inward + self.bias


Layers = dict[str, Layer]
Blocks = dict[str, Float[Array, "..."]]
Entered = Blocks  # rows of what enters each layer
Slopes = Blocks  # rows of the slopes of what leaves it


class Bases(NamedTuple):
    """Eigenvectors, as columns, of what enters and of the slopes of what leaves each layer."""

    inward: Blocks
    outward: Blocks


@dataclass(frozen=True)
class EKFAC:
    """Eigenvalue-corrected Kronecker factors of the linear layers that train.

    What trains besides them (embeddings, norms) is left out of the scores, as published, and
    counted in the attributes.

    Attributes:
        draws: random slopes of the outputs for each example, whose mean is the Gauss-Newton matrix;
            None = all, exactly. One draw is exact for two classes.
    """

    draws: int | None = 1

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``.

        Raises:
            Misuse: the Hessian, adapters, no linear layer that trains.
        """
        if self.draws is not None:
            positive_integer("draws", self.draws)
        layers = layers_of(problem)
        passes = _Passes(problem.task, layers, self.draws)
        bases = _bases(problem, passes)
        values = _eigenvalues(problem, passes, bases)
        inverses, damping = _inverses(problem, values)
        covered = sum(np.prod(one.shape) for one in layers.values())
        said = {
            "solver": "EK-FAC",
            "draws": "all" if self.draws is None else self.draws,
            "precision": "float32",
            "layers": len(layers),
            "weights_covered": int(covered),
            "weights_left_out": int(problem.width - covered),
            "tensors_left_out": shorten(_left_out(problem.task, layers), 1000),
            "damping": damping,
        }
        return _products(problem, passes, bases, inverses), said


def layers_of(problem: Problem) -> Layers:
    """The linear layers whose own weights train, found by one abstract pass.

    Raises:
        Misuse: the Hessian, weights made of others (adapters), no such layer.
    """
    task, params = problem.task, problem.params
    if problem.curvature != "ggn":
        raise Misuse(
            "curvature",
            got="'hessian' with EK-FAC",
            expected="'ggn', whose mean its factors are",
            do="pass curvature='ggn', or take another solver",
        )
    known = jax.eval_shape(task.weights, params, task.frozen)
    made = sorted(set(params) - set(known)) if _both_flat(params, known) else ["weights"]
    if made:
        raise Misuse(
            "solver",
            got=f"EK-FAC for trained parameters that are no tensors of the network: {made[0]}",
            expected="linear layers whose own weights train",
            do="take InSpan(), Arnoldi or ConjugateGradient",
        )
    found: dict[str, list[tuple[int, ...]]] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def watch(name: str, value: Array, product: Array) -> Array:
        found.setdefault(name, []).append(product.shape[:-1])
        sizes[name] = value.shape[-1], product.shape[-1]
        return product

    one = jax.tree.map(lambda leaf: leaf[0], task.train)
    with watching(watch):
        # A function of its own: JAX would not call again what it has traced before.
        jax.eval_shape(lambda *at: task.outputs(*at), known, one)  # type: ignore[misc]
    layers = {
        name: Layer(*sizes[name], f"{name}.bias" in params, tuple(calls))
        for name, calls in found.items()
        if f"{name}.weight" in params
    }
    if not layers:
        raise Misuse(
            "solver",
            got=f"EK-FAC where none of the {len(found)} watched linear layers trains",
            expected="at least one layers.dense whose weight is among task.params",
            do="take InSpan(), Arnoldi or ConjugateGradient",
        )
    return layers


def _both_flat(params: PyTree, known: PyTree) -> bool:
    return isinstance(params, Mapping) and isinstance(known, Mapping)


def _left_out(task: Task, layers: Layers) -> list[str]:
    covered = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    return sorted(set(task.params) - covered)


@dataclass(frozen=True)
class _Passes:
    """Forward and backward passes of one example that keep what the layers' gradients are of."""

    task: Task
    layers: Layers
    draws: int | None

    def pseudo(
        self, params: PyTree, frozen: PyTree, example: PyTree, key: jax.Array
    ) -> tuple[Entered, Slopes]:
        """What enters the layers, and the layers' slopes for slopes drawn for the outputs
        (a leading axis of draws)."""
        outputs, pull, entered = self._passed(params, frozen, example)
        slopes = output_slopes(self.task, outputs, example, key, self.draws)
        found = jax.vmap(lambda one: self._rows(pull(one)[0]))(slopes)
        return entered, found

    def true(self, params: PyTree, frozen: PyTree, example: PyTree) -> tuple[Entered, Slopes]:
        """What enters the layers, and the slopes of the example's loss."""
        outputs, pull, entered = self._passed(params, frozen, example)
        slope = jax.grad(self.task.output_loss)(outputs, example)  # type: ignore[arg-type]
        return entered, self._rows(pull(slope)[0])

    def _passed(
        self, params: PyTree, frozen: PyTree, example: PyTree
    ) -> tuple[Array, Any, Entered]:
        probes = {
            name: [jnp.zeros((*rows, layer.outward)) for rows in layer.calls]
            for name, layer in self.layers.items()
        }

        def probed(probes: dict[str, list[Array]]) -> tuple[Array, dict[str, list[Array]]]:
            entered: dict[str, list[Array]] = {name: [] for name in self.layers}

            def watch(name: str, value: Array, product: Array) -> Array:
                if name not in entered:
                    return product
                entered[name].append(value.astype(jnp.float32))
                return product + probes[name][len(entered[name]) - 1].astype(product.dtype)

            with watching(watch):
                outputs = self.task.outputs(self.task.weights(params, frozen), example)  # type: ignore[misc]
            return outputs, entered

        outputs, pull, entered = jax.vjp(probed, probes, has_aux=True)
        rows = self._rows(entered)
        for name, layer in self.layers.items():
            if layer.bias:
                rows[name] = jnp.pad(rows[name], ((0, 0), (0, 1)), constant_values=1.0)
        return outputs, pull, rows

    def _rows(self, calls: dict[str, list[Array]]) -> Blocks:
        """Rows of all calls of each layer, one call after the other."""
        return {
            name: jnp.concatenate([one.reshape(-1, one.shape[-1]) for one in some])
            for name, some in calls.items()
        }


def _scanned(step: Any, start: PyTree, examples: PyTree, keys: jax.Array) -> PyTree:
    """``step(total, examples, keys, counts)`` over pieces; the last one is filled up."""
    size = len(keys)
    piece = min(PIECE, size)
    places = jnp.arange(-(-size // piece) * piece).reshape(-1, piece)

    def one(total: PyTree, at: Int[Array, " piece"]) -> tuple[PyTree, None]:
        rows = jnp.minimum(at, size - 1)
        some = jax.tree.map(lambda leaf: leaf[rows], examples)
        return step(total, some, keys[rows], at < size), None

    return jax.lax.scan(one, start, places)[0]


def _bases(problem: Problem, passes: _Passes) -> Bases:
    """Eigenvectors of the covariances of what enters and of pseudo slopes.

    A row that no slope reaches (padding) does not count.
    """

    @jax.jit
    def covariances(
        params: PyTree, frozen: PyTree, examples: PyTree, keys: jax.Array
    ) -> tuple[Blocks, Blocks]:
        def step(total: tuple[Blocks, Blocks], some: PyTree, keys: Any, counts: Any) -> Any:
            entered, slopes = jax.vmap(lambda *one: passes.pseudo(params, frozen, *one))(some, keys)
            inward, outward = {}, {}
            for name in passes.layers:
                d = jnp.where(counts[:, None, None, None], slopes[name], 0.0)
                reached = (d != 0).any(axis=(1, 3))
                a = jnp.where(reached[:, :, None], entered[name], 0.0)
                inward[name] = total[0][name] + jnp.einsum("pri,prj->ij", a, a)
                outward[name] = total[1][name] + jnp.einsum("psri,psrj->ij", d, d)
            return inward, outward

        nothing = tuple(
            {name: jnp.zeros((layer.shape[axis],) * 2) for name, layer in passes.layers.items()}
            for axis in (1, 0)
        )
        return _scanned(step, nothing, examples, keys)

    task = problem.task
    keys = jax.random.split(problem.key, len(task.train_ids))
    sums = covariances(problem.params, task.frozen, task.train, keys)
    for name, matrix in (*sums[0].items(), *sums[1].items()):
        if not np.isfinite(matrix).all():
            problem.blame(f"The covariance of layer {name}")
    turned = (jax.tree.map(lambda one: jnp.asarray(np.linalg.eigh(one)[1]), some) for some in sums)
    return Bases(*turned)


def _rotated(
    entered: Float[Array, "row inward"],
    slopes: Float[Array, "row outward"],
    inward: Float[Array, "inward inward"],
    outward: Float[Array, "outward outward"],
) -> Float[Array, "outward inward"]:
    """A gradient in the eigenbasis; rows are turned, or the gradient where that is less work."""
    rows, (wide, high) = len(entered), (len(inward), len(outward))
    if rows * (wide**2 + high**2) <= wide * high * (rows + wide + high):
        return (slopes @ outward).T @ (entered @ inward)
    return outward.T @ (slopes.T @ entered) @ inward


def _eigenvalues(problem: Problem, passes: _Passes, bases: Bases) -> Blocks:
    """Mean squared coordinates of the pseudo gradients: the corrected eigenvalues."""

    @jax.jit
    def squares(
        params: PyTree, frozen: PyTree, bases: Bases, examples: PyTree, keys: jax.Array
    ) -> Blocks:
        def step(total: Blocks, some: PyTree, keys: Any, counts: Any) -> Blocks:
            entered, slopes = jax.vmap(lambda *one: passes.pseudo(params, frozen, *one))(some, keys)
            found = {}
            for name in passes.layers:
                of_draws = jax.vmap(_rotated, in_axes=(None, 0, None, None))
                of_examples = jax.vmap(of_draws, in_axes=(0, 0, None, None))
                coordinates = of_examples(
                    entered[name], slopes[name], bases.inward[name], bases.outward[name]
                )
                square = jnp.where(counts[:, None, None, None], jnp.square(coordinates), 0.0)
                found[name] = total[name] + square.sum(axis=(0, 1))
            return found

        nothing = {name: jnp.zeros(layer.shape) for name, layer in passes.layers.items()}
        return _scanned(step, nothing, examples, keys)

    task = problem.task
    count = len(task.train_ids)
    keys = jax.random.split(problem.key, count)
    sums = squares(problem.params, task.frozen, bases, task.train, keys)
    return {name: one / count for name, one in sums.items()}


def _inverses(problem: Problem, values: Blocks) -> tuple[Blocks, Any]:
    """One over the damped eigenvalues, and the damping: a number, or one for each layer."""
    damping = {
        name: SHARE_OF_MEAN * float(one.mean()) if problem.damping is None else problem.damping
        for name, one in values.items()
    }
    for name, one in values.items():
        smallest, largest = float(one.min()) + damping[name], float(one.max()) + damping[name]
        regular(smallest, largest, damping[name], f"ggn of layer {name}")
    inverses = {name: 1.0 / (one + damping[name]) for name, one in values.items()}
    if problem.damping is None:
        said = ", ".join(f"{name} {one:.6g}" for name, one in damping.items())
        return inverses, f".1 of each layer's mean eigenvalue: {said}"
    return inverses, problem.damping


def _products(
    problem: Problem, passes: _Passes, bases: Bases, inverses: Blocks
) -> Float[np.ndarray, "train query"]:
    """Products of all gradients, queries in groups whose turned gradients fit into memory."""
    task = problem.task

    def turned(params: PyTree, frozen: PyTree, bases: Bases, example: PyTree) -> Blocks:
        entered, slopes = passes.true(params, frozen, example)
        return {
            name: _rotated(entered[name], slopes[name], bases.inward[name], bases.outward[name])
            for name in passes.layers
        }

    @jax.jit
    def of_queries(
        params: PyTree, frozen: PyTree, bases: Bases, inverses: Blocks, examples: PyTree
    ) -> tuple[Blocks, Bool[Array, " query"]]:
        def one(example: PyTree) -> tuple[Blocks, Bool[Array, ""]]:
            found = turned(params, frozen, bases, example)
            finite = jnp.stack([jnp.isfinite(block).all() for block in found.values()]).all()
            return {name: block * inverses[name] for name, block in found.items()}, finite

        return jax.lax.map(one, examples)

    @jax.jit
    def of_trains(
        params: PyTree, frozen: PyTree, bases: Bases, solved: Blocks, examples: PyTree
    ) -> tuple[Float[Array, "query piece"], Bool[Array, " piece"]]:
        found = jax.vmap(lambda one: turned(params, frozen, bases, one))(examples)
        finite = [jnp.isfinite(one).all(axis=(1, 2)) for one in found.values()]
        # Queries first and rows flat: the products are 15 times faster than in another order.
        parts = [
            solved[name].reshape(len(solved[name]), -1) @ one.reshape(len(one), -1).T
            for name, one in found.items()
        ]
        return sum(parts[1:], start=parts[0]), jnp.stack(finite).all(axis=0)

    found = np.zeros((len(task.train_ids), len(task.query_ids)))
    covered = 4 * sum(int(np.prod(one.shape)) for one in passes.layers.values())
    at = (problem.params, task.frozen, bases)
    for columns, queries in pieces_of(task.query, problem.memory // covered):
        solved, finite = of_queries(*at, inverses, queries)
        check_finite(task, "query", columns, finite)
        for rows, trains in pieces_of(task.train, PIECE):
            products, finite = of_trains(*at, solved, trains)
            check_finite(task, "train", rows, finite)
            found[rows, columns] = np.asarray(products, float).T
        problem.meter.advance(len(finite))
    return found
