"""Ways to multiply with an inverse curvature: ``g_q^T (C + damping I)^-1 g_i`` for all pairs.

``Dense`` is exact, ``ConjugateGradient`` and ``LiSSA`` iterate for each query, ``Arnoldi`` keeps
the leading eigenvectors. ``in_span`` runs each of them in few coordinates. EK-FAC, which knows the
network's layers, is in ``ekfac``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float

from bayes_simfluence.attribution.influence.curvature import dense_curvature
from bayes_simfluence.attribution.influence.problem import (
    Problem,
    Said,
    Solved,
    Vectors,
    all_finite,
    regular,
)
from bayes_simfluence.checks import (
    Misuse,
    WorkFailed,
    count_of,
    positive_integer,
    positive_number,
)

__all__ = ["Arnoldi", "ConjugateGradient", "Dense", "LiSSA"]


@jax.jit
def _dots(one: Vectors, other: Vectors) -> Float[Array, " vector"]:
    return jnp.einsum("vw,vw->v", one, other)


def _by_solving(problem: Problem, solve: Callable[[Vectors], Vectors], held: int) -> np.ndarray:
    """All products where ``solve`` takes queries' gradients to solutions.

    Args:
        held: arrays as large as the gradients of a group of queries that are held at once.
    """
    task = problem.task
    found = np.zeros((len(task.train_ids), len(task.query_ids)))
    for columns, queries in problem.gradients("query", problem.memory // (held + 1)):
        solved = solve(queries)
        for rows, trains in problem.gradients("train", problem.memory // (held + 1)):
            found[rows, columns] = np.asarray(trains @ solved.T, float)
        problem.meter.advance(columns.stop - columns.start)
    return found


@dataclass(frozen=True)
class Dense:
    """The curvature written out and factored in double precision; for small networks."""

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``."""
        matrix = dense_curvature(problem.task, problem.params, problem.curvature)
        if not np.isfinite(matrix).all():
            problem.blame("The curvature")
        values, vectors = scipy.linalg.eigh(matrix)
        values = values + problem.damped
        regular(values[0], values[-1], problem.damped, problem.curvature)

        def solve(right: Vectors) -> Vectors:
            inner = (np.asarray(right, float) @ vectors) / values[None]
            return jnp.asarray(inner @ vectors.T, right.dtype)

        said = {"solver": "dense", "smallest": float(values[0]), "largest": float(values[-1])}
        return _by_solving(problem, solve, 2), {**said, "damping": problem.damped}


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradients for each query (Martens 2010; Koh and Liang 2017, section 3).

    Attributes:
        tolerance: length of the residual over that of the query's gradient, to stop at.
        iterations: products with the curvature at most; the largest residual left is said.
    """

    tolerance: float = 1e-3
    iterations: int = 100

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``."""
        positive_number("tolerance", self.tolerance)
        positive_integer("iterations", self.iterations)
        residuals: list[float] = []

        def solve(right: Vectors) -> Vectors:
            solved, residual = self._descend(problem, right)
            residuals.append(residual)
            return solved

        values = _by_solving(problem, solve, 8)
        said = {
            "solver": "conjugate gradients",
            "tolerance": self.tolerance,
            "iterations": self.iterations,
            "residual": max(residuals),
        }
        return values, {**said, "damping": problem.damped}

    def _descend(self, problem: Problem, right: Vectors) -> tuple[Vectors, float]:
        """Solutions, and the largest relative residual."""
        start = _dots(right, right)
        solved, residual, direction, square = jnp.zeros_like(right), right, right, start
        goal = np.asarray(start) * self.tolerance**2
        for _ in range(self.iterations):
            if (np.asarray(square) <= goal).all():
                break
            pushed = problem.product(direction, None) + problem.damped * direction
            curved = _dots(direction, pushed)
            _check_descent(problem, direction, curved, np.asarray(square) > goal)
            solved, residual, direction, square = _step(
                solved, residual, direction, square, pushed, curved
            )
        ratio = np.asarray(square) / np.maximum(np.asarray(start), np.finfo(np.float32).tiny)
        return solved, float(np.sqrt(ratio.max()))


