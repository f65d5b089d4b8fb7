"""The command ``bayes-simfluence``: one verb per job, JAX imported when a job needs it.

Exit code 0 = done, 2 = misuse (one line says what was got, what is expected, what to do), 1 = the
work itself failed.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.progress import Bars, Progress, Silent
from bayes_simfluence.recording.config import RecordConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="bayes-simfluence",
    help="A posterior over simulated training runs: what would the loss have been, how sure?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Seed = Annotated[int, typer.Option(help="Decides everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]
RunsFile = Annotated[Path, typer.Argument(help="Recorded runs (.zarr or .nc).")]
Select = Annotated[
    str, typer.Option(help="Positions of the runs to use, as in '0:25' or '0,3,5'; all if empty.")
]
Draws = Annotated[int, typer.Option(help="Posterior draws.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the verb."""
    _State.debug = debug


class _State:
    debug = False


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="New folder for everything.")] = Path("demo"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Record, fit, simulate and compare on a small network and texts that ship along."""
    from bayes_simfluence.demo.main import run_demo

    found = run_demo(out, seed=seed, progress=_progress(quiet))
    shown = ["mse", "spearman_query", "spearman_run", "crps", "coverage_90", "final_coverage_90"]
    _table(found.table, shown)
    print(f"\n{found.verdict}\n")
    middle, low, high = found.simulated
    print(
        f'What if the {len(found.dropped)} most harmful examples for the query "{found.query_text}"'
    )
    print(
        f"had been left out of a held-out run? Its final loss would change by {middle:+.3f} nats,"
    )
    print(
        f"90% band [{low:+.3f}, {high:+.3f}]; trained without them for real: {found.recorded:+.3f}."
    )
    print(f"\nEverything is in {found.folder}: runs.zarr, posterior.nc, table.csv, table.md,")
    print("curves.png, coverage.png, effects.png, counterfactual.png, dropped.csv")


def _record(
    out: Path, config: Path | None, resume: bool, overwrite: bool, quiet: bool, **given: Any
) -> None:
    from bayes_simfluence.recording.session import (
        config_from_yaml,
        config_path,
        merged,
        record_from_config,
    )

    layers = [config_from_yaml(config)] if config else []
    settings = merged(*layers, {name: one for name, one in given.items() if one is not None})
    runs = record_from_config(
        settings, out, resume=resume, overwrite=overwrite, progress=_progress(quiet)
    )
    print(f"{runs.sizes['run']} runs of {runs.sizes['step']} steps in {out}")
    print(f"settings in {config_path(out)}")


@app.command()
def fit(
    runs: RunsFile,
    out: Annotated[Path, typer.Option(help="New file for the posterior (.nc).")],
    method: Annotated[str, typer.Option(help="exact or ridge.")] = "exact",
    kind: Annotated[
        str, typer.Option(help="two-timescale, linear, additive, multiplicative; method's default.")
    ] = "",
    hyperparameters: Annotated[
        str, typer.Option(help="leave-one-run-out or evidence (exact, two-timescale).")
    ] = "leave-one-run-out",
    select: Select = "",
    validate: Annotated[
        str, typer.Option(help="Positions of the runs that choose the ridge's penalty.")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Fail when the verdict is bad.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit a simulator to recorded runs and save its posterior."""
    import jax

    from bayes_simfluence.checks import choice_of
    from bayes_simfluence.files import new_path
    from bayes_simfluence.inference import fit as fitting
    from bayes_simfluence.inference.exact import Exact
    from bayes_simfluence.inference.path_search import CRITERIA
    from bayes_simfluence.inference.ridge import Ridge
    from bayes_simfluence.model.bayesian import KINDS, Simfluence

    choice_of("--method", method, ["exact", "ridge"])
    choice_of("--kind", kind, ["", *KINDS])
    choice_of("--hyperparameters", hyperparameters, CRITERIA)
    new_path(out, overwrite=overwrite)
    recorded = _opened(runs)
    posterior = fitting.fit(
        _selected(recorded, select, "--select"),
        key=jax.random.key(seed),
        model=Simfluence(kind=kind) if kind else None,  # type: ignore[arg-type]
        method=Ridge(band=True) if method == "ridge" else Exact(hyperparameters),  # type: ignore[arg-type]
        validation=_selected(recorded, validate, "--validate") if validate else None,
        strict=strict,
        progress=_progress(quiet),
    )
    posterior.save(out, overwrite=overwrite)
    print(f"{posterior.verdict}\nposterior in {out}")


@app.command()
def simulate(
    posterior: Annotated[Path, typer.Argument(help="Posterior saved by fit.")],
    runs: RunsFile,
    out: Annotated[Path, typer.Option(help="New file for the trajectories (.nc).")],
    select: Select = "",
    drop: Annotated[
        str, typer.Option(help="Ids of training examples to leave out, separated by commas.")
    ] = "",
    figure: Annotated[Path | None, typer.Option(help="New file for a picture (.png).")] = None,
    draws: Draws = 200,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate recorded curricula, as they are or with examples left out."""
    import jax

    from bayes_simfluence.data.netcdf import write_groups
    from bayes_simfluence.data.runs import without_examples
    from bayes_simfluence.files import atomically, new_path
    from bayes_simfluence.inference.posterior import load_posterior
    from bayes_simfluence.report.plots import plot_curves, save_figure

    for one in (out, figure):
        if one is not None:
            new_path(one, overwrite=overwrite)
    fitted = load_posterior(posterior)
    recorded = _selected(_opened(runs), select, "--select")
    ids = [one.strip() for one in drop.split(",") if one.strip()]
    planned = without_examples(recorded, ids) if ids else recorded
    with _progress(quiet).work("simulate", 1) as meter:
        simulated = fitted.simulate(planned, key=jax.random.key(seed), draws=draws)
        meter.advance()
    with atomically(out) as partial:
        write_groups(partial, {"/": simulated})
    print(f"{planned.sizes['run']} runs x {simulated.sizes['draw']} draws in {out}")
    if figure is not None:
        truth = None if ids else recorded
        save_figure(plot_curves({"simulated": simulated}, truth), figure, overwrite=overwrite)
        print(f"picture in {figure}")


@app.command()
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
    import jax

    from bayes_simfluence.baselines.simple import mean_trajectory, persistence
    from bayes_simfluence.evaluation import compare as comparing
    from bayes_simfluence.files import atomically, new_path
    from bayes_simfluence.inference.posterior import load_posterior
    from bayes_simfluence.report.tables import markdown

    if out is not None:
        new_path(out, overwrite=overwrite)
    methods = {}
    for one in posterior:
        name, separator, path = one.partition("=")
        if not separator:
            name, path = Path(one).stem, one
        methods[name] = load_posterior(path)
    if baselines:
        fitted = next(iter(methods.values())).runs
        methods["mean trajectory"] = mean_trajectory(fitted)
        methods["initial loss kept"] = persistence(fitted)
    held_out = _selected(_opened(runs), select, "--select")
    _apart(methods, held_out)
    table = comparing.compare(
        methods, held_out, key=jax.random.key(seed), draws=draws, progress=_progress(quiet)
    )
    _table(table, list(comparing.METRICS))
    if out is not None:
        text = markdown(table) + "\n" if out.suffix == ".md" else table.to_csv()
        with atomically(out) as partial:
            partial.write_text(text, "utf-8")
        print(f"table in {out}")


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    # Networks here are JAX: that PyTorch is absent is not news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    warnings.showwarning = _one_line  # type: ignore[assignment]
    try:
        app()
    except (Misuse, WorkFailed) as error:
        if _State.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Misuse) else 1)
    except Exception as error:
        if _State.debug:
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        print(f"error: {type(error).__name__}: {said} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


def _record_command() -> Callable[..., None]:
    """``record`` with one option per setting of a recording, straight from its dataclass."""
    own = {
        "out": Annotated[Path, typer.Option(help="New store for the runs (.zarr).")],
        "config": Annotated[
            Path | None, typer.Option(help="YAML with the same names; options here overrule it.")
        ],
        "resume": Annotated[bool, typer.Option("--resume", help="Continue an interrupted store.")],
        "overwrite": Overwrite,
        "quiet": Quiet,
    }
    defaults = {"out": inspect.Parameter.empty, "config": None}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name, False),
            annotation=annotation,
        )
        for name, annotation in own.items()
    ]
    for one in fields(RecordConfig):
        kind = type(one.default)
        choices = "".join(f", {choice}" for choice in one.metadata["choices"])
        said = f"{one.metadata['help']}{choices.replace(',', ':', 1)} (default {one.default!r})"
        parameters.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, typer.Option(help=said, show_default=False)],
            )
        )

    def record(**options: Any) -> None:
        """Fine-tune a checkpoint in many runs and record every query's loss at every step."""
        _record(**options)

    record.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    record.__annotations__ = {one.name: one.annotation for one in parameters}
    return record


app.command("record")(_record_command())


def _progress(quiet: bool) -> Progress:
    return Silent() if quiet else Bars()


def _opened(path: Path) -> Any:
    from bayes_simfluence.data.store import open_runs

    return open_runs(path)


def _selected(runs: Any, text: str, option: str) -> Any:
    """Some of the runs, by position."""
    if not text:
        return runs
    try:
        if ":" in text:
            first, last = (int(part) if part else None for part in text.split(":"))
            chosen = list(range(runs.sizes["run"]))[first:last]
        else:
            chosen = [range(runs.sizes["run"])[int(part)] for part in text.split(",")]
    except (ValueError, IndexError):
        chosen = []
    if not chosen:
        raise Misuse(
            option,
            got=repr(text),
            expected=f"positions among the {runs.sizes['run']} runs, as in 0:25 or 0,3,5",
            do="correct them",
        )
    return runs.isel(run=chosen)


def _apart(methods: dict[str, Any], held_out: Any) -> None:
    """Raise when a posterior was fitted to a run that it is to be judged on."""
    for name, one in methods.items():
        fitted = {run.tobytes() for run in one.runs["batch"].values}
        seen = [
            str(run)
            for run, batch in zip(held_out["run"].values, held_out["batch"].values, strict=True)
            if batch.tobytes() in fitted
        ]
        if seen:
            raise Misuse(
                f"posterior {name!r}",
                got=f"a fit to the runs to compare on: {', '.join(seen[:5])}",
                expected="held-out runs",
                do="choose others with --select",
            )


def _table(table: Any, metrics: list[str]) -> None:
    from rich.console import Console
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
    Console().print(shown)


def _one_line(message: Any, category: type[Warning], *_: Any) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)
