"""One cell of a study on disk: where its results are, and which runs are used for what."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zlib import crc32

import jax
import pandas as pd
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import UNRECORDED
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.store import example_runs, open_runs, stored_statuses
from bayes_simfluence.data.twins import without_twins
from bayes_simfluence.evaluation.compare import FAILED
from bayes_simfluence.study.config import EXAMPLE, CellConfig, StudyConfig
from bayes_simfluence.study.methods import ATTRIBUTIONS, SIMULATORS


@dataclass(frozen=True)
class Split:
    """Runs of a recording by their use; each run has one use."""

    fitted: xr.Dataset
    validation: xr.Dataset | None
    held_out: xr.Dataset


@dataclass(frozen=True)
class Cell:
    """A cell of a study and its folder.

    Attributes:
        config: of the cell.
        study: of the whole study.
        folder: of the cell.
    """

    config: CellConfig
    study: StudyConfig
    folder: Path

    @property
    def store(self) -> Path:
        """Where the runs are recorded, unless the cell names an existing recording."""
        return self.folder / "runs.zarr"

    @property
    def pilot(self) -> Path:
        """The recording of the pilot run that keeps weights."""
        return self.folder / "pilot.zarr"

    @property
    def attributions(self) -> list[str]:
        """Names of the attributions that are wanted."""
        wanted = self.study.methods
        return list(ATTRIBUTIONS if wanted is None else wanted)

    @property
    def simulators(self) -> list[str]:
        """Names of the simulators that are wanted."""
        wanted = self.study.simulators
        return list(SIMULATORS if wanted is None else wanted)

    def scores(self, method: str) -> Path:
        """The scores of an attribution."""
        return self.folder / "scores" / f"{method}.nc"

    def fit(self, method: str, count: int) -> Path:
        """The simulator of a method that was fitted to ``count`` runs."""
        return self.folder / "fits" / str(count) / f"{method}.nc"

    def table(self, count: int) -> Path:
        """The comparison of the simulators that were fitted to ``count`` runs."""
        return self.folder / "tables" / f"{count}.csv"

    def recorded(self, path: Path) -> bool:
        """Whether every run of a store is recorded."""
        return path.exists() and bool((stored_statuses(path) != UNRECORDED).all())

    @cached_property
    def runs(self) -> xr.Dataset:
        """The recorded runs.

        Raises:
            Misuse: they are not all recorded yet.
        """
        source = self.config.runs
        if source.startswith(EXAMPLE):
            return example_runs(source.removeprefix(EXAMPLE))
        if source:
            return open_runs(source)
        if not self.recorded(self.store):
            raise Misuse(
                f"cell {self.config.name!r}",
                got="runs that are not all recorded",
                expected=f"a complete store {self.store}",
                do="run the stage record",
            )
        return open_runs(self.store)

    def split(self, count: int) -> Split:
        """The first ``count`` runs to fit; runs to validate and test, the same for all counts.

        Raises:
            Misuse: fewer usable runs than the study needs.
        """
        (runs, _), study = without_twins(usable_runs(self.runs)), self.study
        if runs.sizes["run"] < study.needed:
            raise Misuse(
                f"cell {self.config.name!r}: runs",
                got=runs.sizes["run"],
                expected=f"at least {study.needed} usable ones",
                do="record more, or lower counts, validate or held_out",
            )
        most = max(study.counts)
        end = most + study.protocol.validate
        return Split(
            fitted=runs.isel(run=slice(0, count)),
            validation=runs.isel(run=slice(most, end)) if study.protocol.validate else None,
            held_out=runs.isel(run=slice(end, end + study.protocol.held_out)),
        )

    def key(self, job: str) -> jax.Array:
        """The PRNG key of a job, the same in every call and on every machine."""
        number = crc32(f"{self.config.name}/{job}".encode())
        return jax.random.fold_in(jax.random.key(self.study.protocol.seed), number)

    def tables(self) -> Mapping[int, pd.DataFrame]:
        """The comparisons made so far, by number of fitted runs."""
        return {
            count: pd.read_csv(self.table(count), index_col="method").fillna({FAILED: ""})
            for count in sorted(self.study.counts)
            if self.table(count).is_file()
        }
