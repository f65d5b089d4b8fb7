"""Models of runs in NumPyro: transitions as runs, minibatches, sites, and draws from the prior."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.inference.compiled import CompiledModel
from bayes_simfluence.inference.numpyro_runs import in_numpyro
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model import noise, priors, sites
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import Exposure
from bayes_simfluence.model.link import link_of
from bayes_simfluence.model.numpyro_model import coefficients_of, density_of
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.prior import PriorOf, prior_draw

RUNS, STEPS, TRAIN, QUERIES = 4, 5, 3, 2
KEY = jax.random.key(0)
FALSE_ALARMS = 1e-3


def runs(rng, lost=(), runs=RUNS, steps=STEPS):
    loss = rng.uniform(0.5, 2.0, (runs, steps + 1, QUERIES))
    for at in lost:
        loss[at] = np.nan
    return bs.runs_from_arrays(
        batch=rng.integers(0, TRAIN, (runs, steps, 2)),
        loss=loss,
        step_size=rng.uniform(0.01, 0.1, (runs, steps)),
        train_ids=[f"t{i}" for i in range(TRAIN)],
        query_ids=["p", "q"],
        missing=bool(lost),
    )


def made_of(model, recorded):
    return in_numpyro(recorded_arrays(recorded, model.prior), model, "test")


def linked(made):
    """Losses on the scale of the link."""
    return np.asarray(link_of(made.model.link, jnp.asarray(made.runs.loss)))


def prior_trace(made):
    run = handlers.seed(partial(CompiledModel.of(made), simulate=True), KEY)
    return handlers.trace(run).get_trace(*made.data)


def sampled(made):
    """Values of the sample sites, from the prior."""
    trace = prior_trace(made)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}


def density(made, values, batch=None, chosen=None):
    """Log density of the model, for some of the runs."""
    given = values if chosen is None else {**values, "runs": jnp.asarray(chosen)}
    run = CompiledModel.of(made, batch)
    return float(log_density(run, made.data, {}, given)[0])


APART = {
    "linear": Simfluence.linear(),
    "student, power, time effect": Simfluence.additive(
        error=noise.StudentT(None), time_effect="linear", link="log"
    ),
    "knots": Simfluence.linear(coefficients=Varying(3), error=noise.Gaussian(0.5)),
}


@pytest.mark.parametrize("name", APART)
def test_transitions_have_the_density_of_the_runs(rng, name):
    with double_precision():
        made = made_of(APART[name], runs(rng))
        apart, values = made.by_transition(), sampled(made)
        assert made.runs.loss.shape == (RUNS, STEPS + 1, QUERIES)
        assert apart.runs.loss.shape == (RUNS * STEPS, 2, QUERIES)
        np.testing.assert_allclose(density(apart, values), density(made, values), rtol=1e-10)


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        (Simfluence.linear(error=noise.AR1()), ()),
        (Simfluence.linear(error=noise.Gaussian(run_effect=True)), ()),
        (Simfluence.additive(error=noise.Gaussian(observation=True)), ()),
        (Simfluence.linear(exposure=Exposure(0.5, 0.0)), ()),
        (Simfluence(), ()),
        (Simfluence.linear(), [(0, 2, 1)]),
    ],
)
def test_runs_whose_steps_depend_on_more_stay_whole(rng, model, lost):
    with double_precision():
        made = made_of(model, runs(rng, lost))
        assert made.by_transition() is made


@pytest.mark.parametrize("lost", [(), [(0, 2, 1), (3, 5, 0)]])
def test_minibatches_are_right_on_average(rng, lost):
    model = Simfluence.linear(error=noise.StudentT())
    with double_precision():
        made = made_of(model, runs(rng, lost))
        values = sampled(made)
        if lost:
            values["missing"] = jnp.asarray(rng.uniform(0.5, 2.0, len(lost)))
        whole = density(made, values)
        some = [density(made, values, 2, c) for c in itertools.combinations(range(RUNS), 2)]
        np.testing.assert_allclose(np.mean(some), whole, rtol=1e-10)
        assert np.std(some) > 0.1
        np.testing.assert_allclose(density(made, values, RUNS), whole, rtol=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        Simfluence.linear(error=noise.StudentT()),
        Simfluence(coefficients=Varying(2), error=noise.Gaussian(loss_power=0.3)),
    ],
    ids=["linear", "two-timescale"],
)
def test_the_model_is_prior_times_density_of_the_losses(rng, model):
    """Also where losses are missing: those have no density but that of the run."""
    lost = [(0, 2, 1), (3, 5, 0)]
    with double_precision():
        made = made_of(model, runs(rng, lost))
        assert made.gaps.imputed == tuple(lost)
        values = sampled(made)
        of_prior = partial(CompiledModel.of(made), simulate=True)
        prior = log_density(of_prior, made.data, {}, values)[0]
        sites = CompiledModel.of(made).sites_of(
            made.data, {name: value[None] for name, value in values.items()}
        )
        exact = {name: jnp.asarray(one[0], float) for name, one in sites.items()}
        found = coefficients_of(model, exact, made.units, made.runs.features)
        filled = rng.uniform(0.5, 2.0, 2)
        losses = linked(made).copy()
        losses[tuple(made.gaps.positions.T)] = filled
        rest = density_of(model, exact, found, made.runs, jnp.asarray(losses), made.gaps)
        total = density(made, {**values, "missing": jnp.asarray(filled)})
        np.testing.assert_allclose(total, float(prior + rest.sum()), rtol=1e-5)


SITES = {
    "pooled low rank": Simfluence.additive(
        prior=priors.LowRank(pooled=True), error=noise.StudentT()
    ),
    "two-timescale": Simfluence(prior=priors.Horseshoe(), coefficients=Varying(2)),
}


@pytest.mark.parametrize("name", SITES)
def test_sites_follow_from_those_that_are_sampled(rng, name):
    recorded = runs(rng)
    with double_precision():
        made = made_of(SITES[name], recorded)
        trace = prior_trace(made)
        values = sampled(made)
        compiled = CompiledModel.of(made)
        whole = {name: one[None] for name, one in values.items()}
        found = compiled.sites_of(made.data, whole)
        drawn = compiled.prior_sites(made.data, key=KEY, draws=3)
        set_to = compiled.trace(made.data, values)
    kept = set(sites.kept(trace))
    assert {name for name, site in set_to.items() if sites.is_sampled(site)} == set(values)
    for site, value in values.items():
        np.testing.assert_array_equal(set_to[site]["value"], value)
    assert set(found) == set(drawn) == kept
    assert {"scale", *(f"{part}_unit" for part in SITES[name].parts)} <= kept
    assert not any(one.endswith(("_own", "_local", "_of_query")) for one in kept)
    for one, value in found.items():
        np.testing.assert_allclose(value[0], trace[one]["value"], rtol=1e-5)
        assert drawn[one].shape == (3, *value.shape[1:])
        # Draws differ from one another.
        assert (np.ptp(np.asarray(drawn[one]), axis=0) > 0).all()
    simulator = made.simulator({one: np.asarray(value)[None] for one, value in drawn.items()})
    plan = recorded_arrays(recorded)
    assert np.isfinite(simulator.simulate(plan, key=KEY, draws=1).mean_loss).all()
    held = sum(np.asarray(one[0], np.float32).nbytes for one in found.values())
    assert held <= made.bytes_of_a_draw() <= held + 4 * (8 * QUERIES + 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"error": noise.Gaussian(observation=True, run_effect=True)},
        {"error": noise.Gaussian(observation=True), "exposure": Exposure(0.5, 0.0)},
        {"error": noise.Gaussian(observation=True), "scales": "shared"},
    ],
)
def test_what_no_density_is_known_of_is_refused(rng, settings):
    model = Simfluence.linear(**settings)
    with double_precision(), pytest.raises(Misuse, match=r"test: the model: got observation noise"):
        made_of(model, runs(rng))


def standardized(truth, drawn):
    """One-step errors of drawn runs under the truth, in units of its noise."""
    loss, found = drawn["loss"].values.astype(float), []
    for run in range(drawn.sizes["run"]):
        for step, slots in enumerate(drawn["batch"].values[run]):
            share = np.array([np.mean(slots == i) for i in range(drawn.sizes["train"])])
            mean = (1 + truth["a"].values @ share) * loss[run, step] + truth["b"].values @ share
            found.append((loss[run, step + 1] - mean) / truth["noise"].values)
    return np.array(found)


def test_drawn_runs_are_typical_of_the_truth_behind_them(rng):
    recorded = runs(rng, runs=10, steps=8)
    draw = prior_draw(Simfluence.linear(), recorded)
    drawn, truth = draw(jax.random.key(5))
    np.testing.assert_array_equal(drawn["loss"][:, 0], recorded["loss"][:, 0])
    np.testing.assert_array_equal(drawn["batch"], recorded["batch"])
    assert drawn["loss"].dtype == recorded["loss"].dtype
    error = standardized(truth, drawn)
    interval = stats.chi2(error.size).interval(1 - FALSE_ALARMS)
    assert interval[0] < (error**2).sum() < interval[1]
    assert stats.kstest(error.ravel(), "norm").pvalue > FALSE_ALARMS
    # Under the truth of another draw the same runs are not typical.
    _, other = draw(jax.random.key(6))
    assert not interval[0] < (standardized(other, drawn) ** 2).sum() < interval[1]


def test_drawn_runs_lack_what_the_recording_lacks(rng):
    recorded = runs(rng, lost=[(0, 2, 1), (3, 5, 0)])
    for error in (noise.Gaussian(), noise.StudentT()):
        drawn, _ = prior_draw(Simfluence.linear(error=error), recorded)(KEY)
        np.testing.assert_array_equal(np.isnan(drawn["loss"]), np.isnan(recorded["loss"]))


def test_draws_of_the_prior_differ_and_have_names(rng):
    recorded = runs(rng)
    found = PriorOf(Simfluence.linear())(recorded, key=KEY, draws=4)
    assert found.parameters["a"].dims == ("chain", "draw", "query", "train")
    assert list(found.parameters["train"].values) == ["t0", "t1", "t2"]
    assert found.predictive["loss"].dims == ("chain", "draw", "run", "time", "query")
    assert len(np.unique(found.parameters["scale"])) == 4 * QUERIES
    with pytest.raises(Misuse, match=r"key: got ArrayImpl.*jax.random.key"):
        PriorOf(Simfluence.linear())(recorded, key=jnp.asarray(0), draws=4)
    with pytest.raises(Misuse, match="draws: got 0"):
        PriorOf(Simfluence.linear())(recorded, key=KEY, draws=0)
