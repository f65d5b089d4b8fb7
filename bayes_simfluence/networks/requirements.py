"""What a network asks of a checkpoint's configuration and tensors, checked before any work."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from bayes_simfluence.checks import Misuse, choice_of, shorten
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Shapes = dict[str, tuple[int, ...]]


def weight_and_bias(name: str, *weight: int, bias: bool = True) -> Shapes:
    """Tensors of a dense layer, whose weight is (out, in), or of a norm, whose weight is (width).

    >>> weight_and_bias("pooler", 2, 3)
    {'pooler.weight': (2, 3), 'pooler.bias': (2,)}
    """
    shapes: Shapes = {f"{name}.weight": weight}
    return {**shapes, f"{name}.bias": weight[:1]} if bias else shapes


def check_option(
    config: "PretrainedConfig", name: str, allowed: Collection[Any], default: Any = None
) -> Any:
    """The value of one option of ``config.json`` when it is one of ``allowed``.

    Raises:
        Misuse: another value, which changes what the network computes and is not built here.
    """
    return choice_of(f"config.json {name}", getattr(config, name, default), allowed)


def quotient(config: "PretrainedConfig", whole: str, part: str) -> int:
    """One option of ``config.json`` divided by another, as the hidden size by its heads.

    Raises:
        Misuse: it does not divide.
    """
    dividend, divisor = getattr(config, whole), getattr(config, part)
    if divisor < 1 or dividend % divisor:
        raise Misuse(
            f"config.json {part}",
            got=divisor,
            expected=f"a divisor of {whole} = {dividend}",
            do="check that config.json belongs to this checkpoint",
        )
    return int(dividend // divisor)


def prefix_of(tensors: Collection[str], marker: str, prefix: str) -> str:
    """What stands before the names of the network's tensors: nothing, or ``prefix``, which a model
    with a head adds.

    Args:
        marker: what some names begin with, the prefix left out.

    >>> prefix_of(["bert.embeddings.word"], "embeddings.", "bert.")
    'bert.'
    """
    plain, inside = (
        any(name.startswith(start) for name in tensors) for start in (marker, prefix + marker)
    )
    return prefix if inside and not plain else ""


def head_name(
    config: "PretrainedConfig", tensors: Tensors, embedding: str, *heads: str
) -> str | None:
    """The tensor of the output layer: the first of ``heads`` that is there, or the tied
    ``embedding``, or None without either.

    A separate head counts even where the configuration ties it, as in transformers; heads that are
    copies of the embeddings were left out when the checkpoint was loaded.
    """
    tied = embedding if config.tie_word_embeddings else None
    return next((head for head in heads if head in tensors), tied)


def check_tensors(
    tensors: Tensors, needed: Mapping[str, tuple[int, ...]], unused: Sequence[str] = ()
) -> None:
    """Raise unless ``tensors`` are those that a network needs.

    Args:
        unused: patterns of names that the network leaves alone: other heads, buffers.

    Raises:
        Misuse: a tensor that is missing, of another shape, or that would be ignored although it
            says that the checkpoint is another network (an adapter, a further layer).
    """
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise Misuse(
            "checkpoint tensors",
            got=f"no tensor {shorten(missing)}",
            expected="the tensors that its config.json describes",
            do="check that config.json and the safetensors file belong together",
        )
    wrong = {name: shape for name, shape in needed.items() if tensors[name].shape != shape}
    if wrong:
        name, shape = next(iter(wrong.items()))
        raise Misuse(
            f"checkpoint tensors {shorten(wrong)}",
            got=f"{name} of shape {tensors[name].shape}",
            expected=f"{shape}, as its config.json describes",
            do="check that config.json and the safetensors file belong together",
        )
    known = re.compile("|".join(unused) or r"(?!)")
    ignored = [
        name
        for name, value in tensors.items()
        if name not in needed
        and jnp.issubdtype(value.dtype, jnp.floating)
        and not known.fullmatch(name)
    ]
    if ignored:
        raise Misuse(
            "checkpoint tensors",
            got=f"tensors that the network would ignore: {shorten(ignored)}",
            expected="only tensors that its config.json describes",
            do="merge adapters into the weights, or check that config.json belongs to this file",
        )
