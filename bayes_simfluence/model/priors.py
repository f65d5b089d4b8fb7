"""What is believed of examples' effects before any run is seen.

A prior is written in units of the query's scale: its effects have unit scale, the model multiplies
them. ``own`` effects follow the prior's law, one for each query, example and knot of training
time; gradient features and pooling over queries can be put on top of every law.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import xarray as xr
from jaxtyping import Array, Float
from numpyro import distributions as dist

from bayes_simfluence.checks import Misuse, named, positive_integer, positive_number
from bayes_simfluence.model.hyper import Hyper, Values

__all__ = [
    "PRIORS",
    "Custom",
    "ExampleFeatures",
    "Features",
    "Horseshoe",
    "Laplace",
    "LowRank",
    "Normal",
    "Prior",
    "StudentT",
    "no_features",
    "prior_from_dict",
]

Shape = tuple[int, int, int]
"""Queries, examples, knots."""


class ExampleFeatures(NamedTuple):
    """Gradient features of training examples and queries (``recording.features``)."""

    train: Float[Array, "train feature"]
    query: Float[Array, "query feature"]


def no_features(train: int, query: int) -> ExampleFeatures:
    """Features that say nothing."""
    return ExampleFeatures(jnp.zeros((train, 0)), jnp.zeros((query, 0)))


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

    gaussian: ClassVar[bool] = False
    """Whether effects are Gaussian given hyperparameters, which ``Exact`` asks for."""
    scaled: ClassVar[bool] = True
    """Whether the query's scale multiplies the effects."""

    @abstractmethod
    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Own effects of unit scale, independent of one another, as NumPyro sites."""

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
                0.0, 0.5, "real", "loss change per unit of gradients' inner product"
            )
        return free

    def effects(
        self, part: str, shape: Shape, values: Values, features: ExampleFeatures
    ) -> Float[Array, "query train knot"]:
        """Effects in units of the query's scale, prior mean left out, as NumPyro sites."""
        queries, _, knots = shape
        found = self.law(part, shape, values)
        if self.pooled:
            share = values[f"{part}_pooled"]
            common = self.law(f"{part}_common_to_queries", (1, *shape[1:]), values)
            found = jnp.sqrt(1.0 - share) * found + jnp.sqrt(share) * common
        width = features.train.shape[1]
        if width:
            weights = _standard(f"{part}_of_features", (queries, width, knots))
            along = jnp.einsum("nf,qfk->qnk", features.train, weights)
            found = found + values[f"{part}_alike"] * along
        return found

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
        named_by = {kind: name for name, kind in PRIORS.items()}
        return {"name": named_by[type(self)], **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True)
class Normal(Prior):
    """Normal effects with learned scales: most examples matter, none much more than the others."""

    gaussian: ClassVar[bool] = True

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Standard normal."""
        return _standard(f"{name}_own", shape)


@dataclass(frozen=True)
class StudentT(Prior):
    """Student-t effects: a few examples may matter several times as much as the rest.

    Attributes:
        freedom: degrees of freedom; at 4, one example in 100 exceeds 4.6 scales.
    """

    freedom: float = 4.0

    def __post_init__(self) -> None:
        positive_number("StudentT(freedom=...)", self.freedom)

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Normal with an inverse-gamma variance for each query and example."""
        half = 0.5 * self.freedom
        return _mixture(name, shape, dist.InverseGamma(half, half))


