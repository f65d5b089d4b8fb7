"""GPT-NeoX, the network of Pythia, as a pure function of the checkpoint's tensors.

Black et al. 2022 (arXiv 2204.06745), Biderman et al. 2023 (arXiv 2304.01373).
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.networks.layers import (
    ACTIVATIONS,
    attend,
    causal,
    dense,
    embed,
    layer_norm,
    rotate,
    split_heads,
)
from bayes_simfluence.networks.network import Family, Network, Sequence, Settings, decoder
from bayes_simfluence.networks.requirements import (
    Shapes,
    check_option,
    check_tensors,
    head_name,
    prefix_of,
    quotient,
    weight_and_bias,
)
from bayes_simfluence.networks.rotary import frequencies_of
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNUSED = (
    r"(.*\.)?attention\.(masked_)?bias",
    r"(.*\.)?rotary_emb\..*",
    r"embed_out\.weight",
    r"score\.weight",
    r"qa_outputs\..*",
    r"classifier\..*",
)
"""Buffers, and heads that ``hidden_states`` does not pass."""


@dataclass(frozen=True, kw_only=True)
class GPTNeoXSettings(Settings):
    """What the forward pass needs of a GPT-NeoX configuration.

    Attributes:
        parallel: attention and feed-forward both read the layer's input.
        frequencies: of the rotary embedding, radians per token.
    """

    parallel: bool
    frequencies: Float[np.ndarray, " pair"]


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> GPTNeoXSettings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    prefix = prefix_of(tensors, "embed_in.", "gpt_neox.")
    size = quotient(config, "hidden_size", "num_attention_heads")
    head = head_name(
        config, tensors, f"{prefix}embed_in.weight", "embed_out.weight", "lm_head.weight"
    )
    check_tensors(tensors, shapes_of(config, prefix, head), UNUSED)
    return GPTNeoXSettings(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        activation=check_option(config, "hidden_act", list(ACTIVATIONS)),
        prefix=prefix,
        head=head,
        parallel=config.use_parallel_residual,
        frequencies=frequencies_of(config, size),
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "", head: str | None = None) -> Shapes:
    """The tensors that ``hidden_states`` reads, and the head's."""
    width, inner = config.hidden_size, config.intermediate_size
    bias = getattr(config, "attention_bias", True)
    shapes: Shapes = {
        f"{prefix}embed_in.weight": (config.vocab_size, width),
        **weight_and_bias(f"{prefix}final_layer_norm", width),
    }
    for layer in range(config.num_hidden_layers):
        name = f"{prefix}layers.{layer}"
        shapes |= weight_and_bias(f"{name}.input_layernorm", width)
        shapes |= weight_and_bias(f"{name}.attention.query_key_value", 3 * width, width, bias=bias)
        shapes |= weight_and_bias(f"{name}.attention.dense", width, width, bias=bias)
        shapes |= weight_and_bias(f"{name}.post_attention_layernorm", width)
        shapes |= weight_and_bias(f"{name}.mlp.dense_h_to_4h", inner, width)
        shapes |= weight_and_bias(f"{name}.mlp.dense_4h_to_h", width, inner)
    return shapes | ({head: (config.vocab_size, width)} if head else {})


def hidden_states(
    settings: GPTNeoXSettings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states after the last norm for one sequence; its segments are not used."""
    prefix, epsilon = settings.prefix, settings.epsilon
    hidden = embed(tensors[f"{prefix}embed_in.weight"], sequence.tokens)
    mask = causal(sequence.attended)
    for layer in range(settings.layers):
        name = f"{prefix}layers.{layer}"
        normed = layer_norm(tensors, f"{name}.input_layernorm", hidden, epsilon)
        fused = dense(tensors, f"{name}.attention.query_key_value", normed)
        # Each head's query, key and value stand side by side.
        query, key, value = jnp.split(split_heads(fused, settings.heads), 3, axis=-1)
        query, key = (rotate(part, settings.frequencies) for part in (query, key))
        mixed = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        after = hidden + dense(tensors, f"{name}.attention.dense", mixed)
        read = hidden if settings.parallel else after
        normed = layer_norm(tensors, f"{name}.post_attention_layernorm", read, epsilon)
        inner = ACTIVATIONS[settings.activation](
            dense(tensors, f"{name}.mlp.dense_h_to_4h", normed)
        )
        hidden = after + dense(tensors, f"{name}.mlp.dense_4h_to_h", inner)
    return layer_norm(tensors, f"{prefix}final_layer_norm", hidden, epsilon)


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a GPT-NeoX or Pythia checkpoint; raises what ``settings_of`` raises."""
    settings = settings_of(config, tensors)
    shapes = shapes_of(config, settings.prefix, settings.head)
    return decoder(config, partial(hidden_states, settings), shapes, settings.head)


FAMILY = Family(
    network,
    tables=("embed_in",),
    tied=("embed_out", "lm_head"),
    lora_targets=("query_key_value",),
    ia3_targets=("query_key_value", "dense_4h_to_h"),
    ia3_feedforward=("dense_4h_to_h",),
    prefix="gpt_neox.",
    peft_task="CAUSAL_LM",
)
