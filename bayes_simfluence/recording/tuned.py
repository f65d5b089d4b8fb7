"""A task from a network's tensors: which of them train, and which stay."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bayes_simfluence.networks.checkpoint import Tensors
from bayes_simfluence.recording.measures import Measure
from bayes_simfluence.recording.pretrained import Pretrained
from bayes_simfluence.recording.rows import Rows
from bayes_simfluence.recording.task import Task

__all__ = ["Tuning", "tuned_task"]


@runtime_checkable
class Tuning(Protocol):
    """Which parameters train: what ``begin`` gives has ``params``, ``frozen`` and ``assemble``."""

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Any:
        """The start of training from these tensors."""


def tuned_task(
    model: Pretrained,
    tensors: Tensors,
    *,
    tuning: Tuning | None,
    key: jax.Array,
    loss: Measure,
    examples: Mapping[str, Any],
    rows: Mapping[str, Rows],
    metrics: Mapping[str, Measure],
    scores: Mapping[str, Callable[[Any], Any]],
    provenance: Mapping[str, Any],
) -> Task:
    """The task of a network's tensors, its head's among them.

    Args:
        tuning: all floating tensors train when None.
        key: decides the initial weights of adapters.
        examples, rows: of ``train`` and ``query``.
    """
    floating = {
        name: value for name, value in tensors.items() if jnp.issubdtype(value.dtype, jnp.floating)
    }
    begun = tuning and tuning.begin(
        floating, family=model.network.family, key=jax.random.fold_in(key, 1)
    )
    name = "full" if tuning is None else type(tuning).__name__.lower()
    return Task(
        params=begun.params if begun else floating,
        frozen=begun.frozen if begun else None,
        assemble=begun.assemble if begun else None,
        loss=loss,
        train=examples["train"],
        query=examples["query"],
        train_ids=list(rows["train"].ids),
        query_ids=list(rows["query"].ids),
        metrics=dict(metrics),
        scores=dict(scores),
        provenance={"model": model.name, "tuning": name, **provenance},
    )
