"""The model as a NumPyro program: every prior, every error, all queries at once.

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

from bayes_simfluence.model import kalman
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.link import loss_of
from bayes_simfluence.model.mean_function import (
    Coefficients,
    batch_effects,
    explained,
    multipliers,
)
from bayes_simfluence.model.priors import ExampleFeatures, no_features
from bayes_simfluence.model.simfluence import (
    MULTIPLICATIVE,
    Path,
    Simfluence,
    hypers_of,
    part_scale,
    time_curve,
)
from bayes_simfluence.model.sites import latent

__all__ = [
    "Gaps",
    "Observed",
    "Sites",
    "Units",
    "coefficients_of",
    "density_of",
    "filterable",
    "gaps_of",
    "joint",
    "noise_of",
]

SCALE = Hyper(0.05, 1.5, "positive", "sd of the effect of a step on one example, units of the link")
WIDE_SCALE = Hyper(
    0.5, 1.5, "positive", "sd of a run's change by its curriculum, units of the link"
)
NOISE = Hyper(0.01, 1.5, "positive", "sd of one step's error, units of the link")
"""Priors of what belongs to each query: for the published kinds, ``WIDE_SCALE`` for the other."""

Sites = Mapping[str, Array]
"""Values of the program's sample sites, by name."""


class Units(NamedTuple):
    """Fixed numbers that say what a scale means; known before any update.

    Attributes:
        reference: of each query, root mean square of its losses before the first update: the loss
            at which multiplicative and additive effects of the published kinds are equally large.
        spread: what a query's scale is divided by to be the sd of a coefficient. One for the
            published kinds; for the others the sd along a run of effects with unit coefficients,
            so that their scale is that of the loss's change.
    """

    reference: Float[Array, " query"]
    spread: Float[Array, ""]


class Observed(NamedTuple):
    """Recorded runs as the program sees them.

    Attributes:
        paths: exposures, relative step sizes and progress, with a leading axis of runs.
        linked: losses on the scale of the link, time 0 first; NaN = not recorded.
        units: of the queries' scales.
        features: embeddings of examples and queries.
    """

    paths: Path
    linked: Float[Array, "run time query"]
    units: Units
    features: ExampleFeatures


class Gaps(NamedTuple):
    """How losses that were not recorded are dealt with; all three ways are exact.

    Attributes:
        rows: steps after which losses enter the density of the error path, the others being
            integrated out; all steps where nothing is missing.
        imputed: positions (run, time, query) of losses that become sites of the program.
        filtered: a Kalman filter integrates over them, and over what noise hides.
    """

    rows: Int[np.ndarray, " row"]
    imputed: Int[np.ndarray, "entry axis"]
    filtered: bool


def gaps_of(model: Simfluence, linked: Float[np.ndarray, "run time query"]) -> Gaps:
    """The cheapest exact way for a model and a pattern of missing losses."""
    steps = np.arange(linked.shape[1] - 1)
    lost = ~np.isfinite(linked)
    nothing = np.zeros((0, 3), int)
    error = model.error
    hidden = model.multiplicative and error.hides_state
    if hidden or (lost.any() and filterable(model)):
        return Gaps(steps, nothing, True)
    by_time = lost.any(axis=(0, 2))[1:]
    common = bool((lost[:, 1:] == by_time[None, :, None]).all())
    linear = error.gaussian and not (model.multiplicative or error.follows_loss)
    if common and linear:
        return Gaps(steps[~by_time], nothing, False)
    return Gaps(steps, np.argwhere(lost), False)


def filterable(model: Simfluence) -> bool:
    """Whether a Kalman filter takes it: the next loss follows from the last one, errors apart."""
    return model.markov and model.error.random_walk


def joint(
    model: Simfluence,
    observed: Observed,
    gaps: Gaps,
    *,
    batch: int | None = None,
    simulate: bool = False,
) -> None:
    """The program: sites of hyperparameters, coefficients and the runs' ``log_density``.

    Args:
        model: what to infer.
        observed: the runs.
        gaps: how losses that were not recorded are dealt with.
        batch: runs in a minibatch of stochastic inference; all when omitted.
        simulate: leave the losses out: the prior of everything else.
    """
    values = {
        name: numpyro.sample(name, hyper.law())
        for name, hyper in hypers_of(model, observed.features).items()
    }
    queries = observed.linked.shape[2]
    sites = dict(values)
    sites["scale"] = _of_query("scale", SCALE if model.published else WIDE_SCALE, model, queries)
    if model.published and model.error.by_step:
        sites["noise"] = _of_query("noise", NOISE, model, queries)
    sites.update(_coefficient_sites(model, values, observed))
    if simulate:
        return
    coefficients = coefficients_of(model, sites, observed.units, observed.features)
    linked = _imputed(observed.linked, gaps)
    size = len(linked)
    with numpyro.plate("runs", size, subsample_size=batch) as chosen:
        paths = (
            observed.paths if batch is None else jax.tree.map(lambda x: x[chosen], observed.paths)
        )
        seen = linked if batch is None else linked[chosen]
        each = density_of(model, sites, coefficients, paths, seen, gaps)
        numpyro.factor("log_density", each.sum(axis=(1, 2)))


