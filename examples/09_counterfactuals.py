"""A page of truth: counterfactuals that were really trained, beside what was simulated of them.

    python examples/09_counterfactuals.py --out docs --overwrite

Makes a small checkpoint, records its fine-tuning on texts that ship with the package, fits
simulators to random runs and to as many of a diverse design, and judges them on curricula that were
trained as well: like the fitted ones, edited, rearranged, longer, at other step and batch sizes.
Writes tables into a page, a picture, and every figure as JSON. ``--work FOLDER`` keeps the
recordings, and a second call with the same folder goes on from there.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import bayes_simfluence as bs
from bayes_simfluence.counterfactual.edits import drop, reverse
from bayes_simfluence.demo.pretrain import pretrained_checkpoint
from bayes_simfluence.evaluation.metrics import coverage, tails
from bayes_simfluence.files import new_path
from bayes_simfluence.posterior.support import ENOUGH
from bayes_simfluence.progress import Bars
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.from_config import classes_of, optimizer_of, task_of
from bayes_simfluence.report.plots import COLOURS, save_figure
from bayes_simfluence.tasks.rows import read_rows

SIZE = {"examples": 240, "queries": 40, "per_run": 160, "batch_size": 8, "epochs": 5}
SMALL = {"examples": 24, "queries": 6, "per_run": 16, "batch_size": 4, "epochs": 3}
"""Sizes with ``--small``."""
JUDGED = 4
"""Runs of each kind."""
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
"""Of the page, between which everything is written."""

Batches = np.ndarray
"""``(step, slot)``, positions of training examples, -1 = empty."""


@dataclass(frozen=True)
class Source:
    """What a counterfactual is made of.

    Attributes:
        batches: of the unedited run.
        side: the class that this run's edit is about.
        labels: of all training examples.
        rng: decides what is drawn.
    """

    batches: Batches
    side: int
    labels: np.ndarray
    rng: np.random.Generator

    @property
    def members(self) -> np.ndarray:
        """The examples that the run trains on."""
        return np.unique(self.batches)

    def epochs(self, members: np.ndarray, steps: int | None = None) -> Batches:
        """Shuffled epochs of some examples in as many steps as the run has, or others."""
        steps, slots = steps or len(self.batches), self.batches.shape[1]
        passes = -(-steps * slots // len(members))
        order = np.concatenate([self.rng.permutation(members) for _ in range(passes)])
        return order[: steps * slots].reshape(steps, slots)

    def some(self, members: np.ndarray, count: int) -> np.ndarray:
        """As many of some examples, drawn; of few no more than half."""
        return self.rng.choice(members, max(min(count, len(members) // 2), 1), replace=False)

    def without(self, members: np.ndarray) -> Batches:
        """The run with the slots of some examples empty."""
        return drop(self.batches, None, members)[0]


def dropped(count: int) -> Callable[[Source], Batches]:
    """Without ``count`` of the run's examples."""
    return lambda run: run.without(run.some(run.members, count))


