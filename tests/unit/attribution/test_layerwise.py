"""Products of gradients taken apart against products of whole gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.gradients.factors import Factors, Way
from bayes_simfluence.attribution.gradients.layerwise import (
    gram_matrix,
    layer_products,
    partition_of,
    squared_norms,
)
from bayes_simfluence.attribution.gradients.per_example import (
    flat,
    gradient_products,
)
from bayes_simfluence.networks import bert, gpt2, t5
from bayes_simfluence.networks.heads import head_logits, with_head
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tuning.tunings import FULL, IA3, LoRA

VOCABULARY, LENGTH, TRAIN, QUERY = 60, 3, 4, 4
ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "bert": (bert, {**ENCODER, "intermediate_size": 24, "max_position_embeddings": 8}),
    "gpt2": (gpt2, {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "n_inner": 24}),
    "t5": (
        t5,
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1}
        | {"num_heads": 2, "decoder_start_token_id": 0},
    ),
}


def network_task(family, tuning, *, options=0):
    """A task of a tiny random network: labels for BERT, next tokens for the others.

    With ``options`` an example holds so many texts, of which the first one is right.
    """
    from transformers import AutoConfig

    module, settings = FAMILIES[family]
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **settings)
    rng = np.random.default_rng(0)
    head = {"head": "wte.weight"} if family == "gpt2" else {}
    shapes = module.shapes_of(config, **head)
    tensors = {
        name: jnp.asarray(rng.normal(0.0, 0.3, shape) + ("norm" in name.lower()), jnp.float32)
        for name, shape in shapes.items()
    }
    network = module.network(config, tensors)
    if family == "bert":
        tensors = with_head(tensors, network, 2, jax.random.key(1))
    count = TRAIN + QUERY
    lead = (count, options) if options else (count,)
    tokens = rng.integers(2, 12, (*lead, LENGTH))
    attended = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (*lead, 1))
    data = {"tokens": tokens, "attended": attended, "label": rng.integers(0, 2, count)}
    data = jax.tree.map(jnp.asarray, data)

    def sequence(example):
        tokens = example["tokens"]
        return Sequence(tokens, jnp.zeros_like(tokens), example["attended"])

    def loss(weights, example):
        tokens = example["tokens"]
        if family == "bert":
            logits = head_logits(network, weights, sequence(example), "mean")
            return -jax.nn.log_softmax(logits)[example["label"]]
        if family == "gpt2":
            logits = network.logits(weights, sequence(example))[:-1]
        else:
            logits = network.seq2seq_logits(weights, sequence(example), tokens[:-1])
        return -jax.nn.log_softmax(logits)[jnp.arange(LENGTH - 1), tokens[1:]].mean()

    def choice(weights, example):
        label = jnp.zeros((), int)
        texts = {name: example[name] for name in ("tokens", "attended")}
        scores = jax.vmap(lambda text: -loss(weights, {**text, "label": label}))(texts)
        return -jax.nn.log_softmax(scores)[0]

    tuned = tuning.begin(tensors, family=family, key=jax.random.key(2))
    return Task(
        params=tuned.params,
        frozen=tuned.frozen,
        assemble=tuned.assemble,
        loss=choice if options else loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=[f"t{number}" for number in range(TRAIN)],
        query_ids=range(QUERY),
    )


def same(task, *, scaled=(False, True), memory=(2**24,)):
    """Both ways agree, at other weights than the initial ones."""
    params = jax.tree.map(lambda leaf: leaf + 0.05, task.params)
    partition = partition_of(task)
    width = flat(params).size
    drawn = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2.0, width), jnp.float32)
    for scale in (drawn if weighed else None for weighed in scaled):
        expected = gradient_products(task, params, scale=scale)
        for some in memory:
            products = layer_products(task, params, partition=partition, scale=scale, memory=some)
            norms = squared_norms(task, params, partition=partition, scale=scale, memory=some)
            for array, other in zip((*products, norms), (*expected, expected.train), strict=True):
                np.testing.assert_allclose(array, other, rtol=2e-4, atol=2e-5 * np.abs(other).max())
    return partition


@pytest.mark.parametrize("held", [1, 3, 100])
def test_products_of_training_examples_with_one_another(held):
    """All held at once; three, so that the last of four come again; and one after another."""
    task = network_task("bert", FULL)
    itself = dataclasses.replace(task, query=task.train, query_ids=task.train_ids)
    expected = gradient_products(itself, task.params), gradient_products(task, task.params)
    told = []

    class Told:
        def advance(self, count):
            told.append(count)

    memory = 8 * held * partition_of(task).kept // 3 + 8
    gram = gram_matrix(task, task.params, memory=memory, meter=Told())
    for array, other in zip(
        gram, (expected[0].products, expected[1].products, expected[1].query), strict=True
    ):
        np.testing.assert_allclose(array, other, rtol=2e-4, atol=2e-5 * np.abs(other).max())
    assert len(told) == {1: 4, 3: 2, 100: 1}[held]
    assert sum(told) == TRAIN * (TRAIN + QUERY)


def names(task, partition):
    """The parameters that have factors."""
    paths = [
        jax.tree_util.keystr(path, simple=True)
        for path, _ in jax.tree.leaves_with_path(task.params)
    ]
    return {paths[at] for at in partition.shapes}


@pytest.mark.parametrize(
    ("family", "tuning", "options", "factored"),
    [
        ("bert", FULL, 0, {"encoder.layer.0.intermediate.dense.weight", "classifier.weight"}),
        ("bert", FULL, 2, {"encoder.layer.0.intermediate.dense.weight"}),
        ("bert", LoRA(rank=2), 0, {"classifier.weight"}),
        ("bert", IA3(), 0, {"classifier.weight"}),
        ("gpt2", FULL, 0, {"h.0.attn.c_attn.weight", "wte.weight"}),
        ("t5", FULL, 0, {"decoder.block.0.layer.1.EncDecAttention.q.weight", "shared.weight"}),
    ],
    ids=["bert", "choice", "lora", "ia3", "gpt2", "t5"],
)
def test_networks_of_every_kind(family, tuning, options, factored):
    task = network_task(family, tuning, options=options)
    partition = same(task)
    assert factored <= names(task, partition)


def toy_task(tokens=2):
    """Every use of a matrix that there is: once, twice, turned, tied, in a loop, as a whole."""
    rng = np.random.default_rng(0)
    shapes = {"once": (9, 8), "twice": (12, 8), "right": (9, 7), "tied": (20, 9), "rows": (20, 8)}
    shapes |= {"turned": (9, 9), "looped": (9, 9), "added": (7,), "short": (2, 8), "unused": (3, 4)}
    params = {
        name: jnp.asarray(rng.normal(0.0, 0.4, shape), jnp.float32)
        for name, shape in shapes.items()
    }

    def loss(weights, example):
        value = weights["rows"][example] + weights["short"][example % 2]
        value = jnp.tanh(jnp.tanh(value @ weights["twice"].T) @ weights["twice"])
        value = jnp.tanh(jnp.einsum("tc,rc->tr", value, weights["once"]))
        value = value + weights["tied"][example]
        value = jnp.tanh(jax.vmap(lambda row: weights["turned"] @ row)(value))
        value, _ = jax.lax.scan(lambda state, _: (state @ weights["looped"], None), value, length=2)
        logits = jax.jit(lambda value, table: value @ table.T)(value, weights["tied"])
        return (
            jnp.square(logits).mean()
            + jnp.sin(value @ weights["right"] + weights["added"][None]).sum()
        )

    data = jnp.asarray(rng.integers(0, 20, (2 * TRAIN + 1, tokens)))
    return Task(
        params=params,
        loss=loss,
        train=data[: TRAIN + 1],
        query=data[TRAIN + 1 :],
        train_ids=range(TRAIN + 1),
        query_ids=range(TRAIN),
    )


def test_every_use_of_a_matrix():
    task = toy_task()
    partition = same(task, memory=(2**24, 5_000))
    assert names(task, partition) == {"once", "right", "rows", "tied", "turned", "twice"}


def test_factors_larger_than_the_gradient_are_not_kept():
    task = toy_task(tokens=5)
    assert names(task, partition_of(task)) == {"rows"}


@pytest.mark.parametrize("kind", ["tokens", "rows", "written"])
def test_ways_agree(rng, kind):
    """Products of two examples' gradients of one matrix, written out by hand."""
    shape, tokens = (6, 5), 3
    sides = []
    for count in (4, 2):
        left, right = (rng.normal(size=(count, tokens, length)).astype("f4") for length in shape)
        rows = rng.integers(0, shape[0], (count, tokens))
        left = None if kind == "rows" else left
        taken = (rows, right) if kind != "tokens" else (None, None)
        sides.append(Factors(left, None if left is None else right, *taken))
    whole = []
    for side in sides:
        gradients = np.zeros((len(side.right if side.rows is None else side.rows), *shape))
        if side.left is not None:
            gradients += np.einsum("ptr,ptc->prc", side.left, side.right)
        if side.rows is not None:
            for example, token in np.ndindex(side.rows.shape):
                gradients[example, side.rows[example, token]] += side.slopes[example, token]
        whole.append(gradients.reshape(len(gradients), -1))
    way = Way(kind, shape, 1)
    first, second = (way.prepared(jax.tree.map(jnp.asarray, side)) for side in sides)
    products = way.multiplied(first, second, None)
    np.testing.assert_allclose(products, whole[0] @ whole[1].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(way.norms(first, None), (whole[0] ** 2).sum(axis=1), rtol=1e-4)
    if kind != "tokens":
        scale = rng.uniform(0.5, 2.0, shape).astype("f4")
        weighed = whole[0] * scale.ravel() @ whole[1].T
        products = way.multiplied(first, second, jnp.asarray(scale))
        np.testing.assert_allclose(products, weighed, rtol=1e-4, atol=1e-5)


def test_the_meter_hears_of_every_pair_once():
    told = []

    class Heard:
        def advance(self, amount=1, note=""):
            told.append(amount)

    task = toy_task()
    layer_products(task, task.params, memory=5_000, meter=Heard())
    assert sum(told) == len(task.train_ids) * len(task.query_ids) and len(told) > 1
    told.clear()
    squared_norms(task, task.params, memory=5_000, meter=Heard())
    assert sum(told) == len(task.train_ids)
