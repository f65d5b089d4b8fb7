"""Query metrics besides the loss, from one score for each possible answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, shorten

__all__ = ["Measure", "Scores", "accuracy", "chosen", "margin", "measures"]

Scores = Callable[[Any, Any], tuple[Float[Array, " answer"], Int[Array, ""]]]
"""``scores(weights, example)``: a score in nats for each answer, and which one is right."""

Measure = Callable[[Any, Any], Float[Array, ""]]


def margin(scores: Float[Array, " answer"], right: Int[Array, ""]) -> Float[Array, ""]:
    """Log-odds of the right answer against the best other one, nats; above 0 where it wins.

    >>> import jax.numpy as jnp
    >>> float(margin(jnp.array([0.5, 2.0, 1.0]), jnp.array(1)))
    1.0
    """
    others = jnp.where(jnp.arange(len(scores)) == right, -jnp.inf, scores)
    return scores[right] - others.max()


def accuracy(scores: Float[Array, " answer"], right: Int[Array, ""]) -> Float[Array, ""]:
    """1 when the right answer has the highest score, otherwise 0; a tie counts as wrong."""
    return (margin(scores, right) > 0).astype(scores.dtype)


def measures(scores: Scores) -> dict[str, Measure]:
    """``accuracy`` and ``margin`` as metrics of a task."""
    return {
        "accuracy": lambda weights, example: accuracy(*scores(weights, example)),
        "margin": lambda weights, example: margin(*scores(weights, example)),
    }


def chosen(metrics: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the known metrics that are wanted.

    Raises:
        Misuse: one that this task does not have.
    """
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise Misuse(
            "metrics",
            got=shorten(unknown),
            expected=f"those of this task: {shorten(known, 10) or 'none besides the loss'}",
            do="correct --metrics",
        )
    return {name: known[name] for name in metrics}
