"""What the curricula of some runs cannot tell apart."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayes_simfluence.checks import shorten
from bayes_simfluence.conventions import EMPTY_SLOT, Curricula

__all__ = ["Identifiability", "identifiability"]


@dataclass(frozen=True)
class Identifiability:
    """What the curricula of some runs cannot tell apart.

    Attributes:
        duplicate_runs: groups of run ids with the same curriculum (their spread is pure noise).
        never_seen: ids of training examples in no batch (their effect is the prior's).
        always_together: groups of ids with the same exposure at every step (only their sum shows).
    """

    duplicate_runs: tuple[tuple[str, ...], ...]
    never_seen: tuple[str, ...]
    always_together: tuple[tuple[str, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.duplicate_runs or self.never_seen or self.always_together)

    def sentences(self) -> tuple[str, ...]:
        """One sentence for each kind of finding, none when all is well."""
        said = []
        if self.duplicate_runs:
            groups = shorten("=".join(group) for group in self.duplicate_runs)
            said.append(f"runs with the same curriculum: {groups}")
        if self.never_seen:
            said.append(
                f"{len(self.never_seen)} examples never trained on, their effects are the prior's: "
                + shorten(self.never_seen)
            )
        if self.always_together:
            groups = shorten("+".join(group) for group in self.always_together)
            said.append(f"examples always together, only their sum is identified: {groups}")
        return tuple(said)


def identifiability(runs: xr.Dataset) -> Identifiability:
    """Duplicate runs, never-seen examples and always-together examples of valid ``runs``.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> runs = runs_from_arrays(
    ...     batch=[[[0, 1]], [[0, 1]]], loss=[[[1.0], [0.9]], [[1.0], [0.8]]], train_ids=list("abc")
    ... )
    >>> found = identifiability(runs)
    >>> found.never_seen, found.always_together, found.duplicate_runs
    (('c',), (('a', 'b'),), (('0', '1'),))
    """
    batch = runs["batch"].values
    train = runs["train"].values.astype(str)
    shares = _share_keys(batch, len(train))
    never = tuple(train[[not share for share in shares]].tolist())
    seen = [(share, name) for share, name in zip(shares, train, strict=True) if share]
    curricula = np.sort(batch, axis=2)
    keyed = zip((one.tobytes() for one in curricula), runs["run"].values.astype(str), strict=True)
    return Identifiability(_groups(keyed), never, _groups(seen))


def _share_keys(batch: Curricula, train: int) -> list[tuple[tuple[int, int], ...]]:
    """For each example, the (flat step, count) pairs at which it occurs."""
    occurrences: list[dict[int, int]] = [{} for _ in range(train)]
    for position, members in enumerate(batch.reshape(-1, batch.shape[-1])):
        for example in members[members != EMPTY_SLOT]:
            at = occurrences[int(example)]
            at[position] = at.get(position, 0) + 1
    return [tuple(one.items()) for one in occurrences]


def _groups(pairs: Iterable[tuple[Any, str]]) -> tuple[tuple[str, ...], ...]:
    members: dict[Any, list[str]] = {}
    for key, name in pairs:
        members.setdefault(key, []).append(str(name))
    return tuple(tuple(names) for names in members.values() if len(names) > 1)
