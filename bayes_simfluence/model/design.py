"""The additive part of the model as a linear map of independent standard normal weights.

Written for one run, from the settings and by the equations of ``model.simfluence``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.coupling import second_moment
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.recurrence import accumulation
from bayes_simfluence.model.simfluence import Simfluence


def design(
    model: Simfluence, values: Values, run: RunArrays, *, knots: int, rows: Int[Array, " row"]
) -> Float[Array, "row weight"]:
    """Trajectory of one run as a linear map of independent standard normal weights.

    ``design @ weights`` is ``u + v`` after the steps with positions ``rows``, up to the query's
    scale. Weights are ordered by part, then knot, then source (``Prior.columns``, then the time
    effect). Multiplicative terms are not among them.
    """
    blocks, exposure = [], run.exposures()
    for part in model.parts:
        over_time = curves(model, values, part, run.progress, knots)
        sources = model.prior.columns(values, part, exposure, run.features)
        gathered = gather(model, values, run, part, rows)
        each = jnp.einsum("tsk,sn->tkn", gathered[:, :, None] * over_time[None], sources)
        if model.time_effect != "none":
            shared = time_curve(model, over_time)
            # What any step does, it does by what its examples have still to learn.
            acting = gathered if run.residual is None else gathered * exposure.sum(axis=1)[None]
            common = values[f"{part}_common"] * acting @ shared
            each = jnp.concatenate([each, common[:, :, None]], axis=2)
        blocks.append(part_scale(values, part) * each.reshape(len(rows), -1))
    return jnp.concatenate(blocks, axis=1)


def curves(
    model: Simfluence, values: Values, part: str, progress: Float[Array, " step"], knots: int
) -> Float[Array, "step source"]:
    """Coefficients at each step as a map of independent standard normal sources."""
    interpolation = model.coefficients.interpolation(progress, knots)
    return interpolation @ model.coefficients.root(values, part, knots)


def time_curve(
    model: Simfluence, over_time: Float[Array, "step source"]
) -> Float[Array, "step source"]:
    """The same map for the time effect: that of the coefficients, or one constant."""
    if model.time_effect == "smooth":
        return over_time
    return jnp.zeros_like(over_time).at[:, 0].set(1.0)


def mean_effect(
    model: Simfluence, values: Values, part: str, features: ExampleFeatures
) -> Float[Array, "train weight"]:
    """Effect of a step on each example alone, averaged over training, as a map of the weights."""
    knots, train = model.coefficients.count(1.0), len(features.train)
    blocks = []
    for other in model.parts:
        over_time = model.coefficients.root(values, other, knots)
        sources = model.prior.columns(values, other, jnp.eye(train), features)
        block = over_time.mean(axis=0)[None, :, None] * sources[:, None, :]
        if model.time_effect != "none":
            shared = values[f"{other}_common"] * time_curve(model, over_time).mean(axis=0)
            shared = jnp.broadcast_to(shared[None, :, None], (train, knots, 1))
            block = jnp.concatenate([block, shared], axis=2)
        block = part_scale(values, other) * block.reshape(train, -1)
        blocks.append(block if other == part else jnp.zeros_like(block))
    return jnp.concatenate(blocks, axis=1)


def prior_mean(
    model: Simfluence, values: Values, run: RunArrays, *, rows: Int[Array, " row"]
) -> Float[Array, "row query"]:
    """Prior mean of ``u + v`` after the steps ``rows``, link units (zero without features)."""
    total, exposure = jnp.zeros((len(rows), len(run.features.query))), run.exposures()
    for part in model.parts:
        effect = model.prior.mean(values, part, exposure, run.features)
        total = total + gather(model, values, run, part, rows) @ effect
    return total


def gather(
    model: Simfluence, values: Values, run: RunArrays, part: str, rows: Int[Array, " row"]
) -> Float[Array, "row source"]:
    """How much of each step's batch a later time holds: memory of optimizer, then of the loss."""
    moment = None
    if run.residual is not None:
        moment = second_moment(run, jnp.asarray(model.prior.alike(run.features).train))
    return gathering(model, values, part, run, moment, rows)


def gathering(
    model: Simfluence,
    values: Values,
    part: str,
    run: RunArrays,
    moment: Float[Array, " step"] | None,
    rows: Int[Array, " row"],
) -> Float[Array, "row source"]:
    """The same, given the running mean of squared gradients."""
    summed = accumulation(rate_of(values, part), jnp.asarray(run.progress))[rows]
    weights = model.exposure.weights(values, jnp.asarray(run.step_size), moment)
    return summed @ (trend(values, jnp.asarray(run.progress))[:, None] * weights)


def trend(values: Values, progress: Float[Array, " step"]) -> Float[Array, " step"]:
    """Factor on what each step does, of a coupled model; constant beyond the recorded length."""
    return jnp.exp(values.get("trend", jnp.zeros(())) * jnp.minimum(progress, 1.0))


def rate_of(values: Values, part: str) -> Float[Array, ""]:
    """Log growth per recorded length of what a part has done to the loss."""
    if part == "fading":
        return -1.0 / values["fade_length"]
    return values.get("growth", jnp.zeros(()))


def part_scale(values: Values, part: str) -> Float[Array, ""]:
    """Factor on a part's effects; the query's scale is that of the first part."""
    return values.get("fading_scale", jnp.ones(())) if part == "fading" else jnp.ones(())
