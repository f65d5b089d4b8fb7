"""Sums over pairs of examples against the design written out row by row."""

import numpy as np
import pytest

from bayes_simfluence.inference.regression import Form, coefficients, eigen, moments
from bayes_simfluence.model.arrays import RunArrays, no_features

RUNS, STEPS, SLOTS, TRAIN, QUERY = 3, 6, 3, 5, 2


def recorded(rng):
    batch = rng.integers(-1, TRAIN, (RUNS, STEPS, SLOTS))
    batch[0, 0], batch[0, 1], batch[1, 2], batch[2, 3] = -1, [2, 2, 2], [1, 1, -1], [4, 0, 4]
    loss = rng.uniform(0.2, 2.0, (RUNS, STEPS + 1, QUERY))
    weight = rng.uniform(0.5, 2.0, batch.shape)
    return RunArrays.of(batch, loss, weight=weight, features=no_features(TRAIN, QUERY))


def written_out(runs, form, query):
    """Design and target of one query, one row per step."""
    design, target = [], []
    for batch, own, loss in zip(runs.batch, runs.weight, runs.loss[..., query], strict=True):
        for members, weights, before, after in zip(batch, own, loss[:-1], loss[1:], strict=True):
            filled = members >= 0
            weight = np.bincount(members[filled], weights[filled], TRAIN)
            weight = weight if form.counted else weight / (weight.sum() or 1.0)
            parts = {"linear": [before, 1.0], "additive": [1.0], "multiplicative": [before]}
            design.append(np.concatenate([part * weight for part in parts[form.kind]]))
            target.append(after - form.keep * before)
    return np.array(design), np.array(target)


@pytest.mark.parametrize("kind", ["linear", "additive", "multiplicative"])
@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_moments_are_those_of_the_design(rng, kind, keep, count, scaled):
    runs, form = recorded(rng), Form(kind, keep, count)
    found = moments(runs, form, scaled=scaled)
    assert found.rows == RUNS * STEPS
    size = np.sqrt(np.mean(runs.loss[:, 0] ** 2, axis=0))
    for query in range(QUERY):
        design, target = written_out(runs, form, query)
        unit = {"linear": [size[query], 1.0], "additive": [1.0], "multiplicative": [size[query]]}
        unit = np.repeat(unit[kind] if scaled else np.ones(len(unit[kind])), TRAIN)
        np.testing.assert_allclose(found.unit[query], unit, rtol=1e-12)
        np.testing.assert_allclose(
            found.gram[query], (design / unit).T @ (design / unit), rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(
            found.cross[query], (design / unit).T @ target, rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(found.square[query], target @ target, rtol=1e-12)


def test_the_eigenbasis_solves_the_ridge_problem(rng):
    found = moments(recorded(rng), Form("linear", 1.0, False), scaled=False)
    solved = eigen(found)
    for query in range(QUERY):
        expected = np.linalg.solve(found.gram[query] + 0.1 * np.eye(2 * TRAIN), found.cross[query])
        weights = solved.vectors[query] @ (solved.cross[query] / (solved.values[query] + 0.1))
        np.testing.assert_allclose(weights, expected, rtol=1e-8)
    assert (solved.values >= 0).all()


@pytest.mark.parametrize("kind", ["linear", "additive", "multiplicative"])
def test_weights_are_named_a_and_b(rng, kind):
    form = Form(kind, 1.0, False)
    weights = rng.normal(size=(QUERY, TRAIN * len(form.powers)))
    a, b = coefficients(weights, form)
    zero = np.zeros((QUERY, TRAIN))
    expected = {
        "linear": (weights[:, :TRAIN], weights[:, TRAIN:]),
        "additive": (zero, weights),
        "multiplicative": (weights, zero),
    }[kind]
    np.testing.assert_array_equal(a, expected[0])
    np.testing.assert_array_equal(b, expected[1])
