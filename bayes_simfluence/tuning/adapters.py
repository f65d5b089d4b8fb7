"""LoRA and IA3 as reparametrisations of linear layers, under the names that peft gives them.

Functions of flat dicts of tensors, whatever network takes them. Semantics and default targets are
those of the ``peft`` library, tested against it (``tests/unit/recording/test_peft_parity.py``).
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.networks.tensor_files import Tensors

__all__ = [
    "DOWN",
    "HEAD",
    "IA3_FEEDFORWARD",
    "IA3_TARGETS",
    "LORA_TARGETS",
    "UP",
    "VECTOR",
    "adapted_modules",
    "chosen_modules",
    "fans",
    "ia3_begin",
    "ia3_merged",
    "in_head",
    "linear_modules",
    "lora_begin",
    "lora_merged",
    "matched",
    "transposed",
]

HEAD = "classifier"
"""The layer on top of a network, trained from scratch beside every adapter."""

LORA_TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "t5": ("q", "v"),
    "llama": ("q_proj", "v_proj"),
}
"""Family -> layers that LoRA adapts by default: peft's, and the same layers for DistilBERT."""

IA3_TARGETS = {
    "bert": ("key", "value", "output.dense"),
    "roberta": ("key", "value", "output.dense"),
    "distilbert": ("k_lin", "v_lin", "lin2"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "t5": ("k", "v", "wo"),
    "llama": ("k_proj", "v_proj", "down_proj"),
}
"""Family -> layers that IA3 adapts by default: peft's, and the same layers for DistilBERT."""

IA3_FEEDFORWARD = {
    "bert": ("output.dense",),
    "roberta": ("output.dense",),
    "distilbert": ("lin2",),
    "gpt2": ("mlp.c_proj",),
    "gpt_neox": ("dense_4h_to_h",),
    "t5": ("wo",),
    "llama": ("down_proj",),
}
"""Family -> those of ``IA3_TARGETS`` whose input is scaled, not their output."""

TRANSPOSED = {"gpt2": ("c_attn", "q_attn", "c_proj", "c_fc")}
"""Family -> layers that store their weight as (in, out), GPT-2's Conv1D; all others (out, in)."""

EMBEDDINGS = (
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "wte",
    "wpe",
    "embed_in",
    "embed_tokens",
    "shared",
    "relative_attention_bias",
)
"""Last parts of the names of tables that are looked up: matrices, but no linear layers."""

DOWN, UP, VECTOR = ".lora_A.weight", ".lora_B.weight", ".ia3_l"
"""What follows a layer's name: LoRA's A and B, IA3's vector."""


def matched(names: Iterable[str], pattern: str) -> list[str]:
    """The names that ``pattern`` describes: whole names, or what follows one of their dots.

    Shell wildcards are allowed (``*`` stands for any text, dots too).

    >>> matched(["layer.0.value", "layer.0.value_norm", "layer.1.value"], "value")
    ['layer.0.value', 'layer.1.value']
    >>> matched(["layer.0.key", "layer.1.key"], "layer.1.*")
    ['layer.1.key']
    """
    return [one for one in names if fnmatchcase(one, pattern) or fnmatchcase(one, f"*.{pattern}")]


def in_head(name: str) -> bool:
    """Whether the tensor belongs to the classification head."""
    return name.startswith(f"{HEAD}.")


def linear_modules(tensors: Tensors) -> list[str]:
    """Names of the layers that multiply by a matrix, without the head, in order."""
    found = []
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        is_matrix = value.ndim == 2 and jnp.issubdtype(value.dtype, jnp.floating)
        is_table = module.split(".")[-1] in EMBEDDINGS
        if module != name and is_matrix and not is_table and not in_head(name):
            found.append(module)
    return sorted(found)


def chosen_modules(
    what: str,
    given: Sequence[str] | None,
    defaults: Mapping[str, tuple[str, ...]],
    family: str,
    modules: Sequence[str],
) -> tuple[tuple[str, ...], list[str]]:
    """The patterns that count, given or the family's, and the modules that they match, in order.

    Raises:
        Misuse: nothing is given and the family has no default, or a pattern matches nothing.
    """
    if given is None and family not in defaults:
        raise Misuse(
            what,
            got=f"none, for the family {family!r}",
            expected=f"layers to adapt, or one of the families {shorten(defaults, 20)}",
            do=f"name them; this checkpoint has {_kinds(modules)}",
        )
    patterns = defaults[family] if given is None else tuple(given)
    if isinstance(given, str) or not patterns:
        raise Misuse(
            what,
            got=repr(given),
            expected="a sequence of at least one name",
            do=f"pass names of layers, such as {_kinds(modules)}",
        )
    found: set[str] = set()
    for pattern in patterns:
        some = matched(modules, pattern)
        if not some:
            raise Misuse(
                f"{what} {pattern!r}",
                got="no linear layer of that name",
                expected=f"the name of a layer, or its end, such as {_kinds(modules)}",
                do=f"correct it; a full name is {shorten(modules, 1)}",
            )
        found.update(some)
    return patterns, sorted(found)


def transposed(module: str, family: str) -> bool:
    """Whether the layer stores its weight as (in, out)."""
    return module.split(".")[-1] in TRANSPOSED.get(family, ())


def fans(tensors: Tensors, module: str, family: str) -> tuple[int, int]:
    """Lengths of a layer's input and output."""
    rows, columns = tensors[f"{module}.weight"].shape
    return (rows, columns) if transposed(module, family) else (columns, rows)


def adapted_modules(params: Tensors) -> list[str]:
    """Names of the layers that trained parameters adapt, in order."""
    endings = (DOWN, UP, VECTOR)
    found = {name.removesuffix(one) for name in params for one in endings if name.endswith(one)}
    return sorted(found)


def lora_begin(
    tensors: Tensors, modules: Sequence[str], *, rank: int, family: str, key: jax.Array
) -> Tensors:
    """Factors of a zero change: B zero, A uniform in +-1/sqrt(in) (peft's start), float32."""
    params: Tensors = {}
    for module, one in zip(modules, jax.random.split(key, len(modules)), strict=True):
        inward, outward = fans(tensors, module, family)
        bound = inward**-0.5
        params[module + DOWN] = jax.random.uniform(
            one, (rank, inward), jnp.float32, minval=-bound, maxval=bound
        )
        params[module + UP] = jnp.zeros((outward, rank), jnp.float32)
    return params


def lora_merged(params: Tensors, frozen: Tensors, *, scale: float, family: str) -> Tensors:
    """All tensors of the network, ``scale * B A`` added to each adapted weight.

    Hu et al. 2021, arXiv 2106.09685, section 4.1.

    Args:
        params: ``{layer}.lora_A.weight`` (rank, in) and ``{layer}.lora_B.weight`` (out, rank), and
            the head, which is taken as it is.
        frozen: every other tensor of the network.
        scale: alpha / rank.
    """
    merged = _with_head(params, frozen)
    for module in adapted_modules(params):
        name = f"{module}.weight"
        # A small product whose rounding would enter every weight: no reduced precision.
        change = scale * jnp.matmul(params[module + UP], params[module + DOWN], precision="highest")
        weight = frozen[name]
        change = change.T if transposed(module, family) else change
        merged[name] = (_wide(weight) + change).astype(weight.dtype)
    return merged


def ia3_begin(
    tensors: Tensors, modules: Sequence[str], *, feedforward: Sequence[str], family: str
) -> Tensors:
    """Vectors of ones, float32: (1, in) for feedforward layers, (out, 1) for the others."""
    params: Tensors = {}
    inner = _inner(modules, feedforward)
    for module in modules:
        inward, outward = fans(tensors, module, family)
        shape = (1, inward) if module in inner else (outward, 1)
        params[module + VECTOR] = jnp.ones(shape, jnp.float32)
    return params


def ia3_merged(
    params: Tensors, frozen: Tensors, *, feedforward: Sequence[str], family: str
) -> Tensors:
    """All tensors of the network, the outputs (or inputs) of each adapted layer scaled.

    Liu et al. 2022, arXiv 2205.05638, section 3.3. Scaling an output scales weight and bias;
    scaling the input of a feedforward layer scales the weight alone.

    Args:
        params: ``{layer}.ia3_l``, and the head, which is taken as it is.
        frozen: every other tensor of the network.
        feedforward: patterns of the layers whose input is scaled.
    """
    merged = _with_head(params, frozen)
    modules = adapted_modules(params)
    inner = _inner(modules, feedforward)
    for module in modules:
        name, bias = f"{module}.weight", f"{module}.bias"
        vector = params[module + VECTOR]
        merged[name] = _scaled(frozen[name], vector.T if transposed(module, family) else vector)
        if module not in inner and bias in frozen:
            merged[bias] = _scaled(frozen[bias], vector[:, 0])
    return merged


def _inner(modules: Sequence[str], feedforward: Sequence[str]) -> set[str]:
    return {name for one in feedforward for name in matched(modules, one)}


def _scaled(value: Float[Array, "..."], by: Float[Array, "..."]) -> Float[Array, "..."]:
    return (_wide(value) * by).astype(value.dtype)


def _wide(value: Float[Array, "..."]) -> Float[Array, "..."]:
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _with_head(params: Tensors, frozen: Tensors) -> Tensors:
    return {**frozen, **{name: value for name, value in params.items() if in_head(name)}}


def _kinds(modules: Sequence[str]) -> str:
    return shorten(dict.fromkeys(one.split(".")[-1] for one in modules), 12)
