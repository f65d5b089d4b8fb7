"""Weights in the data: absent means 1, they pass every door, and nonsense is refused."""

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import VARIABLES
from bayes_simfluence.data import store
from bayes_simfluence.data.identify import identifiability
from bayes_simfluence.data.importers import import_runs
from bayes_simfluence.data.runs import planned_runs, runs_from_arrays
from bayes_simfluence.data.subsets import subsets_of_runs
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.data.weights import weights_of, with_weights

BATCH = [[[0, 1], [2, -1]], [[1, 2], [0, 0]]]
WEIGHT = [[[1.0, 3.0], [0.5, 0.0]], [[0.0, 1.0], [2.0, 1.0]]]


def weighted(weight=WEIGHT, batch=BATCH, run_ids=("a", "b"), **more):
    loss = np.linspace(1.0, 0.5, 3)[None, :, None].repeat(len(batch), axis=0)
    return runs_from_arrays(batch=batch, loss=loss, weight=weight, run_ids=run_ids, **more)


def test_absent_weights_are_one_and_are_not_written(tmp_path):
    runs = weighted(None)
    assert "weight" not in runs
    expected = (np.array(BATCH) != -1).astype(float)
    np.testing.assert_array_equal(weights_of(runs), expected)
    np.testing.assert_array_equal(with_weights(runs)["weight"], expected)
    path = store.save_runs(runs, tmp_path / "runs.zarr")
    assert not (path / "weight").exists() and "weight" not in store.open_runs(path)


def test_weights_are_kept_and_empty_slots_have_none():
    weight = np.array(WEIGHT)
    weight[0, 1, 1] = 7.0
    runs = weighted(weight)
    assert runs["weight"].dims == VARIABLES["weight"][0]
    assert VARIABLES["weight"][1].items() <= runs["weight"].attrs.items()
    np.testing.assert_array_equal(weights_of(runs), WEIGHT)
    assert with_weights(runs) is runs


def test_planned_runs_take_weights():
    like = weighted()
    one = planned_runs(like, BATCH[0], weight=WEIGHT[0])
    np.testing.assert_array_equal(one["weight"], WEIGHT[:1])
    np.testing.assert_array_equal(planned_runs(like, BATCH, weight=WEIGHT)["weight"], WEIGHT)
    assert "weight" not in planned_runs(like, BATCH)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (np.ones((2, 2)), r"weight: got shape \(2, 2\); expected the shape of batch, \(2, 2, 2\)"),
        ([[1.0], [1.0, 2.0]], "weight: got shape that is not rectangular"),
        (np.where(np.array(WEIGHT) == 3.0, -3.0, WEIGHT), r"got -3.0 in run a, step 1, slot 1"),
        (np.where(np.array(WEIGHT) == 0.5, np.nan, WEIGHT), r"got nan in run a, step 2, slot 0"),
        (np.where(np.array(WEIGHT) == 2.0, np.inf, WEIGHT), r"expected finite weights >= 0"),
        (np.where(np.array(WEIGHT) == 0.5, 0.0, WEIGHT), r"sum to 0 in run a, step 2.*with -1"),
    ],
)
def test_weights_that_cannot_be_are_refused(weight, match):
    with pytest.raises(Misuse, match=match):
        weighted(weight)
    with pytest.raises(Misuse):
        planned_runs(weighted(), BATCH, weight=weight)


def test_a_batch_of_empty_slots_needs_no_weight():
    runs = weighted([[[1.0, 1.0], [0.0, 0.0]]], [[[0, 1], [-1, -1]]], ("a",))
    assert validate_runs(runs) is runs


def test_integer_weights_of_a_dataset_are_refused():
    runs = weighted()
    with pytest.raises(Misuse, match=r"runs\['weight'\]: got int64; expected floats"):
        validate_runs(runs.assign(weight=(VARIABLES["weight"][0], np.ones((2, 2, 2), int))))


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_weights_survive_on_disk_and_select_with_their_runs(tmp_path, suffix):
    runs = weighted()
    write = store.save_runs if suffix == "zarr" else store.export_netcdf
    back = store.open_runs(write(runs, tmp_path / f"runs.{suffix}"))
    xr.testing.assert_identical(back, runs)
    np.testing.assert_array_equal(weights_of(back.isel(run=[1])), WEIGHT[1:])


def test_weights_are_chosen_before_runs_are_recorded(tmp_path):
    runs = weighted()
    path = store.create_store(
        tmp_path / "runs.zarr",
        curricula=runs["batch"].values,
        weights=runs["weight"].values,
        train_ids=runs["train"].values,
        query_ids=runs["query"].values,
        attrs={},
    )
    np.testing.assert_array_equal(store.open_store(path)["weight"], WEIGHT)
    assert sorted(file.name for file in (path / "weight" / "c").iterdir()) == ["0", "1"]


@pytest.mark.parametrize("first", [None, WEIGHT])
@pytest.mark.parametrize("second", [None, WEIGHT])
def test_appending_writes_out_ones_where_only_one_side_has_weights(tmp_path, first, second):
    path = store.save_runs(weighted(first), tmp_path / "runs.zarr")
    store.append_runs(weighted(second, run_ids=("c", "d")), path)
    both = store.open_runs(path)
    assert ("weight" in both) == (first is not None or second is not None)
    ones = (np.array(BATCH) != -1).astype(float)
    expected = [ones if weight is None else weight for weight in (first, second)]
    np.testing.assert_array_equal(weights_of(both), np.concatenate(expected))


def test_exposures_decide_what_cannot_be_told_apart():
    batch = [[[0, 1], [2, 2]], [[1, 0], [2, -1]], [[0, 1], [2, 2]]]
    weight = [[[1.0, 1.0], [3.0, 4.0]], [[2.0, 2.0], [1.0, 0.0]], [[1.0, 2.0], [1.0, 1.0]]]
    found = identifiability(weighted(weight, batch, ("x", "y", "z")))
    assert found.duplicate_runs == (("x", "y"),)
    assert found.always_together == ()
    assert identifiability(weighted(None, batch, list("xyz"))).always_together == (("0", "1"),)
    weight[0][0][1] = weight[1][0][0] = weight[2][0][1] = 0.0
    assert identifiability(weighted(weight, batch, ("x", "y", "z"))).never_seen == ("1",)


def test_an_example_without_weight_was_not_trained_on():
    mask = subsets_of_runs(weighted())["mask"].values
    assert mask.tolist() == [[True, True, True], [True, False, True]]


def table(tmp_path, *rows):
    lines = ["run,step,examples,query,loss,weight", "r,0,,q,0.9,", *rows]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_tables_weights_are_listed_like_its_examples(tmp_path):
    rows = ("r,1,a b,q,0.8,2 0.5", 'r,2,"[""b"", null]",q,0.7,"[3, null]"', "r,3,a,q,0.6,")
    runs = import_runs(table(tmp_path, *rows))
    assert runs["weight"].values.tolist() == [[[2.0, 0.5], [3.0, 0.0], [1.0, 0.0]]]


@pytest.mark.parametrize(
    ("cell", "match"),
    [
        ("2", r"got 1 numbers at step 1; expected 2, one for each of the step's examples"),
        ("2 x", r"line 3, column 'weight': got '2 x'; expected one number for each"),
        ('"[2, true]"', r"line 3, column 'weight'.*blank means 1"),
        ("2 -1", r"got -1.0 in run r, step 1, slot 1"),
    ],
)
def test_a_tables_wrong_weights_are_named(tmp_path, cell, match):
    with pytest.raises(Misuse, match=match):
        import_runs(table(tmp_path, f"r,1,a b,q,0.8,{cell}"))
