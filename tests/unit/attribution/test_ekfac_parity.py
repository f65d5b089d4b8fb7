"""EK-FAC against the implementation of its authors (kronfluence), same weights, same slopes.

A classifier of two classes has one direction of slopes, ``sqrt(p0 p1) (1, -1)``, so nothing is
random on either side. It installs by the command in docs/testing.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.influence.influence import EKFAC, influence
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


def theirs(task, folder):
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as KronfluenceTask
    from torch.nn.functional import cross_entropy

    class Classifier(KronfluenceTask):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            if not sample:
                return cross_entropy(logits, batch[1], reduction="sum")
            shares = logits.detach().softmax(-1)
            return (shares.prod(-1).sqrt() * (logits[:, 0] - logits[:, 1])).sum()

        def compute_measurement(self, batch, model):
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    layers = [torch.nn.Linear(*SIZES[name]) for name in SIZES]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    weights = {name: torch.tensor(np.asarray(one)) for name, one in task.params.items()}
    model.load_state_dict(weights)
    train, query = (
        torch.utils.data.TensorDataset(
            torch.tensor(np.asarray(some["x"])), torch.tensor(np.asarray(some["y"])).long()
        )
        for some in (task.train, task.query)
    )
    chosen = Classifier()
    analyzer = Analyzer(
        "mlp",
        prepare_model(model, chosen),
        chosen,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(folder),
    )
    analyzer.fit_all_factors("factors", train, 20, factor_args=FactorArguments("ekfac"))
    analyzer.compute_pairwise_scores(
        "scores", "factors", query, train, QUERY, 20, score_args=ScoreArguments(DAMPING)
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].T.numpy()


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_scores_are_those_of_kronfluence(rng, key, tmp_path):
    """They are products without the sign and the number of examples."""
    pytest.importorskip("kronfluence", reason="needs the command in docs/testing.md")
    task = made(rng)
    found = influence(task, solver=EKFAC(), damping=DAMPING, key=key)
    expected = theirs(task, tmp_path)
    np.testing.assert_allclose(-TRAIN * found, expected, atol=2e-3 * np.abs(expected).max())
