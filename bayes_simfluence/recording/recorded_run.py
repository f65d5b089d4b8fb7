"""One run of any training loop while it goes on: its batches, losses and step sizes, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from bayes_simfluence.checks import Misuse, of_shape, shorten
from bayes_simfluence.conventions import COMPLETE, DIVERGED, EMPTY_SLOT, OF_TRAINING
from bayes_simfluence.data.runs import runs_from_arrays
from bayes_simfluence.data.training import ROUNDING


@dataclass(frozen=True)
class Frame:
    """What the runs of one recording share; ``None`` = the first run decides.

    Attributes:
        train, query: ids of the examples and queries.
        places: position of each training example, by its id as text.
        by_position: whether whole numbers are positions, since no id reads as one.
        steps, slots: length of each run, most examples in a batch.
        sized: whether runs have step sizes.
    """

    train: np.ndarray
    query: np.ndarray
    places: Mapping[str, int]
    by_position: bool
    steps: int | None = None
    slots: int | None = None
    sized: bool | None = None

    def like(self, runs: xr.Dataset) -> "Frame":
        """With the length, the batches and the step sizes of recorded runs."""
        steps, slots = runs.sizes["step"], runs.sizes["slot"]
        return replace(self, steps=steps, slots=slots, sized="step_size" in runs)


class RecordedRun:
    """A run under way, which takes each of its steps; made by ``Recorder.run``."""

    def __init__(self, frame: Frame, initial: Float[np.ndarray, " query"], run_id: Any) -> None:
        self.run_id = run_id
        self._frame = frame
        self._losses = [initial]
        self._batches: list[Int[np.ndarray, " slot"]] = []
        self._weights: list[Float[np.ndarray, " slot"] | None] = []
        self._training: dict[str, list[Float[np.ndarray, " slot"] | None]] = {
            name: [] for name in OF_TRAINING
        }
        self._sizes: list[float | None] = []
        self._diverged = False
        self._over = False

    def step(
        self,
        batch_ids: Any,
        losses: Any = None,
        step_size: Any = None,
        weights: Any = None,
        *,
        train_losses: Any = None,
        train_residuals: Any = None,
    ) -> None:
        """One update: the examples of its batch, and every query's loss after it.

        Args:
            batch_ids: ids of the examples; ``None`` is an empty slot, and so is -1 where no id
                reads so. Where the ids are text and none reads as a number, whole numbers are
                positions in ``train_ids``.
            losses: nats, one per query in the order of ``query_ids``; ``None`` where they were not
                measured. A loss that is not finite marks the whole run as diverged.
            step_size: the optimizer's learning rate at this step; at all steps or at none.
            weights: of the examples in the batch's mean loss, in the order of ``batch_ids``,
                finite and >= 0; all alike when omitted. Only those of a batch relative to one
                another matter.
            train_losses: nats, of the examples in the batch, in the order of ``batch_ids``, at the
                weights before the update: what the training step has computed. NaN or ``None``
                for empty slots; at all steps of a run or at none. A loss that is NaN marks the
                whole run as diverged.
            train_residuals: likewise the share of each target's probability that is missing, in
                [0, 1], mean over target tokens. Of the cross-entropy of one label the losses say
                as much.

        Raises:
            Misuse: unknown ids, too large a batch, another number of losses, weights or residuals,
                residuals outside [0, 1] or beside a negative loss, a step after the end.
        """
        where = self._where(len(self._batches) + 1)
        batch = _positions(f"batch_ids {where}", batch_ids, self._frame)
        weight = None if weights is None else _weight_row(f"weights {where}", weights, batch)
        row = loss_row(f"losses {where}", losses, self._frame)
        size = self._size(where, step_size)
        slots = {
            name: self._of_slots(name, where, values, batch)
            for name, values in zip(OF_TRAINING, (train_losses, train_residuals), strict=True)
        }
        _fitting_residuals(where, *slots.values())
        counted = (batch != EMPTY_SLOT) & (True if weight is None else weight > 0)
        self._batches.append(batch)
        self._weights.append(weight)
        self._losses.append(row)
        self._sizes.append(size)
        for name, values in slots.items():
            self._training[name].append(values)
            self._diverged |= values is not None and bool(np.isnan(values[counted]).any())
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

    def _of_slots(
        self, name: str, where: str, values: Any, batch: Int[np.ndarray, " slot"]
    ) -> Float[np.ndarray, " slot"] | None:
        """Train losses or residuals of a batch's slots, as at the steps before: some or none."""
        what, before = f"{name.replace('loss', 'losse')}s {where}", self._training[name]
        if before and (before[0] is None) != (values is None):
            raise Misuse(
                what,
                got="nothing, but some before" if values is None else "some, but none before",
                expected="those of every step of a run, or of none",
                do="pass them at each step",
            )
        return None if values is None else _slot_row(what, values, batch)

    def end(self) -> None:
        """No further step."""
        self._over = True

    def recorded(self) -> xr.Dataset:
        """The run as a dataset of one run, checked.

        Raises:
            Misuse: fewer steps than the other runs, or none; a query whose later losses were
                never measured.
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
        width = self._frame.slots or max(1, *(len(members) for members in self._batches))
        batch = np.full((1, len(self._batches), width), EMPTY_SLOT, np.int32)
        weight = np.ones(batch.shape, np.float32)
        for step, (members, row) in enumerate(zip(self._batches, self._weights, strict=True)):
            batch[0, step, : len(members)] = members
            if row is not None:
                weight[0, step, : len(members)] = row
        training: dict[str, Any] = {
            name: _padded(rows, width)
            for name, rows in self._training.items()
            if rows[0] is not None
        }
        weighted = any(row is not None for row in self._weights)
        return runs_from_arrays(
            batch=batch,
            loss=np.stack(self._losses)[None],
            weight=weight if weighted else None,
            **training,
            step_size=None if self._sizes[0] is None else np.array([self._sizes]),
            train_ids=self._frame.train,
            query_ids=self._frame.query,
            run_ids=[self.run_id],
            missing=True,
            status=[DIVERGED if self._diverged else COMPLETE],
        )


def _padded(
    rows: list[Float[np.ndarray, " _"] | None], width: int
) -> Float[np.ndarray, "1 step {width}"]:
    """The slots of each step, NaN in those that its batch did not need."""
    padded = np.full((1, len(rows), width), np.nan, np.float32)
    for step, row in enumerate(rows):
        if row is not None:
            padded[0, step, : len(row)] = row
    return padded


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
    names = [name.item() if hasattr(name, "item") else name for name in listed]
    if frame.slots is not None and len(names) > frame.slots:
        raise Misuse(
            what,
            got=f"{len(names)} examples",
            expected=f"at most {frame.slots} slots",
            do="pass slots=... when the first run is recorded, as many as the largest batch has",
        )
    places = [_position(name, frame) for name in names]
    unknown = [name for name, place in zip(names, places, strict=True) if place is None]
    if unknown:
        raise Misuse(
            what,
            got=f"unknown ids {shorten(unknown)}",
            expected=f"ids among {shorten(frame.places)}",
            do="name the examples as train_ids does",
        )
    return np.array(places, np.int32)


def _position(name: Any, frame: Frame) -> int | None:
    whole = isinstance(name, int) and not isinstance(name, bool)
    if name is not None and str(name) in frame.places:
        return frame.places[str(name)]
    if name is None or (whole and name == EMPTY_SLOT):
        return EMPTY_SLOT
    return name if whole and frame.by_position and 0 <= name < len(frame.train) else None


def _weight_row(
    what: str, weights: Any, batch: Int[np.ndarray, " slot"]
) -> Float[np.ndarray, " slot"]:
    """Weights of a batch's slots, 0 in empty ones."""
    row = _array(what, weights)
    if row.shape != batch.shape or not np.isfinite(row).all() or (row < 0).any():
        raise Misuse(
            what,
            got=f"{shorten(row.ravel())} of shape {row.shape}",
            expected=f"a finite weight >= 0 for each of the {len(batch)} examples",
            do="pass them in the order of batch_ids",
        )
    row = np.where(batch == EMPTY_SLOT, np.float32(0), row)
    if (batch != EMPTY_SLOT).any() and not row.any():
        raise Misuse(
            what,
            got="weights that sum to 0",
            expected="a positive sum, since the batch has examples",
            do="give one of them a positive weight, or pass an empty batch",
        )
    return row


