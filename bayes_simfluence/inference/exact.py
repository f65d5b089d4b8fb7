"""Gaussian posteriors in closed form, hyperparameters learned."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, choice_of, positive_integer
from bayes_simfluence.gaussian.search import (
    CRITERIA,
    TIMES,
    Band,
    Criterion,
    Searched,
    band_of,
    recorded_rows,
    search,
    times_of,
)
from bayes_simfluence.inference.collapsed import collapsed_gaussian, collapsed_regression
from bayes_simfluence.inference.evidence import scales_of
from bayes_simfluence.inference.method import FitContext, Fitted, LeftOutRuns
from bayes_simfluence.inference.nuts import NUTS
from bayes_simfluence.inference.regression import Form, coefficients, eigen, moments
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import KINDS, Simfluence
from bayes_simfluence.progress import Progress
from bayes_simfluence.simulators.affine import AffineSimulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator

FEATURELESS = (
    "The recording has no gradient features, which usually costs accuracy: on the SST-2 recording "
    "that ships, with 25 runs fitted, the MSE without them is .00228, with them .00046, about five "
    "times less (docs/results.md). bs.record makes them by default (features=64)."
)
"""What a verdict says of a recording without features."""
ONE_RUN = (
    "One run: scales and hyperparameters are fitted to it, and there is no other to check its band "
    "by. Record more runs."
)
"""What a verdict says of a single run."""
MARGIN = 0.95
"""Left-out runs must be predicted better than their mean by more than luck."""


@dataclass(frozen=True)
class Exact:
    """Gaussian posteriors of coefficients in closed form, hyperparameters learned.

    For the two-timescale model, hyperparameters are shared by all queries and chosen by the log
    score of left-out runs or by marginal likelihood; each query's scale is closed-form and its
    uncertainty is in the band, which left-out runs recalibrate. For the published kinds each
    query's prior scale and noise maximize its marginal likelihood.

    With ``hyperparameters="nuts"`` they are sampled instead, coefficients integrated out
    (collapsed), and coefficients drawn exactly for each draw: the posterior of ``NUTS``, found in a
    few dimensions. Nothing is recalibrated then.

    Attributes:
        hyperparameters: the criterion, or ``nuts``.
        times: times of each run that the two-timescale model conditions on, spread evenly; cost
            grows with the cube of runs x times. When omitted 24; of few runs without gradient
            features as many as make 400 points (50 of 8 runs, 26 of 15), since 24 times would say
            less than there are examples, unless hyperparameters are sampled.
        sampler: settings of the sampling; ``NUTS()`` when omitted.
    """

    hyperparameters: Criterion = "leave-one-run-out"
    times: int | None = None
    sampler: NUTS | None = None

    def __post_init__(self) -> None:
        choice_of("Exact(hyperparameters=...)", self.hyperparameters, CRITERIA)
        if self.times is not None:
            positive_integer("Exact(times=...)", self.times)
        if self.sampler is not None and self.hyperparameters != "nuts":
            raise Misuse(
                "Exact(sampler=...)",
                got=f"a sampler with hyperparameters={self.hyperparameters!r}",
                expected="hyperparameters='nuts'",
                do="pass both or none",
            )

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
        return {"method": "Exact", **asdict(self)}

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """The posterior of ``model`` given ``runs``."""
        key, _, progress = context
        sampler, form = self.sampler or NUTS(), _form_of(model)
        if form is None:
            check_gaussian(runs, model)
            if self.hyperparameters != "nuts":
                return fitted_gaussian(
                    runs, model, self.hyperparameters, self.times, progress=progress
                )
            rows = recorded_rows(np.asarray(runs.known.any(axis=2)), self.times or TIMES)
            return collapsed_gaussian(runs, model, rows, sampler, key=key, progress=progress)
        if self.hyperparameters != "nuts":
            return _regression(runs, form, progress)
        return collapsed_regression(runs, model, form, sampler, key=key, progress=progress)


def fitted_gaussian(
    runs: RunArrays,
    model: Simfluence,
    criterion: Criterion,
    times: int | None,
    *,
    held: Mapping[str, float] | None = None,
    progress: Progress,
) -> Fitted:
    """The posterior of a model with shared scales, hyperparameters by the criterion.

    Args:
        runs: recorded ones.
        model: with Gaussian effects and errors.
        criterion: what hyperparameters maximize.
        times: of each run to condition on; by the number of runs when None.
        held: hyperparameters that keep a value, by name, on the natural scale.
        progress: told of the work.
    """
    largest = runs.largest_step_size
    features = runs.features.where(model.prior.features)
    fitted = runs.in_units(runs.steps, largest)._replace(features=features)
    known = fitted.known_steps
    rows = recorded_rows(known, times_of(times, len(known), features=features.train.shape[1] > 0))
    searched = search(model, fitted, rows, criterion, progress, held)
    band = band_of(model, fitted, rows, searched.free)
    simulator = GaussianSimulator(
        model=model,
        free=searched.free,
        fitted=fitted,
        rows=rows,
        largest_step_size=largest,
        scale=band.scale,
        log_inflation=band.log_inflation,
        df=band.df,
        loadings=band.loadings,
        trust=band.trust,
    )
    left_out = LeftOutRuns(rows + 1, band.predicted, band.low, band.high)
    return Fitted(simulator, _verdict(runs, rows, searched, band, simulator), left_out)


def _form_of(model: Simfluence) -> Form | None:
    """The regression that a model is; None for one with shared scales."""
    if not model.per_query:
        return None
    if model != KINDS[model.kind]():
        raise Misuse(
            "Exact: the model",
            got=f"scales='per-query' with other parts than those of Simfluence.{model.kind}()",
            expected=f"Simfluence.{model.kind}(), or scales='shared' with those parts",
            do="fit it with NUTS() or SVI(), which take every model",
        )
    form: Any = model.kind
    return Form(form, 1.0, False)


def check_gaussian(runs: RunArrays, model: Simfluence) -> None:
    """Raise unless effects and error are Gaussian and all queries share one covariance."""
    error, prior = model.error, model.prior
    wrong = {
        f"error={error!r}": not error.gaussian or error.follows_loss,
        f"prior={prior!r}": not prior.gaussian or prior.pooled,
        f"terms={model.terms!r}": model.has_multiplicative,
    }
    for what, bad in wrong.items():
        if bad:
            raise Misuse(
                "Exact: the model",
                got=what,
                expected="Gaussian effects and errors that do not follow the loss: priors.Normal "
                "or priors.Features without pooling, noise.Smooth, AR1 or Gaussian",
                do="fit it with NUTS() or SVI(), which take every model",
            )
    # All queries share one covariance.
    other = (runs.known != runs.known[..., :1]).any(axis=(0, 1))
    if other.any():
        raise Misuse(
            "runs['loss']",
            got=f"{other.sum()} queries recorded at other times than the first one",
            expected="each run's losses of all queries recorded at the same times",
            do="fit with method=NUTS() or SVI(), or fit such queries apart with runs.isel(query=)",
        )


def _verdict(
    runs: RunArrays, rows: np.ndarray, searched: Searched, band: Band, simulator: GaussianSimulator
) -> Verdict:
    truth = runs.loss[:, 1:][:, rows]
    known = np.isfinite(truth)
    mse = float(np.square(band.predicted - truth).mean(where=known))
    mse_of_mean = _mse_of_mean(truth - runs.loss[:, :1])
    covered = float(((truth >= band.low) & (truth <= band.high)).mean(where=known))
    ends = np.array([rows[0] + 1, rows[-1] + 1]) / runs.steps
    inflated = np.exp(0.5 * simulator.log_variance_inflation(ends))
    numbers = {
        "left_out_score": searched.score,
        "iterations": float(searched.iterations),
        "left_out_mse": mse,
        "left_out_mse_of_mean_trajectory": mse_of_mean,
        "left_out_coverage_90": covered,
        "left_out_coverage_90_before_recalibration": band.raw_coverage,
    }
    notes = [
        f"90% bands cover {covered:.0%} of left-out points after recalibration "
        f"({band.raw_coverage:.0%} before): sd x {inflated[0]:.2f} early, "
        f"x {inflated[1]:.2f} at the end."
    ]
    if len(truth) == 1:
        notes = []
    elif len(truth) < 8:
        notes.append(
            f"{len(truth)} runs tell little of the error's scale: the band is wide for it."
        )
    if simulator.model.prior.features and not runs.features.train.shape[1]:
        notes.append(FEATURELESS)
    if not searched.converged:
        return Verdict(
            False,
            "The search for hyperparameters stopped early: check the losses for jumps, "
            "or fit Exact(hyperparameters='evidence').",
            tuple(notes),
            numbers,
        )
    if len(truth) == 1:
        return Verdict(False, ONE_RUN, tuple(notes), numbers)
    compared = f"MSE of left-out runs {mse:.2g}, of the mean trajectory {mse_of_mean:.2g}"
    if mse >= MARGIN * mse_of_mean:
        return Verdict(
            False,
            f"Curricula explain nothing yet ({compared}): record more runs, or lower the "
            "learning rate if training is chaotic.",
            tuple(notes),
            numbers,
        )
    return Verdict(True, f"Left-out runs are predicted ({compared}).", tuple(notes), numbers)


def _mse_of_mean(change: Float[np.ndarray, "run row query"]) -> float:
    """Left-out MSE of the other runs' mean change, times the best factor in [0, 1].

    Without the factor a few noisy runs would make a rival that anything beats.
    """
    known = np.isfinite(change)
    change = np.where(known, change, 0.0)
    count = np.maximum(known.sum(axis=0, keepdims=True) - 1, 1)
    others = np.where(known, (change.sum(axis=0, keepdims=True) - change) / count, 0.0)
    factor = (others * change).sum() / max(np.square(others).sum(), np.finfo(float).tiny)
    return float(np.square(np.clip(factor, 0.0, 1.0) * others - change).mean(where=known))


def _regression(runs: RunArrays, form: Form, progress: Progress) -> Fitted:
    with progress.work("regression", 2) as meter:
        sums = moments(runs, form, scaled=True)
        solved = eigen(sums)
        meter.advance()
        scales = [
            scales_of(values, cross, square, sums.rows)
            for values, cross, square in zip(solved.values, solved.cross, sums.square, strict=True)
        ]
        ratio = np.array([scale.ratio for scale in scales])[:, None]
        noise = np.array([scale.noise for scale in scales])
        shrunk = solved.values + ratio
        mean = np.einsum("qcv,qv->qc", solved.vectors, solved.cross / shrunk) / sums.unit
        sd = noise[:, None] / np.sqrt(shrunk)
        factor = solved.vectors * sd[:, None, :] / sums.unit[:, :, None]
        meter.advance()
    a, b = coefficients(mean, form)
    zero = np.zeros_like(factor) if form.kind != "linear" else factor[:, :0]
    blocks = {"linear": (factor,), "additive": (zero, factor), "multiplicative": (factor, zero)}
    whole = np.concatenate(blocks[form.kind], axis=1, dtype=np.float32)
    simulator = AffineSimulator(a, b, factor=whole, noise=noise)
    still = int((sums.square <= 1e-12 * sums.rows).sum())
    return Fitted(
        simulator,
        Verdict(
            ok=still == 0,
            sentence=f"{still} queries never change their loss: leave them out."
            if still
            else "Scales by marginal likelihood, one prior scale and one noise per query.",
            notes=(
                "White one-step noise makes bands too narrow along a run (docs/results.md); "
                "Simfluence() models the error of a run.",
            ),
            numbers={"log_evidence": float(sum(scale.log_evidence for scale in scales))},
        ),
    )
