"""Pictures of simulated runs: recorded curves, simulated means, bands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from bayes_simfluence.checks import unit_interval
from bayes_simfluence.conventions import EFFECT_SIGN
from bayes_simfluence.evaluation.metrics import tails
from bayes_simfluence.evaluation.ranks import rank_counts, rank_histogram_test
from bayes_simfluence.files import PathLike, atomically, new_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's palette, distinguishable by colour-blind readers."""
TRUTH = "black"


def plot_curves(
    simulated: Mapping[str, xr.Dataset],
    recorded: xr.Dataset | None,
    *,
    run: int = 0,
    queries: Sequence[Any] | None = None,
    probability: float = 0.90,
) -> Figure:
    """Loss of some queries along one run: recorded, simulated mean, central band.

    Args:
        simulated: by method, as made by ``Posterior.simulate``; with ``band=...``, that band is
            shown.
        recorded: the true runs, if any.
        run: position of the run.
        queries: ids; the six whose recorded (else simulated) loss moves most when omitted.
        probability: of the central interval of the draws, of simulations without a band.
    """
    unit_interval("probability", probability)
    first = next(iter(simulated.values()))
    chosen = list(queries) if queries is not None else _moving(recorded or first, run)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, query in zip(grid.flat, chosen, strict=False):
        for colour, (name, simulation) in zip(COLOURS, simulated.items(), strict=False):
            _band(axes, simulation.isel(run=run).sel(query=query), colour, name, probability)
        if recorded is not None:
            truth = recorded["loss"].isel(run=run).sel(query=query)
            _truth(axes, truth, label="recorded", linewidth=1.2)
        axes.set_title(f"query {query}", fontsize=9)
    _label_grid(grid, len(chosen), "time (updates)", "loss (nats)")
    bands = dict.fromkeys(_band_name(each, probability) for each in simulated.values())
    title = f"run {first['run'].values[run]}: simulated mean and {', '.join(bands)}"
    figure.suptitle(title, fontsize=10)
    legend_below(figure, grid.flat[0])
    return figure


