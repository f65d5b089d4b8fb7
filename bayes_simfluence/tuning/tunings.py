"""What is trained: all weights, the head, or adapters, as reparametrisations of the tensors.

A ``Tuning`` splits the flat dict of a network's tensors into trained parameters and frozen tensors,
and says how both make the dict that the network takes. Gradients and optimizer state exist for the
trained parameters alone; the network knows nothing of it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bayes_simfluence.checks import (
    Misuse,
    choice_of,
    keyed,
    positive_integer,
    positive_number,
    shorten,
)
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.adapters import (
    IA3_FEEDFORWARD,
    IA3_TARGETS,
    LORA_TARGETS,
    chosen_modules,
    ia3_begin,
    ia3_merged,
    in_head,
    linear_modules,
    lora_begin,
    lora_merged,
    matched,
)

__all__ = ["FULL", "IA3", "Full", "Head", "LoRA", "Tuned", "Tuning", "tuning_of"]

Assemble = Callable[[Tensors, Tensors], Tensors]

NEVER_TRAINED = ("position_ids", "masked_bias", "inv_freq")
"""Last parts of the names of constants that some checkpoints store among their weights."""


@dataclass(frozen=True)
class Tuned:
    """A network's tensors, split into what trains and what does not.

    Attributes:
        params: what trains, and nothing else: the optimizer's state is as large.
        frozen: the other tensors.
        assemble: ``assemble(params, frozen)`` gives the tensors that the network takes; pure,
            differentiable, and cheap: called once for a batch, not for each example.
        tuning: how the tensors were split, with the choices filled in that were left open.
        family: ``model_type`` of the network's ``config.json``.
    """

    params: Tensors
    frozen: Tensors
    assemble: Assemble
    tuning: "Tuning"
    family: str

    def counts(self) -> dict[str, int | float]:
        """Numbers ``trained``, ``total`` (adapters included) and the ``share`` of the first."""
        trained, frozen = (
            sum(one.size for one in tensors.values() if jnp.issubdtype(one.dtype, jnp.floating))
            for tensors in (self.params, self.frozen)
        )
        total = trained + frozen
        return {"trained": trained, "total": total, "share": trained / total}

    def as_dict(self) -> dict[str, Any]:
        """The tuning's settings and counts as plain values, for a store's attributes."""
        return {**self.tuning.as_dict(), **self.counts()}


@runtime_checkable
class Tuning(Protocol):
    """A choice of what is trained."""

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """Split ``tensors``, a network's own and its head's, for training to start.

        Args:
            tensors: every tensor of the network, under the checkpoint's names.
            family: ``model_type`` of its ``config.json``; decides default targets.
            key: decides random starts.

        Raises:
            Misuse: a pattern that matches nothing, a family without defaults, nothing to train.
        """
        ...

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, the name first."""
        ...


@dataclass(frozen=True)
class Full:
    """Every floating tensor trains, except those that are excluded.

    Attributes:
        exclude: patterns of tensors that stay frozen: a name, or what follows one of its dots, with
            shell wildcards (``"embeddings.*"``, ``"encoder.layer.0.*"``, ``"LayerNorm.bias"``).

    >>> tensors = {"embeddings.weight": jnp.ones((3, 2)), "dense.weight": jnp.ones((2, 2))}
    >>> tuned = Full(exclude=["embeddings.*"]).begin(tensors, family="bert", key=jax.random.key(0))
    >>> sorted(tuned.params), tuned.counts()
    (['dense.weight'], {'trained': 4, 'total': 10, 'share': 0.4})
    """

    exclude: Sequence[str] = ()

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``; nothing is random."""
        trainable = _trainable(tensors)
        patterns = _sequence("exclude", self.exclude)
        excluded: set[str] = set()
        for pattern in patterns:
            some = matched(tensors, pattern)
            if not some:
                raise Misuse(
                    f"exclude {pattern!r}",
                    got="no tensor of that name",
                    expected=f"a tensor's name or its end, wildcards allowed: {shorten(tensors)}",
                    do="correct it, or leave it out",
                )
            excluded.update(some)
        trained = [name for name in trainable if name not in excluded]
        if not trained:
            raise Misuse(
                "exclude",
                got=f"patterns {shorten(patterns)}, which match every tensor",
                expected="at least one tensor to train",
                do="exclude less",
            )
        return _split(tensors, trained, replace(self, exclude=patterns), family)

    def as_dict(self) -> dict[str, Any]:
        """``{"name": "full", "exclude": [...]}``."""
        return {"name": "full", "exclude": list(self.exclude)}


@dataclass(frozen=True)
class Head:
    """Only the head trains: the tensors ``classifier.*``."""

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

    def as_dict(self) -> dict[str, Any]:
        """``{"name": "head"}``."""
        return {"name": "head"}


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes ``alpha / rank * B A`` of weight matrices train, and the head.

    Hu et al. 2021, arXiv 2106.09685. Fused projections (GPT-2's ``c_attn``, Pythia's
    ``query_key_value``) get one change, as in peft. There is no dropout.

    Attributes:
        rank: rows of A and columns of B, >= 1.
        alpha: the change is scaled by ``alpha / rank``, > 0.
        targets: layers to adapt: a layer's name, or what follows one of its dots, shell wildcards
            allowed; the family's default (``adapters.LORA_TARGETS``) when omitted.
    """

    rank: int = 8
    alpha: int | float = 16
    targets: Sequence[str] | None = None

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``; A is random, B zero, so training starts at the checkpoint's weights."""
        keyed(key)
        rank, alpha = positive_integer("rank", self.rank), positive_number("alpha", self.alpha)
        targets, modules = chosen_modules(
            "targets", self.targets, LORA_TARGETS, family, linear_modules(tensors)
        )
        params = lora_begin(tensors, modules, rank=rank, family=family, key=key)
        return _adapted(tensors, params, LoRA(rank, alpha, targets), family)

    def merging(self, family: str) -> Assemble:
        """``Tuned.assemble`` of these settings."""
        return partial(lora_merged, scale=self.alpha / self.rank, family=family)

    def as_dict(self) -> dict[str, Any]:
        """``{"name": "lora", "rank": ..., "alpha": ..., "targets": ...}``."""
        return {"name": "lora", **asdict(self), "targets": _listed(self.targets)}


