"""Draws of a model's sites, rolled out: what samplers leave behind, whatever the prior or error."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.counterfactual.fitted import stacked_paths
from bayes_simfluence.counterfactual.rollout import Named, Planned, Simulated
from bayes_simfluence.linalg import cholesky, double_precision
from bayes_simfluence.model.bayesian import (
    Path,
    Simfluence,
    gather,
    link_of,
    log_slope,
    loss_of,
    rate_of,
)
from bayes_simfluence.model.explained import Coefficients, batch_effects, multipliers
from bayes_simfluence.model.hyper import Values
from bayes_simfluence.model.joint import (
    JITTER,
    Sites,
    Units,
    coefficients_of,
    density_of,
    gaps_of,
    noise_of,
)
from bayes_simfluence.model.noise import Gaussian, StudentT
from bayes_simfluence.model.priors import ExampleFeatures

__all__ = ["SampledSimulator"]

AT_ONCE = 8
"""Draws rolled out together."""


@dataclass(frozen=True)
class SampledSimulator:
    """Posterior draws of every site of the model's program.

    Attributes:
        model: what was inferred.
        sites: by name, each with leading axes (chain, draw).
        units: of the queries' scales.
        features: embeddings of examples and queries.
        recorded: steps of a recorded run: the unit of training time.
        largest_step_size: what step sizes were divided by; None when they were not recorded.
    """

    name: ClassVar[str] = "sampled"
    model: Simfluence
    sites: Mapping[str, Float[np.ndarray, "chain draw *shape"]]
    units: Units
    features: ExampleFeatures
    recorded: int
    largest_step_size: float | None

    @property
    def draws(self) -> int:
        """Draws of all chains together."""
        chains, draws = self.sites["scale"].shape[:2]
        return int(chains * draws)

    def simulate(self, planned: Planned, *, key: jax.Array, draws: int) -> Simulated:
        """Each kept draw rolled out once, with errors of its own."""
        chosen, shape = self._chosen(draws)
        steps = planned.batch.shape[1]
        with double_precision():
            paths = self._paths(planned)
            start = link_of(self.model, jnp.asarray(planned.initial, float))
            unroll = partial(_simulated, self.model, knots=self._knots(steps))
            found = unroll(
                chosen, self.units, self.features, paths, start,
                jnp.asarray(planned.query), jax.random.split(key, shape[0] * shape[1]),
            )  # fmt: skip
        initial = np.broadcast_to(
            planned.initial[None, :, None], (len(found[0]), *start[:, None].shape)
        )
        whole = (
            np.concatenate([initial, np.asarray(one)], axis=2, dtype=np.float32) for one in found
        )
        return Simulated(*(one.reshape(*shape, *one.shape[1:]) for one in whole))

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Hyperparameters, scales, and the effects of a step on one example alone.

        The published kinds have ``a`` (unitless) and ``b`` (nats), the others ``staying``,
        ``fading`` and ``multiplicative`` on the scale of the link, averaged over training;
        negative = helpful.
        """
        chosen, shape = self._chosen(draws)
        with double_precision():
            one = partial(_effects, self.model, self.units, self.features)
            effects = jax.lax.map(one, chosen)
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
        self,
        planned: Planned,
        loss: Float[np.ndarray, "run time query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> Float[np.ndarray, "chain draw run step query"]:
        """Log density (1/nats) of each loss given the run's earlier ones; NaN where none was seen.

        Losses that a fit had as sites of their own are integrated over only here and there: see
        ``joint.Gaps``. Where that is not possible (``Gaps.imputed``) they take the values of their
        draws.
        """
        chosen, shape = self._chosen(draws)
        with double_precision():
            linked = link_of(self.model, jnp.asarray(loss, float))
            gaps = gaps_of(self.model, np.asarray(linked))

            def one(sites: Sites) -> Array:
                coefficients = coefficients_of(self.model, sites, self.units, self.features)
                seen = linked
                if len(gaps.imputed):
                    seen = linked.at[tuple(gaps.imputed.T)].set(sites["missing"])
                return density_of(self.model, sites, coefficients, paths, seen, gaps)

            paths = self._paths(planned)
            density = jax.lax.map(jax.jit(one), chosen)
            jacobian = log_slope(self.model, jnp.asarray(loss[:, 1:], float))
            found = np.asarray(density + jacobian[None], np.float32)
        found = np.where(np.isfinite(loss[None, :, 1:]), found, np.nan)
        return found.reshape(*shape, *found.shape[1:])

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

    def _knots(self, steps: int) -> int:
        return self.model.coefficients.count(max(1.0, steps / self.recorded))

    def _paths(self, planned: Planned) -> Path:
        if self.largest_step_size is None:
            sizes = np.ones(planned.batch.shape[:2])
        elif planned.step_size is None:
            raise Misuse(
                "runs to simulate",
                got="no step_size",
                expected="the step sizes that training would use, as the fitted runs have them",
                do="pass step_size=... to runs_from_arrays or planned_runs",
            )
        else:
            sizes = planned.step_size / self.largest_step_size
        return stacked_paths(planned.batch, sizes, len(self.features.train), self.recorded)

    def arrays(self) -> Named:
        """The draws, with axes named by position."""
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            "reference": (("query",), np.asarray(self.units.reference)),
            "spread": ((), np.asarray(self.units.spread)),
            "train_feature": (("train", "feature"), np.asarray(self.features.train)),
            "query_feature": (("query", "query_feature"), np.asarray(self.features.query)),
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
        )


