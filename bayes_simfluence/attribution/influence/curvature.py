"""Curvature of the mean training loss: products with vectors in bounded memory, and the trace.

The generalized Gauss-Newton matrix is ``C = 1/n sum_i J_i^T H_i J_i`` with the Jacobian ``J_i`` of
an example's outputs and the Hessian ``H_i`` of its loss in them (Schraudolph 2002; Martens 2020,
arXiv 1412.1193, section 8): positive semi-definite where that loss is convex, and the Hessian less
the curvature of the network itself. Nothing here adds damping.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.attribution.gradients.per_example import flat
from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.linalg import symmetric_eigen
from bayes_simfluence.tasks.task import Task

Curvature = Literal["ggn", "hessian"]
CURVATURES = ("ggn", "hessian")

Vectors = Float[Array, "vector weight"]


class Operands(NamedTuple):
    """The arrays that a curvature is made of; a pytree, so that compiled loops take it whole.

    Attributes:
        params: the trained parameters at which it is taken.
        frozen: weights that do not train.
        examples: with a leading axis; the curvature is that of their mean loss.
    """

    params: PyTree
    frozen: PyTree
    examples: PyTree


Product = Callable[[Operands, Vectors], Vectors]
"""The curvature times each vector."""

BATCH = 16
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
    first = jax.tree.map(lambda leaf: leaf[0], task.train)

    @jax.jit
    def both(params: PyTree, frozen: PyTree, example: PyTree) -> tuple[Array, Array]:
        parts = task.output_loss(outputs_of_one(task, params, frozen, example), example)  # type: ignore[misc]
        return task.loss(task.weights(params, frozen), example), parts

    loss, parts = map(float, both(params, task.frozen, first))
    if not np.isclose(loss, parts, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise Misuse(
            "task.output_loss",
            got=f"{parts:.6g} nats of the outputs of training example {task.train_ids[0]}",
            expected=f"its loss, {loss:.6g} nats",
            do="make task.loss of the two parts",
        )


def output_size(task: Task, params: PyTree) -> int:
    """Number of outputs of one example."""
    first = jax.tree.map(lambda leaf: leaf[0], task.train)
    shape = jax.eval_shape(partial(outputs_of_one, task), params, task.frozen, first)
    return int(shape.size)


def _width(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def outputs_of_one(
    task: Task, params: PyTree, frozen: PyTree, example: PyTree
) -> Float[Array, "..."]:
    """The outputs of one example; the task has them."""
    return task.outputs(task.weights(params, frozen), example)  # type: ignore[misc]


def curvature_product(task: Task, params: PyTree, curvature: Curvature) -> Product:
    """Products with the curvature of the mean loss, compiled.

    Activations of ``BATCH`` examples are held at once, and are shared by all vectors.

    Args:
        params: of the shapes of those at which products are taken.
    """
    unflat = ravel_pytree(params)[1]
    summed = _ggn_summed(task, unflat) if curvature == "ggn" else _hessian_summed(task, unflat)

    @jax.jit
    def product(operands: Operands, vectors: Vectors) -> Vectors:
        size = len(jax.tree.leaves(operands.examples)[0])
        batch = min(BATCH, size)
        # The last batch is filled up with examples that do not count.
        numbers = jnp.arange(-(-size // batch) * batch).reshape(-1, batch)

        def step(total: Vectors, at: Int[Array, " batch"]) -> tuple[Vectors, None]:
            rows = jnp.minimum(at, size - 1)
            some = jax.tree.map(lambda leaf: leaf[rows], operands.examples)
            return total + summed(operands._replace(examples=some), at < size, vectors), None

        return jax.lax.scan(step, jnp.zeros_like(vectors), numbers)[0] / size

    return product


Summed = Callable[[Operands, Bool[Array, " batch"], Vectors], Vectors]
Unflat = Callable[[Float[Array, " weight"]], PyTree]


def _ggn_summed(task: Task, unflat: Unflat) -> Summed:
    def curved(outputs: Array, example: PyTree, slope: Array, counts: Array) -> Array:
        gradient = jax.grad(task.output_loss)  # type: ignore[arg-type]
        product = jax.jvp(lambda at: gradient(at, example), (outputs,), (slope,))[1]
        return jnp.where(counts, product, 0.0)

    def summed(operands: Operands, counts: Bool[Array, " batch"], vectors: Vectors) -> Vectors:
        params, frozen, examples = operands

        def of_params(params: PyTree) -> Array:
            weights = task.weights(params, frozen)
            return jax.vmap(lambda example: task.outputs(weights, example))(examples)  # type: ignore[misc]

        outputs, push = jax.linearize(of_params, params)
        pull = jax.linear_transpose(push, params)

        def product(vector: Float[Array, " weight"]) -> Float[Array, " weight"]:
            slopes = jax.vmap(curved)(outputs, examples, push(unflat(vector)), counts)
            return flat(pull(slopes)[0])

        return jax.lax.map(product, vectors)

    return summed


def _hessian_summed(task: Task, unflat: Unflat) -> Summed:
    def summed(operands: Operands, counts: Bool[Array, " batch"], vectors: Vectors) -> Vectors:
        params, frozen, examples = operands

        def total(params: PyTree) -> Float[Array, ""]:
            weights = task.weights(params, frozen)
            losses = jax.vmap(lambda example: task.loss(weights, example))(examples)
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
            do="take ConjugateGradient(), InGram() or EKFAC()",
        )

    def of_one(example: PyTree) -> Float[Array, "weight weight"]:
        def loss(at: Array) -> Array:
            return task.loss(task.weights(unflat(at), task.frozen), example)

        def outputs(at: Array) -> Array:
            return outputs_of_one(task, unflat(at), task.frozen, example)

        if curvature == "hessian":
            return jax.hessian(loss)(start)
        hessian = _output_hessian(task, outputs(start), example)
        jacobian = jax.jacrev(outputs)(start).reshape(-1, len(start))
        return jacobian.T @ hessian @ jacobian

    @jax.jit
    def summed(examples: PyTree) -> Float[Array, "weight weight"]:
        nothing = jnp.zeros((len(start), len(start)), start.dtype)
        return jax.lax.scan(lambda total, at: (total + of_one(at), None), nothing, examples)[0]

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
        draw: Any = task.output_draw
        keys = jax.random.split(key, draws)
        return jax.vmap(lambda key: draw(outputs, example, key))(keys) / jnp.sqrt(draws)
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
        def length(pair: tuple[PyTree, jax.Array]) -> Float[Array, ""]:
            example, key = pair
            outputs, pull = jax.vjp(lambda at: outputs_of_one(task, at, frozen, example), params)
            slopes = output_slopes(task, outputs, example, key, draws)
            return jax.lax.map(lambda slope: jnp.square(flat(pull(slope)[0])).sum(), slopes).sum()

        return jax.lax.map(length, (examples, keys))

    keys = jax.random.split(key, len(task.train_ids))
    traces = np.asarray(lengths(params, task.frozen, task.train, keys), float)
    return float(traces.mean()) / _width(params)
