"""Counterfactuals that were really trained: do the bands hold, and where is one warned?

    python examples/09_counterfactuals.py --out docs

Makes a small checkpoint and records its fine-tuning on texts that ship with the package: 16 random
runs and 16 of the diverse design to be fitted, and at least four of every kind of counterfactual to
judge with. Writes a table (JSON and Markdown) and a picture; about fifteen minutes on two cores.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from importlib.resources import as_file, files
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import bayes_simfluence as bs
from bayes_simfluence.demo.pretrain import pretrained_checkpoint
from bayes_simfluence.progress import Bars
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.features import features_key, gradient_features
from bayes_simfluence.recording.from_config import optimizer_of, task_of
from bayes_simfluence.report.plots import COLOURS, save_figure
from bayes_simfluence.tasks.rows import read_rows

SIZE = {"examples": 240, "queries": 40, "per_run": 160, "batch_size": 8, "epochs": 5}
SMALL = {"examples": 24, "queries": 6, "per_run": 16, "batch_size": 4, "epochs": 3}
"""Sizes with ``--small``."""
JUDGED = 4
"""Runs of each kind."""
FEW = 16
"""Examples of ``few``, and a half of a small run's."""
DRAWS = 200
MARK = "<!-- tables -->"
"""Where the tables begin in the page."""
LIKE = "like the fitted runs"
LONGER = "half as many steps again"

Batches = np.ndarray
"""``(step, slot)``, indices into the training examples, -1 = empty."""


def settings(folder: Path, size: Mapping[str, int], runs: int, seed: int) -> RecordConfig:
    """A checkpoint in ``folder``, and the settings of its recording."""
    texts: list[str] = []
    for name in ("train.jsonl", "query.jsonl"):
        with as_file(files("bayes_simfluence.demo") / name) as source:
            (folder / name).write_bytes(source.read_bytes())
        texts += read_rows(folder / name).column("text", "text_field")
    pretrained_checkpoint(texts, folder / "checkpoint", key=jax.random.key(seed), progress=Bars())
    return RecordConfig(
        checkpoint=str(folder / "checkpoint"),
        train=str(folder / "train.jsonl"),
        query=str(folder / "query.jsonl"),
        runs=runs,
        **size,
        learning_rate=8e-4,
        max_tokens=24,
        parallel=8,
        seed=seed,
    ).validate()


def labels_of(path: Path, ids: np.ndarray) -> np.ndarray:
    """The class of each example, from 0."""
    rows = read_rows(path)
    known = {str(at): row["label"] for at, row in zip(rows.ids, rows.fields, strict=True)}
    return np.unique([str(known[str(one)]) for one in ids], return_inverse=True)[1]


