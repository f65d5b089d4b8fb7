"""Reads from a function's trace how it uses its parameters.

The function is traced for one example, and the trace is run again equation by equation, whatever
network it is of. ``jax.vmap``, ``jax.jit``, transposes and a second use of the same matrix are seen
through, and a bias is recognised by being added to the product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

CALLS = ("jit", "pjit")
"""Primitives that run a trace of their own."""

SAME = ("convert_element_type", "copy")
"""Primitives whose result is the same value, in another type or place."""


class Use(NamedTuple):
    """One place where a parameter of two axes multiplies vectors or gives rows.

    Attributes:
        leaf: number of the parameter among the leaves.
        kind: ``left``: the matrix is outward x inward, ``right``: inward x outward, ``rows``: its
            rows are taken.
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
    """Marks a value that is a parameter.

    Attributes:
        turned: whether a matrix is transposed.
        axis: along which a vector lies in the value; None for a matrix.
    """

    leaf: int
    turned: bool = False
    axis: int | None = None


class _Left(NamedTuple):
    """Marks a value that left a use, by number; its vectors lie along the axis."""

    use: int
    axis: int


class _Place(NamedTuple):
    """An equation that is a use, what enters, and whether the matrix is its first operand."""

    use: Use
    entered: Array
    first: bool


_Pair = tuple[Any, Any]
"""A value, and its mark: ``_Held``, ``_Left`` or None."""


def trace_bytes(closed: ClosedJaxpr) -> int:
    """Bytes of everything that a trace computes: a bound of what its gradient keeps."""
    total = 0
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name in CALLS:
            total += trace_bytes(equation.params["jaxpr"])
        else:
            total += sum(atom.aval.size * atom.aval.dtype.itemsize for atom in equation.outvars)
    return total


@dataclass
class Reader:
    """Runs a trace, equation by equation, and notes how it uses its parameters.

    Attributes:
        uses: of matrices, as they come.
        others: numbers of parameters that are used in another way.
        added: for each use, what becomes of its product each time that it is read: the number of
            the vector that is added to it, None for anything else.
    """

    watch: Watch
    uses: list[Use] = field(default_factory=list)
    others: set[int] = field(default_factory=set)
    added: list[list[int | None]] = field(default_factory=list)

    def outputs(self, closed: ClosedJaxpr, leaves: int, args: Sequence[Any]) -> list[Any]:
        """What the trace returns; the first ``leaves`` arguments are parameters."""
        pairs: list[_Pair] = [(arg, None) for arg in args]
        for at, arg in enumerate(args[:leaves]):
            pairs[at] = arg, _Held(at, axis=0 if arg.ndim == 1 else None)
        results = self._run(closed, pairs)
        self._read_otherwise(results)
        return [value for value, _ in results]

    def bias_of(self, uses: Sequence[int]) -> int | None:
        """The vector that is added to the products of these uses and is used nowhere else."""
        biases = {bias for at in uses for bias in self.added[at]}
        alone = all(len(self.added[at]) == 1 for at in uses) and len(biases) == 1
        bias = biases.pop() if alone else None
        elsewhere = any(bias in added for at, added in enumerate(self.added) if at not in uses)
        return None if bias in self.others or elsewhere else bias

    def _run(self, closed: ClosedJaxpr, args: Sequence[_Pair]) -> list[_Pair]:
        jaxpr = closed.jaxpr
        known: dict[Any, _Pair] = dict(zip(jaxpr.invars, args, strict=True))
        constants = zip(jaxpr.constvars, closed.consts, strict=True)
        known.update((atom, (value, None)) for atom, value in constants)

        def read(atom: Any) -> _Pair:
            return (atom.val, None) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            pairs = [read(atom) for atom in equation.invars]
            parameters = any(isinstance(mark, _Held) for _, mark in pairs)
            if parameters and equation.primitive.name in CALLS:
                results = self._run(equation.params["jaxpr"], pairs)
            else:
                results = self._equation(jaxpr, equation, pairs)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, jaxpr: Any, equation: Any, pairs: Sequence[_Pair]) -> list[_Pair]:
        results = _bound(jaxpr, equation, pairs)
        marks = [mark for _, mark in pairs if mark is not None]
        if not marks:
            return results
        alias = _alias(equation, marks)
        if alias is not None:
            return [(results[0][0], alias)]
        place = _use_of(equation, pairs)
        if place is not None:
            self._read_otherwise([pair for pair in pairs if isinstance(pair[1], _Left)])
            return [self._used(place, results[0][0])]
        if not self._bias_added(equation, marks):
            self._read_otherwise(pairs)
        return results

    def _used(self, place: _Place, left: Array) -> _Pair:
        self.uses.append(place.use)
        self.added.append([])
        # The matrix's free axis comes first in the product when the matrix is the first operand.
        axis = 0 if place.first else left.ndim - 1
        moved = jnp.moveaxis(left, axis, -1)
        watched = self.watch(place.use, place.entered, moved.reshape(-1, place.use.outward))
        left = jnp.moveaxis(watched.reshape(moved.shape), -1, axis)
        return left, _Left(len(self.uses) - 1, axis)

    def _bias_added(self, equation: Any, marks: Sequence[Any]) -> bool:
        vectors = [mark for mark in marks if isinstance(mark, _Held)]
        products = [mark for mark in marks if isinstance(mark, _Left)]
        alone = len(vectors) == 1 and len(products) == 1
        if equation.primitive.name != "add" or not alone or vectors[0].axis != products[0].axis:
            return False
        self.added[products[0].use].append(vectors[0].leaf)
        return True

    def _read_otherwise(self, pairs: Sequence[_Pair]) -> None:
        for _, mark in pairs:
            if isinstance(mark, _Held):
                self.others.add(mark.leaf)
            elif isinstance(mark, _Left):
                self.added[mark.use].append(None)


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
    results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*values.values())
    return [(result, None) for result in results]


