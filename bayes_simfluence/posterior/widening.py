"""Widening: bands grow where a curriculum leaves what was recorded, whatever the method.

No run tells of curricula unlike it, and every model is wrong far enough away. On the scale of the
log-odds of a loss, a simulation errs there in two ways besides what the posterior knows: by what
the fitted runs had moved by that time, and by the run's own largest move so far, of which the model
says too much or too little, for all queries alike. Both grow with distance (``departures``), slowly
where it is large, by a common ``rate``. How large it is is learned from left-out runs that are
themselves far from the others; where all runs are alike it is what is believed beforehand. Queries
that changed together in the fitted runs err together.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.gaussian.queries import carried_loadings, own_sd, query_loadings
from bayes_simfluence.inference.method import sd_of_band
from bayes_simfluence.model.link import Link, link_of, loss_of
from bayes_simfluence.posterior.arrays import fitted_queries
from bayes_simfluence.posterior.support import Recorded, support_of
from bayes_simfluence.simulators.base import RUN_COUNTS_AS

FREE = 0.25
"""Distance from which on bands widen: below it a curriculum is like the recorded ones."""
BELIEVED, UNSURE = 0.9, 0.7
"""Median of the rate before any run was seen, and sd of its logarithm."""
RATES = BELIEVED * np.geomspace(0.02, 50.0, 61)
# One program each, not one for every operation.
_link_of, _loss_of = (jax.jit(function, static_argnums=0) for function in (link_of, loss_of))


@partial(jax.jit, static_argnums=1)
def _normals(key: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(*each) for each in zip(keys, shapes, strict=True)]


class Widening(NamedTuple):
    """What makes bands grow with distance.

    Attributes:
        rate: sd of the added errors over moves, where the logarithm of distance has grown by one.
        size: root mean square change of each query over the fitted runs, the largest so far.
        loadings: of the queries on common factors, by which added errors go together.
        positive: whether all losses are, so that errors add up on the scale of the log-odds.
    """

    rate: float
    size: Float[np.ndarray, "time query"]
    loadings: Float[np.ndarray, "query factor"]
    positive: bool

    @property
    def link(self) -> Link:
        """The scale on which errors are added."""
        return "log-odds" if self.positive else "identity"


def widening_of(runs: xr.Dataset, left_out: xr.Dataset | None) -> Widening:
    """From fitted runs and predictions of each from the others, if there are any.

    >>> import bayes_simfluence as bs
    >>> like = bs.example_runs().isel(run=slice(0, 8))
    >>> widening_of(like, None).rate  # nothing but what is believed
    0.9
    """
    positive = bool(np.nanmin(runs["loss"].values) > 0)
    linked = _linked(runs["loss"].values, positive)
    with np.errstate(invalid="ignore"):
        change = linked - linked[:, :1]
    if left_out is not None:
        # Of the times that the fit looked at alone.
        change[:, ~np.isin(runs["time"].values, [0, *left_out["time"].values])] = np.nan
    known = np.isfinite(change)
    change = np.where(known, change, 0.0)
    counts = np.maximum(known[:, 1:].sum(axis=(0, 1)), 1)
    typical = np.sqrt(np.square(change).sum(axis=(0, 1)) / counts + 1e-24)
    z = (change / typical)[:, 1:]
    z = z - z.mean(axis=0)
    loadings = query_loadings(z, known[:, 1:].all(axis=2), np.zeros((z.shape[2], 0)))
    size = _size(change, known)
    return Widening(_rate(runs, left_out, size, positive), size, loadings, positive)


def _size(
    change: Float[np.ndarray, "run time query"], known: Bool[np.ndarray, "run time query"]
) -> Float[np.ndarray, "time query"]:
    """The largest root mean square change so far; between recorded times in a straight line."""
    counts = known.sum(axis=0)
    square = np.square(change).sum(axis=0) / np.maximum(counts, 1)
    time = np.arange(len(square))
    for query in range(square.shape[1]):
        seen = counts[:, query] > 0
        square[:, query] = np.interp(time, time[seen], square[seen, query])
    return np.sqrt(np.maximum.accumulate(square, axis=0))


def for_queries(widening: Widening, fitted: xr.Dataset, runs: xr.Dataset) -> Widening:
    """The same of the queries of ``runs``, fitted or not, in their order."""
    at = fitted_queries(fitted, runs)
    old = at >= 0
    others = np.sqrt(np.square(widening.size).mean(axis=1, keepdims=True))
    size = np.where(old, widening.size[:, at], others)
    loadings = np.where(old[:, None], widening.loadings[at], 0.0)
    features = [one.get("query_feature") for one in (fitted, runs)]
    if not old.all() and all(feature is not None for feature in features):
        known, new = (np.asarray(feature.values, float) for feature in features)  # type: ignore[union-attr]
        if known.shape[1] == new.shape[1]:
            loadings[~old] = carried_loadings(widening.loadings, known, new[~old])
    return widening._replace(size=size, loadings=loadings)


def as_dataset(widening: Widening) -> xr.Dataset:
    """To be saved; ``from_dataset`` makes it again."""
    return xr.Dataset(
        {
            "size": (("time", "query"), widening.size),
            "loadings": (("query", "factor"), widening.loadings),
        },
        attrs={"rate": widening.rate, "positive": int(widening.positive)},
    )


def from_dataset(
    saved: xr.Dataset | None, runs: xr.Dataset, left_out: xr.Dataset | None
) -> Widening:
    """What ``as_dataset`` saved.

    Files of earlier forms know none, or one without times; what else they hold tells as much as it
    told the fit.
    """
    if saved is None or "time" not in saved["size"].dims:
        return widening_of(runs, left_out)
    attrs = saved.attrs
    return Widening(
        float(attrs["rate"]),
        saved["size"].values,
        saved["loadings"].values,
        bool(attrs["positive"]),
    )


def widened(
    loss: Float[np.ndarray, "chain draw run time query"],
    distance: Float[np.ndarray, "run time"],
    widening: Widening,
    *,
    key: jax.Array,
) -> Float[np.ndarray, "chain draw run time query"]:
    """Draws of losses with the error that distance adds, the same for all runs and times of a draw.

    Draws of runs that stay within what was recorded are returned as they are.
    """
    far = _far(distance)
    if not far.any() or loss.shape[1] < 2:
        return loss
    chains, draws, *_, queries = loss.shape
    shapes = (chains, draws, queries), (chains, draws, widening.loadings.shape[1]), (chains, draws)
    own, common, amount = map(np.asarray, _normals(key, shapes))
    error = own * own_sd(widening.loadings) + common @ widening.loadings.T
    size = widening.size[_same_time(loss.shape[3], widening)]
    result = loss.copy()
    for run in np.flatnonzero(far.any(axis=1)):
        linked = _linked(loss[:, :, run], widening.positive)
        added = size * error[:, :, None] + _largest_move(linked) * amount[:, :, None, None]
        linked = linked + widening.rate * far[run][:, None] * added
        moved = np.asarray(_loss_of(widening.link, jnp.asarray(linked)), loss.dtype)
        result[:, :, run] = np.where(far[run][:, None] > 0, moved, loss[:, :, run])
    return result


def _far(distance: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.log1p(np.maximum(distance - FREE, 0.0))


def _same_time(times: int, widening: Widening) -> Int[np.ndarray, " time"]:
    """Of each time the fitted runs' one; their last one for those after it."""
    return np.minimum(np.arange(times), len(widening.size) - 1)


