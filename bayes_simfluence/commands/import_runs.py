"""``import``: runs that were recorded elsewhere, into a store."""

from pathlib import Path
from typing import Annotated

import typer

from bayes_simfluence.checks import Misuse
from bayes_simfluence.commands.options import Overwrite
from bayes_simfluence.files import new_path


def import_runs(
    path: Annotated[
        Path, typer.Argument(help="Long table (.csv, .parquet), arrays (.npz), run folders.")
    ],
    out: Annotated[Path, typer.Option(help="New store for the runs (.zarr).")],
    format: Annotated[
        str, typer.Option(help="csv, parquet, npz or gptdynamics; found from the path if empty.")
    ] = "",
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="OURS=THEIRS, a column of the table by another name; as often as wanted."
        ),
    ] = None,
    keep_diverged: Annotated[
        bool, typer.Option("--keep-diverged", help="Mark runs that diverged, not refuse them.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Bring runs that were recorded elsewhere into a store."""
    pairs = [text.partition("=") for text in column or []]
    wrong = [ours for ours, separator, theirs in pairs if not (ours and separator and theirs)]
    if wrong:
        raise Misuse(
            "--column", got=wrong[0], expected="OURS=THEIRS, as in loss=nll", do="correct it"
        )
    new_path(out, overwrite=overwrite)

    from bayes_simfluence.data import importers
    from bayes_simfluence.data.store import save_runs

    runs = importers.import_runs(
        path,
        format or None,
        columns={ours: theirs for ours, _, theirs in pairs} or None,
        keep_diverged=keep_diverged,
    )
    save_runs(runs, out, overwrite=overwrite)
    print(f"{runs.sizes['run']} runs of {runs.sizes['step']} steps in {out}")
