"""The affine recurrence of a loss, rolled out with given or drawn coefficients."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model import kalman
from bayes_simfluence.model.arrays import RunArrays, example_weights, exposures
from bayes_simfluence.model.recurrence import affine_trajectory
from bayes_simfluence.simulators.base import CHUNK, Named, Simulated, Simulator, resampled


@dataclass(frozen=True)
class AffineSimulator(Simulator):
    """``L_t = (keep + sum_i w_ti a_i) L_{t-1} + sum_i w_ti b_i + noise`` for each query.

    ``w`` are exposures (shares of the batch) with ``keep`` = 1 in our form, counts with ``keep`` =
    0 in the published one. Coefficients are a point, or Gaussian with a factor of their
    covariance. Noise is white per step, or whole residual paths of left-out runs, resampled.

    Attributes:
        a, b: posterior means, unitless and nats.
        factor: ``factor @ z`` with standard normal z is a draw of the deviations of a, then b;
            None for a point.
        noise: sd of the noise of one step, nats; None for none.
        residual: true minus simulated losses of left-out runs; None for none.
        keep: what of the previous loss stays when nothing is trained on.
        count: weights are counts instead of shares.
    """

    name: ClassVar[str] = "affine"
    a: Float[np.ndarray, "query train"]
    b: Float[np.ndarray, "query train"]
    factor: Float[np.ndarray, "query weight source"] | None = None
    noise: Float[np.ndarray, " query"] | None = None
    residual: Float[np.ndarray, "fitted time query"] | None = None
    keep: float = 1.0
    count: bool = False

    @property
    def draws(self) -> int | None:
        """One for a point without noise, else any number."""
        point = self.factor is None and self.noise is None and self.residual is None
        return 1 if point else None

    @property
    def has_effects(self) -> bool:
        """Not in the published form, where what ``a`` leaves of the loss is all there is of it."""
        return bool(self.keep)

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Draws of coefficients, rolled out from the initial losses."""
        draws = self.draws or draws
        weights = jnp.asarray(self._weights(runs), jnp.float32)
        initial = jnp.asarray(runs.initial, jnp.float32)
        _, noise_key = jax.random.split(key)
        chunks = []
        for start, a, b in self._chunks(runs.query, key, draws):
            steps = self._step_noise(runs, jax.random.fold_in(noise_key, start), len(a))
            chunks.append(_rolled_out(weights, a, b, steps, initial, jnp.float32(self.keep)))
        mean, loss = (np.concatenate(parts)[None] for parts in zip(*chunks, strict=True))
        if self.residual is not None:
            loss = loss + resampled(self.residual, runs, key=noise_key, draws=draws)[None]
        return Simulated(mean, loss)

    def _weights(self, runs: RunArrays) -> Float[np.ndarray, "run step train"]:
        with double_precision():
            weights = _weights(
                jnp.asarray(runs.batch), jnp.asarray(runs.weight), self.a.shape[1], self.count
            )
        return np.asarray(weights)

    def _chunks(
        self, query: Int[np.ndarray, " query"], key: jax.Array, draws: int
    ) -> Iterator[tuple[int, Array, Array]]:
        """The key's draws of the coefficients: where a chunk starts, its ``a``, its ``b``."""
        coefficients_key, _ = jax.random.split(key)
        for start in range(0, draws, CHUNK):
            own = jax.random.fold_in(coefficients_key, start)
            yield start, *self._coefficients(query, own, min(CHUNK, draws - start))

    def _coefficients(
        self, query: Int[np.ndarray, " query"], key: jax.Array, draws: int
    ) -> tuple[Float[Array, "draw query train"], Float[Array, "draw query train"]]:
        mean = jnp.asarray(np.concatenate([self.a, self.b], axis=1)[query], jnp.float32)
        drawn = jnp.broadcast_to(mean[None], (draws, *mean.shape))
        if self.factor is not None:
            factor = jnp.asarray(self.factor[query], jnp.float32)
            z = jax.vmap(
                lambda number: jax.random.normal(
                    jax.random.fold_in(key, number), (draws, factor.shape[2])
                )
            )(jnp.asarray(query))
            drawn = drawn + jnp.einsum("qws,qds->dqw", factor, z)
        a, b = jnp.split(drawn, 2, axis=-1)
        return a, b

    def _step_noise(
        self, runs: RunArrays, key: jax.Array, draws: int
    ) -> Float[Array, "draw run step query"] | None:
        if self.noise is None:
            return None
        shape = (draws, *runs.batch.shape[:2], len(runs.query))
        return jax.random.normal(key, shape) * self.noise[runs.query][None, None, None]

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """``a`` (unitless) and ``b`` (nats): one draw of a point, else as many as asked."""
        chunks = self._chunks(np.arange(len(self.a)), key, self.draws or draws)
        coefficients = (
            np.concatenate(parts)[None] for parts in list(zip(*chunks, strict=True))[1:]
        )
        dims = ("chain", "draw", "query", "train")
        return {name: (dims, value) for name, value in zip("ab", coefficients, strict=True)}

    def log_likelihood(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> Float[np.ndarray, "chain draw run step query"] | None:
        """Of every step, where the noise is white; over a gap in the record, of several steps.

        A point without noise has no density, and residual paths have none.
        """
        if self.noise is None or self.residual is not None:
            return None
        later = runs.loss[:, 1:]
        density = np.empty((1, draws, *later.shape), np.float32)
        shares = self._weights(runs)
        for start, a, b in self._chunks(runs.query, key, draws):
            # Losses hardly move within a step: differences need double precision.
            with double_precision():
                density[0, start : start + len(a)] = _log_density(
                    jnp.asarray(shares, float),
                    jnp.asarray(a, float),
                    jnp.asarray(b, float),
                    jnp.asarray(self.noise[runs.query], float),
                    jnp.asarray(runs.initial, float),
                    jnp.asarray(later, float),
                    jnp.asarray(self.keep, float),
                )
        return np.where(np.isfinite(later), density, np.float32(np.nan))

    def arrays(self) -> Named:
        """Coefficients, factor, noise and residuals, where there are any."""
        dims = {
            "a": ("query", "train"),
            "b": ("query", "train"),
            "factor": ("query", "weight", "source"),
            "noise": ("query",),
            "residual": ("fitted", "time", "query"),
        }
        values = {name: getattr(self, name) for name in dims}
        return {name: (dims[name], array) for name, array in values.items() if array is not None}

    def settings(self) -> dict[str, Any]:
        """The form of the recurrence."""
        return {"keep": self.keep, "count": self.count}


@partial(jax.jit, static_argnames=("train", "count"))
def _weights(
    batch: Int[Array, "run step slot"],
    weight: Float[Array, "run step slot"],
    train: int,
    count: bool,
) -> Float[Array, "run step train"]:
    of_run = partial(example_weights if count else exposures, train=train)
    weights: Array = jax.vmap(of_run)(batch, weight)
    return weights


@jax.jit
def _rolled_out(
    weights: Float[Array, "run step train"],
    a: Float[Array, "draw query train"],
    b: Float[Array, "draw query train"],
    noise: Float[Array, "draw run step query"] | None,
    initial: Float[Array, "run query"],
    keep: Float[Array, ""],
) -> tuple[Float[Array, "draw run time query"], Float[Array, "draw run time query"]]:
    alpha = keep + jnp.einsum("rsn,dqn->drsq", weights, a)
    beta = jnp.einsum("rsn,dqn->drsq", weights, b)
    start = jnp.broadcast_to(initial[None], (len(a), *initial.shape))
    roll = affine_trajectory
    for axes, out in (((1, 1, 0), 1), ((0, 0, 0), 0), ((0, 0, 0), 0)):
        roll = jax.vmap(roll, in_axes=axes, out_axes=out)
    mean = roll(alpha, beta, start)
    return mean, mean if noise is None else roll(alpha, beta + noise, start)


@jax.jit
def _log_density(
    weights: Float[Array, "run step train"],
    a: Float[Array, "draw query train"],
    b: Float[Array, "draw query train"],
    noise: Float[Array, " query"],
    initial: Float[Array, "run query"],
    loss: Float[Array, "run step query"],
    keep: Float[Array, ""],
) -> Float[Array, "draw run step query"]:
    """Of each loss given the run's earlier ones; zero where none was recorded."""
    of_run = jax.vmap(kalman.log_density, in_axes=(1, 1, 0, 1, 0, None), out_axes=1)
    of_runs = jax.vmap(of_run, in_axes=(0, 0, 0, 0, None, None))

    def of_draw(coefficients: tuple[Array, Array]) -> Array:
        a, b = (jnp.einsum("rsn,qn->rsq", weights, drawn) for drawn in coefficients)
        density: Array = of_runs(
            keep + a, b, initial, loss, jnp.square(noise), jnp.zeros_like(keep)
        )
        return density

    # The filter's scan holds several arrays of this size: one draw at a time.
    density: Array = jax.lax.map(of_draw, (a, b))
    return density
