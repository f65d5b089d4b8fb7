"""Designs: curricula for the runs of one recording, in stated shares of kinds.

A simulator knows the curricula that it was fitted to. ``random`` makes them all alike (random
subsets in shuffled epochs); ``diverse`` rearranges a part of these runs as somebody may ask about
later:

| kind | what becomes of the random run of that number |
|---|---|
| ``random`` | nothing: a random subset, in a new order each epoch |
| ``sorted`` | one class after the other, all of its epochs at once |
| ``blocked`` | within each epoch one class after the other |
| ``one-sided`` | as random, but in a window of a quarter to half of the steps one class alone |
| ``repeated`` | an eighth of its examples, eight times as often |
| ``half`` | half of its examples, twice as often |

Without classes, two halves of the run's examples stand for them, along one of the leading
directions of gradient features. All runs of a design have the same steps, and as many examples in
each of them, so that one recording holds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any, Final, TypeAlias

import jax
import numpy as np

from bayes_simfluence.checks import Misuse, choice_of, keyed, positive_integer
from bayes_simfluence.conventions import EMPTY_SLOT, Curricula
from bayes_simfluence.data.curriculum import Examples, example_indices, random_subset_epochs
from bayes_simfluence.data.rearranged import REARRANGED, few_of
from bayes_simfluence.data.sides import sides_of

__all__ = ["KINDS", "SHARES", "Design", "diverse", "random"]

KINDS: Final = ("random", "sorted", "blocked", "one-sided", "repeated", "half")
"""Kinds of curricula."""
SHARES: Final[Mapping[str, float]] = {
    "sorted": 0.1,
    "blocked": 0.1,
    "one-sided": 0.1,
    "repeated": 0.1,
    "half": 0.1,
}
"""Shares of a diverse design; the rest, half of the runs, is random."""
Shares: TypeAlias = Mapping[str, float | int]
"""Kind -> its share of the runs."""
SIDED: Final = ("sorted", "blocked", "one-sided")
"""Kinds that need examples to be told apart."""


@dataclass(frozen=True)
class Design:
    """Curricula for one recording, and how each was made; ``bs.record`` takes it as it is.

    Attributes:
        curricula: indices into ``train``, -1 = empty slot.
        kinds: one of ``KINDS`` for each run.
    """

    curricula: Curricula
    kinds: tuple[str, ...]


def random(
    examples: int | Examples,
    *,
    runs: int,
    per_run: int,
    batch_size: int,
    epochs: int,
    key: jax.Array,
) -> Design:
    """Each run a random subset of the examples in shuffled epochs (Guu et al. 2023).

    Args:
        examples: indices, or their number ``n`` for ``0..n-1``.
        runs: how many curricula.
        per_run: examples in each run's subset.
        batch_size: examples in a step; the last step of an epoch has fewer where they do not come
            out even.
        epochs: passes over the subset.
        key: decides subsets and orders.

    Raises:
        Misuse: numbers that are not positive, or a subset larger than there are examples.

    >>> import jax
    >>> design = random(20, runs=3, per_run=8, batch_size=2, epochs=3, key=jax.random.key(0))
    >>> design.curricula.shape, design.kinds
    ((3, 12, 2), ('random', 'random', 'random'))
    """
    keyed(key)
    keys = jax.random.split(key, positive_integer("runs", runs))
    sizes = {"per_run": per_run, "batch_size": batch_size, "epochs": epochs}
    curricula = [random_subset_epochs(examples, **sizes, key=one) for one in keys]
    return Design(np.stack(curricula), (KINDS[0],) * runs)


def diverse(
    examples: int | Examples,
    *,
    runs: int,
    per_run: int,
    batch_size: int,
    epochs: int,
    labels: Any = None,
    features: Any = None,
    shares: Shares | None = None,
    key: jax.Array,
) -> Design:
    """The random design of the same ``key`` with a part of its runs rearranged, kind by kind.

    Which runs these are is drawn; how many of each kind is not: ``shares`` times ``runs``, rounded
    so that they add up (the largest remainders first, in the order of ``KINDS``).

    Args:
        examples, runs, per_run, batch_size, epochs: as for ``random``.
        labels: the class of each of the examples, whole numbers or texts, ``(example,)``.
        features: gradient features of the examples, ``(example, feature)``; without ``labels`` they
            tell the examples apart: each rearranged run draws one of the four leading directions,
            in proportion to the variance along it.
        shares: of kinds, each in [0, 1]; what they leave of 1 is random. ``SHARES`` when omitted.
        key: decides everything that is drawn.

    Raises:
        Misuse: as ``random``; shares that are no shares, or of unknown kinds; kinds that need
            classes without ``labels`` and ``features``; labels or features that do not fit the
            examples or do not tell them apart; subsets too small for a kind.

    >>> import jax
    >>> from collections import Counter
    >>> sizes = {"runs": 20, "per_run": 8, "batch_size": 2, "epochs": 3}
    >>> design = diverse(30, **sizes, labels=[0, 1] * 15, key=jax.random.key(0))
    >>> design.curricula.shape
    (20, 12, 2)
    >>> Counter(design.kinds)["random"], Counter(design.kinds)["sorted"]
    (10, 2)
    """
    chosen, shares = example_indices(examples), checked_shares(SHARES if shares is None else shares)
    plain = random(
        chosen, runs=runs, per_run=per_run, batch_size=batch_size, epochs=epochs, key=key
    )
    _large_enough(shares, per_run, batch_size)
    sides = sides_of(chosen, labels, features, needed=[kind for kind in SIDED if shares[kind]])
    names = [kind for kind, count in _counts(shares, runs).items() for _ in range(count)]
    # Split and fold_in may give one another's keys: those of the runs are 0..runs-1, of a run 0, 1.
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, runs), runs))
    kinds = tuple(names[place] for place in order)
    curricula = plain.curricula.copy()
    for run, (kind, run_key) in enumerate(zip(kinds, jax.random.split(key, runs), strict=True)):
        if kind in REARRANGED:
            filled, own = curricula[run] != EMPTY_SLOT, jax.random.fold_in(run_key, 2)
            curricula[run][filled] = REARRANGED[kind](curricula[run], epochs, sides, own)
    return Design(curricula, kinds)


def checked_shares(shares: Shares) -> dict[str, float]:
    """The share of every kind; ``random`` takes what the others leave.

    >>> checked_shares({"half": 0.25})["random"]
    0.75

    Raises:
        Misuse: unknown kinds, numbers outside [0, 1], shares that add up to more than 1 or, with
            one of ``random``, to another number.
    """
    for kind, share in shares.items():
        choice_of("kind in shares", kind, KINDS)
        if not (isinstance(share, int | float) and isfinite(share) and 0 <= share <= 1):
            raise Misuse(
                f"shares[{kind!r}]", got=share, expected="a number in [0, 1]", do="correct it"
            )
    total = sum(shares.values())
    if total > 1 + 1e-9 or ("random" in shares and not isclose(total, 1, abs_tol=1e-9)):
        raise Misuse(
            "shares",
            got=f"a sum of {total:g}",
            expected="a sum of 1, or at most 1 of the kinds other than random",
            do="lower them, or leave out random, which takes the rest",
        )
    given = {kind: float(share) for kind, share in shares.items()}
    return dict.fromkeys(KINDS, 0.0) | {"random": max(1.0 - total, 0.0)} | given


def _counts(shares: Mapping[str, float], runs: int) -> dict[str, int]:
    """Runs of each kind: shares of ``runs``, rounded by largest remainders."""
    quotas = {kind: round(share * runs, 9) for kind, share in shares.items()}
    counts = {kind: int(quota) for kind, quota in quotas.items()}
    # Rounding errors must not decide between equal remainders.
    by_remainder = sorted(quotas, key=lambda kind: round(counts[kind] - quotas[kind], 9))
    for kind in by_remainder[: runs - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _large_enough(shares: Mapping[str, float], per_run: int, batch_size: int) -> None:
    least = {"repeated": few_of(per_run, batch_size) + 1, "half": 2}
    for kind, size in least.items():
        if shares[kind] and per_run < size:
            raise Misuse(
                "per_run",
                got=per_run,
                expected=f"at least {size} for {kind} runs with batches of {batch_size}",
                do=f"raise it, lower batch_size, or pass shares with {kind!r}: 0",
            )
