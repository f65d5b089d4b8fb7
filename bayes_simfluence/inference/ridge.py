"""Point estimates of the published recurrence by ridge regression."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, choice_of, positive_integer, positive_number
from bayes_simfluence.inference.method import FitContext, Fitted, LeftOutRuns
from bayes_simfluence.inference.regression import Form, coefficients, moments, ridge_weights
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import KINDS, Simfluence
from bayes_simfluence.simulators.affine import AffineSimulator

PENALTIES = tuple(10.0 ** np.arange(-8.0, 3.01, 0.5))
"""Penalties tried when none is given."""


@dataclass(frozen=True)
class Ridge:
    """Simfluence-Linear by least squares with a penalty on squared coefficients.

    ``paper`` is the published objective (Guu et al. 2023, section 3.2): ``alpha`` and ``beta`` are
    sums of ``A_i`` and ``B_i`` over the batch, both shrunk to zero, so that without data the loss
    drops to zero in one step. ``centred`` is ours: shares of the batch, shrunk to "nothing
    happens" (alpha = 1, beta = 0). The additive form has alpha = 1 in both.

    Attributes:
        objective: which of the two.
        penalty: on the sum of squared coefficients; when None, the one of ``PENALTIES`` with the
            lowest free-running MSE on the validation runs, or, without such runs, on left-out runs.
        folds: groups of runs that are left out in turn.
        band: add whole residual paths of left-out runs, resampled, as predictive noise.
    """

    objective: Literal["paper", "centred"] = "paper"
    penalty: float | None = None
    folds: int = 5
    band: bool = False

    def __post_init__(self) -> None:
        choice_of("Ridge(objective=...)", self.objective, ["paper", "centred"])
        positive_integer("Ridge(folds=...)", self.folds)
        if self.penalty is not None:
            positive_number("Ridge(penalty=...)", self.penalty)

    def default_model(self) -> Simfluence:
        """The published linear form."""
        return Simfluence.linear()

    def as_dict(self) -> dict[str, Any]:
        """Name and settings."""
        return {"method": "Ridge", **asdict(self)}

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """One chain, one draw: the minimum of the objective."""
        key, validation, progress = context
        form = self._form(model)
        by_folds = self.penalty is None and validation is None
        penalties = PENALTIES if self.penalty is None else (self.penalty,)
        folds = _folds(len(runs.batch), self.folds) if by_folds or self.band else []
        with progress.work("ridge", len(folds) + 1) as meter:
            weights = ridge_weights(moments(runs, form, scaled=False), penalties)
            meter.advance()
            if self.penalty is None and validation is not None:
                best = _best(_simulated(weights, form, validation, key), validation)
                penalties, weights = penalties[best : best + 1], weights[best : best + 1]
            left_out = np.zeros((len(penalties), *runs.loss.shape))
            for fold in folds:
                rest = np.setdiff1d(np.arange(len(runs.batch)), fold)
                without = ridge_weights(moments(runs.take(rest), form, scaled=False), penalties)
                left_out[:, fold] = _simulated(without, form, runs.take(fold), key)
                meter.advance()
        best = _best(left_out, runs) if by_folds else 0
        penalty = penalties[best]
        predicted = left_out[best] if folds else None
        residual = runs.loss - predicted if self.band and predicted is not None else None
        simulator = _simulator(weights[best], form, residual)
        return Fitted(
            simulator,
            _verdict(penalty, given=self.penalty is not None),
            None if predicted is None else LeftOutRuns(np.arange(runs.loss.shape[1]), predicted),
            has_prior=False,
        )

    def _form(self, model: Simfluence) -> Form:
        if model.kind == "two-timescale":
            raise Misuse(
                "Ridge: the model",
                got="scales='shared', a model that has no least-squares form",
                expected="Simfluence.linear(), .additive() or .multiplicative()",
                do="fit one of them, or fit with method=Exact()",
            )
        if model != KINDS[model.kind]():
            raise Misuse(
                "Ridge: the model",
                got=f"other parts than those of Simfluence.{model.kind}()",
                expected=f"Simfluence.{model.kind}(): least squares know no other prior, error or "
                "exposure",
                do="fit it with NUTS() or SVI(), which take every model",
            )
        paper = self.objective == "paper"
        return Form(model.kind, 1.0 if model.kind == "additive" or not paper else 0.0, paper)


def _folds(runs: int, folds: int) -> list[np.ndarray]:
    if runs < 2:
        raise Misuse(
            "runs",
            got="one run",
            expected="at least two, to leave runs out in turn",
            do="record more runs, pass validation=..., or Ridge(penalty=...) without a band",
        )
    count = min(folds, runs)
    return [np.arange(start, runs, count) for start in range(count)]


def _simulator(
    weights: Float[np.ndarray, "query column"], form: Form, residual: np.ndarray | None = None
) -> AffineSimulator:
    a, b = coefficients(weights, form)
    return AffineSimulator(a, b, residual=residual, keep=form.keep, count=form.counted)


def _simulated(
    weights: Float[np.ndarray, "penalty query column"], form: Form, runs: RunArrays, key: jax.Array
) -> Float[np.ndarray, "penalty run time query"]:
    simulated = (_simulator(row, form).simulate(runs, key=key, draws=1) for row in weights)
    return np.stack([losses.mean_loss[0, 0] for losses in simulated])


def _best(simulated: Float[np.ndarray, "penalty run time query"], runs: RunArrays) -> int:
    """Position of the lowest free-running MSE; a simulation that blows up counts as infinite."""
    known = np.isfinite(runs.loss)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.square(simulated[:, known] - runs.loss[known][None]).mean(axis=1)
    return int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))


def _verdict(penalty: float, *, given: bool) -> Verdict:
    numbers = {"penalty": penalty}
    if not given and penalty == PENALTIES[-1]:
        return Verdict(
            ok=False,
            sentence=f"The best penalty, {penalty:g}, is the largest tried, so that curricula "
            "explain next to nothing: record more runs.",
            numbers=numbers,
        )
    if not given and penalty == PENALTIES[0]:
        sentence = f"Point estimate at penalty {penalty:g}, the smallest tried: the runs need none."
        return Verdict(ok=True, sentence=sentence, numbers=numbers)
    return Verdict(ok=True, sentence=f"Point estimate at penalty {penalty:g}.", numbers=numbers)
