"""Scales of a Bayesian linear regression by marginal likelihood, in closed form but for one ratio.

Target ``y = Z w + eps`` with ``w ~ N(0, s^2)`` and ``eps ~ N(0, sigma^2)``; ``ratio`` is
``sigma^2 / s^2``. In the eigenbasis of ``Z' Z`` the marginal likelihood of a ratio costs one pass
over the eigenvalues and ``sigma`` is known in closed form (Bishop 2006, section 3.5).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RATIOS = 10.0 ** np.linspace(-10.0, 6.0, 321)
"""Ratios tried, relative to the mean eigenvalue; the best is refined between its neighbours."""
SMALLEST = 1e-14
"""Smallest mean square of noise, so that a loss that never moves has finite scales."""


class Scales(NamedTuple):
    """The scales of one query.

    Attributes:
        ratio: noise variance over prior variance of the scaled coefficients.
        noise: sd of the noise, nats.
        log_evidence: natural log of the marginal likelihood, up to a constant.
    """

    ratio: float
    noise: float
    log_evidence: float


def log_evidence(
    values: Float[np.ndarray, " column"],
    cross: Float[np.ndarray, " column"],
    square: float,
    rows: int,
    ratios: Float[np.ndarray, " ratio"],
) -> tuple[Float[np.ndarray, " ratio"], Float[np.ndarray, " ratio"]]:
    """Log evidence and noise variance at each ratio, up to a constant of the data.

    Args:
        values: eigenvalues of ``Z' Z``.
        cross: ``Z' y`` in the eigenbasis.
        square: ``y' y``.
        rows: number of rows of ``Z``.
        ratios: where to evaluate.
    """
    shrunk = values[None, :] + ratios[:, None]
    explained = (np.square(cross)[None, :] / shrunk).sum(axis=1)
    variance = np.maximum((square - explained) / rows, SMALLEST)
    volume = np.log1p(values[None, :] / ratios[:, None]).sum(axis=1)
    return -0.5 * (rows * np.log(variance) + volume), variance


def scales_of(
    values: Float[np.ndarray, " column"],
    cross: Float[np.ndarray, " column"],
    square: float,
    rows: int,
) -> Scales:
    """The ratio and noise of highest evidence."""
    unit = max(values.mean(), np.finfo(float).tiny)
    grid = RATIOS * unit
    score, _ = log_evidence(values, cross, square, rows, grid)
    best = int(np.argmax(score))
    if 0 < best < len(grid) - 1:
        # The top of the parabola through the best three, in the log of the ratio.
        before, top, after = score[best - 1 : best + 2]
        shift = 0.5 * (before - after) / min(before - 2.0 * top + after, -1e-300)
        ratio = grid[best] * (grid[1] / grid[0]) ** np.clip(shift, -1.0, 1.0)
    else:
        ratio = grid[best]
    final, variance = log_evidence(values, cross, square, rows, np.array([ratio]))
    return Scales(float(ratio), float(np.sqrt(variance[0])), float(final[0]))
