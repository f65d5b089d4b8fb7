"""The two-timescale posterior against dense conditioning, and what its draws promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.gaussian.designs import JITTER, designs_and_means
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.design import mean_effect
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.base import Simulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator

RUNS, STEPS, SLOTS, TRAIN, QUERY = 4, 8, 2, 6, 2
LONG = 12
"""Steps of simulated runs unless said otherwise: beyond the recorded length."""
ROWS = np.array([1, 3, 5, 7])
DRAWS = 4000
ALIKE = np.tile(np.arange(STEPS) % 4 == 3, (RUNS, 1))
"""Recorded every fourth step; rows in between are in ``ROWS`` and must change nothing."""
UNLIKE = np.array([one.split() for one in (
    "0 1 0 1 0 0 0 1", "1 0 1 0 1 0 1 0", "1 1 1 1 1 1 0 0", "0 0 0 0 0 1 0 0",
)]).astype(int) > 0  # fmt: skip
"""Recorded at other times in each run: none of ``ROWS`` in one, one alone in another."""
FALSE_ALARM = 5.5
"""Monte Carlo errors are refused beyond this many standard errors: 4e-8 for each number."""


def simulator(rng, *, knots=3, features=2, link="identity", df=1e6, **others):
    model = Simfluence(link=link, coefficients=Varying(knots), coupling="none")
    known = ExampleFeatures(
        jnp.asarray(rng.normal(size=(TRAIN, features))),
        jnp.asarray(rng.normal(size=(QUERY, features))),
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
        "log_inflation": np.zeros(3),
        "df": df,
        "loadings": np.array([[0.6, 0.0], [-0.5, 0.4]]),
    }
    return GaussianSimulator(**{**settings, **others})


def recorded_at(post, known):
    """The same posterior from losses recorded only where ``known (run, step)``."""
    loss = post.fitted.loss.copy()
    loss[:, 1:][~known] = np.nan
    return dataclasses.replace(post, fitted=post.fitted._replace(loss=loss))


def planned(rng, steps=LONG, runs=2, query=(0, 1)):
    sizes = np.broadcast_to(np.linspace(0.5, 0.1, steps), (runs, steps)).copy()
    batch = rng.integers(0, TRAIN, (runs, steps, SLOTS))
    initial = rng.uniform(0.5, 1.0, (runs, len(query)))
    return RunArrays.of(
        batch,
        initial[:, None],
        step_size=sizes,
        query=np.array(query),
        features=no_features(TRAIN, QUERY),
    )


def with_initial(plan, initial):
    """The planned runs from other losses before the first update."""
    loss = plan.loss.copy()
    loss[:, 0] = initial
    return plan._replace(loss=loss)


def dense(post, plan):
    """Posterior of all points of one new run by conditioning one big Gaussian, per query.

    Conditioned on the recorded points and nothing else, in plain NumPy.
    Returns means (step, query), covariances of the effects and of the run's error, both up to
    the query's scale squared; and the same for the two kinds of effects of single examples.
    """
    model, fitted, features = post.model, post.fitted, post.fitted.features
    steps = plan.steps
    with double_precision():
        values = natural_values(hypers_of(model, features), jnp.asarray(post.free))
        knots = model.coefficients.count(max(1.0, steps / STEPS))

        def designs(runs, rows):
            made = designs_and_means(model, values, runs, jnp.asarray(rows), knots=knots)
            return [np.asarray(array) for array in made]

        old, old_mean = designs(fitted, ROWS)
        run = plan.take(np.array([0]))._replace(
            step_size=plan.step_size[:1] / post.largest_step_size,
            progress=np.arange(1, steps + 1)[None] / STEPS,
            features=features,
        )
        new, new_mean = (array[0] for array in designs(run, np.arange(steps)))
        progress = jnp.arange(1, max(steps, STEPS) + 1) / STEPS
        error = np.asarray(model.error.covariance(values, progress))
        error = error + JITTER * np.eye(len(error))
        functionals = {
            part: (
                np.asarray(mean_effect(model, values, part, features)),
                np.asarray(model.prior.mean(values, part, jnp.eye(TRAIN), features)),
            )
            for part in (("staying", "fading") if steps == STEPS else ())
        }
    change = fitted.loss[:, 1:][:, ROWS] - fitted.loss[:, :1] - old_mean
    change = change.reshape(-1, QUERY)
    points = np.flatnonzero(np.isfinite(change[:, 0]))
    flat, change = old.reshape(-1, old.shape[-1])[points], change[points]
    size = np.sqrt((flat**2).sum(axis=1).mean())
    flat, new = flat / size, new / size
    errors = np.kron(np.eye(RUNS), error[np.ix_(ROWS, ROWS)])[np.ix_(points, points)]
    inside = errors + flat @ flat.T

    def conditioned(linear, mean):
        across = linear @ flat.T
        return (
            mean + across @ np.linalg.solve(inside, change),
            linear @ linear.T - across @ np.linalg.solve(inside, across.T),
        )

    effects = {part: conditioned(one / size, mean) for part, (one, mean) in functionals.items()}
    return (*conditioned(new, new_mean), error[:steps, :steps], effects)


def same_moments(drawn, mean, covariance):
    """Whether draws ``(draw, item)`` have a normal's mean and covariance."""
    sd = np.sqrt(np.diag(covariance))
    assert np.abs(drawn.mean(axis=0) - mean).max() < FALSE_ALARM * (sd / np.sqrt(DRAWS)).max()
    np.testing.assert_array_less(
        np.abs(drawn.mean(axis=0) - mean), FALSE_ALARM * sd / np.sqrt(DRAWS) + 1e-5
    )
    se = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / DRAWS)
    np.testing.assert_array_less(
        np.abs(np.cov(drawn, rowvar=False) - covariance), FALSE_ALARM * se + 1e-8
    )


