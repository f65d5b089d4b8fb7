"""Checkpoint folders: what is read, what is refused by name, what a trained network leaves."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.networks import saving
from bayes_simfluence.networks.checkpoint import (
    checkpoint_folder,
    load_checkpoint,
    load_tokenizer,
    network_of,
)
from bayes_simfluence.networks.heads import HEAD, with_head
from bayes_simfluence.networks.saving import save_checkpoint
from bayes_simfluence.networks.tensor_files import (
    INDEX,
    SINGLE,
    read_tensors,
    save_tensors,
    write_tensors,
)


@pytest.fixture
def folder(made, tmp_path):
    """A folder of a small BERT: configuration, tokenizer of sixty words, one safetensors file."""
    folder = tmp_path / "bert"
    made.config("bert").save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(55))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    save_tensors(made.checkpoint("bert", folder).tensors, folder)
    return folder


def sharded(folder, tensors):
    """The same tensors in two shards and an index; the index as a dict."""
    names = sorted(tensors)
    parts = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
    for file, part in parts.items():
        write_tensors({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


# Reading


def test_every_element_type_is_read_as_it_was_written(tmp_path, rng):
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]
    arrays = {np.dtype(kind).name: rng.normal(0, 9, (2, 3)).astype(kind) for kind in kinds}
    arrays |= {"scalar": np.float32(3.5), "empty": np.zeros((0, 4), "f4")}
    write_tensors(arrays, tmp_path / SINGLE)
    read = read_tensors(tmp_path)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floating_tensors_become_the_asked_dtype(folder, stored, dtype):
    tensors = load_checkpoint(folder).tensors
    narrow = {name: value.astype(stored) for name, value in tensors.items()}
    narrow["embeddings.position_ids"] = jnp.arange(16)[None]
    save_tensors(narrow, folder, overwrite=True)
    loaded = load_checkpoint(folder, dtype=dtype).tensors
    assert loaded.pop("embeddings.position_ids").dtype == jnp.int32
    for name, value in loaded.items():
        assert value.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(value, narrow[name].astype(dtype))


def test_another_dtype_is_refused(folder):
    with pytest.raises(Misuse, match="dtype: got 'float16'; expected one of float32, bfloat16"):
        load_checkpoint.__wrapped__(folder, dtype="float16")


def test_shards_are_read_as_one(folder):
    tensors = load_checkpoint(folder).tensors
    sharded(folder, tensors)
    (folder / SINGLE).unlink()
    loaded = load_checkpoint(folder).tensors
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_shards_that_do_not_fit_the_index_are_named(folder):
    index = sharded(folder, load_checkpoint(folder).tensors)
    places = index["weight_map"]
    first = next(iter(places))

    def refused(content, match):
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(Misuse, match=match):
            load_checkpoint(folder)

    refused("{", f"{INDEX}: got no JSON .*; expected an index; copy or download it again")
    refused([1], "got no weight_map; expected tensor name -> shard")
    refused({"weight_map": {}}, "got no weight_map")
    refused({"weight_map": {"x": 3}}, "got a weight_map whose values are no file names")
    refused({"weight_map": {**places, "x": "two.safetensors"}}, "got tensors x, in no shard")
    for outside in ("../two.safetensors", "/etc/two.safetensors", "deep/two.safetensors", "x.bin"):
        refused({"weight_map": {**places, first: outside}}, f"got shards {outside}; .*beside it")
    refused(
        {"weight_map": {**places, "x": "three.safetensors"}},
        "got no shard three.safetensors; expected the 3 shards that .*index.json names",
    )


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_file_that_is_cut_is_named(folder, kept):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:kept])
    with pytest.raises(Misuse, match=rf"{SINGLE}: got a file that cannot be read .*whole"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_malformed_header_is_named(folder, header):
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(Misuse, match=f"{SINGLE}: got a file that cannot be read"):
        load_checkpoint(folder)


def test_an_element_type_that_is_not_read_is_named(folder):
    header = b'{"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(Misuse, match=r"got tensors x \(F8_E4M3\); expected .*BF16.*float32"):
        load_checkpoint(folder)


def test_pickled_tensors_are_not_opened(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(Misuse, match=r"no model.safetensors but pytorch_model.bin; .*safe_serial"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"model_type": "unheard of"}',
        '{"model_type": "bert", "vocab_size": "x"}',
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(Misuse, match=r"config.json: got a configuration that cannot be read"):
        load_checkpoint(folder)


def test_a_configuration_of_another_architecture_is_named(made, folder):
    made.config("gpt2").save_pretrained(folder)
    with pytest.raises(
        Misuse, match=r"got no tensor wte.weight, .*config.json and the safetensors"
    ):
        network_of(load_checkpoint(folder))


def test_names_that_are_no_checkpoint_are_refused(tmp_path):
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(Misuse, match="no such folder; expected a checkpoint folder"):
            checkpoint_folder(name)


def test_a_vocabulary_smaller_than_the_tokenizers_is_named(made, folder):
    assert len(load_tokenizer(folder)) == 60
    made.config("bert", vocab_size=59).save_pretrained(folder)
    with pytest.raises(
        Misuse, match=r"config.json vocab_size: got 59, .* id 59; .*at least 60; use"
    ):
        load_tokenizer(folder)


def test_a_missing_tokenizer_is_named(folder):
    (folder / "vocab.txt").unlink()
    with pytest.raises(Misuse, match=r"got no tokenizer that can be read .*beside config.json"):
        load_tokenizer(folder)


def test_copies_of_tied_embeddings_are_left_out(made, tmp_path):
    """Only exact copies, and only where the configuration ties them."""
    for tied in (True, False):
        config = made.config("llama", tie_word_embeddings=tied)
        config.save_pretrained(tmp_path)
        tensors = made.tensors("llama", config)
        for copied in (True, False):
            head = tensors["embed_tokens.weight"] + (0.0 if copied else 1.0)
            save_tensors({**tensors, "lm_head.weight": head}, tmp_path, overwrite=True)
            checkpoint = load_checkpoint(tmp_path)
            assert ("lm_head.weight" in checkpoint.tensors) == (not tied or not copied)
            network = network_of(checkpoint)
            assert network.logits is not None
            assert ("lm_head.weight" in network.shapes) == (not tied or not copied)


# Saving


def test_a_trained_network_comes_back(folder, tmp_path, key):
    checkpoint = load_checkpoint(folder)
    network = network_of(checkpoint)
    trained = with_head(checkpoint.tensors, network, 3, key)
    path = save_checkpoint(checkpoint, trained, tmp_path / "new", labels=["no", "maybe", "yes"])
    again = load_checkpoint(path)
    assert again.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert again.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert again.config.num_labels == 3
    assert again.config.architectures == ["BertForSequenceClassification"]
    assert len(load_tokenizer(path)) == 60
    for name, value in trained.items():
        inside = name if name in HEAD else f"bert.{name}"
        np.testing.assert_array_equal(again.tensors[inside], value)
    assert set(network_of(again).shapes) == {f"bert.{name}" for name in network.shapes}
    assert str(tmp_path) not in (path / "config.json").read_text()
    assert {file.name for file in path.iterdir()} == {"config.json", SINGLE, "vocab.txt"}


def test_without_a_head_names_and_architecture_stay(folder, tmp_path):
    checkpoint = load_checkpoint(folder, dtype="bfloat16")
    path = save_checkpoint(checkpoint, checkpoint.tensors, tmp_path / "new")
    again = load_checkpoint(path, dtype="bfloat16")
    assert set(again.tensors) == set(checkpoint.tensors)
    assert again.config.architectures == checkpoint.config.architectures
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = read_tensors(path)
    assert {value.dtype.name for value in stored.values()} == {"bfloat16"}


def test_what_cannot_be_saved_is_refused_before_anything_is_written(folder, tmp_path, key):
    checkpoint = load_checkpoint(folder)
    tensors = with_head(checkpoint.tensors, network_of(checkpoint), 2, key)
    new = tmp_path / "new"
    with pytest.raises(Misuse, match="something that exists"):
        save_checkpoint(checkpoint, tensors, folder)
    with pytest.raises(Misuse, match=r"no tensor embeddings\.word_embeddings\.weight"):
        save_checkpoint(checkpoint, {name: tensors[name] for name in HEAD}, new)
    for labels in (["a"], ["a", "a"]):
        with pytest.raises(Misuse, match=r"labels: got .*; expected 2 different ones"):
            save_checkpoint(checkpoint, tensors, new, labels=labels)
    assert not new.exists()


def test_a_folder_is_replaced_only_whole(folder, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(folder)
    path = save_checkpoint(checkpoint, checkpoint.tensors, tmp_path / "new")
    more = {name: value + 1.0 for name, value in checkpoint.tensors.items()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", full)
        with pytest.raises(WorkFailed, match=r"could not be written .No space left"):
            save_checkpoint(checkpoint, more, path, overwrite=True)
    name = "embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(load_checkpoint(path).tensors[name], checkpoint.tensors[name])
    save_checkpoint(checkpoint, more, path, overwrite=True)
    np.testing.assert_array_equal(load_checkpoint(path).tensors[name], more[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "new"]


@pytest.mark.parametrize("case", ["gpt2", "t5 1.1", "llama 3", "gpt_neox"])
def test_every_family_comes_back_as_the_same_network(made, tmp_path, case):
    checkpoint = dataclasses.replace(made.checkpoint(case, tmp_path), folder=tmp_path)
    path = save_checkpoint(checkpoint, checkpoint.tensors, tmp_path / "new")
    again = load_checkpoint(path)
    assert set(again.tensors) == set(checkpoint.tensors)
    before, after = network_of(checkpoint), network_of(again)
    assert before == dataclasses.replace(
        after,
        hidden=before.hidden,
        logits=before.logits,
        seq2seq_logits=before.seq2seq_logits,
    )
    assert before.shapes == after.shapes
    settings = [network.hidden.args[0] for network in (before, after)]
    assert repr(settings[0]) == repr(settings[1])
