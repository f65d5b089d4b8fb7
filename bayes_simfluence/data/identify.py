"""What the curricula of some runs cannot tell apart."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayes_simfluence.checks import shorten
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.data.weights import weights_of


@dataclass(frozen=True)
class Identifiability:
    """What the curricula of some runs cannot tell apart.

    Attributes:
        duplicate_runs: groups of run ids with the same exposures at every step (their spread is
            pure noise).
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
        sentences = []
        if self.duplicate_runs:
            groups = shorten("=".join(group) for group in self.duplicate_runs)
            sentences.append(f"runs with the same curriculum: {groups}")
        if self.never_seen:
            sentences.append(
                f"{len(self.never_seen)} examples never trained on, their effects are the prior's: "
                + shorten(self.never_seen)
            )
        if self.always_together:
            groups = shorten("+".join(group) for group in self.always_together)
            sentences.append(f"examples always together, only their sum is identified: {groups}")
        return tuple(sentences)


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
    train, run = runs["train"].values.astype(str), runs["run"].values.astype(str)
    by_example: list[list[tuple[int, int, float]]] = [[] for _ in train]
    by_run: list[list[tuple[int, int, float]]] = [[] for _ in run]
    for at, step, example, share in _shares(runs):
        by_example[example].append((at, step, share))
        by_run[at].append((step, example, share))
    never = tuple(train[[not shares for shares in by_example]].tolist())
    return Identifiability(
        duplicate_runs=_groups(zip(map(tuple, by_run), run, strict=True)),
        never_seen=never,
        always_together=_groups(
            (tuple(shares), name) for shares, name in zip(by_example, train, strict=True) if shares
        ),
    )


def _shares(runs: xr.Dataset) -> Iterator[tuple[int, int, int, float]]:
    """Run, step, example and its share in the batch's weight, in order, where it is above 0.

    Shares are rounded so that equal ones compare equal.
    """
    batch, weight = runs["batch"].values, weights_of(runs).astype(float)
    weight = np.where(batch == EMPTY_SLOT, 0.0, weight)
    at, step, slot = np.nonzero(weight)
    shape = (runs.sizes["run"], runs.sizes["step"], runs.sizes["train"])
    flat = np.ravel_multi_index((at, step, batch[at, step, slot]), shape)
    places, inverse = np.unique(flat, return_inverse=True)
    share = np.bincount(inverse, (weight[at, step, slot] / weight.sum(axis=2)[at, step]))
    columns = (*np.unravel_index(places, shape), share.round(6))
    yield from zip(*(column.tolist() for column in columns), strict=True)


def _groups(pairs: Iterable[tuple[Any, str]]) -> tuple[tuple[str, ...], ...]:
    members: dict[Any, list[str]] = {}
    for key, name in pairs:
        members.setdefault(key, []).append(str(name))
    return tuple(tuple(names) for names in members.values() if len(names) > 1)
