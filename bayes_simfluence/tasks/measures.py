"""Query metrics besides the loss: log-odds of the right answer, and whether they are above 0."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayes_simfluence.checks import Misuse, shorten

Measure = Callable[[Any, Any], Float[Array, ""]]


def margin(scores: Float[Array, " answer"], right: Int[Array, ""]) -> Float[Array, ""]:
    """Log-odds of the right answer against the best other one, nats; above 0 where it wins.

    >>> import jax.numpy as jnp
    >>> float(margin(jnp.array([0.5, 2.0, 1.0]), jnp.array(1)))
    1.0
    """
    others = jnp.where(jnp.arange(len(scores)) == right, -jnp.inf, scores)
    return scores[right] - others.max()


def measures(margin: Measure) -> dict[str, Measure]:
    """The metric ``margin`` of a task, and ``accuracy``: 1 where it is above 0, otherwise 0."""

    def accuracy(weights: Any, example: Any) -> Float[Array, ""]:
        least = margin(weights, example)
        return (least > 0).astype(least.dtype)

    return {"accuracy": accuracy, "margin": margin}


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
