"""TracIn and Grad-Dot of MiniLM with a head against PyTorch: dattri, and a loop of ``backward``.

dattri asks for packages that pull a GPU build of PyTorch; beside ``torch==2.13.0`` it is installed
by ``python -m pip install --no-deps dattri==0.3.0``.
"""

import dataclasses
import importlib
import importlib.util

import jax
import numpy as np
import pytest

from bayes_simfluence.attribution.tracin import grad_dot, tracin
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors

# Without the extra [parity] these tests are not chosen; chosen without it, they fail.
torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
pytestmark = pytest.mark.parity

TRAIN, QUERY, TOKENS = 4, 2, 10


@pytest.fixture(scope="module")
def task(minilm_task):
    """Few words, so that texts have some in common."""
    return minilm_task(TRAIN, QUERY, tokens=TOKENS, words=30)


@pytest.fixture(scope="module")
def checkpoints(task):
    """The initial weights, and others near them."""
    moved = jax.tree.map(lambda leaf: leaf * 1.01, task.params)
    places = zip((task.params, moved), (2e-5, 1e-5), strict=True)
    return [
        SavedWeights(at, rate, named_tensors(weights))
        for at, (weights, rate) in enumerate(places, 1)
    ]


@pytest.fixture(scope="module")
def model(task, minilm_torch):
    return minilm_torch(task)


def states(checkpoints):
    """The checkpoints' tensors under the names of ``model``."""
    head = "classifier."
    return [
        {
            name if name.startswith(head) else f"encoder.{name}": torch.tensor(value)
            for name, value in saved.tensors.items()
        }
        for saved in checkpoints
    ]


def tensors(examples):
    return tuple(
        torch.tensor(np.asarray(examples[name])).to(dtype)
        for name, dtype in (
            ("tokens", torch.long),
            ("attended", torch.float32),
            ("label", torch.long),
        )
    )


def same(scores, theirs):
    """Within 1e-3 of each number, or of the size of all where numbers cancel."""
    np.testing.assert_allclose(scores, -theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).mean())


def test_scores_are_those_of_a_loop_of_backward(task, checkpoints, model):
    def rows(examples, count):
        tokens, attended, label = tensors(examples)
        gradients = []
        for at in range(count):
            model.zero_grad()
            logits = model(tokens[at : at + 1], attended[at : at + 1])
            torch.nn.functional.cross_entropy(logits, label[at : at + 1]).backward()
            gradients.append(torch.cat([value.grad.ravel() for value in model.parameters()]))
        return torch.stack(gradients)

    total = np.zeros((TRAIN, QUERY))
    for saved, state in zip(checkpoints, states(checkpoints), strict=True):
        model.load_state_dict(state, strict=False)
        dots = (rows(task.train, TRAIN) @ rows(task.query, QUERY).T).numpy().astype(float)
        if saved.step == 1:
            same(grad_dot(task), dots)
        total += saved.step_size * dots
    same(tracin(task, checkpoints), total)


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_dattri(task, checkpoints, model):
    """Few examples: it cuts the weights out of one long vector, and each gradient takes seconds."""
    pytest.importorskip("dattri", reason="python -m pip install --no-deps dattri==0.3.0")
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(weights, data):
        tokens, attended, label = (column[None] for column in data)
        logits = torch.func.functional_call(model, weights, (tokens, attended))
        return torch.nn.functional.cross_entropy(logits, label)

    def load(model, state):
        model.load_state_dict(state, strict=False)
        return model

    some = (
        jax.tree.map(lambda leaf: leaf[:2], task.train),
        jax.tree.map(lambda leaf: leaf[:1], task.query),
    )
    few = dataclasses.replace(task, train=some[0], query=some[1], train_ids="ab", query_ids="q")
    theirs = AttributionTask(loss, model, states(checkpoints[:1]), checkpoints_load_func=load)
    attributor = TracInAttributor(theirs, torch.tensor([1.0]), normalized_grad=False)
    # Whole gradients; dattri projects them unless told otherwise here.
    attributor.projector_kwargs = None
    loaders = [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors(part)), batch_size=2)
        for part in some
    ]
    scores = attributor.attribute(*loaders).detach().numpy().astype(float)
    same(grad_dot(few), scores)
    same(tracin(few, checkpoints[:1]), checkpoints[0].step_size * scores)
