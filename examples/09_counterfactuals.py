"""A page of truth: counterfactuals that were really trained, beside what was simulated of them.

    python examples/09_counterfactuals.py --out docs --overwrite
    python examples/09_counterfactuals.py --recording sst2 --out docs --overwrite

Fits simulators to random runs and to as many of a diverse design, and judges them on curricula that
were trained as well: like the fitted ones, edited, rearranged, longer, at other step and batch
sizes, with examples and queries that no fit knew. Writes tables into a page, a picture, and every
figure as JSON.

Without ``--recording`` a small checkpoint is made and fine-tuned on texts that ship with the
package; ``--work FOLDER`` keeps its recordings, and a second call with the same folder goes on from
there. The recordings of MiniLM ship; ``--data FOLDER``, with a folder of texts for each task,
records them anew.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from truth.kinds import KINDS, LIKE, NEW_QUERIES
from truth.marks import between_marks
from truth.recordings import (
    DEMO,
    DIVERSE,
    JUDGED,
    RANDOM,
    RECORDINGS,
    SMALL,
    Recorded,
    demo_settings,
    export,
    shipped,
    sorted_out,
    text_settings,
    trained,
)

import bayes_simfluence as bs
from bayes_simfluence.evaluation.metrics import coverage, tails
from bayes_simfluence.files import new_path
from bayes_simfluence.posterior.support import ENOUGH
from bayes_simfluence.progress import Bars
from bayes_simfluence.report.plots import COLOURS, save_figure

DEFAULT = "default"
FITS = {
    DEFAULT: (RANDOM, bs.Simfluence(), bs.Stack),
    "one fit": (RANDOM, bs.Simfluence(), bs.Exact),
    "additive": (RANDOM, bs.Simfluence(coupling="none"), bs.Stack),
    "default, diverse runs": (DIVERSE, bs.Simfluence(), bs.Stack),
}
"""Name -> runs, model and method of a fit."""
TITLES = {
    "demo": "The demo's network",
    "sst2": "MiniLM on SST-2",
    "trec": "MiniLM on TREC",
    "sst2-lora": "MiniLM with LoRA on SST-2",
    "trec-lora": "MiniLM with LoRA on TREC",
}
"""Of the page's sections."""
SAID = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)
"""Ends of the groups of P(lower)."""
SHOWN = (DEFAULT, "additive")
"""Fits of the picture."""


@dataclass(frozen=True)
class Simulated:
    """Draws with and without the noise of a run at recorded times, and support.

    Attributes:
        loss, mean_loss: ``(draw, run, time, query)``, nats.
        support: ``(run, time)``.
    """

    loss: np.ndarray
    mean_loss: np.ndarray
    support: np.ndarray

    def of_runs(self, order: np.ndarray) -> "Simulated":
        """The runs in another order."""
        return Simulated(self.loss[:, order], self.mean_loss[:, order], self.support[order])


