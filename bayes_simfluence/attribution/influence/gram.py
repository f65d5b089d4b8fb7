"""Gradients of a task in coordinates found from their Gram matrix.

The Gauss-Newton matrix is ``C = sum_r u_r u_r^T / n``, with one vector ``u_r`` for each training
example and direction of its outputs in which the loss is curved. It takes every gradient of a
training example to another vector of their span, so influence functions, and the iterates of
whatever computes them, never leave that span (the identity behind kernel ridge regression; Ren and
Goldfarb 2019, arXiv 1906.02353, use it for natural gradients). An orthonormal basis of the span has
as many vectors as the gradients have dimensions, and the coordinates follow from the gradients'
inner products alone, which ``layerwise`` computes without whole gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from bayes_simfluence.attribution.gradients.checkpoints import check_finite
from bayes_simfluence.attribution.gradients.layerwise import gram_matrix
from bayes_simfluence.attribution.gradients.per_example import MEMORY
from bayes_simfluence.attribution.influence.curvature import (
    MOST_OUTPUTS,
    check_curvature,
    output_factor,
    output_size,
)
from bayes_simfluence.checks import Misuse
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.tasks.task import Functions, Task

MOST_ROWS = 8192
"""Vectors up to which their inner products are factored."""

NOTHING = 1e-5
"""Share of an output slope that counts as rounding."""

SHORT = 1e-6
"""Eigenvalue of the vectors' cosines, over the largest, that counts as rounding."""


@dataclass(frozen=True)
class Gram:
    """Gradients of a task at given weights, in orthonormal coordinates.

    Attributes:
        rows: of each training example, vectors along which its loss is curved, and one of the
            rest of its gradient where such a rest exists.
        curved: 1 for the first, 0 for the rest.
        slope: each example's gradient is ``sum_k slope_k row_k``.
        queries: the queries' gradients. The last coordinate is the length of what is orthogonal to
            all training examples; products between two queries are not kept.
        mean_eigenvalue: of the Gauss-Newton matrix in all the weights of the task.
    """

    rows: Float[np.ndarray, "train row axis"]
    curved: Float[np.ndarray, "train row"]
    slope: Float[np.ndarray, "train row"]
    queries: Float[np.ndarray, "query axis"]
    mean_eigenvalue: float

    @property
    def largest(self) -> float:
        """Bound of the eigenvalues of any batch's Gauss-Newton matrix: the largest trace of one."""
        return float(self._traces.max())

    @property
    def mean_within(self) -> float:
        """Mean eigenvalue of the Gauss-Newton matrix among the coordinates."""
        return float(self._traces.mean()) / max(self.rows.shape[2] - 1, 1)

    @property
    def _traces(self) -> Float[np.ndarray, " train"]:
        """Of each example's own Gauss-Newton matrix."""
        return np.einsum("nka,nka,nk->n", self.rows, self.rows, self.curved)

    def task(self, of: Task) -> Task:
        """A task of few weights with the inner products, and so the influences, of the whole one.

        The loss of an example is a parabola whose gradient at 0, and Gauss-Newton matrix, are
        those of the task that these gradients are of.

        Args:
            of: that task; its ids are kept.
        """
        kept = self.rows.shape[1]
        first = np.eye(kept)[0]
        train = {"rows": self.rows, "curved": self.curved, "slope": self.slope}
        query = {
            "rows": first[None, :, None] * self.queries[:, None],
            "curved": np.zeros((len(self.queries), kept)),
            "slope": np.broadcast_to(first, (len(self.queries), kept)),
        }
        return Task(
            params=jnp.zeros(self.rows.shape[2]),
            loss=_parabola,
            outputs=_along_rows,
            output_loss=_parabola_along,
            train=jax.tree.map(jnp.asarray, train),
            query=jax.tree.map(jnp.asarray, query),
            train_ids=of.train_ids,
            query_ids=of.query_ids,
        )


def _along_rows(weights: Array, example: PyTree) -> Array:
    return example["rows"] @ weights


def _parabola_along(output: Array, example: PyTree) -> Array:
    return (example["curved"] * output**2 / 2 + example["slope"] * output).sum()


def _parabola(weights: Array, example: PyTree) -> Array:
    return _parabola_along(_along_rows(weights, example), example)


def fits_gram(task: Task, params: PyTree) -> bool:
    """Whether a task has few enough outputs and examples; it has outputs."""
    outputs = output_size(task, params)
    return outputs <= MOST_OUTPUTS and outputs * len(task.train_ids) <= MOST_ROWS


