"""The linear datamodeling score: by SciPy's Spearman, with known truths, for simulators too."""

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

import bayes_simfluence as bs
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.attribution.simulators import additive_simulator
from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.subsets import planned_subsets, subsets_from_arrays, subsets_of_runs
from bayes_simfluence.evaluation.lds import (
    linear_datamodeling_score,
    predicted_outcomes,
    simulated_outcomes,
)
from bayes_simfluence.evaluation.synthetic import linear_runs

TRAIN, QUERY, SUBSETS = 12, 5, 30


@pytest.fixture
def scores(rng):
    values = rng.normal(size=(TRAIN, QUERY))
    return score_array(values, list("abcdefghijkl"), list("vwxyz"), method="made", units="nat")


@pytest.fixture
def subsets(scores, rng):
    mask = rng.random((SUBSETS, TRAIN)) < 0.5
    outcome = 3.0 + mask @ scores.values + 2.0 * rng.normal(size=(SUBSETS, QUERY))
    ids = {"train_ids": scores["train"].values, "query_ids": scores["query"].values}
    return subsets_from_arrays(mask, outcome, **ids)


def test_it_is_the_mean_of_spearmans_correlations(scores, subsets, key):
    predicted = predicted_outcomes(scores, subsets["mask"])
    score = linear_datamodeling_score(predicted, subsets["outcome"], key=key)
    each = [
        spearmanr(predicted.values[:, query], subsets["outcome"].values[:, query]).statistic
        for query in range(QUERY)
    ]
    np.testing.assert_allclose(score["by_query"], each)
    np.testing.assert_allclose(score["lds"], np.mean(each))
    assert score["lds_low"] < score["lds"] < score["lds_high"]
    assert score.attrs["method"] == "made" and score.attrs["subsets"] == SUBSETS


def test_the_truth_scores_one_and_its_opposite_minus_one(scores, subsets, key):
    exact = predicted_outcomes(scores, subsets["mask"])
    truth = subsets["outcome"].copy(data=3.0 + 2.0 * exact.values)
    for sign in (1.0, -1.0):
        predicted = predicted_outcomes(sign * scores, subsets["mask"])
        score = linear_datamodeling_score(predicted, truth, key=key, resamples=20)
        for name in ("lds", "lds_low", "lds_high"):
            assert float(score[name]) == pytest.approx(sign)


def test_chance_scores_about_zero(subsets, scores, rng, key):
    chance = scores.copy(data=rng.permuted(scores.values, axis=0))
    score = linear_datamodeling_score(
        predicted_outcomes(chance, subsets["mask"]), subsets["outcome"], key=key
    )
    # Five correlations over 30 subsets: an sd of .09 where they were independent.
    assert abs(float(score["lds"])) < 0.4
    assert score["lds_low"] < 0.35 and score["lds_high"] > -0.35


def test_ids_decide_not_places(scores, subsets, key):
    plain = linear_datamodeling_score(
        predicted_outcomes(scores, subsets["mask"]), subsets["outcome"], key=key
    )
    moved = predicted_outcomes(scores.isel(train=slice(None, None, -1)), subsets["mask"])
    moved = moved.isel(query=[3, 1, 0, 2, 4], subset=np.roll(np.arange(SUBSETS), 5))
    again = linear_datamodeling_score(moved.transpose(), subsets["outcome"], key=key)
    np.testing.assert_allclose(again["by_query"], plain["by_query"])


def test_a_simulator_is_scored_by_its_simulated_outcomes(key):
    runs, truth = linear_runs(key=jax.random.key(1), runs=14, sd_a=1e-6, noise=1e-4, query=4)
    scores = score_array(
        truth.b.T, runs["train"].values.tolist(), runs["query"].values.tolist(),
        method="truth", units="nat",
    )  # fmt: skip
    fitted, held_out = runs.isel(run=slice(0, 6)), runs.isel(run=slice(6, None))
    posterior = additive_simulator(scores, fitted)
    subsets = subsets_of_runs(held_out)
    simulated = simulated_outcomes(posterior, held_out, key=key, draws=3)
    score = linear_datamodeling_score(simulated, subsets["outcome"], key=key, resamples=20)
    assert float(score["lds"]) > 0.99
    # Each example is seen equally often: the sum of scores ranks alike.
    summed = predicted_outcomes(scores, subsets["mask"])
    same = linear_datamodeling_score(simulated, summed, key=key, resamples=20)
    assert float(same["lds"]) > 0.99
    planned = planned_subsets(fitted, subsets["mask"], batch_size=2, epochs=4, key=key)
    again = simulated_outcomes(posterior, planned, key=key, draws=3)
    np.testing.assert_allclose(again, simulated, atol=0.01)
    still = simulated_outcomes(bs.persistence(fitted), held_out, key=key)
    nothing = linear_datamodeling_score(still, subsets["outcome"], key=key, resamples=20)
    assert np.isnan(nothing["lds"]) and np.isnan(nothing["by_query"]).all()


def test_misuse_is_named(scores, subsets, key):
    predicted, outcome = predicted_outcomes(scores, subsets["mask"]), subsets["outcome"]
    with pytest.raises(Misuse, match="predicted: subset: got 29 of them; expected 30"):
        linear_datamodeling_score(predicted.isel(subset=slice(1, None)), outcome, key=key)
    with pytest.raises(Misuse, match="predicted: query: got 4"):
        linear_datamodeling_score(predicted.isel(query=slice(1, None)), outcome, key=key)
    with pytest.raises(Misuse, match="predicted: query: got unknown ids v"):
        renamed = predicted.assign_coords(query=list("Vwxyz"))
        linear_datamodeling_score(renamed, outcome, key=key)
    with pytest.raises(Misuse, match=r"outcomes: got dimensions \('train', 'query'\)"):
        linear_datamodeling_score(predicted, scores, key=key)
    with pytest.raises(Misuse, match="at least three"):
        two = {"subset": [0, 1]}
        linear_datamodeling_score(predicted.isel(two), outcome.isel(two), key=key)
    with pytest.raises(Misuse, match="unknown ids l"):
        predicted_outcomes(scores.isel(train=slice(0, 11)), subsets["mask"])
