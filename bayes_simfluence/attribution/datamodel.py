"""A Bayesian datamodel: outcomes of retraining regressed on membership in the training subset.

    outcome_mq = c_q + sum_i mask_mi theta_iq + e_mq,
    theta_iq ~ N(0, ratio s_q^2),  e_mq ~ N(0, s_q^2),  p(c_q, s_q^2) ~ 1 / s_q^2.

One ``ratio`` for all queries maximizes their marginal likelihood; constants and scales are
integrated out in closed form, so predictions are Student-t. Everything happens among the subsets
(the dual form: a matrix of their inner products), never among the examples. The linear form and
its use are those of Ilyas et al. (2022); their lasso is replaced by the conjugate normal prior.
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.linalg import null_space
from scipy.optimize import minimize_scalar
from scipy.stats import t as student_t

from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.checks import Misuse, named, unit_interval

FEWEST = 4
"""Subsets from which a scale and a constant can be estimated."""
LOG_RATIOS = (-12.0, 12.0)
"""Interval in which the ratio is searched: natural log of explained over unexplained variance."""


@dataclass(frozen=True)
class Datamodel:
    """A fitted datamodel: effects of examples, and predicted outcomes of other subsets.

    Attributes:
        subsets: what was fitted, as made by ``subsets_from_arrays``.
        share: part of the outcomes' variance between subsets that the masks explain, in [0, 1],
            the same for all queries.
        inverse: of the subsets' covariance over ``s^2``, with the constant projected out.
        corrected: the same without that projection.
    """

    subsets: xr.Dataset
    share: float
    inverse: Float[np.ndarray, "subset subset"]
    corrected: Float[np.ndarray, "subset subset"]

    def predict(self, mask: xr.DataArray, *, probability: float = 0.90) -> xr.Dataset:
        """Outcomes of training on other subsets: ``mean``, ``low`` and ``high``.

        Args:
            mask: ``(subset, train)``, with the fitted examples' ids in any order.
            probability: of the central interval, which holds the noise of a single training.

        Raises:
            Misuse: unknown examples.
        """
        places = named("examples of the mask", self.subsets["train"].values, mask["train"].values)
        masks, y = self._masks, self._outcomes
        centred = (mask.values[:, places] - self._mean[None]) / self._unit
        ratio, ones = self._ratio, np.ones(len(y))
        cross = ratio * centred @ masks.T
        solved = self.inverse @ ones
        total = float(ones @ solved)
        constant = solved @ y / total
        mean = constant[None] + cross @ (self.corrected @ y)
        variance = 1.0 + ratio * np.square(centred).sum(axis=1)
        variance -= np.einsum("ms,st,mt->m", cross, self.inverse, cross)
        variance += np.square(1.0 - cross @ solved) / total
        df = len(y) - 1
        scale = np.sqrt(variance[:, None] * self._squares[None] / df)
        return self._interval(mean, scale, df, probability, mask["subset"].values)

    def left_out(self, *, probability: float = 0.90) -> xr.Dataset:
        """Every fitted subset's outcomes as predicted from the others, with the same ``share``."""
        y, diagonal = self._outcomes, np.diag(self.corrected)[:, None]
        weights = self.corrected @ y
        df = len(y) - 2
        squares = np.maximum(self._squares[None] - np.square(weights) / diagonal, 0.0)
        scale = np.sqrt(squares / df / diagonal)
        names = self.subsets["subset"].values
        return self._interval(y - weights / diagonal, scale, df, probability, names)

    def scores(self) -> xr.DataArray:
        """Posterior means of ``theta``: change of the outcome when an example is in the subset."""
        weights = self.corrected @ self._outcomes
        theta = self._ratio / self._unit * self._masks.T @ weights
        return score_array(
            theta,
            self.subsets["train"].values.tolist(),
            self.subsets["query"].values.tolist(),
            method="datamodel",
            units=str(self.subsets["outcome"].attrs["units"]),
            share=self.share,
        )

    @property
    def _outcomes(self) -> Float[np.ndarray, "subset query"]:
        return np.asarray(self.subsets["outcome"].values, float)

    @property
    def _mean(self) -> Float[np.ndarray, " train"]:
        return np.asarray(self.subsets["mask"].values, float).mean(axis=0)

    @property
    def _unit(self) -> float:
        return _unit_of(self.subsets["mask"].values)

    @property
    def _masks(self) -> Float[np.ndarray, "subset train"]:
        return (self.subsets["mask"].values - self._mean[None]) / self._unit

    @property
    def _ratio(self) -> float:
        return self.share / (1.0 - self.share)

    @property
    def _squares(self) -> Float[np.ndarray, " query"]:
        y = self._outcomes
        return np.einsum("sq,st,tq->q", y, self.corrected, y)

    def _interval(
        self,
        mean: Float[np.ndarray, "subset query"],
        scale: Float[np.ndarray, "subset query"],
        df: int,
        probability: float,
        names: np.ndarray,
    ) -> xr.Dataset:
        reach = student_t.ppf((1.0 + unit_interval("probability", probability)) / 2.0, df)
        attrs = {"units": self.subsets["outcome"].attrs["units"], "probability": probability}
        columns = {"mean": mean, "low": mean - reach * scale, "high": mean + reach * scale}
        return xr.Dataset(
            {name: (("subset", "query"), column, attrs) for name, column in columns.items()},
            coords={"subset": names, "query": self.subsets["query"].values},
        )


