"""IA3: vectors that scale what layers read or write (Liu et al. 2022, arXiv 2205.05638)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.networks.families import family_of
from bayes_simfluence.networks.layers import wide
from bayes_simfluence.networks.network import Family
from bayes_simfluence.networks.requirements import Shapes
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.base import Adapting, Tuned
from bayes_simfluence.tuning.layers import (
    chosen_layers,
    fans,
    has_wildcards,
    in_head,
    linear_layers,
    matched,
)

VECTOR = ".ia3_l"


@dataclass(frozen=True)
class IA3(Adapting):
    """Vectors that scale the outputs (or inputs) of layers train, and the head.

    Attributes:
        targets: layers to adapt, described as for ``LoRA``; the family's ``ia3_targets`` when
            omitted.
        feedforward: those of ``targets`` whose input is scaled, not the output; the family's
            ``ia3_feedforward`` when omitted.
    """

    NAME: ClassVar[str] = "ia3"
    PEFT_TYPE: ClassVar[str] = "IA3"
    ENDINGS: ClassVar[tuple[str, ...]] = (VECTOR,)
    PATTERNS: ClassVar[tuple[str, ...]] = ("targets", "feedforward")

    targets: Sequence[str] | None = None
    feedforward: Sequence[str] | None = None

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``. Nothing is random: vectors of ones, float32, so training starts at
        the checkpoint's weights."""
        row = family_of(family)
        targets, layers = chosen_layers(
            "targets", self.targets, row.ia3_targets, family, linear_layers(tensors, row)
        )
        tuning = IA3(targets, self._feedforward_patterns(row, family, layers))
        params: Tensors = {}
        for layer in layers:
            for name, shape in tuning.shapes(layer, *fans(tensors, layer, row)).items():
                params[name] = jnp.ones(shape, jnp.float32)
        return tuning.beside(tensors, params, family)

    def shapes(self, layer: str, inward: int, outward: int) -> Shapes:
        """(1, in) where the input is scaled, (out, 1) elsewhere."""
        scales_input = bool(self._scaled_inputs([layer]))
        return {layer + VECTOR: (1, inward) if scales_input else (outward, 1)}

    def merged(self, params: Tensors, frozen: Tensors, *, family: str) -> Tensors:
        """All tensors of the network, the outputs (or inputs) of each adapted layer scaled.

        Liu et al. 2022, section 3.3. Scaling an output scales weight and bias; scaling the input
        of a feedforward layer scales the weight alone.
        """
        row, layers = family_of(family), self.adapted(params)
        tensors = {**frozen, **{name: x for name, x in params.items() if in_head(name)}}
        inputs = self._scaled_inputs(layers)
        for layer in layers:
            weight, bias, vector = f"{layer}.weight", f"{layer}.bias", params[layer + VECTOR]
            tensors[weight] = _scaled(frozen[weight], vector.T if row.transposes(layer) else vector)
            if layer not in inputs and bias in frozen:
                tensors[bias] = _scaled(frozen[bias], vector[:, 0])
        return tensors

    def peft_settings(self, layers: Sequence[str], prefix: str) -> dict[str, Any]:
        """As in ``Adapting``; full names wherever peft would read a pattern otherwise."""
        targets, feedforward = list(self.targets or ()), list(self.feedforward or ())
        inputs = self._scaled_inputs(layers)
        # peft wants the second among the first, and compares the ends of names, dots or not.
        theirs = {layer for layer in layers if layer.endswith(tuple(feedforward))}
        plain = not has_wildcards(targets + feedforward) and set(feedforward) <= set(targets)
        if not plain or inputs != theirs:
            targets = [f"{prefix}{layer}" for layer in layers]
            feedforward = [f"{prefix}{layer}" for layer in sorted(inputs)]
        settings = {"target_modules": targets, "feedforward_modules": feedforward}
        return {**settings, "init_ia3_weights": True}

    @classmethod
    def of_peft(
        cls, config: Mapping[str, Any], params: Tensors, layers: Sequence[str], where: str
    ) -> "IA3":
        """As in ``Adapting``; the shapes say which layers' inputs are scaled."""
        inputs = tuple(layer for layer in layers if params[layer + VECTOR].shape[0] == 1)
        return cls(tuple(layers), inputs)

    def _feedforward_patterns(
        self, row: Family, family: str, layers: Sequence[str]
    ) -> tuple[str, ...]:
        """The patterns that count of layers whose input is scaled, among the adapted layers."""
        if self.feedforward is None and row.ia3_feedforward:
            return tuple(pattern for pattern in row.ia3_feedforward if matched(layers, pattern))
        if self.feedforward is not None and len(self.feedforward) == 0:
            return ()
        return chosen_layers("feedforward", self.feedforward, (), family, layers)[0]

    def _scaled_inputs(self, layers: Sequence[str]) -> set[str]:
        """Those of the layers whose input is scaled."""
        return {layer for pattern in self.feedforward or () for layer in matched(layers, pattern)}


def _scaled(value: Float[Array, "..."], by: Float[Array, "..."]) -> Float[Array, "..."]:
    return (wide(value) * by).astype(value.dtype)
