"""Methods side by side on held-out runs: every metric with a bootstrap interval over runs."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from warnings import warn

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.checks import (
    Misuse,
    RunsWarning,
    SupportWarning,
    choice_of,
    keyed,
    positive_integer,
    shorten,
)
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.twins import twins_between
from bayes_simfluence.evaluation.floor import by_curriculum, twin_variances
from bayes_simfluence.evaluation.metrics import (
    bootstrap_interval,
    last_known,
    resamples_of,
    run_scores,
    spearman_resampled,
)
from bayes_simfluence.files import first_line
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.posterior.support import told_elsewhere
from bayes_simfluence.progress import Progress, Silent

LOG = logging.getLogger(__name__)

METRICS = (
    "mse",
    "mae",
    "spearman_query",
    "spearman_change",
    "spearman_run",
    "crps",
    "coverage_50",
    "coverage_80",
    "coverage_90",
    "coverage_95",
    "final_coverage_90",
    "elpd",
)
"""Columns of a comparison, in order."""

RATIO = "mse_ratio"
"""Column with each method's MSE over that of the reference; there only when one is named."""

OVER_FLOOR = "mse_over_floor"
"""Column with each method's MSE over what twins differ by (``floor``), 1 = as little as any
simulator errs in expectation; there only when some of the runs are twins."""

ENDS = ("", "_low", "_high")
"""Endings of a metric's columns: the value, and the ends of its bootstrap interval."""

FAILED = "failed"
"""Column with the reasons of methods that failed; there only when one did."""


@dataclass(frozen=True)
class Failed:
    """A method that could not be computed; its row of the table says why.

    Attributes:
        reason: one line.
    """

    reason: str


Compared = Posterior | Failed | Callable[[], Posterior]
"""A method to compare: its posterior, a function that makes it, or why there is none."""


