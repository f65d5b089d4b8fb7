"""Solvers that factor a matrix: the whole curvature, or its leading eigenvectors.

All solvers compute ``g_q^T (C + damping I)^-1 g_i`` for all pairs. Those that iterate for each
query are in ``iterative``; EK-FAC, which looks at the network's layers, is in ``ekfac``;
``gram_solver`` runs any of them in few coordinates.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from bayes_simfluence.attribution.influence.curvature import dense_curvature
from bayes_simfluence.attribution.influence.problem import Problem, Solved, Vectors, regular
from bayes_simfluence.checks import Misuse, at_most, count_of, positive_integer


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

        extremes = {"smallest": float(values[0]), "largest": float(values[-1])}
        attributes = {"solver": "dense", **extremes, "damping": problem.damped}
        return problem.by_solving(solve, 2), attributes


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
        at_most("rank", rank, steps, "iterations", do="lower it")
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
        # Coordinates of gradients in the basis, then along eigenvectors within it.
        train, query = (
            _coordinates(problem, part, basis) @ vectors[:, kept] for part in ("train", "query")
        )
        problem.meter.advance(len(problem.task.query_ids))
        attributes = {
            "solver": "Arnoldi",
            "rank": len(kept),
            "iterations": len(basis),
            "smallest": float(damped.min()),
            "largest": float(damped.max()),
        }
        return train / damped[None] @ query.T, {**attributes, "damping": problem.damped}


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
        pushed = problem.product(problem.operands, vector[None])[0]
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
    batches = problem.gradients(part, memory)
    return np.concatenate([np.asarray(rows @ basis.T, float) for _, rows in batches])
