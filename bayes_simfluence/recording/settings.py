"""Settings of ``record`` in groups: what is measured and when, and where the work is done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from bayes_simfluence.checks import count_of, positive_integer

Choice = slice | Sequence[int] | Int[np.ndarray, " some"] | None
"""Runs by number, all when ``None``."""

Parallel = int | str
"""A number, or "auto"."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured and saved while a run trains, and how often.

    Attributes:
        evaluate_every: measure the queries after every so many steps, and after the last one.
        scores_every: compute the task's scores after every so many steps; 0 = only before the
            first step and after the last.
        checkpoints: how many times each run saves its weights, for ``open_checkpoints``.
    """

    evaluate_every: int = 1
    scores_every: int = 0
    checkpoints: int = 0

    def validate(self) -> "Evaluation":
        """The settings themselves when each is possible.

        Raises:
            Misuse: the first one that is not.
        """
        positive_integer("evaluate_every", self.evaluate_every)
        count_of("scores_every", self.scores_every)
        count_of("checkpoints", self.checkpoints)
        return self


@dataclass(frozen=True)
class Placement:
    """How the work is laid out over memory, devices and processes.

    Only the last bits of the losses depend on it, by ``parallel``, ``accumulate`` and ``remat``; a
    store keeps these three, and a resumed recording must have the same.

    Attributes:
        parallel: how many runs train at once on each device, by ``vmap`` (memory grows with it);
            ``"auto"`` chooses by memory.
        accumulate: into how many parts a batch is split, whose gradients are added up: less
            memory.
        remat: compute activations again in the backward pass: less memory and more time on a GPU,
            no difference on a CPU, whose compiler undoes it.
        query_chunk: how many queries are measured at once; all when ``None``.
        only: the runs to record here, by number; other processes record the others into the same
            store, each with ``resume``, so that the first of them makes it.
        distributed: whether the processes of ``jax.distributed`` share the runs; ``None`` = where
            there are several.
    """

    parallel: Parallel = 1
    accumulate: int = 1
    remat: bool = False
    query_chunk: int | None = None
    only: Choice = None
    distributed: bool | None = None

    def validate(self) -> "Placement":
        """The settings themselves when each is possible.

        Raises:
            Misuse: the first one that is not.
        """
        if self.parallel != "auto":
            positive_integer("parallel", self.parallel, do="pass a whole number or 'auto'")
        positive_integer("accumulate", self.accumulate)
        if self.query_chunk is not None:
            positive_integer("query_chunk", self.query_chunk)
        return self

    @property
    def compiled(self) -> "Placement":
        """What compiled steps depend on, beside the number of runs at once."""
        return replace(self, parallel=1, only=None, distributed=None)

    @property
    def kept(self) -> dict[str, Any]:
        """What a store keeps of it, beside the number of runs at once."""
        return {"accumulate": self.accumulate, "remat": self.remat}