@dataclass(frozen=True)
class Laplace(Prior):
    """Laplace effects: many near zero, the median effect half of the normal's for equal sd."""

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Normal with an exponential variance of mean one for each query and example: unit sd."""
        return _mixture(name, shape, dist.Exponential(1.0))


@dataclass(frozen=True)
class Horseshoe(Prior):
    """Regularised horseshoe: most examples do nothing, some as much as the data say.

    Piironen & Vehtari (2017), eq. 2.8: ``own = z tau lambda~`` with half-Cauchy ``lambda`` for each
    query and example and ``tau`` for each query, and a slab that keeps large effects finite.

    Attributes:
        share: guess of the share of examples that matter; the median of ``tau / (1 - tau)``.
        slab_scale, slab_freedom: effects that matter are about Student-t with these, in units of
            the query's scale.
    """

    share: float = 0.1
    slab_scale: float = 2.0
    slab_freedom: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise Misuse(
                "Horseshoe(share=...)",
                got=repr(self.share),
                expected="a number between 0 and 1",
                do="guess how many of the examples matter",
            )
        positive_number("Horseshoe(slab_scale=...)", self.slab_scale)
        positive_number("Horseshoe(slab_freedom=...)", self.slab_freedom)

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Normal with a local, a global and a slab scale."""
        queries, train, _ = shape
        cauchy = dist.HalfCauchy(1.0)
        tau = _positive(f"{name}_global", (queries, 1), cauchy)
        tau = tau * self.share / (1.0 - self.share)
        squared = jnp.square(_positive(f"{name}_local", (queries, train), cauchy))
        half = 0.5 * self.slab_freedom
        slab = _positive(f"{name}_slab", (queries, 1), dist.InverseGamma(half, half))
        slab = self.slab_scale**2 * slab
        regular = slab * squared / (slab + jnp.square(tau) * squared)
        local = tau * jnp.sqrt(regular)
        return local[:, :, None] * _standard(f"{name}_own", shape)


@dataclass(frozen=True)
class LowRank(Prior):
    """Effects that are partly a product of few traits of examples and of queries.

    ``own_qi = sqrt(1 - share) z_qi + sqrt(share / rank) sum_k U_qk V_ik``, all standard normal:
    what is learned of an example from one query tells about the others.

    Attributes:
        rank: number of traits.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        positive_integer("LowRank(rank=...)", self.rank)

    def hypers(self, part: str, features: ExampleFeatures) -> dict[str, Hyper]:
        """The share of variance of the product, besides what every prior has."""
        share = Hyper(0.5, 1.0, "share", "share of the effects' variance that has low rank")
        return {**super().hypers(part, features), f"{part}_low_rank": share}

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Own normal effects plus the product of traits."""
        queries, train, knots = shape
        share = values[f"{name.removesuffix('_common_to_queries')}_low_rank"]
        of_query = _standard(f"{name}_query_traits", (queries, self.rank, knots))
        of_train = _standard(f"{name}_train_traits", (train, self.rank))
        product = jnp.einsum("qtk,nt->qnk", of_query, of_train) / jnp.sqrt(self.rank)
        own = _standard(f"{name}_own", shape)
        return jnp.sqrt(1.0 - share) * own + jnp.sqrt(share) * product


