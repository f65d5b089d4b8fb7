"""The first table of a study's report."""

import re

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.evaluation.compare import Failed
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.study.headline import headline_of, headline_rows


@pytest.fixture(scope="module")
def table():
    """Two point forecasts that stand for scores, one that failed, and the reference."""
    runs = linear_runs(key=jax.random.key(3), runs=9, train=12, per_run=8, query=4)[0]
    fitted, key = runs.isel(run=slice(0, 6)), jax.random.key(0)
    methods = {
        "mine": bs.fit(fitted, model=bs.Simfluence.linear(), key=key),
        "still": bs.persistence(fitted),
        "mean": bs.mean_trajectory(fitted),
        "broken": Failed("no weights"),
    }
    held_out = runs.isel(run=slice(6, None))
    return bs.compare(methods, held_out, key=key, draws=32, resamples=50, reference="mine")


def test_the_best_of_the_others_is_beside_the_reference(table):
    best, ratio, own, theirs, covers = headline_of(table, "mine", ["still", "mean", "broken"])
    assert best == table["mse"][["still", "mean"]].idxmin()
    value, low, high = _numbers(ratio)
    np.testing.assert_allclose(value, table.loc["mine", "mse"] / table.loc[best, "mse"], rtol=0.01)
    np.testing.assert_allclose(low, 1 / table.loc[best, "mse_ratio_high"], rtol=0.01)
    assert low < value < high < 1
    # Persistence has no change to be correlated: the other one is best in that.
    for cell, row, metric in (
        (own, "mine", "spearman_change"),
        (theirs, "mean", "spearman_change"),
        (covers, "mine", "coverage_90"),
    ):
        np.testing.assert_allclose(_numbers(cell)[0], table.loc[row, metric], rtol=0.01)


def test_nothing_is_said_without_a_reference_or_others(table):
    assert headline_of(table, "mine", ["broken", "absent"]) is None
    assert headline_of(table.drop(columns="mse_ratio"), "mine", ["mean"]) is None
    assert headline_rows({"a": {}}, "mine", ["mean"]) == ""


def test_a_row_for_the_smallest_and_the_largest_number_of_runs(table):
    lines = headline_rows({"a": {5: table, 9: table, 7: table}, "b": {6: table}}, "mine", ["mean"])
    assert [line.split(" | ")[:3] for line in lines.splitlines()[2:]] == [
        ["| a", "5", "mean"],
        ["| a", "9", "mean"],
        ["| b", "6", "mean"],
    ]


def _numbers(cell):
    return [float(number) for number in re.findall(r"[-\d.e]+", cell)]
