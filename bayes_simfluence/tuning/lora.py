"""LoRA: low-rank changes of weight matrices (Hu et al. 2021, arXiv 2106.09685)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bayes_simfluence.checks import Misuse, keyed, positive_integer, positive_number, shorten
from bayes_simfluence.networks.families import family_of
from bayes_simfluence.networks.layers import wide
from bayes_simfluence.networks.requirements import Shapes
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.base import Adapting, Tuned
from bayes_simfluence.tuning.layers import (
    chosen_layers,
    fans,
    has_wildcards,
    in_head,
    linear_layers,
)

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoRA(Adapting):
    """Low-rank changes ``alpha / rank * B A`` of weight matrices train, and the head.

    Fused projections (GPT-2's ``c_attn``, Pythia's ``query_key_value``) get one change, as in
    peft. There is no dropout.

    Attributes:
        rank: rows of A and columns of B, >= 1.
        alpha: the change is scaled by ``alpha / rank``, > 0.
        targets: layers to adapt: a layer's name, or what follows one of its dots, shell wildcards
            allowed; the family's ``lora_targets`` when omitted.
    """

    NAME: ClassVar[str] = "lora"
    PEFT_TYPE: ClassVar[str] = "LORA"
    ENDINGS: ClassVar[tuple[str, ...]] = (DOWN, UP)

    rank: int = 8
    alpha: int | float = 16
    targets: Sequence[str] | None = None

    def begin(self, tensors: Tensors, *, family: str, key: jax.Array) -> Tuned:
        """As in ``Tuning``. B is zero and A uniform in +-1/sqrt(in), float32, as in peft, so
        training starts at the checkpoint's weights."""
        keyed(key)
        rank, alpha = positive_integer("rank", self.rank), positive_number("alpha", self.alpha)
        row = family_of(family)
        targets, layers = chosen_layers(
            "targets", self.targets, row.lora_targets, family, linear_layers(tensors, row)
        )
        tuning = LoRA(rank, alpha, targets)
        params: Tensors = {}
        for layer, layer_key in zip(layers, jax.random.split(key, len(layers)), strict=True):
            inward, outward = fans(tensors, layer, row)
            bound = inward**-0.5
            shapes = tuning.shapes(layer, inward, outward)
            params[layer + DOWN] = jax.random.uniform(
                layer_key, shapes[layer + DOWN], jnp.float32, minval=-bound, maxval=bound
            )
            params[layer + UP] = jnp.zeros(shapes[layer + UP], jnp.float32)
        return tuning.beside(tensors, params, family)

    def shapes(self, layer: str, inward: int, outward: int) -> Shapes:
        """A is (rank, in), B is (out, rank)."""
        return {layer + DOWN: (self.rank, inward), layer + UP: (outward, self.rank)}

    def merged(self, params: Tensors, frozen: Tensors, *, family: str) -> Tensors:
        """All tensors of the network, ``alpha / rank * B A`` added to each adapted weight.

        Hu et al. 2021, section 4.1.
        """
        row, scale = family_of(family), self.alpha / self.rank
        tensors = {**frozen, **{name: x for name, x in params.items() if in_head(name)}}
        for layer in self.adapted(params):
            up, down, weight = params[layer + UP], params[layer + DOWN], frozen[f"{layer}.weight"]
            # A small product whose rounding would enter every weight: no reduced precision.
            change = scale * jnp.matmul(up, down, precision="highest")
            change = change.T if row.transposes(layer) else change
            tensors[f"{layer}.weight"] = (wide(weight) + change).astype(weight.dtype)
        return tensors

    def peft_settings(self, layers: Sequence[str], prefix: str) -> dict[str, Any]:
        """As in ``Adapting``. peft has no wildcards: full names stand for them."""
        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        targets = list(self.targets or ())
        if has_wildcards(targets):
            targets = [f"{prefix}{layer}" for layer in layers]
        settings = {"r": self.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
        return {**settings, "target_modules": targets}

    @classmethod
    def of_peft(
        cls, config: Mapping[str, Any], params: Tensors, layers: Sequence[str], where: str
    ) -> "LoRA":
        """As in ``Adapting``; ``targets`` are the full names of the layers."""
        rank, alpha = config.get("r"), config.get("lora_alpha")
        others = [layer for layer in layers if params[layer + DOWN].shape[0] != rank]
        if not isinstance(alpha, int | float) or others:
            raise Misuse(
                where,
                got=f"r {rank!r} and lora_alpha {alpha!r}"
                + (f", and tensors of another rank ({shorten(others, 1)})" if others else ""),
                expected="the rank and scale of its tensors",
                do="copy both files of the adapter again",
            )
        return cls(int(params[layers[0] + DOWN].shape[0]), float(alpha), tuple(layers))
