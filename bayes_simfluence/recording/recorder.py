"""Recording of any training loop, which reports each step's examples and the losses after it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, positive_integer, shorten
from bayes_simfluence.data.runs import Ids, same_ids
from bayes_simfluence.data.store import append_runs, open_store, save_runs
from bayes_simfluence.files import PathLike, new_path, old_path
from bayes_simfluence.recording.recorded_run import Frame, RecordedRun, loss_row


class Recorder:
    """Writes the runs of any training loop, one by one, into a store that ``open_runs`` reads.

    A run is written when its ``with`` block ends well, all or nothing: an exception in it, or a
    killed process, leaves the runs before it as they were and this one out. All runs have the same
    number of steps and start from the same weights. How many there will be need not be known;
    each one rewrites the store, which is small beside the training.

    Args:
        path: the Zarr store.
        train_ids, query_ids: stable ids of all examples, or their number ``n`` for ``0..n-1``.
        steps: updates of each run; those of the first one when omitted.
        slots: most examples in a batch; those of the first run when omitted.
        initial_loss: every query's loss before the first update, nats; for all runs that bring
            none of their own.
        run_id: of the one run that ``Recorder.step`` records; its number when omitted.
        append: add to the store if it exists.
        overwrite: replace a store that exists, as soon as the first run is finished.
        provenance: attributes of the store: model, optimizer, seed, ...

    Raises:
        Misuse: a store that exists and neither ``append`` nor ``overwrite``; repeated ids; a store
            of other examples or queries.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/runs.zarr"
    >>> with Recorder(path, train_ids=["a", "b", "c"], query_ids=["q"]) as recorder:
    ...     for order in (["a", "b"], ["c", "a"]):
    ...         with recorder.run(initial_loss=[0.7]) as run:
    ...             for example in order:
    ...                 run.step([example], losses=[0.5], step_size=0.1)
    >>> open_store(path)["batch"].values[:, :, 0].tolist()
    [[0, 1], [2, 0]]
    """

    def __init__(
        self,
        path: PathLike,
        *,
        train_ids: Ids | int,
        query_ids: Ids | int,
        steps: int | None = None,
        slots: int | None = None,
        initial_loss: Any = None,
        run_id: str | int | None = None,
        append: bool = False,
        overwrite: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if append and overwrite:
            raise Misuse(
                "append, overwrite", got="both", expected="at most one", do="choose one of them"
            )
        aside = old_path(path)
        if append and not new_path(path, overwrite=True).exists() and aside.exists():
            # A writer was killed while it put a longer store in the place of this one.
            aside.rename(path)
        self._path = new_path(path, overwrite=append or overwrite)
        self._overwrite, self._provenance = overwrite, dict(provenance or {})
        train = _ids("train_ids", train_ids)
        self._frame = Frame(
            train,
            _ids("query_ids", query_ids),
            {str(name): place for place, name in enumerate(train)},
            not any(str(name).removeprefix("-").isdecimal() for name in train),
            None if steps is None else positive_integer("steps", steps),
            None if slots is None else positive_integer("slots", slots),
        )
        self._run_ids: list[str | int] = []
        if append and self._path.exists():
            self._go_on(open_store(self._path))
        self._initial = None if initial_loss is None else self._initial_row(initial_loss)
        self._run_id = run_id
        self._current: RecordedRun | None = None
        self._entered = False

    def __enter__(self) -> "Recorder":
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        current, self._current, self._entered = self._current, None, False
        if kind is None and current is not None:
            self._write(current)

    @contextmanager
    def run(
        self, initial_loss: Any = None, run_id: str | int | None = None
    ) -> Iterator[RecordedRun]:
        """One run: what happens in the block; written when it ends without an exception.

        Args:
            initial_loss: every query's loss before the first update; the recorder's when omitted.
            run_id: stable id of the run; its number when omitted.

        Raises:
            Misuse: losses that do not fit, an id that was used, a run within a run.
        """
        self._current = run = self._begin(initial_loss, run_id)
        try:
            yield run
        finally:
            self._current = None
            run.end()
        self._write(run)

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
        """As ``RecordedRun.step``, where the whole block of the recorder is one run.

        Raises:
            Misuse: beside a ``run``, outside the recorder's ``with`` block, without
                ``initial_loss``.
        """
        if not self._entered:
            raise Misuse(
                "recorder.step",
                got="a recorder that was not entered, or is over",
                expected="steps within its with block, at whose end the run is written",
                do="write: with Recorder(...) as recorder",
            )
        if self._current is None:
            self._current = self._begin(None, self._run_id)
        self._current.step(
            batch_ids,
            losses,
            step_size,
            weights,
            train_losses=train_losses,
            train_residuals=train_residuals,
        )

    def _go_on(self, stored: xr.Dataset) -> None:
        """Take the frame of a store that holds runs already."""
        for name, ids in (("train", self._frame.train), ("query", self._frame.query)):
            if not same_ids(stored[name], ids):
                raise Misuse(
                    f"{name}_ids",
                    got="other ids than the store's",
                    expected=f"the {stored.sizes[name]} ids of {self._path}, in their order",
                    do="record these runs into a store of their own",
                )
        for name, size in (("step", self._frame.steps), ("slot", self._frame.slots)):
            if size not in (None, stored.sizes[name]):
                raise Misuse(
                    f"{name}s",
                    got=size,
                    expected=f"{stored.sizes[name]}, as in {self._path}",
                    do="leave it out, or record these runs into a store of their own",
                )
        self._frame = self._frame.like(stored)
        self._run_ids = stored["run"].values.tolist()

    def _begin(self, initial_loss: Any, run_id: str | int | None) -> RecordedRun:
        if self._current is not None:
            raise Misuse(
                "recorder.run",
                got=f"another run within run {self._current.run_id}",
                expected="one run after the other",
                do="end that one first; a recorder whose step was called is one run itself",
            )
        initial = self._initial if initial_loss is None else self._initial_row(initial_loss)
        if initial is None:
            raise Misuse(
                "initial_loss",
                got="nothing",
                expected=f"{len(self._frame.query)} losses before the first update",
                do="pass initial_loss=... to Recorder or to its run",
            )
        return RecordedRun(self._frame, initial, self._new_id(run_id))

    def _new_id(self, run_id: str | int | None) -> str | int:
        used = {str(name) for name in self._run_ids}
        text = bool(self._run_ids) and isinstance(self._run_ids[0], str)
        if run_id is None:
            candidates = range(len(used), 2 * len(used) + 1)
            number = next(number for number in candidates if str(number) not in used)
            return str(number) if text else number
        if str(run_id) in used:
            raise Misuse(
                "run_id", got=f"{run_id} again", expected="each run once", do="give another id"
            )
        if self._run_ids and isinstance(run_id, str) != text:
            raise Misuse(
                "run_id",
                got=repr(run_id),
                expected="text" if text else "a whole number",
                do=f"name it as the runs before: {shorten(self._run_ids)}",
            )
        return run_id

    def _initial_row(self, initial_loss: Any) -> Float[np.ndarray, " query"]:
        row = loss_row("initial_loss", initial_loss, self._frame)
        if not np.isfinite(row).all():
            bad = self._frame.query[~np.isfinite(row)]
            raise Misuse(
                "initial_loss",
                got=f"{row[~np.isfinite(row)][0]} for queries {shorten(bad)}",
                expected="finite losses before the first update",
                do="evaluate every query once before training",
            )
        return row

    def _write(self, run: RecordedRun) -> None:
        recorded = run.recorded().assign_attrs(self._provenance)
        if self._run_ids:
            append_runs(recorded, self._path)
        else:
            save_runs(recorded, self._path, overwrite=self._overwrite)
        self._run_ids.append(run.run_id)
        self._frame = self._frame.like(recorded)


def _ids(what: str, ids: Ids | int) -> np.ndarray:
    if isinstance(ids, int | np.integer):
        return np.arange(positive_integer(what, ids))
    names = np.asarray(ids)
    _, counts = np.unique(names.astype(str), return_counts=True)
    if names.ndim != 1 or not len(names) or (counts > 1).any():
        raise Misuse(
            what,
            got=f"{len(names.ravel())} ids, {int((counts > 1).sum())} of them repeated",
            expected="a flat list with every id once",
            do="rename them, or pass their number",
        )
    return names
