"""Coupled models under draws of samplers: against the Gaussian form, and through ``fit``.

The statistical test would fail for one seed in 1,000 if the simulator were right.
"""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.gaussian.designs import assembled, designs_and_means, error_covariance
from bayes_simfluence.gaussian.fitted import typical_step
from bayes_simfluence.gaussian.rollout import OF_STATES, SCENARIOS, drawn_residuals
from bayes_simfluence.gaussian.search import typical
from bayes_simfluence.inference.collapsed import Marginal, _coefficient_sites
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model import noise
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.numpyro_model import Units
from bayes_simfluence.model.simfluence import hypers_of
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.prior import PriorOf, prior_draw
from bayes_simfluence.simulators.sampled import SampledSimulator
from bayes_simfluence.simulators.scenarios import shares_of

FALSE_ALARM = 1e-3
RUNS, STEPS, SLOTS, TRAIN, QUERIES = 5, 6, 2, 4, 2
KEY = jax.random.key(0)
MODEL = bs.Simfluence(coefficients=bs.Varying(knots=2))
SIMPLE = bs.Simfluence(
    coefficients=bs.Varying(knots=1),
    timescales="staying",
    time_effect="linear",
    error=noise.Gaussian(),
)
SCALE = np.array([0.5, 1.2])


def recording(seed=0):
    """Losses and residuals that fall, whatever was trained on."""
    rng = np.random.default_rng(seed)
    falling = np.exp(-np.linspace(0.0, 1.5, STEPS + 1))
    loss = falling[:, None] * rng.uniform(0.7, 1.3, (RUNS, STEPS + 1, QUERIES))
    train_loss = falling[:-1, None] * rng.uniform(0.5, 1.5, (RUNS, STEPS, SLOTS))
    return bs.runs_from_arrays(
        batch=rng.integers(0, TRAIN, (RUNS, STEPS, SLOTS)),
        loss=loss,
        step_size=rng.uniform(0.5, 1.0, (RUNS, STEPS)),
        train_loss=train_loss,
        train_ids=range(TRAIN),
        query_ids=range(QUERIES),
    )


def fitted_arrays(rng):
    """Runs in units, as a fit has them, with features and residuals."""
    fall = np.exp(-np.linspace(0.0, 1.5, STEPS))[:, None]
    with double_precision():
        features = ExampleFeatures(
            jnp.asarray(0.3 * rng.normal(size=(TRAIN, 2))),
            jnp.asarray(0.3 * rng.normal(size=(QUERIES, 2))),
        )
    runs = RunArrays.of(
        rng.integers(0, TRAIN, (RUNS, STEPS, SLOTS)),
        rng.uniform(0.4, 1.4, (RUNS, STEPS + 1, QUERIES)),
        step_size=rng.uniform(0.5, 1.0, (RUNS, STEPS)),
        features=features,
    )
    return runs._replace(residual=fall * rng.uniform(0.3, 0.9, runs.batch.shape))


def linked(loss):
    return np.log(np.expm1(np.asarray(loss, float)))


@pytest.fixture(scope="module")
def case():
    """Exact draws of the coefficients at one value of everything else, and what they are of."""
    rng, draws = np.random.default_rng(1), 50 * SCENARIOS
    fitted = fitted_arrays(rng)
    with double_precision():
        hypers = hypers_of(MODEL, fitted.features)
        free = jnp.asarray(start(hypers) + 0.2 * rng.normal(size=len(hypers)))
        values = natural_values(hypers, free)
        rows = tuple(range(STEPS))
        size = assembled(MODEL, values, fitted, jnp.asarray(rows), knots=2).size
        units = Units(jnp.ones(QUERIES), size)
        fixed = {**values, "scale": jnp.asarray(SCALE)}
        drawn = [
            _coefficient_sites(Marginal(MODEL, rows), fitted, units, fixed, key)
            for key in jax.random.split(KEY, draws)
        ]
    sites = {name: np.stack([np.asarray(one[name]) for one in drawn])[None] for name in drawn[0]}
    for name, value in fixed.items():
        sites[name] = np.broadcast_to(value, (1, draws, *np.shape(value)))
    simulator = SampledSimulator(
        MODEL, sites, units, fitted.features, STEPS, 1.0,
        fitted=fitted.of_queries(np.zeros(0, int)),
    )  # fmt: skip
    planned = RunArrays.of(
        rng.integers(0, TRAIN, (2, STEPS, SLOTS)),
        rng.uniform(0.4, 1.4, (2, 1, QUERIES)),
        step_size=rng.uniform(0.5, 1.0, (2, STEPS)),
        features=fitted.features,
    )
    return simulator, fitted, free, planned


