"""The two-timescale model, fitted: Gaussian paths by perturb-and-solve in the space of weights.

On the scale of the link a path is ``m + X w + eta``: prior mean, design times standard normal
weights, error of the run, the last two times the query's scale ``s``. With the fitted points'
covariance ``K`` common to all queries, the weights' posterior mean is ``X' K^-1 (y - m)``, and a
draw of their deviation is ``s (w0 - X' K^-1 (X w0 + eta0))`` with ``w0``, ``eta0`` from the prior
(Papandreou & Yuille 2010). Draws belong to the key alone: any curriculum meets the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayes_simfluence.gaussian.density import correlated_log_density, whitening
from bayes_simfluence.gaussian.designs import (
    FittedPaths,
    designs_and_means,
    error_covariance,
    fitted_covariance,
    interpolated_widening,
    mean_size,
    stacked_paths,
)
from bayes_simfluence.gaussian.draws import drawn_paths, drawn_weights
from bayes_simfluence.linalg import cholesky, double_precision, solve_lower
from bayes_simfluence.model import simfluence as bayesian
from bayes_simfluence.model.hyper import Values, natural_values
from bayes_simfluence.model.link import link_of, log_slope, loss_of
from bayes_simfluence.model.priors import ExampleFeatures
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.base import CHUNK, Named, Planned, Simulated, relative_step_size

__all__ = ["PathSimulator"]


@dataclass(frozen=True)
class PathSimulator:
    """Posterior of the two-timescale model: the fitted runs, hyperparameters and scales.

    Attributes:
        model: the model fitted.
        free: hyperparameters on their unconstrained scale, in the order of ``hypers_of``.
        fitted: the runs that the weights are conditioned on.
        rows: positions of the steps after which the fitted runs were conditioned on.
        largest_step_size: what the fitted step sizes were divided by; None when they were not
            recorded, and are ignored.
        scale: sd of each query's effects, in units of the link.
        widening: log of the factor on the variance that left-out runs asked for, at knots spread
            evenly over a recorded run, straight lines between them.
        freedom: degrees of freedom of the scales' posterior; the band is Student-t with them.
        unseen: features of queries that were never recorded, which this simulates then instead of
            the fitted ones (``simulators.unseen``).
    """

    name: ClassVar[str] = "paths"
    model: Simfluence
    free: Float[np.ndarray, " hyper"]
    fitted: FittedPaths
    rows: Int[np.ndarray, " row"]
    largest_step_size: float | None
    scale: Float[np.ndarray, " query"]
    widening: Float[np.ndarray, " knot"]
    freedom: float
    unseen: ExampleFeatures | None = None

    @property
    def values(self) -> dict[str, float]:
        """Hyperparameters on their natural scale."""
        with double_precision():
            natural = natural_values(
                hypers_of(self.model, self.fitted.features), jnp.asarray(self.free)
            )
            return {name: float(value) for name, value in natural.items()}

    @property
    def draws(self) -> None:
        """Any number."""
        return None

    def simulate(self, planned: Planned, *, key: jax.Array, draws: int) -> Simulated:
        """Draws of weights, scales and run errors, independent between queries."""
        with double_precision():
            rows = np.arange(planned.batch.shape[1])
            solved, designs, centre, covariance, spread = self._centred(planned, rows)
            error = cholesky(covariance)
        deviations = self._deviations(
            solved, designs, error, spread, planned.query, key=key, draws=draws
        )
        start, runs = np.asarray(centre, np.float32)[None], len(planned.batch)

        def in_nats(deviation: Array) -> np.ndarray:
            found = np.empty((1, draws, runs, len(rows) + 1, len(planned.query)), np.float32)
            found[:, :, :, 0] = planned.initial
            for first in range(0, draws, CHUNK):
                some = slice(first, first + CHUNK)
                linked = np.moveaxis(np.asarray(deviation)[:, some], 0, -1) + start
                found[0, some, :, 1:] = loss_of(self.model.link, jnp.asarray(linked))
            return found

        return Simulated(*(in_nats(one) for one in deviations))

    def _centred(self, planned: Planned, rows: Int[np.ndarray, " row"]) -> "_Centred":
        """Planned runs after the steps ``rows``: where draws deviate from, and by how much."""
        solved = self._solved(planned.batch.shape[1] / self.fitted.steps)
        paths = stacked_paths(
            planned.batch,
            relative_step_size(planned, self.largest_step_size),
            self.fitted.train,
            self.fitted.steps,
        )
        designs, mean = designs_and_means(
            self.model,
            solved.values,
            paths,
            self.unseen or self.fitted.features,
            jnp.asarray(rows),
            knots=solved.knots,
        )
        designs = designs / solved.size
        linked = link_of(self.model.link, jnp.asarray(planned.initial, float))
        known = jnp.einsum("rtw,wq->rtq", designs, solved.weights[:, planned.query])
        centre = linked[:, None] + mean[..., planned.query] + known
        progress = paths.progress[0]
        error = error_covariance(self.model, solved.values, progress)[rows][:, rows]
        widened = np.exp(0.5 * self.log_widening(np.asarray(progress[rows])))
        spread = self.scale[planned.query][:, None] * widened[None]
        return _Centred(solved, designs, centre, error, spread)

    def log_likelihood(
        self,
        planned: Planned,
        loss: Float[np.ndarray, "run time query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> Float[np.ndarray, "chain draw run step query"]:
        """Of the steps ``rows``, which the fit conditioned on; NaN at all others.

        The error is smooth: between those times it was never looked at, and a density there would
        be that of steps which the model says nothing about. One query at a time, so that beyond
        the result memory holds one query's draws.
        """
        steps = planned.batch.shape[1]
        rows = self.rows[self.rows < steps]
        found = np.full((1, draws, *loss[:, 1:].shape), np.nan, np.float32)
        with double_precision():
            solved, designs, centre, error, spread = self._centred(planned, rows)
            seen = jnp.asarray(loss[:, 1:][:, rows], float)
            change = link_of(self.model.link, seen) - centre
            slope = log_slope(self.model.link, seen)
            roots, pattern = whitening(error, np.isfinite(np.asarray(change)))
        small = solved.small()
        for at, query in enumerate(planned.query):
            with jax.enable_x64(False):
                drawn = drawn_weights(
                    small, jnp.int32(query), key, jnp.float32(self.freedom),
                    draws=draws, knots=solved.knots, parts=len(self.model.parts),
                )  # fmt: skip
            with double_precision():
                sd = jnp.asarray(drawn.scale, float)[:, None] * spread[at][None]
                path = jnp.einsum("rtw,dw->drt", designs, jnp.asarray(drawn.deviation, float))
                deviation = change[..., at][None] - path * sd[:, None]
                density = correlated_log_density(deviation, roots[pattern[:, at]], sd)
                found[0][:, :, rows, at] = density + slope[..., at][None]
        return found

    def log_widening(self, progress: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
        """Log factor on the variance; constant beyond the recorded length."""
        return interpolated_widening(progress, self.widening)

    def _solved(self, reach: float) -> "_Solved":
        """The weights' posterior, once for all queries, with knots up to ``reach`` run lengths."""
        features, fitted = self.fitted.features, self.fitted
        values = natural_values(hypers_of(self.model, features), jnp.asarray(self.free))
        knots = self.model.coefficients.count(max(1.0, reach))
        paths = fitted.paths()
        designs, mean = designs_and_means(
            self.model, values, paths, features, jnp.asarray(self.rows), knots=knots
        )
        known = jnp.asarray(fitted.known[:, self.rows])
        size = mean_size(designs, known)
        # Without design and change, what was not recorded has no gain.
        designs = jnp.where(known[..., None], designs / size, 0.0)
        error = error_covariance(self.model, values, paths.progress[0])[self.rows][:, self.rows]
        factor = cholesky(fitted_covariance(designs, error, known))
        flat = designs.reshape(-1, designs.shape[-1])
        gain = solve_lower(factor, solve_lower(factor, flat), transposed=True)
        linked = link_of(self.model.link, jnp.asarray(fitted.loss, float))
        change = linked[:, 1:][:, self.rows] - linked[:, :1] - mean
        change = jnp.where(known[..., None], change, 0.0)
        weights = gain.T @ change.reshape(len(flat), -1)
        if self.unseen is not None:
            # Nothing was seen of these queries: the others' mean, with the prior around it.
            mean_weights = weights.mean(axis=1, keepdims=True)
            weights = jnp.broadcast_to(mean_weights, (len(weights), len(self.scale)))
            gain = jnp.zeros_like(gain)
        return _Solved(values, knots, size, flat, gain, weights, cholesky(error))

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Hyperparameters (every draw the same), scales, and effects of examples.

        ``staying[chain, draw, query, train]`` and ``fading`` are what a step on this example alone
        adds to the loss on the scale of the link, averaged over training; negative = helpful.
        """
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            name: (("chain", "draw"), np.full((1, draws), value))
            for name, value in self.values.items()
        }
        query = np.arange(len(self.scale))
        with double_precision():
            solved = self._solved(1.0)
            features = self.fitted.features
            for part in self.model.parts:
                functional = bayesian.mean_effect(self.model, solved.values, part, features)
                functional = functional / solved.size
                prior = self.model.prior.mean(
                    solved.values, part, jnp.eye(self.fitted.train), features
                )
                centre = np.asarray(functional @ solved.weights + prior)
                deviation, _ = self._deviations(
                    solved,
                    functional[None],
                    jnp.zeros((len(functional), len(functional))),
                    self.scale[:, None] * np.ones((1, len(functional))),
                    query,
                    key=key,
                    draws=draws,
                )
                each = np.asarray(deviation)[:, :, 0] + centre.T[:, None]
                named[part] = (("chain", "draw", "query", "train"), np.moveaxis(each, 0, 1)[None])
        return named

    def _deviations(
        self,
        solved: "_Solved",
        designs: Array,
        error: Array,
        spread: np.ndarray,
        query: Int[np.ndarray, " query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> tuple[Array, Array]:
        # Single precision is enough for deviations, and twice as fast.
        with jax.enable_x64(False):
            small = partial(jnp.asarray, dtype=jnp.float32)
            drawn: tuple[Array, Array] = drawn_paths(
                solved.small(),
                small(designs),
                small(error),
                small(spread),
                jnp.asarray(query, jnp.int32),
                key,
                small(self.freedom),
                draws=draws,
                knots=solved.knots,
                parts=len(self.model.parts),
            )
        return drawn

    def arrays(self) -> Named:
        """The fitted runs and everything inferred."""
        return {
            "free": (("hyper",), self.free),
            "rows": (("row",), self.rows),
            "scale": (("query",), self.scale),
            "widening": (("knot",), self.widening),
            "batch": (("run", "step", "slot"), self.fitted.batch),
            "step_size": (("run", "step"), self.fitted.step_size),
            "loss": (("run", "time", "query"), self.fitted.loss),
            "train_feature": (("train", "feature"), np.asarray(self.fitted.features.train)),
            "query_feature": (("query", "of_query"), np.asarray(self.fitted.features.query)),
        }

    def settings(self) -> dict[str, Any]:
        """The model and the band's degrees of freedom."""
        return {
            "model": self.model.as_dict(),
            "freedom": self.freedom,
            "largest_step_size": self.largest_step_size,
        }

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> "PathSimulator":
        """From ``arrays()`` and ``settings()``."""
        features = ExampleFeatures(
            jnp.asarray(arrays["train_feature"]), jnp.asarray(arrays["query_feature"])
        )
        fitted = FittedPaths(arrays["batch"], arrays["step_size"], arrays["loss"], features)
        return cls(
            model=Simfluence.from_dict(settings["model"]),
            free=arrays["free"],
            fitted=fitted,
            rows=arrays["rows"],
            largest_step_size=settings["largest_step_size"],
            scale=arrays["scale"],
            widening=arrays["widening"],
            freedom=settings["freedom"],
        )


class _Solved(NamedTuple):
    values: Values
    knots: int
    size: Float[Array, ""]
    train: Float[Array, "point weight"]
    gain: Float[Array, "point weight"]
    weights: Float[Array, "weight query"]
    error_factor: Float[Array, "row row"]

    def small(self) -> tuple[Array, Array, Array]:
        """What draws of the weights need, in single precision."""
        train, gain, factor = (
            jnp.asarray(one, jnp.float32) for one in (self.train, self.gain, self.error_factor)
        )
        return train, gain, factor


class _Centred(NamedTuple):
    solved: _Solved
    designs: Float[Array, "run row weight"]
    centre: Float[Array, "run row query"]
    error: Float[Array, "row row"]
    spread: Float[np.ndarray, "query row"]
