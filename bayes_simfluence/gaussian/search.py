"""Hyperparameters of the two-timescale model, and what left-out runs say of its band."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import minimize
from scipy.stats import t as student_t

from bayes_simfluence.gaussian.designs import (
    FittedPaths,
    designs_and_means,
    error_covariance,
    fitted_covariance,
    interpolated_widening,
    mean_size,
)
from bayes_simfluence.gaussian.leave_out import evidence_score, left_out, left_out_score
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.hyper import log_prior, natural_values, start
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.priors import ExampleFeatures
from bayes_simfluence.model.simfluence import Path, Simfluence, hypers_of
from bayes_simfluence.progress import Progress

__all__ = [
    "CRITERIA",
    "Band",
    "Criterion",
    "Searched",
    "band_of",
    "even_rows",
    "recorded_rows",
    "search",
]

Criterion = Literal["leave-one-run-out", "evidence", "nuts"]
CRITERIA: tuple[Criterion, ...] = ("leave-one-run-out", "evidence", "nuts")
COARSE, COARSE_STEPS, FINE_STEPS = 12, 60, 8
"""Times per run and most L-BFGS iterations of the search; iterations of its polish."""
WIDENING_KNOTS = 5
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
        widening: log of the factor on the variance, at knots spread evenly over training.
        freedom: degrees of freedom of the scales.
        predicted: medians of left-out runs, nats, at the fitted times; NaN where not recorded.
        low, high: their 90% band after widening.
        raw_coverage: share of points in the 90% band without widening.
    """

    scale: Float[np.ndarray, " query"]
    widening: Float[np.ndarray, " knot"]
    freedom: float
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


def search(
    model: Simfluence,
    fitted: FittedPaths,
    rows: Int[np.ndarray, " row"],
    criterion: Criterion,
    progress: Progress,
) -> Searched:
    """The hyperparameters that maximize the criterion plus a weak prior, by L-BFGS.

    A search on a few times per run is followed by a polish on the times ``rows``.
    """
    hypers = hypers_of(model, fitted.features)
    free, iterations, converged = start(hypers), 0, True
    coarse = recorded_rows(fitted.known, min(COARSE, len(rows)))
    stages = [(coarse, COARSE_STEPS), (rows, FINE_STEPS)]
    best = np.inf
    with double_precision(), progress.work("hyperparameters", None) as meter:
        for at, limit in stages:
            score = _objective(model, fitted, at, criterion)

            def told(intermediate_result: object) -> None:
                meter.advance(1, f"score {-intermediate_result.fun:.4f}")  # type: ignore[attr-defined]

            result = minimize(
                score, free, jac=True, method="L-BFGS-B", callback=told, options={"maxiter": limit}
            )
            free, best, iterations = result.x, float(result.fun), iterations + result.nit
            if at is coarse:
                converged = bool(result.success) or result.nit >= limit
    return Searched(free, -best, iterations, converged)


