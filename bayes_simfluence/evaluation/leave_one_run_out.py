"""Runs left out without refitting: importance sampling by ArviZ, where it can be trusted."""

from typing import Any
from warnings import warn

import pandas as pd

from bayes_simfluence.checks import FitWarning
from bayes_simfluence.posterior.arviz import over_runs, pointwise_loo

__all__ = ["loo_over_runs"]


def loo_over_runs(idata: Any) -> pd.DataFrame:
    """Expected log density of each run under a fit without it, by Pareto-smoothed importance
    sampling (Vehtari et al. 2017, arXiv 1507.04544): cheap, and only as good as its ``pareto_k``.

    Queries are weighted apart, since each has coefficients of its own. Unlike the refits of
    ``elpd_over_runs``, it takes hyperparameters and scales as they are.

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
    >>> posterior = bs.fit(runs, model=bs.Simfluence(kind="additive"), key=jax.random.key(0))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # five runs: none of them can be spared
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
