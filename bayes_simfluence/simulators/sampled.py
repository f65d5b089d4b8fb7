"""Draws of a model's sites, rolled out: what samplers leave behind, whatever the prior or error."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.link import link_of, log_slope
from bayes_simfluence.model.numpyro_model import (
    Gaps,
    Sites,
    Units,
    coefficients_of,
    density_of,
    gaps_of,
)
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.simulators.base import Named, Simulated, Simulator
from bayes_simfluence.simulators.scenarios import residuals_under, shares_of, typical_steps
from bayes_simfluence.simulators.unrolled import of_queries, simulated

BATCH = ("batch", "weight", "residual")
"""Arrays of the fitted runs with axes (run, step, slot)."""


@dataclass(frozen=True)
class SampledSimulator(Simulator):
    """Posterior draws of every site of the model's program.

    Attributes:
        model: what was inferred.
        sites: by name, each with leading axes (chain, draw).
        units: of the queries' scales.
        features: embeddings of examples and queries.
        recorded: steps of a recorded run: the unit of training time.
        largest_step_size: what step sizes were divided by; None when they were not recorded.
        missing: positions (run, time, query) of the fitted runs' losses that the site ``missing``
            holds.
        fitted: the fitted runs without their losses, in units, whose residuals tell of their
            examples; None where examples act alike however well they are known.
    """

    name: ClassVar[str] = "sampled"
    model: Simfluence
    sites: Mapping[str, Float[np.ndarray, "chain draw *shape"]]
    units: Units
    features: ExampleFeatures
    recorded: int
    largest_step_size: float | None
    missing: Int[np.ndarray, "entry axis"] = field(default_factory=lambda: np.zeros((0, 3), int))
    fitted: RunArrays | None = None

    @property
    def coupled(self) -> bool:
        """Whether examples act by their residuals."""
        return self.fitted is not None

    @property
    def draws(self) -> int:
        """Draws of all chains together."""
        chains, draws = self.sites["scale"].shape[:2]
        return int(chains * draws)

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Each kept draw rolled out once, with errors of its own.

        In a coupled model after its run's examples, in scenarios that successive draws share.
        """
        chosen, shape = self._chosen(draws)
        count = shape[0] * shape[1]
        residuals = self.residuals(runs, key=key, draws=draws)
        shares = shares_of(count) if self.coupled else [np.arange(count)]
        planned, keys = self._in_units(runs), jax.random.split(key, count)
        later = []
        with double_precision():
            for share, residual in zip(shares, residuals, strict=True):
                some = {name: value[share] for name, value in chosen.items()}
                acting = planned._replace(residual=residual)
                rolled = simulated(
                    self.model, some, self.units, acting, keys[share], knots=self._knots(runs)
                )
                later.append([np.asarray(loss, np.float32) for loss in rolled])
        whole = []
        for loss in map(np.concatenate, zip(*later, strict=True)):
            initial = np.broadcast_to(runs.initial[:, None], (*loss.shape[:2], 1, loss.shape[3]))
            both = np.concatenate([initial, loss], axis=2, dtype=np.float32)
            whole.append(both.reshape(*shape, *both.shape[1:]))
        return Simulated(*whole)

    def residuals(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> list[Float[np.ndarray, "run step slot"] | None]:
        """With which ``simulate`` lets the runs' examples act, one for each share of the draws.

        Nothing of the runs is looked at but their curricula; [None] where examples act alike.
        """
        if self.fitted is None:
            return [None]
        chosen, _ = self._chosen(draws)
        return list(
            residuals_under(
                self.model, chosen, self.units, self.fitted, self._in_units(runs), key,
                knots=self._knots(runs),
            )
        )  # fmt: skip

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Hyperparameters, scales, and the effects of a step on one example alone.

        Models with scales per query have ``a`` (unitless) and ``b`` (nats), others ``staying``,
        ``fading`` and ``multiplicative`` on the scale of the link, averaged over training;
        negative = helpful. In a coupled model, a step that acts as those of the fitted runs did on
        average.
        """
        chosen, shape = self._chosen(draws)
        with double_precision():
            effects = _effects_of(self.model, self.units, self.features, self.fitted, chosen)
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name, value in chosen.items():
            if value.ndim <= 2 and name != "missing":
                dims = ("chain", "draw", "query")[: value.ndim + 1]
                named[name] = (dims, np.asarray(value).reshape(*shape, *value.shape[1:]))
        for name, value in effects.items():
            dims = ("chain", "draw", "query", "train")
            named[name] = (dims, np.asarray(value, np.float32).reshape(*shape, *value.shape[1:]))
        return named

    def log_likelihood(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> Float[np.ndarray, "chain draw run step query"]:
        """Log density (1/nats) of each loss given the run's earlier ones; NaN where none was seen.

        Losses that were not recorded are integrated over where that is possible (``joint.Gaps``);
        elsewhere they take the values of their draws.

        Raises:
            Misuse: losses left out that are not integrated over and that the fit has no draws of.
        """
        chosen, shape = self._chosen(draws)
        # Sites of which each query has its own, besides the coefficients.
        both = self.model.per_query and self.model.error.by_step
        own = ("scale", "noise") if both else ("scale",)
        with double_precision():
            linked = link_of(self.model.link, jnp.asarray(runs.loss, float))
            gaps = gaps_of(self.model, np.asarray(linked))
            drawn = self._drawn(gaps.positions, runs.query)
            acting = self._in_units(runs)._replace(residual=runs.residual if self.coupled else None)
            density = _densities(
                self.model, gaps, own, chosen, self.units, acting, linked, jnp.asarray(drawn)
            )
            jacobian = log_slope(self.model.link, jnp.asarray(runs.loss[:, 1:], float))
            density = np.asarray(density + jacobian[None], np.float32)
        density = np.where(np.isfinite(runs.loss[None, :, 1:]), density, np.nan)
        return density.reshape(*shape, *density.shape[1:])

    def _drawn(
        self, wanted: Int[np.ndarray, "gap axis"], query: Int[np.ndarray, " query"]
    ) -> Int[np.ndarray, " gap"]:
        """Places in the site ``missing`` of losses at positions (run, time, queried)."""
        places = {tuple(position): place for place, position in enumerate(self.missing.tolist())}
        asked = [(run, time, int(query[at])) for run, time, at in wanted.tolist()]
        unknown = sum(position not in places for position in asked)
        if unknown:
            raise Misuse(
                "times",
                got=f"{unknown} losses left out that the fit has no draws of",
                expected="every recorded loss, for a density that needs the loss before each step",
                do="leave times out",
            )
        return np.array([places[position] for position in asked], int)

    def _chosen(self, draws: int) -> tuple[dict[str, Array], tuple[int, int]]:
        """Draws spread evenly over each chain, chain after chain; and how many of each."""
        chains, held = self.sites["scale"].shape[:2]
        each = min(held, max(1, -(-draws // chains)))
        at = np.linspace(0, held - 1, each).round().astype(int)
        with double_precision():
            chosen = {
                name: jnp.asarray(value[:, at].reshape(chains * each, *value.shape[2:]), float)
                for name, value in self.sites.items()
            }
        return chosen, (chains, each)

    def _in_units(self, runs: RunArrays) -> RunArrays:
        """The curricula as the model takes them, without residuals."""
        runs = runs.in_units(self.recorded, self.largest_step_size)
        return runs._replace(features=self.features, residual=None)

    def _knots(self, runs: RunArrays) -> int:
        return self.model.coefficients.count(max(1.0, runs.steps / self.recorded))

    def arrays(self) -> Named:
        """The draws, with axes named by position."""
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            **unit_arrays(self.units, self.features),
            "missing": (("entry", "axis"), self.missing),
        }
        if self.fitted is not None:
            for name in BATCH:
                named[name] = (("run", "step", "slot"), np.asarray(getattr(self.fitted, name)))
            named["step_size"] = (("run", "step"), np.asarray(self.fitted.step_size))
        for name, value in self.sites.items():
            rest = (f"{name}_{axis}" for axis in range(value.ndim - 2))
            named[f"site_{name}"] = (("chain", "draw", *rest), np.asarray(value))
        return named

    def settings(self) -> dict[str, Any]:
        """The model, and the units of time and step size."""
        return {
            "model": self.model.as_dict(),
            "recorded": self.recorded,
            "largest_step_size": self.largest_step_size,
        }

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> "SampledSimulator":
        """From ``arrays()`` and ``settings()``."""
        units, features = units_of(arrays)
        # Models of version 0.1 were additive.
        model = Simfluence.from_dict({"coupling": "none", **settings["model"]})
        return cls(
            model=model,
            sites={
                name.removeprefix("site_"): value
                for name, value in arrays.items()
                if name.startswith("site_")
            },
            units=units,
            features=features,
            recorded=settings["recorded"],
            largest_step_size=settings["largest_step_size"],
            missing=np.asarray(arrays["missing"], int),
            fitted=_restored(arrays, features) if "residual" in arrays else None,
        )


def unit_arrays(units: Units, features: ExampleFeatures) -> Named:
    """Units of the scales, and features, to be saved; ``units_of`` makes them again."""
    return {
        "reference": (("query",), np.asarray(units.reference)),
        "spread": ((), np.asarray(units.spread)),
        "train_feature": (("train", "feature"), np.asarray(features.train)),
        "query_feature": (("query", "of_query"), np.asarray(features.query)),
    }


def units_of(arrays: Mapping[str, np.ndarray]) -> tuple[Units, ExampleFeatures]:
    """Units and features of ``unit_arrays``."""
    with double_precision():
        features = ExampleFeatures(
            jnp.asarray(arrays["train_feature"]), jnp.asarray(arrays["query_feature"])
        )
        return Units(jnp.asarray(arrays["reference"]), jnp.asarray(arrays["spread"])), features


def _restored(arrays: Mapping[str, np.ndarray], features: ExampleFeatures) -> RunArrays:
    """The fitted runs of ``arrays()``, which were saved in units."""
    runs = RunArrays.of(
        np.asarray(arrays["batch"], int),
        np.zeros((len(arrays["batch"]), 1, 0)),
        weight=np.asarray(arrays["weight"], float),
        step_size=np.asarray(arrays["step_size"], float),
        features=features,
    )
    return runs._replace(residual=np.asarray(arrays["residual"], float))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _densities(
    model: Simfluence,
    gaps: Gaps,
    of_query: tuple[str, ...],
    draws: Sites,
    units: Units,
    runs: RunArrays,
    linked: Float[Array, "run time query"],
    drawn: Int[Array, " gap"],
) -> Float[Array, "draw run step query"]:
    """Log densities under each draw, units of the link; ``drawn`` fills the gaps."""

    def of_draw(sites: Sites) -> Array:
        coefficients = coefficients_of(model, sites, units, runs.features)
        coefficients = of_queries(coefficients, runs.query)
        own = {name: sites[name][runs.query] for name in of_query}
        filled = linked
        if len(gaps.imputed):
            filled = linked.at[tuple(gaps.positions.T)].set(sites["missing"][drawn])
        return density_of(model, {**sites, **own}, coefficients, runs, filled, gaps)

    densities: Array = jax.lax.map(of_draw, draws)
    return densities


@partial(jax.jit, static_argnums=0)
def _effects_of(
    model: Simfluence,
    units: Units,
    features: ExampleFeatures,
    fitted: RunArrays | None,
    draws: Sites,
) -> dict[str, Float[Array, "draw query train"]]:
    effects: dict[str, Array] = jax.lax.map(partial(_effects, model, units, features), draws)
    acting = typical_steps(model, draws, fitted)[:, None, None]
    return {name: acting * effect for name, effect in effects.items()}


def _effects(
    model: Simfluence, units: Units, features: ExampleFeatures, sites: Sites
) -> dict[str, Float[Array, "query train"]]:
    coefficients = coefficients_of(model, sites, units, features)
    named = {part: value.mean(axis=2) for part, value in coefficients.additive.items()}
    if coefficients.multiplicative is not None:
        named["multiplicative"] = coefficients.multiplicative
    published = {"staying": "b", "multiplicative": "a"}
    if model.per_query:
        return {published.get(name, name): value for name, value in named.items()}
    return named
