"""Errors that name what was got, what was expected and what to do, and checks that raise them."""

import math
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import numpy as np

Value = TypeVar("Value")


class Misuse(ValueError):
    """A request that cannot be carried out; raised before any work starts.

    The message is a single line: its subject, what was got, what is expected, what to do.
    """

    def __init__(self, what: str, *, got: object, expected: str, do: str) -> None:
        self.what, self.got, self.expected, self.do = what, got, expected, do
        super().__init__(f"{what}: got {got}; expected {expected}; {do}.")


class WorkFailed(RuntimeError):
    """Valid work that could not be finished (a full disk, a corrupt file in the middle of it)."""


class FitFailed(WorkFailed):
    """A fit whose verdict is bad, under ``fit(..., strict=True)``."""


class FitWarning(UserWarning):
    """A fit whose verdict asks for attention."""


class SupportWarning(UserWarning):
    """Simulated runs that leave what was recorded."""


class RunsWarning(UserWarning):
    """Runs of which only a part can be used."""


def shorten(values: Iterable[object], limit: int = 5) -> str:
    """The first few of ``values`` as text, with a count of the rest."""
    listed = [str(value) for value in values]
    rest = f", ... ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest


def positive_integer(what: str, value: object, *, do: str = "pass a whole number") -> int:
    """``value`` as an ``int`` of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise Misuse(what, got=repr(value), expected="an integer >= 1", do=do)
    return int(value)


def count_of(what: str, value: object, *, do: str = "pass a whole number") -> int:
    """``value`` as an ``int`` of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise Misuse(what, got=repr(value), expected="an integer >= 0", do=do)
    return int(value)


def at_most(what: str, value: int, most: int, items: str, *, do: str) -> int:
    """``value`` when it does not exceed ``most``, the number of some ``items``."""
    if value > most:
        raise Misuse(what, got=value, expected=f"at most the {most} {items}", do=do)
    return value


def of_shape(what: str, array: Any, shape: tuple[int, ...], meaning: str, *, do: str) -> Any:
    """``array`` when it has ``shape``; ``meaning`` says in the error what that is."""
    if array.shape != shape:
        raise Misuse(what, got=f"shape {array.shape}", expected=f"{shape}, {meaning}", do=do)
    return array


def positive_number(what: str, value: object, *, do: str = "pass a number above zero") -> float:
    """``value`` as a finite ``float`` above 0."""
    number = value if isinstance(value, int | float | np.number) else math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise Misuse(what, got=repr(value), expected="a finite number > 0", do=do)
    return float(number)


def unit_interval(what: str, value: float, *, do: str = "pass a number in [0, 1)") -> float:
    """``value`` as a ``float`` in [0, 1)."""
    if not 0 <= value < 1:
        raise Misuse(what, got=repr(value), expected="a number in [0, 1)", do=do)
    return float(value)


def choice_of(what: str, value: Value, choices: Collection[Value]) -> Value:
    """``value`` when it is one of ``choices``."""
    if value not in choices:
        raise Misuse(
            what, got=repr(value), expected=f"one of {shorten(choices, 20)}", do="pick one of them"
        )
    return value


def named(what: str, wanted: Iterable[object], known: Iterable[object]) -> list[int]:
    """Positions of the ids ``wanted`` among the ids ``known``, compared as text."""
    places = {str(name): place for place, name in enumerate(known)}
    names = [str(name) for name in wanted]
    unknown = [name for name in names if name not in places]
    if unknown:
        raise Misuse(
            what,
            got=f"unknown ids {shorten(unknown)}",
            expected=f"ids among {shorten(places)}",
            do="use ids of the recording",
        )
    return [places[name] for name in names]


def hashable(what: str, function: Value) -> Value:
    """The function itself, when it can be hashed: what was compiled for it is found again by it."""
    try:
        hash(function)
    except TypeError as error:
        raise Misuse(
            what,
            got=str(error),
            expected="a function, by which what was compiled for it is found again",
            do="define a function once that calls it, and pass that",
        ) from error
    return function


def keyed(key: Any) -> None:
    """Raise unless ``key`` is one typed PRNG key, as made by ``jax.random.key``."""
    import jax

    is_array = isinstance(key, jax.Array) and key.shape == ()
    if not is_array or not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise Misuse(
            "key",
            got=type(key).__name__,
            expected="one typed PRNG key",
            do="pass key=jax.random.key(seed)",
        )
