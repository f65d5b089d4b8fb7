"""Simulation-based calibration of methods that are right or wrong by design; held-out runs."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.calibration import by_horizon, sbc
from bayes_simfluence.evaluation.metrics import COVERAGES
from bayes_simfluence.evaluation.ranks import rank_histogram_test
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference.method import Fitted
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.simulators.affine import AffineSimulator

KEY = jax.random.key(0)
FALSE_ALARM = 1e-3
"""Of each test of a right posterior."""
NOISE, PRIOR = 0.05, 0.1
BATCH = np.array([[[0], [1], [0]], [[1], [0], [1]]])
EXPOSURE = np.eye(2)[BATCH[..., 0]]


def prior_draw(key):
    """Two runs of an additive model with a normal prior and known noise."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    b = PRIOR * rng.normal(size=2)
    steps = EXPOSURE @ b + NOISE * rng.normal(size=(2, 3))
    loss = 1.0 + np.concatenate([np.zeros((2, 1)), np.cumsum(steps, axis=1)], axis=1)
    runs = bs.runs_from_arrays(batch=BATCH, loss=loss[..., None], train_ids=["x", "y"])
    return runs, xr.Dataset({"b": (("query", "train"), b[None])})


@dataclass(frozen=True)
class Conjugate:
    """The exact posterior of that model, wrong on request."""

    shift: float = 0.0
    ratio: float = 1.0
    ignores: bool = False
    ok: bool = True

    def default_model(self):
        return bs.Simfluence.additive()

    def as_dict(self) -> dict[str, Any]:
        return {"method": "conjugate"}

    def fit(self, runs, model, context):
        design, change = EXPOSURE.reshape(-1, 2), np.diff(runs.loss[..., 0], axis=1).ravel()
        weight = 0.0 if self.ignores else NOISE**-2
        covariance = np.linalg.inv(weight * design.T @ design + np.eye(2) / PRIOR**2)
        mean = weight * covariance @ design.T @ change
        mean = mean + self.shift * np.sqrt(np.diagonal(covariance))
        factor = np.concatenate([np.zeros((2, 2)), self.ratio * np.linalg.cholesky(covariance)])
        simulator = AffineSimulator(np.zeros((1, 2)), mean[None], factor=factor[None])
        return Fitted(self.wrapped(simulator, context.key), Verdict(self.ok, "as planted"))

    def wrapped(self, simulator, key):
        return simulator


@dataclass(frozen=True)
class Held(AffineSimulator):
    """Draws of Markov chains: right on their own, each close to the one before."""

    chain: np.ndarray | None = None

    @property
    def draws(self):
        return self.chain.shape[0] * self.chain.shape[1]

    def samples(self, *, key, draws):
        return {"b": (("chain", "draw", "query", "train"), self.chain)}


@dataclass(frozen=True)
class Chain(Conjugate):
    """The same posterior by two chains of this length and correlation of neighbours."""

    length: int = 500
    correlation: float = 0.8

    def wrapped(self, simulator, key):
        drawn = simulator.samples(key=key, draws=2 * self.length)["b"][1]
        white = (drawn - simulator.b[:, None][None]).reshape(2, self.length, 1, 2)
        chain, left = white.copy(), np.sqrt(1.0 - self.correlation**2)
        for draw in range(1, self.length):
            chain[:, draw] = self.correlation * chain[:, draw - 1] + left * white[:, draw]
        return Held(simulator.a, simulator.b, chain=chain + simulator.b)


def log_likelihood(values, runs):
    """Up to a constant: a quantity that looks at the data."""
    exposure = xr.DataArray(EXPOSURE, dims=("run", "step", "train"))
    change = runs["loss"].diff("time").rename(time="step").drop_vars("step")
    error = change.drop_vars(("run", "query")) - xr.dot(
        exposure, values["b"].drop_vars(("query", "train"), errors="ignore"), dim="train"
    )
    return -(error**2).sum(("run", "step", "query"))


def ranked(method, simulations=60, draws=19, **settings):
    return sbc(prior_draw, method, key=KEY, simulations=simulations, draws=draws, **settings)


