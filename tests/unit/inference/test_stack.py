"""Pools of fits: shares by left-out runs, one posterior to the user."""

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.inference.stack import TOWARDS_EQUAL, stacking_weights
from bayes_simfluence.simulators.base import RUN_COUNTS_AS

KEY = jax.random.key(0)


def recording(first=0, runs=5):
    chosen = {"step": slice(0, 16), "time": slice(0, 17), "query": slice(0, 3)}
    return bs.example_runs().isel(run=slice(first, first + runs), **chosen)


def test_weights_are_where_the_posterior_of_shares_is_highest(rng):
    """Against a grid: the log density of the mixture of every run, plus the Dirichlet prior's."""
    log_density = rng.normal(size=(2, 7))
    share = np.linspace(0.001, 0.999, 4000)
    mixture = share[:, None] * np.exp(log_density[0]) + (1 - share[:, None]) * np.exp(
        log_density[1]
    )
    objective = RUN_COUNTS_AS * np.log(mixture).sum(axis=1)
    objective += TOWARDS_EQUAL * (np.log(share) + np.log(1 - share))
    found = stacking_weights(log_density)
    assert found[0] == pytest.approx(share[objective.argmax()], abs=2e-3)
    assert found.sum() == pytest.approx(1.0)


def test_a_member_that_predicts_nothing_is_left_with_its_prior_share():
    found = stacking_weights(np.array([np.zeros(50), np.full(50, -30.0)]))
    assert found[1] == pytest.approx(TOWARDS_EQUAL / (50 * RUN_COUNTS_AS + 2 * TOWARDS_EQUAL))


def test_runs_without_points_do_not_count():
    known = np.array([[0.0, -1.0], [-1.0, 0.0]])
    longer = np.concatenate([known, np.full((2, 3), np.nan)], axis=1)
    np.testing.assert_allclose(stacking_weights(longer), stacking_weights(known))


@pytest.fixture(scope="module")
def posterior():
    return bs.fit(recording(), method=bs.Stack(times=4), key=KEY)


def test_draws_are_the_members_own_in_their_shares(posterior):
    pool, other = posterior.simulator, recording(6, 2)
    names = ["joint", "marginal", "constant"]
    weights = [posterior.verdict.numbers[f"weight_{name}"] for name in names]
    np.testing.assert_allclose(weights, pool.weights)
    owners = pool.owners(KEY, 50)
    assert np.abs(np.bincount(owners, minlength=3) - 50 * pool.weights).max() < 1
    whole = posterior.simulate(other, key=KEY, draws=50)["mean_loss"].values[0]
    from bayes_simfluence.posterior.arrays import planned_arrays

    planned = planned_arrays(other, posterior.runs["train"].values, posterior.runs["query"].values)
    for at, member in enumerate(pool.members):
        count = int((owners == at).sum())
        made = -(-count // 13) * 13  # a quarter of the draws, in as few shapes as may be
        alone = member.simulate(planned, key=jax.random.fold_in(KEY, at), draws=made)
        np.testing.assert_array_equal(whole[owners == at], alone.mean_loss[0, :count])


def test_a_pool_is_one_posterior(posterior, tmp_path):
    other = recording(6, 2)
    opened = bs.load_posterior(posterior.save(tmp_path / "pool.nc"))
    both = [one.simulate(other, key=KEY, draws=7)["loss"].values for one in (posterior, opened)]
    np.testing.assert_allclose(*both, rtol=1e-5)
    idata = posterior.to_arviz(draws=20, groups=["posterior", "log_likelihood"])
    assert np.isfinite(idata["log_likelihood"]["loss"].values).all()
    assert set(np.unique(idata["posterior"]["member"])) <= {0, 1, 2}
    assert {"staying", "momentum"} <= set(idata["posterior"].data_vars)
    assert "Pooled: joint" in str(posterior.verdict)


def test_only_models_with_shared_scales_are_pooled():
    with pytest.raises(Misuse, match="per-query"):
        bs.fit(recording(), model=bs.Simfluence.linear(), method=bs.Stack(), key=KEY)
