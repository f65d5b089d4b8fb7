"""The schema of runs, checked once, at the door."""

import numpy as np
import xarray as xr
from jaxtyping import Bool

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.conventions import COMPLETE, EMPTY_SLOT, OPTIONAL, SCHEMA_VERSION, VARIABLES
from bayes_simfluence.data.metrics import validate_metrics
from bayes_simfluence.data.starts import validate_starts
from bayes_simfluence.data.training import validate_training
from bayes_simfluence.data.twins import validate_twins
from bayes_simfluence.data.weights import validate_weights


def validate_runs(runs: xr.Dataset) -> xr.Dataset:
    """``runs`` itself when it follows the schema of ``conventions``; checked once, at the door.

    Raises:
        Misuse: a variable, dimension or id is missing, repeated or out of range; weights that
            are negative, not finite or sum to 0 in a batch with examples; train losses or
            residuals that do not fit their batches; twins of other curricula; in a complete run,
            a loss that is infinite or not recorded at time 0.
    """
    if not isinstance(runs, xr.Dataset):
        raise Misuse(
            "runs",
            got=type(runs).__name__,
            expected="an xarray.Dataset of recorded runs",
            do="make one with runs_from_arrays(...) or open_runs(...)",
        )
    version = runs.attrs.get("schema_version")
    if version != SCHEMA_VERSION:
        raise Misuse(
            "runs.attrs['schema_version']",
            got=version,
            expected=str(SCHEMA_VERSION),
            do="record again or rebuild the dataset with runs_from_arrays(...)",
        )
    for name in ("batch", "loss", "status", *(name for name in OPTIONAL if name in runs)):
        dims = VARIABLES[name][0]
        if name not in runs or runs[name].dims != dims:
            got = f"dimensions {runs[name].dims}" if name in runs else "no such variable"
            raise Misuse(
                f"runs['{name}']", got=got, expected=f"dimensions {dims}", do="see conventions"
            )
    validate_metrics(runs)
    for name in ("run", "train", "query", "step", "time"):
        _coordinate(runs, name)
    if runs.sizes["time"] != runs.sizes["step"] + 1:
        raise Misuse(
            "runs",
            got=f"{runs.sizes['step']} steps and {runs.sizes['time']} times",
            expected="one time more than steps",
            do="slice step and time together",
        )
    _indices_in_range(runs)
    validate_weights(runs)
    validate_training(runs)
    validate_starts(runs)
    validate_twins(runs)
    _finite_where_complete(runs)
    return runs


def _coordinate(runs: xr.Dataset, name: str) -> None:
    if name not in runs.coords:
        raise Misuse(
            f"runs['{name}']", got="no coordinate", expected="ids as coordinate", do="add the ids"
        )
    ids, counts = np.unique(runs[name].values.astype(str), return_counts=True)
    if (counts > 1).any():
        raise Misuse(
            f"runs['{name}']",
            got=f"repeated ids {shorten(ids[counts > 1])}",
            expected="each id once",
            do="rename them, or select each run once",
        )


def _indices_in_range(runs: xr.Dataset) -> None:
    batch, train = runs["batch"].values, runs.sizes["train"]
    bad = (batch < EMPTY_SLOT) | (batch >= train)
    if bad.any():
        run, step, _ = np.argwhere(bad)[0]
        raise Misuse(
            "runs['batch']",
            got=f"index {batch[bad][0]} in run {runs['run'].values[run]}, step {step + 1}",
            expected=f"-1 or 0..{train - 1}",
            do="check the indices and train_ids",
        )


def _finite_where_complete(runs: xr.Dataset) -> None:
    for name in ("train_feature", "query_feature"):
        if name in runs and not np.isfinite(runs[name].values).all():
            raise Misuse(
                f"runs['{name}']",
                got="values that are not finite",
                expected="finite features",
                do=f"make the features again, or drop them with runs.drop_vars('{name}')",
            )
    loss = runs["loss"].values
    refuse_losses(
        runs,
        np.isinf(loss),
        expected="finite losses, or NaN where not recorded, in every run of status complete",
        do="leave the run out, or keep it marked with keep_diverged=True",
    )
    complete = runs["status"].values == COMPLETE
    unknown = np.isnan(loss[complete][:, 0]).any(axis=0)
    if unknown.any():
        raise Misuse(
            "runs['loss'] at time 0",
            got=f"nothing recorded for queries {shorten(runs['query'].values[unknown])}",
            expected="every query's loss before the first update in every run of status complete",
            do="record it, or leave these queries or runs out with runs.isel(...)",
        )


def refuse_losses(
    runs: xr.Dataset, bad: Bool[np.ndarray, "run time query"], *, expected: str, do: str
) -> None:
    """Raise when a complete run has a loss that is marked as bad."""
    bad = bad & (runs["status"].values == COMPLETE)[:, None, None]
    if bad.any():
        run, time, query = np.argwhere(bad)[0]
        raise Misuse(
            "runs['loss']",
            got=f"{runs['loss'].values[bad][0]} in run {runs['run'].values[run]}, time {time}, "
            f"query {runs['query'].values[query]}",
            expected=expected,
            do=do,
        )


def check_later_losses(runs: xr.Dataset) -> None:
    """Raise when there are complete runs and none has a loss of some query after time 0."""
    complete = runs["status"].values == COMPLETE
    unknown = np.isnan(runs["loss"].values[complete][:, 1:]).all(axis=(0, 1))
    if complete.any() and unknown.any():
        queries = shorten(runs["query"].values[unknown])
        raise Misuse(
            "runs['loss']",
            got=f"nothing recorded after time 0 for queries {queries}",
            expected="at least one later loss of every query in at least one run",
            do="record it, or leave these queries out with runs.isel(query=...)",
        )
