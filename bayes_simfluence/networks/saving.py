"""A fine-tuned network saved as a folder that transformers loads."""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bayes_simfluence.checks import Misuse
from bayes_simfluence.files import PathLike, atomically, new_path
from bayes_simfluence.networks.checkpoint import Checkpoint, network_of
from bayes_simfluence.networks.families import family_of
from bayes_simfluence.networks.heads import HEAD
from bayes_simfluence.networks.tensor_files import SINGLE, Tensors, write_tensors

COPIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)
"""Files of the tokenizer, and the defaults of generation, which training leaves as they are."""


def save_checkpoint(
    checkpoint: Checkpoint,
    tensors: Tensors,
    folder: PathLike,
    *,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write trained ``tensors`` of ``checkpoint`` as a folder: config, tokenizer, safetensors.

    ``AutoModel.from_pretrained`` and, for decoders and T5, the class with the output layer load it
    and compute what the network here computes; so does ``load_checkpoint``.

    A classification head here is a pooling and one dense layer (``classifier.weight`` and
    ``.bias``). Only ``BertForSequenceClassification`` has the same one, and it always pools with
    BERT's tanh pooler: with ``pooling="pooler"`` its logits are those computed here, after other
    poolings it loads the head but applies it to another vector. For the other families
    transformers' classes have heads of other layers; they load the body, leave ``classifier.*``
    out and say so.

    Args:
        tensors: every tensor of the network; adapters merged into them.
        labels: the label words, in the order of the head's outputs; ``LABEL_0``, ... when None.

    Raises:
        Misuse: something stands at ``folder``, tensors that are not those of the network, or
            ``labels`` that are not as many as the head's outputs.
        WorkFailed: the folder could not be written; nothing is left of it.
    """
    folder = new_path(folder, overwrite=overwrite)
    network = network_of(replace(checkpoint, tensors=tensors))
    family = family_of(network.family)
    config = copy.deepcopy(checkpoint.config)
    config.dtype = str(tensors[next(iter(network.shapes))].dtype)
    if HEAD[0] in tensors:
        names = _labels(len(tensors[HEAD[0]]), labels)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: code for code, name in enumerate(names)}
    if HEAD[0] in tensors and family.classifier:
        config.architectures = [family.classifier]
        bare = {name for name in network.shapes if not name.startswith(family.prefix)}
        tensors = {
            f"{family.prefix}{name}" if name in bare else name: value
            for name, value in tensors.items()
        }
    with atomically(folder) as partial:
        partial.mkdir()
        config.save_pretrained(partial)
        write_tensors(tensors, partial / SINGLE)
        for file in {path for pattern in COPIED for path in checkpoint.folder.glob(pattern)}:
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    return folder


def _labels(count: int, labels: Sequence[str] | None) -> list[str]:
    names = [f"LABEL_{code}" for code in range(count)] if labels is None else list(labels)
    if len(set(names)) != count or len(names) != count:
        raise Misuse(
            "labels",
            got=f"{len(names)} words, {len(set(names))} of them different",
            expected=f"{count} different ones, one for each output of the head",
            do="pass the label words that the task was made with",
        )
    return names
