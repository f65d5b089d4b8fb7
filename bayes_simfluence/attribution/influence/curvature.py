"""Curvature of the mean training loss: products with vectors in bounded memory, and the trace.

The generalized Gauss-Newton matrix is ``C = 1/n sum_i J_i^T H_i J_i`` with the Jacobian ``J_i`` of
an example's outputs and the Hessian ``H_i`` of its loss in them (Schraudolph 2002; Martens 2020,
arXiv 1412.1193, section 8): positive semi-definite where that loss is convex, and the Hessian less
the curvature of the network itself. Nothing here adds damping.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.attribution.gradients.gradients import flat
from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.linalg import symmetric_eigen
from bayes_simfluence.tasks.task import Task

__all__ = [
    "MOST_OUTPUTS",
    "Curvature",
    "Product",
    "check_curvature",
    "curvature_product",
    "dense_curvature",
    "mean_eigenvalue",
    "output_factor",
    "output_size",
    "output_slopes",
    "outputs_of_one",
]

Curvature = Literal["ggn", "hessian"]
CURVATURES = ("ggn", "hessian")

Vectors = Float[Array, "vector weight"]

Product = Callable[[Vectors, Int[Array, " example"] | None], Vectors]
"""Vectors and places of training examples (None = all) -> the curvature of these times each."""

PIECE = 16
"""Training examples whose activations are held at once."""

MOST_OUTPUTS = 64
"""Outputs of one example up to which the Hessian of their loss is written out."""

MOST_DENSE = 4096
"""Weights up to which a curvature is written out."""


def check_curvature(task: Task, params: PyTree, curvature: str, damping: float | None) -> None:
    """Raise unless ``curvature`` exists for the task and ``damping`` makes it regular.

    Raises:
        Misuse: an unknown word; Gauss-Newton without the two parts of the loss, or with parts that
            do not make the loss; no damping where the curvature is surely singular.
    """
    choice_of("curvature", curvature, CURVATURES)
    if curvature == "hessian":
        if damping is None:
            raise Misuse(
                "damping",
                got="None with curvature 'hessian'",
                expected="a number: the Hessian's eigenvalues have either sign",
                do="pass damping=..., or curvature='ggn'",
            )
        return
    _check_parts(task, params)
    outputs, count, weights = output_size(task, params), len(task.train_ids), _width(params)
    if damping == 0 and count * outputs < weights:
        raise Misuse(
            "damping",
            got=f"0 for a curvature of rank {count * outputs} at most ({count} examples of "
            f"{outputs} outputs) in {weights} weights",
            expected="a number > 0",
            do="pass damping=None for .1 of the mean eigenvalue, or a number",
        )


def _check_parts(task: Task, params: PyTree) -> None:
    if task.outputs is None or task.output_loss is None:
        raise Misuse(
            "curvature",
            got="'ggn' for a task without outputs and output_loss",
            expected="the two parts of the loss",
            do="pass outputs and output_loss to the task, or take curvature='hessian'",
        )
    one = jax.tree.map(lambda leaf: leaf[0], task.train)

    @jax.jit
    def both(params: PyTree, frozen: PyTree, example: PyTree) -> tuple[Array, Array]:
        parts = task.output_loss(outputs_of_one(task, params, frozen, example), example)  # type: ignore[misc]
        return task.loss(task.weights(params, frozen), example), parts

    loss, parts = (float(one) for one in both(params, task.frozen, one))
    if not np.isclose(loss, parts, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise Misuse(
            "task.output_loss",
            got=f"{parts:.6g} nats of the outputs of training example {task.train_ids[0]}",
            expected=f"its loss, {loss:.6g} nats",
            do="make task.loss of the two parts",
        )


def output_size(task: Task, params: PyTree) -> int:
    """Number of outputs of one example."""
    one = jax.tree.map(lambda leaf: leaf[0], task.train)
    shape = jax.eval_shape(partial(outputs_of_one, task), params, task.frozen, one)
    return int(shape.size)


def _width(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def outputs_of_one(
    task: Task, params: PyTree, frozen: PyTree, example: PyTree
) -> Float[Array, "..."]:
    """The outputs of one example; the task has them."""
    return task.outputs(task.weights(params, frozen), example)  # type: ignore[misc]


def curvature_product(task: Task, params: PyTree, curvature: Curvature) -> Product:
    """Products with the curvature of the mean loss of training examples.

    One compiled program for each number of vectors and of examples. Activations of ``PIECE``
    examples are held at once, and are shared by all vectors.
    """
    unflat = ravel_pytree(params)[1]
    summed = _ggn_summed(task, unflat) if curvature == "ggn" else _hessian_summed(task, unflat)

    @jax.jit
    def product(params: PyTree, frozen: PyTree, examples: PyTree, vectors: Vectors) -> Vectors:
        size = len(jax.tree.leaves(examples)[0])
        piece = min(PIECE, size)
        # The last piece is filled up with examples that do not count.
        places = jnp.arange(-(-size // piece) * piece).reshape(-1, piece)

        def step(total: Vectors, at: Int[Array, " piece"]) -> tuple[Vectors, None]:
            some = jax.tree.map(lambda leaf: leaf[jnp.minimum(at, size - 1)], examples)
            return total + summed(params, frozen, some, at < size, vectors), None

        return jax.lax.scan(step, jnp.zeros_like(vectors), places)[0] / size

    def of_examples(vectors: Vectors, places: Int[Array, " example"] | None = None) -> Vectors:
        some = task.train
        if places is not None:
            some = jax.tree.map(lambda leaf: leaf[places], some)
        return product(params, task.frozen, some, vectors)

    return of_examples


Summed = Callable[[PyTree, PyTree, PyTree, Bool[Array, " piece"], Vectors], Vectors]
Unflat = Callable[[Float[Array, " weight"]], PyTree]


def _ggn_summed(task: Task, unflat: Unflat) -> Summed:
    def curved(outputs: Array, example: PyTree, slope: Array, counts: Array) -> Array:
        gradient = jax.grad(task.output_loss)  # type: ignore[arg-type]
        found = jax.jvp(lambda at: gradient(at, example), (outputs,), (slope,))[1]
        return jnp.where(counts, found, 0.0)

    def summed(
        params: PyTree,
        frozen: PyTree,
        some: PyTree,
        counts: Bool[Array, " piece"],
        vectors: Vectors,
    ) -> Vectors:
        def outputs(params: PyTree) -> Array:
            weights = task.weights(params, frozen)
            return jax.vmap(lambda one: task.outputs(weights, one))(some)  # type: ignore[misc]

        found, push = jax.linearize(outputs, params)
        pull = jax.linear_transpose(push, params)

        def one(vector: Float[Array, " weight"]) -> Float[Array, " weight"]:
            return flat(pull(jax.vmap(curved)(found, some, push(unflat(vector)), counts))[0])

        return jax.lax.map(one, vectors)

    return summed


def _hessian_summed(task: Task, unflat: Unflat) -> Summed:
    def summed(
        params: PyTree,
        frozen: PyTree,
        some: PyTree,
        counts: Bool[Array, " piece"],
        vectors: Vectors,
    ) -> Vectors:
        def total(params: PyTree) -> Float[Array, ""]:
            weights = task.weights(params, frozen)
            losses = jax.vmap(lambda one: task.loss(weights, one))(some)
            return jnp.where(counts, losses, 0.0).sum()

        push = jax.linearize(jax.grad(total), params)[1]
        return jax.lax.map(lambda vector: flat(push(unflat(vector))), vectors)

    return summed


def dense_curvature(
    task: Task, params: PyTree, curvature: Curvature
) -> Float[np.ndarray, "weight weight"]:
    """The curvature written out: the obvious reference, for small networks.

    Raises:
        Misuse: too many weights.
    """
    start, unflat = ravel_pytree(params)
    if len(start) > MOST_DENSE:
        raise Misuse(
            "solver",
            got=f"a dense curvature of {len(start)} weights",
            expected=f"at most {MOST_DENSE}",
            do="take ConjugateGradient, InSpan() or EKFAC",
        )

    def of_one(example: PyTree) -> Float[Array, "weight weight"]:
        def loss(at: Array) -> Array:
            return task.loss(task.weights(unflat(at), task.frozen), example)

        def outputs(at: Array) -> Array:
            return outputs_of_one(task, unflat(at), task.frozen, example)

        if curvature == "hessian":
            return jax.hessian(loss)(start)
        found = outputs(start)
        jacobian = jax.jacrev(outputs)(start).reshape(found.size, len(start))
        return jacobian.T @ _output_hessian(task, found, example) @ jacobian

    @jax.jit
    def summed(examples: PyTree) -> Float[Array, "weight weight"]:
        nothing = jnp.zeros((len(start), len(start)), start.dtype)
        return jax.lax.scan(lambda total, one: (total + of_one(one), None), nothing, examples)[0]

    return np.asarray(summed(task.train), float) / len(task.train_ids)


def _output_hessian(
    task: Task, outputs: Float[Array, "..."], example: PyTree
) -> Float[Array, "output output"]:
    def loss(at: Float[Array, " output"]) -> Float[Array, ""]:
        return task.output_loss(at.reshape(outputs.shape), example)  # type: ignore[misc]

    return jax.hessian(loss)(outputs.ravel())


def output_factor(
    task: Task, outputs: Float[Array, "..."], example: PyTree
) -> Float[Array, "output output"]:
    """Rows ``u_k`` with ``sum_k u_k u_k^T`` the Hessian of the output loss."""
    values, vectors = symmetric_eigen(_output_hessian(task, outputs, example))
    return jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * vectors.T


def output_slopes(
    task: Task,
    outputs: Float[Array, "*outputs"],
    example: PyTree,
    key: jax.Array,
    draws: int | None,
) -> Float[Array, "slope *outputs"]:
    """Slopes whose sum of outer products is, on average, the Hessian of the output loss.

    Args:
        draws: random slopes; None = one along each eigenvector of the Hessian, exact. A draw is a
            sum of the latter with random signs, exact too where the Hessian has rank 1.

    Raises:
        Misuse: outputs too many to write their Hessian out, and no way to draw.
    """
    if draws is not None and task.output_draw is not None:
        drawn = jax.vmap(lambda one: task.output_draw(outputs, example, one))(  # type: ignore[misc]
            jax.random.split(key, draws)
        )
        return drawn / jnp.sqrt(draws)
    if outputs.size > MOST_OUTPUTS:
        raise Misuse(
            "task.output_draw",
            got="none" if task.output_draw is None else "draws=None, which does not use it",
            expected=f"random slopes for {outputs.size} outputs of an example: their Hessian is "
            f"written out up to {MOST_OUTPUTS}",
            do="pass draws=1, and output_draw to the task",
        )
    factor = output_factor(task, outputs, example)
    if draws is not None:
        signs = jax.random.rademacher(key, (draws, len(factor)), factor.dtype)
        factor = signs @ factor / jnp.sqrt(draws)
    return factor.reshape(-1, *outputs.shape)


def mean_eigenvalue(task: Task, params: PyTree, key: jax.Array, *, draws: int | None = 1) -> float:
    """Trace of the Gauss-Newton matrix per weight: the squared length of slopes drawn for it.

    Args:
        draws: as in ``output_slopes``, for each training example.
    """

    @jax.jit
    def lengths(params: PyTree, frozen: PyTree, examples: PyTree, keys: jax.Array) -> Array:
        def one(pair: tuple[PyTree, jax.Array]) -> Float[Array, ""]:
            example, key = pair
            found, pull = jax.vjp(lambda at: outputs_of_one(task, at, frozen, example), params)
            slopes = output_slopes(task, found, example, key, draws)
            return jax.lax.map(lambda at: jnp.square(flat(pull(at)[0])).sum(), slopes).sum()

        return jax.lax.map(one, (examples, keys))

    keys = jax.random.split(key, len(task.train_ids))
    found = lengths(params, task.frozen, task.train, keys)
    return float(np.asarray(found, float).mean()) / _width(params)
