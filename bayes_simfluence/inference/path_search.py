"""Hyperparameters of the two-timescale model, and what left-out runs say of its band."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize
from scipy.stats import t as student_t

from bayes_simfluence.counterfactual.fitted import (
    FittedPaths,
    designs_and_means,
    error_covariance,
    fitted_covariance,
    interpolated_widening,
    mean_size,
)
from bayes_simfluence.inference.leave_out import evidence_score, left_out, left_out_score
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.bayesian import Path, Simfluence, hypers_of, link_of, loss_of
from bayes_simfluence.model.hyper import log_prior, natural_values, start
from bayes_simfluence.model.priors import ExampleFeatures
from bayes_simfluence.progress import Progress

__all__ = ["CRITERIA", "Band", "Criterion", "Searched", "band_of", "even_rows", "search"]

Criterion = Literal["leave-one-run-out", "evidence"]
CRITERIA: tuple[Criterion, ...] = ("leave-one-run-out", "evidence")
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
        predicted: medians of left-out runs, nats, at the fitted times.
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
    coarse = even_rows(fitted.steps, min(COARSE, len(rows)))
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
    points = jnp.asarray(float(change.shape[0] * change.shape[2]))

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
    covariance, mean = _covariance_and_mean(model, free, paths, features, rows)
    kept = left_out_score if criterion == "leave-one-run-out" else evidence_score
    prior = log_prior(hypers_of(model, features), free)
    return -(kept(covariance, change - mean) + prior / points)


def _covariance_and_mean(
    model: Simfluence,
    free: Float[Array, " hyper"],
    paths: Path,
    features: ExampleFeatures,
    rows: Int[Array, " row"],
) -> tuple[Float[Array, "point point"], Float[Array, "run row query"]]:
    values = natural_values(hypers_of(model, features), free)
    knots = model.coefficients.count(1.0)
    designs, mean = designs_and_means(model, values, paths, features, rows, knots=knots)
    error = error_covariance(model, values, paths.progress[0])[rows][:, rows]
    return fitted_covariance(designs / mean_size(designs), error), mean


def _change(
    model: Simfluence, fitted: FittedPaths, rows: Int[np.ndarray, " row"]
) -> Float[Array, "run row query"]:
    linked = link_of(model, jnp.asarray(fitted.loss, float))
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
    runs and queries.
    """
    with double_precision():
        change = _change(model, fitted, rows)
        covariance, mean = _covariance_and_mean(
            model, jnp.asarray(free), fitted.paths(), fitted.features, jnp.asarray(rows)
        )
        found = jax.jit(left_out)(covariance, change - mean)
        error, variance = np.asarray(found.error), np.asarray(found.variance)[..., None]
        linked = np.asarray(link_of(model, jnp.asarray(fitted.loss, float)))
        truth = linked[:, 1:][:, rows]
    scale = np.sqrt(np.square(error / np.sqrt(variance)).mean(axis=(0, 1)) + 1e-12)
    z = error / (np.sqrt(variance) * scale)
    progress = (rows + 1) / fitted.steps
    knots = min(WIDENING_KNOTS, len(rows))
    lines = np.stack([interpolated_widening(progress, unit) for unit in np.eye(knots)], axis=1)
    by_time = np.log(np.square(z).mean(axis=(0, 2)) + 1e-12)
    widening = np.linalg.lstsq(lines, by_time, rcond=None)[0]
    freedom = float(max(len(error) - 1, 3))
    sd = scale * np.sqrt(variance * np.exp(lines @ widening)[None, :, None])
    quantile = student_t.ppf(0.95, freedom)

    def nats(value: np.ndarray) -> np.ndarray:
        return np.asarray(loss_of(model, jnp.asarray(value)))

    return Band(
        scale=scale,
        widening=widening,
        freedom=freedom,
        predicted=nats(truth - error),
        low=nats(truth - error - quantile * sd),
        high=nats(truth - error + quantile * sd),
        raw_coverage=float((np.abs(z) <= quantile).mean()),
    )
