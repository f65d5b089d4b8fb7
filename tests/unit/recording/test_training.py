"""What is recorded when, and ways of training that must not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zarr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import DIVERGED
from bayes_simfluence.data.metrics import metric_names
from bayes_simfluence.data.store import open_runs
from bayes_simfluence.recording.checkpoints import (
    final_weights,
    named_tensors,
    open_checkpoints,
    with_tensors,
)
from bayes_simfluence.recording.compiled import Training, training_loss
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Evaluation, Placement
from bayes_simfluence.tasks.task import Task

SCHEDULE = optax.linear_schedule(0.05, 0.0, 7)


def grouped(settings):
    """Settings of ``record`` from those of its groups."""
    groups = {"evaluation": Evaluation, "placement": Placement}
    rest = dict(settings)
    for name, group in groups.items():
        mine = {field.name for field in dataclasses.fields(group)} & set(rest)
        rest[name] = group(**{setting: rest.pop(setting) for setting in mine})
    return rest


def recorded(task, curricula, folder, name="runs", **settings):
    optimizer = settings.pop("optimizer", optax.adam(SCHEDULE))
    settings = {"step_size": SCHEDULE, "features": 0, **grouped(settings)}
    return record(task, curricula, optimizer, store=folder / f"{name}.zarr", **settings)


@pytest.fixture(scope="module")
def whole(squares, curricula, tmp_path_factory):
    """Everything measured after every step, one run after the other."""
    return recorded(squares, curricula, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("every", "parallel"), [(2, 1), (3, 2)])
def test_queries_measured_every_so_many_steps(squares, curricula, tmp_path, whole, every, parallel):
    runs = recorded(squares, curricula, tmp_path, evaluate_every=every, parallel=parallel)
    times = sorted({*range(0, 8, every), 7})
    for name in ("loss", "error", "close"):
        values = runs[name].values
        np.testing.assert_allclose(values[:, times], whole[name][:, times], rtol=1e-4, atol=1e-5)
        assert np.isnan(np.delete(values, times, axis=1)).all()
    assert (runs["status"] == 1).all()
    np.testing.assert_allclose(runs["step_size"], whole["step_size"])


def test_queries_are_not_computed_where_they_are_not_measured(squares, curricula, tmp_path):
    """Counted by the compiled steps themselves, also where two runs train at once by vmap."""
    counted = []

    def loss(params, example):
        jax.debug.callback(lambda _: counted.append(1), example["y"])
        return squares.loss(params, example)

    task = dataclasses.replace(squares, loss=loss, metrics={})
    recorded(task, curricula[:2], tmp_path, evaluate_every=3, parallel=2)
    jax.effects_barrier()
    slots, queries = curricula[:2].size, len(squares.query_ids)
    assert len(counted) == queries + slots + 3 * queries, "shared by both runs"


def test_queries_cut_to_their_length_measure_the_same(squares, curricula, tmp_path, whole):
    """Each query is padded with columns of noise that its loss does not read."""
    lengths = [3, 20, 5, 9]
    noise = jax.random.normal(jax.random.key(3), (4, 20))
    padded = {**squares.query, "padding": noise}
    seen = set()

    def cut(example, length):
        seen.add(length)
        return {**example, "padding": example["padding"][:length]}

    task = dataclasses.replace(squares, query=padded, query_lengths=lengths, cut=cut)
    for chunk in (None, 2):
        runs = recorded(task, curricula[:1], tmp_path, str(chunk), query_chunk=chunk)
        np.testing.assert_allclose(runs["loss"], whole["loss"][:1], rtol=1e-5, atol=1e-6)
    assert seen == {8, 16, 24}
    for change in ({"cut": None}, {"query_lengths": lengths[1:]}, {"query_lengths": None}):
        with pytest.raises(Misuse, match=r"task.query_lengths.*both or neither"):
            recorded(dataclasses.replace(task, **change), curricula, tmp_path)


def test_metrics_are_recorded_beside_the_loss(squares, curricula, whole):
    assert metric_names(whole) == ["close", "error"]
    np.testing.assert_allclose(whole["error"] ** 2, whole["loss"], rtol=1e-5)
    np.testing.assert_array_equal(whole["close"], np.abs(whole["error"]) < 1.0)


def test_a_run_that_diverges_between_two_looks_is_marked(squares, curricula, tmp_path):
    settings = {"optimizer": optax.sgd(1e20), "step_size": 1e20, "evaluate_every": 3}
    runs = recorded(squares, curricula, tmp_path, **settings)
    assert (runs["status"] == DIVERGED).all()


@pytest.mark.parametrize("every", [0, 3])
def test_scores_are_computed_between_steps(squares, curricula, tmp_path, every):
    def largest(weights):
        return np.abs(weights["v"]).max() * np.arange(1, 5)

    task = dataclasses.replace(
        squares,
        scores={"largest": largest},
        frozen={"v": jnp.ones(5)},
        assemble=lambda params, frozen: {"w": params["w"], "v": params["v"] + frozen["v"]},
    )
    runs = recorded(task, curricula, tmp_path, scores_every=every, parallel=2, checkpoints=7)
    times = [0, 3, 6, 7] if every else [0, 7]
    assert np.isnan(np.delete(runs["largest"].values, times, axis=1)).all()
    for run in range(3):
        steps = [saved.tensors["v"] for saved in open_checkpoints(tmp_path / "runs.zarr", run)]
        steps.append(final_weights(tmp_path / "runs.zarr", run)["v"])
        expected = [np.abs(steps[time] + 1.0).max() for time in times]
        np.testing.assert_allclose(runs["largest"][run, times, 1] / 2, expected, rtol=1e-6)


def test_scores_of_another_shape_are_refused_before_any_training(squares, curricula, tmp_path):
    task = dataclasses.replace(squares, scores={"one": lambda weights: np.zeros(1)})
    with pytest.raises(Misuse, match=r"task.scores\['one'\]: got shape \(1,\)"):
        recorded(task, curricula, tmp_path)


@pytest.mark.parametrize("settings", [{"accumulate": 3}, {"accumulate": 2, "remat": True}])
def test_less_memory_is_the_same_training(squares, curricula, tmp_path, whole, settings):
    runs = recorded(squares, curricula, tmp_path, parallel=2, **settings)
    np.testing.assert_allclose(runs["loss"], whole["loss"], rtol=1e-4, atol=1e-5)


def test_remat_keeps_less_for_the_backward_pass():
    """Products with weights are kept, what comes between them is not."""

    def loss(params, example):
        hidden = jnp.repeat(example[None], 64, axis=0)
        for weights in params:
            for _ in range(3):
                hidden = jnp.tanh(jnp.sin(hidden) + hidden)
            hidden = hidden @ weights
        return hidden.sum()

    def kept(remat):
        task = Task([jnp.eye(16)] * 3, loss, jnp.ones((8, 16)), jnp.ones((1, 16)), range(8), [0])
        training = Training(
            task.functions, optax.sgd(0.1), lambda state, count: 0.1, Placement(remat=remat)
        )
        batched = jax.vmap(training_loss(training), in_axes=(None, 0))
        backward = jax.vjp(lambda params: batched(params, task.train), task.params)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(True) < 0.3 * kept(False)


def test_checkpoints_are_the_weights_their_steps_start_from(squares, curricula, tmp_path, whole):
    recorded(squares, curricula, tmp_path, checkpoints=3, parallel=2)
    for run in range(3):
        checkpoints = open_checkpoints(tmp_path / "runs.zarr", run)
        assert [saved.step for saved in checkpoints] == [2, 4, 6]
        for step, step_size, tensors in checkpoints:
            assert step_size == pytest.approx(0.05 * (1 - (step - 1) / 7))
            weights = jax.tree.map(jnp.asarray, with_tensors(squares.params, tensors))
            losses = jax.vmap(squares.loss, in_axes=(None, 0))(weights, squares.query)
            np.testing.assert_allclose(losses, whole["loss"][run, step - 1], rtol=1e-4, atol=1e-5)
        last = with_tensors(squares.params, final_weights(tmp_path / "runs.zarr", run))
        losses = jax.vmap(squares.loss, in_axes=(None, 0))(
            jax.tree.map(jnp.asarray, last), squares.query
        )
        np.testing.assert_allclose(losses, whole["loss"][run, -1], rtol=1e-4, atol=1e-5)


def test_checkpoints_stay_when_runs_are_appended(squares, curricula, tmp_path):
    from bayes_simfluence.data.store import append_runs

    first = recorded(squares, curricula, tmp_path, checkpoints=1)
    append_runs(first.assign_coords(run=[7, 8, 9]), tmp_path / "runs.zarr")
    assert open_runs(tmp_path / "runs.zarr").sizes["run"] == 6
    assert open_checkpoints(tmp_path / "runs.zarr", 2)[0].step == 4
    with pytest.raises(Misuse, match=r"checkpoints of run 9 .*: got none"):
        open_checkpoints(tmp_path / "runs.zarr", 9)
    with pytest.raises(Misuse, match="run: got '10'"):
        open_checkpoints(tmp_path / "runs.zarr", 10)


def test_a_truncated_checkpoint_is_named(squares, curricula, tmp_path):
    recorded(squares, curricula[:1], tmp_path, checkpoints=1)
    path = tmp_path / "runs.zarr" / "checkpoints" / "0" / "final.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Misuse, match=r"final\.safetensors: got a file that cannot be read"):
        final_weights(tmp_path / "runs.zarr", 0)


def test_tensors_are_named_by_their_path_in_any_type():
    params = {"a": [jnp.ones(2, jnp.bfloat16)], "b.weight": jnp.zeros((2, 3))}
    named = named_tensors(params)
    assert named["a/0"].dtype == jnp.bfloat16
    assert jax.tree.structure(with_tensors(params, named)) == jax.tree.structure(params)
    with pytest.raises(Misuse, match="more than one array called a/b"):
        named_tensors({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})


def test_some_runs_now_and_the_others_later_are_the_whole(squares, curricula, tmp_path):
    whole = recorded(squares, curricula, tmp_path, "all", parallel=2)
    store = tmp_path / "runs.zarr"
    with pytest.warns(UserWarning, match="1 of 3 runs recorded so far"):
        recorded(squares, curricula, tmp_path, parallel=2, only=[1], resume=True)
    with pytest.warns(UserWarning, match="2 of 3 runs recorded so far"):
        recorded(squares, curricula, tmp_path, parallel=2, only=slice(2, None), resume=True)
    again = recorded(squares, curricula, tmp_path, parallel=2, resume=True)
    for name in ("loss", "error", "close", "step_size"):
        np.testing.assert_array_equal(again[name], whole[name])
    assert not (store / "claims").exists()


def test_a_run_that_another_process_records_is_refused(squares, curricula, tmp_path):
    from bayes_simfluence.data.claims import claimed

    store = tmp_path / "runs.zarr"
    with pytest.warns(UserWarning, match="1 of 3 runs"):
        recorded(squares, curricula, tmp_path, only=[0], resume=True)
    with claimed(store, [1]):
        with pytest.raises(Misuse, match="run 1: got recorded right now by process"):
            recorded(squares, curricula, tmp_path, resume=True)
        with pytest.warns(UserWarning, match="2 of 3 runs"):
            recorded(squares, curricula, tmp_path, resume=True, only=[0, 2])


def test_resuming_with_other_measurements_is_refused(squares, curricula, tmp_path):
    recorded(squares, curricula, tmp_path)
    with pytest.raises(Misuse, match="other metric extra, evaluate_every, checkpoints"):
        recorded(
            dataclasses.replace(squares, metrics={**squares.metrics, "extra": squares.loss}),
            curricula,
            tmp_path,
            resume=True,
            evaluate_every=2,
            checkpoints=1,
        )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"step_size": lambda count: 0.0 * count}, "step_size: got 0 at each of the 7 steps"),
        ({"step_size": 0.0}, "step_size: got 0.0"),
        ({"step_size": None, "optimizer": optax.inject_hyperparams(optax.sgd)(0.0)}, "got 0 at"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"query_chunk": 0}, "query_chunk"),
        ({"accumulate": 5}, "at most the 4 slots"),
        ({"checkpoints": 8}, "at most the 7 steps"),
        ({"only": [5]}, r"numbers among 0\.\.2"),
        ({"distributed": True}, r"jax\.distributed\.initialize"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    squares, curricula, tmp_path, settings, match
):
    with pytest.raises(Misuse, match=match):
        recorded(squares, curricula, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_warm_up_from_zero_is_no_zero_rate(squares, curricula, tmp_path):
    warm = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.0, 0.1, 7))
    runs = recorded(squares, curricula[:1], tmp_path, optimizer=warm, step_size=None)
    np.testing.assert_allclose(runs["step_size"][0], 0.1 * np.arange(7) / 7, atol=1e-7)


def test_a_batch_larger_than_the_data_is_refused(squares, tmp_path):
    with pytest.raises(Misuse, match=r"a batch of 7 examples.*at most the task's 6"):
        recorded(squares, np.zeros((1, 2, 7), int), tmp_path)
    padded = np.full((1, 2, 7), -1)
    padded[:, :, 0] = 3
    recorded(squares, padded, tmp_path)


def test_the_note_tells_the_last_loss_and_the_runs_done(squares, curricula, tmp_path):
    from contextlib import contextmanager

    notes, labels = [], []

    class Listener:
        @contextmanager
        def work(self, label, total):
            labels.append((label, total))
            yield self

        def advance(self, amount=1, note=""):
            notes.append((amount, note))

    runs = recorded(
        squares,
        curricula,
        tmp_path,
        progress=Listener(),
        parallel=2,
        evaluate_every=5,
        checkpoints=1,
    )
    assert labels == [("record, 2 at once", 21)]
    assert [amount for amount, _ in notes] == [6, 8, 3, 4]
    loss = float(runs["loss"].values[:2, 5].mean())
    assert notes[0][1] == "0 of 3 runs"
    assert notes[1][1].endswith(", 0 of 3 runs") and "mean query loss" in notes[1][1]
    assert notes[3][1].endswith(", 2 of 3 runs")
    assert np.isfinite(loss)


def test_each_array_has_a_chunk_of_its_own_for_each_run(squares, curricula, tmp_path):
    recorded(squares, curricula, tmp_path)
    group = zarr.open_group(str(tmp_path / "runs.zarr"), mode="r")
    for name in ("loss", "error", "close", "step_size", "status"):
        assert group[name].chunks[0] == 1
