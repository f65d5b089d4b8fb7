"""Regenerate docs/tasks.md: bands and parts of the model on every recording that ships.

    python examples/03_tasks_study.py --out docs

Bands: the default fitted on 25, 15, 8 and 5 runs of each recording, several splits, 5 held-out runs
each, beside the mean trajectory and the paper's ridge. Features: what is left without them, and
what it is worth to look at few such runs at more than 24 times. Parts: errors, exposures,
coefficients, time effects, links and priors one by one, to choose by the score of left-out runs;
held-out figures stand beside it. Intervals are bootstrapped over recorded runs. An hour or more on
two cores; measurements are kept in tasks.csv, and a second call continues there.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.data.store import EXAMPLES
from bayes_simfluence.evaluation.compare import scores_by_run
from bayes_simfluence.inference.ridge import PENALTIES
from bayes_simfluence.model.link import log_slope
from bayes_simfluence.progress import Bars
from bayes_simfluence.report.plots import save_figure
from bayes_simfluence.simulators.gaussian import GaussianSimulator

FITTED, VALIDATED = 25, 2
COUNTS = (25, 15, 8, 5)
METRICS = ("mse", "crps", "coverage_90", "final_coverage_90")
RESAMPLES = 1000
MEAN, RIDGE, ORACLE, DEFAULT = "mean trajectory", "ridge, residual band", "ridge, oracle", "default"

BARE_ON = ("sst2", "copa", "trec")
"""Recordings whose features are left out; the default was chosen on the first."""
TIMES = 24
PARTS_ON = ("sst2", "trec")
"""Recordings on which parts are compared."""
PARTS: dict[str, bs.Simfluence] = {
    "default": bs.Simfluence(),
    "error: white steps": bs.Simfluence(error=bs.noise.Gaussian()),
    "error: white steps + run slope": bs.Simfluence(error=bs.noise.Gaussian(run_effect=True)),
    "error: white steps + observation": bs.Simfluence(error=bs.noise.Gaussian(observation=True)),
    "error: AR(1) steps": bs.Simfluence(error=bs.noise.AR1()),
    "exposure: memoryless": bs.Simfluence(exposure=bs.Exposure.memoryless()),
    "exposure: momentum .9, step size ignored": bs.Simfluence(exposure=bs.Exposure(0.9, 0.0)),
    "exposure: order 8": bs.Simfluence(exposure=bs.Exposure(order=8)),
    "coefficients: constant": bs.Simfluence(coefficients=bs.Varying(1)),
    "timescales: staying alone": bs.Simfluence(timescales="staying"),
    "timescales: fading alone": bs.Simfluence(timescales="fading"),
    "time effect: linear": bs.Simfluence(time_effect="linear"),
    "time effect: none": bs.Simfluence(time_effect="none"),
    "link: log": bs.Simfluence(link="log"),
    "link: identity": bs.Simfluence(link="identity"),
    "prior: no gradient features": bs.Simfluence(prior=bs.priors.Normal(features=False)),
    "prior: 16 gradient features": bs.Simfluence(),
}
WITH_FEATURES = {"prior: 16 gradient features": 16}
"""Parts for which a recording keeps its first gradient features alone."""
BARE_FEW, BARE = "24 times", "default"
"""Fits without gradient features, at 24 times of each run and at the default's."""
NORMAL = "normal"
PRIORS: dict[str, bs.priors.Prior] = {
    NORMAL: bs.priors.Normal(features=False),
    "normal, gradient features": bs.priors.Normal(),
    "normal, pooled over queries": bs.priors.Normal(features=False, pooled=True),
    "student-t": bs.priors.StudentT(features=False),
    "laplace": bs.priors.Laplace(features=False),
    "horseshoe": bs.priors.Horseshoe(features=False),
    "low rank (4)": bs.priors.LowRank(features=False, rank=4),
}
"""Compared on the published additive model, by ``SVI``: most are not Gaussian."""
FEW_QUERIES = 10
"""Of each recording, where priors are compared."""


