"""The stages of a cell. Each does the jobs that are not done yet; results are files."""

from collections.abc import Callable, Iterable, Mapping
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
from bayes_simfluence.recording.from_config import classes_of, design_of, optimizer_of, task_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.session import record_from_config
from bayes_simfluence.recording.settings import Evaluation
from bayes_simfluence.report.tables import save_table
from bayes_simfluence.study.cell import Cell, Split
from bayes_simfluence.study.config import ALL
from bayes_simfluence.study.jobs import outcome_of, run_job
from bayes_simfluence.study.methods import ATTRIBUTIONS, BAYES, SIMULATORS, Fitting, Pilot

Stage = Callable[[Cell, bool, Progress], None]
"""Takes a cell, whether to repeat failed jobs, and a progress."""


def _record(cell: Cell, retry: bool, progress: Progress) -> None:
    """Record every run of the cell, unless it uses an existing recording."""
    if not cell.config.runs and cell.config.record and not cell.recorded(cell.store):
        record_from_config(cell.config.record, cell.store, resume=True, progress=progress)
    cell.split(max(cell.study.counts))


def _checkpoints(cell: Cell, retry: bool, progress: Progress) -> None:
    """Train the pilot run once more and save its checkpoints.

    Training is deterministic, so this is the run whose losses are recorded.
    """
    config = cell.config.record
    if config is None or not cell.attributions or cell.recorded(cell.pilot):
        return
    task, runs = task_of(config), cell.runs
    features = runs["train_feature"].values if "train_feature" in runs else None
    design = design_of(config, labels=classes_of(config, task), features=features)
    batch = design.curricula[[cell.study.protocol.pilot]]
    same = (
        np.array_equal(runs["batch"].values[cell.study.protocol.pilot], batch[0])
        and _as_text(runs["train"].values) == _as_text(task.train_ids)
        and _as_text(runs["query"].values) == _as_text(task.query_ids)
    )
    if not same:
        raise Misuse(
            f"cell {cell.config.name!r}: record",
            got="settings that draw other examples, queries or batches than the runs have",
            expected=f"the settings of {cell.config.runs or cell.store}",
            do="copy them from the YAML file beside the recording",
        )
    checkpoints = cell.study.protocol.checkpoints
    count = config.steps if checkpoints == ALL else int(checkpoints)
    record(
        task,
        batch,
        optimizer_of(config),
        store=cell.pilot,
        evaluation=Evaluation(evaluate_every=config.steps, checkpoints=count),
        placement=config.placement,
        features=0,
        resume=True,
        progress=progress,
    )


def _attribute(cell: Cell, retry: bool, progress: Progress) -> None:
    """Compute the scores of every attribution."""
    known = {name: outcome_of(cell.scores(name)) for name in cell.attributions}
    todo = [name for name, job in known.items() if job is None or (retry and job.failed)]
    config = cell.config.record
    pilot = _pilot(cell, config, progress) if todo and config else None
    with progress.work(f"{cell.config.name}: attribute", len(todo)) as meter:
        for name in todo:
            run_job(cell.scores(name), partial(_scored, cell, name, pilot), retry=retry)
            meter.advance(1, name)


def _fit(cell: Cell, retry: bool, progress: Progress) -> None:
    """Fit every simulator, those made of scores included, to every number of runs."""
    names = [*cell.simulators, *cell.attributions]
    total = len(names) * len(cell.study.counts)
    with progress.work(f"{cell.config.name}: fit", total) as meter:
        for count in cell.study.counts:
            # Outside the jobs: missing runs are not the failure of a method.
            split = cell.split(count)
            for name in names:
                if not _unscored(cell, name):
                    work = partial(_fitted, cell, name, count, split, progress)
                    run_job(cell.fit(name, count), work, retry=retry)
                meter.advance(1, f"{name}, {count} runs")


def _compare(cell: Cell, retry: bool, progress: Progress) -> None:
    """Compare at every number of runs; methods that failed have a row too."""
    known = cell.tables()
    for count in cell.study.counts:
        reasons = {
            name: _unfitted(cell, name, count) for name in (*cell.simulators, *cell.attributions)
        }
        table = known.get(count)
        if table is not None and _up_to_date(table, reasons):
            continue
        methods: dict[str, Compared] = {
            name: Failed(reason) if reason else partial(load_posterior, cell.fit(name, count))
            for name, reason in reasons.items()
        }
        table = compare(
            methods,
            cell.split(count).held_out,
            key=cell.key("compare"),
            draws=cell.study.protocol.draws,
            resamples=cell.study.protocol.resamples,
            reference=BAYES if BAYES in methods else None,
            progress=progress,
        )
        save_table(table, cell.table(count), overwrite=True)


STAGES: dict[str, Stage] = {
    "record": _record,
    "checkpoints": _checkpoints,
    "attribute": _attribute,
    "fit": _fit,
    "compare": _compare,
}
"""In their order; the report of the whole study follows."""


def _as_text(ids: Iterable[object]) -> list[str]:
    return [str(name) for name in ids]


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
            expected="record: {...}, from which their task is made",
            do="add these settings and pass --retry, or leave the methods out (methods: [])",
        )
    return save_scores(ATTRIBUTIONS[name](pilot), cell.scores(name), overwrite=True)


def _fitted(cell: Cell, name: str, count: int, split: Split, progress: Progress) -> Path:
    if name in SIMULATORS:
        fitting = Fitting(split.fitted, split.validation, cell.key(f"{name}/{count}"), progress)
        posterior: Posterior = SIMULATORS[name](fitting)
    else:
        posterior = additive_simulator(load_scores(cell.scores(name)), split.fitted)
    return posterior.save(cell.fit(name, count), overwrite=True)


def _unscored(cell: Cell, name: str) -> str:
    """Why a method has no scores; empty when it has scores or needs none."""
    if name in SIMULATORS:
        return ""
    outcome = outcome_of(cell.scores(name))
    return "its scores were not computed" if outcome is None else outcome.failed


def _unfitted(cell: Cell, name: str, count: int) -> str:
    """Why a method has no fit to ``count`` runs; empty when it has one."""
    outcome = outcome_of(cell.fit(name, count))
    return _unscored(cell, name) or ("it was not fitted" if outcome is None else outcome.failed)


def _up_to_date(table: pd.DataFrame, reasons: Mapping[str, str]) -> bool:
    """Whether a table has these methods, and failures of just those that have a reason."""
    failed = {str(name) for name, row in table.iterrows() if row.get(FAILED, "")}
    return list(table.index) == list(reasons) and failed == {
        name for name, reason in reasons.items() if reason
    }
