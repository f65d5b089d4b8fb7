"""Error of a run: what its curriculum does not explain, smooth over training."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.transition import accumulation

__all__ = ["SmoothError"]


@dataclass(frozen=True)
class SmoothError:
    """A random walk plus a smooth stationary part, both zero before the first update.

    The random walk lets a run drift away for good; with positive ``growth`` deviations feed on
    themselves (the staying effects share that rate). The stationary part is a Matern-3/2 process
    conditioned to start at zero; its amplitude may change exponentially along the run. Scales are
    relative to the root mean square of the effects.
    """

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        return {
            "drift": Hyper(0.08, 1.5, "positive", "sd of the random walk after a recorded length"),
            "wobble": Hyper(0.08, 1.5, "positive", "sd of the stationary part"),
            "wobble_length": Hyper(0.08, 1.0, "positive", "training time over which it changes"),
            "wobble_trend": Hyper(0.0, 1.0, "real", "log growth of its sd per recorded length"),
        }

    def covariance(
        self, values: Values, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        """Covariance of a run's error between the times after each step, relative units."""
        walk = accumulation(values["growth"], progress)
        walk = (walk * progress[0]) @ walk.T
        start = _matern(progress, values["wobble_length"])
        smooth = _matern(progress[:, None] - progress[None, :], values["wobble_length"])
        smooth = smooth - start[:, None] * start[None, :]
        sd = values["wobble"] * jnp.exp(values["wobble_trend"] * (progress - 0.5))
        return values["drift"] ** 2 * walk + sd[:, None] * sd[None, :] * smooth


def _matern(distance: Float[Array, "..."], length: Float[Array, ""]) -> Float[Array, "..."]:
    """Matern covariance with smoothness 3/2 (Rasmussen & Williams 2006, eq. 4.17)."""
    scaled = jnp.sqrt(3.0) * jnp.abs(distance) / length
    return (1.0 + scaled) * jnp.exp(-scaled)
