"""Simulated runs: what every simulator takes and gives.

A simulator is free-running: of the run to be simulated it sees the curriculum and the losses
before the first update, nothing else. Arrays inside; ``Posterior.simulate`` puts names on them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from bayes_simfluence.checks import Misuse

__all__ = [
    "CHUNK",
    "Named",
    "Planned",
    "Simulated",
    "Simulator",
    "relative_step_size",
    "resampled",
]

Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]
"""Arrays with the names of their dimensions."""

CHUNK = 64
"""Draws rolled out at once, so that memory for intermediate arrays does not grow with draws."""


class Planned(NamedTuple):
    """Runs to be simulated, of equal length.

    Attributes:
        batch: indices into the fitted runs' ``train``, -1 = empty slot.
        step_size: learning rates; None when the fitted runs have none.
        initial: losses before the first update, nats.
        query: positions of the queries among the fitted ones.
    """

    batch: Int[np.ndarray, "run step slot"]
    step_size: Float[np.ndarray, "run step"] | None
    initial: Float[np.ndarray, "run query"]
    query: Int[np.ndarray, " query"]


def relative_step_size(planned: Planned, largest: float | None) -> Float[np.ndarray, "run step"]:
    """Step sizes in units of the fitted runs' largest one; ones where those had none.

    Raises:
        Misuse: no step sizes, where the fitted runs have them.
    """
    if largest is None:
        return np.ones(planned.batch.shape[:2])
    if planned.step_size is None:
        raise Misuse(
            "runs to simulate",
            got="no step_size",
            expected="the step sizes that training would use, as the fitted runs have them",
            do="pass step_size=... to runs_from_arrays or planned_runs",
        )
    return planned.step_size / largest


class Simulated(NamedTuple):
    """Simulated losses in nats, time 0 first.

    Attributes:
        mean_loss: without the noise of a single run: its spread is what is not known of the
            coefficients.
        loss: predictive draws of a run's loss, noise included.
    """

    mean_loss: Float[np.ndarray, "chain draw run time query"]
    loss: Float[np.ndarray, "chain draw run time query"]


@runtime_checkable
class Simulator(Protocol):
    """What a fit leaves behind: everything needed to simulate a run, and to be saved."""

    name: ClassVar[str]
    """Under which saved posteriors find their class again."""

    @property
    def draws(self) -> int | None:
        """Draws that it holds; None = any number on request."""

    def simulate(self, planned: Planned, *, key: jax.Array, draws: int) -> Simulated:
        """Trajectories; the same key gives the same draws of the coefficients to any runs."""

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Draws of what was inferred: name -> (dimensions from chain, draw on, values)."""

    def log_likelihood(
        self,
        planned: Planned,
        loss: Float[np.ndarray, "run time query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> Float[np.ndarray, "chain draw run step query"] | None:
        """Log density (natural log, per nat) of each loss given its run's earlier ones.

        Given the coefficients that ``samples(key=key, draws=draws)`` has in the same draw, so that
        the sum over steps is the log density of the run. NaN where the loss is NaN (not recorded)
        and at steps that the simulator has no density for; None when it has none at all.
        """

    def arrays(self) -> Named:
        """What to save: name -> (dimensions, values)."""

    def settings(self) -> dict[str, Any]:
        """Plain values to save."""

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> "Simulator":
        """The simulator of saved arrays and settings."""


def resampled(
    residual: Float[np.ndarray, "fitted recorded known"],
    planned: Planned,
    *,
    key: jax.Array,
    draws: int,
) -> Float[np.ndarray, "draw run time query"]:
    """Whole residual paths of fitted runs, drawn with replacement for each draw and run."""
    runs, steps, _ = planned.batch.shape
    which = jax.random.randint(key, (draws, runs), 0, len(residual))
    times = np.minimum(np.arange(steps + 1), residual.shape[1] - 1)
    return residual[np.asarray(which)][:, :, times][..., planned.query]
