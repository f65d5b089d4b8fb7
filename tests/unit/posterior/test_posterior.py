"""One contract for every method: simulate, samples, ArviZ, save and load."""

import json
from functools import cache

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.netcdf import read_group, write_groups

KEY = jax.random.key(0)
METHODS = ("two-timescale", "linear", "ridge", "ridge band", "mean", "persistence")
SAMPLES = {
    "two-timescale": {"growth", "momentum", "staying", "fading"},
    "linear": {"a", "b"},
    "ridge": {"a", "b"},
    "ridge band": {"a", "b"},
    "mean": {"change"},
    "persistence": {"a", "b"},
}
DIMS = ("chain", "draw", "run", "time", "query")


examples = cache(bs.example_runs)


def whole():
    return examples().isel(step=slice(0, 16), time=slice(0, 17), query=slice(0, 3))


@pytest.fixture(scope="module")
def posteriors():
    runs = whole().isel(run=slice(0, 4))
    settings = {
        "two-timescale": {"method": bs.Exact(times=4)},
        "linear": {"model": bs.Simfluence.linear(), "method": bs.Exact()},
        "ridge": {"method": bs.Ridge(penalty=0.1)},
        "ridge band": {"method": bs.Ridge(penalty=0.1, objective="centred", band=True)},
    }
    return {
        **{name: bs.fit(runs, key=KEY, **one) for name, one in settings.items()},
        "mean": bs.mean_trajectory(runs),
        "persistence": bs.persistence(runs),
    }


@pytest.fixture
def held_out():
    return whole().isel(run=slice(6, 8)).copy(deep=True)


@pytest.mark.parametrize("method", METHODS)
def test_simulated_runs_explain_themselves(posteriors, held_out, method):
    posterior = posteriors[method]
    found = posterior.simulate(held_out, key=KEY, draws=6)
    draws = 1 if method in ("ridge", "persistence") else 6
    assert set(found.data_vars) == {"mean_loss", "loss", "support"}
    assert found["support"].dims == ("run", "time") and found["support"].attrs["meaning"]
    for one in (found["mean_loss"], found["loss"]):
        assert one.dims == DIMS and one.shape == (1, draws, 2, 17, 3)
        assert one.dtype in (np.float32, np.float64) and one.attrs["units"] == "nat"
        assert one.attrs["long_name"]
    for name in ("run", "time", "query"):
        np.testing.assert_array_equal(found[name], held_out[name])
    assert found["draw"].values.tolist() == list(range(draws))
    assert json.loads(found.attrs["settings"]) == json.loads(json.dumps(posterior.settings))
    initial = np.broadcast_to(held_out["loss"].values[:, 0], found["mean_loss"][..., 0, :].shape)
    np.testing.assert_allclose(found["mean_loss"].isel(time=0), initial, rtol=1e-6)
    assert np.isfinite(found.to_array()).all()


