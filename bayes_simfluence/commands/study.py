"""``study``: many methods on many recordings, stage by stage, with a report."""

from pathlib import Path
from typing import Annotated

import typer

from bayes_simfluence.commands.options import Quiet, progress_of


def study(
    config: Annotated[Path, typer.Option(help="YAML with the study's settings.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the study; a study begun there is continued.")
    ],
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this stage: record, checkpoints, attribute, fit, compare, report; as often "
            "as wanted."
        ),
    ] = None,
    cell: Annotated[
        list[str] | None, typer.Option(help="Only this cell; as often as wanted.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Do again what failed.")] = False,
    quiet: Quiet = False,
) -> None:
    """Record, attribute, fit, compare and report every cell of a study."""
    from bayes_simfluence.settings import config_from_yaml
    from bayes_simfluence.study.config import study_of

    settings = study_of(config_from_yaml(config))

    from bayes_simfluence.study.run import REPORT, run_study

    folder = run_study(
        settings, out, stages=stage, cells=cell, retry=retry, progress=progress_of(quiet)
    )
    page = folder / REPORT / "index.md"
    print(f"report in {page}" if page.is_file() else f"results in {folder}")
