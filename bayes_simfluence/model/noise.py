"""Errors of a run: what its curriculum does not explain, as a random trajectory from zero.

``eta_t = y_t - y_0 - (what the curriculum explains)`` on the scale of the link. ``Gaussian``,
``StudentT`` and ``AR1`` speak of its steps ``eta_t - eta_{t-1}``: an error made once stays, as in
the recurrence ``L_t = alpha L_{t-1} + beta + eps_t``. ``Smooth`` speaks of the whole trajectory.
Sizes are relative to one number that the model brings (sd of a query's one-step error, or of
effects).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.linalg import cholesky, solve_lower
from bayes_simfluence.model.hyper import Hyper, Values
from bayes_simfluence.model.recurrence import accumulation
from bayes_simfluence.settings import layered

__all__ = ["AR1", "ERRORS", "Error", "Gaussian", "Smooth", "StudentT", "error_from_dict"]

JITTER = 1e-8
"""Added to the variances of a trajectory in units of its error, so that it can be factorized."""
LOG_TWO_PI = float(np.log(2.0 * np.pi))
LOWEST = 1e-3
"""Losses below this (nats) count as this much where the error's size follows the loss."""


@dataclass(frozen=True)
class Error(ABC):
    """How a run may err.

    The trajectory of an error is a lower triangular matrix times innovations: independent draws of
    unit scale. Where steps are independent it is their sum, else the matrix is a Cholesky factor of
    the trajectory's covariance. So an error with normal innovations says what is inferred and its
    ``covariance``; an error of independent steps with other innovations says the law of those.
    """

    name: ClassVar[str]
    """As settings and the command line call it."""
    gaussian: ClassVar[bool] = True
    """Whether the trajectory is normal given hyperparameters, so that it has a ``covariance``."""
    by_step: ClassVar[bool] = True
    """Whether its unit is the sd of one step's error; else that of the effects."""
    number: ClassVar[str | None] = None
    """The setting that a number after the name sets, as in ``student-t:4``."""

    @property
    def follows_loss(self) -> bool:
        """Whether the size of a step's error depends on the loss before it (``sizes``)."""
        return False

    @property
    def independent_steps(self) -> bool:
        """Whether steps are independent given the losses before them."""
        return False

    @property
    def hides_state(self) -> bool:
        """Whether losses are measured with noise that the next loss does not start from."""
        return False

    @property
    def random_walk(self) -> bool:
        """Whether steps of the state are independent and normal with one size: a Kalman filter's.

        The state may be hidden.
        """
        return False

    @property
    def of_state(self) -> "Error":
        """The error of the state itself, without the noise that hides it."""
        return self

    @abstractmethod
    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""

    def observation_sd(self, values: Values) -> Float[Array, ""]:
        """Sd of the noise that hides the state, relative to one step's error."""
        return jnp.zeros(())

    def sizes(
        self, values: Values, before: Float[Array, "step query"]
    ) -> Float[Array, "step query"] | None:
        """Relative sd of each step's error given the losses (nats) before it; None = all one."""
        return None

    def covariance(
        self, values: Values, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        """Covariance of a run's error between the times after each step, relative units."""
        raise TypeError(f"{type(self).__name__} has no covariance")

    def log_density(
        self,
        values: Values,
        error: Float[Array, "step query"],
        progress: Float[Array, " step"],
        rows: Int[np.ndarray, " row"],
    ) -> Float[Array, "step query"]:
        """Log density of one run's error after each step given its earlier ones, relative units.

        Args:
            values: hyperparameters.
            error: the trajectory; steps that are not in ``rows`` are integrated out.
            progress: step / steps of the fitted runs.
            rows: positions of steps; the density is zero at the others.
        """
        if self.independent_steps and len(rows) == len(progress):
            return self.innovation_log_density(values, jnp.diff(error, axis=0, prepend=0.0))
        factor = self._factor(values, progress, rows)
        density = self.innovation_log_density(values, solve_lower(factor, error[rows]))
        density = density - jnp.log(jnp.diagonal(factor))[:, None]
        return jnp.zeros_like(error).at[rows].set(density)

    def trajectory(
        self, values: Values, progress: Float[Array, " step"], queries: int, *, key: Array
    ) -> Float[Array, "step query"]:
        """A draw of one run's error for each query, relative units; the loss is not followed."""
        steps = len(progress)
        innovations = self.innovations(values, (steps, queries), key=key)
        if self.gaussian:
            return self._factor(values, progress, np.arange(steps)) @ innovations
        return jnp.tril(jnp.ones((steps, steps))) @ innovations

    def innovations(
        self, values: Values, shape: tuple[int, ...], *, key: Array
    ) -> Float[Array, "..."]:
        """Independent draws of unit scale, of which trajectories are made: standard normal."""
        return jax.random.normal(key, shape)

    def innovation_log_density(
        self, values: Values, innovation: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """Log density of each innovation."""
        return -0.5 * (jnp.square(innovation) + LOG_TWO_PI)

    def as_dict(self) -> dict[str, Any]:
        """Name and settings; ``error_from_dict`` makes them an error again."""
        return {"name": self.name, **asdict(self)}

    def _factor(
        self, values: Values, progress: Float[Array, " step"], rows: Int[np.ndarray, " row"]
    ) -> Float[Array, "row row"]:
        """Cholesky factor of the trajectory's covariance between the times after some steps."""
        covariance = self.covariance(values, progress)[rows][:, rows]
        return cholesky(covariance + JITTER * jnp.eye(len(rows)))


@dataclass(frozen=True)
class _Steps(Error):
    """What errors of single steps share.

    Attributes:
        loss_power: the sd of a step's error is proportional to this power of the loss before it
            (0: it does not follow the loss); inferred when None.
        run_effect: each run has a slope of its own besides (a random effect of the run).
    """

    loss_power: float | None = 0.0
    run_effect: bool = False

    def __post_init__(self) -> None:
        if self.loss_power is not None and not np.isfinite(self.loss_power):
            raise Misuse(
                f"{type(self).__name__}(loss_power=...)",
                got=repr(self.loss_power),
                expected="a finite number, or None to infer it",
                do="pass 0 for an error that does not follow the loss",
            )

    @property
    def follows_loss(self) -> bool:
        """Whether its power of the loss is other than zero."""
        return self.loss_power != 0

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
        if not self.follows_loss:
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

    name: ClassVar[str] = "gaussian"
    observation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observation and self.follows_loss:
            raise Misuse(
                "Gaussian(observation=True)",
                got=f"loss_power={self.loss_power}",
                expected="loss_power=0, since the true loss before a step is not observed",
                do="leave one of them out",
            )

    @property
    def independent_steps(self) -> bool:
        """Unless neighbouring steps share noise of observation, or all a run effect."""
        return not (self.observation or self.run_effect)

    @property
    def hides_state(self) -> bool:
        """Whether there is noise of observation."""
        return self.observation

    @property
    def random_walk(self) -> bool:
        """Unless sizes follow the loss or a run has a slope of its own."""
        return not (self.follows_loss or self.run_effect)

    @property
    def of_state(self) -> "Gaussian":
        """The same without noise of observation."""
        return replace(self, observation=False)

    def observation_sd(self, values: Values) -> Float[Array, ""]:
        """Sd of the noise of observation over that of one step's error."""
        return values["observation"] if self.observation else jnp.zeros(())

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
        """Covariance of the trajectory, for unit variance of a step's error."""
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

    name: ClassVar[str] = "ar1"

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        correlation = Hyper(0.2, 0.6, "correlation", "correlation of errors one step apart")
        return {**super().hypers(), "error_correlation": correlation}

    def covariance(
        self, values: Values, progress: Float[Array, " step"]
    ) -> Float[Array, "step step"]:
        """Covariance of the trajectory, for unit variance of a step's error."""
        rho, size = values["error_correlation"], len(progress)
        lag = jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size)[None, :])
        steps = jnp.where(lag == 0, 1.0, rho ** jnp.maximum(lag, 1))
        walk = jnp.cumsum(jnp.cumsum(steps, axis=0), axis=1)
        return self._with_run_effect(values, walk, progress)


