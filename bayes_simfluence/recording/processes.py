"""Several processes of one ``jax.distributed`` job: who makes the store, who records which runs.

Each process computes on its own devices alone. Only the making of the store and the end of the
recording are common.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from bayes_simfluence.checks import Misuse, WorkFailed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those that record together."""

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls, distributed: bool | None) -> "Processes":
        """This process in its ``jax.distributed`` job, alone when ``distributed`` is False.

        Raises:
            Misuse: several are wanted and ``jax.distributed`` is not initialized.
        """
        if distributed is False:
            return cls()
        if distributed and not jax.distributed.is_initialized():
            raise Misuse(
                "distributed",
                got="a process that belongs to no jax.distributed job",
                expected="one of several processes of a jax.distributed job",
                do="call jax.distributed.initialize() before anything else of JAX",
            )
        return cls(jax.process_index(), jax.process_count())

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of ``items``; over all processes, each item once."""
        return list(items[self.number :: self.count])

    def once(self, work: Callable[[], None]) -> None:
        """``work`` done by process 0 while the others wait.

        Raises:
            WorkFailed: it failed there; process 0 raises what went wrong.
        """
        if self.count == 1:
            return work()
        from jax.experimental import multihost_utils

        failed: BaseException | None = None
        if self.number == 0:
            try:
                work()
            except BaseException as error:
                failed = error
        went_well = multihost_utils.broadcast_one_to_all(jnp.asarray(failed is None))
        if failed is not None:
            raise failed
        if not went_well:
            raise WorkFailed("process 0 could not make the store; its own error says why")

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("bayes_simfluence record")


def join_processes(job: str) -> None:
    """Make this process one of a ``jax.distributed`` job.

    Args:
        job: ``auto``, where JAX can ask SLURM, Open MPI or Kubernetes, or
            ``HOST:PORT,PROCESSES,NUMBER``: the address of process 0, the number of processes, and
            the number of this one, from 0.

    Raises:
        Misuse: neither, or JAX finds no such job.
    """
    parts = job.split(",")
    try:
        if job == "auto":
            jax.distributed.initialize()
        else:
            address, count, number = parts[0], *map(int, parts[1:])
            jax.distributed.initialize(address, count, number)
    except (ValueError, RuntimeError) as error:
        raise Misuse(
            "distributed",
            got=f"{job!r} ({error})",
            expected="'auto' in a job that JAX knows, or HOST:PORT,PROCESSES,NUMBER",
            do="give all three, as in --distributed localhost:5000,2,0",
        ) from error
