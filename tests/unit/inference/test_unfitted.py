"""No run at all: the posterior is the prior, and says so."""

import jax
import numpy as np
import pytest
import xarray as xr
from scipy import stats

import bayes_simfluence as bs
from bayes_simfluence.posterior.prior import PriorOf

KEY = jax.random.key(0)
pytestmark = [
    pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning"),
    pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.SupportWarning"),
]
SMALL = {"step": slice(0, 6), "time": slice(0, 7), "query": slice(0, 2), "train": slice(0, 40)}
PLAIN = {
    "timescales": "staying",
    "coefficients": bs.Varying(knots=1),
    "time_effect": "none",
    "exposure": bs.Exposure.memoryless(),
}


def recording(runs=2):
    some = bs.example_runs().isel(run=slice(0, runs), **SMALL)
    return some.assign(batch=some["batch"] % 40)


def model(prior=None, **parts):
    prior = prior or bs.priors.Normal(features=False)
    return bs.Simfluence(prior=prior, **{**PLAIN, **parts})


def of_nothing(of=None, runs=None, method=None):
    runs = recording(0) if runs is None else runs
    return bs.fit(runs, model=of or model(), method=method or bs.Exact(), key=KEY)


@pytest.fixture(scope="module")
def posterior():
    return of_nothing()


def test_the_verdict_says_that_everything_is_the_prior():
    with pytest.warns(bs.FitWarning, match="No runs: everything is the prior"):
        posterior = of_nothing()
    assert not posterior.verdict.ok
    said = " ".join(posterior.verdict.notes)
    assert "Step sizes are ignored" in said and "Effects are additive" in said
    with pytest.raises(bs.FitFailed, match="No runs"):
        bs.fit(recording(0), model=model(), key=KEY, strict=True)


def test_losses_are_those_of_the_prior(posterior):
    """Against draws of ``PriorOf`` for the same curricula: quantiles of the log of the change.

    Of 600 draws each, largest distance of the empirical laws; false alarms 1e-4.
    """
    runs = recording(1).drop_vars("step_size")
    drawn = PriorOf(model(coupling="none"))(runs, key=jax.random.key(1), draws=600)
    made = posterior.simulate(runs, key=jax.random.key(2), draws=600)
    for at in (0, 1):
        ours, theirs = (
            one["loss"].isel(run=0, time=-1, query=at, chain=0).values
            for one in (made, drawn.predictive)
        )
        pooled = np.sort(np.concatenate([ours, theirs]))
        laws = [np.searchsorted(np.sort(one), pooled, "right") / 600 for one in (ours, theirs)]
        assert np.abs(laws[0] - laws[1]).max() < 2.23 * np.sqrt(2 / 600)


def test_curricula_meet_the_same_coefficients_and_samples_are_theirs(posterior):
    """Without its error, a run's first step moves the link by the effect of its one example."""
    runs = recording(1)
    batch = np.full((1, 6, 4), -1)
    batch[0, 0] = 3
    one = bs.planned_runs(runs, batch)
    made, again = (posterior.simulate(one, key=KEY, draws=8)["mean_loss"] for _ in range(2))
    xr.testing.assert_identical(made, again)
    samples = posterior.samples(key=KEY, draws=8)
    effect = samples["staying"].isel(train=3).values

    def link(loss):
        return np.log(np.expm1(loss.astype(float)))

    moved = link(made.values[:, :, 0, 1]) - link(made.values[:, :, 0, 0])
    np.testing.assert_allclose(moved, effect, rtol=2e-3, atol=1e-5)


def test_support_is_none_and_strict_refuses(posterior):
    with pytest.warns(bs.SupportWarning, match="no run was recorded: everything is the prior"):
        made = posterior.simulate(recording(), key=KEY, draws=3, band=bs.Credible(0.8))
    assert made["support"].values[:, 0].tolist() == [1, 1] and not made["support"][:, 1:].any()
    assert (made["low"] <= made["high"]).all()
    with pytest.raises(bs.Misuse, match="no run was recorded"):
        posterior.simulate(recording(), key=KEY, draws=3, strict=True)


def test_it_is_saved_and_goes_to_arviz(posterior, tmp_path):
    posterior.save(tmp_path / "prior.nc")
    again = bs.load_posterior(tmp_path / "prior.nc")
    assert again.verdict == posterior.verdict and again.runs.sizes["run"] == 0
    xr.testing.assert_identical(
        *(one.simulate(recording(), key=KEY, draws=4) for one in (posterior, again))
    )
    idata = again.to_arviz(draws=5)
    assert idata["posterior"]["staying"].shape == (1, 5, 2, 40)


def test_planned_runs_say_step_sizes():
    plan = bs.planned_runs(recording(1), recording(1)["batch"].values)
    sized = plan.assign(step_size=recording(1)["step_size"])
    posterior = of_nothing(runs=sized)
    assert not any("Step sizes" in note for note in posterior.verdict.notes)
    largest = float(sized["step_size"].max())
    assert posterior.simulator.largest_step_size == pytest.approx(largest)
    assert posterior.runs.sizes["run"] == 0


@pytest.mark.parametrize(
    "of",
    [
        bs.Simfluence.linear(),
        bs.Simfluence.additive(prior=bs.priors.Horseshoe()),
        model(error=bs.noise.StudentT()),
    ],
    ids=["linear", "horseshoe", "student-t"],
)
def test_any_prior_and_error_will_do(of):
    posterior = of_nothing(of, method=bs.NUTS())
    # Prior draws of effects may be huge.
    made = posterior.simulate(recording(1), key=KEY, draws=5)
    assert made["loss"].shape == (1, 5, 1, 7, 2) and not np.isnan(made["loss"]).any()


def test_scores_are_the_mean_of_effects():
    """Half of the examples help, half harm: over draws their mean effect has the scores' sign."""
    scores = np.where(np.arange(40)[:, None] % 2, -1.0, 1.0) * np.ones((1, 2))
    base = bs.priors.Normal(features=False)
    posterior = of_nothing(model(bs.priors.Scores(scores, base=base)))
    samples = posterior.samples(key=KEY, draws=200)
    along = (samples["staying"] * scores.T).mean("train")
    scale = samples["staying_scores"]
    # Around it effects of the base fall to either side alike: 400 coins, false alarms 1e-4.
    above = float((along > scale).mean())
    assert abs(above - 0.5) < 3.9 * 0.5 / np.sqrt(400)
    # In units of a base whose scale is drawn anew each time, the scores still show: 200 pairs.
    rank = stats.spearmanr(scale.values.ravel(), along.mean("query").values.ravel())[0]
    assert rank > 3.7 / np.sqrt(200)


def test_a_method_without_a_prior_needs_runs():
    with pytest.raises(bs.Misuse, match=r"got no recorded run.*no prior to go by"):
        bs.fit(recording(0), method=bs.Ridge(), key=KEY)
