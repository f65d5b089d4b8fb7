"""From hidden states to classes: pooling and a classification head, for every family."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bayes_simfluence.checks import choice_of
from bayes_simfluence.networks.layers import dense, vocabulary_logits, wide
from bayes_simfluence.networks.network import Network
from bayes_simfluence.networks.tensor_files import Tensors

__all__ = ["HEAD", "Pooling", "check_pooling", "classify", "pool", "with_head"]

Pooling = Literal["mean", "cls", "last", "pooler"]

HEAD = ("classifier.weight", "classifier.bias")
"""Tensors of the classification head, in every family."""


def check_pooling(network: Network, how: str) -> Pooling:
    """``how`` when it makes sense for the network.

    A decoder's first token has seen nothing but itself, an encoder's last one is no summary, and
    only some checkpoints of the BERT family hold a pooler.

    Raises:
        Misuse: it makes none.
    """
    fits = {"encoder": ["mean", "cls"], "decoder": ["mean", "last"], "encoder-decoder": ["mean"]}
    allowed = [*fits[network.kind], *(["pooler"] if network.pooler else [])]
    choice_of(f"pooling for this {network.family} checkpoint", how, allowed)
    return next(one for one in get_args(Pooling) if one == how)


def pool(
    network: Network,
    tensors: Tensors,
    hidden: Float[Array, "token hidden"],
    attended: Bool[Array, " token"],
    how: Pooling,
) -> Float[Array, " hidden"]:
    """One vector of a sequence: mean of its tokens, first or last one, or BERT's tanh pooler.

    Raises:
        Misuse: a pooling that makes no sense for the network.
    """
    check_pooling(network, how)
    if how == "mean":
        weights = attended.astype(wide(hidden).dtype)
        return weights @ wide(hidden) / jnp.maximum(weights.sum(), 1.0)
    if how == "last":
        return hidden[jnp.max(jnp.where(attended, jnp.arange(len(attended)), 0))]
    if how == "cls" or network.pooler is None:
        return hidden[0]
    return jnp.tanh(dense(tensors, network.pooler, hidden[0]))


def classify(tensors: Tensors, pooled: Float[Array, " hidden"]) -> Float[Array, " label"]:
    """Logits of the classification head (``classifier.weight``, ``classifier.bias``)."""
    weight, bias = (tensors[one] for one in HEAD)
    return vocabulary_logits(weight, pooled[None].astype(weight.dtype))[0] + wide(bias)


def with_head(network: Network, tensors: Tensors, labels: int, key: jax.Array) -> Tensors:
    """``tensors`` with a fresh head for ``labels`` classes: normal weights of sd .02, bias 0."""
    dtype = tensors[next(iter(network.shapes))].dtype
    weight = 0.02 * jax.random.normal(key, (labels, network.width))
    fresh = (weight.astype(dtype), jnp.zeros(labels, dtype))
    return {**tensors, **dict(zip(HEAD, fresh, strict=True))}
