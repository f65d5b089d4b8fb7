"""Training examples as states: conditioned as plain algebra does it, rolled out step by step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.gaussian.designs import (
    assembled,
    designs_and_means,
    error_covariance,
    linked_change,
)
from bayes_simfluence.gaussian.examples import (
    WHITE,
    States,
    conditioned_states,
    drawn_states,
    observed_examples,
)
from bayes_simfluence.gaussian.fitted import typical_step
from bayes_simfluence.gaussian.rollout import left_out_residuals, rolled_out
from bayes_simfluence.gaussian.search import _left_out, _left_out_simulated
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.model.coupling import DECAY
from bayes_simfluence.model.exposure import FLOOR
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.simfluence import hypers_of
from bayes_simfluence.posterior.arrays import recorded_arrays

FITTED = slice(0, 10)
MODEL = bs.Simfluence(coefficients=bs.Varying(knots=2))
SIZE, SCALE = 1.7, 0.8
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def fitted(recorded):
    runs = recorded_arrays(recorded.isel(run=slice(0, 3)), residuals=True)
    return runs.in_units(runs.steps, runs.largest_step_size)


@pytest.fixture(scope="module")
def free(fitted):
    return jnp.asarray(start(hypers_of(MODEL, fitted.features)))


def as_queries(runs):
    """The runs with their training examples as queries."""
    features = ExampleFeatures(runs.features.train, runs.features.train)
    return runs._replace(features=features, query=np.arange(runs.train))


def designs_of(free, runs):
    """Designs and means of every step, time 0 first, in the units of the states."""
    values = natural_values(hypers_of(MODEL, runs.features), free)
    steps = jnp.arange(runs.steps)
    design, mean = designs_and_means(MODEL, values, as_queries(runs), steps, knots=2)
    error = error_covariance(MODEL, values, jnp.asarray(runs.progress[0]))
    first = ((0, 0), (1, 0), (0, 0))
    return np.pad(design / SIZE, first), np.pad(mean, first), np.pad(error, ((1, 0), (1, 0)))


def dense(free, fitted, example, used):
    """Mean and covariance of (weights, start) given an example's observations, by plain algebra."""
    design, mean, error = designs_of(free, fitted)
    run, step, slot = np.nonzero((fitted.batch == example) & used[:, None, None])
    loss = -np.log1p(-np.clip(fitted.residual, 1e-6, 1 - 1e-6))
    linked = np.log(np.expm1(loss))
    first = linked[:, 0]
    level, spread = first.mean(), first.var() + WHITE * SCALE**2
    rows = np.concatenate([design[run, step], np.ones((len(run), 1))], axis=1)
    prior = np.diag(np.r_[np.full(design.shape[2], SCALE**2), spread])
    noise = (run[:, None] == run[None]) * error[np.ix_(step, step)] + WHITE * np.eye(len(run))
    gain = prior @ rows.T @ np.linalg.inv(rows @ prior @ rows.T + SCALE**2 * noise)
    missed = linked[run, step, slot] - level - mean[run, step, example]
    centre = gain @ missed
    return centre[:-1], level + centre[-1], prior - gain @ rows @ prior


def states(free, fitted, left_out):
    with double_precision():
        return conditioned_states(
            MODEL, free, fitted, observed_examples(MODEL, fitted), jnp.asarray(SIZE),
            jnp.asarray(SCALE), jnp.asarray(left_out), knots=2,
        )  # fmt: skip


def test_states_are_those_of_plain_algebra_with_and_without_a_run(fitted, free):
    left_out = np.array([[False, False, False], [False, True, False]])
    found = states(free, fitted, left_out)
    example = int(fitted.batch[1, 0, 0])
    with double_precision():
        for at, group in enumerate(left_out):
            weights, begin, _ = dense(free, fitted, example, ~group)
            np.testing.assert_allclose(found.weights[at, :, example], weights, atol=1e-8)
            assert found.start[at, example] == pytest.approx(begin, abs=1e-8)
    # Leaving its run out changes what is known of it.
    assert np.abs(found.weights[0, :, example] - found.weights[1, :, example]).max() > 1e-4


