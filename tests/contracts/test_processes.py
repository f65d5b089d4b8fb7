"""Several processes, machines and devices record one store, the same as one process alone."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bayes_simfluence.data.store import open_runs
from bayes_simfluence.recording.settings import Placement

# The recording in this process is the reference of those in others.
pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX"),
]
CRASH = str(Path(__file__).with_name("test_crash.py").absolute())
shared = runpy.run_path(CRASH)
START = (
    "import os, runpy, sys\n"
    "from bayes_simfluence.recording.settings import Placement\n"
    f"record = runpy.run_path({CRASH!r})['record_small']\n"
)
QUIET = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def started(program, *words, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", START + program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUIET, **environment},
    )


def outputs(processes):
    written = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, written, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in written]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process records everything, one run after the other."""
    store = tmp_path_factory.mktemp("reference") / "runs.zarr"
    return shared["record_small"](store), shared["weights_in"](store)


def test_two_processes_record_their_own_runs_into_one_store(tmp_path, reference):
    """Both may be the first: whoever comes first makes the store."""
    store = tmp_path / "runs.zarr"
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "share = Placement(only=slice(int(sys.argv[2]), int(sys.argv[3])))\n"
        "record(sys.argv[1], placement=share, resume=True)\n"
    )
    outputs([started(program, store, *share) for share in ((0, 3), (3, 6))])
    shared["assert_same_bits"](open_runs(store), reference[0])
    assert shared["weights_in"](store) == reference[1]
    assert not (store / "claims").exists()


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes_of_jax_distributed_share_the_runs(tmp_path, reference):
    """At first process 0 cannot make the store, and both say so; then both record."""
    store, address = tmp_path / "runs.zarr", f"localhost:{free_port()}"
    store.mkdir()
    program = (
        "from bayes_simfluence.recording.processes import join_processes\n"
        "join_processes(sys.argv[2])\n"
        "class Counted:\n"
        "    from contextlib import contextmanager\n"
        "    @contextmanager\n"
        "    def work(self, label, total):\n"
        "        print('steps', total)\n"
        "        yield self\n"
        "    def advance(self, amount=1, note=''): pass\n"
        "try:\n"
        "    record(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print('error', type(error).__name__)\n"
        "runs = record(sys.argv[1], overwrite=True, progress=Counted())\n"
        "print('runs', runs.sizes['run'])\n"
    )
    output = outputs([started(program, store, f"{address},2,{number}") for number in range(2)])
    half = shared["RUNS"] // 2 * shared["STEPS"]
    for number, error in enumerate(("Misuse", "WorkFailed")):
        lines = output[number].splitlines()[-3:]
        assert lines == [f"error {error}", f"steps {half}", f"runs {shared['RUNS']}"]
    shared["assert_same_bits"](open_runs(store), reference[0])
    assert shared["weights_in"](store) == reference[1]


def test_runs_are_spread_over_the_devices_and_keep_their_bits(tmp_path, reference):
    """Four devices with one run each, two rounds; then with two each, one round."""
    store = tmp_path / "runs.zarr"
    program = (
        "import jax\n"
        "record(sys.argv[1])\n"
        "record(sys.argv[2], placement=Placement(parallel=2))\n"
        "print(jax.local_device_count())\n"
    )
    flags = "--xla_force_host_platform_device_count=4"
    output = outputs([started(program, store, tmp_path / "two.zarr", XLA_FLAGS=flags)])
    assert output[0].strip() == "4"
    shared["assert_same_bits"](open_runs(store), reference[0])
    assert shared["weights_in"](store) == reference[1]
    two = shared["record_small"](tmp_path / "here.zarr", placement=Placement(parallel=2))
    shared["assert_same_bits"](open_runs(tmp_path / "two.zarr"), two)
