"""Curvature of the mean training loss: products with vectors in bounded memory, and the trace.

The generalized Gauss-Newton matrix is ``C = 1/n sum_i J_i^T H_i J_i`` with the Jacobian ``J_i`` of
an example's outputs and the Hessian ``H_i`` of its loss in them (Schraudolph 2002; Martens 2020,
arXiv 1412.1193, section 8): positive semi-definite where that loss is convex, and the Hessian less
the curvature of the network itself. Nothing here adds damping.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from bayes_simfluence.tasks.task import Functions, Task

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
"""The curvature times each vector; hashable, so that compiled loops take it as it is."""

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
    loss, parts = map(float, _both(task.functions, params, task.frozen, first))
    if not np.isclose(loss, parts, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise Misuse(
            "task.output_loss",
            got=f"{parts:.6g} nats of the outputs of training example {task.train_ids[0]}",
            expected=f"its loss, {loss:.6g} nats",
            do="make task.loss of the two parts",
        )


@partial(jax.jit, static_argnums=0)
def _both(task: Functions, params: PyTree, frozen: PyTree, example: PyTree) -> tuple[Array, Array]:
    """The loss of an example, and what its two parts make of it."""
    parts = task.output_loss(task.outputs_at(params, frozen, example), example)  # type: ignore[misc]
    return task.loss_at(params, frozen, example), parts


def output_size(task: Task, params: PyTree) -> int:
    """Number of outputs of one example."""
    first = jax.tree.map(lambda leaf: leaf[0], task.train)
    shape = jax.eval_shape(task.functions.outputs_at, params, task.frozen, first)
    return int(shape.size)


def _width(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclass(frozen=True)
class CurvatureProduct:
    """Products with the curvature of the mean loss, compiled.

    Activations of ``BATCH`` examples are held at once, and are shared by all vectors.
    """

    task: Functions
    curvature: Curvature

    @partial(jax.jit, static_argnums=0)
    def __call__(self, operands: Operands, vectors: Vectors) -> Vectors:
        """The curvature times each vector."""
        size = len(jax.tree.leaves(operands.examples)[0])
        batch = min(BATCH, size)
        summed = _ggn_summed if self.curvature == "ggn" else _hessian_summed
        # The last batch is filled up with examples that do not count.
        numbers = jnp.arange(-(-size // batch) * batch).reshape(-1, batch)

        def step(total: Vectors, at: Int[Array, " batch"]) -> tuple[Vectors, None]:
            rows = jnp.minimum(at, size - 1)
            some = jax.tree.map(lambda leaf: leaf[rows], operands.examples)
            at_rows = operands._replace(examples=some)
            return total + summed(self.task, at_rows, at < size, vectors), None

        return jax.lax.scan(step, jnp.zeros_like(vectors), numbers)[0] / size


def _ggn_summed(
    task: Functions, operands: Operands, counts: Bool[Array, " batch"], vectors: Vectors
) -> Vectors:
    params, frozen, examples = operands
    unflat = ravel_pytree(params)[1]

    def curved(outputs: Array, example: PyTree, slope: Array, counts: Array) -> Array:
        gradient = jax.grad(task.output_loss)  # type: ignore[arg-type]
        product = jax.jvp(lambda at: gradient(at, example), (outputs,), (slope,))[1]
        return jnp.where(counts, product, 0.0)

    def of_params(params: PyTree) -> Array:
        weights = task.weights(params, frozen)
        return jax.vmap(lambda example: task.outputs(weights, example))(examples)  # type: ignore[misc]

    outputs, push = jax.linearize(of_params, params)
    pull = jax.linear_transpose(push, params)

    def product(vector: Float[Array, " weight"]) -> Float[Array, " weight"]:
        slopes = jax.vmap(curved)(outputs, examples, push(unflat(vector)), counts)
        return flat(pull(slopes)[0])

    return jax.lax.map(product, vectors)


def _hessian_summed(
    task: Functions, operands: Operands, counts: Bool[Array, " batch"], vectors: Vectors
) -> Vectors:
    params, frozen, examples = operands
    unflat = ravel_pytree(params)[1]

    def total(params: PyTree) -> Float[Array, ""]:
        weights = task.weights(params, frozen)
        losses = jax.vmap(lambda example: task.loss(weights, example))(examples)
        return jnp.where(counts, losses, 0.0).sum()

    push = jax.linearize(jax.grad(total), params)[1]
    return jax.lax.map(lambda vector: flat(push(unflat(vector))), vectors)


def dense_curvature(
    task: Task, params: PyTree, curvature: Curvature
) -> Float[np.ndarray, "weight weight"]:
    """The curvature written out: the obvious reference, for small networks.

    Raises:
        Misuse: too many weights.
    """
    if _width(params) > MOST_DENSE:
        raise Misuse(
            "solver",
            got=f"a dense curvature of {_width(params)} weights",
            expected=f"at most {MOST_DENSE}",
            do="take ConjugateGradient(), InGram() or EKFAC()",
        )
    operands = Operands(params, task.frozen, task.train)
    return np.asarray(_dense(task.functions, curvature, operands), float) / len(task.train_ids)


@partial(jax.jit, static_argnums=(0, 1))
def _dense(
    task: Functions, curvature: Curvature, operands: Operands
) -> Float[Array, "weight weight"]:
    """The sum of the examples' curvatures."""
    start, unflat = ravel_pytree(operands.params)

    def of_one(example: PyTree) -> Float[Array, "weight weight"]:
        def loss(at: Array) -> Array:
            return task.loss_at(unflat(at), operands.frozen, example)

        def outputs(at: Array) -> Array:
            return task.outputs_at(unflat(at), operands.frozen, example)

        if curvature == "hessian":
            return jax.hessian(loss)(start)
        hessian = _output_hessian(task, outputs(start), example)
        jacobian = jax.jacrev(outputs)(start).reshape(-1, len(start))
        return jacobian.T @ hessian @ jacobian

    nothing = jnp.zeros((len(start), len(start)), start.dtype)
    summed = jax.lax.scan(lambda total, at: (total + of_one(at), None), nothing, operands.examples)
    return summed[0]


