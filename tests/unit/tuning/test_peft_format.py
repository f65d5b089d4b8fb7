"""Adapters on disk without peft: what is saved comes back, and what cannot be read is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.tuning.peft_format import (
    Adapter,
    load_adapter,
    save_adapter,
    with_adapter,
)
from bayes_simfluence.tuning.tunings import IA3, Full, LoRA

LAYER = "encoder.layer.0.attention.self"
TUNINGS = {
    "lora": LoRA(rank=2, alpha=3),
    "ia3": IA3(),
    "wildcards": LoRA(rank=2, targets=["layer.0.*.key"]),
}


@pytest.fixture
def tensors(rng):
    shapes = {
        **{f"{LAYER}.{part}.weight": (4, 4) for part in ("query", "key", "value")},
        f"{LAYER}.key.bias": (4,),
        "encoder.layer.0.output.dense.weight": (4, 6),
        "classifier.weight": (2, 4),
        "classifier.bias": (2,),
    }
    return {name: jnp.asarray(rng.normal(size=shape), "f4") for name, shape in shapes.items()}


def begun(tuning, tensors):
    return tuning.begin(tensors, family="bert", key=jax.random.key(0))


def trained(tuned, rng):
    """Parameters of some run."""
    return {
        name: jnp.asarray(rng.normal(size=value.shape), "f4")
        for name, value in tuned.params.items()
    }


def saved(folder, tensors, rng, tuning=TUNINGS["lora"]):
    tuned = begun(tuning, tensors)
    return save_adapter(tuned, folder, base_name="some/bert", params=trained(tuned, rng))


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("prefix", [None, ""])
def test_what_is_saved_comes_back(tmp_path, tensors, rng, tuning, prefix):
    tuned = begun(tuning, tensors)
    params = trained(tuned, rng)
    folder = save_adapter(
        tuned, tmp_path / "deep" / "adapter", base_name="some/bert", params=params, prefix=prefix
    )
    adapter = load_adapter(folder)
    assert adapter.base_name == "some/bert"
    # The fresh head of another task gives way to the adapter's.
    other = {**tensors, "classifier.weight": jnp.zeros((5, 4)), "classifier.bias": jnp.zeros(5)}
    again = with_adapter(other, adapter, family="bert")
    assert again.params.keys() == params.keys()
    expected = tuned.assemble(params, tuned.frozen)
    tensors_again = again.assemble(again.params, again.frozen)
    assert tensors_again.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors_again[name], value)
    assert again.counts() == tuned.counts()


def test_names_and_settings_are_those_of_peft(tmp_path, tensors, rng):
    folder = saved(tmp_path / "lora", tensors, rng)
    start = f"base_model.model.bert.{LAYER}"
    assert sorted(load_file(folder / "adapter_model.safetensors")) == [
        *(f"{start}.query.lora_{factor}.weight" for factor in "AB"),
        *(f"{start}.value.lora_{factor}.weight" for factor in "AB"),
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 3}
    expected |= {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    assert config.items() >= {**expected, "fan_in_fan_out": False}.items()
    folder = saved(tmp_path / "ia3", tensors, rng, TUNINGS["ia3"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["feedforward_modules"] == ["output.dense"]
    assert config["target_modules"] == ["key", "value", "output.dense"]
    wildcards = {"lora": TUNINGS["wildcards"], "ia3": IA3(["layer.0.*.key"], feedforward=[])}
    for name, tuning in wildcards.items():
        folder = saved(tmp_path / f"{name} wildcards", tensors, rng, tuning)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["target_modules"] == [f"bert.{LAYER}.key"]


def test_nothing_is_overwritten_unless_it_is_said(tmp_path, tensors, rng):
    folder = saved(tmp_path / "adapter", tensors, rng)
    before = load_file(folder / "adapter_model.safetensors")
    tuned = begun(LoRA(rank=1), tensors)
    with pytest.raises(Misuse, match=r"adapter: got something that exists"):
        save_adapter(tuned, folder, base_name="x")
    after = load_file(folder / "adapter_model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    save_adapter(tuned, folder, base_name="x", overwrite=True)
    assert load_adapter(folder).tuning.rank == 1


def test_a_failed_save_leaves_what_was_there(tmp_path, tensors, rng, monkeypatch):
    folder = saved(tmp_path / "adapter", tensors, rng)

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("bayes_simfluence.tuning.peft_format.save_file", full_disk)
    tuned = begun(LoRA(rank=1), tensors)
    with pytest.raises(WorkFailed, match="No space left"):
        save_adapter(tuned, folder, base_name="x", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    assert load_adapter(folder).tuning.rank == 2


def test_what_is_no_adapter_is_not_saved(tmp_path, tensors):
    with pytest.raises(Misuse, match="tuning: got Full; expected LoRA or IA3"):
        save_adapter(begun(Full(), tensors), tmp_path / "x", base_name="x")
    tuned = begun(LoRA(), tensors)
    with pytest.raises(Misuse, match=r"params: got other tensors than are trained: encoder"):
        save_adapter(tuned, tmp_path / "x", base_name="x", params=begun(IA3(), tensors).params)
    several = {name: jnp.stack([value, value]) for name, value in tuned.params.items()}
    with pytest.raises(Misuse, match="one run's final parameters"):
        save_adapter(tuned, tmp_path / "x", base_name="x", params=several)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "PROMPT_TUNING"}, r"adapter_config.json peft_type: got 'PROMPT_TUNING'"),
        ({"use_dora": True}, r"adapter_config.json use_dora: got True"),
        ({"rank_pattern": {"query": 4}}, r"adapter_config.json rank_pattern"),
        ({"bias": "all"}, r"adapter_config.json bias: got 'all'"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: got 'pissa'"),
        ({"r": 5}, r"adapter_config.json: got r 5 .*another rank"),
        ({"lora_alpha": None}, r"lora_alpha None"),
    ],
)
def test_settings_not_built_here_are_named(tmp_path, tensors, rng, changes, match):
    file = saved(tmp_path / "adapter", tensors, rng) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(Misuse, match=match):
        load_adapter(file.parent)


def test_broken_files_are_named(tmp_path, tensors, rng):
    folder = saved(tmp_path / "adapter", tensors, rng)
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Misuse, match=r"adapter_model.safetensors: got a file that cannot be read"):
        load_adapter(folder)
    file.unlink()
    with pytest.raises(Misuse, match=r"adapter_model.safetensors.*pickled adapters"):
        load_adapter(folder)
    config.write_text("{")
    with pytest.raises(Misuse, match=r"adapter_config.json: got a file that cannot be read"):
        load_adapter(folder)
    with pytest.raises(Misuse, match=r"nowhere.*adapter_config.json"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda all: {"query.lora_A.weight": all.popitem()[1]}, r"got tensors query.lora_A.weight"),
        (lambda all: all | {"base_model.model.x.lora_magnitude_vector": np.ones(2)}, "magnitude"),
        (
            lambda all: {name: value for name, value in all.items() if "lora_B" not in name},
            r"got no tensor bert.*lora_B.weight",
        ),
        (
            lambda all: {name: value for name, value in all.items() if "lora" not in name},
            "got no tensor .lora_A",
        ),
    ],
)
def test_tensors_not_built_here_are_named(tmp_path, tensors, rng, change, match):
    folder = saved(tmp_path / "adapter", tensors, rng)
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(Misuse, match=match):
        load_adapter(folder)


def test_an_adapter_of_another_network_is_refused(tmp_path, tensors, rng):
    adapter = load_adapter(saved(tmp_path / "adapter", tensors, rng))
    wider = {**tensors, f"{LAYER}.value.weight": jnp.ones((4, 7))}
    with pytest.raises(Misuse, match=r"value.lora_A.weight: got shape \(2, 4\).*\(2, 7\)"):
        with_adapter(wider, adapter, family="bert")
    fewer = {name: value for name, value in tensors.items() if "value" not in name}
    with pytest.raises(Misuse, match=r"adapter layer bert.*value: got a network without it"):
        with_adapter(fewer, adapter, family="bert")
    assert isinstance(adapter, Adapter)
