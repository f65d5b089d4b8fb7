"""Attribution as a prior: what scores say before any run, and what runs make of it.

    python examples/10_scores_as_prior.py --recordings sst2 --scores STUDY --out docs
    python examples/10_scores_as_prior.py --recordings trec --out docs

Simulators with a score matrix as the prior mean of effects (``priors.Scores``) are fitted to 0, 1,
2, ... runs of recordings that ship, beside the attribution alone (one scale, fitted) and the same
prior without scores, and judged on runs that none has seen. ``STUDY`` holds EK-FAC scores, made by
the study in ``scores.yaml``, which trains run 0 once more; without it the scores are products of
the gradient features that ship. Writes tables into a page, a picture, and every figure as JSON; a
second call with the same folder goes on from there.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from truth.marks import between_marks

import bayes_simfluence as bs
from bayes_simfluence.attribution.score_files import load_scores
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.attribution.simulators import additive_simulator
from bayes_simfluence.evaluation.metrics import coverage
from bayes_simfluence.progress import Bars
from bayes_simfluence.report.plots import COLOURS, save_figure

TITLES = {"sst2": "MiniLM on SST-2", "trec": "MiniLM on TREC", "copa": "MiniLM on COPA"}
FITTED = 25
"""The first runs are fitted, the others are judged on."""
SETS = {1: 2, 2: 2}
"""Number of runs -> sets of so many that are fitted apart; one of the larger numbers."""
MEAN = "mean trajectory"
MARKS = "scores as prior"
PLAIN, FEATURES = bs.priors.Normal(features=False), bs.priors.Normal()

Predicted = tuple[np.ndarray, np.ndarray | None]
"""Losses ``(run, time, query)``, and draws of them where there is a band."""


def scores_of(recording: str, runs: xr.Dataset, folder: Path | None) -> dict[str, xr.DataArray]:
    """Score matrices by name."""
    if folder is not None:
        return {"EK-FAC": load_scores(folder / recording / "scores" / "influence-ekfac.nc")}
    # One-checkpoint TracIn of sketched gradients, at the initial weights.
    products = -runs["train_feature"].values @ runs["query_feature"].values.T
    ids = list(runs["train"].values), list(runs["query"].values)
    return {"gradients": score_array(products, *ids, method="grad-dot, sketched", units="1")}


def fits(scores: Mapping[str, xr.DataArray], times: int) -> dict[str, Callable[..., Any]]:
    """Name -> a function of fitted runs and a key that makes a posterior."""

    def with_prior(prior: bs.priors.Prior) -> Callable[..., Any]:
        model = bs.Simfluence(prior=prior)
        return lambda runs, key: bs.fit(runs, model=model, method=bs.Stack(times=times), key=key)

    made = {f"{name} alone": _alone(matrix) for name, matrix in scores.items()}
    made["prior without features"] = with_prior(PLAIN)
    for name, matrix in scores.items():
        made[f"{name} as prior"] = with_prior(bs.priors.Scores(matrix, base=PLAIN))
    made["prior with features"] = with_prior(FEATURES)
    return made


def _alone(matrix: xr.DataArray) -> Callable[..., Any]:
    """Scores with one scale; without runs there is none, and with one run there is no band."""

    def made(runs: xr.Dataset, key: jax.Array) -> bs.Posterior | None:
        count = runs.sizes["run"]
        return additive_simulator(matrix, runs, band=count > 1) if count else None

    return made


def sets_of(count: int) -> list[slice]:
    """The runs of each set."""
    return [slice(first * count, (first + 1) * count) for first in range(SETS.get(count, 1))]


def judged(posterior: bs.Posterior, held: xr.Dataset, key: jax.Array, draws: int) -> dict[str, Any]:
    """Error of the median, and cover of the 90% band: after all steps, and after the last."""
    made = posterior.simulate(held, key=key, draws=draws)["loss"].stack(sample=("chain", "draw"))
    loss = np.asarray(made.transpose("sample", "run", "time", "query").values, float)
    truth = np.asarray(held["loss"].values, float)
    error = np.square(np.median(loss, axis=0) - truth)[:, 1:].mean()
    if len(loss) == 1:
        return {"mse": float(error)}
    inside = coverage(loss, truth, [0.90])[0]
    low, high = np.quantile(loss, [0.05, 0.95], axis=0)
    return {
        "mse": float(error),
        "cover": float(inside[:, 1:].mean()),
        "final_cover": float(inside[:, -1].mean()),
        "width": float((high - low)[:, 1:].mean()),
    }


def mean_trajectory(runs: xr.Dataset, held: xr.Dataset) -> dict[str, float]:
    """Error where held-out runs change as the fitted ones did on average; as they are, of none."""
    loss, truth = (np.asarray(one["loss"].values, float) for one in (runs, held))
    change = (loss - loss[:, :1]).mean(axis=0) if len(loss) else 0.0
    return {"mse": float(np.square(truth[:, :1] + change - truth)[:, 1:].mean())}


def measured(
    recording: str, options: argparse.Namespace, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a measurement, and its figures; those that are known are left out."""
    runs = bs.example_runs(recording).isel(query=slice(0, options.queries))
    fitted, held = runs.isel(run=slice(0, FITTED)), runs.isel(run=slice(FITTED, None))
    simulators = fits(scores_of(recording, runs, options.scores), options.times)
    fit_key, draw_key = jax.random.split(jax.random.key(0))
    todo = [(count, at) for count in options.counts for at in range(len(sets_of(count)))]
    with Bars().work(recording, len(todo)) as meter:
        for count, at in todo:
            some = fitted.isel(run=sets_of(count)[at])
            for name, fit in {MEAN: None, **simulators}.items():
                label = f"{recording}/{name}/{count}/{at}"
                if label in known:
                    continue
                if fit is None:
                    yield label, mean_trajectory(some, held)
                    continue
                posterior = fit(some, fit_key)
                if posterior is not None:
                    yield label, judged(posterior, held, draw_key, options.draws)
            meter.advance(1, f"{count} runs")


