"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and XLM-RoBERTa (Conneau et al. 2020).

BERT whose positions count only tokens that are not padding, from one after the padding's id.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.checks import count_of
from bayes_simfluence.networks import bert
from bayes_simfluence.networks.layers import fits
from bayes_simfluence.networks.network import Network, Sequence
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILY", "encode", "network", "shapes_of"]

shapes_of = bert.shapes_of


def encode(
    settings: bert.BertSettings, padding: int, tensors: Tensors, sequence: Sequence
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
    """The network of a RoBERTa or XLM-RoBERTa checkpoint.

    Raises:
        Misuse: an option not built here, or tensors that the configuration does not describe.
    """
    settings = bert.settings_of(config, tensors, family="roberta")
    padding = count_of("config.json pad_token_id", config.pad_token_id, do="set it in config.json")
    pooler = bert.pooler_shapes(config, tensors, settings.prefix)
    return Network(
        family=config.model_type,
        kind="encoder",
        hidden=partial(encode, settings, padding),
        positions=config.max_position_embeddings - padding - 1,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        shapes={**shapes_of(config, settings.prefix), **pooler},
    )


FAMILY = replace(
    bert.FAMILY, network=network, tied=("lm_head.decoder",), prefix="roberta.", classifier=None
)