def simulated(posterior: bs.Posterior, runs: xr.Dataset, key: jax.Array, draws: int) -> Simulated:
    """Of recorded runs, of which nothing but curricula and initial losses is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs.SupportWarning)
        made = posterior.simulate(runs, key=key, draws=draws)
    stacked = made.stack(sample=("chain", "draw")).transpose("sample", "run", "time", "query")
    seen = seen_times(runs)
    loss, mean_loss = (
        np.asarray(stacked[name].values[:, :, seen], float) for name in ("loss", "mean_loss")
    )
    return Simulated(loss, mean_loss, made["support"].values)


def seen_times(runs: xr.Dataset) -> np.ndarray:
    """Positions of the times at which the losses were recorded."""
    return np.flatnonzero(np.isfinite(runs["loss"].values).all(axis=(0, 2)))


def energy(draws: np.ndarray, truth: np.ndarray) -> float:
    """Energy score (Gneiting & Raftery 2007, eq. 21) over queries, mean over runs and times."""
    apart = np.linalg.norm(draws - truth[None], axis=-1).mean()
    return float(apart - 0.5 * np.linalg.norm(draws - np.roll(draws, 1, axis=0), axis=-1).mean())


def independent(draws: np.ndarray) -> np.ndarray:
    """The same draws of each query, in an order of its own."""
    rng = np.random.default_rng(0)
    order = [rng.permutation(len(draws)) for _ in range(draws.shape[-1])]
    return np.stack([draws[each, ..., at] for at, each in enumerate(order)], axis=-1)


def covered(draws: np.ndarray, truth: np.ndarray) -> list[float]:
    """Share of true values in the 90% band: after all steps, and after the last."""
    inside = coverage(draws, truth, [0.90])[0]
    return [float(inside[:, 1:].mean()), float(inside[:, -1].mean())]


def judged(
    ours: Simulated,
    truth: np.ndarray,
    mean_trajectory: np.ndarray,
    sides: np.ndarray,
) -> dict[str, Any]:
    """Error, cover of single queries and of sums over queries, support; of one kind."""
    error = np.square(np.median(ours.loss, axis=0) - truth)[:, 1:].mean()
    of_mean = np.square(mean_trajectory - truth)[:, 1:].mean()
    of_class = [
        covered(ours.loss[..., sides == side].mean(-1), truth[..., sides == side].mean(-1))
        for side in np.unique(sides)
    ]
    least = ours.support.min(axis=1)
    alone = energy(independent(ours.loss), truth)
    return {
        "mse": float(error),
        "mse_of_mean_trajectory": float(of_mean),
        "ratio": float(error / of_mean),
        "query": covered(ours.loss, truth),
        "mean": covered(ours.loss.mean(-1), truth.mean(-1)),
        "classes": np.mean(of_class, axis=0).tolist(),
        "energy": energy(ours.loss, truth) / alone,
        "support": float(least.min()),
        "flagged": int((least < ENOUGH).sum()),
    }


def compared(
    ours: Simulated, unedited: Simulated, truth: np.ndarray, true_unedited: np.ndarray
) -> dict[str, Any]:
    """Cover of the difference to the unedited run, and P(lower at the end) against what was.

    Runs of another length are compared at their ends alone.
    """
    if truth.shape != true_unedited.shape:
        ours, unedited = (replace(one, loss=one.loss[:, :, [0, -1]]) for one in (ours, unedited))
        truth, true_unedited = truth[:, [0, -1]], true_unedited[:, [0, -1]]
    change, true = ours.loss - unedited.loss, truth - true_unedited
    said, lower = (change[:, :, -1] < 0).mean(axis=0), true[:, -1] < 0
    group = np.digitize(said, SAID[1:-1])
    return {
        "difference": covered(change, true),
        "lower": [float(said.mean()), float(lower.mean()), float(np.square(said - lower).mean())],
        "lower_by_said": [
            [int((group == at).sum()), int(lower[group == at].sum())] for at in range(len(SAID) - 1)
        ],
    }


def following(fitted: xr.Dataset, kind: xr.Dataset) -> np.ndarray:
    """The fitted runs' mean change from the true start; beyond its end it stays as it is.

    Queries that were not fitted follow the mean of the others.
    """
    truth = kind["loss"].values[:, seen_times(kind)]
    mean = (fitted["loss"] - fitted["loss"].isel(time=0)).mean("run")
    known = bool(np.isin(kind["query"].values, fitted["query"].values).all())
    change = (mean if known else mean.mean("query", keepdims=True)).values
    last = seen_times(fitted)[-1]
    return truth[:, :1] + change[np.minimum(seen_times(kind), last)]


def judge(
    posterior: bs.Posterior, runs: Recorded, key: jax.Array, draws: int
) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    """Kind, figures, and of the mean over queries of its first run low, middle and high."""
    like, reference = runs.kinds[LIKE], runs.fitted[RANDOM]
    unedited = simulated(posterior, like, key, draws)
    # A run's error is drawn by its place: in another, unedited runs have errors of their own.
    order = np.roll(np.arange(JUDGED), 1)
    moved = simulated(posterior, like.isel(run=order), key, draws)
    apart = moved.of_runs(np.argsort(order))
    with Bars().work("simulate", len(KINDS)) as meter:
        for name, kind in runs.kinds.items():
            ours = unedited if name == LIKE else simulated(posterior, kind, key, draws)
            truth = np.asarray(kind["loss"].values[:, seen_times(kind)], float)
            told = judged(ours, truth, following(reference, kind), runs.sides[name])
            if name not in (LIKE, NEW_QUERIES):
                true_like = np.asarray(like["loss"].values[:, seen_times(like)], float)
                told |= compared(ours, unedited, truth, true_like)
                own = compared(ours, apart, truth, true_like)
                told |= {f"{figure}_own_errors": value for figure, value in own.items()}
            low, high = np.quantile(ours.loss[:, 0].mean(axis=-1), tails(0.90), axis=0)
            middle = np.median(ours.mean_loss[:, 0].mean(axis=-1), axis=0)
            yield name, told, np.stack([low, middle, high])
            meter.advance(1, name)


def number(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}" if abs(value) < 0.095 and value else f"{value:.2f}"


def text(told: Mapping[str, Any], name: str) -> str:
    """A cell: a number, or numbers with strokes between; nothing where there is none."""
    value = told.get(name)
    if value is None:
        return ""
    if name == "flagged":
        return f"{value} of {JUDGED}"
    return " / ".join(map(number, value if isinstance(value, list) else [value]))


COLUMNS = {
    "mse": "MSE",
    "ratio": "over mean trajectory's",
    "query": "one query",
    "mean": "mean over queries",
    "classes": "class means",
    "energy": "energy score over independent draws'",
    "difference": "difference",
    "difference_own_errors": "difference, own errors",
    "lower": "P(lower): said / was / Brier",
    "support": "least support",
    "flagged": "flagged",
}
"""Of a fit's table."""


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items())])


