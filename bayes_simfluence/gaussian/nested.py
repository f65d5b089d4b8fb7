"""Left-out runs as they look from runs that never met them.

What is learned from errors of left-out runs, how queries go together for one, cannot be judged on
the same errors: each is of a prediction to which all other runs contributed, so that errors of the
others know something of every run. Judged are predictions of a group of runs from all others, by
what errors of these say where each is predicted without itself and without the group.

With ``Q`` the inverse of the covariance of all points, leaving out the points ``g`` gives ``Q_ss -
Q_sg Q_gg^-1 Q_gs`` and ``(Q y)_s - Q_sg e_g`` for the others' ``s``, with ``e_g = Q_gg^-1 (Q y)_g``
the group's own errors; then each run is left out as in ``LinearGaussian.left_out``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bayes_simfluence.gaussian.linear_gaussian import LeftOut

GROUPS = 16
"""Most groups; of one run each where there are as few."""


class Apart(NamedTuple):
    """A group of runs, left out, and all others as they are without it.

    Attributes:
        runs: of the group.
        error: of the group's predictions, in units of the queries' scales as the others have them.
        covariance: of such an error.
        others: remaining runs.
        z: their left-out errors over predicted sd and scale.
    """

    runs: Int[np.ndarray, " own"]
    error: Float[np.ndarray, "own row query"]
    covariance: Float[np.ndarray, "own row row"]
    others: Int[np.ndarray, " other"]
    z: Float[np.ndarray, "other row query"]


def groups_apart(
    left_out: LeftOut,
    known: Bool[np.ndarray, "run row"],
    moved: Float[np.ndarray, "run row query"] | float = 0.0,
) -> Iterator[Apart]:
    """Each group of runs in turn.

    Args:
        left_out: of all runs.
        known: whether the points were recorded.
        moved: what errors have besides, such as of runs whose residuals are simulated.
    """
    pulled = np.asarray(left_out.pulled)
    runs, rows, queries = pulled.shape
    grid = np.asarray(left_out.precision).reshape(runs, rows, runs, rows)
    moved = np.broadcast_to(moved, pulled.shape)
    # Of a single run no others would be left.
    groups = min(GROUPS, runs) if runs > 1 else 0
    for first in range(groups):
        own = np.arange(first, runs, groups)
        others = np.setdiff1d(np.arange(runs), own)
        inside = np.linalg.inv(grid[own][:, :, own].reshape(len(own) * rows, -1))
        error = inside @ pulled[own].reshape(-1, queries)
        across = grid[others][:, :, own].reshape(len(others), rows, -1)
        blocks = grid[others, :, others] - across @ inside @ np.swapaxes(across, 1, 2)
        covariance = np.linalg.inv(blocks)
        of_others = covariance @ (pulled[others] - across @ error) + moved[others]
        variance = np.diagonal(covariance, axis1=1, axis2=2)[..., None]
        z = np.where(known[others][..., None], of_others / np.sqrt(variance), 0.0)
        points = max(known[others].sum(), 1)
        scale = np.sqrt(np.square(z).sum(axis=(0, 1)) / points + 1e-12)
        whole = inside.reshape(len(own), rows, len(own), rows)
        yield Apart(
            runs=own,
            error=(error.reshape(len(own), rows, queries) + moved[own]) / scale,
            covariance=whole[np.arange(len(own)), :, np.arange(len(own))],
            others=others,
            z=z / scale,
        )
