"""Weights of examples in their batches: against a plain loop, and where they mean nothing new."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.store import append_runs, open_runs
from bayes_simfluence.data.weights import weights_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.recorder import Recorder
from bayes_simfluence.recording.settings import Evaluation, Placement

RATE = 0.1


def recorded(task, curricula, folder, name="runs", **settings):
    store = folder / f"{name}.zarr"
    settings = {"step_size": RATE, "features": 0, **settings}
    return record(task, curricula, optax.sgd(RATE), store=store, **settings)


def close(runs, expected):
    np.testing.assert_allclose(runs["loss"], expected, rtol=2e-4, atol=1e-5)


@pytest.fixture(scope="module")
def weights(curricula):
    """Weights of several orders of magnitude, some 0; every batch with examples has some."""
    rng = np.random.default_rng(2)
    drawn = np.exp(2 * rng.normal(size=curricula.shape)).astype(np.float32)
    drawn[rng.random(curricula.shape) < 0.2] = 0.0
    filled = curricula >= 0
    drawn[(np.where(filled, drawn, 0).sum(axis=2) == 0)] = 1.0
    assert (drawn[filled] == 0).any()
    return drawn


@pytest.fixture(scope="module")
def expected(squares, curricula, weights):
    """The definition: a gradient step on the weighted mean of the losses of a batch."""
    everything = jax.jit(
        lambda params: jax.vmap(squares.loss, in_axes=(None, 0))(params, squares.query)
    )
    per_example = jax.jit(jax.vmap(jax.grad(squares.loss), in_axes=(None, 0)))
    rows = []
    for curriculum, weight in zip(curricula, weights, strict=True):
        params, losses = squares.params, [everything(squares.params)]
        for members, shares in zip(curriculum, weight, strict=True):
            gradients = per_example(params, squares.train)
            total = np.zeros(len(squares.train_ids))
            for member, share in zip(members, shares, strict=True):
                total[member] += share if member >= 0 else 0.0
            mean = jnp.asarray(total / max(total.sum(), 1e-30), jnp.float32)
            slope = jax.tree.map(lambda leaf, mean=mean: jnp.tensordot(mean, leaf, 1), gradients)
            params = jax.tree.map(lambda leaf, step: leaf - RATE * step, params, slope)
            losses.append(everything(params))
        rows.append(np.stack(losses))
    return np.stack(rows)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(),
        Placement(parallel=2),
        Placement(accumulate=3),
        Placement(accumulate=4, parallel=3, query_chunk=3),
        Placement(accumulate=2, remat=True),
    ],
)
def test_a_weighted_step_is_one_on_the_weighted_mean(
    squares, curricula, weights, expected, tmp_path, placement
):
    runs = recorded(squares, curricula, tmp_path, weights=weights, placement=placement)
    close(runs, expected)
    np.testing.assert_array_equal(runs["weight"], np.where(curricula < 0, 0, weights))


def test_weights_with_queries_cut_and_measured_now_and_then(
    squares, curricula, weights, expected, tmp_path
):
    padded = {**squares.query, "padding": jnp.ones((4, 20))}
    task = dataclasses.replace(
        squares,
        query=padded,
        query_lengths=[3, 20, 5, 9],
        cut=lambda example, length: {**example, "padding": example["padding"][:length]},
    )
    evaluation = Evaluation(evaluate_every=3, checkpoints=2)
    runs = recorded(task, curricula, tmp_path, weights=weights, evaluation=evaluation)
    times = [0, 3, 6, 7]
    close(runs.isel(time=times), expected[:, times])
    assert np.isnan(runs["loss"].values[:, [1, 2, 4, 5]]).all()


def test_a_weight_of_0_is_an_empty_slot(squares, curricula, weights, tmp_path):
    """Bit for bit where both recordings have weights; up to rounding where only one has."""
    dropped = weights == 0
    emptied = np.where(dropped, -1, curricula)
    ones = np.where(dropped, 0.0, 1.0)
    zero = recorded(squares, curricula, tmp_path, "zero", weights=ones)
    empty = recorded(squares, emptied, tmp_path, "empty", weights=ones)
    np.testing.assert_array_equal(zero["loss"], empty["loss"])
    plain = recorded(squares, emptied, tmp_path, "plain")
    close(zero, plain["loss"])
    assert "weight" not in plain


def test_an_example_without_weight_may_have_an_infinite_loss(squares, curricula, tmp_path):
    inputs = squares.train["x"].at[5].set(jnp.inf)
    task = dataclasses.replace(squares, train={**squares.train, "x": inputs})
    curricula = np.where(curricula < 0, 0, curricula)
    weights = np.where(curricula == 5, 0.0, 1.0)
    weights[(weights.sum(axis=2) == 0)] = 1.0
    curricula = np.where((curricula == 5) & (weights == 1.0), 0, curricula)
    runs = recorded(task, curricula, tmp_path, weights=weights)
    assert np.isfinite(runs["loss"]).all()


def test_a_weight_of_2_is_a_slot_repeated_twice(squares, curricula, tmp_path):
    doubled = np.concatenate([curricula, curricula[:, :, :2]], axis=2)
    weights = np.ones(curricula.shape)
    weights[:, :, :2] = 2.0
    twice = recorded(squares, curricula, tmp_path, "twice", weights=weights)
    repeated = recorded(squares, doubled, tmp_path, "repeated")
    close(twice, repeated["loss"])


def test_only_weights_relative_to_one_another_matter(
    squares, curricula, weights, expected, tmp_path
):
    scale = np.exp(3 * np.random.default_rng(3).normal(size=(*curricula.shape[:2], 1)))
    close(recorded(squares, curricula, tmp_path, weights=weights * scale), expected)
    powers = 2.0 ** np.round(np.log2(scale))
    runs = recorded(squares, curricula, tmp_path, "powers", weights=weights * powers)
    close(runs, expected)


def test_resuming_compares_weights(squares, curricula, weights, tmp_path):
    whole = recorded(squares, curricula, tmp_path, "whole", weights=weights)
    with pytest.warns(UserWarning, match="1 of 3 runs recorded so far"):
        recorded(
            squares,
            curricula,
            tmp_path,
            weights=weights,
            resume=True,
            placement=Placement(only=[1]),
        )
    for other in (None, np.ones(curricula.shape), 2 * weights):
        with pytest.raises(Misuse, match="a recording with other weights;"):
            recorded(squares, curricula, tmp_path, weights=other, resume=True)
    again = recorded(squares, curricula, tmp_path, weights=weights, resume=True)
    np.testing.assert_array_equal(again["loss"], whole["loss"])
    recorded(squares, curricula, tmp_path, "plain")
    with pytest.raises(Misuse, match="a recording with other weights;"):
        recorded(squares, curricula, tmp_path, "plain", weights=weights, resume=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights[:, 1:], r"weight: got shape \(3, 6, 4\)"),
        (lambda weights: -1.0 - weights, r"expected finite weights >= 0"),
        (lambda weights: weights + np.nan, r"expected finite weights >= 0"),
        (lambda weights: 0.0 * weights, r"weights that sum to 0 in run 0, step 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(squares, curricula, weights, tmp_path, change, match):
    with pytest.raises(Misuse, match=match):
        recorded(squares, curricula, tmp_path, weights=change(weights))
    assert not (tmp_path / "runs.zarr").exists()


def test_the_recorder_keeps_weights_where_a_run_has_any(tmp_path):
    path = tmp_path / "runs.zarr"
    steps = [(["a", "b"], [0.5, 2.0]), (["c", None], None), ([], None), (["b", None], [3.0, 9.0])]
    with Recorder(path, train_ids=list("abc"), query_ids=["q"], slots=2) as recorder:
        for weighted in (True, False):
            with recorder.run(initial_loss=[1.0]) as run:
                for batch, weight in steps:
                    run.step(batch, [0.5], weights=weight if weighted else None)
            if weighted:
                assert "weight" in open_runs(path)
    runs = open_runs(path)
    kept = [[[0.5, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, 0.0]]]
    equal = [[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]]
    assert runs["weight"].values.tolist() == kept + equal
    with Recorder(tmp_path / "one.zarr", train_ids=3, query_ids=1, initial_loss=[1.0]) as recorder:
        recorder.step([2], [0.5], weights=[4.0])
    assert open_runs(tmp_path / "one.zarr")["weight"].values.tolist() == [[[4.0]]]


def test_unweighted_runs_of_the_recorder_have_no_weights(tmp_path):
    with Recorder(tmp_path / "r.zarr", train_ids=2, query_ids=1, initial_loss=[1.0]) as recorder:
        recorder.step([1], [0.5])
    runs = open_runs(tmp_path / "r.zarr")
    assert "weight" not in runs
    assert weights_of(runs).tolist() == [[[1.0]]]


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], r"weights at step 1 of run 0: got 1\.0 of shape \(1,\); expected a finite weight"),
        ([1.0, -1.0], r"got 1\.0, -1\.0 of shape \(2,\); expected a finite weight >= 0"),
        ([1.0, np.inf], r"got 1\.0, inf of shape"),
        ([0.0, 0.0], r"weights at step 1 of run 0: got weights that sum to 0"),
        ("much", r"that is no array of numbers"),
    ],
)
def test_weights_of_a_step_that_do_not_fit_are_refused_at_once(tmp_path, weights, match):
    with Recorder(tmp_path / "r.zarr", train_ids=2, query_ids=1, initial_loss=[1.0]) as recorder:
        with pytest.raises(Misuse, match=match):
            recorder.step([0, 1], [0.5], weights=weights)
        recorder.step([0, 1], [0.5], weights=[1.0, 3.0])
    assert open_runs(tmp_path / "r.zarr")["weight"].values.tolist() == [[[1.0, 3.0]]]


def test_weighted_runs_are_appended_to_unweighted_ones(squares, curricula, weights, tmp_path):
    recorded(squares, curricula, tmp_path)
    more = recorded(squares, curricula, tmp_path, "more", weights=weights)
    append_runs(more.assign_coords(run=[7, 8, 9]), tmp_path / "runs.zarr")
    both = weights_of(open_runs(tmp_path / "runs.zarr"))
    np.testing.assert_array_equal(both[:3], (curricula >= 0).astype(np.float32))
    np.testing.assert_array_equal(both[3:], more["weight"])
