"""Losses of each step's own examples: those of the task at the weights before the step."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, DIVERGED
from bayes_simfluence.data.store import open_runs, open_store, save_runs, write_run
from bayes_simfluence.data.training import residuals_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.recorder import Recorder
from bayes_simfluence.recording.settings import Evaluation, Placement
from bayes_simfluence.tasks.likelihood import mean_nats, mean_residual
from bayes_simfluence.tasks.task import Task

RATE = 0.1


def recorded(task, curricula, folder, name="runs", optimizer=None, **settings):
    store, optimizer = folder / f"{name}.zarr", optimizer or optax.sgd(RATE)
    settings = {"step_size": RATE, "features": 0, **settings}
    return record(task, curricula, optimizer, store=store, **settings)


@pytest.fixture(scope="module")
def weights(curricula):
    drawn = np.random.default_rng(2).uniform(0.1, 3.0, curricula.shape).astype(np.float32)
    drawn[:, 1, 0] = 0.0
    drawn[np.where(curricula >= 0, drawn, 0).sum(axis=2) == 0] = 1.0
    return drawn


def by_hand(task, curricula, weights):
    """Plain gradient steps on weighted means, one example after the other."""
    value = jax.jit(jax.value_and_grad(task.loss))
    found = np.full(curricula.shape, np.nan)
    for run, (curriculum, shares) in enumerate(zip(curricula, weights, strict=True)):
        params = task.params
        for step, (members, row) in enumerate(zip(curriculum, shares, strict=True)):
            slope, total = jax.tree.map(jnp.zeros_like, params), 0.0
            for slot, (member, share) in enumerate(zip(members, row, strict=True)):
                if member < 0 or share == 0:
                    continue
                example = jax.tree.map(lambda leaf, at=member: leaf[at], task.train)
                found[run, step, slot], gradient = value(params, example)
                slope = jax.tree.map(lambda a, b, w=share: a + w * b, slope, gradient)
                total += share
            if total:
                params = jax.tree.map(lambda a, b, w=total: a - RATE * b / w, params, slope)
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"placement": Placement(parallel=2)},
        {"placement": Placement(accumulate=2)},
        {"placement": Placement(accumulate=3, parallel=2, remat=True)},
        {"evaluation": Evaluation(evaluate_every=3, checkpoints=2)},
    ],
)
def test_each_slots_loss_is_that_before_its_step(
    squares, curricula, weights, tmp_path, weighted, settings
):
    assert (curricula < 0).any()
    shares = weights if weighted else np.ones(curricula.shape)
    given = {"weights": weights} if weighted else {}
    runs = recorded(squares, curricula, tmp_path, **given, **settings)
    expected = by_hand(squares, curricula, shares)
    np.testing.assert_allclose(runs["train_loss"], expected, rtol=2e-4, atol=1e-6)
    assert "train_residual" not in runs
    residuals = np.nan_to_num(1 - np.exp(-expected))
    np.testing.assert_allclose(residuals_of(runs), residuals, rtol=2e-4, atol=1e-6)


@pytest.fixture(scope="module")
def writing():
    """Two tokens of a vocabulary of three; the second counts in every other example."""
    rng = np.random.default_rng(3)
    data = {
        "x": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
        "target": jnp.asarray(rng.integers(0, 3, (8, 2))),
        "counted": jnp.asarray([[True, at % 2 == 0] for at in range(8)]),
    }

    def outputs(params, example):
        return jnp.einsum("tvi,i->tv", params, example["x"])

    def output_loss(logits, example):
        return mean_nats(logits, example["target"], example["counted"])

    return Task(
        params=jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32),
        loss=lambda params, example: output_loss(outputs(params, example), example),
        train=jax.tree.map(lambda leaf: leaf[:6], data),
        query=jax.tree.map(lambda leaf: leaf[6:], data),
        train_ids=list("abcdef"),
        query_ids=list("yz"),
        outputs=outputs,
        output_loss=output_loss,
        output_residual=lambda logits, example: mean_residual(
            logits, example["target"], example["counted"]
        ),
    )


@pytest.mark.parametrize("placement", [Placement(), Placement(accumulate=2, remat=True)])
def test_a_texts_residual_is_the_mean_of_its_tokens(writing, curricula, tmp_path, placement):
    runs = recorded(writing, curricula, tmp_path, placement=placement)
    first, members = runs["train_residual"].values[:, 0], curricula[:, 0]
    logits = np.asarray(jax.vmap(writing.outputs, in_axes=(None, 0))(writing.params, writing.train))
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    target, counted = (np.asarray(writing.train[name]) for name in ("target", "counted"))
    missing = 1 - np.take_along_axis(shares, target[:, :, None], axis=2)[:, :, 0]
    expected = (missing * counted).sum(axis=1) / counted.sum(axis=1)
    expected = np.where(members < 0, np.nan, expected[members])
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    plain = recorded(dataclasses.replace(writing, output_residual=None), curricula, tmp_path, "p")
    np.testing.assert_allclose(runs["loss"], plain["loss"], rtol=1e-5)
    np.testing.assert_allclose(runs["train_loss"], plain["train_loss"], rtol=1e-5)
    stand_in, residual = residuals_of(plain), residuals_of(runs)
    assert (stand_in >= residual - 1e-6).all() and (stand_in > residual + 1e-3).any()


def test_a_residual_needs_the_outputs_it_is_of(writing, squares):
    with pytest.raises(Misuse, match=r"task.outputs: got task.output_residual alone"):
        dataclasses.replace(squares, output_residual=writing.output_residual).validate()
    both = dataclasses.replace(writing, output_residual=lambda logits, example: logits)
    with pytest.raises(Misuse, match=r"task.output_residual: .* expected one number"):
        both.validate()


def test_a_step_that_the_optimizer_skips_leaves_the_run_without_train_losses(
    squares, curricula, tmp_path
):
    unknown = squares.train["y"].at[5].set(jnp.nan)
    task = dataclasses.replace(squares, train={**squares.train, "y": unknown})
    once = np.where(curricula == 5, 0, curricula)
    once[1, 3, 0] = 5
    skipping = optax.apply_if_finite(optax.sgd(RATE), max_consecutive_errors=3)
    runs = recorded(task, once, tmp_path, optimizer=skipping)
    assert (runs["status"] == COMPLETE).all()
    np.testing.assert_array_equal(np.isnan(runs["train_loss"][[0, 2]]), once[[0, 2]] < 0)
    assert np.isnan(runs["train_loss"][1]).all()


def test_a_diverging_run_is_marked_and_its_store_opens(squares, curricula, tmp_path):
    runs = recorded(squares, curricula, tmp_path, optimizer=optax.sgd(1e20))
    assert (runs["status"] == DIVERGED).all()
    assert open_runs(tmp_path / "runs.zarr").identical(runs)


def test_a_store_of_an_earlier_version_opens_and_is_resumed(squares, curricula, tmp_path):
    whole = recorded(squares, curricula, tmp_path, "whole")
    with pytest.warns(UserWarning, match="1 of 3 runs recorded so far"):
        recorded(squares, curricula, tmp_path, placement=Placement(only=[0]))
    path = tmp_path / "runs.zarr"
    earlier = open_store(path).drop_vars("train_loss")
    shutil.rmtree(path)
    save_runs(earlier, path)
    runs = recorded(squares, curricula, tmp_path, resume=True)
    assert "train_loss" not in runs and residuals_of(runs) is None
    np.testing.assert_array_equal(runs["loss"], whole["loss"])


def test_resuming_finishes_what_is_left_with_its_train_losses(squares, curricula, tmp_path):
    whole = recorded(squares, curricula, tmp_path, "whole")
    with pytest.warns(UserWarning, match="1 of 3 runs recorded so far"):
        recorded(squares, curricula, tmp_path, placement=Placement(only=[1]))
    path = tmp_path / "runs.zarr"
    np.testing.assert_array_equal(np.isnan(open_store(path)["train_loss"][[0, 2]]), True)
    runs = recorded(squares, curricula, tmp_path, resume=True)
    np.testing.assert_array_equal(runs["train_loss"], whole["train_loss"])
    assert sorted(file.name for file in (path / "train_loss" / "c").iterdir()) == list("012")
    write_run(path, 0, whole["loss"].values[0], whole["step_size"].values[0])
    np.testing.assert_array_equal(open_store(path)["train_loss"], whole["train_loss"])


def one_run(recorder, steps, *names):
    with recorder.run(initial_loss=[1.0]) as run:
        for batch, losses, residuals in steps:
            given = {"train_losses": losses, "train_residuals": residuals}
            run.step(batch, [0.5], **{name: given[name] for name in names})


def test_the_recorder_keeps_them_where_a_run_has_them(tmp_path):
    path, losses, residuals = tmp_path / "runs.zarr", "train_losses", "train_residuals"
    steps = [
        (["a", "b"], [0.5, 2.0], [0.1, 0.9]),
        (["c", None], [1.0, None], jnp.array([0.5, jnp.nan])),
        ([], [], []),
        (["b"], np.array([3.0]), [1.0]),
    ]
    with Recorder(path, train_ids=list("abc"), query_ids=["q"]) as recorder:
        for names in ((losses,), (), (residuals,), (losses, residuals)):
            one_run(recorder, steps, *names)
    runs, nan = open_runs(path), np.nan
    kept = [[0.5, 2.0], [1.0, nan], [nan, nan], [3.0, nan]]
    unknown = np.full((4, 2), nan)
    np.testing.assert_array_equal(runs["train_loss"], [kept, unknown, unknown, kept])
    shares = np.float32([[0.1, 0.9], [0.5, nan], [nan, nan], [1.0, nan]])
    np.testing.assert_array_equal(runs["train_residual"], [unknown, unknown, shares, shares])
    found = residuals_of(runs)
    np.testing.assert_allclose(found[2], np.nan_to_num(shares))
    np.testing.assert_allclose(found[0], np.nan_to_num(1 - np.exp(-np.array(kept))), rtol=1e-6)
    assert np.isnan(found[1, 0]).all()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"train_losses": [1.0]}, r"train_losses at step 1 of run 0: got 1.0 of shape \(1,\)"),
        ({"train_losses": "much"}, r"train_losses at step 1 .* that is no array of numbers"),
        ({"train_losses": [1.0, 1.0, 1.0]}, r"one number for each of the 3 slots, NaN for empty"),
        ({"train_residuals": [1.5, 0.0, None]}, r"train_residuals at step 1.*in \[0, 1\]"),
        (
            {"train_losses": [-1.0, 0.0, None], "train_residuals": [0.5, 0.5, None]},
            r"train_losses at step 1 of run 0: got -1.0, 0.0, nan; expected losses >= 0",
        ),
    ],
)
def test_what_does_not_fit_a_step_is_refused_at_once(tmp_path, given, match):
    path = tmp_path / "r.zarr"
    with Recorder(path, train_ids=2, query_ids=1, initial_loss=[1.0]) as recorder:
        with pytest.raises(Misuse, match=match):
            recorder.step([0, 1, None], [0.5], **given)
        recorder.step([0, 1, None], [0.5], train_losses=[0.5, 1.5, None])
        with pytest.raises(Misuse, match=r"train_losses at step 2 .* got nothing, but some before"):
            recorder.step([0], [0.5])
        with pytest.raises(Misuse, match=r"train_residuals at step 2 .* got some, but none before"):
            recorder.step([0], [0.5], train_losses=[0.1], train_residuals=[0.1])
        recorder.step([0], [0.5], train_losses=[0.1])
    expected = np.float32([[[0.5, 1.5, np.nan], [0.1, np.nan, np.nan]]])
    np.testing.assert_array_equal(open_runs(path)["train_loss"], expected)


def test_a_train_loss_that_is_not_a_number_marks_the_run(tmp_path):
    path = tmp_path / "r.zarr"
    with Recorder(path, train_ids=2, query_ids=1, initial_loss=[1.0]) as recorder:
        recorder.step([0], [0.5], train_losses=[0.5])
        recorder.step([1], None, train_losses=[np.nan])
    assert open_runs(path)["status"].values.tolist() == [DIVERGED]
