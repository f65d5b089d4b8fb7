"""What is believed of examples' effects before any run is seen.

A prior is written in units of the query's scale: its effects have unit scale, the model multiplies
them. ``own`` effects follow the prior's law, one for each query, example and knot of training
time; gradient features and pooling over queries can be put on top of every law.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from bayes_simfluence.checks import Misuse, choice_of, positive_integer, positive_number
from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.model.effects import Prior, Shape, standard
from bayes_simfluence.model.embeddings import Features
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.normal import Normal
from bayes_simfluence.model.scores import Scores
from bayes_simfluence.model.sites import latent
from bayes_simfluence.settings import layered

__all__ = [
    "PRIORS",
    "Custom",
    "Features",
    "Horseshoe",
    "Laplace",
    "LowRank",
    "Normal",
    "Prior",
    "Scores",
    "StudentT",
    "prior_from_dict",
]


@dataclass(frozen=True)
class StudentT(Prior):
    """Student-t effects: a few examples may matter several times as much as the rest.

    Attributes:
        df: degrees of freedom; at 4, one example in 100 exceeds 4.6 scales.
    """

    name: ClassVar[str] = "student-t"
    number: ClassVar[str | None] = "df"
    df: float = 4.0

    def __post_init__(self) -> None:
        positive_number("StudentT(df=...)", self.df)

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Normal with an inverse-gamma variance for each query and example."""
        half = 0.5 * self.df
        return _mixture(name, shape, dist.InverseGamma(half, half))


@dataclass(frozen=True)
class Laplace(Prior):
    """Laplace effects: many near zero; the median is 0.73 of the normal's for equal sd."""

    name: ClassVar[str] = "laplace"

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Normal with an exponential variance of mean one for each query and example: unit sd."""
        return _mixture(name, shape, dist.Exponential(1.0))


@dataclass(frozen=True)
class Horseshoe(Prior):
    """Regularised horseshoe: most examples do nothing, some as much as the data say.

    Piironen & Vehtari (2017), eq. 2.8: ``own = z tau lambda~`` with half-Cauchy ``lambda`` for each
    query and example and ``tau`` for each query, and a slab that keeps large effects finite.

    Attributes:
        share: guess of the share of examples that matter; ``share / (1 - share)`` is the median of
            ``tau`` (their eq. 3.12, for effects in units of their errors).
        slab_scale, slab_df: effects that matter are about Student-t with these, in units of
            the query's scale.
    """

    name: ClassVar[str] = "horseshoe"
    number: ClassVar[str | None] = "share"
    share: float = 0.1
    slab_scale: float = 2.0
    slab_df: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise Misuse(
                "Horseshoe(share=...)",
                got=repr(self.share),
                expected="a number between 0 and 1",
                do="guess how many of the examples matter",
            )
        positive_number("Horseshoe(slab_scale=...)", self.slab_scale)
        positive_number("Horseshoe(slab_df=...)", self.slab_df)

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Normal with a local, a global and a slab scale."""
        queries, train, _ = shape
        cauchy = dist.HalfCauchy(1.0)
        tau = latent(f"{name}_global", cauchy, (queries, 1))
        tau = tau * self.share / (1.0 - self.share)
        squared = jnp.square(latent(f"{name}_local", cauchy, (queries, train)))
        half = 0.5 * self.slab_df
        slab = latent(f"{name}_slab", dist.InverseGamma(half, half), (queries, 1))
        slab = self.slab_scale**2 * slab
        regular = slab * squared / (slab + jnp.square(tau) * squared)
        local = tau * jnp.sqrt(regular)
        return local[:, :, None] * standard(f"{name}_own", shape)


