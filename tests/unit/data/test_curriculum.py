"""Makers of curricula keep their promises for every size."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data import curriculum as c

sizes = st.integers(1, 12)


@settings(max_examples=30, deadline=None)
@given(examples=sizes, batch_size=sizes, epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_each_epoch_holds_every_example_once(examples, batch_size, epochs, seed):
    batch = c.shuffled_epochs(
        examples, batch_size=batch_size, epochs=epochs, key=jax.random.key(seed)
    )
    steps = -(-examples // batch_size)
    assert batch.shape == (steps * epochs, batch_size)
    for epoch in batch.reshape(epochs, -1):
        assert sorted(epoch[epoch >= 0]) == list(range(examples))


def test_epochs_differ_in_order_and_keys_decide(key):
    batch = c.shuffled_epochs(20, batch_size=4, epochs=2, key=key)
    assert not np.array_equal(batch[:5], batch[5:])
    assert np.array_equal(batch, c.shuffled_epochs(20, batch_size=4, epochs=2, key=key))
    other = c.shuffled_epochs(20, batch_size=4, epochs=2, key=jax.random.key(1))
    assert not np.array_equal(batch, other)


def test_a_random_subset_is_trained_on_alone(key):
    batch = c.random_subset_epochs(200, per_run=128, batch_size=4, epochs=3, key=key)
    assert batch.shape == (96, 4)
    values, counts = np.unique(batch, return_counts=True)
    assert len(values) == 128 and (counts == 3).all() and values.max() < 200


def test_with_replacement_covers_the_examples_evenly(key):
    batch = c.with_replacement(10, batch_size=8, steps=1000, key=key)
    counts = np.bincount(batch.ravel(), minlength=10)
    # 8000 draws over 10 cells: chi-square with 9 degrees of freedom, false alarms 1e-4.
    assert ((counts - 800) ** 2 / 800).sum() < 33.7


def test_blocks_follow_one_another(key):
    batch = c.blocks([[0, 1, 2], [3, 4]], batch_size=2, epochs=2, key=key)
    assert set(batch[:4].ravel()) == {0, 1, 2, -1} and set(batch[4:].ravel()) == {3, 4}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda k: c.shuffled_epochs(0, batch_size=1, epochs=1, key=k), "at least one index"),
        (lambda k: c.shuffled_epochs([-1], batch_size=1, epochs=1, key=k), "leave -1 to empty"),
        (lambda k: c.shuffled_epochs(3, batch_size=0, epochs=1, key=k), "batch_size.*>= 1"),
        (lambda k: c.random_subset_epochs(3, per_run=4, batch_size=1, epochs=1, key=k), "per_run"),
        (lambda k: c.blocks([], batch_size=1, key=k), "at least one group"),
    ],
)
def test_misuse_says_what_to_do(call, match, key):
    with pytest.raises(Misuse, match=match):
        call(key)


def test_an_integer_is_not_a_key():
    with pytest.raises(Misuse, match=r"jax\.random\.key"):
        c.keyed(0)
