"""Comparison tables as text: the best of each column in bold, intervals beside the figures."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.compare import ENDS, FAILED
from bayes_simfluence.evaluation.metrics import COVERAGES, INTERVAL
from bayes_simfluence.files import PathLike, atomically, new_path

NOMINAL = {f"coverage_{round(100 * p)}": p for p in COVERAGES} | {"final_coverage_90": 0.90}
"""Coverages are best where they are nearest to their nominal value."""
HIGHER = {"spearman_query", "spearman_change", "spearman_run", "elpd"}
"""Metrics that are better when higher; the others when lower."""
SHORT = {
    "mse": "MSE",
    "mse_ratio": "MSE / reference's",
    "mse_over_floor": "MSE / floor",
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
    """The method that is best in a metric; None when every method lacks it.

    >>> best_of(pd.DataFrame({"mse": {"a": 0.2, "b": 0.1}}), "mse")
    'b'
    """
    column = table[metric].astype(float)
    loss = (column - NOMINAL[metric]).abs() if metric in NOMINAL else column
    loss = -loss if metric in HIGHER else loss
    return None if loss.isna().all() else str(loss.idxmin())


def markdown(table: pd.DataFrame, metrics: list[str] | None = None, *, bold: bool = True) -> str:
    """A comparison as a Markdown table: ``value [low, high]``, the best value in bold.

    Methods that failed are listed below the table with their reasons.

    Args:
        table: as made by ``compare``.
        metrics: columns to show; all when omitted.
        bold: mark the best of each column.
    """
    shown = _shown(table, metrics)
    lines = [
        "| method | " + " | ".join(SHORT[metric] for metric in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for method, texts in _texts(table, shown, mark="**{}**" if bold else "{}").items():
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    reasons = _reasons(table)
    if reasons:
        lines += ["", *(f"* {method} failed: {reason}" for method, reason in reasons.items())]
    return "\n".join(lines)


def latex(table: pd.DataFrame, metrics: list[str] | None = None, *, bold: bool = True) -> str:
    """A comparison as a LaTeX ``tabular`` (package booktabs), the best value in bold.

    The row of a method that failed says so; the reasons follow the table as comments.

    Args:
        table, metrics, bold: as for ``markdown``.

    >>> table = pd.DataFrame({"mse": {"a_b": 0.2, "c": 0.1}})
    >>> print(latex(table).splitlines()[3])
    a\\_b & 0.2 \\\\
    """
    shown = _shown(table, metrics)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(shown)}}}",
        rf"\toprule method & {' & '.join(_escaped(SHORT[metric]) for metric in shown)} \\",
        r"\midrule",
    ]
    reasons = _reasons(table)
    for method, texts in _texts(table, shown, mark=r"\textbf{{{}}}" if bold else "{}").items():
        if method in reasons:
            texts = [rf"\multicolumn{{{len(shown)}}}{{l}}{{failed}}"]
        lines.append(rf"{_escaped(method)} & {' & '.join(texts)} \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(
        [*lines, *(f"% {method} failed: {reason}" for method, reason in reasons.items())]
    )


def json_text(table: pd.DataFrame) -> str:
    """A comparison as JSON: by method and metric ``value``, ``low``, ``high``; null where missing.

    >>> print(json_text(pd.DataFrame({"mse": {"a": 0.2}})))
    {"interval": 0.9, "methods": {"a": {"mse": {"value": 0.2, "low": null, "high": null}}}}
    """
    methods: dict[str, dict[str, Any]] = {}
    reasons = _reasons(table)
    for method, row in table.iterrows():
        name = str(method)
        if name in reasons:
            methods[name] = {FAILED: reasons[name]}
            continue
        methods[name] = {
            metric: {
                part: _number(dict(row), metric + end)
                for part, end in zip(("value", "low", "high"), ENDS, strict=True)
            }
            for metric in _shown(table, None)
        }
    return json.dumps({"interval": INTERVAL, "methods": methods}, ensure_ascii=False)


FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {
    ".md": lambda table: markdown(table) + "\n",
    ".csv": lambda table: table.to_csv(),
    ".tex": lambda table: latex(table) + "\n",
    ".json": lambda table: json_text(table) + "\n",
}
"""Suffix -> writer of a comparison in that format."""


def check_format(path: PathLike) -> Path:
    """The path itself when its suffix is that of a known format.

    Raises:
        Misuse: another suffix.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise Misuse(
            str(path),
            got=f"the suffix {path.suffix!r}",
            expected=f"one of {', '.join(FORMATS)}",
            do="rename the file",
        )
    return path


def save_table(table: pd.DataFrame, path: PathLike, *, overwrite: bool = False) -> Path:
    """Write a comparison as Markdown, CSV, LaTeX or JSON, as its suffix says.

    Raises:
        Misuse: another suffix, or a file that exists while ``overwrite`` is not set.
    """
    path = new_path(check_format(path), overwrite=overwrite)
    with atomically(path) as partial:
        partial.write_text(FORMATS[path.suffix](table), "utf-8")
    return path


def _shown(table: pd.DataFrame, metrics: list[str] | None) -> list[str]:
    return [metric for metric in (metrics or list(SHORT)) if metric in table]


def _reasons(table: pd.DataFrame) -> dict[str, str]:
    """Method -> reason, for those that failed."""
    if FAILED not in table:
        return {}
    reasons = table[FAILED].fillna("").astype(str)
    return {str(method): reason for method, reason in reasons.items() if reason}


def _texts(table: pd.DataFrame, shown: list[str], *, mark: str) -> dict[str, list[str]]:
    """Texts of each method's row, the best value of each column inside ``mark``."""
    best = {metric: best_of(table, metric) for metric in shown}
    return {
        str(method): [
            with_interval(dict(row), metric, mark if best[metric] == str(method) else "{}")
            for metric in shown
        ]
        for method, row in table.iterrows()
    }


def with_interval(row: Mapping[Any, Any], metric: str, mark: str = "{}") -> str:
    """``value [low, high]`` of a row of a comparison, the value inside ``mark``; or empty text.

    >>> with_interval({"mse": 0.25, "mse_low": 0.125, "mse_high": 0.5}, "mse")
    '0.25 [0.125, 0.5]'
    """
    value = _number(row, metric)
    if value is None:
        return ""
    text = mark.format(f"{value:.3g}")
    low, high = _number(row, f"{metric}_low"), _number(row, f"{metric}_high")
    return text if low is None or high is None else f"{text} [{low:.3g}, {high:.3g}]"


def _number(row: Mapping[Any, Any], name: str) -> float | None:
    value = float(row.get(name, np.nan))
    return value if np.isfinite(value) else None


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text
