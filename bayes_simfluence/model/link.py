"""Links: the scale on which effects add up, and its inverse."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

Link = Literal["log-odds", "log", "identity"]
LINKS: tuple[Link, ...] = ("log-odds", "log", "identity")
SMALLEST_LOSS = 1e-6
"""In nats; smaller losses, which may have no logarithm, count as this much."""


def link_of(link: Link, loss: Array) -> Array:
    """A loss (nats) on the scale on which effects add up.

    >>> float(link_of("log-odds", jnp.log(2.0)))  # even odds
    0.0
    """
    if link == "identity":
        return loss
    positive = jnp.maximum(loss, SMALLEST_LOSS)
    if link == "log":
        return jnp.log(positive)
    # log(exp(L) - 1), without overflow for large losses.
    return positive + jnp.log(-jnp.expm1(-positive))


def loss_of(link: Link, linked: Array) -> Array:
    """A loss in nats from the scale of the link."""
    if link == "identity":
        return linked
    return jnp.exp(linked) if link == "log" else jax.nn.softplus(linked)


def log_slope(link: Link, loss: Array) -> Array:
    """Log derivative of the link at a loss; a log density in nats is larger by it."""
    if link == "identity":
        return jnp.zeros_like(loss)
    positive = jnp.maximum(loss, SMALLEST_LOSS)
    if link == "log":
        return -jnp.log(positive)
    return -jnp.log(-jnp.expm1(-positive))
