"""The report of a study: a page, tables as CSV, pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bayes_simfluence.evaluation.compare import FAILED
from bayes_simfluence.evaluation.metrics import INTERVAL
from bayes_simfluence.files import atomically
from bayes_simfluence.report.attribution import plot_by_runs
from bayes_simfluence.report.plots import save_figure
from bayes_simfluence.report.tables import latex, markdown
from bayes_simfluence.study.cell import Cell
from bayes_simfluence.study.headline import headline_rows
from bayes_simfluence.study.jobs import outcome_of
from bayes_simfluence.study.methods import BAYES

BY_RUNS = ("mse", "spearman_change")
"""Metrics plotted against the number of runs."""
SHOWN = [
    "mse",
    "mse_ratio",
    "spearman_change",
    "spearman_run",
    "crps",
    "coverage_90",
    "final_coverage_90",
]
"""Metrics on the page; the files have all metrics."""
GIBIBYTE = 2.0**30


def write_report(cells: Sequence[Cell], folder: Path) -> Path:
    """Write ``index.md``, ``metrics.csv``, ``costs.csv``, a LaTeX table and pictures for each cell.

    For cells that were not compared yet, the page says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, known = [_title(cells)], {cell.config.name: cell.tables() for cell in cells}
    headline = headline_rows(known, BAYES, cells[0].attributions)
    if headline:
        parts.append(f"{BAYES} beside the best scores:\n\n{headline}")
    metrics, costs = [], []
    for cell in cells:
        tables, spent = known[cell.config.name], _costs(cell)
        costs.append(spent)
        metrics += [
            table.reset_index().assign(cell=cell.config.name, runs=count)
            for count, table in tables.items()
        ]
        parts.append(_section(cell, tables, spent, folder))
    # The columns that identify a row come first.
    if metrics:
        every = pd.concat(metrics)
        first = ["cell", "runs", "method"]
        every = every[[*first, *every.columns.drop(first)]]
        _write(folder / "metrics.csv", every.to_csv(index=False))
    _write(folder / "costs.csv", pd.concat(costs).to_csv(index=False))
    _write(folder / "index.md", "\n\n".join(parts) + "\n")
    return folder


def _title(cells: Sequence[Cell]) -> str:
    held_out = cells[0].study.protocol.held_out
    return (
        "# Study\n\n"
        f"Every method is fitted to the first runs of a recording and tested on {held_out} others. "
        f"Intervals: {INTERVAL:.0%}, bootstrap over these. The scale of scores is fitted on the "
        "fitted runs. The best of each column is bold. Seconds include compilation; memory is the "
        "peak of the process; the first influence function of a cell also computes what the others "
        f"share. Reference: {BAYES}. All metrics: `metrics.csv`."
    )


def _section(
    cell: Cell, tables: Mapping[int, pd.DataFrame], spent: pd.DataFrame, folder: Path
) -> str:
    name = cell.config.name
    parts = [f"## {name}"]
    if not tables:
        return f"{parts[0]}\n\nNot compared yet."
    most = max(tables)
    parts += [f"Fitted to {most} runs:", markdown(tables[most], SHOWN)]
    _write(folder / f"{name}.tex", latex(tables[most]) + "\n")
    if len(tables) > 1:
        for metric in BY_RUNS:
            picture = folder / f"{name}-{metric}.png"
            save_figure(plot_by_runs(tables, metric), picture, overwrite=True)
            parts.append(f"![{metric} against fitted runs, {name}]({picture.name})")
        parts += ["MSE by fitted runs:", _by_runs(tables)]
    parts += ["Cost:", _costs_text(spent, most)]
    return "\n\n".join(parts)


def _by_runs(tables: Mapping[int, pd.DataFrame]) -> str:
    mse = pd.DataFrame({count: table["mse"] for count, table in tables.items()})
    lines = [
        "| method | " + " | ".join(f"{count} runs" for count in mse) + " |",
        "|---|" + "---|" * mse.shape[1],
    ]
    order = list(dict.fromkeys(name for table in tables.values() for name in table.index))
    for method in order:
        texts = ["" if np.isnan(value) else f"{value:.3g}" for value in mse.loc[method]]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _costs(cell: Cell) -> pd.DataFrame:
    """The cost of every job of a cell."""
    jobs = [(name, "attribute", 0, cell.scores(name)) for name in cell.attributions]
    jobs += [
        (name, "fit", count, cell.fit(name, count))
        for count in cell.study.counts
        for name in (*cell.simulators, *cell.attributions)
    ]
    rows = []
    for name, stage, count, path in jobs:
        outcome = outcome_of(path)
        if outcome is not None:
            rows.append((cell.config.name, stage, name, count, outcome.seconds,
                         outcome.peak_bytes, outcome.start_bytes, outcome.failed))  # fmt: skip
    columns = ["cell", "stage", "method", "runs", "seconds", "peak_bytes", "start_bytes", FAILED]
    return pd.DataFrame(rows, columns=columns)


def _costs_text(spent: pd.DataFrame, most: int) -> str:
    """Seconds and memory of each method; the memory is that of its first job (the scores)."""
    lines = [
        f"| method | scores (s) | fit to {most} runs (s) | peak memory (GiB) | at its start |",
        "|---|---|---|---|---|",
    ]
    done = spent[spent[FAILED] == ""]
    for method in dict.fromkeys(done["method"]):
        own = done[done["method"] == method]
        scored, fitted = own[own["stage"] == "attribute"], own[own["runs"] == most]
        first = pd.concat([scored, fitted]).iloc[:1]
        texts = [
            *(_figure(rows, "seconds", ".1f") for rows in (scored, fitted)),
            *(_figure(first, name, ".2f", GIBIBYTE) for name in ("peak_bytes", "start_bytes")),
        ]
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _figure(rows: pd.DataFrame, name: str, form: str, unit: float = 1.0) -> str:
    """The first row's number as text; empty without one."""
    values = rows[name].dropna()
    return f"{float(values.iloc[0]) / unit:{form}}" if len(values) else ""


def _write(path: Path, text: str) -> None:
    with atomically(path) as partial:
        partial.write_text(text, "utf-8")
