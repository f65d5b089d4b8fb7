"""A fit in words: one dataclass for command line and YAML, which makes a model and a method.

A part of the model is a name, with one number where it has one: ``student-t:4``, ``order:3``. What
is left unsaid is the kind's or the method's own.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bayes_simfluence.checks import Misuse, count_of, positive_number, shorten
from bayes_simfluence.settings import check_choices, say

__all__ = ["FitConfig", "words_of"]

INFERRED = "inferred"
SAMPLER = ("chains", "warmup", "draws", "target_accept", "max_tree_depth", "chain_method")
OWN: dict[str, tuple[str, ...]] = {
    "exact": ("hyperparameters", "times"),
    "nuts": SAMPLER,
    "svi": ("guide", "steps", "batch", "learning_rate", "draws"),
    "ridge": ("objective", "penalty", "folds", "band"),
}
"""Settings that each method takes; ``exact`` those of the sampler too where it samples."""
NUMBER_OF_PRIOR: dict[str, tuple[str, Callable[[str], float | int]] | None] = {
    "normal": None,
    "student-t": ("df", float),
    "laplace": None,
    "horseshoe": ("share", float),
    "low-rank": ("rank", int),
}
"""Priors that words can name, with the attribute that their number sets and its type. The others
take arrays or distributions, which only Python can pass."""
ERRORS = ("gaussian", "ar1", "student-t", "smooth")


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fit besides the runs; saved beside the posterior."""

    method: str = say("how to fit", "exact", ("exact", "nuts", "svi", "ridge"))
    kind: str | None = say(
        "model, by the settings of its parts", None,
        ("two-timescale", "linear", "additive", "multiplicative"),
    )  # fmt: skip
    link: str | None = say("scale of the effects", None, ("log-odds", "log", "identity"))
    timescales: str | None = say("effects", None, ("both", "staying", "fading"))
    prior: str | None = say(
        "of effects: normal, student-t[:df], laplace, horseshoe[:share that matters], "
        "low-rank[:rank]", None,
    )  # fmt: skip
    pooled: bool | None = say("effects partly the same for all queries", None)
    features: bool | None = say("use the recording's gradient features", None)
    noise: str | None = say(
        "error of a run: smooth, gaussian, ar1, student-t[:df, inferred when left out]", None
    )
    loss_power: float | str | None = say(
        f"power of the loss in the error's sd, or '{INFERRED}'", None
    )
    run_effect: bool | None = say("each run has a slope of its own", None)
    observation: bool | None = say("white noise of measuring (gaussian)", None)
    exposure: str | None = say(
        "memory of the optimizer: memoryless, momentum[:rho, inferred when left out], "
        "order:steps", None,
    )  # fmt: skip
    step_size_power: float | str | None = say(
        f"power of the step size in the exposure, or '{INFERRED}'", None
    )
    coefficients: int | None = say("knots of a coefficient along training, 1 = constant", None)
    time_effect: str | None = say("shared by all runs", None, ("smooth", "linear", "none"))
    multiplicative: bool | None = say("terms that multiply the loss", None)
    hyperparameters: str | None = say(
        "exact: how they are found", None, ("leave-one-run-out", "evidence", "nuts")
    )
    times: int | None = say("exact: times of each run that are conditioned on", None)
    chains: int | None = say("nuts: chains", None)
    warmup: int | None = say("nuts: iterations of warm-up", None)
    draws: int | None = say("nuts: kept of each chain; svi: kept", None)
    target_accept: float | None = say("nuts: acceptance aimed at", None)
    max_tree_depth: int | None = say("nuts: doublings of a trajectory at most", None)
    chain_method: str | None = say("nuts: chains", None, ("vectorized", "parallel", "sequential"))
    guide: str | None = say("svi", None, ("normal", "low-rank", "full-rank", "laplace"))
    steps: int | None = say("svi: steps at most", None)
    batch: int | None = say("svi: minibatch", None)
    learning_rate: float | None = say("svi: step size of Adam", None)
    objective: str | None = say("ridge", None, ("paper", "centred"))
    penalty: float | None = say("ridge: on squared coefficients; chosen when left out", None)
    folds: int | None = say("ridge: groups of runs that are left out in turn", None)
    band: bool | None = say("ridge: residuals of left-out runs as a band (on)", None)
    select: str = say("positions of the runs to fit, as in '0:25' or '0,3,5'; all if empty", "")
    validate: str = say("positions of the runs that choose the ridge's penalty", "")
    seed: int = say("decides everything random", 0)

    @classmethod
    def names(cls) -> list[str]:
        """The settings' names, in order."""
        return [one.name for one in fields(cls)]

    def as_dict(self) -> dict[str, Any]:
        """What was said, as plain values for YAML."""
        return {name: one for name, one in asdict(self).items() if one is not None}

    def parts(self) -> tuple[Any, Any]:
        """The model (``Simfluence``) and the method.

        Raises:
            Misuse: a word that is not known, or that the method has no use for.
        """
        check_choices(self)
        count_of("seed", self.seed)
        self._unused()
        method = self._method()
        return self._model(method.default_model()), method

    def resolved(self) -> "FitConfig":
        """The same fit with everything said that was left to defaults."""
        model, method = self.parts()
        own = {name: getattr(method, name, None) for name in OWN[self.method]}
        sampler = getattr(method, "sampler", None)
        if sampler is not None:
            own |= {name: getattr(sampler, name) for name in SAMPLER}
        found = {name: one for name, one in own.items() if one is not None}
        return replace(self, **{**found, **words_of(model)})

    def _unused(self) -> None:
        """Raise when something was said that this method does not look at."""
        taken = self._taken()
        every = {name for names in OWN.values() for name in names}
        for name in sorted(every - set(taken)):
            if getattr(self, name) is not None:
                users = [one for one, names in OWN.items() if name in names]
                if name in SAMPLER:
                    users.append("exact with hyperparameters nuts")
                raise Misuse(
                    name,
                    got=f"{getattr(self, name)!r} with method {self.method}",
                    expected=f"method {' or '.join(users)}",
                    do="leave it out, or change the method",
                )
        if self.validate and self.method != "ridge":
            raise Misuse(
                "validate",
                got=f"{self.validate!r} with method {self.method}",
                expected="method ridge, the only one that chooses a penalty on further runs",
                do="leave it out",
            )

    def _taken(self) -> tuple[str, ...]:
        sampled = self.method == "exact" and self.hyperparameters == "nuts"
        return OWN[self.method] + (SAMPLER if sampled else ())

    def _method(self) -> Any:
        said = {name: getattr(self, name) for name in self._taken()}
        said = {name: one for name, one in said.items() if one is not None}
        if self.method == "ridge":
            from bayes_simfluence.inference.ridge import Ridge

            return Ridge(**{"band": True, **said})
        if self.method == "svi":
            return _svi(said)
        from bayes_simfluence.inference.exact import Exact
        from bayes_simfluence.inference.nuts import NUTS

        if self.method == "nuts":
            return NUTS(**said)
        sampler = {name: said.pop(name) for name in SAMPLER if name in said}
        sampled = self.hyperparameters == "nuts"
        return Exact(**said, sampler=NUTS(**sampler) if sampled else None)

    def _model(self, default: Any) -> Any:
        from bayes_simfluence.model.coefficients import Varying
        from bayes_simfluence.model.simfluence import Simfluence

        kind: Any = self.kind or default.kind
        plain = Simfluence(kind=kind)
        said: dict[str, Any] = {
            "link": self.link,
            "timescales": self.timescales,
            "time_effect": self.time_effect,
            "multiplicative": self.multiplicative,
        }
        parts = {name: one for name, one in said.items() if one is not None}
        if self.coefficients is not None:
            parts["coefficients"] = Varying(self.coefficients)
        return replace(
            plain,
            prior=self._prior(plain.prior),
            error=self._error(plain.error),
            exposure=self._exposure(plain.exposure),
            **parts,
        )

    def _prior(self, plain: Any) -> Any:
        from bayes_simfluence.model.priors import PRIORS

        common = {"features": self.features, "pooled": self.pooled}
        said = {name: one for name, one in common.items() if one is not None}
        if self.prior is None:
            return replace(plain, **said)
        name, number = _named_number("prior", self.prior, tuple(NUMBER_OF_PRIOR))
        taken = NUMBER_OF_PRIOR[name]
        if number and taken is None:
            raise _no_number("prior", self.prior, name)
        own = {taken[0]: _number("prior", number, taken[1])} if number and taken else {}
        return PRIORS[name](**{"features": plain.features, **own, **said})

    def _error(self, plain: Any) -> Any:
        from bayes_simfluence.model.noise import ERRORS as CLASSES

        said: dict[str, Any] = {}
        if self.loss_power is not None:
            said["loss_power"] = _inferred("loss_power", self.loss_power)
        for flag in ("run_effect", "observation"):
            if getattr(self, flag) is not None:
                said[flag] = getattr(self, flag)
        kind = type(plain)
        if self.noise is not None:
            name, number = _named_number("noise", self.noise, ERRORS)
            kind = CLASSES[name]
            if number and name != "student-t":
                raise _no_number("noise", self.noise, name)
            if number:
                said["df"] = _number("noise", number, float)
        known = {one.name for one in fields(kind)}
        for name in set(said) - known:
            raise Misuse(
                name,
                got=f"{said[name]!r} with noise {_key_of(CLASSES, kind)}",
                expected=f"nothing of it, since that noise has {shorten(sorted(known)) or 'no'} "
                "settings",
                do="leave it out, or choose another noise",
            )
        return replace(plain, **said) if self.noise is None else kind(**said)

    def _exposure(self, plain: Any) -> Any:
        from bayes_simfluence.model.exposure import Exposure

        found = plain
        if self.exposure is not None:
            name, number = _named_number(
                "exposure", self.exposure, ("memoryless", "momentum", "order")
            )
            if name == "memoryless":
                if number:
                    raise _no_number("exposure", self.exposure, name)
                found = Exposure.memoryless()
            elif name == "order":
                found = Exposure(order=int(_number("exposure", number, int)))
            else:
                found = Exposure(momentum=_number("exposure", number, float) if number else None)
        if self.step_size_power is None:
            return found
        return replace(found, step_size_power=_inferred("step_size_power", self.step_size_power))


