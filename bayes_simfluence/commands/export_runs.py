"""``export``: recorded runs as a long table or plain arrays."""

from pathlib import Path
from typing import Annotated

import typer

from bayes_simfluence.commands.options import Overwrite, RunsFile, Select, opened, selected
from bayes_simfluence.files import new_path


def export_runs(
    runs: RunsFile,
    out: Annotated[Path, typer.Option(help="New file: .csv, .parquet or .npz.")],
    format: Annotated[str, typer.Option(help="One of these; found from the name if empty.")] = "",
    select: Select = "",
    overwrite: Overwrite = False,
) -> None:
    """Write recorded runs as a long table (CSV, Parquet) or plain arrays (NumPy)."""
    new_path(out, overwrite=overwrite)

    from bayes_simfluence.data import importers

    chosen = selected(opened(runs), select, "--select")
    importers.export_runs(chosen, out, format or None, overwrite=overwrite)
    print(f"{chosen.sizes['run']} runs of {chosen.sizes['step']} steps in {out}")
