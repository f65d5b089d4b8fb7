"""Several fits pooled: members that agree near the recorded runs and differ far from them.

One optimum of hyperparameters under one criterion says little of curricula far from the recorded
ones. Members are criteria and models; their shares in the posterior are those under which points of
left-out runs are most likely (stacking of predictive distributions: Yao et al. 2018, eq. 4), drawn
far towards equal ones, since left-out runs say nothing of curricula unlike them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtri

from bayes_simfluence.checks import positive_integer
from bayes_simfluence.gaussian.search import Criterion
from bayes_simfluence.inference.exact import Exact, check_gaussian, fitted_gaussian
from bayes_simfluence.inference.method import (
    FitContext,
    Fitted,
    LeftOutRuns,
    sd_of_band,
)
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.gaussian import GaussianSimulator
from bayes_simfluence.simulators.pooled import PooledSimulator

TOWARDS_EQUAL = 1.0
"""Points that each member is given before any is seen (a Dirichlet prior), over those of all runs:
left-out runs are like the others and say nothing of curricula far from them."""
ROUNDS = 200
QUANTILES = 200
"""Points of the pool's predictive distributions."""


class Member(NamedTuple):
    """One of the fits that are pooled.

    Attributes:
        name: of its share in the verdict.
        criterion: by which its hyperparameters are chosen.
        held: hyperparameters that are not chosen but have a value, by name, on the natural scale.
    """

    name: str
    criterion: Criterion
    held: Mapping[str, float]


@dataclass(frozen=True)
class Stack:
    """``Exact`` fits of several criteria and models, pooled by their left-out runs.

    The members: the model by the score of each point of a left-out run alone, the better one near
    many recorded runs; by the joint score of left-out runs, the better one after few runs; and for
    a coupled model, by the joint score, what it is when effects neither change nor grow nor fade
    and time has none of its own, the better one far from the recorded runs
    (docs/counterfactuals.md). An additive model has no such third member: without residuals its
    effects have to change as examples are learned. All members run the same programs. Models with
    scales per query have no hyperparameters in common and are fitted as ``Exact`` does.

    Attributes:
        times: as for ``Exact``.
    """

    times: int | None = None

    def __post_init__(self) -> None:
        if self.times is not None:
            positive_integer("Stack(times=...)", self.times)

    @property
    def has_prior(self) -> bool:
        """Priors say something where there is no run."""
        return True

    @property
    def couples(self) -> bool:
        """Examples may act by their residuals."""
        return True

    def default_model(self) -> Simfluence:
        """The two-timescale model."""
        return Simfluence()

    def as_dict(self) -> dict[str, Any]:
        """Name and settings."""
        return {"method": "Stack", **asdict(self)}

    def members(self, model: Simfluence, features: ExampleFeatures) -> list[Member]:
        """What is pooled for a model of runs with these features."""
        pooled = [Member("marginal", "marginal", {}), Member("joint", "leave-one-run-out", {})]
        if model.coupled:
            hypers = hypers_of(model, features).items()
            held = {name: one.constant for name, one in hypers if one.constant is not None}
            pooled.append(Member("constant", "leave-one-run-out", held))
        return pooled

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """The pool of the members' posteriors given ``runs``."""
        if model.per_query:
            return Exact().fit(runs, model, context)
        check_gaussian(runs, model)
        members = self.members(model, runs.features.where(model.prior.features))
        fitted = [
            fitted_gaussian(
                runs,
                model,
                member.criterion,
                self.times,
                held=member.held,
                progress=context.progress,
            )
            for member in members
        ]
        # What Exact leaves behind for a model with shared scales.
        simulators = tuple(cast(GaussianSimulator, one.simulator) for one in fitted)
        left_out = [cast(LeftOutRuns, one.left_out) for one in fitted]
        truth = runs.loss[:, left_out[0].time]
        centre, sd = _on_link(model, left_out)
        explain = np.array([one.verdict.ok for one in fitted])
        weights = stacking_weights(_log_densities(model, truth, centre, sd), explain)
        pooled = _pooled_left_out(model, left_out[0].time, centre, sd, weights)
        names = [member.name for member in members]
        verdict = _verdict(fitted[int(weights.argmax())].verdict, names, weights, truth, pooled)
        return Fitted(PooledSimulator(simulators, weights), verdict, pooled)


