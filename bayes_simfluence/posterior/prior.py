"""Draws from before any run was seen: what a model's priors mean for coefficients and losses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, keyed, positive_integer
from bayes_simfluence.conventions import EFFECT_SIGN
from bayes_simfluence.inference.compiled import CompiledModel
from bayes_simfluence.inference.numpyro_runs import in_numpyro
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.arviz import Prior


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
        site_key, loss_key = jax.random.split(key)
        recorded = recorded_arrays(runs, self.model.prior)
        # The prior knows no later losses; what is missing would only become sites of its own.
        known = recorded._replace(loss=np.broadcast_to(recorded.loss[:, :1], recorded.loss.shape))
        with double_precision():
            model = in_numpyro(known, self.model, "prior")
            sites = CompiledModel.of(model).prior_sites(model.data, key=site_key, draws=draws)
        simulator = model.simulator({name: np.asarray(site)[None] for name, site in sites.items()})
        simulated = simulator.simulate(recorded, key=loss_key, draws=draws)
        coords = {"chain": [0], "draw": np.arange(draws)}
        ids = {name: runs[name].values for name in ("query", "train")}
        parameters = xr.Dataset(
            dict(simulator.samples(key=loss_key, draws=draws)),
            coords={**coords, **ids},
            attrs={"effects": EFFECT_SIGN},
        )
        predictive = xr.Dataset(
            {"loss": (("chain", "draw", "run", "time", "query"), simulated.loss)},
            coords={**coords, **{name: runs[name].values for name in ("run", "time", "query")}},
        )
        return Prior(parameters, predictive)


def prior_draw(
    model: Simfluence, runs: xr.Dataset
) -> Callable[[jax.Array], tuple[xr.Dataset, xr.Dataset]]:
    """One recording and the truth behind it, for simulation-based calibration.

    Args:
        model: whose prior and errors are drawn from.
        runs: curricula and initial losses, which every drawn recording shares.

    Returns:
        A function of a key: recorded runs, and true values named as in ``Posterior.samples``.
    """

    def draw(key: jax.Array) -> tuple[xr.Dataset, xr.Dataset]:
        drawn = PriorOf(model)(runs, key=key, draws=1)
        if drawn.predictive is None:
            raise Misuse("model", got="no predictions", expected="some", do="report this")
        loss = np.array(drawn.predictive["loss"].values[0, 0], runs["loss"].dtype)
        loss[:, 0] = runs["loss"].values[:, 0]
        loss[~np.isfinite(runs["loss"].values)] = np.nan
        return runs.assign(loss=runs["loss"].copy(data=loss)), drawn.parameters.isel(
            chain=0, draw=0, drop=True
        )

    return draw


def prior_from_settings(settings: dict[str, Any]) -> PriorOf | None:
    """The prior of a saved posterior's model, where its settings say all of it."""
    if "model" not in settings or not settings.get("has_prior", False):
        return None
    model = Simfluence.from_dict(settings["model"])
    return PriorOf(model) if model.prior.stored else None
