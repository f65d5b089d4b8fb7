"""Tensors of a checkpoint folder: safetensors files, one or several shards, read and written.

No pickle is ever opened. Files are mapped into memory, not read twice.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bayes_simfluence.checks import Misuse, WorkFailed, shorten
from bayes_simfluence.files import atomically, first_line, new_path, readable

Tensors = dict[str, jax.Array]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""Element types by their name in the file's header."""

HEADER = 8
"""Bytes of the little-endian length that a file begins with; the JSON header follows."""


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint folder, each mapped from its file.

    Raises:
        Misuse: no safetensors file, one that is truncated or malformed, an index that is
            malformed, points outside the folder or names a shard or tensor that is not there.
    """
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / SINGLE).exists():
        return _read_file(folder / SINGLE)
    pickled = [file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".h5"}]
    raise Misuse(
        str(folder),
        got=f"no {SINGLE}" + (f" but {shorten(pickled)}" if pickled else ""),
        expected="tensors as safetensors",
        do="save the model with safe_serialization=True" if pickled else "check the path",
    )


def write_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write ``tensors`` as one safetensors file that transformers' PyTorch models load."""
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    try:
        save_file(arrays, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise WorkFailed(f"{path} could not be written ({first_line(error)})") from error


def save_tensors(tensors: Tensors, folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``tensors`` unchanged as ``model.safetensors`` in ``folder``, all or nothing."""
    path = new_path(folder / SINGLE, overwrite=overwrite)
    with atomically(path) as partial:
        write_tensors(tensors, partial)
    return path


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    shard_of = _weight_map(folder / INDEX)
    shards = sorted(set(shard_of.values()))
    outside = [
        shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")
    ]
    if outside:
        raise _malformed(
            f"shards {shorten(outside)}", "names of safetensors files beside it", folder
        )
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise Misuse(
            str(folder),
            got=f"no shard {shorten(absent)}",
            expected=f"the {len(shards)} shards that {INDEX} names",
            do="copy or download them",
        )
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors |= _read_file(folder / shard)
    lost = [name for name in shard_of if name not in tensors]
    if lost:
        raise _malformed(f"tensors {shorten(lost)}, in no shard", "tensors of its shards", folder)
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _malformed(f"no JSON ({first_line(error)})", "an index", path.parent) from error
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        got = "no weight_map"
    elif not all(isinstance(shard, str) for shard in shard_of.values()):
        got = "a weight_map whose values are no file names"
    else:
        return shard_of
    raise _malformed(got, "tensor name -> shard", path.parent)


def _malformed(got: str, expected: str, folder: Path) -> Misuse:
    return Misuse(str(folder / INDEX), got=got, expected=expected, do="copy or download it again")


def _read_file(file: Path) -> dict[str, np.ndarray]:
    errors = (SafetensorError, OSError, ValueError)
    with (
        readable(
            file, *errors, expected="a whole safetensors file", do="copy or download it again"
        ),
        # The reader of the format's own library holds the header against the file's length.
        safe_open(os.fspath(file), framework="np"),
    ):
        content = np.memmap(file, mode="r", dtype=np.uint8)
    start = HEADER + int.from_bytes(content[:HEADER].tobytes(), "little")
    header = json.loads(content[HEADER:start].tobytes())
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    unknown = [
        f"{name} ({entry['dtype']})"
        for name, entry in entries.items()
        if entry["dtype"] not in DTYPES
    ]
    if unknown:
        raise Misuse(
            str(file),
            got=f"tensors {shorten(unknown)}",
            expected=f"element types among {', '.join(DTYPES)}",
            do="save the model as float32 or bfloat16",
        )
    tensors = {}
    for name, entry in entries.items():
        held = content[start:][slice(*entry["data_offsets"])]
        tensors[name] = held.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors
