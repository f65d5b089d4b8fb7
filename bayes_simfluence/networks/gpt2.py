"""GPT-2 as a pure function of the checkpoint's tensors (Radford et al. 2019).

Its dense layers (``Conv1D``) hold their weights as inward x outward.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.networks.layers import (
    ACTIVATIONS,
    attend,
    causal,
    embed,
    layer_norm,
    places,
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
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNUSED = (
    r"(.*\.)?attn\.(masked_)?bias",
    r"lm_head\.weight",
    r"score\.weight",
    r"multiple_choice_head\..*",
    r"classifier\..*",
)
"""Buffers, and heads that ``hidden_states`` does not pass."""


@dataclass(frozen=True, kw_only=True)
class GPT2Settings(Settings):
    """What the forward pass needs of a GPT-2 configuration.

    Attributes:
        scaled: scores are divided by the root of a head's size.
        scaled_by_layer: and by the layer's number, from 1.
    """

    scaled: bool
    scaled_by_layer: bool


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> GPT2Settings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    check_option(config, "add_cross_attention", [False], False)
    prefix = prefix_of(tensors, "wte.", "transformer.")
    quotient(config, "n_embd", "n_head")
    head = head_name(config, tensors, f"{prefix}wte.weight", "lm_head.weight")
    check_tensors(tensors, shapes_of(config, prefix, head), UNUSED)
    return GPT2Settings(
        layers=config.n_layer,
        heads=config.n_head,
        epsilon=config.layer_norm_epsilon,
        activation=check_option(config, "activation_function", list(ACTIVATIONS)),
        prefix=prefix,
        head=head,
        scaled=config.scale_attn_weights,
        scaled_by_layer=config.scale_attn_by_inverse_layer_idx,
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "", head: str | None = None) -> Shapes:
    """The tensors that ``hidden_states`` reads, and the head's."""
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    shapes: Shapes = {
        f"{prefix}wte.weight": (config.vocab_size, width),
        f"{prefix}wpe.weight": (config.n_positions, width),
        **weight_and_bias(f"{prefix}ln_f", width),
    }
    for layer in range(config.n_layer):
        name = f"{prefix}h.{layer}"
        shapes |= weight_and_bias(f"{name}.ln_1", width)
        shapes |= _conv_shapes(f"{name}.attn.c_attn", 3 * width, width)
        shapes |= _conv_shapes(f"{name}.attn.c_proj", width, width)
        shapes |= weight_and_bias(f"{name}.ln_2", width)
        shapes |= _conv_shapes(f"{name}.mlp.c_fc", inner, width)
        shapes |= _conv_shapes(f"{name}.mlp.c_proj", width, inner)
    return shapes | ({head: (config.vocab_size, width)} if head else {})


def hidden_states(
    settings: GPT2Settings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states after the last norm for one sequence; its segments are not used."""
    prefix, epsilon = settings.prefix, settings.epsilon
    hidden = embed(tensors[f"{prefix}wte.weight"], sequence.tokens)
    hidden = hidden + places(tensors[f"{prefix}wpe.weight"], sequence.tokens)
    mask = causal(sequence.attended)
    for layer in range(settings.layers):
        name = f"{prefix}h.{layer}"
        normed = layer_norm(tensors, f"{name}.ln_1", hidden, epsilon)
        fused = jnp.split(_conv(tensors, f"{name}.attn.c_attn", normed), 3, axis=-1)
        query, key, value = (split_heads(part, settings.heads) for part in fused)
        scale = query.shape[-1] ** -0.5 if settings.scaled else 1.0
        scale = scale / (layer + 1) if settings.scaled_by_layer else scale
        mixed = attend(query, key, value, mask, scale=scale)
        hidden = hidden + _conv(tensors, f"{name}.attn.c_proj", mixed)
        normed = layer_norm(tensors, f"{name}.ln_2", hidden, epsilon)
        inner = ACTIVATIONS[settings.activation](_conv(tensors, f"{name}.mlp.c_fc", normed))
        hidden = hidden + _conv(tensors, f"{name}.mlp.c_proj", inner)
    return layer_norm(tensors, f"{prefix}ln_f", hidden, epsilon)


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a GPT-2 checkpoint; raises what ``settings_of`` raises."""
    settings = settings_of(config, tensors)
    shapes = shapes_of(config, settings.prefix, settings.head)
    return decoder(config, partial(hidden_states, settings), shapes, settings.head)


FAMILY = Family(
    network,
    tables=("wte", "wpe"),
    tied=("lm_head",),
    lora_targets=("c_attn",),
    ia3_targets=("c_attn", "mlp.c_proj"),
    ia3_feedforward=("mlp.c_proj",),
    transposed=("c_attn", "q_attn", "c_proj", "c_fc"),
    prefix="transformer.",
    peft_task="CAUSAL_LM",
)


def _conv_shapes(name: str, outward: int, inward: int) -> Shapes:
    return {f"{name}.weight": (inward, outward), f"{name}.bias": (outward,)}


def _conv(
    tensors: Tensors, name: str, value: Float[Array, "token inward"]
) -> Float[Array, "token outward"]:
    return value @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"][None, :]
