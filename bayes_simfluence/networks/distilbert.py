"""DistilBERT as a pure function of the checkpoint's tensors (Sanh et al. 2019, arXiv 1910.01108).

BERT of half the depth, without segments and pooler, under tensor names of its own.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Array, Float

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

__all__ = ["FAMILY", "DistilBertSettings", "encode", "network", "settings_of", "shapes_of"]

EPSILON = 1e-12
"""Added to the variance in layer norm; no option of the configuration."""

UNUSED = (r"vocab_.*", r"(pre_)?classifier\..*", r"qa_outputs\..*", r"(.*\.)?position_ids")
"""Heads that ``hidden`` does not pass, and buffers."""


@dataclass(frozen=True)
class DistilBertSettings:
    """What the forward pass needs of a DistilBERT configuration.

    Attributes:
        layers, heads: depth, and attention heads of a layer.
        activation: name in ``ACTIVATIONS``.
        prefix: what stands before ``embeddings.`` in the tensor names ("" or "distilbert.").
    """

    layers: int
    heads: int
    activation: str
    prefix: str = ""


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> DistilBertSettings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    prefix = prefix_of(tensors, "embeddings.", "distilbert.")
    quotient(config, "dim", "n_heads")
    check_tensors(tensors, shapes_of(config, prefix), UNUSED)
    activation = check_option(config, "activation", list(ACTIVATIONS))
    return DistilBertSettings(config.n_layers, config.n_heads, activation, prefix)


def shapes_of(config: "PretrainedConfig", prefix: str = "") -> Shapes:
    """The tensors that ``encode`` reads."""
    start = f"{prefix}embeddings"
    shapes: Shapes = {
        f"{start}.word_embeddings.weight": (config.vocab_size, config.dim),
        f"{start}.position_embeddings.weight": (config.max_position_embeddings, config.dim),
        **norm_shapes(f"{start}.LayerNorm", config.dim),
    }
    for layer in range(config.n_layers):
        name = f"{prefix}transformer.layer.{layer}"
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= dense_shapes(f"{name}.attention.{part}", config.dim, config.dim)
        shapes |= norm_shapes(f"{name}.sa_layer_norm", config.dim)
        shapes |= dense_shapes(f"{name}.ffn.lin1", config.hidden_dim, config.dim)
        shapes |= dense_shapes(f"{name}.ffn.lin2", config.dim, config.hidden_dim)
        shapes |= norm_shapes(f"{name}.output_layer_norm", config.dim)
    return shapes


def encode(
    settings: DistilBertSettings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states of the last layer for one sequence; its segments are not used."""
    start = f"{settings.prefix}embeddings"
    hidden = embed(tensors[f"{start}.word_embeddings.weight"], sequence.tokens)
    hidden = hidden + places(tensors[f"{start}.position_embeddings.weight"], sequence.tokens)
    hidden = layer_norm(tensors, f"{start}.LayerNorm", hidden, EPSILON)
    mask = everywhere(len(hidden), sequence.attended)
    for layer in range(settings.layers):
        name = f"{settings.prefix}transformer.layer.{layer}"
        query, key, value = (
            split_heads(dense(tensors, f"{name}.attention.{part}", hidden), settings.heads)
            for part in ("q_lin", "k_lin", "v_lin")
        )
        mixed = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        mixed = hidden + dense(tensors, f"{name}.attention.out_lin", mixed)
        hidden = layer_norm(tensors, f"{name}.sa_layer_norm", mixed, EPSILON)
        inner = ACTIVATIONS[settings.activation](dense(tensors, f"{name}.ffn.lin1", hidden))
        mixed = hidden + dense(tensors, f"{name}.ffn.lin2", inner)
        hidden = layer_norm(tensors, f"{name}.output_layer_norm", mixed, EPSILON)
    return hidden


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a DistilBERT checkpoint.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    settings = settings_of(config, tensors)
    return Network(
        family=config.model_type,
        kind="encoder",
        hidden=partial(encode, settings),
        positions=config.max_position_embeddings,
        width=config.dim,
        vocabulary=config.vocab_size,
        shapes=shapes_of(config, settings.prefix),
    )


FAMILY = Family(
    network,
    tables=("word_embeddings", "position_embeddings"),
    tied=("vocab_projector",),
    # peft has no defaults for DistilBERT: the layers that it adapts of BERT.
    lora_targets=("q_lin", "v_lin"),
    ia3_targets=("k_lin", "v_lin", "lin2"),
    ia3_feedforward=("lin2",),
    prefix="distilbert.",
)
