"""``record``: fine-tuning runs with every query's loss at every step."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.commands.options import (
    Config,
    Overwrite,
    Quiet,
    config_of,
    positions,
    progress_of,
    with_settings,
)
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.settings import config_path


def _record(
    out: Annotated[Path, typer.Option(help="New store for the runs (.zarr).")],
    config: Config = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted store.")
    ] = False,
    overwrite: Overwrite = False,
    only: Annotated[
        str,
        typer.Option(
            help="Numbers of the runs to record here, as in '0:16' or '0,3'; other processes "
            "record others into the same store (all with --resume)."
        ),
    ] = "",
    distributed: Annotated[
        str,
        typer.Option(
            help="Share the runs with other processes: 'auto' in a job of SLURM, Open MPI or "
            "Kubernetes, else HOST:PORT,PROCESSES,NUMBER of this one."
        ),
    ] = "",
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Fine-tune a checkpoint in many runs and record every query's loss at every step."""
    settings = config_of(RecordConfig, config, options).validate()
    share = positions(only, settings.runs + settings.twins, "--only") if only else None
    if distributed:
        from bayes_simfluence.recording.processes import join_processes

        join_processes(distributed)
    from bayes_simfluence.recording.session import record_from_config

    runs = record_from_config(
        settings,
        out,
        only=share,
        distributed=bool(distributed),
        resume=resume,
        overwrite=overwrite,
        progress=progress_of(quiet),
    )
    print(f"{runs.sizes['run']} runs of {runs.sizes['step']} steps in {out}")
    print(f"settings in {config_path(out)}")


record = with_settings(_record, RecordConfig)
