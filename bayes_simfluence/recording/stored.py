"""The store of a recording: made anew, or checked to belong to the recording that is resumed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from jaxtyping import Bool

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import KIND, START, TWIN, UNRECORDED
from bayes_simfluence.data.claims import alone_in
from bayes_simfluence.data.metrics import check_metric_name
from bayes_simfluence.data.runs import same_ids
from bayes_simfluence.data.store import create_store, open_store, stored_statuses
from bayes_simfluence.files import PathLike, new_path
from bayes_simfluence.progress import Progress
from bayes_simfluence.recording.compiled import Batches, kept_of
from bayes_simfluence.recording.features import Features, features_of
from bayes_simfluence.recording.starts import Starts
from bayes_simfluence.tasks.task import Task

PACKAGES = ("bayes-simfluence", "jax", "optax", "numpy")


@dataclass(frozen=True)
class StoredRecording:
    """What a store holds of a recording before its first run ends.

    Attributes:
        batches: of all runs, twins included, ``(run, step, slot)``.
        kinds: of curriculum, one for each run of a design; empty where there is no design.
        starts: the weights that each run starts from.
        attrs: of the store, beside the versions of packages and the number of runs at once.
        features: of the task's examples, for the default model's prior, or how many to make.
        key: decides the random signs of those that are made.
    """

    path: PathLike
    task: Task
    batches: Batches
    kinds: Sequence[str]
    starts: Starts
    attrs: Mapping[str, Any]
    features: int | Features
    key: jax.Array

    def prepare(
        self,
        parallel: Callable[[int | None], int],
        *,
        resume: bool,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        """Make the store, or check that the one to be resumed belongs to this recording.

        Args:
            parallel: gives the number of runs at once, from that of a store to be resumed.
            progress: told of the features that are made for a new store.

        Raises:
            Misuse: a store that exists, or one of another recording.
        """
        path, features = Path(self.path), None
        if not (resume and path.exists()):
            new_path(path, overwrite=overwrite)
            # Before the folder is locked: others may record into it meanwhile.
            features = features_of(self.task, self.features, key=self.key, progress=progress)
        with alone_in(path.absolute().parent):
            stored = open_store(path) if resume and path.exists() else None
            at_once = parallel(None if stored is None else stored.attrs.get("parallel"))
            versions = {name: version(name) for name in PACKAGES}
            attrs = {**self.attrs, **self.starts.kept, "versions": versions, "parallel": at_once}
            if stored is None:
                self._create(attrs, features, overwrite=overwrite)
            else:
                self._check_same(stored, attrs)

    @property
    def parallel(self) -> int:
        """How many runs train at once on each device, once the store is there."""
        return int(open_store(self.path).attrs["parallel"])

    @property
    def unrecorded(self) -> Bool[np.ndarray, " run"]:
        """Runs that are not finished yet."""
        return stored_statuses(self.path) == UNRECORDED

    @property
    def _twins(self) -> list[str]:
        """The run that each run repeats, by its id in the store; empty where there are no twins."""
        return [str(run) for run in self.starts.repeated] if self.starts.twins else []

    @property
    def _metrics(self) -> tuple[str, ...]:
        return (*self.task.metrics, *self.task.scores)

    def _create(
        self, attrs: Mapping[str, Any], features: Features | None, *, overwrite: bool
    ) -> None:
        create_store(
            self.path,
            curricula=self.batches.members,
            weights=self.batches.weight,
            train_ids=self.task.train_ids,
            query_ids=self.task.query_ids,
            attrs=attrs,
            features={"train_feature": features.train, "query_feature": features.query}
            if features
            else {},
            metrics=[check_metric_name(name) for name in self._metrics],
            training=kept_of(self.task),
            kinds=self.kinds,
            starts=self.starts.of_runs,
            twins=self._twins,
            overwrite=overwrite,
        )

    def _check_same(self, stored: xr.Dataset, attrs: Mapping[str, Any]) -> None:
        weights = [stored["weight"].values] if "weight" in stored else []
        kinds, starts, twins = (
            stored[name].values.tolist() if name in stored.coords else []
            for name in (KIND, START, TWIN)
        )
        mine = [] if self.batches.weight is None else [self.batches.weight]
        same = {
            "curricula": np.array_equal(stored["batch"].values, self.batches.members),
            "kinds of curricula": np.array_equal(kinds, list(self.kinds)),
            "starts": np.array_equal(starts, self.starts.of_runs),
            "twins": np.array_equal(twins, self._twins),
            "weights": np.array_equal(weights, mine),
            "train ids": same_ids(stored["train"], self.task.train_ids),
            "query ids": same_ids(stored["query"], self.task.query_ids),
            "features": self._same_features(stored),
            **{f"metric {name}": name in stored for name in self._metrics},
            **{name: stored.attrs.get(name) == value for name, value in attrs.items()},
        }
        other = [name for name, agrees in same.items() if not agrees]
        if other:
            raise Misuse(
                str(self.path),
                got=f"a recording with other {', '.join(other)}",
                expected="the recording that is to be resumed",
                do="repeat the settings it was started with, or record to a new path",
            )

    def _same_features(self, stored: xr.Dataset) -> bool:
        """Whether the store has as many features as are given, or as would be made.

        A store begun without any, or a resumption that asks for none, keeps what there is.
        """
        width = stored["train_feature"].shape[1] if "train_feature" in stored else 0
        if isinstance(self.features, Features):
            return bool(width == self.features.train.shape[1])
        return width in (0, min(self.features, len(self.task.train_ids))) or self.features == 0
