"""The two-timescale fit: its gradient, its verdict, and the recordings that it must take."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import FitFailed, FitWarning, Misuse
from bayes_simfluence.gaussian import search as search_module
from bayes_simfluence.gaussian.dense import predictions_of_left_out
from bayes_simfluence.gaussian.designs import designs_and_means
from bayes_simfluence.gaussian.linear_gaussian import LinearGaussian
from bayes_simfluence.gaussian.search import _negative_score, band_of, even_rows
from bayes_simfluence.inference import exact
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.hyper import log_prior, natural_values, start
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.progress import Silent

RUNS, STEPS, TIMES, QUERY = 4, 16, 4, 3
EXACT = bs.Exact(times=TIMES)
KEY = jax.random.key(0)


examples = cache(bs.example_runs)


def recording(runs=RUNS, first=0):
    """A corner of the example recording, small enough to be fitted in a test."""
    chosen = {"step": slice(0, STEPS), "time": slice(0, STEPS + 1), "query": slice(0, QUERY)}
    return examples().isel(run=slice(first, first + runs), **chosen).copy(deep=True)


@pytest.fixture(scope="module")
def posterior():
    return bs.fit(recording(), method=EXACT, key=KEY)


def problem():
    """Arrays of the search, as the fit makes them."""
    found = recorded_arrays(recording())
    fitted = found._replace(step_size=found.step_size / found.step_size.max())
    return Simfluence(coupling="none"), fitted, even_rows(STEPS, TIMES)


def gaussian_at(model, values, fitted, rows):
    """The linear-Gaussian object by NumPy, and changes minus their prior mean."""
    designs, mean = designs_and_means(model, values, fitted, jnp.asarray(rows), knots=6)
    designs = np.asarray(designs) / np.sqrt(np.square(designs).sum(axis=2).mean())
    error = np.asarray(model.error.covariance(values, jnp.arange(1, STEPS + 1) / STEPS))
    error = error[np.ix_(rows, rows)] + 1e-8 * np.eye(len(rows))
    linked = np.log(np.expm1(fitted.loss))
    change = linked[:, 1:][:, rows] - linked[:, :1] - np.asarray(mean)
    known = np.ones(change.shape[:2], bool)
    arrays = (jnp.asarray(array) for array in (designs, error, known))
    return LinearGaussian(*arrays), jnp.asarray(change)


@pytest.mark.parametrize("criterion", ["leave-one-run-out", "marginal", "evidence"])
def test_the_gradient_is_that_of_differences(rng, criterion):
    model, fitted, rows = problem()
    with double_precision():
        jointly = None if criterion == "evidence" else jnp.asarray(float(criterion != "marginal"))
        hypers = hypers_of(model, fitted.features)
        free = start(hypers) + 0.2 * rng.normal(size=len(hypers))

        def score(free):
            return _negative_score(
                jnp.asarray(free), fitted, jnp.asarray(rows), model=model, jointly=jointly
            )

        value, gradient = score(free)
        differences = []
        for at in range(len(free)):
            step = np.zeros_like(free)
            step[at] = 1e-5
            differences.append(float(score(free + step)[0] - score(free - step)[0]) / 2e-5)
        np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=1e-7)
        assert np.abs(gradient).min() > 0

        # The value: criterion plus prior, from the pieces.
        values = natural_values(hypers, jnp.asarray(free))
        gaussian, change = gaussian_at(model, values, fitted, rows)
        score = {
            "leave-one-run-out": lambda change: gaussian.left_out_scores(change).joint,
            "marginal": lambda change: gaussian.left_out_scores(change).marginal,
            "evidence": gaussian.evidence_score,
        }[criterion]
        expected = score(change) + log_prior(hypers, jnp.asarray(free)) / (RUNS * QUERY)
        np.testing.assert_allclose(-value, expected, rtol=1e-6)


def test_the_fit_explains_itself(posterior):
    verdict = posterior.verdict
    assert verdict.ok and "MSE of left-out runs" in verdict.sentence
    assert any("90% bands cover" in note for note in verdict.notes)
    assert any("4 runs tell little" in note for note in verdict.notes)
    assert not any("features" in note for note in verdict.notes)
    assert {"left_out_score", "left_out_mse", "left_out_coverage_90"} <= set(verdict.numbers)
    assert np.isfinite(list(verdict.numbers.values())).all()
    assert posterior.settings["method"] == "Exact" and posterior.settings["times"] == TIMES


def test_the_search_beats_its_start(posterior):
    model, fitted, rows = problem()
    with double_precision():
        hypers = hypers_of(model, fitted.features)

        def score(free):
            return -_negative_score(
                jnp.asarray(free), fitted, jnp.asarray(rows),
                model=model, jointly=jnp.ones(()),
            )[0]  # fmt: skip

        found = float(score(posterior.simulator.free))
        np.testing.assert_allclose(found, posterior.verdict.numbers["left_out_score"], rtol=1e-6)
        assert found > float(score(start(hypers))) + 0.01


def test_left_out_runs_come_with_their_band(posterior):
    left, truth = posterior.left_out, recording()["loss"]
    assert left["predicted"].dims == ("run", "time", "query")
    assert left["time"].values.tolist() == [4, 8, 12, 16]
    assert (left["low"] < left["predicted"]).all() and (left["predicted"] < left["high"]).all()
    truth = truth.sel(time=left["time"])
    inside = float(((truth >= left["low"]) & (truth <= left["high"])).mean())
    np.testing.assert_allclose(inside, posterior.verdict.numbers["left_out_coverage_90"], atol=0.02)
    mse = float(((truth - left["predicted"]) ** 2).mean())
    np.testing.assert_allclose(mse, posterior.verdict.numbers["left_out_mse"], rtol=1e-3)


def test_the_band_is_scaled_by_left_out_errors(posterior):
    model, fitted, rows = problem()
    simulator = posterior.simulator
    band = band_of(model, fitted, rows, simulator.free)
    np.testing.assert_allclose(band.scale, simulator.scale, rtol=1e-6)
    with double_precision():
        values = natural_values(hypers_of(model, fitted.features), jnp.asarray(simulator.free))
        gaussian, change = gaussian_at(model, values, fitted, rows)
        # In plain NumPy, by leaving each run out.
        predictions = [predictions_of_left_out(gaussian, change, run) for run in range(RUNS)]
        z = np.stack([
            missed / np.sqrt(np.diag(covariance))[:, None] for missed, covariance in predictions
        ])  # fmt: skip
    np.testing.assert_allclose(band.scale**2, (z**2).mean(axis=(0, 1)), rtol=1e-4)
    # The variance inflation is the least-squares fit to the mean square at each time.
    by_time = np.log(((z / band.scale) ** 2).mean(axis=(0, 2)))
    lines = np.interp((rows + 1) / STEPS, np.linspace(0, 1, TIMES), band.log_inflation)
    slack = [
        np.interp((rows + 1) / STEPS, np.linspace(0, 1, TIMES), unit) for unit in np.eye(TIMES)
    ]
    np.testing.assert_allclose(np.stack(slack) @ (by_time - lines), 0.0, atol=1e-5)
    assert band.df == 3.0


def finite(posterior, runs=None):
    """Simulations of two further runs; of the shape that other files have, to compile once."""
    runs = recording(2, first=6) if runs is None else runs
    simulated = posterior.simulate(runs, key=jax.random.key(1), draws=6)
    assert np.isfinite(simulated["loss"]).all()
    return simulated


def quietly(runs, **settings):
    """A fit whose verdict may be bad: what matters is that there is one."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        found = bs.fit(runs, method=settings.pop("method", EXACT), key=KEY, **settings)
    assert found.verdict.sentence.endswith(".")
    return found


