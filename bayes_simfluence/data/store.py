"""Runs on disk: Zarr v3 (one chunk a run, so that runs are written one by one) and netCDF.

A new store appears under its name only when it is whole. A finished run is its chunks first and
its ``status`` last, each file replaced atomically: a killed writer leaves the run unrecorded.
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from jaxtyping import Float, Int8

from bayes_simfluence.checks import Misuse, WorkFailed, choice_of, shorten
from bayes_simfluence.conventions import (
    KIND,
    OF_TRAINING,
    OPTIONAL,
    START,
    TWIN,
    UNRECORDED,
    Curricula,
    Trajectory,
)
from bayes_simfluence.data.metrics import metric_names, metric_variable
from bayes_simfluence.data.netcdf import plain, read_group, write_groups
from bayes_simfluence.data.runs import Ids, run_statuses, runs_dataset, same_ids, with_kinds
from bayes_simfluence.data.starts import with_starts
from bayes_simfluence.data.training import with_training
from bayes_simfluence.data.twins import with_twins
from bayes_simfluence.data.validation import validate_runs
from bayes_simfluence.data.weights import with_weights
from bayes_simfluence.files import PathLike, atomically, first_line, new_path, old_path, readable

CHECKPOINTS = "checkpoints"
"""Folder of a store that holds the weights saved on the way, one folder a run."""

EXAMPLES = {
    "sst2": "example_runs.nc",
    "trec": "example_runs_trec.nc",
    "copa": "example_runs_copa.nc",
    "sst2-sgd": "example_runs_sst2_sgd.nc",
    "sst2-lora": "example_runs_sst2_lora.nc",
    "sst2-ia3": "example_runs_sst2_ia3.nc",
    "trec-ia3": "example_runs_trec_ia3.nc",
    "copa-ia3": "example_runs_copa_ia3.nc",
    "trec-causal": "example_runs_trec_causal.nc",
}
"""Recordings that ship with the package, all of one protocol."""
COUNTERFACTUALS = {
    "sst2-counterfactuals": "example_runs_sst2_counterfactuals.nc",
    "sst2-longer": "example_runs_sst2_longer.nc",
    "sst2-lora-counterfactuals": "example_runs_sst2_lora_counterfactuals.nc",
    "sst2-lora-longer": "example_runs_sst2_lora_longer.nc",
}
"""Recordings that ship, of random runs and of curricula that are made otherwise."""


def save_runs(runs: xr.Dataset, path: PathLike, *, overwrite: bool = False) -> Path:
    """Write valid ``runs`` as a Zarr store at ``path``, all or nothing.

    Raises:
        Misuse: invalid runs, a store that exists and ``overwrite`` is not set, a folder that
            cannot be written to.
    """
    validate_runs(runs)
    return _write_store(runs, new_path(path, overwrite=overwrite))


def append_runs(runs: xr.Dataset, path: PathLike) -> Path:
    """Add ``runs`` to the store at ``path``; the same examples and queries, new run ids.

    Where only one of the two has weights, those of the other are written out as 1; where only one
    has train losses or residuals, those of the other are not known and become NaN; where only one
    says what kind its curricula are of, the others' kind is an empty text; where only one has
    twins or other starts, the other's runs are no twins and from start 0.

    Raises:
        Misuse: other ids or steps than the store's, or run ids that it holds already.
    """
    stored, runs = open_store(path), validate_runs(runs)
    for name in ("train", "query", "step", "slot"):
        same = stored.sizes[name] == runs.sizes[name]
        if not same or (name != "slot" and not same_ids(stored[name], runs[name])):
            raise Misuse(
                f"runs['{name}']",
                got="other values than the store's",
                expected=f"the same {name} as in {path}",
                do="save these runs to a store of their own",
            )
    if "weight" in stored or "weight" in runs:
        stored, runs = with_weights(stored), with_weights(runs)
    for name in OF_TRAINING:
        if name in stored or name in runs:
            stored, runs = with_training(stored, name), with_training(runs, name)
    if KIND in stored.coords or KIND in runs.coords:
        stored, runs = _said_or_empty(stored), _said_or_empty(runs)
    if START in stored.coords or START in runs.coords:
        stored, runs = with_starts(stored), with_starts(runs)
    if TWIN in stored.coords or TWIN in runs.coords:
        stored, runs = with_twins(stored), with_twins(runs)
    for name in (*OPTIONAL, *{*metric_names(stored), *metric_names(runs)}):
        if (name in stored) != (name in runs):
            raise Misuse(
                name,
                got="recorded in only one of the two",
                expected="both or neither",
                do=f"drop it with runs.drop_vars('{name}') or record it",
            )
        if (
            name in stored
            and "run" not in stored[name].dims
            and not stored[name].equals(runs[name])
        ):
            raise Misuse(
                name,
                got="other values than the store's",
                expected="the same for all runs of a store",
                do=f"take it from the store: runs.assign({name}=stored['{name}'])",
            )
    both = xr.concat([stored, runs], dim="run", data_vars="minimal", coords="minimal", join="exact")
    both = validate_runs(both.assign_attrs(stored.attrs))
    return _write_store(both, Path(path), like=Path(path))


def open_runs(path: PathLike) -> xr.Dataset:
    """The finished runs of a Zarr store or netCDF file, in memory and validated.

    Runs that ``record`` has not finished are left out, with a warning that says how many.

    Raises:
        Misuse: no store there, a store that cannot be read or is of another schema version.
    """
    runs = open_store(path)
    recorded = runs["status"].values != UNRECORDED
    if not recorded.all():
        warnings.warn(
            f"{path}: {recorded.sum()} of {len(recorded)} runs recorded so far; "
            "record again with resume to finish it",
            stacklevel=2,
        )
    return runs.isel(run=np.flatnonzero(recorded))


def open_store(path: PathLike) -> xr.Dataset:
    """All runs of a store, also those not recorded yet (status 0, losses NaN)."""
    return validate_runs(_opened(Path(path), "recorded runs"))


def open_losses(path: PathLike) -> xr.DataArray:
    """The losses in a Zarr store or netCDF file: of runs, also unfinished ones, or losses alone.

    For ``Posterior.simulate(observed=...)``, which checks them.

    Raises:
        Misuse: nothing there, something that cannot be read, or no variable ``loss`` in it.

    >>> import tempfile
    >>> from pathlib import Path
    >>> seen = example_runs()["loss"].isel(query=[0, 3], time=slice(0, 40))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = seen.to_netcdf(Path(folder) / "seen.nc", engine="h5netcdf")
    ...     open_losses(Path(folder) / "seen.nc").shape
    (32, 40, 2)
    """
    found = _opened(Path(path), "losses")
    if "loss" not in found:
        raise Misuse(
            str(path),
            got=f"no variable loss among {shorten(found.variables)}",
            expected="losses in nats, loss (run, time, query), with these ids as coordinates",
            do="write it with runs['loss'].to_netcdf(path, engine='h5netcdf'), or pass a recording",
        )
    return found["loss"]


def export_netcdf(runs: xr.Dataset, path: PathLike, *, overwrite: bool = False) -> Path:
    """Write valid ``runs`` as one compressed netCDF-4 file; ``open_runs`` reads it back."""
    validate_runs(runs)
    path = new_path(path, overwrite=overwrite)
    with atomically(path) as partial:
        write_groups(partial, {"/": runs})
    return path


def example_runs(name: str = "sst2") -> xr.Dataset:
    """32 recorded runs that ship with the package (ids and losses, no text).

    The standard protocol: each run 128 of 200 examples, batch 4, 3 epochs (96 steps), AdamW with
    linear decay, 50 queries; ``docs/recording.md`` has the commands that recorded them.

    Args:
        name: MiniLM fully fine-tuned on ``sst2`` (sentiment, two classes), ``trec`` (questions, six
            classes) or ``copa`` (pairs of sentences, plausible or not); with adapters in
            ``sst2-lora``, ``sst2-ia3``, ``trec-ia3`` and ``copa-ia3``; ``sst2-sgd``: plain SGD at a
            high rate, where runs are hard to predict; ``trec-causal``: a small GPT-2
            on questions as text.

            Otherwise made are ``sst2-counterfactuals`` (88 runs of 72 steps, 32 queries, with the
            losses of each step's examples; the coordinate ``curriculum`` of ``run`` says which are
            random, of a diverse design, or counterfactuals of each kind: docs/counterfactuals.md)
            and ``sst2-longer``, four of their runs that go on for 108 steps; the same with LoRA,
            without a diverse design, in ``sst2-lora-counterfactuals`` and ``sst2-lora-longer``.

    >>> example_runs().sizes["run"]
    32
    """
    every = EXAMPLES | COUNTERFACTUALS
    choice_of("example_runs(name)", name, tuple(every))
    resource = files("bayes_simfluence.data") / every[name]
    with as_file(resource) as path:
        return open_runs(path)


def create_store(
    path: PathLike,
    *,
    curricula: Curricula,
    train_ids: Ids,
    query_ids: Ids,
    attrs: Mapping[str, Any],
    weights: Float[np.ndarray, "run step slot"] | None = None,
    features: Mapping[str, np.ndarray] | None = None,
    metrics: Sequence[str] = (),
    training: Sequence[str] = (),
    kinds: Sequence[str] = (),
    starts: Sequence[int] = (),
    twins: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """A store with the curricula (and features) of runs that are still to be recorded.

    Args:
        weights: of the example in each slot of the curricula; all 1 when omitted.
        metrics: names of what will be recorded beside the loss.
        training: those of ``OF_TRAINING`` that will be recorded.
        kinds: of curriculum, one for each run of a design; none is said when empty.
        starts: number of each run's initial weights; all start alike when empty.
        twins: the run that each run repeats, as ``data.twins`` has it; none is said when empty.
    """
    runs, steps, _ = curricula.shape
    values = {
        "batch": curricula.astype(np.int32),
        "loss": np.full((runs, steps + 1, len(query_ids)), np.nan, np.float32),
        "step_size": np.full((runs, steps), np.nan, np.float32),
        "status": np.full(runs, UNRECORDED, np.int8),
        **{name: np.full(curricula.shape, np.nan, np.float32) for name in training},
        **dict(features or {}),
    }
    ids = {"run": np.arange(runs), "train": np.asarray(train_ids), "query": np.asarray(query_ids)}
    dataset = runs_dataset(values, weight=weights, ids=ids, attrs=attrs).assign(
        {name: metric_variable(name, values["loss"]) for name in metrics}
    )
    if kinds:
        dataset = with_kinds(dataset, kinds)
    if starts:
        dataset = with_starts(dataset, starts)
    if twins:
        dataset = with_twins(dataset, twins)
    return _write_store(validate_runs(dataset), new_path(path, overwrite=overwrite))


def write_run(
    path: PathLike,
    run: int,
    loss: Trajectory,
    step_size: Float[np.ndarray, " step"],
    *,
    metrics: Mapping[str, Trajectory] | None = None,
    training: Mapping[str, Float[np.ndarray, "step slot"]] | None = None,
    times: Sequence[int] | slice = slice(None),
) -> None:
    """Write one finished run of a store made by ``create_store``; its status goes last.

    Args:
        metrics: what was recorded beside the loss, as named to ``create_store``.
        training: what the steps computed of their batches; what the store has no place for (one
            begun by an earlier version) is left out.
        times: when the loss was recorded; it is NaN at all others.
    """
    # What a killed writer of this run left behind.
    for pattern in (f"*/c/{run}/**/*.partial", f"*/c/{run}.*.partial"):
        for partial in Path(path).glob(pattern):
            partial.unlink()
    try:
        group: Any = zarr.open_group(str(path), mode="r+", use_consolidated=False)
        kept = {name: rows for name, rows in (training or {}).items() if name in group}
        recorded = {"loss": loss, "step_size": step_size, **dict(metrics or {}), **kept}
        for name, values in recorded.items():
            group[name][run] = values
        group["status"][run] = run_statuses(loss[None, times])[0]
    except OSError as error:
        raise WorkFailed(
            f"run {run} could not be written to {path} ({first_line(error)}); the runs before it "
            "are safe, make room and record again with resume"
        ) from error


def stored_statuses(path: PathLike) -> Int8[np.ndarray, " run"]:
    """The status of every run of a store, read without the losses."""
    group: Any = zarr.open_group(str(path), mode="r", use_consolidated=False)
    return np.asarray(group["status"][:])


def _said_or_empty(runs: xr.Dataset) -> xr.Dataset:
    """``runs`` with a kind of each curriculum, an empty text where none was said."""
    return runs if KIND in runs.coords else with_kinds(runs, [""] * runs.sizes["run"])


def _opened(path: Path, what: str) -> xr.Dataset:
    if not path.exists():
        aside = old_path(path)
        raise Misuse(
            str(path),
            got="nothing there",
            expected=f"a store of {what}",
            do=f"rename {aside} back to it, a replacement was interrupted"
            if aside.exists()
            else "check the path, or record runs into it",
        )
    with readable(
        path,
        Exception,
        got="a file or folder",
        expected=f"a Zarr v3 store or netCDF file of {what}",
        do="record again or restore the store from a copy",
    ):
        return _read(path)


def _read(path: Path) -> xr.Dataset:
    if not path.is_dir():
        return read_group(path)
    with xr.open_zarr(path, chunks=None, consolidated=True) as opened:
        return plain(opened.load())


def _write_store(runs: xr.Dataset, path: Path, *, like: Path | None = None) -> Path:
    # Zarr has no specification for fixed-width text yet; variable-length text it has.
    texts = {
        name: runs[name].astype(object) for name in runs.coords if runs[name].dtype.kind == "U"
    }
    runs = runs.assign_coords(texts)
    chunks = {
        name: {"chunks": (1, *variable.shape[1:])}
        for name, variable in runs.data_vars.items()
        if variable.dims[0] == "run"
    }
    with atomically(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        runs.to_zarr(partial, zarr_format=3, consolidated=True, encoding=chunks)
        if like is not None and (like / CHECKPOINTS).is_dir():
            shutil.copytree(like / CHECKPOINTS, partial / CHECKPOINTS)
    return path
