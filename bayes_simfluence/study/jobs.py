"""Work that is done once: its result in a file, what it took, or why it failed, beside it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from bayes_simfluence.files import first_line
from bayes_simfluence.settings import config_from_yaml, config_path, save_config

__all__ = ["Outcome", "outcome_of", "run_job"]

STATM = Path("/proc/self/statm")
EVERY = 0.02
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Outcome:
    """How a piece of work went.

    Attributes:
        seconds: by the wall clock, compilation included.
        peak_bytes: most memory that the process held meanwhile; None where it cannot be seen.
        start_bytes: what it held when the work began.
        failed: why there is no result; empty when there is one.
    """

    seconds: float
    peak_bytes: int | None
    start_bytes: int | None
    failed: str = ""


def outcome_of(path: Path) -> Outcome | None:
    """How the work that writes ``path`` went; None while it has not been done."""
    beside = config_path(path)
    if not beside.is_file():
        return None
    found = Outcome(**config_from_yaml(beside))
    # A result that somebody removed is to be made again.
    return found if found.failed or path.exists() else None


def run_job(path: Path, work: Callable[[], Any], *, retry: bool = False) -> Outcome:
    """Do ``work``, which writes ``path``, unless it has been done.

    Args:
        path: of the result.
        work: takes nothing; whatever it raises is kept as the reason of its failure.
        retry: do again what failed.
    """
    known = outcome_of(path)
    if known is not None and not (retry and known.failed):
        return known
    start, reason = time.perf_counter(), ""
    with _watched() as memory:
        try:
            work()
        # The failure of one method must not stop a study of many.
        except Exception as error:
            reason = first_line(error)
    found = Outcome(time.perf_counter() - start, memory.peak, memory.start, reason)
    save_config(asdict(found), config_path(path))
    return found


class _Memory:
    def __init__(self) -> None:
        self.start = self.peak = _held()

    def look(self) -> None:
        now = _held()
        if now is not None and self.peak is not None:
            self.peak = max(self.peak, now)


@contextmanager
def _watched() -> Iterator[_Memory]:
    """Looks at the memory of this process from time to time."""
    memory, over = _Memory(), Event()

    def watch() -> None:
        while not over.wait(EVERY):
            memory.look()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()
        memory.look()


def _held() -> int | None:
    """Bytes of memory that this process holds, where the system tells."""
    with suppress(OSError, ValueError, IndexError):
        import resource

        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return None
