"""Runs from other initial weights: which start where, and what is refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data import store
from bayes_simfluence.data.importers import export_runs, import_runs
from bayes_simfluence.data.starts import with_starts
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.networks.heads import fresh_head
from bayes_simfluence.recording.record import record as record_with_features
from bayes_simfluence.recording.settings import Placement

record = partial(record_with_features, features=0, step_size=0.1)
SGD = optax.sgd(0.1)


def fresh(params, key):
    """The second layer drawn anew."""
    return {**params, "v": jax.random.normal(key, params["v"].shape)}


@pytest.fixture(scope="module")
def task(squares):
    return replace(squares, fresh=fresh)


@pytest.fixture(scope="module")
def runs(task, curricula, tmp_path_factory):
    path = tmp_path_factory.mktemp("starts") / "runs.zarr"
    return record(task, curricula, SGD, store=path, starts=2, twins=2)


def test_runs_take_turns_and_twins_start_beside_their_runs(runs, task, curricula, tmp_path):
    assert runs["start"].values.tolist() == [0, 1, 0, 1, 0]
    assert runs["twin"].values.tolist() == ["0", "1", "2", "1", "2"]
    first = runs["loss"].values[:, 0]
    np.testing.assert_array_equal(first[2], first[0])
    np.testing.assert_allclose(first[[3, 4]], first[[1, 2]], rtol=1e-5)
    assert np.abs(first[1] - first[0]).min() > 1e-3
    plain = record(task, curricula, SGD, store=tmp_path / "plain.zarr")
    assert "start" not in plain.coords
    np.testing.assert_array_equal(plain["loss"][[0, 2]], runs["loss"][[0, 2]])


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_run_from_another_start_is_that_of_a_task_with_these_weights(
    task, curricula, runs, tmp_path, parallel
):
    key = jax.random.key(3)
    settings = {
        "placement": Placement(parallel=parallel),
        "key": key,
        "starts": np.array([2, 0, 2]),
    }
    varied = record(task, curricula, SGD, store=tmp_path / "a.zarr", **settings)
    drawn = fresh(task.params, jax.random.fold_in(jax.random.fold_in(key, 2), 2))
    other = replace(task, params=drawn, fresh=None)
    expected = record(other, curricula, SGD, store=tmp_path / "b.zarr")
    for name in ("loss", "error", "train_loss"):
        np.testing.assert_allclose(varied[name][[0, 2]], expected[name][[0, 2]], rtol=1e-4)
    np.testing.assert_array_equal(varied["start"], [2, 0, 2])


def test_a_resumed_recording_has_the_same_starts(task, curricula, runs, tmp_path):
    again = partial(record, task, curricula, SGD, store=tmp_path / "runs.zarr", twins=2)
    with pytest.warns(UserWarning, match="1 of 5 runs"):
        again(starts=2, placement=Placement(only=[1]))
    with pytest.raises(Misuse, match="other starts"):
        again(starts=3, resume=True)
    xr.testing.assert_equal(again(starts=2, resume=True), runs)


@pytest.mark.parametrize("suffix", ["zarr", "nc", "csv", "npz"])
def test_starts_survive_on_disk(runs, tmp_path, suffix):
    path = tmp_path / f"runs.{suffix}"
    plain = runs.drop_vars(["error", "close"])
    if suffix in ("csv", "npz"):
        export_runs(plain, path)
        again = import_runs(path)
    else:
        write = store.save_runs if suffix == "zarr" else store.export_netcdf
        again = store.open_runs(write(plain, path))
    np.testing.assert_array_equal(again["start"], runs["start"])
    assert again["start"].dims == ("run",)
    if suffix == "zarr":
        more = plain.drop_vars(["start", "twin"]).assign_coords(run=np.arange(5, 10))
        both = store.open_runs(store.append_runs(more, path))
        assert both["start"].values.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0]


def test_a_fresh_head_is_drawn_as_the_first_one(key):
    tensors = {
        "classifier.weight": jnp.ones((2, 3000), jnp.bfloat16),
        "classifier.bias": jnp.ones(2, jnp.bfloat16),
        "encoder": jnp.ones(3),
    }
    drawn = fresh_head(tensors, key)
    weight = drawn["classifier.weight"]
    assert weight.dtype == jnp.bfloat16 and drawn["encoder"] is tensors["encoder"]
    # The sd of 6000 draws is off by more than four of its own sds with probability 6e-5.
    assert float(jnp.std(weight.astype(float))) == pytest.approx(0.02, rel=4 / np.sqrt(12000))
    assert not drawn["classifier.bias"].any()


@pytest.mark.parametrize(
    ("starts", "match"),
    [
        (0, r"starts: got 0; expected an integer >= 1"),
        (4, r"starts: got 4; expected at most the 3 curricula"),
        ([0, 1], r"starts: got 2 numbers; expected one for each of 3 curricula"),
        ([0, 1, -1], r"starts: got -1; expected an integer >= 0"),
    ],
)
def test_starts_that_do_not_fit_are_refused(task, curricula, tmp_path, starts, match):
    with pytest.raises(Misuse, match=match):
        record(task, curricula, SGD, store=tmp_path / "runs.zarr", starts=starts)


def test_a_task_that_draws_no_weights_or_other_ones_is_refused(squares, curricula, tmp_path):
    refused = partial(record, curricula=curricula, optimizer=SGD, store=tmp_path / "runs.zarr")
    with pytest.raises(Misuse, match=r"starts: got a task that cannot draw other initial weights"):
        refused(squares, starts=2)
    for wrong in (
        lambda params, key: params["v"],
        lambda params, key: {**params, "v": params["v"][:2]},
    ):
        with pytest.raises(Misuse, match=r"task\.fresh: got weights of other names, shapes"):
            refused(replace(squares, fresh=wrong), starts=2)


def test_numbers_that_are_none_are_refused(runs):
    with pytest.raises(Misuse, match=r"start: got shape \(2,\)"):
        with_starts(runs, [0, 1])
    with pytest.raises(Misuse, match=r"runs\['start'\]: got float64"):
        with_starts(runs, np.zeros(5)).pipe(validate_runs)
    with pytest.raises(Misuse, match=r"runs\['start'\]: got int64 over \('run',\), least -1"):
        with_starts(runs, [0, 0, -1, 0, 0]).pipe(validate_runs)
    with pytest.raises(Misuse, match=r"runs 1, 3 of other curricula or starts"):
        with_starts(runs, [0, 1, 0, 2, 0]).pipe(validate_runs)
