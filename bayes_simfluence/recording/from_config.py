"""What a recording's settings describe: its task, from files of text, curricula and optimizer."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
import optax
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, at_most, shorten
from bayes_simfluence.data.designs import Design, diverse, random
from bayes_simfluence.networks.checkpoint import Pretrained, load_checkpoint, pretrained
from bayes_simfluence.networks.heads import Pooling
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.tasks.causal import causal_task
from bayes_simfluence.tasks.choice import choice_task
from bayes_simfluence.tasks.classification import classification_task
from bayes_simfluence.tasks.rows import Rows, read_rows
from bayes_simfluence.tasks.seq2seq import seq2seq_task
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tasks.templates import filled


def task_of(config: RecordConfig) -> Task:
    """The task that a recording's settings describe, from its files.

    Raises:
        Misuse: files, labels or checkpoint that do not fit the settings.
    """
    every_train, every_query = (
        read_rows(path, id_field=config.id_field) for path in (config.train, config.query)
    )
    if _inputs(config, every_train) == _inputs(config, every_query):
        raise Misuse(
            f"query {config.query}",
            got="the same texts as the train file",
            expected="examples that are not trained on",
            do="point --query at a test or validation file",
        )
    train = _drawn("examples", every_train, config.examples, config.seed, stream=0)
    query = _drawn("queries", every_query, config.queries, config.seed, stream=1)
    model = pretrained(load_checkpoint(config.checkpoint))
    return _task_of_kind(config, model, train, query, every_train)


def classes_of(config: RecordConfig, task: Task) -> np.ndarray | None:
    """The class of each training example, by which designs tell them apart; None without classes.

    The right option of a choice is no class: options have nothing in common but their place.
    """
    if config.task not in ("classification", "seq2seq") or "label" not in task.train:
        return None
    return np.asarray(task.train["label"])


def design_of(
    config: RecordConfig,
    *,
    labels: np.ndarray | None = None,
    features: Float[np.ndarray, "example feature"] | None = None,
) -> Design:
    """The runs' curricula, decided by the seed.

    Args:
        labels, features: of the training examples, for a diverse design.

    Raises:
        Misuse: the design is diverse and there is nothing to tell examples apart.
    """
    sizes: dict[str, Any] = {
        "runs": config.runs,
        "per_run": config.per_run,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "key": jax.random.fold_in(jax.random.key(config.seed), 3),
    }
    if config.design == "random":
        return random(config.examples, **sizes)
    shares = config.chosen_shares()
    return diverse(config.examples, labels=labels, features=features, shares=shares, **sizes)


def optimizer_of(config: RecordConfig) -> optax.GradientTransformation:
    """The optax optimizer that a recording's settings describe; its state holds the step size."""
    rate = _schedule(config)
    if config.optimizer == "adamw":
        return optax.inject_hyperparams(optax.adamw)(rate, weight_decay=config.weight_decay)
    if config.optimizer == "adam":
        return optax.inject_hyperparams(optax.adam)(rate)
    return optax.inject_hyperparams(optax.sgd)(rate, momentum=config.momentum or None)


def _schedule(config: RecordConfig) -> optax.Schedule:
    top, warm = config.learning_rate, config.warmup_steps
    decay = max(config.steps - warm, 1)
    after = {
        "linear": optax.linear_schedule(top, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(top, decay),
        "constant": optax.constant_schedule(top),
    }[config.schedule]
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, top, warm), after], [warm])


def _task_of_kind(
    config: RecordConfig, model: Pretrained, train: Rows, query: Rows, every_train: Rows
) -> Task:
    """The task of the kind that is set, with the settings that this kind has."""
    common: dict[str, Any] = {
        "key": jax.random.fold_in(jax.random.key(config.seed), 2),
        "max_tokens": config.max_tokens,
        "metrics": _listed(config.metrics),
        "tuning": config.chosen_tuning(),
    }
    if config.task == "causal":
        # Without templates the text itself is what is predicted.
        completion = config.completion or f"{{{config.text_field}}}"
        return causal_task(
            model,
            train,
            query,
            prompt=config.prompt,
            completion=completion,
            new_tokens=config.new_tokens,
            **common,
        )
    common |= {"prompt": _prompt(config), "label_field": config.label_field}
    pooling = cast(Pooling, config.pooling)
    if config.task == "choice":
        options = _listed(config.choices_fields)
        return choice_task(model, train, query, options=options, pooling=pooling, **common)
    if config.task == "seq2seq":
        labels = None if config.completion else _label_texts(config, every_train)
        return seq2seq_task(
            model,
            train,
            query,
            completion=config.completion,
            labels=labels,
            new_tokens=config.new_tokens,
            **common,
        )
    return classification_task(
        model,
        train,
        query,
        labels=_labels(config, every_train),
        pair_field=config.pair_field,
        pooling=pooling,
        **common,
    )


def _prompt(config: RecordConfig) -> str:
    return config.prompt or f"{{{config.text_field}}}"


def _inputs(config: RecordConfig, rows: Rows) -> list[list[str]]:
    """Every row's texts without its label."""
    columns = []
    if config.task != "causal" or config.prompt:
        option = "prompt" if config.prompt else "text_field"
        columns.append(filled(rows, _prompt(config), option))
    else:
        columns.append(filled(rows, config.completion or _prompt(config), "completion"))
    if config.pair_field:
        columns.append(rows.column(config.pair_field, "pair_field"))
    return columns


def _labels(config: RecordConfig, rows: Rows) -> list[str]:
    return sorted(set(rows.column(config.label_field, "label_field")))


def _label_texts(config: RecordConfig, rows: Rows) -> dict[str, str]:
    """Each label of the train file and its text: the label itself where none is given."""
    labels = _labels(config, rows)
    if not config.label_texts:
        return {label: label for label in labels}
    pairs = [pair.partition("=") for pair in _listed(config.label_texts)]
    texts = {label.strip(): text.strip() for label, _, text in pairs}
    missing = [label for label in labels if not texts.get(label)]
    if missing:
        raise Misuse(
            "label_texts",
            got=f"no text for {shorten(missing)} of {config.train}",
            expected="a text for every label, as in '0=negative,1=positive'",
            do="correct --label-texts, or name another --label-field",
        )
    return texts


def _listed(words: str) -> Sequence[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _drawn(name: str, rows: Rows, count: int, seed: int, *, stream: int) -> Rows:
    at_most(name, count, len(rows.ids), "rows of the file", do=f"lower --{name}")
    key = jax.random.fold_in(jax.random.key(seed), stream)
    chosen = jax.random.choice(key, len(rows.ids), (count,), replace=False)
    return rows.take(sorted(np.asarray(chosen).tolist()))