def page(results: Mapping[str, Any]) -> str:
    """A section, between its marks."""
    fits, size = results["fits"], results["settings"]
    side_by_side = {
        title: table(
            ["curricula", *fits],
            {
                kind: [
                    text(fit["kinds"][kind], name) + "*" * (fit["kinds"][kind]["flagged"] > 0)
                    for fit in fits.values()
                ]
                for kind in KINDS
            },
        )
        for name, title in (
            ("ratio", "MSE over the mean trajectory's:"),
            ("query", "Cover of single queries, all steps / last step:"),
            ("mean", "Cover of the mean over queries:"),
        )
    }
    each = [
        f"### {results['title']}: {fit}\n\n{about['verdict']} {about['notes'][0]}\n\n"
        + table(
            ["curricula", *COLUMNS.values()],
            {kind: [text(told, name) for name in COLUMNS] for kind, told in about["kinds"].items()},
        )
        for fit, about in fits.items()
    ]
    return "\n\n".join(
        [
            f"## {results['title']}",
            f"{size['runs']} random runs fitted, each {size['per_run']} examples, {size['steps']} "
            f"steps of {size['batch_size']}, {size['queries']} queries; {JUDGED} runs of each "
            f"kind. {spent(results['minutes'])}",
            f"![Mean loss over queries of one run of each kind]({results['picture']})",
            "Cover of the 90% band, mean over kinds, all steps / last step:",
            cover_table(fits),
            "Below, a star: at least one run of the kind was flagged.",
            *(part for pair in side_by_side.items() for part in pair),
            "P(lower at the end than unedited), said, and how often it was:",
            lower_table(fits),
            *each,
        ]
    )


def cover_table(fits: Mapping[str, Any]) -> str:
    """Covers averaged over kinds: those of which no run was flagged, and the others."""
    names = ("query", "mean", "classes", "difference", "difference_own_errors")
    rows = {}
    for fit, about in fits.items():
        for which, wanted in (("no flag", False), ("flagged", True)):
            kinds = [one for one in about["kinds"].values() if (one["flagged"] > 0) == wanted]
            found = [[one[name] for one in kinds if name in one] for name in names]
            rows[f"{fit}; {len(kinds)} kinds, {which}"] = [
                " / ".join(map(number, np.mean(each, axis=0))) if each else "" for each in found
            ]
    return table(["fit", *(COLUMNS[name] for name in names)], rows)


def lower_table(fits: Mapping[str, Any]) -> str:
    """How often losses were lower, by the P(lower) that was said, over all kinds."""
    rows = {}
    for name, fit in fits.items():
        told = [one["lower_by_said"] for one in fit["kinds"].values() if "lower_by_said" in one]
        rows[name] = [
            f"{was / count:.2f} of {count}" if count else "" for count, was in np.sum(told, axis=0)
        ]
    groups = [f"{low:.1f} to {high:.1f}" for low, high in pairwise(SAID)]
    return table(["fit", *groups], rows)


