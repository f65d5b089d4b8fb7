"""One recording from its settings: files in, a store of runs and its settings out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from bayes_simfluence.data.claims import alone_in
from bayes_simfluence.files import PathLike, new_path
from bayes_simfluence.progress import Progress
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.features import features_key
from bayes_simfluence.recording.from_config import curricula_of, optimizer_of, task_of
from bayes_simfluence.recording.processes import Processes
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Choice
from bayes_simfluence.settings import config_path, layered, save_config


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
    task = task_of(config.validate())
    if not begun and Processes.here(distributed).number == 0:
        with alone_in(Path(store).absolute().parent):
            save_config(config.as_dict(), config_path(store))
    return record(
        task,
        curricula_of(config),
        optimizer_of(config),
        store=store,
        evaluation=config.evaluation,
        placement=replace(config.placement, only=only, distributed=distributed),
        features=config.features,
        key=features_key(config.seed),
        provenance=_provenance(config),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def _provenance(config: RecordConfig) -> dict[str, Any]:
    """The settings without the paths of the machine that recorded."""
    settings = {**config.as_dict(), "parallel": config.placement.parallel}
    for name in ("checkpoint", "train", "query"):
        settings[name] = Path(settings[name]).name
    return {"settings": settings, "seed": config.seed, "optimizer": config.optimizer}
