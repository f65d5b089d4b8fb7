"""The simulator of one trajectory for all runs."""

import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.model.arrays import RunArrays, no_features
from bayes_simfluence.simulators.base import Simulator
from bayes_simfluence.simulators.mean import MeanSimulator


def simulator(rng):
    return MeanSimulator(rng.normal(size=(7, 3)), rng.normal(size=(4, 7, 3)))


def plan(rng, steps):
    initial = rng.normal(size=(2, 1, 2))
    batch = np.zeros((2, steps, 1), int)
    return RunArrays.of(batch, initial, query=np.array([2, 0]), features=no_features(1, 3))


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_every_run_goes_the_mean_way(rng, key, steps):
    mean, planned = simulator(rng), plan(rng, steps)
    found = mean.simulate(planned, key=key, draws=50)
    assert isinstance(mean, Simulator)
    expected = planned.initial[:, None] + mean.change[None, : steps + 1][:, :, [2, 0]]
    for draw in found.mean_loss[0]:
        np.testing.assert_allclose(draw, expected, rtol=1e-5, atol=1e-6)
    added = (found.loss - found.mean_loss)[0]
    paths = mean.residual[None, None, :, : steps + 1][..., [2, 0]]
    nearest = np.abs(added[:, :, None] - paths).max(axis=(3, 4)).min(axis=2)
    assert nearest.max() < 1e-5


def test_it_says_nothing_beyond_its_end(rng, key):
    with pytest.raises(Misuse, match=r"got 7 steps; expected at most the 6 steps of the fitted"):
        simulator(rng).simulate(plan(rng, 7), key=key, draws=1)


def test_what_is_saved_is_what_was_there(rng, key):
    mean = simulator(rng)
    arrays = {name: value for name, (_, value) in mean.arrays().items()}
    again = MeanSimulator.restore(arrays, mean.settings())
    np.testing.assert_array_equal(again.change, mean.change)
    np.testing.assert_array_equal(again.residual, mean.residual)
    assert mean.samples(key=key, draws=3)["change"][1].shape == (1, 1, 7, 3)
