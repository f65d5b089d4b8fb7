"""BERT as a pure function of the checkpoint's tensors (Devlin et al. 2019, arXiv 1810.04805).

MiniLM checkpoints are BERT. RoBERTa is BERT with other positions (``roberta``).
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Array, Float, Int

from bayes_simfluence.networks.layers import (
    ACTIVATIONS,
    attend,
    dense,
    embed,
    everywhere,
    layer_norm,
    places,
    split_heads,
)
from bayes_simfluence.networks.network import Family, Network, Sequence
from bayes_simfluence.networks.requirements import (
    Shapes,
    check_option,
    check_tensors,
    dense_shapes,
    norm_shapes,
    prefix_of,
    quotient,
)
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "FAMILY",
    "BertSettings",
    "encode",
    "network",
    "pooler_shapes",
    "settings_of",
    "shapes_of",
]

UNUSED = (
    r"(.*\.)?(position_ids|token_type_ids)",
    r"cls\..*",
    r"lm_head\..*",
    r"(.*\.)?pooler\..*",
    r"classifier\..*",
    r"qa_outputs\..*",
)
"""Buffers, and heads that ``hidden`` does not pass."""


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


def settings_of(
    config: "PretrainedConfig", tensors: Tensors, *, family: str = "bert"
) -> BertSettings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Args:
        family: what a model with a head calls the encoder inside it.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    check_option(config, "position_embedding_type", ["absolute"], "absolute")
    check_option(config, "is_decoder", [False], False)
    check_option(config, "add_cross_attention", [False], False)
    prefix = prefix_of(tensors, "embeddings.", f"{family}.")
    quotient(config, "hidden_size", "num_attention_heads")
    check_tensors(tensors, shapes_of(config, prefix), UNUSED)
    return BertSettings(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.layer_norm_eps,
        check_option(config, "hidden_act", list(ACTIVATIONS)),
        prefix,
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "") -> Shapes:
    """The tensors that ``encode`` reads."""
    width, wide = config.hidden_size, config.intermediate_size
    start = f"{prefix}embeddings"
    shapes: Shapes = {
        f"{start}.word_embeddings.weight": (config.vocab_size, width),
        f"{start}.position_embeddings.weight": (config.max_position_embeddings, width),
        f"{start}.token_type_embeddings.weight": (config.type_vocab_size, width),
        **norm_shapes(f"{start}.LayerNorm", width),
    }
    for layer in range(config.num_hidden_layers):
        name = f"{prefix}encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= dense_shapes(f"{name}.attention.{part}", width, width)
        shapes |= norm_shapes(f"{name}.attention.output.LayerNorm", width)
        shapes |= dense_shapes(f"{name}.intermediate.dense", wide, width)
        shapes |= dense_shapes(f"{name}.output.dense", width, wide)
        shapes |= norm_shapes(f"{name}.output.LayerNorm", width)
    return shapes


def pooler_shapes(config: "PretrainedConfig", tensors: Tensors, prefix: str) -> Shapes:
    """The tensors of the tanh layer over the first token, none where the checkpoint has none."""
    shapes = dense_shapes(f"{prefix}pooler.dense", config.hidden_size, config.hidden_size)
    if not any(name in tensors for name in shapes):
        return {}
    check_tensors({name: tensors[name] for name in shapes if name in tensors}, shapes)
    return shapes


def encode(
    settings: BertSettings,
    tensors: Tensors,
    sequence: Sequence,
    positions: Int[Array, " token"] | None = None,
) -> Float[Array, "token hidden"]:
    """Hidden states of the last layer for one sequence.

    Args:
        positions: rows of the position embeddings; 0, 1, 2, ... when None.
    """
    start = f"{settings.prefix}embeddings"
    table = tensors[f"{start}.position_embeddings.weight"]
    hidden = (
        embed(tensors[f"{start}.word_embeddings.weight"], sequence.tokens)
        + (places(table, sequence.tokens) if positions is None else embed(table, positions))
        + embed(tensors[f"{start}.token_type_embeddings.weight"], sequence.segments)
    )
    hidden = layer_norm(tensors, f"{start}.LayerNorm", hidden, settings.epsilon)
    mask = everywhere(len(hidden), sequence.attended)
    for layer in range(settings.layers):
        name = f"{settings.prefix}encoder.layer.{layer}"
        query, key, value = (
            split_heads(dense(tensors, f"{name}.attention.self.{part}", hidden), settings.heads)
            for part in ("query", "key", "value")
        )
        mixed = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        mixed = hidden + dense(tensors, f"{name}.attention.output.dense", mixed)
        hidden = layer_norm(tensors, f"{name}.attention.output.LayerNorm", mixed, settings.epsilon)
        inner = dense(tensors, f"{name}.intermediate.dense", hidden)
        inner = ACTIVATIONS[settings.activation](inner)
        mixed = hidden + dense(tensors, f"{name}.output.dense", inner)
        hidden = layer_norm(tensors, f"{name}.output.LayerNorm", mixed, settings.epsilon)
    return hidden


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a BERT checkpoint.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    settings = settings_of(config, tensors)
    pooler = pooler_shapes(config, tensors, settings.prefix)
    return Network(
        family=config.model_type,
        kind="encoder",
        hidden=partial(encode, settings),
        positions=config.max_position_embeddings,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        shapes={**shapes_of(config, settings.prefix), **pooler},
    )


FAMILY = Family(
    network,
    tables=("word_embeddings", "position_embeddings", "token_type_embeddings"),
    tied=("cls.predictions.decoder",),
    lora_targets=("query", "value"),
    ia3_targets=("key", "value", "output.dense"),
    ia3_feedforward=("output.dense",),
    prefix="bert.",
    classifier="BertForSequenceClassification",
)
