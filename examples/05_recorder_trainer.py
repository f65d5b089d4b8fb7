"""Recording runs of the transformers ``Trainer`` by a callback: PyTorch trains, we record.

    python examples/05_recorder_trainer.py [--out FOLDER]

A tiny random BERT learns to tell two made-up kinds of sentences apart. The collator keeps the
examples' ids, the trainer notes those of the batch it trains on and their losses, and the callback
hands them to ``bs.Recorder`` with every query's loss after the update. Needs PyTorch and accelerate
(extra ``[examples]``). Writes ``runs.zarr`` to the folder. Under half a minute.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bayes_simfluence as bs

try:
    import accelerate  # noqa: F401
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
except ImportError:
    print("skipped: this example needs PyTorch and accelerate, install the extra [examples]")
    sys.exit(0)

TRAIN, QUERY, RUNS, FITTED, PER_RUN, TOKENS = 40, 6, 8, 6, 24, 8


def made_up_sentences(seed: int) -> list[dict[str, Any]]:
    """Sentences of random words, most of them from their own class's half of the vocabulary."""
    rng = np.random.default_rng(seed)
    sentences = []
    for number in range(TRAIN + QUERY):
        label = number % 2
        own = rng.random(TOKENS) < 0.75
        words = rng.integers(0, 24, TOKENS) + 4 + 24 * np.where(own, label, 1 - label)
        sentences.append({"id": f"s{number}", "input_ids": words.tolist(), "label": label})
    return sentences


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch that keeps the examples' ids."""
    return {
        "input_ids": torch.tensor([example["input_ids"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
        "ids": [example["id"] for example in examples],
    }


def query_losses(model: torch.nn.Module, queries: list[dict[str, Any]]) -> np.ndarray:
    """Cross-entropy of each query, in nats, without dropout."""
    training = model.training
    model.eval()
    batch = collate(queries)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    model.train(training)
    return losses.numpy()


class NotingTrainer(Trainer):
    """A Trainer that notes which examples an update is made of, and their losses before it."""

    batch_ids: list[str]
    train_losses: np.ndarray

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        self.batch_ids = inputs.pop("ids")
        return super().training_step(model, inputs, *rest)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **rest)
        # The logits are there already: each example's own loss costs nothing more.
        self.train_losses = torch.nn.functional.cross_entropy(
            outputs.logits.detach(), inputs["labels"], reduction="none"
        ).numpy()
        return (loss, outputs) if return_outputs else loss


class Recording(TrainerCallback):
    """Hands every update to a run of ``bs.Recorder``."""

    def __init__(self, run: Any, queries: list[dict[str, Any]]) -> None:
        self.run, self.queries, self.trainer = run, queries, None

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.gradient_accumulation_steps != 1 or args.world_size * max(args.n_gpu, 1) != 1:
            raise bs.Misuse(
                "TrainingArguments",
                got=f"{args.gradient_accumulation_steps} accumulated batches, {args.world_size} "
                f"processes with {args.n_gpu} GPUs",
                expected="one batch per update on one device, so that its ids are the update's",
                do="set gradient_accumulation_steps=1 and use one device",
            )

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        # The schedule moves on before on_step_end is called.
        self.step_size = optimizer.param_groups[0]["lr"]

    def on_step_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        losses, trainer = query_losses(model, self.queries), self.trainer
        self.run.step(trainer.batch_ids, losses, self.step_size, train_losses=trainer.train_losses)


def main() -> None:
    """Record some runs, fit, and compare on the runs left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    parser.add_argument(
        "--accumulate", type=int, default=1, help="Batches per update; refused if > 1."
    )
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small for more
    sentences = made_up_sentences(0)
    train, queries = sentences[:TRAIN], sentences[TRAIN:]
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = options.out / "runs.zarr"
    with (
        tempfile.TemporaryDirectory() as scratch,
        bs.Recorder(
            store,
            train_ids=[sentence["id"] for sentence in train],
            query_ids=[sentence["id"] for sentence in queries],
            provenance={"model": "tiny random BERT", "framework": "transformers Trainer"},
        ) as recorder,
    ):
        for seed in range(RUNS):
            model.load_state_dict(initial)  # every run starts from the same weights
            chosen = np.random.default_rng(seed).permutation(TRAIN)[:PER_RUN]
            arguments = TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=options.accumulate,
                num_train_epochs=3,
                learning_rate=2e-3,
                seed=seed,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            with recorder.run(
                initial_loss=query_losses(model, queries), run_id=f"seed{seed}"
            ) as run:
                recording = Recording(run, queries)
                recording.trainer = NotingTrainer(
                    model=model,
                    args=arguments,
                    train_dataset=[train[i] for i in chosen],
                    data_collator=collate,
                    callbacks=[recording],
                )
                recording.trainer.remove_callback(PrinterCallback)
                recording.trainer.train()

    runs = bs.open_runs(store)
    fitted, held_out = runs.isel(run=slice(0, FITTED)), runs.isel(run=slice(FITTED, None))
    methods = {
        "ridge": bs.fit(fitted, method=bs.Ridge(band=True), key=jax.random.key(0)),
        "mean": bs.mean_trajectory(fitted),
    }
    table = bs.compare(methods, held_out, key=jax.random.key(1))
    print(table[["mse", "crps", "coverage_90"]].round(4))


if __name__ == "__main__":
    main()
