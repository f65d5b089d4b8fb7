"""One recording from its settings: files in, a store of runs and its settings out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.claims import alone_in
from bayes_simfluence.data.designs import Design
from bayes_simfluence.data.store import open_store
from bayes_simfluence.files import PathLike, new_path
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.features import Features, features_key, features_of
from bayes_simfluence.recording.from_config import classes_of, design_of, optimizer_of, task_of
from bayes_simfluence.recording.processes import Processes
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Choice
from bayes_simfluence.settings import config_path, layered, save_config
from bayes_simfluence.tasks.task import Task


def merged(*layers: Mapping[str, Any]) -> RecordConfig:
    """Validated settings from layers; of those that name a setting the last one decides.

    >>> merged({"runs": 8}, {"runs": 16}).runs
    16
    """
    return layered(RecordConfig, *layers).validate()


def record_from_config(
    config: RecordConfig,
    store: PathLike,
    *,
    only: Choice = None,
    distributed: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Record the runs that ``config`` describes into ``store``, and save its settings beside it.

    Args:
        only, distributed: as in ``Placement``.
        resume, overwrite: as for ``record``.

    Raises:
        Misuse: settings, files or paths that do not fit, before any work.
        WorkFailed: a run could not be written; the runs before it are safe.
    """
    begun = resume and Path(store).exists()
    if not begun:
        new_path(store, overwrite=overwrite)
    processes, task = Processes.here(distributed), task_of(config.validate())
    if begun or processes.count == 1 or not _by_features(config, task):
        design, features = _designed(config, task, store if begun else None, progress or Silent())
    else:
        raise Misuse(
            "design",
            got="diverse by gradient features, in several processes that would each make their own",
            expected="a store that one process began",
            do="record run 0 alone with --only 0:1, then all with --resume and --distributed",
        )
    if not begun and processes.number == 0:
        with alone_in(Path(store).absolute().parent):
            save_config(config.as_dict(), config_path(store))
    return record(
        task,
        design,
        optimizer_of(config),
        store=store,
        evaluation=config.evaluation,
        placement=replace(config.placement, only=only, distributed=distributed),
        features=features,
        starts=config.starts,
        twins=config.twins,
        key=features_key(config.seed),
        provenance=_provenance(config),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def _by_features(config: RecordConfig, task: Task) -> bool:
    """Whether the curricula depend on gradient features."""
    return config.design == "diverse" and classes_of(config, task) is None


def _designed(
    config: RecordConfig, task: Task, begun: PathLike | None, progress: Progress
) -> tuple[Design, int | Features]:
    """The curricula, and features or their number as ``record`` takes them.

    Where curricula depend on features, those are the store's own once it is begun.
    """
    if not _by_features(config, task):
        return design_of(config, labels=classes_of(config, task)), config.features
    if begun is not None:
        stored = open_store(begun)
        known = stored["train_feature"].values if "train_feature" in stored else None
        return design_of(config, features=known), config.features
    key = features_key(config.seed)
    made = features_of(task, config.features, key=key, progress=progress)
    design = design_of(config, features=None if made is None else made.train)
    return design, config.features if made is None else made


def _provenance(config: RecordConfig) -> dict[str, Any]:
    """The settings without the paths of the machine that recorded.

    The settings of a random design, of no twins and of one start say nothing new, and earlier
    versions had none.
    """
    settings = {**config.as_dict(), "parallel": config.placement.parallel}
    silent = ["design", "shares"] if config.design == "random" else []
    silent += [] if config.twins else ["twins"]
    silent += [] if config.starts > 1 else ["starts"]
    settings = {name: value for name, value in settings.items() if name not in silent}
    for name in ("checkpoint", "train", "query"):
        settings[name] = Path(settings[name]).name
    return {"settings": settings, "seed": config.seed, "optimizer": config.optimizer}
