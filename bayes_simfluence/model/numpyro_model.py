"""The model in NumPyro: every prior, every error, all queries at once.

The same function draws from the prior, is sampled by NUTS and fitted by SVI. Given coefficients the
errors of different runs are independent, and the errors' density is that of the losses: each loss
is its error plus what earlier losses and the curriculum determine.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, Int
from numpyro import distributions as dist
from numpyro import handlers

from bayes_simfluence.model import kalman
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.design import part_scale, time_curve
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.mean_function import (
    Coefficients,
    batch_effects,
    mean_function,
    multipliers,
)
from bayes_simfluence.model.simfluence import MULTIPLICATIVE, Simfluence, hypers_of
from bayes_simfluence.model.sites import kept, latent

SCALE = Hyper(0.05, 1.5, "positive", "sd of the effect of a step on one example, units of the link")
WIDE_SCALE = Hyper(
    0.5, 1.5, "positive", "sd of a run's change by its curriculum, units of the link"
)
NOISE = Hyper(0.01, 1.5, "positive", "sd of one step's error, units of the link")
"""Priors of what belongs to each query; ``WIDE_SCALE`` is that of shared scales."""

Sites = Mapping[str, Array]
"""Values of the program's sample sites, by name."""


class Units(NamedTuple):
    """Fixed numbers that say what a scale means; known before any update.

    Attributes:
        reference: of each query, root mean square of its losses before the first update: the loss
            at which multiplicative and additive effects are equally large under scales per query.
        spread: what a query's scale is divided by to be the sd of a coefficient. One for scales
            per query; for shared ones the sd along a run of effects with unit coefficients, so
            that their scale is that of the loss's change.
    """

    reference: Float[Array, " query"]
    spread: Float[Array, ""]


class Gaps(NamedTuple):
    """How losses that were not recorded are dealt with; all three ways are exact.

    Plain numbers, so that what is compiled for one recording serves others with the same gaps.

    Attributes:
        rows: steps after which losses enter the density of the error path, the others being
            integrated out; all steps where nothing is missing.
        imputed: positions (run, time, query) of losses that become sites of the program.
        filtered: a Kalman filter integrates over them, and over what noise hides.
    """

    rows: tuple[int, ...]
    imputed: tuple[tuple[int, ...], ...]
    filtered: bool

    @property
    def seen(self) -> Int[np.ndarray, " row"]:
        """``rows`` as an array."""
        return np.array(self.rows, int)

    @property
    def positions(self) -> Int[np.ndarray, "entry axis"]:
        """``imputed`` as an array."""
        return np.array(self.imputed, int).reshape(-1, 3)


def gaps_of(model: Simfluence, linked: Float[np.ndarray, "run time query"]) -> Gaps:
    """The cheapest exact way for a model and a pattern of missing losses."""
    steps = tuple(range(linked.shape[1] - 1))
    lost = ~np.isfinite(linked)
    error = model.error
    hidden = model.has_multiplicative and error.hides_state
    if hidden or (lost.any() and filterable(model)):
        return Gaps(steps, (), True)
    by_time = lost.any(axis=(0, 2))[1:]
    common = bool((lost[:, 1:] == by_time[None, :, None]).all())
    linear = error.gaussian and not (model.has_multiplicative or error.follows_loss)
    if common and linear:
        return Gaps(tuple(np.flatnonzero(~by_time).tolist()), (), False)
    return Gaps(steps, tuple(map(tuple, np.argwhere(lost).tolist())), False)


def filterable(model: Simfluence) -> bool:
    """Whether a Kalman filter takes it: the next loss follows from the last one, errors apart."""
    return model.markov and model.error.random_walk


