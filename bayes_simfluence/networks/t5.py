"""T5 as pure functions of the checkpoint's tensors (Raffel et al. 2020, arXiv 1910.10683).

Version 1.0 (ReLU, output layer tied to the embeddings, hidden states scaled before it) and 1.1 or
LM-adapted (gated GELU, an output layer of its own, no scaling). Attention scores are not scaled.
"""

import math
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.networks.layers import (
    ACTIVATIONS,
    attend,
    causal,
    dense,
    embed,
    everywhere,
    rms_norm,
    split_heads,
    vocabulary_logits,
)
from bayes_simfluence.networks.network import Family, Network, Sequence, Settings
from bayes_simfluence.networks.requirements import Shapes, check_option, check_tensors, prefix_of
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
"""Names of the one embedding table; which of them a file holds depends on who wrote it."""

UNUSED = (
    r"(.*\.)?EncDecAttention\.relative_attention_bias\.weight",
    r"classification_head\..*",
    r"qa_outputs\..*",
    r"classifier\..*",
)
"""Heads that the network does not pass, and a tensor that the authors' code never read."""


@dataclass(frozen=True, kw_only=True)
class T5Settings(Settings):
    """What the forward passes need of a T5 configuration.

    Attributes:
        decoder_layers: depth of the decoder; ``layers`` is that of the encoder.
        gated: the activation multiplies a second layer's output.
        scaled: hidden states are divided by the root of their size before the output layer.
        buckets, farthest: relative positions share this many biases, the last one from this
            distance on.
        embedding: name of the embedding table.
    """

    decoder_layers: int
    gated: bool
    scaled: bool
    buckets: int
    farthest: int
    embedding: str
    head: str


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> T5Settings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    check_option(config, "dense_act_fn", list(ACTIVATIONS))
    prefix = prefix_of(tensors, "encoder.", "transformer.")
    names = [f"{prefix}{table}.weight" for table in EMBEDDINGS]
    embedding = next((name for name in names if name in tensors), names[0])
    head = "lm_head.weight" if "lm_head.weight" in tensors else embedding
    check_tensors(tensors, shapes_of(config, prefix, embedding=embedding, head=head), UNUSED)
    return T5Settings(
        layers=config.num_layers,
        heads=config.num_heads,
        epsilon=config.layer_norm_epsilon,
        activation=config.dense_act_fn,
        prefix=prefix,
        head=head,
        decoder_layers=config.num_decoder_layers,
        gated=config.is_gated_act,
        scaled=getattr(config, "scale_decoder_outputs", config.tie_word_embeddings),
        buckets=config.relative_attention_num_buckets,
        farthest=config.relative_attention_max_distance,
        embedding=embedding,
    )


def shapes_of(
    config: "PretrainedConfig",
    prefix: str = "",
    *,
    embedding: str = "shared.weight",
    head: str = "shared.weight",
) -> Shapes:
    """The tensors that ``encode`` and ``seq2seq_logits`` read."""
    width, inside = config.d_model, config.num_heads * config.d_kv
    weights: Shapes = {}
    up = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
    for half, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        start = f"{prefix}{half}"
        first = f"{start}.block.0.layer.0.SelfAttention.relative_attention_bias"
        weights[first] = (config.relative_attention_num_buckets, config.num_heads)
        weights[f"{start}.final_layer_norm"] = (width,)
        parts = ["SelfAttention", *(["EncDecAttention"] if half == "decoder" else [])]
        for layer in range(layers):
            name = f"{start}.block.{layer}.layer"
            weights |= {f"{name}.{at}.layer_norm": (width,) for at in range(len(parts) + 1)}
            for at, part in enumerate(parts):
                weights |= {f"{name}.{at}.{part}.{role}": (inside, width) for role in "qkv"}
                weights[f"{name}.{at}.{part}.o"] = (width, inside)
            inner = f"{name}.{len(parts)}.DenseReluDense"
            weights |= {f"{inner}.{layer_name}": (config.d_ff, width) for layer_name in up}
            weights[f"{inner}.wo"] = (width, config.d_ff)
    tables = dict.fromkeys((embedding, head), (config.vocab_size, width))
    return {**tables, **{f"{name}.weight": shape for name, shape in weights.items()}}


