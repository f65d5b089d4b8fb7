"""Text classification from JSON lines: reading, choosing, tokenizing, and the ``Task`` of it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.conventions import Curricula
from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.files import first_line
from bayes_simfluence.networks.checkpoint import Checkpoint, load_checkpoint, load_tokenizer
from bayes_simfluence.networks.families import network_of
from bayes_simfluence.networks.heads import Pooling, check_pooling, head_logits, with_head
from bayes_simfluence.networks.network import Sequence as Tokens
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.task import Task

__all__ = ["Rows", "classification_task", "curricula_of", "read_rows", "task_of"]

log = logging.getLogger(__name__)

MULTIPLE = 8
"""Sequences are padded to a multiple of this many tokens."""


@dataclass(frozen=True)
class Rows:
    """Labelled texts of one file."""

    ids: Sequence[str]
    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: Sequence[str]

    def take(self, chosen: Sequence[int]) -> "Rows":
        """The rows at these positions."""
        pairs = None if self.pairs is None else [self.pairs[one] for one in chosen]
        ids, texts, labels = (
            [values[one] for one in chosen] for values in (self.ids, self.texts, self.labels)
        )
        return Rows(ids, texts, pairs, labels)


def read_rows(
    path: str | Path,
    *,
    text_field: str = "text",
    pair_field: str = "",
    label_field: str = "label",
    id_field: str = "id",
) -> Rows:
    """Read labelled texts from JSON lines.

    Raises:
        Misuse: no such file, no lines, a line that is not a JSON object, a field missing or
            empty, an id that occurs twice; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise Misuse(
            str(path), got="no such file", expected="a file of JSON lines", do="check the path"
        )
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Misuse(
            str(path), got=first_line(error), expected="UTF-8 text", do="convert the file to UTF-8"
        ) from error
    rows = [
        (number, _parsed(path, number, line))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise Misuse(
            str(path), got="an empty file", expected="at least one JSON line", do="check the file"
        )
    texts = [_text(path, number, row, text_field) for number, row in rows]
    pairs = [_text(path, number, row, pair_field) for number, row in rows] if pair_field else None
    labels = [_text(path, number, row, label_field) for number, row in rows]
    ids = [str(row.get(id_field, number)) for number, row in rows]
    if len(set(ids)) < len(ids):
        repeated = [one for one in dict.fromkeys(ids) if ids.count(one) > 1]
        raise Misuse(
            f"{path} field {id_field!r}",
            got=f"repeated ids {shorten(repeated)}",
            expected="each id once",
            do="rename them, or name another field with --id-field",
        )
    return Rows(ids, texts, pairs, labels)


def task_of(config: RecordConfig) -> Task:
    """The classification task that a recording's settings describe, from its files.

    Raises:
        Misuse: files, labels or checkpoint that do not fit the settings.
    """
    fields = {
        "text_field": config.text_field,
        "pair_field": config.pair_field,
        "label_field": config.label_field,
        "id_field": config.id_field,
    }
    every_train, every_query = (read_rows(one, **fields) for one in (config.train, config.query))
    if every_train.texts == every_query.texts and every_train.pairs == every_query.pairs:
        raise Misuse(
            f"query {config.query}",
            got="the same texts as the train file",
            expected="examples that are not trained on",
            do="point --query at a test or validation file",
        )
    train = _draw("examples", every_train, config.examples, config.seed, stream=0)
    query = _draw("queries", every_query, config.queries, config.seed, stream=1)
    return classification_task(
        load_checkpoint(config.checkpoint),
        train,
        query,
        labels=sorted(set(every_train.labels)),
        pooling=cast(Pooling, config.pooling),
        max_tokens=config.max_tokens,
        key=jax.random.fold_in(jax.random.key(config.seed), 2),
    )


def classification_task(
    checkpoint: Checkpoint,
    train: Rows,
    query: Rows,
    *,
    labels: Sequence[str],
    key: jax.Array,
    pooling: Pooling = "mean",
    max_tokens: int = 128,
) -> Task:
    """Fine-tuning of all weights of a checkpoint with a fresh classification head.

    Args:
        labels: the label words; their order is that of the head's outputs.
        key: decides the head's initial weights.

    Raises:
        Misuse: a label that is not among ``labels``, or an architecture not built here.
    """
    codes = {label: code for code, label in enumerate(labels)}
    for name, rows in (("train", train), ("query", query)):
        unknown = sorted(set(rows.labels) - set(codes))
        if unknown:
            raise Misuse(
                f"label in the {name} file",
                got=shorten(unknown),
                expected=f"one of {shorten(codes, 20)}",
                do="correct the label, or add an example of it to the train file",
            )
    network = network_of(checkpoint)
    check_pooling(network, checkpoint.tensors, pooling)
    weights = {name: checkpoint.tensors[name] for name in network.shapes}
    positions = network.positions or max_tokens
    tokenized = _tokenize(checkpoint.folder, [train, query], min(max_tokens, positions))
    examples = [
        {**tokens, "label": jnp.asarray([codes[one] for one in rows.labels])}
        for tokens, rows in zip(tokenized, (train, query), strict=True)
    ]

    def loss(params: dict[str, Array], example: dict[str, Array]) -> Float[Array, ""]:
        inputs = Tokens(example["tokens"], example["segments"], example["attended"])
        logits = head_logits(network, params, inputs, pooling)
        return -jax.nn.log_softmax(logits)[example["label"]]

    return Task(
        params=with_head(weights, network, len(labels), key),
        loss=loss,
        train=examples[0],
        query=examples[1],
        train_ids=list(train.ids),
        query_ids=list(query.ids),
        provenance={
            "model": checkpoint.name,
            "labels": list(labels),
            "tuning": "full",
            "padded_tokens": int(examples[0]["tokens"].shape[1]),
        },
    )


def curricula_of(config: RecordConfig) -> Curricula:
    """Each run a random subset of the examples in shuffled epochs, decided by the seed."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 3), config.runs)
    return np.stack(
        [
            random_subset_epochs(
                config.examples,
                per_run=config.per_run,
                batch_size=config.batch_size,
                epochs=config.epochs,
                key=key,
            )
            for key in keys
        ]
    )


def _draw(name: str, rows: Rows, count: int, seed: int, *, stream: int) -> Rows:
    if count > len(rows.ids):
        raise Misuse(
            name,
            got=count,
            expected=f"at most the {len(rows.ids)} rows of the file",
            do=f"lower --{name}",
        )
    key = jax.random.fold_in(jax.random.key(seed), stream)
    chosen = jax.random.choice(key, len(rows.ids), (count,), replace=False)
    return rows.take(sorted(np.asarray(chosen).tolist()))


def _tokenize(
    folder: Path, files: Sequence[Rows], max_tokens: int
) -> list[dict[str, Int[Array, "example token"] | Bool[Array, "example token"]]]:
    """Token ids, segments and attended positions, all files padded to one length."""
    tokenizer = load_tokenizer(folder)
    encoded = [tokenizer(list(rows.texts), rows.pairs and list(rows.pairs)) for rows in files]
    lengths = [len(tokens) for one in encoded for tokens in one["input_ids"]]
    cut = sum(length > max_tokens for length in lengths)
    if cut:
        log.warning("%d of %d texts cut to %d tokens", cut, len(lengths), max_tokens)
    padded = min(-(-max(lengths) // MULTIPLE) * MULTIPLE, max_tokens)
    arrays = []
    for rows in files:
        one = tokenizer(
            list(rows.texts),
            rows.pairs and list(rows.pairs),
            padding="max_length",
            truncation=True,
            max_length=padded,
            return_tensors="np",
        )
        segments = one.get("token_type_ids", np.zeros_like(one["input_ids"]))
        arrays.append(
            {
                "tokens": jnp.asarray(one["input_ids"], jnp.int32),
                "segments": jnp.asarray(segments, jnp.int32),
                "attended": jnp.asarray(one["attention_mask"], bool),
            }
        )
    return arrays


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        row = error
    if not isinstance(row, dict):
        raise Misuse(
            f"{path} line {number}",
            got=repr(line[:60]),
            expected="one JSON object",
            do="write one object a line",
        )
    return row


def _text(path: Path, number: int, row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None or not str(value).strip():
        raise Misuse(
            f"{path} line {number}",
            got=f"no {field!r} among fields {shorten(row, 8)}",
            expected=f"a value for {field!r}",
            do="name the right field (--text-field, --pair-field, --label-field)",
        )
    return str(value)
