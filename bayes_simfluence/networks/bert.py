"""BERT as a pure function of the checkpoint's tensors (Devlin et al. 2019, arXiv 1810.04805).

MiniLM checkpoints are BERT. RoBERTa is BERT with other positions (``roberta``).
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Array, Bool, Float, Int

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
from bayes_simfluence.networks.network import Family, Network, Sequence, Settings, encoder
from bayes_simfluence.networks.requirements import (
    Shapes,
    check_option,
    check_tensors,
    prefix_of,
    quotient,
    weight_and_bias,
)
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "FAMILY",
    "LayerNames",
    "encode",
    "layers_shapes",
    "network",
    "pooler_shapes",
    "settings_of",
    "shapes_of",
    "through_layers",
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


class LayerNames(NamedTuple):
    """What a checkpoint calls the parts of a layer; ``layer`` stands before the layer's number."""

    layer: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    norm: str


NAMES = LayerNames(
    layer="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
)


def settings_of(config: "PretrainedConfig", tensors: Tensors, *, family: str = "bert") -> Settings:
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
    return Settings(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        activation=check_option(config, "hidden_act", list(ACTIVATIONS)),
        prefix=prefix,
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "") -> Shapes:
    """The tensors that ``encode`` reads."""
    width, start = config.hidden_size, f"{prefix}embeddings"
    return {
        f"{start}.word_embeddings.weight": (config.vocab_size, width),
        f"{start}.position_embeddings.weight": (config.max_position_embeddings, width),
        f"{start}.token_type_embeddings.weight": (config.type_vocab_size, width),
        **weight_and_bias(f"{start}.LayerNorm", width),
        **layers_shapes(NAMES, prefix, config.num_hidden_layers, width, config.intermediate_size),
    }


def layers_shapes(names: LayerNames, prefix: str, layers: int, width: int, inner: int) -> Shapes:
    """The tensors that ``through_layers`` reads.

    Args:
        inner: width between the two layers of the feed-forward part.
    """
    shapes: Shapes = {}
    for layer in range(layers):
        name = f"{prefix}{names.layer}.{layer}"
        for part in (names.query, names.key, names.value, names.output):
            shapes |= weight_and_bias(f"{name}.{part}", width, width)
        shapes |= weight_and_bias(f"{name}.{names.attention_norm}", width)
        shapes |= weight_and_bias(f"{name}.{names.up}", inner, width)
        shapes |= weight_and_bias(f"{name}.{names.down}", width, inner)
        shapes |= weight_and_bias(f"{name}.{names.norm}", width)
    return shapes


def pooler_shapes(config: "PretrainedConfig", tensors: Tensors, prefix: str) -> Shapes:
    """The tensors of the tanh layer over the first token, none where the checkpoint has none."""
    shapes = weight_and_bias(f"{prefix}pooler.dense", config.hidden_size, config.hidden_size)
    if not any(name in tensors for name in shapes):
        return {}
    check_tensors({name: tensors[name] for name in shapes if name in tensors}, shapes)
    return shapes


def encode(
    settings: Settings,
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
    return through_layers(settings, NAMES, tensors, hidden, sequence.attended)


def through_layers(
    settings: Settings,
    names: LayerNames,
    tensors: Tensors,
    hidden: Float[Array, "token hidden"],
    attended: Bool[Array, " token"],
) -> Float[Array, "token hidden"]:
    """Hidden states after all layers, whose norms follow each residual, from the embeddings."""
    mask = everywhere(len(hidden), attended)
    for layer in range(settings.layers):
        name = f"{settings.prefix}{names.layer}.{layer}"
        query, key, value = (
            split_heads(dense(tensors, f"{name}.{part}", hidden), settings.heads)
            for part in (names.query, names.key, names.value)
        )
        mixed = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        mixed = hidden + dense(tensors, f"{name}.{names.output}", mixed)
        hidden = layer_norm(tensors, f"{name}.{names.attention_norm}", mixed, settings.epsilon)
        inner = ACTIVATIONS[settings.activation](dense(tensors, f"{name}.{names.up}", hidden))
        mixed = hidden + dense(tensors, f"{name}.{names.down}", inner)
        hidden = layer_norm(tensors, f"{name}.{names.norm}", mixed, settings.epsilon)
    return hidden


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a BERT checkpoint; raises what ``settings_of`` raises."""
    settings = settings_of(config, tensors)
    pooler = pooler_shapes(config, tensors, settings.prefix)
    shapes = {**shapes_of(config, settings.prefix), **pooler}
    return encoder(config, partial(encode, settings), shapes)


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