def encode(
    settings: T5Settings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states of the encoder for one sequence; its segments are not used."""
    hidden = embed(tensors[settings.embedding], sequence.tokens)
    start = f"{settings.prefix}encoder"
    bias = _position_bias(settings, tensors, start, len(hidden), both_ways=True)
    mask = everywhere(len(hidden), sequence.attended)
    for layer in range(settings.layers):
        name = f"{start}.block.{layer}.layer"
        hidden = _attention(settings, tensors, f"{name}.0", hidden, mask, bias=bias)
        hidden = _feed_forward(settings, tensors, f"{name}.1", hidden)
    return rms_norm(tensors, f"{start}.final_layer_norm", hidden, settings.epsilon)


def seq2seq_logits(
    settings: T5Settings, tensors: Tensors, source: Sequence, inputs: Int[Array, " target"]
) -> Float[Array, "target vocabulary"]:
    """Logits at each position of the decoder.

    Args:
        inputs: the decoder's input tokens: the start token, then the target without its last
            token. What stands right of a position does not change it, so padding at the end needs
            no mask.
    """
    encoded = encode(settings, tensors, source)
    hidden = embed(tensors[settings.embedding], inputs)
    start = f"{settings.prefix}decoder"
    bias = _position_bias(settings, tensors, start, len(hidden), both_ways=False)
    mask = causal(jnp.ones(len(hidden), bool))
    across = everywhere(len(hidden), source.attended)
    for layer in range(settings.decoder_layers):
        name = f"{start}.block.{layer}.layer"
        hidden = _attention(settings, tensors, f"{name}.0", hidden, mask, bias=bias)
        hidden = _attention(settings, tensors, f"{name}.1", hidden, across, encoded=encoded)
        hidden = _feed_forward(settings, tensors, f"{name}.2", hidden)
    hidden = rms_norm(tensors, f"{start}.final_layer_norm", hidden, settings.epsilon)
    hidden = hidden * hidden.shape[-1] ** -0.5 if settings.scaled else hidden
    return vocabulary_logits(tensors[settings.head], hidden)


def buckets(
    distances: Int[np.ndarray, "*shape"], count: int, farthest: int, *, both_ways: bool
) -> Int[np.ndarray, "*shape"]:
    """Which bias a key's distance from its query has (Raffel et al. 2020, section 2.1).

    The first half of the buckets holds one distance each, the second half ever more of them, up to
    ``farthest``. With ``both_ways`` keys to the right have a second set; without, distance 0.

    >>> buckets(np.array([-9, -3, 0, 3, 9]), 8, 16, both_ways=True)
    array([3, 2, 0, 6, 7])
    """
    if both_ways:
        count //= 2
        start, back = np.where(distances > 0, count, 0), np.abs(distances)
    else:
        start, back = np.zeros_like(distances), np.maximum(-distances, 0)
    exact = count // 2
    # In float32, as the published networks were trained: bounds of buckets lie on whole distances.
    ratio = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact))
    far = ratio / np.float32(math.log(farthest / exact)) * np.float32(count - exact)
    logarithmic = np.minimum(exact + far.astype(distances.dtype), count - 1)
    return start + np.where(back < exact, back, logarithmic)


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a T5 checkpoint.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    settings = settings_of(config, tensors)
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return Network(
        family=config.model_type,
        kind="encoder-decoder",
        hidden=partial(encode, settings),
        positions=None,
        width=config.d_model,
        vocabulary=config.vocab_size,
        seq2seq_logits=partial(seq2seq_logits, settings),
        start_token=config.pad_token_id if start is None else start,
        shapes=shapes_of(config, settings.prefix, embedding=settings.embedding, head=settings.head),
    )


FAMILY = Family(
    network,
    tables=("shared", "embed_tokens", "relative_attention_bias"),
    tied=("lm_head", "encoder.embed_tokens", "decoder.embed_tokens"),
    lora_targets=("q", "v"),
    ia3_targets=("k", "v", "wo"),
    ia3_feedforward=("wo",),
    peft_task="SEQ_2_SEQ_LM",
)


def _position_bias(
    settings: T5Settings, tensors: Tensors, start: str, tokens: int, *, both_ways: bool
) -> Float[Array, "head query key"]:
    """Biases of relative positions; a half's first layer holds them for all its layers."""
    at = np.arange(tokens)
    which = buckets(
        at[None, :] - at[:, None], settings.buckets, settings.farthest, both_ways=both_ways
    )
    table = tensors[f"{start}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return jnp.moveaxis(table[which], -1, 0)


def _attention(
    settings: T5Settings,
    tensors: Tensors,
    name: str,
    hidden: Float[Array, "query hidden"],
    mask: Bool[Array, "query key"],
    *,
    bias: Float[Array, "head query key"] | None = None,
    encoded: Float[Array, "key hidden"] | None = None,
) -> Float[Array, "query hidden"]:
    """One attention layer and its residual: over ``encoded``, or over ``hidden`` itself."""
    normed = rms_norm(tensors, f"{name}.layer_norm", hidden, settings.epsilon)
    part = f"{name}.{'SelfAttention' if encoded is None else 'EncDecAttention'}"
    read = normed if encoded is None else encoded
    query, key, value = (
        split_heads(dense(tensors, f"{part}.{role}", inward), settings.heads)
        for role, inward in zip("qkv", (normed, read, read), strict=True)
    )
    mixed = attend(query, key, value, mask, scale=1.0, bias=bias)
    return hidden + dense(tensors, f"{part}.o", mixed)


def _feed_forward(
    settings: T5Settings, tensors: Tensors, name: str, hidden: Float[Array, "token hidden"]
) -> Float[Array, "token hidden"]:
    normed = rms_norm(tensors, f"{name}.layer_norm", hidden, settings.epsilon)
    up: Listed[str] = ("wi_0", "wi_1") if settings.gated else ("wi",)
    first, *rest = (dense(tensors, f"{name}.DenseReluDense.{layer}", normed) for layer in up)
    inner = ACTIVATIONS[settings.activation](first)
    inner = inner * rest[0] if settings.gated else inner
    return hidden + dense(tensors, f"{name}.DenseReluDense.wo", inner)
