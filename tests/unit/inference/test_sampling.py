"""NUTS and the collapsed sampler as their user meets them: through ``fit``."""

import os
import subprocess
import sys
import warnings
from contextlib import contextmanager

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import FitFailed, FitWarning, Misuse
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference import collapsed, nuts
from bayes_simfluence.inference.diagnostics import SampleStats, sampler_verdict
from bayes_simfluence.model.noise import StudentT
from bayes_simfluence.model.priors import Laplace

RUNS, TRAIN, QUERY = 3, 4, 2
KEY = jax.random.key(0)
MODEL = bs.Simfluence.additive()
SAMPLER = bs.NUTS(warmup=60, draws=60, chains=2)
METHODS = {"nuts": SAMPLER, "collapsed": bs.Exact(hyperparameters="nuts", sampler=SAMPLER)}


def recording(seed=0, runs=RUNS, query=QUERY):
    sizes = {"train": TRAIN, "per_run": 3, "batch_size": 2, "epochs": 3, "sd_a": 0.0}
    return linear_runs(key=jax.random.key(seed), runs=runs, query=query, **sizes)[0]


def fitted(runs=None, method=SAMPLER, model=MODEL, **settings):
    runs = recording() if runs is None else runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return bs.fit(runs, model=model, method=method, **{"key": KEY, **settings})


@pytest.fixture(scope="module", params=METHODS)
def posterior(request):
    return fitted(method=METHODS[request.param])


def test_draws_have_the_ids_of_the_recording(posterior):
    runs = recording()
    drawn = posterior.samples(key=KEY, draws=500)
    assert dict(drawn["b"].sizes) == {"chain": 2, "draw": 60, "query": QUERY, "train": TRAIN}
    assert drawn["b"]["train"].values.tolist() == runs["train"].values.tolist()
    assert drawn["scale"].dims == drawn["noise"].dims == ("chain", "draw", "query")
    assert all(np.isfinite(one.values).all() for one in drawn.data_vars.values())
    assert (drawn["noise"].values > 0).all() and np.ptp(drawn["b"].values, axis=1).min() > 0
    simulated = posterior.simulate(runs, key=KEY)
    assert simulated["loss"].shape == (2, 60, *runs["loss"].shape)
    assert posterior.simulator.draws == 120


def test_the_verdict_has_numbers(posterior):
    numbers = posterior.verdict.numbers
    assert {"r_hat", "ess_bulk", "ess_tail", "divergences", "acceptance"} <= set(numbers)
    assert 0 <= numbers["untrusted_pareto_k"] <= 1
    assert all(np.isfinite(one) for one in numbers.values())
    assert numbers["divergences"] == posterior.sample_stats["diverging"].values.sum()
    assert "R-hat" in posterior.verdict.sentence


def test_arviz_takes_draws_and_what_their_sampler_says(posterior):
    idata = posterior.to_arviz()
    assert idata["posterior"]["b"].shape == (2, 60, QUERY, TRAIN)
    stats = idata["sample_stats"]
    assert stats["diverging"].shape == stats["energy"].shape == (2, 60)
    assert (stats["tree_depth"].values >= 1).all()
    assert set(idata["prior"].data_vars) >= {"b", "scale", "noise"}
    assert np.isfinite(idata["prior_predictive"]["loss"].values).all()
    assert idata["log_likelihood"]["loss"].sizes["draw"] == 60


