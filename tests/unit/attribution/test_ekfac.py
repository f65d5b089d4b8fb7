"""EK-FAC where it is exact, against the dense matrix where it is not, and on a small BERT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from bayes_simfluence.attribution.influence.influence_functions import (
    EKFAC,
    Dense,
    InGram,
    influence,
)
from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.layers import dense
from bayes_simfluence.networks.network import Network
from bayes_simfluence.tasks.classification import classification_task
from bayes_simfluence.tasks.rows import Rows
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tuning.tunings import FULL, Full, LoRA

INWARD, WIDTH, CLASSES = 5, 6, 3


def cross_entropy(logits, example):
    return -jax.nn.log_softmax(logits)[example["y"]]


def squared(output, example):
    return 0.5 * jnp.square(output - example["x"][: len(output)] + 1.0).sum()


def linear(weights, example):
    return dense(weights, "one", example["x"])


def two_layers(weights, example):
    return dense(weights, "two", jnp.tanh(dense(weights, "one", example["x"])))


def called_twice(weights, example):
    """One layer that is called two times, on three rows and on one."""
    rows = jnp.stack([example["x"], 2.0 * example["x"], example["x"] ** 2])
    mixed = jnp.tanh(dense(weights, "one", rows)).sum(axis=0)
    return dense(weights, "two", mixed + jnp.tanh(dense(weights, "one", example["x"])))


def made(outputs, output_loss, count, *, layers=("one",), bias=True, queries=5):
    rng = np.random.default_rng(count)
    data = {
        "x": jnp.asarray(rng.normal(size=(count + queries, INWARD)), jnp.float32),
        "y": jnp.asarray(rng.integers(CLASSES, size=count + queries)),
    }
    sizes = [INWARD, *([WIDTH] if len(layers) > 1 else []), CLASSES]
    params = {}
    for name, inward, outward in zip(layers, sizes[:-1], sizes[1:], strict=True):
        weight = rng.normal(size=(outward, inward)) / np.sqrt(inward)
        params[f"{name}.weight"] = jnp.asarray(weight, jnp.float32)
        if bias:
            params[f"{name}.bias"] = jnp.asarray(rng.normal(size=outward), jnp.float32)
    return Task(
        params=params,
        loss=lambda weights, example: output_loss(outputs(weights, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train=jax.tree.map(lambda leaf: leaf[:count], data),
        query=jax.tree.map(lambda leaf: leaf[count:], data),
        train_ids=[f"t{number}" for number in range(count)],
        query_ids=[f"q{number}" for number in range(queries)],
    )


@pytest.mark.parametrize(
    ("output_loss", "count", "bias"),
    [(squared, 20, True), (squared, 20, False), (cross_entropy, 1, True)],
    ids=["squared", "without bias", "one example"],
)
def test_a_linear_layer_whose_curvature_is_a_kronecker_product(key, output_loss, count, bias):
    """Squared error: the same Hessian for all examples. One example: one product anyway."""
    task = made(linear, output_loss, count, bias=bias)
    settings = {"damping": 0.1, "key": key}
    exact = influence(task, solver=Dense(), **settings)
    scores = influence(task, solver=EKFAC(draws=None), **settings)
    np.testing.assert_allclose(scores, exact, atol=2e-4 * float(np.abs(exact).max()))


def entered(params, x):
    """What enters the layers of ``called_twice``, a 1 for the bias last."""
    x, params = np.asarray(x), jax.tree.map(np.asarray, params)
    rows = np.stack([x, 2 * x, x**2, x])
    inner = np.tanh(rows @ params["one.weight"].T + params["one.bias"])
    return {"one": ones(rows), "two": ones(inner.sum(axis=0)[None])}


def ones(rows):
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=1.0)


def by_layer(gradients):
    """``(..., out, in + 1)`` of each layer."""
    arrays = jax.tree.map(np.asarray, gradients)
    return {
        name: np.concatenate([arrays[f"{name}.weight"], arrays[f"{name}.bias"][..., None]], -1)
        for name in ("one", "two")
    }


def test_the_definition_written_out(key):
    """Gradients by JAX's own derivatives, everything after them in NumPy."""
    task = made(called_twice, cross_entropy, 19, layers=("one", "two"))
    params, damping = task.params, 0.05
    pseudo, inward, outward = [], {"one": 0.0, "two": 0.0}, {"one": 0.0, "two": 0.0}
    slopes = jax.jit(jax.jacrev(lambda weights, x: called_twice(weights, {"x": x})))
    for x in task.train["x"]:
        shares = np.asarray(jax.nn.softmax(called_twice(params, {"x": x})))
        values, vectors = np.linalg.eigh(np.diag(shares) - np.outer(shares, shares))
        columns = vectors * np.sqrt(np.maximum(values, 0))[None]
        jacobian = by_layer(slopes(params, x))
        pseudo.append(
            {name: np.einsum("ok,oij->kij", columns, rows) for name, rows in jacobian.items()}
        )
        rows = entered(params, x)
        for name in inward:
            inward[name] = inward[name] + rows[name].T @ rows[name]
        # Slopes of what leaves a layer: those of the second are the outputs' own.
        first, bias, second = (
            np.asarray(params[at]) for at in ("one.weight", "one.bias", "two.weight")
        )
        inner = rows["one"] @ np.concatenate([first, bias[:, None]], axis=1).T
        each = (columns.T @ second)[:, None, :] * (1 - np.tanh(inner) ** 2)[None]
        outward["one"] = outward["one"] + np.einsum("kri,krj->ij", each, each)
        outward["two"] = outward["two"] + columns @ columns.T
    gradient = jax.jit(jax.grad(task.loss))
    trains, queries = (
        [by_layer(gradient(params, {"x": x, "y": y})) for x, y in zip(*some.values(), strict=True)]
        for some in (task.train, task.query)
    )
    expected = np.zeros((19, 5))
    for layer in inward:
        right, left = np.linalg.eigh(inward[layer])[1], np.linalg.eigh(outward[layer])[1]

        def turned(some, name=layer, left=left, right=right):
            return np.stack([left.T @ gradient[name] @ right for gradient in some])

        values = np.mean(
            [np.square(left.T @ each[layer] @ right).sum(axis=0) for each in pseudo], axis=0
        )
        expected -= np.einsum(
            "tij,qij,ij->tq", turned(trains), turned(queries), 1 / (values + damping)
        )
    scores = influence(task, solver=EKFAC(draws=None), damping=damping, key=key)
    np.testing.assert_allclose(scores, expected / 19, atol=1e-3 * np.abs(expected).max() / 19)


