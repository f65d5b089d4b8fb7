"""Densities of recorded runs against SciPy's normals, given the draws that samples() shows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from bayes_simfluence.gaussian.designs import error_covariance
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.affine import AffineSimulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator
from bayes_simfluence.simulators.mean import MeanSimulator

RUNS, STEPS, SLOTS, TRAIN, QUERY = 3, 8, 2, 5, 2
ROWS = np.array([1, 3, 5, 7])
DRAWS = 70
"""More than one chunk."""


def planned(rng, query=(1, 0), steps=STEPS):
    sizes = np.broadcast_to(np.linspace(0.5, 0.1, steps), (RUNS, steps)).copy()
    batch = rng.integers(-1, TRAIN, (RUNS, steps, SLOTS))
    initial = rng.uniform(0.5, 1.0, (RUNS, len(query)))
    return RunArrays.of(
        batch,
        initial[:, None],
        step_size=sizes,
        query=np.array(query),
        features=no_features(TRAIN, QUERY),
    )


def recorded(rng, plan, gaps=False):
    """Losses of the planned runs, the first as planned; some of them missing."""
    runs, steps, _ = plan.batch.shape
    later = rng.uniform(0.4, 1.2, (runs, steps, len(plan.query)))
    if gaps:
        later[0, [0, 4, 5]] = np.nan
        later[1, 3, 0] = later[2, :, 1] = later[2, -1, 0] = np.nan
    return np.concatenate([plan.initial[:, None], later], axis=1)


def affine(rng, **others):
    a, b = (0.2 * rng.normal(size=(QUERY, TRAIN)) for _ in "ab")
    factor = 0.1 * rng.normal(size=(QUERY, 2 * TRAIN, 4))
    settings = {"factor": factor, "noise": np.array([0.1, 0.3]), **others}
    return AffineSimulator(a, b, **settings)


def gaussian(rng, *, link="identity", df=1e7, knots=3, **others):
    model = Simfluence(link=link, coefficients=Varying(knots))
    known = ExampleFeatures(
        jnp.asarray(rng.normal(size=(TRAIN, 2))), jnp.asarray(rng.normal(size=(QUERY, 2)))
    )
    hypers = hypers_of(model, known)
    fitted = RunArrays.of(
        rng.integers(-1, TRAIN, (RUNS, STEPS, SLOTS)),
        rng.uniform(0.5, 1.5, (RUNS, STEPS + 1, QUERY)),
        step_size=np.tile(np.linspace(1.0, 0.2, STEPS), (RUNS, 1)),
        features=known,
    )
    settings = {
        "model": model,
        "free": start(hypers) + 0.3 * rng.normal(size=len(hypers)),
        "fitted": fitted,
        "rows": ROWS,
        "largest_step_size": 0.5,
        "scale": np.array([0.3, 0.5]),
        "log_inflation": np.log([1.0, 2.0, 3.0]),
        "df": df,
        "loadings": np.array([[0.6, 0.0], [-0.5, 0.4]]),
        **others,
    }
    return GaussianSimulator(**settings)


def exposure(batch, count):
    filled = batch[batch >= 0]
    weight = 1.0 if count else 1.0 / max(len(filled), 1)
    return np.bincount(filled, minlength=TRAIN) * weight


@pytest.mark.parametrize(("keep", "count"), [(1.0, False), (0.3, True)])
def test_a_step_of_white_noise_is_a_normal_around_its_prediction(rng, key, keep, count):
    simulator, plan = affine(rng, keep=keep, count=count), planned(rng)
    loss = recorded(rng, plan)
    found = simulator.log_likelihood(plan._replace(loss=loss), key=key, draws=DRAWS)
    assert found.shape == (1, DRAWS, RUNS, STEPS, QUERY)
    a, b = (simulator.samples(key=key, draws=DRAWS)[name][1][0].astype(float) for name in "ab")
    expected = np.zeros_like(found[0])
    for at, query in enumerate(plan.query):
        for run in range(RUNS):
            for step in range(STEPS):
                share = exposure(plan.batch[run, step], count)
                alpha, beta = keep + a[:, query] @ share, b[:, query] @ share
                expected[:, run, step, at] = norm.logpdf(
                    loss[run, step + 1, at],
                    alpha * loss[run, step, at] + beta,
                    simulator.noise[query],
                )
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_gaps_in_the_record_of_white_noise_are_integrated_out(rng, key):
    simulator, plan = affine(rng), planned(rng)
    loss = recorded(rng, plan, gaps=True)
    found = simulator.log_likelihood(plan._replace(loss=loss), key=key, draws=2)[0, -1]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(loss[:, 1:]))
    a, b = (simulator.samples(key=key, draws=2)[name][1][0, -1].astype(float) for name in "ab")
    for at, query in enumerate(plan.query):
        for run in range(RUNS):
            # The whole run is a Gaussian: (I - A) L = first + noise.
            system, right = np.eye(STEPS), np.zeros(STEPS)
            for step in range(STEPS):
                share = exposure(plan.batch[run, step], False)
                alpha, right[step] = 1.0 + a[query] @ share, b[query] @ share
                if step:
                    system[step, step - 1] = -alpha
                else:
                    right[0] += alpha * plan.initial[run, at]
            inverse = np.linalg.inv(system)
            covariance = simulator.noise[query] ** 2 * inverse @ inverse.T
            kept = np.isfinite(loss[run, 1:, at])
            expected = 0.0
            if kept.any():
                expected = multivariate_normal.logpdf(
                    loss[run, 1:, at][kept], (inverse @ right)[kept], covariance[kept][:, kept]
                )
            np.testing.assert_allclose(np.nansum(found[run, :, at]), expected, rtol=1e-5, atol=1e-5)


def test_samples_are_the_coefficients_of_simulated_runs(rng, key):
    simulator, plan = affine(rng), planned(rng)
    found = simulator.simulate(plan, key=key, draws=DRAWS).mean_loss[0]
    a, b = (simulator.samples(key=key, draws=DRAWS)[name][1][0] for name in "ab")
    share = exposure(plan.batch[1, 0], False)
    for at, query in enumerate(plan.query):
        expected = plan.initial[1, at] * (1 + a[:, query] @ share) + b[:, query] @ share
        np.testing.assert_allclose(found[:, 1, 1, at], expected, rtol=1e-5)
    assert len(np.unique(a[:, 0, 0])) == DRAWS


def test_what_has_no_density_says_so(rng, key):
    plan, residual = planned(rng), rng.normal(size=(4, STEPS + 1, QUERY))
    loss = recorded(rng, plan)
    without = (
        affine(rng, factor=None, noise=None),
        affine(rng, noise=None, residual=residual),
        MeanSimulator(residual[0], residual),
    )
    for simulator in without:
        assert simulator.log_likelihood(plan._replace(loss=loss), key=key, draws=2) is None


def error_of(post, steps):
    with double_precision():
        values = natural_values(hypers_of(post.model, post.fitted.features), jnp.asarray(post.free))
        progress = jnp.arange(1, steps + 1) / STEPS
        return np.asarray(error_covariance(post.model, values, progress))


def linked(loss, link):
    """The scale on which effects add up, and the log of the map's slope."""
    if link == "identity":
        return loss, np.zeros_like(loss)
    return np.log(np.expm1(loss)), -np.log(-np.expm1(-loss))


