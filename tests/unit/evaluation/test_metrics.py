"""Scores against their definitions written out, and on draws whose truth is known."""

import itertools

import numpy as np
import pytest
import scipy.stats

from bayes_simfluence.evaluation import metrics
from bayes_simfluence.evaluation.metrics import (
    COVERAGES,
    coverage,
    crps,
    last_known,
    log_density,
    pit,
    run_scores,
    spearman,
    spearman_across_runs,
)


def gaussian_crps(mean, sd, truth):
    """The score of a normal prediction, in closed form (Gneiting & Raftery 2007)."""
    norm, z = scipy.stats.norm, (truth - mean) / sd
    return sd * (z * (2.0 * norm.cdf(z) - 1.0) + 2.0 * norm.pdf(z) - 1.0 / np.sqrt(np.pi))


def test_crps_is_the_mean_over_pairs(rng):
    draws, truth = rng.normal(size=(9, 3, 2)), rng.normal(size=(3, 2))
    pairs = [np.abs(left - right) for left, right in itertools.permutations(draws, 2)]
    expected = np.abs(draws - truth).mean(axis=0) - 0.5 * np.mean(pairs, axis=0)
    np.testing.assert_allclose(crps(draws, truth), expected, rtol=1e-12, atol=1e-14)


def test_crps_of_one_draw_is_the_absolute_error(rng):
    draws, truth = rng.normal(size=(1, 4)), rng.normal(size=4)
    np.testing.assert_allclose(crps(draws, truth), np.abs(draws[0] - truth))


def test_crps_is_unbiased_for_the_gaussian_score(rng):
    # 5 standard errors of the mean over points: a false alarm of 6e-7.
    points = 20_000
    mean, sd, truth = rng.normal(size=(3, points))
    sd = np.exp(0.3 * sd)
    expected = gaussian_crps(mean, sd, truth)
    for size in (2, 20):
        missed = crps(mean + sd * rng.normal(size=(size, points)), truth) - expected
        assert abs(missed.mean()) < 5 * missed.std() / np.sqrt(points)


def test_the_gaussian_score_is_the_integral():
    # The definition: the integral of (F(x) - 1{x >= y})^2.
    x = np.linspace(-30, 30, 600_001)
    for mean, sd, truth in ((0.0, 1.0, 0.3), (1.0, 2.5, -2.0)):
        inside = (scipy.stats.norm.cdf(x, mean, sd) - (x >= truth)) ** 2
        score = gaussian_crps(*(np.array([value]) for value in (mean, sd, truth)))
        np.testing.assert_allclose(score[0], np.trapezoid(inside, x), rtol=1e-4)


@pytest.mark.parametrize("size", [39, 199])
@pytest.mark.parametrize("probability", COVERAGES)
def test_coverage_of_exchangeable_draws_is_nominal(rng, size, probability):
    points = 10_000
    inside = coverage(rng.normal(size=(size, points)), rng.normal(size=points), [probability])[0]
    assert set(np.unique(inside)) <= {0.0, 1.0}
    # 5 standard errors: a false alarm of 6e-7.
    assert abs(inside.mean() - probability) < 5 * np.sqrt(0.25 / points)
    narrow = coverage(
        0.5 * rng.normal(size=(size, points)), rng.normal(size=points), [probability]
    )[0]
    assert narrow.mean() < probability - 0.1


def test_coverage_is_between_order_statistics():
    draws = np.arange(1.0, 20.0)[::-1, None]
    for truth, expected in ((1.0, 1), (0.99, 0), (19.0, 1), (19.01, 0)):
        assert coverage(draws, np.array([truth]), [0.90])[0, 0] == expected
    for truth, expected in ((5.0, 1), (4.99, 0), (15.0, 1), (15.01, 0)):
        assert coverage(draws, np.array([truth]), [0.50])[0, 0] == expected


def test_pit_is_uniform_for_exchangeable_draws(rng):
    values = pit(rng.normal(size=(99, 5000)), rng.normal(size=5000))
    counts = np.bincount((values * 10).astype(int), minlength=10)
    # A false alarm of 1e-4; the same test sees draws that are wrong.
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    for wrong in (0.8 * rng.normal(size=(99, 5000)), 0.2 + rng.normal(size=(99, 5000))):
        counts = np.bincount((pit(wrong, rng.normal(size=5000)) * 10).astype(int), minlength=10)
        assert scipy.stats.chisquare(counts).pvalue < 1e-4


def test_pit_is_inside_and_counts_ties_half():
    draws = np.array([[1.0], [2.0], [2.0], [3.0]])
    for truth, below in ((0.0, 0.0), (2.0, 2.0), (2.5, 3.0), (9.0, 4.0)):
        values = pit(draws, np.array([truth]))[0]
        assert values == (below + 0.5) / 5 and 0 < values < 1


def test_the_log_density_is_normal(rng):
    draws, truth = rng.normal(size=(30, 4)), rng.normal(size=4)
    expected = scipy.stats.norm.logpdf(truth, draws.mean(axis=0), draws.std(axis=0, ddof=1))
    np.testing.assert_allclose(log_density(draws, truth), expected)


def test_a_point_has_no_band(rng):
    draws, truth = rng.normal(size=(1, 4)), rng.normal(size=4)
    assert (
        np.isnan(coverage(draws, truth, [0.9])).all() and np.isnan(log_density(draws, truth)).all()
    )


