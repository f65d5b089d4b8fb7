"""Multiple choice (COPA): one score for each option of a row, cross-entropy over the options.

An encoder reads prompt and option as a pair of texts, and a head of one logit scores it. A decoder
or an encoder-decoder needs no head: an option's score is its mean log-likelihood per token after
the prompt (Brown et al. 2020, 2.4; the loss is L_LN of Liu et al. 2022, eq. 3).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.heads import Pooling, check_pooling, head_logits, with_head
from bayes_simfluence.networks.network import Kind
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.completions import Completions, completed
from bayes_simfluence.tasks.likelihood import completion_logits, mean_nats, target_logits
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled
from bayes_simfluence.tasks.tokens import Examples, Texts, sequence_of, targets_of, tokenized
from bayes_simfluence.tasks.tuned import Prepared, label_task
from bayes_simfluence.tuning.base import Tuning
from bayes_simfluence.tuning.tunings import FULL


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
    rows = {"train": train, "query": query}
    files = {
        name: _File(file.places, filled(file, prompt, "prompt"), _options(file, options))
        for name, file in rows.items()
    }
    labels = {name: _right(rows[name], file.options, label_field) for name, file in files.items()}
    scorer = _SCORERS[model.network.kind](model, pooling)
    tensors = scorer.tensors(key)
    arrays, lengths = scorer.arrays(files, max_tokens)
    examples = {name: {**arrays[name], "label": labels[name]} for name in rows}
    provenance = {"task": "choice", "options": list(options), **lengths}
    prepared = Prepared(model, tensors, tuning, key, rows, examples, metrics, provenance)
    scorer = replace(scorer, model=replace(model, tensors={}))  # the losses outlive the tensors

    def scores(weights: Tensors, example: Examples) -> Float[Array, " option"]:
        def score(option: Examples) -> Float[Array, ""]:
            return scorer.score(weights, example, option)

        return jax.vmap(score)(scorer.several(example))

    def one_by_one(weights: Tensors, example: Examples) -> Float[Array, " option"]:
        # Whoever watches the network's layers sees arrays of a single option, no ``vmap``.
        several = scorer.several(example)
        singles = [{name: leaf[at] for name, leaf in several.items()} for at in range(len(options))]
        return jnp.stack([scorer.score(weights, example, option) for option in singles])

    return label_task(prepared, scores, one_by_one)


@dataclass(frozen=True)
class _File:
    """Each row's place, prompt and options."""

    places: Sequence[str]
    prompts: Sequence[str]
    options: Sequence[Sequence[str]]

    @property
    def by_option(self) -> tuple[list[str], list[str], list[str]]:
        """The place, the prompt and the text of every option, one row after the other."""
        rows = zip(self.places, self.prompts, self.options, strict=True)
        places, prompts, texts = zip(
            *((place, prompt, text) for place, prompt, options in rows for text in options),
            strict=True,
        )
        return list(places), list(prompts), list(texts)

    def by_row(self, arrays: Examples) -> Examples:
        """Arrays of one entry per option, with an axis of rows before that of options."""
        count = len(self.options[0])
        return {name: leaf.reshape(-1, count, *leaf.shape[1:]) for name, leaf in arrays.items()}


Files = Mapping[str, _File]
Tokenized = tuple[dict[str, Examples], dict[str, Any]]
"""The arrays of every file, and the lengths of its texts for the provenance."""


