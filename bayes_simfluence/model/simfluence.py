"""The model: what a curriculum does to the loss of a query, as settings of a few parts.

For one run and one query, on the scale of the link, ``y_t = link(L_t)``:

    ``y_t = y_0 + u_t + v_t + eta_t``
    ``u_t = exp(growth / T) u_{t-1} + sum_{s<=t} w_ts x_s``                  (what stays)
    ``v_t = exp(-1 / (T fade_length)) v_{t-1} + sum_{s<=t} w_ts x'_s``        (what fades)
    ``x_s = mu_s + e_s . b_s + (e_s . a) y_{s-1}``                            (what a batch does)

with exposures ``e_s`` that the optimizer's memory spreads by ``w_ts`` (``exposure``), coefficients
``b_s`` that may vary over training (``coefficients``), their prior over examples (``priors``), a
time effect ``mu_s`` that all runs share, multiplicative terms ``a`` of the recorded loss before the
step, and the run's error ``eta`` (``noise``).

``Simfluence()`` is the two-timescale model: both ``u`` and ``v``, smooth coefficients, momentum, a
smooth error. The paper's (Guu et al. 2023, eq. 2), centred on "nothing happens", is another setting
of the same parts: only ``u``, growth 0, constant coefficients, exposure without memory, independent
errors of each step, for which the above is

    ``L_t = (1 + e_t . a) L_{t-1} + e_t . b + eps_t``      (linear; a = 0: additive; b = 0:
                                                           multiplicative).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.distributions import Distribution

from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import Exposure
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.link import LINKS, Link
from bayes_simfluence.model.noise import Error, Gaussian, Smooth, error_from_dict
from bayes_simfluence.model.priors import (
    Custom,
    Normal,
    Prior,
    prior_from_dict,
)
from bayes_simfluence.model.recurrence import accumulation

__all__ = [
    "KINDS",
    "LINKS",
    "MULTIPLICATIVE",
    "TIMESCALES",
    "TIME_EFFECTS",
    "Kind",
    "Simfluence",
    "curves",
    "design",
    "gather",
    "hypers_of",
    "mean_effect",
    "part_scale",
    "prior_mean",
    "rate_of",
    "time_curve",
]

Kind = Literal["two-timescale", "linear", "additive", "multiplicative"]
KINDS: tuple[Kind, ...] = ("two-timescale", "linear", "additive", "multiplicative")
TIMESCALES = {"both": ("staying", "fading"), "staying": ("staying",), "fading": ("fading",)}
TIME_EFFECTS = ("smooth", "linear", "none")
MULTIPLICATIVE = "multiplicative"
"""Name of the part that holds the terms ``a``."""


@dataclass(frozen=True)
class Simfluence:
    """A model of training runs, as settings of its parts.

    ``Simfluence()`` is the two-timescale model that predicts left-out runs best (docs/results.md);
    ``Simfluence(kind="linear")`` the published one with constant coefficients and white noise. A
    kind is nothing but the settings that the parts take when they are left out.

    Attributes:
        kind: ``two-timescale``, or the published ``linear``, ``additive``, ``multiplicative``.
        link: scale on which effects add up: ``log-odds``, the inverse of softplus, keeps simulated
            losses positive and is the margin of a two-class problem; ``log`` keeps them positive
            too; ``identity`` for losses that may be zero or below.
        timescales: effects that stay, that fade, or both.
        exposure, coefficients, prior, error: the further parts. ``prior`` may be a scalar NumPyro
            distribution.
        time_effect: what all runs have in common at a step: a ``smooth`` curve, ``linear`` in time
            (the same at every step), ``none``.
        multiplicative: terms ``a_i y_{t-1}`` for each example.

    >>> Simfluence(kind="additive").error
    Gaussian(loss_power=0.0, run_effect=False, observation=False)
    """

    kind: Kind = "two-timescale"
    link: Link = None  # type: ignore[assignment]
    timescales: Literal["both", "staying", "fading"] = None  # type: ignore[assignment]
    exposure: Exposure = None  # type: ignore[assignment]
    coefficients: Varying = None  # type: ignore[assignment]
    prior: Prior | Distribution = None
    error: Error = None  # type: ignore[assignment]
    time_effect: Literal["smooth", "linear", "none"] = None  # type: ignore[assignment]
    multiplicative: bool = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        choice_of("Simfluence(kind=...)", self.kind, KINDS)
        for name, value in _settings_of(self.kind).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if isinstance(self.prior, Distribution):
            object.__setattr__(self, "prior", Custom(self.prior))
        choice_of("Simfluence(link=...)", self.link, LINKS)
        choice_of("Simfluence(timescales=...)", self.timescales, tuple(TIMESCALES))
        added = TIME_EFFECTS if self.additive else ("none",)
        choice_of("Simfluence(time_effect=...)", self.time_effect, added)
        _instance("prior", self.prior, Prior, "a prior such as priors.Normal()")
        _instance("error", self.error, Error, "an error such as noise.Smooth()")
        _instance("exposure", self.exposure, Exposure, "an Exposure(...)")
        _instance("coefficients", self.coefficients, Varying, "a Varying(...)")
        if not self.additive and (self.coefficients.knots > 1 or self.timescales != "staying"):
            raise Misuse(
                "Simfluence(kind='multiplicative')",
                got=f"timescales={self.timescales!r}, knots={self.coefficients.knots}",
                expected="timescales='staying' and Varying(knots=1): there are no terms b",
                do="leave them out, or use kind='linear'",
            )
        wanted = {"additive": False, "linear": True, "multiplicative": True}.get(self.kind)
        if wanted is not None and self.multiplicative != wanted:
            raise Misuse(
                "Simfluence(multiplicative=...)",
                got=f"{self.multiplicative} with kind={self.kind!r}",
                expected=str(wanted),
                do="leave it out, or choose another kind",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the additive parts, as in hyperparameters and samples."""
        return TIMESCALES[self.timescales]

    @property
    def published(self) -> bool:
        """Whether scale and noise belong to each query, as in the published kinds."""
        return self.kind != "two-timescale"

    @property
    def additive(self) -> bool:
        """Whether there are terms ``b``."""
        return self.kind != "multiplicative"

    @property
    def markov(self) -> bool:
        """Whether it is ``L_t = alpha_t L_{t-1} + beta_t``: the next loss needs only the last."""
        plain = self.exposure.is_memoryless and self.exposure.step_size_power == 0
        return self.published and plain and self.timescales == "staying"

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``from_dict`` makes them a model again."""
        return {
            "kind": self.kind,
            "link": self.link,
            "timescales": self.timescales,
            "exposure": asdict(self.exposure),
            "coefficients": asdict(self.coefficients),
            "prior": self.prior.as_dict(),
            "error": self.error.as_dict(),
            "time_effect": self.time_effect,
            "multiplicative": self.multiplicative,
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Simfluence":
        """The model of settings made by ``as_dict``."""
        return cls(
            **{
                **settings,
                "exposure": Exposure(**settings["exposure"]),
                "coefficients": Varying(**settings["coefficients"]),
                "prior": prior_from_dict(settings["prior"]),
                "error": error_from_dict(settings["error"]),
            }
        )


def _settings_of(kind: str) -> dict[str, Any]:
    """What the parts are when the caller leaves them out."""
    if kind == "two-timescale":
        return {
            "link": "log-odds",
            "timescales": "both",
            "exposure": Exposure(),
            "coefficients": Varying(),
            "prior": Normal(),
            "error": Smooth(),
            "time_effect": "smooth",
            "multiplicative": False,
        }
    return {
        "link": "identity",
        "timescales": "staying",
        "exposure": Exposure.memoryless(),
        "coefficients": Varying(knots=1),
        "prior": Normal(features=False),
        "error": Gaussian(),
        "time_effect": "none",
        "multiplicative": kind != "additive",
    }


def _instance(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise Misuse(
            f"Simfluence({name}=...)",
            got=value.__name__ if isinstance(value, type) else repr(value),
            expected=expected,
            do="pass an instance",
        )


def hypers_of(model: Simfluence, features: ExampleFeatures) -> dict[str, Hyper]:
    """Every hyperparameter that all queries share, by name."""
    free = {**model.exposure.hypers(), **model.error.hypers()}
    if not model.published:
        if "staying" in model.parts:
            free["growth"] = Hyper(0.0, 1.0, "real", "log growth of what stays per recorded length")
        if model.error.by_step:
            free["noise"] = Hyper(
                0.05, 1.5, "positive", "sd of one step's error over the sd of the effects"
            )
        if model.multiplicative:
            free["multiplicative_scale"] = Hyper(
                0.3, 1.0, "positive", "sd of multiplicative terms over the staying ones'"
            )
    if "fading" in model.parts:
        free["fade_length"] = Hyper(
            0.135, 1.0, "positive", "training time after which effects fade"
        )
    if len(model.parts) == 2:
        free["fading_scale"] = Hyper(
            1.65, 1.0, "positive", "sd of fading effects over staying ones"
        )
    for part in model.parts if model.additive else ():
        if model.time_effect != "none":
            free[f"{part}_common"] = Hyper(0.6, 1.0, "positive", "sd of the effect of any step")
        free.update(model.coefficients.hypers(part))
        free.update(model.prior.hypers(part, features))
    if model.multiplicative:
        nothing = no_features(len(features.train), len(features.query))
        free.update(model.prior.hypers(MULTIPLICATIVE, nothing))
    return free


def design(
    model: Simfluence, values: Values, run: RunArrays, *, knots: int, rows: Int[Array, " row"]
) -> Float[Array, "row weight"]:
    """Trajectory of one run as a linear map of independent standard normal weights.

    ``design @ weights`` is ``u + v`` after the steps with positions ``rows``, up to the query's
    scale. Weights are ordered by part, then knot, then source (``Prior.columns``, then the time
    effect). Multiplicative terms are not among them.
    """
    blocks, exposure = [], run.exposures()
    for part in model.parts:
        over_time = curves(model, values, part, run.progress, knots)
        sources = model.prior.columns(values, part, exposure, run.features)
        gathered = gather(model, values, run, part, rows)
        each = jnp.einsum("tsk,sn->tkn", gathered[:, :, None] * over_time[None], sources)
        if model.time_effect != "none":
            shared = time_curve(model, over_time)
            common = values[f"{part}_common"] * gathered @ shared
            each = jnp.concatenate([each, common[:, :, None]], axis=2)
        blocks.append(part_scale(values, part) * each.reshape(len(rows), -1))
    return jnp.concatenate(blocks, axis=1)


def curves(
    model: Simfluence, values: Values, part: str, progress: Float[Array, " step"], knots: int
) -> Float[Array, "step source"]:
    """Coefficients at each step as a map of independent standard normal sources."""
    interpolation = model.coefficients.interpolation(progress, knots)
    return interpolation @ model.coefficients.root(values, part, knots)


def time_curve(
    model: Simfluence, over_time: Float[Array, "step source"]
) -> Float[Array, "step source"]:
    """The same map for the time effect: that of the coefficients, or one constant."""
    if model.time_effect == "smooth":
        return over_time
    return jnp.zeros_like(over_time).at[:, 0].set(1.0)


def mean_effect(
    model: Simfluence, values: Values, part: str, features: ExampleFeatures
) -> Float[Array, "train weight"]:
    """Effect of a step on each example alone, averaged over training, as a map of the weights."""
    knots, train = model.coefficients.count(1.0), len(features.train)
    blocks = []
    for one in model.parts:
        over_time = model.coefficients.root(values, one, knots)
        sources = model.prior.columns(values, one, jnp.eye(train), features)
        block = over_time.mean(axis=0)[None, :, None] * sources[:, None, :]
        if model.time_effect != "none":
            shared = values[f"{one}_common"] * time_curve(model, over_time).mean(axis=0)
            shared = jnp.broadcast_to(shared[None, :, None], (train, knots, 1))
            block = jnp.concatenate([block, shared], axis=2)
        block = part_scale(values, one) * block.reshape(train, -1)
        blocks.append(block if one == part else jnp.zeros_like(block))
    return jnp.concatenate(blocks, axis=1)


def prior_mean(
    model: Simfluence, values: Values, run: RunArrays, *, rows: Int[Array, " row"]
) -> Float[Array, "row query"]:
    """Prior mean of ``u + v`` after the steps ``rows``, link units (zero without features)."""
    total, exposure = jnp.zeros((len(rows), len(run.features.query))), run.exposures()
    for part in model.parts:
        effect = model.prior.mean(values, part, exposure, run.features)
        total = total + gather(model, values, run, part, rows) @ effect
    return total


def gather(
    model: Simfluence, values: Values, run: RunArrays, part: str, rows: Int[Array, " row"]
) -> Float[Array, "row source"]:
    """How much of each step's batch a later time holds: memory of optimizer, then of the loss."""
    rate = rate_of(values, part)
    summed = accumulation(rate, jnp.asarray(run.progress))[rows]
    return summed @ model.exposure.weights(values, jnp.asarray(run.step_size))


def rate_of(values: Values, part: str) -> Float[Array, ""]:
    """Log growth per recorded length of what a part has done to the loss."""
    if part == "fading":
        return -1.0 / values["fade_length"]
    return values.get("growth", jnp.zeros(()))


def part_scale(values: Values, part: str) -> Float[Array, ""]:
    """Factor on a part's effects; the query's scale is that of the first part."""
    return values.get("fading_scale", jnp.ones(())) if part == "fading" else jnp.ones(())
