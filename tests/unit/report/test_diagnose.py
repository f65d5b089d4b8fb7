"""Diagnoses of fits, as tables and pictures, tested as data."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.report.diagnose import (
    hyper_summary,
    numbers_table,
    plot_diagnosis,
    plot_left_out,
    plot_search,
    plot_traces,
)
from bayes_simfluence.simulators.affine import AffineSimulator

CHAINS, DRAWS = 4, 200
AXES = ("chain", "draw")


class Held:
    """A simulator that holds these draws."""

    name, draws = "held", CHAINS * DRAWS

    def __init__(self, variables):
        self.variables = variables

    def samples(self, *, key, draws):
        return self.variables

    def __getattr__(self, name):
        return getattr(AffineSimulator, name)


@pytest.fixture
def runs():
    loss = np.linspace(0.7, 0.5, 5)[None, :, None] * np.ones((3, 1, 2))
    return bs.runs_from_arrays(batch=np.zeros((3, 4, 1), int), loss=loss, query_ids=["p", "q"])


@pytest.fixture
def sampled(runs, rng):
    """Chains of which one disagrees on ``growth`` and on the second query's ``scale``."""
    fine, off = rng.normal(size=(2, CHAINS, DRAWS))
    off[3] += 2.0
    samples = {
        "drift": (AXES, fine),
        "growth": (AXES, off),
        "scale": ((*AXES, "query"), np.stack([fine, off], axis=2)),
        "staying": ((*AXES, "query", "train"), np.zeros((CHAINS, DRAWS, 2, 1))),
    }
    diverging = np.zeros((CHAINS, DRAWS), bool)
    diverging[1, 7] = diverging[2, [7, 30]] = True
    stats = xr.Dataset({"diverging": (AXES, diverging)})
    return Posterior(Held(samples), Verdict(False, ""), runs, {}, sample_stats=stats)


def test_numbers_say_what_is_wanted_of_them():
    numbers = {"r_hat": 1.2, "ess_bulk": 500.0, "divergences": 0.0, "other": 3.0,
               "dispersion": float("nan")}  # fmt: skip
    table = numbers_table(Verdict(True, "", numbers=numbers))
    assert table["ok"].to_dict() == {
        "r_hat": False, "ess_bulk": True, "divergences": True, "other": True, "dispersion": False
    }  # fmt: skip
    assert table.loc["r_hat", "wanted"] == "at most 1.01"
    assert table.loc["ess_bulk", "wanted"] == "at least 400"
    assert table.loc["dispersion", "wanted"] == "0.7 to 1.5"
    assert table.loc["other", ["wanted", "meaning"]].tolist() == ["", ""]
    assert numbers_table(Verdict(True, "")).empty


def test_the_summary_shows_the_query_whose_chains_disagree(sampled, key):
    table = hyper_summary(sampled, key=key)
    assert list(table.index) == ["drift", "growth", "scale[q]"]
    off = sampled.simulator.variables["growth"][1]
    row = table.loc["growth"]
    np.testing.assert_allclose(row[["mean", "sd"]], [off.mean(), off.std()])
    np.testing.assert_allclose(row[["5%", "95%"]], np.quantile(off, [0.05, 0.95]))
    assert row["r_hat"] > 1.2 > 1.02 > table.loc["drift", "r_hat"]
    assert table.loc["drift", "ess_bulk"] > 400 > row["ess_bulk"]


def test_fixed_hyperparameters_have_no_spread_and_no_chains(sampled, runs, key):
    samples = {"growth": (AXES, np.full((1, 50), 0.1)), "scale": ((*AXES, "query"),
             np.broadcast_to([1.0, 2.0], (1, 50, 2)))}  # fmt: skip
    table = hyper_summary(Posterior(Held(samples), Verdict(True, ""), runs, {}), key=key)
    assert table.loc["growth", "sd"] == 0.0 and list(table.columns) == ["mean", "sd", "5%", "95%"]


def test_traces_show_the_worst_first_ranks_and_divergences(sampled, key):
    figure = plot_traces(sampled, key=key, most=2)
    left, right, *rest = figure.axes
    assert len(rest) == 2
    assert left.get_title(loc="left").startswith(("growth (R-hat 1.", "scale[q] (R-hat 1."))
    assert len(left.lines) == CHAINS
    off = sampled.simulator.variables["growth"][1]
    np.testing.assert_array_equal(left.lines[3].get_ydata(), off[3])
    ticks = [segment[0][0] for segment in left.collections[0].get_segments()]
    assert ticks == [7, 30]
    heights = [patch.get_xy()[:, 1] for patch in right.patches]
    assert len(heights) == CHAINS
    # The chain that lies higher has its ranks at the right end, more than its even share.
    even = right.lines[0].get_ydata()[0]
    assert heights[3][-3] > 2 * even > even / 2 > heights[3][1]


def test_a_search_shows_its_whole_and_its_end(rng):
    loss = 100.0 * np.exp(-np.arange(1000) / 50) + rng.normal(size=1000)
    left, right = plot_search(loss).axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), loss)
    x, y = left.lines[1].get_data()
    np.testing.assert_allclose(y[0], loss[:100].mean())
    assert x[0] == 49.5 and len(y) == 901
    assert right.get_ylim()[1] < 5.0 and right.get_xlim() == (500, 1000)
    broken = np.where(np.arange(50) > 10, np.nan, 1.0)
    assert len(plot_search(broken).axes) == 2


def left_out(runs, band, known=None):
    truth = runs["loss"].isel(time=slice(2, None))
    variables = {"predicted": truth + 0.01}
    if band:
        # The band misses at the last time alone.
        width = xr.where(truth["time"] < 4, 0.02, 0.001)
        variables |= {"low": truth + 0.01 - width, "high": truth + 0.01 + width}
    return xr.Dataset(variables).transpose("run", "time", "query")


def test_left_out_runs_show_coverage_and_changes(runs):
    missing = runs.assign(loss=runs["loss"].where(runs["time"] != 3))
    for recording, times in ((runs, [2, 3, 4]), (missing, [2, 4])):
        left = left_out(recording, band=True)
        posterior = Posterior(Held({}), Verdict(True, ""), recording, {}, left)
        left, right = plot_left_out(posterior).axes
        x, y = left.lines[0].get_data()
        np.testing.assert_array_equal(x, times)
        np.testing.assert_array_equal(y, [1.0] * (len(times) - 1) + [0.0])
        predicted, true = right.lines[1].get_data()
        np.testing.assert_allclose(predicted - true, np.where(np.isnan(true), np.nan, 0.01))
    posterior = Posterior(Held({}), Verdict(True, ""), runs, {}, left_out(runs, band=False))
    left, _ = plot_left_out(posterior).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), 0.01, rtol=1e-4)


def test_the_picture_is_that_of_the_method(sampled, runs, key):
    assert len(plot_diagnosis(sampled, key=key).axes) == 6
    base = SimpleNamespace(simulator=Held({}), verdict=Verdict(True, ""), runs=runs, settings={})
    searched = Posterior(**vars(base), search_loss=np.ones(30))
    assert plot_diagnosis(searched, key=key).axes[0].get_xlabel() == "step"
    left = Posterior(**vars(base), left_out=left_out(runs, band=True))
    assert "90% band" in plot_diagnosis(left, key=jax.random.key(0)).axes[0].get_ylabel()
    with pytest.raises(Misuse, match=r"without chains, search or left-out runs.*calibrate"):
        plot_diagnosis(Posterior(**vars(base)), key=key)
