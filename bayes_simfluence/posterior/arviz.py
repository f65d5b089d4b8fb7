"""ArviZ's containers: what their groups hold, and the one place that knows ArviZ's versions."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable
from warnings import catch_warnings, filterwarnings

import jax
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from bayes_simfluence.checks import Misuse, shorten

RUN_LOG_LIKELIHOOD: Final = "run_log_likelihood"
"""Group of the log densities of whole runs; a group of its own, so that ``log_likelihood`` holds
the one variable that ``az.loo`` takes without being told a name."""

GROUPS: Final = (
    "posterior",
    "log_likelihood",
    RUN_LOG_LIKELIHOOD,
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "sample_stats",
    "observed_data",
    "constant_data",
)
"""Groups of a container, in order."""

LIKELIHOOD: Final = frozenset(["log_likelihood", RUN_LOG_LIKELIHOOD])
PRIOR: Final = frozenset(["prior", "prior_predictive"])

LIMIT_BYTES: Final = 2 * 2**30
"""Most bytes of draws that a container is made of unless more is asked for."""

CONSTANT: Final = ("batch", "weight", "step_size", "train_feature", "query_feature")
DIMS: Final = ("chain", "draw", "run", "time", "query")


class Prior(NamedTuple):
    """Draws from before any run was seen.

    Attributes:
        parameters: variables ``(chain, draw, ...)``, named as in the posterior.
        predictive: ``loss (chain, draw, run, time, query)`` in nats, time 0 first as
            ``Posterior.simulate`` gives it; None when there are no such draws.
    """

    parameters: xr.Dataset
    predictive: xr.Dataset | None = None


@runtime_checkable
class PriorDraws(Protocol):
    """A way of drawing from the prior of a model."""

    def __call__(self, runs: xr.Dataset, *, key: jax.Array, draws: int) -> Prior:
        """``draws`` draws for the curricula and initial losses of ``runs``."""


def chosen_groups(groups: Sequence[str] | None) -> tuple[str, ...]:
    """The groups asked for; all when None."""
    wanted = GROUPS if groups is None else tuple(groups)
    unknown = [group for group in wanted if group not in GROUPS]
    if unknown:
        raise Misuse(
            "groups",
            got=shorten(unknown),
            expected=f"some of {shorten(GROUPS, len(GROUPS))}",
            do="drop what is not among them",
        )
    return wanted


def affordable(runs: xr.Dataset, draws: int, groups: Sequence[str], limit: int) -> None:
    """Raise when draws in single precision would pass ``limit`` bytes.

    Counted are two coefficients for each query and example, the density of every step, and the
    simulated loss with and without noise.
    """
    points = runs.sizes["run"] * runs.sizes["time"] * runs.sizes["query"]
    numbers = {
        frozenset(["posterior"]): 2 * runs.sizes["query"] * runs.sizes["train"],
        LIKELIHOOD: points,
        frozenset(["posterior_predictive"]): 2 * points,
    }
    each = 4 * sum(count for some, count in numbers.items() if some & set(groups))
    if each * draws > limit:
        raise Misuse(
            f"to_arviz(draws={draws})",
            got=f"{each * draws:,} bytes of draws",
            expected=f"at most limit_bytes={limit:,}",
            do=f"ask for at most {limit // each} draws, for fewer runs, queries or groups=..., "
            "or raise limit_bytes",
        )


def times_masked(runs: xr.Dataset, times: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """The losses ``(run, time, query)``, NaN at all later times but ``times``."""
    loss = np.array(runs["loss"].values, float)
    if times is None:
        return loss
    known = runs["time"].values
    unknown = np.setdiff1d(np.asarray(times), known[1:])
    if len(unknown) or not len(times):
        raise Misuse(
            "times",
            got=shorten(unknown) or "none",
            expected=f"times of the recording from {known[1]} to {known[-1]}",
            do="time 0 is given, not predicted",
        )
    loss[:, 1:][:, ~np.isin(known[1:], times)] = np.nan
    return loss


def likelihood_groups(
    density: Float[np.ndarray, "chain draw run step query"],
    kept: Bool[np.ndarray, " step"],
    coords: Mapping[str, Any],
) -> dict[str, xr.Dataset]:
    """Log densities of single losses at the steps ``kept``, and of whole runs."""
    if not kept.any():
        raise Misuse(
            "times",
            got="none at which the model has a density of the loss",
            expected="some of those that it conditions on",
            do="take them from observed_data of to_arviz() without times",
        )
    whole = np.nansum(density, axis=3, dtype=float)
    about = {"long_name": "log density of the loss given the run's earlier ones", "units": "1"}
    of_run = {"long_name": "log density of the run's losses after time 0", "units": "1"}
    without_time = {name: coordinate for name, coordinate in coords.items() if name != "time"}
    dims = tuple(name for name in DIMS if name != "time")
    return {
        "log_likelihood": xr.Dataset(
            {"loss": (DIMS, density[:, :, :, kept], about)}, coords=coords
        ),
        RUN_LOG_LIKELIHOOD: xr.Dataset({"loss": (dims, whole, of_run)}, coords=without_time),
    }


def data_groups(runs: xr.Dataset, kept: Bool[np.ndarray, " step"]) -> dict[str, xr.Dataset]:
    """Losses that the likelihood is about; all that it takes as given."""
    # Provenance may be nested, which files of ArviZ cannot hold; it stays with the runs.
    runs = runs.drop_attrs(deep=False)
    constant = runs[[name for name in CONSTANT if name in runs]]
    given = runs["loss"].isel(time=0, drop=True).assign_attrs(long_name="loss before any update")
    return {
        "observed_data": runs[["loss"]].isel(time=1 + np.flatnonzero(kept)),
        "constant_data": constant.assign(initial_loss=given),
    }


def prior_groups(prior: Prior, times: np.ndarray) -> dict[str, xr.Dataset]:
    """Groups of prior draws, predictions at the observed times."""
    groups = {"prior": prior.parameters}
    if prior.predictive is not None:
        groups["prior_predictive"] = prior.predictive[["loss"]].sel(time=times)
    return groups


def container(groups: Mapping[str, xr.Dataset]) -> Any:
    """``InferenceData`` before ArviZ 1.0, ``DataTree`` from then on."""
    ordered = {name: groups[name] for name in GROUPS if name in groups}
    _same_draws(ordered)
    if _is_tree():
        return xr.DataTree.from_dict(ordered)
    from arviz import InferenceData

    return InferenceData(**ordered)


def over_runs(idata: Any) -> Any:
    """The container with whole runs as the units of its log likelihood.

    ``az.loo`` and ``az.compare`` then leave out whole runs, one query at a time.

    Raises:
        Misuse: a container without densities of runs.
    """
    present = set(idata.children) if _is_tree() else set(idata.groups())
    if RUN_LOG_LIKELIHOOD not in present:
        raise Misuse(
            "container",
            got=f"groups {shorten(sorted(present), len(GROUPS))}",
            expected=f"a group {RUN_LOG_LIKELIHOOD}",
            do="take to_arviz() of a fit with a likelihood (Exact), with that group",
        )
    kept = {name: _dataset(idata[name]) for name in GROUPS if name in present}
    return container({**kept, "log_likelihood": kept[RUN_LOG_LIKELIHOOD]})


def pointwise_loo(idata: Any) -> tuple[xr.DataArray, xr.DataArray, float]:
    """``az.loo`` of each unit: its elpd, its Pareto k, and the largest k to be trusted."""
    import arviz

    with catch_warnings():
        # Who asks for k does not need the advice that there is a large one.
        filterwarnings("ignore", message="Estimated shape parameter of Pareto")
        loo = arviz.loo(idata, pointwise=True)
    elpd = loo.elpd_i if _is_tree() else loo.loo_i
    return elpd, loo.pareto_k, float(loo.good_k)


def untrusted_runs(density: Float[np.ndarray, "chain draw run query"]) -> float:
    """Share of runs and queries that draws cannot leave out by weights: Pareto k above ArviZ's
    threshold (Vehtari et al. 2024, arXiv 1507.02646).

    Args:
        density: log density of whole runs.
    """
    dims = ("chain", "draw", "run", "query")
    coords = {name: np.arange(size) for name, size in zip(dims, density.shape, strict=True)}
    likelihood = xr.Dataset({"loss": (dims, density)}, coords)
    with catch_warnings():
        filterwarnings("ignore", message="The point-wise LOO is the same with the sum LOO")
        _, pareto_k, good = pointwise_loo(
            container({"posterior": likelihood, "log_likelihood": likelihood})
        )
    return float((pareto_k.values > good).mean())


def _same_draws(groups: Mapping[str, xr.Dataset]) -> None:
    """Statistics of a sampler must be of the draws that they stand beside."""
    if "sample_stats" not in groups or "posterior" not in groups:
        return
    shapes = [
        tuple(groups[group].sizes.get(name) for name in ("chain", "draw"))
        for group in ("sample_stats", "posterior")
    ]
    if shapes[0] != shapes[1]:
        raise Misuse(
            "sample_stats",
            got=f"(chain, draw) of sizes {shapes[0]}",
            expected=f"the posterior's {shapes[1]}",
            do=f"pass draws={shapes[0][1]} to to_arviz, or leave sample_stats out of groups=...",
        )


def _dataset(group: Any) -> xr.Dataset:
    return group.to_dataset() if _is_tree() else group


def _is_tree() -> bool:
    return int(version("arviz").split(".")[0]) >= 1