@pytest.mark.filterwarnings("ignore:.*initial losses:bayes_simfluence.SupportWarning")
def test_a_constant_loss_gives_finite_results():
    runs = recording()
    runs["loss"].values[..., 1] = 0.5
    posterior = quietly(runs)
    spread = finite(posterior)["loss"].isel(time=-1).std("draw").mean("run")[0]
    assert np.isfinite(posterior.left_out.to_array()).all()
    assert float(spread[1]) < 0.5 * float(spread[0])


def test_a_zero_loss_gives_finite_results():
    runs = recording()
    runs["loss"].values[:, 5:, 2] = 0.0
    finite(quietly(runs))


def test_without_step_sizes_they_are_not_asked_for(posterior):
    fitted = quietly(recording().drop_vars("step_size"))
    assert fitted.simulator.largest_step_size is None
    runs = recording(2, first=6).drop_vars("step_size")
    one, other = finite(fitted, runs), finite(fitted)
    np.testing.assert_array_equal(one["loss"], other["loss"])
    with pytest.raises(Misuse, match=r"got no step_size.*planned_runs"):
        finite(posterior, runs)


def test_without_features_effects_are_independent():
    runs = recording().drop_vars(["train_feature", "query_feature"])
    fitted = quietly(runs)
    unused = bs.Simfluence(prior=bs.priors.Normal(features=False))
    for one, said in ((fitted, True), (quietly(runs, model=unused), False)):
        assert any("no gradient features" in note for note in one.verdict.notes) == said
    assert not {"staying_alike", "staying_dot"} & set(fitted.simulator.values)
    finite(fitted)


