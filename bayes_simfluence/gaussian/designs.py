"""Runs under the model as a linear-Gaussian object: designs, prior means, error's covariance."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.design import design, prior_mean
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.link import link_of
from bayes_simfluence.model.simfluence import Simfluence

JITTER = 1e-8
"""Variance of a white error, relative to the effects': keeps the covariance invertible."""


class Assembled(NamedTuple):
    """Runs at given hyperparameters.

    Attributes:
        gaussian: of the changes since time 0, up to each query's scale.
        mean: prior mean of the changes, link units.
        size: what the designs were divided by.
    """

    gaussian: LinearGaussian
    mean: Float[Array, "run row query"]
    size: Float[Array, ""]


def assembled(
    model: Simfluence,
    values: Values,
    runs: RunArrays,
    rows: Int[Array, " row"],
    *,
    knots: int,
    size: Float[Array, ""] | None = None,
) -> Assembled:
    """The changes of several runs after the steps ``rows``.

    Args:
        model, values: what the runs follow, and its hyperparameters.
        runs: in units.
        rows: positions of steps.
        knots: of coefficients along training.
        size: unit of the designs; the root mean prior variance of these runs when omitted.
    """
    designs, mean = designs_and_means(model, values, runs, rows, knots=knots)
    known = jnp.isfinite(runs.loss[:, 1:][:, rows]).all(axis=2)
    size = mean_size(designs, known) if size is None else size
    error = error_covariance(model, values, jnp.asarray(runs.progress[0]))[rows][:, rows]
    return Assembled(LinearGaussian(designs / size, error, known), mean, size)


@partial(jax.jit, static_argnames=("model", "knots"))
def designs_and_means(
    model: Simfluence, values: Values, runs: RunArrays, rows: Int[Array, " row"], *, knots: int
) -> tuple[Float[Array, "run row weight"], Float[Array, "run row query"]]:
    """Designs and prior means of several runs after the steps ``rows``."""

    def of_run(run: RunArrays) -> tuple[Array, Array]:
        return (
            design(model, values, run, knots=knots, rows=rows),
            prior_mean(model, values, run, rows=rows),
        )

    made: tuple[Array, Array] = runs.each(of_run)
    return made


def mean_size(
    designs: Float[Array, "run row weight"], known: Bool[Array, "run row"] | None = None
) -> Float[Array, ""]:
    """Root mean prior variance over points: designs are divided by that of the fitted runs.

    Over the ``known`` points alone, where some were not recorded.
    """
    return jnp.sqrt(jnp.square(designs).sum(axis=-1).mean(where=known))


def error_covariance(
    model: Simfluence, values: Values, progress: Float[Array, " step"]
) -> Float[Array, "step step"]:
    """Covariance of a run's error, with the jitter that keeps it invertible."""
    size = values.get("noise", jnp.ones(()))
    return size**2 * model.error.covariance(values, progress) + JITTER * jnp.eye(len(progress))


def linked_change(
    model: Simfluence, runs: RunArrays, rows: Int[Array, " row"]
) -> Float[Array, "run row query"]:
    """Change since time 0 on the scale of the link; NaN where not recorded."""
    linked = link_of(model.link, jnp.asarray(runs.loss, float))
    return linked[:, 1:][:, rows] - linked[:, :1]
