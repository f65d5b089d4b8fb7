"""Data mixtures: what would the loss on each domain have been with other shares of the tokens?

    python examples/08_data_mixtures.py --data FOLDER --out docs

On published runs that nobody here made (RegMix, Liu et al. 2024, arXiv 2407.01492): a mixture is a
run of one step whose batch holds every domain, with its share of the tokens as weight; queries are
the validation losses. Simulators are fitted to the 512 runs of a model of 1M parameters and judged
on 256 held-out mixtures, whose ranks are also compared with those of models of 60M and 1B. Writes
a table and a picture; a minute or two.

The runs are final outcomes: no loss before the step was recorded. Time 0 holds each query's mean
over the fitted runs instead, so that effects are relative to the mean mixture. ``FOLDER`` holds
``train_mixture_1m.csv``, ``train_pile_loss_1m.csv``, and ``test_...`` of ``1m``, ``60m``, ``1B``.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

import bayes_simfluence as bs
from bayes_simfluence.evaluation.metrics import spearman_across_runs, tails
from bayes_simfluence.progress import Bars
from bayes_simfluence.report.plots import save_figure
from bayes_simfluence.report.tables import with_interval

SIZES = ("1m", "60m", "1B")
"""Models that were trained on the held-out mixtures."""
CUTS = (0.01, 0.1)
"""Shares at which the tokens of a domain are divided into groups of their own."""
LINEAR = "additive"
BEST = "log link, first tokens apart"
DRAWS, RESAMPLES = 400, 200
SHOWN = ("dm_mathematics", "github", "pile_cc")
"""Domains of the picture."""


def mixtures(folder: Path, split: str, size: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Shares ``(run, domain)`` and final losses ``(run, query)`` in nats, by name of the domain."""
    shares = pd.read_csv(folder / f"{split}_mixture_{size}.csv", index_col="index")
    losses = pd.read_csv(folder / f"{split}_pile_loss_{size}.csv", index_col="index")
    shares.columns = shares.columns.str.removeprefix("train_the_pile_")
    losses.columns = losses.columns.str.removeprefix("metric/the_pile_").str.removesuffix(
        "_val_loss"
    )
    return shares, losses.loc[shares.index]


def in_groups(shares: pd.DataFrame, cuts: Sequence[float]) -> pd.DataFrame:
    """Shares of groups: of each domain, the tokens up to the first cut, up to the second, ...

    With cuts at 1% and 10%, a domain of 30% has 1%, 9% and 20% in its three groups.
    """
    ends = [0.0, *cuts, 1.0]
    return pd.concat(
        [
            (shares.clip(low, high) - low).add_suffix(f" {low:.0%} to {high:.0%}" if cuts else "")
            for low, high in pairwise(ends)
        ],
        axis=1,
    )


def runs_of(shares: pd.DataFrame, losses: pd.DataFrame, start: pd.Series) -> xr.Dataset:
    """A run of one step for each mixture: a batch of all groups, weighted by their shares."""
    batch = np.tile(np.arange(shares.shape[1], dtype=np.int32), (len(shares), 1, 1))
    before = np.broadcast_to(start[losses.columns].to_numpy(), losses.shape)
    return bs.runs_from_arrays(
        batch=batch,
        weight=shares.to_numpy()[:, None],
        loss=np.stack([before, losses.to_numpy()], axis=1),
        train_ids=list(shares.columns),
        query_ids=list(losses.columns),
        run_ids=[f"mixture {name}" for name in shares.index],
    )


ADDITIVE = bs.Simfluence.additive()
"""One scale and noise for each query, by marginal likelihood."""
ON_LOG_SCALE = bs.Simfluence.additive(link="log", scales="shared", time_effect="linear")
"""Effects that add up on the logarithm of the loss, with what all mixtures have in common."""
MODELS = {
    LINEAR: (ADDITIVE, ()),
    "log link": (ON_LOG_SCALE, ()),
    "first tokens apart": (ADDITIVE, CUTS),
    BEST: (ON_LOG_SCALE, CUTS),
}
"""Name -> model, and cuts of the domains' tokens."""


def rank_transfer(posterior: bs.Posterior, runs: xr.Dataset, key: jax.Array) -> float:
    """Spearman correlation of predicted losses with those of another model, mean over queries."""
    predicted = posterior.simulate(runs, key=key, draws=DRAWS)["mean_loss"].mean(("chain", "draw"))
    final = (loss.isel(time=-1).transpose("run", "query") for loss in (predicted, runs["loss"]))
    return spearman_across_runs(*(np.asarray(loss, float) for loss in final))


def picture(simulated: dict[str, xr.Dataset], runs: xr.Dataset, queries: Sequence[str]) -> Figure:
    """True against predicted final losses of held-out mixtures, with 90% intervals."""
    size = (3.4 * len(queries), 3.2 * len(simulated))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(simulated), len(queries), squeeze=False)
    for row, (name, draws) in zip(grid, simulated.items(), strict=True):
        final = draws.isel(time=-1).stack(sample=("chain", "draw"))
        for axes, query in zip(row, queries, strict=True):
            mean = final["mean_loss"].sel(query=query).mean("sample").values
            loss = final["loss"].sel(query=query).transpose("sample", "run").values
            low, high = np.quantile(loss, tails(0.90), axis=0)
            truth = runs["loss"].sel(query=query).isel(time=-1).values
            axes.hlines(truth, low, high, color="#0072B2", linewidth=0.6, alpha=0.4)
            axes.plot(mean, truth, ".", color="#0072B2", markersize=3)
            ends = [truth.min(), truth.max()]
            axes.plot(ends, ends, color="black", linewidth=0.8, linestyle="--")
            axes.set_title(f"{query}, {name}", fontsize=9)
            axes.set_xlabel("predicted loss (nats), 90% interval")
        row[0].set_ylabel("true loss (nats)")
    return figure


def main() -> None:
    """Fit, predict held-out mixtures, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of RegMix's CSV files")
    parser.add_argument("--out", type=Path, default=Path("mixtures"))
    parser.add_argument("--runs", type=int, help="fit the first ones alone; all when left out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shares, losses = (table[: options.runs] for table in mixtures(options.data, "train", "1m"))
    tests = {size: mixtures(options.data, "test", size) for size in SIZES}
    start, fit_key, draw_key = losses.mean(), *jax.random.split(jax.random.key(0))
    lines = [
        "| model | MSE | Spearman | 90% covers | Spearman, 60M | Spearman, 1B |",
        "|---|---|---|---|---|---|",
    ]
    shown = {}
    for name, (model, cuts) in MODELS.items():
        fitted = runs_of(in_groups(shares, cuts), losses, start)
        posterior = bs.fit(fitted, model=model, method=bs.Exact(), key=fit_key, progress=Bars())
        held_out = {
            size: runs_of(in_groups(test, cuts), outcome, start)
            for size, (test, outcome) in tests.items()
        }
        row = bs.compare(
            {name: posterior}, held_out["1m"], key=draw_key, draws=DRAWS, resamples=RESAMPLES
        ).loc[name]
        texts = [
            *(with_interval(row, metric) for metric in ("mse", "spearman_run", "coverage_90")),
            *(f"{rank_transfer(posterior, held_out[size], draw_key):.3f}" for size in SIZES[1:]),
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
        if name in (LINEAR, BEST):
            shown[name] = posterior.simulate(held_out["1m"], key=draw_key, draws=DRAWS)
    queries = [name for name in SHOWN if name in losses] or list(losses.columns[:3])
    save_figure(
        picture(shown, held_out["1m"], queries), options.out / "mixtures.png", overwrite=True
    )
    (options.out / "mixtures.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