def compare(
    posteriors: Mapping[str, Compared],
    runs: xr.Dataset,
    *,
    key: jax.Array,
    draws: int = 200,
    resamples: int = 1000,
    reference: str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row per method, one column per metric, on runs that no method was fitted to.

    ``mse`` and ``mae`` (nats squared, nats) are over all steps after the first loss; the Spearman
    correlations are of the final losses (across queries; of their change; across runs, averaged
    over queries); ``crps`` (nats), ``coverage_P`` of the central P% band and ``elpd`` (log density
    under a normal with the draws' moments, per point) are over all steps, ``final_coverage_90``
    over the last. Point forecasts are means over draws of ``mean_loss``. Columns ``_low`` and
    ``_high`` hold a 90% bootstrap interval over runs; NaN where a metric does not exist (bands of
    a point, correlations across fewer than three runs).

    Only recorded losses are scored. A query's final loss is then the last recorded one of each
    run, and across runs the one at the last time that was recorded in all of them, so that runs
    are compared at one time (a query without such a time is left out of ``spearman_run``).

    Where runs have twins (``bs.record(..., twins=K)``), ``mse_over_floor`` is each MSE over half of
    the twins' mean squared difference (``evaluation.floor``): 1 is as little as any simulator errs
    in expectation. In its interval runs and pairs of twins are resampled apart. Runs whose twins a
    method was fitted to are said (``RunsWarning``): they are not held out.

    Runs that leave what a method was fitted to are said once for all methods (``SupportWarning``).
    A method that fails, while it is made or while it simulates, keeps its row: its numbers are NaN
    and the column ``failed`` says the reason. When every method fails, the last error is raised.

    Args:
        posteriors: by name; also a function of no arguments that makes the posterior, or
            ``Failed(reason)`` for one that could not be made.
        runs: held-out recorded runs.
        key: decides draws and resamples.
        draws: per run.
        resamples: of the bootstrap.
        reference: name of a method whose MSE divides that of every other, ``mse_ratio``; both are
            of the same runs in every resample, so that the interval is that of the ratio.
        progress: told of every method; silent when omitted.

    >>> import jax, bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(query=slice(0, 5))
    >>> fitted, held_out = runs.isel(run=slice(0, 25)), runs.isel(run=slice(25, None))
    >>> table = bs.compare({"mean": bs.mean_trajectory(fitted)}, held_out, key=jax.random.key(0))
    >>> bool(table.loc["mean", "mse_low"] <= table.loc["mean", "mse"])
    True
    """
    if not posteriors:
        raise Misuse("posteriors", got="none", expected="at least one", do="pass {'a': posterior}")
    keyed(key)
    positive_integer("draws", draws)
    positive_integer("resamples", resamples)
    if reference is not None:
        choice_of("reference", reference, tuple(posteriors))
    runs = usable_runs(runs)
    simulate_key, bootstrap_key = jax.random.split(key)
    columns = [name + end for name in METRICS for end in ENDS]
    rows: dict[str, dict[str, float]] = {}
    seen: dict[str, list[str]] = {}
    known: dict[str, RunScores] = {}
    reasons: dict[str, str] = {}
    last: Exception | None = None
    with (progress or Silent()).work("compare", len(posteriors)) as meter:
        for name, compared in posteriors.items():
            rows[name] = dict.fromkeys(columns, float("nan"))
            try:
                if isinstance(compared, Failed):
                    reasons[name] = compared.reason
                    continue
                posterior = compared if isinstance(compared, Posterior) else compared()
                seen[name] = twins_between(runs, posterior.runs)
                scores = scores_by_run(posterior, runs, key=simulate_key, draws=draws)
                rows[name] = table_of(scores, key=bootstrap_key, resamples=resamples)
                known[name] = scores
            # A method may raise anything; the others go on.
            except Exception as error:
                reasons[name], last = first_line(error), error
                LOG.warning("method %s failed: %s", name, reasons[name])
            finally:
                meter.advance(1, name)
    if len(reasons) == len(rows):
        raise last or Misuse(
            "posteriors",
            got=f"none that could be made ({next(iter(reasons.values()))})",
            expected="at least one",
            do="add persistence(runs) or another method",
        )
    table = pd.DataFrame.from_dict(rows, orient="index")
    if reference is not None:
        chosen = resamples_of(bootstrap_key, resamples, runs.sizes["run"])
        ratios = [_ratio(known.get(name), known.get(reference), chosen) for name in rows]
        for end, column in zip(ENDS, zip(*ratios, strict=True), strict=True):
            table[RATIO + end] = column
    floors = by_curriculum(twin_variances(runs))
    if len(floors):
        over = [_over_floor(known.get(name), floors, bootstrap_key, resamples) for name in rows]
        for end, column in zip(ENDS, zip(*over, strict=True), strict=True):
            table[OVER_FLOOR + end] = column
    if reasons:
        table[FAILED] = [reasons.get(name, "") for name in rows]
    table.index.name = "method"
    _say_seen(seen)
    far = {name: scores.left for name, scores in known.items() if scores.left}
    if far:
        warn(f"{next(iter(far.values()))} ({', '.join(far)}).", SupportWarning, stacklevel=2)
    return table


class RunScores(dict[str, Float[np.ndarray, " run"]]):
    """Scores that are averages over runs, one value per run; plus what is needed across runs."""

    final_mean: Float[np.ndarray, "run query"]
    final_truth: Float[np.ndarray, "run query"]
    left: str
    """Which runs leave what the posterior was fitted to, in words; empty if none."""


def scores_by_run(
    posterior: Posterior, runs: xr.Dataset, *, key: jax.Array, draws: int
) -> RunScores:
    """Every run's scores under one posterior; of runs that leave its support, ``left`` tells."""
    with told_elsewhere():
        simulated = posterior.simulate(runs, key=key, draws=draws)
    truth = np.asarray(runs["loss"].values, float)
    stacked = simulated.stack(sample=("chain", "draw"))
    loss = stacked["loss"].transpose("run", "sample", "time", "query").values.astype(float)
    mean = simulated["mean_loss"].mean(("chain", "draw")).values.astype(float)
    by_run = [run_scores(*run) for run in zip(loss, mean, truth, strict=True)]
    scores = RunScores({name: np.array([run[name] for run in by_run]) for name in by_run[0]})
    scores.left = simulated["support"].attrs["sentence"]
    last = last_known(np.asarray(np.isfinite(truth[:, 1:]).all(axis=0)))
    scores.final_mean, scores.final_truth = _at(mean[:, 1:], last), _at(truth[:, 1:], last)
    return scores


def _at(
    loss: Float[np.ndarray, "run step query"], last: Bool[np.ndarray, "step query"]
) -> Float[np.ndarray, "run query"]:
    """Losses at each query's marked time; NaN where none is marked."""
    at_last = np.where(last[None], loss, 0.0).sum(axis=1)
    return np.where(last.any(axis=0), at_last, np.nan)


def table_of(scores: RunScores, *, key: jax.Array, resamples: int) -> dict[str, float]:
    """Metrics of one method with their bootstrap intervals over runs."""
    runs = len(scores.final_mean)
    chosen = resamples_of(key, resamples, runs)

    def across(chosen: Int[np.ndarray, "resample run"]) -> Float[np.ndarray, " resample"]:
        if runs < 3:
            return np.full(len(chosen), np.nan)
        return spearman_resampled(scores.final_mean, scores.final_truth, chosen)

    row = {}
    for name in METRICS:
        if name == "spearman_run":
            row[name], again = float(across(np.arange(runs)[None])[0]), across(chosen)
        else:
            row[name], again = float(scores[name].mean()), scores[name][chosen].mean(axis=1)
        row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(again)
    return row


def _over_floor(
    scores: RunScores | None,
    floors: Float[np.ndarray, " curriculum"],
    key: jax.Array,
    resamples: int,
) -> tuple[float, float, float]:
    """The MSE over the floor of the same runs, and its interval."""
    if scores is None:
        return (float("nan"),) * 3
    mse = scores["mse"]
    again = mse[resamples_of(key, resamples, len(mse))].mean(axis=1)
    floor_again = floors[resamples_of(jax.random.fold_in(key, 1), resamples, len(floors))]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(mse.mean() / floors.mean())
        return (value, *bootstrap_interval(again / floor_again.mean(axis=1)))


def _say_seen(seen: Mapping[str, list[str]]) -> None:
    """Warn of runs whose twins methods were fitted to."""
    methods = {name: twins for name, twins in seen.items() if twins}
    if methods:
        runs = list(dict.fromkeys(run for twins in methods.values() for run in twins))
        warn(
            f"Runs {shorten(runs)} were fitted, or their twins were ({', '.join(methods)}): they "
            "are not held out. Leave both of a pair out of the fit.",
            RunsWarning,
            stacklevel=3,
        )


def _ratio(
    scores: RunScores | None, reference: RunScores | None, chosen: Int[np.ndarray, "resample run"]
) -> tuple[float, float, float]:
    """The MSE over that of the reference, and its interval."""
    if scores is None or reference is None:
        return (float("nan"),) * 3
    own, other = scores["mse"], reference["mse"]
    with np.errstate(divide="ignore", invalid="ignore"):
        again = own[chosen].mean(axis=1) / other[chosen].mean(axis=1)
        value = float(own.mean() / other.mean())
    return (value, *bootstrap_interval(again))
