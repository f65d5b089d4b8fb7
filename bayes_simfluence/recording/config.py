"""The settings of a recording from text files: one dataclass for Python, command line and YAML."""

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from bayes_simfluence.checks import (
    Misuse,
    count_of,
    positive_integer,
    positive_number,
    unit_interval,
)
from bayes_simfluence.recording.settings import Evaluation, Placement
from bayes_simfluence.settings import check_choices, say

if TYPE_CHECKING:
    from bayes_simfluence.tuning.base import Tuning

Group = TypeVar("Group")
KINDS = ("classification", "choice", "causal", "seq2seq")
POOLINGS = ("mean", "cls", "last", "pooler")
ONLY = {
    "pair_field": ("classification",),
    "completion": ("causal", "seq2seq"),
    "choices_fields": ("choice",),
    "label_texts": ("seq2seq",),
}
"""Setting -> the tasks that have it; elsewhere it would be ignored, and is refused."""

AT_MOST = {"per_run": "examples", "batch_size": "per_run", "twins": "runs", "starts": "runs"}
"""Setting -> the one that it must not exceed."""


@dataclass(frozen=True)
class RecordConfig:
    """Everything that decides what is recorded; saved beside the store."""

    checkpoint: str = say("checkpoint folder, hub name, or 'minilm'", "minilm")
    train: str = say("training examples: JSON lines, .csv or .parquet", "train.jsonl")
    query: str = say("query examples: JSON lines, .csv or .parquet", "query.jsonl")
    task: str = say("what is learned", "classification", KINDS)
    text_field: str = say("field of the text, where no prompt is given", "text")
    prompt: str = say("text of fields, as '{premise} {hypothesis}'; causal: none when empty", "")
    pair_field: str = say("classification: field of a second text, none when empty", "")
    completion: str = say("causal, seq2seq: text to predict, as ' {answer}'", "")
    choices_fields: str = say("choice: fields of the options, as 'choice1,choice2'", "")
    label_field: str = say("field of the label", "label")
    label_texts: str = say("seq2seq: texts of labels, as '0=bad,1=good'; else the labels", "")
    id_field: str = say("field of the id; the line number where it is absent", "id")
    metrics: str = say("beside the loss, of accuracy,margin,bleu,rouge_l", "")
    new_tokens: int = say("most tokens generated for bleu and rouge_l", 32)
    examples: int = say("training examples drawn from the file", 200)
    queries: int = say("queries drawn from the file", 50)
    runs: int = say("runs to record", 32)
    per_run: int = say("examples in each run's random subset", 128)
    batch_size: int = say("examples in a step", 4)
    epochs: int = say("passes over the subset", 3)
    design: str = say(
        "curricula: all random subsets in epochs, or half of them sorted, one-sided, repeated, ...",
        "random",
        ("random", "diverse"),
    )
    shares: str = say(
        "diverse: shares of kinds, as 'sorted=0.2,half=0.1', the rest random; else 0.1 of each", ""
    )
    starts: int = say("fresh heads that the runs take turns with, 1 = all from the same", 1)
    twins: int = say("of the last runs, how many are trained twice: the floor of any simulator", 0)
    optimizer: str = say("update rule", "adamw", ("adamw", "adam", "sgd"))
    learning_rate: float = say("highest step size", 2e-5)
    schedule: str = say("decay of the step size", "linear", ("linear", "cosine", "constant"))
    warmup_steps: int = say("steps of linear warm-up", 0)
    weight_decay: float = say("decoupled weight decay (adamw)", 0.01)
    momentum: float = say("momentum (sgd)", 0.0)
    tuning: str = say("what is trained", "full", ("full", "head", "lora", "ia3"))
    rank: int = say("rank of the changes (lora)", 8)
    alpha: float = say("the changes are scaled by alpha / rank (lora)", 16.0)
    targets: str = say("layers to adapt (lora, ia3), commas between; empty = the family's", "")
    exclude: str = say("tensors that stay frozen (full), commas between", "")
    pooling: str = say("how a text becomes one vector", "mean", POOLINGS)
    max_tokens: int = say("longer texts are cut to this many tokens", 128)
    features: int = say("gradient features kept for the prior, 0 = none", 64)
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
        for name in ("examples", "queries", "runs", "per_run", "batch_size", "epochs", "starts"):
            positive_integer(name, getattr(self, name))
        for name in ("max_tokens", "new_tokens"):
            positive_integer(name, getattr(self, name))
        for name in ("features", "warmup_steps", "seed", "twins"):
            count_of(name, getattr(self, name))
        self.evaluation.validate()
        self.placement.validate()
        positive_number("learning_rate", self.learning_rate)
        unit_interval("momentum", self.momentum)
        unit_interval("weight_decay", self.weight_decay)
        check_choices(self)
        self.chosen_tuning()
        self.chosen_shares()
        self._check_task()
        for small, large in AT_MOST.items():
            if getattr(self, small) > getattr(self, large):
                raise Misuse(
                    small,
                    got=getattr(self, small),
                    expected=f"at most {large} = {getattr(self, large)}",
                    do=f"lower {small} or raise {large}",
                )
        return self

    def chosen_tuning(self) -> "Tuning":
        """What is trained, as an object."""
        # Here, so that the command line answers --help without JAX.
        from bayes_simfluence.tuning.tunings import tuning_of

        return tuning_of(
            self.tuning,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            exclude=self.exclude,
        )

    def chosen_shares(self) -> dict[str, float]:
        """Shares of every kind of curriculum in a diverse design."""
        # Here, as above.
        from bayes_simfluence.data.designs import SHARES, checked_shares

        if not self.shares:
            return checked_shares(SHARES)
        if self.design != "diverse":
            raise Misuse(
                "shares",
                got=f"{self.shares!r} for the design {self.design}",
                expected="shares only for the design diverse",
                do="leave them out, or set --design diverse",
            )
        pairs = [pair.partition("=") for pair in self.shares.split(",")]
        try:
            shares = {kind.strip(): float(share) for kind, _, share in pairs}
        except ValueError:
            raise Misuse(
                "shares",
                got=repr(self.shares),
                expected="a number for each kind, as in 'sorted=0.2,half=0.1'",
                do="correct --shares",
            ) from None
        return checked_shares(shares)

    def _check_task(self) -> None:
        for name, tasks in ONLY.items():
            if getattr(self, name) and self.task not in tasks:
                raise Misuse(
                    name,
                    got=f"{getattr(self, name)!r} for the task {self.task}",
                    expected=f"it only for {' or '.join(tasks)}",
                    do=f"leave it out, or set --task {tasks[0]}",
                )
        needed = {"choice": "choices_fields", "causal": "completion"}
        name = needed.get(self.task, "")
        # Without any template the causal task predicts the text field.
        if name and not getattr(self, name) and (self.task == "choice" or self.prompt):
            raise Misuse(
                name,
                got="nothing",
                expected=f"what the task {self.task} is to choose or complete",
                do=f"give --{name.replace('_', '-')}",
            )
        if self.completion and self.label_texts:
            raise Misuse(
                "label_texts",
                got="it and a completion",
                expected="one of the two",
                do="leave one of them out",
            )

    @property
    def evaluation(self) -> Evaluation:
        """What is measured and saved on the way."""
        return self._group(Evaluation)

    @property
    def placement(self) -> Placement:
        """How the work is laid out; the number of runs at once comes as text on a command line."""
        parallel = self.parallel
        number = int(parallel) if isinstance(parallel, str) and parallel.isdigit() else parallel
        return replace(self._group(Placement), parallel=number)

    def _group(self, group: type[Group]) -> Group:
        """Some settings as ``record`` takes them, where they have the same names."""
        names = {setting.name for setting in fields(group)} & set(self.names())  # type: ignore[arg-type]
        return group(**{name: getattr(self, name) for name in names})

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
        return [setting.name for setting in fields(cls)]
