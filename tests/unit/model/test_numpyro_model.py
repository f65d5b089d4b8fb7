"""Density of losses against the recurrence as a loop, and against dense algebra where some miss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from bayes_simfluence.gaussian.designs import designs_and_means, error_covariance
from bayes_simfluence.inference.collapsed import _named_weights
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model import coupling, noise
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import FLOOR, LEAST_MOMENT, Exposure
from bayes_simfluence.model.hyper import free_values, natural_values, start
from bayes_simfluence.model.mean_function import mean_function
from bayes_simfluence.model.numpyro_model import (
    Units,
    coefficients_of,
    density_of,
    gaps_of,
    noise_of,
)
from bayes_simfluence.model.simfluence import Simfluence, hypers_of

RUNS, STEPS, TRAIN, QUERIES, RECORDED = 2, 5, 3, 2, 4

MODELS = {
    "linear": Simfluence.linear(),
    "additive": Simfluence.additive(link="log"),
    "multiplicative": Simfluence.multiplicative(),
    "student": Simfluence.linear(error=noise.StudentT()),
    "power": Simfluence.linear(error=noise.Gaussian(loss_power=None)),
    "student with power": Simfluence.linear(error=noise.StudentT(0.8, df=3.0)),
    "ar1": Simfluence.linear(error=noise.AR1(loss_power=-0.5, run_effect=True)),
    "smooth": Simfluence.linear(error=noise.Smooth()),
    "run effect": Simfluence.linear(error=noise.Gaussian(run_effect=True)),
    "observation": Simfluence.additive(error=noise.Gaussian(observation=True)),
    "order": Simfluence.linear(exposure=Exposure(order=3), time_effect="linear"),
    "two timescales": Simfluence(coefficients=Varying(3), coupling="none"),
    "coupled": Simfluence(coefficients=Varying(3)),
    "coupled, linear in time": Simfluence(
        time_effect="linear", error=noise.AR1(), exposure=Exposure(second_moment_power=0.7)
    ),
    "two timescales, all": Simfluence(
        terms="both",
        coefficients=Varying(2),
        error=noise.StudentT(0.3),
        link="log",
        coupling="none",
    ),
    "fading": Simfluence(
        timescales="fading",
        terms="both",
        time_effect="linear",
        error=noise.AR1(),
        coupling="none",
    ),
}


def setting(model, rng, count=RUNS):
    """Hyperparameters off their centre, coefficients, runs and their losses on the link's scale."""
    features = no_features(TRAIN, QUERIES)
    hypers = hypers_of(model, features)
    free = start(hypers) + 0.3 * rng.normal(size=len(hypers))
    knots = model.coefficients.count(1.0)
    with double_precision():
        sites = dict(natural_values(hypers, jnp.asarray(free)))
        sites["scale"] = jnp.asarray(rng.uniform(0.1, 0.3, QUERIES))
        if model.per_query and model.error.by_step:
            sites["noise"] = jnp.asarray(rng.uniform(0.1, 0.3, QUERIES))
        for part in model.parts if model.has_additive else ():
            sites[f"{part}_unit"] = jnp.asarray(rng.normal(size=(QUERIES, TRAIN, knots)))
            if model.time_effect != "none":
                width = knots if model.time_effect == "smooth" else 1
                sites[f"{part}_time"] = jnp.asarray(rng.normal(size=(QUERIES, width)))
        if model.has_multiplicative:
            sites["multiplicative_unit"] = jnp.asarray(rng.normal(size=(QUERIES, TRAIN, 1)))
        units = Units(jnp.asarray([1.5, 0.8]), jnp.asarray(1.0 if model.per_query else 3.0))
        coefficients = coefficients_of(model, sites, units, features)
    runs = RunArrays(
        batch=rng.integers(-1, TRAIN, (count, STEPS, 3)),
        weight=rng.uniform(0.5, 2.0, (count, STEPS, 3)),
        step_size=rng.uniform(0.1, 1.0, (count, STEPS)),
        loss=np.full((count, STEPS + 1, QUERIES), np.nan),
        query=np.arange(QUERIES),
        features=features,
        progress=np.broadcast_to(np.arange(1, STEPS + 1) / RECORDED, (count, STEPS)),
        residual=rng.uniform(0.05, 1.0, (count, STEPS, 3)) if model.coupled else None,
    )
    return sites, coefficients, runs, rng.uniform(0.5, 2.0, (count, STEPS + 1, QUERIES))


