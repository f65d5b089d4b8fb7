"""One step of the published recurrence as linear regression, for all queries of a recording.

Row ``t`` of query ``q``: ``L_t - keep L_{t-1} = sum_i w_ti (a_i L_{t-1} + b_i)``. Batches hold few
examples, so second moments are sums over pairs of examples that met in a batch; nothing of the
size rows x examples x queries is ever made.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.linalg import double_precision, symmetric_eigen
from bayes_simfluence.model.arrays import RunArrays

SMALLEST_REFERENCE = 1e-3
"""Nats that initial losses count as at least, where they are a unit."""


class Form(NamedTuple):
    """Which recurrence is regressed.

    Attributes:
        kind: ``linear`` (a and b), ``additive`` (b), ``multiplicative`` (a).
        keep: what of the previous loss stays without any example.
        counted: weights are counts of examples instead of shares of the batch.
    """

    kind: Literal["linear", "additive", "multiplicative"]
    keep: float
    counted: bool

    @property
    def powers(self) -> tuple[int, ...]:
        """Powers of the previous loss that multiply the weights, one per block of columns."""
        return {"linear": (1, 0), "additive": (0,), "multiplicative": (1,)}[self.kind]


class Moments(NamedTuple):
    """Second moments of the regression of each query; sums over rows.

    Attributes:
        gram: of the columns, each divided by its ``unit``.
        cross: of columns and target.
        square: of the target.
        unit: what each column was divided by (root mean square of ``L_0``, or 1), so that one
            penalty or prior scale means the same for a and b; known before any update, so that a
            prior does not depend on what it predicts.
        rows: number of steps.
    """

    gram: Float[np.ndarray, "query column column"]
    cross: Float[np.ndarray, "query column"]
    square: Float[np.ndarray, " query"]
    unit: Float[np.ndarray, "query column"]
    rows: int


class Eigen(NamedTuple):
    """The moments in the basis of the gram's eigenvectors."""

    values: Float[np.ndarray, "query column"]
    vectors: Float[np.ndarray, "query column column"]
    cross: Float[np.ndarray, "query column"]


def moments(runs: RunArrays, form: Form, *, scaled: bool) -> Moments:
    """Second moments of all steps of ``runs``; ``scaled`` columns have unit size.

    Raises:
        Misuse: losses that were not recorded.
    """
    _every_time(runs, form)
    before = runs.loss[:, :-1].reshape(-1, runs.loss.shape[2])
    target = runs.loss[:, 1:].reshape(before.shape) - form.keep * before
    members = runs.batch.reshape(len(before), -1)
    filled = members != EMPTY_SLOT
    weight = np.where(filled, runs.weight.reshape(members.shape), 0.0)
    if not form.counted:
        total = weight.sum(axis=1, keepdims=True)
        weight = weight / np.where(total > 0, total, 1.0)
    size = runs.train
    row = np.arange(len(before))
    # One entry per slot, and one per pair of slots; repeated examples add up.
    single = csr_array(
        (weight[filled], (members[filled], np.broadcast_to(row[:, None], members.shape)[filled])),
        shape=(size, len(before)),
    )
    both = filled[:, :, None] & filled[:, None, :]
    pair = members[:, :, None].astype(np.int64) * size + members[:, None, :]
    products = weight[:, :, None] * weight[:, None, :]
    paired = csr_array(
        (products[both], (pair[both], np.broadcast_to(row[:, None, None], pair.shape)[both])),
        shape=(size * size, len(before)),
    )
    unit = np.ones((len(form.powers), before.shape[1]))
    if scaled:
        first = runs.loss[:, 0]
        unit = np.stack([np.sqrt(np.mean(first ** (2 * power), axis=0)) for power in form.powers])
        unit = np.maximum(unit, SMALLEST_REFERENCE)
    by_power = {
        power: (paired @ before**power).T.reshape(-1, size, size)
        for power in {first + second for first in form.powers for second in form.powers}
    }
    blocks = list(zip(form.powers, unit, strict=True))
    gram = np.block(
        [
            [by_power[first + second] / (own * other)[:, None, None] for second, other in blocks]
            for first, own in blocks
        ]
    )
    cross = np.concatenate(
        [(single @ (before**power * target)).T / own[:, None] for power, own in blocks], axis=1
    )
    return Moments(
        gram, cross, np.square(target).sum(axis=0), np.repeat(unit.T, size, axis=1), len(before)
    )


def _every_time(runs: RunArrays, form: Form) -> None:
    if not runs.known.all():
        raise Misuse(
            "runs['loss']",
            got="losses that were not recorded at some times",
            expected=f"one at every time: kind {form.kind!r} is regressed from step to step here",
            do="fit the default model with method=Exact(), or fit with method=NUTS() or SVI()",
        )


_eigen = jax.jit(jax.vmap(symmetric_eigen))


def eigen(sums: Moments) -> Eigen:
    """Eigenvalues and eigenvectors of each query's gram."""
    with double_precision():
        values, vectors = _eigen(jnp.asarray(sums.gram))
    values, vectors = np.maximum(np.asarray(values), 0.0), np.asarray(vectors)
    return Eigen(values, vectors, np.einsum("qcv,qc->qv", vectors, sums.cross))


def ridge_weights(
    sums: Moments, penalties: Sequence[float]
) -> Float[np.ndarray, "penalty query column"]:
    """Minimizers of the sum of squares plus penalty times the sum of squared weights."""
    if len(penalties) == 1:
        ridged = sums.gram + penalties[0] * np.eye(sums.gram.shape[1])
        return np.linalg.solve(ridged, sums.cross[..., None])[None, ..., 0]
    solved = eigen(sums)
    return np.stack(
        [
            np.einsum("qcv,qv->qc", solved.vectors, solved.cross / (solved.values + penalty))
            for penalty in penalties
        ]
    )


def coefficients(
    weights: Float[np.ndarray, "query column"], form: Form
) -> tuple[Float[np.ndarray, "query train"], Float[np.ndarray, "query train"]]:
    """Columns' weights as ``a`` and ``b``, zero where the form has none."""
    blocks = np.split(weights, len(form.powers), axis=1)
    by_power = dict(zip(form.powers, blocks, strict=True))
    zero = np.zeros_like(blocks[0])
    return by_power.get(1, zero), by_power.get(0, zero)
