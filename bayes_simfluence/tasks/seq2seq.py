"""Texts from texts by an encoder-decoder (T5): texts of labels and their ranking, or any text."""

from collections.abc import Mapping, Sequence

import jax
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.classification import codes_of
from bayes_simfluence.tasks.generation import answers
from bayes_simfluence.tasks.likelihood import mean_nats, target_logits
from bayes_simfluence.tasks.measures import margin, measures
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled
from bayes_simfluence.tasks.tokens import Examples, Texts, sequence_of, targets_of, tokenized
from bayes_simfluence.tasks.tuned import Logits, Prepared, Target, target_task
from bayes_simfluence.tuning.base import Tuning
from bayes_simfluence.tuning.tunings import FULL


def seq2seq_task(
    model: Pretrained,
    train: Rows,
    query: Rows,
    *,
    key: jax.Array,
    prompt: str = "{text}",
    completion: str = "",
    labels: Mapping[str, str] | None = None,
    label_field: str = "label",
    max_tokens: int = 128,
    metrics: Sequence[str] = (),
    new_tokens: int = 32,
    tuning: Tuning = FULL,
) -> Task:
    """Fine-tuning of an encoder-decoder; the loss is the mean cross-entropy of the target's tokens.

    The target is the text of the row's label, or any text. With labels the prediction is the
    label text of lowest loss (rank classification).

    Args:
        key: decides the initial weights of adapters.
        prompt: template of the source text.
        completion: template of the target text; or
        labels: the label words and the text of each.
        metrics: of ``accuracy`` (0 or 1), ``margin`` (nats per token; both with labels only),
            ``bleu`` and ``rouge_l``.
        new_tokens: most tokens generated for ``bleu`` and ``rouge_l``.
        tuning: what is trained.

    Raises:
        Misuse: a network that is no encoder-decoder, rows, labels or metrics that do not fit.
    """
    _check(model, completion, labels)
    rows, words = {"train": train, "query": query}, dict(labels or {})
    codes = {name: codes_of(rows[name], list(words), label_field, name) for name in rows if words}
    texts = {
        name: [list(words.values())[int(code)] for code in codes[name]]
        if words
        else filled(file, completion, "completion")
        for name, file in rows.items()
    }
    sources = {
        name: Texts(file.places, filled(file, prompt, "prompt")) for name, file in rows.items()
    }
    targets = {name: Texts(file.places, texts[name]) for name, file in rows.items()}
    arrays, lengths = tokenized(model, sources, max_tokens)
    if words:
        places = [f"text of label {label!r}" for label in words]
        targets = {"labels": Texts(places, list(words.values())), **targets}
    answered, target_lengths = targets_of(model, targets, max_tokens)
    _different(words, answered)
    examples = {
        name: {**arrays[name], **answered[name], **({"label": codes[name]} if words else {})}
        for name in rows
    }
    written = {"labels": words} if words else {"completion": completion}
    provenance = {"task": "seq2seq", "prompt": prompt, **written, **lengths, **target_lengths}
    prepared = Prepared(model, model.tensors, tuning, key, rows, examples, metrics, provenance)
    network = model.network  # alone: the losses outlive the tensors

    def logits(weights: Tensors, example: Examples) -> Logits:
        return target_logits(network, weights, sequence_of(example), example["target"])

    def margin_of_labels(weights: Tensors, example: Examples) -> Float[Array, ""]:
        def loss_of(answer: Examples) -> Float[Array, ""]:
            return mean_nats(logits(weights, {**example, **answer}), *_target(answer))

        return margin(-jax.vmap(loss_of)(answered["labels"]), example["label"])

    return target_task(
        prepared,
        logits,
        _target,
        measured=measures(margin_of_labels) if words else {},
        writer=lambda: answers(model, sequence_of(examples["query"]), new_tokens),
        references=[text.strip() for text in texts["query"]],
    )


def _target(example: Examples) -> Target:
    return example["target"], example["counted"]


def _check(model: Pretrained, completion: str, labels: Mapping[str, str] | None) -> None:
    network = model.network
    if network.kind != "encoder-decoder" or network.start_token is None:
        raise Misuse(
            "task",
            got=f"'seq2seq' with {model.name} of the family {network.family} ({network.kind})",
            expected="an encoder-decoder with a decoder_start_token_id",
            do="choose another --checkpoint, or another --task",
        )
    if bool(completion) == bool(labels):
        raise Misuse(
            "completion",
            got="both it and labels" if labels else "neither it nor labels",
            expected="the template of the target text, or the texts of labels",
            do="give one of the two",
        )


def _different(labels: Mapping[str, str], targets: Mapping[str, Examples]) -> None:
    tokens = [tuple(row) for row in targets["labels"]["target"].tolist()] if labels else []
    repeated = [
        f"{label}={text}"
        for (label, text), row in zip(labels.items(), tokens, strict=True)
        if tokens.count(row) > 1
    ]
    if repeated:
        raise Misuse(
            "label_texts",
            got=f"the same tokens for {shorten(repeated)}",
            expected="texts that the tokenizer tells apart",
            do="correct --label-texts, as in '0=negative,1=positive'",
        )
