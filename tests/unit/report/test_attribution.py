"""Pictures of attributions, as data."""

import numpy as np
import pandas as pd
import xarray as xr

from bayes_simfluence.evaluation.mislabel import detection
from bayes_simfluence.report.attribution import plot_by_runs, plot_detection


def test_detection_shows_both_curves_with_bands(key):
    wrong = np.arange(20) < 5
    ranking = xr.DataArray(20.0 - np.arange(20), dims="train", coords={"train": np.arange(20)})
    curves = detection(ranking, wrong, key=key, resamples=20)
    figure = plot_detection({"perfect": curves, "again": curves})
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[0].get_xydata()[:, 1], curves["precision"])
    np.testing.assert_allclose(right.lines[0].get_xydata()[:, 1], curves["recall"])
    assert len(left.collections) == len(right.collections) == 2
    assert left.get_legend().get_texts()[0].get_text() == "perfect (AP 1.00)"


def test_error_by_runs_has_a_line_for_each_method_that_has_numbers():
    row = {"mse": 0.2, "mse_low": 0.1, "mse_high": 0.4}
    none = dict.fromkeys(row, np.nan)
    tables = {
        count: pd.DataFrame.from_dict({"a": row, "b": row, "gone": none}, orient="index")
        for count in (5, 10)
    }
    tables[10] = tables[10].drop("b")
    (axes,) = plot_by_runs(tables).axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in lines] == [2, 1]
    np.testing.assert_allclose(lines[0].get_ydata(), [0.2, 0.2])
    assert axes.get_yscale() == "log" and axes.get_xticks().tolist() == [5, 10]
