"""Simulated runs whose coefficients are known, for tests and for trials."""

import jax
import numpy as np
import xarray as xr

from bayes_simfluence.checks import keyed
from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.data.runs import runs_from_arrays
from bayes_simfluence.posterior.arrays import planned_arrays
from bayes_simfluence.simulators.affine import AffineSimulator


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
    initial = np.broadcast_to(np.linspace(0.5, 1.0, query, dtype=np.float32), (runs, query))
    planned = runs_from_arrays(
        batch=batch,
        loss=np.repeat(initial[:, None], batch.shape[1] + 1, axis=1),
        train_ids=range(train),
    )
    arrays = planned_arrays(planned, planned["train"].values, planned["query"].values)
    simulated = truth.simulate(arrays, key=noise_key, draws=1)
    return planned.assign(loss=planned["loss"].copy(data=simulated.loss[0, 0])), truth