def test_spearman_is_scipys(rng):
    for digits in (0, 1, 8):
        first, second = np.round(rng.normal(size=(2, 25)), digits)
        expected = scipy.stats.spearmanr(first, second).statistic
        np.testing.assert_allclose(spearman(first, second), expected, rtol=1e-12)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_spearman_across_runs_is_the_mean_over_queries_with_an_order(rng):
    mean, truth = rng.normal(size=(2, 7, 4))
    truth[:, 1], mean[:, 3] = 1.0, 2.0
    kept = [scipy.stats.spearmanr(mean[:, query], truth[:, query]).statistic for query in (0, 2)]
    np.testing.assert_allclose(spearman_across_runs(mean, truth), np.mean(kept), rtol=1e-12)
    assert np.isnan(spearman_across_runs(mean[:, [3]], truth[:, [3]]))


def test_the_scores_of_a_run_are_averages_after_time_zero(rng):
    draws, mean, truth = rng.normal(size=(19, 5, 6)), *rng.normal(size=(2, 5, 6))
    scores = run_scores(draws, mean, truth)
    np.testing.assert_allclose(scores["mse"], ((mean - truth)[1:] ** 2).mean())
    np.testing.assert_allclose(scores["mae"], np.abs((mean - truth)[1:]).mean())
    np.testing.assert_allclose(scores["crps"], crps(draws, truth)[1:].mean())
    np.testing.assert_allclose(scores["elpd"], log_density(draws, truth)[1:].mean())
    inside = coverage(draws, truth, [0.90])[0]
    np.testing.assert_allclose(scores["coverage_90"], inside[1:].mean())
    np.testing.assert_allclose(scores["final_coverage_90"], inside[-1].mean())
    np.testing.assert_allclose(
        scores["spearman_query"], scipy.stats.spearmanr(mean[-1], truth[-1]).statistic
    )
    np.testing.assert_allclose(
        scores["spearman_change"],
        scipy.stats.spearmanr(mean[-1] - mean[0], truth[-1] - truth[0]).statistic,
    )
    # Time 0 is given to every method.
    draws[:, 0] += 100.0
    assert run_scores(draws, mean, truth) == scores


def test_only_recorded_points_are_scored(rng):
    draws, truth = rng.normal(size=(30, 6, 4)), rng.normal(size=(6, 4))
    mean = draws.mean(axis=0)
    mean[0] = truth[0]
    known = rng.random((6, 4)) < 0.5
    known[0], known[5], known[1:, 3] = True, [True, False, False, False], False
    known[4, 1:3] = True, False
    known[3, 2] = True
    scores = run_scores(draws, mean, np.where(known, truth, np.nan))
    points = [(time, query) for time, query in np.argwhere(known).tolist() if time > 0]
    error = np.array([mean[point] - truth[point] for point in points])
    np.testing.assert_allclose(scores["mse"], (error**2).mean())
    np.testing.assert_allclose(scores["mae"], np.abs(error).mean())

    def mean_over(points, kernel):
        drawn = np.stack([draws[:, time, query] for time, query in points], axis=1)
        return kernel(drawn, np.array([truth[point] for point in points])).mean(axis=-1)

    np.testing.assert_allclose(scores["crps"], mean_over(points, crps))
    np.testing.assert_allclose(scores["elpd"], mean_over(points, log_density))
    for probability, inside in zip(COVERAGES, mean_over(points, coverage), strict=True):
        np.testing.assert_allclose(scores[f"coverage_{round(100 * probability)}"], inside)
    # The final loss is the last recorded one; the last query has none after time 0.
    ends = [(5, 0), (4, 1), (3, 2)]
    predicted, final = (np.array([side[end] for end in ends]) for side in (mean, truth))
    assert scores["spearman_query"] == pytest.approx(scipy.stats.spearmanr(predicted, final)[0])
    changes = (side - truth[0, :3] for side in (predicted, final))
    assert scores["spearman_change"] == pytest.approx(scipy.stats.spearmanr(*changes)[0])
    inside = mean_over(ends, coverage)[COVERAGES.index(0.90)]
    np.testing.assert_allclose(scores["final_coverage_90"], inside)


def test_the_last_known_time_is_marked_once(rng):
    known = rng.random((7, 50)) < 0.3
    marked = last_known(known)
    for query in range(50):
        expected = np.flatnonzero(known[:, query])[-1:]
        assert np.flatnonzero(marked[:, query]).tolist() == expected.tolist()


def test_a_query_without_a_common_final_loss_is_left_out_of_the_correlation(rng):
    mean, truth = rng.normal(size=(2, 6, 3))
    missing = truth.copy()
    missing[:, 1] = np.nan
    expected = spearman_across_runs(mean[:, [0, 2]], truth[:, [0, 2]])
    assert spearman_across_runs(mean, missing) == pytest.approx(expected)


def test_resampled_correlations_are_those_of_each_resample(rng, monkeypatch):
    mean, truth = rng.normal(size=(2, 7, 4))
    mean[:, 2] = 1.0
    truth[3, 3] = np.nan
    chosen = rng.integers(0, 7, (9, 7))
    chosen[4] = 5
    expected = []
    for runs in chosen:
        each = [spearman(mean[runs, q], truth[runs, q]) for q in (0, 1)]
        if 3 not in runs:
            each.append(spearman(mean[runs, 3], truth[runs, 3]))
        expected.append(np.mean(each))
    # In batches of two resamples, and of one at the end.
    monkeypatch.setattr(metrics, "AT_ONCE", 2 * 7 * 4)
    resampled = metrics.spearman_resampled(mean, truth, chosen)
    np.testing.assert_allclose(resampled, expected)
    assert np.isnan(resampled[4]) and np.isfinite(np.delete(resampled, 4)).all()
