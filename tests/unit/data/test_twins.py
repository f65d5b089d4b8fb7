"""Runs that repeat a curriculum: their names, on disk and in tables, and what is refused."""

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data import store
from bayes_simfluence.data.importers import export_runs, import_runs
from bayes_simfluence.data.runs import planned_runs, runs_from_arrays
from bayes_simfluence.data.subsets import subsets_of_runs
from bayes_simfluence.data.twins import twin_groups, twins_between, with_twins, without_twins
from bayes_simfluence.data.validation import validate_runs

NAMES = ["a", "b", "c", "b", "c"]
"""Runs d and e repeat b and c."""


@pytest.fixture
def twins(rng):
    batch = rng.integers(0, 4, (3, 2, 2))[[0, 1, 2, 1, 2]]
    loss = 1.0 + rng.random((5, 3, 2), dtype=np.float32)
    return runs_from_arrays(batch=batch, loss=loss, run_ids=list("abcde"), twin=NAMES)


def test_groups_are_those_of_one_name_whatever_is_selected(twins):
    assert [group.tolist() for group in twin_groups(twins)] == [[1, 3], [2, 4]]
    assert [group.tolist() for group in twin_groups(twins.isel(run=[4, 0, 2]))] == [[0, 2]]
    assert twin_groups(twins.isel(run=[0, 3, 4])) == []
    assert twin_groups(twins.drop_vars("twin")) == []


def test_the_first_of_each_group_stays(twins):
    kept, left = without_twins(twins)
    assert kept["run"].values.tolist() == list("abc") and left == 2
    xr.testing.assert_identical(*without_twins(kept)[:1], kept)
    assert without_twins(kept)[1] == 0


def test_twins_between_two_parts_have_name_and_curriculum_in_common(twins):
    fitted, other = twins.isel(run=[0, 1]), twins.isel(run=[2, 3, 4])
    assert twins_between(other, fitted) == ["d"]
    assert twins_between(other.drop_vars("twin"), fitted) == []
    elsewhere = fitted.assign(batch=3 - fitted["batch"])
    assert twins_between(other, elsewhere) == []


@pytest.mark.parametrize("suffix", ["zarr", "nc", "csv", "npz"])
def test_names_survive_on_disk(twins, tmp_path, suffix):
    path = tmp_path / f"runs.{suffix}"
    if suffix in ("csv", "npz"):
        export_runs(twins, path)
        again = import_runs(path)
    else:
        write = store.save_runs if suffix == "zarr" else store.export_netcdf
        again = store.open_runs(write(twins, path))
    assert again["twin"].values.tolist() == NAMES and again["twin"].dtype.kind == "U"
    xr.testing.assert_equal(again["loss"], twins["loss"])


def test_runs_appended_without_names_are_no_twins(twins, tmp_path):
    plain = twins.drop_vars("twin").assign_coords(run=list("fghij"))
    path = store.save_runs(twins, tmp_path / "runs.zarr")
    both = store.open_runs(store.append_runs(plain, path))
    assert both["twin"].values.tolist() == [*NAMES, *"fghij"]
    path = store.save_runs(plain, tmp_path / "plain.zarr")
    both = store.open_runs(store.append_runs(twins, path))
    assert both["twin"].values.tolist() == [*"fghij", *NAMES]


def test_planned_runs_and_subsets_have_no_twins(twins):
    assert "twin" not in planned_runs(twins, twins["batch"].values).coords
    assert subsets_of_runs(twins)["subset"].values.tolist() == list("abc")


def test_names_that_do_not_fit_are_refused(twins):
    with pytest.raises(Misuse, match=r"twin: got shape \(4,\); expected the id of a run for each"):
        with_twins(twins, NAMES[:4])
    with pytest.raises(Misuse, match=r"runs\['twin'\]: got int64 over \('run',\)"):
        validate_runs(twins.assign_coords(twin=("run", np.arange(5))))
    with pytest.raises(Misuse, match=r"runs\['twin'\]: got runs a, d of other curricula"):
        with_twins(twins, ["a", "b", "c", "a", "c"]).pipe(validate_runs)
    weight = np.ones(twins["batch"].shape, np.float32)
    weight[3] = 1.0, 2.0
    weighted = twins.assign(weight=(twins["batch"].dims, weight))
    with pytest.raises(Misuse, match=r"runs b, d of other curricula"):
        validate_runs(weighted)
