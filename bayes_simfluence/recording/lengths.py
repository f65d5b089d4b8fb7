"""Queries of like length measured together, in arrays without most of their padding."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

__all__ = ["length_groups"]

GROUPS = 3
"""Most groups: each is compiled for itself."""
MULTIPLE = 8
"""Lengths are rounded up to it: odd shapes are no faster."""


def length_groups(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Length to cut to and positions of each group; together they hold the least padding.

    >>> length_groups([5, 30, 9, 8, 14])
    [(8, [0, 3]), (16, [2, 4]), (32, [1])]
    """
    step = max(MULTIPLE, max(lengths) // 128 * MULTIPLE)
    rounded = -(-np.asarray(lengths) // step) * step
    kinds, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])

    def filled(tops: tuple[int, ...]) -> int:
        """Elements of all groups when these kinds are the longest of theirs."""
        edges = [0, *(top + 1 for top in tops)]
        sizes = np.diff(below[edges])
        return int(sizes @ kinds[list(tops)])

    last = len(kinds) - 1
    choices: list[tuple[int, ...]] = [
        (*tops, last)
        for count in range(min(GROUPS, len(kinds)))
        for tops in combinations(range(last), count)
    ]
    best = min(choices, key=filled)
    tops = kinds[list(best)]
    group = np.searchsorted(tops, rounded)
    return [(int(top), np.flatnonzero(group == at).tolist()) for at, top in enumerate(tops)]
