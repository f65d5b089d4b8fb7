"""The compiled part of a recording: some steps of several runs, and all queries as they go.

Written for one run; ``vmap`` and a mesh of devices stand outside. One compilation serves every
stretch of a recording: how many of its steps to take and after which of them to measure are
arguments. It serves further recordings too, of the same functions and shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.conventions import EMPTY_SLOT, OF_TRAINING
from bayes_simfluence.recording.measure import Fixed, fixed_of, measure_of
from bayes_simfluence.recording.settings import Placement
from bayes_simfluence.tasks.task import Functions, Task

AXIS = "run"
KEPT = 8
"""Compiled stretches that are kept for further recordings; they keep functions, no arrays."""
PartitionSpec: Any = jax.sharding.PartitionSpec
Shaped: Any = jax.ShapeDtypeStruct


class Batches(NamedTuple):
    """What some steps train on.

    Attributes:
        members: indices into the training examples, -1 = empty slot.
        weight: of the example in each slot, 0 in empty ones; ``None`` = all alike.
    """

    members: Int[Any, "*run slot"]
    weight: Float[Any, "*run slot"] | None = None

    @property
    def filled(self) -> Bool[Any, "*run slot"]:
        """Slots with an example that counts."""
        filled = self.members != EMPTY_SLOT
        return filled if self.weight is None else filled & (self.weight > 0)

    @property
    def total(self) -> Float[Array, ""] | Int[Array, ""]:
        """Sum of the weights of one batch; 1 if it is empty."""
        if self.weight is None:
            return jnp.maximum(self.filled.sum(), 1)
        total = self.weight.sum()
        return jnp.where(total > 0, total, 1.0)

    def sum_of(self, losses: Float[Array, " slot"]) -> Float[Array, ""]:
        """The weighted sum of the losses of one batch's examples."""
        weighted = losses if self.weight is None else self.weight * losses
        return jnp.where(self.filled, weighted, 0.0).sum()


class Carry(NamedTuple):
    """What training carries from step to step."""

    params: PyTree
    optimizer: PyTree
    taken: Int[Array, "*run"]


class Measured(NamedTuple):
    """What a stretch of steps leaves behind; NaN where nothing was measured.

    Attributes:
        queries: loss and metrics after each step.
        training: variables of ``kept_of`` the examples of each step, at the weights before it.
        step_size: of each step.
    """

    queries: dict[str, Float[Array, "*run step query"]]
    training: dict[str, Float[Array, "*run step slot"]]
    step_size: Float[Array, "*run step"]


Number: TypeAlias = Float[Array, ""]
Kept: TypeAlias = dict[str, Float[Array, "*slot"]]

StepSizeReader = Callable[[PyTree, Int[Array, ""]], Float[Array, ""]]
"""The step size from the optimizer's state and the number of steps taken before."""


@dataclass(frozen=True)
class Training:
    """How a task is trained and measured.

    Attributes:
        step_size: reads the learning rate of the step that was just made.
        placement: how a batch is split and its gradient taken, and how many queries are measured
            at once.
        weighted: whether batches come with weights.
        always: whether queries are measured after every step.
    """

    task: Functions
    optimizer: optax.GradientTransformation
    step_size: StepSizeReader
    placement: Placement = field(default_factory=Placement)
    weighted: bool = False
    always: bool = True


