"""A task from a network, its tensors and examples of text, under one of two losses.

The loss is the cross-entropy either of a label among a score for each answer, or of the tokens of a
text that the network is to write.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.heads import HEAD, fresh_head
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.generation import Write, metrics_and_scores
from bayes_simfluence.tasks.likelihood import drawn_slopes, mean_nats, mean_residual
from bayes_simfluence.tasks.measures import Measure, chosen, margin, measures
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.tokens import Examples, filled_lengths, shortened
from bayes_simfluence.tuning.base import Tuning

Logits = Float[Array, "target vocabulary"]
Target = tuple[Int[Array, " target"], Bool[Array, " target"]]


@dataclass(frozen=True)
class Prepared:
    """Everything of a task but its loss.

    Attributes:
        model: the network and where it comes from.
        tensors: the network's tensors, its head's among them.
        tuning: what is trained.
        key: decides the initial weights of adapters.
        rows, examples: of ``train`` and ``query``.
        metrics: names of the metrics to record.
        provenance: the settings, for the store's attributes.
    """

    model: Pretrained
    tensors: Tensors
    tuning: Tuning
    key: jax.Array
    rows: Mapping[str, Rows]
    examples: Mapping[str, Examples]
    metrics: Sequence[str]
    provenance: Mapping[str, Any]

    def task(self, loss: Measure, **parts: Any) -> Task:
        """The task of this loss.

        Args:
            parts: ``outputs``, ``output_loss``, ``metrics`` and the like, as ``Task`` has them.
        """
        tuned = self.tuning.begin(
            self.tensors, family=self.model.network.family, key=jax.random.fold_in(self.key, 1)
        )
        return Task(
            params=tuned.params,
            frozen=tuned.frozen,
            assemble=tuned.assemble,
            loss=loss,
            train=self.examples["train"],
            query=self.examples["query"],
            train_ids=list(self.rows["train"].ids),
            query_ids=list(self.rows["query"].ids),
            query_lengths=filled_lengths(self.examples["query"]),
            cut=shortened,
            fresh=fresh_head if set(HEAD) <= set(tuned.params) else None,
            provenance={"model": self.model.name, "tuning": tuned.as_dict(), **self.provenance},
            **parts,
        )


def label_task(
    prepared: Prepared,
    scores: Callable[[Tensors, Examples], Float[Array, " answer"]],
    outputs: Callable[[Tensors, Examples], Float[Array, " answer"]] | None = None,
) -> Task:
    """The task of telling which answer is right, the one that ``example["label"]`` counts.

    Args:
        scores: a logit for each answer.
        outputs: the same logits for Gauss-Newton curvature, where they are computed otherwise.
    """

    def output_loss(logits: Float[Array, " answer"], example: Examples) -> Float[Array, ""]:
        return -jax.nn.log_softmax(logits)[example["label"]]

    def loss(weights: Tensors, example: Examples) -> Float[Array, ""]:
        return output_loss(scores(weights, example), example)

    measured = measures(lambda weights, example: margin(scores(weights, example), example["label"]))
    return prepared.task(
        loss,
        outputs=outputs or scores,
        output_loss=output_loss,
        metrics=chosen(prepared.metrics, measured),
    )


def target_task(
    prepared: Prepared,
    logits: Callable[[Tensors, Examples], Logits],
    target: Callable[[Examples], Target],
    *,
    measured: Mapping[str, Measure],
    writer: Callable[[], Write],
    references: Sequence[str],
) -> Task:
    """The task of writing a text; the loss is the mean over its tokens.

    Args:
        logits: those of each token of the target.
        target: its tokens, and which of them count.
        measured: metrics that the network computes.
        writer: makes what writes the queries' texts; asked only where texts are scored.
        references: the text that each query should have.
    """

    def output_loss(logits: Logits, example: Examples) -> Float[Array, ""]:
        return mean_nats(logits, *target(example))

    def output_draw(logits: Logits, example: Examples, key: jax.Array) -> Logits:
        return drawn_slopes(logits, target(example)[1], key)

    def output_residual(logits: Logits, example: Examples) -> Float[Array, ""]:
        return mean_residual(logits, *target(example))

    def loss(weights: Tensors, example: Examples) -> Float[Array, ""]:
        return output_loss(logits(weights, example), example)

    metrics, scores = metrics_and_scores(prepared.metrics, measured, writer, references)
    return prepared.task(
        loss,
        outputs=logits,
        output_loss=output_loss,
        output_draw=output_draw,
        output_residual=output_residual,
        metrics=metrics,
        scores=scores,
    )
