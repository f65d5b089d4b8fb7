"""Recording against a plain loop, for every way of running it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import DIVERGED
from bayes_simfluence.data.curriculum import with_replacement
from bayes_simfluence.data.store import open_store
from bayes_simfluence.recording.record import record as record_with_features
from bayes_simfluence.recording.settings import Placement
from bayes_simfluence.tasks.task import Task

record = partial(record_with_features, features=0)
"""Most tests here are not about features, which take a compilation more."""


def small_task(scale=1.0):
    """Least squares with a hidden layer: 6 training examples, 4 queries."""
    keys = jax.random.split(jax.random.key(7), 4)
    inputs = jax.random.normal(keys[0], (10, 3))
    targets = jnp.sin(inputs.sum(axis=1))

    def loss(params, example):
        hidden = jnp.tanh(params["w"] @ example["x"] + params["b"])
        return scale * (hidden @ params["v"] - example["y"]) ** 2

    data = {"x": inputs, "y": targets}
    return Task(
        params={
            "w": jax.random.normal(keys[1], (5, 3)),
            "b": jnp.zeros(5),
            "v": jax.random.normal(keys[2], (5,)),
        },
        loss=loss,
        train=jax.tree.map(lambda leaf: leaf[:6], data),
        query=jax.tree.map(lambda leaf: leaf[6:], data),
        train_ids=list("abcdef"),
        query_ids=list("wxyz"),
        provenance={"model": "small"},
    )


class Unhashable:
    """A loss that compares its arrays."""

    __hash__ = None

    def __call__(self, params, example):
        return params["v"].sum()


def some_curricula(runs=3, steps=12, slots=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), runs)
    drawn = [with_replacement(6, batch_size=slots, steps=steps, key=key) for key in keys]
    return np.stack(drawn)


def plain_loop(task, curriculum, optimizer):
    """The definition: one step after the other, one example after the other."""
    params, memory = task.params, optimizer.init(task.params)
    example = lambda examples, place: jax.tree.map(lambda leaf: leaf[place], examples)  # noqa: E731
    queries = [example(task.query, place) for place in range(len(task.query_ids))]
    losses = [[float(task.loss(params, query)) for query in queries]]
    for members in curriculum:
        filled = [int(member) for member in members if member >= 0]
        gradients = [jax.grad(task.loss)(params, example(task.train, member)) for member in filled]
        zero = jax.tree.map(jnp.zeros_like, params)
        size = max(len(filled), 1)
        total = jax.tree.map(lambda *parts: sum(parts), zero, *gradients)
        mean = jax.tree.map(lambda leaf, size=size: leaf / size, total)
        updates, memory = optimizer.update(mean, memory, params)
        params = optax.apply_updates(params, updates)
        losses.append([float(task.loss(params, query)) for query in queries])
    return np.array(losses)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adamw": optax.adamw(optax.linear_schedule(0.05, 0.0, 12)),
}


@pytest.mark.parametrize("parallel", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_recording_is_the_plain_loop(tmp_path, optimizer, parallel):
    task, curricula = small_task(), some_curricula()
    curricula[0, 3] = [2, -1]
    curricula[1, 5] = [-1, -1]
    runs = record(
        task,
        curricula,
        optimizer,
        store=tmp_path / "runs.zarr",
        step_size=0.1,
        placement=Placement(parallel=parallel, query_chunk=None if parallel == 1 else 3),
    )
    expected = np.stack([plain_loop(task, curriculum, optimizer) for curriculum in curricula])
    np.testing.assert_allclose(runs["loss"], expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(runs["batch"], curricula)
    assert runs["train"].values.tolist() == list("abcdef")
    assert runs.attrs["model"] == "small"


def test_the_step_size_is_the_one_used(tmp_path):
    schedule = optax.linear_schedule(0.1, 0.0, 12)
    injected = optax.inject_hyperparams(optax.sgd)(schedule)
    runs = record(small_task(), some_curricula(1), injected, store=tmp_path / "a.zarr")
    expected = [0.1 * (1 - step / 12) for step in range(12)]
    np.testing.assert_allclose(runs["step_size"][0], expected, rtol=1e-5)
    given = record(
        small_task(),
        some_curricula(1),
        optax.sgd(schedule),
        store=tmp_path / "b.zarr",
        step_size=schedule,
    )
    np.testing.assert_allclose(given["step_size"], runs["step_size"], rtol=1e-6)
    np.testing.assert_allclose(given["loss"], runs["loss"], rtol=1e-5)


def test_a_design_is_recorded_as_it_is(tmp_path):
    from bayes_simfluence.data.designs import Design, diverse, random

    sizes = {"runs": 4, "per_run": 4, "batch_size": 2, "epochs": 2, "key": jax.random.key(0)}
    design = diverse(6, labels=list("aabbab"), shares={"sorted": 0.5, "half": 0.25}, **sizes)
    settings = {"step_size": 0.1, "store": tmp_path / "runs.zarr"}
    runs = record(small_task(), design, optax.sgd(0.1), **settings)
    np.testing.assert_array_equal(runs["batch"], design.curricula)
    assert tuple(runs["curriculum"].values) == design.kinds
    part = runs.isel(run=runs["curriculum"] == "sorted")
    assert part.sizes["run"] == 2
    with pytest.raises(Misuse, match="other kinds of curricula"):
        record(small_task(), design.curricula, optax.sgd(0.1), **settings, resume=True)
    with pytest.raises(Misuse, match=r"4 curricula and 3 kinds"):
        short = Design(design.curricula, design.kinds[1:])
        record(small_task(), short, optax.sgd(0.1), **settings, overwrite=True)
    plain = record(
        small_task(), random(6, **sizes), optax.sgd(0.1), store=tmp_path / "a.zarr", step_size=0.1
    )
    assert "curriculum" not in plain.coords


def test_an_untold_step_size_is_asked_for(tmp_path):
    with pytest.raises(Misuse, match=r"step_size.*inject_hyperparams"):
        record(small_task(), some_curricula(), optax.sgd(0.1), store=tmp_path / "runs.zarr")
    assert not (tmp_path / "runs.zarr").exists()


def test_a_diverging_run_is_kept_and_marked(tmp_path):
    curricula = some_curricula()
    curricula[[0, 2]] = -1
    optimizer = optax.sgd(1e20)
    runs = record(small_task(), curricula, optimizer, store=tmp_path / "runs.zarr", step_size=1e20)
    assert runs["status"].values.tolist() == [1, DIVERGED, 1]
    assert np.isfinite(runs["loss"].values[[0, 2]]).all()
    assert not np.isfinite(runs["loss"].values[1]).all()


def test_resume_finishes_what_is_left_and_changes_nothing_else(tmp_path):
    task, curricula = small_task(), some_curricula()
    settings = {"step_size": 0.1, "placement": Placement(parallel=2)}
    whole = record(task, curricula, optax.sgd(0.1), store=tmp_path / "whole.zarr", **settings)
    path = tmp_path / "runs.zarr"
    record(task, curricula, optax.sgd(0.1), store=path, **settings)
    import zarr

    group = zarr.open_group(str(path), mode="r+", use_consolidated=False)
    for run in (1, 2):
        group["loss"][run], group["status"][run] = np.nan, 0
    assert open_store(path)["status"].values.tolist() == [1, 0, 0]
    again = record(task, curricula, optax.sgd(0.1), store=path, resume=True, **settings)
    np.testing.assert_array_equal(again["loss"], whole["loss"])


def test_resuming_another_recording_is_refused(tmp_path):
    path, settings = tmp_path / "runs.zarr", {"step_size": 0.1, "provenance": {"seed": 1}}
    record(small_task(), some_curricula(), optax.sgd(0.1), store=path, **settings)
    with pytest.raises(Misuse, match="other curricula, seed"):
        record(
            small_task(),
            some_curricula(seed=1),
            optax.sgd(0.1),
            store=path,
            resume=True,
            step_size=0.1,
            provenance={"seed": 2},
        )
    with pytest.raises(Misuse, match="something that exists"):
        record(small_task(), some_curricula(), optax.sgd(0.1), store=path, **settings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"params": {"w": jnp.arange(3)}}, "floating weights only"),
        ({"train_ids": list("abc")}, "give every leaf a leading axis"),
        ({"loss": lambda params, example: params["v"]}, "one number for one example"),
        ({"loss": Unhashable()}, r"task.loss: got unhashable type: 'Unhashable'"),
        ({"metrics": {"far": Unhashable()}}, r"task.far: got unhashable type: 'Unhashable'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(tmp_path, change, match):
    import dataclasses

    task = dataclasses.replace(small_task(), **change)
    with pytest.raises(Misuse, match=match):
        record(task, some_curricula(), optax.sgd(0.1), store=tmp_path / "x.zarr", step_size=0.1)


@pytest.mark.parametrize(
    ("curricula", "match"),
    [
        (np.full((1, 2, 2), 6), r"indices 6\.\.6"),
        (np.full((1, 2, 2), -2), r"indices -2\.\.-2"),
        (np.zeros((1, 0, 2), int), "numpy.stack"),
    ],
)
def test_curricula_that_do_not_fit_are_refused(tmp_path, curricula, match):
    with pytest.raises(Misuse, match=match):
        record(small_task(), curricula, optax.sgd(0.1), store=tmp_path / "x.zarr", step_size=0.1)


def test_progress_is_told_and_changes_nothing(tmp_path):
    from contextlib import contextmanager

    class Listener:
        done = 0

        @contextmanager
        def work(self, label, total):
            self.total = total
            yield self

        def advance(self, amount=1, note=""):
            self.done += amount

    listener = Listener()
    settings = {"step_size": 0.1}
    loud = record(
        small_task(),
        some_curricula(),
        optax.sgd(0.1),
        store=tmp_path / "a.zarr",
        progress=listener,
        **settings,
    )
    silent = record(
        small_task(), some_curricula(), optax.sgd(0.1), store=tmp_path / "b.zarr", **settings
    )
    assert listener.done == listener.total == 36
    np.testing.assert_array_equal(loud["loss"], silent["loss"])
