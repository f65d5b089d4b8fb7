"""The families of networks, one row each, and which of them an architecture belongs to."""

from typing import TYPE_CHECKING

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks import bert, gpt2, gpt_neox, llama, t5
from bayes_simfluence.networks.network import Family, Network
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = {
    "bert": bert.FAMILY,
    "roberta": bert.ROBERTA,
    "xlm-roberta": bert.ROBERTA,
    "distilbert": bert.DISTILBERT,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "t5": t5.FAMILY,
    "llama": llama.FAMILY,
    "mistral": llama.FAMILY,
    "qwen2": llama.QWEN2,
}
"""``model_type`` of a configuration -> its family."""


def family_of(model_type: str) -> Family:
    """The family of an architecture; of one that is not built here, a family without defaults
    whose ``network`` raises ``Misuse``."""
    return FAMILIES.get(model_type, _UNKNOWN)


def _refused(config: "PretrainedConfig", tensors: Tensors) -> Network:
    raise Misuse(
        "checkpoint architecture",
        got=repr(config.model_type),
        expected=f"one of: {', '.join(FAMILIES)}",
        do="choose a checkpoint of one of these architectures",
    )


_UNKNOWN = Family(
    _refused,
    tables=tuple(dict.fromkeys(table for row in FAMILIES.values() for table in row.tables)),
)
