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
from bayes_simfluence.simulators.unrolled import of_queries, simulated


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
    """

    name: ClassVar[str] = "sampled"
    model: Simfluence
    sites: Mapping[str, Float[np.ndarray, "chain draw *shape"]]
    units: Units
    features: ExampleFeatures
    recorded: int
    largest_step_size: float | None
    missing: Int[np.ndarray, "entry axis"] = field(default_factory=lambda: np.zeros((0, 3), int))

    @property
    def draws(self) -> int:
        """Draws of all chains together."""
        chains, draws = self.sites["scale"].shape[:2]
        return int(chains * draws)

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Each kept draw rolled out once, with errors of its own."""
        chosen, shape = self._chosen(draws)
        knots = self.model.coefficients.count(max(1.0, runs.steps / self.recorded))
        with double_precision():
            later = simulated(
                self.model, chosen, self.units, self._in_units(runs),
                jax.random.split(key, shape[0] * shape[1]), knots=knots,
            )  # fmt: skip
        initial = np.broadcast_to(
            runs.initial[None, :, None], (len(later[0]), len(runs.batch), 1, len(runs.query))
        )
        whole = (
            np.concatenate([initial, np.asarray(loss)], axis=2, dtype=np.float32) for loss in later
        )
        return Simulated(*(loss.reshape(*shape, *loss.shape[1:]) for loss in whole))

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Hyperparameters, scales, and the effects of a step on one example alone.

        Models with scales per query have ``a`` (unitless) and ``b`` (nats), others ``staying``,
        ``fading`` and ``multiplicative`` on the scale of the link, averaged over training;
        negative = helpful.
        """
        chosen, shape = self._chosen(draws)
        with double_precision():
            effects = _effects_of(self.model, self.units, self.features, chosen)
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
            density = _densities(
                self.model, gaps, own, chosen, self.units,
                self._in_units(runs), linked, jnp.asarray(drawn),
            )  # fmt: skip
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
        return runs.in_units(self.recorded, self.largest_step_size)._replace(features=self.features)

    def arrays(self) -> Named:
        """The draws, with axes named by position."""
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            "reference": (("query",), np.asarray(self.units.reference)),
            "spread": ((), np.asarray(self.units.spread)),
            "train_feature": (("train", "feature"), np.asarray(self.features.train)),
            "query_feature": (("query", "of_query"), np.asarray(self.features.query)),
            "missing": (("entry", "axis"), self.missing),
        }
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
        with double_precision():
            features = ExampleFeatures(
                jnp.asarray(arrays["train_feature"]), jnp.asarray(arrays["query_feature"])
            )
            units = Units(jnp.asarray(arrays["reference"]), jnp.asarray(arrays["spread"]))
        return cls(
            model=Simfluence.from_dict(settings["model"]),
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
        )


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
    model: Simfluence, units: Units, features: ExampleFeatures, draws: Sites
) -> dict[str, Float[Array, "draw query train"]]:
    effects: dict[str, Array] = jax.lax.map(partial(_effects, model, units, features), draws)
    return effects


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