def words_of(model: Any) -> dict[str, Any]:
    """The words that make a model: the settings of a ``FitConfig``, all of them said.

    >>> from bayes_simfluence.model.simfluence import Simfluence
    >>> words = words_of(Simfluence(kind="linear"))
    >>> words["noise"], words["exposure"], words["coefficients"]
    ('gaussian', 'memoryless', 1)
    """
    from bayes_simfluence.model.noise import ERRORS as CLASSES
    from bayes_simfluence.model.priors import PRIORS

    name = _key_of(PRIORS, type(model.prior))
    taken = NUMBER_OF_PRIOR[name]
    error, exposure = model.error, model.exposure
    found = {
        "kind": model.kind,
        "link": model.link,
        "timescales": model.timescales,
        "prior": name if taken is None else f"{name}:{getattr(model.prior, taken[0])!r}",
        "pooled": model.prior.pooled,
        "features": model.prior.features,
        "noise": _key_of(CLASSES, type(error)),
        "exposure": _word_of(exposure),
        "step_size_power": _word_of_inferred(exposure.step_size_power),
        "coefficients": model.coefficients.knots,
        "time_effect": model.time_effect,
        "multiplicative": model.multiplicative,
    }
    if getattr(error, "df", None) is not None:
        found["noise"] += f":{error.df!r}"
    for one in fields(error):
        if one.name != "df":
            value = getattr(error, one.name)
            found[one.name] = _word_of_inferred(value) if one.name == "loss_power" else value
    return found