def alone(runs, number):
    """One of the runs, without their axis."""
    parts = ("batch", "weight", "step_size", "loss", "progress")
    parts += ("residual",) if runs.residual is not None else ()
    return runs._replace(**{name: getattr(runs, name)[number] for name in parts})


def shares_of(run):
    """Weight of each example over the sum of weights in each batch of one run, slot by slot.

    Times its residual, where there are such.
    """
    found = np.zeros((STEPS, TRAIN))
    acting = np.ones(run.batch.shape) if run.residual is None else run.residual
    for step, (members, weights) in enumerate(zip(run.batch, run.weight, strict=True)):
        for slot, example in enumerate(members):
            if example >= 0:
                whole = weights[members >= 0].sum()
                found[step, example] += weights[slot] / whole * acting[step, slot]
    return found


def looped(model, sites, coefficients, run, y, query):
    """``u_t + v_t`` of one run and query, batch by batch."""
    value = {name: np.asarray(site, float) for name, site in sites.items()}
    share, step_size, progress = shares_of(run), run.step_size, run.progress
    at = np.linspace(0.0, 1.0, model.coefficients.knots)
    ahead = np.append(at, 1.0 + at[1] - at[0]) if len(at) > 1 else at

    def now(curve, t):
        longer = np.append(curve, np.zeros(len(ahead) - len(curve)))
        return np.interp(progress[t], ahead, longer) if len(at) > 1 else curve[0]

    def moved(part, t):
        total = 0.0
        if model.has_additive:
            for i in range(TRAIN):
                total += share[t, i] * now(np.asarray(coefficients.additive[part])[query, i], t)
            if part in coefficients.common:
                acts = 1.0 if run.residual is None else share[t].sum()
                total += acts * now(np.asarray(coefficients.common[part])[query], t)
        if model.has_multiplicative and part == model.parts[0]:
            total += share[t] @ np.asarray(coefficients.multiplicative)[query] * y[t]
        return total

    def weight(t, s):
        exposure, lag = model.exposure, t - s
        if exposure.is_memoryless:
            found = float(lag == 0)
        elif exposure.order is None:
            rho = value.get("momentum", exposure.momentum)
            found = (1 - rho) * rho**lag / (1 - rho ** (t + 1))
        else:
            shares = [1.0, *(value[f"lag_{k}"] for k in range(1, exposure.order))]
            found = shares[lag] / sum(shares[: t + 1]) if lag < exposure.order else 0.0
        power = value.get("step_size_power", exposure.step_size_power)
        growth = np.exp(value.get("trend", 0.0) * min((t + 1) / RECORDED, 1.0))
        found = growth * found * ((step_size[t] + FLOOR) ** power if power else 1.0)
        if run.residual is not None:
            # Without features all gradients point the same way.
            kept = coupling.DECAY ** np.arange(t, -1.0, -1.0)
            moment = kept @ share[: t + 1].sum(axis=1) ** 2 / kept.sum()
            power = value.get("second_moment_power", exposure.second_moment_power)
            found = found * (moment + LEAST_MOMENT) ** -power
        return found

    rates = {"staying": value.get("growth", 0.0), "fading": -1 / value.get("fade_length", 1.0)}
    totals, found = dict.fromkeys(model.parts, 0.0), []
    for t in range(STEPS):
        for part in model.parts:
            acts = sum(weight(t, s) * moved(part, s) for s in range(t + 1))
            totals[part] = np.exp(rates[part] / RECORDED) * totals[part] + acts
        found.append(sum(totals.values()))
    return np.array(found)


