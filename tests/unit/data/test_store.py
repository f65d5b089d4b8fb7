"""Stores come back as they went in, appear whole or not at all, and refuse what they must."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.conventions import COMPLETE
from bayes_simfluence.data import store as s
from bayes_simfluence.data.runs import runs_from_arrays
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.files import atomically, old_path


def some_runs(rng, names=("a", "b", "c"), step_size=0.1):
    runs, steps, queries = len(names), 4, 5
    return runs_from_arrays(
        batch=rng.integers(-1, 6, (runs, steps, 2)),
        loss=rng.normal(size=(runs, steps + 1, queries)).astype(np.float32),
        step_size=step_size,
        train_ids=[f"t{i}" for i in range(6)],
        query_ids=list(range(queries)),
        run_ids=list(names),
        attrs={"model": "m", "versions": {"jax": "1"}, "labels": ["x", "y"], "remat": False},
    )


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_round_trip(rng, tmp_path, suffix):
    runs = some_runs(rng).drop_attrs(deep=False).assign_attrs(schema_version=1, model="m")
    write = s.save_runs if suffix == "zarr" else s.export_netcdf
    back = s.open_runs(write(runs, tmp_path / f"runs.{suffix}"))
    xr.testing.assert_identical(back, runs)


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_times_without_a_loss_survive(rng, tmp_path, suffix):
    runs, more = some_runs(rng), some_runs(rng, names=("d",))
    runs["loss"].values[:, 1::2] = np.nan
    write = s.save_runs if suffix == "zarr" else s.export_netcdf
    path = write(runs, tmp_path / f"runs.{suffix}")
    xr.testing.assert_identical(s.open_runs(path), runs)
    if suffix == "zarr":
        more["loss"].values[0, 2] = np.nan
        both = s.open_runs(s.append_runs(more, path))
        xr.testing.assert_identical(both.isel(run=slice(0, 3)), runs)
        np.testing.assert_array_equal(both["loss"][3:], more["loss"])
        assert (both["status"] == 1).all()
        runs["loss"].values[0, 0] = np.nan
        with pytest.raises(Misuse, match="time 0: got nothing recorded"):
            s.save_runs(runs, path, overwrite=True)


def test_nested_provenance_survives_in_zarr(rng, tmp_path):
    runs = some_runs(rng)
    xr.testing.assert_identical(s.open_runs(s.save_runs(runs, tmp_path / "runs.zarr")), runs)


def test_a_store_is_version_3_consolidated_and_one_chunk_a_run(rng, tmp_path):
    path = s.save_runs(some_runs(rng), tmp_path / "runs.zarr")
    root = json.loads((path / "zarr.json").read_text())
    assert root["zarr_format"] == 3
    assert "loss" in root["consolidated_metadata"]["metadata"]
    assert sorted(file.name for file in (path / "loss" / "c").iterdir()) == ["0", "1", "2"]


def test_nothing_is_written_over_unless_told(rng, tmp_path):
    first, second = some_runs(rng), some_runs(rng)
    path = s.save_runs(first, tmp_path / "runs.zarr")
    with pytest.raises(Misuse, match="overwrite"):
        s.save_runs(second, path)
    xr.testing.assert_identical(s.open_runs(path), first)
    s.save_runs(second, path, overwrite=True)
    xr.testing.assert_identical(s.open_runs(path), second)
    assert [file.name for file in tmp_path.iterdir()] == ["runs.zarr"]


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_kinds_of_curricula_survive_and_are_empty_where_none_was_said(rng, tmp_path, suffix):
    plain, more = some_runs(rng), some_runs(rng, names=("d", "e"))
    kinds = {"curriculum": ("run", ["random", "one-sided", "half"])}
    runs = plain.assign_coords(kinds)
    write = s.save_runs if suffix == "zarr" else s.export_netcdf
    path = write(runs, tmp_path / f"runs.{suffix}")
    xr.testing.assert_identical(s.open_runs(path), runs)
    if suffix == "zarr":
        both = s.open_runs(s.append_runs(more, path))
        assert both["curriculum"].values.tolist() == ["random", "one-sided", "half", "", ""]
        other = s.save_runs(more, tmp_path / "plain.zarr")
        both = s.open_runs(s.append_runs(runs, other))
        assert both["curriculum"].values.tolist() == ["", "", "random", "one-sided", "half"]


def test_append_joins_runs_and_refuses_others(rng, tmp_path):
    first, second = some_runs(rng), some_runs(rng, names=("d", "e"))
    path = s.save_runs(first, tmp_path / "runs.zarr")
    s.append_runs(second, path)
    both = s.open_runs(path)
    assert both["run"].values.tolist() == ["a", "b", "c", "d", "e"]
    np.testing.assert_array_equal(both["loss"], np.concatenate([first["loss"], second["loss"]]))
    with pytest.raises(Misuse, match="repeated ids d, e"):
        s.append_runs(second, path)
    renamed = second.assign_coords(query=list("vwxyz"))
    with pytest.raises(Misuse, match=r"runs\['query'\].*store of their own"):
        s.append_runs(renamed, path)
    with pytest.raises(Misuse, match="step_size"):
        s.append_runs(some_runs(rng, names=("f",), step_size=None), path)
    xr.testing.assert_identical(s.open_runs(path), both)


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(Misuse, match=r"nothing there.*check the path"):
        s.open_runs(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "text.nc").write_text("no netCDF")
    for name in ("empty.zarr", "text.nc"):
        with pytest.raises(Misuse, match=r"cannot be read.*restore the store"):
            s.open_runs(tmp_path / name)


def test_a_corrupt_chunk_is_an_error_not_numbers(rng, tmp_path):
    path = s.save_runs(some_runs(rng), tmp_path / "runs.zarr")
    chunk = next(file for file in (path / "loss" / "c" / "1").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-7])
    with pytest.raises(Misuse, match=r"cannot be read"):
        s.open_runs(path)


def test_another_schema_version_is_refused(rng, tmp_path):
    path = s.save_runs(some_runs(rng), tmp_path / "runs.zarr")
    meta = json.loads((path / "zarr.json").read_text())
    meta["attributes"]["schema_version"] = 7
    (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(Misuse, match=r"schema_version.*got 7; expected 1"):
        s.open_runs(path)


def test_runs_are_written_one_by_one_status_last(rng, tmp_path):
    runs = some_runs(rng)
    path = s.create_store(
        tmp_path / "runs.zarr",
        curricula=runs["batch"].values,
        train_ids=runs["train"].values,
        query_ids=runs["query"].values,
        attrs={"model": "m"},
    )
    s.write_run(path, 1, runs["loss"].values[1], runs["step_size"].values[1])
    diverged = runs["loss"].values[2].copy()
    diverged[3:] = np.nan
    s.write_run(path, 2, diverged, runs["step_size"].values[2])
    assert s.open_store(path)["status"].values.tolist() == [0, 1, 2]
    with pytest.warns(UserWarning, match="2 of 3 runs recorded so far"):
        recorded = s.open_runs(path)
    np.testing.assert_array_equal(recorded["loss"], np.stack([runs["loss"].values[1], diverged]))


def test_a_killed_writers_leftovers_are_swept(rng, tmp_path):
    runs = some_runs(rng)
    path = s.create_store(
        tmp_path / "runs.zarr",
        curricula=runs["batch"].values,
        train_ids=runs["train"].values,
        query_ids=runs["query"].values,
        attrs={},
    )
    leftovers = [path / "loss/c/1/0/0.ab.partial", path / "status/c/1.ab.partial"]
    for file in leftovers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    s.write_run(path, 1, runs["loss"].values[1], runs["step_size"].values[1])
    assert not any(file.exists() for file in leftovers)


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "thing"
    path.write_text("old")
    with pytest.raises(WorkFailed, match="could not be written"), atomically(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["thing"]


def test_an_interrupted_replacement_says_where_the_old_one_is(rng, tmp_path):
    path = s.save_runs(some_runs(rng), tmp_path / "runs.zarr")
    shutil.move(path, old_path(path))
    with pytest.raises(Misuse, match=r"rename .*\.runs\.zarr\.old back"):
        s.open_runs(path)


def test_a_folder_that_cannot_be_written_to_is_named(rng, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match=r"cannot be written to"):
        s.save_runs(some_runs(rng), tmp_path / "file" / "runs.zarr")


@pytest.mark.parametrize("name", sorted(s.COUNTERFACTUALS))
def test_counterfactuals_that_ship_are_whole(name):
    runs = validate_runs(s.example_runs(name))
    kinds, counts = np.unique(runs["curriculum"], return_counts=True)
    if name.endswith("-longer"):
        assert kinds.tolist() == ["1.5 x steps"] and counts.tolist() == [4]
    else:
        counted = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
        assert counted.pop("random") == 16 and counted.pop("diverse", 16) == 16
        assert len(counted) == 14 and set(counted.values()) == {4}
    assert (runs["status"] == COMPLETE).all() and runs.sizes["feature"] == 64
    known = np.isfinite(runs["train_loss"].values)
    assert (known == (runs["batch"].values >= 0)).all()
    assert "/" not in json.dumps(runs.attrs)


@pytest.mark.parametrize("name", sorted(s.EXAMPLES))
def test_recordings_that_ship_follow_the_standard_protocol(name):
    runs = validate_runs(s.example_runs(name))
    sizes = {"run": 32, "step": 96, "time": 97, "query": 50, "train": 200, "slot": 4}
    assert {dim: runs.sizes[dim] for dim in sizes} == sizes
    assert (runs["status"] == COMPLETE).all() and runs.sizes["feature"] == 64
    for batch in runs["batch"].values:
        members, times = np.unique(batch, return_counts=True)
        assert len(members) == 128 and set(times) == {3}
    # No path of the machine that recorded it.
    assert "/" not in json.dumps(runs.attrs["settings"]).replace("\\/", "")
