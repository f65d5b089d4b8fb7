"""Edits of curricula are pure and do what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.checks import Misuse
from bayes_simfluence.counterfactual import edits as c

curricula = st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(rows=curricula, chosen=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_drop_and_keep_split_a_curriculum_between_them(rows, chosen):
    batch = np.array(rows)
    before = batch.copy()
    dropped, kept = c.drop(batch, chosen), c.keep(batch, chosen)
    assert not np.isin(dropped, chosen).any()
    assert np.isin(kept[kept >= 0], chosen).all()
    assert np.array_equal(np.maximum(dropped, kept), batch)
    assert np.array_equal(batch, before)


@settings(max_examples=50, deadline=None)
@given(rows=curricula, seed=st.integers(0, 99))
def test_edits_that_undo_one_another(rows, seed):
    batch = np.array(rows)
    order = np.random.default_rng(seed).permutation(len(batch))
    assert np.array_equal(c.reverse(c.reverse(batch)), batch)
    assert np.array_equal(c.reorder(c.reorder(batch, order), np.argsort(order)), batch)
    assert np.array_equal(c.swap(c.swap(batch, 0, len(batch) - 1), 0, len(batch) - 1), batch)
    there = c.replace(batch, {1: 2, 2: 1})
    assert np.array_equal(c.replace(there, {1: 2, 2: 1}), batch)
    assert np.array_equal(c.repeat(batch, 3)[len(batch) : 2 * len(batch)], batch)


def test_insert_pads_smaller_batches_and_keeps_the_rest():
    batch = np.arange(6).reshape(3, 2)
    longer = c.insert(batch, 1, np.array([[9]]))
    assert longer.tolist() == [[0, 1], [9, -1], [2, 3], [4, 5]]
    assert c.insert(batch, 3, np.array([[9, 8]]))[-1].tolist() == [9, 8]


def test_swapping_equal_steps_is_nothing_and_swap_is_symmetric():
    batch = np.arange(6).reshape(3, 2)
    assert np.array_equal(c.swap(batch, 1, 1), batch)
    assert np.array_equal(c.swap(batch, 0, 2), c.swap(batch, 2, 0))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda batch: c.swap(batch, 0, 2), "index in 0..1"),
        (lambda batch: c.reorder(batch, [0, 0]), "permutation"),
        (lambda batch: c.insert(batch, 3, np.zeros((1, 1), int)), "step index in 0..2"),
        (lambda batch: c.insert(batch, 0, np.zeros((1, 2), int)), "at most 1 slots"),
    ],
)
def test_misuse_says_what_to_do(call, match):
    with pytest.raises(Misuse, match=match):
        call(np.zeros((2, 1), int))
