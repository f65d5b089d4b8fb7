"""Calibration along training: what held-out runs say of the band at each time."""

import jax
import numpy as np
import pandas as pd
import xarray as xr

from bayes_simfluence.checks import positive_integer
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.evaluation.compare import scores_by_run
from bayes_simfluence.evaluation.metrics import COVERAGES, coverage, pit
from bayes_simfluence.inference.fit import fit
from bayes_simfluence.inference.method import Method
from bayes_simfluence.inference.posterior import Posterior
from bayes_simfluence.model.bayesian import Simfluence
from bayes_simfluence.progress import Progress, Silent

__all__ = ["by_horizon", "elpd_over_runs"]


def by_horizon(
    posterior: Posterior, runs: xr.Dataset, *, key: jax.Array, draws: int = 400
) -> xr.Dataset:
    """PIT values and coverage of held-out runs at each time after the first.

    Returns:
        ``pit (run, time, query)`` in (0, 1), uniform for a calibrated band, and ``coverage
        (probability, time)``, the share of runs and queries within the central bands; NaN where
        nothing was recorded.
    """
    runs = usable_runs(runs)
    simulated = posterior.simulate(runs, key=key, draws=draws)
    stacked = simulated["loss"].stack(sample=("chain", "draw")).isel(time=slice(1, None))
    values = stacked.transpose("sample", "run", "time", "query").values
    truth = runs["loss"].values[:, 1:]
    known = np.isfinite(truth)
    inside = np.where(known[None], coverage(values, truth), 0.0).sum(axis=(1, 3))
    count = known.sum(axis=(0, 2))
    covered = np.where(count[None] > 0, inside / np.maximum(count, 1)[None], np.nan)
    return xr.Dataset(
        {
            "pit": (("run", "time", "query"), np.where(known, pit(values, truth), np.nan)),
            "coverage": (("probability", "time"), covered),
        },
        coords={
            "run": runs["run"],
            "time": runs["time"][1:],
            "query": runs["query"],
            "probability": list(COVERAGES),
        },
    )


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