@pytest.mark.parametrize("method", METHODS)
def test_only_the_first_losses_are_looked_at(posteriors, held_out, method):
    posterior = posteriors[method]
    expected = posterior.simulate(held_out, key=KEY, draws=6)
    held_out["loss"].values[:, 1:] = -7.0
    xr.testing.assert_identical(posterior.simulate(held_out, key=KEY, draws=6), expected)
    planned = bs.planned_runs(
        posterior.runs, held_out["batch"].values, run_ids=held_out["run"].values
    )
    found = posterior.simulate(planned, key=KEY, draws=6)
    np.testing.assert_allclose(found["mean_loss"], expected["mean_loss"], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_examples_and_queries_are_found_by_their_ids(posteriors, held_out, method):
    posterior = posteriors[method]
    expected = posterior.simulate(held_out, key=KEY, draws=6)
    order = np.random.default_rng(0).permutation(held_out.sizes["train"])
    other = held_out.isel(train=order).copy(deep=True)
    place = np.append(np.argsort(order), -1).astype(np.int32)
    other["batch"].values[:] = place[held_out["batch"].values]
    found = posterior.simulate(other, key=KEY, draws=6)
    xr.testing.assert_identical(found, expected)
    some = posterior.simulate(other.isel(query=[2, 1]), key=KEY, draws=6)
    chosen = expected["mean_loss"].isel(query=[2, 1])
    np.testing.assert_allclose(some["mean_loss"], chosen, rtol=1e-4, atol=1e-6)
    assert some["query"].values.tolist() == held_out["query"].values[[2, 1]].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_posterior_simulates_the_same(posteriors, held_out, tmp_path, method):
    posterior, path = posteriors[method], tmp_path / "posterior.nc"
    assert posterior.save(path) == path
    again = bs.load_posterior(path)
    xr.testing.assert_identical(
        again.simulate(held_out, key=KEY, draws=6), posterior.simulate(held_out, key=KEY, draws=6)
    )
    xr.testing.assert_identical(
        again.samples(key=KEY, draws=6), posterior.samples(key=KEY, draws=6)
    )
    assert again.verdict == posterior.verdict and str(again.verdict) == str(posterior.verdict)
    assert again.settings == posterior.settings
    xr.testing.assert_equal(again.runs, posterior.runs)
    assert (again.left_out is None) == (posterior.left_out is None)
    if again.left_out is not None:
        xr.testing.assert_equal(again.left_out, posterior.left_out)
    with pytest.raises(Misuse, match=r"something that exists.*pass overwrite"):
        posterior.save(path)
    posterior.save(path, overwrite=True)
    assert [one.name for one in tmp_path.iterdir()] == ["posterior.nc"]


def test_a_posterior_of_version_0_1_opens(posteriors, held_out, tmp_path):
    """Its simulator had another name, and so had two parts of its band."""
    posterior, old = posteriors["two-timescale"], tmp_path / "old.nc"
    path = posterior.save(tmp_path / "new.nc")
    groups = {group: read_group(path, group) for group in ("/", "simulator", "runs", "left_out")}
    about = groups["/"].attrs
    assert about["simulator"] == "gaussian"
    about["simulator"] = "paths"
    del about["has_widening"]
    about["simulator_settings"]["freedom"] = about["simulator_settings"].pop("df")
    arrays = groups["simulator"].drop_vars("weight")
    groups["simulator"] = arrays.rename(log_inflation="widening")
    write_groups(old, groups)
    again = bs.load_posterior(old)
    assert again.simulator.df == posterior.simulator.df
    xr.testing.assert_identical(
        again.simulate(held_out, key=KEY, draws=6), posterior.simulate(held_out, key=KEY, draws=6)
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_conformal_band(posteriors, method):
    new, calibration = whole().isel(run=slice(8, 12)), whole().isel(run=slice(4, 8))
    bands = {"held out": bs.Conformal(calibration, 0.8)}
    if posteriors[method].left_out is not None:
        bands["left out"] = bs.Conformal(None, 0.8)
    assert ("left out" in bands) == (method in ("two-timescale", "ridge band"))
    for band in bands.values():
        # Four short runs have trained on too few of the examples.
        with pytest.warns(bs.SupportWarning, match="unseen examples"):
            found = posteriors[method].simulate(new, key=KEY, draws=40, band=band)
        inside = (new["loss"] >= found["low"]) & (new["loss"] <= found["high"])
        # 0.8 on average over recordings; calibrated on the four runs of this one.
        assert inside.isel(time=slice(1, None)).mean() > 0.4
        assert found["low"].attrs["n_calibration"] == 4


def test_what_is_no_posterior_is_refused(posteriors, tmp_path):
    with pytest.raises(Misuse, match=r"no such file.*check the path"):
        bs.load_posterior(tmp_path / "none.nc")
    (tmp_path / "junk.nc").write_bytes(b"no posterior at all" * 100)
    with pytest.raises(Misuse, match=r"a file that cannot be read.*fit again"):
        bs.load_posterior(tmp_path / "junk.nc")
    whole = (posteriors["ridge"].save(tmp_path / "whole.nc")).read_bytes()
    (tmp_path / "half.nc").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Misuse, match=r"a file that cannot be read.*fit again"):
        bs.load_posterior(tmp_path / "half.nc")
    bs.export_netcdf(posteriors["ridge"].runs, tmp_path / "runs.nc")
    with pytest.raises(Misuse, match=r"a file that cannot be read.*fit again"):
        bs.load_posterior(tmp_path / "runs.nc")


@pytest.mark.parametrize("method", METHODS)
def test_arviz_takes_the_samples(posteriors, method):
    posterior = posteriors[method]
    idata = posterior.to_arviz(draws=6)
    samples, observed = idata["posterior"], idata["observed_data"]
    assert set(samples.data_vars) >= SAMPLES[method]
    draws = 1 if method in ("ridge", "mean", "persistence") else 6
    for one in samples.data_vars.values():
        assert one.dims[:2] == ("chain", "draw") and one.shape[:2] == (1, draws)
        assert set(one.dims[2:]) <= {"query", "train", "time"}
    np.testing.assert_array_equal(samples["query"], posterior.runs["query"])
    assert observed["loss"].dims == ("run", "time", "query")
    given = {"batch", "step_size", "initial_loss", "train_feature", "query_feature"}
    assert set(idata["constant_data"].data_vars) == given
    np.testing.assert_array_equal(
        posterior.to_arviz(draws=6)["posterior"].to_array(), samples.to_array()
    )
    assert "negative = helpful" in posterior.samples(key=KEY, draws=6).attrs["effects"]


def test_arviz_summarizes_a_fit(posteriors):
    import arviz

    idata = posteriors["linear"].to_arviz(draws=60)
    query = posteriors["linear"].runs["query"].values[0]
    chosen = {"query": [query], "train": idata["posterior"]["train"].values[:3]}
    summary = arviz.summary(idata["posterior"][["a"]].sel(**chosen), kind="stats", round_to="none")
    assert len(summary) == 3
    expected = idata["posterior"]["a"].sel(**chosen).mean(("chain", "draw")).values.ravel()
    np.testing.assert_allclose(summary["mean"].to_numpy(float), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_simulated_is_refused(posteriors, held_out, method):
    posterior = posteriors[method]
    held_out = held_out.copy(deep=True)
    # Without features nothing tells of other ids; with them see test_unseen.py.
    bare = held_out.drop_vars(["train_feature", "query_feature"])
    unknown = bare.assign_coords(query=["x", *held_out["query"].values[1:]])
    with pytest.raises(Misuse, match=r"queries: got unknown ids x|expected 64 features of x"):
        posterior.simulate(unknown, key=KEY)
    used = int(held_out["batch"].values[0, 0, 0])
    names = held_out["train"].values.astype(object)
    names[used] = "stranger"
    unknown = bare.assign_coords(train=names.astype(str))
    said = r"examples in the curricula: got unknown ids stranger|expected 64 features of stranger"
    with pytest.raises(Misuse, match=said):
        posterior.simulate(unknown, key=KEY)
    held_out["loss"].values[0, 0, 1], held_out["status"].values[:] = np.nan, 0
    with pytest.raises(Misuse, match=r"time 0.*not finite.*planned_runs\(like"):
        posterior.simulate(held_out, key=KEY)
    with pytest.raises(Misuse, match=r"draws: got 0"):
        posterior.simulate(posterior.runs, key=KEY, draws=0)
    with pytest.raises(Misuse, match=r"draws: got 0"):
        posterior.samples(key=KEY, draws=0)


def test_strangers_outside_the_curricula_do_not_matter(posteriors, held_out):
    unused = np.setdiff1d(np.arange(held_out.sizes["train"]), held_out["batch"].values)[0]
    names = held_out["train"].values.astype(object)
    names[unused] = "stranger"
    posterior = posteriors["linear"]
    xr.testing.assert_identical(
        posterior.simulate(held_out.assign_coords(train=names.astype(str)), key=KEY, draws=6),
        posterior.simulate(held_out, key=KEY, draws=6),
    )


def test_a_legacy_key_is_refused(posteriors, held_out):
    for key in (jax.random.PRNGKey(0), jax.random.split(KEY, 2)):
        with pytest.raises(Misuse, match=r"pass key=jax.random.key\(seed\)"):
            posteriors["linear"].simulate(held_out, key=key)