def to_loss(model, y):
    return {"identity": y, "log": np.exp(y), "log-odds": np.logaddexp(0.0, y)}[model.link]


def log_density(model, sites, coefficients, run, y, query):
    """Of one run and query, all losses known."""
    error = model.error
    eta = y[1:] - y[0] - looped(model, sites, coefficients, run, y, query)
    steps = np.diff(eta, prepend=0.0)
    size = np.full(STEPS, float(noise_of(model, sites)[query]))
    power = float(sites.get("loss_power", getattr(error, "loss_power", 0.0)))
    size *= np.maximum(to_loss(model, y[:-1]), 1e-3) ** power
    if isinstance(error, noise.StudentT):
        df = error.df or 2 + float(sites["error_freedom"])
        return sum(stats.t.logpdf(steps, df, scale=size))
    if error == noise.Gaussian(loss_power=error.__dict__.get("loss_power", 0.0)):
        return sum(stats.norm.logpdf(steps, scale=size))
    with double_precision():
        covariance = np.asarray(error.covariance(sites, jnp.asarray(run.progress)))
    law = stats.multivariate_normal(cov=covariance + noise.JITTER * np.eye(STEPS))
    return law.logpdf(np.cumsum(steps / size)) - np.log(size).sum()


def densities(model, sites, coefficients, runs, y):
    with double_precision():
        gaps = gaps_of(model, y)
        found = density_of(model, sites, coefficients, runs, jnp.asarray(y), gaps)
        return np.asarray(found), gaps


@pytest.mark.parametrize("name", MODELS)
def test_the_density_is_that_of_the_recurrence_as_a_loop(rng, name):
    model = MODELS[name]
    sites, coefficients, runs, y = setting(model, rng)
    found, gaps = densities(model, sites, coefficients, runs, y)
    assert not gaps.filtered
    assert len(gaps.imputed) == 0
    for number in range(RUNS):
        run = alone(runs, number)
        for query in range(QUERIES):
            expected = log_density(model, sites, coefficients, run, y[number, :, query], query)
            np.testing.assert_allclose(found[number, :, query].sum(), expected, rtol=1e-6)


def test_the_mean_function_is_the_loop(rng):
    model = MODELS["two timescales, all"]
    sites, coefficients, runs, y = setting(model, rng)
    run = alone(runs, 0)
    with double_precision():
        arrays = jax.tree.map(jnp.asarray, run)
        found = mean_function(model, sites, coefficients, arrays, jnp.asarray(y[0, :-1]))
    for query in range(QUERIES):
        expected = looped(model, sites, coefficients, run, y[0, :, query], query)
        np.testing.assert_allclose(found[:, query], expected, rtol=1e-8)


def test_each_step_of_the_published_model_is_a_normal_step(rng):
    model = MODELS["linear"]
    sites, coefficients, runs, y = setting(model, rng)
    found, _ = densities(model, sites, coefficients, runs, y)
    a, b = np.asarray(coefficients.multiplicative), np.asarray(coefficients.additive["staying"])
    for run in range(RUNS):
        for step, share in enumerate(shares_of(alone(runs, run))):
            mean = (1 + share @ a.T) * y[run, step] + share @ b[..., 0].T
            expected = stats.norm.logpdf(y[run, step + 1], mean, np.asarray(sites["noise"]))
            np.testing.assert_allclose(found[run, step], expected, rtol=1e-8)


