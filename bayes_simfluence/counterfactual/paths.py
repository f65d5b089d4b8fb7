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

from bayes_simfluence.checks import Misuse
from bayes_simfluence.counterfactual.fitted import (
    FittedPaths,
    designs_and_means,
    error_covariance,
    fitted_covariance,
    interpolated_widening,
    mean_size,
    stacked_paths,
)
from bayes_simfluence.counterfactual.rollout import Named, Planned, Simulated
from bayes_simfluence.linalg import cholesky, double_precision, solve_lower
from bayes_simfluence.model import bayesian
from bayes_simfluence.model.bayesian import Simfluence, hypers_of, link_of, loss_of
from bayes_simfluence.model.hyper import Values, natural_values
from bayes_simfluence.model.priors import ExampleFeatures

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
        steps = planned.batch.shape[1]
        with double_precision():
            solved = self._solved(steps / self.fitted.steps)
            paths = stacked_paths(
                planned.batch, self._step_size(planned), self.fitted.train, self.fitted.steps
            )
            designs, mean = designs_and_means(
                self.model,
                solved.values,
                paths,
                self.fitted.features,
                jnp.arange(steps),
                knots=solved.knots,
            )
            designs = designs / solved.size
            error = cholesky(error_covariance(self.model, solved.values, paths.progress[0]))
            linked = link_of(self.model, jnp.asarray(planned.initial, float))
            known = jnp.einsum("rtw,wq->rtq", designs, solved.weights[:, planned.query])
            centre = linked[:, None] + mean[..., planned.query] + known
            widened = np.exp(0.5 * self.log_widening(np.asarray(paths.progress[0])))
        spread = self.scale[planned.query][:, None] * widened[None]
        deviations = self._deviations(
            solved, designs, error, spread, planned.query, key=key, draws=draws
        )
        initial = np.broadcast_to(
            planned.initial.astype(np.float32)[None, :, None],
            (draws, len(planned.batch), 1, len(planned.query)),
        )
        start = np.asarray(centre, np.float32)[None]

        def in_nats(deviation: Array) -> np.ndarray:
            linked = np.moveaxis(np.asarray(deviation), 0, -1) + start
            later = np.asarray(loss_of(self.model, jnp.asarray(linked)))
            return np.concatenate([initial, later], axis=2)[None]

        return Simulated(*(in_nats(one) for one in deviations))

    def log_widening(self, progress: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
        """Log factor on the variance; constant beyond the recorded length."""
        return interpolated_widening(progress, self.widening)

    def _step_size(self, planned: Planned) -> Float[np.ndarray, "run step"]:
        if self.largest_step_size is None:
            return np.ones(planned.batch.shape[:2])
        if planned.step_size is None:
            raise Misuse(
                "runs to simulate",
                got="no step_size",
                expected="the step sizes that training would use, as the fitted runs have them",
                do="pass step_size=... to runs_from_arrays or planned_runs",
            )
        return planned.step_size / self.largest_step_size

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
        linked = link_of(self.model, jnp.asarray(fitted.loss, float))
        change = linked[:, 1:][:, self.rows] - linked[:, :1] - mean
        change = jnp.where(known[..., None], change, 0.0)
        weights = gain.T @ change.reshape(len(flat), -1)
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
            drawn: tuple[Array, Array] = _drawn(
                (small(solved.train), small(solved.gain), small(solved.error_factor)),
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
            "query_feature": (("query", "feature"), np.asarray(self.fitted.features.query)),
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


def _normal_weights(
    key: jax.Array, draws: int, parts: int, knots: int, sources: int
) -> Float[Array, "draw weight"]:
    # A key for each part and knot: a longer run adds knots and leaves the others' draws alone.
    def of_part(part: Array) -> Array:
        def of_knot(knot: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, part), knot)
            return jax.random.normal(own, (draws, sources))

        return jax.vmap(of_knot)(jnp.arange(knots))

    blocks = jax.vmap(of_part)(jnp.arange(parts))
    return jnp.moveaxis(blocks, 2, 0).reshape(draws, -1)


@partial(jax.jit, static_argnames=("draws", "knots", "parts"))
def _drawn(
    solved: tuple[Array, Array, Array],
    designs: Float[Array, "run step weight"],
    new_error: Float[Array, "step step"],
    spread: Float[Array, "query step"],
    query: Int[Array, " query"],
    key: jax.Array,
    freedom: Float[Array, ""],
    *,
    draws: int,
    knots: int,
    parts: int,
) -> tuple[Float[Array, "query draw run step"], Float[Array, "query draw run step"]]:
    """Deviations from the posterior mean path: of the coefficients alone, and with the error."""
    train, gain, fitted_error = solved
    runs, steps, weights = designs.shape
    fitted_runs = len(train) // len(fitted_error)
    flat = designs.reshape(-1, weights)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        number, wide = inputs
        mine = jax.random.fold_in(key, number)
        weight_key, fitted_key, new_key, scale_key = jax.random.split(mine, 4)
        prior = _normal_weights(weight_key, draws, parts, knots, weights // parts // knots)
        errors = jax.random.normal(fitted_key, (draws, fitted_runs, len(fitted_error)))
        errors = (errors @ fitted_error.T).reshape(draws, -1)
        deviation = prior - (prior @ train.T + errors) @ gain
        # Scaled inverse chi-square scales make the band Student-t.
        chi_square = 2.0 * jax.random.gamma(scale_key, 0.5 * freedom, (draws,))
        scale = jnp.sqrt(freedom / chi_square)[:, None, None] * wide[None, None]
        mean = (deviation @ flat.T).reshape(draws, runs, steps) * scale
        run_keys = jax.vmap(lambda run: jax.random.fold_in(new_key, run))(jnp.arange(runs))
        white = jax.vmap(lambda run: jax.random.normal(run, (draws, steps)))(run_keys)
        return mean, mean + jnp.moveaxis(white @ new_error.T, 0, 1) * scale

    drawn: tuple[Array, Array] = jax.lax.map(one, (query, spread))
    return drawn
