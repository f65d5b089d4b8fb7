"""Multiple choice (COPA): one score for each option of a row, cross-entropy over the options.

An encoder reads prompt and option as a pair of texts, and a head of one logit scores it. A decoder
or an encoder-decoder needs no head: an option's score is its mean log-likelihood per token after
the prompt (Brown et al. 2020, 2.4; the loss is L_LN of Liu et al. 2022, eq. 3).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks import network as networks
from bayes_simfluence.networks.heads import Pooling, check_pooling, head_logits, with_head
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.completions import Completions, completed
from bayes_simfluence.tasks.likelihood import completion_logits, mean_nats, target_logits
from bayes_simfluence.tasks.measures import chosen, measures
from bayes_simfluence.tasks.pretrained import Pretrained
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled
from bayes_simfluence.tasks.tokens import Examples, Texts, targets_of, tokenized
from bayes_simfluence.tasks.tuned import tuned_task
from bayes_simfluence.tuning.tunings import FULL, Tuning

__all__ = ["choice_task"]

FILES = ("train", "query")


def choice_task(
    model: Pretrained,
    train: Rows,
    query: Rows,
    *,
    options: Sequence[str],
    key: jax.Array,
    prompt: str = "{text}",
    label_field: str = "label",
    pooling: Pooling = "mean",
    max_tokens: int = 128,
    metrics: Sequence[str] = (),
    tuning: Tuning = FULL,
) -> Task:
    """Fine-tuning to pick the right one of each row's options.

    Args:
        options: the fields of the options, or a template for each.
        key: decides the initial weights of an encoder's head.
        prompt: template of what comes before an option.
        label_field: place of the right option, from 0.
        metrics: of ``accuracy`` (0 or 1) and ``margin`` (nats).
        tuning: what is trained.

    Raises:
        Misuse: rows, options, pooling or metrics that do not fit.
    """
    rows = dict(zip(FILES, (train, query), strict=True))
    texts = {name: _texts(one, options) for name, one in rows.items()}
    labels = {name: _right(one, texts[name], label_field) for name, one in rows.items()}
    prompts = {name: filled(one, prompt, "prompt") for name, one in rows.items()}
    tensors = model.tensors
    if model.network.kind == "encoder":
        check_pooling(model.network, tensors, pooling)
        tensors = with_head(tensors, model.network, 1, key)
        scorer = _by_head(model, pooling)
    else:
        scorer = _by_decoder(model) if model.network.kind == "decoder" else _by_answer(model)

    def scores(
        weights: Tensors, example: Examples
    ) -> tuple[Float[Array, " option"], Int[Array, ""]]:
        def score(option: Examples) -> Float[Array, ""]:
            return scorer.score(weights, example, option)

        return jax.vmap(score)(scorer.of(example)), example["label"]

    def loss(weights: Tensors, example: Examples) -> Float[Array, ""]:
        found, right = scores(weights, example)
        return -jax.nn.log_softmax(found)[right]

    def outputs(weights: Tensors, example: Examples) -> Float[Array, " option"]:
        # One option after the other: who watches the network's layers sees arrays, no ``vmap``.
        found = [
            jax.tree.map(lambda leaf, at=at: leaf[at], scorer.of(example))
            for at in range(len(options))
        ]
        return jnp.stack([scorer.score(weights, example, option) for option in found])

    def output_loss(found: Float[Array, " option"], example: Examples) -> Float[Array, ""]:
        return -jax.nn.log_softmax(found)[example["label"]]

    known = chosen(metrics, measures(scores))
    arrays, said = _arrays(model, rows, prompts, texts, max_tokens)
    return tuned_task(
        model,
        tensors,
        tuning=tuning,
        key=key,
        loss=loss,
        examples={name: {**one, "label": labels[name]} for name, one in arrays.items()},
        rows=rows,
        metrics=known,
        scores={},
        provenance={"task": "choice", "options": list(options), **said},
        parts={"outputs": outputs, "output_loss": output_loss},
    )


class _Scorer(NamedTuple):
    """``score(weights, example, option)``, where an option has the leaves of those names."""

    leaves: tuple[str, ...]
    score: Callable[[Tensors, Examples, Examples], Float[Array, ""]]

    def of(self, example: Examples) -> Examples:
        return {name: example[name] for name in self.leaves}


def _by_head(model: Pretrained, pooling: Pooling) -> _Scorer:
    def score(weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        sequence = networks.Sequence(option["tokens"], option["segments"], option["attended"])
        return head_logits(model.network, weights, sequence, pooling)[0]

    return _Scorer(("tokens", "segments", "attended"), score)


def _by_decoder(model: Pretrained) -> _Scorer:
    def score(weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        tokens = option["tokens"]
        logits = completion_logits(model.network, weights, tokens, option["attended"])
        return -mean_nats(logits, tokens[1:], option["target"][1:])

    return _Scorer(("tokens", "attended", "target"), score)


def _by_answer(model: Pretrained) -> _Scorer:
    def score(weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        source = networks.Sequence(example["tokens"], example["segments"], example["attended"])
        logits = target_logits(model.network, weights, source, option["target"])
        return -mean_nats(logits, option["target"], option["counted"])

    return _Scorer(("target", "counted"), score)


def _arrays(
    model: Pretrained,
    rows: dict[str, Rows],
    prompts: dict[str, list[str]],
    texts: dict[str, list[list[str]]],
    max_tokens: int,
) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Arrays of one row per example, with an axis of options where a leaf has one."""
    count = len(texts["train"][0])
    where = {
        name: [place for place in one.places for _ in range(count)] for name, one in rows.items()
    }
    flat = {name: [text for one in found for text in one] for name, found in texts.items()}
    twice = {
        name: [text for text in found for _ in range(count)] for name, found in prompts.items()
    }
    if model.network.kind == "encoder":
        arrays, said = tokenized(
            model, {one: Texts(where[one], twice[one], flat[one]) for one in FILES}, max_tokens
        )
    elif model.network.kind == "decoder":
        files = {one: Completions(where[one], twice[one], flat[one]) for one in FILES}
        arrays, said = completed(model, files, max_tokens, end=False)
    else:
        sources = {one: Texts(rows[one].places, prompts[one]) for one in FILES}
        arrays, said = tokenized(model, sources, max_tokens)
        targets, more = targets_of(
            model, {one: Texts(where[one], flat[one]) for one in FILES}, max_tokens
        )
        by_row = {one: _by_row(found, count) for one, found in targets.items()}
        return {one: {**arrays[one], **by_row[one]} for one in FILES}, {**said, **more}
    return {name: _by_row(one, count) for name, one in arrays.items()}, said