def law_of_losses(model, sites, coefficients, run, y0, query):
    """Mean and covariance of all losses of one run and query, by the recurrence.

    The mean of a linear recurrence is its solution without errors; a column of its response is what
    one more unit of error at a step does to later losses.
    """

    def rolled(errors):
        y = np.full(STEPS + 1, y0)
        for t in range(STEPS):
            told = looped(model, sites, coefficients, run, y, query)[t]
            y[t + 1] = y0 + told + errors[t]
        return y[1:]

    mean = rolled(np.zeros(STEPS))
    response = np.stack([rolled(one) - mean for one in np.eye(STEPS)], axis=1)
    with double_precision():
        error = model.error
        observation = getattr(error, "observation", False)
        own = noise.Gaussian() if observation else error
        covariance = np.asarray(own.covariance(sites, jnp.asarray(run.progress)))
    size = float(noise_of(model, sites)[query])
    whole = response @ covariance @ response.T
    if observation:
        whole = whole + float(sites["observation"]) ** 2 * np.eye(STEPS)
    return mean, size**2 * whole


ROWS = {
    "smooth": Simfluence(coefficients=Varying(2)),
    "smooth, additive": Simfluence(coefficients=Varying(2), coupling="none"),
    "ar1": Simfluence.additive(error=noise.AR1()),
    "run effect": Simfluence.additive(error=noise.Gaussian(run_effect=True)),
    "gaussian, with memory": Simfluence.additive(exposure=Exposure(0.5, 0.0)),
    "observation, with memory": Simfluence.additive(
        exposure=Exposure(0.5, 0.0), error=noise.Gaussian(observation=True)
    ),
}
FILTERED = {
    "linear": Simfluence.linear(),
    "multiplicative": Simfluence.multiplicative(),
    "time effect": Simfluence.additive(time_effect="linear"),
    "observation": Simfluence.linear(error=noise.Gaussian(observation=True)),
    "additive, observation": Simfluence.additive(error=noise.Gaussian(observation=True)),
}


def same_as_dense(model, sites, coefficients, runs, y, found):
    for run in range(RUNS):
        for query in range(QUERIES):
            seen = y[run, 1:, query]
            mean, covariance = law_of_losses(
                model, sites, coefficients, alone(runs, run), y[run, 0, query], query
            )
            kept = np.flatnonzero(np.isfinite(seen))
            law = stats.multivariate_normal(mean[kept], covariance[np.ix_(kept, kept)])
            np.testing.assert_allclose(
                found[run, :, query].sum(), law.logpdf(seen[kept]), rtol=1e-5
            )
            np.testing.assert_array_equal(found[run, ~np.isfinite(seen), query], 0.0)


@pytest.mark.parametrize("name", ROWS)
def test_times_that_all_runs_lack_are_integrated_out(rng, name):
    model = ROWS[name]
    sites, coefficients, runs, y = setting(model, rng)
    y[:, [1, 4]] = np.nan
    found, gaps = densities(model, sites, coefficients, runs, y)
    assert gaps.rows == (1, 2, 4)
    assert not gaps.filtered
    assert len(gaps.imputed) == 0
    same_as_dense(model, sites, coefficients, runs, y, found)


@pytest.mark.parametrize("name", FILTERED)
def test_any_missing_loss_of_a_markov_model_is_filtered_out(rng, name):
    model = FILTERED[name]
    sites, coefficients, runs, y = setting(model, rng)
    y[0, [1, 2, 4], 0] = np.nan
    y[1, 5, 1] = np.nan
    found, gaps = densities(model, sites, coefficients, runs, y)
    assert gaps.filtered
    same_as_dense(model, sites, coefficients, runs, y, found)


def test_noise_of_observation_with_multiplicative_terms_is_filtered_even_if_nothing_misses(rng):
    model = FILTERED["observation"]
    sites, coefficients, runs, y = setting(model, rng)
    found, gaps = densities(model, sites, coefficients, runs, y)
    assert gaps.filtered
    same_as_dense(model, sites, coefficients, runs, y, found)


