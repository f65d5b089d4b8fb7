"""Recording runs: training and per-step evaluation of every query in one compiled program."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array, Float, Int, PyTree

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.conventions import EMPTY_SLOT, UNRECORDED, Curricula
from bayes_simfluence.data.store import create_store, open_runs, open_store, write_run
from bayes_simfluence.files import PathLike
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.features import Features
from bayes_simfluence.recording.task import Task

__all__ = ["record"]

StepSize = float | Callable[[Any], Any]
SEGMENT = 16
"""Most steps in one call of the compiled program: progress is reported between calls."""


class State(NamedTuple):
    """What training carries from step to step."""

    params: PyTree
    optimizer: PyTree


def record(
    task: Task,
    curricula: Curricula,
    optimizer: optax.GradientTransformation,
    *,
    store: PathLike,
    step_size: StepSize | None = None,
    parallel: int = 1,
    query_chunk: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    features: Features | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Train a run per curriculum from the task's weights; keep every query's loss at each time.

    A step takes the mean loss over the filled slots of its batch; an empty batch has a gradient of
    zero and the optimizer still moves. Each finished run is written to ``store`` at once; a run
    whose loss is not finite is kept and marked as diverged.

    Args:
        task: what is trained and measured.
        curricula: indices into ``task.train``, ``(run, step, slot)``, -1 = empty slot.
        optimizer: any optax transformation.
        store: path of the Zarr store.
        step_size: the optimizer's learning rate or schedule, to be recorded. Not needed when the
            optimizer was made by ``optax.inject_hyperparams``, whose state tells it.
        parallel: how many runs train at once by ``vmap`` (memory grows with it).
        query_chunk: evaluate this many queries at once, all when omitted.
        resume: continue a store of the same recording; finished runs are not touched.
        overwrite: replace a store that exists.
        features: gradient features of the task's examples, kept with the runs for the default
            model's prior; a resumed store keeps those it has.
        provenance: attributes for the store, beside the task's.
        progress: told of every few steps; silent when omitted.

    Returns:
        The recorded runs, as ``open_runs(store)``.

    Raises:
        Misuse: before any work, for whatever does not fit.
        WorkFailed: a run could not be written; the runs before it are safe.
    """
    curricula = _checked_curricula(task.validate(), curricula)
    size = min(positive_integer("parallel", parallel), len(curricula))
    tell = _step_size_reader(optimizer, task.params, step_size)
    attrs = {**task.provenance, **dict(provenance or {}), "versions": _versions(), "parallel": size}
    _prepare(store, task, curricula, attrs, features, resume=resume, overwrite=overwrite)
    pending = open_store(store)["status"].values == UNRECORDED
    evaluate = _evaluation(task, query_chunk)
    segment = _segment(task, optimizer, evaluate, tell, parallel=size)
    initial = np.asarray(jax.jit(evaluate)(task.params, task.frozen))
    with (progress or Silent()).work("record", int(pending.sum()) * curricula.shape[1]) as meter:
        for group in _groups(pending, size):
            members = [run for run in group if pending[run]]
            state = _start(task.params, optimizer, parallel=size)
            losses, sizes = [], []
            for steps in _segments(curricula[np.asarray(group)]):
                state, (loss, rate) = segment(state, task.frozen, steps)
                losses.append(np.asarray(loss))
                sizes.append(np.asarray(rate))
                meter.advance(
                    steps.shape[1] * len(members), f"mean query loss {losses[-1][:, -1].mean():.3f}"
                )
            loss, rate = np.concatenate(losses, axis=1), np.concatenate(sizes, axis=1)
            for run in members:
                place = group.index(run)
                write_run(store, run, np.concatenate([initial[None], loss[place]]), rate[place])
    return open_runs(store)


def _evaluation(
    task: Task, chunk: int | None
) -> Callable[[PyTree, PyTree], Float[Array, " query"]]:
    def evaluate(params: PyTree, frozen: PyTree) -> Float[Array, " query"]:
        weights = task.weights(params, frozen)

        def loss(example: PyTree) -> Float[Array, ""]:
            return task.loss(weights, example)

        if chunk is None or chunk >= len(task.query_ids):
            return jax.vmap(loss)(task.query)
        return jax.lax.map(loss, task.query, batch_size=chunk)

    return evaluate


def _segment(
    task: Task,
    optimizer: optax.GradientTransformation,
    evaluate: Callable[[PyTree, PyTree], Float[Array, " query"]],
    tell: Callable[[State, Int[Array, ""]], Float[Array, ""]],
    *,
    parallel: int,
) -> Callable[[Any, PyTree, Int[np.ndarray, "run step slot"]], Any]:
    """The compiled program: some steps of ``parallel`` runs, and all queries after each step."""

    def batch_loss(
        params: PyTree, frozen: PyTree, members: Int[Array, " slot"]
    ) -> Float[Array, ""]:
        filled = members != EMPTY_SLOT
        examples = jax.tree.map(lambda leaf: leaf[jnp.where(filled, members, 0)], task.train)
        losses = jax.vmap(task.loss, in_axes=(None, 0))(task.weights(params, frozen), examples)
        return jnp.where(filled, losses, 0.0).sum() / jnp.maximum(filled.sum(), 1)

    def step(frozen: PyTree, carry: tuple[State, Array], members: Int[Array, " slot"]) -> Any:
        state, count = carry
        gradient = jax.grad(batch_loss)(state.params, frozen, members)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        state = State(optax.apply_updates(state.params, updates), memory)
        return (state, count + 1), (evaluate(state.params, frozen), tell(state, count))

    def steps(carry: tuple[State, Array], frozen: PyTree, batches: Int[Array, "step slot"]) -> Any:
        return jax.lax.scan(partial(step, frozen), carry, batches)

    def alone(carry: Any, frozen: PyTree, batches: Int[Array, "1 step slot"]) -> Any:
        carry, kept = steps(carry, frozen, batches[0])
        return carry, jax.tree.map(lambda leaf: leaf[None], kept)

    together = jax.vmap(steps, in_axes=(0, None, 0))
    return jax.jit(alone if parallel == 1 else together, donate_argnums=0)


