"""Every test runs the package under a runtime checker of its annotated types and shapes."""

import os
from pathlib import Path

# Before NumPy loads BLAS, and for the processes that pytest-xdist starts: several processes with
# several BLAS threads each spend most of their time waiting for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("bayes_simfluence", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


OPTIMIZED = ("statistical", "parity", "optimized")
"""Markers of tests that compute for long; in the others compilation takes most of the time."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture, those of wider scope included."""
    wanted = any(item.get_closest_marker(one) for one in OPTIMIZED)
    benchmark = "benchmark" in getattr(item, "fixturenames", ())
    jax.config.update("jax_disable_most_optimizations", not (wanted or benchmark))


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000
"""Each compiled program holds some memory maps, and Linux grants a process 65,530 of them; one more
ends it without a word."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After each test: drop the compiled programs when they have become too many."""
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
