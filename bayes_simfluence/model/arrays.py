"""Runs as arrays: what was trained on, and the losses that were recorded along the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT


class ExampleFeatures(NamedTuple):
    """Gradient features of training examples and queries; without columns when there are none."""

    train: Float[Any, "train feature"]
    query: Float[Any, "query feature"]

    def where(self, used: bool) -> "ExampleFeatures":
        """The same features, or none where they are not ``used``.

        Features of queries alone say nothing: there is nothing to compare them with.
        """
        train, query = self.train, self.query
        train = train if used else train[:, :0]
        return ExampleFeatures(train, query if train.shape[1] else query[:, :0])


def no_features(train: int, query: int) -> ExampleFeatures:
    """Features that say nothing."""
    return ExampleFeatures(np.zeros((train, 0)), np.zeros((query, 0)))


def example_weights(
    batch: Int[Array, "step slot"], weight: Float[Array, "step slot"], train: int
) -> Float[Array, "step train"]:
    """Sum of the weights of the slots that hold an example, at each step; empty slots have none."""
    filled = jnp.where(batch != EMPTY_SLOT, weight, 0.0)
    steps = jnp.arange(len(batch))[:, None]
    # An empty slot's index -1 counts from the end, where its weight of zero changes nothing.
    return jnp.zeros((len(batch), train), filled.dtype).at[steps, batch].add(filled)


def exposures(
    batch: Int[Array, "step slot"],
    weight: Float[Array, "step slot"],
    train: int,
    residual: Float[Array, "step slot"] | None = None,
) -> Float[Array, "step train"]:
    """Weight of each example over the sum of weights in the batch; an empty batch is all zero.

    This is the weight of an example's gradient when the training loss is the batch's weighted mean.
    With residuals, times how much of its target the example had still to learn.

    >>> batch = jnp.array([[0, 0, 1, -1], [-1, -1, -1, -1]])
    >>> (3 * exposures(batch, jnp.ones((2, 4)), 2)).round().tolist()  # in thirds
    [[2.0, 1.0], [0.0, 0.0]]
    """
    total = jnp.where(batch != EMPTY_SLOT, weight, 0.0).sum(axis=1, keepdims=True)
    acting = weight if residual is None else weight * residual
    return example_weights(batch, acting, train) / jnp.where(total > 0, total, 1.0)


class RunArrays(NamedTuple):
    """Runs of equal length with a leading axis ``run``, or one run without it.

    Recorded runs and planned ones have the same form; of a planned run only the losses before the
    first update are known. The model is written for one run; ``each`` takes it to all of them.
    Arrays are NumPy's in double precision outside of compiled functions, and JAX's inside.

    Attributes:
        batch: indices into ``features.train``, -1 = empty slot.
        weight: of each slot in the batch's weighted mean; that of empty slots does not count.
        step_size: learning rates, None when not recorded; relative to the largest one of the fitted
            runs after ``in_units``.
        loss: nats, time 0 first; NaN where not recorded, never at time 0.
        query: positions of the queries among the fitted ones.
        features: gradient features, one row for each example (seen or not) and fitted query.
        progress: step / steps of the fitted runs: the unit of training time.
        residual: of each slot's example just before the step, in [0, 1], by which its exposure is
            multiplied; None where examples act alike however well they are known.
    """

    batch: Int[Any, "*run step slot"]
    weight: Float[Any, "*run step slot"]
    step_size: Float[Any, "*run step"] | None
    loss: Float[Any, "*run time query"]
    query: Int[Any, " query"]
    features: ExampleFeatures
    progress: Float[Any, "*run step"]
    residual: Float[Any, "*run step slot"] | None = None

    @classmethod
    def of(
        cls,
        batch: Int[np.ndarray, "run step slot"],
        loss: Float[np.ndarray, "run known query"],
        *,
        weight: Float[np.ndarray, "run step slot"] | None = None,
        step_size: Float[np.ndarray, "run step"] | None = None,
        query: Int[np.ndarray, " query"] | None = None,
        features: ExampleFeatures,
    ) -> "RunArrays":
        """Runs whose length is the unit of training time, with weights of one if none are given.

        Of runs that are only planned, ``loss`` has time 0 alone; the later ones are not known.
        """
        runs, steps, _ = batch.shape
        unknown = np.full((runs, steps + 1 - loss.shape[1], loss.shape[2]), np.nan)
        return cls(
            batch=batch,
            weight=np.ones(batch.shape) if weight is None else weight,
            step_size=step_size,
            loss=np.concatenate([loss, unknown], axis=1),
            query=np.arange(loss.shape[2]) if query is None else query,
            features=features,
            progress=np.broadcast_to(np.arange(1, steps + 1) / steps, (runs, steps)),
        )

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return int(self.batch.shape[-2])

    @property
    def train(self) -> int:
        """Number of training examples, seen or not."""
        return int(self.features.train.shape[0])

    @property
    def initial(self) -> Float[Any, "*run query"]:
        """Losses before the first update, nats."""
        return self.loss[..., 0, :]

    @property
    def known(self) -> Bool[Any, "run step query"]:
        """Whether the loss after each step was recorded."""
        return np.isfinite(self.loss[:, 1:])

    @property
    def known_steps(self) -> Bool[Any, "run step"]:
        """Whether the losses of all queries after each step were recorded."""
        return np.asarray(self.known.all(axis=2))

    @property
    def residuals_known(self) -> bool:
        """Whether the residuals of all runs' examples are known."""
        return self.residual is not None and bool(np.isfinite(self.residual).all())

    @property
    def largest_step_size(self) -> float | None:
        """The unit of step sizes; None when none were recorded, or all are zero."""
        if self.step_size is None:
            return None
        return float(np.max(self.step_size, initial=0.0)) or None

    def take(self, runs: Int[Any, "*chosen"]) -> "RunArrays":
        """Some of the runs, or one."""
        step_size = None if self.step_size is None else self.step_size[runs]
        residual = None if self.residual is None else self.residual[runs]
        return self._replace(
            residual=residual,
            batch=self.batch[runs],
            weight=self.weight[runs],
            step_size=step_size,
            loss=self.loss[runs],
            progress=self.progress[runs],
        )

    def of_queries(self, positions: Int[Any, " chosen"]) -> "RunArrays":
        """The same runs with some of their queries."""
        return self._replace(loss=self.loss[..., positions], query=self.query[positions])

    def in_units(self, steps: int, largest_step_size: float | None) -> "RunArrays":
        """The same runs in the fitted runs' units of training time and of step sizes.

        Args:
            steps: of a fitted run.
            largest_step_size: of the fitted runs; None when they had none, so that step sizes are
                ignored.

        Raises:
            Misuse: no step sizes, where the fitted runs have them.
        """
        shape = self.batch.shape[:-1]
        progress = np.broadcast_to(np.arange(1, self.steps + 1) / steps, shape)
        if largest_step_size is None:
            return self._replace(progress=progress, step_size=np.ones(shape))
        if self.step_size is None:
            raise Misuse(
                "runs to simulate",
                got="no step_size",
                expected="the step sizes that training would use, as the fitted runs have them",
                do="pass step_size=... to runs_from_arrays or planned_runs",
            )
        return self._replace(progress=progress, step_size=self.step_size / largest_step_size)

    def exposures(self) -> Float[Array, "step train"]:
        """Of one run: how much of each example every step's batch holds."""
        batch, weight = jnp.asarray(self.batch), jnp.asarray(self.weight, float)
        residual = None if self.residual is None else jnp.asarray(self.residual, float)
        return exposures(batch, weight, self.train, residual)

    def each(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(run, *arguments)`` of each run; arguments have a leading axis of runs."""
        runs = (
            self.batch, self.weight, self.step_size, self.loss, self.progress, self.residual
        )  # fmt: skip

        def of_one(run: tuple[Any, ...], *arguments: Any) -> Any:
            batch, weight, step_size, loss, progress, residual = run
            alone = RunArrays(
                batch, weight, step_size, loss, self.query, self.features, progress, residual
            )
            return function(alone, *arguments)

        return jax.vmap(of_one)(runs, *arguments)
