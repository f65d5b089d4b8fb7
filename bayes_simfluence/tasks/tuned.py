"""A task from a network's tensors: which of them train, and which stay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.measures import Measure
from bayes_simfluence.tasks.pretrained import Pretrained
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.tokens import filled_lengths, shortened
from bayes_simfluence.tuning.tunings import Tuning

__all__ = ["tuned_task"]


def tuned_task(
    model: Pretrained,
    tensors: Tensors,
    *,
    tuning: Tuning,
    key: jax.Array,
    loss: Measure,
    examples: Mapping[str, Any],
    rows: Mapping[str, Rows],
    metrics: Mapping[str, Measure],
    scores: Mapping[str, Callable[[Any], Any]],
    provenance: Mapping[str, Any],
    parts: Mapping[str, Callable[..., Any]],
) -> Task:
    """The task of a network's tensors, its head's among them.

    Args:
        tuning: what is trained.
        key: decides the initial weights of adapters.
        examples, rows: of ``train`` and ``query``.
        parts: ``outputs``, ``output_loss`` and ``output_draw`` of the task.
    """
    tuned = tuning.begin(tensors, family=model.network.family, key=jax.random.fold_in(key, 1))
    return Task(
        params=tuned.params,
        frozen=tuned.frozen,
        assemble=tuned.assemble,
        loss=loss,
        train=examples["train"],
        query=examples["query"],
        train_ids=list(rows["train"].ids),
        query_ids=list(rows["query"].ids),
        metrics=dict(metrics),
        scores=dict(scores),
        query_lengths=filled_lengths(examples["query"]),
        cut=shortened,
        provenance={"model": model.name, "tuning": tuned.as_dict(), **provenance},
        **parts,
    )
