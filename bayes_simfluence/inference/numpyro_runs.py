"""Recorded runs and a model in NumPyro, ready for a sampler or a guide."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.gaussian.designs import designs_and_means, mean_size
from bayes_simfluence.gaussian.search import even_rows
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.link import link_of
from bayes_simfluence.model.numpyro_model import Gaps, Units, filterable, gaps_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.sampled import SampledSimulator

SPREAD_ROWS = 12
"""Times of a run at which the size of effects is measured."""
LIMIT = 1 << 30
"""Bytes of draws that a posterior holds at most; more are thinned while they are made."""


@dataclass(frozen=True)
class NumpyroRuns:
    """A model of certain runs, in NumPyro.

    Attributes:
        model: what is inferred.
        runs: the runs, in units.
        units: of the queries' scales; in double precision.
        gaps: how losses that were not recorded are dealt with.
        largest_step_size: what step sizes were divided by; None when they were not recorded.
    """

    model: Simfluence
    runs: RunArrays
    units: Units
    gaps: Gaps
    largest_step_size: float | None

    @property
    def data(self) -> tuple[RunArrays, Units]:
        """What the model takes as arguments."""
        return self.runs, self.units

    def by_transition(self) -> "NumpyroRuns":
        """Each step as a run of its own, where a loss depends on the last one alone; else itself.

        The density of independent runs of one step is that of the whole runs, so minibatches of
        runs become minibatches of transitions.
        """
        loss = self.runs.loss
        independent = self.model.markov and self.model.error.independent_steps
        if not (independent and bool(np.isfinite(loss).all())):
            return self
        steps = self.runs.batch.shape[0] * self.runs.batch.shape[1]

        def apart(array: np.ndarray) -> np.ndarray:
            return array.reshape(steps, 1, *array.shape[2:])

        pairs = np.stack([loss[:, :-1], loss[:, 1:]], axis=2).reshape(steps, 2, loss.shape[2])
        transitions = self.runs._replace(
            batch=apart(self.runs.batch),
            weight=apart(self.runs.weight),
            step_size=apart(np.asarray(self.runs.step_size)),
            progress=apart(self.runs.progress),
            loss=pairs,
        )
        return replace(self, runs=transitions, gaps=gaps_of(self.model, pairs))

    def simulator(self, sites: Mapping[str, np.ndarray]) -> SampledSimulator:
        """Draws, leading axes (chain, draw), as a simulator."""
        return SampledSimulator(
            model=self.model,
            sites=sites,
            units=self.units,
            features=self.runs.features,
            recorded=self.runs.steps,
            largest_step_size=self.largest_step_size,
            missing=self.gaps.positions,
            fitted=self.runs.of_queries(np.zeros(0, int)) if self.model.coupled else None,
        )

    def bytes_of_a_draw(self) -> int:
        """Memory that one draw's sites take in single precision."""
        train, queries = self.runs.train, self.runs.loss.shape[2]
        knots = self.model.coefficients.count(1.0)
        parts = len(self.model.parts) * knots if self.model.has_additive else 0
        effects = queries * train * (parts + int(self.model.has_multiplicative))
        return 4 * (effects + len(self.gaps.imputed) + 8 * queries + 64)


def in_numpyro(runs: RunArrays, model: Simfluence, method: str) -> NumpyroRuns:
    """The NumPyro model of ``model`` for recorded ``runs``; call in double precision.

    Raises:
        Misuse: a combination of parts that no density is known of.
    """
    hidden = model.has_multiplicative and model.error.hides_state
    if hidden and not filterable(model):
        raise Misuse(
            f"{method}: the model",
            got="observation noise and multiplicative terms with a memory longer than one step "
            "or a run effect",
            expected="Gaussian(observation=True) with Exposure.memoryless() and "
            "scales='per-query', or without multiplicative terms",
            do="leave one of them out",
        )
    if not (model.gaussian and runs.residuals_known):
        # Examples of planned runs can be simulated by Gaussian models alone.
        model, runs = replace(model, coupling="none"), runs._replace(residual=None)
    largest = runs.largest_step_size
    features = runs.features.where(model.prior.features)
    runs = runs.in_units(runs.steps, largest)._replace(features=features)
    linked = np.asarray(link_of(model.link, jnp.asarray(runs.loss)))
    reference = jnp.asarray(np.maximum(np.sqrt(np.square(linked[:, 0]).mean(axis=0)), 1e-3))
    return NumpyroRuns(
        model=model,
        runs=runs,
        units=Units(reference, _spread(model, runs)),
        gaps=gaps_of(model, linked),
        largest_step_size=largest,
    )


def _spread(model: Simfluence, runs: RunArrays) -> Array:
    """Sd along the runs of effects with unit coefficients, hyperparameters at their centre."""
    if model.per_query:
        return jnp.ones(())
    hypers = hypers_of(model, runs.features)
    values = natural_values(hypers, jnp.asarray(start(hypers)))
    rows = jnp.asarray(even_rows(runs.steps, SPREAD_ROWS))
    if runs.residual is not None:
        # What a scale means must not depend on how fast examples were learned.
        counted = (runs.batch[:, 0] != EMPTY_SLOT) & (runs.weight[:, 0] > 0)
        first = runs.residual[:, 0].mean(where=counted) if counted.any() else 1.0
        runs = runs._replace(residual=np.full(runs.batch.shape, first))
    designs, _ = designs_and_means(model, values, runs, rows, knots=model.coefficients.count(1.0))
    return mean_size(designs)
