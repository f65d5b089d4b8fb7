"""BERT as a pure function of the checkpoint's tensors (Devlin et al. 2019, arXiv 1810.04805).

Written for one sequence; ``vmap`` over examples outside. No dropout: a recorded run is a function
of its curriculum alone. Tested against transformers' PyTorch model (``tests/unit/networks``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.networks.checkpoint import Tensors, require_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["BertSettings", "Pooling", "classify", "encode", "pool", "settings_of", "with_head"]

Pooling = Literal["mean", "cls", "pooler"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda value: jax.nn.gelu(value, approximate=False),
    "gelu_new": lambda value: jax.nn.gelu(value, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class BertSettings:
    """What the forward pass needs of a BERT configuration.

    Attributes:
        layers, heads: depth, and attention heads of a layer.
        epsilon: added to the variance in layer norm.
        activation: name in ``ACTIVATIONS``.
        prefix: what stands before ``embeddings.`` in the tensor names ("" or "bert.").
    """

    layers: int
    heads: int
    epsilon: float
    activation: str
    prefix: str = ""


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> BertSettings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: another architecture, an activation or position embedding not built here, or
            tensors that the configuration asks for and the checkpoint lacks.
    """
    if config.model_type != "bert":
        raise Misuse(
            "checkpoint architecture",
            got=repr(config.model_type),
            expected="one of: bert",
            do="choose a checkpoint of the BERT architecture",
        )
    positions = getattr(config, "position_embedding_type", "absolute")
    choice_of("config.json position_embedding_type", positions, ["absolute"])
    choice_of("config.json hidden_act", config.hidden_act, list(ACTIVATIONS))
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    settings = BertSettings(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.layer_norm_eps,
        config.hidden_act,
        prefix,
    )
    last = f"{prefix}encoder.layer.{settings.layers - 1}.output"
    words = f"{prefix}embeddings.word_embeddings.weight"
    require_tensors(tensors, [words, f"{last}.dense.weight", f"{last}.LayerNorm.bias"], "tensors")
    return settings


def encode(
    tensors: Tensors,
    settings: BertSettings,
    tokens: Int[Array, " token"],
    segments: Int[Array, " token"],
    attended: Bool[Array, " token"],
) -> Float[Array, "token hidden"]:
    """Hidden states of the last layer for one sequence.

    Args:
        tokens: token ids.
        segments: 0 for the first text, 1 for the second.
        attended: False at padding, which no token attends to.
    """
    start = f"{settings.prefix}embeddings."
    hidden = (
        tensors[f"{start}word_embeddings.weight"][tokens]
        + tensors[f"{start}position_embeddings.weight"][: len(tokens)]
        + tensors[f"{start}token_type_embeddings.weight"][segments]
    )
    hidden = _layer_norm(tensors, f"{start}LayerNorm", hidden, settings.epsilon)
    for layer in range(settings.layers):
        name = f"{settings.prefix}encoder.layer.{layer}"
        mixed = _attention(tensors, f"{name}.attention.self", hidden, attended, settings.heads)
        mixed = _dense(tensors, f"{name}.attention.output.dense", mixed)
        hidden = _layer_norm(
            tensors, f"{name}.attention.output.LayerNorm", hidden + mixed, settings.epsilon
        )
        wide = _dense(tensors, f"{name}.intermediate.dense", hidden)
        wide = ACTIVATIONS[settings.activation](wide)
        narrow = _dense(tensors, f"{name}.output.dense", wide)
        hidden = _layer_norm(tensors, f"{name}.output.LayerNorm", hidden + narrow, settings.epsilon)
    return hidden


def pool(
    tensors: Tensors,
    settings: BertSettings,
    hidden: Float[Array, "token hidden"],
    attended: Bool[Array, " token"],
    how: Pooling,
) -> Float[Array, " hidden"]:
    """One vector of a sequence: mean of its tokens, first token, or BERT's tanh pooler."""
    if how == "mean":
        weights = attended.astype(hidden.dtype)
        return weights @ hidden / jnp.maximum(weights.sum(), 1.0)
    if how == "cls":
        return hidden[0]
    return jnp.tanh(_dense(tensors, f"{settings.prefix}pooler.dense", hidden[0]))


def classify(tensors: Tensors, pooled: Float[Array, " hidden"]) -> Float[Array, " label"]:
    """Logits of the classification head (``classifier.weight``, ``classifier.bias``)."""
    return _dense(tensors, "classifier", pooled)


def with_head(tensors: Tensors, labels: int, key: jax.Array) -> Tensors:
    """``tensors`` with a fresh head for ``labels`` classes: normal weights of sd .02, bias 0."""
    name = next(one for one in tensors if one.endswith("embeddings.LayerNorm.bias"))
    hidden = tensors[name].shape[0]
    head = {
        "classifier.weight": 0.02 * jax.random.normal(key, (labels, hidden)),
        "classifier.bias": jnp.zeros(labels),
    }
    return {**tensors, **head}


def _dense(
    tensors: Tensors, name: str, value: Float[Array, "*lead inward"]
) -> Float[Array, "*lead outward"]:
    product = value @ tensors[f"{name}.weight"].T
    return product + jnp.broadcast_to(tensors[f"{name}.bias"], product.shape)


def _layer_norm(
    tensors: Tensors, name: str, value: Float[Array, "token hidden"], epsilon: float
) -> Float[Array, "token hidden"]:
    centred = value - value.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return centred * scale * weight[None, :] + bias[None, :]


def _attention(
    tensors: Tensors,
    name: str,
    hidden: Float[Array, "token hidden"],
    attended: Bool[Array, " token"],
    heads: int,
) -> Float[Array, "token hidden"]:
    def split(part: str) -> Float[Array, "token head size"]:
        return _dense(tensors, f"{name}.{part}", hidden).reshape(len(hidden), heads, -1)

    query, key, value = split("query"), split("key"), split("value")
    scores = jnp.einsum("qhd,khd->hqk", query, key) / jnp.sqrt(query.shape[-1])
    scores = jnp.where(attended[None, None, :], scores, np.finfo(np.float32).min)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(hidden.shape)
