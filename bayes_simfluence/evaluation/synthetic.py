"""Simulated runs whose coefficients are known, for tests and for trials."""

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bayes_simfluence.checks import keyed
from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.data.runs import runs_from_arrays
from bayes_simfluence.simulators.affine import AffineSimulator
from bayes_simfluence.simulators.base import Planned

__all__ = ["linear_runs"]


def linear_runs(
    *,
    key: jax.Array,
    runs: int = 12,
    train: int = 20,
    query: int = 3,
    per_run: int = 12,
    batch_size: int = 2,
    epochs: int = 4,
    sd_a: float = 0.2,
    sd_b: float = 0.1,
    noise: float = 0.01,
) -> tuple[xr.Dataset, AffineSimulator]:
    """Runs of Simfluence-Linear, centred: random coefficients, white noise of each step.

    Args:
        key: decides everything.
        runs, train, query, per_run, batch_size, epochs: sizes.
        sd_a, sd_b: of the coefficients, unitless and nats.
        noise: sd of a step, nats.

    Returns:
        The runs, and the simulator that they came from.

    >>> import jax
    >>> runs, truth = linear_runs(key=jax.random.key(0), runs=2)
    >>> runs.sizes["run"], truth.a.shape
    (2, (3, 20))
    """
    keyed(key)
    a_key, b_key, batch_key, noise_key = jax.random.split(key, 4)
    truth = AffineSimulator(
        a=np.asarray(sd_a * jax.random.normal(a_key, (query, train)), float),
        b=np.asarray(sd_b * jax.random.normal(b_key, (query, train)), float),
        noise=np.full(query, noise),
    )
    batch = np.stack(
        [
            random_subset_epochs(
                train, per_run=per_run, batch_size=batch_size, epochs=epochs, key=run_key
            )
            for run_key in jax.random.split(batch_key, runs)
        ]
    )
    initial = np.asarray(jnp.broadcast_to(jnp.linspace(0.5, 1.0, query)[None], (runs, query)))
    planned = Planned(batch, None, initial.astype(float), np.arange(query))
    simulated = truth.simulate(planned, key=noise_key, draws=1)
    return runs_from_arrays(batch=batch, loss=simulated.loss[0, 0], train_ids=range(train)), truth