def plot_two(
    before: xr.Dataset,
    after: xr.Dataset,
    *,
    query: Any,
    names: tuple[str, str] = ("as recorded", "edited"),
    recorded: tuple[xr.DataArray, xr.DataArray] | None = None,
    probability: float = 0.90,
) -> Figure:
    """Loss of one query under two curricula on the same draws, and their difference.

    The difference is of ``mean_loss``: the noise of a run is not part of an effect.

    Args:
        before, after: simulations of one run each, with the same key.
        query: id of the query.
        names: of the two curricula.
        recorded: true losses ``(time,)`` of both runs, when both were trained.
        probability: of the bands.
    """
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    pair = [simulation.isel(run=0, drop=True).sel(query=query) for simulation in (before, after)]
    for colour, name, simulation in zip(COLOURS, names, pair, strict=False):
        _band(left, simulation, colour, name, probability, what="mean_loss")
    left.set_ylabel("loss (nats)")
    left.set_title(f"query {query}", fontsize=10)
    difference = pair[1]["mean_loss"] - pair[0]["mean_loss"]
    _band(right, xr.Dataset({"loss": difference}), COLOURS[2], None, probability)
    if recorded is not None:
        for truth, style, name in zip(recorded, ("-", "--"), names, strict=True):
            _truth(left, truth, label=f"{name}, trained", linewidth=1.0, linestyle=style)
        _truth(
            right,
            recorded[0].copy(data=recorded[1].values - recorded[0].values),
            label="both trained",
        )
        right.legend(fontsize=8, frameon=False)
    right.axhline(0.0, color="grey", linewidth=0.8)
    right.set_ylabel("difference (nats)")
    right.set_title(f"difference: {names[1]}", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("time (updates)")
    left.legend(fontsize=8, frameon=False)
    return figure


def plot_effects(
    effects: xr.DataArray, *, unit: str = "nats", top: int = 10, probability: float = 0.90
) -> Figure:
    """Effects of training examples on a query, the most harmful and most helpful, with intervals.

    Args:
        effects: ``(chain, draw, train)``.
        unit: of the effects: nats for ``b`` of the published forms, log-odds for ``staying`` and
            ``fading`` of the two-timescale model under its default link.
        top: examples at each end.
        probability: of the intervals.
    """
    stacked = effects.stack(sample=("chain", "draw")).transpose("sample", "train")
    mean = stacked.values.mean(axis=0)
    order = np.argsort(mean)
    ends = np.concatenate([order[:top], order[-top:]]) if len(order) > 2 * top else order
    low, high = np.quantile(stacked.values[:, ends], tails(probability), axis=0)
    figure = Figure(figsize=(6.0, 0.22 * len(ends) + 1.2), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(ends))
    axes.hlines(place, low, high, color=COLOURS[0], linewidth=1.5)
    axes.plot(mean[ends], place, "o", color=COLOURS[0], markersize=4)
    axes.axvline(0.0, color=TRUTH, linewidth=0.8)
    axes.set_yticks(place, [str(name) for name in effects["train"].values[ends]], fontsize=7)
    axes.set_xlabel(f"effect on the loss ({unit}), {probability:.0%} interval\n{EFFECT_SIGN}")
    axes.set_ylabel("training example")
    return figure


def plot_coverage(horizons: Mapping[str, xr.Dataset]) -> Figure:
    """Coverage along training and a histogram of PIT values, by method (``by_horizon``)."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, horizon) in zip(COLOURS, horizons.items(), strict=False):
        covered = horizon["coverage"].sel(probability=0.90).dropna("time")
        values = horizon["pit"].values
        left.plot(covered["time"], covered, color=colour, label=name)
        right.hist(
            values[np.isfinite(values)],
            bins=np.linspace(0.0, 1.0, 21),
            density=True,
            histtype="step",
            color=colour,
            label=name,
        )
    label_coverage(left)
    right.axhline(1.0, color=TRUTH, linewidth=0.8, linestyle="--")
    right.set(xlabel="probability integral transform", ylabel="density")
    left.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def label_coverage(axes: Axes) -> None:
    """Labels and the nominal line of coverage of 90% bands along training."""
    axes.axhline(0.90, color=TRUTH, linewidth=0.8, linestyle="--")
    axes.set(xlabel="time (updates)", ylabel="share of points in the 90% band", ylim=(0.0, 1.02))


def plot_ranks(ranks: xr.Dataset, *, most: int = 9, probability: float = 0.95) -> Figure:
    """Histograms of the ranks of ``sbc``, the least uniform quantities first.

    When the posterior is right, each bar lies in the grey band with the given ``probability``. Bars
    high at both ends: the posterior is too narrow; high in the middle: too wide; high at the right:
    too low.

    Args:
        ranks: as made by ``sbc``.
        most: quantities shown.
        probability: of the grey band, for each bar.
    """
    unit_interval("probability", probability)
    test = rank_histogram_test(ranks)
    shown = np.argsort(test.p_values.values, kind="stable")[:most]
    rank = ranks["rank"].transpose("simulation", "quantity").values[:, shown]
    draws, bins = int(ranks["rank"].attrs["draws"]), int(ranks["rank"].attrs["bins"])
    counts = rank_counts(rank, draws, bins)
    low, high = binom.ppf(tails(probability), len(rank), 1.0 / bins)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    edges = np.linspace(0, draws + 1, bins + 1) - 0.5
    band = f"{probability:.0%} of a right posterior's bars"
    for axes, place, heights in zip(grid.flat, shown, counts, strict=False):
        axes.axhspan(low, high, color="lightgrey", label=band)
        axes.axhline(len(rank) / bins, color=TRUTH, linewidth=0.8, linestyle="--")
        axes.stairs(heights, edges, fill=True, color=COLOURS[0], alpha=0.6, label="simulations")
        name, p_value = ranks["quantity"].values[place], float(test.p_values[place])
        axes.set_title(f"{name} (p {p_value:.2g})", fontsize=9)
    _label_grid(grid, len(shown), "rank of the true value", "simulations")
    figure.suptitle("\n".join(wrap(test.sentence, 44 * columns)), fontsize=10)
    legend_below(figure, grid.flat[0])
    return figure


def save_figure(figure: Figure, path: PathLike, *, overwrite: bool = False) -> Path:
    """Write a figure as PNG (or what the suffix says)."""
    path = new_path(path, overwrite=overwrite)
    with atomically(path) as partial:
        figure.savefig(partial, dpi=130, format=path.suffix.lstrip(".") or "png")
    return path


def _band(
    axes: Axes,
    simulation: xr.Dataset,
    colour: str,
    name: str | None,
    probability: float,
    what: str = "loss",
) -> None:
    draws = simulation[what].stack(sample=("chain", "draw")).transpose("sample", "time")
    mean = simulation["mean_loss" if "mean_loss" in simulation else what].mean(("chain", "draw"))
    axes.plot(draws["time"], mean, color=colour, linewidth=1.2, label=name)
    if what == "loss" and "low" in simulation:
        low, high = simulation["low"].values, simulation["high"].values
    elif draws.sizes["sample"] > 1:
        low, high = np.quantile(draws.values, tails(probability), axis=0)
    else:
        return
    axes.fill_between(draws["time"].values, low, high, color=colour, alpha=0.2, linewidth=0)


def _band_name(simulation: xr.Dataset, probability: float) -> str:
    if "low" not in simulation:
        return f"{probability:.0%} band"
    attrs = simulation["low"].attrs
    simultaneous = "simultaneous " if attrs["simultaneous"] else ""
    return f"{attrs['probability']:.0%} {simultaneous}{attrs['kind']} band"


def _truth(axes: Axes, truth: xr.DataArray, **style: Any) -> None:
    """Recorded losses of a run as a line, with marks when some times were not recorded."""
    known = truth.dropna("time")
    mark = None if known.sizes == truth.sizes else "."
    axes.plot(known["time"], known, color=TRUTH, marker=mark, markersize=3, **style)


def _label_grid(grid: Any, used: int, x: str, y: str) -> None:
    """Labels at the left and bottom of a grid of axes; those beyond the used ones are hidden."""
    for axes in list(grid.flat)[used:]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(x)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)


def _moving(runs: xr.Dataset, run: int, count: int = 6) -> list[Any]:
    loss = runs["loss"].isel(run=run)
    extra = [dim for dim in loss.dims if dim not in ("time", "query")]
    curves = loss.mean(extra).transpose("query", "time").values
    moved = [np.abs(np.diff(curve[np.isfinite(curve)])).sum() for curve in curves]
    order = np.argsort(-np.array(moved))[:count]
    return list(runs["query"].values[np.sort(order)])


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of one of the axes, below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False
    )