def test_ranks_explain_themselves():
    ranks = ranked(Conjugate(), simulations=3)
    rank = ranks["rank"]
    assert rank.dims == ("simulation", "quantity") and rank.shape == (3, 2)
    assert rank.attrs == {"long_name": "draws below the true value", "draws": 19, "bins": 2}
    assert ranks["quantity"].values.tolist() == ["b[0, x]", "b[0, y]"]
    assert ((rank >= 0) & (rank <= 19)).all() and np.issubdtype(rank.dtype, np.integer)
    assert ranks["effective"].values.tolist() == [19.0] * 3 and ranks["ok"].all()
    assert "conjugate" in ranks.attrs["settings"]
    assert (ranks.attrs["failed_verdicts"], ranks.attrs["short_chains"]) == (0, 0)


def test_more_simulations_begin_with_the_same_ones():
    few, many = (ranked(Conjugate(), simulations=number)["rank"].values for number in (3, 5))
    np.testing.assert_array_equal(many[:3], few)
    other = sbc(prior_draw, Conjugate(), key=jax.random.key(1), simulations=3, draws=19)
    assert (other["rank"].values != few).any()


def test_a_right_posterior_has_uniform_ranks():
    ranks = ranked(
        Conjugate(),
        simulations=100,
        draws=99,
        quantities={
            "b": lambda values, runs: values["b"],
            "rises": lambda values, runs: values["b"].isel(train=0) > 0,
            "log likelihood": log_likelihood,
        },
    )
    assert ranks["quantity"].values.tolist() == [
        "b[0, x]", "b[0, y]", "rises[0]", "log likelihood"
    ]  # fmt: skip
    test = rank_histogram_test(ranks, false_alarm=FALSE_ALARM)
    assert test.ok, test.sentence


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (Conjugate(shift=-1.0), "too low"),
        (Conjugate(shift=1.0), "too high"),
        (Conjugate(ratio=0.4), "too narrow"),
        (Conjugate(ratio=3.0), "too wide"),
    ],
)
def test_planted_errors_are_seen(method, error):
    test = rank_histogram_test(ranked(method), false_alarm=FALSE_ALARM)
    assert not test.ok and error in test.sentence


def test_only_a_quantity_that_looks_at_the_data_sees_a_posterior_that_does_not():
    ranks = ranked(Conjugate(ignores=True))
    assert rank_histogram_test(ranks, false_alarm=FALSE_ALARM).ok
    looked = ranked(Conjugate(ignores=True), quantities={"log likelihood": log_likelihood})
    test = rank_histogram_test(looked, false_alarm=FALSE_ALARM)
    assert not test.ok and "log likelihood" in test.sentence


def test_long_chains_are_thinned_and_short_ones_are_told_of():
    long = ranked(Chain())
    assert long.attrs["short_chains"] == 0 and (long["effective"] == 19).all()
    assert rank_histogram_test(long, false_alarm=FALSE_ALARM).ok
    short = ranked(Chain(length=10, correlation=0.98))
    assert short.attrs["short_chains"] == 60 and (short["effective"] < 19).all()
    test = rank_histogram_test(short, false_alarm=FALSE_ALARM)
    assert not test.ok and "draw longer chains" in test.sentence


def test_failed_verdicts_are_counted_and_do_not_warn():
    ranks = ranked(Conjugate(ok=False), simulations=20)
    assert ranks.attrs["failed_verdicts"] == 20 and not ranks["ok"].any()
    assert "20 fits asked for attention" in rank_histogram_test(ranks).sentence


def test_true_values_are_found_by_their_ids():
    def reordered(key):
        runs, truth = prior_draw(key)
        truth = truth.assign_coords(train=["x", "y"]).isel(train=[1, 0])
        return runs, truth.transpose("train", "query")

    ranks = sbc(reordered, Conjugate(), key=KEY, simulations=4, draws=19)
    xr.testing.assert_identical(ranks, ranked(Conjugate(), simulations=4))


def test_only_named_quantities_are_ranked():
    def more(key):
        runs, truth = prior_draw(key)
        return runs, truth.assign(unknown=1.0)

    ranks = sbc(more, Conjugate(), key=KEY, simulations=2, draws=19, quantities=["b"])
    assert ranks.sizes["quantity"] == 2
    with pytest.raises(Misuse, match=r"true values: got unknown ids unknown; expected.*a, b"):
        sbc(more, Conjugate(), key=KEY, simulations=2, draws=19)


