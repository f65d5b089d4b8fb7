"""Runs in the layout of GPTDynamics, the recordings of GPTfluence (arXiv 2404.07840).

A folder per run with two files of JSON lines, as the authors' public code writes and reads them:
``train_samples_id.json`` has ``{"step": 1, "samples_id": [17, 4, 9, 3]}`` for each update, and
``all_loss_trajectory.out`` has ``{"id": 0, "loss_trajectory": [{"step": 1, "loss": 0.7}, ...]}``
for each query, where the loss of a step is the one after its update.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from warnings import warn

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, RunsWarning, named, positive_integer, shorten
from bayes_simfluence.conventions import COMPLETE, DIVERGED, EMPTY_SLOT, Curricula
from bayes_simfluence.data.columns import sorted_ids, typed_ids
from bayes_simfluence.data.runs import Ids, runs_from_arrays
from bayes_simfluence.data.tabular import utf8_text
from bayes_simfluence.files import existing_file, first_line

BATCHES: Final = "train_samples_id.json"
LOSSES: Final = "all_loss_trajectory.out"
CONFIG: Final = "config.json"
SETTINGS: Final = ("batch_size", "eval_steps")
FIELDS: Final = ("step", "loss")


@dataclass(frozen=True)
class _Run:
    folder: Path
    batches: Mapping[int, tuple[str, ...]]
    losses: Mapping[str, Mapping[int, float]]
    batch_size: int | None
    diverged: bool


def is_gptdynamics(path: Path) -> bool:
    """Whether a folder is a run in this layout, or holds some."""
    return path.is_dir() and bool(_folders(path))


def read_gptdynamics(
    path: Path, *, train_ids: Ids | None = None, keep_diverged: bool = False
) -> xr.Dataset:
    """The runs of a folder of run folders, in the natural order of their names.

    The authors evaluate after each update and not before the first one. Where step 0 has no losses,
    the first step that has them becomes time 0 and the updates up to it are left out, with a
    warning. The batch size is ``bs-4`` in a folder's name, or ``batch_size`` in a ``config.json``
    in or beside it; ``eval_steps`` there says that losses are recorded every so many steps.
    ``train_samples_id.json`` may also be one JSON list: of batches, or of all examples one after
    the other, which needs the batch size.

    Args:
        path: the folder of the run folders, or one of these.
        train_ids: all examples in their order; those in some batch when omitted.
        keep_diverged: mark runs with a loss that is not finite instead of refusing them.

    Raises:
        Misuse: files that are missing or cannot be read; gaps and repeats of steps; larger batches
            than the batch size; runs of different length, queries or first evaluated step.
    """
    runs = [_read(folder, keep_diverged=keep_diverged) for folder in _folders(path)]
    if not runs:
        raise Misuse(
            str(path),
            got=f"no folder with {BATCHES}",
            expected=f"a folder per run with {BATCHES} and {LOSSES}",
            do="check the path, unpack the recordings first",
        )
    first, last = _common(runs)
    if first:
        warn(
            f"{path}: no losses before the first update; those after step {first} are taken as "
            "time 0, and the updates up to it are left out",
            RunsWarning,
            stacklevel=3,
        )
    queries = list(runs[0].losses)
    loss = np.full((len(runs), last - first + 1, len(queries)), np.nan)
    for place, run in enumerate(runs):
        for at, query in enumerate(queries):
            for step, value in run.losses[query].items():
                loss[place, step - first, at] = value
    used = [[run.batches[step] for step in range(first + 1, last + 1)] for run in runs]
    seen = {name for run in runs for ids in run.batches.values() for name in ids}
    train = sorted_ids(seen) if train_ids is None else np.asarray(train_ids)
    sizes = {run.batch_size for run in runs} - {None}
    return runs_from_arrays(
        batch=_indices(runs, used, train),
        loss=loss,
        train_ids=train,
        query_ids=typed_ids(queries),
        run_ids=[run.folder.absolute().name for run in runs],
        attrs={
            "imported_from": "gptdynamics",
            "first_step": first,
            **({"batch_size": sizes.pop()} if len(sizes) == 1 else {}),
        },
        missing=True,
        status=[DIVERGED if run.diverged else COMPLETE for run in runs],
    )


def _folders(path: Path) -> list[Path]:
    def natural(folder: Path) -> list[Any]:
        return [
            (part.isdecimal(), int(part) if part.isdecimal() else part, part)
            for part in re.split(r"(\d+)", folder.name)
        ]

    def is_run(folder: Path) -> bool:
        return (folder / BATCHES).is_file() or (folder / LOSSES).is_file()

    if is_run(path):
        return [path]
    return sorted(
        (folder for folder in path.iterdir() if folder.is_dir() and is_run(folder)), key=natural
    )


def _read(folder: Path, *, keep_diverged: bool) -> _Run:
    for name in (BATCHES, LOSSES):
        existing_file(
            folder / name,
            expected=f"{BATCHES} and {LOSSES} in each run's folder",
            do="restore it, or move the folder of this run away",
        )
    config = _config(folder)
    in_name = re.search(r"(?:^|[_-])bs-(\d+)(?:_|$)", folder.absolute().name)
    size = config.get("batch_size", int(in_name[1]) if in_name else None)
    batches = _batches(folder / BATCHES, size)
    losses = _losses(folder / LOSSES, keep_diverged=keep_diverged)
    steps = next(iter(losses.values()))
    every, top = config.get("eval_steps", 0), max(batches)
    if max(steps) > top:
        raise Misuse(
            f"{folder / LOSSES}, field 'step'",
            got=f"{max(steps)}",
            expected=f"steps up to {top}, the last one in {BATCHES}",
            do="complete that file, or cut the losses",
        )
    gaps = [step for step in range(every, top + 1, every) if step not in steps] if every else []
    if gaps:
        raise Misuse(
            f"{folder / LOSSES}, field 'step'",
            got=f"no losses at steps {shorten(gaps)}",
            expected=f"losses every {every} steps, as {CONFIG} says in eval_steps",
            do="evaluate these steps, or correct eval_steps or leave it out",
        )
    diverged = any(not math.isfinite(loss) for row in losses.values() for loss in row.values())
    return _Run(folder, batches, losses, size, diverged)


def _config(folder: Path) -> dict[str, int]:
    """Settings of a run from its folder, or of all runs from beside their folders."""
    for path in (folder / CONFIG, folder.absolute().parent / CONFIG):
        if path.is_file():
            try:
                settings = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise _unreadable(str(path), first_line(error), "one JSON object") from error
            settings = settings if isinstance(settings, dict) else {}
            return {
                name: positive_integer(f"{path}, field {name!r}", settings[name], do="correct it")
                for name in SETTINGS
                if name in settings
            }
    return {}


def _batches(path: Path, size: int | None) -> dict[int, tuple[str, ...]]:
    """Ids of the examples of each step."""
    batches: dict[int, tuple[str, ...]] = {}
    for where, step, ids in _batch_entries(path, size):
        if isinstance(step, bool) or not isinstance(step, int) or step != len(batches) + 1:
            raise Misuse(
                f"{where}, field 'step'",
                got=f"{step!r}",
                expected=f"{len(batches) + 1}, steps in order from 1 without gaps or repeats",
                do="restore the missing lines and remove repeated ones",
            )
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            raise Misuse(
                f"{where}, field 'samples_id'",
                got=shorten([ids]),
                expected="a list of ids, whole numbers or text",
                do="correct it",
            )
        if size is not None and len(ids) > size:
            raise Misuse(
                f"{where}, field 'samples_id'",
                got=f"{len(ids)} ids",
                expected=f"at most {size}, the batch size by the folder's name or {CONFIG}",
                do="correct the batch size, or join the updates as they were made",
            )
        batches[step] = tuple(map(str, ids))
    if not batches:
        raise _unreadable(str(path), "no step", "a line for each update")
    return batches


def _batch_entries(path: Path, size: int | None) -> Iterator[tuple[str, Any, Any]]:
    """Place, step and ids of each entry: of JSON lines, or of one JSON list."""
    text = utf8_text(path)
    if not text.lstrip().startswith("["):
        for line, entry in _lines(path, text, ("step", "samples_id")):
            yield f"{path}, line {line}", entry["step"], entry["samples_id"]
        return
    try:
        listed = json.loads(text)
    except ValueError as error:
        raise _unreadable(str(path), first_line(error), "JSON lines, or one JSON list") from error
    if all(map(_is_id, listed)):
        if size is None:
            raise Misuse(
                str(path),
                got="one flat list of examples and no batch size",
                expected=f"'bs-4' in the folder's name, or batch_size in {CONFIG}",
                do=f'write {{"batch_size": 4}} to {path.with_name(CONFIG)}',
            )
        listed = [listed[at : at + size] for at in range(0, len(listed), size)]
    for place, ids in enumerate(listed, 1):
        yield f"{path}, entry {place}", place, ids


def _losses(path: Path, *, keep_diverged: bool) -> dict[str, dict[int, float]]:
    """Losses of each query by step; all queries at the same steps."""
    losses: dict[str, dict[int, float]] = {}
    steps: set[int] = set()
    for line, entry in _lines(path, utf8_text(path), ("id", "loss_trajectory")):
        where, query = f"{path}, line {line}", str(entry["id"])
        if not _is_id(entry["id"]) or query in losses:
            raise Misuse(
                f"{where}, field 'id'",
                got=f"{entry['id']!r}" + (" again" if query in losses else ""),
                expected="a whole number or text, each query on one line",
                do="remove or correct the line",
            )
        row = _trajectory(where, entry["loss_trajectory"], keep_diverged=keep_diverged)
        steps = steps or set(row)
        if set(row) != steps:
            raise Misuse(
                f"{where}, field 'loss_trajectory'",
                got=f"other steps than the lines before: {shorten(sorted(set(row) ^ steps))} "
                "are in only one of them",
                expected="losses of all queries at the same steps",
                do="complete the losses, or remove the line or the steps",
            )
        losses[query] = row
    if not steps:
        raise _unreadable(str(path), "no loss", "a line for each query with its losses")
    return losses


def _trajectory(where: str, entries: Any, *, keep_diverged: bool) -> dict[int, float]:
    row: dict[int, float] = {}
    where = f"{where}, field 'loss_trajectory'"
    for place, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        values = map((entry if isinstance(entry, dict) else {}).get, FIELDS)
        step, loss = (None if isinstance(value, bool) else value for value in values)
        if not isinstance(step, int) or not isinstance(loss, int | float) or step < 0:
            raise Misuse(
                f"{where}, entry {place}",
                got=shorten([entry]),
                expected='{"step": a whole number, "loss": a number}',
                do="correct it",
            )
        if step in row:
            raise Misuse(
                f"{where}, entry {place}",
                got=f"step {step} again",
                expected="each step once",
                do="remove the repeated entry",
            )
        if not math.isfinite(loss) and not keep_diverged:
            raise Misuse(
                f"{where}, entry {place}",
                got=f"a loss of {loss} at step {step}",
                expected="finite losses",
                do="move the folder of this run away, or keep it marked with keep_diverged=True",
            )
        row[step] = float(loss)
    return row


def _common(runs: list[_Run]) -> tuple[int, int]:
    """First evaluated and last step, the same in all runs, as their queries are."""
    first, last = _ends(runs[0])
    for run in runs:
        begin, end = _ends(run)
        other = shorten(sorted(set(run.losses) ^ set(runs[0].losses)))
        for wrong, name, got, expected in (
            (begin != first, LOSSES, f"losses from step {begin}", f"losses from step {first}"),
            (end != last, BATCHES, f"steps up to {end}", f"steps up to {last}"),
            (other != "", LOSSES, f"queries {other} in only one of two runs", "the same queries"),
        ):
            if wrong:
                raise Misuse(
                    str(run.folder / name),
                    got=got,
                    expected=f"{expected}, as in {runs[0].folder.name}",
                    do="make them equal, or move the folder of this run away",
                )
    if first == last:
        raise Misuse(
            f"{runs[0].folder / LOSSES}, field 'step'",
            got=f"losses at step {last} alone",
            expected="losses at two steps or more",
            do="evaluate the queries more often",
        )
    return first, last


def _ends(run: _Run) -> tuple[int, int]:
    """First step with losses, last step."""
    return min(next(iter(run.losses.values()))), max(run.batches)


def _indices(runs: list[_Run], used: list[list[tuple[str, ...]]], train: np.ndarray) -> Curricula:
    width = max(1, *(len(ids) for batches in used for ids in batches))
    batch = np.full((len(used), len(used[0]), width), EMPTY_SLOT, np.int32)
    for place, (run, steps) in enumerate(zip(runs, used, strict=True)):
        for at, ids in enumerate(steps):
            what = f"{run.folder / BATCHES}, field 'samples_id'"
            batch[place, at, : len(ids)] = named(what, ids, train)
    return batch


def _lines(path: Path, text: str, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of lines, with their numbers; blank lines are left out."""
    # Line feeds alone end a line: JSON allows Unicode's other ends of lines inside a text.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            entry = json.loads(content)
        except ValueError as error:
            raise _unreadable(f"{path}, line {line}", first_line(error), "JSON") from error
        missing = [name for name in fields if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise Misuse(
                f"{path}, line {line}",
                got=f"no field {shorten(missing)}",
                expected=f"an object with {shorten(fields)}",
                do="correct the line",
            )
        yield line, entry


def _unreadable(where: str, got: str, expected: str) -> Misuse:
    return Misuse(where, got=got, expected=expected, do="write the file again")


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