@dataclass(frozen=True)
class CompiledSteps:
    """A compiled stretch of steps.

    Attributes:
        runs: how many train in one call; all arguments and results but the shared ones have them
            as their leading axis.
        steps: most steps of one call.
        begin: the carry of runs that all start from one run's parameters.
        begin_each: the carry of runs with parameters of their own, stacked.
        measure: loss and metrics of every query, at one run's parameters.
        place: puts the shared arguments where the compiled steps want them.
        advance: ``(carry, fixed, batches, looks, count) -> (carry, measured)``; takes ``count``
            steps, measures after those where ``looks``, and uses up the memory of ``carry``.
    """

    runs: int
    steps: int
    begin: Callable[[PyTree], Carry]
    begin_each: Callable[[PyTree], Carry]
    measure: Callable[[PyTree, Fixed], dict[str, Float[Array, " query"]]]
    place: Callable[[Fixed], Fixed]
    advance: Any

    @classmethod
    def of(
        cls,
        training: Training,
        task: Task,
        slots: int,
        *,
        steps: int,
        parallel: int,
        devices: list[jax.Device],
    ) -> "CompiledSteps":
        """Compiled for ``parallel`` runs at once on each of ``devices``, now or by an earlier call.

        Args:
            task: whose functions ``training`` has; the shapes of its arrays are used.
        """
        arrays = task.params, fixed_of(task)
        shapes = jax.tree.map(lambda leaf: Shaped(jnp.shape(leaf), jnp.result_type(leaf)), arrays)
        leaves, structure = jax.tree.flatten(shapes)
        precision = jnp.result_type(float), jax.default_matmul_precision.value
        key = tuple(leaves), structure, (parallel, steps, slots), tuple(devices), precision
        return cls._of(training, *key)

    @classmethod
    @lru_cache(maxsize=KEPT)
    def _of(
        cls,
        training: Training,
        leaves: tuple[Shaped, ...],
        structure: Any,
        sizes: tuple[int, int, int],
        devices: tuple[jax.Device, ...],
        _precision: tuple[Any, ...],
    ) -> "CompiledSteps":
        parallel, steps, slots = sizes
        params, fixed = jax.tree.unflatten(structure, leaves)
        runs, slotted = parallel * len(devices), (parallel * len(devices), steps, slots)
        mesh = Mesh(np.asarray(devices), (AXIS,))
        over, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
        begin = jax.jit(partial(_begin, training.optimizer, runs), out_shardings=over)
        each = jax.vmap(partial(_carry, training.optimizer))
        begin_each = jax.jit(each, out_shardings=over)
        stretch = _stretch(training, parallel, steps)
        if len(devices) > 1:
            split, whole = over.spec, everywhere.spec
            stretch = jax.shard_map(
                stretch,
                mesh=mesh,
                in_specs=(split, whole, split, whole, whole),
                out_specs=(split, split),
                check_vma=False,
            )
        advance = jax.jit(stretch, donate_argnums=0).lower(
            _shaped(jax.eval_shape(begin, params), over),
            _shaped(fixed, everywhere),
            Batches(
                Shaped(slotted, jnp.int32, sharding=over),
                Shaped(slotted, jnp.float32, sharding=over) if training.weighted else None,
            ),
            Shaped((steps,), jnp.bool_, sharding=everywhere),
            Shaped((), jnp.int32, sharding=everywhere),
        )
        measure = jax.jit(measure_of(training.task, training.placement.query_chunk))
        place = partial(jax.device_put, device=everywhere)
        return cls(runs, steps, begin, begin_each, measure, place, advance.compile())


def kept_of(task: Task | Functions) -> tuple[str, ...]:
    """Which variables of ``OF_TRAINING`` a step leaves behind: the residual where the task has it.

    Everybody else has it from the loss, by ``data.training.residuals_of``.
    """
    return OF_TRAINING if task.output_residual is not None else OF_TRAINING[:1]


def training_loss(training: Training) -> Callable[[PyTree, PyTree], tuple[Number, Kept]]:
    """The loss of one training example, and what is kept of its forward pass, by name.

    Less is kept for the backward pass under ``remat``: only the products with weights, the rest is
    computed again.
    """
    task = training.task

    def loss(weights: PyTree, example: PyTree) -> tuple[Number, Kept]:
        nats = task.loss(weights, example)
        return nats, {"train_loss": nats}

    def both(weights: PyTree, example: PyTree) -> tuple[Number, Kept]:
        outputs = task.outputs(weights, example)  # type: ignore[misc]
        nats = task.output_loss(outputs, example)  # type: ignore[misc]
        residual = task.output_residual(outputs, example)  # type: ignore[misc]
        return nats, {"train_loss": nats, "train_residual": residual}

    of_example = loss if task.output_residual is None else both
    if not training.placement.remat:
        return of_example
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(of_example, policy=policy)


def _stretch(training: Training, parallel: int, steps: int) -> Callable[..., Any]:
    """``parallel`` runs, with a leading axis of runs whatever their number."""
    one_run = _one_run(training, steps)
    if parallel > 1:
        return jax.vmap(one_run, in_axes=(0, None, 0, None, None))

    def alone(carry: Carry, fixed: Fixed, batches: Batches, *when: Array) -> tuple[Carry, Measured]:
        carry, batches = jax.tree.map(lambda leaf: leaf[0], (carry, batches))
        ended = one_run(carry, fixed, batches, *when)
        return jax.tree.map(lambda leaf: leaf[None], ended)

    return alone


