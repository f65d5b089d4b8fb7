"""Many examples a batch at a time."""

from collections.abc import Callable, Iterator

import jax
from jaxtyping import PyTree

from bayes_simfluence.progress import Meter


def batches_of(examples: PyTree, size: int) -> Iterator[tuple[slice, PyTree]]:
    """Batches of a single size, so that one compiled function serves all: the last one overlaps.

    Args:
        examples: arrays with a leading axis of examples.
        size: of a batch; at least one example, at most all.

    >>> import numpy as np
    >>> [(where.start, some.tolist()) for where, some in batches_of(np.arange(5), 2)]
    [(0, [0, 1]), (2, [2, 3]), (3, [3, 4])]
    """
    count = len(jax.tree.leaves(examples)[0])
    size = max(1, min(size, count))
    for start in range(0, count, size):
        begin = min(start, count - size)
        where = slice(begin, begin + size)
        yield where, jax.tree.map(lambda leaf, where=where: leaf[where], examples)


def over_batches(
    function: Callable[[PyTree], PyTree], examples: PyTree, size: int, meter: Meter | None = None
) -> Iterator[tuple[slice, PyTree]]:
    """The results of a function for all examples, each once: positions, and results.

    Args:
        function: of a batch; its results have a leading axis of examples.
        meter: advanced by the examples that are done.

    >>> import numpy as np
    >>> [some.tolist() for _, some in over_batches(np.negative, np.arange(5), 2)]
    [[0, -1], [-2, -3], [-4]]
    """
    done = 0
    for where, some in batches_of(examples, size):
        results = function(some)
        yield (
            slice(done, where.stop),
            jax.tree.map(lambda leaf, new=done - where.start: leaf[new:], results),
        )
        if meter is not None:
            meter.advance(where.stop - done)
        done = where.stop
