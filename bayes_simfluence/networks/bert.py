"""BERT and its near kin as pure functions of the checkpoint's tensors.

BERT (Devlin et al. 2019, arXiv 1810.04805; MiniLM checkpoints are BERT), RoBERTa (Liu et al. 2019,
arXiv 1907.11692) and XLM-RoBERTa (Conneau et al. 2020), whose positions count only tokens that are
not padding, beginning after the padding's id, and DistilBERT (Sanh et al. 2019, arXiv 1910.01108),
of half the depth, without segments and pooler, under tensor names of its own.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import count_of
from bayes_simfluence.networks.layers import (
    ACTIVATIONS,
    attend,
    dense,
    embed,
    everywhere,
    fits,
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

DISTILBERT_EPSILON = 1e-12
"""Added to the variance in DistilBERT's layer norm; no option of its configuration."""


class Names(NamedTuple):
    """What an architecture calls the options of its configuration and the parts of a layer.

    ``layer`` stands before the layer's number; ``unused`` are patterns of buffers, and of heads
    that ``encode`` does not pass.
    """

    width: str
    heads: str
    depth: str
    inner: str
    activation: str
    layer: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    norm: str
    unused: tuple[str, ...]


BERT_NAMES = Names(
    width="hidden_size",
    heads="num_attention_heads",
    depth="num_hidden_layers",
    inner="intermediate_size",
    activation="hidden_act",
    layer="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
    unused=(
        r"(.*\.)?(position_ids|token_type_ids)",
        r"cls\..*",
        r"lm_head\..*",
        r"(.*\.)?pooler\..*",
        r"classifier\..*",
        r"qa_outputs\..*",
    ),
)

DISTILBERT_NAMES = Names(
    width="dim",
    heads="n_heads",
    depth="n_layers",
    inner="hidden_dim",
    activation="activation",
    layer="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm="output_layer_norm",
    unused=(r"vocab_.*", r"(pre_)?classifier\..*", r"qa_outputs\..*", r"(.*\.)?position_ids"),
)


@dataclass(frozen=True, kw_only=True)
class BertSettings(Settings):
    """What the forward pass needs of a configuration.

    Attributes:
        names: what the checkpoint calls the parts of a layer.
        segments: embeddings of segments are added; otherwise segments are not used.
        padding: id of the padding token where positions count from it (RoBERTa), None elsewhere.
    """

    names: Names
    segments: bool
    padding: int | None


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> BertSettings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    names, is_distilbert = _names(config), config.model_type == "distilbert"
    is_roberta = config.model_type in ("roberta", "xlm-roberta")
    if not is_distilbert:
        check_option(config, "position_embedding_type", ["absolute"], "absolute")
        check_option(config, "is_decoder", [False], False)
        check_option(config, "add_cross_attention", [False], False)
    # What a model with a head calls the encoder inside it.
    family = "roberta" if is_roberta else config.model_type
    prefix = prefix_of(tensors, "embeddings.", f"{family}.")
    quotient(config, names.width, names.heads)
    check_tensors(tensors, shapes_of(config, prefix), names.unused)
    padding = None
    if is_roberta:
        option = "config.json pad_token_id"
        padding = count_of(option, config.pad_token_id, do="set it in config.json")
    return BertSettings(
        layers=getattr(config, names.depth),
        heads=getattr(config, names.heads),
        epsilon=DISTILBERT_EPSILON if is_distilbert else config.layer_norm_eps,
        activation=check_option(config, names.activation, list(ACTIVATIONS)),
        prefix=prefix,
        names=names,
        segments=not is_distilbert,
        padding=padding,
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "") -> Shapes:
    """The tensors that ``encode`` reads."""
    names, start = _names(config), f"{prefix}embeddings"
    width, inner = getattr(config, names.width), getattr(config, names.inner)
    shapes: Shapes = {
        f"{start}.word_embeddings.weight": (config.vocab_size, width),
        f"{start}.position_embeddings.weight": (config.max_position_embeddings, width),
    }
    if config.model_type != "distilbert":
        shapes[f"{start}.token_type_embeddings.weight"] = (config.type_vocab_size, width)
    shapes |= weight_and_bias(f"{start}.LayerNorm", width)
    for layer in range(getattr(config, names.depth)):
        name = f"{prefix}{names.layer}.{layer}"
        for part in (names.query, names.key, names.value, names.output):
            shapes |= weight_and_bias(f"{name}.{part}", width, width)
        shapes |= weight_and_bias(f"{name}.{names.attention_norm}", width)
        shapes |= weight_and_bias(f"{name}.{names.up}", inner, width)
        shapes |= weight_and_bias(f"{name}.{names.down}", width, inner)
        shapes |= weight_and_bias(f"{name}.{names.norm}", width)
    return shapes


