"""Draws from a model's prior, rolled out: what is left behind where there was no run to fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.numpyro_model import Units, prior_sites
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.simulators.base import Named, Simulated, Simulator
from bayes_simfluence.simulators.sampled import SampledSimulator, unit_arrays, units_of

_prior_sites = partial(jax.jit, static_argnums=0)(prior_sites)


@dataclass(frozen=True)
class PriorSimulator(Simulator):
    """A model with hyperparameters, scales and coefficients drawn from their priors.

    Draws are made when they are asked for and depend on the key alone, so there are any number of
    them and none is saved.

    Attributes:
        model: an additive one (``coupling="none"``).
        units: of the queries' scales.
        features: embeddings of examples and queries.
        recorded: steps of a run: the unit of training time.
        largest_step_size: what step sizes are divided by; None when they are not known, and are
            ignored.
    """

    name: ClassVar[str] = "prior"
    model: Simfluence
    units: Units
    features: ExampleFeatures
    recorded: int
    largest_step_size: float | None

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Each draw rolled out once, with errors of its own."""
        site_key, error_key = jax.random.split(key)
        return self._drawn(site_key, draws).simulate(runs, key=error_key, draws=draws)

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """As of ``SampledSimulator``, with the coefficients that ``simulate`` has under the key."""
        site_key, error_key = jax.random.split(key)
        return self._drawn(site_key, draws).samples(key=error_key, draws=draws)

    def log_likelihood(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> Float[np.ndarray, "chain draw run step query"]:
        """Of whole recordings; the mean of densities over draws is the model's evidence."""
        site_key, error_key = jax.random.split(key)
        return self._drawn(site_key, draws).log_likelihood(runs, key=error_key, draws=draws)

    def _drawn(self, key: jax.Array, draws: int) -> SampledSimulator:
        queries = len(np.asarray(self.units.reference))
        nothing = RunArrays.of(
            np.zeros((1, 1, 1), int), np.zeros((1, 1, queries)), features=self.features
        )
        with double_precision():
            known = jax.tree.map(jnp.asarray, (nothing.in_units(1, None), self.units))
            sites = _prior_sites(self.model, *known, jax.random.split(key, draws))
        return SampledSimulator(
            model=self.model,
            sites={name: np.asarray(site)[None] for name, site in sites.items()},
            units=self.units,
            features=self.features,
            recorded=self.recorded,
            largest_step_size=self.largest_step_size,
        )

    def arrays(self) -> Named:
        """Units of the scales, and features."""
        return unit_arrays(self.units, self.features)

    def settings(self) -> dict[str, Any]:
        """The model, and the units of time and step size."""
        return {
            "model": self.model.as_dict(),
            "recorded": self.recorded,
            "largest_step_size": self.largest_step_size,
        }

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> "PriorSimulator":
        """From ``arrays()`` and ``settings()``."""
        units, features = units_of(arrays)
        model = Simfluence.from_dict(settings["model"])
        return cls(model, units, features, settings["recorded"], settings["largest_step_size"])
