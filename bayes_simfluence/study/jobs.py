"""Jobs that are done once: the result in a file; its cost, or why it failed, in one beside it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from bayes_simfluence.files import first_line
from bayes_simfluence.settings import config_from_yaml, config_path, save_config

STATM = Path("/proc/self/statm")
EVERY = 0.02
"""Seconds between two readings of the memory."""


@dataclass(frozen=True)
class Outcome:
    """The cost of a job and whether it failed.

    Attributes:
        seconds: wall clock, compilation included.
        peak_bytes: peak memory of the process during the job; None where it cannot be read.
        start_bytes: memory of the process when the job began.
        failed: why there is no result; empty when there is a result.
    """

    seconds: float
    peak_bytes: int | None
    start_bytes: int | None
    failed: str = ""


def outcome_of(path: Path) -> Outcome | None:
    """The outcome of the job that writes ``path``; None while it has not been done."""
    beside = config_path(path)
    if not beside.is_file():
        return None
    outcome = Outcome(**config_from_yaml(beside))
    # A result that somebody removed is made again.
    return outcome if outcome.failed or path.exists() else None


def run_job(path: Path, work: Callable[[], Any], *, retry: bool = False) -> Outcome:
    """Do ``work``, which writes ``path``, unless it has been done.

    Args:
        path: of the result.
        work: takes no arguments; the error that it raises is kept as the reason of its failure.
        retry: repeat a job that failed.
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
    outcome = Outcome(time.perf_counter() - start, memory.peak, memory.start, reason)
    save_config(asdict(outcome), config_path(path))
    return outcome


class _Memory:
    def __init__(self) -> None:
        self.start = self.peak = _held()

    def read(self) -> None:
        now = _held()
        if now is not None and self.peak is not None:
            self.peak = max(self.peak, now)


@contextmanager
def _watched() -> Iterator[_Memory]:
    """Reads the memory of this process at regular intervals."""
    memory, over = _Memory(), Event()

    def watch() -> None:
        while not over.wait(EVERY):
            memory.read()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()
        memory.read()


def _held() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        import resource

        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return None
