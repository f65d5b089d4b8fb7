"""What a run trains on: makers of curricula.

A curriculum is an integer array ``(step, slot)`` of indices into ``train``, -1 = empty slot.
Makers need a PRNG key; edits of curricula are in ``counterfactual.edits``.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from bayes_simfluence.checks import Misuse, at_most, keyed, positive_integer
from bayes_simfluence.conventions import EMPTY_SLOT, Curriculum

Examples = Int[np.ndarray, " example"]


def shuffled_epochs(
    examples: int | Sequence[int] | Examples, *, batch_size: int, epochs: int, key: jax.Array
) -> Curriculum:
    """Every example once an epoch, in a new order each epoch.

    ``examples`` are indices, or their number ``n`` for ``0..n-1``. The last batch of an epoch is
    padded with empty slots when the batch size does not divide the number of examples.

    >>> import jax
    >>> shuffled_epochs(6, batch_size=4, epochs=1, key=jax.random.key(0)).shape
    (2, 4)
    """
    chosen, size = example_indices(examples), positive_integer("batch_size", batch_size)
    keyed(key)
    keys = jax.random.split(key, positive_integer("epochs", epochs))
    orders = [np.asarray(jax.random.permutation(order_key, chosen)) for order_key in keys]
    padded = np.full((len(keys), -(-len(chosen) // size) * size), EMPTY_SLOT, dtype=np.int32)
    padded[:, : len(chosen)] = orders
    return padded.reshape(-1, size)


def random_subset_epochs(
    examples: int | Sequence[int] | Examples,
    *,
    per_run: int,
    batch_size: int,
    epochs: int,
    key: jax.Array,
) -> Curriculum:
    """A random subset of ``per_run`` examples, then shuffled epochs over it (Guu et al. 2023).

    >>> import jax
    >>> random_subset_epochs(200, per_run=128, batch_size=4, epochs=3, key=jax.random.key(0)).shape
    (96, 4)
    """
    chosen, size = example_indices(examples), positive_integer("per_run", per_run)
    at_most("per_run", size, len(chosen), "examples", do="lower per_run or add examples")
    keyed(key)
    pick, order = jax.random.split(key)
    subset = np.asarray(jax.random.choice(pick, chosen, (per_run,), replace=False))
    return shuffled_epochs(subset, batch_size=batch_size, epochs=epochs, key=order)


def with_replacement(
    examples: int | Sequence[int] | Examples, *, batch_size: int, steps: int, key: jax.Array
) -> Curriculum:
    """Batches of independent draws; an example may repeat within a batch.

    >>> import jax
    >>> with_replacement(10, batch_size=2, steps=5, key=jax.random.key(0)).shape
    (5, 2)
    """
    keyed(key)
    shape = (positive_integer("steps", steps), positive_integer("batch_size", batch_size))
    return np.asarray(jax.random.choice(key, example_indices(examples), shape))


def blocks(
    groups: Sequence[Sequence[int] | Examples], *, batch_size: int, epochs: int = 1, key: jax.Array
) -> Curriculum:
    """One group after the other (say, class by class), each in ``epochs`` shuffled epochs.

    >>> import jax
    >>> blocks([[0, 1], [2, 3]], batch_size=2, key=jax.random.key(0)).max(axis=1).tolist()
    [1, 3]
    """
    keyed(key)
    keys = jax.random.split(key, max(len(groups), 1))
    parts = [
        shuffled_epochs(group, batch_size=batch_size, epochs=epochs, key=group_key)
        for group, group_key in zip(groups, keys, strict=False)
    ]
    if not parts:
        raise Misuse("groups", got="none", expected="at least one group", do="pass the groups")
    return np.concatenate(parts)


def example_indices(examples: int | Sequence[int] | Examples) -> Examples:
    chosen = np.arange(examples) if isinstance(examples, int) else np.asarray(examples)
    if chosen.ndim != 1 or len(chosen) == 0 or not np.issubdtype(chosen.dtype, np.integer):
        raise Misuse(
            "examples",
            got=f"{chosen.dtype} of shape {chosen.shape}",
            expected="at least one index of an example",
            do="pass their number or a list of indices",
        )
    if chosen.min() < 0:
        raise Misuse(
            "examples", got=int(chosen.min()), expected="indices >= 0", do="leave -1 to empty slots"
        )
    return chosen