def test_a_missing_loss_of_a_student_model_is_imputed(rng):
    """The model's density over the missing loss has the integral of the product of steps."""
    model = MODELS["student"]
    sites, coefficients, runs, y = setting(model, rng, count=1)
    y[0, 3, 1] = np.nan
    with double_precision():
        gaps = gaps_of(model, y)
        assert gaps.imputed == ((0, 3, 1),)
        assert not gaps.filtered
        grid = jnp.linspace(-30.0, 30.0, 3001)
        one = partial(density_of, model, sites, coefficients, runs, gaps=gaps)
        seen = jnp.asarray(y)
        found = jax.vmap(lambda at: one(seen.at[0, 3, 1].set(at))[0, :, 1].sum())(grid)
        integral = np.trapezoid(np.exp(np.asarray(found)), np.asarray(grid))
    scale, df = float(sites["noise"][1]), 2 + float(sites["error_freedom"])
    share = shares_of(alone(runs, 0))
    alpha = 1 + share @ np.asarray(coefficients.multiplicative)[1]
    beta = share @ np.asarray(coefficients.additive["staying"])[1, :, 0]

    def product(missing):
        whole = np.where(np.isnan(y[0, :, 1]), missing, y[0, :, 1])
        step = whole[1:] - alpha * whole[:-1] - beta
        return np.prod(stats.t.pdf(step, df, scale=scale))

    expected, _ = integrate.quad(product, -30.0, 30.0, points=[0.0, 1.0, 2.0], epsabs=1e-14)
    np.testing.assert_allclose(integral, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (MODELS["smooth"], "imputed"),  # multiplicative terms need the loss before a step
        (MODELS["power"], "imputed"),
        (MODELS["ar1"], "imputed"),
        (MODELS["two timescales"], "rows"),
        (MODELS["observation"], "filtered"),
    ],
)
def test_the_cheapest_exact_way_is_taken(rng, model, way):
    y = rng.normal(size=(RUNS, STEPS + 1, QUERIES))
    y[:, 2] = np.nan
    gaps = gaps_of(model, y)
    assert gaps.filtered == (way == "filtered")
    assert (len(gaps.imputed) > 0) == (way == "imputed")
    assert len(gaps.rows) == STEPS - (way == "rows")
    y[0, 3, 0] = np.nan
    assert (len(gaps_of(model, y).imputed) > 0) == (way != "filtered")


def test_gradients_are_finite_where_losses_are_missing(rng):
    for model, lost in ((ROWS["smooth"], np.s_[:, 2]), (FILTERED["linear"], np.s_[0, 2, 1])):
        sites, _, runs, y = setting(model, rng)
        y[lost] = np.nan
        with double_precision():
            gaps, units = gaps_of(model, y), Units(jnp.ones(QUERIES), jnp.ones(()))

            def total(sites, model=model, runs=runs, y=y, gaps=gaps, units=units):
                found = coefficients_of(model, sites, units, no_features(TRAIN, QUERIES))
                return density_of(model, sites, found, runs, jnp.asarray(y), gaps).sum()

            gradient = jax.jit(jax.grad(total))(sites)
            assert all(np.isfinite(np.asarray(one)).all() for one in gradient.values())
            assert any(np.abs(np.asarray(one)).max() > 0 for one in gradient.values())


def test_coefficients_have_their_units(rng):
    """``scale / spread`` times the part's, times unit curves, minus what gradients say."""
    model = Simfluence(coefficients=Varying(3), terms="both")
    sites, _, _, _ = setting(model, rng)
    train, query = rng.normal(size=(TRAIN, 2)), rng.normal(size=(QUERIES, 2))
    with double_precision():
        sites = {**sites, "staying_dot": jnp.asarray(0.4), "fading_dot": jnp.asarray(-0.2)}
        features = ExampleFeatures(jnp.asarray(train), jnp.asarray(query))
        units = Units(jnp.ones(QUERIES), jnp.asarray(3.0))
        found = coefficients_of(model, sites, units, features)
    value = {name: np.asarray(one) for name, one in sites.items()}
    scale = value["scale"] / 3.0
    at = np.arange(3) / 2
    for part, dot, ratio in (("staying", 0.4, 1.0), ("fading", -0.2, value["fading_scale"])):
        share, length = value[f"{part}_constant_share"], value[f"{part}_length"]
        smooth = share + (1 - share) * np.exp(-((at[:, None] - at) ** 2) / 2 / length**2)
        root = np.linalg.cholesky(smooth + 1e-6 * np.eye(3))
        for q in range(QUERIES):
            for i in range(TRAIN):
                expected = scale[q] * ratio * (root @ value[f"{part}_unit"][q, i])
                expected = expected - dot * train[i] @ query[q]
                np.testing.assert_allclose(found.additive[part][q, i], expected, rtol=1e-6)
            common = scale[q] * ratio * value[f"{part}_common"] * (root @ value[f"{part}_time"][q])
            np.testing.assert_allclose(found.common[part][q], common, rtol=1e-6)
    expected = scale[:, None] * value["multiplicative_scale"] * value["multiplicative_unit"][..., 0]
    np.testing.assert_allclose(found.multiplicative, expected, rtol=1e-6)


