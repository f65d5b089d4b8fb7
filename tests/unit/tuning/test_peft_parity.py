"""Adapters against peft on PyTorch models: the same tensors, merged weights, outputs and files."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.networks.checkpoint import load_checkpoint, network_of
from bayes_simfluence.networks.families import FAMILIES
from bayes_simfluence.networks.heads import head_logits
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.tuning.peft_format import load_adapter, save_adapter, with_adapter
from bayes_simfluence.tuning.tunings import IA3, LoRA

# Without the extra [parity] these tests are not chosen; chosen without it, they fail.
torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
pytestmark = [
    pytest.mark.parity,
    # peft says that it corrects fan_in_fan_out for GPT-2 by itself.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # peft calls names that transformers renames.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "bert": ("BertForSequenceClassification", {**SMALL, "intermediate_size": 20}),
    "roberta": ("RobertaForMaskedLM", {**SMALL, "intermediate_size": 20}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 30, "dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 20},
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 30, "n_embd": 16, "n_head": 2, "n_layer": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SMALL, "intermediate_size": 20}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_heads": 2, "num_layers": 1},
    ),
    "llama": (
        "LlamaForCausalLM",
        {**SMALL, "intermediate_size": 20, "num_key_value_heads": 1, "attention_bias": True},
    ),
}
METHODS = {"lora": LoRA(rank=3, alpha=5), "ia3": IA3()}
BOTH = [
    pytest.param(family, method, id=f"{family} {method}") for family in MODELS for method in METHODS
]


def torch_model(family):
    """A model with random weights, biases and norms included."""
    import transformers

    kind, settings = MODELS[family]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def peft_model(family, method):
    """The model under peft's own defaults, its adapter random."""
    import peft

    theirs = METHODS[method].as_dict()
    if method == "lora":
        config = peft.LoraConfig(r=theirs["rank"], lora_alpha=theirs["alpha"])
    else:
        config = peft.IA3Config()
    if family == "distilbert":  # the one family without peft's defaults
        names = begun(family, method, tensors_of(torch_model(family))).tuning.as_dict()
        config.target_modules = set(names["targets"])
        config.feedforward_modules = set(names.get("feedforward", ()))
    if family == "bert":
        config.modules_to_save = ["classifier"]
    model = peft.get_peft_model(torch_model(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name or "modules_to_save" in name:
                parameter.normal_(mean=0.5, std=0.3)
    return model


def tensors_of(model):
    return {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}


def begun(family, method, tensors):
    return METHODS[method].begin(tensors, family=family, key=jax.random.key(0))


def adapter_of(model):
    """peft's adapter under our names."""
    from peft import get_peft_model_state_dict

    theirs = get_peft_model_state_dict(model)
    return {
        name.removeprefix("base_model.model."): jnp.asarray(value.detach().numpy())
        for name, value in theirs.items()
    }


def outputs(model, family):
    tokens = torch.tensor(np.random.default_rng(0).integers(3, 30, (2, 7)))
    more = {"decoder_input_ids": tokens[:, :4]} if family == "t5" else {}
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits.numpy()


def assert_merged_alike(merged, model):
    expected = {
        name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()
    }
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_default_layers_are_those_of_peft(model_type):
    from peft.utils import constants

    family = FAMILIES[model_type]
    for table, layers in (
        (constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, family.lora_targets),
        (constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, family.ia3_targets),
        (constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, family.ia3_feedforward),
    ):
        assert table.get(model_type, list(layers)) == list(layers)


@pytest.mark.parametrize(("family", "method"), BOTH)
def test_merged_weights_agree(family, method):
    tensors, model = tensors_of(torch_model(family)), peft_model(family, method)
    tuned, params = begun(family, method, tensors), adapter_of(model)
    assert {k: v.shape for k, v in tuned.params.items()} == {k: v.shape for k, v in params.items()}
    merged = tuned.assemble(params, tuned.frozen)
    assert any(not np.allclose(merged[name], tensors[name]) for name in tensors)
    assert_merged_alike(merged, model)


@pytest.mark.parametrize(("family", "method"), BOTH)
def test_peft_loads_what_is_saved_here(tmp_path, family, method):
    from peft import PeftModel

    model = peft_model(family, method)
    tuned = begun(family, method, tensors_of(torch_model(family)))
    folder = save_adapter(tuned, tmp_path / "adapter", base_name="", params=adapter_of(model))
    again = PeftModel.from_pretrained(torch_model(family), folder).eval()
    before, after = outputs(model, family), outputs(again, family)
    assert np.abs(before - outputs(torch_model(family), family)).max() > 1e-2
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize(("family", "method"), BOTH)
def test_what_peft_saved_is_loaded_here(tmp_path, family, method):
    model = peft_model(family, method)
    model.save_pretrained(tmp_path)
    tensors = tensors_of(torch_model(family))
    tuned = with_adapter(tensors, load_adapter(tmp_path), family=family)
    assert_merged_alike(tuned.assemble(tuned.params, tuned.frozen), model)


@pytest.mark.parametrize("method", METHODS)
def test_our_bert_gives_the_outputs_of_peft(tmp_path, rng, method):
    torch_model("bert").save_pretrained(tmp_path / "base")
    checkpoint, model = load_checkpoint(tmp_path / "base"), peft_model("bert", method)
    tuned = begun("bert", method, checkpoint.tensors)
    weights = tuned.assemble(adapter_of(model), tuned.frozen)
    network = network_of(checkpoint)
    tokens = rng.integers(0, 30, (3, 9))

    def logits(tokens):
        sequence = Sequence(tokens, jnp.zeros(9, int), jnp.ones(9, bool))
        return head_logits(network, weights, sequence, "pooler")

    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.vmap(logits)(jnp.asarray(tokens)), expected, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_checkpoint_and_a_model_with_a_head_exchange_adapters(tmp_path, method):
    """The checkpoint says ``encoder.layer``, the model with a head ``bert.encoder.layer``."""
    from peft import PeftModel

    full = tensors_of(torch_model("bert"))
    tensors = {name.removeprefix("bert."): value for name, value in full.items()}
    tuned, model = begun("bert", method, tensors), peft_model("bert", method)
    params = {name.removeprefix("bert."): value for name, value in adapter_of(model).items()}
    folder = save_adapter(tuned, tmp_path / "adapter", base_name="", params=params)
    again = PeftModel.from_pretrained(torch_model("bert"), folder).eval()
    np.testing.assert_allclose(outputs(again, "bert"), outputs(model, "bert"), atol=1e-5)
    model.save_pretrained(tmp_path / "peft")
    back = with_adapter(tensors, load_adapter(tmp_path / "peft"), family="bert")
    assert back.params.keys() == params.keys()
    np.testing.assert_array_equal(back.params["classifier.bias"], params["classifier.bias"])


def test_patterns_of_ours_that_peft_reads_otherwise_are_written_as_full_names(tmp_path):
    """Wildcards; and peft wants the names of feedforward layers among the targets."""
    from peft import PeftModel

    tensors = tensors_of(torch_model("gpt2"))
    for at, tuning in enumerate(
        [
            LoRA(rank=2, targets=["h.1.*"]),
            IA3(targets=["h.*.c_proj", "h.0.attn.c_attn"], feedforward=["mlp.*"]),
            IA3(targets=["h.1.mlp.c_proj"]),
        ]
    ):
        tuned = tuning.begin(tensors, family="gpt2", key=jax.random.key(0))
        params = {name: value + 0.3 for name, value in tuned.params.items()}
        folder = save_adapter(tuned, tmp_path / str(at), base_name="", params=params)
        again = PeftModel.from_pretrained(torch_model("gpt2"), folder)
        assert_merged_alike(tuned.assemble(params, tuned.frozen), again)


def test_bfloat16_adapters_of_peft_are_read(tmp_path):
    model = peft_model("bert", "lora").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    params = load_adapter(tmp_path).params
    for name, value in adapter_of(model.float()).items():
        np.testing.assert_array_equal(params[name], value)
