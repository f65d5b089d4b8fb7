"""What several files record: a small task and curricula of its examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.tasks.task import Task


@pytest.fixture(scope="session")
def squares() -> Task:
    """Least squares with a hidden layer: 6 training examples, 4 queries, two metrics."""
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(10, 3)).astype("f4")
    data = {"x": jnp.asarray(inputs), "y": jnp.asarray(np.sin(inputs.sum(axis=1)))}

    def error(params, example):
        return jnp.tanh(params["w"] @ example["x"]) @ params["v"] - example["y"]

    return Task(
        params={
            "w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
            "v": jnp.asarray(rng.normal(size=5), jnp.float32),
        },
        loss=lambda params, example: error(params, example) ** 2,
        train=jax.tree.map(lambda leaf: leaf[:6], data),
        query=jax.tree.map(lambda leaf: leaf[6:], data),
        train_ids=list("abcdef"),
        query_ids=list("wxyz"),
        metrics={
            "error": error,
            "close": lambda params, example: jnp.abs(error(params, example)) < 1.0,
        },
    )


@pytest.fixture(scope="session")
def curricula() -> np.ndarray:
    """Three runs of seven steps of four slots, some of them empty."""
    drawn = np.random.default_rng(1).integers(-1, 6, (3, 7, 4))
    drawn[0, 2] = -1
    return drawn
