"""What is trained and what is measured: parameters, a loss of one example, and the examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse, hashable

Params = Any
Example = Any


class Functions(NamedTuple):
    """The functions of a task, by which compiled programs are told apart; named as in ``Task``.

    JAX keeps programs, and what they were compiled for, until ``jax.clear_caches()``: functions
    that close over weights keep those too.
    """

    loss: Callable[[Params, Example], Float[Array, ""]]
    assemble: Callable[[Params, Params], Params] | None
    cut: Callable[[Example, int], Example] | None
    outputs: Callable[[Params, Example], Float[Array, "..."]] | None
    output_loss: Callable[[Float[Array, "..."], Example], Float[Array, ""]] | None
    output_draw: Callable[[Float[Array, "..."], Example, jax.Array], Float[Array, "..."]] | None
    output_residual: Callable[[Float[Array, "..."], Example], Float[Array, ""]] | None
    query_lengths: tuple[int, ...] | None
    metrics: tuple[tuple[str, Callable[[Params, Example], Float[Array, ""]]], ...]

    def weights(self, params: Params, frozen: Params) -> Params:
        """What ``loss`` takes: the trained parameters in their place among the frozen weights.

        Compiled programs take ``frozen`` as an argument: closed over, it would be a constant.
        """
        return params if self.assemble is None else self.assemble(params, frozen)

    def loss_at(self, params: Params, frozen: Params, example: Example) -> Float[Array, ""]:
        """The loss of one example."""
        return self.loss(self.weights(params, frozen), example)

    def outputs_at(self, params: Params, frozen: Params, example: Example) -> Float[Array, "..."]:
        """The outputs of one example; the task has them."""
        return self.outputs(self.weights(params, frozen), example)  # type: ignore[misc]


@dataclass(frozen=True)
class Task:
    """A training problem in JAX; any model fits it that is a function of its parameters.

    Attributes:
        params: the initial weights, a pytree of floating arrays; every run starts from them.
        loss: ``loss(weights, example) -> nats`` of ONE example, pure and differentiable; the
            weights are ``params``, or what ``assemble`` makes of them.
        train, query: examples, pytrees whose leaves have a leading axis of examples.
        train_ids, query_ids: stable ids of the examples.
        provenance: where the task comes from; goes into the store's attributes.
        frozen: weights that do not train, handed to ``assemble``.
        assemble: ``assemble(params, frozen) -> weights``, pure; adapters and heads are trained by
            it, and no gradient or optimizer state is kept for what is frozen.
        metrics: name -> ``metric(weights, example) -> number`` of one query, recorded beside its
            loss: accuracy, margin.
        scores: name -> ``score(weights) -> numbers, one per query``, any Python: metrics of
            generated text, computed between compiled steps.
        query_lengths, cut: how much of each padded query is filled, and ``cut(example, length) ->
            example`` without what lies beyond; queries of like length are then measured in
            smaller arrays. Loss and metrics must not depend on the padding.
        outputs, output_loss: the loss in two parts, ``loss(weights, example) ==
            output_loss(outputs(weights, example), example)`` with one array between them (logits)
            in which the second part is convex; Gauss-Newton curvature is made of them.
        output_draw: ``output_draw(outputs, example, key)``, a random array of mean 0 whose
            covariance is the Hessian of ``output_loss``; for outputs so many that their Hessian
            is too large to write out.
        output_residual: ``output_residual(outputs, example) -> share``, what is missing of the
            target's probability, where that is not ``1 - exp(-loss)``: the mean over target tokens
            for text. Recorded beside each training example's loss, from the same outputs.

        fresh: ``fresh(params, key) -> params``, other initial weights like the first ones: a fresh
            head, or all of them drawn anew; ``record(..., starts=...)`` begins runs from them.

    >>> import jax.numpy as jnp
    >>> task = Task(
    ...     params={"mean": jnp.zeros(())},
    ...     loss=lambda params, example: (params["mean"] - example) ** 2,
    ...     train=jnp.arange(4.0), query=jnp.array([1.5]),
    ...     train_ids=list("abcd"), query_ids=["q"])
    >>> task.validate() is task
    True
    """

    params: Params
    loss: Callable[[Params, Example], Float[Array, ""]]
    train: Example
    query: Example
    train_ids: Sequence[Any]
    query_ids: Sequence[Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    frozen: Params = None
    assemble: Callable[[Params, Params], Params] | None = None
    metrics: Mapping[str, Callable[[Params, Example], Float[Array, ""]]] = field(
        default_factory=dict
    )
    scores: Mapping[str, Callable[[Params], Float[np.ndarray, " query"]]] = field(
        default_factory=dict
    )

    query_lengths: Sequence[int] | None = None
    cut: Callable[[Example, int], Example] | None = None
    outputs: Callable[[Params, Example], Float[Array, "..."]] | None = None
    output_loss: Callable[[Float[Array, "..."], Example], Float[Array, ""]] | None = None
    output_draw: Callable[[Float[Array, "..."], Example, jax.Array], Float[Array, "..."]] | None = (
        None
    )
    output_residual: Callable[[Float[Array, "..."], Example], Float[Array, ""]] | None = None
    fresh: Callable[[Params, jax.Array], Params] | None = None

    @property
    def functions(self) -> Functions:
        """The task without its arrays and ids.

        Raises:
            Misuse: a function that cannot be hashed.
        """
        lengths = None if self.query_lengths is None else tuple(map(int, self.query_lengths))
        named = {name: getattr(self, name) for name in Functions._fields}
        named |= {"metrics": tuple(self.metrics.items()), "query_lengths": lengths}
        for name, part in {**self.metrics, **named}.items():
            hashable(f"task.{name}", part)
        return Functions(**named)

    def weights(self, params: Params, frozen: Params) -> Params:
        """What ``loss`` takes, as ``Functions.weights``."""
        return self.functions.weights(params, frozen)

    def validate(self) -> "Task":
        """The task itself when its parts fit together.

        Raises:
            Misuse: arrays and ids of different length, parameters that are not floating, a loss
                that is not one number for one example or cannot be hashed, outputs that do not
                fit their loss.
        """
        for name in ("train", "query"):
            _leading(name, getattr(self, name), len(getattr(self, f"{name}_ids")))
        if self.query_lengths is not None or self.cut is not None:
            _lengths(self.query_lengths, self.cut, len(self.query_ids))
        for path, leaf in jax.tree.leaves_with_path(self.params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise Misuse(
                    f"task.params{jax.tree_util.keystr(path)}",
                    got=f"dtype {jnp.result_type(leaf)}",
                    expected="floating weights only",
                    do="close over integer arrays in the loss instead",
                )
        example = jax.tree.map(lambda leaf: leaf[0], self.query)
        weights = jax.eval_shape(self.functions.weights, self.params, self.frozen)
        for name, function in (("loss", self.loss), *self.metrics.items()):
            _number(name, jax.eval_shape(function, weights, example))
        parts = (self.outputs, self.output_loss, self.output_residual)
        if any(part is not None for part in parts):
            _outputs(self, weights, example)
        return self


def _number(name: str, shape: Any) -> None:
    if getattr(shape, "shape", None) != ():
        raise Misuse(
            f"task.{name}",
            got=f"{shape}",
            expected="one number for one example",
            do="write it for a single example; record maps it over batches",
        )


def _outputs(task: Task, weights: Params, example: Example) -> None:
    if task.outputs is None or task.output_loss is None:
        given = ("outputs", "output_loss", "output_residual")
        names = [name for name in given if getattr(task, name) is not None]
        raise Misuse(
            "task.outputs",
            got=f"task.{' and task.'.join(names)} alone",
            expected="both parts of the loss",
            do="give task.outputs and task.output_loss, or neither",
        )
    logits = jax.eval_shape(task.outputs, weights, example)
    if not (hasattr(logits, "dtype") and jnp.issubdtype(logits.dtype, jnp.floating)):
        raise Misuse(
            "task.outputs",
            got=f"{logits}",
            expected="one floating array for one example",
            do="return the logits alone",
        )
    _number("output_loss", jax.eval_shape(task.output_loss, logits, example))
    if task.output_residual is not None:
        _number("output_residual", jax.eval_shape(task.output_residual, logits, example))


def _lengths(lengths: Sequence[int] | None, cut: Any, queries: int) -> None:
    if cut is None or lengths is None or len(lengths) != queries or min(lengths) < 1:
        raise Misuse(
            "task.query_lengths",
            got="no lengths" if lengths is None else f"{len(lengths)} lengths, cut = {cut}",
            expected=f"{queries} lengths of at least 1, and task.cut",
            do="give both or neither",
        )


def _leading(name: str, examples: Example, size: int) -> None:
    leaves = jax.tree.leaves(examples)
    lengths = sorted({len(leaf) if jnp.ndim(leaf) else 0 for leaf in leaves})
    if size == 0 or lengths != [size]:
        raise Misuse(
            f"task.{name}",
            got=f"leading axes {lengths} and {size} ids",
            expected="the same number, at least 1",
            do="give every leaf a leading axis of examples and every example an id",
        )
