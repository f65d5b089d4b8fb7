"""The settings of a recording from text files: one dataclass for Python, command line and YAML."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from bayes_simfluence.checks import (
    Misuse,
    count_of,
    positive_integer,
    positive_number,
    unit_interval,
)
from bayes_simfluence.settings import check_choices, say

__all__ = ["RecordConfig"]


@dataclass(frozen=True)
class RecordConfig:
    """Everything that decides what is recorded; saved beside the store."""

    checkpoint: str = say("checkpoint folder, hub name, or 'minilm'", "minilm")
    train: str = say("training examples, JSON lines", "train.jsonl")
    query: str = say("query examples, JSON lines", "query.jsonl")
    text_field: str = say("field of the text", "text")
    pair_field: str = say("field of a second text, none when empty", "")
    label_field: str = say("field of the label", "label")
    id_field: str = say("field of the id; the line number where it is absent", "id")
    examples: int = say("training examples drawn from the file", 200)
    queries: int = say("queries drawn from the file", 50)
    runs: int = say("runs to record", 32)
    per_run: int = say("examples in each run's random subset", 128)
    batch_size: int = say("examples in a step", 4)
    epochs: int = say("passes over the subset", 3)
    optimizer: str = say("update rule", "adamw", ("adamw", "adam", "sgd"))
    learning_rate: float = say("highest step size", 2e-5)
    schedule: str = say("decay of the step size", "linear", ("linear", "cosine", "constant"))
    warmup_steps: int = say("steps of linear warm-up", 0)
    weight_decay: float = say("decoupled weight decay (adamw)", 0.01)
    momentum: float = say("momentum (sgd)", 0.0)
    pooling: str = say("how a text becomes one vector", "mean", ("mean", "cls", "pooler"))
    max_tokens: int = say("longer texts are cut to this many tokens", 128)
    features: int = say("gradient features kept for the prior, 0 = none", 16)
    seed: int = say("decides examples, queries, head and curricula", 0)
    parallel: int | str = say("runs trained at once on each device, a number or auto", 1)
    evaluate_every: int = say("steps between two measurements of the queries", 1)
    scores_every: int = say("steps between two scores of generated text, 0 = at the end", 0)
    checkpoints: int = say("weights that each run saves on its way, for TracIn", 0)
    accumulate: int = say("parts of a batch whose gradients are added up", 1)
    remat: bool = say("compute activations twice to save memory", False)

    def validate(self) -> "RecordConfig":
        """The settings themselves when each is possible.

        Raises:
            Misuse: the first one that is not.
        """
        for name in ("examples", "queries", "runs", "per_run", "batch_size", "epochs"):
            positive_integer(name, getattr(self, name))
        for name in ("max_tokens", "evaluate_every", "accumulate"):
            positive_integer(name, getattr(self, name))
        if self.at_once != "auto":
            positive_integer("parallel", self.at_once, do="pass a whole number or auto")
        for name in ("features", "warmup_steps", "seed", "scores_every", "checkpoints"):
            count_of(name, getattr(self, name))
        positive_number("learning_rate", self.learning_rate)
        unit_interval("momentum", self.momentum)
        unit_interval("weight_decay", self.weight_decay)
        check_choices(self)
        for small, large in (("per_run", "examples"), ("batch_size", "per_run")):
            if getattr(self, small) > getattr(self, large):
                raise Misuse(
                    small,
                    got=getattr(self, small),
                    expected=f"at most {large} = {getattr(self, large)}",
                    do=f"lower {small} or raise {large}",
                )
        return self

    @property
    def at_once(self) -> Any:
        """``parallel`` as a number where it is one; options come as text."""
        said = self.parallel
        return int(said) if isinstance(said, str) and said.isdigit() else said

    @property
    def steps(self) -> int:
        """Optimizer updates in a run."""
        return -(-self.per_run // self.batch_size) * self.epochs

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and for the store's attributes."""
        return asdict(self)

    @classmethod
    def names(cls) -> list[str]:
        """The settings' names, in order."""
        return [one.name for one in fields(cls)]
