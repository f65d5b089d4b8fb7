"""Simulated runs: what every simulator takes and gives, and the affine recurrence rolled out.

A simulator is free-running: of the run to be simulated it sees the curriculum and the losses
before the first update, nothing else. Arrays inside; ``Posterior.simulate`` puts names on them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import Curriculum
from bayes_simfluence.counterfactual.density import one_step_log_density
from bayes_simfluence.data.curriculum import exposures
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.transition import affine_path

__all__ = [
    "CHUNK",
    "AffineSimulator",
    "Named",
    "Planned",
    "Simulated",
    "Simulator",
    "relative_step_size",
    "resampled",
]

Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]
"""Arrays with the names of their dimensions."""

CHUNK = 64
"""Draws rolled out at once, so that memory for intermediate arrays does not grow with draws."""


class Planned(NamedTuple):
    """Runs to be simulated, of equal length.

    Attributes:
        batch: indices into the fitted runs' ``train``, -1 = empty slot.
        step_size: learning rates; None when the fitted runs have none.
        initial: losses before the first update, nats.
        query: positions of the queries among the fitted ones.
    """

    batch: Int[np.ndarray, "run step slot"]
    step_size: Float[np.ndarray, "run step"] | None
    initial: Float[np.ndarray, "run query"]
    query: Int[np.ndarray, " query"]


def relative_step_size(planned: Planned, largest: float | None) -> Float[np.ndarray, "run step"]:
    """Step sizes in units of the fitted runs' largest one; ones where those had none.

    Raises:
        Misuse: no step sizes, where the fitted runs have them.
    """
    if largest is None:
        return np.ones(planned.batch.shape[:2])
    if planned.step_size is None:
        raise Misuse(
            "runs to simulate",
            got="no step_size",
            expected="the step sizes that training would use, as the fitted runs have them",
            do="pass step_size=... to runs_from_arrays or planned_runs",
        )
    return planned.step_size / largest


class Simulated(NamedTuple):
    """Simulated losses in nats, time 0 first.

    Attributes:
        mean_loss: without the noise of a single run: its spread is what is not known of the
            coefficients.
        loss: predictive draws of a run's loss, noise included.
    """

    mean_loss: Float[np.ndarray, "chain draw run time query"]
    loss: Float[np.ndarray, "chain draw run time query"]


@runtime_checkable
class Simulator(Protocol):
    """What a fit leaves behind: everything needed to simulate a run, and to be saved."""

    name: ClassVar[str]
    """Under which saved posteriors find their class again."""

    @property
    def draws(self) -> int | None:
        """Draws that it holds; None = any number on request."""

    def simulate(self, planned: Planned, *, key: jax.Array, draws: int) -> Simulated:
        """Trajectories; the same key gives the same draws of the coefficients to any runs."""

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """Draws of what was inferred: name -> (dimensions from chain, draw on, values)."""

    def log_likelihood(
        self,
        planned: Planned,
        loss: Float[np.ndarray, "run time query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> Float[np.ndarray, "chain draw run step query"] | None:
        """Log density (natural log, per nat) of each loss given its run's earlier ones.

        Given the coefficients that ``samples(key=key, draws=draws)`` has in the same draw, so that
        the sum over steps is the log density of the run. NaN where the loss is NaN (not recorded)
        and at steps that the simulator has no density for; None when it has none at all.
        """

    def arrays(self) -> Named:
        """What to save: name -> (dimensions, values)."""

    def settings(self) -> dict[str, Any]:
        """Plain values to save."""

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> "Simulator":
        """The simulator of saved arrays and settings."""


@dataclass(frozen=True)
class AffineSimulator:
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

    def simulate(self, planned: Planned, *, key: jax.Array, draws: int) -> Simulated:
        """Draws of coefficients, rolled out from the initial losses."""
        draws = self.draws or draws
        weights = jnp.asarray(
            [_weights(batch, self.a.shape[1], self.count) for batch in planned.batch], jnp.float32
        )
        initial = jnp.asarray(planned.initial, jnp.float32)
        _, noise_key = jax.random.split(key)
        pieces = []
        for start, a, b in self._chunks(planned.query, key, draws):
            steps = self._step_noise(planned, jax.random.fold_in(noise_key, start), len(a))
            pieces.append(_rolled_out(weights, a, b, steps, initial, jnp.float32(self.keep)))
        mean, loss = (np.concatenate(parts)[None] for parts in zip(*pieces, strict=True))
        if self.residual is not None:
            loss = loss + resampled(self.residual, planned, key=noise_key, draws=draws)[None]
        return Simulated(mean, loss)

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
                lambda one: jax.random.normal(
                    jax.random.fold_in(key, one), (draws, factor.shape[2])
                )
            )(jnp.asarray(query))
            drawn = drawn + jnp.einsum("qws,qds->dqw", factor, z)
        a, b = jnp.split(drawn, 2, axis=-1)
        return a, b

    def _step_noise(
        self, planned: Planned, key: jax.Array, draws: int
    ) -> Float[Array, "draw run step query"] | None:
        if self.noise is None:
            return None
        runs, steps, _ = planned.batch.shape
        shape = (draws, runs, steps, len(planned.query))
        return jax.random.normal(key, shape) * self.noise[planned.query][None, None, None]

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """``a`` (unitless) and ``b`` (nats): one draw of a point, else as many as asked."""
        chunks = self._chunks(np.arange(len(self.a)), key, self.draws or draws)
        found = (np.concatenate(parts)[None] for parts in list(zip(*chunks, strict=True))[1:])
        dims = ("chain", "draw", "query", "train")
        return {name: (dims, one) for name, one in zip("ab", found, strict=True)}

    def log_likelihood(
        self,
        planned: Planned,
        loss: Float[np.ndarray, "run time query"],
        *,
        key: jax.Array,
        draws: int,
    ) -> Float[np.ndarray, "chain draw run step query"] | None:
        """Of every step, where the noise is white; over a gap in the record, of several steps.

        A point without noise has no density, and residual paths have none.
        """
        if self.noise is None or self.residual is not None:
            return None
        later = loss[:, 1:]
        found = np.empty((1, draws, *later.shape), np.float32)
        train = self.a.shape[1]
        shares = [_weights(batch, train, self.count) for batch in planned.batch]
        for start, a, b in self._chunks(planned.query, key, draws):
            # Losses hardly move within a step: differences need double precision.
            with double_precision():
                weights, a, b = (jnp.asarray(one, float) for one in (np.stack(shares), a, b))
                found[0, start : start + len(a)] = one_step_log_density(
                    self.keep + jnp.einsum("rsn,dqn->drsq", weights, a),
                    jnp.einsum("rsn,dqn->drsq", weights, b),
                    jnp.asarray(self.noise[planned.query], float),
                    jnp.asarray(planned.initial, float),
                    jnp.asarray(later, float),
                )
        return found

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
        return {name: (dims[name], one) for name, one in values.items() if one is not None}

    def settings(self) -> dict[str, Any]:
        """The form of the recurrence."""
        return {"keep": self.keep, "count": self.count}

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> "AffineSimulator":
        """From ``arrays()`` and ``settings()``."""
        return cls(**{**arrays, **settings})


def resampled(
    residual: Float[np.ndarray, "fitted recorded known"],
    planned: Planned,
    *,
    key: jax.Array,
    draws: int,
) -> Float[np.ndarray, "draw run time query"]:
    """Whole residual paths of fitted runs, drawn with replacement for each draw and run."""
    runs, steps, _ = planned.batch.shape
    which = jax.random.randint(key, (draws, runs), 0, len(residual))
    times = np.minimum(np.arange(steps + 1), residual.shape[1] - 1)
    return residual[np.asarray(which)][:, :, times][..., planned.query]


def _weights(batch: Curriculum, train: int, count: bool) -> Float[np.ndarray, "step train"]:
    shares = exposures(batch, train)
    return shares * (batch >= 0).sum(axis=1, keepdims=True) if count else shares


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
    path = affine_path
    for axes, out in (((1, 1, 0), 1), ((0, 0, 0), 0), ((0, 0, 0), 0)):
        path = jax.vmap(path, in_axes=axes, out_axes=out)
    mean = path(alpha, beta, start)
    return mean, mean if noise is None else path(alpha, beta + noise, start)
