"""TracIn: what gradient steps on an example do to a query's loss, to first order.

A step of size eta on example i moves the weights by ``-eta g_i``, hence the loss of query q by
``-eta g_i . g_q`` (Pruthi et al. 2020, arXiv 2002.08484, eq. 1; their score has the other sign).
"""

from collections.abc import Sequence

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float, PyTree

from bayes_simfluence.attribution.adam import AdamDiagonal
from bayes_simfluence.attribution.gradients.checkpoints import (
    check_checkpoints,
    check_finite,
    step_sizes_of,
    weights_along,
)
from bayes_simfluence.attribution.gradients.layerwise import (
    layer_products,
    partition_of,
    squared_norms,
)
from bayes_simfluence.attribution.gradients.per_example import MEMORY
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.checks import Misuse
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.checkpoints import SavedWeights
from bayes_simfluence.tasks.task import Task


def tracin(
    task: Task,
    checkpoints: Sequence[SavedWeights],
    *,
    exposures: Float[np.ndarray, "checkpoint train"] | None = None,
    preconditioner: AdamDiagonal | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> xr.DataArray:
    """TracIn-CP: ``score[i, q] = -sum_k step_size_k g_i(k) . g_q(k)``, over all trained weights.

    The first-order change of the query's loss if at EACH checkpoint a step was made on a batch of
    example i alone (exposure 1); in a batch of n examples it would be an n-th of that.
    Of k checkpoints that stand for equal parts of a run, a single exposure at a random time changes
    the loss by ``score / k``; a simulator fits the scale anyway (``additive_simulator``).

    Args:
        checkpoints: of one run of this task. All steps of the run, with the run's exposures, give
            the first-order sum along that run itself (the paper's TracInIdeal).
        exposures: weight of each example at each checkpoint, 1 when omitted; those of a run are
            ``model.arrays.exposures(batch, weight, train)[steps - 1]``.
        preconditioner: Adam's diagonal, ``g_i . (g_q / (sqrt(v) + epsilon))``; plain when omitted.
        memory: bytes held at once, about.
        progress: reports the pairs of examples at every checkpoint; silent when omitted.

    Returns:
        Scores ``(train, query)`` in nats, negative = lowers the loss.

    Raises:
        Misuse: no checkpoints, those of another task, without step sizes; exposures or moments that
            do not fit; a gradient that is not finite (its example is named).
    """
    check_checkpoints(task, checkpoints)
    sizes = step_sizes_of(checkpoints)
    weights = _exposures(exposures, (len(checkpoints), len(task.train_ids)))
    if preconditioner is not None:
        preconditioner.validate(task, len(checkpoints))
    total = np.zeros((len(task.train_ids), len(task.query_ids)))
    partition = partition_of(task)
    with (progress or Silent()).work("TracIn", total.size * len(checkpoints)) as meter:
        for place, (where, params) in enumerate(weights_along(task, checkpoints)):
            scale = None
            if preconditioner is not None:
                scale = preconditioner.scale(task, params, place, memory=memory, where=where)
            gradients = layer_products(
                task, params, partition=partition, scale=scale, memory=memory, meter=meter
            )
            check_finite(task, where, train=gradients.train, query=gradients.query)
            total -= sizes[place] * weights[place][:, None] * gradients.products
    return score_array(
        total,
        task.train_ids,
        task.query_ids,
        method="TracIn-CP" if preconditioner is None else "TracIn-CP, Adam",
        units="nat",
        exposure="1 at each checkpoint" if exposures is None else "given for each checkpoint",
        checkpoint_steps=[saved.step for saved in checkpoints],
        step_sizes=sizes,
        **({"preconditioner": "none"} if preconditioner is None else preconditioner.as_dict()),
    )


def grad_dot(
    task: Task,
    params: PyTree | None = None,
    *,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> xr.DataArray:
    """Grad-Dot: ``-g_i . g_q`` at given weights (Charpiat et al. 2019), TracIn of one checkpoint.

    In nats: the first-order change of the query's loss by a step of size 1 on the example alone.

    Args:
        params: the trained parameters, the task's initial ones when omitted.
        memory: bytes held at once, about.
        progress: reports the pairs of examples; silent when omitted.

    Raises:
        Misuse: a gradient that is not finite (its example is named).
    """
    return _similarity(task, params, memory, progress, cosine=False)


def grad_cos(
    task: Task,
    params: PyTree | None = None,
    *,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> xr.DataArray:
    """Grad-Cos: minus the cosine of two gradients at given weights; 0 where one of them is 0.

    Arguments and errors as for ``grad_dot``.
    """
    return _similarity(task, params, memory, progress, cosine=True)


def self_influence(
    task: Task,
    checkpoints: Sequence[SavedWeights],
    *,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> xr.DataArray:
    """``sum_k step_size_k |g_i(k)|^2``: what one step on an example lowers its OWN loss by.

    Positive numbers, other than scores. Examples that are mislabelled or hard have large ones
    (Pruthi et al. 2020, section 4.1). Arguments and errors as for ``tracin``.

    Returns:
        ``(train,)`` in nats.
    """
    check_checkpoints(task, checkpoints)
    sizes = step_sizes_of(checkpoints)
    total, partition = np.zeros(len(task.train_ids)), partition_of(task)
    with (progress or Silent()).work("self-influence", total.size * len(checkpoints)) as meter:
        for size, (where, params) in zip(sizes, weights_along(task, checkpoints), strict=True):
            norms = squared_norms(task, params, partition=partition, memory=memory, meter=meter)
            check_finite(task, where, train=norms)
            total += size * norms
    return xr.DataArray(
        total,
        dims="train",
        coords={"train": list(task.train_ids)},
        name="self_influence",
        attrs={
            "long_name": "first-order decrease of an example's own loss by steps on it alone",
            "units": "nat",
            "sign": "positive; larger = steps on the example change its own loss more",
            "method": "TracIn-CP self-influence",
            "checkpoint_steps": [saved.step for saved in checkpoints],
            "step_sizes": sizes,
        },
    )


def _similarity(
    task: Task, params: PyTree | None, memory: int, progress: Progress | None, *, cosine: bool
) -> xr.DataArray:
    method = "Grad-Cos" if cosine else "Grad-Dot"
    where = "the initial weights" if params is None else "the given weights"
    weights = jax.tree.map(jax.numpy.asarray, task.params if params is None else params)
    pairs = len(task.train_ids) * len(task.query_ids)
    with (progress or Silent()).work(method, pairs) as meter:
        gradients = layer_products(task, weights, memory=memory, meter=meter)
    check_finite(task, where, train=gradients.train, query=gradients.query)
    values = -gradients.products
    if cosine:
        norms = np.sqrt(gradients.train)[:, None] * np.sqrt(gradients.query)[None]
        values = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
    return score_array(
        values,
        task.train_ids,
        task.query_ids,
        method=method,
        units="1" if cosine else "nat",
        weights=where,
    )


def _exposures(
    exposures: Float[np.ndarray, "checkpoint train"] | None, shape: tuple[int, int]
) -> Float[np.ndarray, "checkpoint train"]:
    if exposures is None:
        return np.ones(shape)
    if exposures.shape != shape or not np.isfinite(exposures).all():
        raise Misuse(
            "exposures",
            got=f"shape {exposures.shape}"
            if exposures.shape != shape
            else "values that are not finite",
            expected=f"finite weights of shape {shape}, for each checkpoint and example",
            do="take the rows of model.arrays.exposures at the checkpoints' steps",
        )
    return exposures
