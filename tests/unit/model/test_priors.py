"""Laws of effects against SciPy's quantiles, what is put on top of them, embeddings, settings.

Kolmogorov-Smirnov tests and correlations of fixed seeds: each would fail for one seed in 1,000 if
the law were right.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from numpyro import distributions as dist
from numpyro import handlers
from scipy import stats

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model import priors
from bayes_simfluence.model.arrays import ExampleFeatures, no_features
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.model.sites import is_coefficient, kept

FALSE_ALARMS = 1e-3
SHAPE = (60, 100, 1)


def effects(prior, values=(), shape=SHAPE, features=None, seed=0):
    """Effects of one draw, (query, train, knot), and the names of its sites."""
    features = no_features(shape[1], shape[0]) if features is None else features
    with double_precision():
        hypers = {name: jnp.asarray(float(value)) for name, value in dict(values).items()}
        seeded = handlers.seed(prior.effects, jax.random.key(seed))
        traced = handlers.trace(seeded)
        trace = traced.get_trace("staying", shape, hypers, features)
        again = handlers.substitute(prior.effects, {n: s["value"] for n, s in trace.items()})
        return np.asarray(again("staying", shape, hypers, features)), set(trace)


def follows(draws, law):
    """Whether a test at the stated rate finds nothing wrong."""
    return stats.kstest(np.ravel(draws), law.cdf).pvalue > FALSE_ALARMS


LAWS = {
    "normal": (priors.Normal(), stats.norm()),
    "student-t": (priors.StudentT(), stats.t(4)),
    "student-t 8": (priors.StudentT(df=8.0), stats.t(8)),
    "laplace": (priors.Laplace(), stats.laplace(scale=np.sqrt(0.5))),
    "features": (priors.Features(train=np.ones((100, 1))), stats.norm()),
    "custom": (priors.Custom(dist.Cauchy(0.0, 0.01)), stats.cauchy(scale=0.01)),
}


@pytest.mark.parametrize("name", LAWS)
def test_own_effects_follow_their_law(name):
    prior, law = LAWS[name]
    draws, _ = effects(prior)
    assert follows(draws, law)
    # A law that is shifted by 15 percent or 1.25 times as wide or narrow is told from it.
    size = law.std() if np.isfinite(law.std()) else 0.01
    assert not follows(draws + 0.15 * size, law)
    assert not follows(1.25 * draws, law)
    assert not follows(draws / 1.25, law)


def test_laws_are_told_from_one_another():
    draws = {name: effects(prior)[0] for name, (prior, _) in LAWS.items()}
    assert not follows(draws["student-t"], LAWS["normal"][1])
    assert not follows(draws["normal"], LAWS["laplace"][1])
    assert not follows(draws["laplace"], stats.laplace())


def test_one_example_has_one_local_scale_for_all_knots():
    """Normal given its scale: the two knots' ratio is Cauchy, whatever the scale's law."""
    for prior in (priors.StudentT(df=3.0), priors.Laplace(), priors.Horseshoe()):
        drawn, _ = effects(prior, shape=(40, 50, 2))
        assert follows(drawn[..., 0] / drawn[..., 1], stats.cauchy())
        sizes = np.log(np.abs(drawn)).reshape(-1, 2)
        # Independent: below 3.1 / sqrt(2000) = 0.07 at the stated rate.
        assert np.corrcoef(sizes.T)[0, 1] > 0.1


def test_the_horseshoe_is_sparse_and_has_its_slab():
    share, slab = 0.1, 2.0
    drawn, _ = effects(priors.Horseshoe(share=share, slab_scale=slab), shape=(400, 50, 1))
    # By SciPy, with numbers of its own: z tau lambda / sqrt(1 + tau^2 lambda^2 / c^2).
    generator = np.random.default_rng(1)
    tau = np.abs(generator.standard_cauchy((400, 1))) * share / (1 - share)
    local = np.abs(generator.standard_cauchy((400, 50)))
    wide = slab**2 * stats.invgamma(2.0, scale=2.0).rvs((400, 1), random_state=generator)
    size = tau * local * np.sqrt(wide / (wide + tau**2 * local**2))
    expected = size * generator.standard_normal((400, 50))
    # Effects of one query share scales, so that the quantiles of whole queries are compared.
    for quantile in (0.25, 0.5, 0.9, 1.0):
        drawn_sizes, expected_sizes = (
            np.quantile(np.abs(sizes), quantile, axis=1) for sizes in (drawn[..., 0], expected)
        )
        assert stats.ks_2samp(drawn_sizes, expected_sizes).pvalue > FALSE_ALARMS
        assert stats.ks_2samp(2.0 * drawn_sizes, expected_sizes).pvalue < FALSE_ALARMS
    # Nothing is larger than a Student-t with the slab's scale would be.
    assert np.abs(drawn).max() < slab * stats.t(4).isf(1e-3 / drawn.size)


def test_the_global_scale_has_its_median():
    """``tau`` of 1 in 10 that matter: half of all queries are below 1/9."""
    with double_precision():
        law = handlers.seed(priors.Horseshoe(share=0.1, slab_scale=1e6).law, jax.random.key(0))
        trace = handlers.trace(law).get_trace("staying", "staying", (400, 1, 1), {})
    tau, local = (np.asarray(trace[f"staying_{site}"]["value"]) for site in ("global", "local"))
    own = np.asarray(trace["staying_own"]["value"])[..., 0]
    drawn, _ = effects(priors.Horseshoe(share=0.1, slab_scale=1e6), shape=(400, 1, 1))
    np.testing.assert_allclose(drawn[..., 0], own * local * tau / 9, rtol=1e-6)
    below = (np.abs(tau) < 1.0).sum()
    assert stats.binomtest(int(below), 400, 0.5).pvalue > FALSE_ALARMS


def between(first, second, examples=4000):
    """Correlation over examples of two queries, and its standard error were they independent."""
    return float(np.corrcoef(first, second)[0, 1]), 1 / np.sqrt(examples)


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize(
    "prior", [priors.Normal(pooled=True), priors.Laplace(pooled=True)], ids=repr
)
def test_pooled_effects_correlate_between_queries_by_their_share(prior, share):
    drawn, names = effects(prior, {"staying_pooled": share}, shape=(2, 4000, 1))
    correlation, error = between(*drawn[..., 0])
    # Heavier tails widen the estimate: at most by the kurtosis of the common part, 6.
    assert abs(correlation - share) < stats.norm.isf(FALSE_ALARMS / 2) * error * np.sqrt(4)
    assert abs(correlation - share) < 0.1
    np.testing.assert_allclose(drawn.std(axis=1), 1.0, atol=0.1)
    assert "staying_common_to_queries_own" in names


def test_effects_that_are_not_pooled_do_not_correlate():
    correlation, error = between(*effects(priors.Normal(), shape=(2, 4000, 1))[0][..., 0])
    assert abs(correlation) < stats.norm.isf(FALSE_ALARMS / 2) * error


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_low_rank_effects_have_variance_one_and_few_traits(share, pooled):
    prior = priors.LowRank(rank=2, pooled=pooled)
    values = {"staying_low_rank": share, "staying_pooled": 0.0}
    drawn, _ = effects(prior, values, shape=(30, 300, 1))
    # Traits of 30 queries make the variance uncertain: sd of it about share * sqrt(2 / 30).
    assert abs((drawn**2).mean() - 1.0) < 0.02 * 3.3 + share * np.sqrt(2 / 60) * 3.3
    correlation = np.corrcoef(drawn[..., 0]) - np.eye(30)
    eigenvalues = np.linalg.eigvalsh(correlation + np.eye(30))[::-1]
    # Independent: below (1 + sqrt(30 / 300))^2 = 1.73 (Marchenko & Pastur 1967).
    assert (eigenvalues > 2.2).sum() == (2 if share else 0)


def test_all_of_low_rank_is_a_product():
    drawn, _ = effects(priors.LowRank(rank=3), {"staying_low_rank": 1.0}, shape=(6, 9, 2))
    for knot in range(2):
        assert np.linalg.matrix_rank(drawn[..., knot], tol=1e-8) == 3
    # Traits of examples are the same over training.
    assert np.linalg.matrix_rank(np.concatenate([*np.moveaxis(drawn, 2, 0)]), tol=1e-8) == 3


EVERY = {
    **{name: prior for name, (prior, _) in LAWS.items()},
    "horseshoe": priors.Horseshoe(),
    "low rank, pooled": priors.LowRank(pooled=True),
}


@pytest.mark.parametrize("name", EVERY)
def test_sites_say_what_they_are(name):
    """Effects are linear in each site that is marked as a coefficient, and in no other."""
    shape, values = (4, 3, 2), {"staying_pooled": 0.4, "staying_low_rank": 0.3}
    with double_precision():
        known = {name: jnp.asarray(value) for name, value in values.items()}
        arguments = ("staying", shape, known, no_features(3, 4))
        seeded = handlers.seed(EVERY[name].effects, jax.random.key(0))
        trace = handlers.trace(seeded).get_trace(*arguments)

        def scaled(site, factor):
            drawn = {name: record["value"] for name, record in trace.items()}
            drawn[site] = factor * drawn[site]
            return np.asarray(handlers.substitute(EVERY[name].effects, drawn)(*arguments))

        assert kept(trace) == {}
        for site in trace:
            middle, ends = scaled(site, 2.0), 0.5 * (scaled(site, 1.0) + scaled(site, 3.0))
            linear = np.abs(middle - ends).max() < 1e-9
            assert linear == is_coefficient(trace[site]), site


def test_effects_go_on_beyond_a_recorded_run():
    sizes = np.array([0.1, 30.0])
    drawn = sizes[:, None, None] * np.random.default_rng(0).normal(size=(2, 300, 4))
    with double_precision():
        longer = np.asarray(
            priors.Laplace().continued(jnp.asarray(drawn), 3, key=jax.random.key(0))
        )
        same = priors.Custom(dist.Cauchy(0.0, 1.0)).continued(
            jnp.asarray(drawn), 3, key=jax.random.key(0)
        )
    for after in (longer, same):
        assert after.shape == (2, 300, 7)
        np.testing.assert_array_equal(after[..., :4], drawn)
    np.testing.assert_array_equal(same[..., 4:], np.repeat(drawn[..., -1:], 3, axis=2))
    size = np.sqrt((drawn**2).mean(axis=2, keepdims=True))
    assert follows(longer[..., 4:] / size, stats.norm())


def test_only_embeddings_take_the_place_of_the_recordings_features():
    known = no_features(3, 2)
    assert priors.Normal().resolve(TRAIN_IDS, QUERY_IDS, known) is known
    own = priors.Features(train=np.ones((3, 2))).resolve(TRAIN_IDS, QUERY_IDS, known)
    assert own.train.shape == (3, 2)


def test_a_callers_distribution_is_the_same_over_training():
    drawn, _ = effects(priors.Custom(dist.Laplace(0.0, 0.3)), shape=(2, 3, 4))
    np.testing.assert_array_equal(drawn, np.broadcast_to(drawn[..., :1], drawn.shape))
    assert len(np.unique(drawn)) == 6


KNOWN = ExampleFeatures(jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), jnp.zeros((200, 2)))


def test_alike_examples_have_alike_effects():
    """Covariance ``1 + alike^2 <f_i, f_j>`` of examples, over 800 queries."""
    known = KNOWN._replace(query=jnp.zeros((800, 2)))
    drawn, _ = effects(priors.Normal(), {"staying_alike": 1.5}, (800, 3, 1), known)
    features = np.asarray(KNOWN.train)
    expected = np.eye(3) + 1.5**2 * features @ features.T
    covariance = drawn[..., 0].T @ drawn[..., 0] / 800
    error = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / 800)
    assert (np.abs(covariance - expected) < stats.norm.isf(FALSE_ALARMS / 12) * error).all()
    assert covariance[0, 1] > 1.0


def test_columns_have_the_covariance_of_the_effects(rng):
    exposure = rng.uniform(size=(4, 3))
    values = {"staying_alike": jnp.asarray(0.7)}
    with double_precision():
        columns = np.asarray(
            priors.Normal().columns(values, "staying", jnp.asarray(exposure), KNOWN)
        )
        without = priors.Normal().columns({}, "staying", jnp.asarray(exposure), no_features(3, 2))
        np.testing.assert_array_equal(without, exposure)
    features = np.asarray(KNOWN.train)
    expected = exposure @ (np.eye(3) + 0.7**2 * features @ features.T) @ exposure.T
    np.testing.assert_allclose(columns @ columns.T, expected, rtol=1e-6)


def test_the_mean_is_against_the_inner_product(rng):
    exposure, query = rng.uniform(size=(4, 3)), rng.normal(size=(2, 2))
    values = {"staying_dot": jnp.asarray(0.7)}
    with double_precision():
        known = KNOWN._replace(query=jnp.asarray(query))
        mean = priors.Normal().mean(values, "staying", jnp.asarray(exposure), known)
        nothing = priors.Normal().mean({}, "staying", jnp.asarray(exposure), no_features(3, 2))
    for step in range(4):
        for row in range(2):
            dots = np.asarray(KNOWN.train) @ query[row]
            np.testing.assert_allclose(mean[step, row], -0.7 * exposure[step] @ dots, rtol=1e-6)
    np.testing.assert_array_equal(nothing, np.zeros((4, 2)))


TRAIN_IDS, QUERY_IDS = np.array(["a", "b", "c"]), np.array(["p", "q"])


def named(rng, ids, width=4):
    return xr.DataArray(rng.normal(size=(len(ids), width)), {"id": list(ids)}, ("id", "feature"))


def test_embeddings_are_taken_by_id(rng):
    train, query = named(rng, ["c", "x", "a", "b"]), named(rng, ["q", "p"])
    resolved = priors.Features(train=train, query=query).resolve(
        TRAIN_IDS, QUERY_IDS, no_features(3, 2)
    )
    rows = train.sel(id=["a", "b", "c"]).values
    unit = np.sqrt((rows**2).sum(axis=1).mean())
    np.testing.assert_allclose(resolved.train, rows / unit, rtol=1e-6)
    np.testing.assert_allclose(resolved.query, query.sel(id=["p", "q"]).values / unit, rtol=1e-6)
    np.testing.assert_allclose((np.asarray(resolved.train) ** 2).sum(axis=1).mean(), 1.0, rtol=1e-6)


def test_embeddings_without_ids_are_taken_in_order(rng):
    train = rng.normal(size=(3, 4))
    resolved = priors.Features(train=train).resolve(TRAIN_IDS, QUERY_IDS, no_features(3, 2))
    ratio = np.asarray(resolved.train) / train
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert resolved.query.shape == (2, 0)
    empty = priors.Features(train=np.zeros((3, 4))).resolve(TRAIN_IDS, QUERY_IDS, no_features(3, 2))
    np.testing.assert_array_equal(empty.train, np.zeros((3, 4)))


@pytest.mark.parametrize(
    ("train", "query", "match"),
    [
        (None, None, r"Features\(train=...\): got nothing.*pass their embeddings"),
        (np.ones((2, 4)), None, r"Features\(train=...\): got 2 rows; expected 3"),
        (np.ones((3, 4)), np.ones((3, 4)), r"Features\(query=...\): got 3 rows; expected 2"),
        (np.ones((3, 4)), np.ones((2, 5)), r"got 5 numbers for each query; expected 4"),
        (
            xr.DataArray(np.ones((2, 4)), {"id": ["a", "b"]}, ("id", "feature")),
            None,
            r"Features\(train=...\): got unknown ids c",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(train, query, match):
    with pytest.raises(Misuse, match=match):
        priors.Features(train=train, query=query).resolve(TRAIN_IDS, QUERY_IDS, no_features(3, 2))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: priors.StudentT(df=0.0), r"StudentT\(df=...\): got 0.0"),
        (lambda: priors.Horseshoe(share=1.0), r"Horseshoe\(share=...\): got 1.0.*0 and 1"),
        (lambda: priors.Horseshoe(share=float("nan")), r"Horseshoe\(share=...\): got nan"),
        (lambda: priors.Horseshoe(slab_scale=-1.0), r"Horseshoe\(slab_scale=...\): got -1.0"),
        (lambda: priors.Horseshoe(slab_df=0.0), r"Horseshoe\(slab_df=...\): got 0.0"),
        (lambda: priors.LowRank(rank=0), r"LowRank\(rank=...\): got 0"),
        (lambda: priors.Features(train=np.ones(3)), r"Features\(train=...\): got shape \(3,\)"),
        (lambda: priors.Features(query=np.full((2, 2), np.nan)), r"query=...\): got values not"),
        (lambda: priors.Custom(), r"prior: got NoneType.*scalar NumPyro distribution"),
        (lambda: priors.Custom(dist.Normal(jnp.zeros(2), 1.0)), r"prior: got Normal\("),
        (lambda: priors.Custom(dist.Poisson(2.0)), r"prior: got Poisson\(rate=2.0\)"),
        (
            lambda: priors.Custom(dist.Normal(0.0, -1.0, validate_args=False)),
            r"prior: got Normal\(.*scale outside of",
        ),
        (lambda: priors.Custom(dist.Normal(), features=True), r"Custom\(features=...\): got True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, match):
    with pytest.raises(Misuse, match=match):
        make()


SETTINGS = [
    priors.Normal(features=False, pooled=True),
    priors.StudentT(df=7.0, pooled=True),
    priors.Laplace(features=False),
    priors.Horseshoe(share=0.2, slab_scale=3.0, slab_df=5.0),
    priors.LowRank(rank=5, pooled=True),
]


@pytest.mark.parametrize("prior", SETTINGS, ids=repr)
def test_settings_survive_as_plain_values(prior):
    plain = json.loads(json.dumps(prior.as_dict()))
    assert priors.prior_from_dict(plain) == prior
    model = Simfluence(prior=prior)
    assert Simfluence.from_dict(json.loads(json.dumps(model.as_dict()))) == model


def test_settings_of_version_0_1_still_read():
    old = {"name": "horseshoe", "share": 0.2, "slab_scale": 3.0, "slab_freedom": 5.0}
    assert priors.prior_from_dict(old) == priors.Horseshoe(share=0.2, slab_scale=3.0, slab_df=5.0)
    old = {"name": "student-t", "freedom": 7.0, "pooled": True}
    assert priors.prior_from_dict(old) == priors.StudentT(df=7.0, pooled=True)


def test_of_a_callers_own_the_settings_survive():
    for prior in (
        priors.Features(train=np.ones((3, 2)), pooled=True),
        priors.Custom(dist.Cauchy(0.0, 0.01), pooled=True),
    ):
        plain = json.loads(json.dumps(prior.as_dict()))
        again = priors.prior_from_dict(plain)
        assert type(again) is type(prior)
        assert again.pooled
        assert again.as_dict() == plain
    assert plain["distribution"] == "Cauchy(loc=0.0, scale=0.01)"
    with pytest.raises(Misuse, match=r"description 'Cauchy\(loc=0.0, scale=0.01\)' of a saved"):
        effects(again, {"staying_pooled": 0.5})


def test_a_distribution_becomes_a_prior():
    law = dist.Laplace(0.0, 0.01)
    model = Simfluence.linear(prior=law)
    assert isinstance(model.prior, priors.Custom)
    assert model.prior.distribution is law


def test_priors_with_other_contents_are_not_equal():
    """A compiled function that one is a static argument of must not serve for the other."""
    first, second = (priors.Custom(dist.Normal(0.0, scale)) for scale in (1.0, 2.0))
    assert first != second
    assert first == first
    assert priors.Features(train=np.ones((2, 2))) != priors.Features(train=np.zeros((2, 2)))
    assert Simfluence(prior=first) != Simfluence(prior=second)


def test_every_prior_has_its_name():
    assert {kind.name: kind for kind in priors.PRIORS.values()} == priors.PRIORS
    public = {kind for kind in map(priors.__dict__.get, priors.__all__) if isinstance(kind, type)}
    assert set(priors.PRIORS.values()) == {
        kind for kind in public if issubclass(kind, priors.Prior) and kind is not priors.Prior
    }
