"""``demo``: from recording to comparison on a small network that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

from bayes_simfluence.commands.compare import show_metrics
from bayes_simfluence.commands.options import Quiet, Seed, progress_of


def demo(
    out: Annotated[Path, typer.Option(help="New folder for everything.")] = Path("demo"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Record, fit, simulate and compare on a small network and texts of the package."""
    from bayes_simfluence.demo.main import run_demo

    result = run_demo(out, seed=seed, progress=progress_of(quiet))
    shown = ["mse", "spearman_query", "spearman_run", "crps", "coverage_90", "final_coverage_90"]
    show_metrics(result.table, shown)
    print(f"\n{result.verdict}\n")
    middle, low, high = result.simulated
    print(f"What if the {len(result.dropped)} most harmful examples for the query")
    print(f'"{result.query_text}"')
    print(
        f"had been left out of a held-out run? Its final loss would change by {middle:+.3f} nats,"
    )
    print(
        f"90% band [{low:+.3f}, {high:+.3f}]; really trained without them: {result.recorded:+.3f}."
    )
    print(f"\nEverything is in {result.folder}: runs.zarr, posterior.nc, table.csv, table.md,")
    print("curves.png, coverage.png, effects.png, counterfactual.png, dropped.csv")