@pytest.mark.parametrize(
    ("knots", "features", "steps", "known"),
    [
        (3, 2, STEPS, None),
        (2, 0, STEPS, None),
        (3, 2, LONG, None),
        (3, 2, STEPS, ALIKE),
        (3, 2, LONG, UNLIKE),
    ],
)
def test_trajectories_are_the_dense_posterior(rng, key, knots, features, steps, known):
    post, plan = simulator(rng, knots=knots, features=features), planned(rng, steps)
    post = post if known is None else recorded_at(post, known)
    assert isinstance(post, Simulator)
    mean, covariance, error, _ = dense(post, plan)
    found = post.simulate(plan, key=key, draws=DRAWS)
    for at in range(QUERY):
        centre, scale = plan.initial[0, at] + mean[:, at], post.scale[at] ** 2
        for kind, variance in (("mean_loss", covariance), ("loss", covariance + error)):
            drawn = getattr(found, kind)[0, :, 0, :, at].astype(float)
            np.testing.assert_allclose(drawn[:, 0], plan.initial[0, at], rtol=1e-6)
            same_moments(drawn[:, 1:], centre, scale * variance)


@pytest.mark.parametrize("known", [ALIKE, UNLIKE, np.ones_like(ALIKE)])
def test_effects_of_examples_are_the_dense_posterior(rng, key, known):
    post = recorded_at(simulator(rng), known)
    _, _, _, effects = dense(post, planned(rng, STEPS))
    found = post.samples(key=key, draws=DRAWS)
    for part, (mean, covariance) in effects.items():
        dims, drawn = found[part]
        assert dims == ("chain", "draw", "query", "train")
        for query in range(QUERY):
            variance = post.scale[query] ** 2 * covariance
            same_moments(drawn[0, :, query].astype(float), mean[:, query], variance)
    assert found["growth"][1].shape == (1, DRAWS)
    np.testing.assert_array_equal(found["growth"][1], post.values["growth"])


