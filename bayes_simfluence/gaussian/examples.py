"""Training examples as states: their own losses, inferred from residuals and rolled out.

In a coupled model an example acts by its residual, so a simulation has to know the losses of the
examples that it trains on. They follow the same model as the queries, with the prior mean that
their gradient features give, and are observed now and then: each time a recorded run trained on the
example, its residual just before the step. Given those, an example's weights are Gaussian, a small
system for each example.

A planned run's residuals depend on the losses, and the losses on the residuals of earlier steps.
They are found by repeating the roll-out with the residuals that it gives: after ``k`` rounds the
first ``k`` steps are exact, and in practice a dozen rounds are.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.gaussian.designs import designs_and_means, error_covariance
from bayes_simfluence.linalg import cholesky, solve_lower
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.coupling import loss_of_residual, residual_of, running_mean
from bayes_simfluence.model.design import curves, gathering, part_scale, time_curve
from bayes_simfluence.model.hyper import Values, natural_values
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of

MOST = 96
"""Observations of an example that are used, spread evenly over those there are."""
WHITE = 1e-4
"""Variance of an observation's own error, over that of the effects."""
TOLERANCE = 1e-4
"""Residuals of two rounds agree to this."""


class Observed(NamedTuple):
    """When each training example was trained on in fitted runs, and how well it was known then.

    Attributes:
        run, step: of the observation; the step that it precedes, 0 = the first.
        linked: loss that the residual stands for, on the scale of the link.
        known: whether there is such an observation.
        start: mean and variance of the losses before training, over examples.
    """

    run: Int[np.ndarray, "train observation"]
    step: Int[np.ndarray, "train observation"]
    linked: Float[np.ndarray, "train observation"]
    known: Bool[np.ndarray, "train observation"]
    start: tuple[float, float]


class States(NamedTuple):
    """Training examples' weights, in units of the link, and losses before training.

    Attributes:
        weights: as those of queries.
        start: on the scale of the link.
        scale: sd of the examples' effects.
    """

    weights: Float[Array, "*draw weight train"]
    start: Float[Array, "*draw train"]
    scale: Float[Array, ""]


def observed_examples(model: Simfluence, fitted: RunArrays) -> Observed:
    """The observations of coupled runs."""
    residual = jnp.nan_to_num(jnp.asarray(fitted.residual, float))
    linked = np.asarray(link_of(model.link, loss_of_residual(residual)))
    counted = (fitted.batch != EMPTY_SLOT) & (fitted.weight > 0)
    places = [np.argwhere(counted & (fitted.batch == example)) for example in range(fitted.train)]
    places = [
        at[np.linspace(0, len(at) - 1, MOST).round().astype(int)] if len(at) > MOST else at
        for at in places
    ]
    most = max(map(len, places), default=0)
    table = np.zeros((fitted.train, max(most, 1), 3), int)
    known = np.zeros(table.shape[:2], bool)
    for example, at in enumerate(places):
        table[example, : len(at)] = at
        known[example, : len(at)] = True
    run, step, slot = np.moveaxis(table, 2, 0)
    first = linked[:, 0][counted[:, 0]]
    start = (float(first.mean()), float(first.var())) if len(first) else (0.0, 1.0)
    return Observed(run, step, linked[run, step, slot], known, start)


