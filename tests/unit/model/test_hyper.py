"""Scales of hyperparameters and their prior."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, no_features
from bayes_simfluence.model.hyper import Hyper, log_prior, natural_values, start
from bayes_simfluence.model.simfluence import Simfluence, hypers_of

SCALES = {"real": lambda free: free, "positive": np.exp, "share": expit, "correlation": np.tanh}
HYPERS = {
    "slope": Hyper(-0.4, 0.5, "real", "a number"),
    "length": Hyper(0.2, 1.0, "positive", "above zero"),
    "part": Hyper(0.9, 2.0, "share", "between zero and one"),
}


@pytest.mark.parametrize("scale", SCALES)
def test_the_centre_is_a_fixed_point_and_the_scale_is_kept(scale):
    hyper = Hyper(0.3, 1.0, scale, "anything")
    with double_precision():
        centre = hyper.natural(jnp.asarray(hyper.free_centre))
        np.testing.assert_allclose(centre, 0.3, rtol=1e-12)
        for free in (-3.0, 0.0, 2.5):
            np.testing.assert_allclose(
                hyper.natural(jnp.asarray(free)), SCALES[scale](free), rtol=1e-12
            )
            back = hyper.free(jnp.asarray(SCALES[scale](free)))
            np.testing.assert_allclose(back, free, rtol=1e-10, atol=1e-12)


def test_values_rounded_to_an_edge_are_just_inside():
    for scale, edges in {"positive": [0.0], "share": [0.0, 1.0], "correlation": [-1, 1]}.items():
        for edge in edges:
            assert np.isfinite(Hyper(0.3, 1.0, scale, "anything").free(jnp.asarray(float(edge))))


@pytest.mark.parametrize("scale", SCALES)
def test_the_law_is_the_normal_carried_over(scale):
    """Its density is the normal's over the slope of the scale, at every number it allows."""
    hyper = Hyper(0.3, 0.7, scale, "anything")
    with double_precision():
        for free in (-1.5, 0.2, 1.1):
            up, down = (float(SCALES[scale](free + step)) for step in (1e-5, -1e-5))
            expected = norm.logpdf(free, hyper.free_centre, 0.7) - np.log((up - down) / 2e-5)
            density = hyper.law().log_prob(jnp.asarray(float(SCALES[scale](free))))
            np.testing.assert_allclose(density, expected, rtol=1e-7)


def test_a_vector_has_the_order_of_the_names():
    with double_precision():
        values = natural_values(HYPERS, jnp.asarray(start(HYPERS)))
        values = {name: float(value) for name, value in values.items()}
    assert list(values) == ["slope", "length", "part"]
    np.testing.assert_allclose(list(values.values()), [-0.4, 0.2, 0.9], rtol=1e-12)


def test_the_prior_is_normal_on_the_unconstrained_scale(rng):
    spreads = np.array([0.5, 1.0, 2.0])
    points = start(HYPERS) + rng.normal(size=(2, 3))
    expected = norm.logpdf(points, start(HYPERS), spreads).sum(axis=1)
    with double_precision():
        densities = [float(log_prior(HYPERS, jnp.asarray(point))) for point in points]
    np.testing.assert_allclose(densities[0] - densities[1], expected[0] - expected[1], rtol=1e-10)


def test_features_bring_their_hyperparameters():
    with_features = ExampleFeatures(jnp.ones((3, 2)), jnp.ones((2, 2)))
    only_train = ExampleFeatures(jnp.ones((3, 2)), jnp.ones((2, 0)))
    names = {
        which: set(hypers_of(Simfluence(), features))
        for which, features in (
            ("both", with_features),
            ("train", only_train),
            ("none", no_features(3, 2)),
        )
    }
    assert names["both"] - names["train"] == {"staying_dot", "fading_dot"}
    assert names["train"] - names["none"] == {"staying_alike", "fading_alike"}
    assert all(hyper.meaning for hyper in hypers_of(Simfluence(), with_features).values())
