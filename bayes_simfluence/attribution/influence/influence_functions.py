"""Influence functions: what a little more weight on a training example does to a query's loss.

Weight ``w`` added to example i in the SUM of the training losses moves the optimum by
``-w C^-1 g_i / n``, where ``C`` is the curvature of the mean of the ``n`` losses (Cook and
Weisberg 1982; Koh and Liang 2017, arXiv 1703.04730, eq. 1), and so the query's loss by ``w s_iq``,

    s_iq = -g_q^T (C + damping I)^-1 g_i / n

to first order. Leaving example i out is ``w = -1``. With Gauss-Newton curvature and damping this is
the response of a proximal step from where training ended, also before it converged (Bae et al.
2022, arXiv 2209.05364).
"""

import jax
import xarray as xr
from jaxtyping import PyTree

from bayes_simfluence.attribution.gradients.per_example import MEMORY
from bayes_simfluence.attribution.influence.curvature import Curvature, check_curvature
from bayes_simfluence.attribution.influence.ekfac import EKFAC
from bayes_simfluence.attribution.influence.gram import fits_gram
from bayes_simfluence.attribution.influence.gram_solver import InGram
from bayes_simfluence.attribution.influence.iterative import ConjugateGradient, LiSSA
from bayes_simfluence.attribution.influence.problem import Problem, Solver
from bayes_simfluence.attribution.influence.solvers import Arnoldi, Dense
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.checks import Misuse, keyed, positive_integer
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.tasks.task import Task

__all__ = ["EKFAC", "Arnoldi", "ConjugateGradient", "Dense", "InGram", "LiSSA", "influence"]

FORMULA = "-g_query (curvature + damping I)^-1 g_train / number of training examples"


def influence(
    task: Task,
    params: PyTree | None = None,
    *,
    solver: Solver | None = None,
    curvature: Curvature = "ggn",
    damping: float | None = None,
    key: jax.Array,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> xr.DataArray:
    """Influence of every training example on every query.

    Args:
        params: the trained parameters, as ``weights_at`` makes them of a checkpoint; the
            task's initial ones when None.
        solver: how to multiply with the inverse; when None, ``InGram()`` where there are few enough
            examples of few outputs for it, and else ``ConjugateGradient()``.
        curvature: ``ggn`` or ``hessian``, of the mean training loss.
        damping: added to every eigenvalue, >= 0; None = .1 of the mean eigenvalue (with EK-FAC: of
            each layer's), after Grosse et al. 2023 (arXiv 2308.03296).
        key: decides what the solver draws.
        memory: bytes of gradients and vectors held at once.

    Returns:
        Scores ``(train, query)``: nats per unit of weight on the example in the sum of the training
        losses, negative = helpful. Damping and all that decided the solver are attributes.

    Raises:
        Misuse: a task without what the curvature needs, damping that is impossible, a gradient
            that is not finite.
        WorkFailed: a curvature that is not positive definite, a series that diverges.
    """
    keyed(key)
    positive_integer("memory", memory)
    if damping is not None and not damping >= 0:
        raise Misuse("damping", got=damping, expected="a number >= 0, or None", do="correct it")
    params = task.params if params is None else params
    check_curvature(task, params, curvature, damping)
    if solver is None:
        small = curvature == "ggn" and damping != 0 and fits_gram(task, params)
        solver = InGram() if small else ConjugateGradient()
    with (progress or Silent()).work("influence", len(task.query_ids)) as meter:
        problem = Problem(task, params, curvature, damping, key, memory, meter)
        values, attributes = solver.solve(problem)
    return score_array(
        -values / len(task.train_ids),
        task.train_ids,
        task.query_ids,
        method=f"influence functions ({attributes['solver']})",
        units="nat per unit of weight",
        formula=FORMULA,
        curvature=curvature,
        **attributes,
    )
