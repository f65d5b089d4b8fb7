"""``calibrate``: bands on held-out runs, or a method on runs simulated from its own prior."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.commands.options import (
    Config,
    Figure,
    Overwrite,
    Posteriors,
    Quiet,
    RunsFile,
    apart,
    config_of,
    opened,
    posteriors_of,
    printed,
    progress_of,
    selected,
    table_saved,
    with_settings,
)
from bayes_simfluence.files import new_path
from bayes_simfluence.posterior.config import FitConfig

__all__ = ["calibrate"]

HELD_OUT = ("select", "seed", "draws")
"""Settings of a fit that mean something on held-out runs too."""


def _calibrate(
    runs: RunsFile,
    posterior: Posteriors = None,
    sbc: Annotated[
        bool,
        typer.Option(
            "--sbc", help="Simulate recordings of these curricula from the prior and fit them."
        ),
    ] = False,
    simulations: Annotated[int, typer.Option(help="sbc: recordings, 20 or more.")] = 200,
    kept: Annotated[int, typer.Option(help="sbc: draws of each posterior to rank among.")] = 99,
    queries: Annotated[int, typer.Option(help="sbc: queries of the recording, evenly.")] = 3,
    quantities: Annotated[
        str, typer.Option(help="sbc: names of what is ranked, separated by commas.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="New file for the table (.csv or .md).")] = None,
    figure: Figure = None,
    config: Config = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Judge bands on held-out runs (--posterior), or a model and method by simulation (--sbc).

    With --posterior, --draws counts predictive draws.
    """
    for one in (out, figure):
        if one is not None:
            new_path(one, overwrite=overwrite)
    if sbc == bool(posterior):
        raise Misuse(
            "calibrate",
            got="--sbc and --posterior" if sbc else "neither --sbc nor --posterior",
            expected="one of them",
            do="say --posterior FILE to judge a fit, or --sbc to judge a method",
        )
    settings = config_of(FitConfig, config, given)
    if posterior:
        _of_posteriors(posterior, runs, settings, out, figure, overwrite, quiet)
        return
    if settings.method == "ridge":
        raise Misuse(
            "--sbc", got="method ridge", expected="a method that draws",
            do="take exact, nuts or svi",
        )  # fmt: skip
    model, method = settings.parts()
    count = positive_integer("queries", queries)
    # Before hours of fits, not after them.
    if positive_integer("simulations", simulations) < 20:
        raise Misuse(
            "--simulations", got=simulations, expected="at least 20, better 200", do="raise it"
        )

    import jax
    import numpy as np

    from bayes_simfluence.evaluation import calibration, ranks
    from bayes_simfluence.posterior.prior import prior_draw
    from bayes_simfluence.report.plots import plot_ranks, save_figure

    recorded = selected(opened(runs), settings.select, "--select")
    at = np.linspace(0, recorded.sizes["query"] - 1, min(count, recorded.sizes["query"]))
    recorded = recorded.isel(query=np.unique(at.round().astype(int)))
    names = [one.strip() for one in quantities.split(",") if one.strip()]
    found = calibration.sbc(
        prior_draw(model, recorded),
        method,
        key=jax.random.key(settings.seed),
        model=model,
        simulations=simulations,
        draws=kept,
        quantities=names or calibration.summaries_of(model, method, recorded),
        progress=progress_of(quiet),
    )
    test = ranks.rank_histogram_test(found)
    print(f"{'OK' if test.ok else 'NOT CALIBRATED'}: {test}")
    if out is not None:
        table_saved(test.p_values.to_series().rename("p").to_frame(), out, _markdown)
    if figure is not None:
        save_figure(plot_ranks(found), figure, overwrite=overwrite)
        print(f"picture in {figure}")


calibrate = with_settings(_calibrate, FitConfig)


def _of_posteriors(
    named: list[str],
    runs: Path,
    settings: FitConfig,
    out: Path | None,
    figure: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    plain = FitConfig()
    said = [
        name
        for name in FitConfig.names()
        if name not in HELD_OUT and getattr(settings, name) != getattr(plain, name)
    ]
    if said:
        raise Misuse(
            "calibrate --posterior",
            got=f"settings of a fit: {', '.join(said)}",
            expected=f"a posterior, which has its own, and at most {', '.join(HELD_OUT)}",
            do="leave them out, or say --sbc",
        )

    import jax
    import pandas as pd

    from bayes_simfluence.evaluation.calibration import by_horizon, horizon_table
    from bayes_simfluence.report.plots import plot_coverage, save_figure

    methods = posteriors_of(named)
    held_out = selected(opened(runs), settings.select, "--select")
    apart(methods, held_out)
    draws = 400 if settings.draws is None else settings.draws
    found = {}
    with progress_of(quiet).work("calibrate", len(methods)) as meter:
        for name, one in methods.items():
            found[name] = by_horizon(one, held_out, key=jax.random.key(settings.seed), draws=draws)
            meter.advance()
    table = pd.concat(
        {name: horizon_table(one) for name, one in found.items()}, names=["method", "horizon"]
    )
    _show(table)
    if out is not None:
        table_saved(table.reset_index().set_index("method"), out, _markdown)
    if figure is not None:
        save_figure(plot_coverage(found), figure, overwrite=overwrite)
        print(f"picture in {figure}")


def _show(table: Any) -> None:
    from rich.table import Column, Table

    shown = Table(
        Column("method", no_wrap=True),
        Column("time", no_wrap=True),
        *(Column(one, justify="right") for one in table.columns),
    )
    for (method, horizon), row in table.iterrows():
        cells = [f"{one:.3g}" for one in row[:-1]] + [f"{row['losses']:.0f}"]
        shown.add_row(str(method), str(horizon), *cells)
    printed(shown)
    print("PIT of a right band: mean 0.5, sd 0.289 (smaller sd: too wide; larger: too narrow).")


def _markdown(table: Any) -> str:
    named = table.reset_index()
    lines = ["| " + " | ".join(map(str, named.columns)) + " |", "|---" * len(named.columns) + "|"]
    for row in named.itertuples(index=False):
        cells = (f"{one:.3g}" if isinstance(one, float) else str(one) for one in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
