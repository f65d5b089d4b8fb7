"""Products of gradients taken apart against products of whole gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.baselines.gradients import flat, gradient_products
from bayes_simfluence.baselines.layerwise import layer_products, squared_norms
from bayes_simfluence.networks import bert, gpt2, t5
from bayes_simfluence.networks.heads import head_logits, with_head
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.recording.task import Task
from bayes_simfluence.recording.tuning import FULL, IA3, LoRA

VOCABULARY, LENGTH, TRAIN, QUERY = 60, 3, 5, 4
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "bert": (bert, {**ENCODER, "intermediate_size": 24, "max_position_embeddings": 8}),
    "gpt2": (gpt2, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "n_inner": 24}),
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
        scores = jax.vmap(lambda one: -loss(weights, {**one, "label": label}))(texts)
        return -jax.nn.log_softmax(scores)[0]

    tuned = tuning.begin(tensors, family=family, key=jax.random.key(2))
    return Task(
        params=tuned.params,
        frozen=tuned.frozen,
        assemble=tuned.assemble,
        loss=choice if options else loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=[f"t{one}" for one in range(TRAIN)],
        query_ids=range(QUERY),
    )


def same(task, *, scaled=False, memory=2**24, plain=None):
    params = jax.tree.map(lambda leaf: leaf + 0.05, task.params)
    scale = None
    if scaled:
        width = flat(params).size
        scale = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2.0, width), jnp.float32)
    expected = plain or gradient_products(task, params, scale=scale)
    found = layer_products(task, params, scale=scale, memory=memory)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * np.abs(other).max())
    return expected


@pytest.mark.parametrize(
    ("family", "tuning", "options"),
    [
        ("bert", FULL, 0),
        ("bert", FULL, 2),
        ("bert", LoRA(rank=2), 0),
        ("bert", IA3(), 0),
        ("gpt2", FULL, 0),
        ("t5", FULL, 0),
    ],
    ids=["bert", "choice", "lora", "ia3", "gpt2", "t5"],
)
def test_networks_of_every_kind(family, tuning, options):
    task = network_task(family, tuning, options=options)
    expected = same(task)
    norms = squared_norms(task, jax.tree.map(lambda leaf: leaf + 0.05, task.params))
    np.testing.assert_allclose(norms, expected.train, rtol=2e-4)
    same(task, scaled=True)
