"""The model: what a curriculum does to the loss of a query, as settings of a few parts.

For one run and one query, on the scale of the link, ``y_t = link(L_t)``:

    ``y_t = y_0 + u_t + v_t + eta_t``
    ``u_t = exp(growth / T) u_{t-1} + sum_{s<=t} w_ts x_s``                  (what stays)
    ``v_t = exp(-1 / (T fade_length)) v_{t-1} + sum_{s<=t} w_ts x'_s``        (what fades)
    ``x_s = mu_s + e_s . b_s + (e_s . a) y_{s-1}``                            (what a batch does)

with exposures ``e_s`` that the optimizer's memory spreads by ``w_ts`` (``exposure``), coefficients
``b_s`` that may vary over training (``coefficients``), their prior over examples (``priors``), a
time effect ``mu_s`` that all runs share, multiplicative terms ``a`` of the recorded loss before the
step, and the run's error ``eta`` (``noise``). In a coupled model exposures are multiplied by the
examples' residuals just before the step, and ``w_ts`` is divided by the size of the gradients so
far (``coupling``).

``Simfluence()`` is the two-timescale model: both ``u`` and ``v``, smooth coefficients, momentum, a
smooth error. The paper's (Guu et al. 2023, eq. 2), centred on "nothing happens", is another setting
of the same parts: only ``u``, growth 0, constant coefficients, exposure without memory, independent
errors of each step, for which the above is

    ``L_t = (1 + e_t . a) L_{t-1} + e_t . b + eps_t``

with both terms (``Simfluence.linear()``), with ``b`` alone (``Simfluence.additive()``), or with
``a`` alone (``Simfluence.multiplicative()``).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from numpyro.distributions import Distribution

from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.model.arrays import ExampleFeatures, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import Exposure
from bayes_simfluence.model.hyper import NEGLIGIBLE, Hyper
from bayes_simfluence.model.link import LINKS, Link
from bayes_simfluence.model.noise import Error, Gaussian, Smooth, error_from_dict
from bayes_simfluence.model.priors import Custom, Normal, Prior, prior_from_dict
from bayes_simfluence.settings import layered

Kind = Literal["two-timescale", "linear", "additive", "multiplicative"]
TERMS = ("additive", "multiplicative", "both")
TIMESCALES = {"both": ("staying", "fading"), "staying": ("staying",), "fading": ("fading",)}
TIME_EFFECTS = ("smooth", "linear", "none")
Coupling = Literal["residual", "none"]
COUPLINGS: tuple[Coupling, ...] = ("residual", "none")
SCALES = ("shared", "per-query")
MULTIPLICATIVE = "multiplicative"
"""Name of the part that holds the terms ``a``."""


@dataclass(frozen=True, kw_only=True)
class Simfluence:
    """A model of training runs, as settings of its parts.

    ``Simfluence()`` is the two-timescale model that predicts left-out runs best (docs/results.md);
    ``Simfluence.linear()``, ``.additive()`` and ``.multiplicative()`` are the published ones, with
    constant coefficients and white noise. A kind is nothing but the settings of its parts: models
    with equal parts are equal, however they were made.

    Attributes:
        terms: ``additive`` (``b``), ``multiplicative`` (``a``, which multiply the loss before the
            step) or ``both``.
        link: scale on which effects add up: ``log-odds``, the inverse of softplus, keeps simulated
            losses positive and is the margin of a two-class problem; ``log`` keeps them positive
            too; ``identity`` for losses that may be zero or below.
        timescales: effects that stay, that fade, or both.
        exposure: how long a batch acts on the loss.
        coefficients: how effects change over training.
        prior: what is believed of examples' effects; may be a scalar NumPyro distribution.
        error: what the curriculum does not explain.
        time_effect: what all runs have in common at a step: a ``smooth`` curve, ``linear`` in time
            (the same at every step), ``none``.
        coupling: ``residual``: an example acts by its residual, what it has still to learn, and is
            simulated together with the queries. On recordings that know the losses of each step's
            examples, of a model whose effects and errors are Gaussian (the error's size not that
            of the loss, no multiplicative terms), by ``Exact``, ``Stack``, ``NUTS`` and ``SVI``;
            elsewhere effects are additive and the verdict says so. ``none``: it acts alike however
            well it is known, as ``per-query`` scales have it.
        scales: ``shared``: the sizes of errors and of multiplicative terms are relative to one
            scale of each query, which is the sd of a run's change (units of the link), and what
            stays may grow. ``per-query``, as published: each query has its own sd of coefficients
            (of ``b``, units of the link; of ``a``, that over its loss before training) and of one
            step's error; what stays does not grow.

    >>> Simfluence.additive().error
    Gaussian(loss_power=0.0, run_effect=False, observation=False)
    """

    terms: Literal["additive", "multiplicative", "both"] = "additive"
    link: Link = "log-odds"
    timescales: Literal["both", "staying", "fading"] = "both"
    exposure: Exposure = Exposure()
    coefficients: Varying = Varying()
    prior: Prior | Distribution = Normal()
    error: Error = Smooth()
    time_effect: Literal["smooth", "linear", "none"] = "smooth"
    coupling: Coupling = "residual"
    scales: Literal["shared", "per-query"] = "shared"

    @classmethod
    def linear(cls, **parts: Any) -> "Simfluence":
        """The published model ``L_t = (1 + e_t . a) L_{t-1} + e_t . b + eps_t``.

        Args:
            parts: attributes that are to differ from the published ones.
        """
        published = {
            "terms": "both",
            "link": "identity",
            "timescales": "staying",
            "exposure": Exposure.memoryless(),
            "coefficients": Varying(knots=1),
            "prior": Normal(features=False),
            "error": Gaussian(),
            "time_effect": "none",
            "coupling": "none",
            "scales": "per-query",
        }
        return cls(**{**published, **parts})

    @classmethod
    def additive(cls, **parts: Any) -> "Simfluence":
        """The published model without ``a``; ``parts`` as in ``linear``."""
        return cls.linear(**{"terms": "additive", **parts})

    @classmethod
    def multiplicative(cls, **parts: Any) -> "Simfluence":
        """The published model without ``b``; ``parts`` as in ``linear``."""
        return cls.linear(**{"terms": "multiplicative", **parts})

    def __post_init__(self) -> None:
        if self.per_query:
            # Published regressions take a step's batch as it is, so equal parts are equal models.
            object.__setattr__(self, "coupling", "none")
        if isinstance(self.prior, Distribution):
            object.__setattr__(self, "prior", Custom(self.prior))
        choice_of("Simfluence(terms=...)", self.terms, TERMS)
        choice_of("Simfluence(link=...)", self.link, LINKS)
        choice_of("Simfluence(timescales=...)", self.timescales, tuple(TIMESCALES))
        choice_of("Simfluence(time_effect=...)", self.time_effect, TIME_EFFECTS)
        choice_of("Simfluence(scales=...)", self.scales, SCALES)
        choice_of("Simfluence(coupling=...)", self.coupling, COUPLINGS)
        _instance("prior", self.prior, Prior, "a prior such as priors.Normal()")
        _instance("error", self.error, Error, "an error such as noise.Smooth()")
        _instance("exposure", self.exposure, Exposure, "an Exposure(...)")
        _instance("coefficients", self.coefficients, Varying, "a Varying(...)")
        if not self.has_additive:
            self._check_multiplicative()

    def _check_multiplicative(self) -> None:
        """Raise when a part belongs to terms ``b``, which are not there."""
        own = {
            f"timescales={self.timescales!r}": self.timescales == "staying",
            f"knots={self.coefficients.knots}": self.coefficients.knots == 1,
            f"time_effect={self.time_effect!r}": self.time_effect == "none",
            f"scales={self.scales!r}": self.scales == "per-query",
        }
        if not all(own.values()):
            raise Misuse(
                "Simfluence(terms='multiplicative')",
                got=", ".join(setting for setting, fits in own.items() if not fits),
                expected="the settings of Simfluence.multiplicative(), since there are no terms b",
                do="leave them out, or use Simfluence.linear()",
            )

    @property
    def kind(self) -> Kind:
        """Name of the constructor that makes models with these ``scales`` and ``terms``."""
        if self.scales == "shared":
            return "two-timescale"
        return "linear" if self.terms == "both" else self.terms

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the additive parts, as in hyperparameters and samples."""
        return TIMESCALES[self.timescales]

    @property
    def per_query(self) -> bool:
        """Whether sd of coefficients and of a step's error belong to each query."""
        return self.scales == "per-query"

    @property
    def coupled(self) -> bool:
        """Whether examples act by their residuals."""
        return self.coupling == "residual"

    @property
    def gaussian(self) -> bool:
        """Whether losses are Gaussian on the scale of the link, given hyperparameters."""
        effects = self.prior.gaussian and not self.has_multiplicative
        return effects and self.error.gaussian and not self.error.follows_loss

    @property
    def has_additive(self) -> bool:
        """Whether there are terms ``b``."""
        return self.terms != "multiplicative"

    @property
    def has_multiplicative(self) -> bool:
        """Whether there are terms ``a``."""
        return self.terms != "additive"

    @property
    def markov(self) -> bool:
        """Whether it is ``L_t = alpha_t L_{t-1} + beta_t``: the next loss needs only the last."""
        plain = self.exposure.is_memoryless and self.exposure.step_size_power == 0
        return self.per_query and plain and self.timescales == "staying"

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``from_dict`` makes them a model again."""
        return {
            "terms": self.terms,
            "link": self.link,
            "timescales": self.timescales,
            "exposure": asdict(self.exposure),
            "coefficients": asdict(self.coefficients),
            "prior": self.prior.as_dict(),
            "error": self.error.as_dict(),
            "time_effect": self.time_effect,
            "coupling": self.coupling,
            "scales": self.scales,
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Simfluence":
        """The model of settings made by ``as_dict``.

        What they leave out is as ``Simfluence()`` has it, or the constructor that ``kind`` names.
        Files of earlier versions say ``kind`` and ``multiplicative``, not ``terms`` and ``scales``.

        Raises:
            Misuse: names or values that no part has.
        """
        rest = dict(settings)
        plain = KINDS[choice_of("model: kind", rest.pop("kind", "two-timescale"), tuple(KINDS))]()
        if "multiplicative" in rest:
            additive = rest.get("terms", plain.terms) != "multiplicative"
            rest["terms"] = _terms(additive, rest.pop("multiplicative"))
        for name in rest:
            choice_of("a setting of the model", name, tuple(plain.as_dict()))
        for name in PARTS_FROM_DICT.keys() & rest.keys():
            if not isinstance(rest[name], Mapping):
                raise Misuse(
                    f"model: {name}",
                    got=repr(rest[name]),
                    expected="the settings of this part by name",
                    do=f"write them as in {plain.as_dict()[name]}",
                )
            rest[name] = PARTS_FROM_DICT[name](rest[name])
        return replace(plain, **rest)


KINDS: dict[str, Callable[..., Simfluence]] = {
    "two-timescale": Simfluence,
    "linear": Simfluence.linear,
    "additive": Simfluence.additive,
    "multiplicative": Simfluence.multiplicative,
}
"""Constructors, by the name that YAML and the command line use."""


PARTS_FROM_DICT: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "exposure": lambda settings: layered(Exposure, settings, what="exposure"),
    "coefficients": lambda settings: layered(Varying, settings, what="coefficients"),
    "prior": prior_from_dict,
    "error": error_from_dict,
}


def _terms(additive: bool, multiplicative: bool) -> str:
    if not additive and not multiplicative:
        raise Misuse(
            "model: multiplicative",
            got="False, without additive terms",
            expected="terms of one kind at least",
            do="leave it out, or use another kind",
        )
    if additive:
        return "both" if multiplicative else "additive"
    return "multiplicative"


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
    free = {**model.exposure.hypers(coupled=model.coupled), **model.error.hypers()}
    if not model.per_query:
        if "staying" in model.parts:
            free["growth"] = Hyper(
                0.0, 1.0, "real", "log growth of what stays per recorded length", constant=0.0
            )
        if model.error.by_step:
            free["noise"] = Hyper(
                0.05, 1.5, "positive", "sd of one step's error over the sd of the effects"
            )
        if model.has_multiplicative:
            free["multiplicative_scale"] = Hyper(
                0.3, 1.0, "positive", "sd of multiplicative terms over the staying ones'"
            )
    if "fading" in model.parts:
        free["fade_length"] = Hyper(
            0.135, 1.0, "positive", "training time after which effects fade"
        )
    if len(model.parts) == 2:
        free["fading_scale"] = Hyper(
            1.65, 1.0, "positive", "sd of fading effects over staying ones", constant=NEGLIGIBLE
        )
    for part in model.parts if model.has_additive else ():
        if model.time_effect != "none":
            free[f"{part}_common"] = Hyper(
                0.6, 1.0, "positive", "sd of the effect of any step", constant=NEGLIGIBLE
            )
        free.update(model.coefficients.hypers(part))
        free.update(model.prior.hypers(part, features))
    if model.has_multiplicative:
        nothing = no_features(len(features.train), len(features.query))
        free.update(model.prior.hypers(MULTIPLICATIVE, nothing))
    return free
