"""Diagnosis of a fit as tables and one picture: chains, search, or left-out runs."""

from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import rankdata

from bayes_simfluence.checks import Misuse
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.report.plots import COLOURS, TRUTH, label_coverage, legend_below

NUMBERS: dict[str, tuple[str, float, float]] = {
    "r_hat": ("worst R-hat over hyperparameters and some coefficients", -np.inf, 1.01),
    "ess_bulk": ("smallest number of effective draws, bulk", 400.0, np.inf),
    "ess_tail": ("smallest number of effective draws, tails", 400.0, np.inf),
    "divergences": ("draws at which the sampler's integration diverged", -np.inf, 0.0),
    "acceptance": ("mean acceptance probability", 0.6, np.inf),
    "steps_per_draw": ("gradient evaluations per draw", -np.inf, np.inf),
    "longest_trajectory": ("gradient evaluations of the most expensive draw", -np.inf, np.inf),
    "untrusted_pareto_k": ("share of runs that importance sampling cannot leave out", -np.inf, 0.0),
    "dispersion": ("posterior sds over those of the curvature at the mode", 0.7, 1.5),
    "final_loss": ("minus the evidence bound at the end", -np.inf, np.inf),
    "steps": ("steps of the search", -np.inf, np.inf),
    "iterations": ("iterations of the search", -np.inf, np.inf),
    "log_evidence": ("log marginal likelihood", -np.inf, np.inf),
    "left_out_score": ("log score of left-out runs, per point", -np.inf, np.inf),
    "left_out_mse": ("squared error of left-out runs, nats^2", -np.inf, np.inf),
    "left_out_mse_of_mean_trajectory": ("the same of the mean trajectory", -np.inf, np.inf),
    "left_out_coverage_90": ("share of left-out points in their 90% band", 0.85, 0.95),
    "left_out_coverage_90_before_recalibration": ("the same, model alone", -np.inf, np.inf),
    "penalty": ("on squared coefficients", -np.inf, np.inf),
}
"""Meaning of each of a verdict's numbers, and the range that it should lie in."""
BINS = 20
WINDOW = 100
"""Steps over which a search's loss is averaged."""


def numbers_table(verdict: Verdict) -> pd.DataFrame:
    """The numbers of a verdict with columns ``value``, ``wanted``, ``ok`` and ``meaning``.

    >>> table = numbers_table(Verdict(True, "Chains agree.", numbers={"r_hat": 1.2}))
    >>> value, wanted, ok = table.loc["r_hat", ["value", "wanted", "ok"]]
    >>> float(value), wanted, bool(ok)
    (1.2, 'at most 1.01', False)
    """
    rows = {}
    for name, value in verdict.numbers.items():
        meaning, low, high = NUMBERS.get(name, ("", -np.inf, np.inf))
        rows[name] = {
            "value": float(value),
            "wanted": _wanted(low, high),
            # NaN is not in any range.
            "ok": bool(low <= value <= high) or not np.isfinite([low, high]).any(),
            "meaning": meaning,
        }
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["value", "wanted", "ok", "meaning"]
    )


def _wanted(low: float, high: float) -> str:
    if np.isfinite(low) and np.isfinite(high):
        return f"{low:g} to {high:g}"
    if np.isfinite(low):
        return f"at least {low:g}"
    return f"at most {high:g}" if np.isfinite(high) else ""


