"""Hyperparameters sampled with the coefficients integrated out, then exact draws of those.

Where coefficients are Gaussian given hyperparameters, NUTS has to move in a handful of dimensions
instead of thousands: the marginal likelihood is in closed form, and so is the posterior of the
coefficients that belongs to each draw (Rue & Held 2005, section 4.2.2; the target is exactly that
of ``NUTS`` on the whole model, and so are the priors).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.gaussian.designs import Assembled, assembled, linked_change
from bayes_simfluence.inference.diagnostics import sampler_verdict
from bayes_simfluence.inference.method import Fitted
from bayes_simfluence.inference.numpyro_runs import LIMIT, NumpyroRuns, in_numpyro
from bayes_simfluence.inference.nuts import NUTS, sample
from bayes_simfluence.inference.regression import Form, eigen, moments
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.numpyro_model import NOISE, SCALE, WIDE_SCALE, Sites, Units
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.progress import Progress


class Regression(NamedTuple):
    """The regression of one step on its batch, in the eigenbasis of each query's gram."""

    values: Float[Array, "query column"]
    cross: Float[Array, "query column"]
    square: Float[Array, " query"]
    rows: Float[Array, ""]


def collapsed_regression(
    runs: RunArrays, model: Simfluence, form: Form, sampler: NUTS, *, key: jax.Array,
    progress: Progress,
) -> Fitted:  # fmt: skip
    """Scale and noise of each query sampled, coefficients of the published kinds drawn exactly."""
    sample_key, draw_key = jax.random.split(key)
    sums = moments(runs, form, scaled=True)
    solved = eigen(sums)
    with double_precision():
        fitted = in_numpyro(runs, model, "Exact")
        data = Regression(
            values=jnp.asarray(solved.values),
            cross=jnp.asarray(solved.cross),
            square=jnp.asarray(sums.square),
            rows=jnp.asarray(float(sums.rows)),
        )
        thin = _thin(fitted, sampler)
        drawn = sample(
            _of_scales, (data,), sampler, key=sample_key, thin=thin, progress=progress,
        )  # fmt: skip
        chains, draws = drawn.sites["scale"].shape[:2]
        flat = {name: site.reshape(chains * draws, -1) for name, site in drawn.sites.items()}
        weights = _weights(
            data, jnp.asarray(solved.vectors), jnp.asarray(flat["scale"], float),
            jnp.asarray(flat["noise"], float), jax.random.split(draw_key, chains * draws),
        )  # fmt: skip
    units = np.asarray(weights).reshape(chains, draws, *weights.shape[1:], 1)
    sites = {**drawn.sites, **_units_by_site(units, form)}
    verdict = sampler_verdict(drawn.sites, drawn.stats, thin)
    return Fitted(fitted.simulator(sites), verdict, sample_stats=drawn.stats.dataset())


def _of_scales(data: Regression) -> None:
    """The marginal likelihood of scales and noises (Bishop 2006, eq. 3.86, in the eigenbasis)."""
    queries = (len(data.square),)
    scale = numpyro.sample("scale", SCALE.law().expand(queries).to_event(1))
    noise = numpyro.sample("noise", NOISE.law().expand(queries).to_event(1))
    ratio = jnp.square(noise / scale)[:, None]
    explained = (jnp.square(data.cross) / (data.values + ratio)).sum(axis=1)
    volume = jnp.log1p(data.values / ratio).sum(axis=1)
    density = -0.5 * (
        data.rows * jnp.log(2.0 * jnp.pi * jnp.square(noise))
        + volume
        + (data.square - explained) / jnp.square(noise)
    )
    numpyro.factor("evidence", density.sum())


@jax.jit
def _weights(
    data: Regression,
    vectors: Float[Array, "query column column"],
    scale: Float[Array, "draw query"],
    noise: Float[Array, "draw query"],
    keys: Array,
) -> Float[Array, "draw query column"]:
    """Draws of the columns' weights, in units of the query's scale."""

    def of_draw(inputs: tuple[Array, Array, Array]) -> Array:
        scale, noise, key = inputs
        shrunk = data.values + jnp.square(noise / scale)[:, None]
        white = jax.random.normal(key, shrunk.shape, shrunk.dtype)
        inside = data.cross / shrunk + noise[:, None] * white / jnp.sqrt(shrunk)
        weights = jnp.einsum("qcv,qv->qc", vectors, inside) / scale[:, None]
        return weights.astype(jnp.float32)

    drawn: Array = jax.lax.map(of_draw, (scale, noise, keys), batch_size=8)
    return drawn


def _units_by_site(
    weights: Float[np.ndarray, "chain draw query column knot"], form: Form
) -> dict[str, np.ndarray]:
    names = {1: "multiplicative_unit", 0: "staying_unit"}
    blocks = np.split(weights, len(form.powers), axis=3)
    return {names[power]: block for power, block in zip(form.powers, blocks, strict=True)}


