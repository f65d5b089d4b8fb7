"""Calibration: ranks of true values over simulated recordings, and held-out runs along training."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias
from warnings import catch_warnings, simplefilter

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import FitWarning, Misuse, keyed, named, positive_integer
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.evaluation.metrics import COVERAGES, coverage, pit
from bayes_simfluence.evaluation.ranks import even_bins, rank_among
from bayes_simfluence.inference.method import Method
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.fit import fit
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.progress import Progress, Silent

PriorDraw: TypeAlias = Callable[[jax.Array], tuple[xr.Dataset, xr.Dataset]]
"""PRNG key -> recorded runs drawn from the model's prior, and the true values that made them, with
the variables and dimensions of ``Posterior.samples`` less ``chain`` and ``draw``."""

Quantity: TypeAlias = Callable[[xr.Dataset, xr.Dataset], xr.DataArray]
"""(values, runs) -> one number or array of numbers. The values are the truth, or draws with
``chain`` and ``draw``, which must be kept."""


def sbc(
    prior_draw: PriorDraw,
    method: Method,
    *,
    key: jax.Array,
    model: Simfluence | None = None,
    simulations: int = 200,
    draws: int = 99,
    quantities: Sequence[str] | Mapping[str, Quantity] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Simulation-based calibration: ranks of true values among draws of their posteriors.

    Truth and runs are drawn from the prior, the runs are fitted, and the truth is ranked among the
    posterior's draws. If method and model are right every rank is equally likely (Talts et al.
    2018, arXiv 1804.06788); ``rank_histogram_test`` tests that, ``plot_ranks`` shows it.

    A method with independent draws makes ``draws`` of them. A Markov chain, which holds its draws,
    is thinned evenly to as many; these are nearly independent when the chain has at least as many
    effective draws (algorithm 2 there).

    Args:
        prior_draw: makes the runs and the truth, from the very prior that ``method`` assumes.
        method, model: what is tested, as for ``fit``.
        key: decides everything; the first simulations are the same whatever their number.
        simulations: number of simulated recordings, each of which is fitted.
        draws: kept of each posterior; ``draws + 1`` must have a divisor in 2..10.
        quantities: names of the true values to rank, all when omitted; or functions ``(values,
            runs) -> array`` by name. A quantity that depends on the runs, such as the log
            likelihood, detects posteriors that ignore them, which the others cannot.
        progress: told of every simulation; silent when omitted.

    Returns:
        ``rank (simulation, quantity)``, 0 to ``draws``, with attributes ``draws`` and ``bins``;
        ``effective (simulation,)``, the effective draws of the worst quantity, at most ``draws``;
        ``ok (simulation,)``, the verdicts. Attributes count ``failed_verdicts`` (no warning is
        shown) and ``short_chains``, simulations with fewer than ``draws`` effective draws.

    Raises:
        Misuse: a point method, or true values that the posterior does not have.

    >>> import jax, bayes_simfluence as bs
    >>> from bayes_simfluence.evaluation.synthetic import linear_runs
    >>> def prior_draw(key):
    ...     runs, truth = linear_runs(key=key, runs=4, train=4, query=1, per_run=4, epochs=2)
    ...     return runs, xr.Dataset({"b": (("query", "train"), truth.b)})
    >>> model = bs.Simfluence.linear()
    >>> ranks = sbc(
    ...     prior_draw, bs.Exact(), model=model, simulations=2, draws=19, key=jax.random.key(0)
    ... )
    >>> ranks["rank"].dims, ranks["quantity"].values.tolist()
    (('simulation', 'quantity'), ['b[0, 0]', 'b[0, 1]', 'b[0, 2]', 'b[0, 3]'])
    """
    keyed(key)
    positive_integer("simulations", simulations)
    bins = even_bins(positive_integer("draws", draws), simulations)
    if bins == 1:
        raise Misuse(
            "draws",
            got=draws,
            expected="a number such that draws + 1 splits into 2 to 10 equal bins",
            do="pass draws=99",
        )
    ranked = []
    with (progress or Silent()).work("simulations", simulations) as meter:
        for number in range(simulations):
            fit_key, sample_key, tie_key, prior_key = jax.random.split(
                jax.random.fold_in(key, number), 4
            )
            runs, truth = prior_draw(prior_key)
            with catch_warnings():
                # Bad verdicts are counted instead.
                simplefilter("ignore", FitWarning)
                posterior = fit(runs, model=model, method=method, key=fit_key)
            pairs = _sampled(posterior, truth, quantities, draws, sample_key)
            rank = rank_among(_evenly_kept(pairs.draws, draws), pairs.truth, key=tie_key)
            ranked.append(
                (pairs.names, rank, _effective(posterior, pairs, draws), posterior.verdict.ok)
            )
            meter.advance()
    names, ranks, effectives, ok = zip(*ranked, strict=True)
    settings = {} if model is None else {"model": model.as_dict()}
    rank_attrs = {"long_name": "draws below the true value", "draws": draws, "bins": bins}
    effective_attrs = {"long_name": "effective draws, at most those kept"}
    return xr.Dataset(
        {
            "rank": (("simulation", "quantity"), np.stack(ranks), rank_attrs),
            "effective": ("simulation", np.array(effectives), effective_attrs),
            "ok": ("simulation", np.array(ok), {"long_name": "the fit's verdict is good"}),
        },
        coords={"simulation": np.arange(simulations), "quantity": names[0]},
        attrs={
            "failed_verdicts": simulations - sum(ok),
            "short_chains": int((np.array(effectives) < draws).sum()),
            "settings": json.dumps({**settings, **method.as_dict()}),
        },
    )


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


