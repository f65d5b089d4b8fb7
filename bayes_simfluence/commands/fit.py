"""``fit``: recorded runs in, a saved posterior and the settings that repeat it out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.commands.options import (
    Config,
    Overwrite,
    Quiet,
    RunsFile,
    config_of,
    new_files,
    opened,
    progress_of,
    selected,
    with_settings,
)
from bayes_simfluence.posterior.config import FitConfig
from bayes_simfluence.settings import config_path, save_config


def _fit(
    runs: RunsFile,
    out: Annotated[
        Path, typer.Option(help="New file for the posterior (.nc); its settings go beside it.")
    ],
    config: Config = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when the verdict is bad.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Fit a simulator to recorded runs and save its posterior."""
    new_files(out, config_path(out), overwrite=overwrite)
    settings = config_of(FitConfig, config, options)
    model, method = settings.parts()

    import jax

    from bayes_simfluence.posterior import fit as fitting

    recorded = opened(runs)
    validation = settings.validate
    posterior = fitting.fit(
        selected(recorded, settings.select, "--select"),
        key=jax.random.key(settings.seed),
        model=model,
        method=method,
        validation=selected(recorded, validation, "--validate") if validation else None,
        strict=strict,
        progress=progress_of(quiet),
    )
    posterior.save(out, overwrite=overwrite)
    save_config(settings.resolved().as_dict(), config_path(out))
    print(f"{posterior.verdict}\nposterior in {out}\nsettings in {config_path(out)}")


fit = with_settings(_fit, FitConfig)
