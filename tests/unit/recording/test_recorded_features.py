"""What ``record`` does about gradient features: made by default, given, left out, kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.features import Features, features_key, gradient_features
from bayes_simfluence.recording.record import record
from bayes_simfluence.tasks.task import Task

KEPT = ("train_feature", "query_feature")


@pytest.fixture(scope="module")
def task():
    inputs = jax.random.normal(jax.random.key(3), (8, 3))
    return Task(
        params={"w": jnp.ones(3)},
        loss=lambda params, example: jnp.sqrt(jnp.abs(example @ params["w"])),
        train=inputs[:5],
        query=inputs[5:],
        train_ids=list("abcde"),
        query_ids=list("xyz"),
    )


def recorded(task, folder, **settings):
    batch = np.array([[[0, 1], [2, 3]], [[4, 0], [1, -1]]])
    store, plain = folder / "runs.zarr", optax.sgd(0.1)
    return record(task, batch, plain, store=store, step_size=0.1, **settings)


def of_size(train, query):
    rng = np.random.default_rng(0)
    return Features(*(rng.normal(size=(size, 2)).astype("f4") for size in (train, query)), kept=1.0)


def same(runs, features):
    for name, expected in zip(KEPT, (features.train, features.query), strict=True):
        np.testing.assert_array_equal(runs[name], expected)


@pytest.mark.parametrize(
    ("settings", "rank", "seed"),
    [({}, 64, 0), ({"features": 2}, 2, 0), ({"key": features_key(7)}, 64, 7)],
)
def test_features_are_made_of_the_task_and_its_initial_weights(
    task, tmp_path, settings, rank, seed
):
    runs = recorded(task, tmp_path, **settings)
    same(runs, gradient_features(task, rank=rank, key=features_key(seed)))
    assert runs.sizes["feature"] == min(rank, 5)
    # Three weights have no more than three directions.
    assert not runs["train_feature"][:, 3:].any() and not runs["query_feature"][:, 3:].any()


def test_none_are_made_when_none_are_wanted(task, tmp_path, monkeypatch):
    monkeypatch.setattr("bayes_simfluence.recording.features.gradient_features", None)
    assert not set(KEPT) & set(recorded(task, tmp_path, features=0).data_vars)


def test_features_made_before_are_kept_as_they_are(task, tmp_path):
    given = of_size(5, 3)
    same(recorded(task, tmp_path, features=given), given)


@pytest.mark.parametrize("begun", [0, 64])
@pytest.mark.parametrize("resumed", [0, 64])
def test_a_resumed_store_keeps_what_it_has(task, tmp_path, monkeypatch, begun, resumed):
    first = recorded(task, tmp_path, features=begun)
    monkeypatch.setattr("bayes_simfluence.recording.features.gradient_features", None)
    again = recorded(task, tmp_path, features=resumed, resume=True)
    xr.testing.assert_identical(again, first)


def test_a_resumed_store_with_other_features_is_refused(task, tmp_path):
    recorded(task, tmp_path, features=3)
    given = of_size(5, 3)
    for other in (2, given):
        with pytest.raises(Misuse, match="a recording with other features"):
            recorded(task, tmp_path, features=other, resume=True)
    recorded(task, tmp_path, features=0, overwrite=True)
    with pytest.raises(Misuse, match="a recording with other features"):
        recorded(task, tmp_path, features=given, resume=True)


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (-1, r"features: got -1.*pass 0 to leave them out"),
        (of_size(4, 3), r"features.train: .*\(4, 2\)"),
        (of_size(5, 4), r"features.query: .*\(4, 2\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(task, tmp_path, features, match):
    with pytest.raises(Misuse, match=match):
        recorded(task, tmp_path, features=features)
    assert not (tmp_path / "runs.zarr").exists()


def test_a_loss_without_a_finite_gradient_is_told_of(task, tmp_path):
    """The root's slope at 0 is infinite; its value is not, so the query can be measured."""
    flat = dataclasses.replace(task, query=task.query.at[1].set(0.0))
    match = r"1 examples of task.query .* not finite: y; .*features=0"
    with pytest.raises(Misuse, match=match):
        recorded(flat, tmp_path)
    assert not (tmp_path / "runs.zarr").exists()
    assert np.isfinite(recorded(flat, tmp_path, features=0)["loss"]).all()


def test_progress_is_told_of_them(task, tmp_path):
    from contextlib import contextmanager

    done = {}

    class Listener:
        @contextmanager
        def work(self, label, total):
            self.label = label
            done[label] = [0, total]
            yield self

        def advance(self, amount=1, note=""):
            done[self.label][0] += amount

    recorded(task, tmp_path, progress=Listener())
    assert done == {"gradient features": [8, 8], "record": [4, 4]}