def _output_hessian(
    task: Functions, outputs: Float[Array, "..."], example: PyTree
) -> Float[Array, "output output"]:
    def loss(at: Float[Array, " output"]) -> Float[Array, ""]:
        return task.output_loss(at.reshape(outputs.shape), example)  # type: ignore[misc]

    return jax.hessian(loss)(outputs.ravel())


def output_factor(
    task: Functions, outputs: Float[Array, "..."], example: PyTree
) -> Float[Array, "output output"]:
    """Rows ``u_k`` with ``sum_k u_k u_k^T`` the Hessian of the output loss."""
    values, vectors = symmetric_eigen(_output_hessian(task, outputs, example))
    return jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * vectors.T


def output_slopes(
    task: Functions,
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
    keys = jax.random.split(key, len(task.train_ids))
    operands = Operands(params, task.frozen, task.train)
    traces = np.asarray(_lengths(task.functions, draws, operands, keys), float)
    return float(traces.mean()) / _width(params)


@partial(jax.jit, static_argnums=(0, 1))
def _lengths(
    task: Functions, draws: int | None, operands: Operands, keys: jax.Array
) -> Float[Array, " example"]:
    params, frozen, examples = operands

    def length(pair: tuple[PyTree, jax.Array]) -> Float[Array, ""]:
        example, key = pair
        outputs, pull = jax.vjp(lambda at: task.outputs_at(at, frozen, example), params)
        slopes = output_slopes(task, outputs, example, key, draws)
        return jax.lax.map(lambda slope: jnp.square(flat(pull(slope)[0])).sum(), slopes).sum()

    return jax.lax.map(length, (examples, keys))