def test_what_cannot_be_ranked_is_refused():
    def changed(change):
        def drawn(key):
            runs, truth = prior_draw(key)
            return runs, change(truth)

        return drawn

    def run(draw=prior_draw, method=None, **settings):
        return sbc(draw, method or Conjugate(), key=KEY, **{"simulations": 2, **settings})

    with pytest.raises(Misuse, match=r"draws: got 100.*pass draws=99"):
        run(draws=100)
    with pytest.raises(Misuse, match=r"simulations: got 0"):
        run(simulations=0)
    with pytest.raises(Misuse, match=r"sbc\(draws=...\): got 99 of a posterior that has 1;.*point"):
        run(method=bs.Ridge(penalty=0.1))
    with pytest.raises(Misuse, match=r"truth of 'b': got dimensions.*prior_draw"):
        run(changed(lambda truth: truth.isel(query=0)))
    with pytest.raises(Misuse, match=r"truth of 'b': got values that are not finite"):
        run(changed(lambda truth: truth * np.nan))
    with pytest.raises(Misuse, match=r"train of the truth of 'b': got unknown ids y"):
        run(changed(lambda truth: truth.assign_coords(train=["x", "z"])))
    with pytest.raises(Misuse, match=r"true values: got unknown ids c"):
        run(quantities=["c"])
    with pytest.raises(Misuse, match=r"key=jax.random.key\(seed\)"):
        sbc(prior_draw, Conjugate(), key=jax.random.PRNGKey(0))


@pytest.fixture(scope="module")
def runs():
    return linear_runs(key=jax.random.key(4), runs=7, query=2, epochs=2)[0]


def test_calibration_has_a_value_for_every_time(runs, key):
    posterior = bs.mean_trajectory(runs.isel(run=slice(0, 5)))
    held_out = runs.isel(run=[5, 6])
    horizons = by_horizon(posterior, held_out, key=key, draws=80)
    steps = runs.sizes["step"]
    assert horizons["pit"].dims == ("run", "time", "query")
    assert horizons["coverage"].dims == ("probability", "time")
    assert horizons["time"].values.tolist() == list(range(1, steps + 1))
    assert horizons["run"].values.tolist() == [5, 6]
    assert horizons["probability"].values.tolist() == list(COVERAGES)
    assert ((horizons["pit"] > 0) & (horizons["pit"] < 1)).all()
    loss = posterior.simulate(held_out, key=key, draws=80)["loss"].values[0]
    truth = held_out["loss"].values
    below = (loss < truth[None]).sum(axis=0)
    np.testing.assert_allclose(horizons["pit"], (below[:, 1:] + 0.5) / 81, atol=1e-12)
    low, high = np.quantile(loss, [0.05, 0.95], axis=0, method="weibull")
    inside = ((truth >= low) & (truth <= high))[:, 1:].mean(axis=(0, 2))
    np.testing.assert_allclose(horizons["coverage"].sel(probability=0.90), inside)
    assert (np.diff(horizons["coverage"], axis=0) >= 0).all()


def test_calibration_is_of_recorded_times(runs, key):
    posterior, whole = bs.mean_trajectory(runs.isel(run=slice(0, 5))), runs.isel(run=[5, 6])
    thinned = whole.copy(deep=True)
    thinned["loss"].values[:, 1::2] = np.nan
    thinned["loss"].values[0, 2] = np.nan
    full, horizons = (by_horizon(posterior, runs, key=key, draws=40) for runs in (whole, thinned))
    known = np.isfinite(thinned["loss"].values[:, 1:])
    np.testing.assert_array_equal(horizons["pit"], np.where(known, full["pit"], np.nan))
    times = runs["time"].values[1:]
    np.testing.assert_array_equal(np.isnan(horizons["coverage"]).all("probability"), times % 2 == 1)
    both = times[(times % 2 == 0) & (times > 2)]
    np.testing.assert_allclose(horizons["coverage"].sel(time=both), full["coverage"].sel(time=both))
    # At time 2 only the second run was recorded.
    loss = posterior.simulate(whole, key=key, draws=40)["loss"].values[0, :, 1, 2]
    low, high = np.quantile(loss, [0.05, 0.95], axis=0, method="weibull")
    truth = whole["loss"].values[1, 2]
    inside = ((truth >= low) & (truth <= high)).mean()
    np.testing.assert_allclose(horizons["coverage"].sel(time=2, probability=0.90), inside)
