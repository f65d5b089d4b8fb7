"""Recording runs: training and per-step evaluation of every query in one compiled program."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import xarray as xr
from jaxtyping import Bool

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.conventions import EMPTY_SLOT, UNRECORDED, Curricula
from bayes_simfluence.data.claims import alone_in, claimed
from bayes_simfluence.data.metrics import check_metric_name
from bayes_simfluence.data.store import create_store, open_runs, open_store, stored_statuses
from bayes_simfluence.files import PathLike, new_path
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.features import Features
from bayes_simfluence.recording.parallel import Parallel, devices_for, parallel_of
from bayes_simfluence.recording.plan import Choice, Plan, chosen_runs, units
from bayes_simfluence.recording.processes import Processes
from bayes_simfluence.recording.program import Program, Training, fixed_of
from bayes_simfluence.recording.step_sizes import StepSize, step_size_reader
from bayes_simfluence.recording.train import Recording, record_together
from bayes_simfluence.tasks.task import Task

__all__ = ["record"]


def record(
    task: Task,
    curricula: Curricula,
    optimizer: optax.GradientTransformation,
    *,
    store: PathLike,
    step_size: StepSize | None = None,
    evaluate_every: int = 1,
    scores_every: int = 0,
    checkpoints: int = 0,
    accumulate: int = 1,
    remat: bool = False,
    parallel: Parallel = 1,
    query_chunk: int | None = None,
    runs: Choice = None,
    distributed: bool | None = None,
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
        task: what is trained and measured; its metrics are recorded beside the loss.
        curricula: indices into ``task.train``, ``(run, step, slot)``, -1 = empty slot.
        optimizer: any optax transformation.
        store: path of the Zarr store.
        step_size: the optimizer's learning rate or schedule, to be recorded. Not needed when the
            optimizer was made by ``optax.inject_hyperparams``, whose state tells it.
        evaluate_every: measure the queries after every so many steps, and after the last one.
        scores_every: compute the task's scores after every so many steps; 0 = only before the
            first step and after the last.
        checkpoints: weights that each run saves on its way, for ``open_checkpoints``.
        accumulate: parts that a batch is split into, whose gradients are added up (less memory).
        remat: compute activations again in the backward pass: less memory and more time on a GPU,
            no difference on a CPU, whose compiler undoes it.
        parallel: how many runs train at once on each device, by ``vmap`` (memory grows with it);
            ``"auto"`` chooses by memory. The last bits of the losses depend on it.
        query_chunk: evaluate this many queries at once, all when omitted.
        runs: record only these, by number; other processes record the others into the same store
            (with ``resume``, so that whoever comes first makes it).
        distributed: share the runs among the processes of ``jax.distributed``; when omitted, if
            there are several.
        resume: continue a store of the same recording; finished runs are not touched.
        overwrite: replace a store that exists.
        features: gradient features of the task's examples, kept with the runs for the default
            model's prior; a resumed store keeps those it has.
        provenance: attributes for the store, beside the task's.
        progress: told of every few steps; silent when omitted.

    Returns:
        The recorded runs, as ``open_runs(store)``.

    Raises:
        Misuse: before any work, for whatever does not fit, and for runs that another process
            records right now.
        WorkFailed: a run could not be written; the runs before it are safe.
    """
    curricula = _checked_curricula(task.validate(), curricula)
    total, steps, slots = curricula.shape
    plan = Plan(steps, evaluate_every, scores_every, checkpoints).validate()
    training = Training(
        task,
        optimizer,
        step_size_reader(optimizer, task.params, step_size, steps),
        query_chunk,
        _parts(accumulate, slots),
        remat,
        always=bool(plan.looks.all()),
    )
    chosen, processes = chosen_runs(runs, total), Processes.here(distributed)
    program = partial(Program.of, training, slots, steps=plan.longest)
    attrs = {
        **task.provenance,
        **dict(provenance or {}),
        "versions": _versions(),
        "evaluate_every": evaluate_every,
        "scores_every": scores_every,
        "checkpoints": checkpoints,
        "accumulate": accumulate,
        "remat": remat,
    }

    def prepare() -> None:
        begun = open_store(store) if resume and Path(store).exists() else None
        at_once = parallel_of(
            parallel,
            runs=total,
            devices=jax.local_devices(),
            stored=None if begun is None else begun.attrs.get("parallel"),
            shared=fixed_of(task),
            alone=partial(program, parallel=1, devices=jax.local_devices()[:1]),
        )
        said = {**attrs, "parallel": at_once}
        if begun is None:
            _create(store, task, curricula, said, features, overwrite=overwrite)
        else:
            _same_recording(store, begun, task, curricula, said)

    def prepare_alone() -> None:
        if not (resume and Path(store).exists()):
            new_path(store, overwrite=overwrite)
        with alone_in(Path(store).absolute().parent):
            prepare()

    processes.once(prepare_alone)
    size = int(open_store(store).attrs["parallel"])
    mine = processes.share([unit for unit in units(total, size) if chosen[unit].any()])
    wanted = chosen & _members(mine, total)
    with claimed(store, np.flatnonzero(wanted & _unrecorded(store)).tolist()) as claims:
        # Some may have been finished by others before they were claimed.
        wanted &= _unrecorded(store)
        pending = [unit for unit in mine if wanted[unit].any()]
        if pending:
            devices = devices_for(len(pending))
            recording = Recording(
                task, curricula, plan, store, wanted, claims.release, training.query_chunk
            )
            record_together(
                recording,
                pending,
                partial(program, parallel=size, devices=devices),
                progress or Silent(),
            )
    processes.wait()
    return open_runs(store)