def _objective(
    model: Simfluence, fitted: FittedPaths, rows: Int[np.ndarray, " row"], criterion: Criterion
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    paths = fitted.paths()
    change = _change(model, fitted, rows)
    points = (~jnp.isnan(change)).any(axis=1).sum().astype(float)

    def score(free: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _negative_score(
            jnp.asarray(free), paths, fitted.features, change, jnp.asarray(rows), points,
            model=model, criterion=criterion,
        )  # fmt: skip
        if not np.isfinite(value):
            # Beyond where the covariance can be factored: turn the line search back.
            return 1e6, np.zeros_like(free)
        return float(value), np.asarray(gradient)

    return score


@partial(jax.jit, static_argnames=("model", "criterion"))
@jax.value_and_grad
def _negative_score(
    free: Float[Array, " hyper"],
    paths: Path,
    features: ExampleFeatures,
    change: Float[Array, "run row query"],
    rows: Int[Array, " row"],
    points: Float[Array, ""],
    *,
    model: Simfluence,
    criterion: Criterion,
) -> Float[Array, ""]:
    known = ~jnp.isnan(change[..., 0])
    covariance, mean = _covariance_and_mean(model, free, paths, features, rows, known)
    kept = left_out_score if criterion == "leave-one-run-out" else evidence_score
    prior = log_prior(hypers_of(model, features), free)
    return -(kept(covariance, change - mean) + prior / points)


def _covariance_and_mean(
    model: Simfluence,
    free: Float[Array, " hyper"],
    paths: Path,
    features: ExampleFeatures,
    rows: Int[Array, " row"],
    known: Bool[Array, "run row"],
) -> tuple[Float[Array, "point point"], Float[Array, "run row query"]]:
    values = natural_values(hypers_of(model, features), free)
    knots = model.coefficients.count(1.0)
    designs, mean = designs_and_means(model, values, paths, features, rows, knots=knots)
    error = error_covariance(model, values, paths.progress[0])[rows][:, rows]
    return fitted_covariance(designs / mean_size(designs, known), error, known), mean


def _change(
    model: Simfluence, fitted: FittedPaths, rows: Int[np.ndarray, " row"]
) -> Float[Array, "run row query"]:
    """Change since time 0 on the scale of the link; NaN where not recorded."""
    linked = link_of(model.link, jnp.asarray(fitted.loss, float))
    return linked[:, 1:][:, rows] - linked[:, :1]


def band_of(
    model: Simfluence,
    fitted: FittedPaths,
    rows: Int[np.ndarray, " row"],
    free: Float[np.ndarray, " hyper"],
) -> Band:
    """Scales, widening and left-out predictions at given hyperparameters.

    A query's scale is the root mean square of its standardized left-out errors; the widening is
    straight lines between knots in training progress, fitted to the log of their mean square over
    runs and queries, by as many runs as were recorded at a time.
    """
    known = fitted.known[:, rows]
    with double_precision():
        change = _change(model, fitted, rows)
        covariance, mean = _covariance_and_mean(
            model,
            jnp.asarray(free),
            fitted.paths(),
            fitted.features,
            jnp.asarray(rows),
            jnp.asarray(known),
        )
        found = jax.jit(left_out)(covariance, change - mean)
        error, variance = np.asarray(found.error), np.asarray(found.variance)[..., None]
        linked = np.asarray(link_of(model.link, jnp.asarray(fitted.loss, float)))
        truth = linked[:, 1:][:, rows]
    counted = np.broadcast_to(known[..., None], error.shape)
    scale = np.sqrt(np.square(error / np.sqrt(variance)).mean(axis=(0, 1), where=counted) + 1e-12)
    z = error / (np.sqrt(variance) * scale)
    progress = (rows + 1) / fitted.steps
    by_time = np.log(np.square(z).mean(axis=(0, 2), where=counted) + 1e-12)
    lines, widening = _widening(progress, by_time, known.sum(axis=0))
    freedom = float(max(known.any(axis=1).sum() - 1, 3))
    sd = scale * np.sqrt(variance * np.exp(lines @ widening)[None, :, None])
    quantile = student_t.ppf(0.95, freedom)

    def nats(value: np.ndarray) -> np.ndarray:
        return np.asarray(loss_of(model.link, jnp.asarray(value)))

    return Band(
        scale=scale,
        widening=widening,
        freedom=freedom,
        predicted=nats(truth - error),
        low=nats(truth - error - quantile * sd),
        high=nats(truth - error + quantile * sd),
        raw_coverage=float((np.abs(z) <= quantile).mean(where=counted)),
    )


def _widening(
    progress: Float[np.ndarray, " row"],
    log_square: Float[np.ndarray, " row"],
    runs: Int[np.ndarray, " row"],
) -> tuple[Float[np.ndarray, "row knot"], Float[np.ndarray, " knot"]]:
    """Straight lines between knots through ``log_square``, rows weighted by their ``runs``."""
    knots = min(WIDENING_KNOTS, len(progress))
    lines = np.stack([interpolated_widening(progress, unit) for unit in np.eye(knots)], axis=1)
    weight = np.sqrt(runs / runs.max())
    # Knots without a recorded time nearby follow their neighbours.
    level = 1e-6 * np.diff(np.eye(knots), axis=0)
    sides = np.concatenate([lines * weight[:, None], level])
    target = np.concatenate([log_square * weight, np.zeros(knots - 1)])
    return lines, np.linalg.lstsq(sides, target, rcond=None)[0]
