"""The run schema: what passes the door, what is refused and how, what cannot be told apart."""

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse, RunsWarning
from bayes_simfluence.conventions import COMPLETE, DIVERGED, VARIABLES
from bayes_simfluence.data.identify import identifiability
from bayes_simfluence.data.runs import planned_runs, runs_from_arrays, usable_runs
from bayes_simfluence.data.validation import validate_runs


def arrays(rng, runs=3, steps=4, slots=2, queries=5, train=6):
    return {
        "batch": rng.integers(-1, train, (runs, steps, slots)),
        "loss": rng.normal(size=(runs, steps + 1, queries)).astype(np.float32),
        "train_ids": [f"t{i}" for i in range(train)],
        "query_ids": [f"q{i}" for i in range(queries)],
    }


def test_runs_follow_the_schema(rng):
    features = {"train_feature": rng.normal(size=(6, 2)), "query_feature": rng.normal(size=(5, 2))}
    given = arrays(rng)
    empty = given["batch"] < 0
    runs = runs_from_arrays(
        **given,
        **features,
        weight=np.ones((3, 4, 2)),
        train_loss=np.where(empty, np.nan, 0.7),
        train_residual=np.where(empty, np.nan, 0.5),
        step_size=np.full(4, 0.1),
        attrs={"model": "none"},
    )
    for name, (dims, attrs) in VARIABLES.items():
        assert runs[name].dims == dims
        assert attrs.items() <= runs[name].attrs.items()
    assert runs["time"].values.tolist() == [0, 1, 2, 3, 4]
    assert runs["step"].values.tolist() == [1, 2, 3, 4]
    assert runs.attrs["model"] == "none"
    assert validate_runs(runs) is runs


