"""Errors of a run: what its curriculum does not explain, as a random path that starts at zero.

``eta_t = y_t - y_0 - (what the curriculum explains)`` on the scale of the link. ``Gaussian``,
``StudentT`` and ``AR1`` speak of its steps ``eta_t - eta_{t-1}``: an error made once stays, as in
the recurrence ``L_t = alpha L_{t-1} + beta + eps_t``. ``Smooth`` speaks of the whole path. Sizes
are relative to one number that the model brings (sd of a query's one-step error, or of effects).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.recurrence import accumulation

__all__ = ["AR1", "ERRORS", "Error", "Gaussian", "Smooth", "StudentT", "error_from_dict"]

LOWEST = 1e-3
"""Losses below this (nats) count as this much where the error's size follows the loss."""


@dataclass(frozen=True)
class _Steps:
    """What errors of single steps share.

    Attributes:
        loss_power: the sd of a step's error is proportional to this power of the loss before it
            (0: it does not follow the loss); inferred when None.
        run_effect: each run has a slope of its own besides (a random effect of the run).
    """

    loss_power: float | None = 0.0
    run_effect: bool = False

    by_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.loss_power is not None and not np.isfinite(self.loss_power):
            raise Misuse(
                f"{type(self).__name__}(loss_power=...)",
                got=repr(self.loss_power),
                expected="a finite number, or None to infer it",
                do="pass 0 for an error that does not follow the loss",
            )

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        free = {}
        if self.loss_power is None:
            free["loss_power"] = Hyper(0.5, 0.5, "real", "power of the loss in the error's sd")
        if self.run_effect:
            free["run_slope"] = Hyper(
                0.5, 1.0, "positive", "sd of a run's own drift over that of its random walk"
            )
        return free

    def sizes(
        self, values: Values, before: Float[Array, "step query"]
    ) -> Float[Array, "step query"] | None:
        """Relative sd of each step's error given the losses (nats) before it; None = all one."""
        if self.loss_power == 0:
            return None
        power = values["loss_power"] if self.loss_power is None else self.loss_power
        return jnp.maximum(before, LOWEST) ** power

    def _with_run_effect(
        self, values: Values, covariance: Array, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        if not self.run_effect:
            return covariance
        steps = 1.0 / progress[0]
        slope = values["run_slope"] ** 2 * steps
        return covariance + slope * progress[:, None] * progress[None, :]


@dataclass(frozen=True)
class Gaussian(_Steps):
    """Independent normal errors of each step: the literal reading of the recurrence.

    Attributes:
        observation: losses are also measured with white noise that does not stay (a
            linear-Gaussian state space: process noise and observation noise).
    """

    observation: bool = False
    gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observation and self.loss_power != 0:
            raise Misuse(
                "Gaussian(observation=True)",
                got=f"loss_power={self.loss_power}",
                expected="loss_power=0, since the true loss before a step is not observed",
                do="leave one of them out",
            )

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        free = super().hypers()
        if self.observation:
            free["observation"] = Hyper(
                0.5, 1.0, "positive", "sd of the observation noise over that of one step's error"
            )
        return free

    def covariance(
        self, values: Values, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        """Covariance of the error path, for unit variance of a step's error."""
        step = progress / progress[0]
        walk = jnp.minimum(step[:, None], step[None, :])
        if self.observation:
            walk = walk + values["observation"] ** 2 * jnp.eye(len(step))
        return self._with_run_effect(values, walk, progress)


@dataclass(frozen=True)
class AR1(_Steps):
    """Errors of successive steps are correlated: ``eps_t = rho eps_{t-1} + innovation``.

    Stationary from the first step on, with unit variance.
    """

    gaussian: ClassVar[bool] = True

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        correlation = Hyper(0.2, 0.6, "correlation", "correlation of errors one step apart")
        return {**super().hypers(), "error_correlation": correlation}

    def covariance(
        self, values: Values, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        """Covariance of the error path, for unit variance of a step's error."""
        rho, size = values["error_correlation"], len(progress)
        lag = jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size)[None, :])
        steps = jnp.where(lag == 0, 1.0, rho ** jnp.maximum(lag, 1))
        walk = jnp.cumsum(jnp.cumsum(steps, axis=0), axis=1)
        return self._with_run_effect(values, walk, progress)


@dataclass(frozen=True)
class StudentT(_Steps):
    """Independent Student-t errors of each step: rare large jumps do not pull the coefficients.

    Attributes:
        freedom: degrees of freedom, above 2; inferred when None.
    """

    freedom: float | None = None
    gaussian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_effect:
            raise Misuse(
                "StudentT(run_effect=True)",
                got="a run effect with independent Student-t steps",
                expected="run_effect=False",
                do="use Gaussian(run_effect=True) or AR1(run_effect=True)",
            )
        if self.freedom is not None and not 2 < self.freedom < np.inf:
            raise Misuse(
                "StudentT(freedom=...)",
                got=repr(self.freedom),
                expected="a finite number above 2, so that the error has a variance",
                do="pass a larger one, or None to infer it",
            )

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        free = super().hypers()
        if self.freedom is None:
            free["error_freedom"] = Hyper(4.0, 0.7, "positive", "degrees of freedom above 2")
        return free

    def freedom_of(self, values: Values) -> Float[Array, ""]:
        """Degrees of freedom."""
        if self.freedom is not None:
            return jnp.asarray(self.freedom)
        return 2.0 + values["error_freedom"]

    def log_density(self, values: Values, step: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log density of steps of unit scale."""
        freedom = self.freedom_of(values)
        half = 0.5 * (freedom + 1.0)
        gammaln = jax.scipy.special.gammaln
        constant = gammaln(half) - gammaln(0.5 * freedom) - 0.5 * jnp.log(freedom * jnp.pi)
        return constant - half * jnp.log1p(jnp.square(step) / freedom)


@dataclass(frozen=True)
class Smooth:
    """A random walk plus a smooth stationary part, both zero before the first update.

    The random walk lets a run drift away for good; with positive ``growth`` deviations feed on
    themselves (the staying effects share that rate). The stationary part is a Matern-3/2 process
    conditioned to start at zero; its amplitude may change exponentially along the run. Scales are
    relative to the effects'.
    """

    by_step: ClassVar[bool] = False
    gaussian: ClassVar[bool] = True

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        return {
            "drift": Hyper(0.08, 1.5, "positive", "sd of the random walk after a recorded length"),
            "wobble": Hyper(0.08, 1.5, "positive", "sd of the stationary part"),
            "wobble_length": Hyper(0.08, 1.0, "positive", "training time over which it changes"),
            "wobble_trend": Hyper(0.0, 1.0, "real", "log growth of its sd per recorded length"),
        }

    def sizes(self, values: Values, before: Float[Array, "step query"]) -> None:
        """None: the error does not follow the loss."""

    def covariance(
        self, values: Values, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        """Covariance of a run's error between the times after each step, relative units."""
        walk = accumulation(values.get("growth", jnp.zeros(())), progress)
        walk = (walk * progress[0]) @ walk.T
        start = _matern(progress, values["wobble_length"])
        smooth = _matern(progress[:, None] - progress[None, :], values["wobble_length"])
        smooth = smooth - start[:, None] * start[None, :]
        sd = values["wobble"] * jnp.exp(values["wobble_trend"] * (progress - 0.5))
        return values["drift"] ** 2 * walk + sd[:, None] * sd[None, :] * smooth


Error: TypeAlias = Gaussian | AR1 | StudentT | Smooth
"""How a run may err."""

ERRORS: dict[str, type[Error]] = {
    "gaussian": Gaussian,
    "student-t": StudentT,
    "ar1": AR1,
    "smooth": Smooth,
}
"""By the name that settings and the command line use."""


def error_from_dict(settings: dict[str, Any]) -> Error:
    """The error of settings ``{"name": ..., **attributes}``."""
    rest = dict(settings)
    return ERRORS[rest.pop("name")](**rest)


def _matern(distance: Float[Array, "..."], length: Float[Array, ""]) -> Float[Array, "..."]:
    """Matern covariance with smoothness 3/2 (Rasmussen & Williams 2006, eq. 4.17)."""
    scaled = jnp.sqrt(3.0) * jnp.abs(distance) / length
    return (1.0 + scaled) * jnp.exp(-scaled)