def test_draws_have_the_posteriors_mean_and_spread(fitted, free):
    draws = 2000
    with double_precision():
        found = drawn_states(
            MODEL, free, fitted, observed_examples(MODEL, fitted), jnp.asarray(SIZE),
            jnp.asarray(SCALE), KEY, knots=2, draws=draws,
        )  # fmt: skip
    example = int(fitted.batch[1, 0, 0])
    with double_precision():
        weights, begin, covariance = dense(free, fitted, example, np.ones(3, bool))
    drawn = np.asarray(found.weights[:, :, example])
    sd = np.sqrt(np.diag(covariance))
    # Means of 60 weights: beyond 4.5 sd by chance in 1 of 2000 runs of this test.
    z = (drawn.mean(axis=0) - weights) / (sd[:-1] / np.sqrt(draws))
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(drawn.std(axis=0), sd[:-1], rtol=0.1)
    begun = np.asarray(found.start[:, example])
    assert begun.std() == pytest.approx(sd[-1], rel=0.1)
    assert begun.mean() == pytest.approx(begin, abs=0.1 * sd[-1])
    # What was observed narrows them.
    assert sd[:-1].min() < 0.97 * SCALE


def test_an_example_that_no_run_trained_on_is_like_the_others(fitted, free):
    batch = np.where(fitted.batch == 0, -1, fitted.batch)
    found = states(free, fitted._replace(batch=batch), np.zeros((1, 3), bool))
    others = np.asarray(found.weights[0])
    seen = np.isin(np.arange(fitted.train), batch)
    np.testing.assert_allclose(others[:, 0], others[:, seen].mean(axis=1), atol=1e-10)


def test_rolling_out_is_simulating_step_by_step(fitted, free):
    """Residuals of a step follow from those of earlier ones, found one step after the other."""
    rng = np.random.default_rng(0)
    planned = fitted._replace(residual=None)
    with double_precision():
        some = states(free, fitted, np.zeros((1, 3), bool))
        one = States(some.weights[0], some.start[0], some.scale)
        white = jnp.asarray(0.3 * rng.normal(size=(3, fitted.steps + 1, fitted.train)))
        found = rolled_out(MODEL, free, one, planned, jnp.asarray(SIZE), white, knots=2)

        residual = np.zeros(fitted.batch.shape)
        _, _, error = designs_of(free, fitted)
        root = np.zeros(error.shape)
        root[1:, 1:] = np.linalg.cholesky(error[1:, 1:])
        eta = SCALE * np.einsum("ts,rsi->rti", root, white)
        for step in range(fitted.steps):
            design, mean, _ = designs_of(free, fitted._replace(residual=residual))
            linked = np.asarray(one.start) + mean + design @ np.asarray(one.weights) + eta
            loss = np.log1p(np.exp(np.asarray(linked)[:, step]))
            before = np.take_along_axis(1 - np.exp(-loss), fitted.batch[:, step], axis=1)
            residual[:, step] = np.where(fitted.batch[:, step] >= 0, before, 0.0)
    np.testing.assert_allclose(found, residual, atol=2e-3)
    # Not by luck: residuals that stay as they were at first are far from it.
    assert np.abs(residual - residual[:, :1]).max() > 0.1


@pytest.fixture(scope="module")
def posterior(recorded):
    return bs.fit(recorded.isel(run=FITTED), method=bs.Exact(times=6), model=MODEL, key=KEY)


def test_a_simulation_sees_no_residual_of_its_run(recorded, posterior):
    other = recorded.isel(run=[10])
    seen = other.assign(train_loss=other["train_loss"] * 3.0)
    losses = [posterior.simulate(runs, key=KEY, draws=9)["loss"].values for runs in (other, seen)]
    np.testing.assert_array_equal(*losses)


def test_left_out_runs_are_simulated_without_their_own_residuals(fitted, free):
    """Other observations of a run leave its own simulated residuals alone, not the other runs'."""
    with double_precision():
        size, changed = jnp.asarray(SIZE), fitted.residual.copy()
        changed[1] = 0.5 * changed[1] + 0.2
        # Designs of a run are of its recorded residuals; of the changed run nobody looks at them.
        before, after = (
            left_out_residuals(MODEL, free, fitted._replace(residual=residual), size, SCALE)
            for residual in (fitted.residual, changed)
        )
    # The level of all examples' first losses is a common one, and moves a little.
    moved = np.abs(after - before).mean(axis=(1, 2))
    assert moved[1] < 0.3 * min(moved[0], moved[2])
    assert before.shape == fitted.batch.shape and (before[fitted.batch < 0] == 0).all()