def test_features_that_are_there_may_be_left_unused():
    features = recorded_arrays(recording()).features
    used, unused = features.where(True), features.where(False)
    assert used.train.shape == (200, 64) and used.query.shape == (QUERY, 64)
    assert unused.train.shape == (200, 0) and unused.query.shape == (QUERY, 0)
    without_train = recorded_arrays(recording().drop_vars("train_feature")).features
    assert without_train.where(True).query.shape == (QUERY, 0)
    alone = recorded_arrays(recording().drop_vars("query_feature")).features.where(True)
    assert alone.train.shape == (200, 64) and alone.query.shape == (QUERY, 0)


@pytest.mark.parametrize("runs", [1, 2])
def test_one_run_and_two_are_enough(runs):
    posterior = quietly(recording(runs))
    with pytest.warns(bs.SupportWarning, match="unseen examples"):
        finite(posterior)
    one = "One run: scales and hyperparameters are fitted to it"
    assert posterior.verdict.sentence.startswith(one) == (runs == 1)
    assert any("cover" in note for note in posterior.verdict.notes) == (runs == 2)
    # A single run is left out of nothing but itself: what is left is the prior.
    assert np.isfinite(posterior.left_out["predicted"]).all() and posterior.simulator.df == 3


def test_the_evidence_is_a_criterion(posterior):
    fitted = quietly(recording(), method=bs.Exact("evidence", times=TIMES))
    assert fitted.settings["hyperparameters"] == "evidence"
    assert not np.allclose(fitted.simulator.free, posterior.simulator.free)
    finite(fitted)


def test_a_bad_verdict_warns_or_raises_when_asked():
    # The losses of each run belong to the curriculum of another.
    runs = recording().drop_vars(["train_feature", "query_feature"])
    runs["loss"].values[:] = np.roll(runs["loss"].values, 2, axis=0)
    with pytest.warns(FitWarning, match="Curricula explain nothing yet"):
        posterior = bs.fit(runs, method=EXACT, key=KEY)
    assert not posterior.verdict.ok
    with pytest.raises(FitFailed, match=r"Curricula explain nothing yet.*record more runs"):
        bs.fit(runs, method=EXACT, key=KEY, strict=True)


# Six short runs have not trained on all examples that the others have.
@pytest.mark.filterwarnings("ignore:.*unseen examples:bayes_simfluence.checks.SupportWarning")
def test_held_out_runs_are_predicted(posterior):
    final, error = [], []
    for first in range(6, 14, 2):
        held_out = recording(2, first)
        final.append(held_out["loss"].values[:, -1])
        predicted = finite(posterior, held_out)["mean_loss"].mean(("chain", "draw"))
        error.append(predicted.values[:, -1] - final[-1])
    mean = recording()["loss"].values[:, -1].mean(axis=0)
    assert np.square(error).mean() < 0.5 * np.square(mean - np.array(final)).mean()


@pytest.mark.parametrize(("steps", "count"), [(96, 24), (10, 24), (7, 3), (5, 1)])
def test_times_are_spread_evenly_and_hold_the_last(steps, count):
    rows = even_rows(steps, count)
    assert rows[-1] == steps - 1 and len(rows) == min(count, steps) and rows[0] >= 0
    assert np.ptp(np.diff(rows)) <= 1 if len(rows) > 1 else True


class Looked(Exception):
    """Rows that a search was asked to look at."""


@pytest.mark.parametrize(
    ("method", "runs", "times"),
    [(bs.Exact(), 5, 80), (bs.Stack(), 8, 50), (bs.Exact(), 15, 26), (bs.Stack(times=8), 5, 8)],
)
def test_few_runs_without_features_are_looked_at_at_more_times(monkeypatch, method, runs, times):
    def search(model, fitted, rows, *rest):
        raise Looked(len(rows))

    monkeypatch.setattr(exact, "search", search)
    with pytest.raises(Looked) as found:
        bs.fit(examples().drop_dims("feature").isel(run=slice(0, runs)), method=method, key=KEY)
    assert found.value.args == (times,)
    with pytest.raises(Looked) as found:
        bs.fit(examples().isel(run=slice(0, runs)), method=method, key=KEY)
    assert found.value.args == (method.times or 24,)


@pytest.mark.parametrize(("times", "first"), [(96, 48), (24, 12), (16, 12), (8, 8)])
def test_a_search_begins_on_half_of_the_times(monkeypatch, times, first):
    looked = []

    def objective(model, runs, rows, *rest):
        looked.append(len(rows))
        return lambda moved: (0.0, np.zeros_like(moved))

    monkeypatch.setattr(search_module, "_objective", objective)
    runs = recorded_arrays(examples().isel(run=slice(0, 2)))
    search_module.search(Simfluence(), runs, even_rows(96, times), "marginal", Silent())
    assert looked == [first, times]


def test_times_are_counted():
    with pytest.raises(Misuse, match=r"Exact\(times=...\).*integer >= 1"):
        bs.Exact(times=0)