def fit_datamodel(subsets: xr.Dataset) -> Datamodel:
    """Regress the outcomes of training subsets on which examples were in them.

    Raises:
        Misuse: fewer than four subsets, or subsets that are all the same.

    >>> from bayes_simfluence.data.subsets import subsets_from_arrays
    >>> rng = np.random.default_rng(0)
    >>> masks = rng.integers(0, 2, (40, 5))
    >>> datamodel = fit_datamodel(subsets_from_arrays(masks, masks @ rng.normal(size=(5, 2))))
    >>> datamodel.share > 0.99
    True
    """
    count = subsets.sizes["subset"]
    if count < FEWEST:
        raise Misuse(
            "subsets", got=count, expected=f"at least {FEWEST}", do="train on more subsets"
        )
    mask = np.asarray(subsets["mask"].values, float)
    unit = _unit_of(mask)
    if unit == 0:
        raise Misuse(
            "subsets", got="the same examples in all", expected="subsets that differ",
            do="draw them at random",
        )  # fmt: skip
    centred = (mask - mask.mean(axis=0)[None]) / unit
    kernel = centred @ centred.T
    # An orthonormal basis of the contrasts between subsets, which do not see the constant.
    basis = null_space(np.ones((1, count)))
    values, vectors = np.linalg.eigh(basis.T @ kernel @ basis)
    values = np.maximum(values, 0.0)
    rotated = np.square(vectors.T @ basis.T @ np.asarray(subsets["outcome"].values, float))

    def surprise(log_ratio: float) -> float:
        """Minus twice the log marginal likelihood of all queries, up to a constant."""
        variance = 1.0 + np.exp(log_ratio) * values
        squares = np.maximum((rotated / variance[:, None]).sum(axis=0), np.finfo(float).tiny)
        queries = rotated.shape[1]
        return float((count - 1) * np.log(squares).sum() + queries * np.log(variance).sum())

    # A grid first, since the likelihood may have two humps.
    grid = np.linspace(*LOG_RATIOS, 49)
    best = grid[np.argmin([surprise(log_ratio) for log_ratio in grid])]
    step = grid[1] - grid[0]
    log_ratio = minimize_scalar(surprise, bounds=(best - step, best + step), method="bounded").x
    ratio = float(np.exp(log_ratio))
    inverse = np.linalg.inv(np.eye(count) + ratio * kernel)
    solved = inverse.sum(axis=1)
    corrected = inverse - np.outer(solved, solved) / solved.sum()
    return Datamodel(subsets, ratio / (1.0 + ratio), inverse, corrected)


def _unit_of(mask: np.ndarray) -> float:
    """Scale in which the mean squared distance of the masks from their mean is 1."""
    return float(np.sqrt(np.asarray(mask, float).var(axis=0).sum()))
