"""Small configurations of every family, and checkpoints of random tensors; no PyTorch here."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.networks import bert, gpt2, gpt_neox, llama, t5
from bayes_simfluence.networks.checkpoint import Checkpoint
from bayes_simfluence.networks.network import Sequence

VOCABULARY, LENGTH = 60, 10
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
GROUPED = {**ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 32}
T5 = {"d_model": 16, "d_kv": 3, "d_ff": 24, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "relative_attention_max_distance": 12}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}

CASES = {
    "bert": ("bert", bert, {**ENCODER, "max_position_embeddings": 16}),
    "roberta": ("roberta", bert, {**ENCODER, "max_position_embeddings": 20, "pad_token_id": 1}),
    "distilbert": ("distilbert", bert, {"dim": 16, "n_layers": 2, "n_heads": 4}),
    "gpt2": ("gpt2", gpt2, GPT2),
    "gpt2 untied": ("gpt2", gpt2, {**GPT2, **UNTIED, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": (
        "gpt_neox",
        gpt_neox,
        {**ENCODER, "max_position_embeddings": 32, "rotary_pct": 0.5},
    ),
    "t5": ("t5", t5, T5),
    "t5 1.1": ("t5", t5, {**T5, **V11}),
    "llama": ("llama", llama, {**GROUPED, **UNTIED}),
    "llama 3": ("llama", llama, {**GROUPED, **TIED, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", llama, {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", llama, {**GROUPED, **TIED}),
}
"""Case -> family, its module and options of its configuration."""
CASES["distilbert"][2].update(hidden_dim=24, max_position_embeddings=16)

HEADS = {"gpt2 untied": "lm_head", "gpt_neox": "embed_out", "t5 1.1": "lm_head"}
HEADS |= {"llama": "lm_head", "mistral": "lm_head"}
"""Case -> its output layer, where that is a tensor of its own."""


def config_of(case, **changes):
    """The configuration of a case, made by transformers' class without PyTorch."""
    from transformers import AutoConfig

    family, _, options = CASES[case]
    return AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, **options, **changes})


def tensors_of(case, config, prefix=""):
    """Random tensors of every shape that the network asks for; norms near one."""
    rng, module = np.random.default_rng(1), CASES[case][1]
    head = {"head": f"{HEADS[case]}.weight"} if case in HEADS else {}
    if CASES[case][0] == "t5":
        head["embedding"] = f"{prefix}shared.weight"
        head.setdefault("head", head["embedding"])
    shapes = module.shapes_of(config, prefix, **head)
    drawn = {name: rng.normal(0.0, 0.3, shape) for name, shape in shapes.items()}
    for name in drawn:
        if "norm" in name.lower() or ".ln_" in f".{name}":
            drawn[name] = drawn[name] * 0.3 + name.endswith("weight")
    return {name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()}


def checkpoint_of(case, folder, prefix="", **changes):
    config = config_of(case, **changes)
    return Checkpoint(case, folder, config, tensors_of(case, config, prefix))


def some_sequence(seed=0, length=LENGTH, padded=0):
    """A sequence whose last ``padded`` tokens are padding (id 1); no other token has that id."""
    tokens = np.random.default_rng(seed).integers(2, VOCABULARY, length)
    real = np.arange(length) < length - padded
    segments = (np.arange(length) >= 4) & real
    return Sequence(
        jnp.asarray(np.where(real, tokens, 1)), jnp.asarray(segments.astype(int)), jnp.asarray(real)
    )


def output_of(network, tensors, sequence, inputs=None):
    """What the network says of a sequence: logits where it has them, hidden states otherwise."""
    if network.seq2seq_logits is not None:
        inputs = jnp.asarray([0, 5, 9, 13]) if inputs is None else inputs
        return jax.jit(network.seq2seq_logits)(tensors, sequence, inputs)
    return jax.jit(network.logits or network.hidden)(tensors, sequence)


@pytest.fixture(scope="session")
def made():
    """What tests of networks make their cases with."""
    return SimpleNamespace(
        checkpoint=checkpoint_of,
        config=config_of,
        tensors=tensors_of,
        sequence=some_sequence,
        output=output_of,
    )


@pytest.fixture(params=CASES)
def each(request):
    """Every case in turn."""
    return request.param
