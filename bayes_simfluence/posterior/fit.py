"""``fit``: recorded runs in, a ``Posterior`` out, whatever the model and method."""

from dataclasses import replace
from warnings import warn

import jax
import numpy as np
import xarray as xr

from bayes_simfluence.checks import FitFailed, FitWarning, Misuse, keyed, named, shorten
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.data.identify import identifiability
from bayes_simfluence.data.runs import nothing_recorded, usable_runs
from bayes_simfluence.data.training import residuals_of
from bayes_simfluence.data.twins import twins_between, without_twins
from bayes_simfluence.inference.method import FitContext, LeftOutRuns, Method
from bayes_simfluence.inference.stack import Stack
from bayes_simfluence.inference.unfitted import from_prior
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.arviz import untrusted_runs
from bayes_simfluence.posterior.posterior import Posterior
from bayes_simfluence.posterior.prior import PriorOf
from bayes_simfluence.posterior.widening import widening_of
from bayes_simfluence.progress import Progress, Silent
from bayes_simfluence.simulators.base import Simulator

UNCOUPLED = (
    "Effects are additive, since losses of the steps' own examples were not recorded: curricula "
    "unlike the recorded ones may be far outside their bands (docs/counterfactuals.md). Record "
    "anew, or pass train_losses to Recorder."
)
FEWEST_DRAWS, MOST_DRAWS, MOST_QUERIES = 100, 400, 20
"""Draws and queries that Pareto k is measured on."""