def kinds_of(labels: np.ndarray, rng: np.random.Generator) -> dict[str, Callable[..., Batches]]:
    """Ways to make a curriculum from one that was recorded, the batches of run ``number``."""

    def epochs(batches: Batches, members: np.ndarray) -> Batches:
        """As many batches as before of these examples, in shuffled epochs."""
        passes = -(-batches.size // len(members))
        order = np.concatenate([rng.permutation(members) for _ in range(passes)])
        return order[: batches.size].reshape(batches.shape)

    def without(count: int) -> Callable[..., Batches]:
        def drop(batches: Batches, number: int) -> Batches:
            gone = rng.choice(np.unique(batches), min(count, batches.max() // 2), replace=False)
            return np.where(np.isin(batches, gone), -1, batches)

        return drop

    def class_halved(batches: Batches, number: int) -> Batches:
        side = labels[batches] == number % 2
        members = np.unique(batches[side])
        gone = rng.choice(members, len(members) // 2, replace=False)
        return np.where(np.isin(batches, gone), -1, batches)

    def by_class(batches: Batches, number: int) -> Batches:
        flat = batches.reshape(-1)
        order = np.argsort(labels[flat] * (1 - 2 * (number % 2)), kind="stable")
        return flat[order].reshape(batches.shape)

    def some(share: Callable[[int], int]) -> Callable[..., Batches]:
        def few(batches: Batches, number: int) -> Batches:
            members = np.unique(batches)
            return epochs(batches, rng.choice(members, share(len(members)), replace=False))

        return few

    def smaller(batches: Batches, number: int) -> Batches:
        width = batches.shape[1] // 2
        half = epochs(batches, np.unique(batches))[:, :width]
        return np.concatenate([half, np.full_like(half, -1)], axis=1)

    return {
        LIKE: lambda batches, number: batches,
        "one example dropped": without(1),
        "ten dropped": without(10),
        "thirty dropped": without(30),
        "one class dropped by half": class_halved,
        "reversed": lambda batches, number: batches[::-1],
        "half the examples, twice the epochs": some(lambda members: members // 2),
        "half the batch size": smaller,
        "sorted by class": by_class,
        "one class alone": lambda batches, number: epochs(
            batches, np.flatnonzero(labels == number % 2)
        ),
        "few examples, many epochs": some(lambda members: min(FEW, members // 3)),
    }


def recorded(
    folder: Path, config: RecordConfig, seed: int
) -> tuple[dict[str, xr.Dataset], np.ndarray]:
    """Runs to fit and of every kind, all trained; the class of the queries."""
    task, optimizer = task_of(config), optimizer_of(config)
    labels = labels_of(folder / "train.jsonl", np.asarray(task.train_ids))
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    size = {name: getattr(config, name) for name in ("per_run", "batch_size", "epochs")}
    fit_key, judge_key = jax.random.split(key)
    number = {"examples": config.examples, **size}
    designs = {
        "random": bs.designs.random(runs=config.runs, key=fit_key, **number),
        "diverse": bs.designs.diverse(runs=config.runs, key=fit_key, labels=labels, **number),
    }
    like = bs.designs.random(runs=JUDGED, key=judge_key, **number).curricula
    groups = {name: design.curricula for name, design in designs.items()}
    for kind, make in kinds_of(labels, rng).items():
        groups[kind] = np.stack([make(batches, at) for at, batches in enumerate(like)])
    features = gradient_features(task, key=features_key(seed))
    given = {"features": features, "progress": Bars(), "placement": bs.Placement(parallel=8)}
    whole = bs.record(
        task, np.concatenate(list(groups.values())), optimizer, store=folder / "runs.zarr", **given
    )
    ends = np.cumsum([len(group) for group in groups.values()])
    runs = {
        name: whole.isel(run=slice(end - len(groups[name]), end))
        for name, end in zip(groups, ends, strict=True)
    }
    for name, factor in (("3", 3.0), ("one third", 1 / 3)):
        rate = RecordConfig(
            **{**config.__dict__, "learning_rate": factor * config.learning_rate}
        ).validate()
        runs[f"{name} of the step size" if factor < 1 else f"{name} times the step size"] = (
            bs.record(task, like, optimizer_of(rate), store=folder / f"rate-{name}.zarr", **given)
        )
    longer = np.concatenate([like, like[:, : like.shape[1] // 2]], axis=1)
    more = RecordConfig(
        **{**config.__dict__, "epochs": longer.shape[1] * size["batch_size"] // size["per_run"]}
    )
    runs[LONGER] = bs.record(
        task, longer, optimizer_of(more.validate()), store=folder / "longer.zarr", **given
    )
    return runs, labels_of(folder / "query.jsonl", np.asarray(task.query_ids))


def covered(draws: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Share of points in the 90% band: after every step, and after the last."""
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    inside = (truth >= low) & (truth <= high)
    return float(inside[:, 1:].mean()), float(inside[:, -1].mean())


def judged(
    posterior: bs.Posterior,
    kind: str,
    runs: Mapping[str, xr.Dataset],
    sides: np.ndarray,
    mean: np.ndarray,
) -> dict[str, float | tuple[float, float]]:
    """What is said of a kind: error, cover of single queries, sums and differences, support."""
    ours, base = runs[kind], runs[LIKE]
    alike = ours.sizes["time"] == base.sizes["time"] and kind != LIKE
    planned = xr.concat([ours, base], "run", data_vars="minimal") if alike else ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs.SupportWarning)
        simulated = posterior.simulate(planned, key=jax.random.key(2), draws=DRAWS)
    draws = simulated["loss"].values.reshape(DRAWS, *planned["loss"].shape)
    count, truth = ours.sizes["run"], ours["loss"].values
    own = draws[:, :count]
    change = mean[np.minimum(np.arange(truth.shape[1]), len(mean) - 1)]
    error = np.square(np.median(own, axis=0) - truth)[:, 1:].mean()
    of_mean = np.square(truth[:, :1] + change - truth)[:, 1:].mean()
    support = simulated["support"].values[:count, -1]
    told: dict[str, float | tuple[float, float]] = {
        "mse": float(error),
        "mse_over_mean_trajectory": float(error / of_mean),
        "query": covered(own, truth),
        "mean_of_queries": covered(own.mean(axis=-1), truth.mean(axis=-1)),
        "class_means": tuple(
            np.mean(
                [
                    covered(
                        own[..., sides == side].mean(axis=-1),
                        truth[..., sides == side].mean(axis=-1),
                    )
                    for side in np.unique(sides)
                ],
                axis=0,
            ).tolist()
        ),
        "support": float(support.min()),
        "flagged": float((support < 0.5).mean()),
    }
    if alike:
        other = base["loss"].values
        difference, true = own - draws[:, count:], truth - other
        told["difference"] = covered(difference, true)
        lower = (difference[..., -1, :] < 0).mean(axis=0)
        told["p_lower"] = float(lower.mean())
        told["lower"] = float((true[:, -1] < 0).mean())
        told["brier"] = float(np.square(lower - (true[:, -1] < 0)).mean())
    return told


COLUMNS = {
    "mse_over_mean_trajectory": "MSE / mean trajectory's",
    "query": "one query",
    "mean_of_queries": "mean over queries",
    "class_means": "class means",
    "difference": "difference",
    "brier": "Brier",
    "support": "least support",
}


def text(value: float | tuple[float, float] | None) -> str:
    """A number, or a share over all steps and that at the last one."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    return " / ".join(f"{part:.2f}" for part in value)


def markdown(results: Mapping[str, Mapping[str, Mapping]]) -> str:
    """A table for each fit."""
    lines = []
    for fit, kinds in results.items():
        lines += [f"### {fit}", "", "| curricula | " + " | ".join(COLUMNS.values()) + " |"]
        lines += ["|---" * (len(COLUMNS) + 1) + "|"]
        for kind, told in kinds.items():
            cells = [text(told.get(name)) for name in COLUMNS]
            cells[-1] += " (flagged)" if told["flagged"] == 1 else ""
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def picture(posterior: bs.Posterior, runs: Mapping[str, xr.Dataset]) -> Figure:
    """The mean over queries of one run of each kind: what was trained, and the band."""
    kinds = [name for name in runs if name not in ("random", "diverse")]
    rows = -(-len(kinds) // 4)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    for at, (axis, kind) in enumerate(zip(axes, kinds, strict=False)):
        one = runs[kind].isel(run=[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bs.SupportWarning)
            simulated = posterior.simulate(one, key=jax.random.key(2), draws=DRAWS)
        mean = simulated["loss"].mean("query").isel(run=0)
        low, middle, high = mean.quantile([0.05, 0.5, 0.95], ("chain", "draw")).values
        axis.fill_between(one["time"], low, high, color=COLOURS[0], alpha=0.3, label="90% band")
        axis.plot(one["time"], middle, color=COLOURS[0], label="simulated")
        axis.plot(one["time"], one["loss"].mean("query").isel(run=0), "k", lw=1, label="trained")
        far = " (flagged)" if float(simulated["support"].min()) < 0.5 else ""
        axis.set_title(f"{kind}{far}", fontsize=9)
        if at % 4 == 0:
            axis.set_ylabel("mean loss, nats")
        if at >= len(kinds) - 4:
            axis.set_xlabel("step")
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Record, fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("counterfactuals"))
    parser.add_argument("--work", type=Path, help="folder of the recordings; --out when left out")
    parser.add_argument("--runs", type=int, default=16, help="fitted, of each design")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few texts, to try it out")
    options = parser.parse_args()
    work = options.work or options.out
    for folder in (options.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    config = settings(work, SMALL if options.small else SIZE, options.runs, options.seed)
    runs, sides = recorded(work, config, options.seed)
    additive = bs.Simfluence(coupling="none")
    fits = {
        "Exact(), additive, random design": ("random", {"model": additive}),
        "Exact(), random design": ("random", {}),
        "Stack(), random design": ("random", {"method": bs.Stack()}),
        "Stack(), diverse design": ("diverse", {"method": bs.Stack()}),
    }
    if options.small:
        fits = {
            "Exact(), random design": ("random", {"method": bs.Exact(times=4)}),
        }
    results, key = {}, jax.random.key(options.seed)
    for name, (design, given) in fits.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bs.FitWarning)
            posterior = bs.fit(runs[design], key=key, progress=Bars(), **given)
        loss = runs[design]["loss"].values
        mean = (loss - loss[:, :1]).mean(axis=0)
        results[name] = {
            kind: judged(posterior, kind, runs, sides, mean)
            for kind in runs
            if kind not in ("random", "diverse")
        }
        if name in ("Stack(), random design", "Exact(), random design"):
            save_figure(
                picture(posterior, runs), options.out / "counterfactuals.png", overwrite=True
            )
    table = markdown(results)
    (options.out / "counterfactuals.json").write_text(json.dumps(results, indent=1), "utf-8")
    target = options.out / "counterfactuals.md"
    page = target.read_text("utf-8") if target.exists() else f"# Counterfactuals\n\n{MARK}\n"
    target.write_text(f"{page.partition(MARK)[0]}{MARK}\n\n{table}", "utf-8")
    print(table)


if __name__ == "__main__":
    main()
