"""A posterior in ArviZ, before and after 1.0: this file runs under both (see .ci/run)."""

from dataclasses import replace

import arviz
import jax
import matplotlib
import numpy as np
import pytest
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import norm

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning, Misuse
from bayes_simfluence.evaluation.leave_one_run_out import loo_over_runs
from bayes_simfluence.posterior.arviz import GROUPS, Prior, container, over_runs

matplotlib.use("Agg")

KEY = jax.random.key(0)
DRAWS, STEPS, QUERIES, RUNS, TIMES = 80, 16, 2, 5, 4
NEW = int(arviz.__version__.split(".")[0]) >= 1

pytestmark = [
    # ArviZ's own: of its dependencies, of k, of quantities that do not vary between draws.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz"),
    pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:arviz"),
    pytest.mark.filterwarnings("ignore:Your data appears to have a single value:UserWarning"),
]


@pytest.fixture(scope="module")
def runs():
    return bs.example_runs().isel(
        run=slice(0, RUNS), step=slice(0, STEPS), time=slice(0, STEPS + 1), query=slice(0, QUERIES)
    )


@pytest.fixture(scope="module")
def posteriors(runs):
    settings = {
        "default": {"method": bs.Exact(times=TIMES)},
        "linear": {"model": bs.Simfluence.linear()},
        "additive": {"model": bs.Simfluence.additive()},
        "ridge": {"method": bs.Ridge(penalty=0.1, band=True)},
    }
    return {name: bs.fit(runs, key=KEY, **parts) for name, parts in settings.items()}


@pytest.fixture(scope="module")
def idatas(posteriors):
    return {name: posterior.to_arviz(draws=DRAWS) for name, posterior in posteriors.items()}


def groups_of(idata):
    return set(idata.children) if NEW else set(idata.groups())


def some(idata, name):
    """Arguments of plots: a few of the coefficients of one query."""
    known = idata["posterior"]
    coords = {dim: known[dim].values[:2] for dim in ("query", "train")}
    return {"var_names": [name], "coords": coords}


def elpd_of(loo):
    return loo.elpd if NEW else loo.elpd_loo


DENSE = {"default", "linear", "additive"}


@pytest.mark.parametrize("name", ["default", "linear", "additive", "ridge"])
def test_groups_explain_themselves(posteriors, idatas, runs, name):
    idata = idatas[name]
    without = {"sample_stats"}
    if name not in DENSE:
        without |= {"log_likelihood", "run_log_likelihood", "prior", "prior_predictive"}
    assert groups_of(idata) == set(GROUPS) - without
    rows = posteriors[name].simulator.rows if name == "default" else np.arange(STEPS)
    observed, predicted = (
        idata[group]["loss"] for group in ("observed_data", "posterior_predictive")
    )
    assert observed.dims == ("run", "time", "query")
    assert predicted.dims == ("chain", "draw", *observed.dims)
    np.testing.assert_array_equal(observed["time"], rows + 1)
    np.testing.assert_array_equal(observed, runs["loss"].isel(time=rows + 1))
    if name in DENSE:
        assert list(idata["log_likelihood"].data_vars) == ["loss"]
        assert idata["log_likelihood"]["loss"].dims == predicted.dims
        assert idata["run_log_likelihood"]["loss"].dims == ("chain", "draw", "run", "query")
    for group in groups_of(idata):
        for coordinate in {"run", "query", "train", "step"} & set(idata[group].coords):
            np.testing.assert_array_equal(idata[group][coordinate], runs[coordinate])
        if "time" in idata[group].coords:
            np.testing.assert_array_equal(idata[group]["time"], observed["time"])
        if "draw" in idata[group].coords:
            assert idata[group]["draw"].values.tolist() == list(range(DRAWS))
    constant = idata["constant_data"]
    assert set(constant.data_vars) == {
        "batch", "step_size", "initial_loss", "train_feature", "query_feature"
    }  # fmt: skip
    np.testing.assert_array_equal(constant["initial_loss"], runs["loss"].isel(time=0))


