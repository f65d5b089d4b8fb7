"""Classification heads: one vector of a sequence from its hidden states, and logits of it."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bayes_simfluence.checks import choice_of
from bayes_simfluence.networks.layers import dense, wide
from bayes_simfluence.networks.network import Network, Sequence
from bayes_simfluence.networks.tensor_files import Tensors

Pooling = Literal["mean", "cls", "last", "pooler"]

HEAD = ("classifier.weight", "classifier.bias")
"""Tensors of the head, in every family."""

POOLER = "pooler.dense"


def with_head(tensors: Tensors, network: Network, outputs: int, key: jax.Array) -> Tensors:
    """``tensors`` with a fresh head ``classifier.*``: normal weights of sd .02, bias 0.

    It has the dtype of the network's own tensors.
    """
    dtype = next(x.dtype for x in tensors.values() if jnp.issubdtype(x.dtype, jnp.floating))
    empty = (jnp.zeros((outputs, network.width), dtype), jnp.zeros(outputs, dtype))
    return fresh_head({**tensors, **dict(zip(HEAD, empty, strict=True))}, key)


def fresh_head(tensors: Tensors, key: jax.Array) -> Tensors:
    """``tensors`` with other weights of their head, drawn as by ``with_head``."""
    weight, bias = (tensors[name] for name in HEAD)
    drawn = 0.02 * jax.random.normal(key, weight.shape)
    fresh = (drawn.astype(weight.dtype), jnp.zeros_like(bias))
    return {**tensors, **dict(zip(HEAD, fresh, strict=True))}


def check_pooling(network: Network, tensors: Tensors, pooling: Pooling) -> None:
    """Raise when ``pooling`` makes no sense for the network.

    A decoder's first token has seen nothing but itself, an encoder's last one is no summary, and
    not every checkpoint of the BERT family holds a pooler.

    Raises:
        Misuse: it makes none.
    """
    fits: dict[str, list[Pooling]] = {
        "encoder": ["mean", "cls"],
        "decoder": ["mean", "last"],
        "encoder-decoder": ["mean"],
    }
    allowed = [*fits[network.kind], *(["pooler"] if _pooler(tensors) else [])]
    choice_of(f"pooling for this {network.family} checkpoint", pooling, allowed)


def head_logits(
    network: Network, tensors: Tensors, sequence: Sequence, pooling: Pooling
) -> Float[Array, " output"]:
    """The head's logits of one sequence, in float32."""
    pooled = pool(tensors, network.hidden(tensors, sequence), sequence.attended, pooling)
    return wide(dense(tensors, "classifier", wide(pooled)[None])[0])


def pool(
    tensors: Tensors,
    hidden: Float[Array, "token hidden"],
    attended: Bool[Array, " token"],
    pooling: Pooling,
) -> Float[Array, " hidden"]:
    """One vector of a sequence: mean of its tokens, first or last one, or BERT's tanh pooler."""
    if pooling == "mean":
        weights = attended.astype(wide(hidden).dtype)
        return weights @ wide(hidden) / jnp.maximum(weights.sum(), 1.0)
    if pooling == "last":
        return hidden[jnp.max(jnp.where(attended, jnp.arange(len(attended)), 0))]
    if pooling == "cls":
        return hidden[0]
    return jnp.tanh(dense(tensors, str(_pooler(tensors)), hidden[0]))


def _pooler(tensors: Tensors) -> str | None:
    """Name of BERT's layer over the first token, where the checkpoint has one."""
    ending = f"{POOLER}.weight"
    return next((name.removesuffix(".weight") for name in tensors if name.endswith(ending)), None)