@jax.jit
def _step(
    solved: Vectors,
    residual: Vectors,
    direction: Vectors,
    square: Array,
    pushed: Vectors,
    curved: Array,
) -> tuple[Vectors, Vectors, Vectors, Array]:
    size = jnp.where(curved > 0, square / curved, 0.0)[:, None]
    solved, residual = solved + size * direction, residual - size * pushed
    after = jnp.einsum("vw,vw->v", residual, residual)
    back = jnp.where(square > 0, after / square, 0.0)[:, None]
    return solved, residual, residual + back * direction, after


def _check_descent(
    problem: Problem, direction: Vectors, curved: Array, active: Bool[np.ndarray, " vector"]
) -> None:
    found = np.asarray(curved / _dots(direction, direction))[active]
    if not np.isfinite(found).all():
        problem.blame("A product with the curvature")
    if found.min() <= 0:
        raise WorkFailed(
            f"Conjugate gradients met curvature {found.min():.3g} (damping {problem.damped:.3g} "
            f"included), which is not positive: raise damping by more than {-found.min():.3g}"
            + (", or take curvature='ggn'." if problem.curvature == "hessian" else ".")
        )


@dataclass(frozen=True)
class LiSSA:
    """A stochastic Neumann series for each query (Agarwal et al. 2017; Koh and Liang 2017, 3).

    ``x <- g + x - (C_batch + damping I) x / scale``, and in the end ``x / scale``.

    Attributes:
        depth: terms.
        scale: above half of the largest eigenvalue of the damped curvature of any batch, or the
            series diverges; the larger, the more terms it takes.
        repeats: series that are averaged.
        batch: training examples drawn for each term; None = all of them, without chance.
    """

    depth: int = 1000
    scale: float = 10.0
    repeats: int = 1
    batch: int | None = 1

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``."""
        for name in ("depth", "repeats"):
            positive_integer(name, getattr(self, name))
        positive_number("scale", self.scale)
        count = len(problem.task.train_ids)
        if self.batch is not None and positive_integer("batch", self.batch) > count:
            raise Misuse(
                "batch", got=self.batch, expected=f"at most {count} examples", do="lower it"
            )
        changes: list[float] = []

        def solve(right: Vectors) -> Vectors:
            keys = jax.random.split(problem.key, self.repeats)
            series = [self._summed(problem, right, one, changes) for one in keys]
            return sum(series[1:], start=series[0]) / (self.repeats * self.scale)

        values = _by_solving(problem, solve, 7)
        said: Said = {name: getattr(self, name) for name in ("depth", "scale", "repeats")}
        said |= {"batch": self.batch or count, "last_change": max(changes)}
        return values, {"solver": "LiSSA", **said, "damping": problem.damped}

    def _summed(
        self, problem: Problem, right: Vectors, key: jax.Array, changes: list[float]
    ) -> Vectors:
        count = len(problem.task.train_ids)
        length = jnp.sqrt(_dots(right, right))
        summed = right
        for term in range(self.depth):
            places = None
            if self.batch is not None:
                one = jax.random.fold_in(key, term)
                places = jax.random.choice(one, count, (self.batch,), replace=False)
            pushed = problem.product(summed, places) + problem.damped * summed
            after = right + summed - pushed / self.scale
            # No term of a series that converges is longer than the gradient.
            bound = (term + 2) * 1.01 * length
            grown = np.asarray(_dots(after, after) > bound**2) | ~np.asarray(all_finite(after))
            if grown.any():
                if not np.asarray(all_finite(pushed)).all():
                    problem.blame("A product with the curvature")
                self._diverged(summed, pushed, grown, term + 1)
            change, summed = after - summed, after
        ratio = _dots(change, change) / jnp.maximum(_dots(summed, summed), 1e-30)
        changes.append(float(jnp.sqrt(ratio.max())))
        return summed

    def _diverged(
        self, summed: Vectors, pushed: Vectors, grown: Bool[np.ndarray, " vector"], term: int
    ) -> None:
        curved = np.asarray(_dots(summed, pushed) / _dots(summed, summed))[grown][0]
        remedy = (
            "raise damping, or take curvature='ggn': the curvature is not positive there"
            if curved < 0
            else f"raise scale (now {self.scale:.3g}) above {curved:.3g}, or draw a larger batch"
        )
        raise WorkFailed(f"LiSSA diverged in term {term}: {remedy}.")


@dataclass(frozen=True)
class Arnoldi:
    """The leading eigenvectors by Arnoldi's iteration (Schioppa et al. 2022, arXiv 2112.03052).

    Gradients count by their coordinates along these, and nothing is left of what is orthogonal
    to them, as published.

    Attributes:
        rank: eigenvectors kept, the largest eigenvalues in absolute value.
        iterations: products with the curvature, at least ``rank``; 0 = twice the rank.
    """

    rank: int = 20
    iterations: int = 0

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``."""
        rank, asked = positive_integer("rank", self.rank), count_of("iterations", self.iterations)
        steps = min(asked or 2 * rank, problem.width)
        if rank > steps:
            raise Misuse("rank", got=rank, expected=f"at most {steps} iterations", do="lower it")
        needed = 4 * problem.width * (steps + 4)
        if needed > problem.memory:
            raise Misuse(
                "memory",
                got=f"{problem.memory} bytes for {steps} vectors of {problem.width} weights",
                expected=f"at least {needed}",
                do=f"pass memory={needed}, or lower iterations",
            )
        basis, inner = _krylov(problem, steps)
        values, vectors = np.linalg.eigh(inner)
        kept = np.argsort(-np.abs(values))[:rank]
        damped = values[kept] + problem.damped
        regular(damped.min(), np.abs(damped).max(), problem.damped, problem.curvature)
        # Coordinates of gradients in the basis, then along eigenvectors of what it spans.
        train, query = (
            _coordinates(problem, part, basis) @ vectors[:, kept] for part in ("train", "query")
        )
        problem.meter.advance(len(problem.task.query_ids))
        said = {
            "solver": "Arnoldi",
            "rank": len(kept),
            "iterations": len(basis),
            "smallest": float(damped.min()),
            "largest": float(damped.max()),
        }
        return train / damped[None] @ query.T, {**said, "damping": problem.damped}


