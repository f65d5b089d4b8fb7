"""The one result of every fit: simulate, analyse with ArviZ, save."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, keyed, positive_integer
from bayes_simfluence.conventions import EFFECT_SIGN
from bayes_simfluence.data.netcdf import read_group, write_groups
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.files import PathLike, atomically, existing_file, new_path, readable
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.posterior.arrays import recorded_arrays
from bayes_simfluence.posterior.arviz import (
    LIKELIHOOD,
    LIMIT_BYTES,
    PRIOR,
    PriorDraws,
    affordable,
    chosen_groups,
    container,
    data_groups,
    likelihood_groups,
    prior_groups,
    times_masked,
)
from bayes_simfluence.posterior.bands import Band, Credible
from bayes_simfluence.posterior.observed import observed_losses, with_observed
from bayes_simfluence.posterior.prior import prior_from_settings
from bayes_simfluence.posterior.support import Recorded, refuse, support_of, tell, told_elsewhere
from bayes_simfluence.posterior.unseen import simulated_runs
from bayes_simfluence.posterior.widening import (
    Widening,
    as_dataset,
    for_queries,
    from_dataset,
    widened,
)
from bayes_simfluence.simulators.affine import AffineSimulator
from bayes_simfluence.simulators.base import Simulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator
from bayes_simfluence.simulators.mean import MeanSimulator
from bayes_simfluence.simulators.pooled import PooledSimulator
from bayes_simfluence.simulators.prior import PriorSimulator
from bayes_simfluence.simulators.sampled import SampledSimulator

VERSION = 1
"""Of the file format."""

SIMULATORS: dict[str, type[Simulator]] = {
    simulator.name: simulator
    for simulator in (
        AffineSimulator,
        MeanSimulator,
        GaussianSimulator,
        PooledSimulator,
        PriorSimulator,
        SampledSimulator,
    )
}
"""The simulators that a saved posterior may hold."""
FORMER_NAMES = {"paths": "gaussian"}
"""Of simulators in files of version 0.1."""

OF_DISTANCE = 0x0FA2
"""Folded into a key: what distance adds has draws of its own."""


@dataclass(frozen=True)
class Posterior:
    """What was learned from recorded runs, whatever the method.

    Attributes:
        simulator: everything needed to simulate a run.
        verdict: how the fit went; print it.
        runs: the runs fitted.
        settings: model and method, as plain values.
        left_out: fitted runs as predicted without them (``predicted``, ``low``, ``high``, nats,
            90% band), where the method made such predictions.
        sample_stats: of a sampler's draws, variables ``(chain, draw)`` with ArviZ's names
            (``diverging``, ``energy``, ``tree_depth``, ``acceptance_rate``).
        search_loss: of every step of a stochastic search (``SVI``), lower is better.
        prior: draws from the prior, for ``to_arviz``; after loading, where the settings say it all.
        widening: what makes ``loss`` of simulated runs spread where they leave what was recorded;
            None = nothing does.
    """

    simulator: Simulator
    verdict: Verdict
    runs: xr.Dataset
    settings: dict[str, Any]
    left_out: xr.Dataset | None = None
    sample_stats: xr.Dataset | None = None
    search_loss: Float[np.ndarray, " step"] | None = None
    prior: PriorDraws | None = None
    widening: Widening | None = None

    @cached_property
    def _recorded(self) -> Recorded | None:
        return Recorded.of(self.runs) if self.runs.sizes["run"] else None

    def simulate(
        self,
        runs: xr.Dataset,
        *,
        key: jax.Array,
        draws: int = 200,
        band: Band | None = None,
        strict: bool = False,
        observed: xr.DataArray | None = None,
    ) -> xr.Dataset:
        """Losses along any curricula, from the losses before the first update.

        Args:
            runs: recorded or planned (``planned_runs``); of their losses only time 0 is used.
                Examples and queries that the fitted runs do not know need features
                (``train_feature``, ``query_feature``) and a posterior that was fitted with such.
            key: decides the draws; the same key means the same coefficients for all curricula
                (of the same examples).
            draws: number of draws; a point without a band gives one.
            band: ``Credible(...)`` or ``Conformal(...)``; no band when omitted.
            strict: refuse runs that leave what the fitted runs did, instead of warning.
            observed: losses of these runs that are known, in nats, any of their runs, times and
                queries by id, ``(run, time, query)`` and NaN where not observed. The draws that
                there would be without are conditioned on them: ``loss`` equals them where observed;
                other queries and times of a run, earlier ones too, and the coefficients by which
                all runs of the call are simulated, shift and narrow by their covariance, as far
                as left-out runs say that it holds (docs/models.md). Taken as exact.
                Not weighted by what was observed: draws' scales and, where examples are coupled,
                the scenarios of residuals; the shares of a ``Stack``'s members are. What distance
                adds (``widening``) comes after, in full wherever nothing was observed.

        Returns:
            ``mean_loss`` and ``loss``, both ``(chain, draw, run, time, query)`` in nats: without
            and with the noise of a single run; ``support (run, time)`` in (0, 1]: 1 while a run is
            like the fitted ones, falling the farther it leaves them, with its meaning and each
            run's reasons in the attributes. Where it falls, ``loss`` spreads (``widening``). With
            ``band``, also the edges ``low`` and ``high`` of ``loss``, ``(run, time, query)``, whose
            attributes say what they are.

        Raises:
            Misuse: unknown examples or queries without features to go by, initial losses that are
                not finite, a band that cannot be made; with ``strict``, support below 0.5; with
                ``observed``, a posterior that is not of ``Exact`` or ``Stack`` for a two-timescale
                model, queries that were never recorded, ids or times that ``runs`` do not have,
                infinite losses, other losses at time 0, more than 4000 losses, a conformal band.

        Warns:
            SupportWarning: once, with the reasons, when the support of a run falls below 0.5.

        >>> import jax, bayes_simfluence as bs
        >>> runs = bs.example_runs().isel(query=slice(0, 2))
        >>> mean, one = bs.mean_trajectory(runs.isel(run=slice(0, 25))), runs.isel(run=[25])
        >>> support = mean.simulate(one, key=jax.random.key(0))["support"]
        >>> support.dims, support.min().round(1).item()
        (('run', 'time'), 1.0)

        Of a run some queries are measured as it goes, the others are not:

        >>> small = runs.isel(run=slice(0, 6), time=slice(0, 17), step=slice(0, 16))
        >>> exact = bs.fit(small.isel(run=slice(0, 5)), key=jax.random.key(0))
        >>> seen = small["loss"].isel(run=[5], query=[0])
        >>> given = exact.simulate(small.isel(run=[5]), key=jax.random.key(0), observed=seen)
        >>> bool((given["loss"].sel(query=seen["query"]) == seen).all())
        True
        """
        keyed(key)
        positive_integer("draws", draws)
        if band is not None and (isinstance(band, type) or not isinstance(band, Band)):
            raise Misuse(
                "band",
                got=getattr(band, "__name__", repr(band)),
                expected="Credible(...) or Conformal(...)",
                do="pass an instance",
            )
        if not np.isfinite(validate_runs(runs)["loss"].values[:, 0]).all():
            raise Misuse(
                "runs['loss'] at time 0",
                got="losses that are not finite",
                expected="every query's loss before the first update",
                do="measure them, or make the runs with planned_runs(like=recorded, ...)",
            )
        known = None
        if observed is not None:
            with_observed(self.simulator)
            known = observed_losses(observed, runs)
            _not_conformal(band)
        support = support_of(self._recorded, self.runs, runs)
        if strict:
            refuse(support)
        losses = simulated_runs(
            self.simulator, self.runs, runs, key=key, draws=draws, observed=known
        )
        if self.widening is not None:
            own = for_queries(self.widening, self.runs, runs)
            far_key = jax.random.fold_in(key, OF_DISTANCE)
            spread = widened(losses.loss, support.distance, own, key=far_key)
            losses = losses._replace(loss=spread)
        if known is not None:
            exact = np.where(np.isfinite(known), known, losses.loss).astype(losses.loss.dtype)
            losses = losses._replace(loss=exact)
        dims = ("chain", "draw", "run", "time", "query")
        simulated = xr.Dataset(
            {
                "mean_loss": (dims, losses.mean_loss, _nats("loss without the noise of a run")),
                "loss": (dims, losses.loss, _nats("predicted loss, noise included")),
                "support": support.variable(),
            },
            coords={
                **_counted(losses.loss),
                **{name: runs[name] for name in ("run", "time", "query")},
            },
            attrs={"settings": json.dumps(self.settings)},
        )
        tell(support, stacklevel=2)
        if band is None:
            return simulated
        # A band may simulate other runs, to be calibrated on them.
        with told_elsewhere():
            return simulated.assign(band.edges(simulated, self, key=key, draws=draws))

    def samples(self, *, key: jax.Array, draws: int = 200) -> xr.Dataset:
        """Draws of coefficients and hyperparameters, ``(chain, draw, ...)``."""
        keyed(key)
        samples = self.simulator.samples(key=key, draws=positive_integer("draws", draws))
        first = next(iter(samples.values()))[1]
        return xr.Dataset(
            {name: (dims, value) for name, (dims, value) in samples.items()},
            coords={
                **_counted(first),
                **{name: self.runs[name].values for name in ("query", "train")},
            },
            attrs={"effects": EFFECT_SIGN},
        )

    def to_arviz(
        self,
        *,
        key: jax.Array | None = None,
        draws: int = 200,
        groups: Sequence[str] | None = None,
        times: Sequence[int] | np.ndarray | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> Any:
        """ArviZ's container (``InferenceData`` before ArviZ 1.0, ``DataTree`` from then on).

        ``observed_data``, ``posterior_predictive``, ``prior_predictive`` and ``log_likelihood``
        share the variable ``loss`` and the times at which the simulator has a density (the default
        model: those that it conditions on; without a density all but time 0, which is
        ``constant_data``'s ``initial_loss``). ``log_likelihood`` (natural log, per nat) is of each
        loss given its run's earlier ones, ``run_log_likelihood`` of whole runs. Draws in all
        groups belong to the same coefficients. What a fit lacks is left out.

        Args:
            key: decides the draws; ``jax.random.key(0)`` when omitted, so that the container of a
                posterior is one thing.
            draws: number of draws.
            groups: the groups to make; all when omitted.
            times: times to be observed, to compare models on the same ones; losses in between
                are integrated out.
            limit_bytes: most memory for draws; intermediate arrays take about as much again.

        Raises:
            Misuse: unknown groups or times, draws that would pass the limit, sampler statistics of
                another number of draws.

        >>> import jax, bayes_simfluence as bs
        >>> runs = bs.example_runs().isel(run=slice(0, 4), query=slice(0, 2))
        >>> posterior = bs.fit(runs, model=bs.Simfluence.additive(), key=jax.random.key(0))
        >>> idata = posterior.to_arviz(draws=10, groups=["log_likelihood"])
        >>> dict(idata["log_likelihood"]["loss"].sizes)
        {'chain': 1, 'draw': 10, 'run': 4, 'time': 96, 'query': 2}
        """
        key = jax.random.key(0) if key is None else key
        keyed(key)
        wanted = chosen_groups(groups)
        draws = positive_integer("draws", draws)
        draws = self.simulator.draws or draws
        affordable(self.runs, draws, wanted, limit_bytes)
        if not self.runs.sizes["run"]:
            # Nothing was observed: draws of the prior are all that there is.
            alone = {"posterior": self.samples(key=key, draws=draws)}
            return container({name: group for name, group in alone.items() if name in wanted})
        loss = times_masked(self.runs, times)
        made = self._densities(loss, key, draws if LIKELIHOOD & set(wanted) else 1)
        observed = made["observed_data"]["time"].values
        if "posterior" in wanted:
            made["posterior"] = self.samples(key=key, draws=draws)
        if "posterior_predictive" in wanted:
            simulated = self.simulate(self.runs, key=key, draws=draws)
            made["posterior_predictive"] = simulated[["loss"]].sel(time=observed)
        if self.prior is not None and PRIOR & set(wanted):
            prior = self.prior(self.runs, key=jax.random.fold_in(key, 1), draws=draws)
            made.update(prior_groups(prior, observed))
        if self.sample_stats is not None:
            made["sample_stats"] = self.sample_stats
        return container({name: group for name, group in made.items() if name in wanted})

    def _densities(
        self, loss: Float[np.ndarray, "run time query"], key: jax.Array, draws: int
    ) -> dict[str, xr.Dataset]:
        """Groups of the data, and of their log densities where the simulator has any."""
        recorded = recorded_arrays(self.runs, residuals=self.simulator.coupled)
        recorded = recorded._replace(loss=loss)
        density = self.simulator.log_likelihood(recorded, key=key, draws=draws)
        # Every draw has its density at the same steps.
        known = loss[:, 1:] if density is None else density[0, 0]
        kept = np.isfinite(known).any(axis=(0, 2))
        groups = data_groups(self.runs, kept)
        if density is not None:
            ids = {
                str(name): coordinate.values
                for name, coordinate in groups["observed_data"].coords.items()
            }
            coords = {**_counted(density), **ids}
            groups.update(likelihood_groups(density, kept, coords))
        return groups

    def save(self, path: PathLike, *, overwrite: bool = False) -> Path:
        """Write everything to one netCDF file; ``load_posterior`` reads it back.

        Raises:
            Misuse: a file that exists and ``overwrite`` is not set.
        """
        path = new_path(path, overwrite=overwrite)
        about = {
            "posterior_version": VERSION,
            "has_left_out": int(self.left_out is not None),
            "has_sample_stats": int(self.sample_stats is not None),
            "has_search": int(self.search_loss is not None),
            "has_widening": int(self.widening is not None),
            "simulator": self.simulator.name,
            "simulator_settings": self.simulator.settings(),
            "verdict": self.verdict.as_dict(),
            "settings": self.settings,
        }
        groups = {
            "/": xr.Dataset(attrs=about),
            "simulator": xr.Dataset(dict(self.simulator.arrays())),
        }
        groups["runs"] = self.runs
        if self.widening is not None:
            groups["widening"] = as_dataset(self.widening)
        if self.left_out is not None:
            groups["left_out"] = self.left_out
        if self.sample_stats is not None:
            groups["sample_stats"] = self.sample_stats
        if self.search_loss is not None:
            groups["search"] = xr.Dataset({"loss": ("search_step", self.search_loss)})
        with atomically(path) as partial:
            write_groups(partial, groups)
        return path


def load_posterior(path: PathLike) -> Posterior:
    """A posterior written by ``Posterior.save``.

    Raises:
        Misuse: no such file, or one that is no posterior of this version.
    """
    path = existing_file(path, expected="a saved posterior")
    expected = f"a posterior saved by version {VERSION} of the format"
    do = "fit again, or restore the file from a copy"
    with readable(path, Exception, expected=expected, do=do):
        about = read_group(path).attrs
        arrays = {str(name): array.values for name, array in read_group(path, "simulator").items()}
        runs = read_group(path, "runs")
        if about["posterior_version"] != VERSION:
            raise ValueError(f"version {about['posterior_version']}")
        left_out = read_group(path, "left_out") if about["has_left_out"] else None
        # Files of earlier versions know nothing of samplers.
        sampled, searched = about.get("has_sample_stats", 0), about.get("has_search", 0)
        sample_stats = read_group(path, "sample_stats") if sampled else None
        wide = about.get("has_widening", 1)
        spread = read_group(path, "widening") if about.get("has_widening") else None
        search_loss = read_group(path, "search")["loss"].values if searched else None
        simulator = SIMULATORS[FORMER_NAMES.get(about["simulator"], about["simulator"])].restore(
            arrays, about["simulator_settings"]
        )
    runs = validate_runs(runs)
    return Posterior(
        simulator=simulator,
        verdict=Verdict.from_dict(about["verdict"]),
        runs=runs,
        settings=about["settings"],
        left_out=left_out,
        sample_stats=sample_stats,
        search_loss=search_loss,
        prior=prior_from_settings(about["settings"]),
        widening=from_dataset(spread, runs, left_out) if wide else None,
    )


def _not_conformal(band: Band | None) -> None:
    if band is not None and not isinstance(band, Credible):
        raise Misuse(
            "band with observed=...",
            got=repr(type(band).__name__),
            expected="Credible(...): runs that calibrate a band have nothing observed of them",
            do="pass band=Credible(...), or leave observed out",
        )


def _nats(name: str) -> dict[str, str]:
    return {"long_name": name, "units": "nat"}


def _counted(draws: np.ndarray) -> dict[str, np.ndarray]:
    return {"chain": np.arange(draws.shape[0]), "draw": np.arange(draws.shape[1])}