def _imputed(linked: Float[Array, "run time query"], gaps: Gaps) -> Array:
    """Losses with the missing ones as sites: a flat prior leaves their density to the model."""
    if not len(gaps.imputed):
        return linked
    runs, _, queries = gaps.imputed.T
    law = dist.Normal(linked[runs, 0, queries], 1.0).to_event(1)
    missing = numpyro.sample("missing", law)
    # The proposal above only says where a sampler may start.
    numpyro.factor("missing_is_flat", -law.log_prob(missing))
    return linked.at[tuple(gaps.imputed.T)].set(missing)


def _of_query(name: str, hyper: Hyper, model: Simfluence, queries: int) -> Array:
    if not model.prior.pooled:
        return latent(name, hyper.law(), (queries,), ingredient=False)
    centre = numpyro.sample(f"{name}_centre", hyper.law())
    spread = numpyro.sample(f"{name}_spread", dist.HalfNormal(1.0))
    own = latent(f"{name}_of_query", dist.Normal(0.0, 1.0), (queries,))
    return numpyro.deterministic(name, centre * jnp.exp(spread * own))


def _coefficient_sites(model: Simfluence, values: Values, observed: Observed) -> dict[str, Array]:
    train, queries = observed.paths.exposure.shape[2], observed.linked.shape[2]
    knots = model.coefficients.count(1.0)
    sites: dict[str, Array] = {}
    for part in model.parts if model.additive else ():
        effects = model.prior.effects(part, (queries, train, knots), values, observed.features)
        sites[f"{part}_unit"] = numpyro.deterministic(f"{part}_unit", effects)
        if model.time_effect != "none":
            shape = (queries, knots if model.time_effect == "smooth" else 1)
            sites[f"{part}_time"] = latent(
                f"{part}_time", dist.Normal(0.0, 1.0), shape, ingredient=False, coefficient=True
            )
    if model.multiplicative:
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
    for part in model.parts if model.additive else ():
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
    if model.multiplicative:
        ratio = 1.0 / units.reference if model.published else sites["multiplicative_scale"]
        size = scale * ratio if model.prior.scaled else scale
        multiplicative = size[:, None] * sites["multiplicative_unit"][..., 0]
    return Coefficients(additive, common, multiplicative)


def density_of(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    paths: Path,
    linked: Float[Array, "run time query"],
    gaps: Gaps,
) -> Float[Array, "run step query"]:
    """Log density of each loss (units of the link) given the run's earlier ones.

    Zero where none was recorded; the sum over steps is the log density of the run.
    """
    if gaps.filtered:
        of_run = partial(_filtered_density, model, sites, coefficients)
    else:
        # Runs are equally long: what depends on their times alone is computed once.
        progress = paths.progress[0]
        of_run = partial(_direct_density, model, sites, coefficients, gaps.rows, progress)
    density: Array = jax.vmap(of_run)(paths, linked)
    return density


def noise_of(model: Simfluence, sites: Sites) -> Float[Array, " query"]:
    """Size of each query's error."""
    if not model.error.by_step:
        return sites["scale"]
    return sites["noise"] if model.published else sites["noise"] * sites["scale"]


def _filtered_density(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    path: Path,
    linked: Float[Array, "time query"],
) -> Float[Array, "step query"]:
    beta = batch_effects(model, coefficients, "staying", path)
    factor = multipliers(coefficients, path)
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
    path: Path,
    linked: Float[Array, "time query"],
) -> Float[Array, "step query"]:
    # Times that ``rows`` leaves out must not spoil the gradient of the others.
    linked = jnp.where(jnp.isfinite(linked), linked, linked[:1])
    before = linked[:-1]
    error = linked[1:] - linked[:1] - explained(model, sites, coefficients, path, before)
    noise = noise_of(model, sites)[None]
    sizes = model.error.sizes(sites, loss_of(model.link, before))
    if sizes is not None:
        error = jnp.cumsum(jnp.diff(error, axis=0, prepend=0.0) / sizes, axis=0)
    density = model.error.log_density(sites, error / noise, progress, rows)
    enters = np.isin(np.arange(len(progress)), rows)[:, None]
    density = density - jnp.where(enters, jnp.log(noise), 0.0)
    return density if sizes is None else density - jnp.where(enters, jnp.log(sizes), 0.0)