@pytest.mark.parametrize(
    ("link", "steps", "gaps", "df"),
    [
        ("identity", STEPS, False, 1e7),
        ("log-odds", STEPS, True, 4.0),
        ("log-odds", 10, False, 4.0),
        ("identity", 6, True, 4.0),
    ],
)
def test_a_run_of_smooth_error_is_a_dense_normal(rng, key, link, steps, gaps, df):
    post = gaussian(rng, link=link, df=df)
    plan, draws = planned(rng, steps=steps), 4
    loss = recorded(rng, plan, gaps)
    found = post.log_likelihood(plan._replace(loss=loss), key=key, draws=draws)
    rows = ROWS[steps > ROWS]
    assert found.shape == (1, draws, RUNS, steps, QUERY)
    kept = np.zeros(loss[:, 1:].shape, bool)
    kept[:, rows] = np.isfinite(loss[:, 1:][:, rows])
    np.testing.assert_array_equal(np.isfinite(found[0]), np.broadcast_to(kept, found[0].shape))
    trajectory = {
        simulator.df: linked(
            simulator.simulate(plan, key=key, draws=draws).mean_loss[0, :, :, 1:].astype(float),
            link,
        )[0]
        for simulator in (post, dataclasses.replace(post, df=1e7))
    }
    centre = linked(
        dataclasses.replace(post, scale=np.full(QUERY, 1e-9))
        .simulate(plan, key=key, draws=draws)
        .mean_loss[0, :, :, 1:]
        .astype(float),
        link,
    )[0]
    truth, slope = linked(loss[:, 1:], link)
    covariance = error_of(post, steps)
    inflated = np.exp(0.5 * post.log_variance_inflation(np.arange(1, steps + 1) / STEPS))
    for at, query in enumerate(plan.query):
        # The scale of a draw, from how far the same weights go with and without it.
        far = [(trajectory[own] - centre)[:, 0, :, at] for own in (df, 1e7)]
        factors = (far[0] * far[1]).sum(axis=1) / np.square(far[1]).sum(axis=1)
        for draw, factor in enumerate(factors):
            sd = post.scale[query] * factor * inflated
            for run in range(RUNS):
                some = kept[run, :, at]
                expected = 0.0
                if some.any():
                    expected = slope[run, some, at].sum() + multivariate_normal.logpdf(
                        truth[run, some, at],
                        trajectory[df][draw, run, some, at],
                        (sd[:, None] * sd * covariance)[some][:, some],
                    )
                total = np.nansum(found[0, draw, run, :, at])
                np.testing.assert_allclose(total, expected, rtol=2e-3, atol=2e-3)


