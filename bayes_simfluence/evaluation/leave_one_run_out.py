"""How well a model predicts runs that it was not fitted to: by refitting, or by ArviZ's weights."""

from typing import Any
from warnings import warn

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from bayes_simfluence.checks import FitWarning, positive_integer
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.twins import twin_groups
from bayes_simfluence.evaluation.compare import scores_by_run
from bayes_simfluence.inference.method import Method
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.posterior.arviz import over_runs, pointwise_loo
from bayes_simfluence.posterior.fit import fit
from bayes_simfluence.progress import Progress, Silent


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

    Losses within a run are not exchangeable, so whole runs are left out: one of ``folds`` groups
    after the other (as many folds as runs leave out each run by itself). Twins are left out
    together.

    Returns:
        One row per run: ``elpd`` (natural log, mean over points) and ``mse`` (nats squared).
    """
    runs = usable_runs(runs)
    group = _groups(runs)
    count = min(positive_integer("folds", folds), int(group.max()) + 1)
    scored: dict[int, tuple[float, float]] = {}
    with (progress or Silent()).work("left-out runs", count) as meter:
        for fold, fold_key in enumerate(jax.random.split(key, count)):
            out = np.flatnonzero(group % count == fold)
            rest = np.setdiff1d(np.arange(runs.sizes["run"]), out)
            fit_key, draw_key = jax.random.split(fold_key)
            posterior = fit(runs.isel(run=rest), model=model, method=method, key=fit_key)
            scores = scores_by_run(posterior, runs.isel(run=out), key=draw_key, draws=draws)
            scored.update(zip(out, zip(scores["elpd"], scores["mse"], strict=True), strict=True))
            meter.advance()
    ordered = [scored[run] for run in range(runs.sizes["run"])]
    return pd.DataFrame(
        ordered, columns=["elpd", "mse"], index=pd.Index(runs["run"].values, name="run")
    )


def _groups(runs: xr.Dataset) -> Int[np.ndarray, " run"]:
    """Numbers from 0 of the runs that can be left out by themselves, the same for twins."""
    first = np.arange(runs.sizes["run"])
    for twins in twin_groups(runs):
        first[twins] = twins[0]
    return np.unique(first, return_inverse=True)[1]


def loo_over_runs(idata: Any) -> pd.DataFrame:
    """Expected log density of each run under a fit without it, by Pareto-smoothed importance
    sampling (Vehtari et al. 2017, arXiv 1507.04544): cheap, and only as good as its ``pareto_k``.

    Each query has its own weights, since it has its own coefficients. Unlike the refits of
    ``elpd_over_runs``, hyperparameters and scales stay those of the fit to all runs.

    Args:
        idata: ``Posterior.to_arviz()`` of a fit with a likelihood, in either of ArviZ's versions.

    Returns:
        One row per run: ``elpd`` (natural log density of all its observed losses, per nat), the
        largest ``pareto_k`` of its queries, and ``trusted``: whether that is below ArviZ's
        threshold (0.7, less with few draws).

    Raises:
        Misuse: a container without ``run_log_likelihood``.

    Warns:
        FitWarning: runs that importance sampling cannot leave out.

    >>> import jax, warnings, bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(run=slice(0, 5), query=slice(0, 1))
    >>> posterior = bs.fit(runs, model=bs.Simfluence.additive(), key=jax.random.key(0))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # with five runs, no weights can be trusted
    ...     table = loo_over_runs(posterior.to_arviz(draws=400))
    >>> list(table.columns), bool(table["trusted"].any())
    (['elpd', 'pareto_k', 'trusted'], False)
    """
    elpd, pareto_k, good = pointwise_loo(over_runs(idata))
    table = pd.DataFrame(
        {"elpd": elpd.sum("query").to_series(), "pareto_k": pareto_k.max("query").to_series()}
    )
    table["trusted"] = table["pareto_k"] <= good
    bad = int((~table["trusted"]).sum())
    if bad:
        warn(
            f"Pareto k is above {good:.2f} for {bad} of {len(table)} runs: their draws cannot "
            "stand for a fit without them; use elpd_over_runs, which refits.",
            FitWarning,
            stacklevel=2,
        )
    return table
