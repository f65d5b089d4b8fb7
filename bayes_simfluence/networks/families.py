"""Which module computes which architecture. A new family is one module and one line here."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks import bert, distilbert, gpt2, gpt_neox, llama, roberta, t5
from bayes_simfluence.networks.checkpoint import Checkpoint
from bayes_simfluence.networks.network import Network
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "network_of"]

FAMILIES: dict[str, Callable[["PretrainedConfig", Tensors], Network]] = {
    "bert": bert.network,
    "roberta": roberta.network,
    "xlm-roberta": roberta.network,
    "distilbert": distilbert.network,
    "gpt2": gpt2.network,
    "gpt_neox": gpt_neox.network,
    "t5": t5.network,
    "llama": llama.network,
    "mistral": llama.network,
    "qwen2": llama.network,
}
"""``model_type`` of a configuration -> its network."""


def network_of(checkpoint: Checkpoint) -> Network:
    """The network of a checkpoint.

    Raises:
        Misuse: an architecture or an option that is not built here, tensors that are missing, of
            another shape, or that the network would ignore.
    """
    family = checkpoint.config.model_type
    if family not in FAMILIES:
        raise Misuse(
            "checkpoint architecture",
            got=repr(family),
            expected=f"one of: {', '.join(FAMILIES)}",
            do="choose a checkpoint of one of these architectures",
        )
    return FAMILIES[family](checkpoint.config, checkpoint.tensors)
