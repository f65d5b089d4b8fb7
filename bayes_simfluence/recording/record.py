"""Recording runs: training and per-step evaluation of every query, compiled together."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import xarray as xr
from jaxtyping import Bool, Int

from bayes_simfluence.checks import Misuse, at_most, hashable
from bayes_simfluence.conventions import EMPTY_SLOT, Curricula
from bayes_simfluence.data.claims import claimed
from bayes_simfluence.data.designs import Design
from bayes_simfluence.data.store import open_runs
from bayes_simfluence.data.weights import checked_weights
from bayes_simfluence.files import PathLike
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.compiled import Batches, Training
from bayes_simfluence.recording.features import Features, checked_features, features_key
from bayes_simfluence.recording.measure import fixed_of
from bayes_simfluence.recording.parallel import parallel_of
from bayes_simfluence.recording.plan import Plan, chosen_runs, units
from bayes_simfluence.recording.processes import Processes
from bayes_simfluence.recording.settings import Evaluation, Placement
from bayes_simfluence.recording.starts import Chosen, Starts
from bayes_simfluence.recording.step_sizes import StepSize, step_size_reader
from bayes_simfluence.recording.stored import StoredRecording
from bayes_simfluence.recording.train import Recording, record_together
from bayes_simfluence.tasks.task import Task


def record(
    task: Task,
    curricula: Curricula | Design,
    optimizer: optax.GradientTransformation,
    *,
    store: PathLike,
    step_size: StepSize | None = None,
    weights: Any = None,
    evaluation: Evaluation | None = None,
    placement: Placement | None = None,
    features: int | Features = 64,
    starts: Chosen = 1,
    twins: int = 0,
    key: jax.Array | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Train a run per curriculum from the task's weights; keep every query's loss at each time.

    A step takes the mean loss over the filled slots of its batch, weighted if there are
    ``weights``; an empty batch has a gradient of zero and the optimizer still moves. Each finished
    run is written to ``store`` at once; a run whose loss is not finite is kept and marked as
    diverged. Each step's own forward pass leaves the loss of every example in its batch, and for
    text the residual: ``train_loss`` and ``train_residual``, at the weights before the step.
    Further calls with the task's functions, the optimizer and arrays of the same shapes compile
    nothing.

    Args:
        task: what is trained and measured; its metrics are recorded beside the loss.
        curricula: indices into ``task.train``, ``(run, step, slot)``, -1 = empty slot; or a design
            (``bs.designs``), whose kinds are kept as the coordinate ``curriculum`` of ``run``
            where not all are random.
        optimizer: any optax transformation.
        store: path of the Zarr store.
        step_size: the optimizer's learning rate or schedule, to be recorded. Not needed when the
            optimizer was made by ``optax.inject_hyperparams``, whose state holds it.
        weights: of the example in each slot of ``curricula``, finite and >= 0, in its shape; all
            alike when omitted. Only those of a batch relative to one another matter.
        evaluation: what is measured and saved on the way, and how often; when omitted the queries
            after every step.
        placement: how many runs train at once, how to save memory, and which runs are recorded
            here; when omitted all, one after the other.
        features: how many gradient features of the task's examples are made at the initial
            weights and kept with the runs for the default model's prior (at most one for each
            training example), 0 = none; or features made before. A resumed store keeps what it
            has.
        starts: how many initial weights the curricula take turns with, the task's own first, or the
            number of each one's start, 0 = the task's own. Others are drawn by ``task.fresh`` (of
            tasks with a classification head that trains: a fresh head), and the coordinate
            ``start`` of ``run`` says which run had which.
        twins: how many of the curricula, the last ones, are trained a second time, from weights
            that are each moved by one or two units in the last place, up or down. These runs come
            after all others, and the coordinate ``twin`` of ``run`` names the run that each run
            repeats. What twins differ by is the floor of any simulator
            (``evaluation.floor.floor``), and ``compare`` shows each MSE over it.
        key: decides the random signs of features that are made here, other starts, and which way
            twins' weights move. When omitted it is that of the command's seed 0
            (``recording.features.features_key()``), the same in every recording.
        provenance: attributes for the store, beside the task's.
        resume: continue a store of the same recording; finished runs are not touched.
        overwrite: replace a store that exists.
        progress: advanced every few steps; silent when omitted.

    Returns:
        The recorded runs, as ``open_runs(store)``.

    Raises:
        Misuse: before any training, for whatever does not fit, a loss without a finite gradient
            where features are made, twins of weights that are all 0, other starts of a task that
            cannot draw them, and runs that another process records right now.
        WorkFailed: a run could not be written; the runs before it are safe.
    """
    curricula, kinds = _curricula_and_kinds(curricula)
    curricula = _checked_curricula(task.validate(), curricula)
    weights = None if weights is None else checked_weights(weights, curricula)
    evaluation, placement = evaluation or Evaluation(), placement or Placement()
    key = features_key() if key is None else key
    begun = Starts.of(task, len(curricula), starts, twins, key)
    curricula, weights, kinds = _with_twins(begun, curricula, weights, kinds)
    total, steps, slots = curricula.shape
    plan = Plan(steps, evaluation).validate()
    accumulate, do = placement.validate().accumulate, "split a batch into fewer parts"
    at_most("accumulate", accumulate, slots, "slots of a batch", do=do)
    training = Training(
        task.functions,
        hashable("optimizer", optimizer),
        step_size_reader(optimizer, task.params, step_size, steps),
        placement.compiled,
        weighted=weights is not None,
        always=bool(plan.looks.all()),
    )
    attrs = {**task.provenance, **(provenance or {}), **asdict(evaluation), **placement.kept}
    features = checked_features(task, features)
    batches = Batches(curricula, weights)
    stored = StoredRecording(store, task, batches, kinds, begun, attrs, features, key)
    recording = Recording(training, plan, stored)
    chosen, processes = chosen_runs(placement.only, total), Processes.here(placement.distributed)
    at_once = partial(
        parallel_of,
        placement.parallel,
        runs=total,
        devices=jax.local_devices(),
        shared=fixed_of(task),
        alone=partial(recording.compiled, 1, jax.local_devices()[:1]),
    )
    progress = progress or Silent()
    prepare = partial(stored.prepare, at_once, resume=resume, overwrite=overwrite)
    processes.once(partial(prepare, progress=progress))
    _record_share(recording, chosen, processes, progress)
    processes.wait()
    return open_runs(store)