def _slot_row(
    what: str, values: Any, batch: Int[np.ndarray, " slot"]
) -> Float[np.ndarray, " slot"]:
    """Numbers of a batch's slots, NaN in empty ones."""
    row = _array(what, values)
    if row.shape != batch.shape or not np.isnan(row[batch == EMPTY_SLOT]).all():
        raise Misuse(
            what,
            got=f"{shorten(row.ravel())} of shape {row.shape}",
            expected=f"one number for each of the {len(batch)} slots, NaN for empty ones",
            do="pass them in the order of batch_ids",
        )
    return row


def _fitting_residuals(
    where: str,
    losses: Float[np.ndarray, " slot"] | None,
    residuals: Float[np.ndarray, " slot"] | None,
) -> None:
    """Raise unless residuals are shares, and losses beside them those of probabilities."""
    if residuals is None:
        return
    if ((residuals < -ROUNDING) | (residuals > 1 + ROUNDING)).any():
        raise Misuse(
            f"train_residuals {where}",
            got=shorten(residuals),
            expected="residuals in [0, 1]",
            do="pass the share of the target's probability that is missing: 1 - p",
        )
    if losses is not None and (losses < -ROUNDING).any():
        raise Misuse(
            f"train_losses {where}",
            got=shorten(losses),
            expected="losses >= 0 where residuals are given, -log of a probability",
            do="correct the losses, or leave the residuals out",
        )


def loss_row(what: str, losses: Any, frame: Frame) -> Float[np.ndarray, " query"]:
    """Losses as an array over queries; NaN where they were not measured."""
    if losses is None:
        return np.full(len(frame.query), np.nan, np.float32)
    do = "pass the losses in the order of query_ids, or None where they were not measured"
    return of_shape(what, _array(what, losses), (len(frame.query),), "one loss per query", do=do)


def _array(what: str, value: Any) -> Float[np.ndarray, "..."]:
    try:
        with np.errstate(over="ignore"):  # the caller decides what an infinite number means
            return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Misuse(
            what,
            got=f"{type(value).__name__} that is no array of numbers",
            expected="numbers",
            do="pass a list or array; detach tensors and move them to the CPU first",
        ) from error
