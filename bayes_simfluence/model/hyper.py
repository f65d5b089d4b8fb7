"""Hyperparameters: what they mean, which values they may take, and a weak prior for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import distributions as dist

Values = Mapping[str, Float[Array, "..."]]
"""Hyperparameters by name, on their natural scale: scalars.

A mapping of all sites of a draw serves as well; only hyperparameters are looked up in it.
"""

EDGE, LEAST = 1e-7, 1e-37
"""How near to one, and to zero, a value in single precision can be without being it."""
NEGLIGIBLE = 1e-4
"""A scale so small that what it belongs to does nothing, and that still has a logarithm."""


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter with a normal prior on its unconstrained scale.

    Attributes:
        centre: prior median, on the natural scale.
        spread: prior standard deviation on the unconstrained scale (log for ``positive``, log-odds
            for ``share``, Fisher's z for ``correlation``, the number itself for ``real``).
        scale: the possible values: any number, above zero, between zero and one, or between minus
            one and one.
        meaning: a description of one line.
        constant: value under which effects are constant, that is, they neither change nor grow nor
            fade and time has none of its own; None where it has no part in that.
    """

    centre: float
    spread: float
    scale: Literal["real", "positive", "share", "correlation"]
    meaning: str
    constant: float | None = None

    def natural(self, free: Float[Array, ""]) -> Float[Array, ""]:
        """From the unconstrained to the natural scale."""
        if self.scale == "positive":
            return jnp.exp(free)
        if self.scale == "correlation":
            return jnp.tanh(free)
        return jax.nn.sigmoid(free) if self.scale == "share" else free

    def free(self, natural: Float[Array, "*draw"]) -> Float[Array, "*draw"]:
        """From the natural to the unconstrained scale.

        A value that rounding brought to the edge of those possible is just inside.
        """
        return self._free(natural, jnp)

    def law(self) -> dist.Distribution:
        """The prior on the natural scale."""
        normal = dist.Normal(self.free_centre, self.spread)
        maps = dist.transforms
        transforms: dict[str, list[dist.transforms.Transform]] = {
            "real": [],
            "positive": [maps.ExpTransform()],
            "share": [maps.SigmoidTransform()],
            # tanh(x) = 2 sigmoid(2 x) - 1
            "correlation": [
                maps.AffineTransform(0.0, 2.0),
                maps.SigmoidTransform(),
                maps.AffineTransform(-1.0, 2.0, domain=dist.constraints.unit_interval),
            ],
        }
        if not transforms[self.scale]:
            return normal
        return dist.TransformedDistribution(normal, transforms[self.scale])

    def free_number(self, natural: float) -> float:
        """The same of one number, outside of programs and in double precision."""
        return float(self._free(natural, np))

    def _free(self, natural: Any, xp: ModuleType) -> Any:
        """By the functions of NumPy or of JAX."""
        if self.scale == "positive":
            return xp.log(xp.maximum(natural, LEAST))
        if self.scale == "correlation":
            return xp.arctanh(xp.clip(natural, EDGE - 1.0, 1.0 - EDGE))
        if self.scale == "share":
            inside = xp.clip(natural, EDGE, 1.0 - EDGE)
            return xp.log(inside) - xp.log1p(-inside)
        return natural

    @property
    def free_centre(self) -> float:
        """The prior's centre on the unconstrained scale."""
        return self.free_number(self.centre)


def start(
    hypers: Mapping[str, Hyper], held: Mapping[str, float] | None = None
) -> Float[np.ndarray, " hyper"]:
    """The prior's centre as a vector, in the order of ``hypers``; values that are ``held`` as such.

    Args:
        held: by name, on the natural scale.
    """
    held = held or {}
    return np.array(
        [hyper.free_number(held.get(name, hyper.centre)) for name, hyper in hypers.items()]
    )


def natural_values(hypers: Mapping[str, Hyper], free: Float[Array, " hyper"]) -> Values:
    """A vector on the unconstrained scale as named values on the natural one."""
    return {name: hyper.natural(free[at]) for at, (name, hyper) in enumerate(hypers.items())}


def free_values(hypers: Mapping[str, Hyper], values: Values) -> Float[Array, " hyper"]:
    """Named values on the natural scale as a vector on the unconstrained one."""
    return jnp.stack([hyper.free(values[name]) for name, hyper in hypers.items()])


def log_prior(hypers: Mapping[str, Hyper], free: Float[Array, " hyper"]) -> Float[Array, ""]:
    """Log density of the prior on the unconstrained scale, up to a constant."""
    spreads = jnp.asarray([hyper.spread for hyper in hypers.values()])
    return -0.5 * jnp.square((free - start(hypers)) / spreads).sum()
