"""The Bayesian datamodel: against the dense posterior, and calibrated on known and real truth."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm
from scipy.stats import t as student_t

from bayes_simfluence.attribution.datamodel import fit_datamodel
from bayes_simfluence.checks import Misuse
from bayes_simfluence.data.subsets import subsets_from_arrays
from bayes_simfluence.evaluation.lds import linear_datamodeling_score, predicted_outcomes

ROOT = Path(__file__).parents[3]
SUBSETS, TRAIN, QUERY = 60, 20, 40


def drawn(rng, noise=1.0, subsets=SUBSETS):
    """Outcomes of random halves under effects of unit size, and these effects."""
    mask = np.zeros((subsets, TRAIN))
    for row in mask:
        row[rng.choice(TRAIN, TRAIN // 2, replace=False)] = 1
    theta = rng.normal(size=(TRAIN, QUERY)) * np.linspace(0.1, 10, QUERY)
    sd = noise * np.linspace(0.1, 10, QUERY)
    outcome = 5.0 + mask @ theta + sd * rng.normal(size=(subsets, QUERY))
    return subsets_from_arrays(mask, outcome), theta


def covered(band, truth):
    return float(((truth >= band["low"]) & (truth <= band["high"])).mean())


def test_it_is_the_dense_posterior_of_its_share(rng):
    subsets, _ = drawn(rng)
    datamodel = fit_datamodel(subsets.isel(subset=slice(0, 50)))
    mask = datamodel.subsets["mask"].values.astype(float)
    unit = np.sqrt(mask.var(axis=0).sum())
    ratio = datamodel.share / (1 - datamodel.share) / unit**2
    # Primal: regression on constant and examples, in s^2 = 1, with a flat constant.
    design = np.concatenate([np.ones((50, 1)), mask], axis=1)
    precision = design.T @ design + np.diag([0.0, *np.full(TRAIN, 1 / ratio)])
    y = datamodel.subsets["outcome"].values
    weights = np.linalg.solve(precision, design.T @ y)
    np.testing.assert_allclose(datamodel.scores().values, weights[1:], rtol=1e-6, atol=1e-9)
    new = subsets.isel(subset=slice(50, None))
    rows = np.concatenate([np.ones((10, 1)), new["mask"].values.astype(float)], axis=1)
    band = datamodel.predict(new["mask"])
    np.testing.assert_allclose(band["mean"], rows @ weights, rtol=1e-6)
    squares = (y * (y - design @ weights)).sum(axis=0)
    variance = 1 + np.einsum("mi,ij,mj->m", rows, np.linalg.inv(precision), rows)
    reach = student_t.ppf(0.95, 49) * np.sqrt(variance[:, None] * squares[None] / 49)
    np.testing.assert_allclose(band["high"] - band["mean"], reach, rtol=1e-6)
    shuffled = new["mask"].isel(train=rng.permutation(TRAIN))
    xr.testing.assert_allclose(datamodel.predict(shuffled), band)


def test_left_out_is_a_fit_without_it(rng):
    subsets, _ = drawn(rng, subsets=12)
    datamodel = fit_datamodel(subsets)
    out = datamodel.left_out()
    rest = subsets.isel(subset=slice(1, None))
    # The same share of variance per inner product, though the unit of masks is another.
    unit, other = (np.sqrt(part["mask"].values.var(axis=0).sum()) for part in (subsets, rest))
    ratio = datamodel.share / (1 - datamodel.share) * other**2 / unit**2
    mask = rest["mask"].values.astype(float)
    centred = (mask - mask.mean(axis=0)) / other
    inverse = np.linalg.inv(np.eye(11) + ratio * centred @ centred.T)
    solved = inverse.sum(axis=1)
    corrected = inverse - np.outer(solved, solved) / solved.sum()
    again = type(datamodel)(rest, ratio / (1 + ratio), inverse, corrected)
    alone = again.predict(subsets["mask"].isel(subset=[0]))
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(out[name][0], alone[name][0], rtol=1e-6)


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_intervals_cover_a_known_truth(rng, key, noise):
    """Over 100 seeds the share that is covered has a mean of .900 and an sd of .009: five of these
    are allowed, a false alarm in a million."""
    subsets, theta = drawn(rng, noise, subsets=2 * SUBSETS)
    fitted, new = (subsets.isel(subset=part) for part in (slice(0, SUBSETS), slice(SUBSETS, None)))
    datamodel = fit_datamodel(fitted)
    band = datamodel.predict(new["mask"])
    assert abs(covered(band, new["outcome"]) - 0.90) < 0.048
    assert abs(covered(datamodel.left_out(), fitted["outcome"]) - 0.90) < 0.048
    # The share that was drawn: masks' variance times that of the effects, over that plus noise.
    explained = TRAIN / 4 / (TRAIN / 4 + noise**2)
    assert datamodel.share == pytest.approx(explained, abs=0.12)
    narrow = datamodel.predict(new["mask"], probability=0.5)
    assert abs(covered(narrow, new["outcome"]) - 0.50) < 0.08
    # Bands of another width are told apart.
    half = (band["high"] - band["low"]) / 4
    too_narrow = xr.Dataset({"low": band["mean"] - half, "high": band["mean"] + half})
    expected = 2 * norm.cdf(norm.ppf(0.95) / 2) - 1
    assert abs(covered(too_narrow, new["outcome"]) - expected) < 0.08
    score = linear_datamodeling_score(band["mean"], new["outcome"], key=key)
    assert float(score["lds"]) > (0.9 if noise < 1 else 0.3)
    # Differences between examples are what a half can tell.
    centred = [effects - effects.mean(axis=0) for effects in (datamodel.scores().values, theta)]
    agreement = np.corrcoef(*(effects.ravel() for effects in centred))[0, 1]
    assert agreement > (0.95 if noise < 1 else 0.5)
    again = predicted_outcomes(datamodel.scores(), new["mask"])
    same = linear_datamodeling_score(again, new["outcome"], key=key)
    assert float(same["lds"]) == pytest.approx(float(score["lds"]), abs=1e-9)


def test_masks_that_explain_nothing_get_no_share(rng):
    subsets, _ = drawn(rng)
    noise = rng.normal(size=(SUBSETS, QUERY))
    nothing = subsets.assign(outcome=subsets["outcome"].copy(data=noise))
    datamodel = fit_datamodel(nothing)
    assert datamodel.share < 0.05
    assert abs(covered(datamodel.left_out(), nothing["outcome"]) - 0.90) < 0.048


def test_misuse_is_named(rng):
    subsets, _ = drawn(rng)
    with pytest.raises(Misuse, match="subsets: got 3; expected at least 4"):
        fit_datamodel(subsets.isel(subset=slice(0, 3)))
    with pytest.raises(Misuse, match="the same examples in all"):
        fit_datamodel(subsets.isel(subset=[0] * 5))
    with pytest.raises(Misuse, match="examples of the mask: got unknown ids"):
        fit_datamodel(subsets.isel(train=slice(0, 5))).predict(subsets["mask"].isel(train=[7]))


def test_retraining_of_gpt2_is_predicted_with_calibrated_intervals():
    """Public ground truth: 100 halves of WikiText-2; ten folds of ten are predicted by the rest."""
    shared = Path(os.environ.get("BAYES_SIMFLUENCE_DATA", ROOT.parent / "shared" / "data"))
    path = shared / "kronfluence_lds" / "wikitext" / "lds.npz"
    if not path.is_file():
        pytest.skip(f"no {path}: set BAYES_SIMFLUENCE_DATA to a folder with it")
    with np.load(path, allow_pickle=False) as held:
        subsets = subsets_from_arrays(held["masks"], held["losses"])
    inside, means = [], []
    for fold in range(10):
        out = np.arange(fold, 100, 10)
        rest = np.setdiff1d(np.arange(100), out)
        band = fit_datamodel(subsets.isel(subset=rest)).predict(subsets["mask"].isel(subset=out))
        inside.append(covered(band, subsets["outcome"].isel(subset=out)))
        means.append(band["mean"])
    assert 0.87 < np.mean(inside) < 0.93
    predicted = xr.concat(means, dim="subset").sortby("subset")
    score = linear_datamodeling_score(
        predicted, subsets["outcome"], key=jax.random.key(0), resamples=50
    )
    # 100 outcomes tell little of 4656 examples: .042 [.030, .052].
    assert 0.02 < float(score["lds_low"]) < float(score["lds"]) < 0.06
