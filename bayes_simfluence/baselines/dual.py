"""The exact inverse of a Gauss-Newton matrix of few examples, whatever the number of weights.

With one row of ``U`` for each example and output, ``C = U^T U / n``, and

    U (C + damping I)^-1 = n (U U^T + n damping I)^-1 U,

so inner products of rows of Jacobians are all that is needed (the identity behind kernel ridge
regression; Ren and Goldfarb 2019, arXiv 1906.02353, use it for natural gradients).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.baselines.curvature import (
    MOST_OUTPUTS,
    output_factor,
    output_size,
    outputs_of_one,
)
from bayes_simfluence.baselines.gradients import flat, flat_gradients
from bayes_simfluence.baselines.problem import Problem, Solved, all_finite, check_finite
from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.task import Task

__all__ = ["Dual"]

MOST_ROWS = 8192
"""Examples times outputs up to which their inner products are factored."""

NOTHING = 1e-5
"""Share of an output slope that counts as rounding."""


@dataclass(frozen=True)
class Dual:
    """Exact Gauss-Newton influence through inner products: for few examples of few outputs.

    Gradients of the training examples are computed once for each part of them that fits into
    memory: with all of them in it, once.
    """

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``.

        Raises:
            Misuse: the Hessian, no damping, outputs or examples too many.
        """
        outputs = _checked(problem)
        task, damping = problem.task, problem.damped
        kernel, cross = _inner_products(problem, outputs)
        slopes = _output_slopes(problem)
        count = len(task.train_ids)
        # Everything by example from here: its outputs are one axis.
        factor = np.asarray(slopes.factor, float)
        by_factor = partial(np.einsum, "nko,nox->nkx", factor)
        inner = by_factor(kernel.reshape(count, outputs, -1)).reshape(count * outputs, -1)
        inner = by_factor(inner.T.reshape(count, outputs, -1)).reshape(count * outputs, -1)
        pushed = by_factor(cross.reshape(count, outputs, -1)).reshape(count * outputs, -1)
        damped = inner + count * damping * np.eye(len(inner))
        solved = scipy.linalg.solve(damped, pushed, assume_a="pos")
        within, beyond = _split(slopes)
        values = count * np.einsum("nk,nkq->nq", within, solved.reshape(count, outputs, -1))
        if beyond.any():
            of_kernel = np.einsum("xno,no->xn", kernel.reshape(-1, count, outputs), beyond)
            turned = by_factor(of_kernel.reshape(count, outputs, -1)).reshape(-1, count)
            plain = np.einsum("no,noq->nq", beyond, cross.reshape(count, outputs, -1))
            values += (plain - turned.T @ solved) / damping
        problem.meter.advance(len(task.query_ids))
        return values, {"solver": "dual", "damping": damping}


class _OutputSlopes(NamedTuple):
    """Of each training example: the Hessian's factor and the slope of its loss in the outputs."""

    factor: Float[np.ndarray, "train output output"]
    slope: Float[np.ndarray, "train output"]


def _checked(problem: Problem) -> int:
    """The number of outputs of one example."""
    if problem.curvature != "ggn":
        raise Misuse(
            "curvature",
            got="'hessian' with Dual",
            expected="'ggn', which is made of gradients",
            do="pass curvature='ggn', or take another solver",
        )
    if problem.damping == 0:
        raise Misuse(
            "damping",
            got="0 with Dual",
            expected="a number > 0",
            do="pass damping=None for .1 of the mean eigenvalue, or a number",
        )
    outputs, count = output_size(problem.task, problem.params), len(problem.task.train_ids)
    if outputs > MOST_OUTPUTS or outputs * count > MOST_ROWS:
        raise Misuse(
            "solver",
            got=f"Dual for {count} training examples of {outputs} outputs",
            expected=f"at most {MOST_OUTPUTS} outputs, and {MOST_ROWS} in all",
            do="take EKFAC, Arnoldi or ConjugateGradient",
        )
    return outputs


def _inner_products(
    problem: Problem, outputs: int
) -> tuple[Float[np.ndarray, "row row"], Float[np.ndarray, "row query"]]:
    """Of the rows of the training examples' Jacobians, with each other and with the queries'
    gradients."""
    # Two parts are held, and a part is copied once while it is made.
    task, part = problem.task, problem.memory // 4
    count = len(task.train_ids)

    @jax.jit
    def jacobians(
        params: PyTree, frozen: PyTree, examples: PyTree
    ) -> Float[Array, "piece outputs_weights"]:
        def one(example: PyTree) -> Float[Array, " outputs_weights"]:
            found, pull = jax.vjp(lambda at: outputs_of_one(task, at, frozen, example), params)
            unit = jnp.eye(found.size, dtype=found.dtype).reshape(-1, *found.shape)
            return jax.vmap(lambda along: flat(pull(along)[0]))(unit).ravel()

        return jax.vmap(one)(examples)

    def pieces() -> Iterator[tuple[slice, Float[Array, "row weight"]]]:
        made = flat_gradients(
            lambda params, examples: jacobians(params, task.frozen, examples),
            problem.params,
            task.train,
            memory=part // outputs,
        )
        for rows, found in made:
            check_finite(task, "train", rows, all_finite(found))
            at = slice(rows.start * outputs, rows.stop * outputs)
            yield at, found.reshape(-1, problem.width)

    kernel = np.zeros((count * outputs,) * 2)
    cross = np.zeros((count * outputs, len(task.query_ids)))
    for columns, right in pieces():
        for queries, gradients in problem.gradients("query", part):
            cross[columns, queries] = np.asarray(right @ gradients.T, float)
        whole = len(right) == len(kernel)
        for rows, left in [(columns, right)] if whole else pieces():
            kernel[rows, columns] = np.asarray(left @ right.T, float)
    return kernel, cross


def _output_slopes(problem: Problem) -> _OutputSlopes:
    task: Task = problem.task

    @jax.jit
    def of_all(params: PyTree, frozen: PyTree, examples: PyTree) -> tuple[Array, Array]:
        def one(example: PyTree) -> tuple[Array, Array]:
            found = outputs_of_one(task, params, frozen, example)
            slope = jax.grad(task.output_loss)(found, example)  # type: ignore[arg-type]
            return output_factor(task, found, example), slope.ravel()

        return jax.lax.map(one, examples)

    found = of_all(problem.params, task.frozen, task.train)
    return _OutputSlopes(*(np.asarray(one, float) for one in found))


def _split(
    slopes: _OutputSlopes,
) -> tuple[Float[np.ndarray, "train output"], Float[np.ndarray, "train output"]]:
    """Coordinates of each slope along the rows of its factor, and what they do not reach.

    The rows are orthogonal. For a softmax nothing is left.
    """
    square = np.square(slopes.factor).sum(axis=2)
    reached = square > NOTHING * square.max(axis=1, keepdims=True)
    along = np.einsum("nko,no->nk", slopes.factor, slopes.slope)
    within = np.where(reached, along / np.where(reached, square, 1.0), 0.0)
    left = slopes.slope - np.einsum("nk,nko->no", within, slopes.factor)
    length = np.linalg.norm(slopes.slope, axis=1, keepdims=True)
    rounding = np.linalg.norm(left, axis=1, keepdims=True) <= 100 * NOTHING * length
    return within, np.where(rounding, 0.0, left)
