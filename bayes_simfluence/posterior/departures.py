"""How far planned runs leave what the fitted runs did, one distance for each way to leave it.

A distance is 0 within what was recorded and about 1 where a curriculum has clearly left it; the
units are on the constants below. Ratios are compared on a logarithmic scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from bayes_simfluence.posterior.courses import Course

LARGER = np.log(1.5)
"""Unit for step sizes, larger batches and repetition: half as much again as any fitted run."""
FARTHER = np.log(1.25)
"""Unit for what step sizes sum up to: a quarter more, which is a quarter longer training."""
FEWER = np.log(1.75)
"""Unit for smaller batches: an edit that empties some slots is no other batch size."""
MOST_USED = np.log(3.0)
"""Unit for the single example used most, which dropping its neighbours makes count for more."""
LONGER = 0.25
"""Unit for length: a quarter more steps."""
UNSEEN = 0.25
"""Unit for unseen examples: a quarter of the exposure so far."""
ELSEWHERE = 0.5
"""Unit for initial losses: half of what losses moved in the fitted runs."""
FREE, BEYOND = 3.0, 3.0
"""For balance: standard deviations about the fitted runs' mean that are free, and the unit."""
WINDOWS = (8, 4, 2, 1)
"""Lengths of the windows that balance is averaged over: the fitted runs' length over these."""


class Departure(NamedTuple):
    """One way to leave what was recorded.

    Attributes:
        name: of the reason.
        distance: of each run after each step, >= 0; 0 = as recorded, 1 = has clearly left it.
        words: the reason with the size of the farthest departure.
    """

    name: str
    distance: Float[np.ndarray, "run step"]
    words: str


def departures(fitted: Course, planned: Course) -> list[Departure]:
    """Every way to leave what was recorded, in the order in which they are told."""
    known = [departure(fitted, planned) for departure in DEPARTURES]
    return [one for one in known if one is not None]


def _step_size(fitted: Course, planned: Course) -> Departure | None:
    """The step size itself, and what step sizes sum up to after as many steps."""
    own, recorded = planned.step_size, fitted.step_size
    if own is None or recorded is None or not recorded.max() > 0:
        return None
    own_sum, recorded_sum = own.cumsum(axis=1), recorded.cumsum(axis=1)
    # A twentieth of all that runs moved: what a warm-up does in its first steps decides nothing.
    slack = 0.05 * recorded_sum[:, -1].mean()
    at = _same_step(fitted, planned)
    low, high = recorded_sum.min(axis=0)[at], recorded_sum.max(axis=0)[at]
    # Later steps than any recorded are a matter of length.
    own_sum = own_sum[:, at]
    size = own / recorded.max()
    farther = (own_sum + slack) / (high + slack)
    smaller = (low + slack) / (own_sum + slack)
    grown, shrunk = max(float(size.max()), float(farther.max())), float(smaller.max())
    # Without the slack, which would understate it.
    ratio = max(float(size.max()), float(own_sum[:, -1].max()) / max(float(high[-1]), slack))
    words = f"step size up to {ratio:.2g}x"
    if shrunk > grown:
        ratio = float(own_sum[:, -1].min()) / max(float(low[-1]), slack)
        words = f"step size down to {ratio:.2g}x"
    changed = _beyond(np.maximum(size, smaller), LARGER)
    return Departure("step size", np.maximum(changed, _beyond(farther, FARTHER)), words)