def _largest_move(
    linked: Float[np.ndarray, "*many time query"],
) -> Float[np.ndarray, "*many time query"]:
    """Of each trajectory the change from the start that is the largest so far, with its sign."""
    change = linked - linked[..., :1, :]
    down = np.minimum.accumulate(change, axis=-2)
    up = np.maximum.accumulate(change, axis=-2)
    return np.where(up > -down, up, down)


def _linked(loss: Float[np.ndarray, "*shape"], positive: bool) -> Float[np.ndarray, "*shape"]:
    link: Link = "log-odds" if positive else "identity"
    return np.asarray(_link_of(link, jnp.asarray(loss)), float)


def _rate(
    runs: xr.Dataset,
    left_out: xr.Dataset | None,
    size: Float[np.ndarray, "time query"],
    positive: bool,
) -> float:
    """The most probable rate, by left-out runs that leave what the others did."""
    if left_out is None or "low" not in left_out or runs.sizes["run"] < 3:
        return BELIEVED
    times = left_out["time"].values
    truth = _linked(runs["loss"].sel(time=times).values, positive)
    start = _linked(runs["loss"].sel(time=[0]).values, positive)
    predicted, low, high = (
        _linked(left_out[name].values, positive) for name in ("predicted", "low", "high")
    )
    log_posterior = -0.5 * np.square(np.log(RATES / BELIEVED) / UNSURE)
    for run in range(runs.sizes["run"]):
        others = runs.isel(run=np.arange(runs.sizes["run"]) != run)
        support = support_of(Recorded.of(others), others, runs.isel(run=[run]))
        far = _far(support.distance[0])[times]
        if not far.any():
            continue
        square = np.square(truth[run] - predicted[run])
        variance = np.square(sd_of_band(low[run], high[run]))
        move = _largest_move(np.concatenate([start[run], predicted[run]]))[1:]
        unit = far[:, None] * np.sqrt(np.square(size[times]) + np.square(move))
        known = np.isfinite(square) & np.isfinite(variance)
        for at, rate in enumerate(RATES):
            whole = variance + np.square(rate * unit)
            density = -0.5 * (np.log(whole) + square / whole)
            log_posterior[at] += RUN_COUNTS_AS * density.mean(where=known)
    return float(RATES[log_posterior.argmax()])