def _alias(equation: Any, marks: Sequence[_Held | _Left]) -> _Held | _Left | None:
    """The mark of the result of an equation that only moves or converts a marked value."""
    (before, *others), mark = (atom.aval for atom in equation.invars), marks[0]
    after, name = equation.outvars[0].aval, equation.primitive.name
    if others or not jnp.issubdtype(after.dtype, jnp.floating):
        return None
    if name in SAME:
        return mark
    if name == "transpose":
        order = equation.params["permutation"]
        if mark.axis is None:
            return mark._replace(turned=mark.turned ^ (order == (1, 0)))
        return mark._replace(axis=order.index(mark.axis))
    if name == "broadcast_in_dim" and isinstance(mark, _Held) and mark.axis is not None:
        axis = equation.params["broadcast_dimensions"][mark.axis]
        return mark._replace(axis=axis) if after.shape[axis] == before.shape[mark.axis] else None
    return None


def _use_of(equation: Any, pairs: Sequence[_Pair]) -> _Place | None:
    """The use that an equation is; None when it is none."""
    held = [at for at, (_, mark) in enumerate(pairs) if isinstance(mark, _Held)]
    if len(held) != 1 or pairs[held[0]][0].ndim != 2:
        return None
    if equation.primitive.name == "dot_general":
        return _product(equation, pairs, held[0])
    if equation.primitive.name == "gather" and held == [0]:
        return _rows(equation, pairs)
    return None


def _product(equation: Any, pairs: Sequence[_Pair], place: int) -> _Place | None:
    contracting, batch = equation.params["dimension_numbers"]
    (weight, held), (value, _) = pairs[place], pairs[1 - place]
    if held.axis is not None or any(batch) or len(contracting[0]) != 1:
        return None
    inner, entering = contracting[place][0], contracting[1 - place][0]
    outward, inward = weight.shape[1 - inner], weight.shape[inner]
    entered = jnp.moveaxis(value, entering, -1).reshape(-1, inward)
    kind = "right" if (inner == 0) != held.turned else "left"
    dtype = equation.outvars[0].aval.dtype
    return _Place(Use(held.leaf, kind, len(entered), outward, dtype), entered, place == 0)


def _rows(equation: Any, pairs: Sequence[_Pair]) -> _Place | None:
    (table, held), (numbers, _) = pairs[:2]
    axes, left = equation.params["dimension_numbers"], equation.outvars[0].aval
    whole_rows = (
        held.axis is None
        and not held.turned
        and axes.collapsed_slice_dims == (0,)
        and axes.start_index_map == (0,)
        and axes.offset_dims == (left.ndim - 1,)
        and not axes.operand_batching_dims
        and equation.params["slice_sizes"] == (1, table.shape[1])
    )
    if not whole_rows:
        return None
    # Outside of the table gathering repeats the last row, or makes NaN, which is noticed later.
    entered = jnp.clip(numbers.reshape(-1), 0, len(table) - 1)
    use = Use(held.leaf, "rows", len(entered), left.shape[-1], left.dtype)
    return _Place(use, entered, first=False)
