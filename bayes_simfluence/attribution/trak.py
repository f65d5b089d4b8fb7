"""TRAK: attribution by random projections of gradients (Park et al. 2023, arXiv 2303.14186).

The network is approximated by a linear model in its gradients' projections, and a Newton step of
logistic regression gives the effect of an example on a query's output.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PyTree

from bayes_simfluence.attribution.gradients.checkpoints import (
    check_checkpoints,
    check_finite,
    weights_along,
)
from bayes_simfluence.attribution.gradients.per_example import MEMORY
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.checks import Misuse, choice_of, keyed, positive_integer
from bayes_simfluence.progress import Meter, Progress, Silent
from bayes_simfluence.recording.batches import over_batches
from bayes_simfluence.recording.checkpoints import SavedWeights
from bayes_simfluence.recording.features import random_signs, sketched
from bayes_simfluence.tasks.task import Functions, Task

BATCH = 25
"""Examples between two reports of progress."""

SINGULAR = 1e12
"""Condition number from which a matrix counts as singular."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""Error below which the network counts as certain: no gradient is divided by zero."""


_Projected = tuple[Float[Array, "*example dimension"], Float[Array, "*example"]]
"""Gradients of the outputs of several examples, and how wrong the network is on them."""


def trak(
    task: Task,
    checkpoints: Sequence[SavedWeights],
    *,
    dimensions: int = 2048,
    damping: int | float = 0.01,
    of: str = "loss",
    key: jax.Array,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> xr.DataArray:
    """TRAK scores, averaged over checkpoints.

    The output f of an example is the log-odds of what is right, ``log(p / (1 - p))``, with
    ``p = exp(-loss)``: for classification the right label's probability, for texts the geometric
    mean of the right tokens'. Its gradient is ``-grad(loss) / (1 - p)``. With the projected output
    gradients of the training examples as rows of Phi and a query's as phi, and means over
    checkpoints, example i changes the query's output by
    ``mean(phi (Phi^T Phi + lambda)^-1 phi_i) mean(1 - p_i)`` (section 3), and its loss by
    ``-(1 - p)`` times that. Gradients are projected by random signs and folding (a count sketch).

    Args:
        checkpoints: weights of this task; the paper takes the last ones of several runs. Step sizes
            are not used.
        dimensions: length of a projected gradient.
        damping: lambda as a share of the mean of Phi^T Phi's eigenvalues (of those that can be
            above 0, as many as examples or dimensions); 0 is the paper's, for many more examples
            than dimensions.
        of: ``loss`` for effects on the loss in nats; ``log-odds`` for the paper's own scores with
            the sign turned, so that negative = helpful there too.
        key: decides the projection.
        memory: bytes of gradients held at once.
        progress: reports every few examples; silent when omitted.

    Raises:
        Misuse: no checkpoints, or those of another task; a curvature that is singular without
            damping; a gradient that is not finite (its example is named).
    """
    keyed(key)
    check_checkpoints(task, checkpoints)
    length = positive_integer("dimensions", dimensions)
    choice_of("of", of, ("loss", "log-odds"))
    if not 0 <= damping < np.inf:
        raise Misuse("damping", got=damping, expected="a number >= 0", do="pass 0.01, say")
    sizes = len(task.train_ids), len(task.query_ids)
    total, wrong_train, wrong_query = np.zeros(sizes), np.zeros(sizes[0]), np.zeros(sizes[1])
    projected = _projector(task, length, key, memory)
    used = []
    with (progress or Silent()).work("TRAK", sum(sizes) * len(checkpoints)) as meter:
        for where, params in weights_along(task, checkpoints):
            (train, train_error), (query, query_error) = (
                _all_projected(partial(projected, params), part, meter)
                for part in (task.train, task.query)
            )
            check_finite(task, where, train=train.sum(axis=1), query=query.sum(axis=1))
            effects, added = newton_effects(train, query, float(damping))
            total += effects / len(checkpoints)
            wrong_train += train_error / len(checkpoints)
            wrong_query += query_error / len(checkpoints)
            used.append(added)
    values = -total * wrong_train[:, None]
    return score_array(
        values * wrong_query[None] if of == "loss" else values,
        task.train_ids,
        task.query_ids,
        method="TRAK",
        units="nat" if of == "loss" else "log-odds",
        dimensions=length,
        damping=float(damping),
        damping_added=used,
        checkpoint_steps=[saved.step for saved in checkpoints],
    )


def newton_effects(
    train: Float[np.ndarray, "train dimension"],
    query: Float[np.ndarray, "query dimension"],
    damping: float,
) -> tuple[Float[np.ndarray, "train query"], float]:
    """``Phi (Phi^T Phi + lambda)^-1 phi^T``, and lambda.

    Args:
        damping: lambda as a share of the mean eigenvalue.

    Raises:
        Misuse: the matrix is singular.
    """
    count, length = train.shape
    # Either matrix has the other's eigenvalues, and zeros: the smaller one is solved.
    small = train.T @ train if length <= count else train @ train.T
    added = damping * float(np.trace(small)) / len(small)
    damped = small + added * np.eye(len(small))
    if (damping == 0 and length > count) or np.linalg.cond(damped) > SINGULAR:
        raise Misuse(
            "damping",
            got=f"{damping} with {count} training examples in {length} dimensions: the curvature "
            "is singular",
            expected="a matrix that can be inverted",
            do="raise damping (0.01, say), or lower dimensions",
        )
    if length <= count:
        return train @ np.linalg.solve(damped, query.T), added
    return np.linalg.solve(damped, train @ query.T), added


def _projector(
    task: Task, length: int, key: jax.Array, memory: int
) -> Callable[[PyTree, PyTree], _Projected]:
    signs = random_signs(task.params, key)
    width = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    # A gradient and its signed copy.
    at_once = max(1, min(BATCH, memory // (8 * width)))

    made = partial(_made, task.functions, length, at_once)
    return lambda params, examples: made(params, task.frozen, signs, examples)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _made(
    task: Functions,
    length: int,
    at_once: int,
    params: PyTree,
    frozen: PyTree,
    signs: list[Array],
    examples: PyTree,
) -> _Projected:
    def of_example(example: PyTree) -> _Projected:
        value, gradient = jax.value_and_grad(task.loss_at)(params, frozen, example)
        error = jnp.maximum(-jnp.expm1(-value), SMALLEST)
        return -sketched(gradient, signs, length) / error, error

    return jax.lax.map(of_example, examples, batch_size=at_once)


def _all_projected(
    projected: Callable[[PyTree], _Projected], examples: PyTree, meter: Meter
) -> tuple[Float[np.ndarray, "example dimension"], Float[np.ndarray, " example"]]:
    """Projected gradients of all examples and their errors, in float64."""
    batches = [batch for _, batch in over_batches(projected, examples, BATCH, meter)]
    gradients, errors = (np.concatenate(parts, dtype=float) for parts in zip(*batches, strict=True))
    return gradients, errors
