"""``record``: fine-tuning runs with every query's loss at every step."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.commands.options import (
    Config,
    Overwrite,
    Quiet,
    config_of,
    progress_of,
    with_settings,
)
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.settings import config_path

__all__ = ["record"]


def _record(
    out: Annotated[Path, typer.Option(help="New store for the runs (.zarr).")],
    config: Config = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted store.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Fine-tune a checkpoint in many runs and record every query's loss at every step."""
    settings = config_of(RecordConfig, config, given).validate()
    from bayes_simfluence.recording.session import record_from_config

    runs = record_from_config(
        settings, out, resume=resume, overwrite=overwrite, progress=progress_of(quiet)
    )
    print(f"{runs.sizes['run']} runs of {runs.sizes['step']} steps in {out}")
    print(f"settings in {config_path(out)}")


record = with_settings(_record, RecordConfig)