def test_effects_of_a_callers_distribution_are_in_nats_and_stay_the_same(rng):
    from numpyro.distributions import Laplace

    model = Simfluence(coefficients=Varying(3), prior=Laplace(0.0, 0.1), timescales="both")
    sites, coefficients, _, _ = setting(model, rng)
    for part in model.parts:
        np.testing.assert_array_equal(coefficients.additive[part], sites[f"{part}_unit"])


def test_multiplicative_terms_of_the_published_kinds_are_relative_to_the_loss_at_the_start(rng):
    sites, coefficients, _, _ = setting(MODELS["linear"], rng)
    expected = (np.asarray(sites["scale"]) / np.array([1.5, 0.8]))[:, None]
    found = np.asarray(coefficients.multiplicative)
    np.testing.assert_allclose(
        found, expected * np.asarray(sites["multiplicative_unit"])[..., 0], rtol=1e-6
    )


@pytest.mark.parametrize("model", [MODELS["coupled"], MODELS["two timescales"]])
@pytest.mark.parametrize("width", [0, 2])
def test_the_density_is_that_of_the_gaussian_form(rng, model, width):
    """Weights of the design as sites of the program; the density of what is left as an error."""
    _, _, runs, y = setting(model, rng)
    size = 3.0
    with double_precision():
        features = ExampleFeatures(
            jnp.asarray(rng.normal(size=(TRAIN, width))),
            jnp.asarray(rng.normal(size=(QUERIES, width))),
        )
        # Of a recorded length: longer ones have knots of their own.
        progress = np.broadcast_to(np.arange(1, STEPS + 1) / STEPS, (RUNS, STEPS))
        runs = runs._replace(features=features, progress=progress)
        units = Units(jnp.ones(QUERIES), jnp.asarray(size))
        hypers = hypers_of(model, features)
        free = jnp.asarray(start(hypers) + 0.3 * rng.normal(size=len(hypers)))
        values = natural_values(hypers, free)
        scale, rows = np.array([0.4, 0.9]), jnp.arange(STEPS)
        designs, mean = map(np.asarray, designs_and_means(model, values, runs, rows, knots=3))
        weights = rng.normal(size=(designs.shape[2], QUERIES))
        named = _named_weights(model, features, values, jnp.asarray(weights))
        sites = {**values, "scale": jnp.asarray(scale)}
        sites.update({name: jnp.asarray(site, float) for name, site in named.items()})
        coefficients = coefficients_of(model, sites, units, features)
        error = np.asarray(error_covariance(model, values, jnp.asarray(runs.progress[0])))
        np.testing.assert_allclose(free_values(hypers, sites), free, rtol=1e-8)
    found, _ = densities(model, sites, coefficients, runs, y)
    for run in range(RUNS):
        for query in range(QUERIES):
            told = mean[run, :, query] + scale[query] * designs[run] @ weights[:, query] / size
            law = stats.multivariate_normal(told, scale[query] ** 2 * error)
            change = y[run, 1:, query] - y[run, 0, query]
            np.testing.assert_allclose(found[run, :, query].sum(), law.logpdf(change), rtol=1e-3)