def _effects(
    model: Simfluence, units: Units, features: ExampleFeatures, sites: Sites
) -> dict[str, Float[Array, "query train"]]:
    found = coefficients_of(model, sites, units, features)
    named = {part: value.mean(axis=2) for part, value in found.additive.items()}
    if found.multiplicative is not None:
        named["multiplicative"] = found.multiplicative
    published = {"staying": "b", "multiplicative": "a"}
    if model.published:
        return {published.get(name, name): value for name, value in named.items()}
    return named


@partial(jax.jit, static_argnames=("model", "knots"))
def _simulated(
    model: Simfluence,
    draws: Sites,
    units: Units,
    features: ExampleFeatures,
    paths: Path,
    start: Float[Array, "run query"],
    query: Array,
    keys: Array,
    *,
    knots: int,
) -> tuple[Array, Array]:
    """Losses after each step, without and with error: (draw, run, step, query)."""

    def one(inputs: tuple[Sites, Array]) -> tuple[Array, Array]:
        sites, key = inputs
        knot_key, error_key = jax.random.split(key)
        longer = _extended(model, sites, knots, key=knot_key)
        found = _of_queries(coefficients_of(model, longer, units, features), query)
        noise = noise_of(model, sites)[query]
        factor = _walk_factor(model, sites, paths.progress[0])
        runs = jnp.arange(len(start))

        def of_run(run: Array, path: Path, at: Array) -> tuple[Array, Array]:
            own = jax.random.fold_in(error_key, run)
            return _rolled(model, sites, found, path, at, noise, factor, key=own)

        done: tuple[Array, Array] = jax.vmap(of_run)(runs, paths, start)
        return done

    found: tuple[Array, Array] = jax.lax.map(one, (draws, keys), batch_size=AT_ONCE)
    return found


def _extended(model: Simfluence, sites: Sites, knots: int, *, key: jax.Array) -> Sites:
    """Sites with fresh prior draws of the knots beyond a recorded run.

    An example's local scale shows in its size at the recorded knots.
    """
    longer = dict(sites)
    for number, (name, value) in enumerate(sorted(sites.items())):
        smooth = name.endswith("_unit") and not name.startswith("multiplicative")
        curve = name.endswith("_time") and model.time_effect == "smooth"
        more = knots - value.shape[-1] if smooth or curve else 0
        if more > 0:
            own = jax.random.fold_in(key, number)
            size = jnp.sqrt(jnp.square(value).mean(axis=-1, keepdims=True)) if smooth else 1.0
            fresh = size * jax.random.normal(own, (*value.shape[:-1], more), value.dtype)
            longer[name] = jnp.concatenate([value, fresh], axis=-1)
    return longer


def _of_queries(found: Coefficients, query: Array) -> Coefficients:
    taken: Coefficients = jax.tree.map(lambda whole: whole[query], found)
    return taken