def _one_run(training: Training, steps: int) -> Callable[..., tuple[Carry, Measured]]:
    measure = measure_of(training.task, training.placement.query_chunk)
    gradient = _gradient(training)

    def stretch(
        carry: Carry,
        fixed: Fixed,
        batches: Batches,
        looks: Bool[Array, " step"],
        count: Int[Array, ""],
    ) -> tuple[Carry, Measured]:
        shapes = jax.eval_shape(measure, carry.params, fixed)
        nothing = jax.tree.map(lambda shape: jnp.full(shape.shape, jnp.nan, shape.dtype), shapes)

        def step(at: Int[Array, ""], state: tuple[Carry, Measured]) -> tuple[Carry, Measured]:
            (params, memory, taken), measured = state
            slope, kept = gradient(params, fixed, jax.tree.map(lambda leaf: leaf[at], batches))
            updates, memory = training.optimizer.update(slope, memory, params)
            params = optax.apply_updates(params, updates)
            if training.always:
                queries = measure(params, fixed)
            else:
                # The runs share ``looks``, so this stays a branch under vmap.
                queries = jax.lax.cond(looks[at], lambda: measure(params, fixed), lambda: nothing)
            seen = Measured(queries, kept, training.step_size(memory, taken))
            measured = jax.tree.map(lambda rows, row: rows.at[at].set(row), measured, seen)
            return Carry(params, memory, taken + 1), measured

        empty = Measured(
            jax.tree.map(lambda row: jnp.repeat(row[None], steps, axis=0), nothing),
            {
                name: jnp.full(batches.members.shape, jnp.nan, jnp.float32)
                for name in kept_of(training.task)
            },
            jnp.full(steps, jnp.nan),
        )
        return jax.lax.fori_loop(0, count, step, (carry, empty))

    return stretch


def _gradient(training: Training) -> Callable[[PyTree, Fixed, Batches], tuple[PyTree, Kept]]:
    """The gradient of the weighted mean loss of a batch, zero for an empty batch.

    Beside it what is kept of the forward pass of each slot, NaN where no example counts.
    """
    task, loss = training.task, training_loss(training)

    def share(
        params: PyTree, fixed: Fixed, part: Batches, total: Float[Array, ""] | Int[Array, ""]
    ) -> tuple[Number, Kept]:
        """What some slots add to the mean loss of a batch whose weights sum to ``total``."""
        places = jnp.where(part.filled, part.members, 0)
        examples = jax.tree.map(lambda leaf: leaf[places], fixed.train)
        weights = task.weights(params, fixed.frozen)
        losses, kept = jax.vmap(loss, in_axes=(None, 0))(weights, examples)
        kept = {
            name: jnp.where(part.filled, values.astype(jnp.float32), jnp.nan)
            for name, values in kept.items()
        }
        return part.sum_of(losses) / total, kept

    def gradient(params: PyTree, fixed: Fixed, batch: Batches) -> tuple[PyTree, Kept]:
        total, parts, slots = batch.total, training.placement.accumulate, len(batch.members)
        if parts == 1:
            return jax.grad(share, has_aux=True)(params, fixed, batch, total)
        missing = (0, -slots % parts)
        padded = Batches(
            jnp.pad(batch.members, missing, constant_values=EMPTY_SLOT),
            None if batch.weight is None else jnp.pad(batch.weight, missing),
        )

        def add(summed: PyTree, part: Batches) -> tuple[PyTree, Kept]:
            more, kept = jax.grad(share, has_aux=True)(params, fixed, part, total)
            return jax.tree.map(jnp.add, summed, more), kept

        zero = jax.tree.map(jnp.zeros_like, params)
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1), padded)
        slope, kept = jax.lax.scan(add, zero, split)
        return slope, jax.tree.map(lambda rows: rows.reshape(-1)[:slots], kept)

    return gradient


def _carry(optimizer: optax.GradientTransformation, params: PyTree) -> Carry:
    return Carry(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def _begin(optimizer: optax.GradientTransformation, runs: int, params: PyTree) -> Carry:
    carry = _carry(optimizer, params)
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], runs, axis=0), carry)


def _shaped(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda leaf: Shaped(leaf.shape, leaf.dtype, sharding=sharding), tree)
