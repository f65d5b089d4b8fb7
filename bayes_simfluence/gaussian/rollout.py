"""Coupled runs rolled out: the residuals with which planned runs' training examples will act.

A run's residuals depend on the losses of its examples, and the losses on the residuals of earlier
steps. They are found by repeating the roll-out with the residuals that it gives: after ``k`` rounds
the first ``k`` steps are exact, and in practice a dozen rounds are.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.gaussian.examples import (
    States,
    conditioned_states,
    drawn_states,
    error_root,
    observed_examples,
    of_examples,
)
from bayes_simfluence.gaussian.queries import carried_weights
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.coupling import residual_of, running_mean
from bayes_simfluence.model.design import curves, gathering, part_scale, time_curve
from bayes_simfluence.model.hyper import Values, natural_values
from bayes_simfluence.model.link import loss_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of

SCENARIOS = 8
"""Draws of the training examples' states, by which the draws of queries are simulated in turn."""
OF_STATES = 0x5747
"""Folded into a key: draws of the states are none of the queries'."""
TOLERANCE = 1e-4
"""Residuals of two rounds agree to this."""
GROUPS = 8
"""Most groups of runs without which training examples' states are inferred."""


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
    root = states.scale * error_root(model, values, runs)
    others = jax.tree.map(jnp.asarray, of_examples(model, runs))

    # One run after the other: what each step's examples do to all others would fill the memory.
    def of_run(at: Array) -> Array:
        return _residuals(model, values, states, others.take(at), size, root @ white[at], knots)

    found: Array = jax.lax.map(of_run, jnp.arange(len(runs.batch)))
    return found


def drawn_residuals(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    runs: RunArrays,
    size: Float[Array, ""],
    scale: float,
    key: jax.Array,
    *,
    knots: int,
    scenarios: int,
) -> Iterator[Float[np.ndarray, "run step slot"]]:
    """Draws of planned runs' residuals, each of other states and errors of their examples.

    Args:
        model, free: the model and its hyperparameters.
        fitted, runs: conditioned on, and planned; both in units.
        size: unit of the designs.
        scale: sd of an example's effects.
        key: decides the draws.
        knots: of coefficients along training.
        scenarios: how many.
    """
    state_key, error_key = jax.random.split(key)
    observed = observed_examples(model, fitted)
    with double_precision():
        states = drawn_states(
            model, free, fitted, observed, size, scale, state_key, knots=knots, draws=scenarios
        )
        states = _of_unseen(model, fitted, states, np.asarray(observed.known.any(axis=1)))
    for scenario, own in enumerate(jax.random.split(error_key, scenarios)):
        with double_precision():
            white = jax.random.normal(own, (len(runs.batch), runs.steps + 1, runs.train))
            one = States(states.weights[scenario], states.start[scenario], states.scale)
            found = rolled_out(model, free, one, runs, size, white, knots=knots)
        yield np.asarray(found)


def _of_unseen(
    model: Simfluence, fitted: RunArrays, states: States, seen: Bool[np.ndarray, " train"]
) -> States:
    """Examples that no run trained on differ from the others' mean as their features tell."""
    features = np.asarray(model.prior.alike(fitted.features).train)
    if seen.all() or not seen.any() or not features.shape[1]:
        return states
    weights = np.array(states.weights)
    known = weights.mean(axis=0)[:, seen]
    carried = carried_weights(known, features[seen], features[~seen])
    weights[:, :, ~seen] += carried - known.mean(axis=1, keepdims=True)
    return states._replace(weights=jnp.asarray(weights))


def left_out_residuals(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    size: Float[Array, ""],
    scale: float,
) -> Float[np.ndarray, "run step slot"]:
    """Residuals of fitted runs as simulated from the others, a group left out at a time.

    Means of the states, no errors; arguments as ``drawn_residuals``.
    """
    knots, count = model.coefficients.count(1.0), len(fitted.batch)
    groups = [np.arange(first, count, GROUPS) for first in range(min(GROUPS, count))]
    left_out = np.stack([np.isin(np.arange(count), group) for group in groups])
    states = conditioned_states(
        model, free, fitted, observed_examples(model, fitted), size, scale, left_out, knots=knots
    )
    found = np.zeros(fitted.batch.shape)
    for at, group in enumerate(groups):
        # Groups of one size, so that one program serves all.
        padded = np.resize(group, len(groups[0]))
        white = np.zeros((len(padded), fitted.steps + 1, fitted.train))
        own = States(states.weights[at], states.start[at], states.scale)
        planned = fitted.take(padded)._replace(residual=None)
        residual = rolled_out(model, free, own, planned, size, white, knots=knots)
        found[group] = np.asarray(residual)[: len(group)]
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
    gradients, rows = jnp.asarray(model.prior.alike(run.features).train), jnp.arange(len(batch))
    along = gradients[batch] if gradients.shape[1] else jnp.ones((*batch.shape, 1))
    pulls = {
        part: _pulls(model, values, part, states.weights / size, run, knots) for part in model.parts
    }

    def losses(residual: Array) -> Array:
        acting = share * residual
        moment = running_mean(jnp.square(jnp.einsum("sb,sbf->sf", acting, along)).sum(axis=1))
        change = jnp.zeros((len(batch), len(gradients)))
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