@dataclass(frozen=True)
class Marginal:
    """The marginal likelihood of hyperparameters and scales: one factor serves all queries.

    Attributes:
        model: what is inferred.
        rows: positions of the steps whose losses are conditioned on.
    """

    model: Simfluence
    rows: tuple[int, ...]

    def __call__(self, runs: RunArrays, units: Units) -> None:
        """The sites and the density."""
        values = {
            name: numpyro.sample(name, hyper.law())
            for name, hyper in hypers_of(self.model, runs.features).items()
        }
        queries = (runs.loss.shape[2],)
        scale = numpyro.sample("scale", WIDE_SCALE.law().expand(queries).to_event(1))
        made, change = self.at(values, runs, units)
        numpyro.factor("evidence", made.gaussian.log_density(change, scale))

    def at(
        self, values: Values, runs: RunArrays, units: Units
    ) -> tuple[Assembled, Float[Array, "run row query"]]:
        """The runs at given hyperparameters, and their changes minus the prior mean."""
        rows, knots = jnp.asarray(self.rows), self.model.coefficients.count(1.0)
        made = assembled(self.model, values, runs, rows, knots=knots, size=units.spread)
        return made, linked_change(self.model, runs, rows) - made.mean


def collapsed_gaussian(
    runs: RunArrays, model: Simfluence, rows: Int[np.ndarray, " row"], sampler: NUTS, *,
    key: jax.Array, progress: Progress,
) -> Fitted:  # fmt: skip
    """Hyperparameters of a two-timescale model sampled, its coefficients drawn exactly."""
    if not np.isfinite(runs.loss[:, 1:][:, rows]).all():
        raise Misuse(
            "runs['loss']",
            got="losses recorded at other times in some runs than in others",
            expected="the same times in all runs, to sample hyperparameters",
            do="fit with Exact() and its default, or with NUTS()",
        )
    sample_key, draw_key = jax.random.split(key)
    with double_precision():
        fitted = in_numpyro(runs, model, "Exact")
        marginal = Marginal(model, tuple(rows.tolist()))
        thin = _thin(fitted, sampler)
        drawn = sample(
            marginal, fitted.data, sampler, key=sample_key, thin=thin, progress=progress,
            dense=True,
        )  # fmt: skip
        chains, draws = drawn.sites["scale"].shape[:2]
        flat = {
            name: jnp.asarray(site.reshape(chains * draws, *site.shape[2:]), float)
            for name, site in drawn.sites.items()
        }
        coefficients = []
        keys = jax.random.split(draw_key, chains * draws)
        with progress.work("coefficients", len(keys)) as meter:
            for at, own in enumerate(keys):
                sites = {name: site[at] for name, site in flat.items()}
                exact = _coefficient_sites(marginal, *fitted.data, sites, own)
                coefficients.append(jax.tree.map(np.asarray, exact))
                meter.advance()
    whole = {
        name: np.stack([exact[name] for exact in coefficients]).reshape(chains, draws, *site.shape)
        for name, site in coefficients[0].items()
    }
    verdict = sampler_verdict(drawn.sites, drawn.stats, thin)
    return Fitted(
        fitted.simulator({**drawn.sites, **whole}), verdict, sample_stats=drawn.stats.dataset()
    )


@partial(jax.jit, static_argnums=0)
def _coefficient_sites(
    marginal: Marginal, runs: RunArrays, units: Units, sites: Sites, key: Array
) -> dict[str, Float[Array, "..."]]:
    """One exact draw of all coefficients given hyperparameters."""
    made, change = marginal.at(sites, runs, units)
    conditioned = made.gaussian.condition(change)
    weights, queries = conditioned.mean.shape
    weight_key, error_key = jax.random.split(key)
    white = jax.random.normal(weight_key, (weights, queries), conditioned.designs.dtype)
    eta = jax.random.normal(error_key, change.shape, conditioned.designs.dtype)
    deviations = conditioned.deviations(white.T, jnp.moveaxis(eta, 2, 0))
    drawn = conditioned.mean / sites["scale"][None] + deviations.T
    return _named_weights(marginal.model, runs.features, sites, drawn)


def _named_weights(
    model: Simfluence,
    features: ExampleFeatures,
    sites: Sites,
    weights: Float[Array, "weight query"],
) -> dict[str, Float[Array, "..."]]:
    """Weights in the order of ``design.design`` as the sites of the model in NumPyro."""
    shared = model.prior.alike(features).train
    train, width = shared.shape
    timed = model.time_effect != "none"
    grid = weights.reshape(len(model.parts), -1, train + width + int(timed), weights.shape[1])
    named = {}
    for part, block in zip(model.parts, grid, strict=True):
        unit = block[:, :train]
        if width:
            along = jnp.einsum("nf,kfq->knq", shared, block[:, train : train + width])
            unit = unit + sites[f"{part}_alike"] * along
        named[f"{part}_unit"] = jnp.transpose(unit, (2, 1, 0)).astype(jnp.float32)
        if timed:
            curve = block[: 1 if model.time_effect == "linear" else None, -1]
            named[f"{part}_time"] = curve.T.astype(jnp.float32)
    return named


def _thin(runs: NumpyroRuns, sampler: NUTS) -> int:
    return -(-sampler.draws * sampler.chains * runs.bytes_of_a_draw() // LIMIT)
