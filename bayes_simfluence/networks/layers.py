"""Building blocks that networks share, each for one sequence.

Everything follows the dtype of the tensors, except norms, attention scores, softmax and logits,
which are computed in float32 (or wider).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.tensor_files import Tensors


def _tanh_gelu(value: Array) -> Array:
    return jax.nn.gelu(value, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda value: jax.nn.gelu(value, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""Activations by their names in ``config.json``."""

MASKED = float(np.finfo(np.float32).min)
"""Score of what is not attended to: finite, so that a row without any attended key stays finite."""


def wide(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``value`` in float32, or as wide as it is."""
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def embed(
    table: Float[Array, "vocabulary hidden"], tokens: Int[Array, " token"]
) -> Float[Array, "token hidden"]:
    """Rows of an embedding table."""
    return table[tokens]


def places(
    table: Float[Array, "position hidden"], tokens: Int[Array, " token"]
) -> Float[Array, "token hidden"]:
    """Learned embeddings of positions 0, 1, 2, ...

    Raises:
        Misuse: more tokens than positions.
    """
    fits(tokens, len(table))
    return table[: len(tokens)]


def fits(tokens: Int[Array, " token"], positions: int) -> None:
    """Raise unless a sequence has at most ``positions`` tokens; JAX would not notice."""
    if len(tokens) > positions:
        raise Misuse(
            "sequence",
            got=f"{len(tokens)} tokens",
            expected=f"at most the network's {positions} positions",
            do="cut the text to fewer tokens",
        )


def dense(
    tensors: Tensors, name: str, value: Float[Array, "*lead inward"]
) -> Float[Array, "*lead outward"]:
    """``value @ weight.T + bias``, or without a bias where ``tensors`` have none; which layers need
    one is checked with the tensors' shapes."""
    product = value @ tensors[f"{name}.weight"].T
    bias = tensors.get(f"{name}.bias")
    return product if bias is None else product + jnp.broadcast_to(bias, product.shape)


def layer_norm(
    tensors: Tensors, name: str, value: Float[Array, "token hidden"], epsilon: float
) -> Float[Array, "token hidden"]:
    """Layer norm (Ba et al. 2016, arXiv 1607.06450)."""
    centred = wide(value) - wide(value).mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    weight, bias = wide(tensors[f"{name}.weight"]), wide(tensors[f"{name}.bias"])
    return (centred * scale * weight[None, :] + bias[None, :]).astype(value.dtype)


def rms_norm(
    tensors: Tensors, name: str, value: Float[Array, "token hidden"], epsilon: float
) -> Float[Array, "token hidden"]:
    """Root mean square norm (Zhang & Sennrich 2019, arXiv 1910.07467): no centring, no bias."""
    square = jnp.square(wide(value)).mean(axis=-1, keepdims=True)
    scaled = wide(value) * jax.lax.rsqrt(square + epsilon)
    return (scaled * wide(tensors[f"{name}.weight"])[None, :]).astype(value.dtype)


def split_heads(value: Float[Array, "token width"], heads: int) -> Float[Array, "token head size"]:
    """The parts of each head, one after another in the last axis."""
    return value.reshape(len(value), heads, -1)


def rotate(
    value: Float[Array, "token head size"], frequencies: Float[np.ndarray, " pair"]
) -> Float[Array, "token head size"]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of queries or keys.

    Args:
        frequencies: radians per token for each pair of coordinates; pair i is made of coordinates i
            and i + len(frequencies), and coordinates after the last pair stay as they are.
    """
    pairs = len(frequencies)
    angles = np.arange(len(value), dtype=np.float32)[:, None, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(jnp.asarray(angles)), jnp.sin(jnp.asarray(angles))
    first, second = wide(value[..., :pairs]), wide(value[..., pairs : 2 * pairs])
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(
        [*(part.astype(value.dtype) for part in turned), value[..., 2 * pairs :]], axis=-1
    )


def everywhere(queries: int, attended: Bool[Array, " key"]) -> Bool[Array, "query key"]:
    """The mask of an encoder: every query attends to every key that is not padding."""
    return jnp.broadcast_to(attended[None, :], (queries, len(attended)))


def causal(attended: Bool[Array, " key"], window: int | None = None) -> Bool[Array, "key key"]:
    """The mask of a decoder: each token attends to itself and to what stands to its left.

    Args:
        window: how many tokens, itself included, it sees at most (Beltagy et al. 2020).
    """
    at = np.arange(len(attended))
    back = at[:, None] - at[None, :]
    seen = (back >= 0) & (back < (window or len(at)))
    return jnp.asarray(seen) & everywhere(len(at), attended)


def attend(
    query: Float[Array, "query head size"],
    key: Float[Array, "key group size"],
    value: Float[Array, "key group size"],
    mask: Bool[Array, "query key"],
    *,
    scale: float,
    bias: Float[Array, "head query key"] | None = None,
) -> Float[Array, "query width"]:
    """Dot-product attention (Vaswani et al. 2017, arXiv 1706.03762).

    Keys and values may be fewer than the queries' heads: consecutive heads share a group of them
    (Ainslie et al. 2023, arXiv 2305.13245).

    Args:
        scale: factor of the scores.
        bias: added to the scaled scores.
    """
    (queries, heads, size), groups = query.shape, key.shape[1]
    shared = query.reshape(queries, groups, heads // groups, size)
    precise = jnp.promote_types(query.dtype, jnp.float32)
    scores = scale * jnp.einsum("qgrs,kgs->grqk", shared, key, preferred_element_type=precise)
    if bias is not None:
        scores = scores + bias.reshape(scores.shape)
    scores = jnp.where(mask[None, None], scores, MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("grqk,kgs->qgrs", shares, value).reshape(queries, heads * size)


def vocabulary_logits(
    weight: Float[Array, "vocabulary hidden"], hidden: Float[Array, "token hidden"]
) -> Float[Array, "token vocabulary"]:
    """Logits of every token, in float32: a loss is a small difference of large ones."""
    precise = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("th,vh->tv", hidden, weight, preferred_element_type=precise)
