"""Coupling: an example teaches by its own error, and steps shrink with the gradients' size.

The gradient of a cross-entropy is the residual, the share of the target's probability that is
missing, times the gradient of the logits, so an example's exposure is multiplied by its residual
just before the step. Adam divides a step by the root of a running mean of squared gradients (Kingma
& Ba 2015, algorithm 1), whose size residuals and gradient features tell.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.model.arrays import RunArrays

DECAY = 0.999
"""Of the running mean of squared gradients: Adam's default."""
LEAST = 1e-6
"""Residuals are kept this far from 0 and 1, where losses are not finite."""


def residual_of(loss: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The share of the target's probability that is missing at a cross-entropy in nats.

    Losses below zero, which a link may allow, count as none.

    >>> residual_of(jnp.log(jnp.array([1.0, 4.0]))).tolist()
    [0.0, 0.75]
    """
    return -jnp.expm1(-jnp.maximum(loss, 0.0))


def loss_of_residual(residual: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The cross-entropy in nats that leaves this residual."""
    return -jnp.log1p(-jnp.clip(residual, LEAST, 1.0 - LEAST))


def second_moment(run: RunArrays, features: Float[Array, "train feature"]) -> Float[Array, " step"]:
    """Running mean of the batch gradient's squared size, bias-corrected, of one run.

    The gradient is the sum of the batch's gradient features by exposure; without features, of
    examples that all pull alike.
    """
    exposure = run.exposures()
    along = exposure @ features if features.shape[1] else exposure.sum(axis=1, keepdims=True)
    return running_mean(jnp.square(along).sum(axis=1))


def running_mean(square: Float[Array, " step"]) -> Float[Array, " step"]:
    """Means of all values so far with weights that fall by ``DECAY`` a step."""
    lag = jnp.arange(len(square))[:, None] - jnp.arange(len(square))[None, :]
    weight = jnp.where(lag >= 0, DECAY ** jnp.maximum(lag, 0), 0.0)
    return weight @ square / weight.sum(axis=1)
