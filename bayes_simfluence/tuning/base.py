"""What every tuning is: a split of a network's tensors into trained parameters and frozen tensors.

A tuning also says how both make the flat dict of tensors that the network takes. Gradients and
optimizer state exist for the trained parameters alone; the network knows nothing of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.requirements import Shapes
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.layers import in_head

Assemble = Callable[[Tensors, Tensors], Tensors]


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
            sum(x.size for x in tensors.values() if jnp.issubdtype(x.dtype, jnp.floating))
            for tensors in (self.params, self.frozen)
        )
        total = trained + frozen
        return {"trained": trained, "total": total, "share": trained / total}

    def as_dict(self) -> dict[str, Any]:
        """The tuning's settings and counts as plain values, for a store's attributes."""
        return {**self.tuning.as_dict(), **self.counts()}


@dataclass(frozen=True)
class Tuning(ABC):
    """A choice of what is trained."""

    NAME: ClassVar[str]
    """What settings call it."""

    @abstractmethod
    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """Split ``tensors``, a network's own and its head's, for training to start.

        Args:
            tensors: every tensor of the network, under the checkpoint's names.
            family: ``model_type`` of its ``config.json``; decides default targets.
            key: decides random starts.

        Raises:
            Misuse: a pattern that matches nothing, a family without defaults, nothing to train.
        """

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, the name first."""
        patterns = {name: list(x) for name, x in vars(self).items() if isinstance(x, list | tuple)}
        return {"name": self.NAME, **vars(self), **patterns}

    def adapting(self) -> "Adapting":
        """The tuning itself when what it trains is an adapter.

        Raises:
            Misuse: it trains tensors of the network.
        """
        raise Misuse(
            "tuning",
            got=type(self).__name__,
            expected="LoRA or IA3",
            do="save the whole checkpoint instead",
        )


@dataclass(frozen=True)
class Adapting(Tuning):
    """A tuning of adapters: small parameters beside each chosen layer train, and the head.

    Names, shapes and settings of the parameters are those of the ``peft`` library.
    """

    PEFT_TYPE: ClassVar[str]
    """peft's name of the method."""

    ENDINGS: ClassVar[tuple[str, ...]]
    """What follows a layer's name in the names of its parameters."""

    PATTERNS: ClassVar[tuple[str, ...]] = ("targets",)
    """Names of the settings that name layers, ``targets`` (those to adapt) first."""

    @abstractmethod
    def shapes(self, layer: str, inward: int, outward: int) -> Shapes:
        """Names and shapes of the parameters of one adapted layer.

        Args:
            inward, outward: lengths of the layer's input and output.
        """

    @abstractmethod
    def merged(self, params: Tensors, frozen: Tensors, *, family: str) -> Tensors:
        """All tensors of the network, the adapters in them; the head is taken as it is.

        Args:
            params: parameters of the adapted layers, and the head.
            frozen: every other tensor of the network.
            family: ``model_type`` of the network.
        """

    @abstractmethod
    def peft_settings(self, layers: Sequence[str], prefix: str) -> dict[str, Any]:
        """The method's own settings in peft's words.

        Args:
            layers: the adapted layers.
            prefix: what the PyTorch model puts before their names.
        """

    @classmethod
    @abstractmethod
    def of_peft(
        cls, config: Mapping[str, Any], params: Tensors, layers: Sequence[str], where: str
    ) -> "Adapting":
        """The tuning of an adapter that peft's settings and its parameters describe.

        Args:
            where: the file of the settings, for messages.

        Raises:
            Misuse: settings that the parameters contradict.
        """

    def adapting(self) -> "Adapting":
        """The tuning itself."""
        return self

    @classmethod
    def layer_of(cls, name: str) -> str:
        """The layer that a parameter adapts; the name itself where it adapts none."""
        ending = next((end for end in cls.ENDINGS if name.endswith(end)), "")
        return name.removesuffix(ending)

    @classmethod
    def adapted(cls, params: Tensors) -> list[str]:
        """Names of the layers that parameters adapt, in order."""
        return sorted({cls.layer_of(name) for name in params if name.endswith(cls.ENDINGS)})

    def renamed(self, names: Mapping[str, str]) -> "Adapting":
        """The tuning with other names of its layers, all of which it names in full."""
        layers = {setting: getattr(self, setting) or () for setting in self.PATTERNS}
        return replace(
            self, **{setting: tuple(names[x] for x in old) for setting, old in layers.items()}
        )

    def beside(self, tensors: Tensors, adapter: Tensors, family: str) -> Tuned:
        """The split in which ``adapter`` trains, and the head: its own, or that of ``tensors``."""
        head = {name: value for name, value in tensors.items() if in_head(name)}
        frozen = {name: value for name, value in tensors.items() if name not in head}
        assemble = partial(self.merged, family=family)
        return Tuned({**head, **adapter}, frozen, assemble, self, family)
