"""The table of methods: its columns, its numbers, its intervals."""

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.compare import METRICS, Failed
from bayes_simfluence.evaluation.metrics import spearman_across_runs
from bayes_simfluence.evaluation.synthetic import linear_runs

NAMES = [
    "mse",
    "mae",
    "spearman_query",
    "spearman_change",
    "spearman_run",
    "crps",
    "coverage_50",
    "coverage_80",
    "coverage_90",
    "coverage_95",
    "final_coverage_90",
    "elpd",
]
COLUMNS = [name + end for name in NAMES for end in ("", "_low", "_high")]
BANDS = ["coverage_50", "coverage_80", "coverage_90", "coverage_95", "final_coverage_90", "elpd"]


@pytest.fixture(scope="module")
def runs():
    return linear_runs(key=jax.random.key(3), runs=12, train=12, per_run=8, query=4)[0]


@pytest.fixture(scope="module")
def posteriors(runs):
    fitted = runs.isel(run=slice(0, 7))
    key = jax.random.key(0)
    return {
        "exact": bs.fit(fitted, model=bs.Simfluence.linear(), key=key),
        "ridge": bs.fit(fitted, method=bs.Ridge(penalty=0.01), key=key),
        "mean": bs.mean_trajectory(fitted),
        "still": bs.persistence(fitted),
    }


@pytest.fixture(scope="module")
def table(posteriors, runs):
    return bs.compare(posteriors, held_out(runs), key=jax.random.key(1), draws=64, resamples=200)


def test_the_ratio_to_a_reference_is_that_of_the_same_runs(posteriors, runs, table):
    compared = bs.compare(
        posteriors,
        held_out(runs),
        key=jax.random.key(1),
        draws=64,
        resamples=200,
        reference="ridge",
    )
    np.testing.assert_allclose(compared["mse_ratio"], table["mse"] / table.loc["ridge", "mse"])
    assert compared.loc["ridge", ["mse_ratio_low", "mse_ratio_high"]].tolist() == [1.0, 1.0]
    own = compared.loc["exact"]
    assert own["mse_ratio_low"] < own["mse_ratio"] < own["mse_ratio_high"]
    # Hard runs are hard for both: less is uncertain than if each had runs of its own.
    apart = own["mse_high"] / compared.loc["ridge", "mse_low"]
    assert own["mse_ratio_high"] < apart


def test_a_reference_that_failed_leaves_no_ratio(posteriors, runs):
    methods = {"mean": posteriors["mean"], "broken": Failed("no weights")}
    settings = {"key": jax.random.key(1), "draws": 8, "resamples": 20}
    compared = bs.compare(methods, held_out(runs), reference="broken", **settings)
    assert compared["mse_ratio"].isna().all() and compared.loc["mean", "mse"] > 0
    with pytest.raises(Misuse, match=r"reference: got 'other'"):
        bs.compare(methods, held_out(runs), reference="other", **settings)


def held_out(runs):
    return runs.isel(run=slice(7, None))


def test_the_columns_are_the_metrics_with_their_intervals(table):
    assert table.columns.tolist() == COLUMNS
    assert list(METRICS) == NAMES
    assert table.index.tolist() == ["exact", "ridge", "mean", "still"]
    assert table.index.name == "method"


def test_the_numbers_are_those_of_the_simulations(table, posteriors, runs):
    truth = held_out(runs)["loss"].values[:, 1:].astype(float)
    simulate_key, _ = jax.random.split(jax.random.key(1))
    for name, posterior in posteriors.items():
        simulated = posterior.simulate(held_out(runs), key=simulate_key, draws=64)
        mean = simulated["mean_loss"].values.astype(float).mean(axis=(0, 1))[:, 1:]
        np.testing.assert_allclose(table.loc[name, "mse"], ((mean - truth) ** 2).mean(), rtol=1e-4)
        np.testing.assert_allclose(table.loc[name, "mae"], np.abs(mean - truth).mean(), rtol=1e-4)
    start, final = held_out(runs)["loss"].values[:, 0], truth[:, -1]
    # A higher loss at the start is a higher one in the end, for persistence.
    expected = np.mean(
        [np.corrcoef(*(np.argsort(np.argsort(side)) for side in pair))[0, 1]
         for pair in zip(start, final, strict=True)]
    )  # fmt: skip
    np.testing.assert_allclose(table.loc["still", "spearman_query"], expected, rtol=1e-4)
    assert table.loc["exact", "mse"] < 0.1 * table.loc["mean", "mse"]


