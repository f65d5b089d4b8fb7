"""Recorded runs as the two-timescale model sees them: their designs and their covariance."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.data.curriculum import exposures
from bayes_simfluence.model import simfluence as bayesian
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.priors import ExampleFeatures
from bayes_simfluence.model.simfluence import Path, Simfluence

__all__ = [
    "FittedPaths",
    "designs_and_means",
    "error_covariance",
    "fitted_covariance",
    "interpolated_widening",
    "mean_size",
    "stacked_paths",
]

JITTER = 1e-8
"""Variance of a white error, relative to the effects': keeps the covariance invertible."""


class FittedPaths(NamedTuple):
    """Recorded runs as the two-timescale model sees them.

    Attributes:
        batch: indices into ``train``, -1 = empty slot.
        step_size: relative to the largest one.
        loss: nats, time 0 first; NaN where not recorded, at the same times for all queries.
        features: gradient features, without columns when there are none.
    """

    batch: Int[np.ndarray, "run step slot"]
    step_size: Float[np.ndarray, "run step"]
    loss: Float[np.ndarray, "run time query"]
    features: ExampleFeatures

    @property
    def steps(self) -> int:
        """Steps of a recorded run: the unit of training time."""
        return int(self.batch.shape[1])

    @property
    def known(self) -> Bool[np.ndarray, "run step"]:
        """Whether the losses after each step were recorded."""
        return np.isfinite(self.loss[:, 1:]).all(axis=2)

    @property
    def train(self) -> int:
        """Training examples, seen or not."""
        return int(self.features.train.shape[0])

    def paths(self) -> Path:
        """All runs as arrays of the model."""
        return stacked_paths(self.batch, self.step_size, self.train, self.steps)


def stacked_paths(
    batch: Int[np.ndarray, "run step slot"],
    step_size: Float[np.ndarray, "run step"],
    train: int,
    recorded: int,
) -> Path:
    """Runs as arrays of the model with a leading axis of runs; ``recorded`` steps are a length."""
    progress = np.arange(1, batch.shape[1] + 1) / recorded
    return Path(
        jnp.asarray([exposures(one, train) for one in batch]),
        jnp.asarray(step_size, float),
        jnp.asarray(np.broadcast_to(progress, batch.shape[:2])),
    )


@partial(jax.jit, static_argnames=("model", "knots"))
def designs_and_means(
    model: Simfluence,
    values: Values,
    paths: Path,
    features: ExampleFeatures,
    rows: Int[Array, " row"],
    *,
    knots: int,
) -> tuple[Float[Array, "run row weight"], Float[Array, "run row query"]]:
    """Designs and prior means of several runs after the steps ``rows``."""

    def one(path: Path) -> tuple[Array, Array]:
        return (
            bayesian.design(model, values, path, features, knots=knots, rows=rows),
            bayesian.prior_mean(model, values, path, features, rows=rows),
        )

    found: tuple[Array, Array] = jax.vmap(one)(paths)
    return found


def interpolated_widening(
    progress: Float[np.ndarray, " step"], widening: Float[np.ndarray, " knot"]
) -> Float[np.ndarray, " step"]:
    """Log variance factor at each step; constant beyond the recorded length."""
    return np.asarray(np.interp(progress, np.linspace(0.0, 1.0, len(widening)), widening))


def mean_size(
    designs: Float[Array, "run row weight"], known: Bool[Array, "run row"] | None = None
) -> Float[Array, ""]:
    """Root mean prior variance over points: designs are divided by that of the fitted runs.

    Over the ``known`` points alone, where some were not recorded.
    """
    return jnp.sqrt(jnp.square(designs).sum(axis=-1).mean(where=known))


def fitted_covariance(
    designs: Float[Array, "run row weight"],
    error: Float[Array, "row row"],
    known: Bool[Array, "run row"] | None = None,
) -> Float[Array, "point point"]:
    """Covariance of all fitted points, run after run, up to the query's scale.

    Points that are not ``known`` become independent of all others, with variance one: given a
    zero as their value, they change neither a solution for the others nor a log determinant.
    """
    flat = designs.reshape(-1, designs.shape[-1])
    whole = flat @ flat.T + jnp.kron(jnp.eye(len(designs)), error)
    if known is None:
        return whole
    kept = known.reshape(-1)
    return jnp.where(kept[:, None] & kept[None, :], whole, jnp.eye(len(kept)))


def error_covariance(
    model: Simfluence, values: Values, progress: Float[Array, " step"]
) -> Float[Array, "step step"]:
    """Covariance of a run's error, with the jitter that keeps it invertible."""
    size = values.get("noise", jnp.ones(()))
    return size**2 * model.error.covariance(values, progress) + JITTER * jnp.eye(len(progress))
