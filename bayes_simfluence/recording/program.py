"""The compiled programs of a recording: some steps of several runs, and all queries as they go.

Written for one run; ``vmap`` and a mesh of devices stand outside. One program serves every stretch
of a recording: how many of its steps to take and after which to measure are its arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.recording.lengths import length_groups
from bayes_simfluence.tasks.task import Task

__all__ = [
    "Carry",
    "Fixed",
    "Measured",
    "Program",
    "StepSizeReader",
    "Training",
    "fixed_of",
    "measure_of",
    "training_loss",
]

AXIS = "run"
PartitionSpec: Any = jax.sharding.PartitionSpec
Shaped: Any = jax.ShapeDtypeStruct


class Carry(NamedTuple):
    """What training carries from step to step."""

    params: PyTree
    optimizer: PyTree
    taken: Int[Array, "*run"]


class Fixed(NamedTuple):
    """What all steps of all runs share. An argument: closed over, it would be a constant."""

    frozen: PyTree
    train: PyTree
    query: PyTree


class Measured(NamedTuple):
    """What a stretch of steps leaves behind; NaN where nothing was measured."""

    queries: dict[str, Float[Array, "*run step query"]]
    step_size: Float[Array, "*run step"]


StepSizeReader = Callable[[PyTree, Int[Array, ""]], Float[Array, ""]]
"""The step size from the optimizer's state and the number of steps taken before."""


@dataclass(frozen=True)
class Training:
    """How a task is trained and measured.

    Attributes:
        step_size: tells the learning rate of the step that was just made.
        query_chunk: queries measured at once, all when ``None``.
        accumulate: parts that a batch is split into, one gradient after the other.
        remat: keep only the products with weights for the backward pass and compute the rest
            again: less memory, more time. XLA's compiler for CPUs undoes it.
        always: queries are measured after every step.
    """

    task: Task
    optimizer: optax.GradientTransformation
    step_size: StepSizeReader
    query_chunk: int | None = None
    accumulate: int = 1
    remat: bool = False
    always: bool = True


@dataclass(frozen=True)
class Program:
    """A compiled stretch of steps.

    Attributes:
        runs: how many train in one call; all arguments and results but the shared ones have them
            as their leading axis.
        steps: most steps of one call.
        begin: the carry of runs that start from the task's parameters.
        place: shared arguments, put where the program wants them.
        advance: ``(carry, fixed, batches, looks, count) -> (carry, measured)``; takes ``count``
            steps, measures after those where ``looks``, and uses up the memory of ``carry``.
    """

    runs: int
    steps: int
    begin: Callable[[PyTree], Carry]
    place: Callable[[Fixed], Fixed]
    advance: Any

    @classmethod
    def of(
        cls,
        training: Training,
        slots: int,
        *,
        steps: int,
        parallel: int,
        devices: list[jax.Device],
    ) -> "Program":
        """Compile for ``parallel`` runs at once on each of ``devices``."""
        runs = parallel * len(devices)
        mesh = Mesh(np.asarray(devices), (AXIS,))
        over, everywhere = (NamedSharding(mesh, PartitionSpec(*one)) for one in ((AXIS,), ()))
        begin = jax.jit(partial(_begin, training.optimizer, runs), out_shardings=over)
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
        task, shapes = training.task, partial(_shaped, sharding=everywhere)
        advance = jax.jit(stretch, donate_argnums=0).lower(
            _shaped(jax.eval_shape(begin, task.params), over),
            shapes(fixed_of(task)),
            Shaped((runs, steps, slots), jnp.int32, sharding=over),
            Shaped((steps,), jnp.bool_, sharding=everywhere),
            Shaped((), jnp.int32, sharding=everywhere),
        )
        return cls(
            runs,
            steps,
            begin,
            lambda fixed: jax.device_put(fixed, everywhere),
            advance.compile(),
        )


def fixed_of(task: Task) -> Fixed:
    """The shared arguments of a task's programs."""
    return Fixed(task.frozen, task.train, task.query)


def measure_of(
    task: Task, chunk: int | None
) -> Callable[[PyTree, Fixed], dict[str, Float[Array, " query"]]]:
    """Loss and metrics of every query, ``chunk`` queries at once."""

    functions = {"loss": task.loss, **task.metrics}

    def of_group(weights: PyTree, examples: PyTree) -> dict[str, Float[Array, " some"]]:
        def of_one(example: PyTree) -> dict[str, Float[Array, ""]]:
            return {
                name: jnp.asarray(function(weights, example), jnp.float32)
                for name, function in functions.items()
            }

        if chunk is None or chunk >= len(jax.tree.leaves(examples)[0]):
            return jax.vmap(of_one)(examples)
        return jax.lax.map(of_one, examples, batch_size=chunk)

    def measure(params: PyTree, fixed: Fixed) -> dict[str, Float[Array, " query"]]:
        weights = task.weights(params, fixed.frozen)
        if task.cut is None or task.query_lengths is None:
            return of_group(weights, fixed.query)
        groups = length_groups(task.query_lengths)
        found = [
            of_group(weights, _cut(task.cut, length, fixed.query, np.array(members)))
            for length, members in groups
        ]
        order = np.argsort(np.concatenate([members for _, members in groups]))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *found)

    return measure


