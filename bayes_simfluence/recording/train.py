"""Runs trained by compiled steps and written to their store, a few at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.checks import of_shape
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.data.store import write_run
from bayes_simfluence.data.training import whole_or_nothing
from bayes_simfluence.progress import Meter, Progress
from bayes_simfluence.recording.checkpoints import new_checkpoints, write_weights
from bayes_simfluence.recording.compiled import (
    Batches,
    Carry,
    CompiledSteps,
    Measured,
    Training,
    kept_of,
)
from bayes_simfluence.recording.measure import Fixed, fixed_of
from bayes_simfluence.recording.plan import Plan
from bayes_simfluence.recording.stored import StoredRecording
from bayes_simfluence.tasks.task import Task

Queries = dict[str, Float[np.ndarray, " query"]]


@dataclass(frozen=True)
class Recording:
    """One recording: how a task is trained, when it is measured, and the store that keeps it."""

    training: Training
    plan: Plan
    stored: StoredRecording

    def compiled(self, parallel: int, devices: list[jax.Device]) -> CompiledSteps:
        """Its steps, compiled for ``parallel`` runs at once on each of ``devices``."""
        return CompiledSteps.of(
            self.training,
            self.stored.task,
            self.stored.batches.members.shape[-1],
            steps=self.plan.longest,
            parallel=parallel,
            devices=devices,
        )


def record_together(
    recording: Recording,
    groups: list[list[int]],
    wanted: Bool[np.ndarray, " run"],
    *,
    written: Callable[[int], None],
    progress: Progress,
) -> None:
    """Train the runs of ``groups``, one group on each device at once, and write those ``wanted``.

    Args:
        written: called with each run that is safe.

    Raises:
        Misuse: a score that is not one number for each query.
        WorkFailed: a run could not be written; those before it are safe.
    """
    compiled = recording.compiled(len(groups[0]), jax.local_devices()[: len(groups)])
    begin = _Begin(recording.stored, compiled)
    fixed = compiled.place(fixed_of(recording.stored.task))
    label = "record" if compiled.runs == 1 else f"record, {compiled.runs} at once"
    total, done = int(wanted.sum()), 0
    with progress.work(label, total * recording.plan.steps) as meter:
        for members in _loads(groups, compiled.runs):
            places = {run: members.index(run) for run in members if wanted[run]}
            notes = _Notes(meter, len(places), f"{done} of {total} runs")
            for run in _train(recording, compiled, fixed, begin, members, places, notes):
                written(run)
            done += len(places)


class _Begin:
    """Where runs begin: their first weights, and what is measured of the queries with them."""

    def __init__(self, stored: StoredRecording, compiled: CompiledSteps) -> None:
        self._stored, self._compiled = stored, compiled
        self._fixed = fixed_of(stored.task)
        self._first = self._measured(stored.task.params)

    def __call__(self, members: list[int]) -> tuple[Carry, list[Queries]]:
        """Of each of ``members``, in order."""
        starts, task = self._stored.starts, self._stored.task
        if not any(starts.moved(run) for run in members):
            return self._compiled.begin(task.params), [self._first] * len(members)
        each = {run: starts.params(run, task) for run in members}
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each[run] for run in members))
        first = {
            run: self._measured(own) if starts.moved(run) else self._first
            for run, own in each.items()
        }
        return self._compiled.begin_each(stacked), [first[run] for run in members]

    def _measured(self, params: PyTree) -> Queries:
        measured = self._compiled.measure(params, self._fixed)
        rows = {name: np.asarray(row) for name, row in measured.items()}
        return rows | _scores(self._stored.task, params)


class _Notes:
    """Advances a meter by steps; its note is the last mean loss that was measured."""

    def __init__(self, meter: Meter, runs: int, done: str) -> None:
        self._meter, self._runs, self._done, self._loss = meter, runs, done, ""

    def __call__(self, loss: Float[np.ndarray, "run time query"]) -> None:
        seen = loss[:, ~np.isnan(loss).all(axis=(0, 2))]
        if seen.size:
            self._loss = f"mean query loss {seen[:, -1].mean():.3f}, "
        self._meter.advance(loss.shape[1] * self._runs, self._loss + self._done)


def _train(
    recording: Recording,
    compiled: CompiledSteps,
    fixed: Fixed,
    begin: _Begin,
    members: list[int],
    places: dict[int, int],
    notes: _Notes,
) -> Iterator[int]:
    """Train ``members``; when all have ended, write those with ``places`` and yield each."""
    task, plan, stored = recording.stored.task, recording.plan, recording.stored
    batches = jax.tree.map(lambda leaf: leaf[members], stored.batches)
    rates = np.full((len(members), plan.steps), np.nan, np.float32)
    kept = {name: np.full(batches.members.shape, np.nan, np.float32) for name in kept_of(task)}
    shape = (len(members), plan.steps + 1, len(task.query_ids))
    carry, before = begin(members)
    values = {name: np.full(shape, np.nan, np.float32) for name in before[0]}
    for name, rows in values.items():
        rows[:, 0] = [queries[name] for queries in before]
    saved = new_checkpoints(stored.path, list(places) if plan.saved else [])
    with saved as folders:
        behind = None
        at_stop = _Stops(task, plan, values, places, folders)
        for first, last in plan.stretches(at_stop.times):
            at_stop(first, carry.params)
            now = slice(first, last)
            stretch = _padded(batches, plan.looks, now, compiled.steps)
            carry, measured = compiled.advance(carry, fixed, *stretch)
            # What the last call left is read while this one computes.
            if behind is not None:
                _keep(*behind, values, kept, rates, notes)
            behind = now, measured
        if behind is not None:
            _keep(*behind, values, kept, rates, notes)
        at_stop(plan.steps, carry.params)
    loss = values.pop("loss")
    for run, place in places.items():
        counted = np.asarray(batches.filled[place])
        write_run(
            stored.path,
            run,
            loss[place],
            rates[place],
            metrics={name: rows[place] for name, rows in values.items()},
            training={name: whole_or_nothing(rows[place], counted) for name, rows in kept.items()},
            times=plan.times,
        )
        yield run


def _keep(
    now: slice,
    measured: Measured,
    values: dict[str, Float[np.ndarray, "run time query"]],
    kept: dict[str, Float[np.ndarray, "run step slot"]],
    rates: Float[np.ndarray, "run step"],
    notes: _Notes,
) -> None:
    count, times = now.stop - now.start, slice(now.start + 1, now.stop + 1)
    rates[:, now] = np.asarray(measured.step_size)[:, :count]
    for name, rows in measured.queries.items():
        values[name][:, times] = np.asarray(rows)[:, :count]
    for name, slots in measured.training.items():
        kept[name][:, now] = np.asarray(slots)[:, :count]
    notes(values["loss"][:, times])


@dataclass(frozen=True)
class _Stops:
    """What is done with the weights of each run at some times: scores, checkpoints."""

    task: Task
    plan: Plan
    values: dict[str, Float[np.ndarray, "run time query"]]
    places: dict[int, int]
    folders: dict[int, Path]

    @property
    def times(self) -> list[int]:
        scored = self.plan.score_times if self.task.scores else []
        return sorted({*scored, *self.plan.saved})

    def __call__(self, time: int, params: PyTree) -> None:
        scored = bool(self.task.scores) and time > 0 and time in self.plan.score_times
        last = time == self.plan.steps
        for run, place in self.places.items():
            if not (scored or time in self.plan.saved or (last and self.folders)):
                continue
            mine = _of_run(params, place)
            if scored:
                for name, row in _scores(self.task, mine).items():
                    self.values[name][place, time] = row
            if time in self.plan.saved:
                write_weights(self.folders[run], self.plan.saved[time], mine)
            if last and self.folders:
                write_weights(self.folders[run], None, mine)


@jax.jit
def _slice(params: PyTree, place: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[place], params)


def _of_run(params: PyTree, place: int) -> PyTree:
    """A copy of one run's weights on one device; the next steps use up the memory of all runs'."""
    return jax.device_put(_slice(params, np.int32(place)), jax.local_devices()[0])


def _scores(task: Task, params: PyTree) -> Queries:
    if not task.scores:
        return {}
    weights = task.weights(params, task.frozen)
    shape, do = (len(task.query_ids),), "return an array in the order of task.query_ids"
    return {
        name: of_shape(
            f"task.scores[{name!r}]",
            np.asarray(score(weights), np.float32),
            shape,
            "one number for each query",
            do=do,
        )
        for name, score in task.scores.items()
    }


def _loads(groups: list[list[int]], runs: int) -> Iterator[list[int]]:
    """Runs of a call of the compiled steps: a group for each device, the last group repeated."""
    size = len(groups[0])
    for first in range(0, len(groups), runs // size):
        some = groups[first : first + runs // size]
        filled = some + [some[-1]] * (runs // size - len(some))
        yield [run for group in filled for run in group]


def _padded(
    batches: Batches, looks: Bool[np.ndarray, " step"], now: slice, steps: int
) -> tuple[Any, ...]:
    """The compiled steps' arguments for a stretch that may be shorter than their longest."""
    count = now.stop - now.start
    missing = ((0, 0), (0, steps - count), (0, 0))
    weight = batches.weight
    return (
        Batches(
            np.pad(batches.members[:, now], missing, constant_values=EMPTY_SLOT),
            None if weight is None else np.pad(weight[:, now], missing),
        ),
        np.pad(looks[now], (0, steps - count)),
        np.int32(count),
    )
