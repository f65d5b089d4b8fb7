"""Ranks and the test of their uniformity, on ranks whose law is known."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest, chisquare, norm

from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.ranks import (
    even_bins,
    rank_among,
    rank_counts,
    rank_histogram_test,
)

DRAWS = 99


def ranks_of(rank, draws=DRAWS, **attrs):
    simulations, quantities = rank.shape
    about = {"draws": draws, "bins": even_bins(draws, simulations)}
    return xr.Dataset(
        {"rank": (("simulation", "quantity"), rank, about)},
        {"quantity": [f"q{number}" for number in range(quantities)]},
        attrs,
    )


def uniform(rng, simulations, quantities):
    return rng.integers(0, DRAWS + 1, (simulations, quantities))


def planted(rng, simulations, quantities, shift=0.0, ratio=1.0):
    """Ranks of a normal truth among normal draws with another mean and ``ratio`` times its sd."""
    truth = rng.normal(size=(simulations, quantities))
    return rng.binomial(DRAWS, norm.cdf((truth - shift) / ratio))


def test_a_rank_counts_the_draws_below(key):
    draws = np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]])
    assert rank_among(draws, np.array([2.5, 0.0]), key=key).tolist() == [2, 0]
    assert rank_among(draws, np.array([9.0, 6.5]), key=key).tolist() == [3, 2]


def test_ties_are_broken_evenly(key):
    draws = np.concatenate([np.zeros((1, 6000)), np.ones((3, 6000)), np.full((1, 6000), 2.0)])
    ranks = rank_among(draws, np.ones(6000), key=key)
    counts = np.bincount(ranks, minlength=6)
    assert counts[[0, 5]].tolist() == [0, 0]
    assert chisquare(counts[1:5]).pvalue > 1e-3


def test_bins_hold_equally_many_ranks():
    for draws, simulations in ((99, 400), (19, 30), (63, 100), (8, 50)):
        bins = even_bins(draws, simulations)
        every = np.arange(draws + 1)[:, None]
        assert 2 <= bins <= 10
        assert set(rank_counts(every, draws, bins)[0]) == {(draws + 1) // bins}
    assert even_bins(100, 400) == 1


@pytest.mark.parametrize("simulations", [100, 400])
def test_right_ranks_fail_as_seldom_as_stated(rng, simulations):
    p_values = rank_histogram_test(ranks_of(uniform(rng, simulations, 20000))).p_values
    for level in (0.01, 0.001):
        alarms = int((p_values < level).sum())
        # The documented range, with room.
        assert binomtest(alarms, 20000, 1.5 * level, "greater").pvalue > 1e-3
        assert binomtest(alarms, 20000, 0.5 * level, "less").pvalue > 1e-3


@pytest.mark.parametrize(
    ("error", "sentence", "power"),
    [
        ({"shift": -0.4}, "too low", 0.85),
        ({"shift": 0.4}, "too high", 0.85),
        ({"ratio": 0.7}, "too narrow", 0.9),
        ({"ratio": 1.5}, "too wide", 0.95),
    ],
)
def test_the_documented_power_at_200_simulations(rng, error, sentence, power):
    wrong = planted(rng, 200, 300, **error)
    p_values = rank_histogram_test(ranks_of(wrong)).p_values
    # 1% over 100 quantities; the sd of the share over 300 of them is 0.02.
    assert (p_values < 1e-4).mean() > power - 0.07
    among = uniform(rng, 200, 5)
    far = {name: 2 * size if name == "shift" else size**2 for name, size in error.items()}
    among[:, 3:4] = planted(rng, 200, 1, **far)
    test = rank_histogram_test(ranks_of(among), false_alarm=1e-4)
    assert not test.ok
    assert "Ranks of 1 of 5 quantities" in test.sentence
    assert f"q3 (the posterior is {sentence}" in test.sentence


def test_another_shape_is_seen_too(rng):
    """Two clumps with the mean and spread of uniform ranks."""
    rank = np.where(rng.random((200, 1)) < 0.5, 21, 78) + rng.integers(-4, 5, (200, 1))
    test = rank_histogram_test(ranks_of(rank))
    assert not test.ok and "another shape" in test.sentence


def test_the_rate_is_over_all_quantities_together(rng):
    failed = [
        not rank_histogram_test(ranks_of(uniform(rng, 100, 30)), false_alarm=0.1).ok
        for _ in range(400)
    ]
    assert binomtest(sum(failed), 400, 0.15, "greater").pvalue > 1e-3
    assert binomtest(sum(failed), 400, 0.05, "less").pvalue > 1e-3


def test_a_good_sentence_and_its_caveats(rng):
    test = rank_histogram_test(ranks_of(uniform(rng, 100, 3)))
    assert test.ok and test.false_alarm == 0.01
    assert str(test) == (
        "Ranks of 3 quantities look uniform over 100 simulations (false-alarm rate 0.01)."
    )
    assert test.p_values["quantity"].values.tolist() == ["q0", "q1", "q2"]
    ranks = ranks_of(uniform(rng, 100, 3), failed_verdicts=4, short_chains=7)
    sentence = str(rank_histogram_test(ranks))
    assert "4 fits asked for attention." in sentence
    assert "In 7 simulations a chain had fewer effective draws" in sentence


def test_too_few_simulations_are_refused(rng):
    with pytest.raises(Misuse, match=r"ranks: got 19 simulations; expected at least 20"):
        rank_histogram_test(ranks_of(uniform(rng, 19, 1)))
    with pytest.raises(Misuse, match="false_alarm"):
        rank_histogram_test(ranks_of(uniform(rng, 30, 1)), false_alarm=1.0)