def _svi(said: dict[str, Any]) -> Any:
    import optax

    from bayes_simfluence.inference.svi import SVI

    rate = said.pop("learning_rate", None)
    if rate is None:
        return SVI(**said)
    return SVI(**said, optimizer=optax.adam(positive_number("learning_rate", rate)))


def _word_of(exposure: Any) -> str:
    if exposure.order is not None:
        return f"order:{exposure.order}"
    if exposure.momentum is None:
        return "momentum"
    if exposure.momentum == 0:
        return "memoryless"
    return f"momentum:{exposure.momentum!r}"


def _word_of_inferred(value: float | None) -> float | str:
    return INFERRED if value is None else value


def _inferred(name: str, said: float | str) -> float | None:
    if said == INFERRED:
        return None
    if isinstance(said, str):
        raise Misuse(
            name, got=repr(said), expected=f"a number or '{INFERRED}'", do="pass one of them"
        )
    return said


def _key_of(named: dict[str, Any], kind: type[Any]) -> str:
    return next(name for name, one in named.items() if one is kind)


def _named_number(what: str, word: str, names: tuple[str, ...]) -> tuple[str, str]:
    name, _, number = word.partition(":")
    if name not in names:
        raise Misuse(
            what,
            got=repr(word),
            expected=f"one of {shorten(names, 20)}",
            do="pick one of them (others: in Python)" if what == "prior" else "pick one of them",
        )
    return name, number


def _number(what: str, text: str, kind: Callable[[str], float | int]) -> float | int:
    try:
        return kind(text)
    except ValueError:
        raise Misuse(
            what,
            got=repr(text) if text else "no number",
            expected="a whole number" if kind is int else "a number",
            do="write it after the name and a colon, as in order:3",
        ) from None


def _no_number(what: str, word: str, name: str) -> Misuse:
    return Misuse(what, got=repr(word), expected=f"{name} without a number", do="leave it out")
