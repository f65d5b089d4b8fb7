"""Hyperparameters of the two-timescale model, and what left-out runs say of its band."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import minimize
from scipy.stats import t as student_t

from bayes_simfluence.gaussian.designs import assembled, linked_change
from bayes_simfluence.gaussian.fitted import conditioned_weights
from bayes_simfluence.gaussian.linear_gaussian import LeftOut, LinearGaussian
from bayes_simfluence.gaussian.nested import groups_apart
from bayes_simfluence.gaussian.queries import chosen_shares, loadings_with
from bayes_simfluence.gaussian.rollout import left_out_residuals
from bayes_simfluence.gaussian.trust import Trust, learned_trust
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.hyper import log_prior, natural_values, start
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.progress import Progress

Criterion = Literal["leave-one-run-out", "marginal", "evidence", "nuts"]
CRITERIA: tuple[Criterion, ...] = ("leave-one-run-out", "marginal", "evidence", "nuts")
COARSE_STEPS, FINE_STEPS = 60, 8
"""Most L-BFGS iterations of the search on half of the times, and of its polish on all of them."""
TIMES, COARSE, POINTS = 24, 12, 400
"""Least times of each run, and of a search; runs x times up to which few runs give more."""
INFLATION_KNOTS = 5
"""Fewer follow the error along training less well; more do not help left-out runs."""


class Searched(NamedTuple):
    """Where the search ended.

    Attributes:
        free: hyperparameters on their unconstrained scale.
        score: the criterion, log density per point, averaged over queries.
        iterations: of both stages together.
        converged: whether the first stage stopped by itself.
    """

    free: Float[np.ndarray, " hyper"]
    score: float
    iterations: int
    converged: bool


class Band(NamedTuple):
    """What predictions of left-out runs say of the band.

    Attributes:
        scale: sd of each query's effects, link units.
        log_inflation: log of the factor on the variance that left-out runs ask for, at knots
            spread evenly over training.
        df: degrees of freedom of the scales.
        loadings: of queries on the factors that their errors have in common.
        trust: in what observed losses of a run tell of its others.
        predicted: medians of left-out runs, nats, at the fitted times; NaN where not recorded.
        low, high: their 90% band after variance inflation.
        raw_coverage: share of points in the 90% band without it.
    """

    scale: Float[np.ndarray, " query"]
    log_inflation: Float[np.ndarray, " knot"]
    df: float
    loadings: Float[np.ndarray, "query factor"]
    trust: Trust
    predicted: Float[np.ndarray, "run row query"]
    low: Float[np.ndarray, "run row query"]
    high: Float[np.ndarray, "run row query"]
    raw_coverage: float


def even_rows(steps: int, count: int) -> Int[np.ndarray, " row"]:
    """Positions of at most ``count`` steps spread evenly over a run, its last one included.

    >>> even_rows(96, 4).tolist()
    [23, 47, 71, 95]
    """
    count = min(count, steps)
    return np.unique(np.round(np.arange(1, count + 1) * steps / count).astype(int)) - 1


def recorded_rows(known: Bool[np.ndarray, "run step"], count: int) -> Int[np.ndarray, " row"]:
    """Positions of at most ``count`` steps spread evenly over those that were recorded.

    Where runs were recorded at different times, each stretch of training gives the step that was
    recorded in most runs, of which those with few steps so far count more. A run that is left
    with none adds its last one, beyond ``count``.

    >>> recorded_rows(np.array([[False, True, False, True, False]]), 24).tolist()
    [1, 3]
    """
    recorded = np.flatnonzero(known.any(axis=0))
    ends = even_rows(len(recorded), count) + 1
    taken, rows = np.zeros(len(known)), []
    for stretch in np.split(recorded, ends[:-1]):
        worth = (known[:, stretch] / (1.0 + taken)[:, None]).sum(axis=0)
        # The last of the best, so that a whole recording gives the even rows.
        rows.append(int(stretch[np.flatnonzero(worth == worth.max())[-1]]))
        taken += known[:, rows[-1]]
    for run in np.flatnonzero(known.any(axis=1)):
        if not known[run, rows].any():
            rows.append(int(np.flatnonzero(known[run])[-1]))
    return np.unique(rows)


def times_of(times: int | None, runs: int, *, features: bool) -> int:
    """Times of each run to condition on: those given, or what tells of as many examples.

    Without gradient features every example has an effect of its own, and few runs at few times
    have fewer losses than there are examples: as many times are taken as ``POINTS`` allows.

    >>> [times_of(None, runs, features=False) for runs in (5, 8, 15, 25, 100)]
    [80, 50, 26, 24, 24]
    >>> times_of(None, 5, features=True)
    24
    """
    if times is not None:
        return times
    return TIMES if features else max(TIMES, POINTS // runs)


def search(
    model: Simfluence,
    runs: RunArrays,
    rows: Int[np.ndarray, " row"],
    criterion: Criterion,
    progress: Progress,
    held: Mapping[str, float] | None = None,
) -> Searched:
    """The hyperparameters that maximize the criterion plus a weak prior, by L-BFGS.

    A search on half of the times is followed by a polish on all of them.

    Args:
        model: whose hyperparameters.
        runs: the fitted ones, in units.
        rows: positions of the steps whose losses are looked at.
        criterion: what is maximized.
        progress: told of the work.
        held: hyperparameters that keep a value, by name, on the natural scale.
    """
    hypers, held = hypers_of(model, runs.features), held or {}
    free, iterations, converged = start(hypers, held), 0, True
    moves = np.array([name not in held for name in hypers])
    coarse = recorded_rows(runs.known_steps, min(max(COARSE, len(rows) // 2), len(rows)))
    best = np.inf
    with double_precision(), progress.work("hyperparameters", None) as meter:
        for stage, limit in ((coarse, COARSE_STEPS), (rows, FINE_STEPS)):

            def report(intermediate_result: object) -> None:
                meter.advance(1, f"score {-intermediate_result.fun:.4f}")  # type: ignore[attr-defined]

            result = minimize(
                _objective(model, runs, stage, criterion, free, moves),
                free[moves],
                jac=True,
                method="L-BFGS-B",
                callback=report,
                options={"maxiter": limit},
            )
            free[moves] = result.x
            best, iterations = float(result.fun), iterations + result.nit
            if stage is coarse:
                converged = bool(result.success) or result.nit >= limit
    return Searched(free, -best, iterations, converged)


def _objective(
    model: Simfluence,
    runs: RunArrays,
    rows: Int[np.ndarray, " row"],
    criterion: Criterion,
    free: Float[np.ndarray, " hyper"],
    moves: Bool[np.ndarray, " hyper"],
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The negative score and its gradient, of the hyperparameters that move."""
    # A number, so that one program serves both ways of scoring left-out runs.
    jointly = None if criterion == "evidence" else jnp.asarray(float(criterion != "marginal"))

    def score(moved: np.ndarray) -> tuple[float, np.ndarray]:
        at = free.copy()
        at[moves] = moved
        value, gradient = _negative_score(
            jnp.asarray(at), runs, jnp.asarray(rows), model=model, jointly=jointly
        )
        if not np.isfinite(value):
            # Beyond where the covariance can be factored: turn the line search back.
            return 1e6, np.zeros_like(moved)
        return float(value), np.asarray(gradient)[moves]

    return score