def hyper_summary(posterior: Posterior, *, key: jax.Array, draws: int = 200) -> pd.DataFrame:
    """Mean, sd and 90% interval of each hyperparameter; R-hat and effective draws of chains.

    Where each query has its own value (``scale``, ``noise``), the query with the worst R-hat is
    shown, or the median query when nothing was sampled. Hyperparameters that a method fixes have
    sd 0.

    Args:
        posterior: of any method; the table is empty when it has no hyperparameters.
        key, draws: as for ``Posterior.samples``; a sampled posterior uses all draws that it holds.
    """
    rows = {}
    for name, values in _hypers(posterior, key, draws).items():
        low, high = np.quantile(values, [0.05, 0.95])
        mean, sd = values.mean(), values.std()
        # Rounding: the sd of equal numbers is not exactly zero.
        sd = sd if sd > 1e-12 * abs(mean) else 0.0
        row = {"mean": mean, "sd": sd, "5%": low, "95%": high}
        if posterior.sample_stats is not None:
            row |= _convergence(values)
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def _hypers(
    posterior: Posterior, key: jax.Array, draws: int
) -> dict[str, Float[np.ndarray, "chain draw"]]:
    """Draws of every hyperparameter by name, ``name[query]`` where each query has its own."""
    samples = posterior.samples(key=key, draws=posterior.simulator.draws or draws)
    hypers = {}
    for name, variable in samples.items():
        if set(variable.dims) <= {"chain", "draw"}:
            hypers[str(name)] = variable.transpose("chain", "draw").values.astype(float)
        elif set(variable.dims) <= {"chain", "draw", "query"}:
            values = variable.transpose("query", "chain", "draw").values.astype(float)
            at = _query_shown(values, sampled=posterior.sample_stats is not None)
            hypers[f"{name}[{variable['query'].values[at]}]"] = values[at]
    return hypers


