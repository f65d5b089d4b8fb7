"""The Gaussian model, fitted: its weights conditioned on the fitted runs, rolled out.

On the scale of the link a trajectory is ``m + s (X w + eta)``: prior mean, query's scale, design
times standard normal weights, error of the run (``gaussian.linear_gaussian``). Draws of weights,
scales and errors belong to the key alone: any curriculum meets the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import logsumexp

from bayes_simfluence.gaussian.density import correlated_log_density, whitening
from bayes_simfluence.gaussian.draws import (
    Dependence,
    common_sources,
    df_of_scales,
    drawn_trajectories,
    drawn_weights,
)
from bayes_simfluence.gaussian.fitted import (
    FittedWeights,
    Planned,
    conditioned_weights,
    effects_alone,
    plan,
    typical_step,
)
from bayes_simfluence.gaussian.observed import Deviations, Observed
from bayes_simfluence.gaussian.queries import carried_loadings, carried_weights, correlation, own_sd
from bayes_simfluence.gaussian.rollout import OF_STATES, SCENARIOS, drawn_residuals
from bayes_simfluence.gaussian.search import interpolated_inflation, typical
from bayes_simfluence.gaussian.trust import AS_MODELLED, Trust
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.hyper import natural_values
from bayes_simfluence.model.link import link_of, log_slope, loss_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.base import CHUNK, Named, Simulated, Simulator

BATCH = ("run", "step", "slot")


@dataclass(frozen=True)
class GaussianSimulator(Simulator):
    """Posterior of a Gaussian model: the fitted runs, hyperparameters and scales.

    Attributes:
        model: the model fitted.
        free: hyperparameters on their unconstrained scale, in the order of ``hypers_of``.
        fitted: the runs that the weights are conditioned on, in units.
        rows: positions of the steps after which the fitted runs were conditioned on.
        largest_step_size: what the fitted step sizes were divided by; None when they were not
            recorded, and are ignored.
        scale: sd of each query's effects, in units of the link.
        log_inflation: log of the factor on the variance that left-out runs asked for, at knots
            spread evenly over a recorded run, straight lines between them.
        df: degrees of freedom of the scales' posterior; the band is Student-t with them.
        loadings: of the queries on common factors, by which their errors depend on one another
            (``gaussian.queries``); without columns they are independent.
        trust: how far observed losses of a run tell of its others (``gaussian.trust``).
        unseen: features of queries that were never recorded, which this simulates then instead of
            the fitted ones (``posterior.unseen``).
    """

    name: ClassVar[str] = "gaussian"
    model: Simfluence
    free: Float[np.ndarray, " hyper"]
    fitted: RunArrays
    rows: Int[np.ndarray, " row"]
    largest_step_size: float | None
    scale: Float[np.ndarray, " query"]
    log_inflation: Float[np.ndarray, " knot"]
    df: float
    loadings: Float[np.ndarray, "query factor"]
    trust: Trust = AS_MODELLED
    unseen: ExampleFeatures | None = None

    @property
    def values(self) -> dict[str, float]:
        """Hyperparameters on their natural scale."""
        with double_precision():
            natural = natural_values(
                hypers_of(self.model, self.fitted.features), jnp.asarray(self.free)
            )
            return {name: float(value) for name, value in natural.items()}

    @property
    def coupled(self) -> bool:
        """Whether examples act by their residuals."""
        return self.fitted.residual is not None

    @property
    def features(self) -> ExampleFeatures:
        """Of the fitted examples and queries, or of the queries that it simulates instead."""
        return self.unseen or self.fitted.features

    @property
    def by_features(self) -> "GaussianSimulator | None":
        """Itself, where the prior goes by features of examples."""
        known = self.features.train.shape[1] and self.model.prior.extends
        return self if known else None

    def with_examples(self, train: Float[np.ndarray, "new feature"]) -> "GaussianSimulator":
        """The same posterior with further training examples after the fitted ones."""
        features = self.fitted.features
        with double_precision():
            rows = jnp.concatenate([features.train, jnp.asarray(train, float)])
        longer = ExampleFeatures(rows, features.query)
        return replace(self, fitted=self.fitted._replace(features=longer))

    def for_queries(self, query: Float[np.ndarray, "new feature"]) -> "GaussianSimulator":
        """The posterior of queries that were never recorded, in the order of their features."""
        variance = np.log(np.maximum(self.scale, np.finfo(float).tiny) ** 2)
        with double_precision():
            features = self.fitted.features._replace(query=jnp.asarray(query, float))
        return replace(
            self,
            unseen=features,
            scale=np.full(len(query), np.exp(0.5 * variance.mean())),
            df=df_of_scales(float(variance.var(ddof=1)) if len(variance) > 1 else np.inf),
            loadings=carried_loadings(self.loadings, self.fitted.features.query, query),
        )

    @property
    def by_observed(self) -> "GaussianSimulator | None":
        """Itself, for queries that were recorded."""
        return self if self.unseen is None else None

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Draws of weights, scales and run errors, which queries partly have in common."""
        posterior = self._conditioned(runs.steps)
        planned = self._simulated(posterior, runs, key=key, scenarios=min(SCENARIOS, draws))
        deviations = self._of_planned(posterior, planned, runs, key=key, draws=draws)
        return self._in_nats(runs, planned, deviations)

    def simulate_observed(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """The draws of ``simulate``, each given what ``runs`` have of losses after time 0.

        As far as left-out runs trust it (``gaussian.trust``), else exact for the model at a draw's
        scale and, where examples are coupled, at its scenario of their residuals: neither scales
        nor scenarios are weighted by how likely they make what was observed.
        """
        posterior = self._conditioned(runs.steps)
        planned = self._simulated(posterior, runs, key=key, scenarios=min(SCENARIOS, draws))
        deviations = self._of_planned(posterior, planned, runs, key=key, draws=draws)
        spread = self._spread(runs, np.arange(runs.steps)).T
        mean, whole = (np.moveaxis(np.asarray(one), 0, -1).copy() for one in deviations)
        scenario = _scenarios(draws, len(planned))
        for at in np.unique(scenario):
            own = scenario == at
            observed = self._observed(posterior, planned[at], runs)
            trust = self.trust.at(observed.before, runs.known)
            of_mean, of_whole = observed.moves(whole[own] / spread, trust)
            mean[own] += of_mean * spread
            whole[own] += of_whole * spread
        return self._in_nats(runs, planned, (np.moveaxis(mean, -1, 0), np.moveaxis(whole, -1, 0)))

    def log_density_observed(self, runs: RunArrays, *, key: jax.Array) -> float:
        """Of the losses that ``runs`` have after time 0 together; natural log, per nat of each.

        The mean of the densities under scenarios of residuals, the scale of all queries integrated
        out.
        """
        posterior = self._conditioned(runs.steps)
        planned = self._simulated(posterior, runs, key=key, scenarios=SCENARIOS)
        with double_precision():
            slope = np.asarray(log_slope(self.model.link, jnp.asarray(runs.loss[:, 1:], float)))
        volume = slope - np.log(self._spread(runs, np.arange(runs.steps)).T)
        observed = (self._observed(posterior, one, runs) for one in planned)
        densities = [one.log_density(self.df) + one.among(volume).sum() for one in observed]
        return float(logsumexp(densities) - np.log(len(densities)))

    def _observed(self, posterior: FittedWeights, planned: Planned, runs: RunArrays) -> Observed:
        with double_precision():
            linked = link_of(self.model.link, jnp.asarray(runs.loss[:, 1:], float))
            deviation = np.asarray(linked - planned.centre)
        before = Deviations(
            posterior.conditioned,
            np.asarray(planned.designs),
            np.asarray(planned.error),
            correlation(self.loadings[runs.query]),
        )
        return Observed.of(before, deviation / self._spread(runs, np.arange(runs.steps)).T)

    def _of_planned(
        self,
        posterior: FittedWeights,
        planned: list[Planned],
        runs: RunArrays,
        *,
        key: jax.Array,
        draws: int,
    ) -> tuple[Array, Array]:
        """Draws of deviations from the planned runs' posterior means."""
        return self._deviations(
            posterior,
            np.stack([np.asarray(one.designs, np.float32) for one in planned]),
            planned[0].error_factor,
            self._spread(runs, np.arange(runs.steps)),
            runs.query,
            key=key,
            draws=draws,
        )

    def _in_nats(
        self,
        runs: RunArrays,
        planned: list[Planned],
        deviations: tuple[Array | np.ndarray, Array | np.ndarray],
    ) -> Simulated:
        """Draws on the link's scale, of coefficients alone and with errors, as losses."""
        centre = np.stack([np.asarray(one.centre, np.float32) for one in planned])
        draws = deviations[0].shape[1]
        scenario = _scenarios(draws, len(planned))

        def in_nats(deviation: Array | np.ndarray) -> np.ndarray:
            loss = np.empty((1, draws, *runs.loss.shape), "f4")
            loss[:, :, :, 0] = runs.initial
            for first in range(0, draws, CHUNK):
                chunk = slice(first, first + CHUNK)
                linked = np.moveaxis(np.asarray(deviation)[:, chunk], 0, -1)
                linked = (linked + centre[scenario[chunk]]).astype(np.float32)
                loss[0, chunk, :, 1:] = _loss_of(self.model, linked)
            return loss

        return Simulated(*(in_nats(deviation) for deviation in deviations))

    def log_likelihood(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> Float[np.ndarray, "chain draw run step query"]:
        """Of the steps ``rows``, which the fit conditioned on; NaN at all others.

        The error is smooth: between those times nobody has measured it, and a density there would
        be that of steps which the model says nothing about. One query at a time, so that beyond
        the result memory holds one query's draws.
        """
        rows = self.rows[self.rows < runs.steps]
        density = np.full((1, draws, *runs.loss[:, 1:].shape), np.nan, np.float32)
        posterior = self._conditioned(runs.steps)
        residual = runs.residual if self.coupled else None
        planned = self._planned(posterior, runs, rows, residual)
        with double_precision():
            seen = jnp.asarray(runs.loss[:, 1:][:, rows], float)
            change = link_of(self.model.link, seen) - planned.centre
            slope = log_slope(self.model.link, seen)
            roots, pattern = whitening(planned.error, np.isfinite(np.asarray(change)))
            spread = jnp.asarray(self._spread(runs, rows))
        single, dependence = posterior.conditioned.single(), self._dependence(runs.query)
        sizes: Any = {"draws": draws, "knots": posterior.knots, "parts": len(self.model.parts)}
        own_scales = self.unseen is not None
        with jax.enable_x64(False):
            common = common_sources(single, key, factors=self.loadings.shape[1], **sizes)
        for at in range(len(runs.query)):
            with jax.enable_x64(False):
                query = Dependence(*(array[at] for array in dependence))
                drawn = drawn_weights(
                    single, common, query, key, jnp.float32(self.df), own_scales=own_scales, **sizes
                )
            with double_precision():
                sd = jnp.asarray(drawn.scale, float)[:, None] * spread[at][None]
                mean = jnp.einsum(
                    "rtw,dw->drt", planned.designs, jnp.asarray(drawn.deviation, float)
                )
                deviation = change[..., at][None] - mean * sd[:, None]
                of_query = correlated_log_density(deviation, roots[pattern[:, at]], sd)
                density[0][:, :, rows, at] = of_query + slope[..., at][None]
        return density

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Hyperparameters (every draw the same), scales, and effects of examples.

        ``staying[chain, draw, query, train]`` and ``fading`` are what a step on this example alone
        adds to the loss on the scale of the link, averaged over training; negative = helpful. In a
        coupled model, a step that acts as those of the fitted runs did on average.
        """
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            name: (("chain", "draw"), np.full((1, draws), value))
            for name, value in self.values.items()
        }
        posterior = self._conditioned(self.fitted.steps)
        train = self.fitted.train
        for part in self.model.parts:
            with double_precision():
                free = jnp.asarray(self.free)
                acting = typical_step(self.model, free, self.fitted)
                functional, centre = (
                    acting * effect
                    for effect in effects_alone(
                        self.model, free, self.fitted.features, posterior, part=part
                    )
                )
            deviation, _ = self._deviations(
                posterior,
                functional[None, None],
                np.zeros((train, train)),
                np.broadcast_to(self.scale[:, None], (len(self.scale), train)),
                np.arange(len(self.scale)),
                key=key,
                draws=draws,
            )
            effects = np.asarray(deviation)[:, :, 0] + np.asarray(centre).T[:, None]
            named[part] = (("chain", "draw", "query", "train"), np.moveaxis(effects, 0, 1)[None])
        return named

    def _conditioned(self, steps: int) -> FittedWeights:
        """The weights' posterior, once for all queries, with knots for runs of this many steps."""
        knots = self.model.coefficients.count(max(1.0, steps / self.fitted.steps))
        with double_precision():
            conditioned, size = conditioned_weights(
                self.model, jnp.asarray(self.free), self.fitted, jnp.asarray(self.rows), knots=knots
            )
        if self.unseen is not None:
            # Nothing was seen of these queries: what others' say of them, with the prior around it.
            known = np.asarray(self.fitted.features.query)
            mean = carried_weights(
                np.asarray(conditioned.mean), known, np.asarray(self.unseen.query)
            )
            gain = np.zeros(conditioned.gain.shape)
            conditioned = conditioned._replace(mean=mean, gain=gain)
        return FittedWeights(conditioned, size, knots)

    def _simulated(
        self, posterior: FittedWeights, runs: RunArrays, *, key: jax.Array, scenarios: int
    ) -> list[Planned]:
        """The runs at every step, once for each scenario of their examples' residuals."""
        rows = np.arange(runs.steps)
        if not self.coupled:
            return [self._planned(posterior, runs, rows, None)]
        planned = runs.in_units(self.fitted.steps, self.largest_step_size)
        planned = planned._replace(features=self.fitted.features, residual=None)
        with double_precision():
            free = jnp.asarray(self.free)
        residuals = drawn_residuals(
            self.model, free, self.fitted, planned, posterior.size, typical(self.scale),
            jax.random.fold_in(key, OF_STATES), knots=posterior.knots, scenarios=scenarios,
        )  # fmt: skip
        return [self._planned(posterior, runs, rows, residual) for residual in residuals]

    def _planned(
        self,
        posterior: FittedWeights,
        runs: RunArrays,
        rows: Int[np.ndarray, " row"],
        residual: Float[np.ndarray, "run step slot"] | None,
    ) -> Planned:
        """The runs after the steps ``rows``: where draws deviate from, and by how much."""
        runs = runs.in_units(self.fitted.steps, self.largest_step_size)
        runs = runs._replace(features=self.features, residual=residual)
        with double_precision():
            return plan(
                self.model, jnp.asarray(self.free), posterior.conditioned.mean, posterior.size,
                runs, jnp.asarray(rows), knots=posterior.knots,
            )  # fmt: skip

    def _spread(
        self, runs: RunArrays, rows: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, "query row"]:
        """Sd of each query's effects after the steps ``rows``, variance inflation included."""
        inflation = self.log_variance_inflation((rows + 1) / self.fitted.steps)
        return self.scale[runs.query][:, None] * np.exp(0.5 * inflation)[None]

    def log_variance_inflation(
        self, progress: Float[np.ndarray, " step"]
    ) -> Float[np.ndarray, " step"]:
        """Log factor on the variance; constant beyond the recorded length."""
        return interpolated_inflation(progress, self.log_inflation)

    def _dependence(self, query: Int[np.ndarray, " query"]) -> Dependence:
        loading = np.asarray(self.loadings[query], np.float32)
        # Queries that were not recorded have draws of their own, and the common ones.
        first = 0 if self.unseen is None else self.fitted.loss.shape[2]
        return Dependence((query + first).astype(np.int32), loading, own_sd(loading))

    def _deviations(
        self,
        posterior: FittedWeights,
        designs: Array | np.ndarray,
        error_factor: Array | np.ndarray,
        spread: np.ndarray,
        query: Int[np.ndarray, " query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> tuple[Array, Array]:
        # Single precision is enough for deviations, and twice as fast.
        single = partial(np.asarray, dtype=np.float32)
        with jax.enable_x64(False):
            drawn: tuple[Array, Array] = drawn_trajectories(
                posterior.conditioned.single(),
                single(designs),
                single(error_factor),
                single(spread),
                self._dependence(query),
                key,
                np.float32(self.df),
                draws=draws,
                knots=posterior.knots,
                parts=len(self.model.parts),
                own_scales=self.unseen is not None,
            )
        return drawn

    def arrays(self) -> Named:
        """The fitted runs and everything inferred."""
        fitted = self.fitted
        residual = {} if fitted.residual is None else {"residual": (BATCH, fitted.residual)}
        return {
            **residual,
            "free": (("hyper",), self.free),
            "rows": (("row",), self.rows),
            "scale": (("query",), self.scale),
            "log_inflation": (("knot",), self.log_inflation),
            "loadings": (("query", "factor"), self.loadings),
            "trust": (("of_trust",), np.array(self.trust)),
            "batch": (BATCH, fitted.batch),
            "weight": (BATCH, fitted.weight),
            "step_size": (("run", "step"), np.asarray(fitted.step_size)),
            "loss": (("run", "time", "query"), fitted.loss),
            "train_feature": (("train", "feature"), np.asarray(fitted.features.train)),
            "query_feature": (("query", "of_query"), np.asarray(fitted.features.query)),
        }

    def settings(self) -> dict[str, Any]:
        """The model and the band's degrees of freedom."""
        return {
            "model": self.model.as_dict(),
            "df": self.df,
            "largest_step_size": self.largest_step_size,
        }

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> "GaussianSimulator":
        """From ``arrays()`` and ``settings()``, of this version or of 0.1."""
        fitted = RunArrays.of(
            arrays["batch"],
            arrays["loss"],
            weight=arrays.get("weight"),
            step_size=arrays["step_size"],
            features=ExampleFeatures(arrays["train_feature"], arrays["query_feature"]),
        )
        fitted = fitted._replace(residual=arrays.get("residual"))
        # Models of version 0.1 were additive.
        model = Simfluence.from_dict({"coupling": "none", **settings["model"]})
        free, names = arrays["free"], list(hypers_of(model, fitted.features))
        if "trend" in names and len(free) == len(names) - 1:
            # Coupled models had no trend at first, which is one of zero.
            free = np.insert(free, names.index("trend"), 0.0)
        return cls(
            model=model,
            free=free,
            fitted=fitted,  # saved in units
            rows=arrays["rows"],
            largest_step_size=settings["largest_step_size"],
            scale=arrays["scale"],
            log_inflation=arrays["log_inflation" if "log_inflation" in arrays else "widening"],
            df=settings["df" if "df" in settings else "freedom"],
            # Queries were independent in version 0.1.
            loadings=arrays.get("loadings", np.zeros((len(arrays["scale"]), 0))),
            # Nor was what is observed trusted less than the model says, at first.
            trust=Trust(*map(float, arrays.get("trust", AS_MODELLED))),
        )


def _scenarios(draws: int, scenarios: int) -> Int[np.ndarray, " draw"]:
    """Of which scenario each draw is: an equal share for each, the first draws of the first."""
    return np.arange(draws) // -(-draws // scenarios)


@partial(jax.jit, static_argnums=0)
def _loss_of(
    model: Simfluence, linked: Float[Array, "draw run step query"]
) -> Float[Array, "draw run step query"]:
    loss: Array = loss_of(model.link, linked)
    return loss
