"""Classification of a text or of a pair of texts by a fresh head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks import network as networks
from bayes_simfluence.networks.heads import Pooling, check_pooling, head_logits, with_head
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.measures import chosen, measures
from bayes_simfluence.tasks.pretrained import Pretrained
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled
from bayes_simfluence.tasks.tokens import Examples, Texts, tokenized
from bayes_simfluence.tasks.tuned import tuned_task
from bayes_simfluence.tuning.tunings import FULL, Tuning

__all__ = ["classification_task", "codes_of"]


def classification_task(
    model: Pretrained,
    train: Rows,
    query: Rows,
    *,
    labels: Sequence[str],
    key: jax.Array,
    prompt: str = "{text}",
    pair_field: str = "",
    label_field: str = "label",
    pooling: Pooling = "mean",
    max_tokens: int = 128,
    metrics: Sequence[str] = (),
    tuning: Tuning = FULL,
) -> Task:
    """Fine-tuning with a head of one logit per label; the loss is the cross-entropy.

    Args:
        labels: the label words; their order is that of the head's outputs.
        key: decides the head's initial weights.
        prompt: template of the text.
        pair_field: field of a second text, none when empty.
        metrics: of ``accuracy`` (0 or 1) and ``margin`` (nats).
        tuning: what is trained.

    Raises:
        Misuse: rows, labels, pooling or metrics that do not fit.
    """
    rows = {"train": train, "query": query}
    codes = {name: codes_of(one, labels, label_field, name) for name, one in rows.items()}
    check_pooling(model.network, model.tensors, pooling)
    texts = {
        name: Texts(
            one.places,
            filled(one, prompt, "prompt"),
            one.column(pair_field, "pair_field") if pair_field else None,
        )
        for name, one in rows.items()
    }

    def outputs(weights: Tensors, example: Examples) -> Float[Array, " label"]:
        sequence = networks.Sequence(example["tokens"], example["segments"], example["attended"])
        return head_logits(model.network, weights, sequence, pooling)

    def output_loss(logits: Float[Array, " label"], example: Examples) -> Float[Array, ""]:
        return -jax.nn.log_softmax(logits)[example["label"]]

    def loss(weights: Tensors, example: Examples) -> Float[Array, ""]:
        return output_loss(outputs(weights, example), example)

    def scores(
        weights: Tensors, example: Examples
    ) -> tuple[Float[Array, " label"], Int[Array, ""]]:
        return outputs(weights, example), example["label"]

    known = chosen(metrics, measures(scores))
    arrays, said = tokenized(model, texts, max_tokens)
    return tuned_task(
        model,
        with_head(model.tensors, model.network, len(labels), key),
        tuning=tuning,
        key=key,
        loss=loss,
        examples={name: {**one, "label": codes[name]} for name, one in arrays.items()},
        rows=rows,
        metrics=known,
        scores={},
        provenance={"task": "classification", "labels": list(labels), **said},
        parts={"outputs": outputs, "output_loss": output_loss},
    )


def codes_of(
    rows: Rows, labels: Sequence[str], label_field: str, name: str
) -> Int[Array, " example"]:
    """Each row's label as its place among ``labels``.

    Raises:
        Misuse: fewer than two labels, or a label that is not among them.
    """
    if len(set(labels)) < max(2, len(labels)):
        raise Misuse(
            "labels",
            got=shorten(labels) or "none",
            expected="two or more, each once",
            do="check the label field of the train file (--label-field)",
        )
    codes = {label: code for code, label in enumerate(labels)}
    found = rows.column(label_field, "label_field")
    for at, label in enumerate(found):
        if label not in codes:
            raise Misuse(
                f"{name} label, {rows.where(at)} field {label_field!r}",
                got=label,
                expected=f"one of {shorten(codes, 20)}",
                do="correct the label, or add an example of it to the train file",
            )
    return jnp.asarray([codes[one] for one in found])
