"""Scores as a prior mean: by hand, and fitted to runs whose true effects are known."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, no_features
from bayes_simfluence.posterior.prior import PriorOf

pytestmark = pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning")
TRAIN_IDS, QUERY_IDS = np.array(["a", "b", "c"]), np.array(["p", "q"])
TRAIN, QUERY, STEPS, SCALE = 30, 6, 24, 0.08


def matrix(values, train=TRAIN_IDS, query=QUERY_IDS):
    return score_array(values, list(train), list(query), method="mine", units="1")


def test_scores_are_taken_by_id_in_units_of_their_rms(rng):
    values = rng.normal(size=(4, 3))
    given = matrix(values, ["c", "x", "a", "b"], ["q", "y", "p"])
    wanted = values[[2, 3, 0]][:, [2, 0]]
    wanted = wanted / np.sqrt((wanted**2).mean())
    exposure = rng.uniform(size=(5, 3))
    for scores in (given, given.T, values[[2, 3, 0]][:, [2, 0]]):
        prior = bs.priors.Scores(scores)
        with double_precision():
            known = prior.resolve(TRAIN_IDS, QUERY_IDS, no_features(3, 2))
            scale = {"fading_scores": jnp.asarray(0.3)}
            mean = prior.mean(scale, "fading", jnp.asarray(exposure), known)
        np.testing.assert_allclose(mean, 0.3 * exposure @ wanted, rtol=1e-6)


@pytest.mark.parametrize("uses", [True, False])
def test_around_the_scores_effects_are_those_of_the_base(rng, uses):
    recorded = ExampleFeatures(rng.normal(size=(3, 4)), rng.normal(size=(2, 4)))
    base = bs.priors.Normal(features=uses)
    prior = bs.priors.Scores(np.ones((3, 2)), base=base)
    with double_precision():
        exposure = jnp.asarray(rng.uniform(size=(5, 3)))
        known, alone = prior.resolve(TRAIN_IDS, QUERY_IDS, recorded), recorded.where(uses)
        numbers = {"staying_scores": 0.5, "staying_dot": 0.2, "staying_alike": 0.7}
        values = {name: jnp.asarray(number) for name, number in numbers.items()}
        found = prior.columns(values, "staying", exposure, known)
        np.testing.assert_array_equal(found, base.columns(values, "staying", exposure, alone))
        mean = prior.mean(values, "staying", exposure, known)
        around = base.mean(values, "staying", exposure, alone)
        sums = np.asarray(exposure).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(mean - around, np.repeat(0.5 * sums, 2, axis=1), rtol=1e-6)
        for mine, its in zip(prior.alike(known), alone, strict=True):
            np.testing.assert_array_equal(mine, its)
    hypers = set(prior.hypers("staying", known))
    assert hypers == {*base.hypers("staying", alone), "staying_scores"}
    assert "staying_scores" not in prior.hypers("staying", no_features(3, 2))


def test_the_base_says_which_methods_take_it():
    for base in (bs.priors.Normal(pooled=True), bs.priors.Laplace(), bs.priors.StudentT()):
        prior = bs.priors.Scores(np.ones((3, 2)), base=base)
        assert (prior.gaussian, prior.pooled) == (base.gaussian, base.pooled)
    assert bs.priors.Scores(np.ones((3, 2))) != bs.priors.Scores(np.ones((3, 2)))


def test_the_base_survives_as_plain_values():
    base = bs.priors.StudentT(df=7.0)
    prior = bs.priors.Scores(matrix(np.ones((3, 2))), base=base, believed=3.0)
    again = bs.priors.prior_from_dict(prior.as_dict())
    assert again.base == prior.base and again.believed == 3.0
    assert again.as_dict() == prior.as_dict()
    assert again.matrix == "3 x 2 of mine"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: bs.priors.Scores(np.zeros((3, 2))), "got nothing but zeros"),
        (lambda: bs.priors.Scores(np.full((3, 2), np.nan)), "got values not finite"),
        (lambda: bs.priors.Scores(np.ones((3, 2)), believed=0.0), "believed=.*got 0.0"),
        (lambda: bs.priors.Scores(np.ones(3)), r"got shape \(3,\)"),
        (lambda: bs.priors.Scores(xr.DataArray(np.ones((3, 2)))), "got dimensions"),
        (
            lambda: bs.priors.Scores(np.ones((3, 2)), base=bs.priors.Scores(np.ones((3, 2)))),
            "not of scores itself",
        ),
        (lambda: resolved(np.ones((2, 2))), r"got shape \(2, 2\); expected \(3, 2\)"),
        (lambda: resolved(matrix(np.ones((2, 2)), ["a", "b"])), r"train ids.*got unknown ids c"),
        (lambda: resolved(matrix(np.ones((3, 1)), query=["p"])), r"query ids.*got unknown ids q"),
        (lambda: resolved("3 x 2 of mine"), "got the description '3 x 2 of mine'"),
    ],
)
def test_scores_that_do_not_fit_are_refused(make, match):
    with pytest.raises(Misuse, match=match):
        make()


def resolved(scores):
    return bs.priors.Scores(scores).resolve(TRAIN_IDS, QUERY_IDS, no_features(3, 2))


@cache
def recorded(runs=12):
    """Runs of ``L_t = L_{t-1} + e_t . b + eps_t``; the scores behind ``b`` have an rms of one."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(TRAIN, QUERY))
    scores /= np.sqrt((scores**2).mean())
    batch = rng.integers(0, TRAIN, (runs, STEPS, 2)).astype(np.int32)
    steps = SCALE * scores[batch].mean(axis=2) + 0.01 * rng.normal(size=(runs, STEPS, QUERY))
    loss = 5.0 + np.concatenate([np.zeros_like(steps[:, :1]), steps.cumsum(axis=1)], axis=1)
    whole = bs.runs_from_arrays(
        batch=batch,
        loss=loss,
        train_ids=[f"t{at}" for at in range(TRAIN)],
        query_ids=[f"q{at}" for at in range(QUERY)],
    )
    return whole, matrix(scores, whole["train"].values, whole["query"].values)


