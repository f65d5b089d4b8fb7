"""Ranks of true values among posterior draws: uniform when the posterior is right.

Kernels of simulation-based calibration (Talts et al. 2018, arXiv 1804.06788) and its test.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy.stats import chi2

from bayes_simfluence.checks import Misuse, shorten, unit_interval

FEWEST = 20
"""Simulations below which a histogram of ranks is not tested."""

MOST_BINS = 10


def rank_among(
    draws: Float[np.ndarray, "draw quantity"],
    truth: Float[np.ndarray, " quantity"],
    *,
    key: jax.Array,
) -> Int[np.ndarray, " quantity"]:
    """Draws below the truth, 0 to the number of draws; ties are broken at random."""
    below = (draws < truth[None]).sum(axis=0)
    ties = (draws == truth[None]).sum(axis=0)
    return below + np.asarray(jax.random.randint(key, below.shape, 0, ties + 1))


def even_bins(draws: int, simulations: int) -> int:
    """Number of bins of equally many ranks: up to ten, with ten simulations in each where possible.

    1 when the number of ranks, ``draws + 1``, cannot be split.

    >>> even_bins(99, 200), even_bins(99, 60), even_bins(100, 200)
    (10, 5, 1)
    """
    most = max(2, min(MOST_BINS, simulations // 10))
    return max(bins for bins in range(1, most + 1) if (draws + 1) % bins == 0)


def rank_counts(
    ranks: Int[np.ndarray, "simulation quantity"], draws: int, bins: int
) -> Int[np.ndarray, "quantity bin"]:
    """Histogram of each quantity's ranks in bins of equally many ranks."""
    place = ranks * bins // (draws + 1)
    return np.stack([np.bincount(bin_of, minlength=bins) for bin_of in place.T])


@dataclass(frozen=True)
class RankTest:
    """Whether ranks are uniform; print it.

    Attributes:
        ok: no quantity's ranks contradict uniformity at the false-alarm rate.
        sentence: the result in words, and how a wrong posterior errs.
        false_alarm: probability that a right posterior fails, over all quantities together.
        p_values: of each quantity, ``(quantity,)``, not corrected for their number.
    """

    ok: bool
    sentence: str
    false_alarm: float
    p_values: xr.DataArray

    def __str__(self) -> str:
        return self.sentence


def rank_histogram_test(ranks: xr.Dataset, *, false_alarm: float = 0.01) -> RankTest:
    """Test whether the ranks of ``sbc`` are uniform, all quantities together.

    Each quantity is tested twice, and the smaller p-value counts double (Bonferroni): by the mean
    and spread of its ranks (Neyman's smooth test with two Legendre polynomials, which sees shifted,
    too narrow and too wide posteriors) and by a chi-square test of its histogram (any other
    shape). Over quantities, which depend on each other, the p-values are corrected by Bonferroni.

    Measured, for 99 draws: since the chi-square distributions are approximate, the false-alarm rate
    of a single quantity is 0.8 to 1.3 times the nominal one. With one wrong quantity among 100 and
    a rate of 1%, an error is detected in this share of cases at 100 / 200 / 400 simulations: draws
    shifted by 0.4 sd .35 / .87 / 1, draws of 0.7 times the right sd .55 / .95 / 1, of 1.5 times
    .50 / .99 / 1.

    What it cannot detect: a posterior that ignores the data and equals the prior has uniform ranks,
    unless a quantity depends on the data, as the log likelihood does (Modrak et al. 2023, arXiv
    2211.02383).

    Args:
        ranks: as made by ``sbc``.
        false_alarm: probability that a right posterior fails.

    Raises:
        Misuse: fewer than 20 simulations.

    >>> draws, simulations = 99, 200
    >>> rank = np.random.default_rng(0).integers(0, draws + 1, (simulations, 3))
    >>> attrs = {"draws": draws, "bins": 10}
    >>> coords = {"quantity": ["a", "b", "c"]}
    >>> ranks = xr.Dataset({"rank": (("simulation", "quantity"), rank, attrs)}, coords)
    >>> rank_histogram_test(ranks).ok
    True
    >>> ranks["rank"][:, 1] = ranks["rank"][:, 1] // 2 + 50
    >>> print(rank_histogram_test(ranks))
    Ranks of 1 of 3 quantities are not uniform over 200 simulations (false-alarm rate 0.01):
    b (the posterior is too low, p 4.2e-42).
    """
    unit_interval("false_alarm", false_alarm)
    rank = ranks["rank"].transpose("simulation", "quantity").values
    simulations, quantities = rank.shape
    if simulations < FEWEST:
        raise Misuse(
            "ranks",
            got=f"{simulations} simulations",
            expected=f"at least {FEWEST}, better 200",
            do="run sbc(simulations=...) with more",
        )
    draws, bins = int(ranks["rank"].attrs["draws"]), int(ranks["rank"].attrs["bins"])
    moments = _moments(rank, draws)
    smooth = chi2.sf(np.square(moments).sum(axis=0), len(moments))
    expected = simulations / bins
    counts = rank_counts(rank, draws, bins)
    shape = chi2.sf((np.square(counts - expected) / expected).sum(axis=1), bins - 1)
    p_values = np.minimum(1.0, 2.0 * np.minimum(smooth, shape))
    wrong = [int(at) for at in np.argsort(p_values) if p_values[at] * quantities < false_alarm]
    names = ranks["quantity"].values
    errors = [f"{names[at]} ({_error_of(moments[:, at])}, p {p_values[at]:.1e})" for at in wrong]
    rate = f"over {simulations} simulations (false-alarm rate {false_alarm:g})"
    sentence = (
        f"Ranks of {len(wrong)} of {quantities} quantities are not uniform {rate}: "
        f"{shorten(errors, 3)}."
        if wrong
        else f"Ranks of {quantities} quantities look uniform {rate}."
    )
    return RankTest(
        ok=not wrong,
        sentence=" ".join([sentence, *_caveats(ranks)]),
        false_alarm=false_alarm,
        p_values=xr.DataArray(p_values, dims="quantity", coords={"quantity": names}),
    )


def _moments(
    rank: Int[np.ndarray, "simulation quantity"], draws: int
) -> Float[np.ndarray, "2 quantity"]:
    """Standardized mean and spread of ranks, each nearly standard normal for uniform ones."""
    every = 2.0 * (np.arange(draws + 1) + 0.5) / (draws + 1) - 1.0
    spread = np.square(every) - np.square(every).mean()
    unit = np.stack([every / every.std(), spread / spread.std()])
    return unit[:, rank].sum(axis=1) / np.sqrt(len(rank))


def _error_of(moments: Float[np.ndarray, "2"]) -> str:
    place, spread = moments
    if max(abs(place), abs(spread)) < 3.0:
        return "the posterior has another shape"
    if abs(place) > abs(spread):
        return f"the posterior is too {'low' if place > 0 else 'high'}"
    return f"the posterior is too {'narrow' if spread > 0 else 'wide'}"


def _caveats(ranks: xr.Dataset) -> list[str]:
    counts: dict[str, Any] = ranks.attrs
    sentences = []
    if counts.get("failed_verdicts"):
        sentences.append(f"{counts['failed_verdicts']} fits asked for attention.")
    if counts.get("short_chains"):
        sentences.append(
            f"In {counts['short_chains']} simulations a chain had fewer effective draws than were "
            "kept, which by itself makes ranks uneven: draw longer chains, or keep fewer draws."
        )
    return sentences