def test_two_layers_against_the_dense_curvature(key):
    """Labels are drawn from the network itself, as if it had been trained on them."""
    task = made(two_layers, cross_entropy, 200, layers=("one", "two"), queries=20)

    def labelled(some, seed):
        logits = jax.vmap(lambda x: two_layers(task.params, {"x": x}))(some["x"])
        return {**some, "y": jax.random.categorical(jax.random.key(seed), logits)}

    train, query = labelled(task.train, 1), labelled(task.query, 2)
    task = dataclasses.replace(task, train=train, query=query)
    exact, scores, plain = (
        influence(task, solver=solver, damping=damping, key=key)
        for solver, damping in ((Dense(), 0.1), (EKFAC(), 0.1), (EKFAC(), 1e4))
    )
    ranks = [spearmanr(some.values.ravel(), exact.values.ravel())[0] for some in (scores, plain)]
    # Gradients that are hardly preconditioned do worse.
    assert ranks[0] > 0.9
    assert ranks[1] < 0.8
    assert scores.attrs["weights_left_out"] == 0
    assert scores.attrs["damping"] == 0.1


def test_memory_decides_nothing(key):
    task = made(two_layers, cross_entropy, 11, layers=("one", "two"))
    large, small = (
        influence(task, solver=EKFAC(), damping=0.01, key=key, memory=memory)
        for memory in (2**20, 500)
    )
    np.testing.assert_allclose(large, small, rtol=1e-3, atol=1e-5)


def test_default_damping_is_a_tenth_of_each_layers_mean(key):
    task = made(linear, squared, 20)
    scores = influence(task, solver=EKFAC(draws=None), key=key)
    x = np.pad(np.asarray(task.train["x"]), ((0, 0), (0, 1)), constant_values=1.0)
    mean = np.square(x).sum() / 20 / x.shape[1]
    message = f".1 of each layer's mean eigenvalue: one {0.1 * mean:.4g}"
    assert scores.attrs["damping"].startswith(message[:-1])