def _query_shown(values: Float[np.ndarray, "query chain draw"], *, sampled: bool) -> int:
    if sampled:
        r_hats = [_convergence(chains).get("r_hat", np.nan) for chains in values]
        if np.isfinite(r_hats).any():
            return int(np.nanargmax(r_hats))
    return int(np.argsort(values.mean(axis=(1, 2)))[len(values) // 2])


def _convergence(values: Float[np.ndarray, "chain draw"]) -> dict[str, float]:
    import arviz as az

    if values.shape[1] < 8:
        return {}
    draws = xr.Dataset({"x": (("chain", "draw"), values)})
    numbers = {f"ess_{kind}": float(az.ess(draws, method=kind)["x"]) for kind in ("bulk", "tail")}
    return {**numbers, "r_hat": float(az.rhat(draws)["x"])} if len(values) > 1 else numbers


def plot_diagnosis(posterior: Posterior, *, key: jax.Array) -> Figure:
    """The most informative picture of a fit: chains, the search's loss, or left-out runs.

    Raises:
        Misuse: a fit that has none of these.
    """
    if posterior.sample_stats is not None:
        return plot_traces(posterior, key=key)
    if posterior.search_loss is not None:
        return plot_search(posterior.search_loss)
    if posterior.left_out is not None:
        return plot_left_out(posterior)
    raise Misuse(
        "posterior",
        got="a fit without chains, search or left-out runs",
        expected="a fit by NUTS, SVI, Exact (two-timescale) or Ridge with a band",
        do="check it on held-out runs instead: bayes-simfluence calibrate",
    )


def plot_traces(posterior: Posterior, *, key: jax.Array, most: int = 5) -> Figure:
    """Chains of hyperparameters and histograms of their ranks, the worst R-hat first.

    Draws are ranked among those of all chains; the ranks are uniform when chains agree (Vehtari et
    al. 2021, section 4). Red ticks are divergent draws.
    """
    hypers = _hypers(posterior, key, 1)
    r_hat = {name: _convergence(chains).get("r_hat", 0.0) for name, chains in hypers.items()}
    shown = sorted(hypers, key=lambda name: -np.nan_to_num(r_hat[name]))[:most]
    figure = Figure(figsize=(9.0, 1.7 * len(shown) + 0.8), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=[2, 1])
    stats: Any = posterior.sample_stats
    diverging = np.flatnonzero(stats["diverging"].values.any(axis=0))
    for (left, right), name in zip(grid, shown, strict=True):
        values = hypers[name]
        ranks = rankdata(values).reshape(values.shape)
        bins = min(BINS, max(values.shape[1] // 5, 2))
        for number, (chain, rank) in enumerate(zip(values, ranks, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            left.plot(chain, color=colour, linewidth=0.6, alpha=0.8, label=f"chain {number}")
            right.hist(
                rank,
                bins=np.linspace(0.5, values.size + 0.5, bins + 1),
                histtype="step",
                color=colour,
            )
        right.axhline(values.shape[1] / bins, color=TRUTH, linewidth=0.8, linestyle="--")
        right.set_ylim(bottom=0)
        # Ticks at the bottom of the axes, whatever the values.
        left.vlines(
            diverging, 0.0, 0.05, color="red", linewidth=0.8, transform=left.get_xaxis_transform()
        )
        agreement = f" (R-hat {r_hat[name]:.3f})" if r_hat[name] else ""
        left.set_title(f"{name}{agreement}", fontsize=9, loc="left")
        for axes in (left, right):
            axes.tick_params(labelsize=7)
    grid[-1][0].set_xlabel("draw")
    grid[-1][1].set_xlabel("rank among all draws")
    legend_below(figure, grid[0][0])
    return figure


def plot_search(loss: Float[np.ndarray, " step"]) -> Figure:
    """Loss of a stochastic search: all steps, and the second half enlarged."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = max(1, min(WINDOW, len(loss) // 10))
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    at = np.arange(len(smooth)) + (window - 1) / 2
    for axes in (left, right):
        axes.plot(np.arange(len(loss)), loss, color="lightgrey", linewidth=0.6, label="each step")
        axes.plot(at, smooth, color=COLOURS[0], linewidth=1.2, label=f"mean of {window} steps")
        axes.set_xlabel("step")
    left.set_yscale("symlog")
    left.set_ylabel("minus the evidence bound (nats)")
    left.set_title("all steps", fontsize=10)
    half = len(loss) // 2
    tail = loss[half:][np.isfinite(loss[half:])]
    if len(tail):
        low, high = np.quantile(tail, [0.01, 0.99])
        margin = 0.1 * max(high - low, 1e-9)
        right.set_ylim(low - margin, high + margin)
    right.set_xlim(half, len(loss))
    right.set_title("second half", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    return figure


def plot_left_out(posterior: Posterior) -> Figure:
    """Fitted runs predicted without them: coverage along training, predicted and true changes."""
    left_out: Any = posterior.left_out
    left_out = left_out.sel(time=left_out["time"] > 0)
    truth = posterior.runs["loss"].sel(time=left_out["time"], query=left_out["query"])
    start = posterior.runs["loss"].isel(time=0, drop=True).sel(query=left_out["query"])
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "low" in left_out:
        known = np.isfinite(truth) & np.isfinite(left_out["predicted"])
        inside = ((truth >= left_out["low"]) & (truth <= left_out["high"])).where(known)
        covered = inside.mean(("run", "query")).dropna("time")
        left.plot(covered["time"], covered, color=COLOURS[0], marker=".")
        label_coverage(left)
    else:
        error = np.sqrt(np.square(left_out["predicted"] - truth).mean(("run", "query")))
        left.plot(error["time"], error, color=COLOURS[0])
        left.set(xlabel="time (updates)", ylabel="RMS error of left-out runs (nats)")
        left.set_ylim(bottom=0)
    predicted, true = (
        (loss - start).transpose("run", "time", "query").values.ravel()
        for loss in (left_out["predicted"], truth)
    )
    ends = [np.nanmin([predicted, true]), np.nanmax([predicted, true])]
    right.plot(ends, ends, color=TRUTH, linewidth=0.8, linestyle="--")
    right.plot(predicted, true, ".", color=COLOURS[0], markersize=2, alpha=0.3, rasterized=True)
    right.set(xlabel="predicted change of the loss (nats)", ylabel="recorded change (nats)")
    figure.suptitle("fitted runs, each predicted by a fit without it", fontsize=10)
    return figure
