"""What draws and their sampler say of themselves, and the verdict on it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayes_simfluence.inference.verdict import Verdict

WORST_R_HAT, LEAST_ESS = 1.01, 100
"""Vehtari et al. 2021 ask for R-hat below 1.01 and an ESS of 100 per chain and quantile."""
BAD_R_HAT = 1.05
LOOKED_AT = 200
"""Coefficients whose convergence is measured, drawn evenly from all; hyperparameters always are."""


class SampleStats(NamedTuple):
    """What NUTS says of each draw, in ArviZ's names."""

    diverging: Bool[np.ndarray, "chain draw"]
    acceptance_rate: Float[np.ndarray, "chain draw"]
    n_steps: Int[np.ndarray, "chain draw"]
    energy: Float[np.ndarray, "chain draw"]
    step_size: Float[np.ndarray, "chain draw"]

    @classmethod
    def joined(cls, chains: Sequence["SampleStats"]) -> "SampleStats":
        """Chains side by side."""
        return cls(*(np.concatenate(parts, axis=0) for parts in zip(*chains, strict=True)))

    @classmethod
    def appended(cls, pieces: Sequence["SampleStats"]) -> "SampleStats":
        """Pieces of the same chains, one after another."""
        return cls(*(np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)))

    def thinned(self, thin: int) -> "SampleStats":
        """Every ``thin``-th draw; a divergence in between is kept in sight."""
        chains, draws = self.diverging.shape
        padded = np.zeros((chains, -(-draws // thin) * thin), bool)
        padded[:, :draws] = self.diverging
        diverging = np.asarray(padded.reshape(chains, -1, thin).any(axis=2))
        return SampleStats(diverging, *(statistic[:, ::thin] for statistic in self[1:]))

    def dataset(self) -> xr.Dataset:
        """As ArviZ's group ``sample_stats``."""
        named = {name: (("chain", "draw"), statistic) for name, statistic in self._asdict().items()}
        depth = np.ceil(np.log2(np.maximum(self.n_steps, 1) + 1)).astype(int)
        named["tree_depth"] = (("chain", "draw"), depth)
        chains, draws = self.diverging.shape
        return xr.Dataset(named, {"chain": np.arange(chains), "draw": np.arange(draws)})


def convergence(sites: Mapping[str, Float[np.ndarray, "chain draw *shape"]]) -> dict[str, float]:
    """Worst R-hat and smallest bulk and tail ESS over hyperparameters and some coefficients."""
    import arviz as az

    picked = {}
    for name, value in sites.items():
        flat = value.reshape(*value.shape[:2], -1).astype(float)
        many = flat.shape[2] > LOOKED_AT
        at = np.linspace(0, flat.shape[2] - 1, min(LOOKED_AT, flat.shape[2])).astype(int)
        flat = flat[:, :, np.unique(at)] if many else flat
        picked[name] = (("chain", "draw", f"{name}_at"), flat)
    whole = xr.Dataset(picked)
    if min(whole.sizes["chain"] * whole.sizes["draw"] // 2, whole.sizes["draw"]) < 4:
        return {}

    def worst(statistics: xr.Dataset, reduce: str) -> float:
        values = np.concatenate(
            [np.ravel(statistic.values) for statistic in statistics.data_vars.values()]
        )
        known = values[~np.isnan(values)]
        return float(getattr(np, reduce)(known)) if len(known) else float("nan")

    # Chains that never move have no variance to divide by.
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = {
            "ess_bulk": worst(az.ess(whole, method="bulk"), "min"),
            "ess_tail": worst(az.ess(whole, method="tail"), "min"),
        }
        if whole.sizes["chain"] > 1:
            numbers["r_hat"] = worst(az.rhat(whole), "max")
    return numbers


def sampler_verdict(
    sites: Mapping[str, Float[np.ndarray, "chain draw *shape"]], stats: SampleStats, thin: int
) -> Verdict:
    """What to do about a sampled posterior, or that nothing needs doing."""
    numbers = convergence(sites)
    chains, draws = stats.diverging.shape
    diverged = int(stats.diverging.sum())
    longest = int(stats.n_steps.max())
    # Chains in which no site ever changed.
    moved = [np.ptp(value, axis=1).reshape(len(value), -1).any(axis=1) for value in sites.values()]
    still = np.flatnonzero(~np.any(moved, axis=0)).tolist()
    numbers.update(
        divergences=float(diverged),
        acceptance=float(stats.acceptance_rate.mean()),
        steps_per_draw=float(stats.n_steps.mean()),
        longest_trajectory=float(longest),
    )
    notes = []
    if thin > 1:
        notes.append(f"Every {thin}th draw was kept, to stay within memory.")
    if "r_hat" not in numbers:
        notes.append("R-hat needs at least two chains and some draws: convergence is not known.")
    measured = ", ".join(
        f"{label} {numbers[name]:.3g}"
        for name, label in (("r_hat", "worst R-hat"), ("ess_bulk", "smallest bulk ESS"),
                            ("ess_tail", "tail ESS"))
        if name in numbers
    )  # fmt: skip
    bad = _complaint(numbers, still, diverged / (chains * draws), chains)
    if bad:
        return Verdict(
            False, f"{bad} ({measured})." if measured else f"{bad}.", tuple(notes), numbers
        )
    if diverged:
        notes.append(
            f"{diverged} of {chains * draws} draws diverged: a higher target_accept helps."
        )
    sentence = (
        f"{chains} chains agree ({measured})." if measured else f"{draws} draws of {chains} chains."
    )
    return Verdict(True, sentence, tuple(notes), numbers)


def _complaint(
    numbers: Mapping[str, float], still: Sequence[int], diverged: float, chains: int
) -> str:
    if still:
        return (
            f"Chain {', '.join(map(str, still))} never moved: check the losses for values far from "
            "the rest, or start with more warmup"
        )
    if diverged > 0.01:
        return (
            f"{diverged:.1%} of the draws diverged: raise NUTS(target_accept=...) towards 0.99, or "
            "take a prior with lighter tails"
        )
    if numbers.get("r_hat", 1.0) > BAD_R_HAT:
        return "Chains disagree: raise NUTS(warmup=..., draws=...), or take a simpler model"
    least = min(numbers.get("ess_bulk", np.inf), numbers.get("ess_tail", np.inf))
    if least < LEAST_ESS * min(chains, 4) / 4:
        return "Too few independent draws: raise NUTS(draws=...)"
    return ""
