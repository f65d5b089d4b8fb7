"""Runs trained by a compiled program and written to their store, a few at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT, Curricula
from bayes_simfluence.data.store import write_run
from bayes_simfluence.files import PathLike
from bayes_simfluence.progress import Meter, Progress
from bayes_simfluence.recording.checkpoints import new_checkpoints, write_weights
from bayes_simfluence.recording.plan import Plan
from bayes_simfluence.recording.program import Fixed, Measured, Program, fixed_of, measure_of
from bayes_simfluence.tasks.task import Task

__all__ = ["Recording", "record_together"]

Queries = dict[str, Float[np.ndarray, " query"]]


@dataclass(frozen=True)
class Recording:
    """What is recorded, and where.

    Attributes:
        wanted: the runs that this process records; others may train with them unrecorded.
        written: told of each run that is safe.
        query_chunk: queries measured at once, all when ``None``.
    """

    task: Task
    curricula: Curricula
    plan: Plan
    store: PathLike
    wanted: Bool[np.ndarray, " run"]
    written: Callable[[int], None]
    query_chunk: int | None = None


def record_together(
    recording: Recording,
    groups: list[list[int]],
    compiled: Callable[[], Program],
    progress: Progress,
) -> None:
    """Train the runs of ``groups``, one group on each device of the compiled program at once.

    Raises:
        Misuse: a score that is not one number for each query.
        WorkFailed: a run could not be written; those before it are safe.
    """
    task = recording.task
    fixed = fixed_of(task)
    measured = jax.jit(measure_of(task, recording.query_chunk))(task.params, fixed)
    initial = {name: np.asarray(one) for name, one in measured.items()}
    initial |= _scores(task, task.params)
    program = compiled()
    fixed = program.place(fixed)
    label = "record" if program.runs == 1 else f"record, {program.runs} at once"
    total, done = int(recording.wanted.sum()), 0
    with progress.work(label, total * recording.plan.steps) as meter:
        for members in _loads(groups, program.runs):
            places = {run: members.index(run) for run in members if recording.wanted[run]}
            teller = _Teller(meter, len(places), f"{done} of {total} runs")
            _train(recording, program, fixed, initial, members, places, teller)
            done += len(places)


class _Teller:
    """Tells a meter of steps, with the last mean loss that was measured."""

    def __init__(self, meter: Meter, runs: int, done: str) -> None:
        self._meter, self._runs, self._done, self._loss = meter, runs, done, ""

    def __call__(self, loss: Float[np.ndarray, "run time query"]) -> None:
        seen = loss[:, ~np.isnan(loss).all(axis=(0, 2))]
        if seen.size:
            self._loss = f"mean query loss {seen[:, -1].mean():.3f}, "
        self._meter.advance(loss.shape[1] * self._runs, self._loss + self._done)


def _train(
    recording: Recording,
    program: Program,
    fixed: Fixed,
    initial: Queries,
    members: list[int],
    places: dict[int, int],
    told: _Teller,
) -> None:
    """Train ``members``; those with ``places`` are written when all have ended."""
    task, plan = recording.task, recording.plan
    batches = recording.curricula[members]
    rates = np.full(batches.shape[:2], np.nan, np.float32)
    shape = (len(members), plan.steps + 1, len(task.query_ids))
    values = {name: np.full(shape, np.nan, np.float32) for name in initial}
    for name, one in initial.items():
        values[name][:, 0] = one
    saved = new_checkpoints(recording.store, list(places) if plan.checkpoints else [])
    with saved as folders:
        carry, behind = program.begin(task.params), None
        at_stop = _Stops(task, plan, values, places, folders)
        for first, last in plan.stretches(at_stop.times):
            at_stop(first, carry.params)
            now = slice(first, last)
            stretch = _padded(batches[:, now], plan.looks[now], program.steps)
            carry, measured = program.advance(carry, fixed, *stretch)
            # What the last call left is read while this one computes.
            if behind is not None:
                _keep(*behind, values, rates, told)
            behind = now, measured
        if behind is not None:
            _keep(*behind, values, rates, told)
        at_stop(plan.steps, carry.params)
    loss = values.pop("loss")
    for run, place in places.items():
        metrics = {name: one[place] for name, one in values.items()}
        write_run(
            recording.store, run, loss[place], rates[place], metrics=metrics, times=plan.times
        )
        recording.written(run)


def _keep(
    now: slice,
    measured: Measured,
    values: dict[str, Float[np.ndarray, "run time query"]],
    rates: Float[np.ndarray, "run step"],
    told: _Teller,
) -> None:
    count, times = now.stop - now.start, slice(now.start + 1, now.stop + 1)
    rates[:, now] = np.asarray(measured.step_size)[:, :count]
    for name, one in measured.queries.items():
        values[name][:, times] = np.asarray(one)[:, :count]
    told(values["loss"][:, times])


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
                for name, one in _scores(self.task, mine).items():
                    self.values[name][place, time] = one
            if time in self.plan.saved:
                write_weights(self.folders[run], self.plan.saved[time], mine)
            if last and self.folders:
                write_weights(self.folders[run], None, mine)


@jax.jit
def _slice(params: PyTree, place: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[place], params)


def _of_run(params: PyTree, place: int) -> PyTree:
    """A copy of one run's weights on one device; the program uses up the memory of all runs'."""
    return jax.device_put(_slice(params, np.int32(place)), jax.local_devices()[0])


def _scores(task: Task, params: PyTree) -> Queries:
    if not task.scores:
        return {}
    weights = task.weights(params, task.frozen)
    found = {name: np.asarray(score(weights), np.float32) for name, score in task.scores.items()}
    for name, one in found.items():
        if one.shape != (len(task.query_ids),):
            raise Misuse(
                f"task.scores[{name!r}]",
                got=f"shape {one.shape}",
                expected=f"one number for each of the {len(task.query_ids)} queries",
                do="return an array in the order of task.query_ids",
            )
    return found


def _loads(groups: list[list[int]], runs: int) -> Iterator[list[int]]:
    """Runs of one call of the program: a group for each device, the last one again if needed."""
    size = len(groups[0])
    for first in range(0, len(groups), runs // size):
        some = groups[first : first + runs // size]
        filled = some + [some[-1]] * (runs // size - len(some))
        yield [run for group in filled for run in group]


def _padded(
    batches: Int[np.ndarray, "run some slot"], looks: Bool[np.ndarray, " some"], steps: int
) -> tuple[Any, ...]:
    """The program's arguments for a stretch that may be shorter than its longest."""
    count = len(looks)
    empty = ((0, 0), (0, steps - count), (0, 0))
    return (
        np.pad(batches, empty, constant_values=EMPTY_SLOT),
        np.pad(looks, (0, steps - count)),
        np.int32(count),
    )
