"""Which linear layers of a network an adapter is put on: names, patterns, lengths.

Functions of flat dicts of tensors, whatever network takes them.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks.families import FAMILIES
from bayes_simfluence.networks.network import Family
from bayes_simfluence.networks.tensor_files import Tensors

HEAD = "classifier"
"""The layer on top of a network, trained from scratch beside every adapter."""


def matched(names: Iterable[str], pattern: str) -> list[str]:
    """The names that ``pattern`` describes: whole names, or what follows one of their dots.

    Shell wildcards are allowed (``*`` stands for any text, dots too).

    >>> matched(["layer.0.value", "layer.0.value_norm", "layer.1.value"], "value")
    ['layer.0.value', 'layer.1.value']
    >>> matched(["layer.0.key", "layer.1.key"], "layer.1.*")
    ['layer.1.key']
    """
    return [
        name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    ]


def has_wildcards(patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is more than a plain name."""
    return any(mark in pattern for pattern in patterns for mark in "*?[")


def in_head(name: str) -> bool:
    """Whether the tensor belongs to the classification head."""
    return name.startswith(f"{HEAD}.")


def linear_layers(tensors: Tensors, family: Family) -> list[str]:
    """Names of the layers that multiply by a matrix, without the head, in order."""
    layers = []
    for name, value in tensors.items():
        layer = name.removesuffix(".weight")
        is_matrix = value.ndim == 2 and jnp.issubdtype(value.dtype, jnp.floating)
        is_table = layer.split(".")[-1] in family.tables
        if layer != name and is_matrix and not is_table and not in_head(name):
            layers.append(layer)
    return sorted(layers)


def chosen_layers(
    option: str,
    wanted: Sequence[str] | None,
    defaults: Sequence[str],
    family: str,
    layers: Sequence[str],
) -> tuple[tuple[str, ...], list[str]]:
    """The patterns that count and the layers that they match, in order.

    Args:
        option: the setting that holds the patterns, for messages.
        wanted: the patterns; ``defaults``, those of the family, when None.

    Raises:
        Misuse: no patterns and a family without defaults, or a pattern that matches nothing.
    """
    if wanted is None and not defaults:
        raise Misuse(
            option,
            got=f"none, for the family {family!r}",
            expected=f"layers to adapt, or one of the families {shorten(FAMILIES, 20)}",
            do=f"name them; this checkpoint has {_kinds(layers)}",
        )
    if isinstance(wanted, str) or (wanted is not None and len(wanted) == 0):
        raise Misuse(
            option,
            got=repr(wanted),
            expected="a sequence of at least one name",
            do=f"pass names of layers, such as {_kinds(layers)}",
        )
    patterns = tuple(defaults if wanted is None else wanted)
    chosen: set[str] = set()
    for pattern in patterns:
        matches = matched(layers, pattern)
        if not matches:
            raise Misuse(
                f"{option} {pattern!r}",
                got="no linear layer of that name",
                expected=f"the name of a layer, or its end, such as {_kinds(layers)}",
                do=f"correct it; a full name is {shorten(layers, 1)}",
            )
        chosen.update(matches)
    return patterns, sorted(chosen)


def fans(tensors: Tensors, layer: str, family: Family) -> tuple[int, int]:
    """Lengths of a layer's input and output."""
    rows, columns = tensors[f"{layer}.weight"].shape
    return (rows, columns) if family.transposes(layer) else (columns, rows)


def _kinds(layers: Sequence[str]) -> str:
    return shorten(dict.fromkeys(layer.split(".")[-1] for layer in layers), 12)
