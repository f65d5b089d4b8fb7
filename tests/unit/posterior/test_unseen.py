"""Examples and queries that no fitted run knows: their features speak for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.gaussian.designs import designs_and_means
from bayes_simfluence.gaussian.draws import df_of_scales
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.simulators import gaussian

pytestmark = pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning")
KEY = jax.random.key(5)
METHOD = bs.Exact(times=3)


def recording(runs=slice(0, 4), query=slice(0, 4)):
    """The first steps of some recorded runs, with the examples that occur in them first."""
    whole = bs.example_runs().isel(run=runs, query=query)
    return whole.isel(step=slice(0, 24), time=slice(0, 25))


def known_examples(runs):
    """The recording without the examples that no batch holds."""
    batch = runs["batch"].values
    used = np.unique(batch[batch >= 0])
    place = np.full(runs.sizes["train"], -1, np.int32)
    place[used] = np.arange(len(used))
    return runs.isel(train=used).assign(batch=(runs["batch"].dims, place[batch]))


@pytest.fixture(scope="module")
def fits():
    """The same fit with and without examples that are never trained on."""
    whole = recording()
    return tuple(
        bs.fit(one, method=METHOD, key=jax.random.key(0)) for one in (whole, known_examples(whole))
    )


def with_unused(whole, count):
    """A run whose first batches hold examples that the recording never trains on."""
    batch = whole["batch"].values
    unused = np.setdiff1d(np.arange(whole.sizes["train"]), np.unique(batch))[:count]
    changed = whole.isel(run=[0]).copy(deep=True)
    changed["batch"].values[0, : len(unused), 0] = unused
    return changed


def test_an_example_never_recorded_is_one_never_trained_on(fits):
    changed = with_unused(recording(), 5)
    draws = 2000
    found = [one.simulate(changed, key=KEY, draws=draws)["mean_loss"][0] for one in fits]
    low, middle, high = np.moveaxis(
        [one[:, :, 1:].quantile([0.25, 0.5, 0.75], "draw").values for one in found], 1, 0
    )
    # Draws differ (there are more of them to make), what they are drawn from does not: within five
    # standard errors of quartiles (at most 1.7 / sqrt(draws) of their distance for these tails).
    error = 5 * 1.7 / np.sqrt(draws)
    width = high - low
    np.testing.assert_allclose(middle[0], middle[1], atol=error * width.max())
    np.testing.assert_allclose(width[0], width[1], rtol=error)


def test_what_was_never_trained_on_is_less_certain(fits):
    _, reduced = fits
    whole = recording()
    changed = with_unused(whole, 12)
    quartiles = [
        reduced.simulate(one, key=KEY, draws=400)["mean_loss"][0, :, 0, -1]
        .quantile([0.25, 0.75], "draw")
        .values
        for one in (whole.isel(run=[0]), changed)
    ]
    known, unknown = (high - low for low, high in quartiles)
    assert (unknown > 1.2 * known).all()


def the_mean(weights, features, new):
    return np.repeat(weights.mean(axis=1, keepdims=True), len(new), axis=1)


def test_a_query_never_recorded_gets_its_features_mean_and_a_wider_band(fits, monkeypatch):
    _, reduced = fits
    other = recording(query=slice(2, 7))
    simulated = reduced.simulate(other, key=KEY, draws=200)
    assert simulated["query"].values.tolist() == other["query"].values.tolist()
    known = reduced.simulate(other.isel(query=slice(0, 2)), key=KEY, draws=200)
    # The fitted ones come out as they do alone.
    np.testing.assert_array_equal(simulated["loss"][..., :2], known["loss"])
    assert np.isfinite(simulated["loss"]).all()
    simulator = reduced.simulator
    linked = np.log(np.expm1(simulated["mean_loss"].values[0].astype(float)))
    low, high = np.quantile(linked[:, :, -1], [0.25, 0.75], axis=0)
    spread = (high - low).mean(axis=0)
    assert spread[2:].min() > spread[:2].max()
    # Queries that start alike but have opposite gradients part ways by twice the prior mean, here
    # with a mean that is large beside five standard errors of the medians.
    mirrored = other.isel(query=[3, 4]).copy(deep=True)
    mirrored["loss"].values[..., 1] = mirrored["loss"].values[..., 0]
    mirrored["query_feature"].values[0] *= 20
    mirrored["query_feature"].values[1] = -mirrored["query_feature"].values[0]
    # Beside what the others' weights say, which is alike for all here.
    monkeypatch.setattr(gaussian, "carried_weights", the_mean)
    draws = 2000
    drawn = reduced.simulate(mirrored, key=KEY, draws=draws)["mean_loss"].values[0, :, 0, -1]
    middle = np.log(np.expm1(np.median(drawn.astype(float), axis=0)))
    expected = prior_mean_of(simulator, mirrored)[0, -1]
    np.testing.assert_allclose(expected[0], -expected[1], rtol=1e-6)
    low, high = np.quantile(np.log(np.expm1(drawn.astype(float))), [0.25, 0.75], axis=0)
    error = 5 * 1.2 * (high - low).max() * np.sqrt(2 / draws)
    assert abs(expected[0] - expected[1]) > 2 * error
    np.testing.assert_allclose(middle[0] - middle[1], expected[0] - expected[1], atol=error)


def prior_mean_of(simulator, runs):
    """Prior mean of the change of each query, link units, from its features."""
    features = simulator.fitted.features
    with double_precision():
        query = jnp.asarray(runs["query_feature"].values, float)
        arrays = recorded_arrays(known_examples(runs))._replace(
            step_size=runs["step_size"].values.astype(float) / simulator.largest_step_size,
            features=features._replace(query=query),
        )
        values = {name: jnp.asarray(value) for name, value in simulator.values.items()}
        _, mean = designs_and_means(simulator.model, values, arrays, jnp.arange(24), knots=6)
    return np.asarray(mean)


def test_a_scale_known_from_others_has_the_spread_of_theirs(rng):
    for df in (4.0, 30.0):
        logs = -np.log(rng.chisquare(df, 200_000) / df)
        np.testing.assert_allclose(df_of_scales(logs.var()), df, rtol=0.03)
    assert df_of_scales(np.inf) == 1.0 and df_of_scales(0.0) == 200.0


def test_features_are_asked_for_where_they_are_needed(fits):
    _, reduced = fits
    changed = with_unused(recording(), 2)
    with pytest.raises(Misuse, match=r"runs\['train_feature'\]: got nothing; expected 64 features"):
        reduced.simulate(changed.drop_vars("train_feature"), key=KEY)
    other = recording(query=slice(3, 6))
    with pytest.raises(Misuse, match=r"runs\['query_feature'\]: got 3 features"):
        reduced.simulate(short(other), key=KEY)
    linear = bs.fit(
        known_examples(recording()), model=bs.Simfluence.linear(), key=jax.random.key(0)
    )
    with pytest.raises(Misuse, match="has no features to tell of others by"):
        linear.simulate(changed, key=KEY)


def short(runs):
    """The same recording with three features instead of sixteen."""
    return runs.isel(feature=slice(0, 3))
