"""TracIn against gradients one by one, and against what small steps of SGD really do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bayes_simfluence.attribution.adam import AdamDiagonal, second_moments
from bayes_simfluence.attribution.gradients.per_example import flat
from bayes_simfluence.attribution.tracin import grad_cos, grad_dot, self_influence, tracin
from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.store import open_store
from bayes_simfluence.model.arrays import exposures
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors, open_checkpoints
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Evaluation
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY, STEPS = 6, 4, 5


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(TRAIN + QUERY, 3)).astype("f4")
    data = {"x": jnp.asarray(inputs), "y": jnp.asarray(np.sin(inputs.sum(axis=1)))}

    def loss(params, example):
        return (jnp.tanh(params["w"] @ example["x"]) @ params["v"] - example["y"]) ** 2

    return Task(
        params={
            "w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
            "v": jnp.asarray(rng.normal(size=5), jnp.float32),
        },
        loss=loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=list("abcdef"),
        query_ids=list("wxyz"),
    )


@pytest.fixture(scope="module")
def checkpoints(task):
    """Three places near the initial weights."""
    places = [jax.tree.map(lambda leaf, at=at: leaf + 0.1 * at, task.params) for at in range(3)]
    return [
        SavedWeights(at + 1, size, named_tensors(weights))
        for at, (weights, size) in enumerate(zip(places, (0.3, 0.2, 0.05), strict=True))
    ]


def gradients(task, params):
    slope = jax.grad(task.loss)

    def rows(data, count):
        examples = [jax.tree.map(lambda leaf, at=at: leaf[at], data) for at in range(count)]
        return np.stack([np.asarray(flat(slope(params, example)), float) for example in examples])

    return rows(task.train, TRAIN), rows(task.query, QUERY)


def test_tracin_is_the_sum_of_equation_1(task, checkpoints):
    expected, own = np.zeros((TRAIN, QUERY)), np.zeros(TRAIN)
    for saved in checkpoints:
        train, query = gradients(task, saved.tensors)
        expected -= saved.step_size * train @ query.T
        own += saved.step_size * (train**2).sum(axis=1)
    scores = tracin(task, checkpoints)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert scores.attrs["units"] == "nat" and scores.attrs["checkpoint_steps"] == [1, 2, 3]
    assert scores.attrs["preconditioner"] == "none" and scores.attrs["step_sizes"] == [
        0.3,
        0.2,
        0.05,
    ]
    selves = self_influence(task, checkpoints)
    np.testing.assert_allclose(selves, own, rtol=1e-4)
    assert selves.dims == ("train",) and selves.attrs["sign"].startswith("positive")


def test_gradient_similarities(task, checkpoints):
    for params in (None, jax.tree.map(lambda leaf: leaf + 0.1, task.params)):
        train, query = gradients(task, params or task.params)
        dots = train @ query.T
        np.testing.assert_allclose(grad_dot(task, params), -dots, rtol=1e-4, atol=1e-5)
        norms = np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(query, axis=1)
        np.testing.assert_allclose(grad_cos(task, params), -dots / norms, rtol=1e-4, atol=1e-5)
    flat_task = dataclasses.replace(task, params=jax.tree.map(jnp.zeros_like, task.params))
    # No gradient at all where both layers are zero and the target is: 0, not NaN.
    assert np.isfinite(grad_cos(flat_task)).all()


def recorded(task, folder, *, optimizer, batch):
    """One run with the weights of every step, and its losses."""
    record(
        task,
        batch[None],
        optimizer,
        store=folder,
        step_size=0.001,
        evaluation=Evaluation(checkpoints=len(batch)),
        features=0,
    )
    runs = open_store(folder)
    return open_checkpoints(folder, runs["run"].values[0]), runs["loss"].values[0].astype(float)


def shares_of(batch, weight=None):
    """How much of each batch is each example, step by step."""
    weight = np.ones(batch.shape) if weight is None else weight
    own = [np.where(batch == example, weight, 0.0).sum(axis=1) for example in range(TRAIN)]
    return np.stack(own, axis=1) / weight.sum(axis=1, keepdims=True)


def test_every_step_of_sgd_adds_up_to_the_first_order_change(task, tmp_path):
    batch = np.random.default_rng(3).integers(0, TRAIN, (STEPS, 2))
    saved, loss = recorded(task, tmp_path / "runs.zarr", optimizer=optax.sgd(0.001), batch=batch)
    assert len(saved) == STEPS
    scores = tracin(task, saved, exposures=shares_of(batch))
    change = loss[-1] - loss[0]
    np.testing.assert_allclose(scores.sum("train"), change, rtol=0.03, atol=2e-5)
    assert np.abs(change).max() > 1e-3
    # Whole exposures, and scores of the sum of all steps, are another thing.
    assert not np.allclose(tracin(task, saved).sum("train"), change, rtol=0.5)


def test_every_step_of_weighted_batches(task):
    """Plain gradient descent on the weighted mean of each batch's losses."""
    rng, rate = np.random.default_rng(3), 0.001
    batch, weight = rng.integers(0, TRAIN, (STEPS, 2)), rng.uniform(0.2, 3.0, (STEPS, 2))
    losses = jax.vmap(task.loss, (None, 0))
    slope = jax.grad(lambda params, rows, weight: jnp.average(losses(params, rows), weights=weight))
    params, saved = task.params, []
    for step, (members, share) in enumerate(zip(batch, weight, strict=True)):
        saved.append(SavedWeights(step + 1, rate, named_tensors(params)))
        rows = jax.tree.map(lambda leaf, at=members: leaf[at], task.train)
        gradient = slope(params, rows, jnp.asarray(share, jnp.float32))
        params = jax.tree.map(lambda value, g: value - rate * g, params, gradient)
    change = losses(params, task.query) - losses(task.params, task.query)
    shares = np.asarray(exposures(jnp.asarray(batch), jnp.asarray(weight), TRAIN))
    scores = tracin(task, saved, exposures=shares)
    np.testing.assert_allclose(scores.sum("train"), change, rtol=0.03, atol=2e-5)
    equal = tracin(task, saved, exposures=shares_of(batch)).sum("train")
    assert not np.allclose(equal, change, rtol=0.03, atol=2e-5)
    np.testing.assert_allclose(shares, shares_of(batch, weight), rtol=1e-5)


