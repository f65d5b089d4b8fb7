"""Residuals and losses, and the running mean of squared gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays, exposures
from bayes_simfluence.model.coupling import (
    DECAY,
    loss_of_residual,
    residual_of,
    running_mean,
    second_moment,
)


def test_a_residual_and_its_loss_give_each_other_back():
    loss = jnp.array([0.01, 0.7, 5.0])
    np.testing.assert_allclose(loss_of_residual(residual_of(loss)), loss, rtol=1e-3)
    assert np.isfinite(loss_of_residual(jnp.array([0.0, 1.0]))).all()


def test_residuals_multiply_exposures_and_not_the_sum_of_weights():
    batch, weight = jnp.array([[0, 1, -1]]), jnp.array([[1.0, 3.0, 9.0]])
    whole = exposures(batch, weight, 2)
    np.testing.assert_allclose(whole, [[0.25, 0.75]])
    acting = exposures(batch, weight, 2, jnp.array([[0.5, 0.1, 0.0]]))
    np.testing.assert_allclose(acting, [[0.125, 0.075]])


def test_running_means_are_adams_bias_corrected_second_moment(rng):
    square, moment, expected = rng.uniform(size=6), 0.0, []
    for step, value in enumerate(square, start=1):
        moment = DECAY * moment + (1 - DECAY) * value
        expected.append(moment / (1 - DECAY**step))
    with double_precision():
        np.testing.assert_allclose(running_mean(jnp.asarray(square)), expected, rtol=1e-9)


def run_of(features):
    """Two examples that pull against one another, one after the other, then both."""
    run = RunArrays.of(
        np.array([[[0, -1], [1, -1], [0, 1]]]),
        np.zeros((1, 1, 1)),
        features=ExampleFeatures(features, np.zeros((1, 0))),
    )
    return run._replace(residual=np.array([[[0.5, 0.0], [0.2, 0.0], [0.4, 0.4]]]))


@pytest.mark.parametrize(
    ("features", "squares"),
    [
        # The third batch's gradients cancel along the features, and add up without any.
        (np.array([[2.0], [-2.0]]), [1.0, 0.16, 0.0]),
        (np.zeros((2, 0)), [0.25, 0.04, 0.16]),
    ],
)
def test_the_second_moment_is_that_of_the_batchs_gradient(features, squares):
    run = run_of(features).take(np.array(0))
    with double_precision():
        expected = running_mean(jnp.asarray(squares))
        np.testing.assert_allclose(second_moment(run, jnp.asarray(features)), expected, atol=1e-9)


def test_steps_are_divided_by_the_power_of_the_second_moment():
    exposure = bs.Exposure(momentum=0.0, step_size_power=0.0, second_moment_power=0.5)
    assert "second_moment_power" not in exposure.hypers(coupled=True)
    weights = exposure.weights({}, jnp.ones(2), jnp.array([4.0, 0.25]))
    np.testing.assert_allclose(weights, [[0.5, 0.0], [0.0, 2.0]], rtol=1e-5)
    np.testing.assert_allclose(exposure.weights({}, jnp.ones(2)), np.eye(2))
    free = bs.Exposure().hypers(coupled=True)
    assert free.keys() - bs.Exposure().hypers().keys() == {"second_moment_power", "trend"}


def test_a_power_that_is_no_number_is_refused():
    with pytest.raises(Misuse, match="second_moment_power"):
        bs.Exposure(second_moment_power=float("nan"))


def test_what_couples_is_a_setting_of_the_model():
    assert bs.Simfluence().coupled
    assert not bs.Simfluence.linear().coupled
    saved = bs.Simfluence(coupling="none").as_dict()
    assert bs.Simfluence.from_dict(saved) == bs.Simfluence(coupling="none")
