"""``simulate``: curricula, as recorded or with examples left out, with a band on request."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse, choice_of, named
from bayes_simfluence.commands.options import (
    Draws,
    Figure,
    Overwrite,
    Quiet,
    RunsFile,
    Seed,
    Select,
    figure_saved,
    new_files,
    opened,
    progress_of,
    selected,
)
from bayes_simfluence.files import atomically

BANDS = ("credible", "conformal")


def simulate(
    posterior: Annotated[Path, typer.Argument(help="Posterior saved by fit.")],
    runs: RunsFile,
    out: Annotated[Path, typer.Option(help="New file for the trajectories (.nc).")],
    select: Select = "",
    drop: Annotated[
        str, typer.Option(help="Ids of training examples to leave out, separated by commas.")
    ] = "",
    band: Annotated[
        str,
        typer.Option(
            help="Add edges low and high: credible, as the posterior has it, or conformal, "
            "calibrated on runs that were not fitted; none if empty."
        ),
    ] = "",
    probability: Annotated[
        float | None, typer.Option(help="Probability of the band.", show_default="0.9")
    ] = None,
    simultaneous: Annotated[
        bool, typer.Option("--simultaneous", help="The band holds whole trajectories.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Recorded runs that calibrate a conformal band; left-out fitted runs if omitted."
        ),
    ] = None,
    calibration_select: Annotated[
        str, typer.Option(help="Positions of those runs; all if empty.")
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse runs that leave what the fitted runs did.")
    ] = False,
    observed: Annotated[
        Path | None,
        typer.Option(
            help="Losses of these runs that are known: a recording, or loss (run, time, query) "
            "alone (.zarr or .nc), such as those of some queries or of the first times, NaN where "
            "nothing is known. The rest is simulated given them."
        ),
    ] = None,
    figure: Figure = None,
    draws: Draws = 200,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate recorded curricula, as they are or with examples left out."""
    new_files(out, figure, overwrite=overwrite)
    _check_observed(observed, drop)
    _check_band(band, probability, simultaneous, calibration, calibration_select)

    import jax

    from bayes_simfluence.counterfactual import edits
    from bayes_simfluence.data.netcdf import write_groups
    from bayes_simfluence.posterior.posterior import load_posterior
    from bayes_simfluence.report.plots import plot_curves

    chosen = _band_of(band, probability, simultaneous, calibration, calibration_select)
    fitted = load_posterior(posterior)
    everything = opened(runs)
    recorded = selected(everything, select, "--select")
    known = None if observed is None else _observed_of(observed, everything, recorded)
    ids = [name.strip() for name in drop.split(",") if name.strip()]
    planned = edits.edit_runs(recorded, edits.drop, ids) if ids else recorded
    with progress_of(quiet).work("simulate", 1) as meter:
        simulated = fitted.simulate(
            planned,
            key=jax.random.key(seed),
            draws=draws,
            band=chosen,
            strict=strict,
            observed=known,
        )
        meter.advance()
    with atomically(out) as partial:
        write_groups(partial, {"/": simulated})
    print(f"{planned.sizes['run']} runs x {simulated.sizes['draw']} draws in {out}")
    if known is not None:
        given = known.notnull().sum(("time", "query"))
        print(f"given {int(given.sum())} losses of {int((given > 0).sum())} runs in {observed}")
    print(_supported(simulated["support"]))
    if chosen is not None:
        print(_sentence_of(simulated["low"].attrs))
    truth = None if ids else recorded
    figure_saved(lambda: plot_curves({"simulated": simulated}, truth), figure, overwrite=overwrite)


def _check_band(
    band: str,
    probability: float | None,
    simultaneous: bool,
    calibration: Path | None,
    calibration_select: str,
) -> None:
    choice_of("--band", band, ["", *BANDS])
    for option, passed, wanted in (
        ("--probability", probability is not None, BANDS),
        ("--simultaneous", simultaneous, BANDS),
        ("--calibration", calibration is not None, BANDS[1:]),
        ("--calibration-select", bool(calibration_select), BANDS[1:]),
    ):
        if passed and band not in wanted:
            raise Misuse(
                option,
                got=f"--band {band}" if band else "no --band",
                expected=" or ".join(f"--band {name}" for name in wanted),
                do="add it, or leave the option out",
            )
    if calibration_select and calibration is None:
        raise Misuse(
            "--calibration-select",
            got="no --calibration",
            expected="a file of runs",
            do="pass --calibration RUNS",
        )


def _check_observed(observed: Path | None, drop: str) -> None:
    if observed is not None and drop:
        raise Misuse(
            "--observed",
            got="--drop, which makes other runs than those that were observed",
            expected="runs as they are recorded",
            do="leave one of the two out, or simulate the runs together with edited ones in Python",
        )


def _observed_of(path: Path, recorded: Any, planned: Any) -> Any:
    """Losses of the planned runs among those in the file, all of which are recorded runs'."""
    from bayes_simfluence.data.store import open_losses

    losses = open_losses(path)
    if "run" not in losses.indexes:
        return losses  # Posterior.simulate says what is wrong with them.
    named(f"--observed {path}: run", losses["run"].values, recorded["run"].values)
    wanted = set(planned["run"].values.astype(str))
    runs = losses["run"].values.astype(str)
    return losses.isel(run=[place for place, run in enumerate(runs) if run in wanted])


def _band_of(
    band: str,
    probability: float | None,
    simultaneous: bool,
    calibration: Path | None,
    calibration_select: str,
) -> Any:
    from bayes_simfluence.posterior.bands import Credible
    from bayes_simfluence.posterior.conformal import Conformal

    share = 0.9 if probability is None else probability
    if band == "conformal":
        runs = None
        if calibration is not None:
            runs = selected(opened(calibration), calibration_select, "--calibration-select")
        return Conformal(runs, probability=share, simultaneous=simultaneous)
    return Credible(share, simultaneous) if band else None


def _supported(support: Any) -> str:
    least, enough = support.min("time"), support.attrs["enough"]
    left = int((least < enough).sum())
    share = f"{left} of {len(least)} runs"
    return f"support: {float(least.min()):.2f} at least, below {enough} in {share}"


def _sentence_of(about: dict[str, Any]) -> str:
    whole = "whole trajectories" if about["simultaneous"] else "each time"
    sentence = f"{about['kind']} band of {about['probability']:.0%} for {whole}: low, high"
    if "n_calibration" not in about:
        return sentence
    return f"{sentence} (calibrated on {about['n_calibration']} runs, {about['calibration']})"