class TestMisuse:
    @pytest.fixture
    def task(self):
        return made(linear, cross_entropy, 20)

    def test_the_hessian(self, task, key):
        with pytest.raises(Misuse, match=r"'hessian' with EK-FAC.* pass curvature='ggn'"):
            influence(task, solver=EKFAC(), curvature="hessian", damping=0.1, key=key)

    def test_weights_that_are_made_of_others(self, task, key):
        def assembled(params, frozen):
            return {"one.weight": params["low"] + frozen["one.weight"]}

        adapted = dataclasses.replace(
            task, params={"low": jnp.ones((3, 1))}, frozen=task.params, assemble=assembled
        )
        with pytest.raises(
            Misuse, match=r"no tensors of the network: low.* take InGram\(\), Arnoldi"
        ):
            influence(adapted, solver=EKFAC(), damping=0.1, key=key)

    def test_no_linear_layer(self, task, key):
        def outputs(weights, example):
            return (weights["one.weight"] * example["x"][None]).sum(axis=1)

        plain = dataclasses.replace(
            task,
            outputs=outputs,
            loss=lambda weights, example: cross_entropy(outputs(weights, example), example),
        )
        with pytest.raises(Misuse, match=r"none of the 2 trained parameters is a linear"):
            influence(plain, solver=EKFAC(), damping=0.1, key=key)

    def test_outputs_too_many_to_write_out(self, task, key):
        many = dataclasses.replace(
            task,
            outputs=lambda weights, example: jnp.tile(linear(weights, example), 30),
            output_loss=lambda output, example: cross_entropy(output[:CLASSES], example),
        )
        with pytest.raises(Misuse, match=r"output_draw: got none; expected .* for 90 outputs"):
            influence(many, solver=EKFAC(), damping=0.1, key=key)

    @pytest.mark.parametrize("part", ["train", "query"])
    def test_a_gradient_that_is_not_finite(self, task, key, part):
        some = getattr(task, part)
        broken = {**some, "x": some["x"].at[3, 0].set(np.inf)}
        with pytest.raises(Misuse, match=rf"gradient of {part} example {part[0]}3"):
            changed = dataclasses.replace(task, **{part: broken})
            influence(changed, solver=EKFAC(), damping=0.1, key=key)

    def test_no_damping_of_a_singular_layer(self, task, key):
        with pytest.raises(WorkFailed, match=r"ggn of layer one .* cannot be inverted"):
            influence(task, solver=EKFAC(), damping=0.0, key=key)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f"]
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 12, "max_position_embeddings": 8, "vocab_size": len(WORDS)}


def bert_task(tuning, count=40):
    """Classification of random words by a BERT of random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    from bayes_simfluence.networks import bert

    config, rng = BertConfig(**BERT), np.random.default_rng(0)
    tensors = {
        name: jnp.asarray(rng.normal(0.0, 0.4, at) + name.endswith("Norm.weight"), jnp.float32)
        for name, at in bert.shapes_of(config).items()
    }
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    network: Network = bert.network(config, tensors)
    texts = [
        {"text": " ".join(rng.choice(WORDS[4:], rng.integers(2, 7))), "label": str(at % 2)}
        for at in range(count + 6)
    ]
    train, query = (
        Rows(name, "line", list(range(len(some))), [f"{name}{at}" for at in range(len(some))], some)
        for name, some in (("t", texts[:count]), ("q", texts[count:]))
    )
    return classification_task(
        Pretrained("tiny", network, tensors, fast),
        train,
        query,
        labels=["0", "1"],
        key=jax.random.key(0),
        max_tokens=6,
        tuning=tuning,
    )


NOT_LINEAR = ["embeddings.*", "*LayerNorm*"]


def test_a_bert_against_the_exact_solution_of_the_same_tensors(key):
    """EK-FAC leaves out what is no linear layer; the exact solution excludes it."""
    settings = {"damping": 1e-3, "key": key}
    exact = influence(bert_task(Full(exclude=NOT_LINEAR)), solver=InGram(), **settings)
    scores = influence(bert_task(FULL), solver=EKFAC(), **settings)
    assert spearmanr(scores.values.ravel(), exact.values.ravel())[0] > 0.8
    assert scores.attrs["layers"] == 7
    assert "embeddings.word_embeddings.weight" in scores.attrs["tensors_left_out"]


def test_adapters_of_a_bert_are_refused(key):
    with pytest.raises(Misuse, match=r"EK-FAC for .*lora_A.*take InGram\(\), Arnoldi"):
        influence(bert_task(LoRA(rank=2), 4), solver=EKFAC(), damping=0.1, key=key)