def test_a_density_of_a_loss_integrates_to_one_in_nats(rng, key):
    post = gaussian(rng, link="log-odds", rows=np.array([0]), df=5.0)
    plan = planned(rng)
    grid = np.linspace(1e-4, 12.0, 4000)
    many = plan.take(np.zeros(len(grid), int))
    loss = np.full((len(grid), STEPS + 1, QUERY), np.nan)
    loss[:, 0], loss[:, 1] = many.initial, grid[:, None]
    found = post.log_likelihood(many._replace(loss=loss), key=key, draws=2)[0, :, :, 0]
    mass = np.trapezoid(np.exp(found.astype(float)), grid, axis=1)
    np.testing.assert_allclose(mass, 1.0, atol=1e-3)


def test_effects_of_examples_are_those_that_trajectories_are_made_of(rng, key):
    # With constant coefficients, a run on one example moves by its two effects and nothing else.
    post, plan = gaussian(rng, knots=1, log_inflation=np.zeros(3)), planned(rng)
    plan.batch[:] = np.arange(RUNS)[:, None, None]
    moved = post.simulate(plan, key=key, draws=DRAWS).mean_loss[0, :, :, -1]
    samples = post.samples(key=key, draws=DRAWS)
    for at, query in enumerate(plan.query):
        for example in range(RUNS):
            effects = [samples[part][1][0, :, query, example] for part in ("staying", "fading")]
            columns = np.stack([*effects, np.ones(DRAWS)], axis=1).astype(float)
            rest = np.linalg.lstsq(columns, moved[:, example, at].astype(float), rcond=None)[1]
            assert rest[0] / DRAWS < 1e-6 * moved[:, example, at].var()


def test_losses_of_zero_have_a_density(rng, key):
    post, plan = gaussian(rng, link="log-odds"), planned(rng)
    loss = recorded(rng, plan)
    loss[:, 2] = 0.0
    found = post.log_likelihood(plan._replace(loss=loss), key=key, draws=2)
    assert np.isfinite(found[:, :, :, ROWS]).all()
