"""Bands whose coverage rests on runs that the fit did not see, not on the model being right."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, named
from bayes_simfluence.data.runs import usable_runs
from bayes_simfluence.data.twins import twins_between, without_twins
from bayes_simfluence.posterior.bands import (
    FLOOR,
    Shape,
    Simulates,
    banded,
    open_unit_interval,
    shape_of,
    stacked,
    stretch,
    unit_shape,
)

BASE = 0.90
"""Probability of the interval that a conformal band stretches: that of ``Posterior.left_out``."""


def runs_needed(probability: float) -> int:
    """Calibration runs without which no finite band has this probability.

    >>> runs_needed(0.9), runs_needed(0.95)
    (9, 19)
    """
    return math.ceil(probability / (1.0 - probability) - 1e-9)


def conformal_quantile(scores: Float[np.ndarray, "run query"], probability: float) -> float:
    """The score that a new run's stays below, with a probability that finitely many runs allow.

    For one query the ``ceil((runs + 1) probability)``-th smallest score (Vovk et al. 2005). Scores
    of one run's queries depend on each other, so with several queries the exchangeable unit is
    still the run: each run weighs 1 / (runs + 1), spread over its queries, and so does the new one,
    at infinity (Lee, Barber & Willett 2023, "HCP"). The share of a new run's queries below is then
    at least ``probability`` in expectation over runs.

    Scores that were not recorded are NaN: a run's weight is spread over the queries that it has,
    and a run without any does not count. That keeps the promise where what is recorded does not
    depend on the losses.

    Raises:
        Misuse: so few runs that only an infinite band would do.

    >>> conformal_quantile(np.arange(1.0, 10.0)[:, None], 0.9)
    9.0
    """
    known = np.isfinite(scores)
    scores, known = scores[known.any(axis=1)], known[known.any(axis=1)]
    runs = _enough(len(scores), probability)
    weight = np.broadcast_to(1.0 / known.sum(axis=1, keepdims=True), scores.shape)
    order = np.argsort(scores[known], kind="stable")
    reached = np.cumsum(weight[known][order]) >= probability * (runs + 1) - 1e-9
    return float(scores[known][order][np.argmax(reached)])


@dataclass(frozen=True, eq=False)
class Conformal:
    """A band that runs which the fit did not see have calibrated (Vovk et al. 2005).

    The score of a run is its error over the posterior's own predictive width on that side (half of
    its 90% interval; the error in nats where there is no such width, for points and for left-out
    predictions without a band), so that times and queries that are
    hard to predict have the wider bands. The band's factor is the scores' quantile for finitely
    many runs (``conformal_quantile``), one for each time.

    What is guaranteed, whatever the model: of a new run, drawn like the calibration runs, at each
    time the expected share of the simulated queries within the band is at least ``probability``
    (simultaneous: the share of queries whose whole trajectory is). That is an average over runs and
    over those queries, not a promise for each query or each curriculum, and none at all for
    curricula of another kind, such as edited ones. Simulate one query for a band of that query.

    At a time that too few of the runs recorded for this probability, the factor lies on a straight
    line between those of its neighbours that enough did. A simultaneous band holds trajectories at
    as many times as the calibration runs were recorded at.

    Without calibration runs the scores are those of ``Posterior.left_out``, fitted runs predicted
    without them at some times, with straight lines between those times' factors. That is the
    jackknife: every run serves twice, and coverage is close to ``probability`` when leaving one run
    out hardly changes the fit, without a guarantee (Barber et al. 2021).

    Attributes:
        runs: recorded runs that were not fitted; None for left-out predictions of the fitted ones.
        probability: in (0, 1); needs ``probability / (1 - probability)`` runs, 9 for 90%: fewer
            are refused.
        simultaneous: one factor for all times, from each run's largest score along time.

    >>> import jax, bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(query=slice(0, 2))
    >>> mean = bs.mean_trajectory(runs.isel(run=slice(0, 20)))
    >>> band = bs.Conformal(runs.isel(run=slice(20, 31)), probability=0.9)
    >>> simulated = mean.simulate(runs.isel(run=[31]), key=jax.random.key(0), band=band)
    >>> simulated["high"].attrs["n_calibration"]
    11
    """

    runs: xr.Dataset | None = None
    probability: float = 0.90
    simultaneous: bool = False

    def __post_init__(self) -> None:
        open_unit_interval("Conformal(probability=...)", self.probability)
        if self.runs is not None:
            _enough(self.runs.sizes["run"], self.probability)

    def edges(
        self, simulated: xr.Dataset, posterior: Simulates, *, key: jax.Array, draws: int
    ) -> xr.Dataset:
        """``low`` and ``high``: the draws' 90% interval, stretched.

        Raises:
            Misuse: too few calibration runs; fitted runs among them; shorter ones than the runs to
                be simulated; none given and the method left none out.
        """
        query = simulated["query"].values
        if self.runs is None:
            scored = _left_out_scores(posterior, query)
        else:
            scored = _held_out_scores(self.runs, posterior, query, key=key, draws=draws)
        scored = _recorded_enough(scored, self.probability)
        asked, last = simulated["time"].values[-1], scored.time[-1]
        if asked > last:
            raise Misuse(
                "runs to simulate with a conformal band",
                got=f"time {asked}",
                expected=f"times up to {last}, the last of the calibration runs",
                do="cut the curricula, or calibrate on runs as long",
            )
        score = scored.score
        if self.simultaneous:
            # A query that was never recorded after time 0 stays NaN.
            largest = np.max(score, axis=1, initial=-np.inf, where=np.isfinite(score))
            score = np.where(np.isfinite(largest), largest, np.nan)[:, None]
            score = np.broadcast_to(score, scored.score.shape)
        each = [conformal_quantile(scores, self.probability) for scores in np.moveaxis(score, 1, 0)]
        factor = np.interp(simulated["time"].values, scored.time, each)[None, :, None]
        shape = _shape(simulated, in_nats=scored.in_nats)
        about = {
            "kind": "conformal",
            "probability": self.probability,
            "simultaneous": int(self.simultaneous),
            "n_calibration": int(np.isfinite(score).any(axis=(1, 2)).sum()),
            "calibration": "fitted runs left out" if self.runs is None else "runs not fitted",
        }
        return banded(simulated, shape, factor, about)


def _enough(runs: int, probability: float) -> int:
    if runs < runs_needed(probability):
        raise Misuse(
            "calibration runs",
            got=runs,
            expected=f"at least {runs_needed(probability)}, without which a conformal band of "
            f"probability {probability:g} is infinitely wide",
            do="record more runs, or lower the probability to at most "
            f"{math.floor(1000 * (runs / (runs + 1))) / 1000:g}",
        )
    return runs


class _Scored(NamedTuple):
    time: np.ndarray
    score: Float[np.ndarray, "run time query"]
    in_nats: bool


def _held_out_scores(
    runs: xr.Dataset, posterior: Simulates, query: np.ndarray, *, key: jax.Array, draws: int
) -> _Scored:
    # Twins are no two runs drawn apart.
    runs, _ = without_twins(usable_runs(runs))
    _not_fitted(runs, posterior.runs)
    runs = runs.isel(query=named("queries", query, runs["query"].values))
    # The same key: the new run and the calibration runs meet the same draws of coefficients.
    simulated = posterior.simulate(runs, key=key, draws=draws)
    in_nats = simulated.sizes["chain"] * simulated.sizes["draw"] == 1
    score = stretch(_shape(simulated, in_nats=in_nats), np.asarray(runs["loss"].values, float))
    return _Scored(runs["time"].values[1:], score[:, 1:], in_nats)


def _recorded_enough(scored: _Scored, probability: float) -> _Scored:
    """The times that enough runs recorded; those that most did where none has enough."""
    count = np.isfinite(scored.score).any(axis=2).sum(axis=0)
    # The quantile says what is wrong where even the best time has too few.
    kept = count >= min(runs_needed(probability), count.max())
    return _Scored(scored.time[kept], scored.score[:, kept], scored.in_nats)


def _shape(simulated: xr.Dataset, *, in_nats: bool) -> Shape:
    return unit_shape(simulated) if in_nats else shape_of(stacked(simulated["loss"]), BASE)


def _left_out_scores(posterior: Simulates, query: np.ndarray) -> _Scored:
    left_out = posterior.left_out
    if left_out is None:
        raise Misuse(
            "band=Conformal()",
            got="a posterior without predictions of left-out runs",
            expected="calibration runs, or a method that leaves fitted runs out",
            do="pass Conformal(runs) with recorded runs that were not fitted, or fit with Exact() "
            "and the two-timescale model",
        )
    left_out = left_out.sel(time=left_out["time"] > 0)
    left_out = left_out.isel(query=named("queries", query, left_out["query"].values))
    truth = posterior.runs["loss"].sel(time=left_out["time"], query=left_out["query"])
    centre = np.asarray(left_out["predicted"].values, float)
    in_nats = "low" not in left_out
    widths = [np.ones_like(centre)] * 2
    if not in_nats:
        widths = [centre - left_out["low"].values, left_out["high"].values - centre]
    shape = Shape(centre, *(np.maximum(width, FLOOR) for width in widths))
    score = stretch(shape, np.asarray(truth.values, float))
    return _Scored(left_out["time"].values, score, in_nats)


def _not_fitted(runs: xr.Dataset, fitted: xr.Dataset) -> None:
    """Ids may repeat between recordings: a run is a fitted one when its curriculum is, too."""
    same = [
        str(run)
        for run, batch in zip(runs["run"].values, runs["batch"].values, strict=True)
        for at in np.flatnonzero(fitted["run"].values == run)
        if np.array_equal(batch, fitted["batch"].values[at])
    ]
    twins = [] if same else twins_between(runs, fitted)
    if same or twins:
        raise Misuse(
            "calibration runs",
            got=f"{len(same)} fitted runs ({same[0]}, ...)"
            if same
            else f"{len(twins)} twins of fitted runs ({twins[0]}, ...)",
            expected="runs that the fit did not see",
            do="hold runs out, or pass Conformal() to use predictions of left-out fitted runs",
        )
