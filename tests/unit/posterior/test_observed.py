"""Simulations given some losses of the runs: what is met, what moves, what is refused."""

import re
import sys

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence import cli
from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.posterior.observed import observed_losses

KEY = jax.random.key(0)
QUERIES = 4


def recording(first, runs):
    chosen = {"step": slice(0, 16), "time": slice(0, 17), "query": slice(0, QUERIES)}
    return bs.example_runs().isel(run=slice(first, first + runs), **chosen).load()


@pytest.fixture(scope="module")
def posterior():
    return bs.fit(recording(0, 6), method=bs.Exact(times=4), key=KEY)


@pytest.fixture
def held_out():
    return recording(6, 3).copy(deep=True)


def simulated(posterior, runs, observed=None, **others):
    return posterior.simulate(runs, key=KEY, draws=20, observed=observed, **others)


def test_nothing_observed_changes_nothing(posterior, held_out):
    unknown = xr.full_like(held_out["loss"], np.nan)
    start = held_out["loss"].isel(time=[0])
    before = simulated(posterior, held_out)
    for observed in (unknown, start, held_out["loss"].isel(query=[])):
        xr.testing.assert_identical(simulated(posterior, held_out, observed), before)


def test_what_was_observed_is_met_and_the_rest_moves(posterior, held_out):
    seen = held_out["loss"].isel(run=[1], query=[0, 2], time=[4, 8, 16])
    before, given = simulated(posterior, held_out), simulated(posterior, held_out, seen)
    assert (given["loss"].sel(seen.coords) == seen).all()
    # Coefficients change in all runs, a run's own error in the one that was observed.
    for name in ("mean_loss", "loss"):
        moved = np.abs(given[name] - before[name]).max(("chain", "draw", "time"))
        assert (moved.isel(query=[1, 3]) > 1e-5).all()
        assert (given[name].isel(time=0) == before[name].isel(time=0)).all()
    narrow = (given["loss"].std("draw") / before["loss"].std("draw")).isel(chain=0, time=-1)
    assert narrow.isel(run=1, query=[1, 3]).mean() < 1.0
    xr.testing.assert_identical(given["support"], before["support"])


def test_ids_decide_and_not_places(posterior, held_out):
    seen = held_out["loss"].isel(run=[0, 2], query=[1, 3], time=slice(0, None, 4)).copy()
    seen[1, 2, 0] = np.nan
    turned = seen.isel(run=[1, 0], query=[1, 0], time=slice(None, None, -1))
    turned = turned.transpose("query", "time", "run")
    # Ids are compared as text.
    turned = turned.assign_coords(query=turned["query"].values.astype(str))
    one, other = (simulated(posterior, held_out, observed) for observed in (seen, turned))
    xr.testing.assert_identical(one, other)


def test_far_runs_meet_what_was_observed(posterior, held_out):
    far = held_out.assign(step_size=4 * held_out["step_size"])
    seen = held_out["loss"].isel(query=[0])
    with pytest.warns(bs.SupportWarning):
        before, given = simulated(posterior, far), simulated(posterior, far, seen)
    assert (given["loss"].sel(query=seen["query"]) == seen).all()
    # What distance adds is no part of what is conditioned, and stays.
    added = [(one["loss"] - one["mean_loss"]).isel(query=1, time=-1) for one in (before, given)]
    assert added[1].std() > 0.5 * added[0].std()


def test_new_examples_and_bands(posterior, held_out):
    seen = held_out["loss"].isel(query=[0, 1])
    banded = simulated(posterior, held_out, seen, band=bs.Credible(0.8))
    inside = (banded["low"] <= held_out["loss"]) & (held_out["loss"] <= banded["high"])
    assert inside.sel(query=seen["query"]).all()
    place = held_out["batch"].values[held_out["batch"].values != EMPTY_SLOT][0]
    ids = held_out["train"].values.astype(object)
    ids[place] = "never seen"
    new = held_out.assign_coords(train=ids)
    given = simulated(posterior, new, seen)
    assert (given["loss"].sel(query=seen["query"]) == seen).all()


def test_a_pool_of_fits_meets_what_was_observed(held_out):
    pool = bs.fit(recording(0, 6), method=bs.Stack(times=4), key=KEY)
    seen = held_out["loss"].isel(query=[0, 2])
    given = simulated(pool, held_out, seen)
    assert (given["loss"].sel(query=seen["query"]) == seen).all()
    before = simulated(pool, held_out)
    assert not np.allclose(given["loss"].isel(query=1), before["loss"].isel(query=1))


def infinite(loss):
    return xr.where(loss["time"] == 3, np.inf, loss)


