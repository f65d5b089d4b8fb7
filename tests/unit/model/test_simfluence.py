"""The two-timescale design against the recurrence run as a loop; links; settings."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import FitWarning, Misuse
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference.exact import Exact
from bayes_simfluence.inference.nuts import NUTS
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.design import design, mean_effect, prior_mean
from bayes_simfluence.model.exposure import FLOOR, Exposure
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.link import link_of, log_slope, loss_of
from bayes_simfluence.model.noise import AR1, Gaussian, StudentT
from bayes_simfluence.model.priors import Laplace, Normal
from bayes_simfluence.model.simfluence import KINDS, Simfluence, hypers_of
from bayes_simfluence.posterior.fit import fit
from bayes_simfluence.posterior.prior import PriorOf

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
            moved = np.exp(values["trend"] * min((step + 1) / RECORDED, 1.0)) * moved
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
        ({"terms": "cubic"}, r"terms=.*got 'cubic'.*one of additive, multiplicative, both"),
        ({"link": "probit"}, r"link=.*got 'probit'.*one of log-odds, log, identity"),
        ({"scales": "none"}, r"scales=.*got 'none'.*one of shared, per-query"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, match):
    # Past the checker of types, which only tests have.
    model = Simfluence()
    model.__dict__.update(settings)
    with pytest.raises(Misuse, match=match):
        model.__post_init__()


TERMS = {"linear": "both", "additive": "additive", "multiplicative": "multiplicative"}
PUBLISHED = {
    "link": "identity",
    "timescales": "staying",
    "exposure": Exposure(momentum=0.0, step_size_power=0.0),
    "coefficients": Varying(knots=1),
    "prior": Normal(features=False),
    "error": Gaussian(),
    "time_effect": "none",
    "scales": "per-query",
}


@pytest.mark.parametrize("kind", TERMS)
def test_a_published_kind_is_nothing_but_the_settings_of_its_parts(kind):
    model = KINDS[kind]()
    spelled_out = Simfluence(terms=TERMS[kind], **PUBLISHED)
    assert model == spelled_out and hash(model) == hash(spelled_out)
    assert model.as_dict() == spelled_out.as_dict()
    assert model.kind == spelled_out.kind == kind
    assert model.has_multiplicative == (kind != "additive")
    assert model.has_additive == (kind != "multiplicative")
    assert model.per_query and model.markov
    assert hypers_of(model, no_features(TRAIN, QUERY)) == {}
    assert not KINDS[kind](exposure=Exposure(0.5, 0.0)).markov
    assert KINDS[kind](error=StudentT()) == Simfluence(
        terms=TERMS[kind], **{**PUBLISHED, "error": StudentT()}
    )


def test_shared_scales_with_published_parts_are_another_model():
    model = Simfluence(terms="both", **{**PUBLISHED, "scales": "shared"}, coupling="none")
    assert model != Simfluence.linear()
    assert not (model.per_query or model.markov)
    assert model.kind == Simfluence().kind == "two-timescale"
    free = set(hypers_of(model, no_features(TRAIN, QUERY)))
    assert free == {"growth", "noise", "multiplicative_scale"}


@pytest.mark.parametrize("kind", ["linear", "additive"])
def test_equal_parts_have_equal_posteriors(kind, key):
    """However a model was made: by Exact, and by draws from the prior (the program of NUTS)."""
    runs, _ = linear_runs(key=key, runs=4, train=5, query=2, per_run=4, batch_size=2, epochs=2)
    named, parts = KINDS[kind](), Simfluence(terms=TERMS[kind], **PUBLISHED)
    exact, other = (fit(runs, model=model, method=Exact(), key=key) for model in (named, parts))
    assert exact.settings == other.settings
    assert exact.samples(key=key).identical(other.samples(key=key))
    drawn, again = (PriorOf(model)(runs, key=key, draws=3) for model in (named, parts))
    assert drawn.parameters.identical(again.parameters)
    assert drawn.predictive.identical(again.predictive)
    nuts = NUTS(warmup=20, draws=5, chains=1, max_tree_depth=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # So few draws have not converged.
        sampled, again = (fit(runs, model=model, method=nuts, key=key) for model in (named, parts))
    assert sampled.samples(key=key).identical(again.samples(key=key))


BEFORE = {
    "exposure": {"momentum": 0.0, "step_size_power": 0.0, "order": None},
    "coefficients": {"knots": 1},
    "prior": {"name": "normal", "features": False, "pooled": False},
    "error": {"name": "gaussian", "loss_power": 0.0, "run_effect": False, "observation": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_earlier_versions_are_read(kind):
    before = {
        "kind": kind,
        "link": "identity",
        "timescales": "staying",
        "time_effect": "none",
        "multiplicative": kind in ("linear", "multiplicative"),
        **BEFORE,
    }
    if kind == "two-timescale":
        assert Simfluence.from_dict(before) == Simfluence(**{**PUBLISHED, "scales": "shared"})
        assert Simfluence.from_dict({**before, "multiplicative": True}).terms == "both"
    else:
        assert Simfluence.from_dict(before) == KINDS[kind]()


def test_settings_that_are_left_out_are_those_of_the_kind():
    assert Simfluence.from_dict({}) == Simfluence()
    settings = {"kind": "additive", "prior": {"name": "laplace"}, "coefficients": {"knots": 2}}
    assert Simfluence.from_dict(settings) == Simfluence.additive(
        prior=Laplace(), coefficients=Varying(2)
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "cubic"}, r"model: kind: got 'cubic'; expected one of two-timescale, linear"),
        ({"slope": 1}, r"got 'slope'; expected one of terms, link, timescales"),
        (
            {"kind": "multiplicative", "multiplicative": False},
            "model: multiplicative: got False, without additive",
        ),
        ({"prior": "laplace"}, r"model: prior: got 'laplace'; expected the settings.*'name'"),
        ({"prior": {"freedom": 3}}, r"name of the prior: got None; expected one of normal"),
        ({"prior": {"name": "laplace", "rank": 3}}, r"prior laplace: got unknown names rank"),
        ({"error": {"name": "smooth", "size": 3}}, r"error smooth: got unknown.*no settings"),
        ({"exposure": {"momentum": "high"}}, r"momentum: got 'high'; expected a number"),
        ({"coefficients": {"knots": 1.5}}, r"knots: got 1.5; expected a whole number"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        Simfluence.from_dict(settings)


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
    "model",
    [
        Simfluence.linear(error=Gaussian(None, run_effect=True)),
        Simfluence.additive(error=AR1(0.5), link="log", time_effect="linear"),
        Simfluence.multiplicative(error=StudentT(df=5.0)),
        Simfluence(timescales="fading", terms="both", exposure=Exposure(order=4)),
        Simfluence(scales="per-query"),
    ],
    ids=lambda model: f"{model.kind}, {model.timescales}",
)
def test_every_setting_survives_as_plain_values(model):
    import json

    assert Simfluence.from_dict(json.loads(json.dumps(model.as_dict()))) == model


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"coefficients": Varying(knots=3)}, "got knots=3; .*there are no terms b"),
        ({"timescales": "both"}, "got timescales='both'; .*there are no terms b"),
        ({"time_effect": "linear"}, "got time_effect='linear'; .*there are no terms b"),
        ({"scales": "shared"}, "got scales='shared'; .*there are no terms b"),
    ],
)
def test_settings_of_terms_that_are_not_there_are_refused(more, match):
    with pytest.raises(Misuse, match=match):
        Simfluence.multiplicative(**more)