def recordings_of(results: Mapping[str, Any]) -> list[str]:
    """Those that were measured, in their order."""
    return list(dict.fromkeys(label.split("/")[0] for label in results["figures"]))


def averaged(
    figures: Mapping[str, Any], recording: str, figure: str
) -> dict[str, dict[int, float]]:
    """By name and number of runs, the mean over sets; errors over that of persistence."""
    unit = figures[f"{recording}/{MEAN}/0/0"]["mse"] if figure == "mse" else 1.0
    found: dict[str, dict[int, list[float]]] = {}
    for label, figures_of in figures.items():
        where, name, count, _ = label.split("/")
        if where == recording and figure in figures_of:
            found.setdefault(name, {}).setdefault(int(count), []).append(figures_of[figure] / unit)
    # What is there from no run on comes first.
    return {
        name: {count: float(np.mean(each)) for count, each in by_count.items()}
        for name, by_count in sorted(found.items(), key=lambda one: 0 not in one[1])
    }


def table(means: Mapping[str, Mapping[int, float]], counts: Sequence[int]) -> str:
    """Markdown: a row for each simulator, a column for each number of runs."""
    lines = [f"| runs fitted | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 1) + "|"]
    for name, row in means.items():
        cells = (f"{row[count]:.2f}" if count in row else "" for count in counts)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """The section, between its marks."""
    parts = []
    for recording in recordings_of(results):
        for figure, title in (
            ("mse", "MSE over persistence's"),
            ("cover", "cover of the 90% band, all steps"),
            ("final_cover", "cover of the 90% band, last step"),
        ):
            means = averaged(results["figures"], recording, figure)
            parts += [f"{TITLES[recording]}, {title}:", table(means, results["counts"])]
    parts.append("![Error and cover against recorded runs](scores-as-prior.png)")
    return "\n\n".join(parts)


def picture(results: Mapping[str, Any]) -> Figure:
    """Error and cover against the number of fitted runs, a column for each recording."""
    recordings, counts = recordings_of(results), results["counts"]
    figure = Figure(figsize=(4.6 * len(recordings), 6.4), layout="constrained")
    grid = figure.subplots(2, len(recordings), squeeze=False)
    places = {count: place for place, count in enumerate(counts)}
    for column, recording in enumerate(recordings):
        for axes, kind in zip(grid[:, column], ("mse", "cover"), strict=True):
            means = averaged(results["figures"], recording, kind)
            for name, row in means.items():
                x = [places[count] for count in sorted(row)]
                axes.plot(
                    x,
                    [row[count] for count in sorted(row)],
                    color="black" if name == MEAN else COLOURS[_kind(name)],
                    linestyle=_style(name),
                    marker=".",
                    label=name,
                )
            axes.set_xticks(range(len(counts)), [str(count) for count in counts])
            axes.set_xlabel("runs fitted")
            axes.set_xlim(-0.3, len(counts) - 0.7)
        grid[0, column].set_title(TITLES[recording])
        grid[0, column].set_yscale("log")
        grid[1, column].axhline(0.9, color="0.6", linewidth=0.8)
        grid[1, column].set_ylim(0.0, 1.02)
    grid[0, 0].set_ylabel("MSE over persistence's")
    grid[1, 0].set_ylabel("cover of the 90% band")
    shown = {}
    for axes in grid[0]:
        shown |= {
            label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def _kind(name: str) -> int:
    """What a line's colour says: no scores, or which."""
    return ("prior", "EK-FAC", "gradients").index(name.split()[0])


def _style(name: str) -> str:
    """Dotted: alone; dashed: without features; full: as a prior, or with features."""
    if name.endswith("alone") or name == MEAN:
        return ":"
    return "--" if "without" in name else "-"


def main() -> None:
    """Fit, judge, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("scores-as-prior"))
    parser.add_argument("--scores", type=Path, help="folder of the study in scores.yaml")
    parser.add_argument("--recordings", nargs="+", default=["sst2", "trec"], choices=[*TITLES])
    parser.add_argument("--counts", nargs="+", type=int, default=[0, 1, 2, 5, 8, 15, FITTED])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--queries", type=int, default=50, help="fewer, for a trial")
    parser.add_argument("--times", type=int, default=12, help="of each run that fits condition on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = options.out / "scores-as-prior.json"
    results = json.loads(numbers.read_text("utf-8")) if numbers.exists() else {"figures": {}}
    results["counts"] = sorted({*results.get("counts", []), *options.counts})
    # Of few runs the verdict says so, and support is not looked at here.
    warnings.simplefilter("ignore", bs.FitWarning)
    warnings.simplefilter("ignore", bs.SupportWarning)
    for recording in options.recordings:
        for label, figures in measured(recording, options, results["figures"]):
            results["figures"][label] = figures
            numbers.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    save_figure(picture(results), options.out / "scores-as-prior.png", overwrite=True)
    target = options.out / "baselines.md"
    whole = target.read_text("utf-8") if target.exists() else "# Baselines\n\n"
    target.write_text(between_marks(whole, page(results), MARKS), "utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
