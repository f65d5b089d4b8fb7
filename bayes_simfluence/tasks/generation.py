"""Generated texts and their scores: greedy decoding in JAX, BLEU and ROUGE-L.

Each new token takes a full forward pass, without a cache of keys and values: the networks stay
plain functions, and answers are short. Decoding ends at EOS or after ``new_tokens``.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.networks import network as networks
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tasks.measures import Measure, chosen
from bayes_simfluence.tasks.tokens import bucket, padded

TOGETHER = 8
"""Queries decoded at once: logits of all tokens over a vocabulary are large."""

SCORES = ("bleu", "rouge_l")

Write = Callable[[Tensors], list[str]]
State = tuple[Int[Array, " token"], Int[Array, ""], Bool[Array, ""]]


def continuations(model: Pretrained, prompts: Sequence[Sequence[int]], new_tokens: int) -> Write:
    """What a decoder writes after each prompt, as a function of the weights.

    Raises:
        Misuse: no room for ``new_tokens`` after the longest prompt.
    """
    longest = max(len(prompt) for prompt in prompts) + positive_integer("new_tokens", new_tokens)
    positions = model.network.positions
    if positions is not None and longest > positions:
        raise Misuse(
            "new_tokens",
            got=f"{new_tokens} after a prompt of {longest - new_tokens} tokens",
            expected=f"at most the {positions} positions of {model.name}",
            do="lower --new-tokens or --max-tokens",
        )
    end = _end(model)
    # The buffer is filled with the end token, so that what is never written reads as the end.
    buffers = padded(prompts, bucket(longest, positions or 2 * longest), max(end, 0))
    lengths = jnp.asarray([len(prompt) for prompt in prompts])

    def continued(
        tensors: Tensors, prompt: tuple[Int[Array, " token"], Int[Array, ""]]
    ) -> Int[Array, " new"]:
        def next_logits(buffer: Int[Array, " token"], at: Int[Array, ""]) -> Any:
            attended = jnp.arange(len(buffer)) < at
            sequence = networks.Sequence(buffer, jnp.zeros_like(buffer), attended)
            return model.network.logits(tensors, sequence)[at - 1]  # type: ignore[misc]

        buffer, length = prompt
        start = (buffer, length, jnp.zeros((), bool))
        written = _greedy(next_logits, start, length + new_tokens, end)
        return jax.lax.dynamic_slice(written, (length,), (new_tokens,))

    return _writer(model, continued, (buffers, lengths), end)


def answers(model: Pretrained, sources: networks.Sequence, new_tokens: int) -> Write:
    """What an encoder-decoder writes for each source, as a function of the weights."""
    end, count = _end(model), positive_integer("new_tokens", new_tokens)
    network = model.network
    blank = jnp.full(count + 1, max(end, 0)).at[0].set(network.start_token or 0)

    def answered(tensors: Tensors, source: networks.Sequence) -> Int[Array, " new"]:
        def next_logits(buffer: Int[Array, " token"], at: Int[Array, ""]) -> Any:
            return network.seq2seq_logits(tensors, source, buffer)[at - 1]  # type: ignore[misc]

        start = (blank, jnp.ones((), jnp.int32), jnp.zeros((), bool))
        return _greedy(next_logits, start, jnp.asarray(count + 1), end)[1:]

    return _writer(model, answered, sources, end)


def metrics_and_scores(
    wanted: Sequence[str],
    measured: Mapping[str, Measure],
    writer: Callable[[], Write],
    references: Sequence[str],
) -> tuple[dict[str, Measure], dict[str, Callable[[Any], Float[np.ndarray, " query"]]]]:
    """The wanted metrics that networks compute, and those of generated text.

    Args:
        measured: the task's metrics of the first sort.
        writer: makes what writes the queries' texts; asked only where texts are wanted.
        references: the text that each query should have.

    Raises:
        Misuse: a metric that is neither, or whose package is not installed.
    """
    chosen(wanted, {**measured, **dict.fromkeys(SCORES)})
    generated = [name for name in wanted if name in SCORES]
    for name in generated:
        _scorer(name)
    metrics = chosen([name for name in wanted if name not in SCORES], measured)
    return metrics, chosen(generated, text_scores(writer(), references)) if generated else {}


def text_scores(
    write: Write, references: Sequence[str]
) -> dict[str, Callable[[Any], Float[np.ndarray, " query"]]]:
    """``bleu`` and ``rouge_l`` of what is written against one reference for each query.

    BLEU is sacrebleu's sentence BLEU, 0 to 100; ROUGE-L the F-measure of rouge-score without
    stemming, 0 to 1.
    """
    latest = _latest(write)

    def scored(name: str, weights: Any) -> Float[np.ndarray, " query"]:
        score, pairs = _scorer(name), zip(latest(weights), references, strict=True)
        return np.array([score(text, reference) for text, reference in pairs], np.float32)

    return {name: partial(scored, name) for name in SCORES}


def _greedy(
    next_logits: Callable[[Int[Array, " token"], Int[Array, ""]], Float[Array, " vocabulary"]],
    start: State,
    stop: Int[Array, ""],
    end: int,
) -> Int[Array, " token"]:
    """The buffer with the likeliest token at each place, up to ``stop`` or the end token."""

    def write(state: State) -> State:
        buffer, at, _ = state
        token = next_logits(buffer, at).argmax().astype(buffer.dtype)
        return buffer.at[at].set(token), at + 1, token == end

    return jax.lax.while_loop(lambda state: (state[1] < stop) & ~state[2], write, start)[0]


def _end(model: Pretrained) -> int:
    end = model.tokenizer.eos_token_id
    return -1 if end is None else int(end)


def _writer(
    model: Pretrained, decoded: Callable[[Tensors, Any], Int[Array, " new"]], queries: Any, end: int
) -> Write:
    """What writes the text of every query, from the tokens ``decoded(tensors, query)`` of one."""

    @jax.jit
    def decode(tensors: Tensors) -> Int[Array, "query new"]:
        return jax.lax.map(partial(decoded, tensors), queries, batch_size=TOGETHER)

    def write(tensors: Tensors) -> list[str]:
        rows = [row.tolist() for row in np.asarray(decode(tensors))]
        ended = [row[: row.index(end)] if end in row else row for row in rows]
        return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ended]

    return write


def _latest(write: Write) -> Write:
    """``write`` that answers at once when asked again for the weights it was asked for last."""
    kept: list[tuple[list[Any], list[str]]] = []

    def latest(weights: Any) -> list[str]:
        leaves = jax.tree.leaves(weights)
        # Weak references, so that weights are not kept in memory for this.
        if kept and all(
            kept_leaf() is leaf for kept_leaf, leaf in zip(kept[0][0], leaves, strict=True)
        ):
            return kept[0][1]
        kept[:] = [([weakref.ref(leaf) for leaf in leaves], write(weights))]
        return kept[0][1]

    return latest


def _scorer(name: str) -> Callable[[str, str], float]:
    try:
        if name == "bleu":
            from sacrebleu import sentence_bleu

            return lambda text, reference: float(sentence_bleu(text, [reference]).score)
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"], use_stemmer=False)
        return lambda text, reference: float(rouge.score(reference, text)["rougeL"].fmeasure)
    except ImportError as error:
        raise Misuse(
            f"metric {name!r}",
            got=f"no package {error.name}",
            expected="the extra [generation]",
            do="pip install 'bayes-simfluence[generation]'",
        ) from error
