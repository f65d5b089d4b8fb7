"""Scores of training examples: a number for each example and query, under a stated sign."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, choice_of, of_shape, positive_integer
from bayes_simfluence.conventions import EFFECT_SIGN

DIMS = ("train", "query")


def score_array(
    values: Float[np.ndarray, "train query"],
    train_ids: Sequence[Any],
    query_ids: Sequence[Any],
    *,
    method: str,
    units: str,
    **settings: Any,
) -> xr.DataArray:
    """Scores under their ids; a negative one lowers the query's loss.

    Args:
        values: effects on the loss, in ``units``.
        method: the name of what computed them.
        units: ``nat`` for a predicted change of the loss, ``1`` for a similarity, or another.
        settings: everything that decided the values (damping, checkpoints, ...), kept as
            attributes.

    >>> score_array(np.zeros((2, 1)), ["a", "b"], ["q"], method="none", units="nat").attrs["sign"]
    "negative = helpful (lowers the query's loss)"

    Raises:
        Misuse: values that are not finite, or another number of them than of ids.
    """
    shape, each = (len(train_ids), len(query_ids)), "one for each training example and query"
    scores = xr.DataArray(
        of_shape(f"{method} scores", values, shape, each, do="pass ids in the order of the scores"),
        dims=DIMS,
        coords={"train": list(train_ids), "query": list(query_ids)},
        name="score",
        attrs={
            "long_name": "effect of one training example on the query's loss",
            "units": units,
            "sign": EFFECT_SIGN,
            "method": method,
            **settings,
        },
    )
    return check_scores(scores)


def check_scores(scores: xr.DataArray) -> xr.DataArray:
    """The scores themselves when they are finite numbers ``(train, query)``.

    Raises:
        Misuse: other dimensions, or a value that is not finite; the first one is named.
    """
    if scores.dims != DIMS:
        raise Misuse(
            "scores",
            got=f"dimensions {scores.dims}",
            expected=f"{DIMS}",
            do="transpose them, or make them by score_array",
        )
    wrong = np.argwhere(~np.isfinite(scores.values))
    if len(wrong):
        train, query = wrong[0]
        raise Misuse(
            f"score of example {scores['train'].values[train]} on "
            f"query {scores['query'].values[query]}",
            got=f"{scores.values[train, query]} ({len(wrong)} values are not finite)",
            expected="finite numbers",
            do="look at that example's loss and gradient, or raise the damping",
        )
    return scores


def proponents(scores: xr.DataArray, query: object, count: int = 5) -> xr.DataArray:
    """The examples that lower the loss of ``query`` most, the strongest first.

    >>> scores = score_array(np.array([[2.0], [-1.0]]), ["a", "b"], ["q"], method="m", units="nat")
    >>> proponents(scores, "q", 1).train.values.tolist()
    ['b']
    """
    return _ranked(scores, query, count, descending=False)


def opponents(scores: xr.DataArray, query: object, count: int = 5) -> xr.DataArray:
    """The examples that raise the loss of ``query`` most, the strongest first."""
    return _ranked(scores, query, count, descending=True)


def _ranked(scores: xr.DataArray, query: object, count: int, *, descending: bool) -> xr.DataArray:
    names = [str(name) for name in check_scores(scores)["query"].values]
    choice_of("query", str(query), names)
    column = scores.isel(query=names.index(str(query)))
    order = np.argsort(-column.values if descending else column.values, kind="stable")
    return column.isel(train=order[: positive_integer("count", count)])