class Measurements:
    """Scores of each held-out run, kept in a file so that a study can be continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = pd.read_csv(path) if path.exists() else pd.DataFrame()

    def has(self, **columns: object) -> bool:
        """Whether there are rows with these values."""
        rows = self.table
        for name, value in columns.items():
            rows = rows[rows[name] == value] if len(rows) else rows
        return len(rows) > 0

    def add(self, scores: dict[str, np.ndarray], **columns: object) -> None:
        """Keep the scores of a fit, with the values that identify it."""
        self.table = pd.concat([self.table, pd.DataFrame({**columns, **scores})], ignore_index=True)
        self.table.to_csv(self.path, index=False, float_format="%.6g")


def split(runs: xr.Dataset, seed: int) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    """Runs to fit, to validate a ridge, and held out."""
    order = np.random.default_rng(seed).permutation(runs.sizes["run"])
    fit, validation, test = np.split(order, [FITTED, FITTED + VALIDATED])
    return runs.isel(run=fit), runs.isel(run=validation), runs.isel(run=test)


def methods(
    fit: xr.Dataset, validation: xr.Dataset, test: xr.Dataset, key: jax.Array, times: int
) -> Iterator[tuple[str, int, Callable[[], bs.Posterior]]]:
    """Method, runs fitted, and the fit itself."""
    ridge = bs.Ridge(band=True)
    yield MEAN, FITTED, lambda: bs.mean_trajectory(fit)
    yield RIDGE, FITTED, lambda: bs.fit(fit, method=ridge, validation=validation, key=key)
    yield ORACLE, FITTED, lambda: best_in_hindsight(fit, test, key)
    for count in COUNTS:
        few = fit.isel(run=slice(0, count))
        yield DEFAULT, count, lambda few=few: bs.fit(few, method=bs.Exact(times=times), key=key)


def without_features(
    few: xr.Dataset, key: jax.Array
) -> Iterator[tuple[str, Callable[[], bs.Posterior]]]:
    """Method, and its fit to runs without their gradient features."""
    bare = few.drop_dims("feature")
    yield MEAN, lambda: bs.mean_trajectory(few)
    if few.sizes["run"] < FITTED:
        yield BARE_FEW, partial(bs.fit, bare, method=bs.Stack(times=TIMES), key=key)
    yield BARE, partial(bs.fit, bare, method=bs.Stack(), key=key)


def best_in_hindsight(fit: xr.Dataset, test: xr.Dataset, key: jax.Array) -> bs.Posterior:
    """The paper's ridge at the penalty that is best on the held-out runs themselves."""
    fits = [bs.fit(fit, method=bs.Ridge(penalty=penalty), key=key) for penalty in PENALTIES]
    errors = [
        float(((ridge.simulate(test, key=key)["mean_loss"] - test["loss"]) ** 2).mean())
        for ridge in fits
    ]
    return fits[int(np.nanargmin(errors))]


def in_nats(posterior: bs.Posterior) -> float:
    """Mean log derivative of the link: turns a score on its scale into one in nats, per point."""
    if not isinstance(posterior.simulator, GaussianSimulator):
        return 0.0
    seen = posterior.runs["loss"].values[:, 1:][:, posterior.simulator.rows]
    return float(log_slope(posterior.simulator.model.link, jnp.asarray(seen)).mean())


def measured(
    posterior: bs.Posterior, test: xr.Dataset, draws: int, validation: xr.Dataset | None = None
) -> dict[str, np.ndarray]:
    """Scores of each held-out run, and of runs left out of the fit: by it, or ``validation``."""
    scores = scores_by_run(posterior, test, key=jax.random.key(1), draws=draws)
    kept = {name: np.asarray(scores[name]) for name in METRICS}
    if validation is None:
        left_out = posterior.verdict.numbers.get("left_out_score", np.nan) + in_nats(posterior)
    else:
        validated = scores_by_run(posterior, validation, key=jax.random.key(1), draws=draws)
        left_out = float(np.mean(validated["elpd"]))
    return {
        "run": test["run"].values,
        **kept,
        "left_out_score": np.full(test.sizes["run"], left_out),
    }


