"""The two-timescale design against the recurrence run as a loop; links; settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import FLOOR, Exposure
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.link import link_of, log_slope, loss_of
from bayes_simfluence.model.noise import AR1, Gaussian, StudentT
from bayes_simfluence.model.simfluence import (
    Simfluence,
    design,
    hypers_of,
    mean_effect,
    prior_mean,
)

TRAIN, QUERY, STEPS, RECORDED = 5, 2, 12, 8
PARTS = Simfluence().parts


def setting(rng, knots=3, features=2):
    """A model with hyperparameters off their centre, and one run."""
    model = Simfluence(coefficients=Varying(knots))
    run = RunArrays(
        batch=rng.integers(-1, TRAIN, (STEPS, 3)),
        weight=rng.uniform(0.5, 2.0, (STEPS, 3)),
        step_size=np.linspace(1.0, 0.1, STEPS),
        loss=np.full((STEPS + 1, QUERY), np.nan),
        query=np.arange(QUERY),
        features=ExampleFeatures(
            rng.normal(size=(TRAIN, features)), rng.normal(size=(QUERY, features))
        ),
        progress=np.arange(1, STEPS + 1) / RECORDED,
    )
    return model, run


def prepared(rng, model, run):
    """Hyperparameters by name, and the run as arrays of JAX; in double precision."""
    hypers = hypers_of(model, run.features)
    free = start(hypers) + 0.5 * rng.normal(size=len(hypers))
    values = natural_values(hypers, jnp.asarray(free))
    return values, jax.tree.map(jnp.asarray, run)


def shares(run):
    """Weight of each example over the sum of weights in each batch, slot by slot."""
    found = np.zeros((STEPS, TRAIN))
    for step, (members, weights) in enumerate(zip(run.batch, run.weight, strict=True)):
        for example, weight in zip(members, weights, strict=True):
            if example >= 0:
                found[step, example] += weight / weights[members >= 0].sum()
    return found


def looped(values, run, effect_of):
    """``u_t + v_t`` step by step, for ``effect_of(part, step)`` of each batch alone."""
    totals = {"staying": 0.0, "fading": 0.0}
    memories, found = {"staying": 0.0, "fading": 0.0}, []
    kept = {
        "staying": np.exp(values["growth"] / RECORDED),
        "fading": np.exp(-1.0 / (RECORDED * values["fade_length"])),
    }
    momentum, power = values["momentum"], values["step_size_power"]
    for step in range(STEPS):
        for part in PARTS:
            memories[part] = momentum * memories[part] + (1 - momentum) * effect_of(part, step)
            moved = memories[part] / (1 - momentum ** (step + 1))
            moved = (run.step_size[step] + FLOOR) ** power * moved
            totals[part] = kept[part] * totals[part] + moved
        found.append(totals["staying"] + totals["fading"])
    return np.array(found)


def numbers(values):
    return {name: float(value) for name, value in values.items()}


def curves(values, part, weights, model, count):
    """Coefficients of every source at the knots, from standard normal weights."""
    if model.coefficients.knots == 1:
        return weights
    share, length = values[f"{part}_constant_share"], values[f"{part}_length"]
    at = np.arange(count) / (model.coefficients.knots - 1)
    covariance = share + (1 - share) * np.exp(-((at[:, None] - at[None]) ** 2) / 2 / length**2)
    return np.linalg.cholesky(covariance + 1e-6 * np.eye(count)) @ weights


@pytest.mark.parametrize(("knots", "features"), [(3, 2), (1, 2), (4, 0)])
def test_the_design_is_the_recurrence(rng, knots, features):
    model, run = setting(rng, knots, features)
    count = model.coefficients.count(STEPS / RECORDED)
    sources = TRAIN + features + 1
    weights = rng.normal(size=(2, count, sources))
    rows = np.array([0, 3, STEPS - 1])
    with double_precision():
        values, arrays = prepared(rng, model, run)
        found = design(model, values, arrays, knots=count, rows=jnp.asarray(rows))
        found = np.asarray(found) @ weights.reshape(-1)
        values = numbers(values)
    at_knots = {p: curves(values, p, w, model, count) for p, w in zip(PARTS, weights, strict=True)}

    share, known = shares(run), run.features

    def effect_of(part, step):
        at = np.arange(count) / max(knots - 1, 1)
        now = np.array([np.interp(run.progress[step], at, curve) for curve in at_knots[part].T])
        own, shared, common = now[:TRAIN], now[TRAIN:-1], now[-1]
        each = own + (values[f"{part}_alike"] * known.train @ shared if features else 0.0)
        effect = share[step] @ each + values[f"{part}_common"] * common
        return effect * (values["fading_scale"] if part == "fading" else 1.0)

    np.testing.assert_allclose(found, looped(values, run, effect_of)[rows], rtol=1e-8, atol=1e-10)


def test_the_prior_mean_is_the_recurrence(rng):
    model, run = setting(rng)
    rows = np.array([1, 7, STEPS - 1])
    with double_precision():
        values, arrays = prepared(rng, model, run)
        found = np.asarray(prior_mean(model, values, arrays, rows=jnp.asarray(rows)))
        values = numbers(values)
    share, known = shares(run), run.features
    for query in range(QUERY):
        expected = looped(
            values,
            run,
            lambda part, step, query=query: (
                -values[f"{part}_dot"] * (share[step] @ known.train) @ known.query[query]
            ),
        )
        np.testing.assert_allclose(found[:, query], expected[rows], rtol=1e-8, atol=1e-10)


def test_without_query_features_the_prior_mean_is_zero(rng):
    model, run = setting(rng)
    run = run._replace(features=run.features._replace(query=np.zeros((QUERY, 0))))
    with double_precision():
        values, arrays = prepared(rng, model, run)
        found = prior_mean(model, values, arrays, rows=jnp.arange(STEPS))
    np.testing.assert_array_equal(found, np.zeros((STEPS, QUERY)))


@pytest.mark.parametrize("part", PARTS)
def test_the_mean_effect_is_that_of_a_batch_of_one_example(rng, part):
    model, run = setting(rng)
    weights = rng.normal(size=(2, 3, TRAIN + 3))
    with double_precision():
        values, arrays = prepared(rng, model, run)
        found = np.asarray(mean_effect(model, values, part, arrays.features)) @ weights.reshape(-1)
        values = numbers(values)
    mine = curves(values, part, weights[PARTS.index(part)], model, 3).mean(axis=0)
    expected = mine[:TRAIN] + values[f"{part}_alike"] * run.features.train @ mine[TRAIN:-1]
    expected = expected + values[f"{part}_common"] * mine[-1]
    expected = expected * (values["fading_scale"] if part == "fading" else 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_link_is_the_inverse_of_softplus():
    loss = np.array([1e-5, 0.01, 0.6931471805599453, 3.0, 50.0, 800.0])
    with double_precision():
        linked = np.asarray(link_of(Simfluence().link, jnp.asarray(loss)))
        np.testing.assert_allclose(linked[:4], np.log(np.expm1(loss[:4])), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(linked[4:], loss[4:], rtol=1e-12)
        again = np.asarray(loss_of(Simfluence().link, jnp.asarray(linked)))
        np.testing.assert_allclose(again, loss, rtol=1e-9)
        outer = jnp.linspace(-12.0, 40.0, 27)
        inverse = np.asarray(link_of(Simfluence().link, loss_of(Simfluence().link, outer)))
        np.testing.assert_allclose(inverse, np.asarray(outer), atol=1e-9)


def test_losses_without_a_logarithm_stay_finite():
    linked = np.asarray(link_of(Simfluence().link, jnp.asarray([0.0, -1.0, 1e-30, 1e-6])))
    assert np.isfinite(linked).all()
    np.testing.assert_allclose(linked, linked[0])
    assert (np.asarray(loss_of(Simfluence().link, jnp.asarray(linked))) > 0).all()


def test_the_identity_link_changes_nothing():
    model, loss = Simfluence(link="identity"), jnp.asarray([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(link_of(model.link, loss), loss)
    np.testing.assert_array_equal(loss_of(model.link, loss), loss)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "cubic"}, r"kind=.*got 'cubic'.*one of two-timescale, linear"),
        ({"link": "probit"}, r"link=.*got 'probit'.*one of log-odds, log, identity"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, match):
    # Past the checker of types, which only tests have.
    model = Simfluence()
    model.__dict__.update(settings)
    with pytest.raises(Misuse, match=match):
        model.__post_init__()


def test_settings_survive_as_plain_values():
    import json

    model = Simfluence(
        link="identity", exposure=Exposure(0.5, 0.0), coefficients=Varying(2), kind="two-timescale"
    )
    plain = json.loads(json.dumps(model.as_dict()))
    assert Simfluence.from_dict(plain) == model
    assert Simfluence.from_dict(Simfluence().as_dict()) == Simfluence()


PUBLISHED = {"linear": True, "additive": False, "multiplicative": True}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_kind_is_a_setting_of_the_parts(kind):
    model = Simfluence(kind=kind)
    assert model.published
    assert model.markov
    assert model.multiplicative == PUBLISHED[kind]
    assert model.additive == (kind != "multiplicative")
    assert (model.link, model.parts, model.time_effect) == ("identity", ("staying",), "none")
    assert hypers_of(model, no_features(TRAIN, QUERY)) == {}
    assert not Simfluence(kind=kind, exposure=Exposure(0.5, 0.0)).markov
    assert not Simfluence().markov
    assert not Simfluence().published


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "linear", "multiplicative": False}, r"got False with kind='linear'.*True"),
        ({"kind": "additive", "multiplicative": True}, r"got True with kind='additive'"),
        ({"kind": "multiplicative", "time_effect": "linear"}, r"time_effect=.*one of none"),
    ],
)
def test_settings_that_contradict_the_kind_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        Simfluence(**settings)


@pytest.mark.parametrize("link", ["log-odds", "log", "identity"])
def test_the_log_slope_is_that_of_the_link(link):
    model, loss = Simfluence(link=link), np.array([0.01, 0.7, 3.0])
    with double_precision():
        up, down = (
            np.asarray(link_of(model.link, jnp.asarray(loss * k))) for k in (1 + 1e-6, 1 - 1e-6)
        )
        expected = np.log((up - down) / (2e-6 * loss))
        found = log_slope(model.link, jnp.asarray(loss))
        np.testing.assert_allclose(found, expected, atol=1e-7)
        again = loss_of(model.link, link_of(model.link, jnp.asarray(loss)))
        np.testing.assert_allclose(again, loss, rtol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "linear", "error": Gaussian(None, run_effect=True)},
        {"kind": "additive", "error": AR1(0.5), "link": "log", "time_effect": "linear"},
        {"kind": "multiplicative", "error": StudentT(df=5.0)},
        {"timescales": "fading", "multiplicative": True, "exposure": Exposure(order=4)},
    ],
)
def test_every_setting_survives_as_plain_values(changes):
    import json

    model = Simfluence(**changes)
    assert Simfluence.from_dict(json.loads(json.dumps(model.as_dict()))) == model


@pytest.mark.parametrize(
    "more",
    [{"coefficients": Varying(knots=3)}, {"timescales": "both"}],
    ids=["knots", "timescales"],
)
def test_settings_of_terms_that_are_not_there_are_refused(more):
    with pytest.raises(Misuse, match="there are no terms b"):
        Simfluence(kind="multiplicative", **more)
