"""Count sketches of gradients (Charikar et al. 2002): random signs, then folding.

The inner product of two sketches is that of the gradients, on average over the signs; it is off by
about ``1 / sqrt(length)`` of the product of their norms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, PyTree


def random_signs(params: PyTree, key: jax.Array) -> list[Int8[Array, " weight"]]:
    """A sign for each coordinate of every array."""
    leaves = jax.tree.leaves(params)
    keys = jax.random.split(key, len(leaves))
    return [
        jax.random.rademacher(drawn, (leaf.size,), jnp.int8)
        for leaf, drawn in zip(leaves, keys, strict=True)
    ]


def sketched(
    gradient: PyTree, signs: list[Int8[Array, "..."]], length: int
) -> Float[Array, " sketch"]:
    """Signed sums of every ``length``-th coordinate, all arrays one after the other."""
    folded, start = jnp.zeros(length), 0
    for leaf, sign in zip(jax.tree.leaves(gradient), signs, strict=True):
        front = start % length
        padded = jnp.pad(leaf.ravel() * sign, (front, -(front + leaf.size) % length))
        folded = folded + padded.reshape(-1, length).sum(axis=0)
        start += leaf.size
    return folded
