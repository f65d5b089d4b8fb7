"""A fit in words: one dataclass for command line and YAML, which makes a model and a method.

The model is the nested dict of ``Simfluence.as_dict``, in YAML under ``model``. Options have short
forms of its parts, which overrule it: a name, with one number where it has one, as in
``student-t:4``. What is left out is the kind's or the method's own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bayes_simfluence.checks import Misuse, count_of, positive_number
from bayes_simfluence.settings import check_choices, say

INFERRED = "inferred"
SAMPLER = ("chains", "warmup", "draws", "target_accept", "max_tree_depth", "chain_method")
OWN: dict[str, tuple[str, ...]] = {
    "exact": ("hyperparameters", "times"),
    "nuts": SAMPLER,
    "stack": ("times",),
    "svi": ("guide", "steps", "batch", "learning_rate", "draws"),
    "ridge": ("objective", "penalty", "folds", "band"),
}
"""Settings that each method takes; ``exact`` those of the sampler too where it samples."""
NUMBER_OF_EXPOSURE = {"memoryless": None, "momentum": "momentum", "order": "order"}
"""Short forms of the exposure, with the attribute that their number sets."""
FORMS = (
    "kind", "link", "timescales", "prior", "noise", "exposure", "pooled", "features",
    "loss_power", "run_effect", "observation", "step_size_power", "coefficients", "time_effect",
    "coupling", "multiplicative",
)  # fmt: skip
"""Settings that are short forms of the model's parts."""


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fit besides the runs; saved beside the posterior."""

    method: str = say("how to fit", "stack", ("stack", "exact", "nuts", "svi", "ridge"))
    model: dict[str, Any] | None = say("settings of the model's parts, as in a saved fit", None)
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
    coupling: str | None = say(
        "examples act by what they have still to learn, or alike", None, ("residual", "none")
    )
    multiplicative: bool | None = say("terms that multiply the loss", None)
    hyperparameters: str | None = say(
        "exact: how they are found", None, ("leave-one-run-out", "marginal", "evidence", "nuts")
    )
    times: int | None = say("exact, stack: times of each run conditioned on", None)
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
        return [setting.name for setting in fields(cls)]

    def as_dict(self) -> dict[str, Any]:
        """The settings that are not left out, as plain values for YAML."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def parts(self) -> tuple[Any, Any]:
        """The model (``Simfluence``) and the method.

        Raises:
            Misuse: a setting that is not known, or that the method does not take.
        """
        check_choices(self)
        count_of("seed", self.seed)
        self._unused()
        method = self._method()
        return self._model(method.default_model()), method

    def resolved(self) -> "FitConfig":
        """The same fit with every default spelled out."""
        model, method = self.parts()
        own = {name: getattr(method, name, None) for name in OWN[self.method]}
        sampler = getattr(method, "sampler", None)
        if sampler is not None:
            own |= {name: getattr(sampler, name) for name in SAMPLER}
        # What a method does not hold by that name, such as the step size of Adam, stays as it is.
        own = {name: value for name, value in own.items() if value is not None}
        changes: dict[str, Any] = {**own, **dict.fromkeys(FORMS), "model": model.as_dict()}
        return replace(self, **changes)

    def _unused(self) -> None:
        """Raise for settings that the method does not take."""
        taken = self._taken()
        every = {name for names in OWN.values() for name in names}
        for name in sorted(every - set(taken)):
            if getattr(self, name) is not None:
                users = [method for method, names in OWN.items() if name in names]
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
        settings = self._chosen(*self._taken())
        if self.method == "ridge":
            from bayes_simfluence.inference.ridge import Ridge

            return Ridge(**{"band": True, **settings})
        if self.method == "svi":
            return _svi(settings)
        if self.method == "stack":
            from bayes_simfluence.inference.stack import Stack

            return Stack(**settings)
        from bayes_simfluence.inference.exact import Exact
        from bayes_simfluence.inference.nuts import NUTS

        if self.method == "nuts":
            return NUTS(**settings)
        sampler = {name: settings.pop(name) for name in SAMPLER if name in settings}
        sampled = self.hyperparameters == "nuts"
        return Exact(**settings, sampler=NUTS(**sampler) if sampled else None)

    def _model(self, default: Any) -> Any:
        from bayes_simfluence.model.simfluence import Simfluence

        settings = self._plain(default)
        settings["prior"] = self._prior(settings["prior"])
        settings["error"] = self._error(settings["error"])
        settings["exposure"] = self._exposure(settings["exposure"])
        if self.coefficients is not None:
            settings["coefficients"] = {"knots": self.coefficients}
        settings |= self._chosen("link", "timescales", "time_effect", "coupling", "multiplicative")
        model = Simfluence.from_dict(settings)
        if not model.prior.stored:
            raise Misuse(
                "model: prior",
                got=f"{settings['prior']}, which describes what is not saved",
                expected="a prior whose settings say all of it",
                do="name one with prior, or pass the embeddings or the distribution in Python",
            )
        return model

    def _plain(self, default: Any) -> dict[str, Any]:
        """Settings of the model before short forms of its parts."""
        from bayes_simfluence.model.simfluence import KINDS, Simfluence

        if self.model is None:
            return (KINDS[self.kind]() if self.kind else default).as_dict()
        if self.kind is not None:
            raise Misuse(
                "kind",
                got=f"{self.kind!r} beside a model that is spelled out",
                expected="one of them",
                do="leave kind out, or the model of the file of settings",
            )
        return Simfluence.from_dict(self.model).as_dict()

    def _chosen(self, *names: str) -> dict[str, Any]:
        """Those of these settings that are not left out."""
        chosen = {name: getattr(self, name) for name in names}
        return {
            name: None if value == INFERRED else value
            for name, value in chosen.items()
            if value is not None
        }

    def _prior(self, plain: dict[str, Any]) -> dict[str, Any]:
        from bayes_simfluence.model.priors import PRIORS

        if self.prior is not None:
            numbers = {name: prior.number for name, prior in PRIORS.items() if prior.stored}
            name, own = _short("prior", self.prior, numbers)
            plain = {"name": name, "features": plain.get("features", True), **own}
        return plain | self._chosen("features", "pooled")

    def _error(self, plain: dict[str, Any]) -> dict[str, Any]:
        from bayes_simfluence.model.noise import ERRORS

        if self.noise is not None:
            numbers = {name: error.number for name, error in ERRORS.items()}
            name, own = _short("noise", self.noise, numbers)
            plain = {"name": name, **own}
        return plain | self._chosen("loss_power", "run_effect", "observation")

    def _exposure(self, plain: dict[str, Any]) -> dict[str, Any]:
        if self.exposure is not None:
            name, plain = _short("exposure", self.exposure, NUMBER_OF_EXPOSURE)
            if name == "memoryless":
                plain = {"momentum": 0.0, "step_size_power": 0.0}
        return plain | self._chosen("step_size_power")


def _short(option: str, word: str, numbers: Mapping[str, str | None]) -> tuple[str, dict[str, Any]]:
    """Name and attributes of a short form such as ``student-t:4``.

    Args:
        option: as the command line calls it.
        word: the short form.
        numbers: the attribute that the number sets, by name.
    """
    name, _, number = word.partition(":")
    if name not in numbers:
        raise Misuse(
            option,
            got=repr(word),
            expected=f"one of {', '.join(numbers)}",
            do="pick one of them, or pass another in Python",
        )
    attribute = numbers[name]
    if attribute is None and number:
        raise Misuse(option, got=repr(word), expected=f"{name} without a number", do="leave it out")
    if attribute is None or not (number or name == "order"):
        return name, {}
    return name, {attribute: int(number) if number.isdigit() else number}


def _svi(settings: dict[str, Any]) -> Any:
    import optax

    from bayes_simfluence.inference.svi import SVI

    rate = settings.pop("learning_rate", None)
    if rate is None:
        return SVI(**settings)
    return SVI(**settings, optimizer=optax.adam(positive_number("learning_rate", rate)))
