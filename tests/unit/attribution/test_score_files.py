"""Scores in files: what comes back, what is refused."""

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.attribution.score_files import load_scores, save_scores
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.checks import Misuse


@pytest.fixture
def scores(rng):
    values = rng.normal(size=(4, 3))
    return score_array(
        values, list("abcd"), [1, 2, 3], method="m", units="nat", damping=None, steps=[1, 5]
    )


def test_scores_come_back_as_they_were(scores, tmp_path):
    path = save_scores(scores, tmp_path / "s.nc")
    xr.testing.assert_identical(load_scores(path), scores)
    with pytest.raises(Misuse, match="something that exists"):
        save_scores(scores, path)
    xr.testing.assert_identical(load_scores(save_scores(-scores, path, overwrite=True)), -scores)


def test_a_file_of_xarray_is_read(scores, tmp_path):
    plain = scores.assign_attrs({"method": "m", "units": "nat"})
    plain.attrs = {"method": "theirs"}
    plain.to_netcdf(tmp_path / "s.nc", engine="h5netcdf")
    loaded = load_scores(tmp_path / "s.nc")
    np.testing.assert_array_equal(loaded.values, scores.values)
    assert loaded.attrs == {"method": "theirs"} and loaded["train"].values.tolist() == list("abcd")


def test_other_files_are_refused(scores, tmp_path):
    with pytest.raises(Misuse, match="no such file"):
        load_scores(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(Misuse, match=r"text\.nc: got a file that cannot be read"):
        load_scores(tmp_path / "text.nc")
    two = xr.Dataset({"one": scores, "two": scores})
    for variable in two.values():
        variable.attrs = {}
    two.to_netcdf(tmp_path / "two.nc", engine="h5netcdf")
    with pytest.raises(Misuse, match=r"'one', 'two'.*expected one variable"):
        load_scores(tmp_path / "two.nc")
    bare = xr.DataArray(scores.values, dims=("train", "query"), name="score")
    bare.to_netcdf(tmp_path / "bare.nc", engine="h5netcdf")
    with pytest.raises(Misuse, match=r"no ids of \['query', 'train'\]"):
        load_scores(tmp_path / "bare.nc")
    broken = scores.copy(deep=True)
    broken.attrs, broken[2, 1] = {}, np.nan
    broken.to_netcdf(tmp_path / "nan.nc", engine="h5netcdf")
    with pytest.raises(Misuse, match="example c on query 2: got nan"):
        load_scores(tmp_path / "nan.nc")
    with pytest.raises(Misuse, match="example c on query 2: got nan"):
        save_scores(broken, tmp_path / "again.nc")
    assert not (tmp_path / "again.nc").exists()
