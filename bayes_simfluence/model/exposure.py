"""Exposure: with what weight an example of one step acts at that step and at later ones."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.checks import unit_interval
from bayes_simfluence.model.hyper import Hyper, Values

__all__ = ["Exposure"]

FLOOR = 0.01
"""Added to relative step sizes: a schedule that ends at zero keeps a finite logarithm."""


@dataclass(frozen=True)
class Exposure:
    """Exposure smoothed by the optimizer's momentum and weighted by the step size.

    Under momentum the update of step ``t`` holds the batches of steps ``s <= t`` with weights
    ``(1 - rho) rho^(t-s) / (1 - rho^t)``: Adam's bias-corrected first moment (Kingma & Ba 2015,
    algorithm 1). The step size enters as a power, because Adam and decay schedules make an
    example's effect neither independent of nor proportional to it.

    Attributes:
        momentum: ``rho`` in [0, 1); 0 = memoryless; inferred when None.
        step_size_power: 0 = ignore the step size, 1 = proportional; inferred when None.
    """

    momentum: float | None = None
    step_size_power: float | None = None

    def __post_init__(self) -> None:
        if self.momentum is not None:
            unit_interval("Exposure(momentum=...)", self.momentum)

    def hypers(self) -> dict[str, Hyper]:
        """What is inferred."""
        free = {}
        if self.momentum is None:
            free["momentum"] = Hyper(0.9, 1.0, "share", "decay of the update's memory per step")
        if self.step_size_power is None:
            free["step_size_power"] = Hyper(0.5, 0.5, "real", "power of the relative step size")
        return free

    def weights(
        self, values: Values, step_size: Float[Array, " step"]
    ) -> Float[Array, "step source"]:
        """``weights[t, s]``: how much the batch of step ``s`` moves the loss at step ``t``.

        Args:
            values: hyperparameters.
            step_size: relative to the largest recorded one.
        """
        momentum = jnp.asarray(self.momentum if self.momentum is not None else values["momentum"])
        fixed = self.step_size_power
        power = values["step_size_power"] if fixed is None else jnp.asarray(fixed)
        steps = jnp.arange(1, len(step_size) + 1)
        lag = steps[:, None] - steps[None, :]
        memory = jnp.where(lag >= 0, momentum ** jnp.maximum(lag, 0), 0.0)
        memory = (1.0 - momentum) * memory / (1.0 - momentum**steps)[:, None]
        return (step_size + FLOOR)[:, None] ** power * memory