def _cut(
    cut: Callable[[PyTree, int], PyTree],
    length: int,
    examples: PyTree,
    members: Int[np.ndarray, " some"],
) -> PyTree:
    some = jax.tree.map(lambda leaf: leaf[members], examples)
    return jax.vmap(lambda example: cut(example, length))(some)


def training_loss(training: Training) -> Callable[[PyTree, PyTree], Float[Array, ""]]:
    """The loss of one training example, with less kept for its backward pass under ``remat``."""
    if not training.remat:
        return training.task.loss
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(training.task.loss, policy=policy)


def _stretch(training: Training, parallel: int, steps: int) -> Callable[..., Any]:
    """``parallel`` runs, with a leading axis of runs whatever their number."""
    one_run = _one_run(training, steps)
    if parallel > 1:
        return jax.vmap(one_run, in_axes=(0, None, 0, None, None))

    def alone(
        carry: Carry,
        fixed: Fixed,
        batches: Int[Array, "1 step slot"],
        looks: Bool[Array, " step"],
        count: Int[Array, ""],
    ) -> tuple[Carry, Measured]:
        mine = jax.tree.map(lambda leaf: leaf[0], (carry, batches))
        found = one_run(mine[0], fixed, mine[1], looks, count)
        return jax.tree.map(lambda leaf: leaf[None], found)

    return alone


def _one_run(training: Training, steps: int) -> Callable[..., tuple[Carry, Measured]]:
    task = training.task
    measure = measure_of(task, training.query_chunk)
    gradient = _gradient(training)

    def stretch(
        carry: Carry,
        fixed: Fixed,
        batches: Int[Array, "step slot"],
        looks: Bool[Array, " step"],
        count: Int[Array, ""],
    ) -> tuple[Carry, Measured]:
        shapes = jax.eval_shape(measure, carry.params, fixed)
        nothing = jax.tree.map(lambda one: jnp.full(one.shape, jnp.nan, one.dtype), shapes)

        def step(at: Int[Array, ""], state: tuple[Carry, Measured]) -> tuple[Carry, Measured]:
            (params, memory, taken), measured = state
            slope = gradient(params, fixed, batches[at])
            updates, memory = training.optimizer.update(slope, memory, params)
            params = optax.apply_updates(params, updates)
            if training.always:
                found = measure(params, fixed)
            else:
                # The runs share ``looks``, so this stays a branch under vmap.
                found = jax.lax.cond(looks[at], lambda: measure(params, fixed), lambda: nothing)
            seen = Measured(found, training.step_size(memory, taken))
            kept = jax.tree.map(lambda all, one: all.at[at].set(one), measured, seen)
            return Carry(params, memory, taken + 1), kept

        empty = Measured(
            jax.tree.map(lambda one: jnp.repeat(one[None], steps, axis=0), nothing),
            jnp.full(steps, jnp.nan),
        )
        return jax.lax.fori_loop(0, count, step, (carry, empty))

    return stretch


def _gradient(training: Training) -> Callable[[PyTree, Fixed, Int[Array, " slot"]], PyTree]:
    """The gradient of the mean loss over the filled slots of a batch, zero for an empty batch."""
    task, loss = training.task, training_loss(training)

    def share(
        params: PyTree, fixed: Fixed, members: Int[Array, " slot"], size: Int[Array, ""]
    ) -> Float[Array, ""]:
        """What some slots add to the mean loss of a batch that has ``size`` filled ones."""
        filled = members != EMPTY_SLOT
        examples = jax.tree.map(lambda leaf: leaf[jnp.where(filled, members, 0)], fixed.train)
        losses = jax.vmap(loss, in_axes=(None, 0))(task.weights(params, fixed.frozen), examples)
        return jnp.where(filled, losses, 0.0).sum() / size

    def gradient(params: PyTree, fixed: Fixed, members: Int[Array, " slot"]) -> PyTree:
        size = jnp.maximum((members != EMPTY_SLOT).sum(), 1)
        if training.accumulate == 1:
            return jax.grad(share)(params, fixed, members, size)
        parts = training.accumulate
        padded = jnp.pad(members, (0, -len(members) % parts), constant_values=EMPTY_SLOT)

        def add(total: PyTree, part: Int[Array, " slot"]) -> tuple[PyTree, None]:
            more = jax.grad(share)(params, fixed, part, size)
            return jax.tree.map(jnp.add, total, more), None

        zero = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zero, padded.reshape(parts, -1))[0]

    return gradient


def _begin(optimizer: optax.GradientTransformation, runs: int, params: PyTree) -> Carry:
    carry = Carry(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], runs, axis=0), carry)


def _shaped(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(
        lambda leaf: Shaped(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding),
        tree,
    )
