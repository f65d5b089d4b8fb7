"""No runs at all: the prior is the posterior, and a simulator is made of it."""

from dataclasses import replace

import numpy as np

from bayes_simfluence.inference.method import Fitted
from bayes_simfluence.inference.numpyro_runs import in_numpyro
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.simulators.prior import PriorSimulator

SENTENCE = (
    "No runs: everything is the prior, hyperparameters too, and bands are as wide as that is. "
    "Record runs to learn from."
)
TYPICAL_LOSS = 1.0
"""Nats; stands for losses before training that are not known, in the unit of multiplicative terms
under scales per query."""


def from_prior(plan: RunArrays, model: Simfluence) -> Fitted:
    """The prior of ``model`` as what a method returns.

    Args:
        plan: planned runs, if there are any: their curricula, step sizes and losses before training
            say what a scale means. Without, batches are drawn evenly from the examples.
        model: its effects are taken as additive, since nothing is known of how well examples are
            known before they are trained on.
    """
    model = replace(model, coupling="none")
    known = plan if len(plan.batch) else _typical(plan)
    initial = np.where(np.isfinite(known.initial), known.initial, TYPICAL_LOSS)
    # Later losses say nothing here; what is missing would only become sites of its own.
    known = known._replace(loss=np.repeat(initial[:, None], known.steps + 1, axis=1))
    with double_precision():
        made = in_numpyro(known, model, "prior")
    simulator = PriorSimulator(
        model, made.units, made.runs.features, known.steps, made.largest_step_size
    )
    notes = []
    if made.largest_step_size is None:
        notes.append(
            "Step sizes are ignored: none is known. Fit planned runs that have them "
            "(bs.planned_runs) to use them."
        )
    return Fitted(simulator, Verdict(False, SENTENCE, tuple(notes)))


def _typical(plan: RunArrays) -> RunArrays:
    """One run of batches drawn evenly, of as many steps and slots as no run of ``plan`` has."""
    rng = np.random.default_rng(0)
    _, steps, slots = plan.batch.shape
    enough = slots <= plan.train
    batch = [rng.choice(plan.train, slots, replace=not enough) for _ in range(steps)]
    loss = np.full((1, 1, plan.loss.shape[2]), TYPICAL_LOSS)
    return RunArrays.of(np.array([batch]), loss, features=plan.features)
