"""Progress of long work, reported to an object; the default one is silent."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Meter(Protocol):
    """Work in progress."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """``amount`` more units are done; ``note`` is a short state such as the current loss."""


@runtime_checkable
class Progress(Protocol):
    """Receives reports of work; results never depend on it."""

    def work(self, label: str, total: int | None) -> AbstractContextManager[Meter]:
        """A context that yields the meter of ``total`` units (None = not known)."""


class _SilentMeter:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


class Silent:
    """Shows nothing; the default in the library."""

    @contextmanager
    def work(self, label: str, total: int | None) -> Iterator[Meter]:
        yield _SilentMeter()


class Bars:
    """Progress bars on the terminal's error stream; plain lines where there is no terminal."""

    @contextmanager
    def work(self, label: str, total: int | None) -> Iterator[Meter]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:>20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            yield _Bar(bars, bars.add_task(label, total=total, note=""))


class _Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=amount, note=note)
