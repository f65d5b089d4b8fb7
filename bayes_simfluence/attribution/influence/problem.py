"""What a solver of influence functions is given, and what it gives back."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from bayes_simfluence.attribution.gradients.gradients import (
    GradientMaker,
    flat_gradients,
    gradient_maker,
)
from bayes_simfluence.attribution.influence.curvature import (
    Curvature,
    Product,
    curvature_product,
    mean_eigenvalue,
)
from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.progress import Meter
from bayes_simfluence.tasks.task import Task

__all__ = [
    "SHARE_OF_MEAN",
    "Problem",
    "Said",
    "Solved",
    "Solver",
    "Vectors",
    "all_finite",
    "check_finite",
    "regular",
]

Vectors = Float[Array, "vector weight"]
Said = dict[str, Any]
Solved = tuple[Float[np.ndarray, "train query"], Said]
"""``g_q^T (C + damping I)^-1 g_i``, and what is to be said of how it was found."""

SHARE_OF_MEAN = 0.1
"""Damping per mean eigenvalue where none is given (Grosse et al. 2023, section 3.1)."""


@dataclass(frozen=True)
class Problem:
    """What a solver is given.

    Attributes:
        params: the trained parameters at which everything is taken.
        damping: added to every eigenvalue; None = the solver's default.
        memory: bytes of gradients and vectors held at once.
        meter: advanced by one for each query that is done.
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
        return curvature_product(self.task, self.params, self.curvature)

    @cached_property
    def maker(self) -> GradientMaker:
        """Gradients of single examples."""
        return gradient_maker(self.task)

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
        """Gradients of the examples, a piece at a time.

        Raises:
            Misuse: one that is not finite; its example is named.
        """
        pieces = flat_gradients(self.maker, self.params, getattr(self.task, part), memory=memory)
        for rows, gradients in pieces:
            check_finite(self.task, part, rows, all_finite(gradients))
            yield rows, gradients

    def blame(self, what: str) -> NoReturn:
        """Say of which training example it comes that ``what`` is not finite.

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
        """The products for all training examples and queries, and words about them.

        Raises:
            Misuse: settings that do not fit the problem, gradients that are not finite.
            WorkFailed: a curvature that is not positive definite, iterations that diverge.
        """
        ...


def check_finite(
    task: Task, part: str, rows: slice, finite: Bool[np.ndarray, " piece"] | Bool[Array, " piece"]
) -> None:
    """Raise when a gradient is not finite; the first such example is named."""
    wrong = np.flatnonzero(~np.asarray(finite))
    if len(wrong):
        name = getattr(task, f"{part}_ids")[rows.start + int(wrong[0])]
        raise Misuse(
            f"gradient of {part} example {name}",
            got="values that are not finite",
            expected="finite numbers",
            do="look at that example's loss, or take weights from before training diverged",
        )


@jax.jit
def all_finite(rows: Vectors) -> Bool[Array, " vector"]:
    """Whether all of each row's numbers are finite."""
    return jnp.isfinite(rows).all(axis=1)


def regular(smallest: float, largest: float, damping: float, curvature: str) -> None:
    """Raise unless a damped curvature with these extreme eigenvalues can be inverted."""
    if not smallest > np.finfo(np.float32).eps * abs(largest):
        raise WorkFailed(
            f"The {curvature} with damping {damping:.3g} has eigenvalues from {smallest:.3g} to "
            f"{largest:.3g}, so it cannot be inverted: raise damping by more than "
            f"{max(-smallest, 0.0) + 1e-6 * abs(largest):.3g}"
            + (", or take curvature='ggn'." if curvature == "hessian" else ".")
        )
