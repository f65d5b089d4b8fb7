"""The model in NumPyro without its data: what is compiled for one recording serves the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array
from numpyro import handlers

from bayes_simfluence.inference.numpyro_runs import NumpyroRuns
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.numpyro_model import Gaps, Units, numpyro_model, prior_sites
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.model.sites import kept

Data = tuple[RunArrays, Units]


@dataclass(frozen=True)
class CompiledModel:
    """A NumPyro model of recorded runs that is compared by value, for caches of compiled code.

    Attributes:
        model: what is inferred.
        gaps: how losses that were not recorded are dealt with.
        batch: runs in a minibatch; all when None.
    """

    model: Simfluence
    gaps: Gaps
    batch: int | None = None

    @classmethod
    def of(cls, runs: NumpyroRuns, batch: int | None = None) -> "CompiledModel":
        """The model of ``runs`` apart from their data, or that of ``batch`` runs at a time."""
        return cls(runs.model, runs.gaps, batch)

    def __call__(self, runs: RunArrays, units: Units, *, simulate: bool = False) -> None:
        """The sites and the density; without the density, of the prior, when ``simulate``."""
        numpyro_model(self.model, runs, units, self.gaps, batch=self.batch, simulate=simulate)

    def prior_sites(self, data: Data, *, key: Array, draws: int) -> dict[str, Array]:
        """Draws from the prior of everything needed to simulate, leading axis of draws."""
        return _prior_sites(self.model, *data, jax.random.split(key, draws))

    def sites_of(self, data: Data, values: Mapping[str, Array]) -> dict[str, Array]:
        """Everything needed to simulate, from draws of the sample sites (leading axis of draws)."""
        return _sites(self, data, dict(values))

    def trace(self, data: Data, values: Mapping[str, Array]) -> dict[str, Any]:
        """NumPyro's trace of all sites, those in ``values`` (one draw) set to them."""
        substituted = handlers.substitute(handlers.seed(self, 0), dict(values))
        trace: dict[str, Any] = handlers.trace(substituted).get_trace(*data)
        return trace


_prior_sites = partial(jax.jit, static_argnums=0)(prior_sites)


@partial(jax.jit, static_argnums=0)
def _sites(model: CompiledModel, data: Data, values: dict[str, Array]) -> dict[str, Array]:
    sites: dict[str, Array] = jax.lax.map(
        lambda draw: kept(model.trace(data, draw)), values, batch_size=8
    )
    return sites
