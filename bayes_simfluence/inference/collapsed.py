"""Hyperparameters sampled with the coefficients integrated out, then exact draws of those.

Where coefficients are Gaussian given hyperparameters, NUTS has to move in a handful of dimensions
instead of thousands: the marginal likelihood is in closed form, and so is the posterior of the
coefficients that belongs to each draw (Rue & Held 2005, section 4.2.2; the target is exactly that
of ``NUTS`` on the joint program, and so are the priors).
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
from bayes_simfluence.gaussian.designs import (
    designs_and_means,
    error_covariance,
    fitted_covariance,
)
from bayes_simfluence.inference.diagnostics import sampler_verdict
from bayes_simfluence.inference.method import Fitted
from bayes_simfluence.inference.numpyro_runs import LIMIT, Program, program_of
from bayes_simfluence.inference.nuts import NUTS, sample
from bayes_simfluence.inference.recorded import Recorded
from bayes_simfluence.inference.regression import Form, eigen, moments
from bayes_simfluence.linalg import cholesky, double_precision, solve_lower
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.numpyro_model import NOISE, SCALE, WIDE_SCALE, Sites
from bayes_simfluence.model.priors import ExampleFeatures
from bayes_simfluence.model.simfluence import Path, Simfluence, hypers_of
from bayes_simfluence.progress import Progress

__all__ = ["collapsed_paths", "collapsed_regression"]


class Regression(NamedTuple):
    """The regression of one step on its batch, in the eigenbasis of each query's gram."""

    values: Float[Array, "query column"]
    cross: Float[Array, "query column"]
    square: Float[Array, " query"]
    rows: Float[Array, ""]


def collapsed_regression(
    runs: Recorded, model: Simfluence, form: Form, sampler: NUTS, *, key: jax.Array,
    progress: Progress,
) -> Fitted:  # fmt: skip
    """Scale and noise of each query sampled, coefficients of the published kinds drawn exactly."""
    sample_key, draw_key = jax.random.split(key)
    found = moments(runs, form, scaled=True)
    solved = eigen(found)
    with double_precision():
        program = program_of(runs, model, "Exact")
        data = Regression(
            values=jnp.asarray(solved.values),
            cross=jnp.asarray(solved.cross),
            square=jnp.asarray(found.square),
            rows=jnp.asarray(float(found.rows)),
        )
        thin = _thin(program, sampler)
        drawn = sample(
            _of_scales, (data,), sampler, key=sample_key, thin=thin, progress=progress,
        )  # fmt: skip
        chains, draws = drawn.sites["scale"].shape[:2]
        flat = {name: one.reshape(chains * draws, -1) for name, one in drawn.sites.items()}
        weights = _weights(
            data, jnp.asarray(solved.vectors), jnp.asarray(flat["scale"], float),
            jnp.asarray(flat["noise"], float), jax.random.split(draw_key, chains * draws),
        )  # fmt: skip
    units = np.asarray(weights).reshape(chains, draws, *weights.shape[1:], 1)
    sites = {**drawn.sites, **_units_by_site(units, form)}
    verdict = sampler_verdict(drawn.sites, drawn.stats, thin)
    return Fitted(program.simulator(sites), verdict, sample_stats=drawn.stats.dataset())


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

    def one(inputs: tuple[Array, Array, Array]) -> Array:
        scale, noise, key = inputs
        shrunk = data.values + jnp.square(noise / scale)[:, None]
        white = jax.random.normal(key, shrunk.shape, shrunk.dtype)
        inside = data.cross / shrunk + noise[:, None] * white / jnp.sqrt(shrunk)
        found = jnp.einsum("qcv,qv->qc", vectors, inside) / scale[:, None]
        return found.astype(jnp.float32)

    drawn: Array = jax.lax.map(one, (scale, noise, keys), batch_size=8)
    return drawn


def _units_by_site(
    weights: Float[np.ndarray, "chain draw query column knot"], form: Form
) -> dict[str, np.ndarray]:
    names = {1: "multiplicative_unit", 0: "staying_unit"}
    blocks = np.split(weights, len(form.powers), axis=3)
    return {names[power]: block for power, block in zip(form.powers, blocks, strict=True)}


class Points(NamedTuple):
    """Recorded changes at some times of each run, where they are, and what runs trained on.

    Attributes:
        change: since before the first update, on the scale of the link.
        rows: steps after which.
        paths, features, spread: as the joint program has them.
    """

    change: Float[Array, "run row query"]
    rows: Int[Array, " row"]
    paths: Path
    features: ExampleFeatures
    spread: Float[Array, ""]


