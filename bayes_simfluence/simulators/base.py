"""Simulated runs: what every simulator takes and gives.

A simulator is free-running: of the run to be simulated it sees the curriculum and the losses
before the first update, nothing else; later losses only where it is asked to condition on them
(``simulate_observed``). Arrays inside; ``Posterior.simulate`` puts names on them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float

from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays

Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]
"""Arrays with the names of their dimensions."""

CHUNK = 64
"""Draws rolled out at once, so that memory for intermediate arrays does not grow with draws."""

RUN_COUNTS_AS = 4.0
"""Independent points that a run counts as where something is learned from several of them: its
errors are much alike."""


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
        return None

    @property
    def coupled(self) -> bool:
        """Whether recorded runs' residuals are part of what it takes (``model.coupling``)."""
        return False

    @property
    def has_effects(self) -> bool:
        """Whether ``a`` and ``b`` among its samples are changes of the loss, 0 for no effect."""
        return True

    @property
    def by_features(self) -> "FeatureSimulator | None":
        """This simulator, where it can tell of examples and queries that were not fitted."""
        return None

    @property
    def by_observed(self) -> "ObservedSimulator | None":
        """This simulator, where it can tell of runs some losses of which were observed."""
        return None

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Trajectories; the same key gives the same draws of the coefficients to any runs."""

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Draws of what was inferred: name -> (dimensions from chain, draw on, values)."""

    def log_likelihood(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> Float[np.ndarray, "chain draw run step query"] | None:
        """Log density (natural log, per nat) of each loss given its run's earlier ones.

        Given the coefficients that ``samples(key=key, draws=draws)`` has in the same draw, so that
        the sum over steps is the log density of the run. NaN where the loss is NaN (not recorded)
        and at steps that the simulator has no density for; None when it has none at all.
        """
        return None

    def arrays(self) -> Named:
        """What to save: name -> (dimensions, values)."""

    def settings(self) -> dict[str, Any]:
        """Plain values to save."""
        return {}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> "Simulator":
        """The simulator of saved ``arrays()`` and ``settings()``."""
        return cls(**{**arrays, **settings})


class FeatureSimulator(Simulator, Protocol):
    """A simulator that knows examples and queries by their features, and so others than its own."""

    @property
    def features(self) -> ExampleFeatures:
        """Of the fitted examples and queries; without columns where queries have none."""

    def with_examples(self, train: Float[np.ndarray, "new feature"]) -> Simulator:
        """The same posterior with further training examples after the fitted ones."""

    def for_queries(self, query: Float[np.ndarray, "new feature"]) -> Simulator:
        """The posterior of queries that were never recorded, in the order of their features."""


class ObservedSimulator(Simulator, Protocol):
    """A simulator that conditions simulated runs on some of their own losses."""

    def simulate_observed(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Trajectories given the losses that ``runs`` have after time 0, of which there are some.

        The draws of ``simulate`` under the same key, moved.
        """


def resampled(
    residual: Float[np.ndarray, "fitted recorded known"],
    runs: RunArrays,
    *,
    key: jax.Array,
    draws: int,
) -> Float[np.ndarray, "draw run time query"]:
    """Whole residual trajectories of fitted runs, drawn with replacement for each draw and run."""
    which = jax.random.randint(key, (draws, len(runs.batch)), 0, len(residual))
    times = np.minimum(np.arange(runs.steps + 1), residual.shape[1] - 1)
    return residual[np.asarray(which)][:, :, times][..., runs.query]
