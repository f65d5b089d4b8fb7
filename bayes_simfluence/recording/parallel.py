"""How many runs train at once: chosen from memory, and spread over the devices of this process.

Each device trains ``parallel`` runs by ``vmap``; with several devices each has as many. The number
decides the last bits of what is recorded, so it is kept with the store. The number of devices does
not.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from bayes_simfluence.recording.compiled import CompiledSteps
from bayes_simfluence.recording.settings import Parallel

log = logging.getLogger(__name__)

SHARE = 0.7
"""Share of the free memory that a recording may take: allocators lose some to holes."""
MOST = 64
"""Runs at once beyond which a call of the compiled steps gains nothing more."""
SMALL, MOST_ON_CPU = 2**20, 16
"""On a CPU runs gain from ``vmap`` while each needs less than about a megabyte: on two cores, runs
of .05, .4 and 2.7 MiB took .6, .6 and 1.7 times as long, 16 at once, as one by one."""


def parallel_of(
    asked: Parallel,
    stored: int | None,
    *,
    runs: int,
    devices: list[jax.Device],
    shared: PyTree,
    alone: Callable[[], CompiledSteps],
) -> int:
    """Runs at once on each device: as many as are asked for, as a store has, or as fit.

    Args:
        asked: a number or ``"auto"``.
        stored: the number that the store to be resumed was recorded with.
        shared: arrays that all runs use.
        alone: compiles the steps of one run, whose memory decides.
    """
    if asked != "auto":
        return min(int(asked), runs)
    if stored is not None:
        return stored
    shared_bytes = tree_bytes(shared)
    needed = run_bytes(alone(), shared_bytes)
    return fitting_runs(runs, devices, needed=needed, shared=shared_bytes)


def fitting_runs(runs: int, devices: Sequence[Any], *, needed: int, shared: int) -> int:
    """How many of ``runs`` fit a device at once and gain from it, in groups of one size.

    Args:
        devices: JAX devices of one kind.
        needed: bytes that a run needs for itself.
        shared: bytes that all runs of a device use together.
    """
    memory, host = devices[0].memory_stats() or {}, host_memory()
    free = None if host is None else host // len(devices)
    if "bytes_limit" in memory:
        free = int(memory["bytes_limit"]) - int(memory.get("bytes_in_use", 0))
    per_device = -(-runs // len(devices))
    most = min(MOST, per_device)
    if devices[0].platform == "cpu":
        most = min(most, MOST_ON_CPU if needed <= SMALL else 1)
    if free is not None:
        most = min(most, int((SHARE * free - shared) // max(needed, 1)))
    groups = -(-per_device // max(most, 1))
    chosen = -(-per_device // groups)
    log.info(
        "%d runs at once on each of %d devices: %.1f MiB a run, %s free",
        chosen,
        len(devices),
        needed / 2**20,
        "unknown" if free is None else f"{free / 2**20:.0f} MiB",
    )
    return chosen


def run_bytes(compiled: CompiledSteps, shared: int) -> int:
    """Memory that compiled steps need beside the ``shared`` bytes, as the compiler counts it."""
    sizes: Any = compiled.advance.memory_analysis()
    if sizes is None:
        return 1
    taken = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return max(int(taken) - int(sizes.alias_size_in_bytes) - shared, 1)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of the arrays of a pytree."""
    leaves = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def host_memory() -> int | None:
    """Free bytes of this machine, or of the container that this process runs in."""
    free = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(int(available.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text("utf-8") for name in ("max", "current"))
        free.append(int(limit) - int(used))
    with suppress(OSError, ValueError, AttributeError):
        free = free or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    return min(free, default=None)
