"""What ``record`` costs beyond the bare compiled loop of training and per-step evaluation."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.task import Task

INPUTS, WIDTH, LABELS = 64, 384, 10
TRAIN, QUERIES, RUNS = 400, 200, 4


def middle_task():
    """Classification by a network of two hidden layers, 180 thousand weights."""
    keys = jax.random.split(jax.random.key(0), 5)
    inputs = jax.random.normal(keys[0], (TRAIN + QUERIES, INPUTS))
    data = {"x": inputs, "y": jax.random.randint(keys[1], (len(inputs),), 0, LABELS)}
    sizes = [(WIDTH, INPUTS), (WIDTH, WIDTH), (LABELS, WIDTH)]

    def loss(params, example):
        hidden = example["x"]
        for weights in params[:-1]:
            hidden = jnp.tanh(weights @ hidden)
        return -jax.nn.log_softmax(params[-1] @ hidden)[example["y"]]

    return Task(
        params=[
            jax.random.normal(key, size) / jnp.sqrt(size[1])
            for key, size in zip(keys[2:], sizes, strict=True)
        ],
        loss=loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=range(TRAIN),
        query_ids=range(QUERIES),
    )


def bare_loop(task, optimizer):
    """The whole of a run as one ``lax.scan``: a step, then all queries; no empty slots."""
    evaluate = jax.vmap(task.loss, in_axes=(None, 0))

    def batch_loss(params, members):
        return evaluate(params, jax.tree.map(lambda leaf: leaf[members], task.train)).mean()

    def step(state, members):
        params, memory = state
        updates, memory = optimizer.update(jax.grad(batch_loss)(params, members), memory, params)
        params = optax.apply_updates(params, updates)
        return (params, memory), evaluate(params, task.query)

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    return lambda curricula: [np.asarray(run(task.params, one)) for one in curricula]


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_record_against_the_bare_loop(benchmark, tmp_path):
    """Compilation and the making of the store are in both ways' cost once: a recording of one
    short run is taken off, so that what is left is the cost of the steps."""
    task = middle_task()
    optimizer = optax.inject_hyperparams(optax.adamw)(1e-3)
    curricula = np.stack(
        [
            random_subset_epochs(TRAIN, per_run=384, batch_size=8, epochs=20, key=key)
            for key in jax.random.split(jax.random.key(1), RUNS)
        ]
    )
    loop, stores = bare_loop(task, optimizer), itertools.count()

    def recording(some):
        store = tmp_path / f"{next(stores)}.zarr"
        return lambda: record(task, some, optimizer, store=store)

    short = curricula[:1]
    expected = loop(short)[0]
    runs = recording(short)()
    np.testing.assert_allclose(runs["loss"][0, 1:], expected, rtol=1e-3, atol=1e-3)
    pairs = []
    for _ in range(5):
        bare = seconds_of(lambda: loop(curricula)) - seconds_of(lambda: loop(short))
        ours = seconds_of(recording(curricula)) - seconds_of(recording(short))
        pairs.append((ours, bare))
    ours, bare = np.median(pairs, axis=0)
    whole = seconds_of(recording(curricula))
    ratio = ours / bare
    benchmark.extra_info.update(ratio=ratio, record_seconds=ours, loop_seconds=bare, whole=whole)
    print(
        f"\nrecord against the bare loop: ratio {ratio:.3f} (goal <= 1.05), "
        f"{ours:.2f} s / {bare:.2f} s for {RUNS - 1} runs of {curricula.shape[1]} steps; "
        f"a whole call with compilation {whole:.2f} s",
        end="",
    )
    benchmark.pedantic(recording(curricula), rounds=1)