def gram_of(
    task: Task,
    params: PyTree | None = None,
    *,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Gram:
    """Compute the Gram coordinates of a task's gradients; several solvers can share them.

    Args:
        params: the trained parameters at which gradients are taken, the task's initial ones when
            omitted.
        memory: bytes held at once, about.
        progress: reports the pairs of vectors; silent when omitted.

    Raises:
        Misuse: a task without outputs, outputs or examples too many, a gradient that is not finite
            (its example is named).
    """
    params = task.params if params is None else params
    check_curvature(task, params, "ggn", None)
    if not fits_gram(task, params):
        outputs, count = output_size(task, params), len(task.train_ids)
        raise Misuse(
            "solver",
            got=f"Gram coordinates of {count} training examples of {outputs} outputs",
            expected=f"at most {MOST_OUTPUTS} outputs, and {MOST_ROWS} in all",
            do="take EKFAC, Arnoldi or ConjugateGradient",
        )
    train, query = (_slopes(task, params, some) for some in (task.train, task.query))
    where = "the given weights"
    sums = {"train": train.slope.sum(axis=1), "query": query.slope.sum(axis=1)}
    check_finite(task, where, **sums)
    rows, curved, slope = _rows(train)
    wide = _row_task(task, params, rows, query.slope)
    pairs = len(wide.train_ids) * (len(wide.train_ids) + len(task.query_ids))
    with (progress or Silent()).work("Gram matrix", pairs) as meter:
        gram = gram_matrix(wide, params, memory=memory, meter=meter)
    squares = np.diag(gram.train).reshape(curved.shape)
    check_finite(task, where, train=squares.sum(axis=1), query=gram.query)
    coordinates, queries = _orthonormal(gram.train, gram.cross, gram.query)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    trace = float((squares * curved).sum()) / len(task.train_ids)
    return Gram(
        rows=coordinates.reshape(*curved.shape, -1),
        curved=curved,
        slope=slope,
        queries=queries,
        mean_eigenvalue=trace / weights,
    )


class _Slopes(NamedTuple):
    """Of each example: the Hessian's factor and the slope of its loss in the outputs."""

    factor: Float[np.ndarray, "example output output"]
    slope: Float[np.ndarray, "example output"]
    shape: tuple[int, ...]


def _slopes(task: Task, params: PyTree, examples: PyTree) -> _Slopes:
    arrays = _factors_and_slopes(task.functions, params, task.frozen, examples)
    factor, slope = (np.asarray(array, float) for array in arrays)
    return _Slopes(factor, slope.reshape(len(slope), -1), slope.shape[1:])


@partial(jax.jit, static_argnums=0)
def _factors_and_slopes(
    task: Functions, params: PyTree, frozen: PyTree, examples: PyTree
) -> tuple[Array, Array]:
    def of_example(example: PyTree) -> tuple[Array, Array]:
        outputs = task.outputs_at(params, frozen, example)
        slope = jax.grad(task.output_loss)(outputs, example)  # type: ignore[arg-type]
        return output_factor(task, outputs, example), slope

    return jax.lax.map(of_example, examples)


def _rows(
    slopes: _Slopes,
) -> tuple[
    Float[np.ndarray, "train row *outputs"],
    Float[np.ndarray, "train row"],
    Float[np.ndarray, "train row"],
]:
    """Slopes that give the rows, which of them are curved, the loss's coordinates in them."""
    # The rows of a factor are orthogonal; some are 0 (for a softmax, always one).
    square = np.square(slopes.factor).sum(axis=2)
    reached = square > NOTHING * square.max(axis=1, keepdims=True)
    along = np.einsum("nko,no->nk", slopes.factor, slopes.slope)
    slope = np.where(reached, along / np.where(reached, square, 1.0), 0.0)
    left = slopes.slope - np.einsum("nk,nko->no", slope, slopes.factor)
    rest = np.linalg.norm(left, axis=1) > 100 * NOTHING * np.linalg.norm(slopes.slope, axis=1)
    rows = np.concatenate([reached[:, :, None] * slopes.factor, (rest[:, None] * left)[:, None]], 1)
    curved = np.concatenate([reached, np.zeros_like(reached[:, :1])], axis=1)
    slope = np.concatenate([slope, rest[:, None]], axis=1)
    used: Bool[np.ndarray, " row"] = np.append(reached.any(axis=0), rest.any())
    used[0] |= not used.any()
    rows = rows[:, used].reshape(len(rows), -1, *slopes.shape)
    return rows, curved[:, used].astype(float), slope[:, used]


class _RowLoss(NamedTuple):
    """The loss whose gradient is the Jacobian's product with ``row["slope"]``."""

    outputs: Callable[[Any, PyTree], Array]

    def __call__(self, weights: Any, row: PyTree) -> Float[Array, ""]:
        return (self.outputs(weights, row["example"]) * row["slope"]).sum()


def _row_task(
    task: Task,
    params: PyTree,
    rows: Float[np.ndarray, "train row *outputs"],
    queries: Float[np.ndarray, "query output"],
) -> Task:
    """A task whose gradients are the Jacobians' products with these slopes."""
    count, kept, *shape = rows.shape

    def made(examples: PyTree, slopes: np.ndarray) -> PyTree:
        return {"example": examples, "slope": jnp.asarray(slopes, jnp.float32)}

    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, kept, axis=0), task.train)
    return replace(
        task,
        params=params,
        loss=_RowLoss(task.outputs),  # type: ignore[arg-type]
        train=made(repeated, rows.reshape(-1, *shape)),
        query=made(task.query, queries.reshape(-1, *shape)),
        train_ids=range(count * kept),
    )


def _orthonormal(
    kernel: Float[np.ndarray, "row row"],
    crossed: Float[np.ndarray, "row query"],
    squares: Float[np.ndarray, " query"],
) -> tuple[Float[np.ndarray, "row axis"], Float[np.ndarray, "query axis"]]:
    """Coordinates of vectors, and of queries with the length that they have beyond these."""
    # Of vectors of length 1: short ones (examples that are fitted) would drown in rounding.
    length = np.sqrt(np.maximum(np.diag(kernel), 0.0))
    unit = np.where(length > 0, 1 / np.where(length > 0, length, 1.0), 0.0)
    cosines = kernel * unit[:, None] * unit[None]
    values, vectors = np.linalg.eigh((cosines + cosines.T) / 2)
    kept = values > SHORT * max(values[-1], 0.0)
    root, vectors = np.sqrt(values[kept]), vectors[:, kept]
    inside = (crossed * unit[:, None]).T @ vectors / root
    beyond = np.sqrt(np.maximum(squares - np.square(inside).sum(axis=1), 0.0))
    rows = length[:, None] * vectors * root
    return np.pad(rows, ((0, 0), (0, 1))), np.column_stack([inside, beyond])
