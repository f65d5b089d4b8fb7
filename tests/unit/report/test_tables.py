"""Comparison tables as text."""

import numpy as np
import pandas as pd

from bayes_simfluence.report.tables import best_of, markdown


def table():
    return pd.DataFrame(
        {
            "mse": {"a": 0.5, "b": 0.25},
            "mse_low": {"a": 0.4, "b": 0.2},
            "mse_high": {"a": 0.6, "b": 0.3},
            "spearman_query": {"a": 0.9, "b": 0.1},
            "coverage_90": {"a": 0.99, "b": 0.88},
            "elpd": {"a": np.nan, "b": np.nan},
        }
    )


def test_best_is_lowest_highest_or_nearest():
    found = {name: best_of(table(), name) for name in ("mse", "spearman_query", "coverage_90")}
    assert found == {"mse": "b", "spearman_query": "a", "coverage_90": "b"}
    assert best_of(table(), "elpd") is None


def test_markdown_has_intervals_bold_and_blanks():
    lines = markdown(table(), ["mse", "coverage_90", "elpd"]).splitlines()
    assert lines[0] == "| method | MSE | 90% covers | ELPD |"
    assert lines[2] == "| a | 0.5 [0.4, 0.6] | 0.99 |  |"
    assert lines[3] == "| b | **0.25** [0.2, 0.3] | **0.88** |  |"
    assert "**" not in markdown(table(), bold=False)