def test_what_is_not_recorded_is_as_if_it_had_never_been(rng, key):
    plan, post = planned(rng), simulator(rng)

    def posterior(simulator):
        """Mean of the weights, and what the fit takes from their prior covariance."""
        conditioned = simulator._conditioned(STEPS).conditioned
        gain, designs = (np.asarray(array) for array in (conditioned.gain, conditioned.designs))
        return np.asarray(conditioned.mean), gain.T @ designs

    found = posterior(recorded_at(post, ALIKE))
    never = posterior(dataclasses.replace(post, rows=np.array([3, 7])))
    for one, other, whole in zip(found, never, posterior(post), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)
        assert not np.allclose(one, whole, atol=0.01)
    # Times that are not among the rows say nothing, recorded or not.
    whole = post.simulate(plan, key=key, draws=DRAWS)
    at_rows = np.tile(np.isin(np.arange(STEPS), ROWS), (RUNS, 1))
    again = recorded_at(post, at_rows).simulate(plan, key=key, draws=DRAWS)
    for one, other in zip(again, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_check_of_moments_refuses_wrong_ones(rng):
    root = rng.normal(size=(4, 4))
    mean, covariance = rng.normal(size=4), root @ root.T
    drawn = rng.multivariate_normal(mean, covariance, DRAWS)
    same_moments(drawn, mean, covariance)
    centred = drawn - mean
    for wrong in (mean + 0.9 * centred, mean + 1.1 * centred, drawn + 0.15 * drawn.std(axis=0)):
        with pytest.raises(AssertionError):
            same_moments(wrong, mean, covariance)


def test_the_log_odds_link_maps_the_same_trajectories(rng, key):
    plan = planned(rng)
    post = simulator(rng, link="log-odds")
    # The identity link on linked losses is the same posterior before the last map.
    linked = dataclasses.replace(
        post,
        model=dataclasses.replace(post.model, link="identity"),
        fitted=post.fitted._replace(loss=np.log(np.expm1(post.fitted.loss))),
    )
    inner = linked.simulate(
        with_initial(plan, np.log(np.expm1(plan.initial))), key=key, draws=DRAWS
    )
    found = post.simulate(plan, key=key, draws=DRAWS)
    for one, other in zip(found, inner, strict=True):
        np.testing.assert_allclose(one, np.logaddexp(0.0, other), rtol=1e-4)
        assert (one > 0).all()


def test_few_degrees_of_freedom_have_heavy_tails(rng, key):
    plan = planned(rng)
    normal, heavy = (
        simulator(np.random.default_rng(0), df=df).simulate(plan, key=key, draws=DRAWS)
        for df in (1e6, 5.0)
    )
    final = [found.loss[0, :, 0, -1, 0].astype(float) for found in (normal, heavy)]
    variances = [one.var() for one in final]
    # A Student-t with 5 degrees of freedom has variance 5/3; 5 se of a ratio is about 0.3.
    assert abs(variances[1] / variances[0] - 5 / 3) < 0.3
    kurtosis = [((one - one.mean()) ** 4).mean() / one.var() ** 2 for one in final]
    assert kurtosis[0] < 3.5 < 4.5 < kurtosis[1]


def test_inflation_is_a_factor_on_the_variance(rng, key):
    post, plan = simulator(rng), planned(rng)
    wide = dataclasses.replace(post, log_inflation=np.log([1.0, 4.0, 9.0]))
    plain, inflated = (one.simulate(plan, key=key, draws=DRAWS) for one in (post, wide))
    expected = np.exp(
        0.5 * np.interp(np.arange(13) / STEPS, [0.0, 0.5, 1.0], np.log([1.0, 4.0, 9.0]))
    )
    for kind in ("mean_loss", "loss"):
        spread = [
            getattr(one, kind)[0, :, 0].astype(float).std(axis=0) for one in (plain, inflated)
        ]
        np.testing.assert_allclose(spread[1][1:], expected[1:, None] * spread[0][1:], rtol=1e-3)
        middle = [getattr(one, kind)[0, :, 0].mean(axis=0) for one in (plain, inflated)]
        assert np.abs(middle[0] - middle[1]).max() < 0.5 * spread[1].max()


def test_longer_runs_begin_as_they_would_and_know_less_at_their_end(rng, key):
    post = simulator(rng)
    short, long = planned(np.random.default_rng(1), 8), planned(np.random.default_rng(1), 12)
    long.batch[:, :8], long.step_size[:, :8] = short.batch, short.step_size
    long = with_initial(long, short.initial)
    found = {
        steps: post.simulate(plan, key=key, draws=DRAWS) for steps, plan in ((8, short), (12, long))
    }
    np.testing.assert_allclose(
        found[12].mean_loss[:, :, :, :9], found[8].mean_loss, rtol=1e-3, atol=1e-4
    )
    assert np.isfinite(found[12].loss).all()
    spread = found[12].loss[0].std(axis=0)
    assert (spread[:, 12] > spread[:, 8]).all()


def test_a_run_is_the_same_in_any_company(rng, key):
    post, one, other = simulator(rng, df=4.0), planned(rng), planned(rng)
    for name in ("batch", "step_size", "loss"):
        getattr(other, name)[0] = getattr(one, name)[1]
    found, again = (post.simulate(plan, key=key, draws=DRAWS) for plan in (one, other))
    np.testing.assert_allclose(
        again.mean_loss[:, :, 0], found.mean_loss[:, :, 1], rtol=1e-4, atol=1e-5
    )
    different = post.simulate(one, key=jax.random.key(1), draws=DRAWS)
    assert not np.allclose(different.mean_loss, found.mean_loss)


def test_equal_curricula_share_coefficients_but_not_their_error(rng, key):
    plan = planned(rng)
    for name in ("batch", "step_size", "loss"):
        getattr(plan, name)[0] = getattr(plan, name)[1]
    found = simulator(rng).simulate(plan, key=key, draws=DRAWS)
    np.testing.assert_allclose(found.mean_loss[:, :, 0], found.mean_loss[:, :, 1], rtol=1e-5)
    error = (found.loss - found.mean_loss)[0, :, :, -1, 0]
    assert abs(np.corrcoef(error.T)[0, 1]) < FALSE_ALARM / np.sqrt(DRAWS)
    assert (error.std(axis=0) > 0.01).all()


def test_step_sizes_are_needed_where_the_fitted_runs_had_them(rng, key):
    plan = planned(rng)
    with pytest.raises(Misuse, match=r"got no step_size.*pass step_size=... to"):
        simulator(rng).simulate(plan._replace(step_size=None), key=key, draws=DRAWS)
    ignorant = simulator(rng, largest_step_size=None)
    one, other = (
        ignorant.simulate(plan._replace(step_size=sizes), key=key, draws=DRAWS).loss
        for sizes in (None, plan.step_size)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("known", [np.ones_like(ALIKE), UNLIKE])
def test_what_is_saved_is_what_was_there(rng, key, known):
    post, plan = recorded_at(simulator(rng), known), planned(rng)
    arrays = {name: value for name, (_, value) in post.arrays().items()}
    again = GaussianSimulator.restore(arrays, post.settings())
    for one, other in zip(
        post.simulate(plan, key=key, draws=DRAWS),
        again.simulate(plan, key=key, draws=DRAWS),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_what_version_0_1_saved_is_what_was_there(rng, key):
    """Without weights, and under the names that the band's parts had then."""
    post, plan = simulator(rng, log_inflation=np.log([1.0, 2.0, 3.0]), df=5.0), planned(rng)
    arrays = {name: value for name, (_, value) in post.arrays().items()}
    settings = post.settings()
    del arrays["weight"]
    arrays["widening"], settings["freedom"] = arrays.pop("log_inflation"), settings.pop("df")
    again = GaussianSimulator.restore(arrays, settings)
    assert again.df == 5.0
    for loss, expected in zip(
        again.simulate(plan, key=key, draws=DRAWS),
        post.simulate(plan, key=key, draws=DRAWS),
        strict=True,
    ):
        np.testing.assert_array_equal(loss, expected)
