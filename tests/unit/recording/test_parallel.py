"""How many runs at once: from memory, from the store, or as told."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording import parallel as p
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Placement

MIB = 2**20


def devices(count, *, free=None, platform="gpu"):
    stats = None if free is None else {"bytes_limit": free + 5, "bytes_in_use": 5}
    device = SimpleNamespace(memory_stats=lambda: stats, platform=platform)
    return [device] * count


@pytest.mark.parametrize(
    ("runs", "count", "free", "expected"),
    [
        (32, 1, 1000, 32),
        (32, 1, 400, 16),  # 27 would fit: two equal groups waste nothing
        (32, 4, 400, 8),
        (200, 1, 10**6, 50),  # four groups of at most 64
        (5, 1, 12, 1),  # nothing fits: one at a time
    ],
)
def test_as_many_as_fit_in_equal_groups(runs, count, free, expected):
    chosen = p.fitting_runs(runs, devices(count, free=free * MIB), needed=10 * MIB, shared=5 * MIB)
    assert chosen == expected


def test_on_a_cpu_large_runs_train_one_by_one(monkeypatch):
    monkeypatch.setattr(p, "host_memory", lambda: 2**40)
    cpu = devices(1, platform="cpu")
    assert p.fitting_runs(32, cpu, needed=3 * MIB, shared=0) == 1
    assert p.fitting_runs(32, cpu, needed=MIB, shared=0) == 16
    monkeypatch.setattr(p, "host_memory", lambda: MIB)
    assert p.fitting_runs(32, cpu, needed=MIB, shared=0) == 1


def test_the_memory_of_this_machine_is_known():
    assert p.host_memory() > MIB


def test_auto_is_kept_with_the_store_and_taken_from_it(squares, curricula, tmp_path, monkeypatch):
    settings = {"step_size": 0.1, "store": tmp_path / "runs.zarr", "features": 0}
    settings["placement"] = Placement(parallel="auto")
    optimizer = optax.sgd(0.1)
    runs = record(squares, curricula, optimizer, **settings)
    assert runs.attrs["parallel"] == 3
    monkeypatch.setattr(p, "fitting_runs", lambda *_, **__: 1)
    again = record(squares, curricula, optimizer, resume=True, **settings)
    assert again.attrs["parallel"] == 3
    settings["placement"] = Placement(parallel=2)
    with pytest.raises(Misuse, match="a recording with other parallel"):
        record(squares, curricula, optimizer, resume=True, **settings)


@pytest.mark.parametrize("parallel", [0, "many"])
def test_other_numbers_are_refused(squares, curricula, tmp_path, parallel):
    with pytest.raises(Misuse, match="parallel"):
        record(
            squares,
            curricula,
            optax.sgd(0.1),
            step_size=0.1,
            store=tmp_path / "runs.zarr",
            placement=Placement(parallel=parallel),
        )
    assert not (tmp_path / "runs.zarr").exists()


def test_the_compiler_counts_more_memory_for_more_work(squares):
    from bayes_simfluence.recording.compiled import CompiledSteps, Training

    training = Training(squares.functions, optax.adam(0.1), lambda state, count: np.float32(0.1))
    sizes = [
        p.run_bytes(
            CompiledSteps.of(
                training, squares, 2, steps=4, parallel=at_once, devices=jax.devices()[:1]
            ),
            0,
        )
        for at_once in (1, 8)
    ]
    state = 3 * p.tree_bytes(squares.params)
    assert state < sizes[0] < sizes[1]