def horizon_table(horizons: xr.Dataset, parts: int = 4) -> pd.DataFrame:
    """Coverage and moments of PIT values in equal parts of training, from ``by_horizon``.

    Returns:
        One row per part, named by its first and last time, and one for ``all``: the share of losses
        within each central band, ``PIT mean`` and ``PIT sd`` (0.5 and 0.289 where calibrated), and
        ``losses``, how many were recorded. A part without any is left out.
    """
    count = horizons["pit"].notnull().sum(("run", "query")).values
    steps = np.arange(horizons.sizes["time"])
    split = np.array_split(steps, min(parts, len(steps)))
    recorded = [part for part in split if count[part].sum()]
    time = horizons["time"].values
    by_name = {f"{time[part[0]]}-{time[part[-1]]}": part for part in recorded}
    rows = {}
    for name, at in {**by_name, "all": steps}.items():
        part = horizons.isel(time=at)
        covered = part["coverage"].fillna(0.0).transpose("probability", "time").values
        values = part["pit"].values[np.isfinite(part["pit"].values)]
        rows[name] = {
            **{
                f"{probability:.0%}": float(share @ count[at] / count[at].sum())
                for probability, share in zip(horizons["probability"].values, covered, strict=True)
            },
            "PIT mean": values.mean(),
            "PIT sd": values.std(),
            "losses": len(values),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("horizon")


def summaries_of(model: Simfluence, method: Method, runs: xr.Dataset) -> dict[str, Quantity]:
    """A few summaries of a model to rank in ``sbc``; a test of thousands has little power.

    Effects are summed over examples, which gives one number for each query; hyperparameters are
    ranked where the method draws them.
    """
    effects = (
        ["b"] * model.has_additive + ["a"] * model.has_multiplicative
        if model.per_query
        else [*model.parts, *(["multiplicative"] * model.has_multiplicative)]
    )
    totals = {f"total {name}": _summed(name) for name in effects}
    settings = method.as_dict()
    fixed = settings["method"] in ("Exact", "Stack") and settings.get("hyperparameters") != "nuts"
    features = recorded_arrays(runs, model.prior).features.where(model.prior.features)
    names = [] if fixed else list(hypers_of(model, features))
    own = [] if fixed else ["scale", *(["noise"] * model.per_query)]
    return {**totals, **{name: _variable(name) for name in dict.fromkeys([*names, *own])}}


def _summed(name: str) -> Quantity:
    return lambda values, _: values[name].sum("train")


class _Pairs(NamedTuple):
    names: list[str]
    draws: Float[np.ndarray, "chain draw quantity"]
    truth: Float[np.ndarray, " quantity"]


def _sampled(
    posterior: Posterior,
    truth: xr.Dataset,
    quantities: Sequence[str] | Mapping[str, Quantity] | None,
    draws: int,
    key: jax.Array,
) -> _Pairs:
    """Draws and true values of everything that is ranked."""
    held = posterior.simulator.draws
    values = posterior.samples(key=key, draws=draws if held is None else max(draws, held))
    if not isinstance(quantities, Mapping):
        chosen = [str(name) for name in (truth.data_vars if quantities is None else quantities)]
        named("true values", chosen, truth.data_vars)
        named("true values", chosen, values.data_vars)
        quantities = {name: _variable(name) for name in chosen}
    names: list[str] = []
    drawn, true = [], []
    for name, quantity in quantities.items():
        of_draws = quantity(values, posterior.runs).transpose("chain", "draw", ...)
        of_truth = _like(name, quantity(truth, posterior.runs), of_draws)
        drawn.append(of_draws.values.astype(float).reshape(*of_draws.shape[:2], -1))
        true.append(of_truth.values.astype(float).ravel())
        names += _labels(name, of_draws)
    return _Pairs(names, np.concatenate(drawn, axis=2), np.concatenate(true))


def _variable(name: str) -> Quantity:
    return lambda values, _: values[name]


def _like(name: str, truth: xr.DataArray, draws: xr.DataArray) -> xr.DataArray:
    """The truth with its dimensions and ids in the order of the draws'."""
    dims = draws.dims[2:]
    sizes = {dim: draws.sizes[dim] for dim in dims}
    if dict(truth.sizes) != sizes:
        raise Misuse(
            f"the truth of '{name}'",
            got=f"dimensions {dict(truth.sizes)}",
            expected=f"{sizes}, as the posterior has",
            do="make prior_draw name the dimensions of Posterior.samples without chain and draw",
        )
    if not np.isfinite(truth.values).all():
        raise Misuse(
            f"the truth of '{name}'",
            got="values that are not finite",
            expected="the numbers that made the runs",
            do="check prior_draw",
        )
    ids = {dim: draws[dim].values for dim in dims if dim in draws.coords and dim in truth.coords}
    order = {
        dim: named(f"{dim} of the truth of '{name}'", wanted, truth[dim].values)
        for dim, wanted in ids.items()
    }
    return truth.isel(order).transpose(*dims)


def _labels(name: str, draws: xr.DataArray) -> list[str]:
    sizes = draws.shape[2:]
    ids = [draws[dim].values for dim in draws.dims[2:]]
    places = (
        ", ".join(str(names[at]) for names, at in zip(ids, place, strict=True))
        for place in np.ndindex(*sizes)
    )
    return [f"{name}[{place}]" if sizes else name for place in places]


def _evenly_kept(
    values: Float[np.ndarray, "chain held quantity"], draws: int
) -> Float[np.ndarray, "draw quantity"]:
    values = values.reshape(-1, values.shape[2])
    if len(values) < draws:
        raise Misuse(
            "sbc(draws=...)",
            got=f"{draws} of a posterior that has {len(values)}",
            expected="at most the draws that the method makes",
            do="lower draws, or use a method with more draws; a point estimate has no ranks",
        )
    return values[np.linspace(0, len(values) - 1, draws).round().astype(int)]


def _effective(posterior: Posterior, pairs: _Pairs, draws: int) -> float:
    """Smallest bulk effective sample size (Vehtari et al. 2021), at most ``draws``."""
    if posterior.simulator.draws is None:
        return float(draws)
    import arviz

    ess = arviz.ess(xr.Dataset({"all": (("chain", "draw", "quantity"), pairs.draws)}))
    return min(float(draws), float(np.nanmin(ess["all"].values)))