@dataclass(frozen=True)
class _Scorer(ABC):
    """How one kind of network scores an option."""

    OF_OPTION: ClassVar[tuple[str, ...]]
    """Names of the arrays of an example that have an axis of options."""

    model: Pretrained
    pooling: Pooling

    @abstractmethod
    def arrays(self, files: Files, max_tokens: int) -> Tokenized:
        """Prompts and options as arrays."""

    @abstractmethod
    def score(self, weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        """The score of one option, nats."""

    def tensors(self, key: jax.Array) -> Tensors:
        """The network's tensors, with those of a head where one is needed."""
        return self.model.tensors

    def several(self, example: Examples) -> Examples:
        """The arrays of an example that have an axis of options."""
        return {name: example[name] for name in self.OF_OPTION}


class _ByHead(_Scorer):
    OF_OPTION = ("tokens", "segments", "attended")

    def tensors(self, key: jax.Array) -> Tensors:
        check_pooling(self.model.network, self.model.tensors, self.pooling)
        return with_head(self.model.tensors, self.model.network, 1, key)

    def arrays(self, files: Files, max_tokens: int) -> Tokenized:
        pairs = {name: Texts(*file.by_option) for name, file in files.items()}
        arrays, lengths = tokenized(self.model, pairs, max_tokens)
        return {name: file.by_row(arrays[name]) for name, file in files.items()}, lengths

    def score(self, weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        return head_logits(self.model.network, weights, sequence_of(option), self.pooling)[0]


class _ByCompletion(_Scorer):
    OF_OPTION = ("tokens", "attended", "target")

    def arrays(self, files: Files, max_tokens: int) -> Tokenized:
        texts = {name: Completions(*file.by_option) for name, file in files.items()}
        arrays, lengths = completed(self.model, texts, max_tokens, end=False)
        return {name: file.by_row(arrays[name]) for name, file in files.items()}, lengths

    def score(self, weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        tokens = option["tokens"]
        logits = completion_logits(self.model.network, weights, tokens, option["attended"])
        return -mean_nats(logits, tokens[1:], option["target"][1:])


class _ByAnswer(_Scorer):
    OF_OPTION = ("target", "counted")

    def arrays(self, files: Files, max_tokens: int) -> Tokenized:
        sources, answers = {}, {}
        for name, file in files.items():
            places, _, texts = file.by_option
            sources[name], answers[name] = Texts(file.places, file.prompts), Texts(places, texts)
        arrays, lengths = tokenized(self.model, sources, max_tokens)
        targets, target_lengths = targets_of(self.model, answers, max_tokens)
        for name, file in files.items():
            arrays[name] |= file.by_row(targets[name])
        return arrays, {**lengths, **target_lengths}

    def score(self, weights: Tensors, example: Examples, option: Examples) -> Float[Array, ""]:
        source = sequence_of(example)
        logits = target_logits(self.model.network, weights, source, option["target"])
        return -mean_nats(logits, option["target"], option["counted"])


_SCORERS: dict[Kind, type[_Scorer]] = {
    "encoder": _ByHead,
    "decoder": _ByCompletion,
    "encoder-decoder": _ByAnswer,
}


def _options(rows: Rows, options: Sequence[str]) -> list[list[str]]:
    if len(options) < 2:
        raise Misuse(
            "choices_fields",
            got=shorten(options) or "none",
            expected="two or more fields or templates",
            do="name the fields of the options, as --choices-fields choice1,choice2",
        )
    templates = [option if "{" in option else f"{{{option}}}" for option in options]
    columns = [filled(rows, template, "choices_fields") for template in templates]
    return [list(texts) for texts in zip(*columns, strict=True)]


def _right(
    rows: Rows, options: Sequence[Sequence[str]], label_field: str
) -> Int[Array, " example"]:
    places = []
    for at, label in enumerate(rows.column(label_field, "label_field")):
        texts = options[at]
        if not (label.isascii() and label.isdigit() and int(label) < len(texts)):
            raise Misuse(
                f"{rows.where(at)} field {label_field!r}",
                got=label,
                expected=f"the place of the right option, 0 to {len(texts) - 1}",
                do="correct the label, or name its field with --label-field",
            )
        if texts.count(texts[int(label)]) > 1:
            raise Misuse(
                rows.where(at),
                got=f"the right option {texts[int(label)]!r} more than once",
                expected="options that differ from the right one",
                do="correct the row, or --choices-fields",
            )
        places.append(int(label))
    return jnp.asarray(places)
