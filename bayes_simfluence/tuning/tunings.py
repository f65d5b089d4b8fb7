"""What is trained: all weights, the head, or adapters, as reparametrisations of the tensors."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from bayes_simfluence.checks import Misuse, choice_of, positive_integer, positive_number, shorten
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.base import Tuned, Tuning
from bayes_simfluence.tuning.ia3 import IA3
from bayes_simfluence.tuning.layers import in_head, matched
from bayes_simfluence.tuning.lora import LoRA

__all__ = ["FULL", "IA3", "Full", "Head", "LoRA", "tuning_of"]

NEVER_TRAINED = ("position_ids", "masked_bias", "inv_freq")
"""Last parts of the names of constants that some checkpoints store among their weights."""


@dataclass(frozen=True)
class Full(Tuning):
    """Every floating tensor trains, except those that are excluded.

    Attributes:
        exclude: patterns of tensors that stay frozen: a name, or what follows one of its dots, with
            shell wildcards (``"embeddings.*"``, ``"encoder.layer.0.*"``, ``"LayerNorm.bias"``).

    >>> tensors = {"embeddings.weight": jnp.ones((3, 2)), "dense.weight": jnp.ones((2, 2))}
    >>> tuned = Full(exclude=["embeddings.*"]).begin(tensors, family="bert", key=jax.random.key(0))
    >>> sorted(tuned.params), tuned.counts()
    (['dense.weight'], {'trained': 4, 'total': 10, 'share': 0.4})
    """

    NAME: ClassVar[str] = "full"

    exclude: Sequence[str] = ()

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``; nothing is random."""
        trainable = _trainable(tensors)
        patterns = _sequence("exclude", self.exclude)
        excluded: set[str] = set()
        for pattern in patterns:
            matches = matched(tensors, pattern)
            if not matches:
                raise Misuse(
                    f"exclude {pattern!r}",
                    got="no tensor of that name",
                    expected=f"a tensor's name or its end, wildcards allowed: {shorten(tensors)}",
                    do="correct it, or leave it out",
                )
            excluded.update(matches)
        trained = [name for name in trainable if name not in excluded]
        if not trained:
            raise Misuse(
                "exclude",
                got=f"patterns {shorten(patterns)}, which match every tensor",
                expected="at least one tensor to train",
                do="exclude less",
            )
        return _split(tensors, trained, replace(self, exclude=patterns), family)


@dataclass(frozen=True)
class Head(Tuning):
    """Only the head trains: the tensors ``classifier.*``."""

    NAME: ClassVar[str] = "head"

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``; nothing is random."""
        trained = [name for name in _trainable(tensors) if in_head(name)]
        if not trained:
            raise Misuse(
                "tuning head",
                got="a network without tensors classifier.*",
                expected="a task with a classification head",
                do="choose tuning full, lora or ia3",
            )
        return _split(tensors, trained, self, family)


FULL = Full()
NAMES = tuple(tuning.NAME for tuning in (Full, Head, LoRA, IA3))


def tuning_of(
    name: str, *, rank: int = 8, alpha: int | float = 16, targets: str = "", exclude: str = ""
) -> Tuning:
    """The tuning that settings describe.

    Args:
        name: ``full``, ``head``, ``lora`` or ``ia3``.
        rank, alpha: of ``lora``.
        targets: of ``lora`` and ``ia3``, names with commas between; empty = the family's.
        exclude: of ``full``, patterns with commas between.

    >>> tuning_of("lora", rank=4, targets="query, key")
    LoRA(rank=4, alpha=16.0, targets=('query', 'key'))
    """
    choice_of("tuning", name, NAMES)
    _unused("targets", targets, name, ("lora", "ia3"))
    _unused("exclude", exclude, name, ("full",))
    if name == "full":
        return Full(_names(exclude))
    if name == "head":
        return Head()
    if name == "lora":
        positive_integer("rank", rank)
        return LoRA(rank, positive_number("alpha", alpha), _names(targets) or None)
    return IA3(_names(targets) or None)


def _unused(setting: str, value: str, name: str, users: Sequence[str]) -> None:
    if value and name not in users:
        raise Misuse(
            setting,
            got=f"{value!r} with tuning {name!r}",
            expected=f"no value, except with tuning {' or '.join(users)}",
            do=f"leave {setting} out, or change the tuning",
        )


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _sequence(what: str, value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise Misuse(what, got=repr(value), expected="a sequence of names", do=f"pass [{value!r}]")
    return tuple(value)


def _trainable(tensors: Tensors) -> list[str]:
    """Names of weights; four axes are the causal mask that old GPT-2 checkpoints store."""
    return [
        name
        for name, value in tensors.items()
        if jnp.issubdtype(value.dtype, jnp.floating)
        and name.split(".")[-1] not in NEVER_TRAINED
        and value.ndim < 4
    ]


def _split(tensors: Tensors, trained: Collection[str], tuning: Tuning, family: str) -> Tuned:
    params = {name: tensors[name] for name in trained}
    frozen = {name: value for name, value in tensors.items() if name not in params}
    return Tuned(params, frozen, _together, tuning, family)


def _together(params: Tensors, frozen: Tensors) -> Tensors:
    return {**frozen, **params}