def _record_share(
    recording: Recording, chosen: Bool[np.ndarray, " run"], processes: Processes, progress: Progress
) -> None:
    """Record this process's share of the ``chosen`` runs, unless they are recorded already."""
    stored, total = recording.stored, len(chosen)
    groups = [group for group in units(total, stored.parallel) if chosen[group].any()]
    mine = processes.share(groups)
    wanted = np.zeros(total, bool)
    wanted[[run for group in mine for run in group]] = True
    wanted &= chosen
    with claimed(stored.path, np.flatnonzero(wanted & stored.unrecorded).tolist()) as claims:
        # Some may have been finished by others before they were claimed.
        wanted &= stored.unrecorded
        pending = [group for group in mine if wanted[group].any()]
        if pending:
            record_together(recording, pending, wanted, written=claims.release, progress=progress)


def _with_twins(
    starts: Starts, curricula: Curricula, weights: Any, kinds: tuple[str, ...]
) -> tuple[Int[np.ndarray, "all step slot"], Any, tuple[str, ...]]:
    """All runs' curricula, weights and kinds, those of twins after the others."""
    repeated = starts.repeated
    return (
        curricula[repeated],
        None if weights is None else weights[repeated],
        tuple(kinds[run] for run in repeated) if kinds else (),
    )


def _curricula_and_kinds(given: Curricula | Design) -> tuple[Curricula, tuple[str, ...]]:
    """The curricula, and their kinds where these say anything."""
    if not isinstance(given, Design):
        return given, ()
    if len(given.kinds) != len(given.curricula):
        raise Misuse(
            "curricula",
            got=f"a design of {len(given.curricula)} curricula and {len(given.kinds)} kinds",
            expected="one kind for each curriculum",
            do="take the same runs of both",
        )
    return given.curricula, () if set(given.kinds) == {"random"} else tuple(given.kinds)


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
