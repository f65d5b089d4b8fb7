"""Heads over hidden states: one vector of a sequence, and logits of it."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.checkpoint import Tensors
from bayes_simfluence.networks.network import Network, Sequence

__all__ = ["Pooling", "check_pooling", "head_logits", "with_head"]

Pooling = Literal["mean", "cls", "last", "pooler"]
POOLER = "pooler.dense"


def with_head(tensors: Tensors, network: Network, outputs: int, key: jax.Array) -> Tensors:
    """``tensors`` with a fresh head ``classifier.*``: normal weights of sd .02, bias 0."""
    head = {
        "classifier.weight": 0.02 * jax.random.normal(key, (outputs, network.width)),
        "classifier.bias": jnp.zeros(outputs),
    }
    return {**tensors, **head}


def head_logits(
    network: Network, tensors: Tensors, sequence: Sequence, pooling: Pooling
) -> Float[Array, " output"]:
    """The head's logits of one sequence."""
    pooled = _pooled(tensors, network.hidden(tensors, sequence), sequence.attended, pooling)
    return _dense(tensors, "classifier", pooled)


def check_pooling(network: Network, tensors: Tensors, pooling: Pooling) -> None:
    """Raise when ``pooling`` makes no sense for the network.

    Raises:
        Misuse: a first token that sees no other one, a pooler that the checkpoint lacks.
    """
    if network.kind == "decoder" and pooling == "cls":
        raise Misuse(
            "pooling",
            got=f"'cls', the first token, of the decoder {network.family}",
            expected="a token that sees the text: 'last' or 'mean'",
            do="choose another --pooling",
        )
    if pooling == "pooler" and _pooler(tensors) is None:
        raise Misuse(
            "pooling",
            got=f"'pooler', but the {network.family} checkpoint has no tensor {POOLER}.weight",
            expected="'mean', 'cls' or 'last'",
            do="choose another --pooling",
        )


def _pooled(
    tensors: Tensors,
    hidden: Float[Array, "token hidden"],
    attended: Bool[Array, " token"],
    how: Pooling,
) -> Float[Array, " hidden"]:
    """Mean of the tokens, first token, last token, or BERT's tanh pooler of the first one."""
    if how == "mean":
        weights = attended.astype(hidden.dtype)
        return weights @ hidden / jnp.maximum(weights.sum(), 1.0)
    if how == "last":
        return hidden[attended.sum() - 1]
    if how == "cls":
        return hidden[0]
    return jnp.tanh(_dense(tensors, str(_pooler(tensors)), hidden[0]))


def _pooler(tensors: Tensors) -> str | None:
    ending = f"{POOLER}.weight"
    return next((one.removesuffix(".weight") for one in tensors if one.endswith(ending)), None)


def _dense(tensors: Tensors, name: str, value: Float[Array, " inward"]) -> Float[Array, " outward"]:
    return value @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
