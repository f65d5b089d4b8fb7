"""Prompts and completions as token ids of one sequence, for decoders.

Prompt and completion are tokenized apart and joined, so that the boundary is where the templates
put it. The sequence begins with the tokenizer's BOS token where the tokenizer itself puts one, or
where there is no prompt (the first token needs something before it; EOS stands in for a missing
BOS). It ends with EOS, which counts as part of the completion, where that is wanted and the
tokenizer has one. Long sequences lose their end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.tasks.tokens import (
    Encoded,
    Examples,
    arrays_of,
    known_tokens,
    limit_of,
    without_special,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completions:
    """Prompts (blank = none) and completions, each with its place for messages."""

    where: Sequence[str]
    prompts: Sequence[str]
    completions: Sequence[str]


def completed(
    model: Pretrained, files: Mapping[str, Completions], max_tokens: int, *, end: bool
) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Token ids, attended positions and ``target``, True on the completion, of every file.

    Args:
        end: the completion ends with EOS.

    Raises:
        Misuse: a completion without tokens or without room, a token that the network does not
            know, no token to begin with where there is no prompt.
    """
    limit = limit_of(model, max_tokens)
    encoded = {name: _encoded(model, texts, limit, end=end) for name, texts in files.items()}
    examples, lengths = arrays_of(model, encoded, limit, marks="target")
    for arrays in examples.values():
        arrays["target"] = arrays["target"].astype(bool)
    return examples, lengths


def prompt_tokens(model: Pretrained, texts: Completions) -> list[list[int]]:
    """Token ids of the prompts alone, with what stands before them."""
    prompts = without_special(model.tokenizer, texts.prompts)
    return [
        _start(model.tokenizer, bool(prompt), place) + prompt
        for prompt, place in zip(prompts, texts.where, strict=True)
    ]


def _encoded(model: Pretrained, texts: Completions, limit: int, *, end: bool) -> Encoded:
    """Token ids, marked 1 on the completion."""
    tokenizer = model.tokenizer
    last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    prompts = prompt_tokens(model, texts)
    answers = without_special(tokenizer, texts.completions)
    tokens, targets, cut = [], [], 0
    for prompt, answer, place in zip(prompts, answers, texts.where, strict=True):
        if not answer:
            raise Misuse(
                place,
                got="an empty completion",
                expected="at least one token",
                do="correct the row or the template --completion",
            )
        if len(prompt) >= limit:
            raise Misuse(
                place,
                got=f"a prompt of {len(prompt)} tokens, which leaves none of the completion",
                expected=f"fewer than the limit of {limit}",
                do="raise --max-tokens, or shorten the prompt",
            )
        whole = prompt + answer + last
        cut += len(whole) > limit
        tokens.append(whole[:limit])
        targets.append(([0] * len(prompt) + [1] * len(answer + last))[:limit])
    known_tokens(model, tokens, texts.where)
    return Encoded(tokens, targets, cut)


def _start(tokenizer: "PreTrainedTokenizerBase", has_prompt: bool, where: str) -> list[int]:
    own = tokenizer.bos_token_id
    if own is not None and tokenizer("a")["input_ids"][0] == own:
        return [own]
    if has_prompt:
        return []
    start = tokenizer.eos_token_id if own is None else own
    if start is None:
        raise Misuse(
            where,
            got="no prompt, and a tokenizer with neither BOS nor EOS",
            expected="something before the first token of the completion",
            do="give a --prompt",
        )
    return [start]
