"""Pictures, tested as data."""

import jax
import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.calibration import by_horizon
from bayes_simfluence.report.plots import (
    _moving,
    plot_coverage,
    plot_curves,
    plot_effects,
    plot_ranks,
    plot_two,
    save_figure,
)


@pytest.fixture(scope="module")
def fitted():
    runs = bs.example_runs().isel(query=slice(0, 4), run=slice(0, 8))
    model = bs.Simfluence.additive()
    return runs, bs.fit(runs.isel(run=slice(0, 6)), model=model, key=jax.random.key(0))


def test_curves_show_truth_mean_and_band(fitted, key):
    runs, posterior = fitted
    held_out = runs.isel(run=slice(6, 8))
    simulated = posterior.simulate(held_out, key=key, draws=40)
    query = runs["query"].values[1]
    figure = plot_curves({"bayes": simulated}, held_out, run=1, queries=[query])
    (axes,) = figure.axes
    mean, truth = axes.lines
    assert (truth.get_ydata() == held_out["loss"].values[1, :, 1]).all()
    expected = simulated["mean_loss"].values[0, :, 1, :, 1].mean(axis=0)
    np.testing.assert_allclose(mean.get_ydata(), expected, rtol=1e-5)
    low, high = np.quantile(simulated["loss"].values[0, :, 1, :, 1], [0.05, 0.95], axis=0)
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(low.min(), rel=1e-5)
    assert edge.max() == pytest.approx(high.max(), rel=1e-5)
    assert "nats" in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bayes", "recorded"]


def test_curves_show_the_band_that_was_asked_for(fitted, key):
    runs, posterior = fitted
    band = bs.Credible(0.5, simultaneous=True)
    simulated = posterior.simulate(runs.isel(run=[6]), key=key, draws=40, band=band)
    figure = plot_curves({"bayes": simulated}, None, queries=[runs["query"].values[0]])
    edge = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(float(simulated["low"][0, :, 0].min()), rel=1e-5)
    assert edge.max() == pytest.approx(float(simulated["high"][0, :, 0].max()), rel=1e-5)
    assert "50% simultaneous credible band" in figure.get_suptitle()


def test_curves_pick_the_queries_that_move_most(fitted, key):
    runs, posterior = fitted
    simulated = posterior.simulate(runs, key=key, draws=3)
    shown = [axes for axes in plot_curves({"a": simulated}, None).axes if axes.get_visible()]
    assert len(shown) == 4


def test_two_curricula_and_their_difference(fitted, key):
    runs, posterior = fitted
    query = runs["query"].values[0]
    before = posterior.simulate(runs.isel(run=[0]), key=key, draws=30)
    after = posterior.simulate(runs.isel(run=[1]), key=key, draws=30)
    figure = plot_two(before, after, query=query)
    difference = figure.axes[1].lines[0].get_ydata()
    expected = (after["mean_loss"].values - before["mean_loss"].values)[0, :, 0, :, 0].mean(axis=0)
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_effects_are_ordered_and_say_their_sign(fitted, key):
    _, posterior = fitted
    effects = posterior.samples(key=key, draws=30)["b"].isel(query=0)
    axes = plot_effects(effects, top=3).axes[0]
    shown = axes.lines[0].get_xdata()
    mean = np.sort(effects.values[0].mean(axis=0))
    np.testing.assert_allclose(shown, np.concatenate([mean[:3], mean[-3:]]), rtol=1e-6)
    assert "negative = helpful" in axes.get_xlabel()


def test_coverage_along_training(fitted, key):
    runs, posterior = fitted
    horizon = by_horizon(posterior, runs, key=key, draws=30)
    left, right = plot_coverage({"a": horizon}).axes
    np.testing.assert_array_equal(
        left.lines[0].get_ydata(), horizon["coverage"].sel(probability=0.9).values
    )
    area = sum(patch.get_path().vertices[:, 1].max() > 0 for patch in right.patches)
    assert area == 1


def test_what_was_not_recorded_is_not_drawn(fitted, key):
    runs, posterior = fitted
    thinned = runs.isel(run=slice(6, 8)).copy(deep=True)
    thinned["loss"].values[:, np.arange(97) % 8 > 0] = np.nan
    thinned["loss"].values[1, -1] = np.nan
    loss, query = thinned["loss"], runs["query"].values[1]
    simulated = posterior.simulate(thinned, key=key, draws=20)
    truth = plot_curves({"a": simulated}, thinned, run=1, queries=[query]).axes[0].lines[1]
    assert truth.get_xdata().tolist() == list(range(0, 96, 8)) and truth.get_marker() == "."
    np.testing.assert_array_equal(truth.get_ydata(), loss.values[1, :96:8, 1])
    assert len(plot_curves({"a": simulated}, thinned).axes) == 6
    both = (loss.isel(run=0).sel(query=query), loss.isel(run=1).sel(query=query))
    before, after = (simulated.isel(run=[run]) for run in (0, 1))
    left, right = plot_two(before, after, query=query, recorded=both).axes
    lengths = [len(line.get_xdata()) for line in left.lines if "trained" in line.get_label()]
    assert lengths == [13, 12]
    (trained,) = (line for line in right.lines if line.get_label() == "both trained")
    np.testing.assert_array_equal(trained.get_ydata(), (both[1] - both[0]).values[:96:8])
    horizon = by_horizon(posterior, thinned, key=key, draws=20)
    line = plot_coverage({"a": horizon}).axes[0].lines[0]
    assert line.get_xdata().tolist() == list(range(8, 97, 8))
    assert np.isfinite(line.get_ydata()).all()


def test_the_queries_that_move_most_are_found_between_recorded_losses():
    loss = np.full((1, 7, 8), np.nan)
    loss[:, ::2] = 0.5
    loss[0, 2, 1:7] += np.arange(1, 7)
    coordinates = {"run": [0], "time": range(7), "query": list("abcdefgh")}
    runs = xr.Dataset({"loss": (("run", "time", "query"), loss)}, coords=coordinates)
    assert _moving(runs, 0) == list("bcdefg")


def test_ranks_are_shown_worst_first_with_the_expected_band(rng):
    rank = rng.integers(0, 20, (50, 4))
    rank[:, 2] //= 4
    ranks = xr.Dataset(
        {"rank": (("simulation", "quantity"), rank, {"draws": 19, "bins": 5})},
        {"quantity": list("abcd")},
    )
    figure = plot_ranks(ranks, most=2)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 2 and shown[0].get_title().startswith("c (p ")
    bars = shown[0].patches[-1].get_data()
    high = int((rank[:, 2] == 4).sum())
    assert bars.values.tolist() == [50 - high, high, 0, 0, 0]
    np.testing.assert_array_equal(bars.edges, [-0.5, 3.5, 7.5, 11.5, 15.5, 19.5])
    lowest, highest = binom.ppf([0.025, 0.975], 50, 0.2)
    band = shown[0].patches[0]
    assert (band.get_y(), band.get_y() + band.get_height()) == (lowest, highest)
    assert "too low" not in figure.get_suptitle() and "too high" in figure.get_suptitle()


def test_figures_are_not_overwritten(fitted, key, tmp_path):
    runs, posterior = fitted
    figure = plot_curves({"a": posterior.simulate(runs, key=key, draws=3)}, runs)
    path = save_figure(figure, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Misuse, match="something that exists"):
        save_figure(figure, path)
