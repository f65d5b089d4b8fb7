"""What is believed of examples' effects before any run is seen."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.model.hyper import Hyper, Values

__all__ = ["ExampleFeatures", "Normal", "no_features"]


class ExampleFeatures(NamedTuple):
    """Gradient features of training examples and queries (``recording.features``)."""

    train: Float[Array, "train feature"]
    query: Float[Array, "query feature"]


def no_features(train: int, query: int) -> ExampleFeatures:
    """Features that say nothing."""
    return ExampleFeatures(jnp.zeros((train, 0)), jnp.zeros((query, 0)))


@dataclass(frozen=True)
class Normal:
    """Normal effects with learned scales; examples with alike gradients have alike effects.

    The effect of example ``i`` on query ``q`` is, up to the query's scale,
    ``-dot * <f_i, f_q> + own_i + alike * sum_k f_ik shared_k`` with standard normal ``own`` and
    ``shared`` and the recording's gradient features ``f``. The first term says what gradients at
    the initial weights predict (one-checkpoint TracIn; in units of the link, for every query
    alike), the last that their misses are shared by examples with alike gradients. Without
    features the effects are independent. The mean over all examples, which exposures of full
    steps cannot tell from a time effect, has a scale of its own (``common``).

    Attributes:
        features: use the recording's gradient features when it has them.
    """

    features: bool = True

    def hypers(self, part: str, features: ExampleFeatures) -> dict[str, Hyper]:
        """What is inferred for one part of the effects (``staying``, ``fading``)."""
        free = {f"{part}_common": Hyper(0.6, 1.0, "positive", "sd of the effect of any step")}
        if features.train.shape[1]:
            free[f"{part}_alike"] = Hyper(
                1.65, 1.0, "positive", "sd of effects shared along gradient features"
            )
        if features.query.shape[1]:
            free[f"{part}_dot"] = Hyper(
                0.0, 0.5, "real", "loss change per unit of gradients' inner product"
            )
        return free

    def columns(
        self,
        values: Values,
        part: str,
        exposure: Float[Array, "step train"],
        features: ExampleFeatures,
    ) -> Float[Array, "step source"]:
        """Exposure of a run's steps to each independent standard normal source of effects."""
        parts = [exposure]
        if features.train.shape[1]:
            parts.append(values[f"{part}_alike"] * exposure @ features.train)
        parts.append(values[f"{part}_common"] * jnp.ones((len(exposure), 1)))
        return jnp.concatenate(parts, axis=1)

    def mean(
        self,
        values: Values,
        part: str,
        exposure: Float[Array, "step train"],
        features: ExampleFeatures,
    ) -> Float[Array, "step query"]:
        """Prior mean of what each step does to each query."""
        if not features.query.shape[1]:
            return jnp.zeros((len(exposure), len(features.query)))
        return -values[f"{part}_dot"] * exposure @ features.train @ features.query.T
