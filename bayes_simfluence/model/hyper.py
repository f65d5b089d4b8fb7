"""Hyperparameters: their meaning, their scale, and a weak prior that keeps a search on the map."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["Hyper", "Values", "log_prior", "natural_values", "start"]

Values = Mapping[str, Float[Array, ""]]
"""Hyperparameters by name, on their natural scale."""


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter with a normal prior on its unconstrained scale.

    Attributes:
        centre: prior median, on the natural scale.
        spread: prior standard deviation on the unconstrained scale (log for ``positive``, log-odds
            for ``share``, the number itself for ``real``).
        scale: which numbers are possible: any, above zero, between zero and one.
        meaning: what it is, in one line.
    """

    centre: float
    spread: float
    scale: Literal["real", "positive", "share"]
    meaning: str

    def natural(self, free: Float[Array, ""]) -> Float[Array, ""]:
        """From the unconstrained to the natural scale."""
        if self.scale == "positive":
            return jnp.exp(free)
        return jax.nn.sigmoid(free) if self.scale == "share" else free

    @property
    def free_centre(self) -> float:
        """The prior's centre on the unconstrained scale."""
        if self.scale == "positive":
            return float(np.log(self.centre))
        if self.scale == "share":
            return float(np.log(self.centre) - np.log1p(-self.centre))
        return self.centre


def start(hypers: Mapping[str, Hyper]) -> Float[np.ndarray, " hyper"]:
    """The prior's centre as a vector, in the order of ``hypers``."""
    return np.array([hyper.free_centre for hyper in hypers.values()])


def natural_values(hypers: Mapping[str, Hyper], free: Float[Array, " hyper"]) -> Values:
    """A vector on the unconstrained scale as named values on the natural one."""
    return {name: hyper.natural(free[at]) for at, (name, hyper) in enumerate(hypers.items())}


def log_prior(hypers: Mapping[str, Hyper], free: Float[Array, " hyper"]) -> Float[Array, ""]:
    """Log density of the prior on the unconstrained scale, up to a constant."""
    spreads = jnp.asarray([hyper.spread for hyper in hypers.values()])
    return -0.5 * jnp.square((free - start(hypers)) / spreads).sum()
