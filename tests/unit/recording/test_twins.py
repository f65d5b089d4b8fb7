"""Curricula that are trained twice: where twins start, and what stays as it was."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.designs import Design
from bayes_simfluence.recording.checkpoints import open_checkpoints
from bayes_simfluence.recording.record import record as record_with_features
from bayes_simfluence.recording.settings import Evaluation, Placement
from bayes_simfluence.recording.starts import Starts, perturbed

record = partial(record_with_features, features=0, step_size=0.1)
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def path(squares, curricula, tmp_path_factory):
    path = tmp_path_factory.mktemp("twins") / "runs.zarr"
    checked = Evaluation(checkpoints=7)
    record(squares, curricula, SGD, store=path, twins=2, evaluation=checked)
    return path


@pytest.fixture(scope="module")
def twins(path):
    from bayes_simfluence.data.store import open_runs

    return open_runs(path)


def test_every_weight_moves_by_one_or_two_units_in_its_last_place(key):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=4000), jnp.float32)
    moved = perturbed({"w": weights, "zero": jnp.zeros(3)}, key)
    units = (moved["w"] - weights) / np.spacing(np.asarray(weights))
    assert set(np.abs(units).tolist()) <= {0.5, 1.0, 1.5, 2.0} and not moved["zero"].any()
    # As many up as down: 4000 signs are off by more than four sd with probability 6e-5.
    assert abs(np.sign(moved["w"] - weights).sum()) < 4 * np.sqrt(4000)
    half = perturbed(weights.astype(jnp.bfloat16), key)
    assert half.dtype == jnp.bfloat16 and (half != weights.astype(jnp.bfloat16)).all()


def test_the_last_curricula_are_recorded_again_after_all_others(twins, curricula):
    assert twins["run"].values.tolist() == [0, 1, 2, 3, 4]
    assert twins["twin"].values.tolist() == ["0", "1", "2", "1", "2"]
    np.testing.assert_array_equal(twins["batch"], curricula[[0, 1, 2, 1, 2]])
    assert twins.attrs["twins"] == 2


def test_twins_start_next_to_the_weights_of_the_task_and_train_alike(twins, path, squares):
    for run in range(5):
        first = open_checkpoints(path, run)[0]
        assert first.step == 1
        for name, weights in squares.params.items():
            off = np.abs(first.tensors[name] / np.asarray(weights) - 1)
            np.testing.assert_array_less(off, 3e-7)
            assert (off > 0).all() if run > 2 else not off.any()
    first, second = (twins.isel(run=part) for part in (slice(1, 3), slice(3, 5)))
    for name in ("loss", "train_loss", "error"):
        np.testing.assert_allclose(second[name], first[name], rtol=1e-4, atol=1e-5)
        assert (second[name].values != first[name].values).any(axis=(1, 2)).all()
    # The loss before any step is that of the twin's own weights.
    assert (second["loss"].values[:, 0] != first["loss"].values[:, 0]).any()
    assert (second["loss"].values[0, 0] != second["loss"].values[1, 0]).any()


@pytest.mark.parametrize("parallel", [1, 2])
def test_other_runs_are_what_they_are_without_twins(squares, curricula, tmp_path, parallel):
    settings = {"placement": Placement(parallel=parallel)}
    plain = record(squares, curricula, SGD, store=tmp_path / "plain.zarr", **settings)
    more = record(squares, curricula, SGD, store=tmp_path / "more.zarr", twins=1, **settings)
    xr.testing.assert_equal(more.isel(run=slice(0, 3)).drop_vars("twin"), plain)
    assert "twin" not in plain.coords and "twins" not in plain.attrs


def test_a_resumed_recording_draws_the_same(squares, curricula, twins, tmp_path):
    settings = {"twins": 2, "evaluation": Evaluation(checkpoints=7), "resume": True}
    again = partial(record, squares, curricula, SGD, store=tmp_path / "runs.zarr", **settings)
    with pytest.warns(UserWarning, match="1 of 5 runs"):
        again(placement=Placement(only=[4]))
    with pytest.raises(Misuse, match="other starts_key"):
        again(key=jax.random.key(1))
    with pytest.raises(Misuse, match="other curricula, twins"):
        again(twins=1)
    xr.testing.assert_equal(again(), twins)


def test_weights_and_kinds_go_with_the_curriculum(squares, curricula, tmp_path):
    weights = np.random.default_rng(0).random(curricula.shape)
    design = Design(curricula, ("random", "half", "sorted"))
    runs = record(squares, design, SGD, store=tmp_path / "runs.zarr", twins=1, weights=weights)
    assert runs["curriculum"].values.tolist() == ["random", "half", "sorted", "sorted"]
    np.testing.assert_array_equal(runs["weight"][3], runs["weight"][2])


def test_an_optimizer_that_remembers_weights_remembers_the_twins(squares, curricula, tmp_path):
    def update(slope, first, params):
        back = jax.tree.map(lambda one, at, grad: one - at - 0.1 * grad, first, params, slope)
        return back, first

    homing = optax.GradientTransformation(lambda params: params, update)
    runs = record(squares, curricula[:1], homing, store=tmp_path / "runs.zarr", twins=1)
    # The third step has no examples, so that it leads back to where the run began.
    np.testing.assert_allclose(runs["loss"][:, 3], runs["loss"][:, 0], rtol=1e-7)
    assert (runs["loss"][1, 0].values != runs["loss"][0, 0].values).any()


@pytest.mark.parametrize(
    ("twins", "match"),
    [
        (4, r"twins: got 4; expected at most the 3 curricula"),
        (-1, r"twins: got -1; expected an integer >= 0"),
    ],
)
def test_numbers_of_twins_that_do_not_exist_are_refused(squares, curricula, tmp_path, twins, match):
    with pytest.raises(Misuse, match=match):
        record(squares, curricula, SGD, store=tmp_path / "runs.zarr", twins=twins)


def test_weights_that_rounding_cannot_move_are_refused(squares, key):
    still = replace(squares, params=jax.tree.map(jnp.zeros_like, squares.params))
    with pytest.raises(Misuse, match="a task whose initial weights are all 0"):
        Starts.of(still, 2, 1, 1, key)
    assert Starts.of(still, 2, 1, 0, key).kept == {}