def study(measurements: Measurements, options: argparse.Namespace) -> None:
    """Make the fits that are missing: bands of all recordings first, then parts and priors."""
    recordings = {
        name: bs.example_runs(name).isel(query=slice(0, options.queries))
        for name in options.recordings
    }
    parts = dict(list(PARTS.items())[: options.parts])
    parts_on = [name for name in PARTS_ON if name in recordings]
    bare_on = [name for name in BARE_ON if name in recordings]
    priors = dict(list(PRIORS.items())[: options.priors])
    compared = len(parts) + len(priors)
    total = len(recordings) * options.splits * (3 + len(COUNTS)) + len(parts_on) * compared
    total += sum(3 - (count == FITTED) for count in COUNTS[-options.few :]) * len(bare_on)
    with Bars().work("fits", total) as meter:

        def keep(
            make: Callable[[], bs.Posterior],
            test: xr.Dataset,
            validation: xr.Dataset | None = None,
            **columns: object,
        ) -> None:
            if not measurements.has(**columns):
                scores = measured(make(), test, options.draws, validation)
                measurements.add(scores, **columns)
            name = f"{columns['recording']}: {columns['method']}, {columns['fitted']} runs"
            meter.advance(1, name)

        for recording, runs in recordings.items():
            for seed in range(options.splits):
                fit, validation, test = split(runs, seed)
                key = jax.random.key(seed)
                for name, count, make in methods(fit, validation, test, key, options.times):
                    keep(
                        make, test, study="bands", recording=recording, method=name, fitted=count,
                        split=seed,
                    )  # fmt: skip
        for recording in bare_on:
            fit, _, _ = split(recordings[recording], 0)
            unseen = recordings[recording].drop_sel(run=fit["run"].values)
            for count in COUNTS[-options.few :]:
                few = fit.isel(run=slice(0, count))
                for name, make in without_features(few, jax.random.key(0)):
                    keep(
                        make, unseen, study="features", recording=recording, method=name,
                        fitted=count, split=0,
                    )  # fmt: skip
        # Half of the times: what compares parts need not be the finest fit.
        method = bs.Exact(times=max(options.times // 2, 2))
        for recording in parts_on:
            fit, _, test = split(recordings[recording], 0)
            for name, model in parts.items():
                fitted = fit.isel(feature=slice(0, WITH_FEATURES.get(name)))
                make = partial(bs.fit, fitted, model=model, method=method, key=jax.random.key(0))
                keep(
                    make, test, study="parts", recording=recording, method=name, fitted=FITTED,
                    split=0,
                )  # fmt: skip
        svi = bs.SVI(guide="normal", steps=3000)
        for recording in parts_on:
            few = recordings[recording].isel(query=slice(0, FEW_QUERIES))
            fit, validation, test = split(few, 0)
            for name, prior in priors.items():
                model = bs.Simfluence.additive(prior=prior)
                make = partial(bs.fit, fit, model=model, method=svi, key=jax.random.key(0))
                keep(
                    make, test, validation, study="priors", recording=recording, method=name,
                    fitted=FITTED, split=0,
                )  # fmt: skip


def with_interval(rows: pd.DataFrame, metric: str) -> tuple[float, float, float]:
    """Mean over held-out runs of all splits, and its 90% bootstrap interval over recorded runs."""
    ids, place = np.unique(rows["run"].to_numpy(), return_inverse=True)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES)[:, place]
    values = rows[metric].to_numpy()
    low, high = np.quantile(counts @ values / np.maximum(counts.sum(axis=1), 1), [0.05, 0.95])
    return float(values.mean()), float(low), float(high)


def as_text(rows: pd.DataFrame, metric: str) -> str:
    """``value [low, high]``."""
    value, low, high = with_interval(rows, metric)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def bands_table(table: pd.DataFrame) -> str:
    """One line for each recording, method and number of runs."""
    lines = [
        "| recording | method | runs fitted | MSE | CRPS | 90% covers, all steps | final step |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [MEAN, RIDGE, ORACLE, DEFAULT]
    bands = table[table["study"] == "bands"]
    for recording in bands["recording"].unique():
        of_recording = bands[bands["recording"] == recording]
        for name in order:
            of_method = of_recording[of_recording["method"] == name]
            for count in sorted(of_method["fitted"].unique())[::-1]:
                rows = of_method[of_method["fitted"] == count]
                point = name == ORACLE
                texts = [
                    "" if point and "coverage" in metric else as_text(rows, metric)
                    for metric in METRICS
                ]
                lines.append(f"| {recording} | {name} | {count} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def goals_table(table: pd.DataFrame) -> str:
    """Ratios that the project set itself."""
    lines = [
        "| recording | MSE over ridge's best (goal .2) | CRPS over mean trajectory's (.3) "
        "| CRPS over ridge's with band (.3) | MSE of 8 runs over ridge's best of 25 (1) |",
        "|---|---|---|---|---|",
    ]
    bands = table[table["study"] == "bands"]
    for recording, rows in bands.groupby("recording", sort=False):
        mean = rows.groupby(["method", "fitted"])[["mse", "crps"]].mean()
        ours, oracle = mean.loc[(DEFAULT, FITTED)], mean.loc[(ORACLE, FITTED)]
        ratios = [
            ours["mse"] / oracle["mse"],
            ours["crps"] / mean.loc[(MEAN, FITTED)]["crps"],
            ours["crps"] / mean.loc[(RIDGE, FITTED)]["crps"],
            mean.loc[(DEFAULT, 8)]["mse"] / oracle["mse"],
        ]
        lines.append(f"| {recording} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def features_table(table: pd.DataFrame) -> str:
    """One line for each recording, number of runs and fit."""
    rows = table[table["study"] == "features"]
    lines = [
        "| recording | runs fitted | fit | MSE | CRPS | CRPS over mean trajectory's "
        "| 90% covers, all steps | final step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (recording, count), cell in rows.groupby(["recording", "fitted"], sort=False):
        mean = cell.groupby("method", sort=False)[list(METRICS)].mean()
        for name, one in mean.drop(index=MEAN).iterrows():
            ratio = one["crps"] / mean.loc[MEAN, "crps"]
            covers = f"{one['coverage_90']:.3f} | {one['final_coverage_90']:.3f}"
            lines.append(
                f"| {recording} | {count} | {name} | {one['mse']:.3g} | {one['crps']:.3g} "
                f"| {ratio:.2f} | {covers} |"
            )
    return "\n".join(lines)


def parts_table(table: pd.DataFrame, study: str = "parts", base: str = "default") -> str:
    """Score of left-out runs for each part and recording, and scores of the held-out runs."""
    parts = table[table["study"] == study]
    recordings = list(parts["recording"].unique())
    score = parts.groupby(["method", "recording"], sort=False)["left_out_score"].first().unstack()
    score = score[recordings]
    gain = score - score.loc[base]
    head = "".join(f" {name}: score | {name}: CRPS | {name}: covers |" for name in recordings)
    lines = [f"| {study[:-1]} |{head} mean score |", "|---|" + "---|" * (3 * len(recordings) + 1)]
    for name in gain.mean(axis=1).sort_values(ascending=False).index:
        texts = []
        for recording in recordings:
            rows = parts[(parts["method"] == name) & (parts["recording"] == recording)]
            texts += [
                f"{gain.loc[name, recording]:+.3f}",
                as_text(rows, "crps"),
                as_text(rows, "coverage_90"),
            ]
        lines.append(f"| {name} | " + " | ".join(texts) + f" | {gain.loc[name].mean():+.3f} |")
    return "\n".join(lines)


def priors_section(table: pd.DataFrame) -> list[str]:
    """Heading, what is measured, and table; nothing where priors were not compared."""
    if not (table["study"] == "priors").any():
        return []
    return [
        "## Priors",
        "The published additive model, which takes every prior, fitted by `SVI` (independent "
        f"normals, 3000 steps) to 25 runs and {FEW_QUERIES} queries. Score: log density of the 2 "
        "validation runs per point, minus that of the normal prior. CRPS and coverage: the 5 "
        "held-out runs.",
        parts_table(table, "priors", NORMAL),
    ]


def picture(table: pd.DataFrame) -> plt.Figure:
    """Coverage against the number of runs fitted."""
    bands = table[(table["study"] == "bands") & (table["method"] == DEFAULT)]
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True, layout="constrained")
    names = {"coverage_90": "all steps", "final_coverage_90": "final step"}
    for axes, (metric, name) in zip(panels, names.items(), strict=True):
        axes.axhspan(0.87, 0.93, color="0.9")
        axes.axhline(0.90, color="0.5", linewidth=1)
        recordings = bands["recording"].unique()
        for shift, recording in enumerate(recordings):
            rows = bands[bands["recording"] == recording]
            by_count = [with_interval(rows[rows["fitted"] == count], metric) for count in COUNTS]
            value, low, high = np.array(by_count).T
            place = np.array(COUNTS) + 0.22 * (shift - (len(recordings) - 1) / 2)
            reach = [value - low, high - value]
            axes.errorbar(place, value, yerr=reach, marker="o", markersize=4, label=recording)
        axes.set(title=f"90% band, {name}", xlabel="runs fitted", xticks=COUNTS, ylim=(0.5, 1.0))
    panels[0].set_ylabel("share of held-out points inside")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def main() -> None:
    """Run the study and write its page, table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--recordings", nargs="+", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--queries", type=int, default=None, help="fewer, for a trial")
    parser.add_argument(
        "--few", type=int, default=len(COUNTS), help="numbers of runs without features, for a trial"
    )
    parser.add_argument("--parts", type=int, default=len(PARTS), help="fewer, for a trial")
    parser.add_argument("--priors", type=int, default=len(PRIORS), help="fewer, for a trial")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--times", type=int, default=24, help="fewer, for a trial")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", bs.FitWarning)
    measurements = Measurements(options.out / "tasks.csv")
    study(measurements, options)
    table = measurements.table
    target = options.out / "tasks.md"
    text = target.read_text("utf-8") if target.exists() else "# Tasks\n\n<!-- tables -->\n"
    head, _, rest = text.partition("<!-- tables -->")
    _, mark, tail = rest.partition("<!-- end of tables -->")
    body = "\n\n".join(
        [
            "<!-- tables -->",
            f"{options.splits} splits of each recording; in brackets 90% bootstrap intervals over "
            "runs. Losses in nats.",
            goals_table(table),
            bands_table(table),
            "## Without gradient features",
            "`Stack()`, the default, fitted to runs of the first split without their features, at "
            f"{TIMES} times of each run and at as many as make 400 points, as it does by itself. "
            "7 held-out runs.",
            features_table(table),
            "## Parts",
            "Score: log density (of losses in nats) of a left-out run per point under fits to the "
            "25 runs of the first split at 12 times of each run, minus the default's (higher is "
            "better; this chooses). "
            "CRPS and coverage: the 5 held-out runs.",
            parts_table(table),
            *priors_section(table),
            "<!-- end of tables -->",
        ]
    )
    target.write_text(head + body + (tail if mark else "\n"), "utf-8")
    save_figure(picture(table), options.out / "tasks.png", overwrite=True)
    print(f"written: {target}")


if __name__ == "__main__":
    main()
