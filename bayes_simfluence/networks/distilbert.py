"""DistilBERT as a pure function of the checkpoint's tensors (Sanh et al. 2019, arXiv 1910.01108).

BERT of half the depth, without segments and pooler, under tensor names of its own.
"""

from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Array, Float

from bayes_simfluence.networks.bert import LayerNames, layers_shapes, through_layers
from bayes_simfluence.networks.layers import ACTIVATIONS, embed, layer_norm, places
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

__all__ = ["FAMILY", "encode", "network", "settings_of", "shapes_of"]

EPSILON = 1e-12
"""Added to the variance in layer norm; no option of the configuration."""

UNUSED = (r"vocab_.*", r"(pre_)?classifier\..*", r"qa_outputs\..*", r"(.*\.)?position_ids")
"""Heads that ``hidden`` does not pass, and buffers."""


NAMES = LayerNames(
    layer="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm="output_layer_norm",
)


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> Settings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    prefix = prefix_of(tensors, "embeddings.", "distilbert.")
    quotient(config, "dim", "n_heads")
    check_tensors(tensors, shapes_of(config, prefix), UNUSED)
    activation = check_option(config, "activation", list(ACTIVATIONS))
    return Settings(
        layers=config.n_layers,
        heads=config.n_heads,
        epsilon=EPSILON,
        activation=activation,
        prefix=prefix,
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "") -> Shapes:
    """The tensors that ``encode`` reads."""
    start = f"{prefix}embeddings"
    return {
        f"{start}.word_embeddings.weight": (config.vocab_size, config.dim),
        f"{start}.position_embeddings.weight": (config.max_position_embeddings, config.dim),
        **weight_and_bias(f"{start}.LayerNorm", config.dim),
        **layers_shapes(NAMES, prefix, config.n_layers, config.dim, config.hidden_dim),
    }


def encode(
    settings: Settings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states of the last layer for one sequence; its segments are not used."""
    start = f"{settings.prefix}embeddings"
    hidden = embed(tensors[f"{start}.word_embeddings.weight"], sequence.tokens)
    hidden = hidden + places(tensors[f"{start}.position_embeddings.weight"], sequence.tokens)
    hidden = layer_norm(tensors, f"{start}.LayerNorm", hidden, settings.epsilon)
    return through_layers(settings, NAMES, tensors, hidden, sequence.attended)


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a DistilBERT checkpoint; raises what ``settings_of`` raises."""
    settings = settings_of(config, tensors)
    return encoder(config, partial(encode, settings), shapes_of(config, settings.prefix))


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