@dataclass(frozen=True)
class IA3:
    """Vectors that scale the outputs (or inputs) of layers train, and the head.

    Liu et al. 2022, arXiv 2205.05638.

    Attributes:
        targets: layers to adapt, described as for ``LoRA``; the family's default
            (``adapters.IA3_TARGETS``) when omitted.
        feedforward: those of ``targets`` whose input is scaled, not the output; the family's
            (``adapters.IA3_FEEDFORWARD``) when omitted.
    """

    targets: Sequence[str] | None = None
    feedforward: Sequence[str] | None = None

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``; nothing is random: training starts at the checkpoint's weights."""
        targets, modules = chosen_modules(
            "targets", self.targets, IA3_TARGETS, family, linear_modules(tensors)
        )
        tuning = IA3(targets, self._inner_patterns(family, modules))
        params = ia3_begin(tensors, modules, feedforward=tuning.feedforward or (), family=family)
        return _adapted(tensors, params, tuning, family)

    def merging(self, family: str) -> Assemble:
        """``Tuned.assemble`` of these settings, ``feedforward`` filled in."""
        return partial(ia3_merged, feedforward=tuple(self.feedforward or ()), family=family)

    def _inner_patterns(self, family: str, modules: Sequence[str]) -> tuple[str, ...]:
        """The patterns of feedforward layers that count, among the adapted layers."""
        if self.feedforward is None and family in IA3_FEEDFORWARD:
            return tuple(one for one in IA3_FEEDFORWARD[family] if matched(modules, one))
        if self.feedforward is not None and len(self.feedforward) == 0:
            return ()
        return chosen_modules("feedforward", self.feedforward, IA3_FEEDFORWARD, family, modules)[0]

    def as_dict(self) -> dict[str, Any]:
        """``{"name": "ia3", "targets": ..., "feedforward": ...}``."""
        said = {"targets": _listed(self.targets), "feedforward": _listed(self.feedforward)}
        return {"name": "ia3", **said}


FULL = Full()
NAMES = ("full", "head", "lora", "ia3")


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
            expected=f"it only with tuning {' or '.join(users)}",
            do=f"leave {setting} out, or change the tuning",
        )


def _names(value: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in value.split(",") if one.strip())


def _sequence(what: str, value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise Misuse(what, got=repr(value), expected="a sequence of names", do=f"pass [{value!r}]")
    return tuple(value)


def _listed(value: Sequence[str] | None) -> list[str] | None:
    return None if value is None else list(value)


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


def _adapted(
    tensors: Tensors,
    adapter: Tensors,
    tuning: "LoRA | IA3",
    family: str,
) -> Tuned:
    head = {name: value for name, value in tensors.items() if in_head(name)}
    frozen = {name: value for name, value in tensors.items() if name not in head}
    return Tuned({**adapter, **head}, frozen, tuning.merging(family), tuning, family)


def _together(params: Tensors, frozen: Tensors) -> Tensors:
    return {**frozen, **params}