@partial(jax.jit, static_argnames=("model", "knots", "draws"))
def conditioned_states(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    observed: Observed,
    size: Float[Array, ""],
    scale: Float[Array, ""],
    left_out: Bool[Array, "group run"],
    key: jax.Array,
    *,
    knots: int,
    draws: int = 0,
) -> States:
    """The examples' states given fitted runs.

    Args:
        model, free: the model and its hyperparameters.
        fitted, observed: the runs, in units, and what they say of their examples.
        size: unit of the designs.
        scale: sd of an example's effects.
        left_out: runs whose observations are not used; the means without each of the groups.
        key, draws: decide draws given all observations, which follow the means of the groups.
        knots: of coefficients along training.

    Returns:
        For each group and each draw.
    """
    values = natural_values(hypers_of(model, fitted.features), free)
    runs = _of_examples(model, fitted)
    designs, mean = designs_and_means(model, values, runs, jnp.arange(fitted.steps), knots=knots)
    # Time 0 first: nothing has been done then.
    designs = jnp.pad(designs / size, ((0, 0), (1, 0), (0, 0)))
    mean = jnp.pad(mean, ((0, 0), (1, 0), (0, 0)))
    error = error_covariance(model, values, jnp.asarray(fitted.progress[0]))
    root = jnp.pad(cholesky(error), ((1, 0), (1, 0)))
    error = jnp.pad(error, ((1, 0), (1, 0)))
    level, spread = observed.start
    variance = spread / scale**2 + WHITE

    def of_example(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        run, step, linked, known, own_mean, own_key = inputs
        rows = jnp.where(known[:, None], designs[run, step], 0.0)
        same = (run[:, None] == run[None, :]) * error[step][:, step]
        covariance = variance + rows @ rows.T + same + WHITE * jnp.eye(len(run))
        missed = linked - level - own_mean[run, step]

        def given(used: Array, missed: Array) -> tuple[Array, Array]:
            both = used[:, None] & used[None, :]
            factor = cholesky(jnp.where(both, covariance, jnp.eye(len(run))))
            half = solve_lower(factor, jnp.where(used, missed, 0.0)[:, None])
            pulled = solve_lower(factor, half, transposed=True)[:, 0]
            return pulled @ rows, variance * pulled.sum()

        def without(group: Array) -> tuple[Array, Array]:
            return given(known & ~group[run], missed)

        def drawn(key: Array) -> tuple[Array, Array]:
            of_weights, of_start, of_error, of_white = jax.random.split(key, 4)
            weights = jax.random.normal(of_weights, rows.shape[1:])
            start = jnp.sqrt(variance) * jax.random.normal(of_start)
            eta = jax.random.normal(of_error, (len(designs), len(root))) @ root.T
            white = jnp.sqrt(WHITE) * jax.random.normal(of_white, step.shape)
            prior = rows @ weights + start + eta[run, step] + white
            shift, move = given(known, missed / scale - prior)
            return scale * (weights + shift), scale * (start + move)

        means = jax.lax.map(without, left_out)
        if not draws:
            return means
        more = jax.lax.map(drawn, jax.random.split(own_key, draws))
        both: tuple[Array, Array] = jax.tree.map(lambda *each: jnp.concatenate(each), means, more)
        return both

    keys = jax.random.split(key, fitted.train)
    table = (observed.run, observed.step, observed.linked, observed.known)
    weights, start = jax.lax.map(
        of_example, (*map(jnp.asarray, table), jnp.moveaxis(mean, 2, 0), keys)
    )
    weights, start = jnp.moveaxis(weights, 0, 2), jnp.moveaxis(start, 0, 1) + level
    seen = jnp.asarray(observed.known).any(axis=1)
    # Of an example that no run trained on, what is known is what the others have in common.
    share = seen / jnp.maximum(seen.sum(), 1)
    common = (weights @ share)[..., None]
    return States(jnp.where(seen[None, None], weights, weights + common), start, jnp.asarray(scale))


@partial(jax.jit, static_argnames=("model", "knots"))
def rolled_out(
    model: Simfluence,
    free: Float[Array, " hyper"],
    states: States,
    runs: RunArrays,
    size: Float[Array, ""],
    white: Float[Array, "run time train"],
    *,
    knots: int,
) -> Float[Array, "run step slot"]:
    """Residuals of planned runs' examples just before each step.

    Args:
        model, free: the model and its hyperparameters.
        states: one draw of the examples' states, or their mean.
        runs: to be simulated, in units.
        size: unit of the designs.
        white: standard normal, of each example's own error in the run; zeros for none.
        knots: of coefficients along training.
    """
    values = natural_values(hypers_of(model, runs.features), free)
    error = error_covariance(model, values, jnp.asarray(runs.progress[0]))
    root = states.scale * jnp.pad(cholesky(error), ((1, 0), (1, 0)))
    others = jax.tree.map(jnp.asarray, _of_examples(model, runs))

    # One run after the other: what each step's examples do to all others would fill the memory.
    def of_run(at: Array) -> Array:
        return _residuals(model, values, states, others.take(at), size, root @ white[at], knots)

    found: Array = jax.lax.map(of_run, jnp.arange(len(runs.batch)))
    return found


def _residuals(
    model: Simfluence,
    values: Values,
    states: States,
    run: RunArrays,
    size: Float[Array, ""],
    eta: Float[Array, "time train"],
    knots: int,
) -> Float[Array, "step slot"]:
    """Of one run: the residuals that give themselves back."""
    batch, weight = jnp.asarray(run.batch), jnp.asarray(run.weight, float)
    weight = jnp.where(batch != EMPTY_SLOT, weight, 0.0)
    total = weight.sum(axis=1, keepdims=True)
    share = weight / jnp.where(total > 0, total, 1.0)
    features, rows = jnp.asarray(run.features.train), jnp.arange(len(batch))
    along = features[batch] if features.shape[1] else jnp.ones((*batch.shape, 1))
    pulls = {
        part: _pulls(model, values, part, states.weights / size, run, knots) for part in model.parts
    }

    def losses(residual: Array) -> Array:
        acting = share * residual
        moment = running_mean(jnp.square(jnp.einsum("sb,sbf->sf", acting, along)).sum(axis=1))
        change = jnp.zeros((len(batch), len(features)))
        for part, pull in pulls.items():
            moved = jnp.einsum("sb,sbj->sj", acting, pull)
            change = change + gathering(model, values, part, run, moment, rows) @ moved
        return states.start[None] + jnp.pad(change, ((1, 0), (0, 0))) + eta

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        residual, _, rounds = state
        before = jnp.take_along_axis(losses(residual)[:-1], jnp.maximum(batch, 0), axis=1)
        found = residual_of(loss_of(model.link, before))
        return found, jnp.abs(found - residual).max(), rounds + 1

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > TOLERANCE) & (state[2] < len(batch))

    begin = residual_of(loss_of(model.link, states.start))[jnp.maximum(batch, 0)]
    residual, _, _ = jax.lax.while_loop(
        goes_on, again, (begin, jnp.asarray(jnp.inf), jnp.asarray(0))
    )
    return jnp.where(batch != EMPTY_SLOT, residual, 0.0)


