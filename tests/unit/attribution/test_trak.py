"""TRAK against its formula on whole gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.trak import newton_effects, trak
from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors
from bayes_simfluence.recording.features import random_signs, sketched
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY, DIMENSIONS = 9, 4, 5


def logits(params, example):
    return params["v"] @ jnp.tanh(params["w"] @ example["x"])


def classified(params, example):
    return -jax.nn.log_softmax(logits(params, example))[example["label"]]


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(2)
    count = TRAIN + QUERY
    data = {
        "x": jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, count)),
    }
    return Task(
        params={
            "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            "v": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        },
        loss=classified,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=list("abcdefghi"),
        query_ids=list("wxyz"),
    )


@pytest.fixture(scope="module")
def checkpoints(task):
    places = [jax.tree.map(lambda leaf, at=at: leaf - 0.2 * at, task.params) for at in range(2)]
    nan = float("nan")
    return [SavedWeights(at + 1, nan, named_tensors(weights)) for at, weights in enumerate(places)]


def log_odds(params, example):
    """Of the right label, written out."""
    scores = logits(params, example)
    label = example["label"]
    others = jnp.where(jnp.arange(3) == label, -jnp.inf, scores)
    return scores[label] - jax.nn.logsumexp(others)


def dense(task, checkpoints, key, damping):
    """The scores by the paper's formula, one gradient after the other."""
    signs = random_signs(task.params, key)
    total, wrong = 0.0, []
    for saved in checkpoints:

        def rows(data, count, params=saved.tensors):
            sketches, errors = [], []
            for at in range(count):
                example = jax.tree.map(lambda leaf, at=at: leaf[at], data)
                gradient = jax.grad(log_odds)(params, example)
                sketches.append(np.asarray(sketched(gradient, signs, DIMENSIONS), float))
                errors.append(1.0 - np.exp(-float(classified(params, example))))
            return np.stack(sketches), np.array(errors)

        (phi, train_error), (queries, query_error) = (
            rows(task.train, TRAIN),
            rows(task.query, QUERY),
        )
        square = phi.T @ phi
        added = damping * np.trace(square) / DIMENSIONS * np.eye(DIMENSIONS)
        total = total + phi @ np.linalg.inv(square + added) @ queries.T / len(checkpoints)
        wrong.append((train_error, query_error))
    train_error, query_error = (np.mean(errors, axis=0) for errors in zip(*wrong, strict=True))
    return -total * train_error[:, None], query_error


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_scores_are_those_of_the_formula(task, checkpoints, key, damping):
    expected, errors = dense(task, checkpoints, key, damping)
    given = {"dimensions": DIMENSIONS, "damping": damping, "key": key}
    odds = trak(task, checkpoints, of="log-odds", **given)
    np.testing.assert_allclose(odds, expected, rtol=2e-3, atol=1e-4)
    scores = trak(task, checkpoints, memory=1, **given)
    np.testing.assert_allclose(scores, expected * errors[None], rtol=2e-3, atol=1e-4)
    assert odds.attrs["units"] == "log-odds" and scores.attrs["units"] == "nat"
    assert scores.attrs["damping"] == damping and len(scores.attrs["damping_added"]) == 2
    assert scores.attrs["dimensions"] == DIMENSIONS


def test_an_example_helps_itself(task, checkpoints, key):
    own = dataclasses.replace(task, query=task.train, query_ids=task.train_ids)
    scores = trak(own, checkpoints, dimensions=64, damping=0.1, key=key)
    assert (np.diag(scores) < 0).all()


def test_both_sides_of_the_curvature_give_the_same(rng):
    train, query = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    wide = np.concatenate([train, np.zeros((6, 5))], axis=1)
    (narrow, added), (padded, other) = (
        newton_effects(train, query, 0.2),
        newton_effects(wide, np.concatenate([query, np.zeros((3, 5))], axis=1), 0.2 * 6 / 4),
    )
    assert added == pytest.approx(other)
    np.testing.assert_allclose(narrow, padded, rtol=1e-9)
    expected = train @ np.linalg.inv(train.T @ train + added * np.eye(4)) @ query.T
    np.testing.assert_allclose(narrow, expected, rtol=1e-9)


def test_certain_examples_have_no_effect(task, key):
    """A loss of 0 has no gradient: nothing is divided by it."""
    sure = dataclasses.replace(
        task, loss=lambda params, example: classified(params, example) * (example["x"][0] > 0)
    )
    saved = [SavedWeights(1, 1.0, named_tensors(task.params))]
    scores = trak(sure, saved, dimensions=DIMENSIONS, key=key)
    certain = np.asarray(task.train["x"][:, 0]) <= 0
    assert certain.any() and not certain.all()
    np.testing.assert_allclose(scores.values[certain], 0.0, atol=1e-12)
    assert (np.abs(scores.values[~certain]).max(axis=1) > 0).all()


def test_misuse_is_named(task, checkpoints, key):
    with pytest.raises(Misuse, match="checkpoints: got none"):
        trak(task, [], key=key)
    with pytest.raises(Misuse, match=r"damping: got 0.0 with 9 .* in 12 dimensions.* singular"):
        trak(task, checkpoints, dimensions=12, damping=0, key=key)
    with pytest.raises(Misuse, match="damping: got -1"):
        trak(task, checkpoints, damping=-1, key=key)
    with pytest.raises(Misuse, match="of: got 'margin'"):
        trak(task, checkpoints, of="margin", key=key)
    broken = dict(task.query, x=task.query["x"].at[3].set(jnp.nan))
    wrong = dataclasses.replace(task, query=broken)
    with pytest.raises(Misuse, match="gradient of query example z at step 1"):
        trak(wrong, checkpoints, dimensions=DIMENSIONS, key=key)
