"""Every network against transformers' PyTorch model: outputs, and gradients of every tensor."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.networks.checkpoint import load_checkpoint, network_of
from bayes_simfluence.networks.heads import HEAD, head_logits, with_head
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.networks.saving import save_checkpoint

# Without the extra [parity] these tests are not chosen; chosen without it, they fail.
torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
pytestmark = pytest.mark.parity

PADDING, VOCABULARY = 1, 50
ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "initializer_range": 0.3}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 20, "initializer_range": 0.3}
GROUPED = {**ENCODER, "num_key_value_heads": 2}
T5 = {
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

CASES = {
    "bert": ("bert", {**ENCODER, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "bert one head": (
        "bert",
        {**ENCODER, "num_attention_heads": 1, "num_hidden_layers": 3, "hidden_act": "gelu_new"},
    ),
    "roberta": ("roberta", {**ENCODER, "pad_token_id": PADDING, "type_vocab_size": 2}),
    "xlm-roberta": ("xlm-roberta", {**ENCODER, "pad_token_id": PADDING, "num_hidden_layers": 1}),
    "distilbert": ("distilbert", {**DISTIL, "max_position_embeddings": 20}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, other scales": (
        "gpt2",
        {
            **GPT2,
            **UNTIED,
            "n_inner": 30,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "silu",
        },
    ),
    "gpt_neox": ("gpt_neox", {**ENCODER, "rotary_pct": 0.34}),
    "gpt_neox in sequence": (
        "gpt_neox",
        {**ENCODER, "use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 100},
    ),
    "gpt_neox tied, no bias": (
        "gpt_neox",
        {**ENCODER, **TIED, "rotary_pct": 0.67, "attention_bias": False, "num_hidden_layers": 1},
    ),
    "t5 1.0": ("t5", T5),
    "t5 1.1": (
        "t5",
        {**T5, **UNTIED, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1},
    ),
    "llama": ("llama", {**ENCODER, **UNTIED, "rope_parameters": LINEAR}),
    "llama grouped": ("llama", {**GROUPED, **TIED, "head_dim": 8, "attention_bias": True}),
    "llama 3": ("llama", {**GROUPED, "rope_parameters": LLAMA3, "mlp_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", {**GROUPED, **TIED}),
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")


def torch_model(case):
    """A model of random weights; biases and norms are moved too, which PyTorch leaves at 0 or 1."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
    )

    family, options = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, **options})
    kinds = {"t5": AutoModelForSeq2SeqLM, **dict.fromkeys(ENCODERS, AutoModel)}
    model = kinds.get(family, AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def untied(case, model):
    """T5 1.1 has an output layer of its own, which transformers 5 gives it only from a file."""
    if case == "t5 1.1" and model.lm_head.weight is model.shared.weight:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.config.tie_word_embeddings = False
    return model


def some_batch(rng, size=4, length=12, vocabulary=VOCABULARY):
    """Texts of several lengths; the one in the middle of the batch is the shortest."""
    lengths = np.array([length, length - 3, 2, length - 1])[:size]
    attended = np.arange(length)[None] < lengths[:, None]
    tokens = rng.integers(2, vocabulary, (size, length))
    segments = (np.arange(length)[None] >= lengths[:, None] // 2) & attended
    return np.where(attended, tokens, PADDING), segments.astype(int), attended


def torch_inputs(family, batch):
    tokens, segments, attended = (torch.tensor(array.astype(int)) for array in batch)
    inputs = {"input_ids": tokens, "attention_mask": attended}
    if family in ("bert", "roberta", "xlm-roberta"):
        inputs["token_type_ids"] = segments
    return inputs


def our_outputs(network, tensors, batch, decoder_inputs):
    sequences = Sequence(*(jnp.asarray(outputs) for outputs in batch))
    if network.seq2seq_logits is not None:
        outputs = jax.vmap(network.seq2seq_logits, in_axes=(None, 0, 0))
        return jax.jit(outputs)(tensors, sequences, jnp.asarray(decoder_inputs))
    outputs = jax.vmap(network.logits or network.hidden, in_axes=(None, 0))
    return jax.jit(outputs)(tensors, sequences)


RENAMED = {"lm_head.weight": "embed_out.weight"}
"""transformers' name in memory -> in files: of GPT-NeoX's output layer."""


def assert_gradients_agree(ours, model):
    """Within 1e-3 of each tensor's norm; tensors whose true gradient is zero (softmax does not
    see a shift by the keys' biases) only to rounding of the largest one."""
    renamed = RENAMED if model.config.model_type == "gpt_neox" else {}
    theirs = {
        renamed.get(name, name): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    rounding = 1e-6 * max(np.linalg.norm(gradient) for gradient in theirs.values())
    assert theirs
    assert set(theirs) == set(ours)
    for name, expected in theirs.items():
        error = np.linalg.norm(np.asarray(ours[name]) - expected)
        assert error <= 1e-3 * np.linalg.norm(expected) + rounding, name


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_agree(case, tmp_path, rng):
    """The loss is a random weighting of all outputs at tokens that are not padding."""
    family = CASES[case][0]
    model = untied(case, torch_model(case))
    model.save_pretrained(tmp_path)
    batch, decoder_inputs = some_batch(rng), rng.integers(2, VOCABULARY, (4, 7))
    more = {"decoder_input_ids": torch.tensor(decoder_inputs)} if family == "t5" else {}
    outputs = model(**torch_inputs(family, batch), **more)
    theirs = outputs.last_hidden_state if family in ENCODERS else outputs.logits
    checkpoint = load_checkpoint(tmp_path)
    network = network_of(checkpoint)
    assert (network.kind == "encoder") == (family in ENCODERS)
    counted = np.ones((4, 7), bool) if family == "t5" else batch[2]
    weights = rng.normal(size=theirs.shape).astype("f4") * counted[..., None]
    (theirs * torch.tensor(weights)).sum().backward()
    tensors = {name: checkpoint.tensors[name] for name in network.shapes}

    def loss(tensors):
        ours = our_outputs(network, tensors, batch, decoder_inputs)
        return (ours * weights).sum(), ours

    gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(tensors)
    np.testing.assert_allclose(ours[counted], theirs.detach().numpy()[counted], atol=1e-4)
    read = {name: value for name, value in gradient.items() if "pooler" not in name}
    assert_gradients_agree(read, model)


def test_minilm_agrees_in_hidden_states_and_gradients(rng):
    from transformers import BertModel

    checkpoint = load_checkpoint("minilm")
    network = network_of(checkpoint)
    model = BertModel.from_pretrained(checkpoint.folder).eval()
    batch = some_batch(rng, size=3, length=32, vocabulary=30000)
    theirs = model(**torch_inputs("bert", batch)).last_hidden_state
    attended = batch[2]
    (theirs.square() * torch.tensor(attended[..., None].astype("f4"))).sum().backward()
    tensors = {name: checkpoint.tensors[name] for name in network.shapes if "pooler" not in name}

    def total(tensors):
        hidden = our_outputs(network, tensors, batch, None)
        return (jnp.square(hidden) * attended[..., None]).sum(), hidden

    gradient, ours = jax.jit(jax.grad(total, has_aux=True))(tensors)
    np.testing.assert_allclose(ours[attended], theirs.detach().numpy()[attended], atol=1e-4)
    assert_gradients_agree(gradient, model)


def test_berts_own_classifier_is_our_head_on_the_pooler(tmp_path, rng):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, num_labels=3, **ENCODER)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    batch, labels = some_batch(rng), np.array([0, 2, 1, 2])
    theirs = model(**torch_inputs("bert", batch), labels=torch.tensor(labels)).loss
    theirs.backward()
    checkpoint = load_checkpoint(tmp_path)
    network = network_of(checkpoint)

    def loss(tensors):
        def loss_of(label, *inputs):
            logits = head_logits(network, tensors, Sequence(*inputs), "pooler")
            return -jax.nn.log_softmax(logits)[label]

        return jax.vmap(loss_of)(*(jnp.asarray(array) for array in (labels, *batch))).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(checkpoint.tensors)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    assert_gradients_agree(gradient, model)


SAVED = {
    "bert": ("float32", "bfloat16"),
    "roberta": ("float32",),
    "distilbert": ("float32",),
    "gpt2": ("float32", "bfloat16"),
    "gpt_neox": ("float32",),
    "t5 1.0": ("float32",),
    "t5 1.1": ("float32", "bfloat16"),
    "llama": ("float32",),
    "llama grouped": ("bfloat16",),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, dtype) for case, dtypes in SAVED.items() for dtype in dtypes]
)
def test_transformers_loads_what_was_trained(case, dtype, tmp_path, rng, key):
    """Trained tensors, with a head beside them, saved and loaded by the class that saved first."""
    family = CASES[case][0]
    model = untied(case, torch_model(case))
    model.save_pretrained(tmp_path / "first")
    checkpoint = load_checkpoint(tmp_path / "first", dtype=dtype)
    network = network_of(checkpoint)
    trained = {name: value * 1.25 for name, value in checkpoint.tensors.items()}
    trained = with_head(trained, network, 3, key)
    save_checkpoint(checkpoint, trained, tmp_path / "second", labels=["a", "b", "c"])
    loaded = type(model).from_pretrained(tmp_path / "second").eval()
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    batch, decoder_inputs = some_batch(rng), rng.integers(2, VOCABULARY, (4, 7))
    more = {"decoder_input_ids": torch.tensor(decoder_inputs)} if family == "t5" else {}
    with torch.no_grad():
        outputs = loaded.float()(**torch_inputs(family, batch), **more)
    theirs = outputs.last_hidden_state if family in ENCODERS else outputs.logits
    again = load_checkpoint(tmp_path / "second")
    ours = our_outputs(network_of(again), again.tensors, batch, decoder_inputs)
    counted = np.ones((4, 7), bool) if family == "t5" else batch[2]
    scale = np.abs(theirs.numpy()[counted]).max()
    np.testing.assert_allclose(ours[counted], theirs.numpy()[counted], atol=1e-5 * max(scale, 10))
    if family == "bert":
        assert_bert_classifies_alike(tmp_path / "second", again, batch)


def assert_bert_classifies_alike(folder, checkpoint, batch):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        theirs = model(**torch_inputs("bert", batch)).logits.numpy()
    network = network_of(checkpoint)
    for name in HEAD:
        np.testing.assert_array_equal(model.get_parameter(name).detach(), checkpoint.tensors[name])
    sequences = Sequence(*(jnp.asarray(array) for array in batch))
    head = jax.vmap(lambda sequence: head_logits(network, checkpoint.tensors, sequence, "pooler"))
    ours = jax.jit(head)(sequences)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 10), (16, 20), (64, 500)])
def test_buckets_agree(both_ways, count, farthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    from bayes_simfluence.networks.t5 import buckets

    distances = np.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=both_ways, num_buckets=count, max_distance=farthest
    )
    np.testing.assert_array_equal(
        buckets(distances, count, farthest, both_ways=both_ways), theirs.numpy()
    )
