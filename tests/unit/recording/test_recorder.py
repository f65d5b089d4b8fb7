"""The recorder of other loops: equal to ``record``, safe when it breaks, clear when misused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, DIVERGED
from bayes_simfluence.data.store import open_runs
from bayes_simfluence.files import old_path
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.recorder import Recorder
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY = list("abcdef"), ["x", "y"]


def recorder_at(path, **settings):
    return Recorder(path, **{"train_ids": TRAIN, "query_ids": QUERY, **settings})


def one_run(recorder, steps=3, **settings):
    with recorder.run(**{"initial_loss": [1.0, 2.0], **settings}) as run:
        for step in range(steps):
            run.step([TRAIN[step]], [0.5, 0.6], 0.1)


def test_a_recorded_loop_is_what_record_records(tmp_path):
    inputs = jax.random.normal(jax.random.key(0), (8, 3))
    data = {"x": inputs, "y": jnp.sin(inputs.sum(axis=1))}

    def loss(params, example):
        return (jnp.tanh(params @ example["x"]) - example["y"]) ** 2

    start, rate = jnp.array([0.3, -0.2, 0.1]), 0.1
    curricula = np.array([[[0, 1], [2, -1], [3, 4]], [[5, 0], [-1, -1], [1, 1]]])
    task = Task(
        params=start,
        loss=loss,
        train=jax.tree.map(lambda leaf: leaf[:6], data),
        query=jax.tree.map(lambda leaf: leaf[6:], data),
        train_ids=TRAIN,
        query_ids=QUERY,
    )
    reference = record(
        task,
        curricula,
        optax.sgd(rate),
        store=tmp_path / "reference.zarr",
        step_size=rate,
        features=0,
    )
    evaluate = jax.vmap(loss, in_axes=(None, 0))
    mean = jax.jit(jax.grad(lambda params, batch: evaluate(params, batch).mean()))
    with recorder_at(tmp_path / "runs.zarr", steps=3, slots=2) as recorder:
        for curriculum in curricula:
            params = start
            with recorder.run(initial_loss=evaluate(params, task.query)) as run:
                for members in curriculum:
                    filled = members[members >= 0]
                    if len(filled):
                        batch = jax.tree.map(lambda leaf, at=filled: leaf[at], task.train)
                        params = params - rate * mean(params, batch)
                    run.step(members, evaluate(params, task.query), rate)
    runs = open_runs(tmp_path / "runs.zarr")
    np.testing.assert_allclose(runs["loss"], reference["loss"], rtol=1e-5, atol=1e-6)
    for name in ("loss", "step_size", "batch", "status"):
        assert runs[name].dtype == reference[name].dtype
        assert runs[name].attrs == reference[name].attrs
    for name in ("step_size", "batch", "status"):
        np.testing.assert_array_equal(runs[name], reference[name])
    for name in ("run", "step", "time", "train", "query"):
        np.testing.assert_array_equal(runs[name], reference[name])


def test_ids_positions_and_empty_slots(tmp_path):
    batches = {
        "ids": ["c", None],
        "short": ["c"],
        "array": np.array(["c"]),
        "positions": [2, -1],
        "int64": np.array([2, -1]),
        "scalars": [np.int64(2), None],
    }
    for name, batch in batches.items():
        with recorder_at(tmp_path / f"{name}.zarr", slots=2, initial_loss=[1.0, 2.0]) as recorder:
            recorder.step(batch, [0.5, 0.6])
        runs = open_runs(tmp_path / f"{name}.zarr")
        assert runs["batch"].values.tolist() == [[[2, -1]]], name
        assert "step_size" not in runs
    # Where an id reads as a number, numbers are ids, -1 among them.
    numbers = {"train_ids": [7, -1, 0], "initial_loss": [1.0, 2.0]}
    with recorder_at(tmp_path / "n.zarr", **numbers) as recorder:
        recorder.step([0, -1, None, "7"], [0.5, 0.6])
        with pytest.raises(Misuse, match=r"batch_ids at step 2 of run 0: got unknown ids 1;"):
            recorder.step([1], [0.5, 0.6])
    assert open_runs(tmp_path / "n.zarr")["batch"].values.tolist() == [[[2, 1, -1, 0]]]
    with recorder_at(tmp_path / "c.zarr", train_ids=3, initial_loss=[1.0, 2.0]) as recorder:
        recorder.step([], [0.5, 0.6])
        recorder.step([2, 0], [0.5, 0.6])
    runs = open_runs(tmp_path / "c.zarr")
    assert runs["train"].values.tolist() == [0, 1, 2]
    assert runs["batch"].values.tolist() == [[[-1, -1], [2, 0]]]


def test_nobody_looked_is_not_divergence(tmp_path):
    with recorder_at(tmp_path / "runs.zarr") as recorder:
        with recorder.run(initial_loss=[1.0, 2.0], run_id="thin") as run:
            for losses in (None, [0.5, 0.6], None):
                run.step(["a"], losses, 0.1)
        with recorder.run(initial_loss=[1.0, 2.0], run_id="wild") as run:
            for losses in ([3.0, 4.0], [np.nan, 1e300], None):
                run.step(["a"], losses, jnp.float32(0.1))
    runs = open_runs(tmp_path / "runs.zarr")
    assert runs["status"].values.tolist() == [COMPLETE, DIVERGED]
    assert np.isnan(runs["loss"].values[0, [1, 3]]).all()
    np.testing.assert_array_equal(runs["loss"][0, 2], np.float32([0.5, 0.6]))
    np.testing.assert_array_equal(runs["step_size"], np.full((2, 3), 0.1, np.float32))


def test_one_run_a_recorder_and_appending(tmp_path):
    path = tmp_path / "runs.zarr"
    for seed in range(3):
        with recorder_at(
            path, append=True, initial_loss=[1.0, 2.0], provenance={"model": "m"}
        ) as r:
            for step in range(2):
                r.step([TRAIN[seed], TRAIN[step]], [0.5 - 0.1 * seed, 0.6], 0.1)
    runs = open_runs(path)
    assert runs["run"].values.tolist() == [0, 1, 2] and runs.attrs["model"] == "m"
    assert runs["batch"].values[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
    with pytest.raises(Misuse, match=r"something that exists"):
        recorder_at(path)
    with recorder_at(path, overwrite=True, initial_loss=[1.0, 2.0], run_id="new") as recorder:
        recorder.step(["a"], [0.5, 0.6])
        assert open_runs(path).sizes["run"] == 3, "kept until the first run is finished"
    assert open_runs(path)["run"].values.tolist() == ["new"]


def test_an_exception_leaves_the_runs_before_it(tmp_path):
    path = tmp_path / "runs.zarr"
    with pytest.raises(RuntimeError, match="out of memory"), recorder_at(path) as recorder:
        one_run(recorder)
        before = open_runs(path)
        with recorder.run(initial_loss=[1.0, 2.0]) as run:
            run.step(["a"], [0.5, 0.6], 0.1)
            raise RuntimeError("out of memory")
    xr.testing.assert_identical(open_runs(path), before)
    with recorder_at(path, append=True) as recorder:
        with pytest.raises(RuntimeError), recorder.run(initial_loss=[1.0, 2.0]):
            raise RuntimeError
        one_run(recorder, run_id=7)
    assert open_runs(path)["run"].values.tolist() == [0, 7]
    with pytest.raises(RuntimeError), recorder_at(path, append=True, initial_loss=[1, 2]) as r:
        for _ in range(3):
            r.step(["a"], [0.5, 0.6], 0.1)
        raise RuntimeError
    assert open_runs(path)["run"].values.tolist() == [0, 7]


def record_and_die(path, instant):
    """In a process of its own: two runs, and the end of everything at the given instant."""
    recorder = recorder_at(path)
    one_run(recorder)
    rename = Path.rename

    def rename_and_die(source, target):
        done = rename(source, target)
        if instant == "replacing":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.rename = rename_and_die
    with recorder.run(initial_loss=[1.0, 2.0]) as run:
        for _ in range(3):
            run.step(["a"], [0.4, 0.5], 0.1)
            if instant == "training":
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("instant", ["training", "replacing"])
def test_a_killed_process_leaves_the_runs_before_it(tmp_path, instant):
    path = tmp_path / "runs.zarr"
    program = (
        f"import runpy\nrunpy.run_path({str(Path(__file__).absolute())!r})"
        f"['record_and_die']({str(path)!r}, {instant!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if instant == "replacing":
        assert old_path(path).exists() and not path.exists()
        with pytest.raises(Misuse, match=r"rename .*\.old back"):
            open_runs(path)
    else:
        assert open_runs(path).sizes["run"] == 1
    with recorder_at(path, append=True) as recorder:
        assert open_runs(path)["run"].values.tolist() == [0]
        one_run(recorder)
    assert open_runs(path)["run"].values.tolist() == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.zarr"]


def beginnings(path):
    """What cannot begin: (the attempt, its message)."""
    yield lambda: recorder_at(path, append=True, overwrite=True), r"append, overwrite: got both"
    yield lambda: recorder_at(path, train_ids=["a", "b", "a"]), r"train_ids: got 3 ids, 1 of them"
    yield lambda: recorder_at(path, query_ids=[]), r"query_ids: got 0 ids"
    yield lambda: recorder_at(path, train_ids=0), r"train_ids: got 0"
    yield lambda: recorder_at(path, steps=0), r"steps: got 0"
    yield lambda: recorder_at(path, slots=-1), r"slots: got -1"
    yield lambda: recorder_at(path, initial_loss=[1.0]), r"initial_loss: got shape \(1,\); .*\(2,\)"
    yield (
        lambda: recorder_at(path, initial_loss=[1.0, np.inf]),
        r"initial_loss: got inf for queries y; expected finite losses",
    )
    yield lambda: recorder_at(path).step(["a"]), r"recorder.step: got a recorder that was not"
    yield lambda: recorder_at(path).run().__enter__(), r"initial_loss: got nothing; expected 2"


def test_what_cannot_begin(tmp_path):
    for begin, message in beginnings(tmp_path / "runs.zarr"):
        with pytest.raises(Misuse, match=message):
            begin()
    assert list(tmp_path.iterdir()) == []


STEPS = {
    "unknown id": ((["z"], None, 0.1), r"batch_ids at step 2 of run 1: got unknown ids z;"),
    "no position": (([6], None, 0.1), r"unknown ids 6; expected ids among a, b, c, d, e, \.\.\."),
    "truth": (([True], None, 0.1), r"unknown ids True"),
    "no list": (("ab", None, 0.1), r"batch_ids at step 2 of run 1: got str; expected a list"),
    "one id": ((3, None, 0.1), r"got int; expected a list of the examples' ids"),
    "large batch": ((["a", "b"], None, 0.1), r"got 2 examples; expected at most 1 slots; pass sl"),
    "losses": ((["a"], [0.1], 0.1), r"losses at step 2 of run 1: got shape \(1,\)"),
    "more losses": (
        (["a"], np.ones((2, 2)), 0.1),
        r"got shape \(2, 2\); expected \(2,\), one loss",
    ),
    "text": ((["a"], ["low", "high"], 0.1), r"losses at step 2 of run 1: got list that is no arr"),
    "no size": ((["a"], None, None), r"step_size at step 2 of run 1: got nothing; expected a step"),
    "nan size": ((["a"], None, np.nan), r"step_size at step 2 of run 1: got nan; expected one fin"),
    "negative": ((["a"], None, -0.1), r"got -0.1; expected one finite number >= 0"),
    "sizes": ((["a"], None, [0.1, 0.2]), r"got \[0.1, 0.2\]; expected one finite number"),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_does_not_fit_is_refused_and_the_run_goes_on(tmp_path, case):
    step, message = STEPS[case]
    with recorder_at(tmp_path / "runs.zarr") as recorder:
        one_run(recorder)
        with recorder.run(initial_loss=[1.0, 2.0]) as run:
            run.step(["a"], [0.5, 0.6], 0.1)
            with pytest.raises(Misuse, match=message):
                run.step(*step)
            run.step(["b"], None, 0.1)
            run.step(["c"], None, 0.1)
    assert open_runs(tmp_path / "runs.zarr")["batch"].values[1, :, 0].tolist() == [0, 1, 2]


def test_runs_of_other_length_size_or_name_are_refused(tmp_path):
    path = tmp_path / "runs.zarr"
    with recorder_at(path) as recorder:
        with pytest.raises(Misuse, match=r"run 0: got 0 steps; expected at least 1"):
            one_run(recorder, steps=0)
        one_run(recorder)
        with pytest.raises(Misuse, match=r"run 1: got 2 steps; expected 3, .*it was not written"):
            one_run(recorder, steps=2)
        with pytest.raises(Misuse, match=r"step at step 4 of run 1: got one step more; expected 3"):
            one_run(recorder, steps=4)
        with pytest.raises(Misuse, match=r"run_id: got 0 again; expected each run once"):
            one_run(recorder, run_id="0")
        with pytest.raises(Misuse, match=r"run_id: got 'x'; expected a whole number"):
            one_run(recorder, run_id="x")
        with (
            pytest.raises(Misuse, match=r"recorder.run: got another run within run 1"),
            recorder.run(initial_loss=[1.0, 2.0]),
        ):
            one_run(recorder)
        with (
            pytest.raises(Misuse, match=r"nothing recorded after time 0 for queries x, y"),
            recorder.run(initial_loss=[1.0, 2.0]) as run,
        ):
            for _ in range(3):
                run.step(["a"], None, 0.1)
        with pytest.raises(
            Misuse, match=r"step at step 4 of run 1: got a step after the run's end"
        ):
            run.step(["a"])
        with (
            pytest.raises(Misuse, match=r"got 0.1, but none before; expected a step size at every"),
            recorder_at(tmp_path / "other.zarr").run(initial_loss=[1.0, 2.0]) as run,
        ):
            run.step(["a"])
            run.step(["a"], None, 0.1)
    assert open_runs(path).sizes["run"] == 1
    with pytest.raises(Misuse, match=r"recorder.step: got a recorder that was not entered, or is"):
        recorder.step(["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.zarr"]


def test_appending_to_another_recording_is_refused(tmp_path):
    path = tmp_path / "runs.zarr"
    one_run(recorder_at(path, slots=2))
    for settings, message in (
        ({"train_ids": TRAIN[::-1]}, r"train_ids: got other ids than the store's; expected the 6"),
        ({"query_ids": ["x"]}, r"query_ids: got other ids"),
        ({"steps": 4}, r"steps: got 4; expected 3, as in .*runs.zarr"),
        ({"slots": 1}, r"slots: got 1; expected 2"),
    ):
        with pytest.raises(Misuse, match=message):
            recorder_at(path, append=True, **settings)
    recorder = recorder_at(path, append=True, steps=3, slots=2)
    with (
        pytest.raises(Misuse, match=r"step_size at step 1 of run 1: got nothing"),
        recorder.run(initial_loss=[1.0, 2.0]) as run,
    ):
        run.step(["a"], [0.5, 0.6])
