"""Several fits pooled: members that agree near the recorded runs and differ far from them.

One optimum of hyperparameters under one criterion says little of curricula far from the recorded
ones. Members are criteria and models; their shares in the posterior are those under which points of
left-out runs are most likely (stacking of predictive distributions: Yao et al. 2018, eq. 4), drawn
towards equal ones by as much as a few runs can be wrong.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.gaussian.search import Criterion
from bayes_simfluence.inference.exact import Exact
from bayes_simfluence.inference.method import (
    FitContext,
    Fitted,
    LeftOutRuns,
    sd_of_band,
)
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.link import link_of, loss_of
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.simulators.base import RUN_COUNTS_AS
from bayes_simfluence.simulators.gaussian import GaussianSimulator
from bayes_simfluence.simulators.pooled import PooledSimulator

TOWARDS_EQUAL = 2.0
"""Points that each member is given before any is seen (a Dirichlet prior)."""
ROUNDS = 200
QUANTILES = 200
"""Points of the pool's predictive distributions."""


class Member(NamedTuple):
    """A model and the criterion by which its hyperparameters are chosen."""

    name: str
    model: Simfluence
    criterion: Criterion


@dataclass(frozen=True)
class Stack:
    """``Exact`` fits of several criteria and models, pooled by their left-out runs.

    The members: the model by the joint score of left-out runs and by that of each point alone; the
    model with constant coefficients that stay and no time effect; for a coupled model, the additive
    one too. The cost is theirs together, about four fits.

    Attributes:
        times: as for ``Exact``.
    """

    times: int = 24

    def __post_init__(self) -> None:
        positive_integer("Stack(times=...)", self.times)

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

    def members(self, model: Simfluence) -> list[Member]:
        """What is pooled for a model."""
        plain = replace(
            model, coefficients=Varying(knots=1), timescales="staying", time_effect="none"
        )
        pooled = [
            Member("joint", model, "leave-one-run-out"),
            Member("marginal", model, "marginal"),
            Member("constant", plain, "leave-one-run-out"),
        ]
        if model.coupled:
            pooled.append(Member("additive", replace(model, coupling="none"), "leave-one-run-out"))
        return pooled

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """The pool of the members' posteriors given ``runs``."""
        if model.per_query:
            raise Misuse(
                "Stack: the model",
                got="scales='per-query'",
                expected="scales='shared', as Simfluence() has",
                do="fit it with Exact(), NUTS() or SVI()",
            )
        members = self.members(model)
        fitted = [
            Exact(member.criterion, self.times).fit(_for(member.model, runs), member.model, context)
            for member in members
        ]
        # What Exact leaves behind for a model with shared scales.
        simulators = tuple(cast(GaussianSimulator, one.simulator) for one in fitted)
        left_out = [cast(LeftOutRuns, one.left_out) for one in fitted]
        truth = runs.loss[:, left_out[0].time]
        centre, sd = _on_link(model, left_out)
        weights = stacking_weights(_log_densities(model, truth, centre, sd))
        pooled = _pooled_left_out(model, left_out[0].time, centre, sd, weights)
        names = [member.name for member in members]
        verdict = _verdict(fitted[0].verdict, names, weights, truth, pooled)
        return Fitted(PooledSimulator(simulators, weights), verdict, pooled)


def stacking_weights(
    log_density: Float[np.ndarray, "member run"],
) -> Float[np.ndarray, " member"]:
    """Shares of members, by expectation maximization from equal ones.

    Args:
        log_density: of each left-out run, mean over its points; NaN where nothing was recorded.

    >>> stacking_weights(np.log([[1.0, 1.0], [1.0, 1.0]])).tolist()
    [0.5, 0.5]
    """
    known = np.isfinite(log_density).all(axis=0)
    relative = log_density[:, known] - log_density[:, known].max(axis=0)
    weights = np.full(len(log_density), 1.0 / len(log_density))
    for _ in range(ROUNDS):
        share = weights[:, None] * np.exp(relative)
        share = share / share.sum(axis=0)
        counts = RUN_COUNTS_AS * share.sum(axis=1) + TOWARDS_EQUAL
        weights = counts / counts.sum()
    return np.asarray(weights)


def _for(model: Simfluence, runs: RunArrays) -> RunArrays:
    """The runs as a member takes them: residuals for coupled ones alone."""
    return runs if model.coupled else runs._replace(residual=None)


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
    first: Verdict,
    names: list[str],
    weights: Float[np.ndarray, " member"],
    truth: Float[np.ndarray, "run time query"],
    pooled: LeftOutRuns,
) -> Verdict:
    known = np.isfinite(truth)
    covered = (truth >= pooled.low) & (truth <= pooled.high)
    numbers = {
        **first.numbers,
        "left_out_mse": float(np.square(pooled.predicted - truth).mean(where=known)),
        "left_out_coverage_90": float(covered.mean(where=known)),
        **{f"weight_{name}": float(share) for name, share in zip(names, weights, strict=True)},
    }
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, weights, strict=True))
    # The first note is of the first member's band.
    return replace(first, notes=(f"Pooled: {shares}.", *first.notes[1:]), numbers=numbers)