def numpyro_model(
    model: Simfluence,
    runs: RunArrays,
    units: Units,
    gaps: Gaps,
    *,
    batch: int | None = None,
    simulate: bool = False,
) -> None:
    """Sites of hyperparameters and coefficients, and the runs' ``log_density``.

    Args:
        model: what to infer.
        runs: recorded runs, in units.
        units: of the queries' scales.
        gaps: how losses that were not recorded are dealt with.
        batch: runs in a minibatch of stochastic inference; all when omitted.
        simulate: leave the losses out: the prior of everything else.
    """
    values = {
        name: numpyro.sample(name, hyper.law())
        for name, hyper in hypers_of(model, runs.features).items()
    }
    queries = runs.loss.shape[2]
    sites = dict(values)
    sites["scale"] = _of_query("scale", SCALE if model.per_query else WIDE_SCALE, model, queries)
    if model.per_query and model.error.by_step:
        sites["noise"] = _of_query("noise", NOISE, model, queries)
    sites.update(_coefficient_sites(model, values, runs))
    if simulate:
        return
    coefficients = coefficients_of(model, sites, units, runs.features)
    linked = _imputed(link_of(model.link, jnp.asarray(runs.loss)), gaps)
    with numpyro.plate("runs", len(linked), subsample_size=batch) as chosen:
        if batch is not None:
            runs, linked = runs.take(chosen), linked[chosen]
        density = density_of(model, sites, coefficients, runs, linked, gaps)
        numpyro.factor("log_density", density.sum(axis=(1, 2)))


def prior_sites(
    model: Simfluence, runs: RunArrays, units: Units, keys: Array
) -> dict[str, Float[Array, "draw *shape"]]:
    """Draws from the prior of everything needed to simulate, one for each key.

    Args:
        model: whose prior.
        runs: any, with the examples, queries and features that sites are wanted of.
        units: of the queries' scales.
        keys: decide the draws.
    """

    def of_draw(key: Array) -> dict[str, Array]:
        program = partial(numpyro_model, model, runs, units, Gaps((), (), False), simulate=True)
        return kept(handlers.trace(handlers.seed(program, key)).get_trace())

    sites: dict[str, Array] = jax.lax.map(of_draw, keys, batch_size=8)
    return sites


def _imputed(linked: Float[Array, "run time query"], gaps: Gaps) -> Array:
    """Losses with the missing ones as sites: a flat prior leaves their density to the model."""
    if not len(gaps.imputed):
        return linked
    runs, _, queries = gaps.positions.T
    law = dist.Normal(linked[runs, 0, queries], 1.0).to_event(1)
    missing = numpyro.sample("missing", law)
    # The proposal above only says where a sampler may start.
    numpyro.factor("missing_is_flat", -law.log_prob(missing))
    return linked.at[tuple(gaps.positions.T)].set(missing)


def _of_query(name: str, hyper: Hyper, model: Simfluence, queries: int) -> Array:
    if not model.prior.pooled:
        return latent(name, hyper.law(), (queries,), ingredient=False)
    centre = numpyro.sample(f"{name}_centre", hyper.law())
    spread = numpyro.sample(f"{name}_spread", dist.HalfNormal(1.0))
    own = latent(f"{name}_of_query", dist.Normal(0.0, 1.0), (queries,))
    return numpyro.deterministic(name, centre * jnp.exp(spread * own))


def _coefficient_sites(model: Simfluence, values: Values, runs: RunArrays) -> dict[str, Array]:
    train, queries = runs.train, runs.loss.shape[2]
    knots = model.coefficients.count(1.0)
    sites: dict[str, Array] = {}
    for part in model.parts if model.has_additive else ():
        effects = model.prior.effects(part, (queries, train, knots), values, runs.features)
        sites[f"{part}_unit"] = numpyro.deterministic(f"{part}_unit", effects)
        if model.time_effect != "none":
            shape = (queries, knots if model.time_effect == "smooth" else 1)
            sites[f"{part}_time"] = latent(
                f"{part}_time", dist.Normal(0.0, 1.0), shape, ingredient=False, coefficient=True
            )
    if model.has_multiplicative:
        nothing = no_features(train, queries)
        effects = model.prior.effects(MULTIPLICATIVE, (queries, train, 1), values, nothing)
        sites["multiplicative_unit"] = numpyro.deterministic("multiplicative_unit", effects)
    return sites


