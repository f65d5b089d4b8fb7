"""Solvers that iterate for each query: conjugate gradients, and LiSSA's series.

Their loops stay on the device; what went wrong in them is looked at afterwards.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.attribution.influence.curvature import Operands, Product
from bayes_simfluence.attribution.influence.problem import Problem, Solved, Vectors
from bayes_simfluence.checks import WorkFailed, at_most, positive_integer, positive_number


def _dots(left: Vectors, right: Vectors) -> Float[Array, " vector"]:
    return jnp.einsum("vw,vw->v", left, right)


class _Descent(NamedTuple):
    """The state of conjugate gradients for several right sides ``b`` of ``A x = b``.

    Attributes:
        x, r, p, gamma: the solution so far, its residual ``b - A x``, the direction of the next
            step, and the residual's squared length.
        steps: that were made.
        checked: whether ``r`` was computed from ``x``, and not by the recurrence.
        curvature: smallest ``p^T A p / p^T p`` of the last step where the residual was too large.
    """

    x: Vectors
    r: Vectors
    p: Vectors
    gamma: Float[Array, " vector"]
    steps: Int[Array, ""]
    checked: Bool[Array, ""]
    curvature: Float[Array, ""]


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradients for each query (Martens 2010; Koh and Liang 2017, section 3).

    Rounding makes the recurrence of the residual drift, so it is computed from the solution before
    stopping, and the descent begins anew from there where it is still too large. The scores'
    attributes say whether all queries converged, and the largest residual left.

    Attributes:
        tolerance: length of the residual over that of the query's gradient at which to stop.
        iterations: steps at most.
    """

    tolerance: float = 1e-3
    iterations: int = 100

    def solve(self, problem: Problem) -> Solved:
        """As in ``Solver``."""
        positive_number("tolerance", self.tolerance)
        positive_integer("iterations", self.iterations)
        residuals: list[float] = []
        converged: list[bool] = []

        def solve(right: Vectors) -> Vectors:
            done, reached = self._descend(problem.product, problem.operands, right, problem.damped)
            _check_descent(problem, float(done.curvature))
            start = jnp.maximum(_dots(right, right), np.finfo(np.float32).tiny)
            residuals.append(float(jnp.sqrt(done.gamma / start).max()))
            converged.append(bool(reached.all()))
            return done.x

        values = problem.by_solving(solve, 8)
        return values, {
            "solver": "conjugate gradients",
            "tolerance": self.tolerance,
            "iterations": self.iterations,
            "residual": max(residuals),
            "converged": all(converged),
            "damping": problem.damped,
        }

    @partial(jax.jit, static_argnums=(0, 1))
    def _descend(
        self, product: Product, operands: Operands, b: Vectors, damping: Float[Array, ""] | float
    ) -> tuple[_Descent, Bool[Array, " vector"]]:
        """The last state, and which residuals are small enough."""
        goal = self.tolerance**2 * _dots(b, b)

        def ends(state: _Descent) -> Bool[Array, ""]:
            return (state.gamma <= goal).all() | (state.steps >= self.iterations)

        def running(state: _Descent) -> Bool[Array, ""]:
            # A curvature that is not a number is not positive either.
            return (state.curvature > 0) & ~(state.checked & ends(state))

        def multiply(state: _Descent) -> _Descent:
            """A step, or the check of a residual that seems small enough."""
            x, r, p, gamma, steps, _, _ = state
            check = ends(state)
            v = jnp.where(check, x, p)
            pushed = product(operands, v) + damping * v
            curved = _dots(p, pushed)
            met = jnp.where((gamma > goal) & ~check, curved / _dots(p, p), jnp.inf)
            alpha = jnp.where((curved > 0) & ~check, gamma / curved, 0.0)[:, None]
            r = jnp.where(check, b - pushed, r - alpha * pushed)
            after = _dots(r, r)
            beta = jnp.where((gamma > 0) & ~check, after / gamma, 0.0)[:, None]
            return _Descent(x + alpha * p, r, r + beta * p, after, steps + ~check, check, met.min())

        begun = _Descent(
            x=jnp.zeros_like(b),
            r=b,
            p=b,
            gamma=_dots(b, b),
            steps=jnp.zeros((), int),
            checked=jnp.zeros((), bool),
            curvature=jnp.asarray(jnp.inf, b.dtype),
        )
        done = jax.lax.while_loop(running, multiply, begun)
        return done, done.gamma <= goal


