"""Loss and metrics of every query; queries of like length in arrays without most padding."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bayes_simfluence.tasks.task import Functions, Task

GROUPS = 3
"""Most groups, since each is compiled separately."""
MULTIPLE = 8
"""Lengths are rounded up to a multiple of it; odd shapes are no faster."""


class Fixed(NamedTuple):
    """What all steps of all runs share. An argument: closed over, it would be a constant."""

    frozen: PyTree
    train: PyTree
    query: PyTree


def fixed_of(task: Task) -> Fixed:
    """The arrays of a task that all steps of all runs share."""
    return Fixed(task.frozen, task.train, task.query)


def measure_of(
    task: Functions, chunk: int | None
) -> Callable[[PyTree, Fixed], dict[str, Float[Array, " query"]]]:
    """What measures the loss and metrics of every query, ``chunk`` queries at once."""
    functions = {"loss": task.loss, **dict(task.metrics)}

    def of_group(weights: PyTree, examples: PyTree) -> dict[str, Float[Array, " some"]]:
        def of_query(example: PyTree) -> dict[str, Float[Array, ""]]:
            return {
                name: jnp.asarray(function(weights, example), jnp.float32)
                for name, function in functions.items()
            }

        if chunk is None or chunk >= len(jax.tree.leaves(examples)[0]):
            return jax.vmap(of_query)(examples)
        return jax.lax.map(of_query, examples, batch_size=chunk)

    def measure(params: PyTree, fixed: Fixed) -> dict[str, Float[Array, " query"]]:
        weights = task.weights(params, fixed.frozen)
        if task.cut is None or task.query_lengths is None:
            return of_group(weights, fixed.query)
        groups = length_groups(task.query_lengths)
        measured = [
            of_group(weights, _cut(task.cut, length, fixed.query, np.array(members)))
            for length, members in groups
        ]
        order = np.argsort(np.concatenate([members for _, members in groups]))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *measured)

    return measure


def length_groups(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Length to cut to and positions of each group; together they hold the least padding.

    >>> length_groups([5, 30, 9, 8, 14])
    [(8, [0, 3]), (16, [2, 4]), (32, [1])]
    """
    step = max(MULTIPLE, max(lengths) // 128 * MULTIPLE)
    rounded = -(-np.asarray(lengths) // step) * step
    kinds, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])

    def filled(tops: tuple[int, ...]) -> int:
        """Elements of all groups when these kinds are the longest of theirs."""
        edges = [0, *(top + 1 for top in tops)]
        sizes = np.diff(below[edges])
        return int(sizes @ kinds[list(tops)])

    last = len(kinds) - 1
    choices: list[tuple[int, ...]] = [
        (*tops, last)
        for count in range(min(GROUPS, len(kinds)))
        for tops in combinations(range(last), count)
    ]
    best = min(choices, key=filled)
    tops = kinds[list(best)]
    group = np.searchsorted(tops, rounded)
    return [(int(top), np.flatnonzero(group == at).tolist()) for at, top in enumerate(tops)]


def _cut(
    cut: Callable[[PyTree, int], PyTree],
    length: int,
    examples: PyTree,
    members: Int[np.ndarray, " some"],
) -> PyTree:
    some = jax.tree.map(lambda leaf: leaf[members], examples)
    return jax.vmap(lambda example: cut(example, length))(some)