def test_a_saved_posterior_simulates_the_same(posterior, tmp_path):
    loaded = bs.load_posterior(posterior.save(tmp_path / "p.nc"))
    found, expected = (one.simulate(recording(), key=KEY) for one in (loaded, posterior))
    np.testing.assert_array_equal(found["loss"].values, expected["loss"].values)
    np.testing.assert_array_equal(
        loaded.sample_stats["energy"].values, posterior.sample_stats["energy"].values
    )
    assert loaded.verdict == posterior.verdict and loaded.settings == posterior.settings
    assert loaded.prior is not None


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_key_decides_everything(method):
    first, same, other = (
        fitted(method=method, key=jax.random.key(seed)).simulator.sites["staying_unit"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).mean() > 0.9


def test_equal_shapes_are_compiled_once():
    fitted()
    before = nuts._compiled.cache_info()
    found = fitted(recording(seed=5)).simulator.sites["staying_unit"]
    after = nuts._compiled.cache_info()
    assert after.misses == before.misses and after.hits > before.hits
    # Nothing of the first recording is left in what was compiled for it.
    nuts._compiled.cache_clear()
    fresh = fitted(recording(seed=5)).simulator.sites["staying_unit"]
    np.testing.assert_allclose(found, fresh, rtol=1e-5)


def test_one_chain_after_another_is_the_same():
    # Few draws: rounding, which differs, grows with every one.
    found, together = (
        fitted(method=bs.NUTS(warmup=4, draws=4, chains=2, chain_method=one)).simulator.sites
        for one in ("sequential", "vectorized")
    )
    for name in ("scale", "noise", "staying_unit"):
        assert found[name].shape == together[name].shape
        np.testing.assert_allclose(found[name], together[name], rtol=0.05, atol=1e-3)


PARALLEL = """
import jax, numpy as np, warnings
warnings.simplefilter("ignore")
import bayes_simfluence as bs
from bayes_simfluence.evaluation.synthetic import linear_runs
assert jax.local_device_count() == 2
runs, _ = linear_runs(key=jax.random.key(0), runs=3, train=4, query=2, per_run=3, epochs=3)
model = bs.Simfluence.additive()
found = [
    bs.fit(runs, key=jax.random.key(0), model=model, method=bs.NUTS(30, 30, 4, chain_method=one))
    for one in ("parallel", "vectorized")
]
first, other = (one.simulator.sites["scale"] for one in found)
assert first.shape == (4, 30, 2), first.shape
np.testing.assert_allclose(first[:, 0], other[:, 0], rtol=0.05)
try:
    bs.NUTS(chains=3, chain_method="parallel")
except bs.Misuse as error:
    print(error)
"""


@pytest.mark.statistical
def test_chains_over_devices():
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PARALLEL],
        env={**os.environ, **forced},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 chains on 2 devices" in done.stdout


@pytest.mark.parametrize(("method", "module"), [("nuts", nuts), ("collapsed", collapsed)])
def test_draws_beyond_the_limit_are_thinned(monkeypatch, method, module):
    whole = fitted(method=METHODS[method])
    each = 4 * (QUERY * TRAIN + 8 * QUERY + 64)
    monkeypatch.setattr(module, "LIMIT", 120 * each // 7)
    thinned = fitted(method=METHODS[method])
    for name in ("scale", "noise"):
        value = thinned.simulator.sites[name]
        np.testing.assert_allclose(value, whole.simulator.sites[name][:, ::8], rtol=1e-5)
    assert thinned.sample_stats.sizes["draw"] == thinned.simulator.sites["scale"].shape[1] == 8
    assert any("Every 8th draw" in note for note in thinned.verdict.notes)
    np.testing.assert_array_equal(
        thinned.sample_stats["energy"].values, whole.sample_stats["energy"].values[:, ::8]
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_progress_is_told(method):
    class Listener:
        def __init__(self):
            self.done, self.total, self.notes = 0, 0, []

        @contextmanager
        def work(self, label, total):
            self.total += total
            yield self

        def advance(self, amount=1, note=""):
            self.done += amount
            self.notes.append(note)

    listener = Listener()
    loud = fitted(method=method, progress=listener)
    assert listener.done == listener.total >= 120
    assert "warm-up" in listener.notes and any("divergences" in one for one in listener.notes)
    np.testing.assert_array_equal(
        loud.simulator.sites["scale"], fitted(method=method).simulator.sites["scale"]
    )


def test_a_bad_verdict_warns_once_or_raises():
    few = bs.NUTS(warmup=60, draws=10, chains=2)
    with pytest.warns(FitWarning) as found:
        posterior = bs.fit(recording(), model=MODEL, method=few, key=KEY)
    assert len(found) == 1 and str(found[0].message) == posterior.verdict.sentence
    assert not posterior.verdict.ok
    with pytest.raises(FitFailed, match=r"raise NUTS"):
        bs.fit(recording(), model=MODEL, method=few, key=KEY, strict=True)


def stats_of(diverging):
    shape = diverging.shape
    ones = np.ones(shape)
    return SampleStats(diverging, 0.8 * ones, np.full(shape, 7), ones, 0.1 * ones)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda draws, diverging: draws, ""),
        (lambda draws, diverging: draws[1].fill(0.0), "Chain 1 never moved"),
        (lambda draws, diverging: diverging[0, ::20].fill(True), "of the draws diverged"),
        (lambda draws, diverging: np.add(draws[1], 3.0, out=draws[1]), "Chains disagree"),
        (lambda draws, diverging: np.cumsum(draws, axis=1, out=draws), "raise NUTS"),
    ],
)
def test_the_verdict_sees_chains_gone_wrong(rng, change, said):
    draws, diverging = rng.normal(size=(2, 400, 3)), np.zeros((2, 400), bool)
    change(draws, diverging)
    verdict = sampler_verdict({"x": draws}, stats_of(diverging), 1)
    assert verdict.ok == (not said) and said in verdict.sentence


