"""``diagnose``: how a saved fit went."""

from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.commands.options import (
    Draws,
    Figure,
    Overwrite,
    Quiet,
    Seed,
    figure_saved,
    new_files,
    printed,
    progress_of,
)

SHORT = {"ess_bulk": "ESS", "ess_tail": "tail ESS", "r_hat": "R-hat"}


def diagnose(
    posterior: Annotated[Path, typer.Argument(help="Posterior saved by fit.")],
    figure: Figure = None,
    draws: Draws = 200,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Print a fit's verdict, its numbers and its hyperparameters."""
    new_files(figure, overwrite=overwrite)

    import jax

    from bayes_simfluence.model.simfluence import Simfluence
    from bayes_simfluence.posterior.posterior import load_posterior
    from bayes_simfluence.report.diagnose import hyper_summary, numbers_table, plot_diagnosis

    fitted = load_posterior(posterior)
    key = jax.random.key(seed)
    with progress_of(quiet).work("diagnose", 2) as meter:
        drawn = None if figure is None else plot_diagnosis(fitted, key=key)
        meter.advance()
        summary = hyper_summary(fitted, key=key, draws=draws)
        meter.advance()
    model, method = fitted.settings.get("model"), fitted.settings.get("method", "")
    kind = Simfluence.from_dict(model).kind if model else "none"
    print(f"{method}, kind {kind}, {fitted.runs.sizes['run']} runs")
    print(f"{'OK' if fitted.verdict.ok else 'ASKS FOR ATTENTION'}: {fitted.verdict}\n")
    _numbers(numbers_table(fitted.verdict))
    if len(summary):
        _summary(summary)
    figure_saved(lambda: drawn, figure, overwrite=overwrite)


def _numbers(table: Any) -> None:
    from rich.table import Column, Table

    shown = Table("number", Column("value", justify="right", no_wrap=True), "wanted")
    for name, row in table.iterrows():
        value = f"{row['value']:.4g}"
        marked = value if row["ok"] else f"[bold red]{value} ![/bold red]"
        shown.add_row(row["meaning"] or str(name), marked, row["wanted"])
    printed(shown)


def _summary(table: Any) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    shown = Table(
        Column("hyperparameter", no_wrap=True),
        *(Column(SHORT.get(name, name), justify="right") for name in table.columns),
    )
    for name, row in table.iterrows():
        figures = ["" if isnan(value) else f"{value:.3g}" for value in row]
        shown.add_row(escape(str(name)), *figures)
    printed(shown)
