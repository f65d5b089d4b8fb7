"""Edits of curricula are pure, do what they say, and carry weights along with their slots."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.counterfactual import edits as e
from bayes_simfluence.data.runs import runs_from_arrays
from bayes_simfluence.evaluation.synthetic import linear_runs

curricula = st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=1, max_size=6)

ALL = [
    (e.drop, ([1],)),
    (e.keep, ([0, 2],)),
    (e.repeat, (2,)),
    (e.insert, (1, np.array([[2]]))),
    (e.swap, (0, 1)),
    (e.reorder, ([1, 0],)),
    (e.reverse, ()),
    (e.replace, ({0: 1},)),
    (e.upweight, ({0: 2.0},)),
]


def batch_of(edit, batch, *arguments):
    edited, weight = edit(batch, None, *arguments)
    assert weight is None
    return edited


def test_every_edit_is_in_the_table_of_these_tests():
    here = {name for name, of in vars(e).items() if getattr(of, "__module__", "") == e.__name__}
    public = {name for name in here if not name.startswith("_")} - {"Edit", "edit_runs"}
    assert {edit.__name__ for edit, _ in ALL} == public


@pytest.mark.parametrize(("edit", "arguments"), ALL)
def test_edits_are_pure_and_weights_follow_their_slots(edit, arguments):
    batch = np.array([[0, 1], [2, -1]], np.int32)
    weight = np.array([[3.0, 0.5], [2.0, 0.0]], np.float32)
    before = batch.copy(), weight.copy()
    edited, weights = edit(batch, weight, *arguments)
    plain, _ = edit(batch, None, *arguments)
    np.testing.assert_array_equal(plain, edited)
    assert edited.dtype == batch.dtype and weights.dtype == weight.dtype
    assert weights.shape == edited.shape and (weights[edited == -1] == 0).all()
    edited[:], weights[:] = 7, 7
    np.testing.assert_array_equal(batch, before[0])
    np.testing.assert_array_equal(weight, before[1])


@settings(max_examples=50, deadline=None)
@given(rows=curricula, chosen=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_drop_and_keep_split_a_curriculum_between_them(rows, chosen):
    batch = np.array(rows)
    weight = np.where(batch >= 0, batch + 0.5, 0.0)
    (dropped, without), (kept, within) = (
        e.drop(batch, weight, chosen),
        e.keep(batch, weight, chosen),
    )
    assert not np.isin(dropped, chosen).any()
    assert np.isin(kept[kept >= 0], chosen).all()
    assert np.array_equal(np.maximum(dropped, kept), batch)
    assert np.array_equal(without + within, weight)


@settings(max_examples=50, deadline=None)
@given(rows=curricula, seed=st.integers(0, 99))
def test_edits_that_undo_one_another(rows, seed):
    batch = np.array(rows)
    weight = np.where(batch >= 0, batch + np.arange(len(batch))[:, None] + 0.5, 0.0)
    order = np.random.default_rng(seed).permutation(len(batch))
    for pair in (
        e.reverse(*e.reverse(batch, weight)),
        e.reorder(*e.reorder(batch, weight, order), np.argsort(order)),
        e.swap(*e.swap(batch, weight, 0, len(batch) - 1), 0, len(batch) - 1),
        e.replace(*e.replace(batch, weight, {1: 2, 2: 1}), {1: 2, 2: 1}),
        e.upweight(*e.upweight(batch, weight, {1: 2.0, 2: 0.5}), {1: 0.5, 2: 2.0}),
        [values[len(batch) : 2 * len(batch)] for values in e.repeat(batch, weight, 3)],
    ):
        assert np.array_equal(pair[0], batch) and np.array_equal(pair[1], weight)


def test_insert_pads_smaller_batches_and_keeps_the_rest():
    batch = np.arange(6).reshape(3, 2)
    longer = batch_of(e.insert, batch, 1, np.array([[9]]))
    assert longer.tolist() == [[0, 1], [9, -1], [2, 3], [4, 5]]
    assert batch_of(e.insert, batch, 3, np.array([[9, 8]]))[-1].tolist() == [9, 8]


@pytest.mark.parametrize(
    ("weight", "more", "expected"),
    [
        (None, [[3.0]], [[1, 1], [3, 0], [1, 1]]),
        ([[2.0, 0.5], [1, 4]], None, [[2, 0.5], [1, 0], [1, 4]]),
        ([[2.0, 0.5], [1, 4]], [[3.0]], [[2, 0.5], [3, 0], [1, 4]]),
    ],
)
def test_inserted_steps_without_weights_have_weight_one(weight, more, expected):
    weight, more = (None if one is None else np.array(one, float) for one in (weight, more))
    _, found = e.insert(np.array([[0, 1], [2, 3]]), weight, 1, np.array([[9]]), more)
    np.testing.assert_array_equal(found, expected)


def test_swapping_equal_steps_is_nothing_and_swap_is_symmetric():
    batch = np.arange(6).reshape(3, 2)
    assert np.array_equal(batch_of(e.swap, batch, 1, 1), batch)
    assert np.array_equal(batch_of(e.swap, batch, 0, 2), batch_of(e.swap, batch, 2, 0))


def test_upweight_multiplies_what_is_there_wherever_it_occurs():
    batch, weight = np.array([[0, 1], [1, -1]]), np.array([[3.0, 0.5], [2.0, 0.0]])
    edited, weights = e.upweight(batch, weight, {1: 4.0, 0: 0.0})
    np.testing.assert_array_equal(edited, batch)
    np.testing.assert_array_equal(weights, [[0.0, 2.0], [8.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda batch: e.swap(batch, None, 0, 2), "index in 0..1"),
        (lambda batch: e.reorder(batch, None, [0, 0]), "permutation"),
        (lambda batch: e.insert(batch, None, 3, np.zeros((1, 1), int)), "step index in 0..2"),
        (lambda batch: e.insert(batch, None, 0, np.zeros((1, 2), int)), "at most 1 slots"),
        (lambda batch: e.upweight(batch, None, {0: -1.0}), "factor of -1.0; expected finite"),
        (lambda batch: e.upweight(batch, None, {0: np.nan}), "factor of nan; expected finite"),
        (lambda batch: e.upweight(batch, None, {-1: 2.0}), "leave -1 to empty slots"),
    ],
)
def test_misuse_says_what_to_do(call, match):
    with pytest.raises(Misuse, match=match):
        call(np.zeros((2, 1), int))


def some_runs(**more):
    return runs_from_arrays(
        batch=[[[0, 1], [2, -1]], [[1, 2], [0, 0]]],
        loss=[[[0.7], [0.6], [0.5]], [[0.75], [0.65], [0.5]]],
        step_size=[0.2, 0.1],
        train_ids=["a", "b", "c"],
        run_ids=["x", "y"],
        **more,
    )


def batches(runs):
    ids = np.array([*runs["train"].values, None])
    return ids[runs["batch"].values].tolist()


def test_runs_are_edited_by_ids_and_start_where_they_started():
    runs = some_runs()
    planned = e.edit_runs(runs, e.drop, ["b"])
    assert batches(planned) == [[["a", None], ["c", None]], [[None, "c"], ["a", "a"]]]
    assert "weight" not in planned
    assert planned["run"].values.tolist() == ["x", "y"]
    np.testing.assert_array_equal(planned["step_size"], runs["step_size"])
    np.testing.assert_allclose(planned["loss"][:, 0, 0], [0.7, 0.75])
    assert np.isnan(planned["loss"].values[:, 1:]).all()


@pytest.mark.parametrize(
    ("edit", "arguments", "expected"),
    [
        (e.keep, (["a"],), [["a", None], [None, None]]),
        (e.replace, ({"a": "c", "c": "a"},), [["c", "b"], ["a", None]]),
        (e.insert, (0, [["c", "b"], ["b"]]), [["c", "b"], ["b", None], ["a", "b"], ["c", None]]),
        (e.insert, (2, [["c"]]), [["a", "b"], ["c", None], ["c", None]]),
        (e.reverse, (), [["c", None], ["a", "b"]]),
        (e.swap, (0, 1), [["c", None], ["a", "b"]]),
        (e.repeat, (2,), [["a", "b"], ["c", None], ["a", "b"], ["c", None]]),
    ],
)
def test_each_edit_of_runs(edit, arguments, expected):
    planned = e.edit_runs(some_runs(), edit, *arguments)
    assert batches(planned)[0] == expected
    assert ("step_size" in planned) == (len(expected) == 2)


def test_weights_of_runs_are_kept_and_changed():
    weight = np.array([[[3.0, 0.5], [2.0, 0.0]], [[1.0, 1.0], [4.0, 0.25]]])
    runs = some_runs(weight=weight)
    np.testing.assert_array_equal(e.edit_runs(runs, e.reverse)["weight"], weight[:, ::-1])
    found = e.edit_runs(runs, e.upweight, {"b": 2.0})["weight"]
    np.testing.assert_array_equal(found, weight * [[[1, 2], [1, 1]], [[2, 1], [1, 1]]])
    with pytest.raises(Misuse, match=r"sum to 0 in run x, step 2.*with -1"):
        e.edit_runs(runs, e.upweight, {"c": 0.0})


def test_longer_runs_take_their_step_sizes():
    planned = e.edit_runs(some_runs(), e.repeat, 2, step_size=[0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(planned["step_size"][1], [0.4, 0.3, 0.2, 0.1])


def test_an_edit_of_ones_own_gets_its_arguments_as_they_are():
    def first(batch, weight, steps):
        return batch[:steps], weight

    planned = e.edit_runs(some_runs(), first, 1)
    assert batches(planned) == [[["a", "b"]], [["b", "c"]]]
    assert isinstance(planned, xr.Dataset)


def test_unknown_ids_are_named():
    with pytest.raises(Misuse, match="examples to drop: got unknown ids z; expected ids among a"):
        e.edit_runs(some_runs(), e.drop, ["z"])


@pytest.mark.parametrize("objective", ["paper", "centred"])
def test_a_weight_of_two_is_two_slots_to_a_fit_and_its_simulations(objective, key):
    runs, _ = linear_runs(key=key, runs=5, train=6, query=2, per_run=4, epochs=2)
    batch, loss = runs["batch"].values, runs["loss"].values
    slots = np.concatenate([batch, batch[:, :, :1]], axis=2)
    weight = np.where(batch >= 0, [2.0, 1.0], 0.0)
    simulated = []
    for recorded in (
        runs_from_arrays(batch=slots, loss=loss),
        runs_from_arrays(batch=batch, loss=loss, weight=weight),
    ):
        ridge = bs.fit(recorded, method=bs.Ridge(objective=objective, penalty=1.0), key=key)
        planned = e.edit_runs(recorded, e.upweight, {0: 3.0})
        simulated.append(ridge.simulate(planned, key=key)["mean_loss"].values)
        assert (
            abs(simulated[-1] - ridge.simulate(recorded, key=key)["mean_loss"].values).max() > 1e-3
        )
    np.testing.assert_allclose(*simulated, rtol=1e-5)
