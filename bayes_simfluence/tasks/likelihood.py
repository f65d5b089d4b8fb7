"""How likely a text is to a network: nats of its tokens, and their mean.

Losses of texts are means over target tokens, so that long answers do not weigh more; ranking
answers by them is the length-normalised ranking of Brown et al. 2020 (2.4) and T-Few (Liu et al.
2022, eq. 3). Sums over a vocabulary need more digits than bfloat16 has, so they are in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.networks.layers import wide
from bayes_simfluence.networks.network import Network, Sequence
from bayes_simfluence.networks.tensor_files import Tensors


def completion_logits(
    network: Network,
    tensors: Tensors,
    tokens: Int[Array, " token"],
    attended: Bool[Array, " token"],
) -> Float[Array, "token-1 vocabulary"]:
    """A decoder's logits of each token but the first, given those before it."""
    sequence = Sequence(tokens, jnp.zeros_like(tokens), attended)
    return network.logits(tensors, sequence)[:-1]  # type: ignore[misc]


def target_logits(
    network: Network, tensors: Tensors, source: Sequence, target: Int[Array, " target"]
) -> Float[Array, "target vocabulary"]:
    """An encoder-decoder's logits of each target token, given the source and those before it."""
    shifted = jnp.roll(target, 1).at[0].set(network.start_token)
    return network.seq2seq_logits(tensors, source, shifted)  # type: ignore[misc]


def mean_nats(
    logits: Float[Array, "target vocabulary"],
    target: Int[Array, " target"],
    counted: Bool[Array, " target"],
) -> Float[Array, ""]:
    """Mean cross-entropy of the counted target tokens, nats."""
    return -jnp.where(counted, _log_shares(logits, target), 0.0).sum() / counted.sum()


def mean_residual(
    logits: Float[Array, "target vocabulary"],
    target: Int[Array, " target"],
    counted: Bool[Array, " target"],
) -> Float[Array, ""]:
    """Mean over the counted target tokens of the probability that each lacks, in [0, 1]."""
    missing = -jnp.expm1(_log_shares(logits, target))
    return jnp.where(counted, missing, 0.0).sum() / counted.sum()


def _log_shares(
    logits: Float[Array, "target vocabulary"], target: Int[Array, " target"]
) -> Float[Array, " target"]:
    return jax.nn.log_softmax(wide(logits))[jnp.arange(len(target)), target]


def drawn_slopes(
    logits: Float[Array, "target vocabulary"], counted: Bool[Array, " target"], key: jax.Array
) -> Float[Array, "target vocabulary"]:
    """A random array of mean 0 whose covariance is the Hessian of ``mean_nats`` in the logits.

    Each counted token's block of the Hessian, ``(diag(p) - p p^T) / count``, is the covariance of
    the slope at a token drawn from the network's own distribution (Martens 2020, section 9.2).
    """
    logits = wide(logits)
    tokens = jax.random.categorical(key, logits)
    slopes = jax.nn.softmax(logits) - jax.nn.one_hot(tokens, logits.shape[1])
    return jnp.where(counted[:, None], slopes, 0.0) / jnp.sqrt(counted.sum())


def smallest_margin(
    logits: Float[Array, "target vocabulary"],
    target: Int[Array, " target"],
    counted: Bool[Array, " target"],
) -> Float[Array, ""]:
    """The least log-odds of a target token against the best other one, nats.

    Above 0 exactly when greedy decoding would write the target.
    """
    logits = wide(logits)
    places = jnp.arange(len(target))
    others = logits.at[places, target].set(-jnp.inf).max(axis=-1)
    return jnp.where(counted, logits[places, target] - others, jnp.inf).min()
