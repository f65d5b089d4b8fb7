"""What every network does, whatever the family: shapes, who sees whom, padding, dtype, refusals."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.checkpoint import Checkpoint, network_of
from bayes_simfluence.networks.families import FAMILIES
from bayes_simfluence.networks.heads import HEAD, check_pooling, head_logits, with_head
from bayes_simfluence.networks.layers import attend, causal, rotate
from bayes_simfluence.networks.rotary import frequencies_of
from bayes_simfluence.networks.t5 import buckets
from bayes_simfluence.tuning.layers import fans, linear_layers, matched

INPUTS = np.array([0, 5, 9, 13])


def changed(sequence, at):
    """The same sequence with another token at one place."""
    return sequence._replace(tokens=sequence.tokens.at[at].add(1))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_shapes_and_who_sees_whom(made, each, tmp_path):
    checkpoint = made.checkpoint(each, tmp_path)
    network, tensors = network_of(checkpoint), checkpoint.tensors
    assert network.family in FAMILIES
    assert (network.width, network.vocabulary) == (16, 60)
    whole, padded = made.sequence(length=8), made.sequence(length=8, padded=3)
    output = made.output(network, tensors, whole)
    assert output.dtype == jnp.float32
    assert np.isfinite(output).all()
    sizes = {"encoder": (8, 16), "decoder": (8, 60), "encoder-decoder": (4, 60)}
    assert output.shape == sizes[network.kind]
    later = made.output(network, tensors, changed(whole, 6))
    if network.kind == "decoder":
        close(later[:6], output[:6])
        assert np.abs(later[6:] - output[6:]).max(axis=1).min() > 1e-3
    else:
        assert np.abs(later - output).max(axis=1).min() > 1e-4
    if network.kind == "encoder-decoder":
        other = made.output(network, tensors, whole, jnp.asarray(INPUTS).at[2].add(1))
        close(other[:2], output[:2])
        assert np.abs(other[2:] - output[2:]).max() > 1e-3
    short = made.output(network, tensors, padded)
    rubbish = padded._replace(tokens=padded.tokens.at[6].set(7))
    real = slice(None) if network.kind == "encoder-decoder" else slice(5)
    if network.family != "roberta":  # It takes positions from the padding's own id.
        close(made.output(network, tensors, rubbish)[real], short[real])
    if network.kind != "decoder":
        cut = jax.tree.map(lambda leaf: leaf[:5], padded)
        close(made.output(network, tensors, cut)[real], short[real])


def test_bfloat16_is_close_to_float32(made, each, tmp_path):
    checkpoint = made.checkpoint(each, tmp_path)
    network = network_of(checkpoint)
    narrow = {name: value.astype(jnp.bfloat16) for name, value in checkpoint.tensors.items()}
    wide = {name: value.astype(jnp.float32) for name, value in narrow.items()}
    sequence = made.sequence(length=8)
    exact = np.asarray(made.output(network, wide, sequence))
    output = made.output(network, narrow, sequence)
    assert output.dtype == (jnp.bfloat16 if network.kind == "encoder" else jnp.float32)
    error = np.asarray(output, "f4") - exact
    assert 0.0 < np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)


def test_the_row_of_a_family_names_layers_of_its_networks(made, each, tmp_path):
    checkpoint = made.checkpoint(each, tmp_path)
    family = FAMILIES[checkpoint.config.model_type]
    layers = linear_layers(checkpoint.tensors, family)
    assert family.lora_targets
    for pattern in (*family.lora_targets, *family.ia3_targets):
        assert matched(layers, pattern)
    assert set() < set(family.ia3_feedforward) < set(family.ia3_targets)
    tables = [name for name in checkpoint.tensors if name.endswith(f"{family.tables[0]}.weight")]
    assert [checkpoint.tensors[name].shape for name in tables] == [(60, 16)]
    assert not {name.removesuffix(".weight") for name in tables} & set(layers)
    for pattern in family.ia3_feedforward:
        sizes = {fans(checkpoint.tensors, name, family) for name in matched(layers, pattern)}
        assert (24, 16) in sizes


def test_the_docs_list_every_architecture():
    docs = Path(__file__).parents[3] / "docs" / "recording.md"
    rows = [line for line in docs.read_text("utf-8").splitlines() if line.startswith("| ")]
    for model_type in FAMILIES:
        assert any(f"`{model_type}`" in row for row in rows), model_type


PREFIXES = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert."}
PREFIXES |= {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "llama": "model."}
PREFIXES |= {"t5": "transformer."}


@pytest.mark.parametrize("named", PREFIXES)
def test_names_within_a_model_with_a_head(made, named, tmp_path):
    plain = made.checkpoint(named, tmp_path)
    inside = made.checkpoint(named, tmp_path, PREFIXES[named])
    assert set(inside.tensors) != set(plain.tensors)
    first, second = network_of(plain), network_of(inside)
    sequence = made.sequence(length=8)
    hidden = first.hidden(plain.tensors, sequence)
    np.testing.assert_array_equal(hidden, second.hidden(inside.tensors, sequence))


def test_tensors_that_are_missing_misshapen_or_unknown_are_named(made, each, tmp_path):
    checkpoint = made.checkpoint(each, tmp_path)
    name = list(network_of(checkpoint).shapes)[-3]
    tensors = checkpoint.tensors

    def refused(changes):
        return pytest.raises(Misuse), dataclasses.replace(checkpoint, tensors=changes)

    context, wrong = refused({other: value for other, value in tensors.items() if other != name})
    with context as error:
        network_of(wrong)
    assert f"got no tensor {name}" in str(error.value)
    assert "config.json" in str(error.value)
    context, wrong = refused({**tensors, name: jnp.zeros((3, 5))})
    with context as error:
        network_of(wrong)
    assert f"got {name} of shape (3, 5); expected {tensors[name].shape}" in str(error.value)
    context, wrong = refused({**tensors, f"{name}.lora_A.weight": jnp.zeros(3)})
    with context as error:
        network_of(wrong)
    assert f"would ignore: {name}.lora_A.weight" in str(error.value)
    assert "merge adapters" in str(error.value)


def test_buffers_and_other_heads_are_let_be(made, tmp_path):
    buffers = {
        "bert": ["embeddings.position_ids", "cls.predictions.bias"],
        "gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias"],
        "gpt_neox": ["layers.0.attention.rotary_emb.inv_freq", "layers.0.attention.bias"],
        "llama": ["layers.0.self_attn.rotary_emb.inv_freq", "score.weight"],
        "t5": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
    }
    for case, names in buffers.items():
        checkpoint = made.checkpoint(case, tmp_path)
        more = {name: jnp.zeros(2) for name in names}
        network = network_of(dataclasses.replace(checkpoint, tensors=checkpoint.tensors | more))
        assert set(network.shapes) == set(checkpoint.tensors)


def test_a_further_layer_is_named(made, tmp_path):
    checkpoint = made.checkpoint("bert", tmp_path)
    config = made.config("bert", num_hidden_layers=1)
    with pytest.raises(Misuse, match=r"would ignore: encoder\.layer\.1\..* more\)"):
        network_of(dataclasses.replace(checkpoint, config=config))


@pytest.mark.parametrize(
    ("case", "changes", "match"),
    [
        (
            "bert",
            {"hidden_act": "celu"},
            "config.json hidden_act: got 'celu'; expected one of gelu",
        ),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: got 'rel"),
        ("bert", {"is_decoder": True}, "is_decoder: got True; expected one of False"),
        ("bert", {"num_attention_heads": 3}, "num_attention_heads: got 3; .*hidden_size = 16"),
        ("roberta", {"pad_token_id": None}, "pad_token_id: got None"),
        ("distilbert", {"activation": "mish"}, "activation: got 'mish'"),
        ("gpt2", {"activation_function": "mish"}, "activation_function: got 'mish'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: got True"),
        ("gpt_neox", {"hidden_act": "mish"}, "hidden_act: got 'mish'"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "dense_act_fn: got 'mish'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act: got 'mish'"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "use_sliding_window: got True",
        ),
    ],
)
def test_options_that_are_not_built_are_named(made, tmp_path, case, changes, match):
    checkpoint = made.checkpoint(case, tmp_path)
    config = made.config(case)
    for name, value in changes.items():
        setattr(config, name, value)
    if "feed_forward_proj" in changes:
        config.dense_act_fn = "mish"
    with pytest.raises(Misuse, match=match):
        network_of(dataclasses.replace(checkpoint, config=config))


def test_another_architecture_is_named_with_the_supported_list(made, tmp_path):
    from transformers import OPTConfig

    with pytest.raises(Misuse, match=r"architecture: got 'opt'; expected one of: bert, .*qwen2"):
        network_of(Checkpoint("x", tmp_path, OPTConfig(), {}))


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "gpt2"])
def test_more_tokens_than_positions_are_refused(made, tmp_path, case):
    checkpoint = made.checkpoint(case, tmp_path)
    network = network_of(checkpoint)
    with pytest.raises(Misuse, match=f"at most the network's {network.positions} positions"):
        network.hidden(checkpoint.tensors, made.sequence(length=network.positions + 1))


def test_a_decoder_without_an_output_layer_has_no_logits(made, tmp_path):
    checkpoint = made.checkpoint("llama", tmp_path)
    body = {name: value for name, value in checkpoint.tensors.items() if name != "lm_head.weight"}
    network = network_of(dataclasses.replace(checkpoint, tensors=body))
    assert network.logits is None
    assert network.hidden(body, made.sequence(length=8)).shape == (8, 16)


# Heads


@pytest.mark.parametrize("named", ["bert", "gpt2", "t5"])
def test_heads_of_every_pooling(made, tmp_path, named, key):
    checkpoint = made.checkpoint(named, tmp_path)
    tensors = dict(checkpoint.tensors)
    if named == "bert":
        tensors |= {"pooler.dense.weight": jnp.eye(16), "pooler.dense.bias": jnp.zeros(16)}
    network = network_of(dataclasses.replace(checkpoint, tensors=tensors))
    tensors = with_head(tensors, network, 3, key)
    tensors[HEAD[1]] = jnp.arange(3.0)
    sequence = made.sequence(length=8, padded=3)
    hidden = np.asarray(network.hidden(tensors, sequence))
    expected = {
        "mean": hidden[:5].mean(axis=0),
        "cls": hidden[0],
        "last": hidden[4],
        "pooler": np.tanh(hidden[0]),
    }
    allowed = {"bert": ["mean", "cls", "pooler"], "gpt2": ["mean", "last"], "t5": ["mean"]}[named]
    for pooling, vector in expected.items():
        if pooling not in allowed:
            with pytest.raises(Misuse, match=f"this {named} checkpoint: got '{pooling}'; .*mean"):
                check_pooling(network, tensors, pooling)
            continue
        check_pooling(network, tensors, pooling)
        logits = vector @ np.asarray(tensors[HEAD[0]]).T + np.arange(3.0)
        np.testing.assert_allclose(head_logits(network, tensors, sequence, pooling), logits, 1e-4)


def test_a_fresh_head_has_the_dtype_of_the_network(made, tmp_path, key):
    checkpoint = made.checkpoint("bert", tmp_path)
    network = network_of(checkpoint)
    narrow = {name: value.astype(jnp.bfloat16) for name, value in checkpoint.tensors.items()}
    assert with_head(narrow, network, 2, key)[HEAD[0]].dtype == jnp.bfloat16
    assert with_head(checkpoint.tensors, network, 2, key)[HEAD[0]].dtype == jnp.float32


# Shared pieces


def test_grouped_attention_against_plain_loops(rng):
    query, key, value = (rng.normal(size=(5, heads, 3)) for heads in (4, 2, 2))
    mask, bias = rng.random((5, 5)) < 0.7, rng.normal(size=(4, 5, 5))
    mask[:, 0] = True
    mixed = attend(
        *(jnp.asarray(array) for array in (query, key, value, mask)),
        scale=0.7,
        bias=jnp.asarray(bias),
    )
    expected = np.zeros((5, 4, 3))
    for at in range(5):
        for head in range(4):
            scores = 0.7 * key[:, head // 2] @ query[at, head] + bias[head, at]
            shares = np.where(mask[at], np.exp(scores), 0.0)
            expected[at, head] = shares / shares.sum() @ value[:, head // 2]
    np.testing.assert_allclose(mixed, expected.reshape(5, 12), rtol=1e-4)


def test_a_row_that_attends_to_nothing_stays_finite():
    zero = jnp.zeros((2, 1, 2))
    mixed = attend(zero, zero, zero + 3.0, jnp.zeros((2, 2), bool), scale=1.0)
    np.testing.assert_array_equal(mixed, 3.0)


def test_masks_of_decoders():
    attended = jnp.asarray([True, True, True, False])
    np.testing.assert_array_equal(
        causal(attended).astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    )
    np.testing.assert_array_equal(
        causal(attended, 2).astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    )


def test_rotation_keeps_lengths_and_sees_distances_only(rng):
    query, key = (np.tile(rng.normal(size=(1, 1, 6)), (7, 1, 1)) for _ in range(2))
    frequencies = np.array([1.0, 0.3], "f4")
    turned, other = (rotate(jnp.asarray(vector), frequencies)[:, 0] for vector in (query, key))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(query[0]), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 4:], query[:, 0, 4:].astype("f4"))
    products = np.asarray(turned @ other.T)
    np.testing.assert_allclose(products[2, 0], products[6, 4], rtol=1e-4)
    assert abs(products[2, 0] - products[3, 0]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type: got 'yarn'; .*default, linear, llama3"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor: got 1 of a head's 4"),
        ({"rope_type": "linear", "factor": 0.0}, "rope factor: got 0.0"),
        ({"rope_theta": None}, "rope_theta: got None"),
    ],
)
def test_rotary_embeddings_that_are_not_built_are_named(made, changes, match):
    config = made.config("llama")
    config.rope_parameters = {**config.rope_parameters, **changes}
    with pytest.raises(Misuse, match=match):
        frequencies_of(config, 4)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_grow_with_distance(both_ways):
    distances = np.arange(-300, 301)
    which = buckets(distances, 32, 128, both_ways=both_ways)
    left = which[:301][::-1]
    assert (np.diff(left) >= 0).all()
    half = 16 if both_ways else 32
    np.testing.assert_array_equal(left[: half // 2], np.arange(half // 2))
    assert left[-1] == left[128] == half - 1
    if both_ways:
        np.testing.assert_array_equal(which[301:], left[1:] + 16)
    else:
        np.testing.assert_array_equal(which[301:], 0)