def model(prior):
    return bs.Simfluence(
        prior=prior,
        link="identity",
        timescales="staying",
        exposure=bs.Exposure.memoryless(),
        coefficients=bs.Varying(knots=1),
    )


def fitted(prior, method=None, runs=3):
    some = recorded()[0].isel(run=slice(0, runs))
    method = method or bs.Exact(times=8)
    return bs.fit(some, model=model(prior), method=method, key=jax.random.key(1))


def error(posterior):
    """Mean squared error on the runs that no fit has seen."""
    held = recorded()[0].isel(run=slice(6, None))
    mean = posterior.simulate(held, key=jax.random.key(2), draws=50)["mean_loss"]
    return float(np.square(mean.mean(("chain", "draw")) - held["loss"]).mean())


@cache
def helped():
    return fitted(bs.priors.Scores(recorded()[1]))


def test_true_scores_help_where_runs_are_few():
    assert error(helped()) < 0.2 * error(fitted(bs.priors.Normal()))
    assert helped().simulator.values["staying_scores"] == pytest.approx(SCALE, rel=0.1)


def test_scores_of_noise_are_dropped_and_reversed_ones_turned():
    _, scores = recorded()
    noise = np.random.default_rng(9).normal(size=scores.shape)
    # What chance gives them of the true ones, which have a mean square of one, is taken out.
    noise -= (noise * scores.values).mean() * scores.values
    dropped = fitted(bs.priors.Scores(noise), runs=6)
    assert abs(dropped.simulator.values["staying_scores"]) < 0.15 * SCALE
    turned = fitted(bs.priors.Scores(-scores))
    assert turned.simulator.values["staying_scores"] == pytest.approx(-SCALE, rel=0.15)


@pytest.mark.parametrize(
    "method",
    [
        None,
        bs.Exact(times=6, hyperparameters="nuts", sampler=bs.NUTS(chains=1, warmup=20, draws=10)),
        bs.NUTS(chains=1, warmup=40, draws=20),
        bs.SVI(steps=300),
    ],
    ids=["Exact", "collapsed", "NUTS", "SVI"],
)
def test_every_method_learns_the_scale_and_is_saved(method, tmp_path):
    posterior = helped() if method is None else fitted(bs.priors.Scores(recorded()[1]), method)
    key = jax.random.key(4)
    samples = posterior.samples(key=key, draws=20)
    assert float(samples["staying_scores"].mean()) == pytest.approx(SCALE, rel=0.3)
    posterior.save(tmp_path / "posterior.nc")
    again = bs.load_posterior(tmp_path / "posterior.nc")
    held = recorded()[0].isel(run=[7])
    xr.testing.assert_allclose(
        again.simulate(held, key=key, draws=5), posterior.simulate(held, key=key, draws=5)
    )
    assert again.settings["model"]["prior"]["matrix"] == f"{TRAIN} x {QUERY} of mine"
    assert again.prior is None


def test_what_has_no_scores_is_refused_plainly():
    held = recorded()[0].isel(run=[7])
    strange = held.assign_coords(query=[*held["query"].values[:-1], "new"])
    with pytest.raises(Misuse, match="queries: got unknown ids new"):
        helped().simulate(strange, key=jax.random.key(0))
    strange = held.assign_coords(train=[f"u{at}" for at in range(TRAIN)])
    with pytest.raises(Misuse, match="examples in the curricula: got unknown ids"):
        helped().simulate(strange, key=jax.random.key(0))


def test_the_scale_has_the_prior_that_the_docstring_says():
    """Mean and sd of 400 prior draws, within five standard errors."""
    whole, scores = recorded()
    for believed, prior in (
        (0.02, bs.priors.Scores(scores)),
        (4.0, bs.priors.Scores(scores, believed=4.0)),
    ):
        before = PriorOf(model(prior))
        drawn = before(whole.isel(run=[0]), key=jax.random.key(0), draws=400)
        scale = drawn.parameters["staying_scores"].values
        assert scale.mean() == pytest.approx(believed, abs=5 * 2 * believed / np.sqrt(400))
        assert scale.std() == pytest.approx(2 * believed, rel=5 / np.sqrt(2 * 400))
