"""Claims on runs of a store: several processes record into one store, each run by one of them.

A claim is a file that can be made only once (``O_EXCL``) and names its process and host. It ends
with its owner: a claim whose process is gone from this host is taken over. Whether a process of
another host lives cannot be seen from here, so its claim stands until its file is removed.
"""

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.files import PathLike, first_line

try:
    import fcntl
except ImportError:  # Not a POSIX system: only O_EXCL stands between two processes.
    fcntl = None  # type: ignore[assignment]

FOLDER = "claims"


class Claims:
    """The claims that this process holds on a store's runs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held = folder, set[int]()

    def take(self, run: int) -> None:
        """Claim ``run``.

        Raises:
            Misuse: a process that lives, or one of another host, records it.
        """
        with alone_in(self._folder):
            path = self._folder / str(run)
            if path.exists() and not _forsaken(path):
                raise _refused(path, run)
            path.unlink(missing_ok=True)
            mine = os.getpid()
            owner = {"host": socket.gethostname(), "pid": mine, "born": _born(mine)}
            try:
                with path.open("x", encoding="utf-8") as file:
                    json.dump(owner, file)
            except FileExistsError:
                raise _refused(path, run) from None
        self._held.add(run)

    def release(self, run: int) -> None:
        """``run`` is recorded, or left to others."""
        if run in self._held:
            self._held.remove(run)
            (self._folder / str(run)).unlink(missing_ok=True)

    def close(self) -> None:
        """Release what is still held; the folder goes with its last claim of a living process."""
        for run in tuple(self._held):
            self.release(run)
        with suppress(OSError), alone_in(self._folder):
            for path in self._folder.iterdir():
                if _forsaken(path):
                    path.unlink()
            self._folder.rmdir()


@contextmanager
def claimed(store: PathLike, runs: Iterable[int]) -> Iterator[Claims]:
    """All of ``runs`` claimed for the block, or none.

    Raises:
        Misuse: another process records one of them.
        WorkFailed: the store's folder cannot be written to.
    """
    claims = Claims(Path(store) / FOLDER)
    try:
        try:
            for run in runs:
                claims.take(run)
        except OSError as error:
            raise WorkFailed(
                f"runs of {store} could not be claimed ({first_line(error)}); make room, or check "
                "that the folder can be written to"
            ) from error
        yield claims
    finally:
        claims.close()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process of this host at a time looks at claims; the folder exists meanwhile."""
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    handle = _locked(folder)
    try:
        yield
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    """A handle of ``folder`` whose lock ends when it is closed, or its owner dies."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # Some network file systems have no locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Its last holder may have removed the folder while this one waited.
        if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
        os.close(handle)


def _forsaken(path: Path) -> bool:
    """Whether the claim's owner is gone, as far as this host can tell."""
    owner = _owner(path)
    if not owner:
        return True  # Its writer was killed between two system calls: nobody else is in here.
    if owner["host"] != socket.gethostname():
        return False
    return not _lives(owner["pid"]) or owner["born"] != _born(owner["pid"])


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and {"host", "pid", "born"} <= set(owner) else {}


def _lives(process: int) -> bool:
    if _stat(process)[:1] == ["Z"]:
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _born(process: int) -> str:
    """When a process started, in ticks: another may have got its number since."""
    return "".join(_stat(process)[19:20])


def _stat(process: int) -> list[str]:
    """The fields of a process after its name, state first; empty where the system has none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _refused(path: Path, run: int) -> Misuse:
    owner = _owner(path)
    return Misuse(
        f"run {run}",
        got=f"recorded right now by process {owner.get('pid')} of {owner.get('host')}",
        expected="runs that no other process records",
        do=f"choose others with Placement(only=...), or remove {path} if that process is gone",
    )
