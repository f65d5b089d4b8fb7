"""Runs as one ``xarray.Dataset``: recorded ones, planned ones, and those a fit can use."""

from collections.abc import Mapping, Sequence
from typing import Any
from warnings import warn

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, RunsWarning, shorten
from bayes_simfluence.conventions import (
    COMPLETE,
    DIVERGED,
    KIND,
    OF_TRAINING,
    SCHEMA_VERSION,
    UNRECORDED,
    VARIABLES,
)
from bayes_simfluence.data.starts import with_starts
from bayes_simfluence.data.twins import with_twins
from bayes_simfluence.data.validation import check_later_losses, refuse_losses, validate_runs
from bayes_simfluence.data.weights import checked_weights, for_each_slot

Ids = Sequence[Any] | np.ndarray


def runs_from_arrays(
    *,
    batch: Any,
    loss: Any,
    weight: Any = None,
    train_loss: Any = None,
    train_residual: Any = None,
    step_size: Any = None,
    train_ids: Ids | None = None,
    query_ids: Ids | None = None,
    run_ids: Ids | None = None,
    train_feature: Any = None,
    query_feature: Any = None,
    curriculum: Any = None,
    start: Any = None,
    twin: Any = None,
    attrs: Mapping[str, Any] | None = None,
    keep_diverged: bool = False,
    missing: bool = False,
    status: Any = None,
) -> xr.Dataset:
    """Recorded runs from plain arrays, validated.

    Args:
        batch: indices into ``train``, ``(run, step, slot)``, -1 = empty slot.
        loss: nats, ``(run, time, query)`` with one more time than steps; time 0 is before any
            update.
        weight: of the example in each slot, ``(run, step, slot)``, finite and >= 0; all 1 when
            omitted. Only the weights within a batch relative to one another matter: an example's
            share in the mean loss of its batch is its weight over their sum.
        train_loss: nats, of the example in each slot just before the update, ``(run, step,
            slot)``; NaN in empty slots and throughout a run of which it is not known.
        train_residual: share of the target's probability that is missing just before the update,
            of the same shape, in [0, 1] and NaN likewise; where it is known apart from the loss.
        step_size: learning rate of each step, ``(run, step)``, ``(step,)`` or one number.
        train_ids, query_ids, run_ids: stable ids; positions when omitted.
        train_feature, query_feature: gradient features ``(train, feature)`` and
            ``(query, feature)``, as made by ``recording.features``; the default model's prior
            uses them.
        curriculum: a word for how each run's curriculum was made, ``(run,)``, as a design has them.
        start: number of the initial weights that each run started from, ``(run,)``, 0 = the first;
            where not all runs started from the same ones (``data.starts``).
        twin: id of the run whose curriculum each run repeats, its own where it repeats none,
            ``(run,)``; for curricula that were trained more than once (``data.twins``).
        attrs: provenance (model, optimizer, ...), kept with the runs.
        keep_diverged: mark runs with a NaN or infinite loss as diverged (fits leave them out)
            instead of refusing them.
        missing: NaN means "not recorded at this time", as in a loss recorded every k steps or a
            run that was stopped; then only infinite losses are diverged. Every loss at time 0 is
            needed, and at least one later loss of every query in some run.
        status: how each run ended, ``(run,)``, as the values of ``conventions``; when omitted, its
            losses decide.

    Raises:
        Misuse: shapes that do not fit, runs of different length, indices out of range, a weight
            that is negative or not finite, a batch of examples without weight, train losses or
            residuals that do not fit their batches, twins of other curricula, a loss that is not
            finite, or under ``missing`` one that is needed.

    >>> runs = runs_from_arrays(batch=[[[0, 1], [1, -1]]], loss=[[[0.7], [0.6], [0.5]]])
    >>> dict(runs.sizes)
    {'run': 1, 'step': 2, 'slot': 2, 'time': 3, 'query': 1, 'train': 2}
    >>> last = [[[0.7], [float("nan")], [0.5]]]
    >>> runs = runs_from_arrays(batch=[[[0, 1], [1, -1]]], loss=last, missing=True)
    """
    batch = _rectangular("batch", batch, 3, np.int32)
    loss = _rectangular("loss", loss, 3, None)
    runs, steps, _ = batch.shape
    if loss.shape[:2] != (runs, steps + 1):
        raise Misuse(
            "loss",
            got=f"shape {loss.shape}",
            expected=f"({runs} runs, {steps + 1} times, queries), one time more than steps",
            do="record the loss before the first update too",
        )
    if train_ids is None:
        train_ids = np.arange(max(int(batch.max()) + 1, 1))
    variables = {
        "batch": batch,
        "loss": loss,
        "status": _statuses(loss, status, keep_diverged=keep_diverged, missing=missing),
    }
    for name, feature in (("train_feature", train_feature), ("query_feature", query_feature)):
        if feature is not None:
            variables[name] = np.asarray(feature, dtype=np.float32)
    for name, values in zip(OF_TRAINING, (train_loss, train_residual), strict=True):
        if values is not None:
            do = "fill empty slots with NaN, and runs of which it is not known"
            variables[name] = for_each_slot(name, values, batch, do=do)
    dataset = runs_dataset(
        variables,
        weight=weight,
        step_size=step_size,
        ids={
            "run": ids_of("run_ids", run_ids, runs),
            "train": np.asarray(train_ids),
            "query": ids_of("query_ids", query_ids, loss.shape[2]),
        },
        attrs=dict(attrs or {}),
    )
    if curriculum is not None:
        dataset = with_kinds(dataset, curriculum)
    if start is not None:
        dataset = with_starts(dataset, start)
    if twin is not None:
        dataset = with_twins(dataset, twin)
    if not missing:
        refuse_losses(
            dataset,
            np.isnan(loss),
            expected="finite losses",
            do="pass missing=True where NaN means not recorded, leave the run out, or keep it "
            "marked with keep_diverged=True",
        )
    validate_runs(dataset)
    check_later_losses(dataset)
    return dataset