REFUSED = {
    "a missing dimension": (lambda loss: loss.isel(query=0), "got float32 of dimensions run, time"),
    "words": (lambda loss: loss.astype(str), "expected losses in nats"),
    "no ids": (lambda loss: loss.drop_vars("query"), "observed: query: got no coordinate"),
    "an unknown query": (
        lambda loss: loss.assign_coords(query=[*loss["query"].values[:-1], "other"]),
        "observed: query: got unknown ids other",
    ),
    "a run that is not simulated": (
        lambda loss: loss.assign_coords(run=[*loss["run"].values[:-1], "other"]),
        "observed: run: got unknown ids other",
    ),
    "a time beyond": (
        lambda loss: loss.assign_coords(time=loss["time"] + 1),
        "observed: time: got unknown ids 17",
    ),
    "a query twice": (lambda loss: loss.isel(query=[0, 0]), "observed: query: got repeated ids"),
    "infinite losses": (infinite, "infinite losses in runs"),
    "another start": (lambda loss: loss + 0.1, "observed at time 0: got other losses"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_observed_is_refused(posterior, held_out, case):
    change, said = REFUSED[case]
    with pytest.raises(Misuse, match=re.escape(said)):
        simulated(posterior, held_out, change(held_out["loss"]))


def test_only_arrays_with_names_are_taken(held_out):
    for wrong in (held_out, held_out["loss"].values):
        with pytest.raises(Misuse, match=f"observed: got {type(wrong).__name__}"):
            observed_losses(wrong, held_out)


def test_too_many_observed_losses_are_refused_before_any_work(posterior, held_out, monkeypatch):
    monkeypatch.setattr("bayes_simfluence.posterior.observed.MOST", 100)
    monkeypatch.setattr("bayes_simfluence.posterior.posterior.simulated_runs", None)
    with pytest.raises(Misuse, match=r"got 192 losses after time 0; expected at most 100"):
        simulated(posterior, held_out, held_out["loss"])


def test_new_queries_and_conformal_bands_are_refused(posterior, held_out):
    seen = held_out["loss"].isel(query=[0])
    with pytest.raises(Misuse, match=r"got 'Conformal'; expected Credible"):
        simulated(posterior, held_out, seen, band=bs.Conformal())
    other = held_out.assign_coords(query=[*held_out["query"].values[:-1], "other"])
    with pytest.raises(Misuse, match=r"got queries that were never recorded, other"):
        simulated(posterior, other, seen)


@pytest.mark.parametrize(
    ("fitted", "name"),
    [
        (lambda runs: bs.mean_trajectory(runs), "mean"),
        (lambda runs: bs.fit(runs, method=bs.Ridge(penalty=0.1), key=KEY), "affine"),
        (lambda runs: bs.fit(runs, model=bs.Simfluence.additive(), key=KEY), "affine"),
    ],
)
def test_posteriors_that_are_not_gaussian_refuse(held_out, fitted, name):
    with pytest.raises(Misuse, match=f"got a posterior with a {name} simulator"):
        simulated(fitted(recording(0, 4)), held_out, held_out["loss"].isel(query=[0]))


@pytest.fixture
def command(posterior, held_out, tmp_path, monkeypatch, capsys):
    """``simulate`` on the command line, given the losses in a file: exit code, output, errors."""
    posterior.save(tmp_path / "p.nc")
    bs.export_netcdf(held_out, tmp_path / "runs.nc")
    monkeypatch.chdir(tmp_path)

    def run(observed, *words):
        path = observed
        if isinstance(observed, xr.DataArray | xr.Dataset):
            observed.to_netcdf(path := "seen.nc", engine="h5netcdf")
        options = ["--observed", path, "--out", "s.nc", "--draws", "20", "--quiet", *words]
        monkeypatch.setattr(sys, "argv", ["x", "simulate", "p.nc", "runs.nc", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def test_losses_come_from_a_file(command, posterior, held_out, tmp_path):
    """As of Python: of all runs in the file, the selected ones, by the losses alone."""
    seen = held_out["loss"].isel(query=[0, 2], time=slice(0, 9)).copy()
    seen[1, 4:, 0] = np.nan
    code, out, errors = command(seen, "--select", "1:", "--overwrite")
    assert code == 0, errors
    # Nine times of two queries of two runs, but five of one.
    assert f"given {2 * 2 * 9 - 5} losses of 2 runs in seen.nc" in out
    planned = held_out.isel(run=[1, 2])
    expected = posterior.simulate(planned, key=KEY, draws=20, observed=seen.isel(run=[1, 2]))
    found = xr.open_dataset(tmp_path / "s.nc", engine="h5netcdf")
    np.testing.assert_array_equal(found["loss"], expected["loss"])


def test_a_recording_is_such_a_file(command, held_out, tmp_path):
    some = held_out.assign(loss=held_out["loss"].where(held_out["time"] < 5))
    bs.save_runs(some, tmp_path / "some.zarr")
    code, out, errors = command("some.zarr")
    assert code == 0, errors
    assert f"given {3 * QUERIES * 5} losses of 3 runs in some.zarr" in out
    found = xr.open_dataset(tmp_path / "s.nc", engine="h5netcdf")["loss"]
    assert (found.isel(time=4) == held_out["loss"].isel(time=4)).all()
    assert (found.isel(time=8).std("draw") > 0).all()


REFUSED_FILES = {
    "nothing": (lambda loss: "no.nc", (), "no.nc: got nothing there"),
    "no losses": (lambda loss: loss.rename("other").to_dataset(), (), "no variable loss among"),
    "a run that is not recorded": (
        lambda loss: loss.assign_coords(run=["a", "b", "c"]), (), "run: got unknown ids a, b, c",
    ),
    "an unknown query": (
        lambda loss: loss.assign_coords(query=[*"abcd"]), (), "query: got unknown ids a, b, c, d",
    ),
    "no runs": (lambda loss: loss.isel(run=0, drop=True), (), "of dimensions time, query"),
    "edited runs": (lambda loss: loss, ("--drop", "0"), "--observed: got --drop"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_files_that_do_not_fit_are_refused(command, held_out, tmp_path, case):
    change, words, said = REFUSED_FILES[case]
    code, _, errors = command(change(held_out["loss"]), *words)
    assert code == 2 and len(errors.strip().splitlines()) == 1
    assert said in errors
    assert not (tmp_path / "s.nc").exists()
