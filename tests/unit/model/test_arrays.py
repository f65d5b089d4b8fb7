"""Runs as arrays: what a batch holds of each example, and how runs are cut and rescaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import (
    ExampleFeatures,
    RunArrays,
    example_weights,
    exposures,
    no_features,
)

RUNS, STEPS, SLOTS, TRAIN, QUERY = 3, 7, 4, 5, 2


def shares(batch, weight=None):
    """In double precision; with weights of one if none are given."""
    weight = np.ones(batch.shape) if weight is None else weight
    with double_precision():
        return np.asarray(exposures(jnp.asarray(batch), jnp.asarray(weight, float), TRAIN))


def drawn(rng):
    """Batches, one of them empty, one of a single example."""
    batch = rng.integers(-1, TRAIN, (STEPS, SLOTS))
    batch[2], batch[4] = -1, 3
    return batch, rng.uniform(0.1, 3.0, batch.shape)


def test_exposures_are_the_weights_of_a_mean(rng):
    batch = rng.integers(-1, TRAIN, (STEPS, SLOTS))
    for share, members in zip(shares(batch), batch, strict=True):
        filled = members[members >= 0]
        expected = [np.mean(filled == i) if len(filled) else 0.0 for i in range(TRAIN)]
        assert share == pytest.approx(expected)


def test_exposures_are_the_weights_of_a_weighted_mean(rng):
    batch, weight = drawn(rng)
    effect = rng.normal(size=TRAIN)
    for step, share in enumerate(shares(batch, weight)):
        filled = batch[step] >= 0
        expected = 0.0
        if filled.any():
            expected = np.average(effect[batch[step][filled]], weights=weight[step][filled])
        assert share @ effect == pytest.approx(expected, abs=1e-12)
        assert share.sum() == pytest.approx(float(filled.any()))


def test_weights_of_empty_slots_do_not_count(rng):
    batch, weight = drawn(rng)
    other = np.where(batch < 0, 100.0, weight)
    np.testing.assert_array_equal(shares(batch, other), shares(batch, weight))
    np.testing.assert_array_equal(
        shares(batch, np.where(batch < 0, np.nan, weight)), shares(batch, weight)
    )


def test_a_slot_of_weight_zero_is_an_empty_one(rng):
    batch, weight = drawn(rng)
    batch[0, 1], weight[0, 1] = 2, 0.0
    weight[4] = 0.0
    empty = np.where(weight == 0.0, -1, batch)
    np.testing.assert_array_equal(shares(batch, weight), shares(empty, weight))
    assert (shares(batch, weight)[4] == 0.0).all()


def test_a_slot_of_weight_two_is_two_slots(rng):
    batch, _ = drawn(rng)
    weight = np.ones(batch.shape)
    weight[:, 0] = 2.0
    twice = np.concatenate([batch, batch[:, :1]], axis=1)
    np.testing.assert_allclose(shares(batch, weight), shares(twice), rtol=1e-12)


def test_the_scale_of_a_batchs_weights_changes_nothing(rng):
    batch, weight = drawn(rng)
    scaled = weight * rng.uniform(0.01, 100.0, (STEPS, 1))
    np.testing.assert_allclose(shares(batch, scaled), shares(batch, weight), rtol=1e-12)


def test_weights_of_examples_are_sums_over_slots(rng):
    batch, weight = drawn(rng)
    with double_precision():
        found = example_weights(jnp.asarray(batch), jnp.asarray(weight), TRAIN)
    for step in range(STEPS):
        for example in range(TRAIN):
            expected = weight[step][batch[step] == example].sum()
            assert float(found[step, example]) == pytest.approx(expected)


def test_features_are_used_or_not_and_queries_never_alone():
    known = ExampleFeatures(np.ones((TRAIN, 2)), np.ones((QUERY, 2)))
    for features, used, widths in (
        (known, True, (2, 2)),
        (known, False, (0, 0)),
        (known._replace(query=np.ones((QUERY, 0))), True, (2, 0)),
        (known._replace(train=np.ones((TRAIN, 0))), True, (0, 0)),
        (no_features(TRAIN, QUERY), True, (0, 0)),
    ):
        found = features.where(used)
        assert (found.train.shape, found.query.shape) == ((TRAIN, widths[0]), (QUERY, widths[1]))


def recorded(rng, step_size=True):
    batch = rng.integers(-1, TRAIN, (RUNS, STEPS, SLOTS))
    return RunArrays.of(
        batch,
        rng.uniform(0.5, 1.5, (RUNS, STEPS + 1, QUERY)),
        weight=rng.uniform(0.5, 2.0, batch.shape),
        step_size=rng.uniform(0.1, 0.4, (RUNS, STEPS)) if step_size else None,
        features=no_features(TRAIN, QUERY),
    )


BY_RUN = ("batch", "weight", "step_size", "loss", "progress")


def test_runs_have_weights_of_one_unless_given_and_their_length_as_unit(rng):
    runs = recorded(rng)
    assert (runs.steps, runs.train) == (STEPS, TRAIN)
    np.testing.assert_array_equal(runs.query, np.arange(QUERY))
    np.testing.assert_allclose(runs.progress, np.tile(np.arange(1, 8) / 7, (RUNS, 1)))
    np.testing.assert_array_equal(runs.initial, runs.loss[:, 0])
    assert runs.largest_step_size == runs.step_size.max()
    plain = RunArrays.of(runs.batch, runs.loss, features=runs.features)
    np.testing.assert_array_equal(plain.weight, np.ones(runs.batch.shape))
    assert plain.step_size is None and plain.largest_step_size is None
    still = runs._replace(step_size=np.zeros((RUNS, STEPS)))
    assert still.largest_step_size is None


def test_of_planned_runs_only_the_start_is_known(rng):
    runs = recorded(rng)
    planned = RunArrays.of(runs.batch, runs.loss[:, :1], features=runs.features)
    assert planned.loss.shape == runs.loss.shape
    np.testing.assert_array_equal(planned.initial, runs.initial)
    assert not planned.known.any() and runs.known.all() and runs.known_steps.all()
    runs.loss[1, 3, 0] = np.nan
    known = np.ones((RUNS, STEPS, QUERY), bool)
    known[1, 2, 0] = False
    np.testing.assert_array_equal(runs.known, known)
    np.testing.assert_array_equal(runs.known_steps, known.all(axis=2))


def test_some_runs_are_the_same_ones(rng):
    runs, chosen = recorded(rng), np.array([2, 0, 2])
    taken = runs.take(chosen)
    for name in BY_RUN:
        np.testing.assert_array_equal(getattr(taken, name), getattr(runs, name)[chosen])
    assert taken.query is runs.query and taken.features is runs.features
    assert recorded(rng, step_size=False).take(chosen).step_size is None


def test_some_queries_keep_their_positions_among_the_fitted_ones(rng):
    runs = recorded(rng)._replace(query=np.array([4, 7]))
    turned = runs.of_queries(np.array([1, 0]))
    assert turned.query.tolist() == [7, 4]
    np.testing.assert_array_equal(turned.loss, runs.loss[..., ::-1])
    one = runs.of_queries(np.array([1]))
    assert one.query.tolist() == [7] and one.loss.shape == (RUNS, STEPS + 1, 1)
    assert one.batch is runs.batch


def test_units_are_those_of_the_fitted_runs(rng):
    runs = recorded(rng)
    inside = runs.in_units(4, 0.5)
    np.testing.assert_allclose(inside.progress, np.tile(np.arange(1, 8) / 4, (RUNS, 1)))
    np.testing.assert_allclose(inside.step_size, runs.step_size / 0.5)
    for name in ("batch", "weight", "loss"):
        assert getattr(inside, name) is getattr(runs, name)
    own = runs.in_units(runs.steps, runs.largest_step_size)
    assert own.step_size.max() == 1.0 and own.progress.max() == 1.0


def test_step_sizes_are_needed_only_where_the_fitted_runs_had_them(rng):
    without = recorded(rng, step_size=False)
    for runs in (without, recorded(rng)):
        np.testing.assert_array_equal(runs.in_units(4, None).step_size, np.ones((RUNS, STEPS)))
    with pytest.raises(Misuse, match=r"runs to simulate: got no step_size.*pass step_size=..."):
        without.in_units(4, 0.5)


def test_a_function_of_a_run_is_taken_to_each_of_them(rng):
    runs, start = recorded(rng), rng.normal(size=(RUNS, QUERY))

    def of_run(run, start):
        assert (run.batch.shape, run.steps, run.train) == ((STEPS, SLOTS), STEPS, TRAIN)
        assert run.loss.shape == (STEPS + 1, QUERY) and run.features is runs.features
        return run.exposures(), run.initial + start, run.step_size.sum() + run.progress[-1]

    with double_precision():
        share, moved, total = jax.tree.map(np.asarray, runs.each(of_run, jnp.asarray(start)))
    expected = [shares(*pair) for pair in zip(runs.batch, runs.weight, strict=True)]
    np.testing.assert_allclose(share, expected, rtol=1e-12)
    np.testing.assert_allclose(moved, runs.loss[:, 0] + start, rtol=1e-12)
    np.testing.assert_allclose(total, runs.step_size.sum(axis=1) + 1.0, rtol=1e-12)
    without = recorded(rng, step_size=False)
    assert (np.asarray(without.each(lambda run: jnp.array(run.step_size is None)))).all()
