"""Every test runs the package under a runtime checker of its annotated types and shapes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def minilm_task() -> Callable[..., Any]:
    """Makes two-class fine-tuning of all weights of MiniLM on random texts of mixed length."""

    def made(train: int, queries: int, *, tokens: int = 32, words: int = 20_000) -> Any:
        import jax.numpy as jnp

        from bayes_simfluence.networks.checkpoint import load_checkpoint, network_of
        from bayes_simfluence.networks.heads import head_logits, with_head
        from bayes_simfluence.networks.network import Sequence
        from bayes_simfluence.tasks.task import Task
        from bayes_simfluence.tasks.tokens import filled_lengths, shortened

        checkpoint = load_checkpoint("minilm")
        network, rng = network_of(checkpoint), np.random.default_rng(0)

        def examples(count: int) -> dict[str, jax.Array]:
            lengths = rng.integers(tokens // 4, tokens + 1, count)
            return {
                "tokens": jnp.asarray(rng.integers(1000, 1000 + words, (count, tokens)), jnp.int32),
                "attended": jnp.asarray(np.arange(tokens)[None] < lengths[:, None]),
                "label": jnp.asarray(rng.integers(0, 2, count), jnp.int32),
            }

        def outputs(weights: Any, example: Any) -> jax.Array:
            found = example["tokens"]
            sequence = Sequence(found, jnp.zeros_like(found), example["attended"])
            return head_logits(network, weights, sequence, "mean")

        def output_loss(logits: jax.Array, example: Any) -> jax.Array:
            return -jax.nn.log_softmax(logits)[example["label"]]

        names = [name for name in network.shapes if "pooler" not in name]
        weights = {name: checkpoint.tensors[name] for name in names}
        query = examples(queries)
        return Task(
            params=with_head(weights, network, 2, jax.random.key(0)),
            loss=lambda weights, example: output_loss(outputs(weights, example), example),
            outputs=outputs,
            output_loss=output_loss,
            train=examples(train),
            query=query,
            train_ids=range(train),
            query_ids=range(queries),
            provenance={"folder": str(checkpoint.folder)},
            query_lengths=filled_lengths(query),
            cut=shortened,
        )

    return made
