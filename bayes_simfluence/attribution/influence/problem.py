"""What a solver of influence functions takes and returns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.attribution.gradients.checkpoints import check_finite
from bayes_simfluence.attribution.gradients.per_example import flat_gradients
from bayes_simfluence.attribution.influence.curvature import (
    Curvature,
    CurvatureProduct,
    Operands,
    Product,
    mean_eigenvalue,
)
from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.progress import Meter
from bayes_simfluence.tasks.task import Task

Vectors = Float[Array, "vector weight"]
Attributes = dict[str, Any]
Solved = tuple[Float[np.ndarray, "train query"], Attributes]
"""``g_q^T (C + damping I)^-1 g_i``, and how it was computed, for the scores' attributes."""

SHARE_OF_MEAN = 0.1
"""Damping per mean eigenvalue where none is given (Grosse et al. 2023, section 3.1)."""


@dataclass(frozen=True)
class Problem:
    """What a solver takes.

    Attributes:
        params: the trained parameters at which everything is taken.
        damping: added to every eigenvalue; None = the solver's default.
        memory: bytes of gradients and vectors held at once.
        meter: advanced by the number of queries that are done.
    """

    task: Task
    params: PyTree
    curvature: Curvature
    damping: float | None
    key: jax.Array
    memory: int
    meter: Meter

    @cached_property
    def product(self) -> Product:
        """Products with the curvature, without damping."""
        return CurvatureProduct(self.task.functions, self.curvature)

    @property
    def operands(self) -> Operands:
        """What ``product`` takes for the curvature of all training examples."""
        return Operands(self.params, self.task.frozen, self.task.train)

    @cached_property
    def damped(self) -> float:
        """The damping, .1 of the mean eigenvalue of the whole curvature where none was given."""
        if self.damping is not None:
            return self.damping
        return SHARE_OF_MEAN * mean_eigenvalue(self.task, self.params, self.key)

    @property
    def width(self) -> int:
        """Number of trained weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def gradients(
        self, part: Literal["train", "query"], memory: int
    ) -> Iterator[tuple[slice, Vectors]]:
        """Gradients of the examples, a batch at a time.

        Raises:
            Misuse: a gradient that is not finite; its example is named.
        """
        batches = flat_gradients(self.task, self.params, getattr(self.task, part), memory=memory)
        for rows, gradients in batches:
            sums = {part: gradients.sum(axis=1)}
            check_finite(self.task, "the given weights", **sums, start=rows.start)
            yield rows, gradients

    def by_solving(
        self, solve: Callable[[Vectors], Vectors], held: int
    ) -> Float[np.ndarray, "train query"]:
        """All products where ``solve`` takes queries' gradients to solutions.

        Args:
            held: arrays as large as the gradients of a group of queries that are held at once.
        """
        products = np.zeros((len(self.task.train_ids), len(self.task.query_ids)))
        memory = self.memory // (held + 1)
        for columns, queries in self.gradients("query", memory):
            solved = solve(queries)
            for rows, trains in self.gradients("train", memory):
                products[rows, columns] = np.asarray(trains @ solved.T, float)
            self.meter.advance(columns.stop - columns.start)
        return products

    def check_ggn(self, solver: str) -> None:
        """Raise where a solver that knows Gauss-Newton curvature alone is given the Hessian.

        Raises:
            Misuse: it is given the Hessian.
        """
        if self.curvature != "ggn":
            raise Misuse(
                "curvature",
                got=f"'hessian' with {solver}",
                expected="'ggn', which is made of gradients",
                do="pass curvature='ggn', or take another solver",
            )

    def blame(self, what: str) -> NoReturn:
        """Name the training example that is the cause of ``what`` not being finite.

        Raises:
            Misuse: a training example's gradient is not finite either.
            WorkFailed: all of them are finite.
        """
        for _ in self.gradients("train", self.memory // 2):
            pass
        raise WorkFailed(
            f"{what} is not finite, though all gradients are: take weights from before training "
            "diverged."
        )


@runtime_checkable
class Solver(Protocol):
    """A way to multiply with the inverse of a damped curvature."""

    def solve(self, problem: Problem) -> Solved:
        """The products for all training examples and queries, and attributes of the scores.

        Raises:
            Misuse: settings that do not fit the problem, gradients that are not finite.
            WorkFailed: a curvature that is not positive definite, iterations that diverge.
        """
        ...


def regular(smallest: float, largest: float, damping: float, curvature: str) -> None:
    """Raise unless a damped curvature with these extreme eigenvalues can be inverted."""
    if not smallest > np.finfo(np.float32).eps * abs(largest):
        raise WorkFailed(
            f"The {curvature} with damping {damping:.3g} has eigenvalues from {smallest:.3g} to "
            f"{largest:.3g}, so it cannot be inverted: raise damping by more than "
            f"{max(-smallest, 0.0) + 1e-6 * abs(largest):.3g}"
            + (", or take curvature='ggn'." if curvature == "hessian" else ".")
        )
