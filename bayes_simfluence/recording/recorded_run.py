"""One run of any training loop while it goes on: its batches, losses and step sizes, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.conventions import COMPLETE, DIVERGED, EMPTY_SLOT
from bayes_simfluence.data.runs import runs_from_arrays

__all__ = ["Frame", "RecordedRun", "loss_row"]


@dataclass(frozen=True)
class Frame:
    """What the runs of one recording share; ``None`` = the first run decides.

    Attributes:
        train, query: ids of the examples and queries.
        places: position of each training example, by its id as text.
        by_position: whether whole numbers are positions, since no id reads as one.
        steps, slots: length of each run, most examples in a batch.
        sized: whether runs tell their step sizes.
    """

    train: np.ndarray
    query: np.ndarray
    places: Mapping[str, int]
    by_position: bool
    steps: int | None = None
    slots: int | None = None
    sized: bool | None = None


class RecordedRun:
    """One run under way, told of each step; made by ``Recorder.run``."""

    def __init__(self, frame: Frame, initial: Float[np.ndarray, " query"], run_id: Any) -> None:
        self.run_id = run_id
        self._frame = frame
        self._losses = [initial]
        self._batches: list[Int[np.ndarray, " slot"]] = []
        self._sizes: list[float | None] = []
        self._diverged = False
        self._over = False

    def step(self, batch_ids: Any, losses: Any = None, step_size: Any = None) -> None:
        """One update: the examples of its batch, and every query's loss after it.

        Args:
            batch_ids: ids of the examples; ``None`` is an empty slot, and so is -1 where no id
                reads so. Where the ids are text and none reads as a number, whole numbers are
                positions in ``train_ids``.
            losses: nats, one per query in the order of ``query_ids``; ``None`` where nobody
                looked. A loss that is not finite marks the whole run as diverged.
            step_size: the optimizer's learning rate at this step; at all steps or at none.

        Raises:
            Misuse: unknown ids, too large a batch, another number of losses, a step after the end.
        """
        where = self._where(len(self._batches) + 1)
        batch = _positions(f"batch_ids {where}", batch_ids, self._frame)
        row = loss_row(f"losses {where}", losses, self._frame)
        size = self._size(where, step_size)
        self._batches.append(batch)
        self._losses.append(row)
        self._sizes.append(size)
        self._diverged |= losses is not None and not bool(np.isfinite(row).all())

    def _where(self, step: int) -> str:
        where, steps = f"at step {step} of run {self.run_id}", self._frame.steps
        if self._over:
            raise Misuse(
                f"step {where}",
                got="a step after the run's end",
                expected="steps within the with block of the run",
                do="begin another run with recorder.run(...)",
            )
        if steps is not None and step > steps:
            raise Misuse(
                f"step {where}",
                got="one step more",
                expected=f"{steps} steps, as in every run of this recording",
                do="end the run, or record runs of another length into another store",
            )
        return where

    def _size(self, where: str, step_size: Any) -> float | None:
        sized = self._sizes[0] is not None if self._sizes else self._frame.sized
        if sized not in (None, step_size is not None):
            raise Misuse(
                f"step_size {where}",
                got="nothing" if step_size is None else f"{step_size}, but none before",
                expected="a step size at every step of every run, or at none",
                do="pass the learning rate of the optimizer at each step",
            )
        if step_size is None:
            return None
        size = _array(f"step_size {where}", step_size)
        if size.shape != () or not np.isfinite(size) or size < 0:
            raise Misuse(
                f"step_size {where}",
                got=f"{step_size}",
                expected="one finite number >= 0",
                do="pass the learning rate of the optimizer at this step",
            )
        return float(size)

    def end(self) -> None:
        """No further step."""
        self._over = True

    def recorded(self) -> xr.Dataset:
        """The run as a dataset of one run, checked.

        Raises:
            Misuse: fewer steps than the other runs, or none; a query whose later losses were
                never looked at.
        """
        self.end()
        expected = self._frame.steps
        if not self._batches or len(self._batches) < (expected or 0):
            raise Misuse(
                f"run {self.run_id}",
                got=f"{len(self._batches)} steps",
                expected=f"{expected or 'at least 1'}, as in every run of this recording",
                do="train it to the end; it was not written",
            )
        width = self._frame.slots or max(1, *(len(one) for one in self._batches))
        batch = np.full((1, len(self._batches), width), EMPTY_SLOT, np.int32)
        for place, members in enumerate(self._batches):
            batch[0, place, : len(members)] = members
        return runs_from_arrays(
            batch=batch,
            loss=np.stack(self._losses)[None],
            step_size=None if self._sizes[0] is None else np.array([self._sizes]),
            train_ids=self._frame.train,
            query_ids=self._frame.query,
            run_ids=[self.run_id],
            missing=True,
            status=[DIVERGED if self._diverged else COMPLETE],
        )


def _positions(what: str, batch_ids: Any, frame: Frame) -> Int[np.ndarray, " slot"]:
    """Positions of a batch's examples among the training examples; -1 for empty slots."""
    listed = batch_ids.tolist() if hasattr(batch_ids, "tolist") else batch_ids
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise Misuse(
            what,
            got=f"{type(batch_ids).__name__}",
            expected="a list of the examples' ids",
            do="pass a list, also of a single one",
        )
    names = [one.item() if hasattr(one, "item") else one for one in listed]
    if frame.slots is not None and len(names) > frame.slots:
        raise Misuse(
            what,
            got=f"{len(names)} examples",
            expected=f"at most {frame.slots} slots",
            do="pass slots=... when the first run is recorded, as many as the largest batch has",
        )
    found = [_position(one, frame) for one in names]
    unknown = [one for one, place in zip(names, found, strict=True) if place is None]
    if unknown:
        raise Misuse(
            what,
            got=f"unknown ids {shorten(unknown)}",
            expected=f"ids among {shorten(frame.places)}",
            do="name the examples as train_ids does",
        )
    return np.array(found, np.int32)


def _position(one: Any, frame: Frame) -> int | None:
    whole = isinstance(one, int) and not isinstance(one, bool)
    if one is not None and str(one) in frame.places:
        return frame.places[str(one)]
    if one is None or (whole and one == EMPTY_SLOT):
        return EMPTY_SLOT
    return one if whole and frame.by_position and 0 <= one < len(frame.train) else None


def loss_row(what: str, losses: Any, frame: Frame) -> Float[np.ndarray, " query"]:
    """Losses as an array over queries; NaN where nobody looked."""
    if losses is None:
        return np.full(len(frame.query), np.nan, np.float32)
    row = _array(what, losses)
    if row.shape != (len(frame.query),):
        raise Misuse(
            what,
            got=f"shape {row.shape}",
            expected=f"({len(frame.query)},), one loss per query",
            do="pass the losses in the order of query_ids, or None where nobody looked",
        )
    return row


def _array(what: str, value: Any) -> Float[np.ndarray, "..."]:
    try:
        with np.errstate(over="ignore"):  # an infinite loss is judged by whoever asked
            return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Misuse(
            what,
            got=f"{type(value).__name__} that is no array of numbers",
            expected="numbers",
            do="pass a list or array; detach tensors and move them to the CPU first",
        ) from error
