"""Regenerate docs/results.md: every method on the shipped MiniLM / SST-2 recording.

    python examples/02_results_study.py --out docs

The standard protocol: 25 runs fitted, 2 to choose the ridge's penalty, 5 held out, for several
seeds of the split. Intervals are bootstrapped over the recorded runs, all held-out appearances of
a run together. About 15 minutes on two cores.
"""

import argparse
import json
import platform
import time
import warnings
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.evaluation.calibration import by_horizon
from bayes_simfluence.evaluation.compare import METRICS, RunScores, scores_by_run
from bayes_simfluence.evaluation.metrics import spearman_across_runs
from bayes_simfluence.inference.ridge import PENALTIES
from bayes_simfluence.model.priors import Normal
from bayes_simfluence.progress import Bars
from bayes_simfluence.report.plots import plot_coverage, plot_curves, save_figure
from bayes_simfluence.report.tables import markdown

FITTED, VALIDATED = 25, 2
RESAMPLES = 2000
SHOWN = [
    "mse", "spearman_query", "spearman_change", "spearman_run", "crps",
    "coverage_50", "coverage_90", "final_coverage_90",
]  # fmt: skip

MAIN = "**Simfluence() + Exact()**"
ORACLE = "ridge, paper's objective, best penalty in hindsight"
MEAN = "mean trajectory, spread as band"
BANDED = "ridge, paper's objective, residual band"


def methods(fit: xr.Dataset, validation: xr.Dataset, test: xr.Dataset, key: jax.Array, times: int):
    """Every method of the table, fitted."""
    exact = bs.Exact(times=times)
    yield "initial loss kept", bs.persistence(fit)
    yield MEAN, bs.mean_trajectory(fit)
    yield BANDED, bs.fit(fit, method=bs.Ridge(band=True), validation=validation, key=key)
    yield ORACLE, best_in_hindsight(fit, test, key)
    yield (
        "ridge, centred objective",
        bs.fit(fit, method=bs.Ridge("centred"), validation=validation, key=key),
    )
    literal = bs.Simfluence.linear()
    yield (
        "literal Bayes: linear, white noise, evidence",
        bs.fit(fit, model=literal, method=exact, key=key),
    )
    by_evidence = bs.Exact("evidence", times)
    yield "two-timescale, by evidence", bs.fit(fit, method=by_evidence, key=key)
    identity = bs.Simfluence(link="identity")
    yield "two-timescale, identity link", bs.fit(fit, model=identity, method=exact, key=key)
    plain = bs.Simfluence(prior=Normal(features=False))
    yield "two-timescale, no gradient features", bs.fit(fit, model=plain, method=exact, key=key)
    yield MAIN, bs.fit(fit, method=exact, key=key)
    for count in (15, 8, 5):
        few = bs.fit(fit.isel(run=slice(0, count)), method=exact, key=key)
        yield f"Simfluence() + Exact(), {count} runs fitted", few


def best_in_hindsight(fit: xr.Dataset, test: xr.Dataset, key: jax.Array) -> bs.Posterior:
    """The paper's ridge at the penalty that is best on the held-out runs themselves."""
    fits = [bs.fit(fit, method=bs.Ridge(penalty=penalty), key=key) for penalty in PENALTIES]
    errors = [
        float(((ridge.simulate(test, key=key)["mean_loss"] - test["loss"]) ** 2).mean())
        for ridge in fits
    ]
    return fits[int(np.nanargmin(errors))]


