"""What every network is: pure functions of a checkpoint's tensors and one sequence of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.networks.checkpoint import Tensors

__all__ = ["Network", "Sequence"]


class Sequence(NamedTuple):
    """One sequence: token ids, segments (0 first text, 1 second), False at padding."""

    tokens: Int[Array, " token"]
    segments: Int[Array, " token"]
    attended: Bool[Array, " token"]


@dataclass(frozen=True)
class Network:
    """A forward pass over a checkpoint's own tensors; ``vmap`` over examples outside.

    Attributes:
        family: ``model_type`` of the checkpoint's configuration.
        hidden: last hidden states; the encoder's where there is a decoder too.
        logits: a decoder's next-token logits at every position.
        seq2seq_logits: of an encoder-decoder, at each decoder position, given the decoder's INPUT
            tokens (shifted right already).
        positions: longest sequence, None = no limit.
        width: size of a hidden state.
        vocabulary: tokens that have an embedding.
        start_token: the decoder's first input token.
    """

    family: str
    kind: Literal["encoder", "decoder", "encoder-decoder"]
    hidden: Callable[[Tensors, Sequence], Float[Array, "token hidden"]]
    logits: Callable[[Tensors, Sequence], Float[Array, "token vocabulary"]] | None
    seq2seq_logits: (
        Callable[[Tensors, Sequence, Int[Array, " target"]], Float[Array, "target vocabulary"]]
        | None
    )
    positions: int | None
    width: int
    vocabulary: int
    start_token: int | None