def encode(
    settings: BertSettings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states of the last layer, whose norms follow each residual, for one sequence."""
    start, names, epsilon = f"{settings.prefix}embeddings", settings.names, settings.epsilon
    hidden = embed(tensors[f"{start}.word_embeddings.weight"], sequence.tokens)
    table = tensors[f"{start}.position_embeddings.weight"]
    hidden = hidden + _positions(table, sequence.tokens, settings.padding)
    if settings.segments:
        table = tensors[f"{start}.token_type_embeddings.weight"]
        hidden = hidden + embed(table, sequence.segments)
    hidden = layer_norm(tensors, f"{start}.LayerNorm", hidden, epsilon)
    mask = everywhere(len(hidden), sequence.attended)
    for layer in range(settings.layers):
        name = f"{settings.prefix}{names.layer}.{layer}"
        query, key, value = (
            split_heads(dense(tensors, f"{name}.{part}", hidden), settings.heads)
            for part in (names.query, names.key, names.value)
        )
        mixed = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        mixed = hidden + dense(tensors, f"{name}.{names.output}", mixed)
        hidden = layer_norm(tensors, f"{name}.{names.attention_norm}", mixed, epsilon)
        inner = ACTIVATIONS[settings.activation](dense(tensors, f"{name}.{names.up}", hidden))
        mixed = hidden + dense(tensors, f"{name}.{names.down}", inner)
        hidden = layer_norm(tensors, f"{name}.{names.norm}", mixed, epsilon)
    return hidden


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a checkpoint of these architectures; raises what ``settings_of`` raises."""
    settings = settings_of(config, tensors)
    shapes = shapes_of(config, settings.prefix) | _pooler_shapes(config, tensors, settings.prefix)
    rows, padding = config.max_position_embeddings, settings.padding
    positions = rows if padding is None else rows - padding - 1
    return encoder(config, partial(encode, settings), shapes, positions)


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

ROBERTA = replace(FAMILY, tied=("lm_head.decoder",), prefix="roberta.", classifier=None)

DISTILBERT = Family(
    network,
    tables=("word_embeddings", "position_embeddings"),
    tied=("vocab_projector",),
    # peft has no defaults for DistilBERT: the layers that it adapts of BERT.
    lora_targets=("q_lin", "v_lin"),
    ia3_targets=("k_lin", "v_lin", "lin2"),
    ia3_feedforward=("lin2",),
    prefix="distilbert.",
)


def _names(config: "PretrainedConfig") -> Names:
    return DISTILBERT_NAMES if config.model_type == "distilbert" else BERT_NAMES


def _positions(
    table: Float[Array, "position hidden"], tokens: Int[Array, " token"], padding: int | None
) -> Float[Array, "token hidden"]:
    """Embeddings of 0, 1, 2, ..., or of RoBERTa's positions: padding's is its id."""
    if padding is None:
        return places(table, tokens)
    fits(tokens, len(table) - padding - 1)
    words = tokens != padding
    return embed(table, jnp.where(words, jnp.cumsum(words), 0) + padding)


def _pooler_shapes(config: "PretrainedConfig", tensors: Tensors, prefix: str) -> Shapes:
    """The tensors of the tanh layer over the first token, none where the checkpoint has none."""
    shapes = weight_and_bias(f"{prefix}pooler.dense", config.hidden_size, config.hidden_size)
    held = {name: tensors[name] for name in shapes if name in tensors}
    if not held:
        return {}
    check_tensors(held, shapes)
    return shapes
