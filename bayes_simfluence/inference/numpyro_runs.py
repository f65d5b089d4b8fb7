"""Recorded runs and a model as a NumPyro program, ready for a sampler or a guide."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.gaussian.designs import designs_and_means, mean_size, stacked_paths
from bayes_simfluence.gaussian.search import even_rows
from bayes_simfluence.inference.recorded import Recorded, features_of
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.link import link_of
from bayes_simfluence.model.numpyro_model import Gaps, Observed, Units, filterable, gaps_of
from bayes_simfluence.model.priors import ExampleFeatures
from bayes_simfluence.model.simfluence import Path, Simfluence, hypers_of
from bayes_simfluence.simulators.sampled import SampledSimulator

__all__ = ["LIMIT", "Program", "program_of"]

SPREAD_ROWS = 12
"""Times of a run at which the size of effects is measured."""
LIMIT = 1 << 30
"""Bytes of draws that a posterior holds at most; more are thinned while they are made."""


@dataclass(frozen=True)
class Program:
    """A model of certain runs.

    Attributes:
        model: what is inferred.
        observed: the runs; in double precision.
        gaps: how losses that were not recorded are dealt with.
        recorded: steps of a run.
        largest_step_size: what step sizes were divided by; None when they were not recorded.
    """

    model: Simfluence
    observed: Observed
    gaps: Gaps
    recorded: int
    largest_step_size: float | None

    @property
    def runs(self) -> int:
        """Runs, or transitions."""
        return len(self.observed.linked)

    def by_transition(self) -> "Program":
        """Each step as a run of its own, where a loss depends on the last one alone; else itself.

        The density of independent runs of one step is that of the whole runs, so minibatches of
        runs become minibatches of transitions.
        """
        linked = self.observed.linked
        independent = self.model.markov and self.model.error.independent_steps
        if not (independent and bool(jnp.isfinite(linked).all())):
            return self
        pairs = jnp.stack([linked[:, :-1], linked[:, 1:]], axis=2)
        steps = pairs.shape[0] * pairs.shape[1]
        paths = jax.tree.map(lambda one: one.reshape(steps, 1, *one.shape[2:]), self.observed.paths)
        apart = self.observed._replace(paths=paths, linked=pairs.reshape(steps, 2, pairs.shape[3]))
        gaps = gaps_of(self.model, np.asarray(apart.linked))
        return replace(self, observed=apart, gaps=gaps)

    def simulator(self, sites: Mapping[str, np.ndarray]) -> SampledSimulator:
        """Draws, leading axes (chain, draw), as a simulator."""
        return SampledSimulator(
            model=self.model,
            sites=sites,
            units=self.observed.units,
            features=self.observed.features,
            recorded=self.recorded,
            largest_step_size=self.largest_step_size,
            missing=self.gaps.imputed,
        )

    def bytes_of_a_draw(self) -> int:
        """Memory that one draw's sites take in single precision."""
        _, train = self.observed.paths.exposure.shape[1:]
        queries = self.observed.linked.shape[2]
        knots = self.model.coefficients.count(1.0)
        parts = len(self.model.parts) * knots if self.model.additive else 0
        effects = queries * train * (parts + int(self.model.multiplicative))
        return 4 * (effects + len(self.gaps.imputed) + 8 * queries + 64)


def program_of(runs: Recorded, model: Simfluence, method: str) -> Program:
    """The program of ``model`` for ``runs``; call in double precision.

    Raises:
        Misuse: a combination of parts that no density is known of.
    """
    hidden = model.multiplicative and model.error.hides_state
    if hidden and not filterable(model):
        raise Misuse(
            f"{method}: the model",
            got="observation noise and multiplicative terms with a memory longer than one step "
            "or a run effect",
            expected="Gaussian(observation=True) with Exposure.memoryless() and a published kind, "
            "or without multiplicative terms",
            do="leave one of them out",
        )
    relative, largest = runs.relative_step_size()
    paths = stacked_paths(runs.batch, relative, runs.train, runs.batch.shape[1])
    linked = np.asarray(link_of(model.link, jnp.asarray(runs.loss)))
    features = features_of(runs, model)
    units = Units(_reference(linked), _spread(model, paths, features))
    return Program(
        model=model,
        observed=Observed(paths, jnp.asarray(linked), units, features),
        gaps=gaps_of(model, linked),
        recorded=int(runs.batch.shape[1]),
        largest_step_size=largest,
    )


def _reference(linked: Float[np.ndarray, "run time query"]) -> Array:
    return jnp.asarray(np.maximum(np.sqrt(np.square(linked[:, 0]).mean(axis=0)), 1e-3))


def _spread(model: Simfluence, paths: Path, features: ExampleFeatures) -> Array:
    """Sd along the runs of effects with unit coefficients, hyperparameters at their centre."""
    if model.published:
        return jnp.ones(())
    hypers = hypers_of(model, features)
    values = natural_values(hypers, jnp.asarray(start(hypers)))
    steps = paths.progress.shape[1]
    rows = jnp.asarray(even_rows(steps, SPREAD_ROWS))
    designs, _ = designs_and_means(
        model, values, paths, features, rows, knots=model.coefficients.count(1.0)
    )
    return mean_size(designs)