def one_class_halved(run: Source) -> Batches:
    """Without half of the examples of one class."""
    of_class = run.members[run.labels[run.members] == run.side]
    return run.without(run.some(of_class, len(of_class) // 2))


def sorted_by_class(run: Source) -> Batches:
    """All of one class first, then the other; within each in the run's order."""
    flat = run.batches.reshape(-1)
    return flat[np.argsort(run.labels[flat] != run.side, kind="stable")].reshape(run.batches.shape)


def one_class(run: Source) -> Batches:
    """The run's examples of one class alone, more often."""
    return run.epochs(run.members[run.labels[run.members] == run.side])


def half_batches(run: Source) -> Batches:
    """The first half of each step's slots."""
    return np.where(np.arange(run.batches.shape[1]) < run.batches.shape[1] // 2, run.batches, -1)


def longer(run: Source) -> Batches:
    """Half as many steps again."""
    return np.concatenate([run.batches, run.epochs(run.members, len(run.batches) // 2)])


@dataclass(frozen=True)
class Kind:
    """A kind of counterfactual.

    Attributes:
        trained: what was trained, in words.
        make: its batches.
        step_size: factor on the highest step size.
        length: factor on the number of steps.
    """

    trained: str
    make: Callable[[Source], Batches]
    step_size: float = 1.0
    length: float = 1.0


LIKE = "like the random runs"
KINDS = {
    LIKE: Kind("random subsets in shuffled epochs, not edited", lambda run: run.batches),
    "one dropped": Kind("one of its examples left out, its slots empty", dropped(1)),
    "ten dropped": Kind("ten of its examples left out", dropped(10)),
    "thirty dropped": Kind("thirty of its examples left out", dropped(30)),
    "one class halved": Kind("half of one class left out", one_class_halved),
    "reversed": Kind("the last step first", lambda run: reverse(run.batches, None)[0]),
    "sorted by class": Kind("all of one class first, all epochs at once", sorted_by_class),
    "one class only": Kind("its examples of one class alone, in more epochs", one_class),
    "half subset": Kind(
        "half of its examples, twice the epochs",
        lambda run: run.epochs(run.some(run.members, len(run.members) // 2)),
    ),
    "sixteen repeated": Kind(
        "sixteen of its examples, as many epochs as fill the steps",
        lambda run: run.epochs(run.some(run.members, 16)),
    ),
    "half batches": Kind("the first half of each step's examples, as many steps", half_batches),
    "1.5 x steps": Kind(
        "half as many steps again, over which the step size decays", longer, length=1.5
    ),
    "3 x step size": Kind("three times the step size", lambda run: run.batches, step_size=3.0),
    "1/3 step size": Kind("a third of the step size", lambda run: run.batches, step_size=1 / 3),
}

FITS = {
    "default, random runs": ("random", bs.Simfluence(), bs.Exact),
    "additive, random runs": ("random", bs.Simfluence(coupling="none"), bs.Exact),
    "default, diverse runs": ("diverse", bs.Simfluence(), bs.Exact),
    "Stack, random runs": ("random", bs.Simfluence(), bs.Stack),
    "Stack, diverse runs": ("diverse", bs.Simfluence(), bs.Stack),
}
"""Name -> runs, model and method of a fit."""
SAID = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)
"""Ends of the groups of P(lower)."""
SHOWN = ("default, random runs", "default, diverse runs")
"""Fits of the picture."""


def settings(work: Path, size: Mapping[str, int], runs: int, seed: int) -> RecordConfig:
    """A checkpoint in ``work``, made if it is not there, and the settings of its fine-tuning."""
    texts: list[str] = []
    for name in ("train.jsonl", "query.jsonl"):
        with as_file(files("bayes_simfluence.demo") / name) as source:
            (work / name).write_bytes(source.read_bytes())
        texts += read_rows(work / name).column("text", "text_field")
    if not (work / "checkpoint").exists():
        key = jax.random.fold_in(jax.random.key(seed), 1)
        pretrained_checkpoint(texts, work / "checkpoint", key=key, progress=Bars())
    return RecordConfig(
        checkpoint=str(work / "checkpoint"),
        train=str(work / "train.jsonl"),
        query=str(work / "query.jsonl"),
        runs=runs,
        **size,
        learning_rate=8e-4,
        max_tokens=24,
        seed=seed,
    ).validate()


@dataclass(frozen=True)
class Recorded:
    """Everything that was trained.

    Attributes:
        fitted: runs to fit, by design.
        kinds: runs to judge with; the first, second, ... of each kind come of the same run.
        sides: the class of each query.
    """

    fitted: dict[str, xr.Dataset]
    kinds: dict[str, xr.Dataset]
    sides: np.ndarray


def recorded(work: Path, config: RecordConfig) -> Recorded:
    """Runs to fit and of every kind, in a store for each optimizer."""
    task = task_of(config)
    labels = classes_of(config, task)
    random_key, judged_key = jax.random.split(jax.random.key(config.seed))
    sizes = {name: getattr(config, name) for name in ("per_run", "batch_size", "epochs")}
    designs = {
        "random": bs.designs.random(config.examples, runs=config.runs, key=random_key, **sizes),
        "diverse": bs.designs.diverse(
            config.examples, runs=config.runs, labels=labels, key=random_key, **sizes
        ),
    }
    like = bs.designs.random(config.examples, runs=JUDGED, key=judged_key, **sizes).curricula
    rng = np.random.default_rng(config.seed)
    curricula = {name: design.curricula for name, design in designs.items()} | {
        name: np.stack([kind.make(Source(run, at % 2, labels, rng)) for at, run in enumerate(like)])
        for name, kind in KINDS.items()
    }
    stores: dict[tuple[float, float], list[str]] = {(1.0, 1.0): list(designs)}
    for name, kind in KINDS.items():
        stores.setdefault((kind.step_size, kind.length), []).append(name)
    runs = {}
    for (step_size, length), names in stores.items():
        rate = step_size * config.learning_rate
        # The schedule decays over the steps, which follow from the examples of a run.
        changed = replace(config, learning_rate=rate, per_run=int(length * config.per_run))
        whole = bs.record(
            task,
            np.concatenate([curricula[name] for name in names]),
            optimizer_of(changed),
            store=work / f"step-size-{step_size:.2g}-steps-{length:g}.zarr",
            features=64 if "random" in names else 0,
            placement=bs.Placement(parallel=8),
            resume=True,
            progress=Bars(),
        )
        ends = np.cumsum([len(curricula[name]) for name in names])
        for name, end in zip(names, ends, strict=True):
            runs[name] = whole.isel(run=slice(end - len(curricula[name]), end))
    return Recorded(
        {name: runs[name] for name in designs},
        {name: runs[name] for name in KINDS},
        np.asarray(task.query["label"]),
    )


@dataclass(frozen=True)
class Simulated:
    """Draws with and without the noise of a run, and support.

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
    loss, mean_loss = (np.asarray(stacked[name].values, float) for name in ("loss", "mean_loss"))
    return Simulated(loss, mean_loss, made["support"].values)


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
    return {
        "mse": float(error),
        "mse_of_mean_trajectory": float(of_mean),
        "ratio": float(error / of_mean),
        "query": covered(ours.loss, truth),
        "mean": covered(ours.loss.mean(-1), truth.mean(-1)),
        "classes": np.mean(of_class, axis=0).tolist(),
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


def following(fitted: xr.Dataset, truth: np.ndarray) -> np.ndarray:
    """The fitted runs' mean change from the true start; beyond its end it stays as it is."""
    change = (fitted["loss"] - fitted["loss"].isel(time=0)).mean("run").values
    times = np.minimum(np.arange(truth.shape[1]), len(change) - 1)
    return truth[:, :1] + change[times]


def judge(
    posterior: bs.Posterior, runs: Recorded, key: jax.Array, draws: int
) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    """Kind, figures, and of the mean over queries of its first run low, middle and high."""
    like, reference = runs.kinds[LIKE], runs.fitted["random"]
    unedited = simulated(posterior, like, key, draws)
    # A run's error is drawn by its place: in another, unedited runs have errors of their own.
    order = np.roll(np.arange(JUDGED), 1)
    moved = simulated(posterior, like.isel(run=order), key, draws)
    apart = moved.of_runs(np.argsort(order))
    with Bars().work("simulate", len(KINDS)) as meter:
        for name, kind in runs.kinds.items():
            ours = unedited if name == LIKE else simulated(posterior, kind, key, draws)
            truth = np.asarray(kind["loss"].values, float)
            told = judged(ours, truth, following(reference, truth), runs.sides)
            if name != LIKE:
                true_like = np.asarray(like["loss"].values, float)
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
    """Everything between the marks."""
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
            ("ratio", "### MSE over the mean trajectory's"),
            ("query", "### Cover of single queries, all steps / last step"),
        )
    }
    each = [
        f"### {fit}\n\n{about['verdict']}\n\n"
        + table(
            ["curricula", *COLUMNS.values()],
            {kind: [text(told, name) for name in COLUMNS] for kind, told in about["kinds"].items()},
        )
        for fit, about in fits.items()
    ]
    return "\n\n".join(
        [
            f"Recorded: {size['runs']} random and {size['runs']} diverse runs to be fitted, each "
            f"{size['per_run']} of {size['examples']} examples, {size['steps']} steps of "
            f"{size['batch_size']}, {size['queries']} queries; {JUDGED} runs of each kind below. "
            f"Seed {size['seed']}, {size['draws']} draws. {spent(results['minutes'])}",
            table(["curricula", "what was trained"], {k: [v.trained] for k, v in KINDS.items()}),
            "## Side by side",
            "### Cover of the 90% band, mean over kinds, all steps / last step",
            cover_table(fits),
            "Below, a star: at least one run of the kind was flagged.",
            *(part for pair in side_by_side.items() for part in pair),
            "### P(lower at the end than unedited), said, and how often it was",
            lower_table(fits),
            "## Fit by fit",
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


def between_marks(whole: str, text: str) -> str:
    """The page with ``text`` between its marks, or at its end where there are none."""
    head, _, rest = whole.partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2] or "\n"
    return f"{head}{MARKS[0]}\n{text}\n{MARKS[1]}{tail}"


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
    unedited = runs.kinds[LIKE]["loss"].isel(run=0).mean("query")
    first = next(iter(told.values()))["kinds"]
    for axes, (kind, kind_runs) in zip(grid.flat, runs.kinds.items(), strict=False):
        truth = kind_runs["loss"].isel(run=0).mean("query")
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

    fresh = not (work / "checkpoint").exists()
    config = settings(work, SMALL if options.small else SIZE, options.runs, options.seed)
    runs = recorded(work, config)
    part("recording" if fresh else "opening recordings made before")
    fit_key, draw_key = jax.random.split(jax.random.key(options.seed))
    told: dict[str, Any] = {}
    bands: dict[str, dict[str, np.ndarray]] = {}
    chosen = ((name, fit) for name, fit in FITS.items() if options.stack or fit[2] is not bs.Stack)
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
    sizes = SMALL if options.small else SIZE
    given = {name: getattr(options, name) for name in ("runs", "seed", "draws", "times")}
    results = {
        "settings": {**sizes, **given, "steps": config.steps},
        "minutes": minutes,
        "fits": told,
    }
    return results, picture(runs, bands, told)


def main() -> None:
    """Make the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("counterfactuals"))
    parser.add_argument("--work", type=Path, help="keep the recordings here, and use those there")
    parser.add_argument("--runs", type=int, default=16, help="fitted, of each design")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=199)
    parser.add_argument("--times", type=int, default=24, help="fewer, for a trial")
    parser.add_argument("--stack", action="store_true", help="also Stack(), as long again or more")
    parser.add_argument("--fits", type=int, default=len(FITS), help="fewer, for a trial")
    parser.add_argument("--small", action="store_true", help="fewer, shorter runs, for a trial")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options = parser.parse_args()
    numbers, image = (
        new_path(options.out / f"counterfactuals.{end}", overwrite=options.overwrite)
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
    target.write_text(between_marks(whole, page(results)), "utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
