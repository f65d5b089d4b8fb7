"""Benchmarks time the package as its users run it: without the checker of types and shapes."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True, scope="session")
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Peak(threading.Thread):
    """The most memory that the process holds while it is watched, in GiB over the start's."""

    def __enter__(self) -> "Peak":
        self.watched, self.first, self.most = True, self.held(), 0.0
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watched = False
        self.join()

    def run(self) -> None:
        while self.watched:
            self.most = max(self.most, self.held() - self.first)
            time.sleep(0.02)

    @staticmethod
    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**30


@pytest.fixture(scope="session")
def measured() -> Callable[[Callable[[], Any]], tuple[float, float, Any]]:
    """Does some work: its seconds, its peak memory in GiB, what it returned."""

    def of(work: Callable[[], Any]) -> tuple[float, float, Any]:
        began = time.perf_counter()
        with Peak() as peak:
            found = work()
        return time.perf_counter() - began, peak.most, found

    return of