def _krylov(
    problem: Problem, steps: int
) -> tuple[Float[Array, "step weight"], Float[np.ndarray, "step step"]]:
    """An orthonormal basis of products with a random vector, and the curvature within it.

    Shorter than ``steps`` when the products stop giving new directions.
    """
    basis = jnp.zeros((steps, problem.width), jnp.float32)
    inner = np.zeros((steps, steps))
    vector = jax.random.normal(problem.key, (problem.width,), jnp.float32)
    vector = vector / jnp.linalg.norm(vector)
    for step in range(steps):
        basis = _with_row(basis, vector, jnp.asarray(step))
        pushed = problem.product(vector[None], None)[0]
        parts, left = _orthogonal(basis, pushed)
        inner[: step + 1, step] = np.asarray(parts, float)[: step + 1]
        length = float(jnp.linalg.norm(left))
        if not np.isfinite(length):
            problem.blame("A product with the curvature")
        if step + 1 == steps or length <= 1e-5 * float(jnp.linalg.norm(parts)):
            break
        inner[step + 1, step] = length
        vector = left / length
    size = step + 1
    square = inner[:size, :size]
    return basis[:size], (square + square.T) / 2


@partial(jax.jit, donate_argnums=0)
def _with_row(basis: Array, row: Array, at: Array) -> Array:
    return basis.at[at].set(row)


@jax.jit
def _orthogonal(basis: Array, vector: Array) -> tuple[Array, Array]:
    # Twice, or rounding brings the leading directions back.
    parts = basis @ vector
    left = vector - parts @ basis
    again = basis @ left
    return parts + again, left - again @ basis


def _coordinates(
    problem: Problem, part: Literal["train", "query"], basis: Float[Array, "step weight"]
) -> Float[np.ndarray, "example step"]:
    memory = max(problem.memory - 4 * basis.size, 1) // 2
    pieces = problem.gradients(part, memory)
    return np.concatenate([np.asarray(rows @ basis.T, float) for _, rows in pieces])
