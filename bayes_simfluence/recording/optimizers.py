"""Optimizers by name, whose state tells the step size that ``record`` keeps."""

import optax

from bayes_simfluence.recording.config import RecordConfig

__all__ = ["optimizer_of"]


def optimizer_of(config: RecordConfig) -> optax.GradientTransformation:
    """The optax optimizer that a recording's settings describe."""
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
    return (
        optax.join_schedules([optax.linear_schedule(0.0, top, warm), after], [warm])
        if warm
        else after
    )