def test_examples_act_as_in_the_gaussian_form_at_the_same_hyperparameters(case):
    """Its scales are in units of the design's size; so are those of draws."""
    simulator, fitted, free, planned = case
    found = simulator.residuals(planned, key=KEY, draws=200)
    assert len(found) == SCENARIOS
    with double_precision():
        bare = planned.in_units(STEPS, 1.0)._replace(features=fitted.features)
    for number, residual in enumerate(found):
        own = jax.random.fold_in(jax.random.fold_in(KEY, OF_STATES), number)
        (expected,) = drawn_residuals(
            MODEL, free, fitted, bare, simulator.units.spread, typical(SCALE), own, knots=2,
            scenarios=1,
        )  # fmt: skip
        np.testing.assert_allclose(residual, expected, atol=1e-5)
    assert np.ptp(np.stack(found), axis=0).max() > 0.02


def test_draws_have_the_posterior_of_the_gaussian_form_in_each_scenario(case):
    simulator, fitted, free, planned = case
    draws = simulator.draws
    losses = simulator.simulate(planned, key=KEY, draws=draws)
    residuals = simulator.residuals(planned, key=KEY, draws=draws)
    rows, size = jnp.arange(STEPS), np.asarray(simulator.units.spread)
    with double_precision():
        values = natural_values(hypers_of(MODEL, fitted.features), free)
        seen, told = map(np.asarray, designs_and_means(MODEL, values, fitted, rows, knots=2))
        error = np.asarray(error_covariance(MODEL, values, jnp.asarray(fitted.progress[0])))
        planned_designs = []
        for residual in residuals:
            runs = planned.in_units(STEPS, 1.0)._replace(residual=residual)
            made = designs_and_means(MODEL, values, runs, rows, knots=2)
            planned_designs.append([np.asarray(one) for one in made])
    # Weights given the fitted runs, by plain algebra.
    design = seen.reshape(RUNS * STEPS, -1) / size
    inverse = np.linalg.inv(design @ design.T + np.kron(np.eye(RUNS), error))
    gain = design.T @ inverse
    covariance = np.eye(design.shape[1]) - gain @ design
    change = linked(fitted.loss)[:, 1:] - linked(fitted.loss)[:, :1] - told
    weights = gain @ change.reshape(RUNS * STEPS, QUERIES)
    white = {"mean": [], "whole": []}
    for share, (of_run, centre) in zip(shares_of(draws), planned_designs, strict=True):
        for run in range(2):
            x = of_run[run] / size
            for query in range(QUERIES):
                mean = linked(planned.initial[run, query]) + centre[run, :, query]
                mean = mean + x @ weights[:, query]
                spread = SCALE[query] ** 2 * (x @ covariance @ x.T)
                own = {"mean": losses.mean_loss, "whole": losses.loss}
                for name, loss in own.items():
                    whole = spread + (SCALE[query] ** 2 * error if name == "whole" else 0.0)
                    off = linked(loss[0, share, run, 1:, query]) - mean
                    # The last step alone: earlier ones go with it.
                    white[name].append(off[:, -1] / np.sqrt(whole[-1, -1]))
    for z in map(np.array, white.values()):
        # Draws are independent, runs and queries of a draw are not: each is judged alone.
        columns = z.reshape(len(shares_of(draws)), 2 * QUERIES, -1).swapaxes(0, 1).reshape(4, -1)
        for column in columns:
            assert stats.kstest(column, "norm").pvalue > FALSE_ALARM / 8
            low, high = stats.chi2(column.size).interval(1 - FALSE_ALARM / 8)
            square = (column**2).sum()
            assert low < square < high
            # Draws a third wider or narrower would be seen.
            assert (4 / 3) ** 2 * square > high and square / (4 / 3) ** 2 < low
    # Residuals of another scenario would not do: the scenarios differ by more than draws hide.
    assert np.ptp([of_run[0, -1] / size for of_run, _ in planned_designs], axis=0).max() > 0.01


def test_effects_are_those_of_a_typical_step(case):
    simulator, fitted, free, _ = case
    alike = replace(simulator, fitted=None)
    with double_precision():
        acting = float(typical_step(MODEL, free, fitted))
    assert abs(acting - 1.0) > 0.1
    first, second = (one.samples(key=KEY, draws=3) for one in (simulator, alike))
    for part in MODEL.parts:
        np.testing.assert_allclose(first[part][1], acting * second[part][1], rtol=1e-4)


SAMPLER = bs.NUTS(warmup=8, draws=12, chains=1)
METHODS = {
    "nuts": SAMPLER,
    "collapsed": bs.Exact(hyperparameters="nuts", sampler=SAMPLER, times=4),
    "svi": bs.SVI(steps=20, draws=12),
}


def quietly(runs, method, model=SIMPLE):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return bs.fit(runs, model=model, method=method, key=KEY)


@pytest.fixture(scope="module", params=METHODS)
def posterior(request):
    return quietly(recording(), METHODS[request.param])


def simulated(posterior, runs):
    return posterior.simulate(runs, key=KEY, draws=12)["loss"].values