def test_plain_xarray_splits_runs(rng):
    runs = runs_from_arrays(**arrays(rng))
    fitted, held_out = runs.isel(run=slice(0, 2)), runs.isel(run=slice(2, None))
    assert validate_runs(fitted).sizes["run"] == 2 and validate_runs(held_out).sizes["run"] == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch": [[[0], [1]], [[0]]]}, "runs of different length"),
        ({"batch": np.zeros((3, 4), int)}, "batch: got shape"),
        ({"batch": np.zeros((3, 4, 2))}, "expected integers"),
        ({"loss": np.zeros((3, 4, 5))}, "before the first update too"),
        ({"loss": np.zeros((3, 5, 5), int)}, "expected floats"),
        ({"train_ids": ["a"]}, r"index \d in run"),
        ({"train_ids": list("aabcde")}, "repeated ids a"),
        ({"query_ids": ["q"]}, "got 1 ids; expected 5"),
        ({"run_ids": [1, 1, 2]}, "repeated ids 1"),
        ({"curriculum": ["random"]}, r"curriculum: got .*\(1,\); expected a text for each of 3"),
        ({"curriculum": [1, 2, 3]}, "curriculum: got int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(rng, change, match):
    with pytest.raises(Misuse, match=match):
        runs_from_arrays(**{**arrays(rng), **change})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused_or_kept_marked(rng, value):
    given = arrays(rng)
    given["loss"][1, 2, 3] = value
    with pytest.raises(Misuse, match=r"in run 1, time 2, query q3.*keep_diverged"):
        runs_from_arrays(**given)
    runs = runs_from_arrays(**given, keep_diverged=True)
    assert runs["status"].values.tolist() == [1, DIVERGED, 1]
    with pytest.warns(RunsWarning, match="1 runs left out, diverged to a non-finite loss: 1"):
        assert usable_runs(runs)["run"].values.tolist() == [0, 2]


def test_no_usable_run_is_an_error(rng):
    given = arrays(rng, runs=1)
    given["loss"][:] = np.nan
    runs = runs_from_arrays(**given, keep_diverged=True)
    with pytest.warns(RunsWarning), pytest.raises(Misuse, match="no usable run"):
        usable_runs(runs)


def thinned(rng, every=2, **sizes):
    given = arrays(rng, **sizes)
    given["loss"][:, np.arange(given["loss"].shape[1]) % every > 0] = np.nan
    return given


def test_a_loss_that_was_not_recorded_is_nan_in_a_complete_run(rng):
    given = thinned(rng)
    with pytest.raises(Misuse, match=r"got nan in run 0, time 1, query q0.*pass missing=True"):
        runs_from_arrays(**given)
    runs = runs_from_arrays(**given, missing=True)
    assert (runs["status"] == COMPLETE).all() and validate_runs(runs) is runs
    np.testing.assert_array_equal(runs["loss"], given["loss"])
    xr.testing.assert_identical(usable_runs(runs), runs)
    planned = planned_runs(runs, runs["batch"].values)
    np.testing.assert_array_equal(planned["loss"][:, 0], given["loss"][[0, 0, 0], 0])


def test_an_infinite_loss_is_never_one_that_was_not_recorded(rng):
    given = thinned(rng)
    given["loss"][1, 2, 3] = -np.inf
    with pytest.raises(Misuse, match=r"got -inf in run 1, time 2.*or NaN where not recorded"):
        runs_from_arrays(**given, missing=True)
    runs = runs_from_arrays(**given, missing=True, keep_diverged=True)
    assert runs["status"].values.tolist() == [COMPLETE, DIVERGED, COMPLETE]
    with pytest.warns(RunsWarning, match="1 runs left out, diverged"):
        assert usable_runs(runs)["run"].values.tolist() == [0, 2]


def test_the_losses_before_training_are_needed(rng):
    given = thinned(rng)
    given["loss"][1, 0, [0, 3]] = np.nan
    match = r"time 0: got nothing recorded for queries q0, q3; expected every query's loss before"
    with pytest.raises(Misuse, match=match):
        runs_from_arrays(**given, missing=True)
    # Of a diverged run nothing is needed.
    given["loss"][1, 1] = np.inf
    assert runs_from_arrays(**given, missing=True, keep_diverged=True)["status"][1] == DIVERGED


def test_a_later_loss_of_every_query_is_needed_in_one_run(rng):
    given = thinned(rng)
    given["loss"][:2, 1:, [1, 2]] = np.nan
    runs = runs_from_arrays(**given, missing=True)
    match = r"nothing recorded after time 0 for queries q1, q2; expected at least one later loss"
    with pytest.raises(Misuse, match=match + r".*isel\(query=...\)"):
        usable_runs(runs.isel(run=[0, 1]))
    assert usable_runs(runs.isel(run=[0, 1], query=[0, 3, 4])).sizes["query"] == 3
    given["loss"][2, 1:, 2] = np.nan
    with pytest.raises(Misuse, match=r"after time 0 for queries q2;"):
        runs_from_arrays(**given, missing=True)


def test_a_run_with_nothing_but_its_start_is_left_out(rng):
    given = thinned(rng)
    given["loss"][1, 1:] = np.nan
    runs = runs_from_arrays(**given, missing=True)
    with pytest.warns(RunsWarning, match="1 runs left out, no loss after time 0: 1"):
        assert usable_runs(runs)["run"].values.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda runs: runs.attrs.update(schema_version=99), "schema_version.*got 99"),
        (lambda runs: runs.drop_vars("loss"), "no such variable"),
        (lambda runs: runs.drop_vars("query"), "ids as coordinate"),
        (lambda runs: runs.isel(step=slice(1, None)), "slice step and time together"),
        (lambda runs: runs.transpose("query", ...), "expected dimensions"),
    ],
)
def test_a_spoiled_dataset_is_refused(rng, spoil, match):
    runs = runs_from_arrays(**arrays(rng))
    spoiled = spoil(runs)
    with pytest.raises(Misuse, match=match):
        validate_runs(runs if spoiled is None else spoiled)


def brute_force_together(batch, train):
    counts = np.stack([(batch == one).sum(axis=2).ravel() for one in range(train)])
    return {
        frozenset(np.flatnonzero((counts == row).all(axis=1)).tolist())
        for row in counts
        if row.any() and (counts == row).all(axis=1).sum() > 1
    }


def test_identifiability_agrees_with_brute_force(rng):
    for _ in range(20):
        batch = rng.integers(-1, 8, (2, 2, 3))
        loss = np.zeros((2, 3, 1))
        found = identifiability(runs_from_arrays(batch=batch, loss=loss, train_ids=range(8)))
        assert {int(name) for name in found.never_seen} == set(range(8)) - set(batch.ravel())
        together = {frozenset(int(name) for name in group) for group in found.always_together}
        assert together == brute_force_together(batch, 8)


def test_duplicate_runs_are_found_whatever_the_order_in_a_batch():
    batch = [[[0, 1], [2, 3]], [[1, 0], [3, 2]], [[2, 3], [0, 1]]]
    runs = runs_from_arrays(batch=batch, loss=np.zeros((3, 3, 1)), run_ids=["x", "y", "z"])
    found = identifiability(runs)
    assert found.duplicate_runs == (("x", "y"),)
    assert found and "x=y" in found.sentences()[0]


def test_nothing_to_report_is_false():
    batch = [[[0, 1], [2, -1]], [[0, 2], [1, -1]]]
    assert not identifiability(runs_from_arrays(batch=batch, loss=np.zeros((2, 3, 1))))


def test_a_dataset_is_an_ordinary_dataset(rng):
    assert isinstance(runs_from_arrays(**arrays(rng)), xr.Dataset)
