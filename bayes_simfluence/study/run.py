"""A study from its settings: every stage of every cell, then the report."""

from collections.abc import Sequence
from pathlib import Path

import jax

from bayes_simfluence.checks import choice_of
from bayes_simfluence.files import PathLike, new_path
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.settings import config_from_yaml, save_config
from bayes_simfluence.study.cell import Cell
from bayes_simfluence.study.config import StudyConfig, study_of
from bayes_simfluence.study.methods import ATTRIBUTIONS, SIMULATORS
from bayes_simfluence.study.report import write_report
from bayes_simfluence.study.stages import STAGES

REPORT = "report"
SETTINGS = "study.yaml"


def run_study(
    config: StudyConfig,
    out: PathLike,
    *,
    stages: Sequence[str] | None = None,
    cells: Sequence[str] | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Record, attribute, fit, compare and report; a second call continues where the first stopped.

    Results are files in ``out``, in a folder for each cell: ``runs.zarr``, ``pilot.zarr``,
    ``scores/METHOD.nc``, ``fits/RUNS/METHOD.nc``, ``tables/RUNS.csv``. A ``.yaml`` file beside each
    holds its cost, or why it failed. Remove a result to have it made again.

    Args:
        config: as made by ``study_of``.
        out: the study's folder.
        stages: some of ``record``, ``checkpoints``, ``attribute``, ``fit``, ``compare``,
            ``report``; all when omitted.
        cells: names of some cells; all when omitted. The report always covers all cells.
        retry: repeat jobs that failed.
        progress: told of long work; silent when omitted.

    Returns:
        The folder.

    Raises:
        Misuse: unknown stages, cells or methods; another study in the folder; recordings that do
            not match their settings; a stage whose earlier stage was not run.
    """
    folder = new_path(out, overwrite=True)
    config = _checked(config, folder)
    names = [cell.name for cell in config.cells]
    for name in cells or ():
        choice_of("cell", name, names)
    for name in stages or ():
        choice_of("stage", name, (*STAGES, REPORT))
    wanted = [stage for stage in (*STAGES, REPORT) if stages is None or stage in stages]
    every = [Cell(cell, config, folder / cell.name) for cell in config.cells]
    chosen = [cell for cell in every if cells is None or cell.config.name in cells]
    save_config(config.as_dict(), folder / SETTINGS)
    for name in wanted:
        if name == REPORT:
            write_report(every, folder / REPORT)
            continue
        for cell in chosen:
            STAGES[name](cell, retry, progress or Silent())
            if len(chosen) > 1:
                # Other cells cannot use what was compiled for this one; memory maps are limited.
                jax.clear_caches()  # type: ignore[no-untyped-call]
    return folder


def _checked(config: StudyConfig, folder: Path) -> StudyConfig:
    config = config.checked()
    for what, names, known in (
        ("methods", config.methods, ATTRIBUTIONS),
        ("simulators", config.simulators, SIMULATORS),
    ):
        for name in names or ():
            choice_of(what, name, list(known))
    if (folder / SETTINGS).is_file():
        config.continues(study_of(config_from_yaml(folder / SETTINGS)), str(folder))
    return config
