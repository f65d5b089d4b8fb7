"""Telling examples apart: by class or, without classes, as halves along a direction of features."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.curriculum import Examples

DIRECTIONS = 4
"""Most directions of features along which examples are halved."""

Members: TypeAlias = Int[np.ndarray, " member"]
Groups: TypeAlias = Int[np.ndarray, " member"]
Sides: TypeAlias = Callable[[Members, jax.Array], Groups]
"""Groups of a run's examples; a key decides along which direction."""


def sides_of(chosen: Examples, labels: Any, features: Any, *, needed: Sequence[str]) -> Sides:
    """Groups by ``labels (example,)`` or, without them, by ``features (example, feature)``.

    Args:
        needed: kinds of curricula that need groups; without any, neither has to be there.

    Raises:
        Misuse: neither and they are needed; labels or features that do not fit the examples
            ``chosen``, or do not tell them apart.
    """
    if labels is not None:
        return _by_class(chosen, labels)
    if features is not None:
        return _by_direction(chosen, features)
    if needed:
        raise Misuse(
            "labels and features",
            got="neither",
            expected=f"one of the two, since {', '.join(needed)} runs tell examples apart",
            do="pass labels, or gradient features of the examples, or shares of other kinds",
        )
    return lambda members, key: np.zeros(len(members), int)


def _by_class(chosen: Examples, labels: Any) -> Sides:
    labels = np.asarray(labels)
    if labels.shape != chosen.shape or labels.dtype.kind not in "biuU":
        raise Misuse(
            "labels",
            got=f"{labels.dtype} of shape {labels.shape}",
            expected=f"whole numbers or texts, one for each of {len(chosen)} examples",
            do="give the class of every example; numbers with a fraction are no classes",
        )
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise Misuse(
            "labels",
            got="one class",
            expected="at least two classes",
            do="leave labels out and pass gradient features",
        )
    return lambda members, key: codes[_positions(chosen, members)]


def _by_direction(chosen: Examples, features: Any) -> Sides:
    features = np.asarray(features, float)
    if features.ndim != 2 or len(features) != len(chosen) or not np.isfinite(features).all():
        raise Misuse(
            "features",
            got=f"an array of shape {features.shape}"
            + ("" if np.isfinite(features).all() else " with values that are not finite"),
            expected=f"finite numbers (example, feature) of {len(chosen)} examples",
            do="pass gradient_features(...).train, or runs['train_feature'].values",
        )
    left, values, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    values = values[:DIRECTIONS]
    if not values.size or values[0] <= 1e-9 * np.abs(features).max():
        raise Misuse(
            "features",
            got="the same for all examples",
            expected="features that tell examples apart",
            do="pass labels, or shares of other kinds",
        )
    # The sign of a singular vector is the platform's choice.
    largest = np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0)
    along = (left * np.sign(largest))[:, : len(values)]
    chances = np.square(values) / np.square(values).sum()

    def halves(members: Members, key: jax.Array) -> Groups:
        direction = int(jax.random.choice(key, len(values), p=chances))
        ranks = along[_positions(chosen, members), direction].argsort(kind="stable").argsort()
        return (2 * ranks >= len(members)).astype(int)

    return halves


def _positions(chosen: Examples, members: Members) -> Members:
    """Where each of ``members`` stands among the chosen examples."""
    order = chosen.argsort()
    return order[np.searchsorted(chosen, members, sorter=order)]