@dataclass(frozen=True)
class LowRank(Prior):
    """Effects that are partly a product of few traits of examples and of queries.

    ``own_qi = sqrt(1 - share) z_qi + sqrt(share / rank) sum_k U_qk V_ik``, all standard normal:
    what is learned of an example from one query tells about the others.

    Attributes:
        rank: number of traits.
    """

    name: ClassVar[str] = "low-rank"
    number: ClassVar[str | None] = "rank"
    rank: int = 2

    def __post_init__(self) -> None:
        positive_integer("LowRank(rank=...)", self.rank)

    def hypers(self, part: str, features: ExampleFeatures) -> dict[str, Hyper]:
        """The share of variance of the product, besides what every prior has."""
        share = Hyper(0.5, 1.0, "share", "share of the effects' variance that has low rank")
        return {**super().hypers(part, features), f"{part}_low_rank": share}

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Own normal effects plus the product of traits."""
        queries, train, knots = shape
        share = values[f"{part}_low_rank"]
        of_query = standard(f"{name}_query_traits", (queries, self.rank, knots))
        of_train = standard(f"{name}_train_traits", (train, self.rank))
        product = jnp.einsum("qtk,nt->qnk", of_query, of_train) / jnp.sqrt(self.rank)
        own = standard(f"{name}_own", shape)
        return jnp.sqrt(1.0 - share) * own + jnp.sqrt(share) * product


@dataclass(frozen=True, eq=False)
class Custom(Prior):
    """Effects that follow a NumPyro distribution of the caller's, in nats (units of the link).

    ``Simfluence(prior=numpyro.distributions.Cauchy(0.0, 0.01))`` makes one. The query's scale does
    not multiply these effects, they are the same over training, and features are not used.

    Attributes:
        distribution: a scalar distribution of real numbers. Of a saved model only a description is
            left, a text: what was inferred is known, the prior cannot be drawn from.
    """

    name: ClassVar[str] = "custom"
    scaled: ClassVar[bool] = False
    varying: ClassVar[bool] = False
    stored: ClassVar[bool] = False
    # Distributions have no equality: two of these are equal when they are the same.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    distribution: Any = None
    features: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        law = self.distribution
        if isinstance(law, str):
            return
        known = isinstance(law, dist.Distribution)
        if not known or law.batch_shape or law.event_shape or law.is_discrete:
            raise Misuse(
                "prior",
                got=_described(law) if known else type(law).__name__,
                expected="a prior of bayes_simfluence or one scalar NumPyro distribution of real "
                "numbers",
                do="pass for example numpyro.distributions.Laplace(0.0, 0.01)",
            )
        for name, allowed in law.arg_constraints.items():
            value = getattr(law, name, None)
            if value is None or allowed.is_discrete or getattr(allowed, "_is_dependent", False):
                continue
            if not jnp.all(allowed(value)):
                raise Misuse(
                    "prior",
                    got=f"{_described(law)}: {name} outside of {allowed}",
                    expected="a distribution with possible parameters, scales positive",
                    do=f"correct {name}",
                )
        if self.features:
            raise Misuse(
                "Custom(features=...)",
                got="True",
                expected="False: a distribution of nats knows no features",
                do="leave it out, or use another prior",
            )

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Independent draws, the same over training."""
        if isinstance(self.distribution, str):
            raise Misuse(
                "prior",
                got=f"the description {self.distribution!r} of a saved model",
                expected="a distribution",
                do="make the model anew with prior=...",
            )
        queries, train, knots = shape
        effects = latent(f"{name}_own", self.distribution, (queries, train, 1), coefficient=True)
        return jnp.broadcast_to(effects, (queries, train, knots))

    def _settings(self) -> dict[str, Any]:
        return {"pooled": self.pooled, "distribution": _described(self.distribution)}


PRIORS: dict[str, type[Prior]] = {
    kind.name: kind
    for kind in (Normal, StudentT, Laplace, Horseshoe, LowRank, Features, Scores, Custom)
}
"""By the name that settings and the command line use."""


def prior_from_dict(settings: Mapping[str, Any]) -> Prior:
    """The prior of settings made by ``Prior.as_dict``.

    A caller's own distribution, embeddings or scores are not saved; what was inferred under them
    is.
    """
    # ``freedom``, ``slab_freedom``: as version 0.1 wrote them.
    rest = {name.replace("freedom", "df"): value for name, value in settings.items()}
    name = choice_of("name of the prior", rest.pop("name", None), tuple(PRIORS))
    base = rest.pop("base", None) if name == Scores.name else None
    prior = layered(PRIORS[name], rest, what=f"prior {name}")
    if isinstance(prior, Scores) and base is not None:
        return replace(prior, base=prior_from_dict(base))
    return prior


def _mixture(name: str, shape: Shape, variance: dist.Distribution) -> Array:
    local = latent(f"{name}_local", variance, shape[:2])
    return jnp.sqrt(local)[:, :, None] * standard(f"{name}_own", shape)


def _described(distribution: Any) -> str:
    """The distribution as it is written: its name and its parameters."""
    if isinstance(distribution, str):
        return distribution
    parameters = (f"{name}={getattr(distribution, name)}" for name in distribution.arg_constraints)
    return f"{type(distribution).__name__}({', '.join(parameters)})"