def fit(
    runs: xr.Dataset,
    *,
    key: jax.Array,
    model: Simfluence | None = None,
    method: Method | None = None,
    validation: xr.Dataset | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Posterior:
    """Infer a simulator of training runs from recorded ones.

    Args:
        runs: recorded runs; unusable ones are left out with a warning. Of twins the first is
            fitted: where runs are left out to judge predictions of them, twins must be, too. With
            no run, or with planned ones alone, everything is the prior: hyperparameters, scales
            and effects are drawn from it, and the verdict says so.
        key: decides whatever a method draws.
        model: what is inferred; the method's own default when omitted.
        method: how; ``Stack()`` when omitted.
        validation: further runs, for methods that choose settings on them (``Ridge``).
        strict: raise when the verdict asks for attention, instead of warning.
        progress: told of the work; silent when omitted.

    Raises:
        Misuse: invalid runs, or a model that the method cannot take; before any work.
        FitFailed: under ``strict``, a verdict that is not ok.

    >>> import jax, bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(run=slice(0, 6), query=slice(0, 3))
    >>> posterior = bs.fit(runs, method=bs.Ridge(penalty=1.0), key=jax.random.key(0))
    >>> posterior.verdict.sentence
    'Point estimate at penalty 1.'
    """
    keyed(key)
    method = Stack() if method is None else method
    if isinstance(method, type) or not isinstance(method, Method):
        raise Misuse(
            "method",
            got=getattr(method, "__name__", type(method).__name__),
            expected="an inference method such as Stack() or Ridge()",
            do="pass an instance, not a class or a name",
        )
    model = method.default_model() if model is None else model
    if not isinstance(model, Simfluence):
        raise Misuse(
            "model", got=type(model).__name__, expected="a Simfluence(...)", do="pass an instance"
        )
    if nothing_recorded(runs):
        return _unfitted(runs, model, method, strict=strict)
    runs, twins = without_twins(usable_runs(runs))
    checked = None if validation is None else _like(usable_runs(validation), runs)
    fit_key, check_key = jax.random.split(key)
    model, uncoupled = settled_coupling(model, method, runs)
    recorded = recorded_arrays(runs, model.prior, residuals=model.coupled)
    context = FitContext(
        key=fit_key,
        validation=None if checked is None else recorded_arrays(checked, model.prior),
        progress=progress or Silent(),
    )
    fitted = method.fit(recorded, model, context)
    weighed = _weighed(fitted.simulator, recorded, check_key)
    verdict = Verdict(
        fitted.verdict.ok,
        fitted.verdict.sentence,
        (
            *fitted.verdict.notes,
            *_said_of_twins(twins),
            *uncoupled,
            *_said_of(weighed),
            *identifiability(runs).sentences(),
        ),
        {**fitted.verdict.numbers, **weighed},
    )
    _told(verdict, strict=strict)
    left_out = None if fitted.left_out is None else _named(fitted.left_out, runs)
    return Posterior(
        simulator=fitted.simulator,
        verdict=verdict,
        runs=runs,
        settings={"model": model.as_dict(), **method.as_dict(), "has_prior": fitted.has_prior},
        left_out=left_out,
        widening=widening_of(runs, left_out),
        sample_stats=fitted.sample_stats,
        search_loss=fitted.losses,
        prior=PriorOf(model) if fitted.has_prior else None,
    )


def _unfitted(runs: xr.Dataset, model: Simfluence, method: Method, *, strict: bool) -> Posterior:
    """The posterior of no runs: the prior's."""
    # A method says so itself; what a caller brings may know nothing of priors.
    if not getattr(method, "has_prior", False):
        raise Misuse(
            "runs",
            got="no recorded run",
            expected="at least one, since this method has no prior to go by",
            do="record runs, or fit with method=Stack(), Exact(), NUTS() or SVI()",
        )
    fitted = from_prior(recorded_arrays(runs, model.prior), model)
    notes = fitted.verdict.notes
    if model.coupled:
        notes = (UNCOUPLED, *notes)
    verdict = replace(fitted.verdict, notes=notes)
    _told(verdict, strict=strict)
    return Posterior(
        simulator=fitted.simulator,
        verdict=verdict,
        runs=runs.isel(run=slice(0, 0)),
        settings={"model": model.as_dict(), **method.as_dict(), "has_prior": False},
    )


def _told(verdict: Verdict, *, strict: bool) -> None:
    """Warn of a bad verdict, or raise when that is wanted."""
    if not verdict.ok and strict:
        raise FitFailed(verdict.sentence)
    if not verdict.ok:
        warn(verdict.sentence, FitWarning, stacklevel=3)


def settled_coupling(
    model: Simfluence, method: Method, runs: xr.Dataset
) -> tuple[Simfluence, list[str]]:
    """The model that can be fitted, uncoupled where it must be, and what to say of that."""
    if not model.coupled:
        return model, []
    additive = replace(model, coupling="none")
    residual = residuals_of(runs)
    if residual is None:
        return additive, [UNCOUPLED]
    # A method says so itself; what a caller brings may know nothing of it.
    if not getattr(method, "couples", False):
        return additive, [
            "Effects are additive: only Exact(), Stack(), NUTS() and SVI() let examples act by "
            "their residuals."
        ]
    if not model.gaussian:
        return additive, [
            "Effects are additive: with multiplicative terms, errors that follow the loss, or "
            "effects or errors that are not Gaussian, examples are not simulated with the queries."
        ]
    unknown = np.isnan(residual).any(axis=(1, 2))
    if unknown.any():
        return additive, [
            f"Effects are additive, since {unknown.sum()} of {len(unknown)} runs have no losses "
            "of the steps' own examples: fit the other runs alone to use them."
        ]
    return model, []


def _weighed(simulator: Simulator, runs: RunArrays, key: jax.Array) -> dict[str, float]:
    """Pareto k of leaving whole runs out by weights, where a simulator holds enough draws."""
    complete = bool(np.isfinite(runs.loss).all())
    if simulator.draws is None or simulator.draws < FEWEST_DRAWS or not complete:
        return {}
    queries = runs.loss.shape[2]
    some = np.unique(np.linspace(0, queries - 1, min(queries, MOST_QUERIES)).astype(int))
    # Densities beyond single precision belong to runs that no weights can leave out.
    with np.errstate(over="ignore"):
        density = simulator.log_likelihood(
            runs.of_queries(some), key=key, draws=min(simulator.draws, MOST_DRAWS)
        )
    if density is None:
        return {}
    if not np.isfinite(density).all():
        return {"untrusted_pareto_k": 1.0}
    return {"untrusted_pareto_k": untrusted_runs(np.nansum(density.astype(float), axis=3))}


def _said_of(weighed: dict[str, float]) -> list[str]:
    share = weighed.get("untrusted_pareto_k", 0.0)
    if share == 0:
        return []
    return [
        f"Pareto k is too high for {share:.0%} of runs and queries to be left out by weights: "
        "compare models by elpd_over_runs, which refits."
    ]


def _said_of_twins(count: int) -> list[str]:
    if count == 0:
        return []
    return [
        f"{count} runs have the curricula of fitted runs, whose twins they are, and were not "
        "fitted: a run could not be left out while its twin stays."
    ]


def _like(validation: xr.Dataset, runs: xr.Dataset) -> xr.Dataset:
    """The validation runs with examples and queries in the order of the fitted ones."""
    seen = twins_between(validation, runs)
    if seen:
        raise Misuse(
            "validation",
            got=f"twins of fitted runs: {shorten(seen)}",
            expected="runs of other curricula",
            do="take both of a pair into the fitted runs, or into the validation runs",
        )
    for name in ("train", "query"):
        if validation.sizes[name] != runs.sizes[name]:
            raise Misuse(
                f"validation['{name}']",
                got=f"{validation.sizes[name]} ids",
                expected=f"the {runs.sizes[name]} ids of the fitted runs",
                do="take both from one recording",
            )
    place = named("validation['train']", validation["train"].values, runs["train"].values)
    order = named("queries", runs["query"].values, validation["query"].values)
    # The last place keeps empty slots empty.
    batch = np.append(place, EMPTY_SLOT).astype(np.int32)[validation["batch"].values]
    moved = validation.assign(batch=(validation["batch"].dims, batch))
    return moved.isel(query=order)


def _named(left_out: LeftOutRuns, runs: xr.Dataset) -> xr.Dataset:
    dims = ("run", "time", "query")
    values = {
        name: value
        for name, value in left_out._asdict().items()
        if name != "time" and value is not None
    }
    return xr.Dataset(
        {name: (dims, value.astype("float32"), {"units": "nat"}) for name, value in values.items()},
        coords={"run": runs["run"], "time": left_out.time, "query": runs["query"]},
    )