def _pulls(
    model: Simfluence,
    values: Values,
    part: str,
    weights: Float[Array, "weight train"],
    run: RunArrays,
    knots: int,
) -> Float[Array, "step slot train"]:
    """What each slot's example, acting fully, does to every example at that step."""
    train = weights.shape[1]
    grid = weights.reshape(len(model.parts), knots, -1, train)[model.parts.index(part)]
    over_time = curves(model, values, part, run.progress, knots)
    sources = model.prior.columns(values, part, jnp.eye(train), run.features)
    effects = jnp.einsum("in,knj->kij", sources, grid[:, : sources.shape[1]])
    always = model.prior.mean(values, part, jnp.eye(train), run.features)
    common = jnp.zeros((len(over_time), train))
    if model.time_effect != "none":
        common = values[f"{part}_common"] * time_curve(model, over_time) @ grid[:, -1]
    scale = part_scale(values, part)

    def of_step(inputs: tuple[Array, Array, Array]) -> Array:
        batch, curve, shared = inputs
        varying = jnp.einsum("k,kbj->bj", curve, effects[:, batch]) + shared[None]
        return scale * varying + always[batch]

    pulls: Array = jax.lax.map(of_step, (jnp.asarray(run.batch), over_time, common))
    return pulls


def _of_examples(model: Simfluence, runs: RunArrays) -> RunArrays:
    """The same runs with their own training examples as queries."""
    train = jnp.asarray(runs.features.train)
    comparable = model.prior.extends and runs.features.query.shape[1] == train.shape[1]
    features = ExampleFeatures(train, train if comparable else train[:, :0])
    return runs._replace(features=features, query=np.arange(len(train)))
