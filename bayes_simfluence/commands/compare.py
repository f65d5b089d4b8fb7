"""``compare``: saved posteriors against one another and baselines, on held-out runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.commands.options import (
    Draws,
    Overwrite,
    Quiet,
    RunsFile,
    Seed,
    Select,
    apart,
    opened,
    posteriors_of,
    printed,
    progress_of,
    selected,
    table_saved,
)
from bayes_simfluence.files import new_path

__all__ = ["compare", "show_metrics"]


def compare(
    runs: RunsFile,
    posterior: Annotated[
        list[str], typer.Option(help="NAME=FILE of a saved posterior; as often as wanted.")
    ],
    select: Select = "",
    out: Annotated[Path | None, typer.Option(help="New file for the table (.csv or .md).")] = None,
    baselines: Annotated[
        bool, typer.Option(help="Add the mean trajectory and persistence.")
    ] = True,
    draws: Draws = 200,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare saved posteriors on held-out runs."""
    if out is not None:
        new_path(out, overwrite=overwrite)

    import jax

    from bayes_simfluence.baselines.simple import mean_trajectory, persistence
    from bayes_simfluence.evaluation import compare as comparing
    from bayes_simfluence.report.tables import markdown

    methods = posteriors_of(posterior)
    if baselines:
        fitted = next(iter(methods.values())).runs
        methods["mean trajectory"] = mean_trajectory(fitted)
        methods["initial loss kept"] = persistence(fitted)
    held_out = selected(opened(runs), select, "--select")
    apart(methods, held_out)
    table = comparing.compare(
        methods, held_out, key=jax.random.key(seed), draws=draws, progress=progress_of(quiet)
    )
    show_metrics(table, list(comparing.METRICS))
    if out is not None:
        table_saved(table, out, markdown)


def show_metrics(table: Any, metrics: list[str]) -> None:
    """Print a comparison, the best of each column in bold."""
    from rich.table import Column, Table

    from bayes_simfluence.report.tables import SHORT, best_of

    shown = Table(Column("method", no_wrap=True), *(SHORT[one] for one in metrics))
    best = {metric: best_of(table, metric) for metric in metrics}
    for method, row in table.iterrows():
        cells = ["" if row[one] != row[one] else f"{row[one]:.3g}" for one in metrics]
        marked = [
            f"[bold]{cell}[/bold]" if best[one] == method else cell
            for one, cell in zip(metrics, cells, strict=True)
        ]
        shown.add_row(str(method), *marked)
    printed(shown)
