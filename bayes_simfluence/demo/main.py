"""The main way, end to end, on a small network and texts that ship with the package."""

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr

from bayes_simfluence.attribution.simple import mean_trajectory, persistence
from bayes_simfluence.counterfactual.edits import drop, edit_runs
from bayes_simfluence.demo.pretrain import pretrained_checkpoint
from bayes_simfluence.evaluation.calibration import by_horizon
from bayes_simfluence.evaluation.compare import compare
from bayes_simfluence.files import PathLike, new_path
from bayes_simfluence.inference.ridge import Ridge
from bayes_simfluence.posterior.fit import fit
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.from_config import optimizer_of, task_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.session import record_from_config
from bayes_simfluence.report.plots import (
    plot_coverage,
    plot_curves,
    plot_effects,
    plot_two,
    save_figure,
)
from bayes_simfluence.report.tables import markdown
from bayes_simfluence.tasks.rows import read_rows

FITTED, VALIDATED, HELD_OUT = 16, 2, 6
SIZES: dict[str, Any] = {
    "examples": 240,
    "queries": 40,
    "per_run": 160,
    "batch_size": 8,
    "epochs": 5,
}
"""Of the recording."""
DROPPED = 10
"""Training examples that the counterfactual leaves out."""


@dataclass(frozen=True)
class Demo:
    """Results of the demo.

    Attributes:
        table: methods x metrics on the held-out runs.
        verdict: of the Bayesian fit.
        query_text: of the query that its most harmful examples hurt most.
        dropped: those examples: text, label, probability of being harmful.
        simulated: change of the query's final loss without them: median, low, high (90%).
        recorded: the same change when the run is really trained without them.
        folder: where everything is written.
    """

    table: pd.DataFrame
    verdict: str
    query_text: str
    dropped: pd.DataFrame
    simulated: tuple[float, float, float]
    recorded: float
    folder: Path


def run_demo(out: PathLike, *, seed: int = 0, progress: Progress | None = None) -> Demo:
    """Pretrain, record, fit, simulate, compare, try a counterfactual; write everything to ``out``.

    Raises:
        Misuse: ``out`` exists or cannot be written to.
    """
    progress = progress or Silent()
    folder = new_path(out)
    folder.mkdir(parents=True)
    fit_key, simulate_key, compare_key = jax.random.split(jax.random.key(seed), 3)
    config = _checkpoint_and_config(folder, seed, progress)
    runs = record_from_config(config, folder / "runs.zarr", progress=progress)
    fitted = runs.isel(run=slice(0, FITTED))
    validation = runs.isel(run=slice(FITTED, FITTED + VALIDATED))
    held_out = runs.isel(run=slice(FITTED + VALIDATED, None))
    posterior = fit(fitted, key=fit_key, progress=progress)
    ridge = fit(
        fitted, method=Ridge(band=True), validation=validation, key=fit_key, progress=progress
    )
    methods = {
        "bayes": posterior,
        "ridge (paper)": ridge,
        "mean trajectory": mean_trajectory(fitted),
        "initial loss kept": persistence(fitted),
    }
    table = compare(methods, held_out, key=compare_key, progress=progress)
    posterior.save(folder / "posterior.nc")
    table.to_csv(folder / "table.csv")
    (folder / "table.md").write_text(markdown(table) + "\n", "utf-8")
    shown = {name: methods[name] for name in ("bayes", "ridge (paper)")}
    with progress.work("figures", 3) as meter:
        simulated = {
            name: method.simulate(held_out, key=simulate_key) for name, method in shown.items()
        }
        save_figure(plot_curves(simulated, held_out), folder / "curves.png")
        meter.advance()
        horizons = {
            name: by_horizon(method, held_out, key=simulate_key)
            for name, method in methods.items()
            if name != "initial loss kept"
        }
        save_figure(plot_coverage(horizons), folder / "coverage.png")
        meter.advance()
        counterfactual = _counterfactual(
            posterior, held_out, config, folder, simulate_key, progress
        )
        meter.advance()
    return Demo(table, str(posterior.verdict), *counterfactual, folder)


def _checkpoint_and_config(folder: Path, seed: int, progress: Progress) -> RecordConfig:
    texts: list[str] = []
    for name in ("train.jsonl", "query.jsonl"):
        with as_file(files("bayes_simfluence.demo") / name) as source:
            (folder / name).write_bytes(source.read_bytes())
        texts += read_rows(folder / name).column("text", "text_field")
    key = jax.random.fold_in(jax.random.key(seed), 1)
    pretrained_checkpoint(texts, folder / "checkpoint", key=key, progress=progress)
    return RecordConfig(
        checkpoint=str(folder / "checkpoint"),
        train=str(folder / "train.jsonl"),
        query=str(folder / "query.jsonl"),
        runs=FITTED + VALIDATED + HELD_OUT,
        **SIZES,
        learning_rate=8e-4,
        max_tokens=24,
        parallel=8,
        seed=seed,
    ).validate()


def _counterfactual(
    posterior: Posterior,
    held_out: xr.Dataset,
    config: RecordConfig,
    folder: Path,
    key: jax.Array,
    progress: Progress,
) -> tuple[str, pd.DataFrame, tuple[float, float, float], float]:
    """Drop from a held-out run what hurts a query most; simulate that, and train it for real."""
    run = held_out.isel(run=slice(0, 1))
    batch = run["batch"].values[0]
    effects = posterior.samples(key=key)["staying"].isel(train=np.unique(batch[batch >= 0]))
    mean = effects.mean(("chain", "draw"))
    worst = mean.values.argsort(axis=1)[:, -DROPPED:]
    hurt = np.take_along_axis(mean.values, worst, axis=1).sum(axis=1)
    query = held_out["query"].values[int(hurt.argmax())]
    of_query = effects.sel(query=query)
    harmful = of_query["train"].values[worst[int(hurt.argmax())]][::-1]
    planned = edit_runs(run, drop, harmful)
    before, after = (posterior.simulate(curriculum, key=key) for curriculum in (run, planned))
    actual = record(
        task_of(config),
        planned["batch"].values,
        optimizer_of(config),
        store=folder / "counterfactual.zarr",
        features=0,
        progress=progress,
    )
    names = ("all examples", f"without the {DROPPED} most harmful")
    truth = (run.isel(run=0).sel(query=query)["loss"], actual.isel(run=0).sel(query=query)["loss"])
    figure = plot_two(before, after, query=query, names=names, recorded=truth)
    save_figure(figure, folder / "counterfactual.png")
    save_figure(plot_effects(of_query, unit="log-odds"), folder / "effects.png")
    change = (after["mean_loss"] - before["mean_loss"]).sel(query=query).isel(run=0, time=-1)
    low, middle, high = np.quantile(change.values, [0.05, 0.5, 0.95])
    dropped = _described(of_query.sel(train=harmful), folder / "train.jsonl")
    dropped.to_csv(folder / "dropped.csv")
    rows = read_rows(folder / "query.jsonl")
    return (
        rows.column("text", "text_field")[rows.ids.index(str(query))],
        dropped,
        (float(middle), float(low), float(high)),
        float((truth[1] - truth[0])[-1]),
    )


def _described(effects: xr.DataArray, file: Path) -> pd.DataFrame:
    rows = read_rows(file)
    places = [rows.ids.index(str(name)) for name in effects["train"].values]
    return pd.DataFrame(
        {
            "text": [rows.fields[place]["text"] for place in places],
            "label": [str(rows.fields[place]["label"]) for place in places],
            "probability_harmful": (effects > 0).mean(("chain", "draw")).values,
        },
        index=pd.Index(effects["train"].values, name="train"),
    )