def planned_runs(
    like: xr.Dataset,
    batch: Any,
    *,
    weight: Any = None,
    step_size: Any = None,
    run_ids: Ids | None = None,
) -> xr.Dataset:
    """Runs that were never recorded: curricula to be simulated, in the schema of ``like``.

    They have no train losses or residuals: those of ``like`` belong to its own curricula.

    Args:
        like: recorded runs; the initial losses, examples and queries are theirs.
        batch: curricula, ``(run, step, slot)`` or ``(step, slot)`` for one.
        weight: of the example in each slot, in the shape of ``batch``; all 1 when omitted.
        step_size: learning rates, ``(run, step)``, ``(step,)`` or one number; those of the first
            run of ``like`` when omitted and the number of steps is the same.

    >>> runs = runs_from_arrays(batch=[[[0, 1], [1, -1]]], loss=[[[0.7], [0.6], [0.5]]])
    >>> planned_runs(runs, [[1, -1], [0, -1]])["loss"].values[0, :, 0]
    array([0.7, nan, nan], dtype=float32)
    """
    batch = np.asarray(batch)
    if batch.ndim == 2:
        batch, weight = batch[None], None if weight is None else [weight]
    batch = _rectangular("batch", batch, 3, np.int32)
    runs, steps, _ = batch.shape
    loss = np.full((runs, steps + 1, like.sizes["query"]), np.nan, np.float32)
    loss[:, 0] = like["loss"].values[0, 0]
    if step_size is None and "step_size" in like and like.sizes["step"] == steps:
        step_size = like["step_size"].values[0]
    variables = {"batch": batch, "loss": loss, "status": np.full(runs, UNRECORDED, np.int8)}
    planned = runs_dataset(
        variables,
        weight=weight,
        step_size=step_size,
        ids={
            "run": ids_of("run_ids", run_ids, runs),
            "train": like["train"].values,
            "query": like["query"].values,
        },
        attrs={},
    )
    return validate_runs(planned)


def run_statuses(loss: np.ndarray, *, missing: bool = False) -> np.ndarray:
    """``COMPLETE`` or ``DIVERGED`` for each run of ``loss (run, time, query)``.

    With ``missing``, NaN is a loss that was not recorded and only an infinite one diverged.
    """
    bad = np.isinf(loss) if missing else ~np.isfinite(loss)
    return np.where(bad.any(axis=(1, 2)), DIVERGED, COMPLETE).astype(np.int8)


def nothing_recorded(runs: xr.Dataset) -> bool:
    """Whether a valid dataset has no runs, or planned ones alone.

    >>> runs = runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]])
    >>> nothing_recorded(runs), nothing_recorded(runs.isel(run=slice(0, 0)))
    (False, True)
    >>> nothing_recorded(planned_runs(runs, [[[0, -1]]]))
    True
    """
    return bool((validate_runs(runs)["status"].values == UNRECORDED).all())


def usable_runs(runs: xr.Dataset) -> xr.Dataset:
    """The complete runs of a valid dataset; warns of those left out.

    Losses that were not recorded are NaN; a run without any after time 0 is left out too.

    Raises:
        Misuse: none is usable, or a query has no loss after time 0 in any of them.
    """
    status = validate_runs(runs)["status"].values
    later = np.isfinite(runs["loss"].values[:, 1:]).any(axis=(1, 2))
    for without, word in (
        (status == DIVERGED, "diverged to a non-finite loss"),
        (status == UNRECORDED, "not recorded"),
        ((status == COMPLETE) & ~later, "no loss after time 0"),
    ):
        left = runs["run"].values[without]
        if len(left):
            warn(f"{len(left)} runs left out, {word}: {shorten(left)}", RunsWarning, stacklevel=3)
    usable = runs.isel(run=np.flatnonzero((status == COMPLETE) & later))
    if usable.sizes["run"] == 0:
        raise Misuse("runs", got="no usable run", expected="at least one", do="record more runs")
    check_later_losses(usable)
    return usable


