"""A simulator that does not look at curricula: every run goes the way that runs go on average."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.simulators.base import Named, Simulated, Simulator, resampled


@dataclass(frozen=True)
class MeanSimulator(Simulator):
    """One trajectory for all runs, and whole residuals of left-out runs as its band.

    Resampled residuals have no density.

    Attributes:
        change: mean change of the loss since time 0, nats.
        residual: true minus simulated losses of left-out runs.
    """

    name: ClassVar[str] = "mean"
    change: Float[np.ndarray, "time query"]
    residual: Float[np.ndarray, "fitted time query"]

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """The mean change on top of each run's initial losses."""
        times = runs.steps + 1
        if times > len(self.change):
            raise Misuse(
                "runs to simulate",
                got=f"{times - 1} steps",
                expected=f"at most the {len(self.change) - 1} steps of the fitted runs",
                do="cut the curricula; a mean trajectory says nothing beyond its end",
            )
        loss = runs.initial[:, None] + self.change[:times][None, :, runs.query]
        mean = np.broadcast_to(loss[None], (draws, *loss.shape)).astype(np.float32)
        noise = resampled(self.residual, runs, key=key, draws=draws)
        return Simulated(mean[None], (mean + noise).astype(np.float32)[None])

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """The one trajectory there is."""
        return {"change": (("chain", "draw", "time", "query"), self.change[None, None])}

    def arrays(self) -> Named:
        """Mean change and residuals."""
        return {
            "change": (("time", "query"), self.change),
            "residual": (("fitted", "time", "query"), self.residual),
        }
