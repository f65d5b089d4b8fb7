"""A recording killed at any instant loses nothing that it had finished, and resumes bit for bit."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
import zarr

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.conventions import COMPLETE, UNRECORDED
from bayes_simfluence.data.store import open_runs, open_store
from bayes_simfluence.recording.features import Features
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Evaluation
from bayes_simfluence.tasks.task import Task

# A recording in this process must be the bit-for-bit reference of one in another.
pytestmark = pytest.mark.optimized
KILLS = 24
RUNS, STEPS = 6, 12


def small_task():
    """Least squares with a hidden layer: 6 training examples, 4 queries."""
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(10, 3)).astype("f4")
    data = {"x": inputs, "y": np.sin(inputs.sum(axis=1))}

    def loss(params, example):
        return (jnp.tanh(params["w"] @ example["x"]) @ params["v"] - example["y"]) ** 2

    return Task(
        params={
            "w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
            "v": jnp.asarray(rng.normal(size=5), jnp.float32),
        },
        loss=loss,
        train={name: jnp.asarray(rows[:6]) for name, rows in data.items()},
        query={name: jnp.asarray(rows[6:]) for name, rows in data.items()},
        train_ids=list("abcdef"),
        query_ids=list("wxyz"),
        metrics={"below": lambda params, example: loss(params, example) < 0.5},
        scores={"norm": lambda params: np.full(4, np.linalg.norm(params["v"]))},
    )


def record_small(store, **settings):
    """The recording of this file; every call is the same one."""
    rng = np.random.default_rng(0)
    return record(
        small_task(),
        rng.integers(-1, 6, (RUNS, STEPS, 2)),
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.05, 0.0, STEPS)),
        store=store,
        evaluation=Evaluation(checkpoints=1),
        features=Features(
            rng.normal(size=(6, 2)).astype("f4"), rng.normal(size=(4, 2)).astype("f4"), 1.0
        ),
        **settings,
    )


class LineProgress:
    """A progress that writes a line to file descriptor 1 whenever steps are done.

    From the first steps on no file may grow beyond ``limit`` bytes; 0 = no limit.
    """

    def __init__(self, limit):
        self.limit = limit

    @contextmanager
    def work(self, label, total):
        os.write(1, b"recording\n")
        yield self

    def advance(self, amount=1, note=""):
        os.write(1, b"steps\n")
        if self.limit:
            import resource  # POSIX only, as fork is

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def serve():
    """Fork a recording for each line on stdin: imports are paid once, XLA starts in the child."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for line in sys.stdin:
        limit, store = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if not child:
            try:
                record_small(store, resume=True, progress=LineProgress(int(limit)))
                os.write(1, b"end\n")
            except WorkFailed as error:
                os.write(1, f"WorkFailed: {error}\n".encode())
            os._exit(0)
        os.write(1, f"pid {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


class Recorder:
    """A process that records on request, and whose recordings may be killed.

    Its recordings share what they compile through ``cache``, a folder: compilation would be two
    thirds of their time. The reference is compiled by itself.
    """

    def __init__(self, cache):
        settings = {
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        program = (
            f"import runpy, sys\nrunpy.run_path({str(Path(__file__).absolute())!r})['serve']()\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **settings},
        )

    def record(self, store, kill=None):
        """Whether the recording came to its end before ``kill``: (times told, seconds later)."""
        return "end" in self.lines_of(store, kill)

    def lines_of(self, store, kill=None, limit=0):
        """What a recording writes, killed or with a limit to its files."""
        self.process.stdin.write(f"{limit} {store}\n".encode())
        self.process.stdin.flush()
        child = int(self._line().removeprefix("pid "))
        lines, reached = [], None
        os.set_blocking(self.process.stdout.fileno(), False)
        while kill and "gone" not in lines:
            line = self.process.stdout.readline().decode().strip()
            lines += [line] if line else []
            now = time.monotonic()
            if reached is None and lines.count("steps") >= kill[0]:
                reached = now
            if reached is not None and now >= reached + kill[1]:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.0005)
        os.set_blocking(self.process.stdout.fileno(), True)
        while "gone" not in lines:
            lines.append(self._line())
        return lines

    def _line(self):
        line = self.process.stdout.readline().decode().strip()
        if not line:
            raise RuntimeError("the recorder ended")
        return line

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    recorder = Recorder(tmp_path_factory.mktemp("compiled"))
    yield recorder
    recorder.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same recording, uninterrupted."""
    return record_small(tmp_path_factory.mktemp("reference") / "runs.zarr")


def finished_runs(store, reference):
    """Number of runs marked complete, after checking that each is the reference's."""
    try:
        stored = open_store(store)
    except Misuse as error:
        assert "nothing there" in str(error)
        assert not store.exists()
        return 0
    done = stored["status"].values == COMPLETE
    assert set(stored["status"].values) <= {COMPLETE, UNRECORDED}
    for name in ("batch", "loss", "step_size", "below", "norm"):
        np.testing.assert_array_equal(stored[name].values[done], reference[name].values[done])
    for name in ("train_feature", "query_feature"):
        np.testing.assert_array_equal(stored[name], reference[name])
    return int(done.sum())


def weights_in(store):
    """Name -> bytes of every file of weights."""
    folder = store / "checkpoints"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_bits(runs, reference):
    xr.testing.assert_identical(runs, reference)
    for name in reference.variables:
        assert runs[name].dtype == reference[name].dtype
        assert runs[name].values.tobytes() == reference[name].values.tobytes(), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_instants_a_recording_resumes_bit_for_bit(tmp_path, reference, recorder):
    """Half of the kills fall anywhere in the life of the process, half between the end of a run's
    steps and a few milliseconds later, which is where it is written."""
    rng = np.random.default_rng()
    assert recorder.record(tmp_path / "first.zarr")
    began = time.monotonic()
    assert recorder.record(tmp_path / "timed.zarr")
    whole = time.monotonic() - began
    assert_same_bits(open_runs(tmp_path / "timed.zarr"), reference)
    saved = weights_in(tmp_path / "timed.zarr")
    assert sorted(saved) == sorted(
        f"{run}/{name}.safetensors" for run in range(RUNS) for name in ("final", "step-000007")
    )
    kills, stores, seen = 0, 0, set()
    while kills < KILLS:
        stores += 1
        store = tmp_path / f"{stores}.zarr"
        ended = False
        while not ended:
            anywhere = (0, rng.uniform(0.0, whole))
            writing = (int(rng.integers(1, 5)), rng.uniform(0.0, 0.02))
            instant = anywhere if kills % 2 else writing
            ended = recorder.record(store, instant if kills < KILLS else None)
            kills += not ended
            seen.add(finished_runs(store, reference))
        assert_same_bits(open_runs(store), reference)
        assert weights_in(store) == saved
        assert not (store / "claims").exists()
        assert not list(store.rglob("*.partial")), "rests of killed writers"
        assert not list(store.parent.glob(f".{store.name}*")), "rests of killed writers"
    assert len(seen - {0, RUNS}) >= 2, f"kills met only stores with {seen} finished runs"


@pytest.mark.parametrize("variable", ["loss", "step_size", "below", "status"])
def test_a_full_disk_ends_the_work_and_resume_finishes_it(
    tmp_path, monkeypatch, reference, variable
):
    store, written = tmp_path / "runs.zarr", zarr.Array.__setitem__

    def full(array, selection, value):
        if array.name.strip("/") == variable and selection == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(array, selection, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(WorkFailed, match=r"run 1 .*No space left on device.*safe.*resume"):
        record_small(store)
    assert open_store(store)["status"].values.tolist() == [COMPLETE] + [UNRECORDED] * 5
    assert finished_runs(store, reference) == 1
    with pytest.warns(UserWarning, match="1 of 6 runs recorded so far"):
        assert open_runs(store).sizes["run"] == 1
    monkeypatch.undo()
    assert_same_bits(record_small(store, resume=True), reference)


def test_a_disk_full_of_weights_ends_the_work_and_resume_finishes_it(
    tmp_path, monkeypatch, reference
):
    store, written = tmp_path / "runs.zarr", Path.write_bytes

    def full(path, data):
        if path.suffix == ".safetensors" and path.parent.name == ".1.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WorkFailed, match=r"checkpoints.1 could not be written .*No space left"):
        record_small(store)
    assert open_store(store)["status"].values.tolist() == [COMPLETE] + [UNRECORDED] * 5
    assert finished_runs(store, reference) == 1
    monkeypatch.undo()
    assert_same_bits(record_small(store, resume=True), reference)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_disk_that_takes_no_more_of_a_file_leaves_a_readable_store(tmp_path, reference, recorder):
    """The system's own refusal, by a limit on the size of files: that of the weights is over it."""
    store = tmp_path / "runs.zarr"
    *_, failure, gone = recorder.lines_of(store, limit=20)
    assert failure.startswith("WorkFailed: ") and "File too large" in failure
    assert gone == "gone"
    assert finished_runs(store, reference) == 0
    assert_same_bits(record_small(store, resume=True), reference)


def test_a_disk_full_from_the_start_leaves_no_store(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    with pytest.raises(WorkFailed, match=r"could not be written .*No space left on device"):
        record_small(tmp_path / "runs.zarr")
    assert list(tmp_path.iterdir()) == []