def _check_descent(problem: Problem, curvature: float) -> None:
    if np.isnan(curvature):
        problem.blame("A product with the curvature")
    if curvature <= 0:
        raise WorkFailed(
            f"Conjugate gradients met curvature {curvature:.3g} (damping {problem.damped:.3g} "
            f"included), which is not positive: raise damping by more than {-curvature:.3g}"
            + (", or take curvature='ggn'." if problem.curvature == "hessian" else ".")
        )


class _Series(NamedTuple):
    """The state of LiSSA's series.

    Attributes:
        term: number of terms added.
        summed, before: the sum with and without the last term.
        pushed: the damped curvature times ``before``.
        grown: whether the sum is longer than that of a series that converges.
    """

    term: Int[Array, ""]
    summed: Vectors
    before: Vectors
    pushed: Vectors
    grown: Bool[Array, " vector"]


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
        if self.batch is not None:
            size = positive_integer("batch", self.batch)
            at_most("batch", size, count, "examples", do="lower it")
        changes: list[float] = []

        def solve(right: Vectors) -> Vectors:
            total = jnp.zeros_like(right)
            for key in jax.random.split(problem.key, self.repeats):
                done = self._series(problem.product, problem.operands, right, problem.damped, key)
                self._check(problem, done)
                change, length = done.summed - done.before, _dots(done.summed, done.summed)
                ratio = _dots(change, change) / jnp.maximum(length, 1e-30)
                changes.append(float(jnp.sqrt(ratio.max())))
                total = total + done.summed
            return total / (self.repeats * self.scale)

        values = problem.by_solving(solve, 8)
        settings = {name: getattr(self, name) for name in ("depth", "scale", "repeats")}
        attributes = {"solver": "LiSSA", **settings, "batch": self.batch or count}
        return values, {**attributes, "last_change": max(changes), "damping": problem.damped}

    @partial(jax.jit, static_argnums=(0, 1))
    def _series(
        self,
        product: Product,
        operands: Operands,
        right: Vectors,
        damping: Float[Array, ""] | float,
        key: jax.Array,
    ) -> _Series:
        length = jnp.sqrt(_dots(right, right))
        count = len(jax.tree.leaves(operands.examples)[0])

        def running(state: _Series) -> Bool[Array, ""]:
            return (state.term < self.depth) & ~state.grown.any()

        def add(state: _Series) -> _Series:
            drawn = operands
            if self.batch is not None:
                draw = jax.random.fold_in(key, state.term)
                rows = jax.random.choice(draw, count, (self.batch,), replace=False)
                examples = jax.tree.map(lambda leaf: leaf[rows], operands.examples)
                drawn = operands._replace(examples=examples)
            pushed = product(drawn, state.summed) + damping * state.summed
            after = right + state.summed - pushed / self.scale
            # No term of a series that converges is longer than the gradient.
            bound = (state.term + 2) * 1.01 * length
            grown = ~(_dots(after, after) <= bound**2)
            return _Series(state.term + 1, after, state.summed, pushed, grown)

        nothing = jnp.zeros(len(right), bool)
        begun = _Series(jnp.zeros((), int), right, right, jnp.zeros_like(right), nothing)
        return jax.lax.while_loop(running, add, begun)

    def _check(self, problem: Problem, done: _Series) -> None:
        """Raise when the series grew beyond what converges."""
        grown = np.asarray(done.grown)
        if not grown.any():
            return
        if not np.isfinite(done.pushed).all():
            problem.blame("A product with the curvature")
        lengths = _dots(done.before, done.before)
        curved = np.asarray(_dots(done.before, done.pushed) / lengths)[grown][0]
        remedy = (
            "raise damping, or take curvature='ggn': the curvature is not positive there"
            if curved < 0
            else f"raise scale (now {self.scale:.3g}) above {curved:.3g}, or draw a larger batch"
        )
        raise WorkFailed(f"LiSSA diverged in term {int(done.term)}: {remedy}.")