@dataclass(frozen=True)
class Hypers:
    """The marginal likelihood of hyperparameters and scales: one factor serves all queries."""

    model: Simfluence

    def __call__(self, points: Points) -> None:
        """The sites and the density."""
        values = {
            name: numpyro.sample(name, hyper.law())
            for name, hyper in hypers_of(self.model, points.features).items()
        }
        queries = (points.change.shape[2],)
        scale = numpyro.sample("scale", WIDE_SCALE.law().expand(queries).to_event(1))
        factor, residual, _, _ = _factored(self.model, values, points)
        white = solve_lower(factor, residual) / scale[None]
        volume = jnp.log(jnp.diagonal(factor)).sum() + len(factor) * jnp.log(scale)
        numpyro.factor("evidence", -0.5 * jnp.square(white).sum() - volume.sum())


def collapsed_paths(
    runs: Recorded, model: Simfluence, rows: Int[np.ndarray, " row"], sampler: NUTS, *,
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
        program = program_of(runs, model, "Exact")
        observed = program.observed
        change = observed.linked[:, 1:][:, rows] - observed.linked[:, :1]
        points = Points(
            change, jnp.asarray(rows), observed.paths, observed.features, observed.units.spread
        )
        thin = _thin(program, sampler)
        drawn = sample(
            Hypers(model), (points,), sampler, key=sample_key, thin=thin, progress=progress,
            dense=True,
        )  # fmt: skip
        chains, draws = drawn.sites["scale"].shape[:2]
        flat = {
            name: jnp.asarray(one.reshape(chains * draws, *one.shape[2:]), float)
            for name, one in drawn.sites.items()
        }
        keys = jax.random.split(draw_key, chains * draws)
        with progress.work("coefficients", len(keys)) as meter:
            found = []
            for at, one in enumerate(keys):
                sites = {name: value[at] for name, value in flat.items()}
                found.append(jax.tree.map(np.asarray, _path_sites(model, points, sites, one)))
                meter.advance()
    whole = {
        name: np.stack([one[name] for one in found]).reshape(chains, draws, *found[0][name].shape)
        for name in found[0]
    }
    verdict = sampler_verdict(drawn.sites, drawn.stats, thin)
    return Fitted(
        program.simulator({**drawn.sites, **whole}), verdict, sample_stats=drawn.stats.dataset()
    )


def _factored(
    model: Simfluence, values: Values, points: Points
) -> tuple[Array, Array, Array, Array]:
    """Factor of all points' covariance and residuals, for unit scale; designs and error."""
    knots = model.coefficients.count(1.0)
    designs, mean = designs_and_means(
        model, values, points.paths, points.features, points.rows, knots=knots
    )
    designs = designs / points.spread
    error = error_covariance(model, values, points.paths.progress[0])
    error = error[points.rows][:, points.rows]
    factor = cholesky(fitted_covariance(designs, error))
    residual = (points.change - mean).reshape(len(factor), -1)
    return factor, residual, designs.reshape(len(factor), -1), error


@partial(jax.jit, static_argnums=0)
def _path_sites(
    model: Simfluence, points: Points, sites: Sites, key: Array
) -> dict[str, Float[Array, "..."]]:
    """One exact draw of all coefficients given hyperparameters, by perturb-and-solve.

    With ``X`` the designs, ``K`` the points' covariance and ``w``, ``eta`` from the prior,
    ``w + X' K^-1 (y / s - X w - eta)`` is a draw given ``y`` (Papandreou & Yuille 2010).
    """
    factor, residual, designs, error = _factored(model, sites, points)
    runs, queries = len(points.change), residual.shape[1]
    weight_key, error_key = jax.random.split(key)
    white = jax.random.normal(weight_key, (designs.shape[1], queries), designs.dtype)
    eta = jax.random.normal(error_key, (runs, len(error), queries), designs.dtype)
    eta = jnp.einsum("ts,rsq->rtq", cholesky(error), eta).reshape(len(factor), queries)
    miss = residual / sites["scale"][None] - designs @ white - eta
    solved = solve_lower(factor, solve_lower(factor, miss), transposed=True)
    weights = white + designs.T @ solved
    return _named_weights(model, points.features, sites, weights)


def _named_weights(
    model: Simfluence,
    features: ExampleFeatures,
    sites: Sites,
    weights: Float[Array, "weight query"],
) -> dict[str, Float[Array, "..."]]:
    """Weights in the order of ``bayesian.design`` as the joint program's sites."""
    train, width = features.train.shape
    timed = model.time_effect != "none"
    grid = weights.reshape(len(model.parts), -1, train + width + int(timed), weights.shape[1])
    found = {}
    for part, block in zip(model.parts, grid, strict=True):
        unit = block[:, :train]
        if width:
            along = jnp.einsum("nf,kfq->knq", features.train, block[:, train : train + width])
            unit = unit + sites[f"{part}_alike"] * along
        found[f"{part}_unit"] = jnp.transpose(unit, (2, 1, 0)).astype(jnp.float32)
        if timed:
            curve = block[: 1 if model.time_effect == "linear" else None, -1]
            found[f"{part}_time"] = curve.T.astype(jnp.float32)
    return found


def _thin(program: Program, sampler: NUTS) -> int:
    return -(-sampler.draws * sampler.chains * program.bytes_of_a_draw() // LIMIT)