def _start(params: PyTree, optimizer: optax.GradientTransformation, *, parallel: int) -> Any:
    # Copies, because the program reuses the memory of the state it is handed.
    carry = (State(params, optimizer.init(params)), jnp.zeros((), jnp.int32))
    if parallel == 1:
        return jax.tree.map(jnp.array, carry)
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], parallel, axis=0), carry)


def _step_size_reader(
    optimizer: optax.GradientTransformation, params: PyTree, step_size: StepSize | None
) -> Callable[[State, Int[Array, ""]], Float[Array, ""]]:
    if step_size is not None:
        schedule = step_size if callable(step_size) else lambda count: step_size
        return lambda state, count: jnp.asarray(schedule(count), jnp.float32)

    def told(state: PyTree) -> Any:
        parts = jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "hyperparams"))
        rates = [getattr(part, "hyperparams", {}).get("learning_rate") for part in parts]
        return next((rate for rate in rates if rate is not None), None)

    if jax.eval_shape(lambda weights: told(optimizer.init(weights)), params) is None:
        raise Misuse(
            "step_size",
            got="nothing, and the optimizer's state does not tell it",
            expected="the learning rate or schedule of the optimizer",
            do="pass step_size=schedule, or make the optimizer with "
            "optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)",
        )
    return lambda state, count: jnp.asarray(told(state.optimizer), jnp.float32)


def _groups(pending: np.ndarray, size: int) -> Iterator[list[int]]:
    """Runs that train together, fixed by their number: a resumed run meets the same neighbours."""
    for first in range(0, len(pending), size):
        members = list(range(first, min(first + size, len(pending))))
        if pending[members].any():
            yield members + [members[-1]] * (size - len(members))


def _segments(curricula: Curricula) -> Iterator[Curricula]:
    """Equal pieces, so that one program serves them all."""
    steps = curricula.shape[1]
    length = next(one for one in range(min(SEGMENT, steps), 0, -1) if steps % one == 0)
    for first in range(0, steps, length):
        yield curricula[:, first : first + length]


def _checked_curricula(task: Task, curricula: Curricula) -> Curricula:
    curricula = np.asarray(curricula)
    if (
        curricula.ndim != 3
        or not np.issubdtype(curricula.dtype, np.integer)
        or 0 in curricula.shape
    ):
        raise Misuse(
            "curricula",
            got=f"{curricula.dtype} of shape {curricula.shape}",
            expected="integers (run, step, slot)",
            do="stack curricula of equal length with numpy.stack",
        )
    top = len(task.train_ids) - 1
    if curricula.min() < EMPTY_SLOT or curricula.max() > top:
        raise Misuse(
            "curricula",
            got=f"indices {curricula.min()}..{curricula.max()}",
            expected=f"-1 (empty slot) or 0..{top}",
            do="make the curricula for this task's examples",
        )
    return curricula.astype(np.int32)


def _prepare(
    store: PathLike,
    task: Task,
    curricula: Curricula,
    attrs: Mapping[str, Any],
    features: Features | None,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the store, or check that the one there belongs to this very recording."""
    if not (resume and Path(store).exists()):
        create_store(
            store,
            curricula=curricula,
            train_ids=task.train_ids,
            query_ids=task.query_ids,
            attrs=attrs,
            features=_as_variables(features),
            overwrite=overwrite,
        )
        return
    stored = open_store(store)
    same = {
        "curricula": np.array_equal(stored["batch"].values, curricula),
        "train ids": _same_ids(stored["train"], task.train_ids),
        "query ids": _same_ids(stored["query"], task.query_ids),
        **{name: stored.attrs.get(name) == value for name, value in attrs.items()},
    }
    other = [name for name, agrees in same.items() if not agrees]
    if other:
        raise Misuse(
            str(store),
            got=f"a recording with other {', '.join(other)}",
            expected="the recording that is to be resumed",
            do="repeat the settings it was started with, or record to a new path",
        )


def _as_variables(features: Features | None) -> dict[str, np.ndarray]:
    if features is None:
        return {}
    return {"train_feature": features.train, "query_feature": features.query}


def _same_ids(stored: xr.DataArray, ids: Any) -> bool:
    return stored.values.astype(str).tolist() == [str(one) for one in ids]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("bayes-simfluence", "jax", "optax", "numpy")}
