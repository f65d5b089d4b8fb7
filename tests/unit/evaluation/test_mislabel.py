"""Mislabel detection: analytic curves, scikit-learn's average precision, a known harm."""

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.mislabel import (
    average_precision,
    detection,
    flip_labels,
    probability_of_harm,
)
from bayes_simfluence.evaluation.synthetic import linear_runs

COUNT, WRONG = 200, 40


def ranking(values):
    return xr.DataArray(values, dims="train", coords={"train": np.arange(len(values))}, name="s")


@pytest.fixture
def wrong(rng):
    marks = np.zeros(COUNT, bool)
    marks[rng.choice(COUNT, WRONG, replace=False)] = True
    return marks


def test_flipped_labels_are_wrong_and_the_others_right(key):
    labels = ["a", "b", "c"] * 20
    noisy = flip_labels(labels, 0.25, key=key)
    assert noisy.flipped.sum() == 15
    differs = np.array([new != old for new, old in zip(noisy.labels, labels, strict=True)])
    np.testing.assert_array_equal(differs, noisy.flipped)
    assert set(noisy.labels) == {"a", "b", "c"}
    # Each of the other labels comes up.
    pairs = {pair for pair in zip(labels, noisy.labels, strict=True) if pair[0] != pair[1]}
    assert len(pairs) > 3
    assert flip_labels(labels, 0.25, key=key).labels == noisy.labels
    assert flip_labels([0, 1], 0.01, key=key).flipped.sum() == 1
    with pytest.raises(Misuse, match=r"share: got 1\.0"):
        flip_labels(labels, 1.0, key=key)
    with pytest.raises(Misuse, match="labels: got 1 different"):
        flip_labels(["a"] * 4, 0.5, key=key)


def test_a_perfect_ranking_finds_all_first(wrong, key):
    curves = detection(ranking(wrong + np.linspace(0.0, 0.1, COUNT)), wrong, key=key)
    place = np.arange(1, COUNT + 1)
    np.testing.assert_allclose(curves["precision"], np.minimum(1.0, WRONG / place))
    np.testing.assert_allclose(curves["recall"], np.minimum(place / WRONG, 1.0))
    for name in ("average_precision", "average_precision_low", "average_precision_high"):
        assert float(curves[name]) == 1.0
    assert curves.attrs["share"] == WRONG / COUNT and curves.attrs["ranking"] == "s"


def test_a_constant_ranking_is_a_blind_search(wrong, key):
    curves = detection(ranking(np.zeros(COUNT)), wrong, key=key)
    np.testing.assert_allclose(curves["precision"], WRONG / COUNT)
    assert float(curves["average_precision"]) == pytest.approx(WRONG / COUNT)
    # The share of wrong ones among 200 resampled examples: binomial, central 90%.
    sd = np.sqrt(0.2 * 0.8 / COUNT)
    for end, sign in (("low", -1), ("high", 1)):
        expected = 0.2 + sign * 1.645 * sd
        assert float(curves[f"average_precision_{end}"]) == pytest.approx(expected, abs=0.4 * sd)


def test_average_precision_is_that_of_scikit_learn(rng, wrong):
    metrics = pytest.importorskip("sklearn.metrics")
    for values in (rng.normal(size=COUNT) + wrong, rng.integers(0, 5, COUNT) + 1.0 * wrong):
        expected = metrics.average_precision_score(wrong, values)
        assert average_precision(values.astype(float), wrong) == pytest.approx(expected)
    assert np.isnan(average_precision(np.zeros(3), np.zeros(3, bool)))


def test_bands_hold_the_curve(rng, wrong, key):
    curves = detection(ranking(rng.normal(size=COUNT) + 1.5 * wrong), wrong, key=key)
    for name in ("precision", "recall"):
        inside = (curves[f"{name}_low"] <= curves[name]) & (curves[name] <= curves[f"{name}_high"])
        assert inside.mean() > 0.95
    assert curves["average_precision_low"] < curves["average_precision"]
    assert curves["average_precision"] < curves["average_precision_high"]
    assert float(curves["recall"][-1]) == 1.0


def test_harm_is_the_share_of_draws_above_zero(key):
    runs, truth = linear_runs(key=jax.random.key(2), runs=10, train=10, per_run=6, query=3)
    posterior = bs.fit(runs, model=bs.Simfluence.linear(), key=key)
    harm = probability_of_harm(posterior, key=key, draws=400)
    assert harm.dims == ("train",) and ((harm >= 0) & (harm <= 1)).all()
    drawn = posterior.samples(key=key, draws=400)
    mean = runs["loss"].values.mean(axis=(0, 1))
    effect = np.einsum("cdqn,q->cdn", drawn["a"].values, mean) + drawn["b"].values.sum(axis=2)
    np.testing.assert_allclose(harm, (effect > 0).mean(axis=(0, 1)))
    true = np.einsum("qn,q->n", truth.a, mean) + truth.b.sum(axis=0)
    sure = np.abs(harm - 0.5) > 0.4
    assert sure.any() and ((harm > 0.5) == (true > 0))[sure].mean() > 0.8
    curves = detection(harm, true > 0, key=key, resamples=50)
    assert curves["average_precision"] > curves.attrs["share"]
    for point in (bs.persistence(runs), bs.mean_trajectory(runs)):
        with pytest.raises(Misuse, match="no draws of effects"):
            probability_of_harm(point, key=key, draws=10)


def test_misuse_is_named(wrong, key):
    with pytest.raises(Misuse, match="and 200 marks"):
        detection(ranking(np.zeros(3)), wrong, key=key)
    with pytest.raises(Misuse, match="suspicion of example 1: got nan"):
        detection(ranking(np.array([0.0, np.nan])), [True, False], key=key)
    with pytest.raises(Misuse, match="wrong: got 0 of 2"):
        detection(ranking(np.zeros(2)), [False, False], key=key)
