"""Comparison tables as text: the best of each column in bold, intervals beside the figures."""

import numpy as np
import pandas as pd

__all__ = ["best_of", "markdown"]

NOMINAL = {
    "coverage_50": 0.50,
    "coverage_80": 0.80,
    "coverage_90": 0.90,
    "coverage_95": 0.95,
    "final_coverage_90": 0.90,
}
"""Coverages are best where they are nearest to these."""
HIGHER = {"spearman_query", "spearman_change", "spearman_run", "elpd"}
"""Metrics that are better when higher; the others when lower."""
SHORT = {
    "mse": "MSE",
    "mae": "MAE",
    "spearman_query": "Spearman, queries",
    "spearman_change": "Spearman, change",
    "spearman_run": "Spearman, runs",
    "crps": "CRPS",
    "coverage_50": "50% covers",
    "coverage_80": "80% covers",
    "coverage_90": "90% covers",
    "coverage_95": "95% covers",
    "final_coverage_90": "90% covers, final",
    "elpd": "ELPD",
}


def best_of(table: pd.DataFrame, metric: str) -> str | None:
    """The method that is best in a metric; None when no method has it.

    >>> best_of(pd.DataFrame({"mse": {"a": 0.2, "b": 0.1}}), "mse")
    'b'
    """
    column = table[metric].astype(float)
    loss = (column - NOMINAL[metric]).abs() if metric in NOMINAL else column
    loss = -loss if metric in HIGHER else loss
    return None if loss.isna().all() else str(loss.idxmin())


def markdown(table: pd.DataFrame, metrics: list[str] | None = None, *, bold: bool = True) -> str:
    """A comparison as a Markdown table: ``value [low, high]``, the best value in bold.

    Args:
        table: as made by ``compare``.
        metrics: columns to show; all when omitted.
        bold: mark the best of each column.
    """
    shown = [one for one in (metrics or list(SHORT)) if one in table]
    lines = [
        "| method | " + " | ".join(SHORT[one] for one in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    best = {metric: best_of(table, metric) for metric in shown}
    for method, row in table.iterrows():
        cells = [_cell(row, metric, bold=bold and best[metric] == str(method)) for metric in shown]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: "pd.Series[float]", metric: str, *, bold: bool) -> str:
    value = float(row[metric])
    if not np.isfinite(value):
        return ""
    text = f"{value:.3g}"
    text = f"**{text}**" if bold else text
    low, high = row.get(f"{metric}_low", np.nan), row.get(f"{metric}_high", np.nan)
    return text if not np.isfinite(low) else f"{text} [{low:.3g}, {high:.3g}]"
