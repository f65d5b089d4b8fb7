"""``calibrate``: how often the bands of saved posteriors cover held-out runs."""

from typing import Annotated, Any

import typer

from bayes_simfluence.commands.options import (
    Draws,
    Figure,
    Overwrite,
    Quiet,
    RunsFile,
    Seed,
    Select,
    TableFile,
    apart,
    figure_saved,
    new_files,
    opened,
    posteriors_of,
    printed,
    progress_of,
    selected,
    table_saved,
)


def calibrate(
    runs: RunsFile,
    posterior: Annotated[
        list[str], typer.Option(help="NAME=FILE of a saved posterior; as often as wanted.")
    ],
    select: Select = "",
    out: TableFile = None,
    figure: Figure = None,
    draws: Draws = 400,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Judge the bands of saved posteriors on held-out runs, over the whole of training."""
    new_files(out, figure, overwrite=overwrite)

    import jax
    import pandas as pd

    from bayes_simfluence.evaluation.calibration import by_horizon, horizon_table
    from bayes_simfluence.report.plots import plot_coverage

    methods = posteriors_of(posterior)
    held_out = selected(opened(runs), select, "--select")
    apart(methods, held_out)
    key, scores = jax.random.key(seed), {}
    with progress_of(quiet).work("calibrate", len(methods)) as meter:
        for name, method in methods.items():
            scores[name] = by_horizon(method, held_out, key=key, draws=draws)
            meter.advance()
    tables = {name: horizon_table(score) for name, score in scores.items()}
    table = pd.concat(tables, names=["method", "horizon"])
    _show(table)
    table_saved(table.reset_index().set_index("method"), out)
    figure_saved(lambda: plot_coverage(scores), figure, overwrite=overwrite)


def _show(table: Any) -> None:
    from rich.table import Column, Table

    shown = Table(
        Column("method", no_wrap=True),
        Column("time", no_wrap=True),
        *(Column(name, justify="right") for name in table.columns),
    )
    for (method, horizon), row in table.iterrows():
        figures = [f"{value:.3g}" for value in row[:-1]] + [f"{row['losses']:.0f}"]
        shown.add_row(str(method), str(horizon), *figures)
    printed(shown)
    print("PIT of a right band: mean 0.5, sd 0.289 (smaller sd: too wide; larger: too narrow).")
