"""Linear layers and tables of rows among the parameters of a function.

A matrix that only multiplies vectors, or only gives rows, has a gradient of low rank: what entered
the product (or which rows were taken) and the gradient of what left it determine it. Probes of
zeros, added to what leaves, have that gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from bayes_simfluence.attribution.gradients.trace import Reader, Use

Probes = Mapping[int, Sequence[Array]]
"""Number of a parameter -> an array (token x outward) for each of its uses."""


class Layer(NamedTuple):
    """A matrix that multiplies vectors or gives rows wherever it is used.

    Attributes:
        shape: of the matrix.
        uses: in the order of the computation.
        bias: number of the parameter that is added to each product, and used nowhere else; None
            where there is none.
    """

    shape: tuple[int, int]
    uses: tuple[Use, ...]
    bias: int | None

    @property
    def multiplied(self) -> int:
        """Vectors that it multiplies."""
        return sum(use.tokens for use in self.uses) - self.taken

    @property
    def taken(self) -> int:
        """Rows that are taken from it."""
        return sum(use.tokens for use in self.uses if use.kind == "rows")


def layers_of(closed: ClosedJaxpr, leaves: int) -> dict[int, Layer]:
    """Those of the first ``leaves`` arguments of a trace that are linear layers or tables of rows.

    A matrix that is used in any other way as well is not among them.
    """
    reader = Reader(lambda use, entered, left: left)
    jax.eval_shape(lambda *args: reader.outputs(closed, leaves, args), *closed.in_avals)
    layers = {}
    for leaf in sorted({use.leaf for use in reader.uses} - reader.others):
        numbers = [at for at, use in enumerate(reader.uses) if use.leaf == leaf]
        uses = tuple(reader.uses[at] for at in numbers)
        layers[leaf] = Layer(closed.in_avals[leaf].shape, uses, reader.bias_of(numbers))
    return layers


def probes_of(layers: Mapping[int, Layer]) -> dict[int, list[Array]]:
    """Probes of zeros for each use of the layers."""
    return {
        leaf: [jnp.zeros((use.tokens, use.outward), use.dtype) for use in layer.uses]
        for leaf, layer in layers.items()
    }


def with_probes(
    closed: ClosedJaxpr, leaves: int, args: Sequence[Any], probes: Probes
) -> tuple[list[Any], dict[int, list[Array]]]:
    """What a traced function returns when probes are added to what leaves the layers.

    The gradient of a probe of zeros is that of what it is added to.

    Returns:
        The function's values, and what entered each use of each probed layer.
    """
    entered: dict[int, list[Array]] = {leaf: [] for leaf in probes}

    def watch(use: Use, value: Array, left: Array) -> Array:
        if use.leaf not in probes:
            return left
        probe = probes[use.leaf][len(entered[use.leaf])]
        entered[use.leaf].append(value)
        return left + probe

    return Reader(watch).outputs(closed, leaves, args), entered
