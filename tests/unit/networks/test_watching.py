"""What passes through linear layers, seen from outside of the network."""

import jax
import jax.numpy as jnp
import numpy as np

from bayes_simfluence.networks.layers import dense, watching


def test_a_probe_of_zeros_has_the_gradient_of_the_layers_output(rng):
    tensors = {
        "one.weight": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "one.bias": jnp.ones(3),
        "two.weight": jnp.asarray(rng.normal(size=(1, 3)), jnp.float32),
    }
    value = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)

    def loss(tensors):
        return jnp.square(dense(tensors, "two", jnp.tanh(dense(tensors, "one", value)))).sum()

    def probed(probes):
        entered = {}

        def watch(name, value, product):
            entered[name] = value
            return product + probes[name]

        with watching(watch):
            return loss(tensors), entered

    probes = {"one": jnp.zeros((4, 3)), "two": jnp.zeros((4, 1))}
    slopes, entered = jax.grad(probed, has_aux=True)(probes)
    gradient = jax.grad(loss)(tensors)
    for name in probes:
        np.testing.assert_allclose(
            slopes[name].T @ entered[name], gradient[f"{name}.weight"], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(slopes["one"].sum(axis=0), gradient["one.bias"], rtol=1e-4)
    # Outside of the context nobody watches.
    assert float(loss(tensors)) == float(probed(probes)[0])
