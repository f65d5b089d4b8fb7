"""Gradients in batches against gradients one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.gradients.checkpoints import weights_at
from bayes_simfluence.attribution.gradients.per_example import flat, gradient_products
from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY, WIDTH = 7, 5, 3


@pytest.fixture
def task(rng):
    inputs = jnp.asarray(rng.normal(size=(TRAIN + QUERY, 4)))
    params = {"w": jnp.asarray(rng.normal(size=(WIDTH, 4))), "v": jnp.ones(WIDTH)}

    def loss(weights, example):
        return (jnp.tanh(weights["w"] @ example) @ weights["v"] * weights["frozen"] - 1.0) ** 2

    return Task(
        params=params,
        frozen={"frozen": jnp.float32(0.7)},
        assemble=lambda params, frozen: {**params, **frozen},
        loss=loss,
        train=inputs[:TRAIN],
        query=inputs[TRAIN:],
        train_ids=range(TRAIN),
        query_ids=range(QUERY),
    )


def one_by_one(task, params, examples):
    def loss(params, example):
        return task.loss(task.weights(params, task.frozen), example)

    return np.stack([np.asarray(flat(jax.grad(loss)(params, example))) for example in examples])


@pytest.mark.parametrize("memory", [2**20, 8 * 4 * 15, 1], ids=["whole", "batches", "single"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_products_in_batches_are_those_of_whole_gradients(task, rng, memory, scaled):
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.params)
    train, query = (one_by_one(task, params, part) for part in (task.train, task.query))
    scale = rng.uniform(0.5, 2.0, train.shape[1]).astype(np.float32) if scaled else None
    products = gradient_products(
        task, params, scale=None if scale is None else jnp.asarray(scale), memory=memory
    )
    weights = np.ones(train.shape[1]) if scale is None else scale
    np.testing.assert_allclose(products.products, train * weights @ query.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(products.train, (train**2 * weights).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(products.query, (query**2 * weights).sum(axis=1), rtol=1e-4)


def test_weights_of_a_checkpoint_take_their_place(task):
    tensors = {name: np.asarray(leaf) + 1 for name, leaf in named_tensors(task.params).items()}
    params = weights_at(task, SavedWeights(3, 0.1, tensors))
    np.testing.assert_allclose(params["w"], task.params["w"] + 1)
    with pytest.raises(Misuse, match=r"checkpoint of step 3: got .* v absent"):
        weights_at(task, SavedWeights(3, 0.1, {"w": tensors["w"]}))
    with pytest.raises(Misuse, match=r"w \(2, 2\)"):
        weights_at(task, SavedWeights(3, 0.1, {**tensors, "w": np.zeros((2, 2))}))