def _walk_factor(
    model: Simfluence, values: Values, progress: Float[Array, " step"]
) -> Float[Array, "step step"] | None:
    """Root of the covariance of the error path; None for Student-t steps.

    Noise of observation that the recurrence does not see is added to the rolled-out losses.
    """
    error = model.error
    if isinstance(error, StudentT):
        return None
    if _hidden(model):
        assert isinstance(error, Gaussian)
        error = replace(error, observation=False)
    covariance = error.covariance(values, progress)
    return cholesky(covariance + JITTER * jnp.eye(len(progress)))


def _hidden(model: Simfluence) -> bool:
    return model.multiplicative and isinstance(model.error, Gaussian) and model.error.observation


def _rolled(
    model: Simfluence,
    sites: Sites,
    coefficients: Coefficients,
    path: Path,
    start: Float[Array, " query"],
    noise: Float[Array, " query"],
    factor: Float[Array, "step step"] | None,
    *,
    key: jax.Array,
) -> tuple[Float[Array, "step query"], Float[Array, "step query"]]:
    steps, queries = len(path.progress), len(start)
    walk_key, seen_key = jax.random.split(key)
    if factor is None:
        assert isinstance(model.error, StudentT)
        freedom = model.error.freedom_of(sites)
        walk = jnp.cumsum(jax.random.t(walk_key, freedom, (steps, queries)), axis=0)
    else:
        walk = factor @ jax.random.normal(walk_key, (steps, queries))
    error = noise[None] * walk
    simple = not model.multiplicative and getattr(model.error, "loss_power", 0.0) == 0
    way = _summed if simple else _scanned
    mean = way(model, sites, coefficients, path, start, jnp.zeros_like(error))
    loss = way(model, sites, coefficients, path, start, error)
    if _hidden(model):
        white = jax.random.normal(seen_key, (steps, queries))
        loss = loss + sites["observation"] * noise[None] * white
    return loss_of(model, mean), loss_of(model, loss)


def _summed(
    model: Simfluence,
    values: Values,
    coefficients: Coefficients,
    path: Path,
    start: Float[Array, " query"],
    error: Float[Array, "step query"],
) -> Float[Array, "step query"]:
    """Without feedback of the loss: a sum of matrix products."""
    rows = jnp.arange(len(path.progress))
    total = start[None] + error
    for part in model.parts:
        moved = batch_effects(model, coefficients, part, path)
        total = total + gather(model, values, path, part, rows) @ moved
    return total


class _State(NamedTuple):
    moved: dict[str, Array]
    total: dict[str, Array]
    error: Array
    loss: Array


def _scanned(
    model: Simfluence,
    values: Values,
    coefficients: Coefficients,
    path: Path,
    start: Float[Array, " query"],
    error: Float[Array, "step query"],
) -> Float[Array, "step query"]:
    """Step by step: batches act on the simulated loss, and the error's size may follow it."""
    steps = len(path.progress)
    batches = {part: batch_effects(model, coefficients, part, path) for part in model.parts}
    factor = multipliers(coefficients, path)
    weights = model.exposure.weights(values, path.step_size)
    kept = {part: jnp.exp(rate_of(values, part) * path.progress[0]) for part in model.parts}
    pushes = jnp.diff(error, axis=0, prepend=jnp.zeros_like(error[:1]))

    def step(state: _State, at: Array) -> tuple[_State, Array]:
        moved, total = {}, {}
        for part in model.parts:
            now = batches[part][at]
            if factor is not None and part == model.parts[0]:
                now = now + factor[at] * state.loss
            moved[part] = state.moved[part].at[at].set(now)
            total[part] = kept[part] * state.total[part] + weights[at] @ moved[part]
        size = model.error.sizes(values, loss_of(model, state.loss)[None])
        push = pushes[at] if size is None else size[0] * pushes[at]
        deviation = state.error + push
        loss = start + sum(total.values()) + deviation
        return _State(moved, total, deviation, loss), loss

    nothing = {part: jnp.zeros_like(error) for part in model.parts}
    zero = {part: jnp.zeros_like(start) for part in model.parts}
    begin = _State(nothing, zero, jnp.zeros_like(start), start)
    _, losses = jax.lax.scan(step, begin, jnp.arange(steps))
    found: Array = losses
    return found
