"""The BERT pass against transformers' PyTorch model: hidden states, logits and gradients."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks import bert
from bayes_simfluence.networks.checkpoint import load_checkpoint

# Without the extra [parity] these tests are not chosen; chosen without it, they fail.
torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
pytestmark = pytest.mark.parity

SHAPES = {
    "one layer": {"num_hidden_layers": 1},
    "relu": {"hidden_act": "relu", "num_hidden_layers": 2},
    "tanh gelu": {"hidden_act": "gelu_new", "num_hidden_layers": 2},
    "large epsilon": {"layer_norm_eps": 1e-3, "num_hidden_layers": 3},
    "one head": {"num_attention_heads": 1, "num_hidden_layers": 2},
}


def torch_classifier(tmp_path, **changes):
    from transformers import BertConfig, BertForSequenceClassification

    settings = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 20,
        "initializer_range": 0.3,
        "num_labels": 3,
    }
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**{**settings, **changes})).eval()
    model.save_pretrained(tmp_path)
    return model


def some_batch(rng, vocabulary, size=4, length=12):
    tokens = rng.integers(0, vocabulary, (size, length))
    lengths = rng.integers(3, length + 1, size)
    attended = np.arange(length)[None] < lengths[:, None]
    segments = (np.arange(length)[None] >= lengths[:, None] // 2) & attended
    return tokens, segments.astype(int), attended


def hidden_states(checkpoint, batch):
    settings = bert.settings_of(checkpoint.config, checkpoint.tensors)
    encode = jax.vmap(lambda *inputs: bert.encode(checkpoint.tensors, settings, *inputs))
    return np.asarray(encode(*(jnp.asarray(one) for one in batch)))


def assert_gradients_agree(ours, model):
    """Within 1e-3 of each tensor's norm; tensors whose true gradient is zero (softmax does not
    see a shift by the keys' biases) only to rounding of the largest one."""
    theirs = {
        name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None
    }
    rounding = 1e-6 * max(np.linalg.norm(one) for one in theirs.values())
    assert theirs
    for name, expected in theirs.items():
        error = np.linalg.norm(np.asarray(ours[name]) - expected)
        assert error <= 1e-3 * np.linalg.norm(expected) + rounding, name


def torch_inputs(batch):
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: torch.tensor(value.astype(int)) for name, value in zip(names, batch, strict=True)}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_hidden_states_agree(tmp_path, rng, changes):
    model = torch_classifier(tmp_path, **changes)
    batch = some_batch(rng, 50)
    with torch.no_grad():
        expected = model.bert(**torch_inputs(batch)).last_hidden_state.numpy()
    attended = batch[2]
    ours = hidden_states(load_checkpoint(tmp_path), batch)
    np.testing.assert_allclose(ours[attended], expected[attended], atol=1e-4)


def test_classification_loss_and_all_gradients_agree(tmp_path, rng):
    model = torch_classifier(tmp_path, num_hidden_layers=2)
    batch, labels = some_batch(rng, 50), np.array([0, 2, 1, 2])
    theirs = model(**torch_inputs(batch), labels=torch.tensor(labels)).loss
    theirs.backward()
    checkpoint = load_checkpoint(tmp_path)
    settings = bert.settings_of(checkpoint.config, checkpoint.tensors)

    def loss(tensors):
        def one(tokens, segments, attended, label):
            hidden = bert.encode(tensors, settings, tokens, segments, attended)
            pooled = bert.pool(tensors, settings, hidden, attended, "pooler")
            return -jax.nn.log_softmax(bert.classify(tensors, pooled))[label]

        return jax.vmap(one)(*(jnp.asarray(each) for each in (*batch, labels))).mean()

    value, gradient = jax.value_and_grad(loss)(checkpoint.tensors)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    assert_gradients_agree(gradient, model)


def test_minilm_agrees_in_hidden_states_and_gradients(rng):
    from transformers import BertModel

    checkpoint = load_checkpoint("minilm")
    model = BertModel.from_pretrained(checkpoint.folder).eval()
    batch = some_batch(rng, 30000, size=3, length=32)
    theirs = model(**torch_inputs(batch)).last_hidden_state
    weights = torch.tensor(batch[2][..., None].astype(np.float32))
    (theirs.square() * weights).sum().backward()
    ours = hidden_states(checkpoint, batch)
    attended = batch[2]
    np.testing.assert_allclose(ours[attended], theirs.detach().numpy()[attended], atol=1e-4)
    settings = bert.settings_of(checkpoint.config, checkpoint.tensors)

    def total(tensors):
        encode = jax.vmap(lambda *inputs: bert.encode(tensors, settings, *inputs))
        hidden = encode(*(jnp.asarray(one) for one in batch))
        return (jnp.square(hidden) * attended[..., None]).sum()

    floats = {k: v for k, v in checkpoint.tensors.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    assert_gradients_agree(jax.grad(total)(floats), model)


def test_padding_changes_nothing(tmp_path, rng):
    torch_classifier(tmp_path, num_hidden_layers=2)
    checkpoint = load_checkpoint(tmp_path)
    settings = bert.settings_of(checkpoint.config, checkpoint.tensors)
    tokens = jnp.asarray(rng.integers(0, 50, 6))
    short = bert.encode(checkpoint.tensors, settings, tokens, jnp.zeros(6, int), jnp.ones(6, bool))
    padded = bert.encode(
        checkpoint.tensors,
        settings,
        jnp.pad(tokens, (0, 5)),
        jnp.zeros(11, int),
        jnp.arange(11) < 6,
    )
    np.testing.assert_allclose(padded[:6], short, atol=1e-5)


def test_another_architecture_or_activation_is_named(tmp_path):
    torch_classifier(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.config.hidden_act = "swish"
    with pytest.raises(Misuse, match=r"hidden_act.*'swish'.*gelu"):
        bert.settings_of(checkpoint.config, checkpoint.tensors)
    checkpoint.config.model_type = "t5"
    with pytest.raises(Misuse, match=r"architecture.*'t5'.*bert"):
        bert.settings_of(checkpoint.config, checkpoint.tensors)
