"""The joint program without its data: what is compiled for one recording serves the next."""

from dataclasses import dataclass

import numpy as np

from bayes_simfluence.inference.program import Program
from bayes_simfluence.model.bayesian import Simfluence
from bayes_simfluence.model.joint import Gaps, Observed, joint

__all__ = ["JointProgram"]


@dataclass(frozen=True)
class JointProgram:
    """A NumPyro program of recorded runs that is compared by value, for caches of compiled code.

    Attributes:
        model: what is inferred.
        rows, imputed, filtered: ``Gaps``, as tuples.
        batch: runs in a minibatch; all when None.
    """

    model: Simfluence
    rows: tuple[int, ...]
    imputed: tuple[tuple[int, ...], ...]
    filtered: bool
    batch: int | None = None

    @classmethod
    def of(cls, program: Program, batch: int | None = None) -> "JointProgram":
        """What ``program(batch)`` is apart from its data."""
        gaps = program.gaps
        imputed = tuple(tuple(one) for one in gaps.imputed.tolist())
        return cls(program.model, tuple(gaps.rows.tolist()), imputed, gaps.filtered, batch)

    def __call__(self, observed: Observed) -> None:
        """The sites and the density."""
        imputed = np.array(self.imputed, int).reshape(-1, 3)
        gaps = Gaps(np.array(self.rows, int), imputed, self.filtered)
        joint(self.model, observed, gaps, batch=self.batch)
