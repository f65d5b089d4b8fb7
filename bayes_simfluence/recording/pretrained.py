"""What tasks from text start from: a checkpoint's network, its tensors and its tokenizer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks import bert
from bayes_simfluence.networks.checkpoint import Checkpoint, Tensors, load_tokenizer
from bayes_simfluence.networks.network import Network

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
    network, tokenizer = _bert_network(checkpoint), load_tokenizer(checkpoint.folder)
    files = list(tokenizer.vocab_files_names.values())
    # Without them transformers makes a tokenizer of special tokens only, and every word is unknown.
    if not any((checkpoint.folder / one).is_file() for one in files):
        raise Misuse(
            str(checkpoint.folder),
            got="no tokenizer",
            expected=f"one of {shorten(files)} beside config.json",
            do="save the tokenizer into the folder",
        )
    return Pretrained(checkpoint.name, network, checkpoint.tensors, tokenizer)


def _bert_network(checkpoint: Checkpoint) -> Network:
    settings = bert.settings_of(checkpoint.config, checkpoint.tensors)
    return Network(
        family="bert",
        kind="encoder",
        hidden=lambda tensors, sequence: bert.encode(tensors, settings, *sequence),
        logits=None,
        seq2seq_logits=None,
        positions=checkpoint.config.max_position_embeddings,
        width=checkpoint.config.hidden_size,
        vocabulary=checkpoint.config.vocab_size,
        start_token=None,
    )
