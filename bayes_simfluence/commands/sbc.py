"""``sbc``: simulation-based calibration of a model and a method, before any run is fitted."""

from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.commands.options import (
    Config,
    Figure,
    Overwrite,
    Quiet,
    RunsFile,
    TableFile,
    config_of,
    figure_saved,
    new_files,
    opened,
    progress_of,
    selected,
    table_saved,
    with_settings,
)
from bayes_simfluence.posterior.config import FitConfig

FEWEST = 20
"""Simulations below which the ranks say nothing."""


def _sbc(
    runs: RunsFile,
    simulations: Annotated[int, typer.Option(help="Simulated recordings, 20 or more.")] = 200,
    kept: Annotated[int, typer.Option(help="Draws of each posterior to rank among.")] = 99,
    queries: Annotated[int, typer.Option(help="Queries of the recording, evenly chosen.")] = 3,
    quantities: Annotated[
        str, typer.Option(help="Names of what is ranked, separated by commas; all if empty.")
    ] = "",
    out: TableFile = None,
    figure: Figure = None,
    config: Config = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Simulate recordings of these curricula from the prior, fit each, and test the ranks."""
    new_files(out, figure, overwrite=overwrite)
    settings = config_of(FitConfig, config, options)
    model, method = settings.parts()
    count = positive_integer("queries", queries)
    _check(settings.method, simulations)

    import jax
    import numpy as np

    from bayes_simfluence.evaluation import calibration, ranks
    from bayes_simfluence.posterior.prior import prior_draw
    from bayes_simfluence.report.plots import plot_ranks

    recorded = selected(opened(runs), settings.select, "--select")
    size = recorded.sizes["query"]
    places = np.linspace(0, size - 1, min(count, size)).round().astype(int)
    recorded = recorded.isel(query=np.unique(places))
    names = [name.strip() for name in quantities.split(",") if name.strip()]
    ranked = calibration.sbc(
        prior_draw(model, recorded),
        method,
        key=jax.random.key(settings.seed),
        model=model,
        simulations=simulations,
        draws=kept,
        quantities=names or calibration.summaries_of(model, method, recorded),
        progress=progress_of(quiet),
    )
    test = ranks.rank_histogram_test(ranked)
    print(f"{'OK' if test.ok else 'NOT CALIBRATED'}: {test}")
    table_saved(test.p_values.to_series().rename("p").to_frame(), out)
    figure_saved(lambda: plot_ranks(ranked), figure, overwrite=overwrite)


sbc = with_settings(_sbc, FitConfig)


def _check(method: str, simulations: int) -> None:
    """Raise before hours of fits, not after them."""
    if method == "ridge":
        raise Misuse(
            "sbc",
            got="method ridge, which has no draws to rank among",
            expected="a method that draws",
            do="take exact, nuts or svi",
        )
    if positive_integer("simulations", simulations) < FEWEST:
        raise Misuse(
            "--simulations",
            got=simulations,
            expected=f"at least {FEWEST}, better 200",
            do="raise it",
        )