def test_a_divergence_between_kept_draws_is_not_lost():
    diverging = np.zeros((1, 10), bool)
    diverging[0, 5] = True
    assert stats_of(diverging).thinned(4).diverging.tolist() == [[False, True, False]]


def absurd(kind):
    runs = recording().copy(deep=True)
    loss = runs["loss"].values
    if kind == "constant":
        loss[:] = loss[:, :1]
    elif kind == "jump":
        loss[1, 4:] += 1e8
    elif kind == "huge":
        loss *= 1e12
    elif kind == "infinitely huge":
        loss[:] = np.float32(3e38) * np.sign(loss)
    return runs


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", ["constant", "jump", "huge", "infinitely huge"])
def test_absurd_losses_are_never_silently_wrong(method, kind):
    try:
        found = fitted(absurd(kind), method)
    except Misuse as error:
        assert "loss" in str(error)
        return
    finite = all(np.isfinite(one).all() for one in found.simulator.sites.values())
    assert finite, found.verdict
    moved = np.ptp(found.simulator.sites["scale"], axis=1).min() > 0
    assert moved or not found.verdict.ok


def test_one_run_and_one_query_can_be_fitted():
    found = fitted(recording(runs=1, query=1), METHODS["collapsed"])
    assert found.simulator.sites["scale"].shape == (2, 60, 1)
    assert np.isfinite(found.simulate(recording(runs=1, query=1), key=KEY)["loss"]).all()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (bs.Simfluence.additive(error=StudentT()), r"NUTS\(\) or SVI\(\)"),
        (bs.Simfluence.additive(prior=Laplace()), r"NUTS\(\) or SVI\(\)"),
        (bs.Simfluence(error=StudentT()), r"noise.Smooth, AR1 or Gaussian"),
        (bs.Simfluence(prior=Laplace()), r"priors.Normal"),
    ],
)
def test_a_model_that_cannot_be_collapsed_is_refused(model, match):
    with pytest.raises(Misuse, match=match):
        fitted(method=METHODS["collapsed"], model=model)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"warmup": -1}, "warmup"),
        ({"draws": 0}, "draws"),
        ({"chains": 0}, "chains"),
        ({"target_accept": 1.0}, r"got 1.0.*between 0 and 1"),
        ({"max_tree_depth": 0}, "max_tree_depth"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        bs.NUTS(**settings)


def test_a_sampler_needs_its_criterion():
    with pytest.raises(Misuse, match="hyperparameters='nuts'"):
        bs.Exact(sampler=bs.NUTS())


def test_a_query_without_later_losses_is_refused():
    runs = recording().copy(deep=True)
    runs["loss"].values[:, 1:, 1] = np.nan
    for method in METHODS.values():
        with pytest.raises(Misuse, match="nothing recorded after time 0 for queries 1"):
            fitted(runs, method)
