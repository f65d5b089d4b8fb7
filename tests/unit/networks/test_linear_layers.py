"""Attribution on every family: what reads linear layers from a trace, against plain Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.influence import ekfac
from bayes_simfluence.attribution.influence.influence_functions import EKFAC, influence
from bayes_simfluence.attribution.tracin import tracin
from bayes_simfluence.networks.checkpoint import network_of
from bayes_simfluence.networks.families import family_of
from bayes_simfluence.networks.heads import head_logits, with_head
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors
from bayes_simfluence.recording.features import gradient_features
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tuning.layers import HEAD, linear_layers

COUNT, LENGTH, CLASSES, RATE, DAMPING = 3, 4, 3, 0.1, 1e5
ONE_LAYER = {
    "bert": {"num_hidden_layers": 1},
    "roberta": {"num_hidden_layers": 1},
    "distilbert": {"n_layers": 1},
    "gpt2": {"n_layer": 1},
    "gpt_neox": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "llama": {"num_hidden_layers": 1},
}
"""Family -> one layer of its small configuration."""


def family_task(checkpoint):
    """Three classes: the head's, or the logits of three tokens after the first two."""
    network, rng = network_of(checkpoint), np.random.default_rng(0)
    encoder = network.kind == "encoder"
    tensors = {name: checkpoint.tensors[name] for name in network.shapes if "pooler" not in name}

    def outputs(weights, example):
        tokens = example["tokens"]
        sequence = Sequence(tokens, jnp.zeros_like(tokens), example["attended"])
        if encoder:
            return head_logits(network, weights, sequence, "mean")
        if network.seq2seq_logits is not None:
            return network.seq2seq_logits(weights, sequence, tokens[:2])[1, :CLASSES]
        return network.logits(weights, sequence)[1, :CLASSES]

    def output_loss(logits, example):
        return -jax.nn.log_softmax(logits)[example["label"]]

    def examples():
        return {
            "tokens": jnp.asarray(rng.integers(2, 12, (COUNT, LENGTH))),
            "attended": jnp.arange(LENGTH)[None] < jnp.asarray([2, 3, 4])[:, None],
            "label": jnp.asarray(rng.integers(0, CLASSES, COUNT)),
        }

    params = with_head(tensors, network, CLASSES, jax.random.key(1)) if encoder else tensors
    return Task(
        params={name: 5 * value if HEAD in name else value for name, value in params.items()},
        loss=lambda weights, example: output_loss(outputs(weights, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train=examples(),
        query=examples(),
        train_ids=range(COUNT),
        query_ids=range(COUNT),
        provenance={"family": network.family},
    )


@pytest.fixture(scope="module", params=ONE_LAYER)
def task(request, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return family_task(made.checkpoint(request.param, folder, **ONE_LAYER[request.param]))


@pytest.fixture(scope="module")
def plain(task):
    """Gradients of training examples and queries by name of tensor, and each tensor's trace of the
    Gauss-Newton matrix: from Jacobians alone."""
    jacobians = jax.jit(jax.vmap(jax.jacrev(task.outputs), (None, 0)))
    logits = jax.jit(jax.vmap(task.outputs, (None, 0)))
    gradients = []
    for examples in (task.train, task.query):
        jacobian = {
            name: np.asarray(rows, float).reshape(COUNT, CLASSES, -1)
            for name, rows in jacobians(task.params, examples).items()
        }
        shares = np.asarray(jax.nn.softmax(logits(task.params, examples)), float)
        slopes = shares - np.eye(CLASSES)[np.asarray(examples["label"])]
        gradients.append(
            {name: np.einsum("nk,nkw->nw", slopes, rows) for name, rows in jacobian.items()}
        )
        if examples is task.train:
            hessian = np.eye(CLASSES) * shares[:, :, None] - shares[:, :, None] * shares[:, None]
            traces = {
                name: np.einsum("nkl,nkw,nlw->", hessian, rows, rows) / COUNT
                for name, rows in jacobian.items()
            }
    return (*gradients, traces)


def products_of(train, query, names):
    return sum(train[name] @ query[name].T for name in names)


def test_tracin_by_layers(task, plain):
    train, query, _ = plain
    scores = tracin(task, [SavedWeights(1, RATE, named_tensors(task.params))])
    expected = -RATE * products_of(train, query, train)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_gradient_features(task, plain, key):
    """A sketch longer than the gradient, and a coordinate for each example, lose nothing."""
    train, query, _ = plain
    width = sum(leaf.size for leaf in task.params.values())
    found = gradient_features(task, rank=COUNT, sketch=width, key=key)
    unit = np.trace(products_of(train, train, train)) / COUNT
    expected = products_of(train, query, train) / unit
    np.testing.assert_allclose(found.train @ found.query.T, expected, atol=1e-3)


def test_ekfac(task, plain, key, monkeypatch):
    """Every linear layer with its bias, nothing else; mean eigenvalues are those of the dense
    blocks. Under damping so heavy the blocks are multiples of the identity."""
    monkeypatch.setattr(ekfac, "SHARE_OF_MEAN", DAMPING)
    train, query, traces = plain
    scores = influence(task, solver=EKFAC(draws=None), key=key)
    layers = linear_layers(task.params, family_of(task.provenance["family"]))
    layers += [HEAD] if f"{HEAD}.bias" in train else []
    members = {
        name: [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in train]
        for name in layers
    }
    dampings = dict(
        layer.split(" ") for layer in scores.attrs["damping"].split(": ")[1].split(", ")
    )
    assert dampings.keys() == members.keys()
    expected = np.zeros((COUNT, COUNT))
    for name, parts in members.items():
        size = sum(train[part].shape[1] for part in parts)
        mean = sum(traces[part] for part in parts) / size
        np.testing.assert_allclose(float(dampings[name]), DAMPING * mean, rtol=1e-3)
        expected -= products_of(train, query, parts) / (DAMPING * mean) / COUNT
    np.testing.assert_allclose(scores, expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max())
    covered = sum(train[part].shape[1] for parts in members.values() for part in parts)
    assert scores.attrs["weights_covered"] == covered