def coefficients_of(
    model: Simfluence, sites: Sites, units: Units, features: ExampleFeatures
) -> Coefficients:
    """One draw's coefficients, in units of the link, from its sites.

    Unit effects with more knots than a recorded run has belong to a longer one.
    """
    whole = sites["scale"] / units.spread
    scale = whole if model.prior.scaled else jnp.ones_like(whole)
    additive, common = {}, {}
    for part in model.parts if model.has_additive else ():
        unit = sites[f"{part}_unit"]
        root = model.coefficients.root(sites, part, unit.shape[2])
        own = scale * part_scale(sites, part) if model.prior.scaled else scale
        everyone = jnp.eye(unit.shape[1], dtype=unit.dtype)
        mean = model.prior.mean(sites, part, everyone, features)
        over_time = unit @ root.T if model.prior.varying else unit
        additive[part] = own[:, None, None] * over_time + mean.T[:, :, None]
        if f"{part}_time" in sites:
            size = whole * part_scale(sites, part) * sites[f"{part}_common"]
            curve = time_curve(model, root)[:, : sites[f"{part}_time"].shape[1]]
            common[part] = size[:, None] * (sites[f"{part}_time"] @ curve.T)
    multiplicative = None
    if model.has_multiplicative:
        ratio = 1.0 / units.reference if model.per_query else sites["multiplicative_scale"]
        size = scale * ratio if model.prior.scaled else scale
        multiplicative = size[:, None] * sites["multiplicative_unit"][..., 0]
    return Coefficients(additive, common, multiplicative)


def density_of(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    runs: RunArrays,
    linked: Float[Array, "run time query"],
    gaps: Gaps,
) -> Float[Array, "run step query"]:
    """Log density of each loss (``linked``, units of the link) given the run's earlier ones.

    Zero where none was recorded; the sum over steps is the log density of the run.
    """
    if gaps.filtered:
        of_run = partial(_filtered_density, model, sites, coefficients)
    else:
        # Runs are equally long: what depends on their times alone is computed once.
        progress = jnp.asarray(runs.progress[0])
        of_run = partial(_direct_density, model, sites, coefficients, gaps.seen, progress)
    density: Array = runs.each(of_run, linked)
    return density


def noise_of(model: Simfluence, sites: Sites) -> Float[Array, " query"]:
    """Size of each query's error."""
    if not model.error.by_step:
        return sites["scale"]
    return sites["noise"] if model.per_query else sites["noise"] * sites["scale"]


def _filtered_density(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    run: RunArrays,
    linked: Float[Array, "time query"],
) -> Float[Array, "step query"]:
    beta = batch_effects(model, coefficients, "staying", run)
    factor = multipliers(coefficients, run)
    alpha = jnp.ones_like(beta) if factor is None else 1.0 + factor
    process = jnp.square(noise_of(model, sites))
    observation = jnp.square(model.error.observation_sd(sites)) * process
    of_query = jax.vmap(kalman.log_density, in_axes=(1, 1, 0, 1, 0, 0), out_axes=1)
    density: Array = of_query(alpha, beta, linked[0], linked[1:], process, observation)
    return density


def _direct_density(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    rows: Int[np.ndarray, " row"],
    progress: Float[Array, " step"],
    run: RunArrays,
    linked: Float[Array, "time query"],
) -> Float[Array, "step query"]:
    # Times that ``rows`` leaves out must not spoil the gradient of the others.
    linked = jnp.where(jnp.isfinite(linked), linked, linked[:1])
    before = linked[:-1]
    error = linked[1:] - linked[:1] - mean_function(model, sites, coefficients, run, before)
    noise = noise_of(model, sites)[None]
    sizes = model.error.sizes(sites, loss_of(model.link, before))
    if sizes is not None:
        error = jnp.cumsum(jnp.diff(error, axis=0, prepend=0.0) / sizes, axis=0)
    density = model.error.log_density(sites, error / noise, progress, rows)
    enters = np.isin(np.arange(len(progress)), rows)[:, None]
    density = density - jnp.where(enters, jnp.log(noise), 0.0)
    return density if sizes is None else density - jnp.where(enters, jnp.log(sizes), 0.0)
