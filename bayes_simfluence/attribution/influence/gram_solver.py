"""Any solver in the span of the gradients: for few examples of few outputs, of any network."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bayes_simfluence.attribution.influence.gram import Span, span_of
from bayes_simfluence.attribution.influence.problem import SHARE_OF_MEAN, Problem, Solved, Solver
from bayes_simfluence.checks import Misuse

__all__ = ["InSpan"]


@dataclass(frozen=True)
class InSpan:
    """A solver that works with coordinates in the span of the gradients, and not with weights.

    Exact in exact arithmetic: conjugate gradients and LiSSA go through the same iterates as in all
    the weights, at the price of one matrix of inner products instead of several passes through the
    network for each term and query. Arnoldi's random start has no part outside of the span, which
    the first product would take away.

    Attributes:
        solver: what solves there; None = exactly, in double precision, and for any damping > 0.
        span: of the same task and weights, where it was found before; ``span_of``.
    """

    solver: Solver | None = None
    span: Span | None = None

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``.

        Raises:
            Misuse: the Hessian, no damping, the span of another task, outputs or examples too many.
        """
        _check(problem)
        task = problem.task
        span = self.span or span_of(task, problem.params, memory=problem.memory)
        if (len(span.rows), len(span.queries)) != (len(task.train_ids), len(task.query_ids)):
            raise Misuse(
                "span",
                got=f"{len(span.rows)} training examples and {len(span.queries)} queries",
                expected=f"{len(task.train_ids)} and {len(task.query_ids)}, those of the task",
                do="take span_of(task, params), or leave it out",
            )
        damping = problem.damping
        if damping is None:
            damping = SHARE_OF_MEAN * span.mean_eigenvalue
        axes = span.rows.shape[2]
        if self.solver is None:
            problem.meter.advance(len(task.query_ids))
            said = {"solver": "exact, in the span of the gradients", "damping": damping}
            return _solved(span, damping), {**said, "dimensions": axes}
        inside = Problem(
            task=span.task(task),
            params=jnp.zeros(axes),
            curvature="ggn",
            damping=damping,
            key=problem.key,
            memory=problem.memory,
            meter=problem.meter,
        )
        values, said = self.solver.solve(inside)
        name = f"{said['solver']} in the span of the gradients"
        return values, {**said, "solver": name, "dimensions": axes}


def _solved(span: Span, damping: float) -> np.ndarray:
    """``g_q^T (C + damping I)^-1 g_i``, all pairs."""
    count = len(span.rows)
    # The last coordinate is one that no training example has.
    rows, queries = span.rows[:, :, :-1], span.queries[:, :-1]
    curvature = np.einsum("nk,nka,nkb->ab", span.curved, rows, rows, optimize=True) / count
    values, vectors = np.linalg.eigh(curvature)
    trains = np.einsum("nk,nka->na", span.slope, rows) @ vectors
    return trains / (np.maximum(values, 0.0) + damping) @ (queries @ vectors).T


def _check(problem: Problem) -> None:
    if problem.curvature != "ggn":
        raise Misuse(
            "curvature",
            got="'hessian' with InSpan",
            expected="'ggn', which is made of gradients",
            do="pass curvature='ggn', or take another solver",
        )
    if problem.damping == 0:
        raise Misuse(
            "damping",
            got="0 with InSpan",
            expected="a number > 0",
            do="pass damping=None for .1 of the mean eigenvalue, or a number",
        )
