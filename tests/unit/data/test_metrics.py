"""Metrics travel with the runs, and are what they say."""

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import METRIC, METRIC_DIMS
from bayes_simfluence.data import store as s
from bayes_simfluence.data.metrics import metric_names, with_metric
from bayes_simfluence.data.runs import runs_from_arrays
from bayes_simfluence.data.validation import validate_runs


def some_runs(rng, names=("a", "b", "c")):
    shape = (len(names), 5, 3)
    runs = runs_from_arrays(
        batch=rng.integers(-1, 6, (len(names), 4, 2)),
        loss=rng.normal(size=shape).astype(np.float32),
        train_ids=range(6),
        run_ids=list(names),
    )
    accuracy = (rng.normal(size=shape) > 0).astype(float)
    accuracy[:, 1::2] = np.nan
    return with_metric(with_metric(runs, "accuracy", accuracy), "rouge-l", rng.normal(size=shape))


def test_a_metric_is_a_marked_variable(rng):
    runs = some_runs(rng)
    assert metric_names(runs) == ["accuracy", "rouge-l"]
    assert runs["accuracy"].dims == METRIC_DIMS
    assert runs["accuracy"].attrs == {"long_name": "accuracy", **METRIC}
    assert metric_names(runs.isel(run=[0]).drop_vars("accuracy")) == ["rouge-l"]


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_metrics_survive_files_selection_and_appending(rng, tmp_path, suffix):
    runs, more = some_runs(rng), some_runs(rng, ("d", "e"))
    write = s.save_runs if suffix == "zarr" else s.export_netcdf
    path = write(runs, tmp_path / f"runs.{suffix}")
    xr.testing.assert_identical(s.open_runs(path), runs)
    xr.testing.assert_identical(validate_runs(s.open_runs(path).isel(run=[1])), runs.isel(run=[1]))
    if suffix == "zarr":
        both = s.open_runs(s.append_runs(more, path))
        xr.testing.assert_identical(both["accuracy"][:3], runs["accuracy"])
        np.testing.assert_array_equal(both["accuracy"][3:], more["accuracy"])
        with pytest.raises(Misuse, match=r"rouge-l: got recorded in only one"):
            s.append_runs(some_runs(rng, ("f",)).drop_vars("rouge-l"), path)


def test_a_run_is_written_with_its_metrics_and_the_times_it_was_looked_at(rng, tmp_path):
    runs = some_runs(rng)
    path = s.create_store(
        tmp_path / "runs.zarr",
        curricula=runs["batch"].values,
        train_ids=range(6),
        query_ids=range(3),
        attrs={},
        metrics=["accuracy"],
    )
    loss, rates = runs["loss"].values.copy(), np.ones(4, np.float32)
    loss[:, [1, 3]] = np.nan
    for run in (0, 1):
        metrics = {"accuracy": runs["accuracy"].values[run]}
        times = [0, 2, 4] if run == 0 else slice(None)
        s.write_run(path, run, loss[run], rates, metrics=metrics, times=times)
    assert s.stored_statuses(path).tolist() == [1, 2, 0], "a NaN that was looked at is a divergence"
    with pytest.warns(UserWarning, match="2 of 3 runs"):
        back = s.open_runs(path)
    np.testing.assert_array_equal(back["accuracy"], runs["accuracy"][:2])


@pytest.mark.parametrize("name", ["loss", "query", "feature", "a/b", "", "_hidden"])
def test_names_that_mean_something_else_are_refused(rng, name):
    runs = some_runs(rng)
    with pytest.raises(Misuse, match="name of a metric"):
        with_metric(runs, name, runs["loss"].values)


def test_metrics_of_another_shape_are_refused(rng):
    runs = some_runs(rng)
    with pytest.raises(Misuse, match=r"metric 'x': got shape \(3, 4, 3\)"):
        with_metric(runs, "x", runs["loss"].values[:, 1:])
    for bad in (runs["accuracy"].transpose("query", ...), runs["accuracy"].notnull()):
        bad.attrs = dict(METRIC)
        with pytest.raises(Misuse, match=r"runs\['accuracy'\]: .*floating metric"):
            validate_runs(runs.assign(accuracy=bad))
