"""Comparison tables as text."""

import json

import numpy as np
import pandas as pd
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.report.tables import best_of, json_text, latex, markdown, save_table


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
    best = {name: best_of(table(), name) for name in ("mse", "spearman_query", "coverage_90")}
    assert best == {"mse": "b", "spearman_query": "a", "coverage_90": "b"}
    assert best_of(table(), "elpd") is None


def test_markdown_has_intervals_bold_and_blanks():
    lines = markdown(table(), ["mse", "coverage_90", "elpd"]).splitlines()
    assert lines[0] == "| method | MSE | 90% covers | ELPD |"
    assert lines[2] == "| a | 0.5 [0.4, 0.6] | 0.99 |  |"
    assert lines[3] == "| b | **0.25** [0.2, 0.3] | **0.88** |  |"
    assert "**" not in markdown(table(), bold=False)


def failing():
    return pd.concat([table(), pd.DataFrame({"failed": {"c_d": "no_memory"}})]).fillna(
        {"failed": ""}
    )


def test_a_failed_method_is_in_every_format():
    assert markdown(failing()).splitlines()[-1] == "* c_d failed: no_memory"
    assert markdown(failing(), ["mse"]).splitlines()[4] == "| c_d |  |"
    lines = latex(failing(), ["mse", "coverage_90"]).splitlines()
    assert lines[1] == r"\toprule method & MSE & 90\% covers \\"
    assert lines[3] == r"a & 0.5 [0.4, 0.6] & 0.99 \\"
    assert lines[4] == r"b & \textbf{0.25} [0.2, 0.3] & \textbf{0.88} \\"
    assert lines[5] == r"c\_d & \multicolumn{2}{l}{failed} \\"
    assert lines[-1] == "% c_d failed: no_memory"
    assert "textbf" not in latex(failing(), bold=False)
    methods = json.loads(json_text(failing()))["methods"]
    assert methods["c_d"] == {"failed": "no_memory"}
    assert methods["b"]["mse"] == {"value": 0.25, "low": 0.2, "high": 0.3}
    assert methods["a"]["elpd"]["value"] is None


def test_a_table_is_written_by_its_suffix(tmp_path):
    for suffix, start in ((".md", "| method"), (".csv", ","), (".tex", "\\begin"), (".json", "{")):
        path = save_table(table(), tmp_path / f"t{suffix}")
        assert path.read_text().startswith(start), suffix
        with pytest.raises(Misuse, match="something that exists"):
            save_table(table(), path)
    with pytest.raises(Misuse, match=r"suffix '.xls'; expected one of .md, .csv, .tex, .json"):
        save_table(table(), tmp_path / "t.xls")