def runs_dataset(
    variables: Mapping[str, np.ndarray],
    *,
    weight: Any = None,
    step_size: Any = None,
    ids: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Runs in the schema of ``conventions``, not validated; ``step_size`` is broadcast to them."""
    runs, steps, _ = variables["batch"].shape
    if weight is not None:
        variables = {**variables, "weight": checked_weights(weight, variables["batch"])}
    if step_size is not None:
        sizes = np.asarray(step_size, dtype=np.float32)
        if sizes.shape not in ((), (steps,), (runs, steps)):
            raise Misuse(
                "step_size",
                got=f"shape {sizes.shape}",
                expected=f"({runs} runs, {steps} steps), ({steps} steps,) or one number",
                do="give one learning rate per step",
            )
        variables = {**variables, "step_size": np.broadcast_to(sizes, (runs, steps)).copy()}
    dataset = xr.Dataset(
        {name: (VARIABLES[name][0], value) for name, value in variables.items()},
        coords={**ids, "step": np.arange(1, steps + 1), "time": np.arange(steps + 1)},
        attrs={"schema_version": SCHEMA_VERSION, **attrs},
    )
    for name in variables:
        dataset[name].attrs.update(dict(VARIABLES[name][1]))
    return dataset


def _statuses(loss: np.ndarray, status: Any, *, keep_diverged: bool, missing: bool) -> np.ndarray:
    if status is None:
        statuses = run_statuses(loss, missing=missing)
        return statuses if keep_diverged else np.full(len(loss), COMPLETE, np.int8)
    statuses = np.asarray(status)
    known = (UNRECORDED, COMPLETE, DIVERGED)
    if statuses.shape != (len(loss),) or not np.isin(statuses, known).all():
        raise Misuse(
            "status",
            got=f"{shorten(statuses.ravel())} of shape {statuses.shape}",
            expected=f"one of {shorten(known)} for each of the {len(loss)} runs",
            do="see conventions, or leave it out",
        )
    return statuses.astype(np.int8)


def _rectangular(name: str, value: Any, ndim: int, dtype: Any) -> np.ndarray:
    dims = ", ".join(VARIABLES[name][0])
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray([], dtype=object)
    if array.dtype == object:
        raise Misuse(
            name,
            got="runs of different length",
            expected=f"one rectangular array ({dims})",
            do="pad batches with -1 and cut all runs to the same number of steps",
        )
    if array.ndim != ndim or 0 in array.shape:
        raise Misuse(
            name, got=f"shape {array.shape}", expected=f"({dims}), none empty", do="reshape it"
        )
    if dtype is np.int32 and not np.issubdtype(array.dtype, np.integer):
        raise Misuse(name, got=f"{array.dtype}", expected="integers", do="pass indices into train")
    if dtype is None and not np.issubdtype(array.dtype, np.floating):
        raise Misuse(name, got=f"{array.dtype}", expected="floats", do="pass losses in nats")
    return array.astype(dtype) if dtype is not None else array


def ids_of(what: str, ids: Ids | None, size: int) -> np.ndarray:
    """``ids`` as an array of ``size`` items, numbers from 0 when omitted."""
    array = np.arange(size) if ids is None else np.asarray(ids)
    if len(array) != size:
        raise Misuse(what, got=f"{len(array)} ids", expected=f"{size}", do="name every item once")
    return array


def with_kinds(runs: xr.Dataset, kinds: Any) -> xr.Dataset:
    """``runs`` with the kind of each run's curriculum as the coordinate ``curriculum``.

    Raises:
        Misuse: another number of kinds than runs, or kinds that are no text.
    """
    words = np.asarray(kinds)
    if words.shape != (runs.sizes["run"],) or words.dtype.kind != "U":
        raise Misuse(
            KIND,
            got=f"{words.dtype} of shape {words.shape}",
            expected=f"a text for each of {runs.sizes['run']} runs",
            do="pass the kinds of a design, or leave it out",
        )
    return runs.assign_coords({KIND: ("run", words)})


def same_ids(ids: Any, others: Any) -> bool:
    """Whether two lists of ids are the same, compared as text."""
    return np.array_equal(np.asarray(ids).astype(str), np.asarray(others).astype(str))
