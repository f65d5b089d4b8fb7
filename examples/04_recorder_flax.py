"""Recording a training loop of your own: Flax NNX, with ``bs.Recorder`` told of each step.

    python examples/04_recorder_flax.py [--out FOLDER]

Needs Flax (extra ``[examples]``). Writes ``runs.zarr`` to the folder. Under half a minute.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import bayes_simfluence as bs
from bayes_simfluence.data.curriculum import random_subset_epochs

try:
    from flax import nnx
except ImportError:
    print("skipped: this example needs Flax, install the extra [examples]")
    sys.exit(0)

TRAIN, QUERY, RUNS, FITTED = 30, 8, 14, 11


class Network(nnx.Module):
    """One hidden layer, two classes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(2, 16, rngs=rngs)
        self.out = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


def losses_of(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y)


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """One update on the mean loss of a batch."""
    gradient = nnx.grad(lambda network: losses_of(network, x, y).mean())(model)
    optimizer.update(model, gradient)


@nnx.jit
def evaluate(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Every query's loss."""
    return losses_of(model, x, y)


def noisy_rings(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two rings of different radius: places and classes."""
    angle_key, noise_key = jax.random.split(key)
    label = jnp.arange(TRAIN + QUERY) % 2
    angle = jax.random.uniform(angle_key, (TRAIN + QUERY,), maxval=2 * jnp.pi)
    place = (1.0 + label)[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return place + 0.2 * jax.random.normal(noise_key, place.shape), label


def main() -> None:
    """Record some runs of the loop, fit, and compare on the runs left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    store = parser.parse_args().out / "runs.zarr"
    x, y = noisy_rings(jax.random.key(0))
    train, query = (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])
    with bs.Recorder(
        store,
        train_ids=[f"t{i}" for i in range(TRAIN)],
        query_ids=[f"q{i}" for i in range(QUERY)],
        provenance={"model": "Flax NNX, one hidden layer"},
    ) as recorder:
        for run_key in jax.random.split(jax.random.key(1), RUNS):
            curriculum = random_subset_epochs(
                TRAIN, per_run=16, batch_size=4, epochs=6, key=run_key
            )
            model = Network(nnx.Rngs(0))  # every run starts from the same weights
            schedule = optax.linear_schedule(0.02, 0.0, len(curriculum))
            optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
            with recorder.run(initial_loss=evaluate(model, *query)) as run:
                for step, members in enumerate(curriculum):
                    train_step(model, optimizer, train[0][members], train[1][members])
                    run.step(members, evaluate(model, *query), schedule(step))

    runs = bs.open_runs(store)
    fitted, held_out = runs.isel(run=slice(0, FITTED)), runs.isel(run=slice(FITTED, None))
    # The quickest method, for an example; without method= the fit is the default model's.
    methods = {
        "ridge": bs.fit(fitted, method=bs.Ridge(band=True), key=jax.random.key(2)),
        "mean": bs.mean_trajectory(fitted),
    }
    table = bs.compare(methods, held_out, key=jax.random.key(3))
    print(table[["mse", "crps", "coverage_90"]].round(4))


if __name__ == "__main__":
    main()
