"""Writing files and folders whole or not at all, and never over something by accident."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayes_simfluence.checks import Misuse, WorkFailed

PathLike = str | os.PathLike[str]


def new_path(path: PathLike, *, overwrite: bool = False) -> Path:
    """``path`` when something new may be written there, checked before any work starts."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise Misuse(
            str(path),
            got="something that exists",
            expected="a new path",
            do="choose another path, or pass overwrite (to go on with a recording: resume)",
        )
    parent = path.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise Misuse(
            str(path),
            got=f"{existing}, which cannot be written to",
            expected="a folder you may write to",
            do="choose another folder or change its permissions",
        )
    return path


@contextmanager
def atomically(path: PathLike) -> Iterator[Path]:
    """A path to write to; what was written there moves to ``path`` when the block succeeds."""
    path = Path(path).absolute()
    partial, old = path.with_name(f".{path.name}.partial"), old_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
    except BaseException as error:
        _remove(partial)
        if isinstance(error, OSError):
            raise WorkFailed(f"{path} could not be written ({first_line(error)})") from error
        raise
    if path.is_dir():
        # A folder cannot be replaced in one call: step aside first, so that no moment loses it.
        _remove(old)
        path.rename(old)
    partial.replace(path)
    _remove(old)


def old_path(path: PathLike) -> Path:
    """Where the folder at ``path`` is kept while another takes its place."""
    path = Path(path).absolute()
    return path.with_name(f".{path.name}.old")


def existing_file(path: PathLike, *, expected: str, do: str = "check the path") -> Path:
    """``path`` when a file is there."""
    if not Path(path).is_file():
        raise Misuse(str(path), got="no such file", expected=expected, do=do)
    return Path(path)


@contextmanager
def readable(
    path: PathLike, *errors: type[BaseException], got: str = "a file", expected: str, do: str
) -> Iterator[None]:
    """A block that reads ``path``; ``errors`` in it become a ``Misuse`` with their first line."""
    try:
        yield
    except errors as error:
        got = f"{got} that cannot be read ({first_line(error)})"
        raise Misuse(str(path), got=got, expected=expected, do=do) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
