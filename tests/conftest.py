"""Every test runs the package under a runtime checker of its annotated types and shapes."""

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


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
