"""Where the variance between runs comes from: what they train on, its order, their start, rounding.

By the law of total variance that of a loss is the variance over sets of examples of its mean, plus
that within a set over orders, plus that within a curriculum over initial weights, plus that between
twins. Half of the squared difference of two runs is in expectation the sum of the last of these
parts, of all that differ between the two; so pairs of each kind give the parts without bias. In
balanced designs they are those of a nested analysis of variance.
"""

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.starts import starts_of
from bayes_simfluence.data.weights import weights_of

PARTS = ("composition", "order", "start", "rounding")
"""Which examples and how often; when; which initial weights; what twins differ by."""


def variance_split(runs: xr.Dataset, *, time: int | None = None) -> pd.DataFrame:
    """The variance of losses between runs, split into its sources.

    Each part is what its source adds: ``start`` is the variance within one curriculum over initial
    weights, interactions of the two included. A part that the design does not tell apart from the
    one above it is NaN, and in that one: without twins rounding is in ``start``, and where no
    curriculum was trained from several starts, start and rounding are in ``order``. Where there are
    several starts, only runs of different ones tell of composition and order.

    Args:
        runs: recorded; some of them with a curriculum, or its examples in another order, in common.
        time: of the losses; the last at which all were recorded when omitted.

    Returns:
        One row for each of ``PARTS`` and ``total``: ``variance`` (nats squared, mean over queries;
        unbiased, so that a small one may come out below 0), its ``share`` of the total, and ``sd``,
        the jackknife's standard error of the variance over sets of examples; NaN with fewer than
        three.

    Raises:
        Misuse: runs of one set of examples alone, or no time at which all losses were recorded.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> runs = runs_from_arrays(
    ...     batch=[[[0], [1]], [[1], [0]], [[2], [3]], [[3], [2]]],
    ...     loss=[[[2.0], [1.5], [end]] for end in (1.0, 1.2, 0.4, 0.6)])
    >>> variance_split(runs)["variance"].round(3).to_dict()
    {'composition': 0.17, 'order': 0.02, 'start': nan, 'rounding': nan, 'total': 0.19}
    """
    runs = usable_runs(runs)
    kinds = _kinds(runs)
    loss = _losses(runs, time)
    sets = np.unique(kinds[:, 0])
    if len(sets) < 2:
        raise Misuse(
            "runs",
            got="one set of training examples",
            expected="runs on several sets",
            do="record runs on other subsets as well",
        )
    whole = _parts(loss, kinds)
    sd = np.full(len(whole), np.nan)
    if len(sets) > 2:
        rests = [kinds[:, 0] != one for one in sets]
        without = np.stack([_parts(loss[rest], kinds[rest]) for rest in rests])
        squares = np.square(without - without.mean(axis=0)).sum(axis=0)
        sd = np.sqrt((len(sets) - 1) / len(sets) * squares)
    share = whole / whole[-1] if whole[-1] > 0 else np.full(len(whole), np.nan)
    return pd.DataFrame(
        {"variance": whole, "share": share, "sd": sd},
        index=pd.Index([*PARTS, "total"], name="source"),
    )


def _losses(runs: xr.Dataset, time: int | None) -> Float[np.ndarray, "run query"]:
    loss = np.asarray(runs["loss"].values, float)
    known = np.flatnonzero(np.isfinite(loss).all(axis=(0, 2)))
    at = int(known[-1]) if time is None else time
    if at not in known or at == 0:
        raise Misuse(
            "time",
            got=at,
            expected="a time after 0 at which every loss of every run was recorded",
            do="pass such a time, or leave the other runs out",
        )
    return loss[:, at]


def _kinds(runs: xr.Dataset) -> Int[np.ndarray, "run 3"]:
    """Numbers of each run's set of examples, curriculum and start; equal where these are."""
    batch, weight = runs["batch"].values, weights_of(runs)
    filled = batch != EMPTY_SLOT
    count = np.zeros((len(batch), runs.sizes["train"]))
    for run, (members, row, slots) in enumerate(zip(batch, weight, filled, strict=True)):
        np.add.at(count[run], members[slots], row[slots])
    # The order within a batch does not matter.
    order = np.argsort(batch, axis=2, kind="stable")
    sorted_batch, sorted_weight = (
        np.take_along_axis(values, order, axis=2).reshape(len(batch), -1)
        for values in (batch, np.where(filled, weight, 0.0))
    )
    trained = np.concatenate([sorted_batch, sorted_weight], axis=1)
    found = [np.unique(rows, axis=0, return_inverse=True)[1] for rows in (count.round(6), trained)]
    return np.stack([*(place.ravel() for place in found), starts_of(runs)], axis=1)


def _parts(
    loss: Float[np.ndarray, "run query"], kinds: Int[np.ndarray, "run 3"]
) -> Float[np.ndarray, "part"]:
    """Variances of ``PARTS`` and their total."""
    first, second = np.triu_indices(len(loss), 1)
    square = 0.5 * np.square(loss[first] - loss[second]).mean(axis=1)
    same = kinds[first] == kinds[second]
    levels = [square[pairs].mean() if pairs.any() else np.nan for pairs in _levels(same)]
    parts, within = [], 0.0
    for level in reversed(levels):
        # A kind of pairs that is missing leaves its part to the next one.
        parts.append(level - within)
        within = within if np.isnan(level) else level
    return np.array([*reversed(parts), within])


def _levels(same: Bool[np.ndarray, "pair 3"]) -> list[Bool[np.ndarray, " pair"]]:
    """Pairs that differ in composition, in order alone, in the start alone, in nothing.

    Where there are several starts, those of pairs that differ otherwise differ too: what a start
    does to all runs alike would count for less than one part otherwise.
    """
    composition, curriculum, start = same.T
    apart = ~start if (~start).any() else np.ones_like(start)
    return [
        ~composition & apart,
        composition & ~curriculum & apart,
        curriculum & ~start,
        curriculum & start,
    ]
