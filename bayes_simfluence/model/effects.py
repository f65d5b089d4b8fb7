"""Effects of examples in units of a scale: what every prior is made of.

``own`` effects follow the prior's law, one for each query, example and knot of training time;
gradient features and pooling over queries can be put on top of every law.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import distributions as dist

from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.model.hyper import NEGLIGIBLE, Hyper, Values
from bayes_simfluence.model.sites import latent

Shape = tuple[int, int, int]
"""Queries, examples, knots."""


@dataclass(frozen=True, kw_only=True)
class Prior(ABC):
    """The law of examples' own effects, and what is put on top of it.

    The effect of example ``i`` on query ``q`` is, up to the query's scale,
    ``-dot * <f_i, f_q> + own_qi + alike * sum_k f_ik shared_qk`` with the recording's gradient
    features ``f`` and standard normal ``shared``. The first term says what gradients at the initial
    weights predict (one-checkpoint TracIn; in units of the link, for every query alike), the last
    that their misses are shared by examples with alike gradients. Without features the effects are
    independent over examples.

    Attributes:
        features: use the recording's gradient features when it has them.
        pooled: own effects are partly the same for all queries; the share is inferred.
    """

    features: bool = True
    pooled: bool = False

    name: ClassVar[str]
    """As settings and the command line call it."""
    gaussian: ClassVar[bool] = False
    """Whether effects are Gaussian given hyperparameters, which ``Exact`` asks for."""
    scaled: ClassVar[bool] = True
    """Whether the query's scale multiplies the effects."""
    varying: ClassVar[bool] = True
    """Whether effects change over training in the way that ``Varying`` says."""
    stored: ClassVar[bool] = True
    """Whether ``as_dict`` holds everything; else it describes what only the caller has."""
    extends: ClassVar[bool] = True
    """Whether features say enough of an example or a query that no fitted run knows."""

    number: ClassVar[str | None] = None
    """The setting that a number after the name sets, as in ``student-t:4``."""

    @abstractmethod
    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Own effects of unit scale, independent of one another, as NumPyro sites.

        Args:
            name: what the names of the sites begin with.
            part: of the effects, as in the names of its hyperparameters.
            shape: queries, examples, knots.
            values: hyperparameters.
        """

    def hypers(self, part: str, features: ExampleFeatures) -> dict[str, Hyper]:
        """What is inferred for one part of the effects (``staying``, ``fading``, ...)."""
        free = {}
        if self.pooled:
            free[f"{part}_pooled"] = Hyper(
                0.3, 1.0, "share", "share of the effects' variance that all queries have in common"
            )
        if features.train.shape[1]:
            free[f"{part}_alike"] = Hyper(
                1.65, 1.0, "positive", "sd of effects shared along gradient features"
            )
        if features.query.shape[1]:
            free[f"{part}_dot"] = Hyper(
                0.0,
                0.5,
                "real",
                "loss change per unit of gradients' inner product",
                constant=NEGLIGIBLE if part == "fading" else None,
            )
        return free

    def effects(
        self, part: str, shape: Shape, values: Values, features: ExampleFeatures
    ) -> Float[Array, "query train knot"]:
        """Effects in units of the query's scale, prior mean left out, as NumPyro sites."""
        queries, _, knots = shape
        effects = self.law(part, part, shape, values)
        if self.pooled:
            share = values[f"{part}_pooled"]
            common = self.law(f"{part}_common_to_queries", part, (1, *shape[1:]), values)
            effects = jnp.sqrt(1.0 - share) * effects + jnp.sqrt(share) * common
        width = features.train.shape[1]
        if width:
            weights = standard(f"{part}_of_features", (queries, width, knots))
            along = jnp.einsum("nf,qfk->qnk", features.train, weights)
            effects = effects + values[f"{part}_alike"] * along
        return effects

    def continued(
        self, effects: Float[Array, "query train knot"], more: int, *, key: Array
    ) -> Float[Array, "query train longer"]:
        """Effects of unit scale with ``more`` knots beyond those of a recorded run.

        Fresh draws; an example's local scale shows in its size at the recorded knots.
        """
        if not self.varying:
            last = jnp.repeat(effects[..., -1:], more, axis=-1)
            return jnp.concatenate([effects, last], axis=-1)
        size = jnp.sqrt(jnp.square(effects).mean(axis=-1, keepdims=True))
        fresh = size * jax.random.normal(key, (*effects.shape[:-1], more), effects.dtype)
        return jnp.concatenate([effects, fresh], axis=-1)

    def resolve(
        self, train_ids: np.ndarray, query_ids: np.ndarray, recorded: ExampleFeatures
    ) -> ExampleFeatures:
        """What is known of examples and queries, in the order of a recording.

        Its gradient features, ``recorded``, unless the prior brings something of its own.
        """
        return recorded

    def alike(self, features: ExampleFeatures) -> ExampleFeatures:
        """Those of the features that say which examples, and which queries, are alike."""
        return features

    def columns(
        self,
        values: Values,
        part: str,
        exposure: Float[Array, "step train"],
        features: ExampleFeatures,
    ) -> Float[Array, "step source"]:
        """Exposure of a run's steps to each independent standard normal source of effects."""
        if not features.train.shape[1]:
            return exposure
        along = values[f"{part}_alike"] * exposure @ features.train
        return jnp.concatenate([exposure, along], axis=1)

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

    def as_dict(self) -> dict[str, Any]:
        """Name and settings."""
        return {"name": self.name, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def standard(name: str, shape: tuple[int, ...]) -> Array:
    """A site of independent standard normal coefficients."""
    return latent(name, dist.Normal(0.0, 1.0), shape, coefficient=True)