@partial(jax.jit, static_argnames="model")
@jax.value_and_grad
def _negative_score(
    free: Float[Array, " hyper"],
    runs: RunArrays,
    rows: Int[Array, " row"],
    *,
    model: Simfluence,
    jointly: Float[Array, ""] | None,
) -> Float[Array, ""]:
    """The criterion: left-out runs, ``jointly`` or point by point; the evidence for None."""
    gaussian, mean = _at(model, free, runs, rows)
    change = linked_change(model, runs, rows) - mean
    if jointly is None:
        score = gaussian.evidence_score(change)
    else:
        scores = gaussian.left_out_scores(change)
        score = jointly * scores.joint + (1.0 - jointly) * scores.marginal
    recorded = jnp.isfinite(change).any(axis=1).sum()
    return -(score + log_prior(hypers_of(model, runs.features), free) / recorded)


@partial(jax.jit, static_argnames="model")
def _left_out(
    model: Simfluence, free: Float[Array, " hyper"], runs: RunArrays, rows: Int[Array, " row"]
) -> LeftOut:
    gaussian, mean = _at(model, free, runs, rows)
    return gaussian.left_out(linked_change(model, runs, rows) - mean)


def _at(
    model: Simfluence, free: Float[Array, " hyper"], runs: RunArrays, rows: Int[Array, " row"]
) -> tuple[LinearGaussian, Float[Array, "run row query"]]:
    """Runs at given hyperparameters, and their prior mean."""
    values = natural_values(hypers_of(model, runs.features), free)
    made = assembled(model, values, runs, rows, knots=model.coefficients.count(1.0))
    return made.gaussian, made.mean


@partial(jax.jit, static_argnames="model")
def _left_out_simulated(
    model: Simfluence,
    free: Float[Array, " hyper"],
    runs: RunArrays,
    rows: Int[Array, " row"],
    residual: Float[Array, "run step slot"],
) -> LeftOut:
    """Errors where left-out runs' residuals are simulated, not recorded."""
    knots = model.coefficients.count(1.0)
    values = natural_values(hypers_of(model, runs.features), free)
    made = assembled(model, values, runs, rows, knots=knots)
    change = linked_change(model, runs, rows)
    left_out = made.gaussian.left_out(change - made.mean)
    conditioned = made.gaussian.condition(change - made.mean)
    simulated = runs._replace(residual=residual)
    other = assembled(model, values, simulated, rows, knots=knots, size=made.size)
    gain = conditioned.gain.reshape(made.gaussian.designs.shape)

    # The weights' mean without a run is that with it, less its own pull.
    def of_run(design: Array, mean: Array, gain: Array, change: Array, error: Array) -> Array:
        weights = conditioned.mean - gain.T @ error
        return jnp.where(jnp.isfinite(change), change - mean - design @ weights, 0.0)

    designs = other.gaussian.designs
    error = jax.vmap(of_run)(designs, other.mean, gain, change, left_out.error)
    return left_out._replace(error=error)


