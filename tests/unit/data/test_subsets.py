"""Subsets and outcomes: what is kept, what is planned, what is refused."""

import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.subsets import planned_subsets, subsets_from_arrays, subsets_of_runs


@pytest.fixture
def runs(rng):
    batch = np.array([[[0, 1], [2, -1]], [[2, 2], [3, 0]], [[1, -1], [-1, -1]]])
    return bs.runs_from_arrays(
        batch=batch, loss=rng.random((3, 3, 2)), train_ids=list("abcd"), query_ids=list("xy")
    )


def test_runs_are_subsets_with_their_last_losses(runs):
    found = subsets_of_runs(runs)
    expected = [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0]]
    np.testing.assert_array_equal(found["mask"].values.astype(int), expected)
    np.testing.assert_allclose(found["outcome"].values, runs["loss"].values[:, -1])
    assert found["train"].values.tolist() == list("abcd") and found["outcome"].attrs["units"]


def test_planned_runs_train_on_their_subset(runs, key, rng):
    mask = np.zeros((3, 4), bool)
    for row, one in zip(mask, rng.permuted(np.tile(np.arange(4), (3, 1)), axis=1), strict=True):
        row[one[:3]] = True
    subsets = subsets_from_arrays(mask, np.zeros((3, 1)), train_ids=list("abcd"))
    planned = planned_subsets(runs, subsets["mask"], batch_size=2, epochs=2, key=key)
    assert planned["batch"].shape == (3, 4, 2)
    again = subsets_from_arrays(mask[:, ::-1], np.zeros((3, 1)), train_ids=list("dcba"))
    moved = planned_subsets(runs, again["mask"], batch_size=2, epochs=2, key=key)
    np.testing.assert_array_equal(moved["batch"], planned["batch"])
    for row, batch in zip(mask, planned["batch"].values, strict=True):
        members, times = np.unique(batch[batch >= 0], return_counts=True)
        assert members.tolist() == np.flatnonzero(row).tolist() and set(times) == {2}
    uneven = subsets["mask"].copy(data=np.tri(3, 4, dtype=bool))
    with pytest.raises(Misuse, match="subsets of 1 to 3 examples"):
        planned_subsets(runs, uneven, batch_size=2, epochs=1, key=key)


def test_misuse_is_named():
    with pytest.raises(Misuse, match=r"masks and outcomes: got shapes \(3, 2\) and \(2, 1\)"):
        subsets_from_arrays(np.ones((3, 2)), np.ones((2, 1)))
    with pytest.raises(Misuse, match="values than 0 and 1"):
        subsets_from_arrays(np.full((2, 2), 2), np.ones((2, 1)))
    with pytest.raises(Misuse, match="outcome of subset 1, query 0: got nan"):
        subsets_from_arrays(np.ones((2, 2)), [[1.0], [np.nan]])
    with pytest.raises(Misuse, match="train_ids: got 3 ids; expected 2"):
        subsets_from_arrays(np.ones((2, 2)), np.ones((2, 1)), train_ids=list("abc"))
