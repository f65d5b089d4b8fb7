"""What the rest of the package knows of a network and of a family of networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.networks.layers import vocabulary_logits
from bayes_simfluence.networks.tensor_files import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["encoder", "decoder", "encoder-decoder"]


class Sequence(NamedTuple):
    """One text as tokens, padded at its end.

    Attributes:
        tokens: token ids.
        segments: 0 for the first text, 1 for the second; networks without segments ignore it.
        attended: False at padding, which no token attends to.
    """

    tokens: Int[Array, " token"]
    segments: Int[Array, " token"]
    attended: Bool[Array, " token"]


Hidden = Callable[[Tensors, Sequence], Float[Array, "token hidden"]]


@dataclass(frozen=True)
class Network:
    """Pure functions of a flat dict of tensors and ONE sequence; ``vmap`` over sequences outside.

    No dropout: a recorded run is a function of its curriculum alone. Results at padded positions
    mean nothing.

    Attributes:
        family: ``model_type`` of the configuration.
        kind: an encoder sees the whole text, a decoder what stands to the left.
        hidden: last hidden states, after the last norm; those of the encoder for T5.
        positions: longest sequence, None = no limit.
        width: size of a hidden state.
        vocabulary: number of tokens.
        logits: next-token logits at every position, in float32. None for encoders, and for
            decoders whose checkpoint has no output layer.
        seq2seq_logits: ``(tensors, source, inputs)``, logits in float32 at each position of the
            decoder, given its INPUT tokens (the target shifted right by ``start_token``).
        start_token: what a decoder's input begins with (T5).
        shapes: every tensor that the functions read, and BERT's pooler, with their shapes: what
            training may change. A checkpoint may hold more (buffers, other heads).
    """

    family: str
    kind: Kind
    hidden: Hidden
    positions: int | None
    width: int
    vocabulary: int
    logits: Callable[[Tensors, Sequence], Float[Array, "token vocabulary"]] | None = None
    seq2seq_logits: (
        Callable[[Tensors, Sequence, Int[Array, " target"]], Float[Array, "target vocabulary"]]
        | None
    ) = None
    start_token: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every forward pass needs of a configuration.

    Attributes:
        layers, heads: depth, and attention heads of a layer.
        epsilon: added to the variance, or the mean square, in norms.
        activation: name in ``ACTIVATIONS``.
        prefix: what stands before the network's tensor names: nothing, or its family's prefix.
        head: name of the output layer's weight, the word embeddings' where they are tied; None
            where the checkpoint has no output layer.
    """

    layers: int
    heads: int
    epsilon: float
    activation: str
    prefix: str = ""
    head: str | None = None


@dataclass(frozen=True)
class Family:
    """Architectures that share a forward pass and the names of their layers.

    A layer or table is named by what ends its tensors' names (``"query"``, ``"mlp.c_proj"``).

    Attributes:
        network: makes the network of a configuration and a checkpoint's tensors.
        tables: embedding tables, the word embeddings first: matrices that are looked up, so no
            adapter takes them for linear layers.
        tied: output layers whose weight may be a second copy of the word embeddings.
        lora_targets: layers that LoRA adapts unless told otherwise; peft's defaults.
        ia3_targets: layers that IA3 adapts unless told otherwise; peft's defaults.
        ia3_feedforward: those of ``ia3_targets`` whose input is scaled, not their output.
        transposed: layers that store their weight as (in, out); all others store (out, in).
        prefix: what transformers' models with a head put before the names of these tensors.
        peft_task: peft's name for what its models do without a classification head.
        classifier: transformers' class that has the classification head of ``heads``, if one has.
    """

    network: Callable[["PretrainedConfig", Tensors], Network]
    tables: tuple[str, ...]
    tied: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    ia3_targets: tuple[str, ...] = ()
    ia3_feedforward: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    prefix: str = ""
    peft_task: str | None = None
    classifier: str | None = None

    def transposes(self, layer: str) -> bool:
        """Whether the layer stores its weight as (in, out)."""
        return layer.split(".")[-1] in self.transposed


def encoder(
    config: "PretrainedConfig",
    hidden: Hidden,
    shapes: Mapping[str, tuple[int, ...]],
    positions: int | None = None,
) -> Network:
    """A network of hidden states; ``positions`` are the configuration's when omitted."""
    return Network(
        family=config.model_type,
        kind="encoder",
        hidden=hidden,
        positions=config.max_position_embeddings if positions is None else positions,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        shapes=shapes,
    )


def decoder(
    config: "PretrainedConfig",
    hidden: Hidden,
    shapes: Mapping[str, tuple[int, ...]],
    head: str | None,
) -> Network:
    """A network of next-token logits, where ``head`` names the weight that makes them."""
    return replace(
        encoder(config, hidden, shapes),
        kind="decoder",
        logits=partial(_logits, hidden, head) if head else None,
    )


def _logits(
    hidden: Hidden, head: str, tensors: Tensors, sequence: Sequence
) -> Float[Array, "token vocabulary"]:
    return vocabulary_logits(tensors[head], hidden(tensors, sequence))