def spent(minutes: Mapping[str, float]) -> str:
    """The time that it took."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return f"Minutes on {os.cpu_count()} cores: {parts}; {sum(minutes.values()):.0f} in all."


def picture(
    runs: Recorded, bands: Mapping[str, Mapping[str, np.ndarray]], told: Mapping[str, Any]
) -> Figure:
    """Mean loss over queries of one run of each kind: trained, simulated, unedited."""
    columns = 4
    rows = -(-len(KINDS) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns)
    like = runs.kinds[LIKE]
    unedited = like["loss"].isel(run=0, time=seen_times(like)).mean("query")
    first = next(iter(told.values()))["kinds"]
    for axes, (kind, kind_runs) in zip(grid.flat, runs.kinds.items(), strict=False):
        truth = kind_runs["loss"].isel(run=0, time=seen_times(kind_runs)).mean("query")
        for colour, of_fit in zip(COLOURS, bands.values(), strict=False):
            low, middle, high = of_fit[kind]
            axes.fill_between(truth["time"], low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(truth["time"], middle, color=colour, linewidth=1.2)
        if kind != LIKE:
            axes.plot(unedited["time"], unedited, color="0.45", linewidth=1.0, linestyle=":")
        axes.plot(truth["time"], truth, color="black", linewidth=1.2)
        flag = ", flagged" if first[kind]["flagged"] else ""
        axes.set_title(f"{kind} ({first[kind]['support']:.2f}{flag})", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(KINDS) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("mean loss (nats)", fontsize=9)
    for axes in grid.flat[len(KINDS) - columns : len(KINDS)]:
        axes.set_xlabel("time (updates)", fontsize=9)
    lines = [
        Line2D([], [], color="black", label="trained"),
        Line2D([], [], color="0.45", linestyle=":", label="trained, unedited run"),
    ]
    names = [
        Patch(color=colour, alpha=0.5, label=f"{name}: mean loss, 90% band")
        for colour, name in zip(COLOURS, bands, strict=False)
    ]
    figure.legend(
        handles=[*lines, *names], loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    return figure


def study(work: Path, options: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Record, fit and judge: every figure, and the picture."""
    begun = time.monotonic()
    minutes: dict[str, float] = {}

    def part(name: str) -> None:
        """Count the time since the last part."""
        minutes[name] = (time.monotonic() - begun) / 60 - sum(minutes.values())

    everything, config = opened(work, options)
    runs = sorted_out(everything)
    part("recording, or opening what was recorded")
    fit_key, draw_key = jax.random.split(jax.random.key(options.seed))
    told: dict[str, Any] = {}
    bands: dict[str, dict[str, np.ndarray]] = {}
    chosen = ((name, fit) for name, fit in FITS.items() if fit[0] in runs.fitted)
    for name, (design, model, method) in islice(chosen, options.fits):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bs.FitWarning)
            posterior = bs.fit(
                runs.fitted[design],
                model=model,
                method=method(times=options.times),
                key=fit_key,
                progress=Bars(),
            )
        told[name] = {"verdict": posterior.verdict.sentence, "notes": posterior.verdict.notes}
        told[name]["kinds"] = {}
        for kind, figures, band in judge(posterior, runs, draw_key, options.draws):
            told[name]["kinds"][kind] = figures
            if name in SHOWN:
                bands.setdefault(name, {})[kind] = band
        part(name)
    queries = runs.fitted[RANDOM].sizes["query"]
    results = {
        "title": TITLES[options.recording],
        "picture": f"{stem(options)}.png",
        "settings": {**config, "queries": queries, "draws": options.draws, "times": options.times},
        "minutes": minutes,
        "fits": told,
    }
    return results, picture(runs, bands, told)


def opened(work: Path, options: argparse.Namespace) -> tuple[list[xr.Dataset], dict[str, Any]]:
    """Everything that was trained, and its sizes."""
    if options.recording == "demo":
        size = SMALL if options.small else DEMO
        config = demo_settings(work, size, options.seed)
        runs = trained(work, config)
    elif options.data is None:
        runs = shipped(options.recording)
    else:
        runs = trained(work, text_settings(options.data, options.recording, options.seed))
        export(runs, options.recording, options.out)
    fitted = sorted_out(runs).fitted[RANDOM]
    batch = fitted["batch"].values
    return runs, {
        "runs": len(batch),
        "steps": batch.shape[1],
        "batch_size": batch.shape[2],
        "per_run": len(np.unique(batch[0])),
        "seed": options.seed,
    }


def stem(options: argparse.Namespace) -> str:
    """Name of the files, without ending."""
    suffix = "" if options.recording == "demo" else f"-{options.recording}"
    return f"counterfactuals{suffix}"


def main() -> None:
    """Make the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("counterfactuals"))
    parser.add_argument("--work", type=Path, help="keep the recordings here, and use those there")
    parser.add_argument("--recording", choices=["demo", *RECORDINGS], default="demo")
    parser.add_argument("--data", type=Path, help="folder of texts: record MiniLM anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=199)
    parser.add_argument("--times", type=int, default=24, help="fewer, for a trial")
    parser.add_argument("--fits", type=int, default=len(FITS), help="fewer, for a trial")
    parser.add_argument("--small", action="store_true", help="fewer, shorter runs, for a trial")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options = parser.parse_args()
    numbers, image = (
        new_path(options.out / f"{stem(options)}.{end}", overwrite=options.overwrite)
        for end in ("json", "png")
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results, figure = study(work, options)
    numbers.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    save_figure(figure, image, overwrite=options.overwrite)
    target = options.out / "counterfactuals.md"
    whole = target.read_text("utf-8") if target.exists() else "# Counterfactuals\n\n"
    target.write_text(between_marks(whole, page(results), options.recording), "utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
