"""The stages of a cell. Each does what is not done yet and leaves files behind."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from bayes_simfluence.attribution.score_files import load_scores, save_scores
from bayes_simfluence.attribution.simulators import additive_simulator
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.compare import FAILED, Compared, Failed, compare
from bayes_simfluence.posterior.posterior import Posterior, load_posterior
from bayes_simfluence.progress import Progress
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.optimizers import optimizer_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.session import record_from_config
from bayes_simfluence.recording.text import curricula_of, task_of
from bayes_simfluence.report.tables import save_table
from bayes_simfluence.study.cell import Cell, Split
from bayes_simfluence.study.config import ALL
from bayes_simfluence.study.jobs import outcome_of, run_job
from bayes_simfluence.study.methods import ATTRIBUTIONS, BAYES, SIMULATORS, Fitting, Pilot

__all__ = ["STAGES", "Stage"]

Stage = Callable[[Cell, bool, Progress], None]
"""Takes a cell, whether to do again what failed, and whom to tell."""


def _record(cell: Cell, retry: bool, progress: Progress) -> None:
    """Every run of the cell, unless it takes those of another recording."""
    if not cell.config.runs and cell.config.record and not cell.recorded(cell.store):
        record_from_config(cell.config.record, cell.store, resume=True, progress=progress)
    cell.split(max(cell.study.counts))


def _checkpoints(cell: Cell, retry: bool, progress: Progress) -> None:
    """The pilot run once more, now with its weights on the way.

    Training is deterministic, so that this is the run whose losses are recorded.
    """
    config = cell.config.record
    if config is None or not cell.attributions or cell.recorded(cell.pilot):
        return
    task, batch = task_of(config), curricula_of(config)[[cell.study.protocol.pilot]]
    runs = cell.runs
    same = (
        np.array_equal(runs["batch"].values[cell.study.protocol.pilot], batch[0])
        and [str(one) for one in runs["train"].values] == [str(one) for one in task.train_ids]
        and [str(one) for one in runs["query"].values] == [str(one) for one in task.query_ids]
    )
    if not same:
        raise Misuse(
            f"cell {cell.config.name!r}: record",
            got="settings that draw other examples, queries or batches than the runs have",
            expected=f"the settings of {cell.config.runs or cell.store}",
            do="copy them from the YAML file beside the recording",
        )
    record(
        task,
        batch,
        optimizer_of(config),
        store=cell.pilot,
        evaluate_every=config.steps,
        checkpoints=_count(cell, config),
        accumulate=config.accumulate,
        remat=config.remat,
        resume=True,
        progress=progress,
    )


def _attribute(cell: Cell, retry: bool, progress: Progress) -> None:
    """The scores of every attribution."""
    known = {name: outcome_of(cell.scores(name)) for name in cell.attributions}
    todo = [name for name, one in known.items() if one is None or (retry and one.failed)]
    config = cell.config.record
    pilot = _pilot(cell, config, progress) if todo and config else None
    with progress.work(f"{cell.config.name}: attribute", len(todo)) as meter:
        for name in todo:
            run_job(cell.scores(name), partial(_scored, cell, name, pilot), retry=retry)
            meter.advance(1, name)


def _fit(cell: Cell, retry: bool, progress: Progress) -> None:
    """Every simulator at every number of runs, those of scores among them."""
    names = [*cell.simulators, *cell.attributions]
    total = len(names) * len(cell.study.counts)
    with progress.work(f"{cell.config.name}: fit", total) as meter:
        for count in cell.study.counts:
            # Outside of the jobs: runs that are not there are no failure of a method.
            split = cell.split(count)
            for name in names:
                if not _unscored(cell, name):
                    work = partial(_fitted, cell, name, count, split, progress)
                    run_job(cell.fit(name, count), work, retry=retry)
                meter.advance(1, f"{name}, {count} runs")


def _compare(cell: Cell, retry: bool, progress: Progress) -> None:
    """A table for every number of runs, with a row also for what failed."""
    known = cell.tables()
    for count in cell.study.counts:
        methods = {
            name: _method(cell, name, count) for name in (*cell.simulators, *cell.attributions)
        }
        failed = {name for name, one in methods.items() if isinstance(one, Failed)}
        table = known.get(count)
        if table is not None and _up_to_date(table, list(methods), failed):
            continue
        found = compare(
            methods,
            cell.split(count).held_out,
            key=cell.key("compare"),
            draws=cell.study.protocol.draws,
            resamples=cell.study.protocol.resamples,
            reference=BAYES if BAYES in methods else None,
            progress=progress,
        )
        save_table(found, cell.table(count), overwrite=True)


STAGES: dict[str, Stage] = {
    "record": _record,
    "checkpoints": _checkpoints,
    "attribute": _attribute,
    "fit": _fit,
    "compare": _compare,
}
"""In order; a report of the whole study follows."""


def _count(cell: Cell, config: RecordConfig) -> int:
    said = cell.study.protocol.checkpoints
    return config.steps if said == ALL else int(said)


def _pilot(cell: Cell, config: RecordConfig, progress: Progress) -> Pilot:
    if not cell.recorded(cell.pilot):
        raise Misuse(
            f"cell {cell.config.name!r}",
            got="no weights of the pilot run",
            expected=f"a complete store {cell.pilot}",
            do="run the stage checkpoints",
        )
    task, key = task_of(config), cell.key("pilot")
    return Pilot(task, cell.pilot, config.steps, config.batch_size, key, progress)


def _scored(cell: Cell, name: str, pilot: Pilot | None) -> Path:
    if pilot is None:
        raise Misuse(
            f"cell {cell.config.name!r}",
            got="runs without the settings that recorded them",
            expected="record: {...}, to make their task of",
            do="add these settings and say --retry, or leave the methods out (methods: [])",
        )
    return save_scores(ATTRIBUTIONS[name](pilot), cell.scores(name), overwrite=True)


def _fitted(cell: Cell, name: str, count: int, split: Split, progress: Progress) -> Path:
    if name in SIMULATORS:
        some = Fitting(split.fitted, split.validation, cell.key(f"{name}/{count}"), progress)
        posterior: Posterior = SIMULATORS[name](some)
    else:
        posterior = additive_simulator(load_scores(cell.scores(name)), split.fitted)
    return posterior.save(cell.fit(name, count), overwrite=True)


def _unscored(cell: Cell, name: str) -> str:
    """Why a method has no scores; empty when it has, or needs none."""
    if name in SIMULATORS:
        return ""
    outcome = outcome_of(cell.scores(name))
    return "its scores were not computed" if outcome is None else outcome.failed


def _up_to_date(table: pd.DataFrame, methods: list[str], failed: set[str]) -> bool:
    """Whether a table has these methods, and a reason for these and no others."""
    said = {str(name) for name, one in table.iterrows() if one.get(FAILED, "")}
    return list(table.index) == methods and said == failed


def _method(cell: Cell, name: str, count: int) -> Compared:
    path = cell.fit(name, count)
    outcome = outcome_of(path)
    reason = _unscored(cell, name) or ("it was not fitted" if outcome is None else outcome.failed)
    return Failed(reason) if reason else partial(load_posterior, path)
