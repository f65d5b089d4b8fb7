"""Affine simulators against plain loops, their draws against the stated moments."""

import jax
import numpy as np
import pytest

from bayes_simfluence.model.arrays import RunArrays, no_features
from bayes_simfluence.simulators.affine import AffineSimulator
from bayes_simfluence.simulators.base import Simulator, resampled

DRAWS = 3
RUNS, STEPS, SLOTS, TRAIN, QUERY = 3, 7, 3, 5, 2
FALSE_ALARM = 5.0
"""Monte Carlo errors are refused beyond this many standard errors: 6e-7 for each number."""


def planned(rng, query=(0, 1), runs=RUNS, steps=STEPS):
    batch = rng.integers(-1, TRAIN, (runs, steps, SLOTS))
    batch[0, 0], batch[0, 1], batch[-1, 2] = -1, [2, 2, 2], [1, 1, -1]
    initial = rng.uniform(0.5, 1.5, (runs, len(query)))
    return starting(batch, initial, query, weight=rng.uniform(0.5, 2.0, batch.shape))


def starting(batch, initial, query, weight=None):
    """Planned runs, without step sizes."""
    features = no_features(TRAIN, QUERY)
    return RunArrays.of(
        batch, initial[:, None], weight=weight, query=np.array(query), features=features
    )


def coefficients(rng, scale=0.2):
    return scale * rng.normal(size=(QUERY, TRAIN)), scale * rng.normal(size=(QUERY, TRAIN))


def gaussian(rng, **others):
    a, b = coefficients(rng)
    factor = 0.1 * rng.normal(size=(QUERY, 2 * TRAIN, 4))
    return AffineSimulator(a, b, factor=factor, **others)


def looped(a, b, plan, *, keep, count):
    """The definition: one run, one step, one query, one slot after the other."""
    runs, steps, _ = plan.batch.shape
    found = np.zeros((runs, steps + 1, len(plan.query)))
    for run in range(runs):
        for at, query in enumerate(plan.query):
            found[run, 0, at] = loss = plan.initial[run, at]
            for step, members in enumerate(plan.batch[run], start=1):
                weights = [
                    (example, weight)
                    for example, weight in zip(members, plan.weight[run, step - 1], strict=True)
                    if example >= 0
                ]
                total = 1.0 if count or not weights else sum(weight for _, weight in weights)
                alpha = keep + sum(weight / total * a[query, i] for i, weight in weights)
                loss = alpha * loss + sum(weight / total * b[query, i] for i, weight in weights)
                found[run, step, at] = loss
    return found


@pytest.mark.parametrize("keep", [1.0, 0.0, 0.4])
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("query", [(0, 1), (1,), (1, 0)])
def test_a_point_is_the_plain_loop(rng, key, keep, count, query):
    (a, b), plan = coefficients(rng), planned(rng, query)
    simulator = AffineSimulator(a, b, keep=keep, count=count)
    found = simulator.simulate(plan, key=key, draws=10)
    assert isinstance(simulator, Simulator) and simulator.draws == 1
    assert found.mean_loss.shape == (1, 1, RUNS, STEPS + 1, len(query))
    expected = looped(a, b, plan, keep=keep, count=count)
    np.testing.assert_allclose(found.mean_loss[0, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.loss, found.mean_loss)


def test_a_draw_is_the_plain_loop_of_its_coefficients(rng, key):
    simulator, plan = gaussian(rng), planned(rng)
    found = simulator.simulate(plan, key=key, draws=DRAWS).mean_loss[0]
    # One step on one example from two starts tells its coefficients apart.
    alone = np.broadcast_to(np.arange(TRAIN)[:, None, None], (TRAIN, 1, 1))
    zero, one = (
        simulator.simulate(
            starting(alone, np.full((TRAIN, QUERY), start), range(QUERY)),
            key=key,
            draws=DRAWS,
        ).mean_loss[0, :, :, 1]
        for start in (0.0, 1.0)
    )
    b, a = zero.swapaxes(1, 2), (one - zero - 1.0).swapaxes(1, 2)
    for draw in range(DRAWS):
        expected = looped(a[draw], b[draw], plan, keep=1.0, count=False)
        np.testing.assert_allclose(found[draw], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0], found[1])


def test_draws_have_the_stated_moments(rng, key):
    simulator, draws = gaussian(rng), 4000
    samples = simulator.samples(key=key, draws=draws)
    assert samples["a"][0] == ("chain", "draw", "query", "train")
    drawn = np.concatenate([samples[name][1][0] for name in "ab"], axis=-1).astype(float)
    mean = np.concatenate([simulator.a, simulator.b], axis=1)
    for query in range(QUERY):
        covariance = simulator.factor[query] @ simulator.factor[query].T
        sd = np.sqrt(np.diag(covariance))
        missed = (drawn[:, query].mean(axis=0) - mean[query]) / (sd / np.sqrt(draws))
        assert np.abs(missed).max() < FALSE_ALARM
        se = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / draws)
        missed = (np.cov(drawn[:, query], rowvar=False) - covariance) / se
        assert np.abs(missed).max() < FALSE_ALARM
    # Queries are independent.
    crossed = np.corrcoef(drawn[:, 0].T, drawn[:, 1].T)[: 2 * TRAIN, 2 * TRAIN :]
    assert np.abs(crossed).max() < FALSE_ALARM / np.sqrt(draws)


