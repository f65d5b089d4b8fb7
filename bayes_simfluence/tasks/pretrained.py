"""What tasks of text begin with: a checkpoint's network, its tensors and its tokenizer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bayes_simfluence.networks.checkpoint import Checkpoint, load_tokenizer, network_of
from bayes_simfluence.networks.network import Network
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pretrained", "pretrained"]


@dataclass(frozen=True)
class Pretrained:
    """A pretrained network: its name, forward pass, tensors and tokenizer."""

    name: str
    network: Network
    tensors: Tensors
    tokenizer: "PreTrainedTokenizerBase"


def pretrained(checkpoint: Checkpoint) -> Pretrained:
    """The network and the tokenizer of a checkpoint.

    Raises:
        Misuse: an architecture that is not built here, or no tokenizer in the folder.
    """
    network, tokenizer = network_of(checkpoint), load_tokenizer(checkpoint.folder)
    # Buffers and other heads of the checkpoint are not the network's.
    tensors = {name: checkpoint.tensors[name] for name in network.shapes}
    return Pretrained(checkpoint.name, network, tensors, tokenizer)