def band_of(
    model: Simfluence,
    runs: RunArrays,
    rows: Int[np.ndarray, " row"],
    free: Float[np.ndarray, " hyper"],
) -> Band:
    """Scales, variance inflation and left-out predictions at given hyperparameters.

    Left-out runs are simulated freely: where examples act by their residuals, these are simulated
    too, from fits without the run.

    A query's scale is the root mean square of its standardized left-out errors; the log variance
    inflation is straight lines between knots in training progress, fitted to the log of their mean
    square over runs and queries, by as many runs as were recorded at a time.
    """
    known = runs.known_steps[:, rows]
    counted = known[..., None]
    with double_precision():
        at = (model, jnp.asarray(free), runs, jnp.asarray(rows))
        left_out = recorded = _left_out(*at)
        if runs.residual is not None:
            _, size = conditioned_weights(*at, knots=model.coefficients.count(1.0))
            of_example = typical(_scales(left_out, counted))
            residual = left_out_residuals(model, at[1], runs, size, of_example)
            left_out = _left_out_simulated(*at, residual)
        error, variance = np.asarray(left_out.error), np.asarray(left_out.variance)[..., None]
        truth = np.asarray(link_of(model.link, jnp.asarray(runs.loss, float)))[:, 1:][:, rows]
    counted = np.broadcast_to(counted, error.shape)
    scale = _scales(left_out, counted)
    z = error / (np.sqrt(variance) * scale)
    progress = (rows + 1) / runs.steps
    by_time = np.log(np.square(z).mean(axis=(0, 2), where=counted) + 1e-12)
    lines, log_inflation = _log_inflation(progress, by_time, known.sum(axis=0))
    df = float(max(known.any(axis=1).sum() - 1, 3))
    inflation = np.exp(0.5 * lines @ log_inflation)
    sd = scale * np.sqrt(variance) * inflation[None, :, None]
    features = np.asarray(model.prior.alike(runs.features).query)
    shares = chosen_shares(z, known, features)
    # What simulated residuals add is taken as found with all other runs.
    groups = groups_apart(recorded, known, error - np.asarray(recorded.error))
    quantile = student_t.ppf(0.95, df)

    def nats(value: np.ndarray) -> np.ndarray:
        return np.asarray(loss_of(model.link, jnp.asarray(value)))

    return Band(
        scale=scale,
        log_inflation=log_inflation,
        df=df,
        loadings=loadings_with(shares, z, known, features),
        trust=learned_trust(groups, shares, known, features, inflation, progress),
        predicted=nats(truth - error),
        low=nats(truth - error - quantile * sd),
        high=nats(truth - error + quantile * sd),
        raw_coverage=float((np.abs(z) <= quantile).mean(where=counted)),
    )


def typical(scale: Float[np.ndarray, " query"]) -> float:
    """Scale of what was not recorded, that of training examples for one: the geometric mean."""
    return float(np.exp(np.log(np.maximum(scale, np.finfo(float).tiny)).mean()))


def _scales(
    left_out: LeftOut, counted: Bool[np.ndarray, "run row _"]
) -> Float[np.ndarray, " query"]:
    z = np.asarray(left_out.error) / np.sqrt(np.asarray(left_out.variance))[..., None]
    counted = np.broadcast_to(counted, z.shape)
    return np.asarray(np.sqrt(np.square(z).mean(axis=(0, 1), where=counted) + 1e-12))


def interpolated_inflation(
    progress: Float[np.ndarray, " step"], log_inflation: Float[np.ndarray, " knot"]
) -> Float[np.ndarray, " step"]:
    """Log factor on the variance at each step; constant beyond the recorded length."""
    knots = np.linspace(0.0, 1.0, len(log_inflation))
    return np.asarray(np.interp(progress, knots, log_inflation))


def _log_inflation(
    progress: Float[np.ndarray, " row"],
    log_square: Float[np.ndarray, " row"],
    runs: Int[np.ndarray, " row"],
) -> tuple[Float[np.ndarray, "row knot"], Float[np.ndarray, " knot"]]:
    """Straight lines between knots through ``log_square``, rows weighted by their ``runs``."""
    knots = min(INFLATION_KNOTS, len(progress))
    lines = np.stack([interpolated_inflation(progress, unit) for unit in np.eye(knots)], axis=1)
    weight = np.sqrt(runs / runs.max())
    # Knots without a recorded time nearby follow their neighbours.
    level = 1e-6 * np.diff(np.eye(knots), axis=0)
    sides = np.concatenate([lines * weight[:, None], level])
    target = np.concatenate([log_square * weight, np.zeros(knots - 1)])
    return lines, np.linalg.lstsq(sides, target, rcond=None)[0]
