"""Scores as a simulator: every attribution method is Simfluence-Linear with ``a = 0``.

TracIn (Pruthi et al. 2020, eq. 1) says that a step of size ``eta`` on example i changes a query's
loss by ``-eta g_i . g_q``, influence functions (Koh and Liang 2017, eq. 2) that weight on example i
does so by ``-g_q . H^-1 g_i``: either way a number ``s_iq`` that does not depend on when the
example is met or on the loss then. Added up along a curriculum, with a batch's mean gradient, this
is ``L_t = L_{t-1} + c sum_i e_ti s_iq``: Simfluence-Linear (Guu et al. 2023, eq. 3) with ``a = 0``
and ``b_iq = c s_iq``. The one scale ``c`` stands for what the method leaves open (step size,
number of examples, damping); it is fitted to the recorded runs by least squares over all times.
"""

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.attribution.scores import check_scores
from bayes_simfluence.checks import Misuse, named
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.twins import without_twins
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.simulators.affine import AffineSimulator


def additive_simulator(scores: xr.DataArray, runs: xr.Dataset, *, band: bool = True) -> Posterior:
    """The simulator of a method's scores, its scale fitted to recorded runs.

    Args:
        scores: effects on the loss, ``(train, query)``, a negative one lowers it; ids as in
            ``runs``, in any order.
        runs: recorded runs, none of those that the simulator is judged by; of twins the first
            alone counts.
        band: add the residual trajectories of the runs, each at the scale that the other runs
            give, as predictive noise; without it the simulation has no spread.

    Returns:
        A posterior like any other: simulate, compare and save it.

    Raises:
        Misuse: ids without a score, scores that are not finite, fewer than two runs for a band.
    """
    check_scores(scores)
    runs, _ = without_twins(usable_runs(runs))
    count = runs.sizes["run"]
    if band and count < 2:
        raise Misuse(
            "runs", got="one run", expected="at least two", do="record more, or pass band=False"
        )
    rows, columns = (
        named(f"scores of {dim} ids", runs[dim].values, scores[dim].values)
        for dim in ("train", "query")
    )
    effects = np.asarray(scores.values, float)[np.ix_(rows, columns)]
    loss = np.asarray(runs["loss"].values, float)
    known = np.isfinite(loss)
    change = np.where(known, loss - loss[:, :1], 0.0)
    summed = np.where(known, _summed(recorded_arrays(runs), effects), 0.0)
    # Sufficient statistics of each run: a run is left out by subtraction.
    cross, square = ((factor * summed).sum(axis=(1, 2)) for factor in (change, summed))
    scale = _ratio(cross.sum(), square.sum())
    residual = None
    if band:
        others = np.array(
            [_ratio(cross.sum() - cross[run], square.sum() - square[run]) for run in range(count)]
        )
        residual = change - others[:, None, None] * summed
    b = scale * effects.T
    total = max(float(np.square(change).sum()), np.finfo(float).tiny)
    explained = 1.0 - float(np.square(change - scale * summed).sum()) / total
    return Posterior(
        simulator=AffineSimulator(np.zeros_like(b), b, residual=residual),
        verdict=_verdict(scale, explained, count),
        runs=runs,
        settings={"method": str(scores.attrs.get("method", "scores")), "scale": scale},
    )


def _summed(
    runs: RunArrays, effects: Float[np.ndarray, "train query"]
) -> Float[np.ndarray, "run time query"]:
    """What the scores add up to along each run, 0 before the first step."""
    with double_precision():
        steps = np.asarray(runs.each(lambda run: run.exposures() @ effects))
    return np.concatenate([np.zeros_like(steps[:, :1]), steps.cumsum(axis=1)], axis=1)


def _ratio(cross: float, square: float) -> float:
    return float(cross / square) if square > 0 else 0.0


def _verdict(scale: float, explained: float, count: int) -> Verdict:
    sentence = (
        f"One scale, {scale:.3g}, fitted on {count} runs, explains {explained:.0%} of the squared "
        "change of their losses."
        if scale > 0
        else f"The scores point the wrong way: their best scale on {count} runs is {scale:.3g}. "
        "Check their sign (a negative score lowers the loss)."
    )
    return Verdict(scale > 0, sentence, numbers={"scale": scale, "explained": explained})
