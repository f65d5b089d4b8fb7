"""The main result of a study: how far the simulator is ahead of the best scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bayes_simfluence.evaluation.compare import ENDS, RATIO
from bayes_simfluence.report.tables import with_interval

Row = dict[str, Any]
CHANGE = "spearman_change"
COLUMNS = (
    "cell",
    "fitted runs",
    "best scores",
    "MSE over theirs",
    "Spearman, change",
    "theirs at best",
    "90% covers",
)


def headline_of(table: pd.DataFrame, reference: str, scored: Sequence[str]) -> list[str] | None:
    """The reference against the best of other methods, as the texts of a row.

    The best method is that with the lowest MSE; the correlation is the highest of any of them.

    Args:
        table: as made by ``compare`` with this reference.
        scored: names of the methods that it is compared with.

    >>> ends = {"": 4.0, "_low": 2.0, "_high": 8.0}
    >>> row = {"mse": 1.0} | {f"mse_ratio{end}": value for end, value in ends.items()}
    >>> table = pd.DataFrame({"mine": {"mse": 0.25}, "theirs": row}).T
    >>> headline_of(table, "mine", ["theirs"])[:2]
    ['theirs', '0.25 [0.125, 0.5]']
    """
    rows: dict[str, Row] = {str(name): dict(row) for name, row in table.iterrows()}
    others = {
        name: rows[name] for name in scored if np.isfinite(rows.get(name, {}).get(RATIO, np.nan))
    }
    if not others:
        return None
    best = min(others, key=lambda name: others[name][RATIO])
    # The column holds theirs over that of the reference.
    value, high, low = (1.0 / others[best][RATIO + end] for end in ENDS)
    ranked = [with_interval(row, CHANGE) for row in sorted(others.values(), key=_rank)]
    return [
        best,
        f"{value:.3g} [{low:.3g}, {high:.3g}]",
        with_interval(rows[reference], CHANGE),
        ranked[-1],
        with_interval(rows[reference], "coverage_90"),
    ]


def headline_rows(
    tables: Mapping[str, Mapping[int, pd.DataFrame]], reference: str, scored: Sequence[str]
) -> str:
    """A Markdown table with a row for each cell and number of runs; empty without tables.

    Args:
        tables: for each cell by number of fitted runs; the smallest and largest number are shown.
    """
    lines = []
    for cell, by_runs in tables.items():
        for count in sorted({min(by_runs), max(by_runs)}) if by_runs else ():
            row = headline_of(by_runs[count], reference, scored)
            if row is not None:
                lines.append(" | ".join(["", cell, str(count), *row, ""]).strip())
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *lines])


def _rank(row: Row) -> float:
    """The correlation of the change; the lowest rank where a method has none."""
    change = row.get(CHANGE, np.nan)
    return change if np.isfinite(change) else -np.inf
