"""The joint program without its data: what is compiled for one recording serves the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from bayes_simfluence.inference.numpyro_runs import Program
from bayes_simfluence.model.numpyro_model import Gaps, Observed, joint
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.model.sites import kept

__all__ = ["JointProgram"]


@dataclass(frozen=True)
class JointProgram:
    """A NumPyro program of recorded runs that is compared by value, for caches of compiled code.

    Attributes:
        model: what is inferred.
        rows, imputed, filtered: ``Gaps``, as tuples.
        batch: runs in a minibatch; all when None.
    """

    model: Simfluence
    rows: tuple[int, ...]
    imputed: tuple[tuple[int, ...], ...]
    filtered: bool
    batch: int | None = None

    @classmethod
    def of(cls, program: Program, batch: int | None = None) -> "JointProgram":
        """What ``program`` is apart from its data, or that of ``batch`` runs at a time."""
        gaps = program.gaps
        imputed = tuple(tuple(position) for position in gaps.imputed.tolist())
        return cls(program.model, tuple(gaps.rows.tolist()), imputed, gaps.filtered, batch)

    def __call__(self, observed: Observed, *, simulate: bool = False) -> None:
        """The sites and the density; without the density, of the prior, when ``simulate``."""
        imputed = np.array(self.imputed, int).reshape(-1, 3)
        gaps = Gaps(np.array(self.rows, int), imputed, self.filtered)
        joint(self.model, observed, gaps, batch=self.batch, simulate=simulate)

    def prior_sites(self, observed: Observed, *, key: Array, draws: int) -> dict[str, Array]:
        """Draws from the prior of everything needed to simulate, leading axis of draws."""
        return _prior_sites(self, observed, jax.random.split(key, draws))

    def sites_of(self, observed: Observed, values: Mapping[str, Array]) -> dict[str, Array]:
        """Everything needed to simulate, from draws of the sample sites (leading axis of draws)."""
        return _sites(self, observed, dict(values))

    def trace(self, observed: Observed, values: Mapping[str, Array]) -> dict[str, Any]:
        """NumPyro's trace of all sites, those in ``values`` (one draw) set to them."""
        run = handlers.substitute(handlers.seed(self, 0), dict(values))
        trace: dict[str, Any] = handlers.trace(run).get_trace(observed)
        return trace


@partial(jax.jit, static_argnums=0)
def _prior_sites(program: JointProgram, observed: Observed, keys: Array) -> dict[str, Array]:
    def of_draw(key: Array) -> dict[str, Array]:
        run = handlers.seed(partial(program, simulate=True), key)
        return kept(handlers.trace(run).get_trace(observed))

    sites: dict[str, Array] = jax.lax.map(of_draw, keys, batch_size=8)
    return sites


@partial(jax.jit, static_argnums=0)
def _sites(program: JointProgram, observed: Observed, values: dict[str, Array]) -> dict[str, Array]:
    sites: dict[str, Array] = jax.lax.map(
        lambda draw: kept(program.trace(observed, draw)), values, batch_size=8
    )
    return sites
