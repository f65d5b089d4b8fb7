"""Recording a causal language model: a small GPT-2 made on the spot, fine-tuned on other text.

    python examples/06_causal_recording.py --text sst2/train.jsonl --train trec/train.jsonl \\
        --query trec/test.jsonl --out FOLDER

No checkpoint of a language model comes with a package, so this one is made from ``--text``: a
byte-pair vocabulary, random weights, and some minutes of next-token training. It is an ordinary
folder (``gpt2-small-text``), which ``bayes-simfluence record --task causal --checkpoint`` takes as
well; its fine-tuning runs on ``--train`` are recorded to ``runs.zarr`` under the standard protocol.
Without files the example makes up sentences and is done in under a minute.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bayes_simfluence.networks.checkpoint import load_checkpoint, load_tokenizer, network_of
from bayes_simfluence.networks.network import Network, Sequence
from bayes_simfluence.networks.tensor_files import Tensors, save_tensors
from bayes_simfluence.progress import Bars
from bayes_simfluence.recording.session import merged, record_from_config
from bayes_simfluence.tasks.likelihood import mean_nats

END = "<|endoftext|>"
WIDTH, HEADS, POSITIONS = 128, 4, 64
LENGTH, BATCH, RATE = 32, 32, 2e-3
MADE_UP = {"runs": 4, "examples": 16, "queries": 4, "per_run": 8, "epochs": 1, "features": 8}
"""Size of the recording where no files are given."""


def made_up(count: int, subjects: list[str]) -> list[str]:
    """Sentences of a small grammar."""
    draw = np.random.default_rng(len(subjects)).choice
    verbs, ends = ["sees", "likes", "paints", "finds"], ["a house", "the sea", "old trees"]
    return [f"the {draw(subjects)} {draw(verbs)} {draw(ends)} {number}" for number in range(count)]


def write_folder(texts: list[str], folder: Path, vocabulary: int, layers: int) -> None:
    """Config and tokenizer of a small GPT-2 whose vocabulary is learned from ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )
    words.save_pretrained(folder)
    GPT2Config(
        vocab_size=len(words),
        n_layer=layers,
        n_embd=WIDTH,
        n_head=HEADS,
        n_positions=POSITIONS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    ).save_pretrained(folder)


def random_tensors(folder: Path, key: jax.Array) -> Tensors:
    """Weights as GPT-2 begins: normal with sd .02, norms one, biases zero."""
    config = json.loads((folder / "config.json").read_text())
    shapes = {"wte.weight": (config["vocab_size"], WIDTH), "wpe.weight": (POSITIONS, WIDTH)}
    for layer in range(config["n_layer"]):
        inside = f"h.{layer}"
        shapes |= {f"{inside}.{norm}.weight": (WIDTH,) for norm in ("ln_1", "ln_2")}
        shapes[f"{inside}.attn.c_attn.weight"] = (WIDTH, 3 * WIDTH)
        shapes[f"{inside}.attn.c_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{inside}.mlp.c_fc.weight"] = (WIDTH, 4 * WIDTH)
        shapes[f"{inside}.mlp.c_proj.weight"] = (4 * WIDTH, WIDTH)
    shapes["ln_f.weight"] = (WIDTH,)
    keys = jax.random.split(key, len(shapes))
    tensors: Tensors = {}
    for (name, shape), tensor_key in zip(shapes.items(), keys, strict=True):
        norm = len(shape) == 1
        tensors[name] = jnp.ones(shape) if norm else 0.02 * jax.random.normal(tensor_key, shape)
        if name not in ("wte.weight", "wpe.weight"):
            tensors[name.replace(".weight", ".bias")] = jnp.zeros(shape[-1])
    return tensors


def pretrain(network: Network, tensors: Tensors, stream: jax.Array, steps: int) -> Tensors:
    """Next-token training on stretches of ``stream``, texts one after the other."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=0.1)
    segment, next_token = min(50, steps), network.logits

    def loss(tensors: Tensors, starts: jax.Array) -> jax.Array:
        def mean_loss(start: jax.Array) -> jax.Array:
            tokens = jax.lax.dynamic_slice(stream, (start,), (LENGTH,))
            seen = jnp.ones(LENGTH, bool)
            logits = next_token(tensors, Sequence(tokens, jnp.zeros_like(tokens), seen))
            return mean_nats(logits[:-1], tokens[1:], seen[1:])

        return jax.vmap(mean_loss)(starts).mean()

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, memory = carry
        starts = jax.random.randint(key, (BATCH,), 0, len(stream) - LENGTH)
        value, slope = jax.value_and_grad(loss)(params, starts)
        updates, memory = optimizer.update(slope, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry = (tensors, optimizer.init(tensors))
    with Bars().work("pretrain", steps) as meter:
        for keys in jax.random.split(jax.random.key(1), (steps // segment, segment)):
            carry, losses = run(carry, keys)
            meter.advance(segment, f"loss {float(losses.mean()):.2f}")
    return carry[0]


def make_checkpoint(
    texts: list[str], folder: Path, *, vocabulary: int, layers: int, steps: int
) -> None:
    """A folder with config, tokenizer and safetensors."""
    folder.mkdir(parents=True)
    write_folder(texts, folder, vocabulary, layers)
    tensors = random_tensors(folder, jax.random.key(0))
    save_tensors(tensors, folder)
    words = load_tokenizer(folder)
    stream = np.concatenate([[*words(text)["input_ids"], words.eos_token_id] for text in texts])
    network = network_of(load_checkpoint(folder))
    trained = pretrain(network, tensors, jnp.asarray(stream, jnp.int32), steps)
    save_tensors(trained, folder, overwrite=True)


def main() -> None:
    """Make the checkpoint, record its fine-tuning, say how the losses went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("causal"))
    parser.add_argument("--text", type=Path, help="JSON lines with a field text, to pretrain on")
    parser.add_argument("--train", type=Path, help="JSON lines to fine-tune on")
    parser.add_argument("--query", type=Path, help="JSON lines whose losses are recorded")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining, with --text")
    given = parser.parse_args()
    folder = given.out / "gpt2-small-text"
    if given.text is None:
        texts = made_up(200, ["cat", "bear", "child"])
        made = {"vocabulary": 300, "layers": 1, "steps": 50}
        other = made_up(60, ["king", "queen", "robot", "cook"])
        size = MADE_UP
        for name, part in (("train", other[:40]), ("query", other[40:])):
            given.out.mkdir(parents=True, exist_ok=True)
            path = given.out / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
            setattr(given, name, path)
    else:
        texts = [json.loads(line)["text"] for line in given.text.read_text().splitlines()]
        made = {"vocabulary": 2000, "layers": 4, "steps": given.steps}
        size = {}
    if not folder.exists():
        make_checkpoint(texts, folder, **made)
    config = merged(
        {"task": "causal", "checkpoint": str(folder), "max_tokens": 32, "learning_rate": 5e-4},
        {"train": str(given.train), "query": str(given.query), **size},
    )
    runs = record_from_config(config, given.out / "runs.zarr", progress=Bars())
    first, last = (float(runs["loss"].isel(time=at).mean()) for at in (0, -1))
    print(f"mean loss of the queries: {first:.2f} nats per token before, {last:.2f} after")


if __name__ == "__main__":
    main()
