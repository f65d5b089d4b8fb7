"""Methods side by side on held-out runs: every metric with a bootstrap interval over runs."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.checks import Misuse, choice_of, keyed, positive_integer
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.evaluation.metrics import last_known, run_scores, spearman_resampled
from bayes_simfluence.files import first_line
from bayes_simfluence.inference.method import Method
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.posterior.fit import fit
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.progress import Progress, Silent

__all__ = [
    "ENDS",
    "FAILED",
    "INTERVAL",
    "METRICS",
    "RATIO",
    "Compared",
    "Failed",
    "compare",
    "elpd_over_runs",
    "scores_by_run",
    "table_of",
]

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

INTERVAL = 0.90
"""Probability of the bootstrap interval, ``_low`` to ``_high``."""

ENDS = ("", "_low", "_high")
"""Of the columns of a metric: the value, and its interval."""

FAILED = "failed"
"""Column with the reasons of methods that failed; there only when one did."""


@dataclass(frozen=True)
class Failed:
    """A method that could not be computed: a row of the table that says why.

    Attributes:
        reason: one line.
    """

    reason: str


Compared = Posterior | Failed | Callable[[], Posterior]
"""What stands for a method: a simulator, what makes one, or the reason why there is none."""


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
        raise Misuse("posteriors", got="none", expected="at least one", do="name one: {'a': post}")
    keyed(key)
    positive_integer("draws", draws)
    positive_integer("resamples", resamples)
    if reference is not None:
        choice_of("reference", reference, tuple(posteriors))
    runs = usable_runs(runs)
    simulate_key, bootstrap_key = jax.random.split(key)
    rows: dict[str, dict[str, float]] = {}
    known: dict[str, RunScores] = {}
    reasons: dict[str, str] = {}
    last: Exception | None = None
    with (progress or Silent()).work("compare", len(posteriors)) as meter:
        for name, one in posteriors.items():
            rows[name] = _unknown()
            try:
                if isinstance(one, Failed):
                    reasons[name] = one.reason
                    continue
                posterior = one if isinstance(one, Posterior) else one()
                scores = scores_by_run(posterior, runs, key=simulate_key, draws=draws)
                rows[name] = table_of(scores, key=bootstrap_key, resamples=resamples)
                known[name] = scores
            # Whatever a method raises is its own: the others go on.
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
        chosen = _resampled(bootstrap_key, resamples, runs.sizes["run"])
        found = [_ratio(known.get(name), known.get(reference), chosen) for name in rows]
        for place, end in enumerate(ENDS):
            table[RATIO + end] = [one[place] for one in found]
    if reasons:
        table[FAILED] = [reasons.get(name, "") for name in rows]
    table.index.name = "method"
    return table


def _unknown() -> dict[str, float]:
    """The row of a method without numbers."""
    return {name + end: float("nan") for name in METRICS for end in ENDS}


class RunScores(dict[str, Float[np.ndarray, " run"]]):
    """Scores that are averages over runs, one value per run; plus what is needed across runs."""

    final_mean: Float[np.ndarray, "run query"]
    final_truth: Float[np.ndarray, "run query"]


def scores_by_run(
    posterior: Posterior, runs: xr.Dataset, *, key: jax.Array, draws: int
) -> RunScores:
    """Every run's scores under one posterior."""
    simulated = posterior.simulate(runs, key=key, draws=draws)
    truth = np.asarray(runs["loss"].values, float)
    stacked = simulated.stack(sample=("chain", "draw"))
    loss = stacked["loss"].transpose("run", "sample", "time", "query").values.astype(float)
    mean = simulated["mean_loss"].mean(("chain", "draw")).values.astype(float)
    each = [run_scores(*one) for one in zip(loss, mean, truth, strict=True)]
    scores = RunScores({name: np.array([one[name] for one in each]) for name in each[0]})
    last = last_known(np.asarray(np.isfinite(truth[:, 1:]).all(axis=0)))
    scores.final_mean, scores.final_truth = _at(mean[:, 1:], last), _at(truth[:, 1:], last)
    return scores


def _at(
    loss: Float[np.ndarray, "run step query"], last: Bool[np.ndarray, "step query"]
) -> Float[np.ndarray, "run query"]:
    """Losses at each query's marked time; NaN where none is marked."""
    found = np.where(last[None], loss, 0.0).sum(axis=1)
    return np.where(last.any(axis=0), found, np.nan)


def table_of(scores: RunScores, *, key: jax.Array, resamples: int) -> dict[str, float]:
    """Metrics of one method with their bootstrap intervals over runs."""
    runs = len(scores.final_mean)
    chosen = _resampled(key, resamples, runs)

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
        row[f"{name}_low"], row[f"{name}_high"] = _interval(again)
    return row


def _resampled(key: jax.Array, resamples: int, runs: int) -> Int[np.ndarray, "resample run"]:
    """Runs drawn with replacement, the same ones for the same key."""
    return np.asarray(jax.random.randint(key, (resamples, runs), 0, runs))


def _interval(again: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    kept = again[np.isfinite(again)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1.0 - INTERVAL) / 2.0, (1.0 + INTERVAL) / 2.0])
    return float(low), float(high)


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
    return (value, *_interval(again))


def elpd_over_runs(
    runs: xr.Dataset,
    *,
    key: jax.Array,
    model: Simfluence | None = None,
    method: Method | None = None,
    folds: int = 5,
    draws: int = 200,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Expected log predictive density of runs that were left out, by refitting without them.

    Points within a run are not exchangeable, so whole runs are left out, ``folds`` groups in turn
    (as many as runs for leave-one-run-out).

    Returns:
        One row per run: ``elpd`` (natural log, mean over points) and ``mse`` (nats squared).
    """
    runs = usable_runs(runs)
    count = min(positive_integer("folds", folds), runs.sizes["run"])
    found: dict[int, tuple[float, float]] = {}
    with (progress or Silent()).work("left-out runs", count) as meter:
        for fold, one in enumerate(jax.random.split(key, count)):
            out = np.arange(fold, runs.sizes["run"], count)
            rest = np.setdiff1d(np.arange(runs.sizes["run"]), out)
            fit_key, draw_key = jax.random.split(one)
            posterior = fit(runs.isel(run=rest), model=model, method=method, key=fit_key)
            scores = scores_by_run(posterior, runs.isel(run=out), key=draw_key, draws=draws)
            found.update(zip(out, zip(scores["elpd"], scores["mse"], strict=True), strict=True))
            meter.advance()
    ordered = [found[run] for run in range(runs.sizes["run"])]
    return pd.DataFrame(
        ordered, columns=["elpd", "mse"], index=pd.Index(runs["run"].values, name="run")
    )
