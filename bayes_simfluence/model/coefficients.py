"""Coefficients over training time: values at knots, straight lines between them."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.checks import positive_integer
from bayes_simfluence.linalg import cholesky
from bayes_simfluence.model.hyper import Hyper, Values

JITTER = 1e-6
ALL = 1.0 - 1e-6
"""A share of all but nothing, that still has log-odds."""


@dataclass(frozen=True)
class Varying:
    """An example's coefficient over training: partly constant, partly a smooth random curve.

    A Gaussian process with covariance ``share + (1 - share) exp(-d^2 / 2 length^2)`` at knots that
    split a recorded run evenly, interpolated linearly. Beyond the recorded length the knots go on
    with the same spacing; what is known of them there comes from the prior.

    Attributes:
        knots: knots in a recorded run, ends included; 1 = constant coefficients.
    """

    knots: int = 6

    def __post_init__(self) -> None:
        positive_integer("Varying(knots=...)", self.knots)

    def hypers(self, part: str) -> dict[str, Hyper]:
        """What is inferred for one part of the effects (``staying``, ``fading``)."""
        if self.knots == 1:
            return {}
        return {
            f"{part}_constant_share": Hyper(
                0.5,
                1.5,
                "share",
                "share of a coefficient's variance that never changes",
                constant=ALL,
            ),
            f"{part}_length": Hyper(
                0.37, 0.7, "positive", "training time over which a coefficient changes"
            ),
        }

    def count(self, reach: float) -> int:
        """Knots that cover training up to ``reach`` recorded lengths."""
        if self.knots == 1:
            return 1
        return self.knots + max(0, -int(-(reach - 1.0 - 1e-9) * (self.knots - 1) // 1))

    def interpolation(
        self, progress: Float[Array, " step"], count: int
    ) -> Float[Array, "step knot"]:
        """Weights of the knots' values in the coefficient at each step; rows sum to one."""
        if self.knots == 1:
            return jnp.ones((len(progress), 1))
        distance = progress[:, None] * (self.knots - 1) - jnp.arange(count)[None, :]
        return jnp.maximum(1.0 - jnp.abs(distance), 0.0)

    def root(self, values: Values, part: str, count: int) -> Float[Array, "knot source"]:
        """A lower triangular root of the knots' prior covariance (unit variance).

        Its leading block does not depend on how many knots follow.
        """
        if self.knots == 1:
            return jnp.ones((1, 1))
        share, length = values[f"{part}_constant_share"], values[f"{part}_length"]
        at = jnp.arange(count) / (self.knots - 1)
        smooth = jnp.exp(-0.5 * jnp.square((at[:, None] - at[None, :]) / length))
        return cholesky(share + (1.0 - share) * smooth + JITTER * jnp.eye(count))
