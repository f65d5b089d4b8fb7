"""Training examples as states: their own losses, inferred from recorded residuals.

In a coupled model an example acts by its residual, so a simulation has to know the losses of the
examples that it trains on. They follow the same model as the queries, with the prior mean that
their gradient features give, and are observed now and then: each time a recorded run trained on the
example, its residual just before the step. Given those, an example's weights are Gaussian, a small
system for each example; ``rollout`` simulates with them.
"""

from collections.abc import Callable
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
from bayes_simfluence.model.coupling import loss_of_residual
from bayes_simfluence.model.hyper import Values, natural_values
from bayes_simfluence.model.link import link_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of

MOST = 96
"""Observations of an example that are used, spread evenly over those there are."""
WHITE = 1e-4
"""Variance of an observation's own error, over that of the effects."""


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


class _System(NamedTuple):
    """One example's observations as a linear-Gaussian system, in units of its scale.

    Attributes:
        run, step, known: as in ``Observed``.
        rows: what an observation says of the weights.
        covariance: of the observations.
        missed: what was observed minus the prior mean, units of the link.
        variance: of the loss before training.
    """

    run: Int[Array, " observation"]
    step: Int[Array, " observation"]
    known: Bool[Array, " observation"]
    rows: Float[Array, "observation weight"]
    covariance: Float[Array, "observation observation"]
    missed: Float[Array, " observation"]
    variance: Float[Array, ""]

    def given(
        self, used: Bool[Array, " observation"], missed: Float[Array, " observation"]
    ) -> tuple[Float[Array, " weight"], Float[Array, ""]]:
        """Mean of the weights and of the loss before training, given the ``used`` observations."""
        both = used[:, None] & used[None, :]
        factor = cholesky(jnp.where(both, self.covariance, jnp.eye(len(used))))
        half = solve_lower(factor, jnp.where(used, missed, 0.0)[:, None])
        pulled = solve_lower(factor, half, transposed=True)[:, 0]
        return pulled @ self.rows, self.variance * pulled.sum()


@partial(jax.jit, static_argnames=("model", "knots"))
def conditioned_states(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    observed: Observed,
    size: Float[Array, ""],
    scale: Float[Array, ""],
    left_out: Bool[Array, "group run"],
    *,
    knots: int,
) -> States:
    """Means of the examples' states given all fitted runs but those of a group, for each group.

    Args:
        model, free: the model and its hyperparameters.
        fitted, observed: the runs, in units, and what they say of their examples.
        size: unit of the designs.
        scale: sd of an example's effects.
        left_out: runs whose observations are not used.
        knots: of coefficients along training.
    """

    def of_groups(
        system: _System, root: Array, own: Array
    ) -> tuple[Float[Array, "group weight"], Float[Array, " group"]]:
        def without(group: Array) -> tuple[Array, Array]:
            return system.given(system.known & ~group[system.run], system.missed)

        means: tuple[Array, Array] = jax.lax.map(without, left_out)
        return means

    nothing = jnp.zeros(fitted.train)
    return _of_all(model, free, fitted, observed, size, scale, of_groups, nothing, knots)


@partial(jax.jit, static_argnames=("model", "knots", "draws"))
def drawn_states(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    observed: Observed,
    size: Float[Array, ""],
    scale: Float[Array, ""],
    key: jax.Array,
    *,
    knots: int,
    draws: int,
) -> States:
    """Draws of the examples' states given all fitted runs; arguments as ``conditioned_states``."""

    def of_draws(
        system: _System, root: Array, key: Array
    ) -> tuple[Float[Array, "draw weight"], Float[Array, " draw"]]:
        def drawn(key: Array) -> tuple[Array, Array]:
            of_weights, of_start, of_error, of_white = jax.random.split(key, 4)
            weights = jax.random.normal(of_weights, system.rows.shape[1:])
            start = jnp.sqrt(system.variance) * jax.random.normal(of_start)
            eta = jax.random.normal(of_error, (len(fitted.batch), len(root))) @ root.T
            white = jnp.sqrt(WHITE) * jax.random.normal(of_white, system.step.shape)
            prior = system.rows @ weights + start + eta[system.run, system.step] + white
            shift, move = system.given(system.known, system.missed / scale - prior)
            return scale * (weights + shift), scale * (start + move)

        made: tuple[Array, Array] = jax.lax.map(drawn, jax.random.split(key, draws))
        return made

    keys = jax.random.split(key, fitted.train)
    return _of_all(model, free, fitted, observed, size, scale, of_draws, keys, knots)


def _of_all(
    model: Simfluence,
    free: Float[Array, " hyper"],
    fitted: RunArrays,
    observed: Observed,
    size: Float[Array, ""],
    scale: Float[Array, ""],
    solve: Callable[[_System, Array, Array], tuple[Array, Array]],
    own: Array,
    knots: int,
) -> States:
    """``solve(system, root of a run's error, own[example])``, one example after the other."""
    values = natural_values(hypers_of(model, fitted.features), free)
    runs = of_examples(model, fitted)
    designs, mean = designs_and_means(model, values, runs, jnp.arange(fitted.steps), knots=knots)
    # Time 0 first: nothing has been done then.
    designs = jnp.pad(designs / size, ((0, 0), (1, 0), (0, 0)))
    mean = jnp.pad(mean, ((0, 0), (1, 0), (0, 0)))
    root = error_root(model, values, fitted)
    error = root @ root.T
    level, spread = observed.start
    variance = spread / scale**2 + WHITE

    def of_example(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        run, step, linked, known, own_mean, own = inputs
        rows = jnp.where(known[:, None], designs[run, step], 0.0)
        same = (run[:, None] == run[None, :]) * error[step][:, step]
        covariance = variance + rows @ rows.T + same + WHITE * jnp.eye(len(run))
        missed = linked - level - own_mean[run, step]
        return solve(_System(run, step, known, rows, covariance, missed, variance), root, own)

    table = (observed.run, observed.step, observed.linked, observed.known)
    weights, start = jax.lax.map(
        of_example, (*map(jnp.asarray, table), jnp.moveaxis(mean, 2, 0), own)
    )
    weights, start = jnp.moveaxis(weights, 0, 2), jnp.moveaxis(start, 0, 1) + level
    seen = jnp.asarray(observed.known).any(axis=1)
    # Of an example that no run trained on, what is known is what the others have in common.
    share = seen / jnp.maximum(seen.sum(), 1)
    common = (weights @ share)[..., None]
    return States(jnp.where(seen[None, None], weights, weights + common), start, jnp.asarray(scale))


def error_root(model: Simfluence, values: Values, runs: RunArrays) -> Float[Array, "time time"]:
    """A root of the covariance of a run's error, which begins after the first step."""
    error = error_covariance(model, values, jnp.asarray(runs.progress[0]))
    return jnp.pad(cholesky(error), ((1, 0), (1, 0)))


def of_examples(model: Simfluence, runs: RunArrays) -> RunArrays:
    """The same runs with their own training examples as queries."""
    train = jnp.asarray(runs.features.train)
    comparable = model.prior.extends and runs.features.query.shape[1] == train.shape[1]
    features = ExampleFeatures(train, train if comparable else train[:, :0])
    return runs._replace(features=features, query=np.arange(len(train)))
