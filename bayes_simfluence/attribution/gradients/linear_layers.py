"""How a loss uses its parameters, read from its trace.

A matrix that only multiplies vectors, or only gives rows, has a gradient of low rank: what entered
the product (or which rows were taken) and the gradient of what left it say all of it. Both are
found here for any function in JAX: it is traced for one example and run again equation by equation;
``jax.vmap``, ``jax.jit``, transposes and a second use of the same matrix are seen through.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

__all__ = ["Use", "Watch", "rerun", "trace_bytes", "uses_of"]

CALLS = ("jit", "pjit")
"""Primitives that run a trace of their own."""

ALIASES = ("transpose", "convert_element_type", "copy")
"""Primitives whose result is still the parameter."""


class Use(NamedTuple):
    """One place where a parameter of two axes multiplies vectors or gives rows.

    Attributes:
        leaf: number of the parameter among the leaves.
        kind: ``left``: it is outward x inward, ``right``: inward x outward, ``rows``: its rows are
            taken.
        tokens: vectors that are multiplied, or rows that are taken.
        outward: length of what leaves.
        dtype: of what leaves.
    """

    leaf: int
    kind: str
    tokens: int
    outward: int
    dtype: Any


Watch = Callable[[Use, Array, Array], Array]
"""A use, what enters (token x inward, or numbers of rows), what leaves (token x outward) -> what is
to leave instead."""


class _Held(NamedTuple):
    """A value that is a parameter, or its transpose."""

    leaf: int
    turned: bool


_Pair = tuple[Any, _Held | None]


def uses_of(closed: ClosedJaxpr, leaves: int) -> tuple[list[Use], set[int]]:
    """The uses of the first ``leaves`` arguments of a trace, and those used in any other way."""
    found: list[Use] = []
    others: set[int] = set()

    def watch(use: Use, entered: Array, left: Array) -> Array:
        found.append(use)
        return left

    jax.eval_shape(lambda *args: rerun(closed, leaves, args, watch, others.add), *closed.in_avals)
    return found, others


def rerun(
    closed: ClosedJaxpr,
    leaves: int,
    args: Sequence[Any],
    watch: Watch,
    otherwise: Callable[[int], Any] = lambda leaf: None,
) -> list[Any]:
    """What a traced function returns, while ``watch`` sees the uses of its parameters.

    Args:
        leaves: how many of the arguments are parameters; they come first.
        otherwise: told of the number of a parameter that is used in another way.
    """
    pairs = [(one, _Held(at, False) if at < leaves else None) for at, one in enumerate(args)]
    return [value for value, _ in _run(closed, pairs, watch, otherwise)]


def trace_bytes(closed: ClosedJaxpr) -> int:
    """Bytes of everything that a trace computes: a bound of what its gradient keeps."""
    total = 0
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name in CALLS:
            total += trace_bytes(equation.params["jaxpr"])
        else:
            total += sum(one.aval.size * one.aval.dtype.itemsize for one in equation.outvars)
    return total


def _run(
    closed: ClosedJaxpr, args: Sequence[_Pair], watch: Watch, otherwise: Callable[[int], Any]
) -> list[_Pair]:
    jaxpr = closed.jaxpr
    known: dict[Any, _Pair] = dict(zip(jaxpr.invars, args, strict=True))
    known.update(
        (one, (value, None)) for one, value in zip(jaxpr.constvars, closed.consts, strict=True)
    )

    def read(atom: Any) -> _Pair:
        return (atom.val, None) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        pairs = [read(one) for one in equation.invars]
        held = [one for _, one in pairs if one is not None]
        if held and equation.primitive.name in CALLS:
            results = _run(equation.params["jaxpr"], pairs, watch, otherwise)
        else:
            results = _bound(jaxpr, equation, pairs)
            alias = _alias(equation, held)
            if alias is not None:
                results = [(results[0][0], alias)]
            elif held:
                left = _used(equation, pairs, results[0][0], watch)
                if left is None:
                    for one in held:
                        otherwise(one.leaf)
                else:
                    results = [(left, None)]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(one) for one in jaxpr.outvars]


def _bound(jaxpr: Any, equation: Any, pairs: Sequence[_Pair]) -> list[_Pair]:
    """What one equation gives, run as a trace of its own."""
    values = {
        atom: value
        for atom, (value, _) in zip(equation.invars, pairs, strict=True)
        if not isinstance(atom, Literal)
    }
    alone = jaxpr.replace(
        constvars=[], invars=list(values), outvars=equation.outvars, eqns=[equation]
    )
    found = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*values.values())
    return [(one, None) for one in found]


def _alias(equation: Any, held: Sequence[_Held]) -> _Held | None:
    name = equation.primitive.name
    shape, dtype = equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
    if (
        not held
        or name not in ALIASES
        or len(shape) != 2
        or not jnp.issubdtype(dtype, jnp.floating)
    ):
        return None
    turns = name == "transpose" and equation.params["permutation"] == (1, 0)
    return _Held(held[0].leaf, held[0].turned ^ turns)


def _used(equation: Any, pairs: Sequence[_Pair], left: Array, watch: Watch) -> Array | None:
    """What leaves a watched use; None when the equation is none."""
    name = equation.primitive.name
    if name == "dot_general" and sum(one is not None for _, one in pairs) == 1:
        return _product(equation, pairs, left, watch)
    if name == "gather" and pairs[0][1] is not None and not pairs[0][1].turned:
        return _rows(equation, pairs, left, watch)
    return None


def _product(equation: Any, pairs: Sequence[_Pair], left: Array, watch: Watch) -> Array | None:
    contracting, batch = equation.params["dimension_numbers"]
    place = 0 if pairs[0][1] is not None else 1
    (weight, held), (value, _) = pairs[place], pairs[1 - place]
    if held is None or weight.ndim != 2 or any(batch) or len(contracting[0]) != 1:
        return None
    inner, entering = contracting[place][0], contracting[1 - place][0]
    outward, inward = weight.shape[1 - inner], weight.shape[inner]
    entered = jnp.moveaxis(value, entering, -1).reshape(-1, inward)
    kind = "right" if (inner == 0) != held.turned else "left"
    use = Use(held.leaf, kind, len(entered), outward, left.dtype)
    # The weight's free axis comes first in the result when the weight is the first operand.
    if place == 0:
        turned = watch(use, entered, left.reshape(outward, -1).T)
        return turned.T.reshape(left.shape)
    return watch(use, entered, left.reshape(-1, outward)).reshape(left.shape)


def _rows(equation: Any, pairs: Sequence[_Pair], left: Array, watch: Watch) -> Array | None:
    (table, held), (numbers, _) = pairs[:2]
    axes = equation.params["dimension_numbers"]
    whole_rows = (
        held is not None
        and table.ndim == 2
        and axes.collapsed_slice_dims == (0,)
        and axes.start_index_map == (0,)
        and axes.offset_dims == (left.ndim - 1,)
        and not axes.operand_batching_dims
        and equation.params["slice_sizes"] == (1, table.shape[1])
    )
    if held is None or not whole_rows:
        return None
    # Outside of the table gathering repeats the last row, or makes NaN, which is found later.
    entered = jnp.clip(numbers.reshape(-1), 0, len(table) - 1)
    use = Use(held.leaf, "rows", len(entered), left.shape[-1], left.dtype)
    return watch(use, entered, left.reshape(-1, use.outward)).reshape(left.shape)