def test_every_step_of_adam_too(task, tmp_path):
    """Without momentum, and with second moments of the steps themselves, it is exact as well."""
    batch = np.random.default_rng(3).integers(0, TRAIN, (STEPS, 2))
    rule = optax.chain(optax.scale_by_rms(decay=0.9, eps=0.0, initial_scale=1.0), optax.sgd(0.001))
    saved, loss = recorded(task, tmp_path / "runs.zarr", optimizer=rule, batch=batch)
    moments, running = [], jax.tree.map(jnp.ones_like, task.params)
    slope = jax.grad(lambda params, rows: jax.vmap(task.loss, (None, 0))(params, rows).mean())
    for weights, members in zip(saved, batch, strict=True):
        rows = jax.tree.map(lambda leaf, at=members: leaf[at], task.train)
        gradient = slope(weights.tensors, rows)
        running = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, running, gradient)
        moments.append(running)
    diagonal = AdamDiagonal(batch_size=2, moments=moments)
    given = {"exposures": shares_of(batch), "preconditioner": diagonal}
    scores = tracin(task, saved, **given)
    np.testing.assert_allclose(scores.sum("train"), loss[-1] - loss[0], rtol=0.03, atol=2e-5)
    assert scores.attrs["preconditioner"] == "adam"
    assert scores.attrs["second_moments"] == "given" and scores.attrs["epsilon"] == 1e-8


def test_second_moments_are_those_of_all_batches(task, checkpoints):
    from itertools import combinations

    train, query = gradients(task, task.params)
    batches = [train[list(some)].mean(axis=0) for some in combinations(range(TRAIN), 2)]
    squares = np.mean(np.square(batches), axis=0)
    moments = second_moments(task, task.params, batch_size=2, memory=1000)
    np.testing.assert_allclose(moments, squares, rtol=1e-4)
    scores = tracin(task, checkpoints[:1], preconditioner=AdamDiagonal(2, epsilon=0.1))
    expected = -0.3 * (train / (np.sqrt(squares) + 0.1)) @ query.T
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    assert scores.attrs["second_moments"] == "estimated"


def test_progress_is_told(task, checkpoints):
    told = []

    class Heard:
        def work(self, label, total):
            told.append(total)
            from contextlib import nullcontext

            return nullcontext(self)

        def advance(self, amount=1, note=""):
            told.append(-amount)

    tracin(task, checkpoints, progress=Heard())
    assert sum(told) == 0 and told[0] == 3 * TRAIN * QUERY


def test_misuse_is_named(task, checkpoints):
    first = checkpoints[0]
    with pytest.raises(Misuse, match="checkpoints: got none"):
        tracin(task, [])
    with pytest.raises(Misuse, match=r"step size of the checkpoints of steps 1: got nan"):
        tracin(task, [first._replace(step_size=float("nan"))])
    with pytest.raises(Misuse, match=r"step 1: got tensors that differ"):
        self_influence(task, [first._replace(tensors={"w": first.tensors["w"]})])
    with pytest.raises(Misuse, match=r"exposures: got shape \(1, 6\)"):
        tracin(task, checkpoints, exposures=np.ones((1, TRAIN)))
    with pytest.raises(Misuse, match="batch_size: got 7"):
        tracin(task, checkpoints, preconditioner=AdamDiagonal(7))
    with pytest.raises(Misuse, match="1 second moments for 3 checkpoints"):
        tracin(task, checkpoints, preconditioner=AdamDiagonal(2, moments=[first.tensors]))
    with pytest.raises(Misuse, match=r"moments\[0\]: got numbers below 0"):
        tracin(task, [first], preconditioner=AdamDiagonal(2, moments=[first.tensors]))
    with pytest.raises(Misuse, match=r"moments\[0\]: got other arrays"):
        tracin(task, [first], preconditioner=AdamDiagonal(2, moments=[{}]))


def test_an_example_without_finite_gradient_is_named(task, checkpoints):
    broken = dict(task.train, y=task.train["y"].at[2].set(jnp.inf))
    wrong = dataclasses.replace(task, train=broken)
    for work in (
        lambda: tracin(wrong, checkpoints),
        lambda: self_influence(wrong, checkpoints),
        lambda: tracin(wrong, checkpoints, preconditioner=AdamDiagonal(2)),
    ):
        with pytest.raises(Misuse, match="gradient of train example c at step 1"):
            work()
    query = dict(task.query, y=task.query["y"].at[1].set(jnp.nan))
    with pytest.raises(Misuse, match="gradient of query example x at the initial weights"):
        grad_dot(dataclasses.replace(task, query=query))
