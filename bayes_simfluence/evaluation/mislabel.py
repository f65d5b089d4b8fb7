"""Finding mislabelled examples: flip some labels, rank all examples, see how soon they turn up.

As in Koh and Liang (2017, section 5.4) and Pruthi et al. (2020, section 4.1), whose ranking is
self-influence; here also by the posterior probability that an example does harm.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.checks import Misuse, keyed, positive_integer, unit_interval
from bayes_simfluence.posterior.posterior import Posterior

__all__ = ["Flipped", "average_precision", "detection", "flip_labels", "probability_of_harm"]

INTERVAL = 0.90
"""Probability of the bootstrap bands."""
Label = TypeVar("Label", bound=Hashable)


class Flipped(NamedTuple):
    """Labels of which some are wrong now.

    Attributes:
        labels: in the order they were given in.
        flipped: which ones are wrong.
    """

    labels: list[Any]
    flipped: Bool[np.ndarray, " train"]


def flip_labels(labels: Sequence[Label], share: float, *, key: jax.Array) -> Flipped:
    """A share of the labels, drawn at random, each exchanged for another one of those there are.

    Args:
        labels: one for each example: words or codes.
        share: of the examples, in (0, 1); at least one is flipped.
        key: decides which, and what they become.

    >>> import jax
    >>> found = flip_labels(["a", "b", "a", "b"], 0.5, key=jax.random.key(0))
    >>> int(found.flipped.sum())
    2

    Raises:
        Misuse: a share outside (0, 1), labels that are all the same.
    """
    keyed(key)
    kinds = sorted(set(labels), key=str)
    if len(kinds) < 2:
        raise Misuse(
            "labels", got=f"{len(kinds)} different", expected="at least two",
            do="flip where there is something to flip to",
        )  # fmt: skip
    if not 0 < share < 1:
        raise Misuse("share", got=share, expected="a number in (0, 1)", do="pass such a share")
    count = max(1, round(share * len(labels)))
    which, turn = jax.random.split(key)
    places = np.asarray(jax.random.choice(which, len(labels), (count,), replace=False))
    turns = np.asarray(jax.random.randint(turn, (count,), 1, len(kinds)))
    found, flipped = list(labels), np.zeros(len(labels), bool)
    for place, by in zip(places, turns, strict=True):
        found[place] = kinds[(kinds.index(labels[place]) + int(by)) % len(kinds)]
    flipped[places] = True
    return Flipped(found, flipped)


def probability_of_harm(posterior: Posterior, *, key: jax.Array, draws: int = 1000) -> xr.DataArray:
    """Posterior probability that training on an example raises the summed loss of the queries.

    The effect of an example on a query is the one that stays (``staying``, on the scale of the
    model's link), or ``a`` times the query's mean recorded loss plus ``b`` where the model has
    these.

    Args:
        posterior: a fit with draws of effects.
        key: decides the draws.
        draws: as many as asked, where the simulator does not hold its own.

    Returns:
        ``(train,)`` in [0, 1]; 1 = harmful.

    Raises:
        Misuse: a posterior without draws of effects: a point, a mean trajectory.
    """
    found = posterior.samples(key=key, draws=draws)
    if "staying" in found:
        effect = found["staying"]
    elif {"a", "b"} <= set(found.data_vars) and getattr(posterior.simulator, "keep", True):
        effect = found["b"] + found["a"] * posterior.runs["loss"].mean(("run", "time"))
    else:
        effect = xr.DataArray(np.zeros((1, 1)), dims=("chain", "draw"))
    if effect.sizes["chain"] * effect.sizes["draw"] < 2:
        raise Misuse(
            "posterior",
            got="no draws of effects",
            expected="a fit that draws effects of examples",
            do="fit with Exact(), NUTS() or SVI(); rank a point's effects themselves",
        )
    harm = (effect.sum("query") > 0).mean(("chain", "draw"))
    return harm.rename("harm").assign_attrs(
        long_name="probability that the example raises the summed loss", units="1", draws=draws
    )


def average_precision(
    suspicion: Float[np.ndarray, " train"], wrong: Bool[np.ndarray, " train"]
) -> float:
    """Mean over the wrong examples of the precision where each is found; NaN where none is wrong.

    Examples of equal suspicion are looked at together.

    >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True])).__round__(4)
    0.8333
    """
    precision, _ = _curve(suspicion, wrong)
    order = np.argsort(-suspicion, kind="stable")
    kept = wrong[order]
    return float(precision[kept].mean()) if kept.any() else float("nan")


def detection(
    suspicion: xr.DataArray,
    wrong: Bool[np.ndarray, " train"] | Sequence[bool],
    *,
    key: jax.Array,
    resamples: int = 500,
    probability: float = INTERVAL,
) -> xr.Dataset:
    """Precision and recall of looking at examples in order of suspicion, with bootstrap bands.

    Args:
        suspicion: ``(train,)``, higher = looked at sooner: self-influence, probability of harm.
        wrong: which examples are mislabelled, in the order of ``suspicion``.
        key: decides the resamples of examples.
        resamples: of the bootstrap.
        probability: of the bands.

    Returns:
        Along ``examined`` (share of the examples looked at): ``precision`` and ``recall`` with
        ``_low`` and ``_high``; and ``average_precision`` with both. What a blind search has is the
        attribute ``share``.

    Raises:
        Misuse: numbers that are not finite, another number of them, none or all wrong.
    """
    keyed(key)
    positive_integer("resamples", resamples)
    unit_interval("probability", probability)
    values, truth = _checked(suspicion, np.asarray(wrong, bool))
    count = len(values)
    chosen = np.asarray(jax.random.randint(key, (resamples, count), 0, count))
    chosen = chosen[truth[chosen].any(axis=1)]
    curves = np.array([_curve(values[one], truth[one]) for one in chosen])
    averages = np.array([average_precision(values[one], truth[one]) for one in chosen])
    tails = [(1.0 - probability) / 2.0, (1.0 + probability) / 2.0]
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name, best, drawn, dims in (
        ("precision", _curve(values, truth)[0], curves[:, 0], ("examined",)),
        ("recall", _curve(values, truth)[1], curves[:, 1], ("examined",)),
        ("average_precision", np.array(average_precision(values, truth)), averages, ()),
    ):
        low, high = np.quantile(drawn, tails, axis=0)
        for end, one in (("", best), ("_low", low), ("_high", high)):
            found[f"{name}{end}"] = (dims, np.asarray(one))
    return xr.Dataset(
        found,
        coords={"examined": np.arange(1, count + 1) / count},
        attrs={
            "share": float(truth.mean()),
            "probability": probability,
            "ranking": str(suspicion.attrs.get("method", suspicion.name or "")),
        },
    )


def _curve(
    suspicion: Float[np.ndarray, " train"], wrong: Bool[np.ndarray, " train"]
) -> tuple[Float[np.ndarray, " train"], Float[np.ndarray, " train"]]:
    """Precision and recall after each example, those of equal suspicion looked at together."""
    order = np.argsort(-suspicion, kind="stable")
    ranked, sorted_values = np.cumsum(wrong[order]), suspicion[order]
    last = _last_of_ties(sorted_values)
    found = ranked[last]
    return found / (last + 1.0), found / max(int(ranked[-1]), 1)


def _last_of_ties(ordered: Float[np.ndarray, " train"]) -> Int[np.ndarray, " train"]:
    """Place of the last of each one's equals, in a sorted array.

    >>> _last_of_ties(np.array([3.0, 2.0, 2.0, 1.0])).tolist()
    [0, 2, 2, 3]
    """
    ends = np.append(ordered[1:] != ordered[:-1], True)
    places = np.flatnonzero(ends)
    return places[np.cumsum(ends) - ends]


def _checked(
    suspicion: xr.DataArray, wrong: Bool[np.ndarray, " other"]
) -> tuple[Float[np.ndarray, " train"], Bool[np.ndarray, " train"]]:
    values = np.asarray(suspicion.values, float)
    if suspicion.dims != ("train",) or values.shape != wrong.shape:
        raise Misuse(
            "suspicion",
            got=f"dimensions {suspicion.dims} of {values.shape}, and {len(wrong)} marks",
            expected="one number for each training example and a mark for each",
            do="take the diagonal or the sum over queries, in the order of the marks",
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise Misuse(
            f"suspicion of example {suspicion['train'].values[bad[0]]}",
            got=f"{values[bad[0]]}",
            expected="finite numbers",
            do="look at that example's loss and gradient",
        )
    if wrong.all() or not wrong.any():
        raise Misuse(
            "wrong", got=f"{int(wrong.sum())} of {len(wrong)}", expected="some but not all",
            do="flip labels with flip_labels",
        )  # fmt: skip
    return values, wrong
