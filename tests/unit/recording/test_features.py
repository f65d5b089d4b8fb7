"""Gradient features against the full gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording import features
from bayes_simfluence.recording.features import gradient_features
from bayes_simfluence.tasks.task import Task


def one_matrix(train=7, query=5):
    """A single layer: its gradient is one array of 12 numbers."""
    keys = jax.random.split(jax.random.key(1), 2)
    inputs = jax.random.normal(keys[0], (train + query, 4))

    def loss(params, example):
        return jnp.square(params @ example - 1.0).sum()

    return Task(
        params=jax.random.normal(keys[1], (3, 4)),
        loss=loss,
        train=inputs[:train],
        query=inputs[train:],
        train_ids=range(train),
        query_ids=range(query),
    )


def network(width=60, train=7, query=5):
    """Two layers: a gradient of arrays of very different size."""
    keys = jax.random.split(jax.random.key(2), 3)
    inputs = jax.random.normal(keys[0], (train + query, 40))

    def loss(params, example):
        hidden = jnp.tanh(params["w"] @ example + params["b"])
        return (hidden @ params["v"] - 1.0) ** 2

    return Task(
        params={
            "w": jax.random.normal(keys[1], (width, 40)) / 6.0,
            "b": jnp.zeros(width),
            "v": jax.random.normal(keys[2], (width,)) / 6.0,
        },
        loss=loss,
        train=inputs[:train],
        query=inputs[train:],
        train_ids=range(train),
        query_ids=range(query),
    )


def gradients(task):
    """Every example's whole gradient: of the training examples, of the queries."""

    def flat(example):
        gradient = jax.grad(task.loss)(task.params, example)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

    return tuple(np.stack([flat(example) for example in part]) for part in (task.train, task.query))


def mean_square(vectors):
    return np.square(vectors).sum(axis=1).mean()


def test_a_sketch_longer_than_the_gradient_keeps_every_inner_product(key):
    task = one_matrix()
    train, query = gradients(task)
    coordinates = gradient_features(task, rank=7, sketch=64, key=key)
    unit = mean_square(train)
    np.testing.assert_allclose(
        coordinates.train @ coordinates.train.T, train @ train.T / unit, atol=1e-4
    )
    np.testing.assert_allclose(
        coordinates.train @ coordinates.query.T, train @ query.T / unit, atol=1e-4
    )
    np.testing.assert_allclose(coordinates.kept, 1.0, atol=1e-6)


def test_gradients_of_few_dimensions_have_no_coordinates_of_rounding(key):
    """Training examples that come twice leave eigenvalues of 0, on either side of it."""
    task = one_matrix(train=4)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), task.train)
    task = dataclasses.replace(task, train=twice, train_ids=range(8))
    train, query = gradients(task)
    coordinates = gradient_features(task, rank=8, sketch=64, key=key)
    unit = mean_square(train)
    np.testing.assert_allclose(
        coordinates.train @ coordinates.query.T, train @ query.T / unit, atol=1e-4
    )
    np.testing.assert_allclose(coordinates.train[:, 4:], 0.0, atol=1e-6)
    np.testing.assert_array_equal(coordinates.query[:, 4:], 0.0)


@pytest.mark.parametrize("sketch", [64, 512])
def test_a_short_sketch_is_off_by_about_one_over_the_root_of_its_length(sketch):
    task = network()
    train, query = gradients(task)
    unit = mean_square(train)
    norms = np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(query, axis=1)[None]
    errors = []
    for seed in range(4):
        coordinates = gradient_features(task, rank=7, sketch=sketch, key=jax.random.key(seed))
        # With all coordinates kept, inner products are those of the sketches.
        errors.append((coordinates.train @ coordinates.query.T * unit - train @ query.T) / norms)
    scale = np.sqrt(sketch * np.square(errors).mean())
    assert 0.0 < scale < 3.0


def test_coordinates_are_the_best_of_their_number(key):
    task = one_matrix()
    whole = gradient_features(task, rank=7, sketch=64, key=key)
    values = np.linalg.eigvalsh(whole.train @ whole.train.T)[::-1]
    for rank in (1, 3, 7):
        coordinates = gradient_features(task, rank=rank, sketch=64, key=key)
        assert coordinates.train.shape == (7, rank)
        assert coordinates.query.shape == (5, rank)
        np.testing.assert_allclose(coordinates.kept, values[:rank].sum() / values.sum(), rtol=1e-4)
        np.testing.assert_allclose(mean_square(coordinates.train), coordinates.kept, rtol=1e-4)
        np.testing.assert_allclose(coordinates.train, whole.train[:, :rank], atol=1e-3)


def test_a_rank_above_the_number_of_examples_is_that_number(key):
    coordinates = gradient_features(one_matrix(), rank=16, sketch=64, key=key)
    assert coordinates.train.shape == (7, 7)
    assert 0.0 < coordinates.kept <= 1.0
    np.testing.assert_allclose(mean_square(coordinates.train), 1.0, rtol=1e-4)


def test_the_key_decides(key):
    first, same = (gradient_features(network(), rank=4, sketch=64, key=key) for _ in range(2))
    np.testing.assert_array_equal(first.train, same.train)
    np.testing.assert_array_equal(first.query, same.query)
    other = gradient_features(network(), rank=4, sketch=64, key=jax.random.key(9))
    assert np.abs(first.train - other.train).max() > 1e-3


class Listener:
    def __init__(self):
        self.told = []

    def advance(self, amount=1, note=""):
        self.told.append(amount)


@pytest.mark.parametrize("batch", [1, 4, 5, 6, 7, 100])
def test_batches_change_nothing_but_the_reports_of_progress(monkeypatch, key, batch):
    expected = gradient_features(network(), rank=4, sketch=64, key=key)
    monkeypatch.setattr(features, "BATCH", batch)
    listener = Listener()
    coordinates = gradient_features(network(), rank=4, sketch=64, key=key, meter=listener)
    np.testing.assert_allclose(coordinates.train, expected.train, atol=1e-5)
    np.testing.assert_allclose(coordinates.query, expected.query, atol=1e-5)
    assert sum(listener.told) == 7 + 5
    assert len(listener.told) == -(-7 // batch) + -(-5 // batch)


def test_more_examples_than_a_batch(key):
    task = one_matrix(train=features.BATCH + 6, query=features.BATCH + 1)
    train, query = gradients(task)
    coordinates = gradient_features(task, rank=12, sketch=64, key=key)
    expected = train @ query.T / mean_square(train)
    np.testing.assert_allclose(coordinates.train @ coordinates.query.T, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"sketch": 0}, "sketch: got 0"),
        ({"key": jax.random.PRNGKey(0)}, "one typed PRNG key"),
    ],
)
def test_settings_that_do_not_fit_are_refused(key, settings, match):
    with pytest.raises(Misuse, match=match):
        gradient_features(one_matrix(), **{"key": key, **settings})


def test_a_sketch_longer_than_all_arrays_of_the_gradient_is_exact(key):
    task = network(width=10)
    train, query = gradients(task)
    coordinates = gradient_features(task, rank=7, sketch=512, key=key)
    expected = train @ query.T / mean_square(train)
    np.testing.assert_allclose(coordinates.train @ coordinates.query.T, expected, atol=1e-3)
