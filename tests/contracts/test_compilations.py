"""How many programs are compiled on the way from runs to a comparison: few, and each once."""

import dataclasses
import gc
import weakref
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayes_simfluence as bs
from bayes_simfluence.attribution.influence.influence_functions import (
    EKFAC,
    ConjugateGradient,
    Dense,
    InGram,
    LiSSA,
    influence,
)
from bayes_simfluence.networks.layers import dense
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Evaluation, Placement
from bayes_simfluence.tasks.task import Task

COMPILED = "/jax/core/compile/backend_compile_duration"
KEY = jax.random.key(0)


@pytest.fixture
def counted():
    """``with counted(at_most): ...`` checks how many programs the block compiles."""
    compiled = []
    listeners = [lambda name, _, **about: compiled.append(name) if name == COMPILED else None]
    jax.monitoring.register_event_duration_secs_listener(listeners[0])

    @contextmanager
    def counting(at_most):
        before = len(compiled)
        yield
        assert len(compiled) - before <= at_most

    yield counting
    jax.monitoring.unregister_event_duration_listener(listeners[0])


@pytest.fixture(scope="module")
def recording():
    """Of a size that no other test has, in a process that has compiled nothing yet."""
    # Small programs of other tests, and how full the caches are, would change the numbers.
    jax.clear_caches()
    few = {"run": slice(0, 7), "step": slice(0, 11), "time": slice(0, 12), "query": slice(0, 3)}
    return bs.example_runs().isel(few)


def test_the_counter_sees_a_compilation(counted):
    with pytest.raises(AssertionError), counted(0):
        jax.jit(lambda x: x + 17)(1.0)


@pytest.mark.filterwarnings("ignore::bayes_simfluence.FitWarning")
@pytest.mark.filterwarnings("ignore:.*unseen examples:bayes_simfluence.SupportWarning")
def test_fit_simulate_compare(counted, recording):
    """Measured: 17, 6 and 1 programs (126, 56 and 1 in version 0.1)."""
    fitted, held_out = recording.isel(run=slice(0, 5)), recording.isel(run=slice(5, 7))
    other_key = jax.random.key(1)  # makes programs of its own
    with counted(at_most=25):
        posterior = bs.fit(fitted, key=KEY)
    with counted(at_most=10):
        posterior.simulate(held_out, key=KEY, draws=20)
    with counted(at_most=5):
        bs.compare({"bayes": posterior}, held_out, key=KEY, draws=20)
    with counted(at_most=0):
        posterior.simulate(held_out.isel(run=[1, 0]), key=other_key, draws=20)
        bs.fit(fitted, key=other_key)


@pytest.mark.parametrize(
    "method",
    [bs.NUTS(warmup=2, draws=2, chains=1, max_tree_depth=1), bs.SVI(steps=2, draws=2)],
    ids=["NUTS", "SVI"],
)
@pytest.mark.filterwarnings("ignore::bayes_simfluence.FitWarning")
def test_sampled_posteriors_compile_once(counted, recording, method):
    """Another recording of the same shape compiles nothing: not the fit, nor what is made of it."""

    def whole_way(runs, key):
        posterior = bs.fit(runs, method=method, key=key)
        posterior.simulate(runs, key=key, draws=2)
        posterior.samples(key=key, draws=2)
        posterior.to_arviz(draws=2, groups=["log_likelihood"])

    other_key = jax.random.key(1)  # makes programs of its own
    whole_way(recording.isel(run=slice(0, 3)), KEY)
    with counted(at_most=0):
        whole_way(recording.isel(run=slice(3, 6)), other_key)


def small_task():
    """Of shapes that no other test has; every call makes its arrays anew, of the same functions."""
    inputs = np.random.default_rng(0).normal(size=(17, 3)).astype("f4")
    data = {"x": jnp.asarray(inputs), "y": jnp.asarray(inputs[:, 0] > 0, int)}
    return Task(
        params={"b.weight": jnp.ones((2, 3)), "b.bias": jnp.zeros(2)},
        loss=small_loss,
        train=jax.tree.map(lambda leaf: leaf[:13], data),
        query=jax.tree.map(lambda leaf: leaf[13:], data),
        train_ids=range(13),
        query_ids=range(4),
        outputs=logits,
        output_loss=nats,
    )


def logits(weights, example):
    return dense(weights, "b", example["x"])


def nats(outputs, example):
    return -jax.nn.log_softmax(outputs)[example["y"]]


def small_loss(weights, example):
    return nats(logits(weights, example), example)


@pytest.mark.parametrize(
    "solver",
    [EKFAC(), ConjugateGradient(), Dense(), InGram(), LiSSA(depth=3), InGram(ConjugateGradient())],
    ids=str,
)
def test_influence_compiles_once(counted, solver):
    other_key = jax.random.key(1)
    influence(small_task(), solver=solver, key=KEY)
    again = small_task()
    with counted(at_most=0):
        influence(again, solver=solver, key=other_key)


@pytest.mark.parametrize("placement", [{}, {"parallel": "auto"}, {"parallel": 2, "accumulate": 2}])
def test_recording_compiles_once(counted, tmp_path, placement):
    """For other weights and curricula; another optimizer is another program."""
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)

    def recorded(name, seed, optimizer, **changes):
        drawn = np.random.default_rng(seed).integers(13, size=(4, 7, 5))
        task = dataclasses.replace(small_task(), **changes)
        evaluation, where = Evaluation(checkpoints=2), Placement(only=np.arange(4), **placement)
        return record(
            task,
            drawn,
            optimizer,
            store=tmp_path / name,
            evaluation=evaluation,
            placement=where,
        )

    first = recorded("first", 0, optimizer)
    other = jax.tree.map(lambda leaf: leaf + 1, small_task().params)
    with counted(at_most=0):
        second = recorded("second", 1, optimizer, params=other)
        again = recorded("again", 0, optimizer)
    assert not np.array_equal(first["loss"], second["loss"])
    np.testing.assert_array_equal(first["loss"], again["loss"])
    steeper = recorded("steeper", 0, optax.inject_hyperparams(optax.sgd)(learning_rate=0.9))
    assert not np.array_equal(first["loss"], steeper["loss"])


def test_recordings_keep_no_arrays_alive(tmp_path):
    """What is compiled and kept has the functions of a task alone."""
    task = small_task()
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves((task.params, task.train, task.query))]
    record(task, np.zeros((1, 2, 1), int), optax.sgd(0.1), store=tmp_path / "runs", step_size=0.1)
    del task
    gc.collect()
    assert not any(ref() is not None for ref in kept)
