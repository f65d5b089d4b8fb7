"""Any solver in Gram coordinates: for few examples of few outputs, of any network."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from bayes_simfluence.attribution.influence.gram import Gram, gram_of
from bayes_simfluence.attribution.influence.problem import SHARE_OF_MEAN, Problem, Solved, Solver
from bayes_simfluence.checks import Misuse


@dataclass(frozen=True)
class InGram:
    """A solver that works with coordinates in Gram coordinates instead of weights.

    Up to rounding, conjugate gradients and LiSSA go through the same iterates as in all the
    weights, at the price of one Gram matrix instead of several passes through the network for each
    term and query. Arnoldi's random start lacks the part that is orthogonal to all gradients, which
    the first product would remove anyway.

    Attributes:
        solver: what solves there; None = exactly, in double precision, and for any damping > 0.
        gram: coordinates of the same task and weights, where ``gram_of`` has computed them before.
    """

    solver: Solver | None = None
    gram: Gram | None = None

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``.

        Raises:
            Misuse: the Hessian, no damping, coordinates of another task, too many outputs or
                examples.
        """
        problem.check_ggn("InGram")
        if problem.damping == 0:
            raise Misuse(
                "damping",
                got="0 with InGram",
                expected="a number > 0",
                do="pass damping=None for .1 of the mean eigenvalue, or a number",
            )
        task = problem.task
        gram = self.gram or gram_of(task, problem.params, memory=problem.memory)
        if (len(gram.rows), len(gram.queries)) != (len(task.train_ids), len(task.query_ids)):
            raise Misuse(
                "gram",
                got=f"{len(gram.rows)} training examples and {len(gram.queries)} queries",
                expected=f"{len(task.train_ids)} and {len(task.query_ids)}, those of the task",
                do="take gram_of(task, params), or leave it out",
            )
        damping = problem.damping
        if damping is None:
            damping = SHARE_OF_MEAN * gram.mean_eigenvalue
        axes = gram.rows.shape[2]
        if self.solver is None:
            problem.meter.advance(len(task.query_ids))
            attributes = {"solver": "exact, in Gram coordinates", "damping": damping}
            return _solved(gram, damping), {**attributes, "dimensions": axes}
        inside = replace(problem, task=gram.task(task), params=jnp.zeros(axes), damping=damping)
        values, attributes = self.solver.solve(inside)
        name = f"{attributes['solver']} in Gram coordinates"
        return values, {**attributes, "solver": name, "dimensions": axes}


def _solved(gram: Gram, damping: float) -> np.ndarray:
    """``g_q^T (C + damping I)^-1 g_i``, all pairs."""
    count = len(gram.rows)
    # The last coordinate is one that no training example has.
    rows, queries = gram.rows[:, :, :-1], gram.queries[:, :-1]
    curvature = np.einsum("nk,nka,nkb->ab", gram.curved, rows, rows, optimize=True) / count
    values, vectors = np.linalg.eigh(curvature)
    trains = np.einsum("nk,nka->na", gram.slope, rows) @ vectors
    return trains / (np.maximum(values, 0.0) + damping) @ (queries @ vectors).T