def _create(
    store: PathLike,
    task: Task,
    curricula: Curricula,
    attrs: Mapping[str, Any],
    features: Features | None,
    *,
    overwrite: bool,
) -> None:
    kept = {"train_feature": features.train, "query_feature": features.query} if features else {}
    create_store(
        store,
        curricula=curricula,
        train_ids=task.train_ids,
        query_ids=task.query_ids,
        attrs=attrs,
        features=kept,
        metrics=[check_metric_name(one) for one in (*task.metrics, *task.scores)],
        overwrite=overwrite,
    )


def _same_recording(
    store: PathLike,
    stored: xr.Dataset,
    task: Task,
    curricula: Curricula,
    attrs: Mapping[str, Any],
) -> None:
    """Raise unless the store belongs to this very recording."""
    same = {
        "curricula": np.array_equal(stored["batch"].values, curricula),
        "train ids": _same_ids(stored["train"], task.train_ids),
        "query ids": _same_ids(stored["query"], task.query_ids),
        **{f"metric {one}": one in stored for one in (*task.metrics, *task.scores)},
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
    largest = int((curricula != EMPTY_SLOT).sum(axis=2).max())
    if largest > len(task.train_ids):
        raise Misuse(
            "curricula",
            got=f"a batch of {largest} examples",
            expected=f"at most the task's {len(task.train_ids)} training examples",
            do="make smaller batches, or give the task more examples",
        )
    return curricula.astype(np.int32)


def _parts(accumulate: int, slots: int) -> int:
    if positive_integer("accumulate", accumulate) > slots:
        raise Misuse(
            "accumulate",
            got=accumulate,
            expected=f"at most the {slots} slots of a batch",
            do="split a batch into fewer parts",
        )
    return accumulate


def _members(groups: Sequence[Sequence[int]], total: int) -> Bool[np.ndarray, " run"]:
    found = np.zeros(total, bool)
    found[[run for group in groups for run in group]] = True
    return found


def _unrecorded(store: PathLike) -> Bool[np.ndarray, " run"]:
    return stored_statuses(store) == UNRECORDED


def _same_ids(stored: xr.DataArray, ids: Any) -> bool:
    return stored.values.astype(str).tolist() == [str(one) for one in ids]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("bayes-simfluence", "jax", "optax", "numpy")}