@dataclass(frozen=True, eq=False)
class Features(Prior):
    """Normal effects whose mean and covariance come from embeddings that the caller brings.

    Embeddings take the place of the recording's gradient features (see ``Prior``): examples with
    alike embeddings have alike effects (a Gaussian process with linear kernel), and, when queries
    have embeddings of the same width, the mean is proportional to the inner product, with a sign
    and size that are inferred. An example that no run trained on thus has a mean that its relatives
    suggest, and the prior's spread around it.

    Attributes:
        train: ``(train, feature)``, an array in the order of the recording's examples or a
            ``DataArray`` with their ids; scaled to a mean squared norm of one.
        query: the same for the queries; None = no inner product.
    """

    train: Any = field(default=None, repr=False)
    query: Any = field(default=None, repr=False)
    gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("train", "query"):
            one = getattr(self, name)
            if one is None:
                continue
            if np.ndim(one) != 2 or not np.isfinite(np.asarray(one, float)).all():
                raise Misuse(
                    f"Features({name}=...)",
                    got=f"shape {np.shape(one)}" if np.ndim(one) != 2 else "values not finite",
                    expected=f"finite numbers, ({name}, feature)",
                    do="pass one row of numbers for each example",
                )

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Standard normal."""
        return _standard(f"{name}_own", shape)

    def resolve(self, train_ids: np.ndarray, query_ids: np.ndarray) -> ExampleFeatures:
        """The embeddings in the order of a recording.

        Raises:
            Misuse: ids without an embedding, or widths of train and query that differ.
        """
        train = _rows("train", self.train, train_ids)
        unit = np.sqrt(max(np.square(train).sum(axis=1).mean(), np.finfo(float).tiny))
        if self.query is None:
            return ExampleFeatures(jnp.asarray(train / unit), jnp.zeros((len(query_ids), 0)))
        query = _rows("query", self.query, query_ids)
        if query.shape[1] != train.shape[1]:
            raise Misuse(
                "Features(query=...)",
                got=f"{query.shape[1]} numbers for each query",
                expected=f"{train.shape[1]}, as for the training examples",
                do="embed both by the same model, or leave query out",
            )
        return ExampleFeatures(jnp.asarray(train / unit), jnp.asarray(query / unit))

    def _settings(self) -> dict[str, Any]:
        return {"features": self.features, "pooled": self.pooled}


@dataclass(frozen=True, eq=False)
class Custom(Prior):
    """Effects that follow a NumPyro distribution of the caller's, in nats (units of the link).

    ``Simfluence(prior=numpyro.distributions.Cauchy(0.0, 0.01))`` makes one. The query's scale does
    not multiply these effects, and features are not used.

    Attributes:
        distribution: a scalar distribution of real numbers.
    """

    distribution: Any = None
    features: bool = field(default=False, kw_only=True)
    scaled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one = self.distribution
        if not isinstance(one, dist.Distribution) or one.batch_shape or one.event_shape:
            raise Misuse(
                "prior",
                got=type(one).__name__ if not isinstance(one, dist.Distribution) else "a batch",
                expected="a prior of bayes_simfluence or one scalar NumPyro distribution",
                do="pass for example numpyro.distributions.Laplace(0.0, 0.01)",
            )

    def law(self, name: str, shape: Shape, values: Values) -> Float[Array, "query train knot"]:
        """Independent draws, the same over training."""
        queries, train, knots = shape
        expanded = self.distribution.expand((queries, train, 1)).to_event(3)
        found: Array = numpyro.sample(f"{name}_own", expanded)
        return jnp.broadcast_to(found, (queries, train, knots))

    def _settings(self) -> dict[str, Any]:
        return {"pooled": self.pooled, "distribution": repr(self.distribution)}


PRIORS: dict[str, type[Prior]] = {
    "normal": Normal,
    "student-t": StudentT,
    "laplace": Laplace,
    "horseshoe": Horseshoe,
    "low-rank": LowRank,
    "features": Features,
    "custom": Custom,
}
"""By the name that settings and the command line use."""


def prior_from_dict(settings: dict[str, Any]) -> Prior:
    """The prior of settings made by ``Prior.as_dict``.

    A caller's own distribution is not saved; what was inferred under it is.
    """
    rest = dict(settings)
    kind = PRIORS[rest.pop("name")]
    if kind is Custom:
        return replace(_NOTHING_KNOWN, pooled=rest["pooled"])
    return kind(**rest)


def _rows(what: str, given: Any, ids: np.ndarray) -> Float[np.ndarray, "row feature"]:
    if given is None:
        raise Misuse(
            f"Features({what}=...)",
            got="nothing",
            expected="one row for each example",
            do="pass their embeddings",
        )
    if isinstance(given, xr.DataArray):
        dim = str(given.dims[0])
        return np.asarray(given.values, float)[
            named(f"Features({what}=...)", ids, given[dim].values)
        ]
    if len(given) != len(ids):
        raise Misuse(
            f"Features({what}=...)",
            got=f"{len(given)} rows",
            expected=f"{len(ids)}, one for each id of the recording",
            do="pass a DataArray with ids as coordinate, or as many rows in their order",
        )
    return np.asarray(given, float)


def _standard(name: str, shape: tuple[int, ...]) -> Array:
    found: Array = numpyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
    return found


def _positive(name: str, shape: tuple[int, ...], law: dist.Distribution) -> Array:
    found: Array = numpyro.sample(name, law.expand(shape).to_event(len(shape)))
    return found


def _mixture(name: str, shape: Shape, variance: dist.Distribution) -> Array:
    local = _positive(f"{name}_local", shape[:2], variance)
    return jnp.sqrt(local)[:, :, None] * _standard(f"{name}_own", shape)


_NOTHING_KNOWN = Custom(distribution=dist.Normal(0.0, 1.0))
