"""Causal language modelling with the loss on the completion alone."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.completions import Completions, completed, prompt_tokens
from bayes_simfluence.tasks.generation import continuations
from bayes_simfluence.tasks.likelihood import completion_logits, smallest_margin
from bayes_simfluence.tasks.measures import measures
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled
from bayes_simfluence.tasks.tokens import Examples
from bayes_simfluence.tasks.tuned import Logits, Prepared, Target, target_task
from bayes_simfluence.tuning.base import Tuning
from bayes_simfluence.tuning.tunings import FULL


def causal_task(
    model: Pretrained,
    train: Rows,
    query: Rows,
    *,
    key: jax.Array,
    prompt: str = "",
    completion: str = "{text}",
    max_tokens: int = 128,
    metrics: Sequence[str] = (),
    new_tokens: int = 32,
    tuning: Tuning = FULL,
) -> Task:
    """Fine-tuning of a decoder; the loss is the mean cross-entropy of the completion's tokens.

    The EOS token ends the completion and counts where the tokenizer has one and it was not cut
    away; ``completions`` says what stands before the prompt.

    Args:
        key: decides the initial weights of adapters.
        prompt: template of what comes before and is not predicted; blank = nothing.
        completion: template of what is predicted.
        metrics: of ``accuracy`` (1 when greedy decoding writes the completion), ``margin`` (nats,
            of the completion's least certain token), ``bleu`` and ``rouge_l``.
        new_tokens: most tokens generated for ``bleu`` and ``rouge_l``.
        tuning: what is trained.

    Raises:
        Misuse: a network that is no decoder, rows or metrics that do not fit.
    """
    if model.network.kind != "decoder":
        raise Misuse(
            "task",
            got=f"'causal' with {model.name}, whose family {model.network.family} is an "
            f"{model.network.kind}",
            expected="a decoder",
            do="choose another --checkpoint, or another --task",
        )
    rows = {"train": train, "query": query}
    texts = {
        name: Completions(
            file.places,
            filled(file, prompt, "prompt") if prompt else [""] * len(file.ids),
            filled(file, completion, "completion"),
        )
        for name, file in rows.items()
    }
    examples, lengths = completed(model, texts, max_tokens, end=True)
    provenance = {"task": "causal", "prompt": prompt, "completion": completion, **lengths}
    prepared = Prepared(model, model.tensors, tuning, key, rows, examples, metrics, provenance)
    network = model.network  # alone: the losses outlive the tensors

    def logits(weights: Tensors, example: Examples) -> Logits:
        return completion_logits(network, weights, example["tokens"], example["attended"])

    def target(example: Examples) -> Target:
        return example["tokens"][1:], example["target"][1:]

    def margin(weights: Tensors, example: Examples) -> Float[Array, ""]:
        return smallest_margin(logits(weights, example), *target(example))

    return target_task(
        prepared,
        logits,
        target,
        measured=measures(margin),
        writer=lambda: continuations(model, prompt_tokens(model, texts["query"]), new_tokens),
        references=[text.strip() for text in texts["query"].completions],
    )
