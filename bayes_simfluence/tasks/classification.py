"""Classification of a text or of a pair of texts by a fresh head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.heads import Pooling, check_pooling, head_logits, with_head
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled
from bayes_simfluence.tasks.tokens import Examples, Texts, sequence_of, tokenized
from bayes_simfluence.tasks.tuned import Prepared, label_task
from bayes_simfluence.tuning.base import Tuning
from bayes_simfluence.tuning.tunings import FULL


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
    codes = {name: codes_of(file, labels, label_field, name) for name, file in rows.items()}
    check_pooling(model.network, model.tensors, pooling)
    texts = {
        name: Texts(
            file.places,
            filled(file, prompt, "prompt"),
            file.column(pair_field, "pair_field") if pair_field else None,
        )
        for name, file in rows.items()
    }
    arrays, lengths = tokenized(model, texts, max_tokens)
    tensors = with_head(model.tensors, model.network, len(labels), key)
    examples = {name: {**arrays[name], "label": codes[name]} for name in rows}
    provenance = {"task": "classification", "labels": list(labels), **lengths}
    prepared = Prepared(model, tensors, tuning, key, rows, examples, metrics, provenance)
    network = model.network  # alone: the losses outlive the tensors

    def logits(weights: Tensors, example: Examples) -> Float[Array, " label"]:
        return head_logits(network, weights, sequence_of(example), pooling)

    return label_task(prepared, logits)


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
    words = rows.column(label_field, "label_field")
    for at, label in enumerate(words):
        if label not in codes:
            raise Misuse(
                f"{name} label, {rows.where(at)} field {label_field!r}",
                got=label,
                expected=f"one of {shorten(codes, 20)}",
                do="correct the label, or add an example of it to the train file",
            )
    return jnp.asarray([codes[label] for label in words])
