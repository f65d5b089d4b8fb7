"""Scores as simulators: the recurrence in plain NumPy, the scale, the sign."""

import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.attribution.scores import opponents, proponents, score_array
from bayes_simfluence.attribution.simulators import additive_simulator
from bayes_simfluence.checks import Misuse

TRAIN, QUERY, STEPS = 4, 3, 6


@pytest.fixture
def scores(rng):
    values = rng.normal(size=(TRAIN, QUERY))
    return score_array(values, list("abcd"), list("xyz"), method="made up", units="nat")


def shares_of(batch, weight=None):
    """How much of each batch is each example, step by step."""
    weight = np.ones(batch.shape) if weight is None else weight
    own = [np.where(batch == example, weight, 0.0).sum(axis=1) for example in range(TRAIN)]
    return np.stack(own, axis=1) / weight.sum(axis=1, keepdims=True)


def runs_of(scores, rng, scale, noise=0.0, runs=5, weighted=False):
    """Runs that follow the scores at ``scale``, by the recurrence itself."""
    batch = rng.integers(0, TRAIN, (runs, STEPS, 2))
    weight = rng.uniform(0.2, 3.0, batch.shape) if weighted else np.ones(batch.shape)
    loss = np.full((runs, STEPS + 1, QUERY), 50.0)
    for run in range(runs):
        for step, shares in enumerate(shares_of(batch[run], weight[run])):
            moved = scale * shares @ scores.values + noise * rng.normal(size=QUERY)
            loss[run, step + 1] = loss[run, step] + moved
    return bs.runs_from_arrays(
        batch=batch,
        loss=loss,
        weight=weight if weighted else None,
        train_ids=list("abcd"),
        query_ids=list("xyz"),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_and_the_trajectories_are_found_again(scores, rng, key, weighted):
    runs = runs_of(scores, rng, scale=0.3, weighted=weighted)
    posterior = additive_simulator(scores, runs)
    assert posterior.verdict.ok
    assert posterior.verdict.numbers["scale"] == pytest.approx(0.3, rel=1e-4)
    assert posterior.verdict.numbers["explained"] == pytest.approx(1.0, abs=1e-4)
    simulated = posterior.simulate(runs, key=key, draws=3)
    for draw in simulated["mean_loss"].values[0]:
        np.testing.assert_allclose(draw, runs["loss"].values, atol=1e-3)


def test_ids_decide_not_places(scores, rng, key):
    runs = runs_of(scores, rng, scale=0.3)
    shuffled = scores.isel(train=[2, 0, 3, 1], query=[1, 2, 0])
    plain, permuted = (additive_simulator(some, runs) for some in (scores, shuffled))
    np.testing.assert_allclose(plain.simulator.b, permuted.simulator.b)


def test_the_band_is_made_of_runs_at_the_scale_of_the_others(scores, rng):
    runs = runs_of(scores, rng, scale=0.3, noise=0.5)
    posterior = additive_simulator(scores, runs)
    for left_out in range(runs.sizes["run"]):
        rest = runs.isel(run=[run for run in range(runs.sizes["run"]) if run != left_out])
        without = additive_simulator(scores, rest, band=False)
        batch = runs["batch"].values[left_out]
        steps = shares_of(batch) @ without.simulator.b.T
        loss = runs["loss"].values[left_out].astype(float)
        expected = loss[1:] - loss[0] - steps.cumsum(axis=0)
        np.testing.assert_allclose(
            posterior.simulator.residual[left_out][1:], expected, rtol=1e-6, atol=1e-9
        )


def test_losses_that_were_not_recorded_do_not_count(scores, rng):
    runs = runs_of(scores, rng, scale=0.3)
    loss = runs["loss"].values.copy()
    loss[:, 1::2] = np.nan
    thin = bs.runs_from_arrays(
        batch=runs["batch"].values,
        loss=loss,
        train_ids=runs["train"].values,
        query_ids=runs["query"].values,
        missing=True,
    )
    posterior = additive_simulator(scores, thin)
    assert posterior.verdict.numbers["scale"] == pytest.approx(0.3, rel=1e-4)
    assert np.isfinite(posterior.simulator.residual).all()


def test_a_wrong_sign_is_reported(scores, rng):
    posterior = additive_simulator(-scores, runs_of(scores, rng, scale=0.3))
    assert not posterior.verdict.ok
    assert "wrong way" in posterior.verdict.sentence


def test_misuse_is_named(scores, rng):
    runs = runs_of(scores, rng, scale=0.3)
    with pytest.raises(Misuse, match="unknown ids d"):
        additive_simulator(scores.isel(train=slice(0, 3)), runs)
    broken = scores.copy(deep=True)
    broken[2, 1] = np.nan
    with pytest.raises(Misuse, match="example c on query y: got nan"):
        additive_simulator(broken, runs)
    with pytest.raises(Misuse, match="got one run"):
        additive_simulator(scores, runs.isel(run=[0]))
    with pytest.raises(Misuse, match="dimensions"):
        additive_simulator(scores.transpose(), runs)
    with pytest.raises(Misuse, match=r"shape \(4, 3\)"):
        score_array(scores.values, list("abc"), list("xyz"), method="m", units="nat")


def test_proponents_lower_the_loss_and_opponents_raise_it(scores):
    column = scores.sel(query="y").values
    helpful, harmful = proponents(scores, "y", 2), opponents(scores, "y", 2)
    assert helpful.values.tolist() == sorted(column)[:2]
    assert harmful.values.tolist() == sorted(column)[::-1][:2]
    with pytest.raises(Misuse, match="query"):
        proponents(scores, "w")
