"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and XLM-RoBERTa (Conneau et al. 2020).

BERT whose positions count only tokens that are not padding, beginning after the padding's id.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.checks import count_of
from bayes_simfluence.networks import bert
from bayes_simfluence.networks.layers import fits
from bayes_simfluence.networks.network import Network, Sequence, Settings, encoder
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILY", "encode", "network", "shapes_of"]

shapes_of = bert.shapes_of


def encode(
    settings: Settings, padding: int, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token hidden"]:
    """Hidden states of the last layer for one sequence.

    Args:
        padding: id of the padding token, whose position is that id too.
    """
    rows = len(tensors[f"{settings.prefix}embeddings.position_embeddings.weight"])
    fits(sequence.tokens, rows - padding - 1)
    words = sequence.tokens != padding
    positions = jnp.where(words, jnp.cumsum(words), 0) + padding
    return bert.encode(settings, tensors, sequence, positions)


def network(config: "PretrainedConfig", tensors: Tensors) -> Network:
    """The network of a RoBERTa or XLM-RoBERTa checkpoint; raises what ``bert.settings_of`` does."""
    settings = bert.settings_of(config, tensors, family="roberta")
    padding = count_of("config.json pad_token_id", config.pad_token_id, do="set it in config.json")
    pooler = bert.pooler_shapes(config, tensors, settings.prefix)
    shapes = {**shapes_of(config, settings.prefix), **pooler}
    positions = config.max_position_embeddings - padding - 1
    return encoder(config, partial(encode, settings, padding), shapes, positions)


FAMILY = replace(
    bert.FAMILY, network=network, tied=("lm_head.decoder",), prefix="roberta.", classifier=None
)