def stacking_weights(
    log_density: Float[np.ndarray, "member run"],
    explain: Bool[np.ndarray, " member"] | None = None,
) -> Float[np.ndarray, " member"]:
    """Shares of members, by expectation maximization from equal ones.

    Args:
        log_density: of each left-out run, mean over its points; NaN where nothing was recorded.
        explain: whether a member predicts left-out runs better than their mean does: where only
            some do, the others have no share. All do when omitted.

    >>> stacking_weights(np.log([[1.0, 1.0], [1.0, 1.0]])).tolist()
    [0.5, 0.5]
    """
    known = np.isfinite(log_density).all(axis=0)
    relative = log_density[:, known] - log_density[:, known].max(axis=0)
    pooled = np.ones(len(log_density), bool)
    if explain is not None and explain.any():
        pooled = explain
    weights = pooled / pooled.sum()
    for _ in range(ROUNDS):
        share = weights[:, None] * np.exp(relative)
        share = share / share.sum(axis=0)
        counts = share.sum(axis=1) + TOWARDS_EQUAL * max(known.sum(), 1) * pooled
        weights = counts / counts.sum()
    return np.asarray(weights)


def _on_link(
    model: Simfluence, left_out: list[LeftOutRuns]
) -> tuple[Float[np.ndarray, "member run time query"], Float[np.ndarray, "member run time query"]]:
    """Medians and sd of the members' predictions on the scale of the link."""

    def linked(loss: Float[np.ndarray, "run time query"]) -> np.ndarray:
        return np.asarray(link_of(model.link, jnp.asarray(loss)))

    centre = np.stack([linked(one.predicted) for one in left_out])
    bands = [(linked(np.asarray(one.low)), linked(np.asarray(one.high))) for one in left_out]
    return centre, np.maximum(np.stack([sd_of_band(*band) for band in bands]), 1e-9)


def _log_densities(
    model: Simfluence,
    truth: Float[np.ndarray, "run time query"],
    centre: Float[np.ndarray, "member run time query"],
    sd: Float[np.ndarray, "member run time query"],
) -> Float[np.ndarray, "member run"]:
    """Mean log density of each left-out run's points, up to a constant."""
    z = (np.asarray(link_of(model.link, jnp.asarray(truth))) - centre) / sd
    density = -0.5 * np.square(z) - np.log(sd)
    known = np.isfinite(density)
    counts = known.sum(axis=(2, 3))
    total = np.where(known, density, 0.0).sum(axis=(2, 3))
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def _pooled_left_out(
    model: Simfluence,
    time: np.ndarray,
    centre: Float[np.ndarray, "member run time query"],
    sd: Float[np.ndarray, "member run time query"],
    weights: Float[np.ndarray, " member"],
) -> LeftOutRuns:
    """Quantiles of the mixture of the members' predictions."""
    parts = []
    for share, middle, width in zip(weights, centre, sd, strict=True):
        count = max(round(share * QUANTILES), 1)
        z = ndtri((np.arange(count) + 0.5) / count)
        parts.append(middle + width * z[:, None, None, None])
    edges = np.quantile(np.concatenate(parts), [0.05, 0.5, 0.95], axis=0)
    low, predicted, high = (np.asarray(loss_of(model.link, jnp.asarray(edge))) for edge in edges)
    return LeftOutRuns(time, predicted, low, high)


def _verdict(
    largest: Verdict,
    names: list[str],
    weights: Float[np.ndarray, " member"],
    truth: Float[np.ndarray, "run time query"],
    pooled: LeftOutRuns,
) -> Verdict:
    known = np.isfinite(truth)
    covered = (truth >= pooled.low) & (truth <= pooled.high)
    numbers = {
        **largest.numbers,
        "left_out_mse": float(np.square(pooled.predicted - truth).mean(where=known)),
        "left_out_coverage_90": float(covered.mean(where=known)),
        **{f"weight_{name}": float(share) for name, share in zip(names, weights, strict=True)},
    }
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, weights, strict=True))
    if len(truth) == 1:
        return replace(largest, notes=(f"Pooled fits: {shares}.", *largest.notes), numbers=numbers)
    note = (
        f"Pooled fits: {shares}. 90% bands cover {numbers['left_out_coverage_90']:.0%} of left-out "
        "points."
    )
    # Its first note is of its own band.
    return replace(largest, notes=(note, *largest.notes[1:]), numbers=numbers)
