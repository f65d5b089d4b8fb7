"""The model: what a curriculum does to the loss of a query, as one linear-Gaussian design.

Two-timescale (the default), for one run and one query, on the scale of the link:

    ``y_t = link(L_t) - link(L_0) = u_t + v_t + eta_t``
    ``u_t = exp(growth / T) u_{t-1} + sum_{s<=t} w_ts e_s . b_s``            (what stays)
    ``v_t = exp(-1 / (T fade_length)) v_{t-1} + sum_{s<=t} w_ts e_s . c_s``   (what fades)

with exposures ``e_s`` that the optimizer's memory spreads by ``w_ts`` (``exposure``), coefficients
``b_s``, ``c_s`` that vary over training (``coefficients``), their prior over examples (``priors``)
and the run's error ``eta`` (``noise``). The paper's model (Guu et al. 2023), centred on "nothing
happens", is the other kind:

    ``L_t = (1 + e_t . a) L_{t-1} + e_t . b + eps_t``      (linear; a = 0: additive; b = 0:
                                                           multiplicative)
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import choice_of
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import Exposure
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.noise import SmoothError
from bayes_simfluence.model.priors import ExampleFeatures, Normal
from bayes_simfluence.model.transition import accumulation

__all__ = [
    "KINDS",
    "LINKS",
    "PARTS",
    "Path",
    "Simfluence",
    "design",
    "hypers_of",
    "link_of",
    "loss_of",
    "mean_effect",
    "prior_mean",
]

Kind = Literal["two-timescale", "linear", "additive", "multiplicative"]
KINDS: tuple[Kind, ...] = ("two-timescale", "linear", "additive", "multiplicative")
SMALLEST_LOSS = 1e-6
"""Losses at or below zero have no logarithm: they count as this many nats."""
LINKS = ("log-odds", "identity")
PARTS = ("staying", "fading")


@dataclass(frozen=True)
class Simfluence:
    """A model of training runs, as settings of its parts.

    ``Simfluence()`` is the two-timescale model that predicts left-out runs best (docs/results.md);
    ``Simfluence(kind="linear")`` the published one with constant coefficients and white noise.

    Attributes:
        kind: ``two-timescale``, or the published ``linear``, ``additive``, ``multiplicative``,
            which have no further parts.
        link: scale on which effects add up (two-timescale): ``log-odds``, the inverse of
            softplus, keeps simulated losses positive and is the margin of a two-class problem;
            ``identity`` for losses that may be zero or below.
        exposure, coefficients, prior, error: the parts of the two-timescale model.

    >>> Simfluence(kind="additive").kind
    'additive'
    """

    kind: Kind = "two-timescale"
    link: Literal["log-odds", "identity"] = "log-odds"
    exposure: Exposure = field(default_factory=Exposure)
    coefficients: Varying = field(default_factory=Varying)
    prior: Normal = field(default_factory=Normal)
    error: SmoothError = field(default_factory=SmoothError)

    def __post_init__(self) -> None:
        choice_of("Simfluence(kind=...)", self.kind, KINDS)
        choice_of("Simfluence(link=...)", self.link, LINKS)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``from_dict`` makes them a model again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Simfluence":
        """The model of settings made by ``as_dict``."""
        return cls(
            kind=settings["kind"],
            link=settings["link"],
            exposure=Exposure(**settings["exposure"]),
            coefficients=Varying(**settings["coefficients"]),
            prior=Normal(**settings["prior"]),
            error=SmoothError(**settings["error"]),
        )


class Path(NamedTuple):
    """What one run trains on, as arrays.

    Attributes:
        exposure: weight of each example in each step's batch.
        step_size: relative to the largest step size of the fitted runs.
        progress: step / steps of the fitted runs.
    """

    exposure: Float[Array, "step train"]
    step_size: Float[Array, " step"]
    progress: Float[Array, " step"]


def link_of(model: Simfluence, loss: Array) -> Array:
    """A loss (nats) on the scale on which effects add up."""
    if model.link == "identity":
        return loss
    # log(exp(L) - 1), without overflow for large losses.
    positive = jnp.maximum(loss, SMALLEST_LOSS)
    return positive + jnp.log(-jnp.expm1(-positive))


def loss_of(model: Simfluence, linked: Array) -> Array:
    """A loss in nats from the scale of the link."""
    return linked if model.link == "identity" else jax.nn.softplus(linked)


def hypers_of(model: Simfluence, features: ExampleFeatures) -> dict[str, Hyper]:
    """Every hyperparameter of the two-timescale model, by name."""
    return {
        **model.exposure.hypers(),
        "growth": Hyper(0.0, 1.0, "real", "log growth of what stays per recorded length"),
        "fade_length": Hyper(0.135, 1.0, "positive", "training time after which effects fade"),
        "fading_scale": Hyper(1.65, 1.0, "positive", "sd of fading effects over staying ones"),
        **model.error.hypers(),
        **{
            name: hyper
            for part in PARTS
            for hypers in (model.coefficients.hypers(part), model.prior.hypers(part, features))
            for name, hyper in hypers.items()
        },
    }


def design(
    model: Simfluence,
    values: Values,
    path: Path,
    features: ExampleFeatures,
    *,
    knots: int,
    rows: Int[Array, " row"],
) -> Float[Array, "row weight"]:
    """Path of one run as a linear map of independent standard normal weights.

    ``design @ weights`` is ``u + v`` after the steps with positions ``rows``, up to the query's
    scale. Weights are ordered by part, then knot, then source (``Normal.columns``).
    """
    interpolation = model.coefficients.interpolation(path.progress, knots)
    blocks = []
    for part in PARTS:
        over_time = interpolation @ model.coefficients.root(values, part, knots)
        sources = model.prior.columns(values, part, path.exposure, features)
        gathered = _gather(model, values, path, part, rows)
        each = jnp.einsum("tsk,sn->tkn", gathered[:, :, None] * over_time[None], sources)
        blocks.append(_part_scale(values, part) * each.reshape(len(rows), -1))
    return jnp.concatenate(blocks, axis=1)


def mean_effect(
    model: Simfluence, values: Values, part: str, features: ExampleFeatures
) -> Float[Array, "train weight"]:
    """Effect of a step on each example alone, averaged over training, as a map of the weights."""
    knots = model.coefficients.count(1.0)
    blocks = []
    for one in PARTS:
        over_time = model.coefficients.root(values, one, knots).mean(axis=0)
        train = len(features.train)
        sources = model.prior.columns(values, one, jnp.eye(train), features)
        block = (over_time[None, :, None] * sources[:, None, :]).reshape(train, -1)
        blocks.append(_part_scale(values, one) * block if one == part else jnp.zeros_like(block))
    return jnp.concatenate(blocks, axis=1)


def prior_mean(
    model: Simfluence,
    values: Values,
    path: Path,
    features: ExampleFeatures,
    *,
    rows: Int[Array, " row"],
) -> Float[Array, "row query"]:
    """Prior mean of ``u + v`` after the steps ``rows``, link units (zero without features)."""
    total = jnp.zeros((len(rows), len(features.query)))
    for part in PARTS:
        each = model.prior.mean(values, part, path.exposure, features)
        total = total + _gather(model, values, path, part, rows) @ each
    return total


def _gather(
    model: Simfluence, values: Values, path: Path, part: str, rows: Int[Array, " row"]
) -> Float[Array, "row source"]:
    """How much of each step's batch a later time holds: memory of optimizer, then of the loss."""
    rate = values["growth"] if part == "staying" else -1.0 / values["fade_length"]
    summed = accumulation(rate, path.progress)[rows]
    return summed @ model.exposure.weights(values, path.step_size)


def _part_scale(values: Values, part: str) -> Float[Array, ""]:
    return values["fading_scale"] if part == "fading" else jnp.ones(())
