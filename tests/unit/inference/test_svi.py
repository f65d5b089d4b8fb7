"""Stochastic variational inference as its user meets it: through ``fit``."""

import warnings
from contextlib import contextmanager

import jax
import numpy as np
import optax
import pytest
from numpyro.infer import autoguide

import bayes_simfluence as bs
from bayes_simfluence.checks import FitFailed, FitWarning, Misuse
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference import svi

TRAIN, QUERY = 4, 2
KEY = jax.random.key(0)
MODEL = bs.Simfluence.additive()


def recording(seed=0):
    sizes = {"runs": 3, "train": TRAIN, "query": QUERY, "per_run": 3, "batch_size": 2, "epochs": 3}
    return linear_runs(key=jax.random.key(seed), sd_a=0.0, **sizes)[0]


def fitted(runs=None, key=KEY, progress=None, **settings):
    method = bs.SVI(**{"steps": 1250, "draws": 120, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        runs = recording() if runs is None else runs
        return bs.fit(runs, model=MODEL, method=method, key=key, progress=progress)


@pytest.fixture(scope="module")
def posterior():
    return fitted(optimizer=FAST, steps=3000)


FAST = optax.adam(optax.cosine_decay_schedule(0.1, 750))


def test_draws_and_losses(posterior):
    drawn = posterior.samples(key=KEY, draws=500)
    assert dict(drawn["b"].sizes) == {"chain": 1, "draw": 120, "query": QUERY, "train": TRAIN}
    assert np.ptp(drawn["b"].values, axis=1).min() > 0
    loss = posterior.search_loss
    assert len(loss) == posterior.verdict.numbers["steps"] and np.isfinite(loss).all()
    assert loss[-250:].mean() < loss[:250].mean()
    assert posterior.verdict.numbers["final_loss"] == pytest.approx(loss[-250:].mean())
    assert posterior.settings["optimizer"] == "the caller's"


def test_the_search_stops_when_the_loss_is_flat(posterior):
    assert len(posterior.search_loss) < 3000
    assert "flat after" in posterior.verdict.sentence or "narrow" in posterior.verdict.sentence


def test_the_verdict_says_when_it_still_falls():
    few = fitted(steps=30)
    assert len(few.search_loss) == 30 and not few.verdict.ok
    assert few.verdict.sentence == "The loss still falls after 30 steps: raise SVI(steps=...)."
    with pytest.warns(FitWarning, match="still falls") as told:
        bs.fit(recording(), model=MODEL, method=bs.SVI(steps=30, draws=120), key=KEY)
    assert len(told) == 1
    with pytest.raises(FitFailed, match="still falls"):
        bs.fit(recording(), model=MODEL, method=bs.SVI(steps=30, draws=120), key=KEY, strict=True)


def test_a_saved_posterior_is_the_same(posterior, tmp_path):
    loaded = bs.load_posterior(posterior.save(tmp_path / "p.nc"))
    np.testing.assert_array_equal(loaded.search_loss, posterior.search_loss)
    found, expected = (one.simulate(recording(), key=KEY)["loss"] for one in (loaded, posterior))
    np.testing.assert_array_equal(found.values, expected.values)
    assert loaded.verdict == posterior.verdict and loaded.sample_stats is None


def test_the_key_decides_everything_and_compiled_code_is_used_again(posterior):
    same = fitted(optimizer=FAST, steps=3000)
    np.testing.assert_array_equal(same.search_loss, posterior.search_loss)
    name = "staying_unit"
    np.testing.assert_array_equal(same.simulator.sites[name], posterior.simulator.sites[name])
    before = svi._descent.cache_info()
    other = fitted(recording(seed=3), optimizer=FAST, steps=3000)
    assert svi._descent.cache_info().misses == before.misses
    assert (other.simulator.sites[name] != posterior.simulator.sites[name]).mean() > 0.5


def test_minibatches_of_transitions_find_the_same(posterior):
    small = fitted(batch=9, optimizer=FAST, steps=3000)
    assert any("Minibatches of 9" in note for note in small.verdict.notes)
    found, expected = (
        one.samples(key=KEY, draws=120)["b"].mean(("chain", "draw")).values
        for one in (small, posterior)
    )
    sd = posterior.samples(key=KEY, draws=120)["b"].std(("chain", "draw")).values
    # Half a posterior sd: the noise of 120 draws and of a short search.
    assert (np.abs(found - expected) < 0.75 * sd + 0.01).all()


def test_progress_is_told():
    class Listener:
        done, total, note = 0, 0, ""

        @contextmanager
        def work(self, label, total):
            self.total = total
            yield self

        def advance(self, amount=1, note=""):
            self.done += amount
            self.note = note

    listener = Listener()
    found = fitted(steps=30, progress=listener)
    assert listener.done == listener.total == 30
    assert listener.note == f"loss {found.search_loss.mean():.6g}"


def test_a_guide_of_the_callers_class():
    found = fitted(guide=autoguide.AutoDelta, steps=30)
    assert found.settings["guide"] == "AutoDelta"
    sites = found.simulator.sites["staying_unit"]
    assert np.ptp(sites, axis=1).max() < 1e-6
    assert found.verdict.numbers["dispersion"] < 1e-3


def test_a_flat_loss_is_told_from_a_falling_one(rng):
    noise = rng.normal(size=(3, svi.WINDOW))
    assert svi._is_flat(list(noise))
    assert not svi._is_flat(list(noise - np.arange(3)[:, None]))
    assert not svi._is_flat(list(noise[:2]))


def test_losses_that_are_not_finite_are_told():
    verdict = svi._verdict(np.full(10, np.nan), False, float("nan"), None)
    assert not verdict.ok and "not finite" in verdict.sentence


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"guide": "narrow"}, r"one of normal, low-rank, full-rank, laplace"),
        ({"steps": 0}, "steps"),
        ({"draws": 0}, "draws"),
        ({"batch": 0}, "batch"),
        ({"optimizer": 0.01}, r"got float.*optax"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    build = bs.SVI.__init__
    while hasattr(build, "__wrapped__"):
        build = build.__wrapped__
    with pytest.raises(Misuse, match=match):
        build(object.__new__(bs.SVI), **settings)
