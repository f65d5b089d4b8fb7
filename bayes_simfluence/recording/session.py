"""One recording from its settings: files in, a store of runs and its settings out."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import xarray as xr
import yaml

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.files import PathLike, atomically, new_path
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.features import Features, gradient_features
from bayes_simfluence.recording.optimizers import optimizer_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.task import Task
from bayes_simfluence.recording.text import curricula_of, task_of

__all__ = ["config_from_yaml", "config_path", "merged", "record_from_config"]


def config_path(store: PathLike) -> Path:
    """Where the resolved settings of a recording lie: beside its store."""
    return Path(store).with_suffix(".yaml")


def config_from_yaml(path: PathLike) -> dict[str, Any]:
    """The settings that a YAML file names.

    Raises:
        Misuse: no such file, or no mapping in it.
    """
    if not Path(path).is_file():
        raise Misuse(str(path), got="no such file", expected="a YAML file", do="check --config")
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        settings = str(error).splitlines()[0]
    if not isinstance(settings, dict):
        raise Misuse(
            str(path),
            got=shorten([settings]),
            expected="YAML lines 'setting: value'",
            do="start from the file that record saves beside its store",
        )
    return settings


def merged(*layers: Mapping[str, Any]) -> RecordConfig:
    """Settings from layers, the last one that names a setting decides; validated.

    >>> merged({"runs": 8}, {"runs": 16}).runs
    16
    """
    settings = {name: value for layer in layers for name, value in layer.items()}
    unknown = [name for name in settings if name not in RecordConfig.names()]
    if unknown:
        raise Misuse(
            "settings",
            got=f"unknown names {shorten(unknown)}",
            expected=f"names among {shorten(RecordConfig.names(), 30)}",
            do="correct them",
        )
    return replace(
        RecordConfig(), **{name: _typed(name, one) for name, one in settings.items()}
    ).validate()


def _typed(name: str, value: Any) -> Any:
    """A setting of the kind of its default; YAML reads ``2e-5`` as text and 1 as an integer."""
    kind = type(getattr(RecordConfig(), name))
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    if type(value) is not kind:
        raise Misuse(
            name,
            got=repr(value),
            expected={int: "a whole number", float: "a number", str: "text"}[kind],
            do=f"correct it, as in {name}: {getattr(RecordConfig(), name)!r}",
        )
    return value


def record_from_config(
    config: RecordConfig,
    store: PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Record the runs that ``config`` describes into ``store``; its settings go beside it.

    Raises:
        Misuse: settings, files or paths that do not fit, before any work.
        WorkFailed: a run could not be written; the runs before it are safe.
    """
    progress = progress or Silent()
    begun = resume and Path(store).exists()
    if not begun:
        new_path(store, overwrite=overwrite)
    task = task_of(config.validate())
    features = None if begun else _features(task, config, progress)
    if not begun:
        with atomically(config_path(store)) as partial:
            partial.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False), "utf-8")
    return record(
        task,
        curricula_of(config),
        optimizer_of(config),
        store=store,
        parallel=config.parallel,
        resume=resume,
        overwrite=overwrite,
        features=features,
        provenance=_provenance(config),
        progress=progress,
    )


def _features(task: Task, config: RecordConfig, progress: Progress) -> Features | None:
    if config.features == 0:
        return None
    with progress.work("gradient features", len(task.train_ids) + len(task.query_ids)) as meter:
        return gradient_features(
            task,
            rank=config.features,
            key=jax.random.fold_in(jax.random.key(config.seed), 4),
            meter=meter,
        )


def _provenance(config: RecordConfig) -> dict[str, Any]:
    """The settings without the paths of the machine that recorded."""
    settings = config.as_dict()
    for name in ("checkpoint", "train", "query"):
        settings[name] = Path(settings[name]).name
    return {"settings": settings, "seed": config.seed, "optimizer": config.optimizer}
