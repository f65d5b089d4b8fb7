"""What the verbs share: options, options made from a settings class, and the files they name."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse
from bayes_simfluence.files import atomically, new_path
from bayes_simfluence.progress import Bars, Progress, Silent
from bayes_simfluence.settings import config_from_yaml, kinds_of, layered

WIDE = 120
"""Columns of a table that goes to a file or another program."""
Seed = Annotated[int, typer.Option(help="Decides everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]
RunsFile = Annotated[Path, typer.Argument(help="Recorded runs (.zarr or .nc).")]
Select = Annotated[
    str, typer.Option(help="Positions of the runs to use, as in '0:25' or '0,3,5'; all if empty.")
]
Draws = Annotated[int, typer.Option(help="Posterior draws.")]
Config = Annotated[
    Path | None, typer.Option(help="YAML with the same names; options here overrule it.")
]
Figure = Annotated[Path | None, typer.Option(help="New file for a picture (.png).")]
TableFile = Annotated[Path | None, typer.Option(help="New file for the table (.csv or .md).")]
Posteriors = Annotated[
    list[str] | None, typer.Option(help="NAME=FILE of a saved posterior; as often as wanted.")
]


def with_settings(verb: Callable[..., None], settings: type[Any]) -> Callable[..., None]:
    """``verb`` with an option for each setting besides its own.

    The verb gets the settings that the user passed as keywords.
    """
    own = [
        parameter
        for parameter in inspect.signature(verb, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    kinds = kinds_of(settings)
    for field in fields(settings):
        if dict in kinds[field.name]:
            continue  # Nested settings have no option: they come from a file.
        # Words are parsed later, numbers by typer.
        kind = str if str in kinds[field.name] else kinds[field.name][0]
        choices = ", ".join(field.metadata["choices"])
        help = f"{field.metadata['help']}{': ' if choices else ''}{choices}"
        if field.default is not None:
            help += f" (default {field.default!r})"
        own.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, typer.Option(help=help, show_default=False)],
            )
        )

    def command(**options: Any) -> None:
        verb(**options)

    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in own}
    return command


def config_of(settings: type[Any], config: Path | None, options: dict[str, Any]) -> Any:
    """Settings from a YAML file, overruled by the options that the user passed."""
    passed = {name: value for name, value in options.items() if value is not None}
    return layered(settings, *([config_from_yaml(config)] if config else []), passed)


def printed(table: Any) -> None:
    """Print a rich table; wide enough for its numbers where there is no terminal to ask."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=WIDE)).print(table)


def progress_of(quiet: bool) -> Progress:
    """Bars, unless the caller wants quiet."""
    return Silent() if quiet else Bars()


def opened(path: Path) -> Any:
    """Recorded runs from a file."""
    from bayes_simfluence.data.store import open_runs

    return open_runs(path)


def selected(runs: Any, text: str, option: str) -> Any:
    """Some of the runs, by position."""
    return runs.isel(run=positions(text, runs.sizes["run"], option)) if text else runs


def positions(text: str, total: int, option: str) -> list[int]:
    """The positions among ``total`` runs that ``text`` names, as in 0:25 or 0,3,5."""
    try:
        if ":" in text:
            first, last = (int(part) if part else None for part in text.split(":"))
            chosen = list(range(total))[first:last]
        else:
            chosen = [range(total)[int(part)] for part in text.split(",")]
    except (ValueError, IndexError):
        chosen = []
    if not chosen:
        raise Misuse(
            option,
            got=repr(text),
            expected=f"positions among the {total} runs, as in 0:25 or 0,3,5",
            do="correct them",
        )
    return chosen


def posteriors_of(named: list[str]) -> dict[str, Any]:
    """Saved posteriors by name, from ``NAME=FILE`` or ``FILE``."""
    from bayes_simfluence.posterior.posterior import load_posterior

    return {name: load_posterior(path) for name, path in named_files(named).items()}


def named_files(words: list[str]) -> dict[str, str]:
    """Files by name, from ``NAME=FILE`` or ``FILE``."""
    pairs = [word.partition("=") for word in words]
    return {name if sign else Path(name).stem: path or name for name, sign, path in pairs}


def apart(methods: dict[str, Any], held_out: Any) -> None:
    """Raise when a posterior was fitted to a run that it is to be judged on."""
    for name, method in methods.items():
        fitted = set(_curricula(method.runs))
        names = held_out["run"].values.astype(str)
        seen = [
            run
            for run, curriculum in zip(names, _curricula(held_out), strict=True)
            if curriculum in fitted
        ]
        if seen:
            raise Misuse(
                f"posterior {name!r}",
                got=f"a fit to the runs to compare on: {', '.join(seen[:5])}",
                expected="held-out runs",
                do="choose others with --select",
            )


def _curricula(runs: Any) -> list[tuple[bytes, bytes]]:
    from bayes_simfluence.data.weights import weights_of

    pairs = zip(runs["batch"].values, weights_of(runs), strict=True)
    return [(batch.tobytes(), weight.tobytes()) for batch, weight in pairs]


def new_files(*paths: Path | None, overwrite: bool) -> None:
    """Raise, before any work, when a file that is to be written exists."""
    for path in paths:
        if path is not None:
            new_path(path, overwrite=overwrite)


def table_saved(table: Any, out: Path | None) -> None:
    """Write a table as CSV, or as Markdown where the file is called so."""
    if out is not None:
        text = _markdown(table) + "\n" if out.suffix == ".md" else table.to_csv()
        with atomically(out) as partial:
            partial.write_text(text, "utf-8")
        print(f"table in {out}")


def figure_saved(draw: Callable[[], Any], path: Path | None, *, overwrite: bool) -> None:
    """Draw a picture and write it, where a file for it is named."""
    if path is not None:
        from bayes_simfluence.report.plots import save_figure

        save_figure(draw(), path, overwrite=overwrite)
        print(f"picture in {path}")


def _markdown(table: Any) -> str:
    columns = table.reset_index()
    lines = ["| " + " | ".join(map(str, columns.columns)) + " |", "|---" * columns.shape[1] + "|"]
    for row in columns.itertuples(index=False):
        values = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)