def test_all_groups_belong_to_the_same_draws(idatas, posteriors, runs):
    idata, noise = idatas["linear"], posteriors["linear"].simulator.noise
    density, draws = idata["log_likelihood"]["loss"][0], idata["posterior"]
    run, step = 1, 3
    batch = runs["batch"].values[run, step]
    share = np.bincount(batch[batch >= 0], minlength=runs.sizes["train"]) / (batch >= 0).sum()
    before, now = (runs["loss"].values[run, time].astype(float) for time in (step, step + 1))
    a, b = (draws[name].values[0].astype(float) @ share for name in "ab")
    expected = norm.logpdf(now, (1.0 + a) * before + b, noise)
    np.testing.assert_allclose(density[:, run, step], expected, rtol=1e-4, atol=1e-4)
    whole = idata["run_log_likelihood"]["loss"][0]
    np.testing.assert_allclose(whole, density.sum("time"), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_loo_takes_the_container_as_it_is(idatas, name):
    density = idatas[name]["log_likelihood"]["loss"].values[0].astype(float)
    loo = arviz.loo(idatas[name], pointwise=True)
    assert loo.n_samples == DRAWS and loo.n_data_points == density[0].size
    pointwise = logsumexp(density, axis=0) - np.log(DRAWS)
    elpd = loo.elpd_i if NEW else loo.loo_i
    assert elpd.dims == ("run", "time", "query") and np.isfinite(elpd).all()
    # A loss is not predicted better without it than with it.
    assert (elpd.values <= pointwise + 1e-6).all()
    p_loo = loo.p if NEW else loo.p_loo
    np.testing.assert_allclose(p_loo, pointwise.sum() - elpd_of(loo), rtol=1e-4)


def test_compare_ranks_models_on_the_same_losses(posteriors, idatas):
    pair = {name: idatas[name] for name in ("linear", "additive")}
    for table, containers in (
        (arviz.compare(pair), pair),
        (arviz.compare({name: over_runs(idata) for name, idata in pair.items()}), None),
    ):
        assert set(table.index) == set(pair)
        if containers is not None:
            best = max(containers, key=lambda name: elpd_of(arviz.loo(containers[name])))
            assert table.index[0] == best
    times = idatas["default"]["observed_data"]["time"].values
    thinned = posteriors["linear"].to_arviz(draws=DRAWS, times=times)
    np.testing.assert_array_equal(thinned["observed_data"]["time"], times)
    table = arviz.compare({"default": idatas["default"], "linear": thinned})
    assert set(table.index) == {"default", "linear"}


def test_times_in_between_are_integrated_out(posteriors, idatas, runs):
    posterior = posteriors["linear"]
    thinned = posterior.to_arviz(draws=DRAWS, times=[8, 16])["log_likelihood"]["loss"]
    assert thinned["time"].values.tolist() == [8, 16]
    every = idatas["linear"]["log_likelihood"]["loss"]
    assert not np.allclose(thinned, every.sel(time=[8, 16]))
    all_times = posterior.to_arviz(draws=DRAWS, times=runs["time"].values[1:])
    np.testing.assert_array_equal(all_times["log_likelihood"]["loss"], every)
    for wrong in ([0, 8], [99], []):
        with pytest.raises(Misuse, match=r"times: got .* from 1 to 16"):
            posterior.to_arviz(times=wrong)
    with pytest.raises(Misuse, match=r"none at which the model has a density"):
        posteriors["default"].to_arviz(times=[1])


@pytest.mark.parametrize(("name", "variable"), [("default", "staying"), ("linear", "a")])
def test_summary_and_plots_take_the_container_as_it_is(idatas, name, variable):
    idata = idatas[name]
    shown = arviz.summary(idata, **some(idata, variable), round_to="none")
    assert len(shown) == 4
    expected = idata["posterior"][variable].mean(("chain", "draw"))[:2, :2].values
    np.testing.assert_allclose(shown["mean"].to_numpy(float), expected.ravel(), rtol=1e-3)
    predictive = arviz.plot_ppc_dist if NEW else arviz.plot_ppc
    plots = [
        arviz.plot_trace(idata, **some(idata, variable)),
        arviz.plot_forest(idata, **some(idata, variable)),
        predictive(idata),
    ]
    for plot in plots:
        figures = {plot.get_viz("figure")} if NEW else {axes.figure for axes in np.ravel(plot)}
        assert all(any(axes.has_data() for axes in figure.axes) for figure in figures)
        for figure in figures:
            matplotlib.pyplot.close(figure)


def test_whole_summary_has_a_row_for_each_number(idatas):
    posterior = idatas["linear"]["posterior"]
    rows = sum(posterior[name][0, 0].size for name in posterior.data_vars)
    assert len(arviz.summary(idatas["linear"], kind="stats")) == rows


@pytest.mark.parametrize("name", ["default", "ridge"])
def test_a_container_can_be_kept_in_a_file(idatas, tmp_path, name):
    idatas[name].to_netcdf(tmp_path / "idata.nc", engine="h5netcdf")
    again = arviz.from_netcdf(tmp_path / "idata.nc", engine="h5netcdf")
    assert groups_of(again) == groups_of(idatas[name])
    for group in groups_of(again):
        read, kept = (x[group].to_dataset() if NEW else x[group] for x in (again, idatas[name]))
        xr.testing.assert_equal(read, kept)


def drawn_prior(runs, *, key, draws):
    """A stand-in: coefficients and losses of the right names, dimensions and number."""
    query, times = runs.sizes["query"], runs["time"].values
    shape = (1, draws, runs.sizes["run"], len(times), query)
    counted = {"chain": [0], "draw": np.arange(draws)}
    ids = {name: runs[name].values for name in ("run", "query")}
    b = jax.random.normal(key, (1, draws, query))
    loss = jax.random.uniform(key, shape)
    return Prior(
        xr.Dataset({"b": (("chain", "draw", "query"), np.asarray(b))}, coords=counted),
        xr.Dataset(
            {"loss": (("chain", "draw", "run", "time", "query"), np.asarray(loss))},
            coords={**counted, **ids, "time": times},
        ),
    )


def test_a_prior_fills_its_groups(posteriors):
    idata = replace(posteriors["default"], prior=drawn_prior).to_arviz(draws=DRAWS)
    predictive, observed = idata["prior_predictive"]["loss"], idata["observed_data"]["loss"]
    assert predictive.dims == ("chain", "draw", *observed.dims)
    np.testing.assert_array_equal(predictive["time"], observed["time"])
    assert idata["prior"]["b"].sizes["draw"] == DRAWS
    plot = arviz.plot_ppc_dist if NEW else arviz.plot_ppc
    assert plot(idata, group="prior_predictive" if NEW else "prior") is not None
    matplotlib.pyplot.close("all")
    only = replace(
        posteriors["default"], prior=lambda runs, *, key, draws: Prior(drawn_prior(
            runs, key=key, draws=draws).parameters)
    ).to_arviz(draws=DRAWS)  # fmt: skip
    assert "prior" in groups_of(only) and "prior_predictive" not in groups_of(only)


def sampler_statistics(draws):
    rng = np.random.default_rng(0)
    dims = ("chain", "draw")
    return xr.Dataset(
        {
            "diverging": (dims, rng.random((1, draws)) < 0.1),
            "energy": (dims, rng.normal(size=(1, draws))),
            "tree_depth": (dims, rng.integers(1, 10, (1, draws))),
            "acceptance_rate": (dims, rng.random((1, draws))),
        },
        coords={"chain": [0], "draw": np.arange(draws)},
    )


def test_statistics_of_a_sampler_are_kept_and_saved(posteriors, tmp_path):
    stats = sampler_statistics(DRAWS)
    posterior = replace(posteriors["linear"], sample_stats=stats)
    path = posterior.save(tmp_path / "posterior.nc")
    for sampled in (posterior, bs.load_posterior(path)):
        xr.testing.assert_equal(sampled.sample_stats, stats)
        assert sampled.sample_stats["diverging"].dtype == bool
        idata = sampled.to_arviz(draws=DRAWS)
        assert idata["sample_stats"]["energy"].dims == ("chain", "draw")
        assert arviz.plot_energy(idata) is not None
    matplotlib.pyplot.close("all")
    with pytest.raises(Misuse, match=r"sample_stats: got .*80.*the posterior's .*7.*draws=80"):
        posterior.to_arviz(draws=7)
    assert "sample_stats" not in groups_of(posterior.to_arviz(draws=7, groups=["posterior"]))


def test_a_fit_keeps_the_statistics_of_its_sampler(runs):
    class Sampler:
        """A method whose fits have a sampler's statistics."""

        def default_model(self):
            return bs.Simfluence.additive()

        def as_dict(self):
            return {"method": "Sampler"}

        def fit(self, recorded, model, context):
            fitted = bs.Exact().fit(recorded, model, context)
            return replace(fitted, sample_stats=sampler_statistics(DRAWS))

    posterior = bs.fit(runs, method=Sampler(), key=KEY)
    xr.testing.assert_equal(posterior.sample_stats, sampler_statistics(DRAWS))


def test_only_what_is_asked_for_is_made(posteriors):
    posterior = replace(posteriors["default"], prior=drawn_prior)
    wanted = ["posterior_predictive", "observed_data"]
    idata = posterior.to_arviz(draws=3, groups=wanted)
    assert groups_of(idata) == set(wanted)
    np.testing.assert_array_equal(
        idata["observed_data"]["time"], posterior.to_arviz(draws=3)["observed_data"]["time"]
    )
    with pytest.raises(Misuse, match=r"groups: got posteriors; expected some of posterior, log_l"):
        posterior.to_arviz(groups=["posterior", "posteriors"])


def test_more_draws_than_the_limit_are_refused_before_any_work(posteriors, monkeypatch):
    posterior = posteriors["linear"]
    points, weights = RUNS * (STEPS + 1) * QUERIES, QUERIES * posterior.runs.sizes["train"]
    each = 4 * (3 * points + 2 * weights)
    posterior.to_arviz(draws=3, limit_bytes=3 * each)
    monkeypatch.setattr(type(posterior.simulator), "simulate", None)
    with pytest.raises(Misuse, match=rf"got {4 * each:,} bytes.*at most 3 draws"):
        posterior.to_arviz(draws=4, limit_bytes=3 * each)
    density = posterior.to_arviz(draws=4, limit_bytes=16 * points, groups=["log_likelihood"])
    assert density["log_likelihood"]["loss"].nbytes <= 16 * points
    with pytest.raises(Misuse, match=r"draws: got 0"):
        posterior.to_arviz(draws=0)


def normal_mean(values, draws):
    """Densities of values given draws of their mean's posterior (flat prior, unit noise)."""
    rng = np.random.default_rng(0)
    mean = values.mean() + rng.normal(size=draws) / np.sqrt(values.size)
    density = norm.logpdf(values[None], mean[:, None, None])[None]
    dims = ("chain", "draw", "run", "query")
    counted = {"chain": [0], "draw": np.arange(draws)}
    return container(
        {
            "posterior": xr.Dataset({"mean": (dims[:2], mean[None])}, coords=counted),
            "run_log_likelihood": xr.Dataset(
                {"loss": (dims, density)},
                coords={**counted, "run": [f"r{run}" for run in range(len(values))]},
            ),
        }
    )


def test_leaving_runs_out_by_weights_is_leaving_them_out():
    values = np.random.default_rng(1).normal(size=(30, 1))
    table = loo_over_runs(normal_mean(values, 4000))
    others = (values.sum() - values[:, 0]) / (len(values) - 1)
    exact = norm.logpdf(values[:, 0], others, np.sqrt(1.0 + 1.0 / (len(values) - 1)))
    np.testing.assert_allclose(table["elpd"], exact, atol=0.02)
    assert table["trusted"].all() and table.index.tolist()[:2] == ["r0", "r1"]
    assert (table["pareto_k"] < 0.7).all()


def test_runs_that_weights_cannot_leave_out_are_named():
    values = np.random.default_rng(1).normal(size=(40, 1))
    values[2] = 30.0
    with pytest.warns(FitWarning, match=r"for \d of 40 runs.*use elpd_over_runs, which refits"):
        table = loo_over_runs(normal_mean(values, 4000))
    assert table["pareto_k"].idxmax() == "r2" and table["pareto_k"]["r2"] > 0.7
    np.testing.assert_array_equal(table["trusted"], table["pareto_k"] <= 0.7)
    assert table["trusted"].sum() > 30


def test_runs_without_a_density_cannot_be_left_out(idatas):
    with pytest.raises(Misuse, match=r"expected a group run_log_likelihood.*fit with a likelihood"):
        loo_over_runs(idatas["ridge"])
