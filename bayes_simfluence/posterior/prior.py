"""Draws from before any run was seen: what a model's priors mean for coefficients and losses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import keyed, positive_integer
from bayes_simfluence.conventions import EFFECT_SIGN
from bayes_simfluence.data.training import counted_slots, with_training
from bayes_simfluence.inference.compiled import CompiledModel
from bayes_simfluence.inference.numpyro_runs import in_numpyro
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.arviz import Prior
from bayes_simfluence.simulators.sampled import SampledSimulator


@dataclass(frozen=True)
class PriorOf:
    """Draws from a model's prior, for given curricula and initial losses.

    Attributes:
        model: the model.

    >>> import jax, bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(run=slice(0, 2), query=slice(0, 3))
    >>> drawn = PriorOf(bs.Simfluence.linear())(runs, key=jax.random.key(0), draws=5)
    >>> dict(drawn.parameters["a"].sizes)
    {'chain': 1, 'draw': 5, 'query': 3, 'train': 200}
    """

    model: Simfluence

    def __call__(self, runs: xr.Dataset, *, key: jax.Array, draws: int) -> Prior:
        """Parameters named as in the posterior, and the losses that they predict.

        Args:
            runs: whose curricula are run; of their losses only time 0 is used.
            key: decides the draws.
            draws: how many.
        """
        keyed(key)
        positive_integer("draws", draws)
        drawn = _drawn(self.model, runs, key=key, draws=draws)
        predictive = xr.Dataset(
            {"loss": (("chain", "draw", "run", "time", "query"), drawn.loss)},
            coords={
                **_counted(draws),
                **{name: runs[name].values for name in ("run", "time", "query")},
            },
        )
        return Prior(_parameters(drawn.simulator, runs, key=key, draws=draws), predictive)


class _Drawn(NamedTuple):
    """Draws from a prior.

    Attributes:
        simulator: of the draws.
        loss: along the runs' curricula.
        residual: of coupled runs' examples, for each share of the draws; [None] else.
    """

    simulator: SampledSimulator
    loss: Float[np.ndarray, "chain draw run time query"]
    residual: list[Float[np.ndarray, "run step slot"] | None]


def _drawn(model: Simfluence, runs: xr.Dataset, *, key: jax.Array, draws: int) -> _Drawn:
    site_key, loss_key = jax.random.split(key)
    recorded = recorded_arrays(runs, model.prior, residuals=model.coupled)
    # The prior knows no later losses; what is missing would only become sites of its own.
    known = recorded._replace(loss=np.broadcast_to(recorded.loss[:, :1], recorded.loss.shape))
    with double_precision():
        made = in_numpyro(known, model, "prior")
        sites = CompiledModel.of(made).prior_sites(made.data, key=site_key, draws=draws)
    simulator = made.simulator({name: np.asarray(site)[None] for name, site in sites.items()})
    before = replace(simulator, fitted=simulator.fitted and _first_steps(simulator.fitted))
    simulated = before.simulate(recorded, key=loss_key, draws=draws)
    residual = before.residuals(recorded, key=loss_key, draws=draws)
    return _Drawn(simulator, simulated.loss, residual)


def _first_steps(runs: RunArrays) -> RunArrays:
    """The runs' first steps: what residuals tell of examples before any update, and no more."""
    return runs._replace(
        batch=runs.batch[:, :1],
        weight=runs.weight[:, :1],
        step_size=None if runs.step_size is None else runs.step_size[:, :1],
        loss=runs.loss[:, :2],
        progress=runs.progress[:, :1],
        residual=None if runs.residual is None else runs.residual[:, :1],
    )


def _parameters(
    simulator: SampledSimulator, runs: xr.Dataset, *, key: jax.Array, draws: int
) -> xr.Dataset:
    ids = {name: runs[name].values for name in ("query", "train")}
    return xr.Dataset(
        dict(simulator.samples(key=key, draws=draws)),
        coords={**_counted(draws), **ids},
        attrs={"effects": EFFECT_SIGN},
    )


def _counted(draws: int) -> dict[str, np.ndarray]:
    return {"chain": np.zeros(1, int), "draw": np.arange(draws)}


def prior_draw(
    model: Simfluence, runs: xr.Dataset
) -> Callable[[jax.Array], tuple[xr.Dataset, xr.Dataset]]:
    """One recording and the truth behind it, for simulation-based calibration.

    Args:
        model: whose prior and errors are drawn from.
        runs: curricula and initial losses, which every drawn recording shares. Where they tell
            the residuals of their examples, a coupled model draws such too: the examples are
            simulated with the queries, from the losses that the first steps tell.

    Returns:
        A function of a key: recorded runs, and true values named as in ``Posterior.samples``.
    """

    def draw(key: jax.Array) -> tuple[xr.Dataset, xr.Dataset]:
        drawn = _drawn(model, runs, key=key, draws=1)
        loss = np.array(drawn.loss[0, 0], runs["loss"].dtype)
        loss[:, 0] = runs["loss"].values[:, 0]
        loss[~np.isfinite(runs["loss"].values)] = np.nan
        made = runs.assign(loss=runs["loss"].copy(data=loss))
        simulator, (residual,) = drawn.simulator, drawn.residual
        if simulator.fitted is not None and residual is not None:
            simulator = replace(simulator, fitted=simulator.fitted._replace(residual=residual))
            made = _with_residuals(made, residual)
        truth = _parameters(simulator, runs, key=key, draws=1)
        return made, truth.isel(chain=0, draw=0, drop=True)

    return draw


def _with_residuals(runs: xr.Dataset, residual: Float[np.ndarray, "run step slot"]) -> xr.Dataset:
    """The runs with these residuals instead of what they tell of their examples."""
    told = with_training(runs.drop_vars("train_loss", errors="ignore"), "train_residual")
    seen = np.where(counted_slots(runs), residual, np.nan).astype(np.float32)
    return told.assign(train_residual=told["train_residual"].copy(data=seen))


def prior_from_settings(settings: dict[str, Any]) -> PriorOf | None:
    """The prior of a saved posterior's model, where its settings say all of it."""
    if "model" not in settings or not settings.get("has_prior", False):
        return None
    model = Simfluence.from_dict(settings["model"])
    return PriorOf(model) if model.prior.stored else None