def test_more_draws_than_a_chunk_differ_from_each_other(rng, key):
    found = gaussian(rng).simulate(planned(rng), key=key, draws=150).mean_loss[0, :, 0, -1, 0]
    assert len(found) == 150 and len(np.unique(found)) == 150


def test_white_noise_adds_up_along_a_run(rng, key):
    zero, draws = np.zeros((QUERY, TRAIN)), 4000
    simulator, plan = AffineSimulator(zero, zero, noise=np.array([0.1, 0.3])), planned(rng)
    found = simulator.simulate(plan, key=key, draws=draws)
    kept = np.broadcast_to(plan.initial[None, :, None], found.mean_loss[0].shape)
    np.testing.assert_allclose(found.mean_loss[0], kept, rtol=1e-6)
    expected = np.sqrt(np.arange(STEPS + 1))[:, None] * np.array([0.1, 0.3])
    sd = (found.loss - found.mean_loss)[0].std(axis=0)
    wrong = np.abs(sd - expected[None]) / np.maximum(expected[None], 1e-9)
    assert wrong[:, 1:].max() < FALSE_ALARM / np.sqrt(2 * draws)
    assert (sd[:, 0] == 0).all()


def test_a_run_is_the_same_in_any_company(rng, key):
    simulator, plan = gaussian(rng, noise=np.full(QUERY, 0.1)), planned(rng)
    alone = plan.take(np.array([1]))
    twice = (np.concatenate([array, array], axis=1) for array in (plan.batch, plan.weight))
    batch, weight = twice
    longer = starting(batch, plan.initial, plan.query, weight)
    together = simulator.simulate(plan, key=key, draws=DRAWS).mean_loss
    for other, run in ((alone, slice(0, 1)), (longer, slice(1, 2))):
        found = simulator.simulate(other, key=key, draws=DRAWS).mean_loss
        np.testing.assert_allclose(
            found[:, :, run, : STEPS + 1], together[:, :, 1:2], rtol=1e-5, atol=1e-6
        )
    other_key = simulator.simulate(plan, key=jax.random.key(1), draws=DRAWS).mean_loss
    assert not np.allclose(other_key, together)


def test_some_queries_have_the_draws_that_they_have_among_all(rng, key):
    simulator, plan = gaussian(rng), planned(rng)
    every = simulator.simulate(plan, key=key, draws=DRAWS).mean_loss
    second = plan.of_queries(np.array([1]))
    found = simulator.simulate(second, key=key, draws=DRAWS).mean_loss
    np.testing.assert_allclose(found[..., 0], every[..., 1], rtol=1e-5)


def test_a_band_of_residuals_is_whole_trajectories(rng, key):
    (a, b), plan = coefficients(rng), planned(rng, query=(1, 0))
    residual = rng.normal(size=(4, STEPS + 1, QUERY))
    simulator = AffineSimulator(a, b, residual=residual)
    assert simulator.draws is None
    found = simulator.simulate(plan, key=key, draws=200)
    added = (found.loss - found.mean_loss)[0]
    distance = np.abs(added[:, :, None] - residual[None, None, :, :, [1, 0]]).max(axis=(3, 4))
    assert (distance.min(axis=2) < 1e-5).all()
    shares = np.bincount(distance.argmin(axis=2).ravel(), minlength=4) / distance[..., 0].size
    assert np.abs(shares - 0.25).max() < FALSE_ALARM * np.sqrt(0.25 * 0.75 / 600)
    # Draws and runs meet different residuals.
    assert len(np.unique(distance.argmin(axis=2)[:, 0])) == 4


def test_residuals_stay_at_their_end_in_longer_runs(rng, key):
    residual = rng.normal(size=(2, 4, QUERY))
    found = resampled(residual, planned(rng), key=key, draws=DRAWS)
    assert found.shape == (DRAWS, RUNS, STEPS + 1, QUERY)
    np.testing.assert_array_equal(found[:, :, 4:], np.repeat(found[:, :, 3:4], STEPS - 3, axis=2))


def test_what_is_saved_is_what_was_there(rng, key):
    simulator = gaussian(rng, noise=np.full(QUERY, 0.1), keep=0.0, count=True)
    arrays = {name: value for name, (_, value) in simulator.arrays().items()}
    assert set(arrays) == {"a", "b", "factor", "noise"}
    again, plan = AffineSimulator.restore(arrays, simulator.settings()), planned(rng)
    for one, other in zip(
        simulator.simulate(plan, key=key, draws=DRAWS),
        again.simulate(plan, key=key, draws=DRAWS),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