def test_a_simulation_sees_neither_losses_nor_residuals_of_its_run(posterior):
    assert posterior.simulator.coupled
    assert "Effects are additive" not in str(posterior.verdict)
    planned = recording(seed=1)
    loss = planned["loss"].copy()
    loss[:, 1:] = 3.0
    other = planned.assign(loss=loss, train_loss=0.2 * planned["train_loss"])
    bare = planned.drop_vars("train_loss")
    np.testing.assert_array_equal(simulated(posterior, planned), simulated(posterior, other))
    np.testing.assert_array_equal(simulated(posterior, planned), simulated(posterior, bare))


def test_a_saved_posterior_simulates_the_same(posterior, tmp_path):
    opened = bs.load_posterior(posterior.save(tmp_path / "posterior.nc"))
    assert opened.simulator.coupled
    planned = recording(seed=1)
    found, again = (simulated(one, planned) for one in (posterior, opened))
    np.testing.assert_allclose(found, again, rtol=1e-5)
    first, second = (one.samples(key=KEY) for one in (posterior, opened))
    np.testing.assert_allclose(first["staying"], second["staying"], rtol=1e-5)


def test_densities_are_of_the_recorded_residuals(posterior):
    simulator = posterior.simulator
    runs = recorded_arrays(recording(), residuals=True)
    found = simulator.log_likelihood(runs, key=KEY, draws=12)
    alike = replace(simulator, fitted=None).log_likelihood(runs, key=KEY, draws=12)
    assert np.isfinite(found).all()
    assert np.abs(found - alike).max() > 1e-3
    idata = posterior.to_arviz(draws=12, groups=["log_likelihood"])
    density = idata["log_likelihood"]["loss"].values
    np.testing.assert_allclose(density, found[:, :, :, idata_rows(idata)], rtol=1e-4)


def idata_rows(idata):
    return idata["log_likelihood"]["time"].values - 1


def test_posteriors_saved_before_there_was_coupling_are_additive(case):
    simulator, _, _, planned = case
    arrays = {
        name: value
        for name, (_, value) in simulator.arrays().items()
        if name not in ("batch", "weight", "residual", "step_size")
    }
    settings = simulator.settings()
    settings["model"] = {k: v for k, v in settings["model"].items() if k != "coupling"}
    opened = SampledSimulator.restore(arrays, settings)
    assert not opened.coupled and not opened.model.coupled
    assert np.isfinite(opened.simulate(planned, key=KEY, draws=2).loss).all()


@pytest.mark.parametrize(
    ("model", "without", "said"),
    [
        (SIMPLE, True, "were not recorded"),
        (replace(SIMPLE, error=noise.Gaussian(loss_power=0.5)), False, "errors that follow"),
        (replace(SIMPLE, error=noise.StudentT()), False, "not Gaussian"),
        (replace(SIMPLE, terms="both"), False, "multiplicative terms"),
        (replace(SIMPLE, prior=bs.priors.Laplace()), False, "not Gaussian"),
    ],
    ids=["no residuals", "power", "student", "multiplicative", "laplace"],
)
def test_what_cannot_be_coupled_is_additive_and_the_verdict_says_so(model, without, said):
    runs = recording().drop_vars("train_loss") if without else recording()
    found = quietly(runs, bs.SVI(steps=5, draws=3), model)
    assert not found.simulator.coupled
    notes = str(found.verdict)
    assert "Effects are additive" in notes and said in notes


def test_drawn_runs_of_a_coupled_model_have_residuals_of_their_own(case):
    recorded = recording()
    made, truth = prior_draw(SIMPLE, recorded)(jax.random.key(2))
    residual = made["train_residual"].values
    assert "train_loss" not in made
    assert ((residual >= 0) & (residual <= 1)).all()
    validate_runs(made)
    # Before any update examples are as the recording has them.
    first = -np.expm1(-recorded["train_loss"].values[:, 0])
    assert np.abs(residual[:, 0] - first).max() < 0.2
    other, _ = prior_draw(SIMPLE, recorded)(jax.random.key(3))
    assert np.abs(other["train_residual"].values - residual).max() > 0.01
    # Nothing but time 0 of the recording is looked at.
    later = recorded["train_loss"].copy()
    later[:, 1:] *= 0.3
    same, _ = prior_draw(SIMPLE, recorded.assign(train_loss=later))(jax.random.key(2))
    np.testing.assert_allclose(same["loss"], made["loss"], rtol=1e-5)
    assert truth["staying"].dims == ("query", "train")


def test_a_prior_of_runs_without_residuals_is_additive():
    bare = recording().drop_vars("train_loss")
    made, _ = prior_draw(SIMPLE, bare)(KEY)
    assert "train_residual" not in made
    coupled, alike = (
        PriorOf(one)(bare, key=KEY, draws=2).predictive["loss"].values
        for one in (SIMPLE, replace(SIMPLE, coupling="none"))
    )
    np.testing.assert_array_equal(coupled, alike)