def _batch_size(fitted: Course, planned: Course) -> Departure:
    """More slots than any batch had, or fewer over a window than any window had."""
    most = max(float(fitted.filled.max()), 1.0)
    width = max(fitted.steps // 4, 1)
    low = float(_window_means(fitted.filled[..., None], width).min())
    larger = _beyond(planned.filled / most, LARGER)
    smaller, size, recorded = np.zeros(planned.filled.shape), float(planned.filled.max()), most
    if width <= planned.steps:
        means = _window_means(planned.filled[..., None], width)[..., 0]
        smaller[:, width - 1 :] = _beyond(low / np.maximum(means, 1e-3), FEWER)
        if smaller.max() > larger.max():
            size, recorded = float(means.min()), low
    words = f"batch size {size:.2g} instead of {recorded:.2g}"
    return Departure("batch size", np.maximum(larger, smaller), words)


def _length(fitted: Course, planned: Course) -> Departure:
    steps = np.arange(1, planned.steps + 1)
    more = np.maximum(steps - fitted.steps, 0) / fitted.steps
    distance = np.broadcast_to(more / LONGER, planned.filled.shape)
    return Departure("length", distance, f"length {planned.steps} steps instead of {fitted.steps}")


def _balance(fitted: Course, planned: Course) -> Departure | None:
    """Mean coordinates of windows against those of the fitted runs at the same steps."""
    runs, directions = len(fitted.filled), fitted.place.shape[2]
    if not directions:
        return None
    slots = max(float(fitted.filled.mean()), 1.0)
    distance = np.zeros(planned.filled.shape)
    for width in _windows(fitted):
        if width > planned.steps:
            continue
        recorded, own = (_window_means(one.place, width) for one in (fitted, planned))
        mean = recorded.mean(axis=0)
        # Few runs say little of the spread: at least that of a random choice of as many examples,
        # and all times together.
        squares = ((recorded - mean) ** 2).mean(axis=(0, 1)) * runs / max(runs - 1, 1)
        spread = np.sqrt(np.maximum(squares, 1 / (slots * width)) * (1 + 1 / runs))
        at = np.minimum(np.arange(own.shape[1]), len(mean) - 1)
        low = np.minimum(recorded.min(axis=0), mean - FREE * spread)[at]
        high = np.maximum(recorded.max(axis=0), mean + FREE * spread)[at]
        beyond = np.maximum(np.maximum(own - high, low - own), 0.0) / (BEYOND * spread)
        distance[:, width - 1 :] = np.maximum(distance[:, width - 1 :], beyond.max(axis=2))
    far = FREE + BEYOND * float(distance.max())
    words = f"class balance over a window, {far:.2g} standard deviations off"
    return Departure("class balance over a window", distance, words)


def _repetition(fitted: Course, planned: Course) -> Departure:
    """How much examples were used by then, and the one used most against all of a fitted run."""
    used = fitted.repeated.max(axis=0)
    slack = max(float(used[-1]) / 3, 1e-12)
    at = _same_step(fitted, planned)
    ratio = (planned.repeated + slack) / (used[at] + slack)
    plain = planned.repeated / np.maximum(used[at], 1e-12)
    # A first batch with one example left in it is no repetition yet.
    early = _windows(fitted)[0] - 1
    ratio[:, :early] = plain[:, :early] = 0.0
    most = planned.most / max(float(fitted.most.max()), 1e-12)
    distance = np.maximum(_beyond(ratio, LARGER), _beyond(most, MOST_USED))
    times = max(float(plain.max()), float(most.max()))
    return Departure("repetition", distance, f"repetition up to {times:.2g}x")


def _unseen(fitted: Course, planned: Course) -> Departure:
    exposure = planned.unknown.cumsum(axis=1)
    so_far = np.maximum(np.arange(1, planned.steps + 1), _windows(fitted)[0])
    share = exposure / so_far
    words = f"unseen examples, {float(share.max()):.0%} of what is trained on"
    return Departure("unseen examples", share / UNSEEN, words)


def other_start(
    initial: Float[np.ndarray, "fitted query"],
    moved: Float[np.ndarray, " query"],
    own: Float[np.ndarray, "run query"],
    steps: int,
) -> Departure:
    """Initial losses unlike those of any fitted run: training forgets what a start adds to them.

    Args:
        initial: losses of the fitted runs before the first update, nats.
        moved: root mean square change of each query's loss in the fitted runs.
        own: initial losses of the planned runs.
        steps: of the planned runs, at all of which the distance is the same.
    """
    runs = len(initial)
    spread = initial.std(axis=0, ddof=1) * np.sqrt(1 + 1 / runs) if runs > 1 else 0.0
    off = np.maximum(np.abs(own - initial.mean(axis=0)) - FREE * spread, 0.0)
    size = np.sqrt(np.square(off).mean(axis=1))
    unit = ELSEWHERE * max(float(np.sqrt(np.square(moved).mean())), 1e-12)
    distance = np.broadcast_to((size / unit)[:, None], (len(own), steps))
    return Departure("initial losses", distance, f"initial losses {size.max():.2g} nats off")


DEPARTURES: tuple[Callable[[Course, Course], Departure | None], ...] = (
    _step_size,
    _batch_size,
    _length,
    _balance,
    _repetition,
    _unseen,
)


def _beyond(ratio: Float[np.ndarray, "run _"], unit: float) -> Float[np.ndarray, "run _"]:
    return np.asarray(np.log(np.maximum(ratio, 1.0)) / unit)


def _same_step(fitted: Course, planned: Course) -> Int[np.ndarray, " step"]:
    """Of each planned step the fitted runs' one; their last one for those after it."""
    return np.minimum(np.arange(planned.steps), fitted.steps - 1)


def _windows(fitted: Course) -> list[int]:
    return sorted({max(fitted.steps // part, 1) for part in WINDOWS})


def _window_means(
    values: Shaped[np.ndarray, "run step direction"], width: int
) -> Float[np.ndarray, "run window direction"]:
    """Means over every ``width`` steps in a row, in the order of their last steps."""
    summed = np.cumsum(np.pad(np.asarray(values, float), ((0, 0), (1, 0), (0, 0))), axis=1)
    return (summed[:, width:] - summed[:, :-width]) / width
