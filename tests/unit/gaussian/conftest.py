"""A real recording that tests can afford: logistic regression on two overlapping classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayes_simfluence as bs
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY, WIDTH = 24, 6, 5
STEPS, SLOTS, RUNS = 24, 4, 10
RATE = 0.06


def _examples(rng, count):
    label = np.arange(count) % 2
    inputs = rng.normal(size=(count, WIDTH)) + 0.2 * (2 * label - 1)[:, None]
    return {"x": inputs.astype(np.float32), "sign": (2 * label - 1).astype(np.float32)}


def _loss(params, example):
    return jax.nn.softplus(-example["sign"] * (example["x"] @ params["w"]))


@pytest.fixture(scope="session")
def logistic():
    """The task; even examples are of one class, odd ones of the other."""
    rng = np.random.default_rng(0)
    return Task(
        params={"w": jnp.zeros(WIDTH)},
        loss=_loss,
        train=_examples(rng, TRAIN),
        query=_examples(rng, QUERY),
        train_ids=range(TRAIN),
        query_ids=range(QUERY),
    )


@pytest.fixture(scope="session")
def recorded(logistic, tmp_path_factory):
    """Random runs, then two of one class alone and two sorted by class."""
    rng = np.random.default_rng(1)

    def epochs(members):
        order = [rng.permutation(members) for _ in range(STEPS * SLOTS // len(members) + 1)]
        return np.concatenate(order)[: STEPS * SLOTS].reshape(STEPS, SLOTS)

    alike = [epochs(rng.choice(TRAIN, 16, replace=False)) for _ in range(RUNS + 2)]
    alone = [epochs(np.arange(side, TRAIN, 2)) for side in (0, 1)]
    ordered = [
        np.concatenate([batch[batch % 2 == side] for side in sides])[: STEPS * SLOTS].reshape(
            STEPS, SLOTS
        )
        for batch, sides in zip(alike[-2:], ((0, 1), (1, 0)), strict=True)
    ]
    curricula = np.stack([*alike, *alone, *ordered]).astype(np.int32)
    optimizer = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(RATE, 0.0, STEPS))
    store = tmp_path_factory.mktemp("logistic") / "runs.zarr"
    return bs.record(logistic, curricula, optimizer, store=store, features=WIDTH)
