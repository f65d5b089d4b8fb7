"""Texts to arrays of token ids: truncation counted, lengths padded to a few sizes.

All examples of a task, training and queries, have ONE padded length, so that a recording compiles
once; the length is one of a small set, so that tasks of about the same length share programs. Up
to 128 tokens it is a multiple of 8, above that one of four lengths between powers of two (160,
192, 224, 256, 320, ...): at most a quarter is padding, and 1024 tokens need 28 lengths at most.
Padding always stands on the right and nothing attends to it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.network import Sequence as Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Examples = dict[str, Shaped[Array, "..."]]
"""Arrays by name, of one example or with a leading axis of examples."""

MULTIPLE, FINE = 8, 128


@dataclass(frozen=True)
class Texts:
    """Texts or pairs of texts to tokenize, each with its place for messages."""

    where: Sequence[str]
    texts: Sequence[str]
    pairs: Sequence[str] | None = None


class Encoded(NamedTuple):
    """Token ids of texts, a mark for each token, and how many of the texts were cut."""

    tokens: Sequence[Sequence[int]]
    marks: Sequence[Sequence[int]]
    cut: int


def bucket(length: int, limit: int) -> int:
    """The padded length for ``length`` tokens, at most ``limit``.

    >>> [bucket(longest, 1024) for longest in (1, 9, 128, 129, 200, 600)]
    [8, 16, 128, 160, 224, 640]
    """
    step = MULTIPLE if length <= FINE else 2 ** ((length - 1).bit_length() - 3)
    return min(-(-length // step) * step, limit)


def limit_of(model: Pretrained, max_tokens: int) -> int:
    """The longest sequence in tokens: ``max_tokens``, or the network's positions if fewer."""
    return min(max_tokens, model.network.positions or max_tokens)


def tokenized(
    model: Pretrained, files: Mapping[str, Texts], max_tokens: int
) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Arrays of token ids, segments and attended positions of every file, and their lengths.

    Special tokens are the tokenizer's own; of a pair the longer text is cut first.

    Raises:
        Misuse: a token that the network does not know, no room for special tokens.
    """
    limit = limit_of(model, max_tokens)
    encoded = {name: _encoded(model, texts, limit) for name, texts in files.items()}
    return arrays_of(model, encoded, limit, marks="segments")


def arrays_of(
    model: Pretrained, encoded: Mapping[str, Encoded], limit: int, *, marks: str
) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Arrays of one padded length for all files; that length, and how many texts were cut, of
    which the log warns.

    Args:
        marks: name of the array of the tokens' marks.
    """
    longest = max(len(ids) for file in encoded.values() for ids in file.tokens)
    length = bucket(longest, limit)
    examples = {
        name: {
            "tokens": padded(file.tokens, length, padding_of(model.tokenizer)),
            marks: padded(file.marks, length, 0),
            "attended": padded([[1] * len(ids) for ids in file.tokens], length, 0).astype(bool),
        }
        for name, file in encoded.items()
    }
    cut = {name: file.cut for name, file in encoded.items()}
    if any(cut.values()):
        total = sum(len(file.tokens) for file in encoded.values())
        log.warning("%d of %d texts cut to %d tokens", sum(cut.values()), total, limit)
    return examples, {"padded_tokens": length, "truncated": cut}


def sequence_of(examples: Examples) -> Tokens:
    """The text of one example, or those of several, as networks take them."""
    return Tokens(examples["tokens"], examples["segments"], examples["attended"])


def targets_of(
    model: Pretrained, files: Mapping[str, Texts], max_tokens: int
) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Texts for a decoder to write as arrays ``target`` and ``counted``, False at padding.

    A text ends with EOS where the tokenizer has one and the text was not cut.

    Raises:
        Misuse: a token that the network does not know, a text without any.
    """
    tokenizer = model.tokenizer
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = {}
    for name, texts in files.items():
        plain = without_special(tokenizer, texts.texts)
        known_tokens(model, plain, texts.where)
        kept = [(ids + last)[:max_tokens] for ids in plain]
        cut = sum(len(ids + last) > max_tokens for ids in plain)
        encoded[name] = Encoded(kept, [[1] * len(ids) for ids in kept], cut)
    arrays, lengths = arrays_of(model, encoded, max_tokens, marks="counted")
    examples = {
        name: {"target": file["tokens"], "counted": file["counted"].astype(bool)}
        for name, file in arrays.items()
    }
    named = {"padded_tokens": "padded_target_tokens", "truncated": "truncated_targets"}
    return examples, {named[name]: value for name, value in lengths.items()}


def without_special(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts alone."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Int[Array, "example {length}"]:
    """Rows of token ids as one array, padded on the right with ``fill``."""
    array = np.full((len(rows), length), fill, np.int32)
    for at, row in enumerate(rows):
        array[at, : len(row)] = row
    return jnp.asarray(array)


def padding_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The padding token; where the tokenizer has none, the token that ends texts."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    stand_in = tokenizer.eos_token_id
    log.info("no padding token: %s stands in, unattended", tokenizer.eos_token or "token 0")
    return 0 if stand_in is None else int(stand_in)


def filled_lengths(examples: Examples) -> list[int]:
    """Tokens of each example that are not padding; of the longest where it has several texts."""
    filled = np.asarray(examples["attended"]).sum(axis=-1)
    return [int(length) for length in filled.reshape(len(filled), -1).max(axis=1)]


def shortened(example: Examples, length: int) -> Examples:
    """One example without padding beyond ``length`` tokens; what a decoder writes stays whole."""
    along = {"tokens", "segments", "attended"}
    if "counted" not in example:  # In an encoder-decoder the target is not along its source.
        along.add("target")
    return {name: x[..., :length] if name in along else x for name, x in example.items()}


def known_tokens(model: Pretrained, tokens: Sequence[Sequence[int]], where: Sequence[str]) -> None:
    """Raise when a token has no embedding: indexing in JAX would take another one's silently.

    Raises:
        Misuse: such a token, or a text without any; the message names the row.
    """
    size = model.network.vocabulary
    for ids, place in zip(tokens, where, strict=True):
        if not ids:
            raise Misuse(
                place,
                got="a text of no tokens",
                expected="at least one",
                do="correct the row, or use the tokenizer that belongs to the checkpoint",
            )
        if max(ids) >= size:
            word = model.tokenizer.convert_ids_to_tokens(max(ids))
            raise Misuse(
                place,
                got=f"token {word!r} with id {max(ids)}",
                expected=f"ids below {size}, the vocabulary of {model.name}",
                do="use the tokenizer that belongs to the checkpoint",
            )


def _encoded(model: Pretrained, texts: Texts, limit: int) -> Encoded:
    """Token ids with their segments."""
    arguments = (list(texts.texts), texts.pairs and list(texts.pairs))
    special = model.tokenizer.num_special_tokens_to_add(pair=texts.pairs is not None)
    if limit <= special:
        raise Misuse(
            "max_tokens",
            got=limit,
            expected=f"more than the {special} special tokens of each text",
            do="raise --max-tokens",
        )
    encoded = model.tokenizer(*arguments)
    cut = sum(len(ids) > limit for ids in encoded["input_ids"])
    if cut:
        encoded = model.tokenizer(*arguments, truncation=True, max_length=limit)
    tokens = [list(ids) for ids in encoded["input_ids"]]
    known_tokens(model, tokens, texts.where)
    segments = encoded.get("token_type_ids") or [[0] * len(ids) for ids in tokens]
    return Encoded(tokens, segments, cut)
