"""The main way in Python, on a small regression network: record, fit, simulate, compare.

    python examples/01_record_fit_simulate.py [--out FOLDER]

Writes ``runs.zarr``, ``posterior.nc`` and ``curves.png`` to the folder. About half a minute.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bayes_simfluence as bs
from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.progress import Bars
from bayes_simfluence.report.plots import plot_curves, save_figure

TRAIN, QUERY, RUNS, FITTED = 40, 12, 20, 14


def small_task(key: jax.Array) -> bs.Task:
    """A network with one hidden layer learns to tell two noisy half circles apart."""
    place_key, noise_key, *weight_keys = jax.random.split(key, 4)
    angle = jax.random.uniform(place_key, (TRAIN + QUERY,), maxval=jnp.pi)
    label = jnp.arange(TRAIN + QUERY) % 2
    circle = jnp.stack([jnp.cos(angle) + label, jnp.sin(angle) * (1 - 2 * label)], axis=1)
    data = {"x": circle + 0.3 * jax.random.normal(noise_key, circle.shape), "y": label}

    def loss(params: dict[str, jax.Array], example: dict[str, jax.Array]) -> jax.Array:
        hidden = jnp.tanh(params["w"] @ example["x"])
        return -jax.nn.log_softmax(params["v"] @ hidden)[example["y"]]

    return bs.Task(
        params={
            "w": jax.random.normal(weight_keys[0], (16, 2)),
            "v": 0.1 * jax.random.normal(weight_keys[1], (2, 16)),
        },
        loss=loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=[f"t{i}" for i in range(TRAIN)],
        query_ids=[f"q{i}" for i in range(QUERY)],
        provenance={"model": "one hidden layer"},
    )


def main() -> None:
    """Record, fit, simulate and compare; print the verdict and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    out = parser.parse_args().out
    task_key, run_key, fit_key, simulate_key = jax.random.split(jax.random.key(0), 4)
    task = small_task(task_key)
    curricula = np.stack(
        [
            random_subset_epochs(TRAIN, per_run=24, batch_size=4, epochs=6, key=key)
            for key in jax.random.split(run_key, RUNS)
        ]
    )
    schedule = optax.linear_schedule(0.02, 0.0, curricula.shape[1])
    runs = bs.record(
        task,
        curricula,
        optax.inject_hyperparams(optax.adam)(schedule),
        store=out / "runs.zarr",
        placement=bs.Placement(parallel=RUNS),
        progress=Bars(),
    )
    fitted, held_out = runs.isel(run=slice(0, FITTED)), runs.isel(run=slice(FITTED, None))
    posterior = bs.fit(fitted, key=fit_key, progress=Bars())
    ridge = bs.fit(fitted, method=bs.Ridge(band=True), key=fit_key)
    print(posterior.verdict)
    methods = {"bayes": posterior, "ridge": ridge, "mean": bs.mean_trajectory(fitted)}
    table = bs.compare(methods, held_out, key=simulate_key)
    print(table[["mse", "crps", "coverage_90", "final_coverage_90"]].round(4))
    posterior.save(out / "posterior.nc")
    simulated = {"bayes": posterior.simulate(held_out, key=simulate_key)}
    save_figure(plot_curves(simulated, held_out), out / "curves.png")


if __name__ == "__main__":
    main()
