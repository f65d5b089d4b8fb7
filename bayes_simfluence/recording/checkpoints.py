"""Weights saved on the way of a run, for TracIn and for going on with the trained network.

A checkpoint holds the trained tensors that a step STARTED from; with that step's size it gives one
term of TracIn (Pruthi et al. 2020, eq. 1): the step size times the inner product of two gradients
at those weights. Checkpoints lie in the middle of equal parts of a run, so that each stands for its
part; as many as there are steps give the first-order sum exactly.

Layout: ``STORE/checkpoints/RUN/step-000048.safetensors`` and ``final.safetensors``, the weights
after the last step.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from bayes_simfluence.checks import Misuse, choice_of, shorten
from bayes_simfluence.data.store import CHECKPOINTS, open_store
from bayes_simfluence.files import PathLike, atomically, readable

FINAL = "final"
NAMED = re.compile(r"step-(\d+)\.safetensors")
SEPARATOR = "/"


class SavedWeights(NamedTuple):
    """The trained tensors that a step of a run started from.

    Attributes:
        step: number of the step, from 1.
        step_size: learning rate of that step; NaN where none was recorded.
        tensors: by name; parts of a nested pytree are joined by ``/``.
    """

    step: int
    step_size: float
    tensors: dict[str, np.ndarray]


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """The steps, from 1, whose starting weights stand for ``count`` equal parts of a run.

    >>> checkpoint_steps(96, 3)
    [17, 49, 81]
    >>> checkpoint_steps(3, 3)
    [1, 2, 3]
    """
    return [(2 * part + 1) * steps // (2 * count) + 1 for part in range(count)]


def open_checkpoints(store: PathLike, run: object) -> list[SavedWeights]:
    """The checkpoints of a run, in the order of its steps.

    Args:
        run: id of the run in the store.

    Raises:
        Misuse: no such run, none were saved, a file that cannot be read.
    """
    runs = open_store(store)
    folder = _folder_of(store, run)
    place = runs["run"].values.astype(str).tolist().index(str(run))
    rates = runs["step_size"].values[place] if "step_size" in runs else None
    checkpoints = []
    for path in sorted(folder.iterdir()):
        if named := NAMED.fullmatch(path.name):
            step = int(named[1])
            rate = float("nan") if rates is None else float(rates[step - 1])
            checkpoints.append(SavedWeights(step, rate, _read(path)))
    return checkpoints


def final_weights(store: PathLike, run: object) -> dict[str, np.ndarray]:
    """The trained tensors of a run after its last step.

    Raises:
        Misuse: no such run, none were saved, a file that cannot be read.
    """
    return _read(_folder_of(store, run) / f"{FINAL}.safetensors")


@contextmanager
def new_checkpoints(store: PathLike, runs: list[int]) -> Iterator[dict[int, Path]]:
    """Folders for the checkpoints of runs that train now; they get their names when all is well."""
    with ExitStack() as stack:
        folders = {}
        for run in runs:
            folders[run] = stack.enter_context(atomically(Path(store) / CHECKPOINTS / str(run)))
            folders[run].mkdir()
        yield folders


def write_weights(folder: Path, step: int | None, params: PyTree) -> None:
    """Write the weights that ``step`` starts from, or with ``None`` those after the last step."""
    name = FINAL if step is None else f"step-{step:06d}"
    # Through Python's own files: a full disk is an OSError here.
    (folder / f"{name}.safetensors").write_bytes(save(named_tensors(params)))


def named_tensors(params: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a pytree under their paths; the names of a flat dict stay as they are.

    >>> sorted(named_tensors({"layer.weight": np.zeros(2), "head": [np.zeros(1)]}))
    ['head/0', 'layer.weight']

    Raises:
        Misuse: two arrays have the same path.
    """
    leaves = jax.tree.leaves_with_path(params)
    named = {_path(keys): np.ascontiguousarray(leaf) for keys, leaf in leaves}
    if len(named) < len(leaves):
        paths = [_path(keys) for keys, _ in leaves]
        repeated = {path for path in paths if paths.count(path) > 1}
        raise Misuse(
            "task.params",
            got=f"more than one array called {shorten(repeated)}",
            expected="a name for each array",
            do=f"rename keys that contain {SEPARATOR!r}",
        )
    return named


def with_tensors(params: PyTree, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """``params`` with its arrays taken from ``tensors``, as ``named_tensors`` called them.

    >>> saved = named_tensors({"w": [np.ones(2)]})
    >>> with_tensors({"w": [np.zeros(2)]}, saved)
    {'w': [array([1., 1.])]}
    """
    return jax.tree.map_with_path(lambda keys, _: tensors[_path(keys)], params)


def _path(keys: tuple[object, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR)


def _folder_of(store: PathLike, run: object) -> Path:
    choice_of("run", str(run), open_store(store)["run"].values.astype(str).tolist())
    folder = Path(store) / CHECKPOINTS / str(run)
    if not folder.is_dir():
        raise Misuse(
            f"checkpoints of run {run} in {store}",
            got="none",
            expected="weights that were saved while recording",
            do="record(..., evaluation=Evaluation(checkpoints=5)) saves five a run",
        )
    return folder


def _read(path: Path) -> dict[str, np.ndarray]:
    do = "record the run again or restore the store from a copy"
    with readable(path, SafetensorError, OSError, expected="a whole safetensors file", do=do):
        return load_file(path)
