"""A fitted Gaussian model: its weights given the recorded runs, and runs that are planned.

Each is one compiled function of arrays; ``simulators.gaussian`` holds the arrays and makes draws.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.gaussian.designs import assembled, linked_change
from bayes_simfluence.gaussian.linear_gaussian import Conditioned
from bayes_simfluence.linalg import cholesky
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.coupling import second_moment
from bayes_simfluence.model.design import mean_effect, trend
from bayes_simfluence.model.hyper import natural_values
from bayes_simfluence.model.link import link_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of


class FittedWeights(NamedTuple):
    """The weights given the fitted runs; unit of the designs; knots of coefficients."""

    conditioned: Conditioned
    size: Float[Array, ""]
    knots: int


class Planned(NamedTuple):
    """Runs to be simulated: designs, where draws deviate from, and the run's error."""

    designs: Float[Array, "run row weight"]
    centre: Float[Array, "run row query"]
    error: Float[Array, "row row"]
    error_factor: Float[Array, "row row"]


@partial(jax.jit, static_argnames=("model", "knots"))
def conditioned_weights(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    rows: Int[Array, " row"],
    *,
    knots: int,
) -> tuple[Conditioned, Float[Array, ""]]:
    """The weights given the fitted runs after the steps ``rows``; unit of the designs."""
    values = natural_values(hypers_of(model, fitted.features), free)
    made = assembled(model, values, fitted, rows, knots=knots)
    return made.gaussian.condition(linked_change(model, fitted, rows) - made.mean), made.size


@partial(jax.jit, static_argnames=("model", "knots"))
def plan(
    model: Simfluence,
    free: Float[Array, " hyper"],
    weights: Float[Array, "weight query"],
    size: Float[Array, ""],
    runs: RunArrays,
    rows: Int[Array, " row"],
    *,
    knots: int,
) -> Planned:
    """Runs after the steps ``rows``, given the weights' posterior mean and the designs' unit."""
    values = natural_values(hypers_of(model, runs.features), free)
    made = assembled(model, values, runs, rows, knots=knots, size=size)
    designs, error = made.gaussian.designs, made.gaussian.error
    linked = link_of(model.link, jnp.asarray(runs.initial, float))
    mean = jnp.einsum("rtw,wq->rtq", designs, weights[:, runs.query])
    centre = linked[:, None] + made.mean[..., runs.query] + mean
    return Planned(designs, centre, error, cholesky(error))


@partial(jax.jit, static_argnames="model")
def typical_step(
    model: Simfluence, free: Float[Array, " hyper"], fitted: RunArrays
) -> Float[Array, ""]:
    """With what factor a fitted run's example acts at a step, on average; 1 if not coupled."""
    if fitted.residual is None:
        return jnp.ones(())
    values = natural_values(hypers_of(model, fitted.features), free)

    def of_run(run: RunArrays) -> Array:
        plain = replace(model.exposure, momentum=0.0, order=None)
        moment = second_moment(run, jnp.asarray(model.prior.alike(run.features).train))
        weights = jnp.diagonal(plain.weights(values, jnp.asarray(run.step_size), moment))
        growing = trend(values, jnp.asarray(run.progress))
        return (growing * weights * run.exposures().sum(axis=1)).mean()

    means: Array = fitted.each(of_run)
    return means.mean()


@partial(jax.jit, static_argnames=("model", "part"))
def effects_alone(
    model: Simfluence,
    free: Float[Array, " hyper"],
    features: ExampleFeatures,
    posterior: FittedWeights,
    *,
    part: str,
) -> tuple[Float[Array, "train weight"], Float[Array, "train query"]]:
    """A step on each example alone: as a map of the weights, and its posterior mean."""
    values = natural_values(hypers_of(model, features), free)
    functional = mean_effect(model, values, part, features) / posterior.size
    prior = model.prior.mean(values, part, jnp.eye(len(features.train)), features)
    return functional, functional @ posterior.conditioned.mean + prior
