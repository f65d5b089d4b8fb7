"""``compare``: saved posteriors and scores against one another and baselines, on held-out runs."""

from functools import partial
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse
from bayes_simfluence.commands.options import (
    Draws,
    Overwrite,
    Posteriors,
    Quiet,
    RunsFile,
    Seed,
    Select,
    apart,
    named_files,
    opened,
    posteriors_of,
    printed,
    progress_of,
    selected,
)
from bayes_simfluence.files import new_path


def compare(
    runs: RunsFile,
    posterior: Posteriors = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE of saved scores (.nc, train x query); their scale is fitted to the "
            "runs of the first posterior, or to --fitted."
        ),
    ] = None,
    select: Select = "",
    fitted: Annotated[
        Path | None, typer.Option(help="Recorded runs that scores and baselines are fitted to.")
    ] = None,
    fitted_select: Annotated[str, typer.Option(help="Positions of those runs.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="New file for the table (.md, .csv, .tex or .json).")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Add the mean trajectory and persistence.")
    ] = True,
    ridge: Annotated[
        bool, typer.Option("--ridge", help="Add ridge linear, additive and multiplicative.")
    ] = False,
    reference: Annotated[
        str,
        typer.Option(
            help="NAME of a method; adds the ratio of each MSE to its MSE, over the same runs."
        ),
    ] = "",
    draws: Draws = 200,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare saved posteriors and scores on held-out runs."""
    _check(posterior, scores, fitted, fitted_select)
    if out is not None:
        from bayes_simfluence.report.tables import check_format

        new_path(check_format(out), overwrite=overwrite)

    import jax

    from bayes_simfluence.attribution.score_files import load_scores
    from bayes_simfluence.evaluation import compare as comparing
    from bayes_simfluence.evaluation.floor import floor
    from bayes_simfluence.report.tables import save_table

    key, fit_key = jax.random.key(seed), jax.random.fold_in(jax.random.key(seed), 1)
    methods: dict[str, Any] = posteriors_of(posterior or [])
    held_out = selected(opened(runs), select, "--select")
    if fitted is not None:
        known = selected(opened(fitted), fitted_select, "--fitted-select")
    else:
        known = next(iter(methods.values())).runs
    apart({**methods, "--fitted": _Fitted(known)}, held_out)
    for name, path in named_files(scores or []).items():
        methods[name] = partial(_additive, load_scores(path), known)
    if ridge:
        for kind in ("linear", "additive", "multiplicative"):
            methods[f"ridge {kind}"] = partial(_ridge, kind, known, fit_key)
    if baselines:
        from bayes_simfluence.attribution.simple import mean_trajectory, persistence

        methods["mean trajectory"] = partial(mean_trajectory, known)
        methods["initial loss kept"] = partial(persistence, known)
    table = comparing.compare(
        methods,
        held_out,
        key=key,
        draws=draws,
        reference=reference or None,
        progress=progress_of(quiet),
    )
    beside = [name for name in (comparing.RATIO, comparing.OVER_FLOOR) if name in table]
    show_metrics(table, [*comparing.METRICS, *beside])
    if comparing.OVER_FLOOR in table:
        print(floor(held_out, key=key))
    if out is not None:
        print(f"table in {save_table(table, out, overwrite=overwrite)}")


class _Fitted:
    """Runs that something was fitted to, as ``apart`` asks for them."""

    def __init__(self, runs: Any) -> None:
        self.runs = runs


def _check(
    posterior: list[str] | None, scores: list[str] | None, fitted: Path | None, select: str
) -> None:
    if not posterior and not scores:
        raise Misuse(
            "compare",
            got="neither --posterior nor --scores",
            expected="at least one of them",
            do="name a file: --posterior NAME=FILE",
        )
    if not posterior and fitted is None:
        raise Misuse(
            "--scores",
            got="no runs to fit their scale to",
            expected="--fitted RUNS, or a --posterior whose runs are taken",
            do="name recorded runs that the methods are not judged on",
        )
    if select and fitted is None:
        raise Misuse(
            "--fitted-select", got="no --fitted", expected="both", do="name the runs by --fitted"
        )


def _additive(scores: Any, runs: Any) -> Any:
    from bayes_simfluence.attribution.simulators import additive_simulator

    return additive_simulator(scores, runs)


def _ridge(kind: Any, runs: Any, key: Any) -> Any:
    from bayes_simfluence.inference.ridge import Ridge
    from bayes_simfluence.model.simfluence import KINDS
    from bayes_simfluence.posterior.fit import fit

    return fit(runs, model=KINDS[kind](), method=Ridge(band=True), key=key)


def show_metrics(table: Any, metrics: list[str]) -> None:
    """Print a comparison, the best of each column in bold, and below it the methods that failed."""
    from rich.table import Column, Table

    from bayes_simfluence.report.tables import SHORT, best_of

    shown = Table(Column("method", no_wrap=True), *(SHORT[metric] for metric in metrics))
    best = {metric: best_of(table, metric) for metric in metrics}
    for method, row in table.iterrows():
        figures = ["" if isnan(row[metric]) else f"{row[metric]:.3g}" for metric in metrics]
        marked = [
            f"[bold]{figure}[/bold]" if best[metric] == method else figure
            for metric, figure in zip(metrics, figures, strict=True)
        ]
        shown.add_row(str(method), *marked)
    printed(shown)
    for method, reason in table["failed"].items() if "failed" in table else ():
        if reason:
            print(f"{method} failed: {reason}")