def study(seeds: list[int], limit: int | None, draws: int, times: int) -> tuple[pd.DataFrame, dict]:
    """Scores of every method over all splits, and pictures of the first."""
    runs = bs.example_runs().isel(query=slice(0, limit))
    scores, seconds, pictures = defaultdict(list), defaultdict(list), {}
    with Bars().work("splits", len(seeds)) as meter:
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(runs.sizes["run"])
            parts = np.split(order, [FITTED, FITTED + VALIDATED])
            fit, validation, test = (runs.isel(run=part) for part in parts)
            started = time.perf_counter()
            for name, posterior in methods(fit, validation, test, jax.random.key(seed), times):
                seconds[name].append(time.perf_counter() - started)
                key = jax.random.key(1000 + seed)
                scores[name].append(
                    (parts[2], scores_by_run(posterior, test, key=key, draws=draws))
                )
                if seed == seeds[0] and name in (MAIN, BANDED, MEAN):
                    horizon = by_horizon(posterior, test, key=key, draws=draws)
                    pictures[name] = (posterior.simulate(test, key=key, draws=draws), horizon)
                started = time.perf_counter()
            pictures.setdefault("recorded", test)
            meter.advance(1, f"seed {seed}")
    rows = {name: pooled(appearances) for name, appearances in scores.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table["seconds"] = {name: float(np.median(times)) for name, times in seconds.items()}
    return table, pictures


def pooled(appearances: list[tuple[np.ndarray, RunScores]]) -> dict[str, float]:
    """Means over all held-out appearances, with intervals from resampled recorded runs."""
    ids = np.concatenate([runs for runs, _ in appearances])
    distinct = np.unique(ids)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), RESAMPLES)
    weights = counts[:, np.searchsorted(distinct, ids)]
    across = np.array(
        [spearman_across_runs(scores.final_mean, scores.final_truth) for _, scores in appearances]
    )
    row = {}
    for name in METRICS:
        if name == "spearman_run":
            again = rng.choice(across, (RESAMPLES, len(across))).mean(axis=1)
            row[name] = float(across.mean())
        else:
            values = np.concatenate([scores[name] for _, scores in appearances])
            row[name] = float(values.mean())
            again = weights @ values / np.maximum(weights.sum(axis=1), 1)
        row[f"{name}_low"], row[f"{name}_high"] = np.quantile(again, [0.05, 0.95])
    return row


def page(table: pd.DataFrame, seeds: list[int]) -> str:
    """The text of docs/results.md's table section."""
    main, oracle = table.loc[MAIN], table.loc[ORACLE]
    ratios = {
        "MSE over the paper's ridge at its best penalty in hindsight": main.mse / oracle.mse,
        "CRPS over the mean trajectory's": main.crps / table.loc[MEAN].crps,
        "CRPS over the ridge's with residual bands": main.crps / table.loc[BANDED].crps,
    }
    goals = ("0.25", "0.35", "1")
    lines = [
        f"| {name} | {value:.2f} | <= {goal} |"
        for (name, value), goal in zip(ratios.items(), goals, strict=True)
    ]
    return "\n".join(
        [
            f"{len(seeds)} splits (seeds {seeds[0]}..{seeds[-1]}), 25 runs fitted, 5 held out; "
            "in brackets 90% bootstrap intervals over runs. Losses in nats.",
            "",
            markdown(table.drop(columns="seconds"), SHOWN, bold=False),
            "",
            "| ratio | measured | goal |",
            "|---|---|---|",
            *lines,
            f"| 90% band covers, all steps | {main.coverage_90:.3f} | .87 to .93 |",
            f"| 90% band covers, final step | {main.final_coverage_90:.3f} | .85 to .95 |",
            "",
            f"Median seconds of a fit, compilation included in the first: default "
            f"{table.seconds[MAIN]:.1f}, literal Bayes "
            f"{table.seconds['literal Bayes: linear, white noise, evidence']:.1f} "
            f"(Python {platform.python_version()}, JAX {jax.__version__}, 2 cores).",
        ]
    )


def main() -> None:
    """Run the study and write its table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--splits", type=int, default=6)
    parser.add_argument("--queries", type=int, default=None, help="fewer, for a trial")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--times", type=int, default=24, help="fewer, for a trial")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", bs.FitWarning)
    seeds = list(range(options.splits))
    table, pictures = study(seeds, options.queries, options.draws, options.times)
    table.to_csv(options.out / "results.csv", float_format="%.6g")
    target = options.out / "results.md"
    text = target.read_text("utf-8") if target.exists() else "# Results\n\n<!-- table -->\n"
    head, _, rest = text.partition("<!-- table -->")
    _, mark, tail = rest.partition("<!-- end of table -->")
    body = f"<!-- table -->\n{page(table, seeds)}\n<!-- end of table -->"
    target.write_text(head + body + (tail if mark else "\n"), "utf-8")
    recorded = pictures.pop("recorded")
    simulated = {name.strip("*"): draws for name, (draws, _) in pictures.items() if name != MEAN}
    horizons = {name.strip("*"): horizon for name, (_, horizon) in pictures.items()}
    save_figure(plot_curves(simulated, recorded), options.out / "curves.png", overwrite=True)
    save_figure(plot_coverage(horizons), options.out / "coverage.png", overwrite=True)
    print(json.dumps({"written": str(target)}))


if __name__ == "__main__":
    main()