def _by_row(examples: Examples, count: int) -> Examples:
    return {name: leaf.reshape(-1, count, *leaf.shape[1:]) for name, leaf in examples.items()}


def _texts(rows: Rows, options: Sequence[str]) -> list[list[str]]:
    if len(options) < 2:
        raise Misuse(
            "choices_fields",
            got=shorten(options) or "none",
            expected="two or more fields or templates",
            do="name the fields of the options, as --choices-fields choice1,choice2",
        )
    columns = [
        filled(rows, one if "{" in one else f"{{{one}}}", "choices_fields") for one in options
    ]
    return [list(one) for one in zip(*columns, strict=True)]


def _right(rows: Rows, texts: list[list[str]], label_field: str) -> Int[Array, " example"]:
    found = []
    for at, label in enumerate(rows.column(label_field, "label_field")):
        options = texts[at]
        if not (label.isascii() and label.isdigit() and int(label) < len(options)):
            raise Misuse(
                f"{rows.where(at)} field {label_field!r}",
                got=label,
                expected=f"the place of the right option, 0 to {len(options) - 1}",
                do="correct the label, or name its field with --label-field",
            )
        if options.count(options[int(label)]) > 1:
            raise Misuse(
                rows.where(at),
                got=f"the right option {options[int(label)]!r} more than once",
                expected="options that differ from the right one",
                do="correct the row, or --choices-fields",
            )
        found.append(int(label))
    return jnp.asarray(found)
