"""Linear layers read from traces: their biases, and probes of what leaves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.gradients.linear_layers import layers_of, probes_of, with_probes

BIAS, WEIGHT = 0, 1
"""Numbers of the leaves; dicts are sorted."""


@pytest.fixture
def params(rng):
    shapes = {"b": (3,), "w": (3, 3)}
    return {name: jnp.asarray(rng.normal(size=at), jnp.float32) for name, at in shapes.items()}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)


def dense(w, b, x):
    return x @ w.T + b[None]


FUNCTIONS = {
    "added": (dense, BIAS),
    "of one vector": (lambda w, b, x: w @ x[0] + b, BIAS),
    "vmap": (lambda w, b, x: jax.vmap(lambda row: b + w @ row)(x), BIAS),
    "jit": (lambda w, b, x: jax.jit(dense)(w, b, x), BIAS),
    "inward first": (lambda w, b, x: x @ w + jnp.broadcast_to(b, x.shape), BIAS),
    "columns": (lambda w, b, x: w @ x.T + b[:, None], BIAS),
    "two uses": (lambda w, b, x: jnp.tanh(dense(w, b, x)) + dense(w, b, x**2), BIAS),
    "none": (lambda w, b, x: x @ w.T, None),
    "along the other axis": (lambda w, b, x: x[:3] @ w.T + b[:, None], None),
    "added twice": (lambda w, b, x: dense(w, b, x) + b[None], None),
    "in one of two uses": (lambda w, b, x: jnp.tanh(dense(w, b, x)) + x @ w.T, None),
    "used elsewhere": (lambda w, b, x: dense(w, b, x) * b.sum(), None),
    "scaled": (lambda w, b, x: x @ w.T + 2.0 * b[None], None),
    "after a product with a number": (lambda w, b, x: 2.0 * (x @ w.T) + b[None], None),
    "product read twice": (lambda w, b, x: (lambda y: jnp.tanh(y + b[None]) + y)(x @ w.T), None),
    "one number for all": (lambda w, b, x: x @ w.T + b[:1][None], None),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bias_is_what_is_added_to_the_product_alone(params, x, name):
    function, bias = FUNCTIONS[name]
    closed = jax.make_jaxpr(lambda some, x: function(some["w"], some["b"], x))(params, x)
    layers = layers_of(closed, 2)
    assert layers.keys() == {WEIGHT}
    assert layers[WEIGHT].bias == bias
    assert layers[WEIGHT].multiplied > 0 and layers[WEIGHT].taken == 0


@pytest.mark.parametrize("name", [name for name, (_, bias) in FUNCTIONS.items() if bias == BIAS])
def test_probes_have_the_gradients_of_matrix_and_bias(params, x, name):
    def loss(some, x):
        return jnp.square(FUNCTIONS[name][0](some["w"], some["b"], x) + 1.0).sum()

    closed = jax.make_jaxpr(loss)(params, x)
    layers = layers_of(closed, 2)

    def probed(probes):
        (value,), entered = with_probes(closed, 2, [params["b"], params["w"], x], probes)
        return value, entered

    slopes, entered = jax.grad(probed, has_aux=True)(probes_of(layers))
    left, right = (jnp.concatenate(some[WEIGHT]) for some in (slopes, entered))
    gradient = jax.grad(loss)(params, x)
    product = left.T @ right if layers[WEIGHT].uses[0].kind == "left" else right.T @ left
    np.testing.assert_allclose(product, gradient["w"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(left.sum(axis=0), gradient["b"], rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_added_is_no_bias(x):
    params = [jnp.ones((4, 3)), jnp.ones((3, 3))]
    closed = jax.make_jaxpr(lambda some, x: x @ some[1].T + some[0])(params, x)
    assert layers_of(closed, 2)[1].bias is None
