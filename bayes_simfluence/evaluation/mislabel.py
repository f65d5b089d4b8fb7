"""Finding mislabelled examples: flip some labels, rank all examples, see how early they rank.

As in Koh and Liang (2017, section 5.4) and Pruthi et al. (2020, section 4.1), whose ranking is
self-influence; here also by the posterior probability that an example does harm.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from bayes_simfluence.checks import Misuse, keyed, positive_integer, unit_interval
from bayes_simfluence.evaluation.metrics import INTERVAL, resamples_of, tails
from bayes_simfluence.posterior.posterior import Posterior

Label = TypeVar("Label", bound=Hashable)


class Flipped(NamedTuple):
    """Labels, some of which were exchanged for wrong ones.

    Attributes:
        labels: in the order of the examples.
        flipped: which ones are wrong.
    """

    labels: list[Any]
    flipped: Bool[np.ndarray, " train"]


def flip_labels(labels: Sequence[Label], share: float, *, key: jax.Array) -> Flipped:
    """A share of the labels, drawn at random, each exchanged for another of the labels.

    Args:
        labels: one for each example: words or codes.
        share: of the examples, in (0, 1); at least one is flipped.
        key: decides which, and what they become.

    >>> import jax
    >>> noisy = flip_labels(["a", "b", "a", "b"], 0.5, key=jax.random.key(0))
    >>> int(noisy.flipped.sum())
    2

    Raises:
        Misuse: a share outside (0, 1), labels that are all the same.
    """
    keyed(key)
    kinds = sorted(set(labels), key=str)
    if len(kinds) < 2:
        raise Misuse(
            "labels", got=f"{len(kinds)} different", expected="at least two",
            do="pass labels of two classes or more",
        )  # fmt: skip
    if not 0 < share < 1:
        raise Misuse("share", got=share, expected="a number in (0, 1)", do="pass such a share")
    count = max(1, round(share * len(labels)))
    which, turn = jax.random.split(key)
    places = np.asarray(jax.random.choice(which, len(labels), (count,), replace=False))
    turns = np.asarray(jax.random.randint(turn, (count,), 1, len(kinds)))
    noisy, flipped = list(labels), np.zeros(len(labels), bool)
    for place, by in zip(places, turns, strict=True):
        noisy[place] = kinds[(kinds.index(labels[place]) + int(by)) % len(kinds)]
    flipped[places] = True
    return Flipped(noisy, flipped)


def probability_of_harm(posterior: Posterior, *, key: jax.Array, draws: int = 1000) -> xr.DataArray:
    """Posterior probability that training on an example raises the summed loss of the queries.

    The effect of an example on a query is the one that stays (``staying``, on the scale of the
    model's link), or ``a`` times the query's mean recorded loss plus ``b`` where the model has
    these.

    Args:
        posterior: a fit with draws of effects.
        key: decides the draws.
        draws: number of draws; ignored where the simulator holds draws of its own.

    Returns:
        ``(train,)`` in [0, 1]; 1 = harmful.

    Raises:
        Misuse: a posterior without draws of effects: a point, a mean trajectory.
    """
    samples = posterior.samples(key=key, draws=draws)
    if "staying" in samples:
        effect = samples["staying"]
    elif {"a", "b"} <= set(samples.data_vars) and posterior.simulator.has_effects:
        effect = samples["b"] + samples["a"] * posterior.runs["loss"].mean(("run", "time"))
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

    Examples of equal suspicion are examined together.

    >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True])).__round__(4)
    0.8333
    """
    return _curve(suspicion, wrong)[2]


def detection(
    suspicion: xr.DataArray,
    wrong: Bool[np.ndarray, " train"] | Sequence[bool],
    *,
    key: jax.Array,
    resamples: int = 500,
    probability: float = INTERVAL,
) -> xr.Dataset:
    """Precision and recall of examining examples in order of suspicion, with bootstrap bands.

    Args:
        suspicion: ``(train,)``, higher = examined sooner: self-influence, probability of harm.
        wrong: which examples are mislabelled, in the order of ``suspicion``.
        key: decides the resamples of examples.
        resamples: of the bootstrap.
        probability: of the bands.

    Returns:
        Along ``examined`` (share of the examples examined so far): ``precision`` and ``recall``
        with ``_low`` and ``_high``; and ``average_precision`` with both. The attribute ``share`` is
        the share of wrong labels, which is the precision of a random order.

    Raises:
        Misuse: suspicions that are not finite, or not as many as marks; none or all wrong.
    """
    keyed(key)
    positive_integer("resamples", resamples)
    unit_interval("probability", probability)
    values, truth = _checked(suspicion, np.asarray(wrong, bool))
    count = len(values)
    chosen = resamples_of(key, resamples, count)
    chosen = chosen[truth[chosen].any(axis=1)]
    resampled = [_curve(values[again], truth[again]) for again in chosen]
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name, value, *again in zip(
        ("precision", "recall", "average_precision"), _curve(values, truth), *resampled, strict=True
    ):
        low, high = np.quantile(again, tails(probability), axis=0)
        for end, values_at in (("", value), ("_low", low), ("_high", high)):
            variables[f"{name}{end}"] = (("examined",)[: np.ndim(value)], np.asarray(values_at))
    return xr.Dataset(
        variables,
        coords={"examined": np.arange(1, count + 1) / count},
        attrs={
            "share": float(truth.mean()),
            "probability": probability,
            "ranking": str(suspicion.attrs.get("method", suspicion.name or "")),
        },
    )


def _curve(
    suspicion: Float[np.ndarray, " train"], wrong: Bool[np.ndarray, " train"]
) -> tuple[Float[np.ndarray, " train"], Float[np.ndarray, " train"], float]:
    """Precision and recall after each example, those of equal suspicion taken together, and the
    average precision."""
    order = np.argsort(-suspicion, kind="stable")
    marks, sorted_values = wrong[order], suspicion[order]
    ranked = np.cumsum(marks)
    last = np.searchsorted(-sorted_values, -sorted_values, side="right") - 1
    hits = ranked[last]
    precision = hits / (last + 1.0)
    average = float(precision[marks].mean()) if marks.any() else float("nan")
    return precision, hits / max(int(ranked[-1]), 1), average


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
            do="check that example's loss and gradient",
        )
    if wrong.all() or not wrong.any():
        raise Misuse(
            "wrong", got=f"{int(wrong.sum())} of {len(wrong)}", expected="some but not all",
            do="flip labels with flip_labels",
        )  # fmt: skip
    return values, wrong