def test_intervals_hold_their_estimate(table):
    for name in ("mse", "mae", "crps"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
        assert (table[f"{name}_low"] < table[f"{name}_high"]).all()


def test_the_interval_is_that_of_means_over_resampled_runs(table, posteriors, runs):
    truth = held_out(runs)["loss"].values.astype(float)
    simulated = posteriors["still"].simulate(held_out(runs), key=jax.random.key(0))
    by_run = np.square(simulated["mean_loss"].values[0, 0] - truth)[:, 1:].mean(axis=(1, 2))
    # 200 resamples there, 20000 here: the ends agree up to the former's own error.
    again = np.random.default_rng(0).choice(by_run, (20_000, len(by_run))).mean(axis=1)
    low, high = np.quantile(again, [0.05, 0.95])
    room = 0.35 * (high - low)
    assert abs(table.loc["still", "mse_low"] - low) < room
    assert abs(table.loc["still", "mse_high"] - high) < room


def test_what_a_point_does_not_have_is_nan(table):
    for name in ("ridge", "still"):
        for column in BANDS:
            assert table.loc[name, [column, f"{column}_low", f"{column}_high"]].isna().all()
        assert table.loc[name, "crps"] == table.loc[name, "mae"]
    # Persistence has no order of changes, nor of runs that start alike.
    assert np.isnan(table.loc["still", "spearman_change"])
    assert np.isnan(table.loc["still", "spearman_run"])
    assert table.loc[["exact", "mean"], BANDS].notna().all(axis=None)
    assert -1 <= table.loc["exact", "spearman_run_low"] <= table.loc["exact", "spearman_run"] <= 1


def test_two_runs_have_no_correlation_across_runs(posteriors, runs):
    few = held_out(runs).isel(run=[0, 1])
    table = bs.compare(
        {"mean": posteriors["mean"]}, few, key=jax.random.key(1), draws=20, resamples=20
    )
    assert table.filter(like="spearman_run").isna().all(axis=None)
    assert table.loc["mean", "mse_low"] < table.loc["mean", "mse_high"]


def test_the_same_key_gives_the_same_table(posteriors, runs):
    chosen = {"mean": posteriors["mean"]}
    tables = [
        bs.compare(chosen, held_out(runs), key=jax.random.key(seed), draws=20, resamples=50)
        for seed in (5, 5, 6)
    ]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_runs_are_compared_where_they_were_recorded(posteriors, runs):
    thinned = held_out(runs).copy(deep=True)
    loss = thinned["loss"].values
    loss[:, 1::2] = np.nan
    loss[0, -3:] = np.nan
    loss[1, 2:, 3] = np.nan
    key, last = jax.random.key(1), loss.shape[1] - 1
    settings = {"draws": 20, "resamples": 20}
    table = bs.compare(posteriors, thinned, key=key, **settings)
    assert np.isfinite(table[["mse", "mae", "crps", "spearman_query", "mse_low"]]).all(axis=None)
    simulate_key, _ = jax.random.split(key)
    for name, posterior in posteriors.items():
        simulated = posterior.simulate(held_out(runs), key=simulate_key, draws=20)
        mean = simulated["mean_loss"].values.astype(float).mean(axis=(0, 1))
        each = [np.nanmean(np.square(error)[1:]) for error in mean - loss]
        np.testing.assert_allclose(table.loc[name, "mse"], np.mean(each), rtol=1e-5)
        # Across runs at the last time of all of them; the last query has none.
        assert last % 2 == 0 and np.isnan(loss[0, last - 1]).all()
        at = last - 4
        expected = spearman_across_runs(mean[:, at, :3], loss[:, at, :3].astype(float))
        np.testing.assert_allclose(table.loc[name, "spearman_run"], expected)


def test_something_is_compared_with_counts_above_zero(posteriors, runs, key):
    with pytest.raises(Misuse, match=r"posteriors: got none.*at least one"):
        bs.compare({}, runs, key=key)
    with pytest.raises(Misuse, match=r"draws: got 0"):
        bs.compare(posteriors, runs, key=key, draws=0)
    with pytest.raises(Misuse, match=r"resamples: got 0"):
        bs.compare({"mean": posteriors["mean"]}, runs, key=key, resamples=0)


def test_a_method_that_fails_keeps_its_row_and_the_others_go_on(posteriors, runs, key, caplog):
    def broken():
        raise ZeroDivisionError("singular curvature\nsecond line")

    unlike = bs.mean_trajectory(runs.isel(run=slice(0, 7), query=[0, 1]))
    methods = {
        "mean": posteriors["mean"],
        "broken": broken,
        "late": lambda: posteriors["still"],
        "unlike": unlike,
        "gone": Failed("out of memory"),
    }
    table = bs.compare(methods, held_out(runs), key=key, draws=10, resamples=20)
    alone = bs.compare(
        {"mean": posteriors["mean"]}, held_out(runs), key=key, draws=10, resamples=20
    )
    assert table.index.tolist() == list(methods)
    assert table.loc["mean", COLUMNS].tolist() == pytest.approx(
        alone.loc["mean"].tolist(), nan_ok=True
    )
    assert table.loc["late", "mse"] > 0 and table.columns.tolist() == [*COLUMNS, "failed"]
    assert table.loc[["broken", "unlike", "gone"], COLUMNS].isna().all(axis=None)
    reasons = table["failed"]
    assert reasons[["mean", "late"]].tolist() == ["", ""]
    assert reasons["broken"] == "singular curvature" and reasons["gone"] == "out of memory"
    assert "quer" in reasons["unlike"]
    assert "method broken failed" in caplog.text


def test_when_all_fail_the_error_is_raised(runs, key):
    def broken():
        raise ZeroDivisionError("singular curvature")

    with pytest.raises(ZeroDivisionError, match="singular"):
        bs.compare({"a": Failed("no"), "b": broken}, held_out(runs), key=key)
    with pytest.raises(Misuse, match=r"none that could be made \(no\)"):
        bs.compare({"a": Failed("no")}, held_out(runs), key=key)
