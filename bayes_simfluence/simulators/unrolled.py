"""Draws of coefficients rolled out into losses, with errors drawn from the model's."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.design import gather, rate_of, trend
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.mean_function import Coefficients, batch_effects, multipliers
from bayes_simfluence.model.numpyro_model import Sites, Units, coefficients_of, noise_of
from bayes_simfluence.model.simfluence import Simfluence

AT_ONCE = 8
"""Draws rolled out together."""


@partial(jax.jit, static_argnames=("model", "knots"))
def simulated(
    model: Simfluence, draws: Sites, units: Units, runs: RunArrays, keys: Array, *, knots: int
) -> tuple[Array, Array]:
    """Losses after each step, without and with error: (draw, run, step, query)."""
    start = link_of(model.link, jnp.asarray(runs.initial, float))

    def of_draw(inputs: tuple[Sites, Array]) -> tuple[Array, Array]:
        sites, key = inputs
        knot_key, error_key = jax.random.split(key)
        longer = _extended(model, sites, knots, key=knot_key)
        coefficients = of_queries(coefficients_of(model, longer, units, runs.features), runs.query)
        noise = noise_of(model, sites)[runs.query]
        progress = jnp.asarray(runs.progress[0])

        def of_run(run: RunArrays, number: Array, initial: Array) -> tuple[Array, Array]:
            own = jax.random.fold_in(error_key, number)
            return _rolled(model, sites, coefficients, run, initial, noise, progress, key=own)

        rolled: tuple[Array, Array] = runs.each(of_run, jnp.arange(len(start)), start)
        return rolled

    losses: tuple[Array, Array] = jax.lax.map(of_draw, (draws, keys), batch_size=AT_ONCE)
    return losses


def _extended(model: Simfluence, sites: Sites, knots: int, *, key: jax.Array) -> Sites:
    """Sites with fresh prior draws of the knots beyond a recorded run."""
    more = knots - model.coefficients.count(1.0)
    if more <= 0 or not model.has_additive:
        return sites
    longer, names = dict(sites), sorted(sites)
    for part in model.parts:
        unit, time = f"{part}_unit", f"{part}_time"
        own = jax.random.fold_in(key, names.index(unit))
        longer[unit] = model.prior.continued(sites[unit], more, key=own)
        if model.time_effect == "smooth":
            own = jax.random.fold_in(key, names.index(time))
            shape = (*sites[time].shape[:-1], more)
            fresh = jax.random.normal(own, shape, sites[time].dtype)
            longer[time] = jnp.concatenate([sites[time], fresh], axis=-1)
    return longer


def of_queries(coefficients: Coefficients, query: Array) -> Coefficients:
    """The coefficients of some queries alone."""
    chosen: Coefficients = jax.tree.map(lambda every: every[query], coefficients)
    return chosen


def _rolled(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    run: RunArrays,
    start: Float[Array, " query"],
    noise: Float[Array, " query"],
    progress: Float[Array, " step"],
    *,
    key: jax.Array,
) -> tuple[Float[Array, "step query"], Float[Array, "step query"]]:
    walk_key, seen_key = jax.random.split(key)
    # Multiplicative terms act on the state: the noise that hides it is added at the end.
    hidden = model.has_multiplicative and model.error.hides_state
    own = model.error.of_state if hidden else model.error
    error = noise[None] * own.trajectory(sites, progress, len(start), key=walk_key)
    feedback = model.has_multiplicative or model.error.follows_loss
    way = _scanned if feedback else _summed
    mean = way(model, sites, coefficients, run, start, jnp.zeros_like(error))
    loss = way(model, sites, coefficients, run, start, error)
    if hidden:
        white = jax.random.normal(seen_key, error.shape)
        loss = loss + model.error.observation_sd(sites) * noise[None] * white
    return loss_of(model.link, mean), loss_of(model.link, loss)


def _summed(
    model: Simfluence,
    values: Values,
    coefficients: Coefficients,
    run: RunArrays,
    start: Float[Array, " query"],
    error: Float[Array, "step query"],
) -> Float[Array, "step query"]:
    """Without feedback of the loss: a sum of matrix products."""
    rows = jnp.arange(run.steps)
    total = start[None] + error
    for part in model.parts:
        moved = batch_effects(model, coefficients, part, run)
        total = total + gather(model, values, run, part, rows) @ moved
    return total


class _State(NamedTuple):
    moved: dict[str, Array]
    total: dict[str, Array]
    error: Array
    loss: Array


def _scanned(
    model: Simfluence,
    values: Values,
    coefficients: Coefficients,
    run: RunArrays,
    start: Float[Array, " query"],
    error: Float[Array, "step query"],
) -> Float[Array, "step query"]:
    """Step by step: batches act on the simulated loss, and the error's size may follow it."""
    steps = run.steps
    batches = {part: batch_effects(model, coefficients, part, run) for part in model.parts}
    factor = multipliers(coefficients, run)
    weights = model.exposure.weights(values, jnp.asarray(run.step_size))
    weights = trend(values, jnp.asarray(run.progress))[:, None] * weights
    kept = {part: jnp.exp(rate_of(values, part) * run.progress[0]) for part in model.parts}
    pushes = jnp.diff(error, axis=0, prepend=jnp.zeros_like(error[:1]))

    def step(state: _State, at: Array) -> tuple[_State, Array]:
        moved, total = {}, {}
        for part in model.parts:
            now = batches[part][at]
            if factor is not None and part == model.parts[0]:
                now = now + factor[at] * state.loss
            moved[part] = state.moved[part].at[at].set(now)
            total[part] = kept[part] * state.total[part] + weights[at] @ moved[part]
        size = model.error.sizes(values, loss_of(model.link, state.loss)[None])
        push = pushes[at] if size is None else size[0] * pushes[at]
        deviation = state.error + push
        loss = start + sum(total.values()) + deviation
        return _State(moved, total, deviation, loss), loss

    nothing = {part: jnp.zeros_like(error) for part in model.parts}
    zero = {part: jnp.zeros_like(start) for part in model.parts}
    begin = _State(nothing, zero, jnp.zeros_like(start), start)
    losses: Array = jax.lax.scan(step, begin, jnp.arange(steps))[1]
    return losses