def test_errors_of_left_out_runs_are_those_of_really_leaving_them_out(fitted, free):
    """With the residuals that were simulated in the designs, and the others' recorded ones."""
    rows = jnp.asarray([3, 11, 23])
    rng = np.random.default_rng(0)
    other = np.where(fitted.batch >= 0, rng.uniform(0.2, 0.8, fitted.batch.shape), 0.0)
    with double_precision():
        found = _left_out_simulated(MODEL, free, fitted, rows, jnp.asarray(other))
        same = _left_out_simulated(MODEL, free, fitted, rows, jnp.asarray(fitted.residual))
        recorded = _left_out(MODEL, free, fitted, rows)
        values = natural_values(hypers_of(MODEL, fitted.features), free)
        whole = assembled(MODEL, values, fitted, rows, knots=2)
        planned = fitted._replace(residual=other)
        own = assembled(MODEL, values, planned, rows, knots=2, size=whole.size)
        change = linked_change(MODEL, fitted, rows)
        for run in range(3):
            rest = np.delete(np.arange(3), run)
            taken = whole.gaussian._replace(
                designs=whole.gaussian.designs[rest], known=whole.gaussian.known[rest]
            )
            weights = taken.condition((change - whole.mean)[rest]).mean
            expected = change[run] - own.mean[run] - own.gaussian.designs[run] @ weights
            np.testing.assert_allclose(found.error[run], expected, atol=1e-6)
    np.testing.assert_allclose(same.error, recorded.error, atol=1e-6)
    assert np.abs(found.error - recorded.error).max() > 1e-3


def test_effects_of_examples_are_those_of_a_typical_step(fitted, free):
    exposure = np.asarray(fitted.each(lambda run: run.exposures()))
    square = np.square(np.einsum("rsn,nf->rsf", exposure, fitted.features.train)).sum(axis=2)
    ends = range(1, fitted.steps + 1)
    moment = np.array(
        [
            [np.average(one[:end], weights=DECAY ** np.arange(end - 1.0, -1, -1)) for end in ends]
            for one in square
        ]
    )
    names = list(hypers_of(MODEL, fitted.features))
    free = free.at[names.index("trend")].set(0.7)
    power, of_step_size = (
        float(free[names.index(name)]) for name in ("second_moment_power", "step_size_power")
    )
    acting = np.exp(0.7 * fitted.progress) * (fitted.step_size + FLOOR) ** of_step_size
    expected = (acting * moment**-power * exposure.sum(axis=2)).mean()
    with double_precision():
        assert float(typical_step(MODEL, free, fitted)) == pytest.approx(expected, rel=1e-4)
        assert float(typical_step(MODEL, free, fitted._replace(residual=None))) == 1.0


def test_coupled_posteriors_are_saved_and_opened(recorded, posterior, tmp_path):
    path = posterior.save(tmp_path / "posterior.nc")
    opened, other = bs.load_posterior(path), recorded.isel(run=[10, 11])
    assert opened.simulator.coupled
    both = [one.simulate(other, key=KEY, draws=5)["loss"].values for one in (posterior, opened)]
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_coupled_posteriors_of_before_the_trend_have_none(recorded, posterior):
    simulator = posterior.simulator
    at = list(simulator.values).index("trend")
    without = replace(
        simulator, free=np.where(np.arange(len(simulator.free)) == at, 0.0, simulator.free)
    )
    saved = {name: array for name, (_, array) in without.arrays().items()}
    assert simulator.values["trend"] != 0
    old = saved | {"free": np.delete(saved["free"], at)}
    opened = type(simulator).restore(old, simulator.settings())
    assert opened.values == without.values


def test_densities_are_of_the_recorded_residuals(posterior):
    idata = posterior.to_arviz(draws=4, groups=["log_likelihood"])
    assert np.isfinite(idata["log_likelihood"]["loss"].values).all()


def test_without_residuals_effects_are_additive_and_the_verdict_says_so(recorded):
    bare = recorded.isel(run=FITTED).drop_vars("train_loss")
    fitted = bs.fit(bare, method=bs.Exact(times=4), key=KEY)
    assert not fitted.simulator.coupled
    assert "Effects are additive" in str(fitted.verdict)
    chosen = replace(bs.Simfluence(), coupling="none")
    said = bs.fit(bare, method=bs.Exact(times=4), model=chosen, key=KEY)
    assert "Effects are additive" not in str(said.verdict)
    np.testing.assert_allclose(fitted.simulator.scale, said.simulator.scale)


def test_runs_without_residuals_among_others_are_told(recorded):
    some = recorded.isel(run=slice(0, 4)).copy(deep=True)
    some["train_loss"][1] = np.nan
    fitted = bs.fit(some, method=bs.Exact(times=3), key=KEY)
    assert "1 of 4 runs" in str(fitted.verdict)