@dataclass(frozen=True)
class StudentT(_Steps):
    """Independent Student-t errors of each step: rare large jumps do not pull the coefficients.

    Attributes:
        df: degrees of freedom, above 2; inferred when None.
    """

    name: ClassVar[str] = "student-t"
    gaussian: ClassVar[bool] = False
    number: ClassVar[str | None] = "df"
    df: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_effect:
            raise Misuse(
                "StudentT(run_effect=True)",
                got="a run effect with independent Student-t steps",
                expected="run_effect=False",
                do="use Gaussian(run_effect=True) or AR1(run_effect=True)",
            )
        if self.df is not None and not 2 < self.df < np.inf:
            raise Misuse(
                "StudentT(df=...)",
                got=repr(self.df),
                expected="a finite number above 2, so that the error has a variance",
                do="pass a larger one, or None to infer it",
            )

    @property
    def independent_steps(self) -> bool:
        """Always."""
        return True

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        free = super().hypers()
        if self.df is None:
            # Saved posteriors know the site by this name.
            free["error_freedom"] = Hyper(4.0, 0.7, "positive", "degrees of freedom above 2")
        return free

    def df_of(self, values: Values) -> Float[Array, ""]:
        """Degrees of freedom."""
        return 2.0 + values["error_freedom"] if self.df is None else jnp.asarray(self.df)

    def innovations(
        self, values: Values, shape: tuple[int, ...], *, key: Array
    ) -> Float[Array, "..."]:
        """Student-t draws of unit scale."""
        return jax.random.t(key, self.df_of(values), shape)

    def innovation_log_density(
        self, values: Values, innovation: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """Log density of Student-t draws of unit scale."""
        df = self.df_of(values)
        half = 0.5 * (df + 1.0)
        gammaln = jax.scipy.special.gammaln
        constant = gammaln(half) - gammaln(0.5 * df) - 0.5 * jnp.log(df * jnp.pi)
        return constant - half * jnp.log1p(jnp.square(innovation) / df)


@dataclass(frozen=True)
class Smooth(Error):
    """A random walk plus a smooth stationary part, both zero before the first update.

    The random walk lets a run drift away for good; with positive ``growth`` deviations feed on
    themselves (the staying effects share that rate). The stationary part is a Matern-3/2 process
    conditioned to start at zero; its amplitude may change exponentially along the run. Scales are
    relative to the effects'.
    """

    name: ClassVar[str] = "smooth"
    by_step: ClassVar[bool] = False

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        return {
            "drift": Hyper(0.08, 1.5, "positive", "sd of the random walk after a recorded length"),
            "wobble": Hyper(0.08, 1.5, "positive", "sd of the stationary part"),
            "wobble_length": Hyper(0.08, 1.0, "positive", "training time over which it changes"),
            "wobble_trend": Hyper(0.0, 1.0, "real", "log growth of its sd per recorded length"),
        }

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


ERRORS: dict[str, type[Error]] = {kind.name: kind for kind in (Gaussian, StudentT, AR1, Smooth)}
"""By the name that settings and the command line use."""


def error_from_dict(settings: Mapping[str, Any]) -> Error:
    """The error of settings made by ``Error.as_dict``."""
    rest = dict(settings)
    if "freedom" in rest:  # as version 0.1 wrote it
        rest["df"] = rest.pop("freedom")
    name = choice_of("name of the error", rest.pop("name", None), tuple(ERRORS))
    return layered(ERRORS[name], rest, what=f"error {name}")


def _matern(distance: Float[Array, "..."], length: Float[Array, ""]) -> Float[Array, "..."]:
    """Matern covariance with smoothness 3/2 (Rasmussen & Williams 2006, eq. 4.17)."""
    scaled = jnp.sqrt(3.0) * jnp.abs(distance) / length
    return (1.0 + scaled) * jnp.exp(-scaled)
