"""Several simulators as one: every draw is one member's, in shares that were learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.special import softmax

from bayes_simfluence.model.arrays import ExampleFeatures, RunArrays
from bayes_simfluence.simulators.base import RUN_COUNTS_AS, Named, Simulated, Simulator
from bayes_simfluence.simulators.gaussian import GaussianSimulator

OF_MEMBERS = 0x3E3B
"""Mixed into a key: which draw is whose."""


@dataclass(frozen=True)
class PooledSimulator(Simulator):
    """Members that each simulate a share of the draws.

    Attributes:
        members: simulators of the same queries.
        weights: their shares, which sum to one.
    """

    name: ClassVar[str] = "pooled"
    members: tuple[GaussianSimulator, ...]
    weights: Float[np.ndarray, " member"]

    @property
    def coupled(self) -> bool:
        """Whether a member lets examples act by their residuals."""
        return any(member.coupled for member in self.members)

    @property
    def features(self) -> ExampleFeatures:
        """Of the members, which all know the same ones."""
        return self.members[0].features

    @property
    def by_features(self) -> "PooledSimulator | None":
        """Itself, where all members go by features of examples."""
        return self if all(member.by_features for member in self.members) else None

    def with_examples(self, train: Float[np.ndarray, "new feature"]) -> "PooledSimulator":
        """The same posterior with further training examples after the fitted ones."""
        return replace(self, members=tuple(one.with_examples(train) for one in self.members))

    def for_queries(self, query: Float[np.ndarray, "new feature"]) -> "PooledSimulator":
        """The posterior of queries that were never recorded, in the order of their features."""
        return replace(self, members=tuple(one.for_queries(query) for one in self.members))

    def simulate(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Draws of all members, mixed."""
        parts = [
            member.simulate(runs, key=own, draws=made)
            for member, own, made in self._each(key, draws)
        ]
        return Simulated(*(self._mixed(each, key, draws) for each in zip(*parts, strict=True)))

    @property
    def by_observed(self) -> "PooledSimulator | None":
        """Itself, where all members can condition on a run's losses."""
        return self if all(member.by_observed for member in self.members) else None

    def simulate_observed(self, runs: RunArrays, *, key: jax.Array, draws: int) -> Simulated:
        """Draws of all members, each given what ``runs`` have of losses after time 0.

        Shares are the members' own times a power of how likely each makes these losses
        (``shares_given``).
        """
        pool = replace(self, weights=self.shares_given(runs, key=key))
        parts = [
            member.simulate_observed(runs, key=own, draws=made)
            for member, own, made in pool._each(key, draws)
        ]
        return Simulated(*(pool._mixed(each, key, draws) for each in zip(*parts, strict=True)))

    def shares_given(self, runs: RunArrays, *, key: jax.Array) -> Float[np.ndarray, " member"]:
        """The members' shares given the losses that ``runs`` have after time 0.

        Each observed run counts as ``RUN_COUNTS_AS`` points: a run's losses err together, and their
        whole likelihood would leave one member.
        """
        known = runs.known
        tempered = min(1.0, RUN_COUNTS_AS * known.any(axis=(1, 2)).sum() / known.sum())
        log_density = [
            member.log_density_observed(runs, key=jax.random.fold_in(key, at))
            for at, member in enumerate(self.members)
        ]
        with np.errstate(divide="ignore"):
            return softmax(np.log(self.weights) + tempered * np.array(log_density))

    def log_likelihood(
        self, runs: RunArrays, *, key: jax.Array, draws: int
    ) -> Float[np.ndarray, "chain draw run step query"]:
        """Each draw's by its own member; NaN at steps where a member has none."""
        parts = [
            member.log_likelihood(runs, key=own, draws=made)
            for member, own, made in self._each(key, draws)
        ]
        return self._mixed(parts, key, draws)

    def samples(self, *, key: jax.Array, draws: int) -> Named:
        """What all members have, each draw its own member's, and which ``member`` that is."""
        parts = [
            member.samples(key=own, draws=made) for member, own, made in self._each(key, draws)
        ]
        owner = self.owners(key, draws)
        shared = [name for name in parts[0] if all(name in part for part in parts)]
        named = {
            name: (
                parts[0][name][0],
                self._mixed([part[name][1] for part in parts], key, draws),
            )
            for name in shared
        }
        return {"member": (("chain", "draw"), owner[None]), **named}

    def owners(self, key: jax.Array, draws: int) -> Int[np.ndarray, " draw"]:
        """Which member each draw is of: shares as near as counts allow, in an order of the key."""
        exact = self.weights * draws
        counts = np.floor(exact).astype(int)
        most_left = np.argsort(-(exact - counts), kind="stable")
        counts[most_left[: draws - counts.sum()]] += 1
        # By NumPy, since a permutation by JAX compiles a program for each number of draws.
        own = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel() ^ OF_MEMBERS)
        return own.permutation(np.repeat(np.arange(len(counts)), counts))

    def _each(self, key: jax.Array, draws: int) -> list[tuple[GaussianSimulator, jax.Array, int]]:
        """Members with draws, a key of each one's own, and how many draws are to be made.

        As many by each, in quarters of all draws, some of them for nothing: each number is a
        program to compile.
        """
        counts = np.bincount(self.owners(key, draws), minlength=len(self.members))
        quarter = -(-draws // 4)
        made = quarter * -(-int(counts.max()) // quarter)
        return [
            (member, jax.random.fold_in(key, at), made)
            for at, (member, count) in enumerate(zip(self.members, counts, strict=True))
            if count
        ]

    def _mixed(
        self, parts: Sequence[np.ndarray], key: jax.Array, draws: int
    ) -> Shaped[np.ndarray, "chain draw *rest"]:
        """The members' draws in their places among all."""
        owner = self.owners(key, draws)
        counts = [int(count) for count in np.bincount(owner) if count]
        cut = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
        return np.concatenate(cut, axis=1)[:, owner.argsort(kind="stable").argsort()]

    def arrays(self) -> Named:
        """The members' own, with a number before the names of arrays and dimensions."""
        named: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            "weights": (("member",), self.weights)
        }
        for at, member in enumerate(self.members):
            for name, (dims, array) in member.arrays().items():
                named[f"{at}.{name}"] = (tuple(f"{at}.{dim}" for dim in dims), array)
        return named

    def settings(self) -> dict[str, Any]:
        """Those of the members in turn."""
        return {"members": [member.settings() for member in self.members]}

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> "PooledSimulator":
        """From ``arrays()`` and ``settings()``."""
        members = [
            GaussianSimulator.restore(
                {
                    name.removeprefix(f"{at}."): array
                    for name, array in arrays.items()
                    if name.startswith(f"{at}.")
                },
                own,
            )
            for at, own in enumerate(settings["members"])
        ]
        return cls(tuple(members), np.asarray(arrays["weights"]))
