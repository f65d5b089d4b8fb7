"""Toy networks of every kind with a tokenizer, and rows of a file."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.networks.checkpoint import Pretrained
from bayes_simfluence.networks.network import Network
from bayes_simfluence.tasks.rows import Rows

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "b", "c", "d", "yes", "no"]
VOCABULARY, WIDTH = len(WORDS), 5


@pytest.fixture(scope="session")
def toy_tokenizer():
    """``toy_tokenizer(pad=..., eos=..., bos=...)``; BOS is put before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def made(*, pad=True, eos=True, bos=False):
        codes = {word: code for code, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(codes, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)]
            )
        special = {"pad_token": "<pad>"} if pad else {}
        special |= {"eos_token": "</s>"} if eos else {}
        special |= {"bos_token": "<s>"} if bos else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
            **special,
        )

    return made


@pytest.fixture(scope="session")
def toy(toy_tokenizer):
    """``toy(kind, **tokenizer settings)``: a network whose states are decaying sums of tokens."""

    def made(kind, *, vocabulary=VOCABULARY, positions=None, scale=1.0, **settings):
        rng = np.random.default_rng(0)
        tensors = {
            name: jnp.asarray(scale * rng.normal(size=(vocabulary, WIDTH)), jnp.float32)
            for name in ("embed", "out")
        }
        network = Network(
            family="toy",
            kind=kind,
            hidden=hidden,
            logits=logits if kind == "decoder" else None,
            seq2seq_logits=seq2seq_logits if kind == "encoder-decoder" else None,
            positions=positions,
            width=WIDTH,
            vocabulary=vocabulary,
            start_token=0 if kind == "encoder-decoder" else None,
        )
        return Pretrained("toy", network, tensors, toy_tokenizer(**settings))

    return made


@pytest.fixture(scope="session")
def rows_of():
    """``rows_of(rows)`` as a file of lines."""

    def made(rows, source="file"):
        numbers = list(range(1, len(rows) + 1))
        return Rows(source, "line", numbers, [f"{source}-{number}" for number in numbers], rows)

    return made


def decayed(states):
    """Each state plus half of the one before it plus a quarter of ...: order matters."""
    places = jnp.arange(len(states))
    behind = places[:, None] - places[None, :]
    return jnp.where(behind >= 0, 0.5 ** jnp.maximum(behind, 0), 0.0) @ states


def hidden(tensors, sequence):
    shown = jnp.where(sequence.attended[:, None], tensors["embed"][sequence.tokens], 0.0)
    return decayed(shown) * (1.0 + sequence.segments[:, None])


def logits(tensors, sequence):
    return hidden(tensors, sequence) @ tensors["out"].T


def seq2seq_logits(tensors, source, inputs):
    read = jnp.where(source.attended[:, None], hidden(tensors, source), 0.0).sum(axis=0)
    return (decayed(tensors["embed"][inputs]) + read[None]) @ tensors["out"].T
