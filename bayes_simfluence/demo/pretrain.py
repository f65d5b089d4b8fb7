"""A small BERT made on the spot: words of a few texts, random tensors, brief masked-word training.

The result is an ordinary checkpoint folder (config, tokenizer, safetensors).
"""

import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.networks import bert
from bayes_simfluence.networks.checkpoint import load_tokenizer
from bayes_simfluence.networks.network import Sequence as Tokens
from bayes_simfluence.networks.tensor_files import Tensors, save_tensors
from bayes_simfluence.progress import Progress

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LAYERS, HIDDEN, INNER, HEADS, LONGEST = 2, 64, 128, 4, 24
STEPS, SEGMENT, BATCH, RATE, MASKED = 200, 50, 32, 1e-3, 0.2


def pretrained_checkpoint(
    texts: Sequence[str], folder: Path, *, key: jax.Array, progress: Progress
) -> Path:
    """Write a small BERT that has learned to fill in masked words of ``texts``."""
    folder.mkdir(parents=True)
    _write_tokenizer(texts, folder)
    config = _write_config(folder)
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="np"
    )
    tokens = jnp.asarray(encoded["input_ids"], jnp.int32)
    attended = jnp.asarray(encoded["attention_mask"], bool)
    start_key, train_key = jax.random.split(key)
    tensors = _random_tensors(config["vocab_size"], start_key)
    from transformers import BertConfig

    settings = bert.settings_of(BertConfig(**config), tensors)
    # Masked-word training, output weights tied to the word embeddings (Devlin et al. 2019).
    carry = (tensors, _optimizer(STEPS).init(tensors))
    with progress.work("pretrain", STEPS) as meter:
        for keys in jax.random.split(train_key, (STEPS // SEGMENT, SEGMENT)):
            carry, losses = _some_steps(settings, STEPS, tokens, attended, carry, keys)
            meter.advance(SEGMENT, f"masked-word loss {float(losses.mean()):.2f}")
    save_tensors(carry[0], folder)
    return folder


def _write_tokenizer(texts: Sequence[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words = sorted({word for text in texts for word, _ in split(text.lower())})
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocabulary = list(dict.fromkeys([*SPECIAL, *words, *letters]))
    codes = {word: code for code, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(codes, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, codes[token]) for token in ("[CLS]", "[SEP]")],
    )
    special = zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special}
    ).save_pretrained(folder)


def _write_config(folder: Path) -> dict[str, int]:
    from transformers import BertConfig

    settings = {
        "vocab_size": len(load_tokenizer(folder)),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": LONGEST,
    }
    BertConfig(**settings).save_pretrained(folder)
    return settings


def _random_tensors(vocabulary: int, key: jax.Array) -> Tensors:
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, HIDDEN),
        "embeddings.position_embeddings.weight": (LONGEST, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
    }
    for layer in range(LAYERS):
        inside = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            shapes[f"{inside}.attention.self.{name}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{inside}.attention.output.dense.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{inside}.intermediate.dense.weight"] = (INNER, HIDDEN)
        shapes[f"{inside}.output.dense.weight"] = (HIDDEN, INNER)
    keys = jax.random.split(key, len(shapes))
    tensors = {
        name: 0.05 * jax.random.normal(tensor_key, shape)
        for tensor_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    for name, shape in shapes.items():
        if "encoder" in name:
            tensors[name.replace(".weight", ".bias")] = jnp.zeros(shape[0])
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        norms += [
            f"encoder.layer.{layer}.{part}.LayerNorm" for part in ("attention.output", "output")
        ]
    for norm in norms:
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = jnp.ones(HIDDEN), jnp.zeros(HIDDEN)
    return tensors


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=0.01)


@partial(jax.jit, static_argnames=("settings", "steps"))
def _some_steps(
    settings: bert.BertSettings,
    steps: int,
    tokens: Int[Array, "text token"],
    attended: Bool[Array, "text token"],
    carry: Any,
    keys: Array,
) -> Any:
    """A step for each key, on batches drawn from the texts; ``steps`` is the schedule's length."""

    def step(carry: Any, step_key: jax.Array) -> Any:
        params, memory = carry
        pick, hide = jax.random.split(step_key)
        chosen = jax.random.choice(pick, len(tokens), (BATCH,))
        loss = partial(_masked_word_loss, settings)
        value, slope = jax.value_and_grad(loss)(params, tokens[chosen], attended[chosen], hide)
        updates, memory = _optimizer(steps).update(slope, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    return jax.lax.scan(step, carry, keys)


def _masked_word_loss(
    settings: bert.BertSettings,
    params: Tensors,
    words: Int[Array, "batch token"],
    seen: Bool[Array, "batch token"],
    hide: jax.Array,
) -> Float[Array, ""]:
    hidden_word = jax.random.bernoulli(hide, MASKED, words.shape) & (words >= len(SPECIAL))
    shown = jnp.where(hidden_word, SPECIAL.index("[MASK]"), words)

    def encode(words: Int[Array, " token"], seen: Bool[Array, " token"]) -> Array:
        return bert.encode(settings, params, Tokens(words, jnp.zeros_like(words), seen))

    states = jax.vmap(encode)(shown, seen)
    scores = jax.nn.log_softmax(states @ params["embeddings.word_embeddings.weight"].T)
    right = jnp.take_along_axis(scores, words[..., None], axis=-1)[..., 0]
    return -jnp.where(hidden_word, right, 0.0).sum() / jnp.maximum(hidden_word.sum(), 1)
