"""What every inference method takes and gives."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.progress import Progress
from bayes_simfluence.simulators.base import Simulator


class LeftOutRuns(NamedTuple):
    """Simulations of fitted runs by fits without them, nats; NaN where they were not recorded.

    Attributes:
        time: at which times.
        predicted: medians (points for a point method).
        low, high: 90% band; None for a point method without a band.
    """

    time: np.ndarray
    predicted: Float[np.ndarray, "run time query"]
    low: Float[np.ndarray, "run time query"] | None = None
    high: Float[np.ndarray, "run time query"] | None = None


QUANTILE_90 = 1.6449


def sd_of_band(low: Float[np.ndarray, "*shape"], high: Float[np.ndarray, "*shape"]) -> np.ndarray:
    """Sd of normal predictions with the 90% band ``low`` to ``high``."""
    return (high - low) / (2.0 * QUANTILE_90)


@dataclass(frozen=True)
class Fitted:
    """What a method returns; ``fit`` makes the ``Posterior`` of it.

    Attributes:
        simulator, verdict: what was learned, and how it went.
        left_out: fitted runs as predicted without them, where the method made such predictions.
        sample_stats: of a sampler's draws, variables ``(chain, draw)`` with ArviZ's names.
        losses: of every step of a stochastic search, where there was one.
        has_prior: whether the model's priors were used, so that draws from them mean something.
    """

    simulator: Simulator
    verdict: Verdict
    left_out: LeftOutRuns | None = None
    sample_stats: xr.Dataset | None = None
    losses: Float[np.ndarray, " step"] | None = None
    has_prior: bool = True


class FitContext(NamedTuple):
    """What a fit is given besides runs and model.

    Attributes:
        key: decides whatever a method draws.
        validation: further runs, for methods that choose settings on them.
        progress: told of the work.
    """

    key: jax.Array
    validation: RunArrays | None
    progress: Progress


@runtime_checkable
class Method(Protocol):
    """A way of inferring a model from recorded runs."""

    def default_model(self) -> Simfluence:
        """The model fitted when the caller names none."""

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """Fit ``model`` to ``runs``; raises ``Misuse`` for a model that it cannot take."""

    def as_dict(self) -> dict[str, Any]:
        """The method's name and settings as plain values."""
