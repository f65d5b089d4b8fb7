"""Exposure: with what weight an example of one step acts at that step and at later ones."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse, positive_integer, unit_interval
from bayes_simfluence.model.hyper import Hyper, Values

FLOOR = 0.01
"""Added to relative step sizes: a schedule that ends at zero keeps a finite logarithm."""
LEAST_MOMENT = 1e-9
"""Added to the second moment: a first batch without a gradient keeps a finite logarithm."""


@dataclass(frozen=True)
class Exposure:
    """Exposure smoothed by the optimizer's momentum and weighted by the step size.

    Under momentum the update of step ``t`` holds the batches of steps ``s <= t`` with weights
    ``(1 - rho) rho^(t-s) / (1 - rho^t)``: Adam's bias-corrected first moment (Kingma & Ba 2015,
    algorithm 1). The step size enters as a power, because Adam and decay schedules make an
    example's effect neither independent of nor proportional to it. So does the running mean of
    squared gradients, by whose root Adam divides a step, where residuals tell it (``coupling``).

    Attributes:
        momentum: ``rho`` in [0, 1); 0 = memoryless; inferred when None.
        step_size_power: 0 = ignore the step size, 1 = proportional; inferred when None.
        order: an n-th order memory instead of the exponential one: a batch acts on this many
            steps, its own included, with shares that are inferred; ``momentum`` is not used.
        second_moment_power: of the running mean of squared gradients that steps are divided by,
            in coupled models: .5 as in Adam, 0 as in SGD; inferred when None.

    >>> Exposure.memoryless()
    Exposure(momentum=0.0, step_size_power=0.0, order=None, second_moment_power=None)
    """

    momentum: float | None = None
    step_size_power: float | None = None
    order: int | None = None
    second_moment_power: float | None = None

    def __post_init__(self) -> None:
        if self.momentum is not None:
            unit_interval("Exposure(momentum=...)", self.momentum)
        _finite_power("step_size_power", self.step_size_power, "the step size")
        _finite_power("second_moment_power", self.second_moment_power, "the gradients' size")
        if self.order is not None:
            positive_integer("Exposure(order=...)", self.order)
        if self.order is not None and self.momentum is not None:
            raise Misuse(
                "Exposure",
                got=f"momentum={self.momentum} and order={self.order}",
                expected="one of them",
                do="leave one out",
            )

    @classmethod
    def memoryless(cls) -> "Exposure":
        """A batch acts on its own step alone, whatever the step size: the published exposure."""
        return cls(momentum=0.0, step_size_power=0.0)

    @property
    def is_memoryless(self) -> bool:
        """Whether a batch acts on its own step alone."""
        return self.momentum == 0.0 or self.order == 1

    def hypers(self, *, coupled: bool = False) -> dict[str, Hyper]:
        """What is inferred; of a coupled model, the power of the second moment and a trend too.

        All runs may have one schedule, which cannot tell the step size from time. Where residuals
        say what is left to learn, an optimizer's own rule is believed: effects are proportional to
        the step size, and whatever else makes those of later steps larger is the trend.
        """
        free = {}
        for lag in range(1, self.order or 1):
            free[f"lag_{lag}"] = Hyper(0.3, 1.5, "positive", f"share of lag {lag} over lag 0's")
        if self.momentum is None and self.order is None:
            free["momentum"] = Hyper(0.9, 1.0, "share", "decay of the update's memory per step")
        if self.step_size_power is None:
            centre, spread = (1.0, 0.1) if coupled else (0.5, 0.5)
            free["step_size_power"] = Hyper(
                centre, spread, "real", "power of the relative step size"
            )
        if coupled:
            free["trend"] = Hyper(0.0, 1.0, "real", "log growth over a run of what a step does")
        if coupled and self.second_moment_power is None:
            free["second_moment_power"] = Hyper(
                0.25, 0.25, "real", "power of the mean squared gradient that divides a step"
            )
        return free

    def weights(
        self,
        values: Values,
        step_size: Float[Array, " step"],
        moment: Float[Array, " step"] | None = None,
    ) -> Float[Array, "step source"]:
        """``weights[t, s]``: how much the batch of step ``s`` moves the loss at step ``t``.

        Args:
            values: hyperparameters.
            step_size: relative to the largest recorded one.
            moment: running mean of squared gradients; None where it is not known.
        """
        memory = self._memory(values, len(step_size))
        if self.step_size_power != 0:
            power = _power(values, "step_size_power", self.step_size_power)
            memory = (step_size + FLOOR)[:, None] ** power * memory
        if moment is not None:
            power = _power(values, "second_moment_power", self.second_moment_power)
            memory = (moment + LEAST_MOMENT)[:, None] ** -power * memory
        return memory

    def _memory(self, values: Values, size: int) -> Float[Array, "step source"]:
        """Shares of the batches in each step's update; rows sum to one."""
        steps = jnp.arange(1, size + 1)
        lag = steps[:, None] - steps[None, :]
        if self.is_memoryless:
            return jnp.eye(size)
        if self.order is None:
            fixed = self.momentum
            momentum = values["momentum"] if fixed is None else jnp.asarray(fixed)
            memory = jnp.where(lag >= 0, momentum ** jnp.maximum(lag, 0), 0.0)
            return (1.0 - momentum) * memory / (1.0 - momentum**steps)[:, None]
        shares = jnp.stack([jnp.ones(()), *(values[f"lag_{k}"] for k in range(1, self.order))])
        reached = (lag >= 0) & (lag < self.order)
        memory = jnp.where(reached, shares[jnp.clip(lag, 0, self.order - 1)], 0.0)
        return memory / memory.sum(axis=1, keepdims=True)


def _power(values: Values, name: str, fixed: float | None) -> Array:
    return jnp.asarray(values[name] if fixed is None else fixed)


def _finite_power(name: str, power: float | None, of: str) -> None:
    if power is not None and not np.isfinite(power):
        raise Misuse(
            f"Exposure({name}=...)",
            got=repr(power),
            expected="a finite number, or None to infer it",
            do=f"pass 0 to ignore {of}",
        )
