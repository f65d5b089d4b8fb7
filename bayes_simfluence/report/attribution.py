"""Pictures of attributions: how early wrong labels are found, error against recorded runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayes_simfluence.report.plots import COLOURS
from bayes_simfluence.report.tables import SHORT

STYLES = ("-", "--", ":", "-.")


def plot_detection(detections: Mapping[str, xr.Dataset]) -> Figure:
    """Precision against recall, and recall against the share examined, with bootstrap bands.

    Args:
        detections: by ranking, as made by ``detection``.
    """
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, curve) in enumerate(detections.items()):
        colour, style = _style(place)
        label = f"{name} (AP {float(curve['average_precision']):.2f})"
        for axes, x, y in ((left, "recall", "precision"), (right, "examined", "recall")):
            axes.plot(
                curve[x], curve[y], style, color=colour, label=label if axes is left else None
            )
            ends = curve[f"{y}_low"], curve[f"{y}_high"]
            axes.fill_between(curve[x], *ends, color=colour, alpha=0.2, linewidth=0)
    first = next(iter(detections.values()))
    left.axhline(first.attrs["share"], color="grey", linewidth=0.8)
    right.plot([0.0, 1.0], [0.0, 1.0], color="grey", linewidth=0.8, label="random order")
    left.set(xlabel="recall", ylabel="precision", ylim=(0.0, 1.05))
    right.set(xlabel="share of the examples examined", ylabel="share of the wrong labels found")
    figure.suptitle(f"bands: {first.attrs['probability']:.0%} over resampled examples", fontsize=9)
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False)
    return figure


def plot_by_runs(tables: Mapping[int, pd.DataFrame], metric: str = "mse") -> Figure:
    """A metric of every method against the number of runs that it was fitted to.

    Args:
        tables: comparisons by number of fitted runs.
        metric: a column of them; its bootstrap intervals are drawn as bars.
    """
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes: Axes = figure.subplots()
    counts = sorted(tables)
    methods = list(dict.fromkeys(name for count in counts for name in tables[count].index))
    drawn: list[tuple[float, Any]] = []
    for place, method in enumerate(methods):
        rows = {at: tables[at].loc[method] for at in counts if method in tables[at].index}
        known = {count: row for count, row in rows.items() if np.isfinite(row[metric])}
        if not known:
            continue
        value, low, high = (
            np.array([float(row[f"{metric}{end}"]) for row in known.values()])
            for end in ("", "_low", "_high")
        )
        colour, style = _style(place)
        # Shifted sideways, so that intervals do not overlap.
        shifted = np.array(list(known)) + 0.12 * (place - len(methods) / 2)
        reach = np.maximum([value - low, high - value], 0.0)
        line = axes.errorbar(
            shifted, value, reach, color=colour, linestyle=style, marker="o", markersize=3,
            linewidth=1.0, elinewidth=0.6, label=method,
        )  # fmt: skip
        drawn.append((value[-1], line))
    if metric in ("mse", "mae", "crps"):
        axes.set_yscale("log")
    axes.set_xticks(counts)
    axes.set(xlabel="fitted runs", ylabel=SHORT[metric])
    # Legend in the order in which the lines end, so that many of them can be told apart.
    lines = [line for _, line in sorted(drawn, key=lambda drawing: -drawing[0])]
    figure.legend(handles=lines, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _style(place: int) -> tuple[str, str]:
    """Colour and line style of the line at a place of the legend."""
    return COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
