"""EK-FAC against the implementation of its authors (kronfluence), same weights, same slopes.

A classifier of two classes has one direction of slopes, ``sqrt(p0 p1) (1, -1)``, so nothing is
random on either side. It installs by the command in docs/testing.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.influence.influence_functions import EKFAC, influence
from bayes_simfluence.networks.layers import dense
from bayes_simfluence.tasks.task import Task

pytestmark = pytest.mark.parity

SIZES = {"0": (10, 16), "2": (16, 12), "4": (12, 2)}
"""Layers of a ``torch.nn.Sequential`` with tanh between them."""
TRAIN, QUERY, DAMPING = 60, 10, 1e-3


def made(rng):
    data = {
        "x": rng.normal(size=(TRAIN + QUERY, 10)).astype("f4"),
        "y": rng.integers(0, 2, TRAIN + QUERY),
    }
    params = {}
    for name, (inward, outward) in SIZES.items():
        params[f"{name}.weight"] = rng.normal(size=(outward, inward)) / np.sqrt(inward)
        params[f"{name}.bias"] = 0.3 * rng.normal(size=outward)

    def outputs(weights, example):
        hidden = example["x"]
        for name in ("0", "2"):
            hidden = jnp.tanh(dense(weights, name, hidden))
        return dense(weights, "4", hidden)

    def output_loss(logits, example):
        return -jax.nn.log_softmax(logits)[example["y"]]

    return Task(
        params={name: jnp.asarray(one, jnp.float32) for name, one in params.items()},
        loss=lambda weights, example: output_loss(outputs(weights, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train={name: jnp.asarray(one[:TRAIN]) for name, one in data.items()},
        query={name: jnp.asarray(one[TRAIN:]) for name, one in data.items()},
        train_ids=range(TRAIN),
        query_ids=range(QUERY),
    )


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_scores_are_those_of_kronfluence(rng, key, tmp_path, kronfluence_scores):
    """They are products without the sign and the number of examples."""
    pytest.importorskip("kronfluence", reason="needs the command in docs/testing.md")
    import torch

    task = made(rng)
    layers = [torch.nn.Linear(*SIZES[name]) for name in SIZES]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    weights = {name: torch.tensor(np.asarray(value)) for name, value in task.params.items()}
    model.load_state_dict(weights)
    train, query = (
        torch.utils.data.TensorDataset(
            torch.tensor(np.asarray(part["x"])), torch.tensor(np.asarray(part["y"])).long()
        )
        for part in (task.train, task.query)
    )
    expected = kronfluence_scores(
        model,
        train,
        query,
        logits=lambda model, batch: model(batch[0]),
        label=lambda batch: batch[1],
        damping=DAMPING,
        queries=QUERY,
        folder=tmp_path,
    )
    scores = influence(task, solver=EKFAC(), damping=DAMPING, key=key)
    np.testing.assert_allclose(-TRAIN * scores, expected, atol=2e-3 * np.abs(expected).max())
