"""Progress of long work: an object that is told of it, silent unless the caller hands in another."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

__all__ = ["Meter", "Progress", "Silent"]


@runtime_checkable
class Meter(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """``amount`` more units are done; ``note`` is a short state such as the current loss."""


@runtime_checkable
class Progress(Protocol):
    """Where work announces itself; results never depend on which one listens."""

    def work(self, label: str, total: int | None) -> AbstractContextManager[Meter]:
        """A context that yields the meter of ``total`` units (None = not known)."""


class _SilentMeter:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


class Silent:
    """Says nothing; the default in the library."""

    @contextmanager
    def work(self, label: str, total: int | None) -> Iterator[Meter]:
        yield _SilentMeter()
