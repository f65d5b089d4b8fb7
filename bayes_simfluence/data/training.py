"""What the training step computed of its own batch: losses and residuals of its examples.

The gradient of an example's loss shrinks with its residual, the share of its target's probability
that is still missing, so recorded residuals say how strongly each example acted. Both variables are
optional. A complete run has one at every example that counts in its batch (in a slot that is filled
and has weight) or nowhere, which is NaN throughout.
"""

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, EMPTY_SLOT, OF_TRAINING, VARIABLES
from bayes_simfluence.data.weights import weights_of

ROUNDING = 1e-6
"""How far below 0 or above 1 a mean of shares in single precision may come to lie."""


def residuals_of(runs: xr.Dataset) -> Float[np.ndarray, "run step slot"] | None:
    """How much each example had still to learn when it was trained on; ``None`` if nothing tells.

    The recorded residual, or else ``1 - exp(-train_loss)``. That is the residual itself where the
    loss is the cross-entropy of one label. Of a text, whose loss is a mean over tokens, it is a
    stand-in: one less the geometric mean of the tokens' probabilities, which is no less than the
    residual, one less their arithmetic mean.

    Returns:
        In [0, 1]; 0 in slots without an example that counts, NaN in runs of which nothing is known.
        A negative train loss is no cross-entropy, so nothing is known of its run either.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> runs = runs_from_arrays(
    ...     batch=[[[0, -1]]], loss=[[[0.7], [0.6]]], train_loss=[[[np.log(4.0), np.nan]]])
    >>> residuals_of(runs).round(6).tolist()
    [[[0.75, 0.0]]]
    """
    known = [name for name in OF_TRAINING if name in runs]
    if not known:
        return None
    counted = counted_slots(runs)
    found = np.full(counted.shape, np.nan)
    if "train_loss" in runs:
        loss = runs["train_loss"].values.astype(float)
        negative = (counted & (loss < -ROUNDING)).any(axis=(1, 2), keepdims=True)
        found = np.where(negative, np.nan, -np.expm1(-np.maximum(loss, 0.0)))
    if "train_residual" in runs:
        residual = runs["train_residual"].values.astype(float)
        found = np.where(np.isnan(residual), found, residual)
    return np.where(counted, np.clip(found, 0.0, 1.0), 0.0)


def counted_slots(runs: xr.Dataset) -> Bool[np.ndarray, "run step slot"]:
    """Slots with an example that counts: filled, and of a weight above 0."""
    return (runs["batch"].values != EMPTY_SLOT) & (weights_of(runs) > 0)


def with_training(runs: xr.Dataset, name: str) -> xr.Dataset:
    """``runs`` with the variable ``name`` of ``OF_TRAINING``, NaN if it was not recorded."""
    if name in runs:
        return runs
    dims, attrs = VARIABLES[name]
    return runs.assign(
        {name: (dims, np.full(runs["batch"].shape, np.nan, np.float32), dict(attrs))}
    )


def whole_or_nothing(
    values: Float[np.ndarray, "step slot"], counted: Bool[np.ndarray, "step slot"]
) -> Float[np.ndarray, "step slot"]:
    """``values`` of one run, NaN throughout where one that counts is NaN, as a complete run needs.

    Such a run can end well: an optimizer may skip the steps that are not finite.
    """
    return np.full_like(values, np.nan) if np.isnan(values[counted]).any() else values


def validate_training(runs: xr.Dataset) -> None:
    """Raise unless train losses and residuals fit their batches.

    ``runs`` have a valid ``batch`` and ``weight``.
    """
    known = [name for name in OF_TRAINING if name in runs]
    for name in known:
        _fits_batches(runs, name)
    if "train_residual" in known:
        residual = runs["train_residual"].values
        _refuse(
            runs,
            "train_residual",
            (residual < -ROUNDING) | (residual > 1 + ROUNDING),
            expected="residuals in [0, 1]",
            do="pass the share of the target's probability that is missing: 1 - p",
        )
    if len(known) == 2:
        given = ~np.isnan(runs["train_residual"].values)
        _refuse(
            runs,
            "train_loss",
            given & (runs["train_loss"].values < -ROUNDING),
            expected="losses >= 0 where a residual is given, -log of a probability",
            do="correct the losses, or leave the residuals out",
        )


def _fits_batches(runs: xr.Dataset, name: str) -> None:
    values = runs[name].values
    if not np.issubdtype(values.dtype, np.floating):
        raise Misuse(
            f"runs['{name}']", got=f"{values.dtype}", expected="floats", do="convert to float32"
        )
    _refuse(
        runs,
        name,
        (runs["batch"].values == EMPTY_SLOT) & ~np.isnan(values),
        expected="NaN in slots without an example",
        do="give its numbers to the slots that have examples, NaN to the others",
    )
    counted = counted_slots(runs)
    missing = counted & np.isnan(values)
    some = (counted & ~missing).any(axis=(1, 2)) & (runs["status"].values == COMPLETE)
    _refuse(
        runs,
        name,
        missing & some[:, None, None],
        expected="a number at every example of a complete run, or at none",
        do=f"record it at all steps, or set it to NaN in this run, or drop {name}",
    )


def _refuse(
    runs: xr.Dataset, name: str, bad: Bool[np.ndarray, "run step slot"], *, expected: str, do: str
) -> None:
    if bad.any():
        run, step, slot = np.argwhere(bad)[0].tolist()
        raise Misuse(
            f"runs['{name}']",
            got=f"{runs[name].values[run, step, slot]} in run {runs['run'].values[run]}, "
            f"step {step + 1}, slot {slot}",
            expected=expected,
            do=do,
        )
