"""Many examples a piece at a time."""

from collections.abc import Iterator

import jax
from jaxtyping import PyTree

__all__ = ["pieces_of"]


def pieces_of(examples: PyTree, size: int) -> Iterator[tuple[slice, PyTree]]:
    """Pieces of one size, so that one compiled program serves all: the last one overlaps.

    Args:
        examples: arrays with a leading axis of examples.
        size: of a piece; at least one example, at most all.

    >>> import numpy as np
    >>> [(where.start, some.tolist()) for where, some in pieces_of(np.arange(5), 2)]
    [(0, [0, 1]), (2, [2, 3]), (3, [3, 4])]
    """
    count = len(jax.tree.leaves(examples)[0])
    size = max(1, min(size, count))
    for start in range(0, count, size):
        begin = min(start, count - size)
        where = slice(begin, begin + size)
        yield where, jax.tree.map(lambda leaf, where=where: leaf[where], examples)
