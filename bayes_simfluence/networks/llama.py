"""Llama and its near kin as pure functions of the checkpoint's tensors.

Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288), Mistral (Jiang et al. 2023, arXiv
2310.06825; a sliding window) and Qwen 2 (arXiv 2407.10671; biases of query, key and value).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.networks.layers import (
    ACTIVATIONS,
    attend,
    causal,
    dense,
    embed,
    rms_norm,
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
    r"(.*\.)?rotary_emb\..*",
    r"lm_head\.weight",
    r"score\.weight",
    r"qa_outputs\..*",
    r"classifier\..*",
)
"""Buffers, and heads that ``hidden_states`` does not pass."""


@dataclass(frozen=True, kw_only=True)
class LlamaSettings(Settings):
    """What the forward pass needs of a Llama configuration.

    Attributes:
        groups: heads of a layer's keys and values.
        frequencies: of the rotary embedding, radians per token.
        window: how many tokens a token sees at most, None = all to its left.
    """

    groups: int
    frequencies: Float[np.ndarray, " pair"]
    window: int | None


def settings_of(config: "PretrainedConfig", tensors: Tensors) -> LlamaSettings:
    """The settings of a checkpoint's ``config.json``, checked against its tensors.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    if config.model_type == "qwen2":
        check_option(config, "use_sliding_window", [False], False)
    quotient(config, "num_attention_heads", "num_key_value_heads")
    prefix = prefix_of(tensors, "embed_tokens.", "model.")
    head = head_name(config, tensors, f"{prefix}embed_tokens.weight", "lm_head.weight")
    check_tensors(tensors, shapes_of(config, prefix, head), UNUSED)
    return LlamaSettings(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        epsilon=config.rms_norm_eps,
        activation=check_option(config, "hidden_act", list(ACTIVATIONS)),
        prefix=prefix,
        head=head,
        groups=config.num_key_value_heads,
        frequencies=frequencies_of(config, _size(config)),
        window=config.sliding_window if config.model_type == "mistral" else None,
    )


def shapes_of(config: "PretrainedConfig", prefix: str = "", head: str | None = None) -> Shapes:
    """The tensors that ``hidden_states`` reads, and the head's."""
    width, wide, size = config.hidden_size, config.intermediate_size, _size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    outward_bias = getattr(config, "attention_bias", False)
    inward_bias = outward_bias or config.model_type == "qwen2"
    inner_bias = getattr(config, "mlp_bias", False)
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (config.vocab_size, width),
        **weight_and_bias(f"{prefix}norm", width, bias=False),
    }
    for layer in range(config.num_hidden_layers):
        name = f"{prefix}layers.{layer}"
        attention = f"{name}.self_attn"
        for part, outward in (("q", queries), ("k", keys), ("v", keys)):
            shapes |= weight_and_bias(f"{attention}.{part}_proj", outward, width, bias=inward_bias)
        shapes |= weight_and_bias(f"{attention}.o_proj", width, queries, bias=outward_bias)
        for part in ("gate", "up"):
            shapes |= weight_and_bias(f"{name}.mlp.{part}_proj", wide, width, bias=inner_bias)
        shapes |= weight_and_bias(f"{name}.mlp.down_proj", width, wide, bias=inner_bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{name}.{norm}.weight"] = (width,)
    return shapes | ({head: (config.vocab_size, width)} if head else {})


def hidden_states(
    settings: LlamaSettings, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states after the last norm for one sequence; its segments are not used."""
    prefix, epsilon = settings.prefix, settings.epsilon
    hidden = embed(tensors[f"{prefix}embed_tokens.weight"], sequence.tokens)
    mask = causal(sequence.attended, settings.window)
    for layer in range(settings.layers):
        name = f"{prefix}layers.{layer}"
        normed = rms_norm(tensors, f"{name}.input_layernorm", hidden, epsilon)
        query, key, value = (
            split_heads(dense(tensors, f"{name}.self_attn.{part}_proj", normed), heads)
            for part, heads in zip(
                "qkv", (settings.heads, settings.groups, settings.groups), strict=True
            )
        )
        query, key = (rotate(part, settings.frequencies) for part in (query, key))
        mixed = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        hidden = hidden + dense(tensors, f"{name}.self_attn.o_proj", mixed)
        normed = rms_norm(tensors, f"{name}.post_attention_layernorm", hidden, epsilon)
        # SwiGLU (Shazeer 2020, arXiv 2002.05202)
        gate = ACTIVATIONS[settings.activation](dense(tensors, f"{name}.mlp.gate_proj", normed))
        inner = gate * dense(tensors, f"{name}.mlp.up_proj", normed)
        hidden = hidden + dense(tensors, f"{name}.mlp.down_proj", inner)
    return rms_norm(tensors, f"{prefix}norm", hidden, epsilon)


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a Llama, Mistral or Qwen 2 checkpoint; raises what ``settings_of`` raises."""
    settings = settings_of(config, tensors)
    shapes = shapes_of(config, settings.prefix, settings.head)
    return decoder(config, partial(hidden_states, settings), shapes, settings.head)


FAMILY = Family(
    network,
    tables=("embed_tokens",),
    tied=("lm_head",),
    lora_targets=("q_proj", "v_proj"),
    ia3_targets=("k_proj", "v_proj", "down_proj"),
    ia3_feedforward=("down_proj",),
    prefix="model.",
    peft_task="CAUSAL_LM",
)

# peft scales queries, not keys, in Qwen 2.
QWEN2 = replace(FAMILY, ia3_targets=("q_proj", "v_proj", "down_proj"))


def _size(config: "PretrainedConfig") -> int:
    """Coordinates of one head; they need not fill the hidden size."""
    stated: int | None = getattr(config, "head_dim", None)
    return stated or quotient(config, "hidden_size", "num_attention_heads")
